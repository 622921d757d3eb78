"""What exists only because MADTP's own code does so, and its checkpoints were trained with it. Nothing else knows of
this.

Batches and pairs whose samples keep equally many tokens, texts with padding that is scored and merged, a minimum below
which CLIP does not prune, and the order in which a top-k on a GPU leaves tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of

from .base import Pruning, ScoredPruning, Tokens


def official(rule: Pruning, reason: str, **settings: Tensor | bool | None) -> Pruning:
    """``rule`` with settings of :class:`Official`; a dense rule stays as it is.

    Raises:
        ValueError: a rule that the official code knows nothing of; the message begins with ``reason``.
    """
    if not rule.active:
        return rule
    if isinstance(rule, Official):
        return dataclasses.replace(rule, **settings)
    if not isinstance(rule, ScoredPruning):
        raise ValueError(f"{reason} is MADTP's, and cannot be combined with pruning by {rule.name!r}")
    return Official(rule, backend=rule.backend, streams=rule.streams, **settings)


def with_minimum(
    rule: Pruning, batch: int, device: torch.device, least: Tensor | None = None, **settings: bool
) -> Pruning:
    """MADTP as CLIP's code runs it: a sample is pruned only if more tokens survive than ``least [B]`` int32 says, by
    default 1.

    With a ``least``, other rules are refused; without, they stay as they are, and a batch whose samples are tied has
    one.
    """
    if least is None:
        if not isinstance(rule, (ScoredPruning, Official)):
            return rule
        least = torch.ones(batch, dtype=torch.int32, device=device)
    elif isinstance(rule, Official) and rule.groups is not None:
        least = least.amax(0, keepdim=True).expand_as(least).contiguous()
    return official(rule, "text_mode 'compat'", min_keep=least, **settings)


@dataclass(frozen=True, eq=False)
class Official(Pruning):
    """A rule that scores tokens, with the exceptions of the official code. Lives for one forward.

    Args:
        rule: MADTP, or another that scores.
        groups: ``[B]`` int32: samples of a group keep the same number of tokens.
        min_keep: ``[B]`` int32: prune a sample only if more than this many tokens survive.
        weakest_last: order of the kept tokens, see :func:`weakest_last`.
    """

    rule: ScoredPruning = dataclasses.field(kw_only=False)
    groups: Tensor | None = None
    min_keep: Tensor | None = None
    weakest_last: bool = False

    name, importance, needs_dictionary, strength = (
        property(attrgetter(f"rule.{name}")) for name in ("name", "importance", "needs_dictionary", "strength")
    )

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        importance, limit = self.rule.decide(block_input, attention, dictionary, layer)
        options = {"groups": self.groups, "min_keep": self.min_keep}
        if not self.weakest_last:
            left, trace = self.rule.compact(tokens, importance, limit, layer, norm, **options)
        else:  # the rows' numbers are carried along, from which their scores are found again
            numbered = torch.arange(len(tokens.ids), dtype=torch.int32, device=tokens.device)
            left, trace = self.rule.compact(
                dataclasses.replace(tokens, ids=numbered), importance, limit, layer, None, **options
            )
            if len(left.ids):
                left = _reordered(
                    left, weakest_last(left.ids, importance, tokens.cu_seqlens, left.cu_seqlens), tokens.ids
                )
            trace = dataclasses.replace(trace, ids=left.ids)
        if isinstance(tokens, PaddedTokens):
            left = left.hiding(mask_after_pruning(tokens, left, importance, layer), importance.dtype)
        return left, trace


def _reordered(left: Tokens, order: Tensor, ids: Tensor) -> Tokens:
    """Rows in another order; their ids, which are rows of ``ids`` until now, become those."""
    source = left.ids[order]
    ids = torch.where(source < 0, source, ids[source.clamp(0, len(ids) - 1)])
    sizes, bias = (None if part is None else part[order] for part in (left.sizes, left.key_bias))
    return dataclasses.replace(left, values=left.values[order], ids=ids, sizes=sizes, key_bias=bias)


@dataclass(frozen=True, eq=False)
class PaddedTokens(Tokens):
    """Texts with their padding, which takes part in scores but is never attended to.

    Attributes:
        padding: ``[C]`` bool.
    """

    padding: Tensor | None = None

    def hiding(self, padding: Tensor, dtype: torch.dtype) -> PaddedTokens:
        """These tokens, of which ``padding [C]`` is hidden as BERT hides it; ``dtype`` is that of the logits."""
        hidden = padding.to(dtype) * -10000.0
        return dataclasses.replace(
            self, padding=padding, key_bias=hidden if self.key_bias is None else self.key_bias + hidden
        )


def fill_up(texts: RaggedBatch, length: int, padding_id: int) -> tuple[RaggedBatch, Tensor]:
    """Texts ``[T]`` filled up with ``padding_id`` to ``length`` tokens each, and which of them are padding ``[B *
    length]``."""
    values, mask = RaggedBatch.unchecked(texts.values, texts.cu_seqlens, length, texts.bound).to_padded(padding_id)
    offsets = torch.arange(len(values) + 1, dtype=torch.int32, device=values.device) * length
    return RaggedBatch(values.flatten(), offsets, length), ~mask.flatten()


def padded(texts: RaggedBatch, length: int, padding_id: int, dtype: torch.dtype) -> PaddedTokens:
    """Texts ``[T]`` filled up to ``length`` tokens each, with hidden padding, for a model in ``dtype``."""
    texts, padding = fill_up(texts, length, padding_id)
    return PaddedTokens.start(texts).hiding(padding, torch.promote_types(dtype, torch.float32))


def weakest_last(source: Tensor, importance: Tensor, cu_seqlens_in: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The order in which `torch.topk(sorted=False)` leaves the kept tokens on a GPU, on which official CLIP text
    depends.

    It collects everything above the K-th largest score by ascending index, and only then the K-th itself (and its
    equals). So of each pruned sample the kept token with the lowest score goes behind the other kept ones; the merged
    token stays last.

    Args:
        source: ``[T']`` int32 row that each row of the result came from; negative for merged tokens.
        importance: ``[T]`` float32 of the rows that entered.
        cu_seqlens_in, cu_seqlens: ``[B+1]`` int32 offsets before and after pruning.

    Returns:
        ``[T']`` int64: which row of the result goes where. Rows beyond the last sample stay behind all samples. Nothing
        waits for a device.
    """
    batch, rows = len(cu_seqlens) - 1, torch.arange(len(source), device=source.device)
    sample = torch.where(rows < cu_seqlens[-1], sample_of(cu_seqlens, len(rows)), batch)
    first = torch.cat([cu_seqlens[:-1], cu_seqlens.new_full((1,), -1)])[sample]
    pruned = torch.cat([cu_seqlens.diff() < cu_seqlens_in.diff(), cu_seqlens.new_zeros(1, dtype=torch.bool)])[sample]
    kept = pruned & (source >= 0) & (rows != first)
    score = importance.detach()[source.clamp(0, len(importance) - 1)].where(kept, torch.inf)
    lowest = score.new_full((batch + 1,), torch.inf).scatter_reduce(0, sample, score, "amin")
    rank = torch.where(source < 0, 2, (kept & (score == lowest[sample])).int())  # others, weakest, merged
    return (sample * 3 + rank).argsort(stable=True)


