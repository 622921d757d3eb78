"""BLIP-NLVR with MADTP pruning: is a statement about two images true?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, checks

from ..config import NLVRConfig
from ..pruning import LayerTrace, Pruning, Stream
from ..text import NLVRTextEncoder
from ..vision import VisionTransformer

GROUPINGS = ("instance", "pair", "batch")


@dataclass(frozen=True)
class NLVROutput:
    """Result of :class:`NLVR`."""

    logits: Tensor
    """``[B, 2]``; class 1 means that the statement is true."""
    vision: list[LayerTrace]
    """Per vision layer; samples are the B left images, then the B right images."""
    text: list[LayerTrace]
    """Per text layer; samples are the B statements."""
    image_embeds: RaggedBatch
    """Final image tokens ``[T, D]`` of the 2B images."""
    last_hidden_state: RaggedBatch
    """Final text states ``[T, D]``; the first of each sample is what the head sees."""
    summaries: tuple[Tensor, Tensor] | None = None
    """``(vision [2B, M, sd_dim], text [B, M, sd_dim])`` alignment summaries, if asked for."""


class NLVR(nn.Module):
    """Two images and a statement per sample, ragged from the embeddings to the head.

    Parameters are named as in MADTP's checkpoints, except that query/key/value projections are fused.

    Args:
        config: sizes.
        temperature: pruning temperature; 0 runs dense.
        grouping: "instance" prunes every image by its own count; "pair" ties the two images of a pair as the official code
            does at batch size 1; "batch" ties everything in the batch, the official code's batch-maximum execution.
        use_sizes: merged tokens weigh what they stand for (not in the paper).
        backend: force an implementation of the kernels.
    """

    def __init__(
        self,
        config: NLVRConfig,
        temperature: float = 0.0,
        grouping: str = "instance",
        use_sizes: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if grouping not in GROUPINGS:
            raise ValueError(f"grouping: expected one of {', '.join(GROUPINGS)}, got {grouping!r}")
        self.config = config
        self.temperature = float(temperature)
        self.grouping = grouping
        self.use_sizes = use_sizes
        self.backend = backend
        self.processor = None
        width = config.text.hidden_size
        self.space_dict = nn.Parameter(torch.randn(config.vision.sd_num, config.vision.sd_dim))
        self.visual_encoder = VisionTransformer(config.vision)
        self.text_encoder = NLVRTextEncoder(config)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @contextlib.contextmanager
    def dense(self) -> Iterator[NLVR]:
        """Run without pruning inside the ``with`` block."""
        temperature, self.temperature = self.temperature, 0.0
        try:
            yield self
        finally:
            self.temperature = temperature

    @property
    def device(self) -> torch.device:
        return self.space_dict.device

    @property
    def dtype(self) -> torch.dtype:
        return self.space_dict.dtype

    def _pruning(self, temperature: float, group_size: int, batch: int) -> Pruning:
        """Settings for a stream of ``group_size * batch`` samples of which every ``batch``-th belongs together."""
        groups = None
        if temperature > 0 and self.grouping == "pair" and group_size > 1:
            groups = torch.arange(group_size * batch, dtype=torch.int32, device=self.device) % batch
        elif temperature > 0 and self.grouping == "batch":
            groups = torch.zeros(group_size * batch, dtype=torch.int32, device=self.device)
        return Pruning(temperature, groups, self.use_sizes, self.backend)

    def forward(
        self,
        pixels: Tensor,
        input_ids: RaggedBatch | Sequence[Tensor],
        temperature: float | None = None,
        summaries: bool = False,
    ) -> NLVROutput:
        """Answer B statements.

        Args:
            pixels: ``[2B, 3, S, S]`` normalised images in the model's dtype: the B left ones, then the B right ones.
            input_ids: B texts of int64 ids with [ENC] at position 0, as a ragged batch ``[T]`` or a list.
            temperature: for this call instead of the model's own.
            summaries: also return the alignment summaries (training).

        Raises:
            ValueError: sizes that do not fit the model or each other.
        """
        if not isinstance(input_ids, RaggedBatch):
            texts = list(input_ids)
            if not texts:
                raise ValueError("input_ids: expected at least one text, got none")
            input_ids = RaggedBatch.from_list(texts)
        _check_ids(input_ids, self.config.text.vocab_size)
        input_ids = input_ids.to(self.device)
        batch = input_ids.batch_size
        if pixels.shape[0] != 2 * batch:
            raise ValueError(f"pixels: expected two images for each of {batch} texts, got {pixels.shape[0]} images")
        temperature = self.temperature if temperature is None else float(temperature)
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")

        vision = self.visual_encoder(
            pixels.to(self.device, self.dtype), self.space_dict, self._pruning(temperature, 2, batch), summaries
        )
        images = split(vision.stream, batch)
        text = self.text_encoder(
            input_ids, images, self.space_dict, self._pruning(temperature, 1, batch), summaries
        )
        states = text.stream.tokens
        first = states.values[states.cu_seqlens[:-1].long()]
        return NLVROutput(
            logits=self.cls_head(first),
            vision=vision.trace,
            text=text.trace,
            image_embeds=vision.stream.tokens,
            last_hidden_state=states,
            summaries=(vision.summary, text.summary) if summaries else None,
        )


def _check_ids(input_ids: RaggedBatch, vocabulary: int) -> None:
    """Every text has a first token, which answers for it, and every id has an embedding."""
    ids = input_ids.values
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"input_ids: expected int64 ids [T], got {checks.describe(ids)}")
    if not checks.may_read(ids):
        return
    empty = (input_ids.lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"input_ids: expected at least one token per text, text {empty[0]} has none")
    ids = ids[: input_ids.num_tokens]
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocabulary:
        raise ValueError(f"input_ids: expected ids in 0..{vocabulary - 1}, got {ids.min()}..{ids.max()}")


def split(stream: Stream, batch: int) -> tuple[Stream, Stream]:
    """The left images (first ``batch`` samples) and the right images of a stream, without waiting for a device."""
    tokens = stream.tokens
    offset = tokens.cu_seqlens[batch]
    left = RaggedBatch(tokens.values, tokens.cu_seqlens[: batch + 1], tokens.max_seqlen)
    left_sizes = right_sizes = stream.sizes
    if tokens.device.type == "cpu":
        cut = int(offset)
        left = left.with_values(tokens.values[:cut])
        right_values, right_ids, left_ids = tokens.values[cut:], stream.ids[cut:], stream.ids[:cut]
        if stream.sizes is not None:
            left_sizes, right_sizes = stream.sizes[:cut], stream.sizes[cut:]
    else:
        # The cut is known to the device only: move the right rows to the front of a buffer of the same capacity.
        rows = torch.arange(tokens.values.shape[0], device=tokens.device) + offset
        rows = rows.clamp(max=tokens.values.shape[0] - 1)
        right_values, right_ids, left_ids = tokens.values[rows], stream.ids[rows], stream.ids
        if stream.sizes is not None:
            right_sizes = stream.sizes[rows]
    right = RaggedBatch(right_values, tokens.cu_seqlens[batch:] - offset, tokens.max_seqlen)
    return Stream(left, left_ids, left_sizes), Stream(right, right_ids, right_sizes)
