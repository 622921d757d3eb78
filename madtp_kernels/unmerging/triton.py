"""Copies of the rows that stand for tokens on the GPU, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import after_previous, block, cdiv, launch, on_device_of_first


@triton.jit(do_not_specialize=["batch"])
def _unmerge_kernel(x, rows, out, cu_seqlens, batch, x_row, WIDTH, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """One program: ROWS tokens."""
    after_previous()
    tokens = tl.load(cu_seqlens + batch)
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    m_t = o_t < tokens
    source = tl.load(rows + o_t, mask=m_t, other=-1).to(tl.int64)
    m_d = (o_d < WIDTH)[None, :]
    tile = tl.load(x + source[:, None] * x_row + o_d[None, :], mask=(source >= 0)[:, None] & m_d, other=0.0)
    tl.store(out + o_t.to(tl.int64)[:, None] * WIDTH + o_d[None, :], tile, mask=m_t[:, None] & m_d)


@on_device_of_first
def unmerge(x: Tensor, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``[C, D]``; see the public operation for the contract."""
    capacity, width = rows.shape[0], x.shape[1]
    out = x.new_empty(capacity, width)
    if capacity and width:
        block_d = block(width)
        programs = max(1, min(32, 8192 // block_d))
        launch(
            _unmerge_kernel, cdiv(capacity, programs),
            x, rows, out, cu_seqlens, cu_seqlens.shape[0] - 1, x.stride(0), width,
            ROWS=programs, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out
