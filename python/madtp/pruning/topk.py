"""Fixed shares: every sample keeps the same share of its tokens in every layer, the best by attention, or any."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from madtp_kernels.segments import sums

from .base import ScoredPruning, is_number, register


@dataclass(frozen=True)
class _FixedShare(ScoredPruning):
    """Keeps a share of the tokens, scored by :meth:`score`; the others become one token, weighted by their score.

    Args:
        drop: share of the prunable tokens that each layer drops, 0 (dense) to below 1; the strength of this rule.
    """

    bounds: ClassVar[tuple[float, float]] = (1e-3, 0.99)

    drop: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.drop) or not 0 <= self.drop < 1:
            raise ValueError(f"drop: expected a share from 0 to below 1, got {self.drop!r}")

    @property
    def strength(self) -> float:
        return self.drop

    def at(self, strength: float):
        return replace(self, drop=strength)

    def score(self, block_input, attention, layer):
        """``[C]`` float32: what each token is worth."""
        raise NotImplementedError

    def decide(self, block_input, attention, dictionary, layer):
        own: Tensor | int = 1  # protected tokens of a sample; token 0, which always stays, is not in the count
        if block_input.prefix > 1 or block_input.protected_ids is not None:
            own = sums(block_input.protected.float(), block_input.cu_seqlens)
        keep = ((block_input.lengths - own) * (1 - self.drop)).round() + own - 1
        return self.score(block_input, attention, layer), {"keep_count": keep.clamp(min=1).int()}


@register
@dataclass(frozen=True)
class TopK(_FixedShare):
    """The tokens that receive the most attention."""

    name: ClassVar[str] = "topk"
    importance: ClassVar[str] = "max"

    def score(self, block_input, attention, layer):
        return attention.attention_received


@register
@dataclass(frozen=True)
class Random(_FixedShare):
    """Tokens by lot, the same for a token of the same place in every forward.

    Args:
        seed: of the lots.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def score(self, block_input, attention, layer):
        # A hash of place and layer: neither the neighbours in the batch nor the device decide.
        lots = block_input.ids.long() * 0x9E3779B1 + (self.seed * 0x85EBCA77 + layer * 0xC2B2AE3D)
        for shift in (16, 13, 15):
            lots = ((lots ^ (lots >> shift)) * 0x27D4EB2F) & 0xFFFFFFFF
        return (lots.double() / 2**32).to(torch.promote_types(block_input.dtype, torch.float32))
