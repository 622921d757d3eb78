"""Writing text with the ragged decoder: the search itself is `transformers`', here is what it needs to drive our decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from madtp_kernels import RaggedBatch

from .layers import QueryGroups
from .pruning import Tokens
from .text import TextDecoder

# What transformers calls the cache of a decoder, in arguments and outputs: releases from 5.24 on, and before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


# The options of `transformers.GenerationConfig` that our decoder serves, as transformers serves them. Every other one would be
# ignored, change what is returned, or (a static cache, a time limit) change the words without anybody's asking: refused by name.
_SEARCH = (
    "bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty", "forced_eos_token_id", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size", "num_beams", "remove_invalid_values",
    "renormalize_logits", "repetition_penalty", "sequence_bias", "suppress_tokens",
)  # fmt: skip
_BEAMS = ("early_stopping", "length_penalty")
_SAMPLING = ("epsilon_cutoff", "eta_cutoff", "min_p", "temperature", "top_k", "top_p", "typical_p")
_SEEDED = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}
OPTIONS = tuple(sorted((*_SEARCH, *_BEAMS, "do_sample", *_SAMPLING)))
"""Options of transformers' `generate` that are served."""

# How many of the most likely words are sampled from where nobody says: the default of transformers.
_TOP_K = 50


def generate(
    decoder: TextDecoder,
    memory: Tokens,
    prompts: Tensor,
    *,
    backend: str | None = None,
    official_lengths: bool = True,
    seeds: Sequence[int] | None = None,
    **options,
) -> list[Tensor]:
    """Continue prompts while looking at encoder states.

    Args:
        decoder: of a captioning or question answering model.
        memory: encoder states ``[S, D]``, one sample per prompt.
        prompts: ``[B, P]`` int64.
        backend: force an implementation of the kernels.
        official_lengths: a beam's log-probability is divided by its length. As in the official code (transformers 4.15) that
            is the number of all its tokens without [SEP]; if False, the number of those after the prompt with [SEP], as in
            transformers of today.
        seeds: B numbers, each for the random numbers of one prompt when sampling, so that it is continued in the same way in
            any batch and on any device; by default torch's global random numbers serve all.
        options: those of `transformers.GenerationConfig` that :data:`OPTIONS` names: num_beams, max_length, min_length,
            do_sample, top_p, ... None stands for an option that is not given.

    Returns:
        One int64 tensor per prompt: what follows it, without [SEP] and padding.

    Raises:
        ValueError: a length beyond the positions of the model, an option that is not served, or one that would have no effect:
            of sampling without do_sample, of beam search without beams, others than temperature, top_k and top_p with seeds.
    """
    config, limit, prompt = decoder.config, decoder.config.max_position_embeddings, prompts.shape[1]
    options = _checked(options)
    if "max_new_tokens" in options and "max_length" in options:
        raise ValueError("max_new_tokens: give either this or max_length, got both")
    name = "max_new_tokens" if "max_new_tokens" in options else "max_length"
    before = prompt if name == "max_new_tokens" else 0
    longest = options.setdefault(name, limit)
    if not prompt - before < longest <= limit - before:
        least = "at least 1" if before else f"more than the prompt's {prompt}"
        raise ValueError(f"{name}: expected {least} and at most {limit - before}, got {longest}")
    if options.get("min_length", 0) > before + longest:
        raise ValueError(
            f"min_length: expected at most the longest text's {before + longest} tokens, got {options['min_length']}"
        )
    processors = None if seeds is None else _sampling(options, seeds, len(prompts))
    settings = GenerationConfig(
        pad_token_id=config.pad_token_id, eos_token_id=config.sep_token_id, bos_token_id=config.dec_token_id, **options
    )
    sequences = _Generator(decoder, memory, backend, official_lengths).generate(
        prompts.contiguous(),
        attention_mask=torch.ones_like(prompts),
        generation_config=settings,
        logits_processor=processors,
    )
    return [row[: _first(row, config.sep_token_id)] for row in sequences[:, prompt:]]


def _checked(options: dict) -> dict:
    """The options that are given; each has an effect."""
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"{name}: no option here; there are {', '.join(OPTIONS)}")
    beams = options.get("num_beams", 1)
    if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
        raise ValueError(f"num_beams: expected a whole number of at least 1, got {beams!r}")
    if options.get("do_sample"):
        options.setdefault("top_k", _TOP_K)
    else:
        for name in _SAMPLING:
            if name in options:
                raise ValueError(f"{name}: only sampling takes it; give do_sample=True, too")
    if options.get("num_beams", 1) == 1:
        for name in _BEAMS:
            if name in options:
                raise ValueError(f"{name}: only beam search takes it; give num_beams, too")
    return options


