"""The ways to prune that are compared: MADTP, with and without sizes, and what it has to be better than."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from madtp.pruning import MADTP, ScoredPruning
from madtp_kernels.importance.reference import EPS
from madtp_kernels.segments import sample_of


class NoAlignment(MADTP):
    """MADTP's threshold on what attention alone says of a token: (received / sum + CLS) / 2."""

    def decide(self, block_input, attention, dictionary, layer):
        entries, _ = dictionary
        received = attention.attention_received
        tokens, seen = block_input.to_padded()  # [B, L, D]
        seen[:, 0] = False
        alignment = (tokens @ entries.mT).detach().float()
        weights = (alignment / self.temperature).masked_fill(~seen[..., None], -torch.inf).softmax(1)
        sample = sample_of(block_input.cu_seqlens, len(received))
        total = received.new_zeros(block_input.batch_size).index_add(0, sample, received) + EPS
        importance = (received / total[sample] + attention.cls_attention) / 2
        padded, _ = block_input.with_values(importance.detach()).to_padded()
        threshold = (weights * padded.masked_fill(~seen, 0.0)[..., None]).sum(1).amin(1)
        return importance, {"threshold": threshold}


@dataclass(frozen=True)
class _FixedShare(ScoredPruning):
    """Every sample keeps the same share of its tokens in a layer, about the shares that MADTP keeps on average: most
    image tokens go in the first two layers. A higher "temperature" keeps less.
    """

    importance = "max"

    temperature: float = 0.0

    @property
    def strength(self):
        return self.temperature

    def at(self, strength):
        return replace(self, temperature=strength)

    def score(self, attention):
        raise NotImplementedError

    def share(self, layer: int) -> float:
        return 1 / (1 + self.temperature / (1 if layer < 2 else 8))

    def decide(self, block_input, attention, dictionary, layer):
        kept = ((block_input.lengths - 1) * self.share(layer)).round().clamp(min=1)
        return self.score(attention), {"keep_count": kept.int()}


class _FixedShareOfText(_FixedShare):
    def share(self, layer):
        return 1 / (1 + self.temperature / 8)


class Random(_FixedShare):
    """Tokens by lot."""

    def score(self, attention):
        return torch.rand_like(attention.attention_received)


class RandomText(Random, _FixedShareOfText):
    """Tokens of a text by lot."""


class ClsAttention(_FixedShare):
    """The tokens that the first one attends to most; the others are merged by that weight, as in EViT
    (arXiv 2202.07800).
    """

    def score(self, attention):
        return attention.cls_attention


class ClsAttentionText(ClsAttention, _FixedShareOfText):
    """The same on a text."""


class Unpruned(MADTP):
    """No pruning, at any temperature."""

    @property
    def active(self) -> bool:
        return False


class Method(NamedTuple):
    """A way to prune."""

    rules: tuple[type[ScoredPruning], type[ScoredPruning]] = (MADTP, MADTP)
    """Of images and of texts."""
    use_sizes: bool = True
    """Whether merged tokens weigh what they stand for."""
    alignment: float = 0.1
    """Weight of the alignment loss."""
    start: float = 1.0
    """Temperature at which fine-tuning begins."""


METHODS = {
    "madtp": Method(use_sizes=False),
    "madtp-sizes": Method(),
    "vision-only": Method((MADTP, Unpruned)),
    "no-alignment": Method((NoAlignment, NoAlignment), alignment=0.0),
    "cls": Method((ClsAttention, ClsAttentionText), alignment=0.0, start=0.2),
    "random": Method((Random, RandomText), alignment=0.0, start=0.2),
}
"""All but the first with sizes, so that they differ in which tokens they keep and in nothing else."""
