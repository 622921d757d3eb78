"""ToMe (arXiv 2210.09461) and ATM (arXiv 2505.15160): the most similar pairs of a bipartite matching are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from madtp_kernels import match_tokens
from madtp_kernels.segments import sample_of

from ..config import check_choices
from .base import PER_TOKEN, register
from .merging import MergingPruning, own_rows


@register
@dataclass(frozen=True, kw_only=True)
class ToMe(MergingPruning):
    """Each token at an even place finds the most similar one at an odd place; the r most similar pairs of a sample
    merge.

    The score of a token is ``1 - cos`` of its keys, averaged over heads, to its partner's.

    Survivors keep their places here, so that neighbours in a picture stay on different sides. The authors' code puts
    those of the even side before the odd ones in each layer, by which more is lost: on photographs a quarter more
    (docs/rules.md).

    Args:
        keys: "averaged" over heads, as in the paper, or "concatenated".
        authors_order: order the survivors as the authors' code does (not in causal attention, which reads the order).
    """

    name: ClassVar[str] = "tome"
    adaptive: ClassVar[bool] = False

    keys: str = "averaged"
    authors_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "", keys=("averaged", "concatenated"))

    def score(self, tokens, block_input, attention, dictionary, layer):
        keys = attention.keys.mean(1) if self.keys == "averaged" else attention.keys
        into, similarity = match_tokens(
            keys, tokens.cu_seqlens, tokens.max_seqlen, threshold=-2.0, protected=tokens.prefix, backend=self.backend
        )
        free = (into != own_rows(tokens)) & tokens.free
        return (1 - similarity).where(free, 0.0), free, {"partner": into}

    def similarities(self, tokens, gone, width, heads):
        return tokens * tokens / 4 * (width // heads if self.keys == "averaged" else width)

    def into(self, tokens, goes, threshold, partner):
        return torch.where(goes, partner, own_rows(tokens))

    def merge(self, tokens, attention, score, goes, found, layer, threshold):
        left, record = super().merge(tokens, attention, score, goes, found, layer, threshold)
        if not self.authors_order or attention.causal:
            return left, record
        row, rows = own_rows(tokens).long(), record.rows.long()
        odd = ((row - tokens.cu_seqlens[sample_of(tokens.cu_seqlens, len(row))]) % 2).int()
        odd = odd.masked_fill(tokens.protected, 0)
        survivors, spare = own_rows(left).long(), len(left.ids)
        stays = (rows >= 0) & ~goes & (row < tokens.cu_seqlens[-1])
        side = odd.new_zeros(spare + 1).scatter(0, rows.where(stays, spare), odd)[:-1]
        place = 2 * sample_of(left.cu_seqlens, spare) + side
        place = place.where(survivors < left.cu_seqlens[-1], 2 * left.batch_size + 2)
        order = place.argsort(stable=True)
        moved = torch.empty_like(order).scatter(0, order, survivors).int()
        parts = {name: part[order] for name in PER_TOKEN if (part := getattr(left, name)) is not None}
        rows = moved[rows.clamp(min=0)].where(rows >= 0, record.rows)
        return replace(left, **parts), replace(record, ids=parts["ids"], rows=rows)


@register
@dataclass(frozen=True, kw_only=True)
class ATM(ToMe):
    """ToMe's matching above a threshold of similarity for each layer, so that every sample merges as many as are alike.

    The paper's matching by sizes in the last layers is left out.
    """

    name: ClassVar[str] = "atm"
    adaptive: ClassVar[bool] = True
