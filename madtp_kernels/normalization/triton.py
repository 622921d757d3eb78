"""LayerNorm on the GPU, for a number of rows that only the device knows: as many programs as the device holds share them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import Launch, after_previous, block, cdiv, multiprocessors, prepared

PROGRAMS = 6  # per multiprocessor, which has registers for as many


@triton.jit(do_not_specialize=["batch"])
def _layer_norm_kernel(
    x, weight, bias, out, cu_seqlens, batch, x_row, eps, WIDTH, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: every n-th group of ROWS whole rows among the first T."""
    after_previous()
    tokens = tl.load(cu_seqlens + batch)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    for start in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < tokens)[:, None] & m_d[None, :]
        wide = rows.to(tl.int64)[:, None]
        tile = tl.load(x + wide * x_row + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(m_d[None, :], tile - (tl.sum(tile, 1) / WIDTH)[:, None], 0.0)
        scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
        result = centred * scale[:, None] * tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        if bias is not None:
            result += tl.load(bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        tl.store(out + wide * WIDTH + o_d[None, :], result.to(out.dtype.element_ty), mask=mask)


@prepared
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, eps: float) -> Callable:
    """``[C, D]``; see the public operation for the contract."""
    capacity, width = x.shape
    block_d = block(width)
    rows = max(1, min(16, 4096 // block_d))
    programs = min(cdiv(capacity, rows), PROGRAMS * multiprocessors(x))
    if programs == 0:
        return lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format)
    sizes = (cu_seqlens.shape[0] - 1, x.stride(0), eps, width)
    start = Launch(_layer_norm_kernel, programs, ROWS=rows, BLOCK_D=block_d, num_warps=4)

    def run(x, weight, bias, cu_seqlens, eps):
        out = x.new_empty(capacity, width)
        start(x, weight, bias, out, cu_seqlens, *sizes)
        return out

    return run
