"""Ranked novelty: a token goes if one that matters more is like it, and is merged into the most similar survivor. No
training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from madtp_kernels import merge_redundant, merge_scores, nearest_kept, score_tokens

from ..config import check_choices
from .base import LayerTrace, register
from .merging import MergingPruning, number_protected, own_rows

ORDERS = ("attention", "cls", "norm", "importance", "index")
"""By what tokens may be ranked."""
KEYS = ("concatenated", "per_head", "averaged")
"""How the keys of several heads are compared."""


@register
@dataclass(frozen=True, kw_only=True)
class RankedNovelty(MergingPruning):
    """Drops tokens that are like one that matters more; each is merged into the survivor with the most similar key.

    With k the layer's keys, a the order and s the sizes of a sample's tokens (without protected ones):

        n_j = 1 - max { cos(k_i, k_j) : a_i > a_j, or a_i = a_j and i before j }     (2 for the first of all)
        c_j = (a_j / mean a) ^ attention_exponent * n_j ^ novelty_exponent * s_j ^ size_exponent

    and tokens with ``c_j`` up to the layer's threshold go, at most two thirds. Novelty against *all* tokens would let
    both of two like tokens go; in an order one of every group of likes stays. The form is that of density-peaks
    clustering (Rodriguez and Laio, Science 2014), with attention received for the density; thresholds per layer are
    ATM's, too (arXiv 2505.15160).

    Args:
        order: what matters: "attention" received, the maximum over heads summed over queries; "cls": that of the first
            token; "norm" of the token, which needs no attention weights; MADTP's "importance", which needs a
            dictionary; "index": earlier tokens matter more.
        weight: what stands in the score for ``a``, if not the order.
        keys: what a cosine is taken of: heads "concatenated", in which those with longer keys count more; "per_head",
            the mean of the cosines of all heads; heads "averaged": a fraction of the work, slightly worse.
        attention_exponent, novelty_exponent, size_exponent: of the score.
        second_look: with thresholds, a token whose score is above this multiple of the threshold once its novelty is
            taken against the survivors alone stays after all; 0: no such look. None: calibration tries 0 and 1, and
            without one it is 0.
    """

    name: ClassVar[str] = "ranked_novelty"

    order: str = "attention"
    weight: str | None = None
    keys: str = "concatenated"
    attention_exponent: float = 0.25
    novelty_exponent: float = 1.0
    size_exponent: float = 0.3
    second_look: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, "", order=ORDERS, weight=(None, *ORDERS), keys=KEYS)
        for name in ("attention_exponent", "novelty_exponent", "size_exponent"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        look = self.second_look
        if look is not None and not (isinstance(look, (int, float)) and 0 <= look < math.inf):
            raise ValueError(f"second_look: expected a number >= 0 or None, got {look!r}")

    @property
    def variants(self):
        if self.second_look is not None:
            return (self,)
        return replace(self, second_look=0.0), replace(self, second_look=1.0)

    def _uses(self, *orders: str) -> bool:
        return self.order in orders or self.weight in orders

    @property
    def importance(self) -> str | None:
        return "max" if self._uses("attention", "cls", "importance") else None

    @property
    def needs_dictionary(self) -> bool:
        return self._uses("importance")

    def _importance(self, order, tokens, block_input, attention, dictionary):
        """``[C]``: what each token is worth by ``order``."""
        if order == "attention":
            if tokens.prefix == 1:
                return attention.attention_received
            return attention.received("max", slice(tokens.prefix, None))
        if order == "cls":
            return attention.cls_attention
        if order == "norm":
            return torch.linalg.vector_norm(tokens.values, dim=1, dtype=_wide(tokens))
        if order == "importance":
            entries, bias = dictionary
            return score_tokens(
                block_input.values, entries, attention.attention_received, attention.cls_attention, tokens.cu_seqlens,
                tokens.max_seqlen, 1.0, bias=bias, backend=self.backend,
            )[0]  # fmt: skip
        return 1 / (1 + tokens.ids.clamp(min=0).to(_wide(tokens)))

    def _compared(self, tokens, block_input, attention, dictionary):
        """The keys by which tokens are compared, the order, and the other arguments of :func:`madtp_kernels.merge_scores` but
        ``free``."""
        keys = attention.keys
        if self.keys == "averaged":
            keys = keys.mean(1)
        elif self.keys == "per_head":  # heads of unit length: the cosine of all is the mean of the heads'
            keys = F.normalize(keys, dim=2)
        order = self._importance(self.order, tokens, block_input, attention, dictionary)
        weight = None
        if self.weight not in (None, self.order):
            weight = self._importance(self.weight, tokens, block_input, attention, dictionary)
        return keys, order, {
            "weight": weight, "sizes": tokens.sizes, "weight_exponent": self.attention_exponent,
            "novelty_exponent": self.novelty_exponent, "size_exponent": self.size_exponent, "backend": self.backend,
        }  # fmt: skip

    def _in_one_call(self, layer):
        """Whether :func:`madtp_kernels.merge_redundant` does what the steps of this rule do in a layer."""
        if not self.active:
            return False
        kind, limit = self.limit_of(layer)
        own = type(self)
        steps = (own.score, own.choose, own.chosen, own.prunable, own.lowest, own.into, own.merge)
        return limit > 0 and not (self.second_look and kind == "thresholds") and steps == _STEPS

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        if not self._in_one_call(layer):
            return super().__call__(
                tokens, block_input=block_input, attention=attention, dictionary=dictionary, layer=layer, norm=norm
            )
        keys, order, options = self._compared(tokens, block_input, attention, dictionary)
        # Position ids serve as a mask: only the first token of a sample has number 0.
        first_only = tokens.prefix == 1 and tokens.protected_ids is None
        norm = norm if keys.is_cuda and _follows(norm) else None
        merged, scores, normed, log_sizes = merge_redundant(
            tokens, keys, order, free=tokens.ids if first_only else tokens.free, **options, **self.argument(layer),
            share=self.share, uncounted=number_protected(tokens), carry=(tokens.ids,),
            norm=None if norm is None else norm.affine, with_log_sizes=self.proportional_attention,
        )  # fmt: skip
        left = tokens.survivors(
            merged.tokens, merged.carried[0], merged.sizes, key_bias=log_sizes,
            normed=None if norm is None else (norm, normed),
        )  # fmt: skip
        return left, LayerTrace(tokens.cu_seqlens, left.cu_seqlens, left.ids, scores, rows=merged.rows)

    def score(self, tokens, block_input, attention, dictionary, layer):
        keys, order, options = self._compared(tokens, block_input, attention, dictionary)
        free = tokens.free
        score, new, inverse_norms = merge_scores(
            keys, order, tokens.cu_seqlens, tokens.max_seqlen, free=free, **options
        )
        found = {"keys": keys, "inverse_norms": inverse_norms, "new": new, "total": score, "free": free}
        return score, free, found

    def similarities(self, tokens, gone, width, heads):
        depth = width // heads if self.keys == "averaged" else width
        return tokens * tokens / 2 * depth + gone * (tokens - gone) * depth + gone * depth

    def into(self, tokens, goes, threshold, keys, inverse_norms, new, total, free):
        stays = free > goes  # free and not going, in one operation
        nearest = nearest_kept(
            keys, stays, tokens.cu_seqlens, tokens.max_seqlen, goes=goes, inverse_norms=inverse_norms,
            backend=self.backend,
        )  # fmt: skip
        if self.second_look and threshold is not None:
            # What a token resembled may have gone, too: it stays if it is new beside all that is left.
            rows = goes.nonzero()[:, 0] if goes.device.type == "cpu" else own_rows(tokens).long()
            # Rows beyond the last token hold any number.
            others = nearest[rows].clamp(0, len(nearest) - 1).long()
            cosine = F.cosine_similarity(
                keys[rows].flatten(1).to(new.dtype), keys[others].flatten(1).to(new.dtype), dim=1
            )
            change = ((1 - cosine).double() / new[rows].double().clamp(min=1e-12)) ** self.novelty_exponent
            goes = goes.index_copy(
                0, rows, goes[rows] & (total[rows].double() * change <= threshold * self.second_look)
            )
            return torch.where(goes, nearest, own_rows(tokens))
        return nearest


_STEPS = (
    RankedNovelty.score, RankedNovelty.choose, RankedNovelty.chosen, RankedNovelty.prunable, RankedNovelty.lowest,
    RankedNovelty.into, RankedNovelty.merge,
)  # fmt: skip
"""What a subclass may have replaced."""


def _follows(norm):
    """Whether a LayerNorm is to be applied in the GPU's kernel that merges: at inference, if nobody watches it."""
    if norm is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    plain = getattr(norm, "is_plain", False) and norm.affine[0] is not None
    return plain and not torch.is_autocast_enabled("cuda")


def _wide(tokens):
    return torch.promote_types(tokens.dtype, torch.float32)
