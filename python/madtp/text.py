"""BERT layers on ragged tokens: encoders with MAG and DTP that may look at images, and a decoder that writes text.

One layer serves all: without cross-attention, with one other modality, or with the two images of BLIP-NLVR; bidirectional or
causal. Parameter names are BLIP's, with fused query/key/value projections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of

from .config import TextConfig
from .guidance import QueryModel
from .layers import CrossAttention, Keys, LayerNorm, Runs, cached_attention, self_attention
from .linear import Linear, mlp
from .pruning import LayerTrace, Pruning, Stream, prune_layer
from .vision import run_blocks

EPS = 1e-12  # BERT's LayerNorm


class TextOutput(NamedTuple):
    """What a text encoder returns."""

    stream: Stream
    """Final hidden states ``[T, D]``; the first of each sample stands for the text."""
    trace: list[LayerTrace]
    """One record per layer."""
    summary: Tensor | None
    """``[B, M, sd_dim]`` alignment summaries summed over the layers; None if not asked for."""


class Embeddings(nn.Module):
    """Word plus position embedding, then LayerNorm. BLIP has no token types."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=EPS)

    def forward(self, input_ids: RaggedBatch, positions: Tensor) -> RaggedBatch:
        """Ids ``[T]`` int64 with their positions ``[T]``, to ``[T, D]``."""
        limit = self.position_embeddings.num_embeddings
        if input_ids.max_seqlen > limit:
            raise ValueError(f"input_ids: a text of {input_ids.max_seqlen} tokens exceeds the model's {limit} positions")
        if input_ids.bound:  # rows beyond the last token have positions as if they belonged to the last text
            positions = positions.clamp(max=limit - 1)
        x = self.word_embeddings(input_ids.values) + self.position_embeddings(positions)
        return input_ids.with_values(self.LayerNorm(x))


