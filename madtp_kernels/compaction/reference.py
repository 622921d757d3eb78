"""Selection, compaction and merging in plain PyTorch: the oracle for tests and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import segments
from ..importance.reference import EPS
from ..ragged import offsets_from_lengths, pack, spans


def select(
    importance: Tensor,
    threshold: Tensor | None,
    keep_count: Tensor | None,
    cu_seqlens: Tensor,
    protected: Tensor | None,
    groups: Tensor | None,
    min_keep: Tensor | None,
) -> list[Tensor]:
    """For every sample the mask ``[L_b]`` of the rows that survive as they are. All True where nothing is pruned.

    Token 0 always survives. A sample is pruned only if more than ``min_keep`` of its other N tokens survive and at least two
    do not: dropping one to append a merged one would not shorten it.
    """
    samples = spans(cu_seqlens)
    chosen, counts = [], []
    for b, (start, stop) in enumerate(samples):
        scores = importance[start + 1 : stop]
        if threshold is not None:
            chosen.append(scores > threshold[b])
            if protected is not None:
                chosen[b] = chosen[b] | protected[start + 1 : stop]
            counts.append(int(chosen[b].sum()))
        else:
            counts.append(min(int(keep_count[b]), len(scores)))

    if groups is not None or threshold is None:
        group = list(range(len(samples))) if groups is None else groups.tolist()
        largest = [max((c for c, g in zip(counts, group, strict=True) if g == own), default=0) for own in group]
        counts = [min(c, max(stop - start - 1, 0)) for c, (start, stop) in zip(largest, samples, strict=True)]
        chosen = []
        for b, (start, stop) in enumerate(samples):
            ranked = importance[start + 1 : stop].argsort(descending=True, stable=True)
            if protected is not None:
                ranked = ranked[protected[start + 1 : stop][ranked].int().argsort(descending=True, stable=True)]
            chosen.append(torch.zeros_like(ranked, dtype=torch.bool).index_fill_(0, ranked[: counts[b]], True))

    keep = []
    for b, (start, stop) in enumerate(samples):
        needed = 0 if min_keep is None else int(min_keep[b])
        pruned = counts[b] > needed and (stop - start - 1) - counts[b] >= 2
        first = torch.ones(min(1, stop - start), dtype=torch.bool, device=importance.device)
        keep.append(torch.cat([first, chosen[b] if pruned else torch.ones_like(chosen[b])]))
    return keep


def compact(
    x: Tensor,
    importance: Tensor,
    threshold: Tensor | None,
    keep_count: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    protected: Tensor | None,
    groups: Tensor | None,
    min_keep: Tensor | None,
    ids: Tensor | None,
    sizes: Tensor | None,
    merged_id: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token 0, the surviving tokens in order, and sum_dropped w x / (sum_dropped w + eps), w = importance (* size)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    masks = select(importance, threshold, keep_count, cu_seqlens, protected, groups, min_keep)
    rows, row_ids, row_sizes = [], [], []
    for keep, (start, stop) in zip(masks, spans(cu_seqlens), strict=True):
        x_b = x[start:stop]
        ids_b = torch.arange(stop - start, device=x.device, dtype=torch.int32) if ids is None else ids[start:stop]
        rows.append(x_b[keep])
        row_ids.append(ids_b[keep])
        if sizes is not None:
            row_sizes.append(sizes[start:stop][keep])
        if keep.all():
            continue
        weight = importance[start:stop][~keep].to(dtype)
        if sizes is not None:
            weight = weight * sizes[start:stop][~keep]
            row_sizes.append(sizes[start:stop][~keep].sum()[None])
        merged = weight @ x_b[~keep].to(dtype) / (weight.sum() + EPS)
        rows.append(merged.to(x.dtype)[None])
        row_ids.append(ids_b.new_full((1,), merged_id))

    lengths = [int(keep.sum()) + (not keep.all()) for keep in masks]
    capacity = sum(lengths) if exact else x.shape[0]
    values = pack(rows, x, capacity)
    ids_out = pack(row_ids, torch.empty(0, dtype=torch.int32, device=x.device), capacity)
    sizes_out = x.new_empty(0, dtype=torch.float32) if sizes is None else pack(row_sizes, sizes, capacity)
    normed = x.new_empty(0) if norm_weight is None else layer_norm(values, norm_weight, norm_bias, norm_eps)
    return values, offsets_from_lengths(lengths, x.device), ids_out, sizes_out, normed


def layer_norm(values: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension with float32 statistics (float64 for float64), result in the dtype of values."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    wide_bias = None if bias is None else bias.to(dtype)
    return F.layer_norm(values.to(dtype), values.shape[-1:], weight.to(dtype), wide_bias, eps).to(values.dtype)


def layer_norm_backward(
    values: Tensor, weight: Tensor, bias: Tensor | None, eps: float, cu_seqlens: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of values, weight and bias (empty without one). Rows beyond T get and give zero. Nothing waits for the device."""
    token = (torch.arange(values.shape[0], device=values.device) < cu_seqlens[-1])[:, None]
    with torch.enable_grad():
        leaves = [
            t.detach().requires_grad_() for t in (values.where(token, 0), weight, *(() if bias is None else (bias,)))
        ]
        out = layer_norm(leaves[0], leaves[1], None if bias is None else leaves[2], eps)
        grads = torch.autograd.grad(out, leaves, d_out.where(token, 0))
    return grads[0], grads[1], d_out.new_empty(0) if bias is None else grads[2]


