"""The linear layer on the GPU, for a number of rows that only the device knows: a persistent matrix product.

Each program reads T and takes every n-th tile of the result, so that no program starts for rows without tokens. Bias,
activation and residual are applied to the float32 sums before they are rounded and stored. On Hopper and later the copy engine
fetches the operands (tensor descriptors), if their addresses are multiples of 16 bytes.

Which shape of tiles is the fastest is measured, once per size and dtype, with half of the rows in use; PyTorch's product over
the whole buffer takes part, because for float32 it is hard to beat by leaving out rows. A product that takes microseconds
goes to it right away: there launches count, and PyTorch's take less of the host's time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_utils import LOG2E, dot_precision, multiprocessors, on_device_of_first, product
from . import reference

QUICK_GELU = tl.constexpr(reference.QUICK_GELU)
GROUP = 8  # row blocks whose tiles follow one another: what they share stays in the L2 cache

# Multiply-adds below which a product takes some ten microseconds on a large GPU.
SMALL = {torch.float32: 2**28, torch.bfloat16: 2**32, torch.float16: 2**32}


@triton.jit
def _finish(
    z, bias, residual, out, residual_row, o_m, first_column, tokens, OUT, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr
):
    """Add the bias to the sums z, apply the activation, add the residual, store."""
    o_n = first_column + tl.arange(0, COLUMNS)
    rows = o_m.to(tl.int64)
    m_n = o_n < OUT
    inside = (o_m < tokens)[:, None] & m_n[None, :]
    if bias is not None:
        z += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        z = z / (1.0 + tl.exp2(u * (-2.0 * LOG2E)))
    elif ACTIVATION == "quick_gelu":
        z = z / (1.0 + tl.exp2(z * (-QUICK_GELU * LOG2E)))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp2(z * -LOG2E))
    if residual is not None:
        added = tl.load(residual + rows[:, None] * residual_row + o_n[None, :], mask=inside, other=0.0)
        z += added.to(tl.float32)
    tl.store(out + rows[:, None] * OUT + o_n[None, :], z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _corner(tile, row_blocks, column_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP row blocks, column by column, then the next ones."""
    first_block = tile // (GROUP * column_blocks) * GROUP
    in_group = tile % (GROUP * column_blocks)
    group = tl.minimum(row_blocks - first_block, GROUP)
    return (first_block + in_group % group) * BLOCK_M, in_group // group * BLOCK_N


@triton.jit
def _linear_kernel(
    x, weight, bias, residual, out, cu_seqlens, batch, x_row, weight_row, residual_row, OUT, IN,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: tiles ``program_id``, ``program_id + programs``, ... of the first T rows of the result."""
    tokens = tl.load(cu_seqlens + batch)
    row_blocks = tl.cdiv(tokens, BLOCK_M)
    column_blocks = tl.cdiv(OUT, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    # The loops become one, in which the first loads of a tile precede the end of the tile before. The end finds its place by
    # a count of its own: what both shared would have to be kept for as long.
    finished = tl.program_id(0)
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
        first_row, first_column = _corner(tile, row_blocks, column_blocks, BLOCK_M, BLOCK_N, GROUP)
        o_m = first_row + tl.arange(0, BLOCK_M)
        o_n = first_column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, IN, BLOCK_K):
            if DESCRIPTORS:  # what lies outside of the tensors is read as 0
                x_tile = x.load([first_row, start])
                w_tile = weight.load([first_column, start])
            else:
                m_k = (start + o_k < IN)[None, :]
                x_rows = x + o_m.to(tl.int64)[:, None] * x_row
                w_rows = weight + o_n.to(tl.int64)[:, None] * weight_row
                x_tile = tl.load(x_rows + (start + o_k)[None, :], mask=(o_m < tokens)[:, None] & m_k, other=0.0)
                w_tile = tl.load(w_rows + (start + o_k)[None, :], mask=(o_n < OUT)[:, None] & m_k, other=0.0)
            acc = product(x_tile, tl.trans(w_tile), acc, PRECISION)

        first_row, first_column = _corner(finished, row_blocks, column_blocks, BLOCK_M, BLOCK_N, GROUP)
        finished += tl.num_programs(0)
        o_m = first_row + tl.arange(0, BLOCK_M)
        # Halves of the tile one after the other: the addresses of a whole one would not fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        _finish(left, bias, residual, out, residual_row, o_m, first_column, tokens, OUT, BLOCK_N // 2, ACTIVATION)
        _finish(
            right, bias, residual, out, residual_row, o_m, first_column + BLOCK_N // 2, tokens, OUT, BLOCK_N // 2, ACTIVATION
        )


class Tile(NamedTuple):
    """Shape of a tile of the result, columns of the operands per step, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int  # per multiprocessor

    def count(self, rows: int, columns: int) -> int:
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)


