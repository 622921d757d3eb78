"""EViT (arXiv 2202.07800): the tokens that CLS attends to stay, the others become one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from madtp_kernels import merge_tokens
from madtp_kernels.segments import sample_of, sums

from .base import LayerTrace, register
from .merging import MergingPruning, own_rows


@register
@dataclass(frozen=True, kw_only=True)
class EViT(MergingPruning):
    """Keeps the tokens that the first one attends to most (mean over heads); the others' weighted sum is appended.

    The sum is that of the paper's code: weighted by the attention, not divided by it. The first token has to be a class
    token. A sample that would lose one token only is left alone. The paper drops 30 % in three layers out of twelve:
    ``shares=(0, 0, 0, .3, 0, 0, .3, 0, 0, .3, 0, 0)``.
    """

    name: ClassVar[str] = "evit"
    adaptive: ClassVar[bool] = False

    proportional_attention: bool = False

    def score(self, tokens, block_input, attention, dictionary, layer):
        if tokens.prefix < 1:
            raise ValueError("evit: the model has no class token whose attention could choose; use another rule")
        return attention.received("mean", slice(0, 1)), tokens.free, {}

    def similarities(self, tokens, gone, width, heads):
        return tokens * width  # logits of the first token

    def merge(self, tokens, attention, score, goes, found, layer, threshold):
        # One token alone would not become fewer.
        goes = goes & (sums(goes.float(), tokens.cu_seqlens) > 1)[sample_of(tokens.cu_seqlens, len(goes))]
        into = torch.where(goes, -1, own_rows(tokens))
        merged = merge_tokens(
            tokens, into, weights=score, sizes=tokens.sizes, append="sum", carry=(tokens.ids,), backend=self.backend
        )
        ids = torch.where(merged.source < 0, -(1 + layer), merged.carried[0])
        left = tokens.survivors(merged.tokens, ids, merged.sizes, proportional=self.proportional_attention)
        return left, LayerTrace(tokens.cu_seqlens, left.cu_seqlens, ids, score, rows=merged.rows, appends=True)
