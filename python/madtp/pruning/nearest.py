"""MADTP's choice, with merging into the nearest survivor instead of one merged token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from madtp_kernels import nearest_kept
from madtp_kernels.segments import sample_of, scatter_add

from ..config import check_choices
from .base import LayerTrace, register
from .madtp import MADTP
from .merging import own_rows


@register
@dataclass(frozen=True, kw_only=True)
class MADTPNearest(MADTP):
    """MADTP (arXiv 2403.02991) whose dropped tokens are merged into the survivors with the most similar keys.

    A token stays if its importance exceeds the sample's threshold; the others' weights in the means are their
    importance. As in MADTP a sample of which nothing would survive, or fewer than two tokens would go, is left alone in
    that layer.

    Args:
        weights: what tokens weigh in a mean: their "importance", or their "sizes".
    """

    name: ClassVar[str] = "madtp_nearest"

    proportional_attention: bool = True
    weights: str = "importance"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "", weights=("importance", "sizes"))

    def count(self, cost, layer, before, after, **sizes):
        super().count(cost, layer, before, after, **sizes)
        cost["similarity"] += (before - after) * max(after - 1, 0) * sizes["width"]

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        if not self.active:
            return tokens, LayerTrace(tokens.cu_seqlens, tokens.cu_seqlens, tokens.ids)
        importance, limit = self.decide(block_input, attention, dictionary, layer)
        protected, own = tokens.protected, own_rows(tokens)
        sample, batch = sample_of(tokens.cu_seqlens, len(own)), tokens.batch_size
        free = ~protected & (own < tokens.cu_seqlens[-1])
        goes = free & (importance <= limit["threshold"][sample])
        number = scatter_add(torch.stack([goes, free & ~goes], 1).long(), sample, max(batch, 1))
        goes = goes & ((number[:, 0] >= 2) & (number[:, 1] >= 1))[sample]
        nearest = nearest_kept(
            attention.keys, ~goes & ~protected, tokens.cu_seqlens, tokens.max_seqlen, backend=self.backend
        )
        into = torch.where(goes, nearest, own)
        weights = importance.masked_fill(protected, 1.0) if self.weights == "importance" else None
        left, merged = tokens.merged(
            into, proportional=self.proportional_attention, backend=self.backend, weights=weights
        )
        trace = LayerTrace(
            tokens.cu_seqlens, left.cu_seqlens, left.ids, importance, limit["threshold"], rows=merged.rows
        )
        return left, trace
