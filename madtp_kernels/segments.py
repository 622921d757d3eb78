"""Per-sample bookkeeping on packed tokens, in plain PyTorch and without waiting for a device: what the gradients use."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_of(cu_seqlens: Tensor, rows: int) -> Tensor:
    """``[rows]`` int64: the sample that each row belongs to; rows beyond T get the last sample (mask them)."""
    row = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=max(cu_seqlens.shape[0] - 2, 0))


def sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[B]`` sums of ``values [C]`` over each sample, in a fixed order; empty samples give 0."""
    if cu_seqlens.shape[0] == 1:
        return values.new_zeros(0)
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0)


def scatter_add(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """``[rows, D]`` sums of those of ``values [N, D]`` that share an ``index [N]`` int64, in a fixed order on every device."""
    result = values.new_zeros(rows, *values.shape[1:])
    if values.is_cuda:  # sorts; index_add_ would add atomically
        return result.index_put_((index,), values, accumulate=True)
    return result.index_add_(0, index, values)  # one by one; index_put_ would add atomically
