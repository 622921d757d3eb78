"""Giving every token the row that stands for it, in plain PyTorch: the oracle, and what serves without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import segments


def unmerge(x: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x[rows], zeros where a row is -1. Rows beyond T are zero too."""
    present = _present(rows, cu_seqlens)
    if x.shape[0] == 0:
        return x.new_zeros(rows.shape[0], x.shape[1])
    return x[rows.long().where(present, 0)].where(present[:, None], 0)


def unmerge_backward(x: Tensor, rows: Tensor, cu_seqlens: Tensor, d_out: Tensor) -> Tensor:
    """The sum of the gradients of all tokens that a row stands for."""
    present = _present(rows, cu_seqlens)
    dtype = torch.promote_types(x.dtype, torch.float32)
    target = rows.long().where(present, x.shape[0])  # what has no row goes to a spare one
    return segments.scatter_add(d_out.to(dtype).where(present[:, None], 0), target, x.shape[0] + 1)[:-1].to(x.dtype)


def _present(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    return (torch.arange(rows.shape[0], device=rows.device) < cu_seqlens[-1]) & (rows >= 0)
