"""Choosing tokens and merging them into others in plain PyTorch, without waiting for a device: the oracle for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import segments
from ..importance.reference import EPS


def lowest_tokens(
    scores: Tensor,
    count: Tensor | None,
    cu_seqlens: Tensor,
    free: Tensor,
    threshold: float | None,
    share: float = 1.0,
    uncounted: int = 0,
) -> Tensor:
    """``[C]`` bool: by two stable sorts, by score and then by sample, what is among the first of its sample: min(count,
    floor(share (L - uncounted))) of them."""
    capacity, batch = scores.shape[0], cu_seqlens.shape[0] - 1
    row = torch.arange(capacity, device=scores.device)
    may = free & (row < cu_seqlens[-1])
    if batch == 0:
        return may
    if threshold is not None:
        may = may & (scores <= threshold)
    sample = segments.sample_of(cu_seqlens, capacity)
    # From the last row to the first, so that of equal scores the later one leads; what may not go stands behind.
    order = row.flip(0)
    order = order[scores.where(may, float("inf"))[order].argsort(stable=True)]
    order = order[sample.where(row < cu_seqlens[-1], batch)[order].argsort(stable=True)]
    place = torch.empty_like(row).index_copy_(0, order, row) - cu_seqlens[sample]
    most = ((cu_seqlens.diff() - uncounted).clamp(min=0).float() * share).long()
    most = most if count is None else torch.minimum(most, count)
    return may & (place < most[sample])


def number_rows(into: Tensor, cu_seqlens: Tensor, append: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where everything goes: offsets ``cu_out [B+1]``, ``rows [C]`` int64 of the result (-1: none), and ``kept [C]`` bool.

    Kept tokens in order, then, with ``append``, one row for all dropped tokens of a sample that has any.
    """
    capacity, batch = into.shape[0], cu_seqlens.shape[0] - 1
    row = torch.arange(capacity, device=into.device)
    valid = row < cu_seqlens[-1]
    kept, dropped = valid & (into == row), valid & (into < 0)
    sample = segments.sample_of(cu_seqlens, capacity)
    counts = segments.scatter_add(kept.long(), sample, batch + 1)[:batch]
    extra = (segments.scatter_add(dropped.long(), sample, batch + 1)[:batch] > 0).long() * append
    cu_out = torch.cat([counts.new_zeros(1), (counts + extra).cumsum(0)])
    if batch == 0:
        return cu_out.int(), torch.full_like(row, -1), kept
    before = cu_out[:-1] - (counts.cumsum(0) - counts)  # rows appended to earlier samples
    target = kept.cumsum(0) - 1 + before[sample]
    other = into.long().clamp(0, max(capacity - 1, 0))
    last = (cu_out[1:] - 1)[sample] if append else -torch.ones_like(row)
    return cu_out.int(), torch.where(valid & (into >= 0), target[other], last).where(valid, -1), kept


def merge_tokens(
    x: Tensor,
    into: Tensor,
    weights: Tensor,
    sizes: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    append: str,
    exact: bool,
    carry: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """values, cu_out, sizes_out, rows, source, carried.

    A kept token becomes the mean of itself and the tokens merged into it; alone, or without any weight, it stays what it is. An
    appended row is sum w x ("sum") or sum w x / (sum w + eps) ("mean") over the dropped tokens.
    """
    capacity, dtype = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    cu_out, rows, kept = number_rows(into, cu_seqlens, append != "")
    target = rows.where(rows >= 0, capacity)  # what goes nowhere goes to a spare row
    present = (rows >= 0)[:, None]
    weight = weights.to(dtype).where(rows >= 0, 0)
    total = segments.scatter_add(weight, target, capacity + 1)[:-1]
    summed = segments.scatter_add(weight[:, None] * x.to(dtype).where(present, 0), target, capacity + 1)[:-1]
    own = torch.full_like(rows, -1, dtype=torch.int64)
    own = torch.cat([own, own[:1]]) if capacity else own.new_full((1,), -1)
    own[target.where(kept, capacity)] = torch.arange(capacity, device=x.device).where(kept, -1)
    source = own[:capacity]  # [C] the kept token of each row, -1 for an appended one
    members = segments.scatter_add((rows >= 0).long(), target, capacity + 1)[:-1]

    appended = summed if append == "sum" else summed / (total + EPS)[:, None]
    mean = torch.where((source >= 0)[:, None], summed / total[:, None], appended).to(x.dtype)
    stays = (source >= 0) & ((members == 1) | (total == 0))
    copied = x[source.clamp(min=0)] if capacity else x
    values = torch.where(stays[:, None], copied, mean)
    sizes_out = segments.scatter_add(sizes.where(rows >= 0, 0), target, capacity + 1)[:-1]
    defined = int(cu_out[-1]) if exact else capacity
    carried = [follow(tensor, source[:defined]) for tensor in carry]
    return values[:defined], cu_out, sizes_out[:defined], rows.int(), source[:defined].int(), carried


def follow(carried: Tensor, source: Tensor) -> Tensor:
    """The rows of a tensor ``[C, ...]`` that belong to the source of each row of the result; zeros for an appended row."""
    if carried.shape[0] == 0:
        return carried.clone()
    present = (source >= 0).reshape(-1, *[1] * (carried.dim() - 1))
    rows = carried[source.clamp(min=0).long()]
    return torch.where(present, rows, rows.new_zeros(()))  # masked_fill knows no float8


def follow_backward(d_carried: Tensor, source: Tensor, capacity: int) -> Tensor:
    """Each row's gradient to its source, which no other row has."""
    target = source.long().where(source >= 0, capacity)  # of an appended row: a spare one
    return d_carried.new_zeros(capacity + 1, *d_carried.shape[1:]).index_copy(0, target, d_carried)[:capacity]


def merge_tokens_backward(
    x: Tensor, weights: Tensor, rows: Tensor, source: Tensor, append: str, d_values: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weights, 0 for tokens that went nowhere. With W the weights of a row and m its value:

    dx_i = w_i / W dm and dw_i = <x_i - m, dm> / W in a mean (W + eps in an appended one); dx_i = w_i dm and dw_i = <x_i, dm> in
    an appended sum; dx_i = dm where a row is a copy.
    """
    capacity, dtype = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    present = rows >= 0
    target = rows.long().where(present, capacity)
    weight = weights.to(dtype).where(present, 0)
    spare = capacity - d_values.shape[0]
    dm = torch.cat([d_values.to(dtype), d_values.new_zeros(spare + 1, x.shape[1], dtype=dtype)])[
        target
    ]  # 0 where not present
    kept = torch.cat([source >= 0, source.new_zeros(spare + 1, dtype=torch.bool)])[target]
    total = segments.scatter_add(weight, target, capacity + 1)[target]
    members = segments.scatter_add(present.long(), target, capacity + 1)[target]
    copied = kept & ((members == 1) | (total == 0))
    is_source = torch.zeros(capacity + 1, dtype=torch.bool, device=x.device)
    is_source[source.long().where(source >= 0, capacity)] = True
    total = torch.where(kept, total, 1.0 if append == "sum" else total + EPS)
    share = torch.where(copied, is_source[:capacity].to(dtype), weight / total)
    agreement = (x.to(dtype) * dm).sum(1).where(present, 0)
    mean = segments.scatter_add(weight * agreement, target, capacity + 1)[target] / total
    if append == "sum":
        mean = mean.where(kept, 0)
    dx = share[:, None] * dm
    d_weight = ((agreement - mean) / total).where(present & ~copied, 0)
    return dx.to(x.dtype), d_weight.to(weights.dtype)
