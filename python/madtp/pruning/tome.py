"""ToMe (arXiv 2210.09461) and ATM (arXiv 2505.15160): the most similar pairs of a bipartite matching are merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from madtp_kernels import match_tokens

from .base import register
from .merging import MergingPruning, own_rows


@register
@dataclass(frozen=True)
class ToMe(MergingPruning):
    """Each token at an even place finds the most similar one at an odd place; the r most similar pairs of a sample
    merge.

    The score of a token is ``1 - cos`` of its keys, averaged over heads, to its partner's.

    Args:
        keys: "averaged" over heads, as in the paper, or "concatenated".
    """

    name: ClassVar[str] = "tome"
    adaptive: ClassVar[bool] = False

    keys: str = "averaged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys not in ("averaged", "concatenated"):
            raise ValueError(f"keys: expected 'averaged' or 'concatenated', got {self.keys!r}")

    def score(self, tokens, block_input, attention, dictionary, layer):
        keys = attention.keys.mean(1) if self.keys == "averaged" else attention.keys
        into, similarity = match_tokens(
            keys, tokens.cu_seqlens, tokens.max_seqlen, threshold=-2.0, protected=tokens.prefix, backend=self.backend
        )
        free = (into != own_rows(tokens)) & ~tokens.protected
        return (1 - similarity).where(free, 0.0), free, {"partner": into}

    def similarities(self, tokens, gone, width, heads):
        return tokens * tokens / 4 * (width // heads if self.keys == "averaged" else width)

    def into(self, tokens, goes, threshold, partner):
        return torch.where(goes, partner, own_rows(tokens))


@register
@dataclass(frozen=True)
class ATM(ToMe):
    """ToMe's matching above a threshold of similarity for each layer, so that every sample merges as many as are alike.

    The paper's matching by sizes in the last layers is left out.
    """

    name: ClassVar[str] = "atm"
    adaptive: ClassVar[bool] = True
