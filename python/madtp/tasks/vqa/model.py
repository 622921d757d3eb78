"""BLIP-VQA with MADTP pruning: a question about an image, answered in words or by ranking a list of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp_kernels import RaggedBatch

from ...config import Config, TextConfig, VisionConfig
from ...layers import QueryGroups
from ...model import Model, renamed
from ...pruning import LayerTrace, Pruning, Tokens
from ...rows import gather_samples
from ...text import TextDecoder, TextEncoder
from ...vision import VisionTransformer

# Rows of logits over the vocabulary that exist at a time while answers are ranked: 32 MB per 256 rows and 30524 words.
LOGIT_ROWS = 1024


@dataclass(frozen=True)
class VQAConfig(Config):
    """BLIP-VQA: an image and a question; a decoder of the same sizes as the question encoder answers."""

    task: ClassVar[str] = "vqa"
    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=480))
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True)
class VQAOutput:
    """Result of :class:`VQA`."""

    questions: Tokens
    """Final states ``[T, D]`` of the B questions, at which the decoder looks."""
    vision: list[LayerTrace]
    """Per vision layer; samples are the B images."""
    text: list[LayerTrace]
    """Per layer of the question encoder."""
    image_embeds: Tokens
    """Final image tokens ``[T, D]``."""
    alignment_features: tuple[Tensor, Tensor] | None = None
    """``(vision, text)`` of ``[B, M, sd_dim]``, if asked for."""


class Ranking(NamedTuple):
    """Candidate answers to B questions, the most likely first token first."""

    candidates: Tensor
    """``[B, k]`` int64 numbers of the candidates that were scored."""
    first_token_probabilities: Tensor
    """``[B, k]`` float32 probability of their first tokens, descending."""
    scores: Tensor
    """``[B, k]`` float32: minus the summed label-smoothed loss of their tokens."""

    @property
    def best(self) -> Tensor:
        """``[B]`` int64: the candidate with the highest score."""
        return self.candidates.gather(1, self.scores.argmax(1, keepdim=True))[:, 0]


class VQA(Model):
    """Image and question encoder with pruning, answer decoder without."""

    def __init__(self, config: VQAConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.visual_encoder = VisionTransformer(config.vision)
        self.text_encoder = TextEncoder(config.text, config.vision.sd_dim)
        self.text_decoder = TextDecoder(replace(config.text, encoder_width=config.text.hidden_size))

    @renamed
    def forward(
        self,
        pixels: Tensor,
        input_ids: RaggedBatch | Sequence[Tensor],
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
    ) -> VQAOutput:
        """Encode B questions about B images; :meth:`generate` and :meth:`rank` answer them.

        Args:
            pixels: ``[B, 3, S, S]`` normalised images.
            input_ids: B questions of int64 ids with [ENC] at position 0, as a ragged batch ``[T]`` or a list.
            pruning: for this call instead of the model's own; a number is MADTP at that temperature.
            alignment_features: also return them (training).

        Raises:
            ValueError: sizes that do not fit the model or each other.
        """
        input_ids = self._ids(input_ids)
        batch = input_ids.batch_size
        if len(pixels) != batch:
            raise ValueError(f"pixels: expected an image for each of {batch} questions, got {len(pixels)}")
        rule = self._pruning(pruning, batch)
        vision = self.visual_encoder(self._pixels(pixels), self.space_dict, rule, alignment_features)
        text = self.text_encoder(input_ids, (vision.tokens,), self.space_dict, rule, alignment_features)
        return VQAOutput(
            questions=text.tokens,
            vision=vision.trace,
            text=text.trace,
            image_embeds=vision.tokens,
            alignment_features=(vision.alignment_features, text.alignment_features) if alignment_features else None,
        )

    def generate(
        self,
        questions: Tokens,
        *,
        num_beams: int | None = None,
        max_length: int | None = None,
        min_length: int = 1,
        **options,
    ) -> list[Tensor]:
        """Answers in words.

        Args:
            questions: ``output.questions`` of a forward.
            num_beams: of the beam search; 1 is greedy, and 3 is the default.
            max_length, min_length: in tokens, [DEC] included; at most 10 by default, unless ``max_new_tokens`` is
                given.
            options: see :func:`madtp.generation.generate`.

        Returns:
            One int64 tensor per question, without [DEC], [SEP] and padding.

        Raises:
            ValueError: lengths beyond the model's positions, or an option that is not served.
        """
        from ...generation import generate

        if max_length is None and options.get("max_new_tokens") is None:
            max_length = 10
        start = torch.full((questions.batch_size, 1), self.config.text.dec_token_id, device=self.device)
        return generate(
            self.text_decoder, questions, start, backend=self.backend, num_beams=3 if num_beams is None else num_beams,
            max_length=max_length, min_length=min_length, **options,
        )  # fmt: skip

    def rank(self, questions: Tokens, answers: RaggedBatch | Sequence[Tensor], k: int = 128) -> Ranking:
        """Score candidate answers, as the official code does by default.

        The k candidates with the most likely first token are scored by minus the summed loss of all their tokens. The
        loss is label-smoothed (0.1) as in training, which BLIP's evaluation inherits from it.

        Args:
            questions: ``output.questions`` of a forward.
            answers: C candidates of int64 ids: [DEC], the words, [SEP]; as a ragged batch ``[T]`` or a list.
            k: how many to score; all if there are fewer.

        Raises:
            ValueError: a candidate without words, or ids that do not fit the model.
        """
        answers = self._ids(answers, "answers")
        lengths = answers.lengths
        if k < 1 or lengths.min() < 2:
            raise ValueError(
                f"answers: expected at least two tokens each and k >= 1, got {int(lengths.min())} and k = {k}"
            )
        batch, count = questions.batch_size, min(k, answers.batch_size)
        decoder, keys = self.text_decoder, self.text_decoder.keys(questions)
        start = torch.full((batch,), self.config.text.dec_token_id, device=self.device)
        states = decoder(RaggedBatch.from_lengths(start, [1] * batch), keys, backend=self.backend)
        words = decoder.logits(states.values).float().softmax(-1)
        first = answers.values[answers.cu_seqlens[:-1].long() + 1]
        probabilities, candidates = words[:, first].sort(dim=1, descending=True, stable=True)
        probabilities, candidates = probabilities[:, :count], candidates[:, :count].contiguous()

        chosen = candidates.flatten()
        texts = gather_samples(answers, chosen)
        groups = QueryGroups.of([count] * batch, self.device)
        states = decoder(texts, keys, query_groups=groups, backend=self.backend)
        row = torch.arange(texts.values.shape[0], device=self.device)
        last = torch.zeros_like(row, dtype=torch.bool).scatter_(0, texts.cu_seqlens[1:].long() - 1, True)
        inner = row[~last]  # the last token predicts nothing
        loss = torch.zeros(len(row), device=self.device)
        for rows in inner.split(LOGIT_ROWS):
            logits = decoder.logits(states.values[rows]).float()
            loss[rows] = F.cross_entropy(logits, texts.values[rows + 1], reduction="none", label_smoothing=0.1)
        scores = -torch.segment_reduce(loss, "sum", offsets=texts.cu_seqlens.long())
        return Ranking(candidates, probabilities, scores.unflatten(0, (batch, count)))