def mask_after_pruning(before: PaddedTokens, after: Tokens, importance: Tensor, layer: int) -> Tensor:
    """Which tokens are padding after a layer pruned: kept ones stay what they are, and the merged token is hidden if
    the most important of the tokens that went into it was, which is what the official text encoder makes of its mask.

    Returns:
        ``[T']`` bool. Nothing waits for a device.
    """
    if not len(before.ids):
        return before.padding
    old_sample, new_sample = (sample_of(t.cu_seqlens, t.values.shape[0]) for t in (before, after))

    def key(tokens: Tokens, sample: Tensor) -> Tensor:
        """Ascends along the rows: tokens stay in order, and merged ones follow in the order of their layers."""
        ids = tokens.ids.long()
        keys = (sample << 32) + torch.where(ids < 0, (1 << 31) - 1 - ids, ids)
        row = torch.arange(len(keys), device=keys.device)
        return keys.where(row < tokens.cu_seqlens[-1], torch.iinfo(torch.int64).max)  # rows beyond the last token

    old_key, new_key = key(before, old_sample), key(after, new_sample)
    source = torch.searchsorted(old_key, new_key).clamp(max=len(old_key) - 1)
    found = torch.searchsorted(new_key, old_key).clamp(max=len(new_key) - 1)
    stays = (new_key[found] == old_key) | (old_key == torch.iinfo(torch.int64).max)
    score = importance.detach().masked_fill(stays, -torch.inf)
    best = score.new_full((before.batch_size,), -torch.inf).scatter_reduce(0, old_sample, score, "amax")
    hidden = (before.padding & (score == best[old_sample])).float()
    merged = hidden.new_zeros(before.batch_size).scatter_reduce(0, old_sample, hidden, "amax") > 0
    return torch.where(after.ids == -(1 + layer), merged[new_sample], before.padding[source])
