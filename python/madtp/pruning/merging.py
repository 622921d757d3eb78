"""Rules that merge tokens into others: what to merge is a score, how much is a limit for each layer.

A rule scores the tokens that may go and says where each would go; this module decides how many do: below a threshold,
so that every sample keeps its own number; or a share or a number of each sample's tokens.
:mod:`madtp.pruning.calibration` finds the limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from madtp_kernels import lowest_tokens
from madtp_kernels.merging import counts_of

from .base import LayerTrace, Pruning, Tokens, is_number

if TYPE_CHECKING:
    from ..layers import Attention

LIMITS = ("thresholds", "shares", "counts")
"""Fields of a rule that say, layer by layer, how much goes; at most one is set."""


@dataclass(frozen=True, kw_only=True)
class MergingPruning(Pruning):
    """A rule that merges tokens into others of their sample, in each layer as many as its limit lets pass.

    One of the three limits is given: one value for each layer, or one for all. Without any, ``default_shares`` applies.

    Args:
        thresholds: tokens whose score is at most this are merged: every sample keeps its own number of tokens. What a
            score is depends on the model and its inputs, so thresholds come from :func:`madtp.pruning.calibrate`.
        shares: share of each sample's tokens (without protected ones) that is merged, those of lowest score.
        counts: number of tokens of each sample that is merged.
        strength: multiplies the limit; 0 is dense, 1 the limit as it is. Counts are rounded after that.
        most: at most this share of a sample's tokens is merged in a layer, rounded down.
        streams: images only by default.
    """

    default_shares: ClassVar[tuple[float, ...]] = (0.06,)
    """What an uncalibrated rule merges: 6 % of the tokens in each layer, about 30 % of the operations of 12 layers."""
    adaptive: ClassVar[bool] = True
    """Whether calibration sets thresholds; else each sample loses as many tokens, as the rule's authors have it."""

    thresholds: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    counts: tuple[float, ...] = ()
    strength: float = 1.0
    most: float = 2 / 3
    proportional_attention: bool = True
    streams: tuple[str, ...] = ("vision",)

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in LIMITS if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{', '.join(LIMITS)}: expected one of them, got {' and '.join(given)}")
        for name in given:
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not all(map(is_number, values)):
                raise ValueError(f"{name}: expected a tuple, one number for each layer or one for all, got {values!r}")
            values = tuple(map(float, values))
            if not all(0 <= value < math.inf for value in values) or (name == "shares" and max(values) > 1):
                expected = "shares from 0 to 1" if name == "shares" else "numbers >= 0"
                raise ValueError(f"{name}: expected {expected}, got {values}")
            if name == "counts" and not all(value.is_integer() for value in values):
                raise ValueError(f"counts: expected whole numbers, got {values}")
            object.__setattr__(self, name, values)
        if not is_number(self.strength) or not 0 <= self.strength < math.inf:
            raise ValueError(f"strength: expected a number >= 0, got {self.strength!r}")
        if not is_number(self.most) or not 0 <= self.most <= 1:
            raise ValueError(f"most: expected a share from 0 to 1, got {self.most!r}")

    @property
    def limit(self) -> tuple[str, tuple[float, ...]]:
        """Which limit applies, and its values."""
        for name in LIMITS:
            if getattr(self, name):
                return name, getattr(self, name)
        return "shares", self.default_shares

    @property
    def variants(self) -> tuple[MergingPruning, ...]:
        """Rules of which calibration takes the best; the first chooses the schedule."""
        return (self,)

    def at(self, strength: float):
        return replace(self, strength=strength)

    def limited(self, kind: str, values: tuple[float, ...]):
        """The same rule with another limit, at strength 1."""
        return replace(self, **dict.fromkeys(LIMITS, ()) | {kind: tuple(values)}, strength=1.0)

    @property
    def active(self) -> bool:
        return self.strength > 0 and max(self.limit[1]) > 0

    def on(self, stream, layers):
        kind, values = self.limit
        if stream in self.streams and len(values) not in (1, layers):
            raise ValueError(
                f"{kind}: expected one value for each of the {layers} layers of {stream} or one for all, got {len(values)}"
            )
        return super().on(stream, layers)

    def limit_of(self, layer: int) -> tuple[str, float]:
        """The limit of a layer.

        Raises:
            ValueError: a model of more layers than there are limits.
        """
        kind, values = self.limit
        if len(values) > 1 and layer >= len(values):
            raise ValueError(
                f"{kind}: expected one value for each layer or one for all, got {len(values)} for layer {layer}"
            )
        value = values[layer if len(values) > 1 else 0] * self.strength
        return kind, min(value, 1.0) if kind == "shares" else value

    def score(
        self,
        tokens: Tokens,
        block_input: Tokens,
        attention: Attention,
        dictionary: tuple[Tensor, Tensor | None] | None,
        layer: int,
    ) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """What merging each token would cost; arguments as :meth:`Pruning.__call__`.

        Returns:
            Scores ``[C]`` float32, the lowest go first; ``[C]`` bool, which tokens may go; and what :meth:`into` takes
            besides.
        """
        raise NotImplementedError

    def into(self, tokens: Tokens, goes: Tensor, threshold: float | None, **found: Tensor) -> Tensor:
        """Where tokens go.

        Args:
            tokens: ``[C, D]``.
            goes: ``[C]`` bool, the tokens that were chosen to go.
            threshold: by which they were, if by one.
            found: what :meth:`score` found.

        Returns:
            ``[C]`` int32: the row that a token which goes is merged into, and its own of one that stays.
        """
        raise NotImplementedError

    def similarities(self, tokens: int, gone: int, width: int, heads: int) -> float:
        """Multiply-adds of cosines for a sample of ``tokens`` that can be merged, of which ``gone`` are."""
        raise NotImplementedError

    def count(self, cost, layer, before, after, *, width, heads, entries, alignment):
        if not self.active or not self.limit_of(layer)[1]:
            return
        cost["similarity"] += self.similarities(max(before - 1, 0), before - after, width, heads)
        cost["merge"] += 2 * (before - after) * width
        if self.importance:
            cost["importance"] += before * before * (width + 4 * heads) + before * width
        if self.needs_dictionary:
            cost["alignment"] += alignment * max(before - 1, 0)

    def choose(self, tokens: Tokens, score: Tensor, free: Tensor, layer: int) -> Tensor:
        """``[C]`` bool: the tokens that go, of those that are free to."""
        return self.lowest(tokens, score, free, **self.chosen(tokens, layer))

    def argument(self, layer: int) -> dict[str, Any]:
        """The limit of a layer, as :func:`madtp_kernels.merge_redundant` takes it."""
        kind, limit = self.limit_of(layer)
        if kind == "counts":
            return {"count": round(limit)}
        return {"portion" if kind == "shares" else "threshold": limit}

    def chosen(self, tokens: Tokens, layer: int) -> dict[str, Any]:
        """The limit of a layer, as :meth:`lowest` takes it."""
        limit = self.argument(layer)
        if "threshold" in limit:
            return limit
        return {"count": counts_of(tokens.cu_seqlens, uncounted=number_protected(tokens), **limit)}

    @property
    def share(self) -> float:
        """``most`` as the kernels take it: two thirds of three are two."""
        return min(self.most * (1 + 1e-6), 1.0)

    def lowest(
        self,
        tokens: Tokens,
        score: Tensor,
        free: Tensor,
        *,
        count: Tensor | None = None,
        threshold: float | None = None,
    ) -> Tensor:
        """``[C]`` bool: the free tokens of lowest score, at most the share ``most`` of a sample's.

        Args:
            count: ``[B]`` int32: no more than so many of each sample.
            threshold: only those whose score is at most this.
        """
        return lowest_tokens(
            score, count, tokens.cu_seqlens, free=free, threshold=threshold, share=self.share,
            uncounted=number_protected(tokens), backend=self.backend,
        )  # fmt: skip

    @staticmethod
    def prunable(tokens: Tokens) -> Tensor:
        """``[B]`` int32: tokens of each sample that are not protected."""
        return (tokens.lengths - number_protected(tokens)).clamp(min=0)

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        if not self.active or not self.limit_of(layer)[1]:
            return tokens, LayerTrace(tokens.cu_seqlens, tokens.cu_seqlens, tokens.ids)
        score, free, found = self.score(tokens, block_input, attention, dictionary, layer)
        goes = self.choose(tokens, score, free, layer)
        kind, limit = self.limit_of(layer)
        return self.merge(tokens, attention, score, goes, found, layer, limit if kind == "thresholds" else None)

    def merge(
        self,
        tokens: Tokens,
        attention: Attention,
        score: Tensor,
        goes: Tensor,
        found: Mapping[str, Tensor],
        layer: int,
        threshold: float | None,
    ) -> tuple[Tokens, LayerTrace]:
        """The tokens without those that go, and the record of the layer."""
        into = self.into(tokens, goes, threshold, **found)
        left, merged = tokens.merged(into, proportional=self.proportional_attention, backend=self.backend)
        return left, LayerTrace(tokens.cu_seqlens, left.cu_seqlens, left.ids, score, rows=merged.rows)


def number_protected(tokens: Tokens) -> int:
    """How many tokens of each sample are protected."""
    return tokens.prefix + (tokens.protected_ids is not None)


def own_rows(tokens: Tokens) -> Tensor:
    """``[C]`` int32: every row's own number."""
    return torch.arange(tokens.ids.shape[0], dtype=torch.int32, device=tokens.device)
