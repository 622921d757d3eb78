"""MADTP's own rule (arXiv 2403.02991, section 3.3): importance from attention and the dictionary, a threshold per
sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from madtp_kernels import prune, score_tokens

from ..config import check_temperature
from .base import ScoredPruning, register


@register
@dataclass(frozen=True)
class MADTP(ScoredPruning):
    """Dynamic token pruning under alignment guidance.

    Args:
        temperature: 0 is dense; a higher one prunes more. It is the strength of this rule.
    """

    name: ClassVar[str] = "madtp"
    importance: ClassVar[str] = "max"
    needs_dictionary: ClassVar[bool] = True

    temperature: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "temperature", check_temperature(self.temperature))

    @property
    def strength(self) -> float:
        return self.temperature

    def at(self, strength: float) -> MADTP:
        return replace(self, temperature=strength)

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        if not self.active or type(self).decide is not MADTP.decide:
            return super().__call__(
                tokens, block_input=block_input, attention=attention, dictionary=dictionary, layer=layer, norm=norm
            )
        # Both of :meth:`decide` and compaction in one call.
        entries, bias = dictionary
        compacted, importance, threshold = prune(
            tokens, block_input.values, entries, attention.attention_received, attention.cls_attention,
            self.temperature, bias=bias, **self.compaction(tokens, layer, norm),
        )  # fmt: skip
        return self.left(tokens, compacted, norm, importance, threshold)

    def decide(self, block_input, attention, dictionary, layer):
        entries, bias = dictionary
        importance, threshold = score_tokens(
            block_input.values, entries, attention.attention_received, attention.cls_attention, block_input.cu_seqlens,
            block_input.max_seqlen, self.temperature, bias=bias, backend=self.backend,
        )  # fmt: skip
        return importance, {"threshold": threshold}

    def count(self, cost, layer, before, after, *, width, heads, entries, alignment):
        if not self.active:
            return
        super().count(cost, layer, before, after, width=width, heads=heads, entries=entries, alignment=alignment)
        prunable = max(before - 1, 0)
        cost["alignment"] += alignment * prunable
        cost["threshold"] += 7 * entries * prunable
        if after == before:  # what fvcore takes for dead code
            cost["unofficial"] += alignment * prunable
