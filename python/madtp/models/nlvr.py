"""BLIP-NLVR with MADTP pruning: is a statement about two images true?"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from ..config import NLVRConfig
from ..pruning import LayerTrace, Stream
from ..rows import first_rows
from ..text import TextEncoder
from ..vision import VisionTransformer
from .base import Model


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


class NLVR(Model):
    """Two images and a statement per sample, ragged from the embeddings to the head.

    Beside the groupings of every model there is "pair", which ties the two images of a pair as the official code does at batch
    size 1.
    """

    groupings = ("instance", "pair", "batch")

    def __init__(self, config: NLVRConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        width = config.text.hidden_size
        self.visual_encoder = VisionTransformer(config.vision)
        self.text_encoder = TextEncoder(config.text, config.vision.sd_dim, config.merge_from)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

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
        input_ids = self._ids(input_ids)
        batch = input_ids.batch_size
        if len(pixels) != 2 * batch:
            raise ValueError(f"pixels: expected two images for each of {batch} texts, got {len(pixels)} images")
        temperature = self._temperature(temperature)
        pruning = self._pruning(temperature, 2 * batch)
        if pruning.active and self.grouping == "pair":
            groups = torch.arange(2 * batch, dtype=torch.int32, device=self.device) % batch
            pruning = dataclasses.replace(pruning, groups=groups)
        vision = self.visual_encoder(self._pixels(pixels), self.space_dict, pruning, summaries)
        images = split(vision.stream, batch)
        text = self.text_encoder(
            input_ids, images, self.space_dict, self._pruning(temperature, batch), summaries
        )
        return NLVROutput(
            logits=self.cls_head(first_rows(text.stream.tokens)),
            vision=vision.trace,
            text=text.trace,
            image_embeds=vision.stream.tokens,
            last_hidden_state=text.stream.tokens,
            summaries=(vision.summary, text.summary) if summaries else None,
        )


def split(stream: Stream, batch: int) -> tuple[Stream, Stream]:
    """The left images (first ``batch`` samples) and the right images of a stream, without waiting for a device."""
    tokens = stream.tokens
    offset = tokens.cu_seqlens[batch]
    left = RaggedBatch(tokens.values, tokens.cu_seqlens[: batch + 1], tokens.max_seqlen, bound=True)
    left_sizes = right_sizes = stream.sizes
    if tokens.device.type == "cpu" or not tokens.bound:
        # On a GPU only images that were never pruned have an exact buffer, and those are all of one length.
        cut = int(offset) if tokens.device.type == "cpu" else tokens.values.shape[0] // 2
        left = RaggedBatch(tokens.values[:cut], left.cu_seqlens, left.max_seqlen)
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
    right = RaggedBatch(right_values, tokens.cu_seqlens[batch:] - offset, tokens.max_seqlen, tokens.bound)
    return Stream(left, left_ids, left_sizes), Stream(right, right_ids, right_sizes)
