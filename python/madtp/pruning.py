"""DTP, the dynamic token pruning of one layer, and the record it leaves. Paper: arXiv 2403.02991, section 3.3.

The arithmetic is in `madtp_kernels`; here is what a model has to carry from layer to layer for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch, compact, score_tokens
from madtp_kernels.segments import sample_of


@dataclass(frozen=True)
class Pruning:
    """How one stream (vision or text) is pruned during one forward."""

    temperature: float
    """0: dense. Higher prunes more."""
    groups: Tensor | None = None
    """``[B]`` int32: samples of a group keep the same number of tokens (official batches)."""
    use_sizes: bool = False
    """Let merged tokens weigh what they stand for, in attention and in further merges (not in the paper)."""
    backend: str | None = None
    min_keep: Tensor | None = None
    """``[B]`` int32: prune a sample only if more than this many tokens survive (0 by default)."""
    protected_ids: Tensor | None = None
    """``[B]`` int32: id of one more token of each sample, beside token 0, that always survives."""
    weakest_last: bool = False
    """Order of the kept tokens: ascending, or with the one of the lowest score behind the others (see
    :func:`weakest_last`)."""

    @property
    def active(self) -> bool:
        return self.temperature > 0

    def decide(
        self, entering: RaggedBatch, guide: tuple[Tensor, Tensor | None], received: Tensor, cls: Tensor, layer: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tokens that enter a layer are worth, and which of them stay. Another rule is a subclass of this.

        Args:
            entering: tokens ``[T, D]``.
            guide, received, cls, layer: as in :func:`prune_layer`.

        Returns:
            Importance ``[T]`` float32, and for :func:`madtp_kernels.compact` either ``{"threshold": [B] float32}`` or
            ``{"keep_count": [B] int32}``.
        """
        dictionary, bias = guide
        importance, threshold = score_tokens(
            entering.values, dictionary, received, cls, entering.cu_seqlens, entering.max_seqlen, self.temperature,
            bias=bias, backend=self.backend,
        )  # fmt: skip
        return importance, {"threshold": threshold}


@dataclass(frozen=True)
class Stream:
    """Tokens on their way through the layers."""

    tokens: RaggedBatch
    ids: Tensor
    """``[T]`` int32: position of the original token in its sample; -(1 + layer) for a token merged in that layer."""
    sizes: Tensor | None = None
    """``[T]`` float32: how many original tokens each stands for; only with ``Pruning.use_sizes``."""
    masked: Tensor | None = None
    """``[T]`` bool: padding, which takes part in scores but is never attended to; only where padding is asked for."""

    @classmethod
    def start(cls, tokens: RaggedBatch, use_sizes: bool) -> Stream:
        """Every token stands for itself."""
        row = torch.arange(tokens.values.shape[0], device=tokens.device)
        sample = torch.searchsorted(tokens.cu_seqlens[1:], row, right=True, out_int32=True)
        first = tokens.cu_seqlens[sample.clamp(max=max(tokens.batch_size - 1, 0))] if tokens.batch_size else row
        sizes = torch.ones_like(row, dtype=torch.float32) if use_sizes else None
        return cls(tokens, (row - first).to(torch.int32), sizes)

    def with_values(self, values: Tensor) -> Stream:
        return Stream(self.tokens.with_values(values), self.ids, self.sizes, self.masked)

    @property
    def key_bias(self) -> Tensor | None:
        """Log of the sizes: makes a merged token count as the tokens it stands for. Padding is hidden as in BERT."""
        dtype = torch.promote_types(self.tokens.dtype, torch.float32)  # that of the logits
        bias = None if self.sizes is None else self.sizes.to(dtype).log()
        if self.masked is None:
            return bias
        hidden = self.masked.to(dtype) * -10000.0
        return hidden if bias is None else hidden + bias


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did to its tokens. Everything stays on the device until somebody reads it."""

    cu_seqlens_in: Tensor
    """``[B+1]`` int32 offsets of the tokens that entered."""
    cu_seqlens: Tensor
    """``[B+1]`` int32 offsets of the tokens that left."""
    ids: Tensor
    """``[T']`` int32 of the tokens that left (see :class:`Stream`); token 0 of each sample has id 0."""
    importance: Tensor | None = None
    """``[T]`` float32 of the tokens that entered; None in a dense layer."""
    threshold: Tensor | None = None
    """``[B]`` float32; None in a dense layer, and where a number of tokens is kept instead."""

    @property
    def lengths_in(self) -> Tensor:
        return self.cu_seqlens_in.diff()

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    @property
    def pruned(self) -> Tensor:
        """``[B]`` bool: pruning always shortens a sample."""
        return self.lengths < self.lengths_in

    @property
    def kept(self) -> Tensor:
        """``[B]`` prunable tokens that survived as themselves (neither token 0 nor this layer's merged token)."""
        return self.lengths - 1 - self.pruned.int()


def prune_layer(
    stream: Stream,
    entering: Tensor,
    received: Tensor,
    cls: Tensor,
    guide: tuple[Tensor, Tensor | None],
    pruning: Pruning,
    layer: int,
    *,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
) -> tuple[Stream, Tensor | None, LayerTrace]:
    """Prune the tokens after a block's attention sub-layer.

    Args:
        stream: tokens ``[T, D]`` after the attention sub-layer (residual added).
        entering: ``[T, D]`` the tokens as they entered the block.
        received, cls: ``[T]`` float32, the importance of the block's attention.
        guide: folded dictionary ``[M, D]`` and bias ``[M]`` or None.
        layer: number of the layer, for the ids of merged tokens.
        norm: LayerNorm that follows, done in the same pass.

    Returns:
        The stream that goes on, the normalised rows (None without ``norm``), and the record of the layer.
    """
    cu_seqlens, ids, protected = stream.tokens.cu_seqlens, stream.ids, None
    if pruning.protected_ids is not None and len(ids):
        protected = ids == pruning.protected_ids[sample_of(cu_seqlens, len(ids))]
    if pruning.weakest_last:  # the rows' numbers are carried along, from which their scores are found again
        ids = torch.arange(len(ids), dtype=torch.int32, device=ids.device)
    importance, limit = pruning.decide(stream.tokens.with_values(entering), guide, received, cls, layer)
    tokens, ids, sizes, normed = compact(
        stream.tokens, importance, backend=pruning.backend, ids=ids, sizes=stream.sizes, merged_id=-(1 + layer),
        protected=protected, groups=pruning.groups, min_keep=pruning.min_keep, norm=norm, **limit,
    )  # fmt: skip
    if pruning.weakest_last and len(ids):
        order = weakest_last(ids, importance, cu_seqlens, tokens.cu_seqlens)
        source = ids[order]
        ids = torch.where(source < 0, source, stream.ids[source.clamp(0, len(stream.ids) - 1)])
        tokens = tokens.with_values(tokens.values[order])
        sizes = None if sizes is None else sizes[order]
        normed = None if normed is None else normed[order]
    trace = LayerTrace(cu_seqlens, tokens.cu_seqlens, ids, importance, limit.get("threshold"))
    return Stream(tokens, ids, sizes), normed, trace


def weakest_last(source: Tensor, importance: Tensor, cu_seqlens_in: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The order in which `torch.topk(sorted=False)` leaves the kept tokens on a GPU, on which official CLIP text depends.

    It collects everything above the K-th largest score by ascending index, and only then the K-th itself (and its equals).
    So of each pruned sample the kept token with the lowest score goes behind the other kept ones; the merged token stays last.

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
