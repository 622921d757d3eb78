"""PiToMe (arXiv 2405.16148): tokens in large groups of likes are merged first, isolated ones are left alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp_kernels import match_tokens, nearest_kept
from madtp_kernels.ragged import pack, spans
from madtp_kernels.segments import sample_of

from ..config import check_choices
from .base import register
from .merging import MergingPruning, number_protected, own_rows


@register
@dataclass(frozen=True, kw_only=True)
class PiToMe(MergingPruning):
    """Tokens in the order of their energy, every second one matched with the most similar of the others.

        E_i = mean over j of f(cos(k_i, k_j)), f(x) = x if x >= m, else alpha * (exp(x - m) - 1), m = 0.9 (1 - layer /
        layers)

    with keys averaged over heads. High energy means many likes. Cosines of all pairs of a sample are held at once.

    Args:
        form: "protect", the paper's: the 2 r tokens of highest energy are split, and one half merged into the other;
            "matching": all tokens are split, and the r most similar pairs merged (the paper's code has both).
        margin: ``m`` in the first layer.
        alpha: of ``f``.
        layers: over which the margin falls to zero; None: those of the model the rule runs in. Another number than the
            model has is refused.
    """

    name: ClassVar[str] = "pitome"
    adaptive: ClassVar[bool] = False

    form: str = "matching"
    margin: float = 0.9
    alpha: float = 1.0
    layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "", form=("protect", "matching"))
        if self.layers is not None and not self.layers >= 1:
            raise ValueError(f"layers: expected at least 1, got {self.layers!r}")

    def on(self, stream, layers):
        rule = super().on(stream, layers)
        if rule is not self or self.layers == layers:
            return rule
        if self.layers is not None:
            raise ValueError(f"layers: expected {layers}, as many as the model's {stream} has, got {self.layers}")
        return replace(self, layers=layers)

    def energy(self, keys: Tensor, tokens, layer: int) -> Tensor:
        """``[C]`` float32: the energy of each token among those that are not protected."""
        if self.layers is None:
            raise ValueError("layers: expected the model's number, got None: the rule did not come from `on`")
        margin, free = self.margin * (1 - layer / self.layers), tokens.free
        keys = F.normalize(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        if keys.device.type == "cpu":  # a sample at a time: its bits do not depend on the others
            rows = []
            for start, stop in spans(tokens.cu_seqlens):
                own, seen = keys[start:stop].clone(), free[start:stop]
                values = F.elu(own @ own.mT - margin, self.alpha).masked_fill(~seen, 0.0)
                rows.append(values.sum(1) / seen.sum().clamp(min=1))
            return pack(rows, keys.new_empty(0), keys.shape[0])
        padded, _ = tokens.with_values(keys).to_padded()
        seen, _ = tokens.with_values(free).to_padded(False)
        values = F.elu(padded @ padded.mT - margin, self.alpha).masked_fill(~seen[:, None], 0.0)
        values = values.sum(2) / seen.sum(1, keepdim=True).clamp(min=1)
        position = torch.arange(keys.shape[0], device=keys.device)
        sample = sample_of(tokens.cu_seqlens, len(position))
        place = (position - tokens.cu_seqlens[sample]).clamp(max=max(values.shape[1] - 1, 0))
        return values[sample, place]

    def score(self, tokens, block_input, attention, dictionary, layer):
        keys, protected, cu_seqlens = attention.keys.mean(1), tokens.protected, tokens.cu_seqlens
        energy, rows = self.energy(keys, tokens, layer), own_rows(tokens).long()
        sample = sample_of(cu_seqlens, len(rows))
        sample = torch.where(rows < cu_seqlens[-1], sample, sample + 1)
        # Protected tokens first, then by energy, sample by sample.
        order = energy.masked_fill(protected, torch.inf).argsort(descending=True, stable=True)
        order = order[sample[order].argsort(stable=True)]
        place = torch.empty_like(rows).index_copy_(0, order, rows) - cu_seqlens[sample.clamp(max=tokens.batch_size - 1)]
        heads = number_protected(tokens)
        if self.form == "protect":
            second = (place - heads) % 2 == 1
            return -energy, ~protected & ~second, {"place": place, "keys": keys, "second": second}
        into, similarity = match_tokens(
            keys[order], cu_seqlens, tokens.max_seqlen, threshold=-2.0, protected=heads, backend=self.backend
        )
        partner = torch.empty_like(into).index_copy_(0, order, order[into.clamp(0, len(order) - 1).long()].int())
        score = torch.empty_like(similarity).index_copy_(0, order, 1 - similarity)
        free = (partner != own_rows(tokens)) & ~protected
        return score.where(free, 0.0), free, {"partner": partner}

    def similarities(self, tokens, gone, width, heads):
        matched = tokens * tokens / 4 if self.form == "matching" else gone * gone
        return (tokens * tokens + matched) * (width // heads)

    def into(self, tokens, goes, threshold, partner=None, place=None, keys=None, second=None):
        own = own_rows(tokens)
        if partner is None:  # the sources are the first, third, ... of the 2 r first; the others of these are targets
            sample = sample_of(tokens.cu_seqlens, len(own))
            last = place.new_zeros(tokens.batch_size).scatter_reduce(
                0, sample, torch.where(goes & (own < tokens.cu_seqlens[-1]), place + 1, 0), "amax"
            )
            targets = second & (place <= last[sample]) & tokens.free
            partner = nearest_kept(keys, targets, tokens.cu_seqlens, tokens.max_seqlen, backend=self.backend)
            partner = torch.where(partner < 0, own, partner)
        return torch.where(goes, partner, own)