# From the one that reuses its operands most to the one that fills a device with the fewest rows.
FLOAT32 = (Tile(128, 128, 16, 8, 2, 1), Tile(64, 128, 16, 8, 2, 2))
SIXTEEN_BITS = (Tile(128, 128, 32, 8, 3, 1), Tile(64, 64, 64, 4, 3, 2))
UNALIGNED = SIXTEEN_BITS[1:]  # the addresses of a large tile would not fit the registers
COPY_ENGINE = (Tile(128, 256, 64, 8, 3, 1), Tile(128, 128, 64, 4, 3, 2), Tile(64, 128, 64, 4, 3, 2))


@functools.cache
def _copy_engine(device: torch.device) -> bool:
    """Whether the device fetches tiles by descriptors, and has the shared memory (227 KiB) for large ones."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def _tiles(x: Tensor, weight: Tensor) -> tuple[Tile, ...]:
    if x.dtype == torch.float32:
        return FLOAT32
    if not x.shape[1] or any(t.data_ptr() % 16 or t.stride(0) % 8 for t in (x, weight)):
        return UNALIGNED
    return COPY_ENGINE if _copy_engine(x.device) else SIXTEEN_BITS


def _unmeasured(tiles: tuple[Tile, ...], x: Tensor, weight: Tensor) -> Tile:
    """The largest tile that the result fills in width, and of which half of the rows have enough for the whole device."""
    rows, columns = x.shape[0] // 2, weight.shape[0]
    for tile in tiles:
        if columns >= tile.columns and tile.count(rows, columns) >= multiprocessors(x) * tile.programs:
            return tile
    return tiles[-1]


_fastest: dict[tuple, Tile | None] = {}


def _choose(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None) -> Tile | None:
    """The tile for this product; None if PyTorch's product over all rows is the faster one."""
    tiles = _tiles(x, weight)
    (capacity, width), columns = x.shape, weight.shape[0]
    if not x.is_cuda:
        return _unmeasured(tiles, x, weight)
    if capacity * width * columns < SMALL[x.dtype]:
        return None
    key = (x.device, x.dtype, tiles, capacity.bit_length(), width, columns)
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed
            return _unmeasured(tiles, x, weight)
        _fastest[key] = _measure(tiles, x, weight, bias, activation, residual)
    return _fastest[key]


def _measure(
    tiles: tuple[Tile, ...], x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tile | None:
    """Time all candidates on this product with half of its rows in use: some tens of milliseconds each."""
    half = torch.full((1,), x.shape[0] // 2, dtype=torch.int32, device=x.device)
    calls = {tile: functools.partial(_multiply, tile, x, weight, bias, half, activation, residual) for tile in tiles}
    calls[None] = functools.partial(reference.linear, x, weight, bias, half, activation, residual)
    times = {
        tile: triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median") for tile, call in calls.items()
    }
    return min(times, key=times.__getitem__)


def _multiply(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: str,
    residual: Tensor | None,
) -> Tensor:
    (capacity, width), columns = x.shape, weight.shape[0]
    out = torch.empty(capacity, columns, dtype=x.dtype, device=x.device)
    programs = min(tile.count(capacity, columns), multiprocessors(x) * tile.programs)
    if programs == 0:
        return out
    descriptors = _tiles(x, weight) is COPY_ENGINE
    x_tiles, weight_tiles = x, weight
    if descriptors:
        x_tiles = TensorDescriptor(x, [*x.shape], [*x.stride()], [tile.rows, tile.depth])
        weight_tiles = TensorDescriptor(weight, [*weight.shape], [*weight.stride()], [tile.columns, tile.depth])
    _linear_kernel[(programs,)](
        x_tiles, weight_tiles, bias, residual, out, cu_seqlens, cu_seqlens.shape[0] - 1,
        x.stride(0), weight.stride(0), residual.stride(0) if residual is not None else 0, columns, width,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=GROUP, ACTIVATION=activation,
        DESCRIPTORS=descriptors, PRECISION=dot_precision(x.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@on_device_of_first
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, activation: str, residual: Tensor | None
) -> Tensor:
    """``[C, out]``; see the public operation for the contract."""
    tile = _choose(x, weight, bias, activation, residual)
    if tile is None:
        return reference.linear(x, weight, bias, cu_seqlens, activation, residual)
    return _multiply(tile, x, weight, bias, cu_seqlens, activation, residual)