def _first(row: Tensor, token: int) -> int:
    """Where a token first stands; the length of the row if nowhere."""
    ids = row.tolist()
    return ids.index(token) if token in ids else len(ids)


def _sampling(options: dict, seeds: Sequence[int], prompts: int) -> LogitsProcessorList:
    """Takes the options of sampling out; what is left, greedy search over these processors, is sampling too."""
    if not options.pop("do_sample", False) or options.get("num_beams", 1) != 1 or len(seeds) != prompts:
        raise ValueError(
            f"seeds: expected one for each of {prompts} prompts, and do_sample without beams, got {len(seeds)}"
        )
    for name in _SAMPLING:
        if name in options and name not in _SEEDED:
            raise ValueError(f"{name}: sampling with seeds takes {', '.join(_SEEDED)}")
    given = {name: options.pop(name) for name in _SEEDED if name in options}
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    warpers = [
        warper(given[name]) for name, warper in _SEEDED.items() if given.get(name, neutral[name]) != neutral[name]
    ]
    return LogitsProcessorList([*warpers, _Gumbel(seeds)])


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise to logits ``[B, V]``: then the largest is a sample of their softmax. Each row has its own generator."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        size = scores.shape[1]
        noise = torch.stack([torch.empty(size).exponential_(generator=generator) for generator in self.generators])
        return scores.float() - noise.log().to(scores.device)


class _Generator(PreTrainedModel, GenerationMixin):
    """Our decoder as `transformers` sees it. Lives for one call."""

    config_class = BertConfig

    def __init__(self, decoder: TextDecoder, memory: Tokens, backend: str | None, official_lengths: bool) -> None:
        super().__init__(
            BertConfig(**dataclasses.asdict(decoder.config), is_decoder=True)
        )  # its names of sizes are ours
        self.decoder, self.backend, self.official_lengths = decoder, backend, official_lengths
        self.keys, self.images = decoder.keys(memory), memory.batch_size

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask=None, **inputs) -> dict:
        """Only what the cache does not hold yet goes through the decoder."""
        cache = inputs[CACHE]
        return {"input_ids": input_ids[:, cache.get_seq_length() :], CACHE: cache}

    def forward(self, input_ids: Tensor, **inputs) -> CausalLMOutputWithPast:
        """Logits ``[N, 1, V]`` of what comes after ``input_ids [N, L]``; the N rows are the beams, image by image."""
        rows, new = input_ids.shape
        starts = torch.arange(rows + 1, dtype=torch.int32, device=input_ids.device) * new
        texts = RaggedBatch(input_ids.flatten(), starts, new)
        beams = rows // self.images
        groups = QueryGroups(torch.arange(self.images + 1, device=input_ids.device) * beams, beams)
        states = self.decoder(texts, self.keys, query_groups=groups, cache=inputs[CACHE], backend=self.backend)
        last = states.values.unflatten(0, (rows, new))[:, -1]
        return CausalLMOutputWithPast(logits=self.decoder.logits(last)[:, None], **{CACHE: inputs[CACHE]})

    # Beam search of transformers 4.15 divides by the tokens without [SEP], the prompt among them.

    def _update_finished_beams(self, *, topk_running_sequences, topk_log_probs, cur_len, decoder_prompt_len,
                               length_penalty, **state):  # fmt: skip
        if self.official_lengths:
            # `cur_len + 1` tokens, of which a finished beam's last is [SEP]; one that is cut off at max_length has none.
            cut = topk_running_sequences[:, :, cur_len] != self.decoder.config.sep_token_id
            topk_log_probs = topk_log_probs * (cur_len / (cur_len + cut)) ** length_penalty
            decoder_prompt_len = 1
        return super()._update_finished_beams(
            topk_running_sequences=topk_running_sequences, topk_log_probs=topk_log_probs, cur_len=cur_len,
            decoder_prompt_len=decoder_prompt_len, length_penalty=length_penalty, **state,
        )  # fmt: skip

    def _check_early_stop_heuristic(self, *, decoder_prompt_len, **state):
        return super()._check_early_stop_heuristic(
            decoder_prompt_len=1 if self.official_lengths else decoder_prompt_len, **state
        )