class SingleCrossAttention(nn.Module):
    """Words attend to one other modality."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self = CrossAttention(width, config.encoder_width, config.num_attention_heads)
        self.output = nn.Module()
        self.output.dense = Linear(width, width)
        self.output.LayerNorm = LayerNorm(width, eps=EPS)

    def forward(self, x: RaggedBatch, others: Sequence[Stream | Keys], backend: str | None, runs: Runs | None) -> Tensor:
        """``x [T, D]`` and what it looks at, to ``[T, D]``."""
        (other,) = others
        attended = self.self(x, other, backend, runs)
        return self.output.LayerNorm(self.output.dense(attended, residual=x.values, tokens=x), x)


class TwinCrossAttention(nn.Module):
    """Words attend to each of two images; the results are averaged or, in later layers, merged by a linear layer."""

    def __init__(self, config: TextConfig, merges: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self0 = CrossAttention(width, config.encoder_width, config.num_attention_heads)
        self.self1 = CrossAttention(width, config.encoder_width, config.num_attention_heads)
        self.output = nn.Module()
        self.output.dense0 = Linear(width, width)
        self.output.dense1 = Linear(width, width)
        self.output.LayerNorm = LayerNorm(width, eps=EPS)
        self.output.merge_layer = Linear(2 * width, width) if merges else None

    def forward(self, x: RaggedBatch, others: Sequence[Stream | Keys], backend: str | None, runs: Runs | None) -> Tensor:
        """``x [T, D]`` and the tokens of both images of each sample, to ``[T, D]``."""
        left = self.output.dense0(self.self0(x, others[0], backend, runs), tokens=x)
        right = self.output.dense1(self.self1(x, others[1], backend, runs), tokens=x)
        if self.output.merge_layer is None:
            both = (left + right) / 2 + x.values
        else:
            both = self.output.merge_layer(torch.cat([left, right], -1), residual=x.values, tokens=x)
        return self.output.LayerNorm(both, x)


class Layer(nn.Module):
    """Self-attention, pruning, cross-attention with the words that are left, feed-forward; LayerNorm after each sum."""

    def __init__(self, config: TextConfig, crossattention: nn.Module, causal: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.causal = config.num_attention_heads, causal
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        self.attention.self.qkv = Linear(width, 3 * width)
        self.attention.output = nn.Module()
        self.attention.output.dense = Linear(width, width)
        self.attention.output.LayerNorm = LayerNorm(width, eps=EPS)
        self.crossattention = crossattention
        self.intermediate = nn.Module()
        self.intermediate.dense = Linear(width, config.intermediate_size)
        self.output = nn.Module()
        self.output.dense = Linear(config.intermediate_size, width)
        self.output.LayerNorm = LayerNorm(width, eps=EPS)

    def forward(
        self,
        stream: Stream,
        guide: tuple[Tensor, Tensor | None] | None,
        pruning: Pruning,
        layer: int,
        *,
        others: Sequence[Stream | Keys] = (),
        runs: Runs | None = None,
        cache=None,
        visible: Tensor | None = None,
    ) -> tuple[Stream, LayerTrace]:
        """Tokens through the layer. With no ``others`` cross-attention is left out; ``cache`` makes a decoding step of it, for
        which ``visible`` is as in :func:`madtp.layers.cached_attention`."""
        entering = stream.tokens.values
        qkv = self.attention.self.qkv(entering, tokens=stream.tokens).unflatten(-1, (3, self.num_heads, -1))
        if cache is None:
            attended = self_attention(qkv, stream, pruning, causal=self.causal)
        else:
            attended = cached_attention(qkv, stream.tokens.batch_size, cache, layer, visible)
        summed = self.attention.output.dense(attended.out, residual=entering, tokens=stream.tokens)
        stream = stream.with_values(self.attention.output.LayerNorm(summed, stream.tokens))
        if pruning.active:
            before = stream
            stream, _, trace = prune_layer(
                stream, entering, attended.received, attended.cls, guide, pruning, layer
            )
            if before.masked is not None:
                stream = replace(stream, masked=mask_after_pruning(before, stream, trace.importance, layer))
        else:
            trace = LayerTrace(stream.tokens.cu_seqlens, stream.tokens.cu_seqlens, stream.ids)
        x = stream.tokens.values
        if others:
            x = self.crossattention(stream.tokens, others, pruning.backend, runs)
        x = mlp(x, self.intermediate.dense, self.output.dense, residual=x, tokens=stream.tokens)
        return stream.with_values(self.output.LayerNorm(x, stream.tokens)), trace


def mask_after_pruning(before: Stream, after: Stream, importance: Tensor, layer: int) -> Tensor:
    """Which tokens are padding after a layer pruned: kept ones stay what they are, and the merged token is hidden if the
    most important of the tokens that went into it was, which is what the official text encoder makes of its mask.

    Returns:
        ``[T']`` bool. Nothing waits for a device.
    """
    old, new = before.tokens, after.tokens
    if not len(before.ids):
        return before.masked
    old_sample, new_sample = (sample_of(t.cu_seqlens, t.values.shape[0]) for t in (old, new))

    def key(tokens: RaggedBatch, ids: Tensor, sample: Tensor) -> Tensor:
        """Ascends along a stream: tokens stay in order, and merged ones follow in the order of their layers."""
        keys = (sample << 32) + torch.where(ids < 0, (1 << 31) - 1 - ids.long(), ids.long())
        row = torch.arange(len(keys), device=keys.device)
        return keys.where(row < tokens.cu_seqlens[-1], torch.iinfo(torch.int64).max)  # rows beyond the last token

    old_key, new_key = key(old, before.ids, old_sample), key(new, after.ids, new_sample)
    source = torch.searchsorted(old_key, new_key).clamp(max=len(old_key) - 1)
    found = torch.searchsorted(new_key, old_key).clamp(max=len(new_key) - 1)
    stays = (new_key[found] == old_key) | (old_key == torch.iinfo(torch.int64).max)
    score = importance.detach().masked_fill(stays, -torch.inf)
    best = score.new_full((old.batch_size,), -torch.inf).scatter_reduce(0, old_sample, score, "amax")
    hidden = (before.masked & (score == best[old_sample])).float()
    merged = hidden.new_zeros(old.batch_size).scatter_reduce(0, old_sample, hidden, "amax") > 0
    return torch.where(after.ids == -(1 + layer), merged[new_sample], before.masked[source])


class TextEncoder(nn.Module):
    """Text encoder of BLIP (`text_encoder.*`).

    Args:
        config: sizes.
        sd_dim: width of a dictionary entry.
        merge_from: None for one other modality. Else there are two, and from this layer on they are merged by a linear layer.
    """

    def __init__(self, config: TextConfig, sd_dim: int, merge_from: int | None = None) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList()
        for number in range(config.num_hidden_layers):
            single = merge_from is None
            cross = SingleCrossAttention(config) if single else TwinCrossAttention(config, number >= merge_from)
            self.encoder.layer.append(Layer(config, cross))
        self.encoder.txt_query_model = QueryModel(config.hidden_size, sd_dim, config.hidden_size != sd_dim)

    def forward(
        self,
        input_ids: RaggedBatch,
        others: Sequence[Stream],
        dictionary: Tensor | None,
        pruning: Pruning,
        summaries: bool = False,
        *,
        runs: Runs | None = None,
        masked: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> TextOutput:
        """Encode texts, alone or with what they look at.

        Args:
            input_ids: ``[T]`` int64.
            others: one stream per other modality (images), none for the text alone; sample b belongs to text b.
            dictionary, pruning, summaries: as in the vision transformer.
            runs: consecutive texts that share a sample of ``others``.
            masked: ``[T]`` bool, True for padding: scored like any token, never attended to.
            positions: ``[T]`` int64; by default counted from the first token of each text.

        Raises:
            ValueError: a text beyond the position embeddings, or active pruning without a dictionary.
        """
        stream = replace(Stream.start(input_ids, pruning.use_sizes), masked=masked)
        stream = stream.with_values(self.embeddings(input_ids, stream.ids if positions is None else positions).values)
        layers = [partial(layer, others=others, runs=runs) for layer in self.encoder.layer]
        query_models = [self.encoder.txt_query_model] * len(layers)
        return TextOutput(*run_blocks(layers, query_models, stream, dictionary, pruning, summaries))


class LMHead(nn.Module):
    """Hidden states to logits over the vocabulary; the word embeddings are the output layer too."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.transform = nn.Module()
        self.transform.dense = Linear(width, width)
        self.transform.LayerNorm = LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """``x [T, D]`` to ``[T, V]``."""
        x = self.transform.LayerNorm(self.transform.dense(x, activation="gelu"))
        return F.linear(x, word_embeddings, self.bias)


class TextDecoder(nn.Module):
    """Text decoder of BLIP (`text_decoder.*`): causal, never pruned, looks at the ragged states of an encoder."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = nn.Module()
        self.bert.embeddings = Embeddings(config)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            Layer(config, SingleCrossAttention(config), causal=True) for _ in range(config.num_hidden_layers)
        )
        self.cls = nn.Module()
        self.cls.predictions = LMHead(config)

    def keys(self, memory: Stream) -> list[Keys]:
        """What every layer looks at, from encoder states ``[S, encoder_width]``: computed once for all steps and beams."""
        return [layer.crossattention.self.keys(memory) for layer in self.bert.encoder.layer]

    def forward(
        self,
        input_ids: RaggedBatch,
        keys: Sequence[Keys],
        *,
        runs: Runs | None = None,
        cache=None,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
        backend: str | None = None,
    ) -> RaggedBatch:
        """Hidden states ``[T, D]`` of texts; :meth:`logits` makes predictions of them.

        Args:
            input_ids: ``[T]`` int64. With a ``cache`` only the newest tokens, equally many of each text.
            keys: from :meth:`keys`.
            runs: consecutive texts that share a sample of ``keys``.
            cache: of `transformers`: keys and values of the earlier tokens, to which this call adds.
            positions: ``[T]`` int64; by default counted from the first token of each text, which may be in the cache.
            visible: with a ``cache``, which tokens are no padding; see :func:`madtp.layers.cached_attention`.
            backend: force an implementation of the kernels.

        Raises:
            ValueError: a text beyond the position embeddings.
        """
        stream = Stream.start(input_ids, use_sizes=False)
        seen = 0 if cache is None else cache.get_seq_length()
        positions = stream.ids + seen if positions is None else positions
        stream = stream.with_values(self.bert.embeddings(input_ids, positions).values)
        pruning = Pruning(0.0, backend=backend)
        for number, (layer, key) in enumerate(zip(self.bert.encoder.layer, keys, strict=True)):
            stream, _ = layer(stream, None, pruning, number, others=(key,), runs=runs, cache=cache, visible=visible)
        return stream.tokens

    def logits(self, states: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, V]``: what comes after each token."""
        return self.cls.predictions(states, self.bert.embeddings.word_embeddings.weight)