def compact_backward(
    x: Tensor,
    importance: Tensor,
    cu_seqlens: Tensor,
    sizes: Tensor | None,
    cu_out: Tensor,
    source: Tensor,
    d_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and importance: a scatter of d_values, and through the merge weights into the importance.

    ``source [C']`` int32 is the row of x that each result row came from, -1 for a merged row. With W = sum_dropped w + eps,
    dm the gradient of the merged row and p_j = <x_j, dm>: dx_j = w_j/W dm and dw_j = (p_j - sum_k w_k p_k / W) / W (times the
    size for the importance). Selection and threshold carry none. Nothing here waits for a device.
    """
    if cu_seqlens.shape[0] == 1:
        return torch.zeros_like(x), torch.zeros_like(importance)
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, out_rows = x.shape[0], d_values.shape[0]
    survived = (torch.arange(out_rows, device=x.device) < cu_out[-1]) & (source >= 0)
    # Rows without a source go to a spare row at the end.
    target = torch.where(survived, source.long(), rows)
    dx = x.new_zeros(rows + 1, x.shape[1]).index_copy_(0, target, d_values)[:rows]
    kept = torch.zeros(rows + 1, dtype=torch.bool, device=x.device).index_fill_(0, target, True)[:rows]
    dropped = ~kept & (torch.arange(rows, device=x.device) < cu_seqlens[-1])

    sample = segments.sample_of(cu_seqlens, rows)
    merged_row = (cu_out[1:].long() - 1).clamp(0, max(out_rows - 1, 0))[sample]
    dm = torch.where(dropped[:, None], d_values[merged_row].to(dtype) if out_rows else 0.0, 0.0)
    size = importance.new_ones(rows) if sizes is None else sizes.to(importance.dtype)
    weight = torch.where(dropped, importance * size, 0.0).to(dtype)
    total = (segments.sums(weight, cu_seqlens) + EPS)[sample]
    agreement = torch.where(dropped, (x.to(dtype) * dm).sum(1), 0.0)
    mean = segments.sums(weight * agreement, cu_seqlens)[sample] / total
    dx = torch.where(dropped[:, None], (weight / total)[:, None] * dm, dx)
    d_importance = torch.where(dropped, (agreement - mean) / total * size, 0.0)
    return dx.to(x.dtype), d_importance.to(importance.dtype)
