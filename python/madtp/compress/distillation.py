"""What a dense model makes of the tokens, as a target for a pruned one: of each token the mean over all that it stands
for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of, scatter_add

from ..processes import mean_over_processes
from ..pruning import LayerTrace

__all__ = ["assignment", "distillation_loss"]


def assignment(trace: Sequence[LayerTrace]) -> Tensor:
    """Which row of the last layer stands for each token that entered the first one.

    Args:
        trace: one record per layer, in order; at least one.

    Returns:
        ``[T]`` int64; -1 for a token that was dropped without being merged into another.
    """
    first = trace[0]
    entered = int(first.cu_seqlens_in[-1])
    rows = torch.arange(entered, device=first.ids.device)
    ids = rows - first.cu_seqlens_in[sample_of(first.cu_seqlens_in, entered)]
    for layer in trace:
        step = _rows(layer, ids) if layer.rows is None else layer.rows
        rows = torch.where(rows < 0, -1, step[rows.clamp(min=0)].long())
        ids = layer.ids
    return rows


def _rows(layer: LayerTrace, ids: Tensor) -> Tensor:
    """The row that stands for each token that entered a layer, found again by its id; for dropped ones the appended
    row.

    Args:
        layer: record of a rule that does not say it.
        ids: ``[T]`` of the tokens that entered.
    """
    entered, left = int(layer.cu_seqlens_in[-1]), int(layer.cu_seqlens[-1])
    if entered == left:
        return torch.arange(entered, device=ids.device)
    sample_in, sample = sample_of(layer.cu_seqlens_in, entered), sample_of(layer.cu_seqlens, left)
    # Ids of a sample are unique, and well within 32 bits.
    known, order = ((sample.long() << 32) + layer.ids[:left]).sort()
    wanted = (sample_in.long() << 32) + ids[:entered]
    place = torch.searchsorted(known, wanted).clamp(max=left - 1)
    last = layer.cu_seqlens[1:].long() - 1 if layer.appends else layer.cu_seqlens[1:].long() * 0 - 1
    return torch.where(known[place] == wanted, order[place], last[sample_in])


def distillation_loss(tokens: RaggedBatch, rows: Tensor, dense: RaggedBatch) -> Tensor:
    """How far tokens are from the mean of the dense tokens that they stand for.

    The mean squared error over the variance of the dense tokens; both are taken over the batches of all processes
    together.

    Args:
        tokens: ``[T', D]`` final states of a pruned stream.
        rows: ``[T]`` int64: which of them stands for each original token; -1: none does. See :func:`assignment`.
        dense: ``[T, D]`` final states of the same samples without pruning; an exact buffer without gradient.
    """
    target, sources = dense.values.float(), rows >= 0
    counts = torch.bincount(rows[sources], minlength=len(tokens.values))
    means = scatter_add(target[sources], rows[sources], len(tokens.values)) / counts.clamp(min=1)[:, None]
    # Rows beyond the last token may hold anything, even NaN, which no factor of zero takes away.
    stands = (counts > 0)[:, None]
    error = (tokens.values.float().where(stands, means) - means).square().mean(-1).sum()
    variance, mean = torch.var_mean(target, correction=0)
    moments = torch.stack([torch.ones_like(mean), mean, variance + mean.square()]).double() * target.numel()
    left, elements, total, squares = mean_over_processes(torch.cat([stands.sum().double()[None], moments]))
    variance = squares / elements - (total / elements).square()
    return error / (left * variance).float()
