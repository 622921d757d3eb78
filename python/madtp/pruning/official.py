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

from .base import PER_TOKEN, Pruning, ScoredPruning, Tokens
from .merging import own_rows


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
        padded = isinstance(tokens, PaddedTokens)
        if not self.weakest_last and not padded:
            return self.rule.compact(tokens, importance, limit, layer, norm, **options)
        # The rows' numbers are carried along: by them scores, ids and padding of what is left are found again.
        numbered = dataclasses.replace(tokens, ids=own_rows(tokens))
        norm = None if self.weakest_last else norm
        left, trace = self.rule.compact(numbered, importance, limit, layer, norm, **options)
        if self.weakest_last and len(left.ids):
            order = weakest_last(left.ids, importance, tokens.cu_seqlens, left.cu_seqlens)
            parts = {name: part[order] for name in PER_TOKEN if (part := getattr(left, name)) is not None}
            left = dataclasses.replace(left, **parts)
        source = left.ids
        ids = torch.where(source < 0, source, tokens.ids[source.clamp(0, len(tokens.ids) - 1)])
        left, trace = dataclasses.replace(left, ids=ids), dataclasses.replace(trace, ids=ids)
        if padded:
            left = left.hiding(mask_after_pruning(tokens, source, left.cu_seqlens, importance), importance.dtype)
        return left, trace


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


def mask_after_pruning(before: PaddedTokens, source: Tensor, cu_seqlens: Tensor, importance: Tensor) -> Tensor:
    """Which tokens are padding after a layer pruned: kept ones stay what they are, and the merged token is hidden if
    the most important of the tokens that went into it was, which is what the official text encoder makes of its mask.

    Args:
        before: the tokens that entered.
        source, cu_seqlens: of the result, as :func:`weakest_last` takes them.
        importance: ``[T]`` float32 of the rows that entered.

    Returns:
        ``[T']`` bool. Nothing waits for a device.
    """
    rows, batch = len(before.ids), before.batch_size
    if not rows:
        return before.padding
    real = torch.arange(len(source), device=source.device) < cu_seqlens[-1]
    kept = source.long().where(real & (source >= 0), rows)  # of what was not kept: a spare row
    beyond = torch.arange(rows + 1, device=source.device) >= before.cu_seqlens[-1]
    score = importance.detach().masked_fill(beyond.index_fill(0, kept, True)[:-1], -torch.inf)
    sample = sample_of(before.cu_seqlens, rows)
    best = score.new_full((batch,), -torch.inf).scatter_reduce(0, sample, score, "amax")
    hidden = (before.padding & (score == best[sample])).float()
    merged = hidden.new_zeros(batch).scatter_reduce(0, sample, hidden, "amax") > 0
    stays = before.padding[source.clamp(0, rows - 1)]
    return torch.where(source < 0, merged[sample_of(cu_seqlens, len(source))], stays)
