"""The linear layer on the GPU, for a number of rows that only the device knows: a persistent matrix product.

Each program reads T and takes every n-th tile of the result, so that no program starts for rows without tokens. Some tiles are
taken in halves where they would be the last and leave most programs without work. Bias, activation and residual are applied to
the float32 sums before they are rounded and stored. On Hopper and later the copy engine fetches the operands (tensor
descriptors), if their addresses are multiples of 16 bytes.

A row has the same bits whatever the number of rows: alone, in any batch, in any buffer. PyTorch's product has not, and is
never taken. Which tiles serve which product is written in `tiles.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..triton_utils import (
    LOG2E,
    Launch,
    after_previous,
    capability,
    cdiv,
    dot_precision,
    multiprocessors,
    prepared,
    product,
)
from . import reference, tiles
from .tiles import Tile

QUICK_GELU = tl.constexpr(reference.QUICK_GELU)
BOTH, HALVES, COLUMNS = (tl.constexpr(form) for form in reference.FORMS)  # of `linear_pair`
GROUP = 8  # row blocks whose tiles follow one another: what they share stays in the L2 cache


@triton.jit
def _gelu(z):
    """z Phi(z), as max(z, 0) - |z| Phi(-|z|), without the cancellation of 1 + erf.

    log2(Phi(-a)) is nearly a parabola: -1 + a Q(a), with Q of degree 7 fitted to a <= 5.5. The error is at most 2.7e-7 |z|, that
    of PyTorch in float32 3.4e-7. Beyond, Q runs on downwards and the second term is nothing. This takes a third of the
    instructions of an erf, and of their fetches: unrolled over a tile, those were most of the kernel's time.
    """
    a = tl.minimum(tl.abs(z), 64.0)
    q = -9.426576948e-7 * a + 1.5572696959e-5
    q = q * a - 6.7104455159e-5
    q = q * a - 4.4118869788e-4
    q = q * a + 7.4872802639e-3
    q = q * a - 5.2813109034e-2
    q = q * a - 0.45909297276
    q = q * a - 1.15112042117
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tl.exp2(q * a - 1.0)


@triton.jit
def _finish(
    z, bias, residual, out, residual_row, out_row, first_row, first_out, first_column, tokens, OUT,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Add the bias to the sums z, apply the activation, add the residual, store in rows from ``first_out + first_row`` on."""
    o_m = first_row + tl.arange(0, ROWS)
    o_n = first_column + tl.arange(0, COLUMNS)
    rows = (first_out + o_m).to(tl.int64)
    m_n = o_n < OUT
    inside = (o_m < tokens)[:, None] & m_n[None, :]
    if bias is not None:
        z += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        z = _gelu(z)
    elif ACTIVATION == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        u = 0.7978845608028654 * (z + 0.044715 * z * z * z)
        z = z / (1.0 + tl.exp2(u * (-2.0 * LOG2E)))
    elif ACTIVATION == "quick_gelu":
        z = z / (1.0 + tl.exp2(z * (-QUICK_GELU * LOG2E)))
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp2(z * -LOG2E))
    if residual is not None:
        if STORED:
            added = residual.load([first_row, first_column])
        else:
            added = tl.load(residual + rows[:, None] * residual_row + o_n[None, :], mask=inside, other=0.0)
        z += added.to(tl.float32)
    if STORED:
        out.store([first_row, first_column], z.to(out.dtype))
    else:
        tl.store(out + rows[:, None] * out_row + o_n[None, :], z.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _corner(tile, row_blocks, column_blocks, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP row blocks, column by column, then the next ones."""
    first_block = tile // (GROUP * column_blocks) * GROUP
    in_group = tile % (GROUP * column_blocks)
    group = tl.minimum(row_blocks - first_block, GROUP)
    return (first_block + in_group % group) * BLOCK_M, in_group // group * BLOCK_N


@triton.jit
def _sums(
    x, weight, x_row, weight_row, first_in, first_row, first_column, tokens, OUT, IN,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of rows from ``first_in + first_row`` on and columns from ``first_column`` on, in float32."""
    o_k = tl.arange(0, DEPTH)
    o_m = first_row + tl.arange(0, ROWS)
    o_n = first_column + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, IN, DEPTH):
        if DESCRIPTORS:  # what lies outside of the tensors is read as 0
            x_tile = x.load([first_in + first_row, start])
            w_tile = weight.load([first_column, start])
        else:
            m_k = (start + o_k < IN)[None, :]
            x_rows = x + (first_in + o_m).to(tl.int64)[:, None] * x_row
            w_rows = weight + o_n.to(tl.int64)[:, None] * weight_row
            x_tile = tl.load(x_rows + (start + o_k)[None, :], mask=(o_m < tokens)[:, None] & m_k, other=0.0)
            w_tile = tl.load(w_rows + (start + o_k)[None, :], mask=(o_n < OUT)[:, None] & m_k, other=0.0)
        acc = product(x_tile, tl.trans(w_tile), acc, PRECISION)
    return acc


@triton.jit
def _multiply_rows(
    x, weight, half_weight, bias, residual, out, x_row, weight_row, residual_row, out_row, first_in, first_out, tokens,
    first_tile, OUT, IN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, DESCRIPTORS: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles ``first_tile``, ``first_tile + programs``, ... of the products of ``tokens`` rows of x from ``first_in`` on, whose
    results are the rows of ``out`` from ``first_out`` on.

    With ``half_weight``, the weight in blocks of half as many columns, the tiles of a last round that would leave half of the
    programs or more without work are taken in halves, one to a program. ``first_tile`` is then the number of the program.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    row_blocks = tl.cdiv(tokens, BLOCK_M)
    column_blocks = tl.cdiv(OUT, BLOCK_N)
    programs = tl.num_programs(0)
    tiles = row_blocks * column_blocks
    whole = tiles
    if half_weight is not None:
        last_round = tiles % programs
        if 2 * last_round <= programs:
            whole = tiles - last_round
    # The loops become one, in which the first loads of a tile precede the end of the tile before. The end finds its place by
    # a count of its own: what both shared would have to be kept for as long.
    finished = first_tile
    for tile in tl.range(first_tile, whole, programs, flatten=True):
        first_row, first_column = _corner(tile, row_blocks, column_blocks, BLOCK_M, BLOCK_N, GROUP)
        acc = _sums(
            x, weight, x_row, weight_row, first_in, first_row, first_column, tokens, OUT, IN,
            BLOCK_M, BLOCK_N, BLOCK_K, DESCRIPTORS, PRECISION,
        )  # fmt: skip

        first_row, first_column = _corner(finished, row_blocks, column_blocks, BLOCK_M, BLOCK_N, GROUP)
        finished += programs
        # Halves of the tile one after the other: the addresses of a whole one would not fit the registers.
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _finish(
            left, bias, residual, out, residual_row, out_row, first_row, first_out, first_column, tokens, OUT,
            BLOCK_M, HALF, ACTIVATION, STORED,
        )  # fmt: skip
        _finish(
            right, bias, residual, out, residual_row, out_row, first_row, first_out, first_column + HALF, tokens, OUT,
            BLOCK_M, HALF, ACTIVATION, STORED,
        )  # fmt: skip

    if half_weight is not None:
        half = 2 * whole + first_tile
        if half < 2 * tiles:
            first_row, first_column = _corner(half // 2, row_blocks, column_blocks, BLOCK_M, BLOCK_N, GROUP)
            first_column += half % 2 * HALF
            acc = _sums(
                x, half_weight, x_row, weight_row, first_in, first_row, first_column, tokens, OUT, IN,
                BLOCK_M, HALF, BLOCK_K, DESCRIPTORS, PRECISION,
            )  # fmt: skip
            _finish(
                acc, bias, residual, out, residual_row, out_row, first_row, first_out, first_column, tokens, OUT,
                BLOCK_M, HALF, ACTIVATION, STORED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _linear_kernel(
    x, weight, half_weight, bias, residual, out, cu_seqlens, batch, x_row, weight_row, residual_row, OUT, IN,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, DESCRIPTORS: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: tiles ``program_id``, ``program_id + programs``, ... of the first T rows of the result; a half of a last one."""
    after_previous()
    _multiply_rows(
        x, weight, half_weight, bias, residual, out, x_row, weight_row, residual_row, OUT, 0, 0,
        tl.load(cu_seqlens + batch), tl.program_id(0), OUT, IN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, ACTIVATION, DESCRIPTORS,
        STORED, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch"])
def _pair_kernel(
    x, weight, other_weight, bias, other_bias, out, offsets, cu_seqlens, batch, x_row, weight_row, other_row, OUT, IN,
    FORM: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: its tiles of the first product, then those of the second, dealt out as if they were one product.

    ``batch`` counts the samples of one half: rows from ``cu_seqlens[batch]`` on are the second half, but of BOTH.
    """
    after_previous()
    first = tl.load(cu_seqlens + batch)
    second = first
    second_in = first
    second_out = first
    out_row = OUT
    if FORM == BOTH:
        second_in = 0
        if tl.program_id(0) == 0:
            for start in range(0, batch + 1, BLOCK_B):
                o_b = start + tl.arange(0, BLOCK_B)
                offset = tl.load(cu_seqlens + o_b, mask=o_b <= batch, other=0)
                tl.store(offsets + o_b, offset, mask=o_b <= batch)
                tl.store(offsets + batch + o_b, first + offset, mask=(o_b > 0) & (o_b <= batch))
    else:
        second = tl.load(cu_seqlens + 2 * batch) - first
    other_out = out
    if FORM == COLUMNS:
        second_out = 0
        out_row = 2 * OUT
        other_out = out + OUT
    tiles = tl.cdiv(first, BLOCK_M) * tl.cdiv(OUT, BLOCK_N)
    programs = tl.num_programs(0)
    _multiply_rows(
        x, weight, None, bias, None, out, x_row, weight_row, 0, out_row, 0, 0, first, tl.program_id(0),
        OUT, IN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, "", DESCRIPTORS, False, PRECISION,
    )  # fmt: skip
    _multiply_rows(
        x, other_weight, None, other_bias, None, other_out, x_row, other_row, 0, out_row, second_in, second_out, second,
        (tl.program_id(0) + programs - tiles % programs) % programs,
        OUT, IN, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, "", DESCRIPTORS, False, PRECISION,
    )  # fmt: skip


def _architecture(device: torch.device) -> int:
    """Major number of the compute capability; 0 where there is none."""
    return capability(device)[0]


def _copy_engine(device: torch.device) -> bool:
    """Whether the device fetches tiles by descriptors, and has the shared memory (227 KiB) for large ones."""
    return _architecture(device) in (9, 10)


def _aligned(tensor: Tensor) -> bool:
    """Whether a descriptor of a matrix in 16 bits may be made: address and distance between rows are multiples of 16 bytes, and
    rows do not overlap (nor are the same, as those of an expanded one)."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 8 == 0 and tensor.stride(0) >= tensor.shape[1]


def _tiles(x: Tensor, weight: Tensor) -> tuple[Tile, ...]:
    if x.dtype == torch.float32:
        return tiles.FLOAT32
    if not x.shape[1] or not _aligned(x) or not _aligned(weight):
        return tiles.UNALIGNED
    return tiles.COPY_ENGINE if _copy_engine(x.device) else tiles.SIXTEEN_BITS


@functools.lru_cache(1024)
def _described(shape: tuple[int, int], stride: int, rows: int, columns: int) -> Callable[[Tensor], TensorDescriptor]:
    """What makes descriptors of blocks ``[rows, columns]`` of aligned matrices of this shape and distance between rows.

    What they share belongs to their class. The constructor of a descriptor checks all of it once more, for longer than a launch
    takes.
    """
    fields = {"shape": shape, "strides": (stride, 1), "block_shape": [rows, columns]}
    blocks, make = type("Blocks", (TensorDescriptor,), fields), object.__new__

    def describe(base: Tensor) -> TensorDescriptor:
        descriptor = make(blocks)
        descriptor.base = base
        return descriptor

    return describe


def _itself(tensor: Tensor | None) -> Tensor | None:
    return tensor


def _product(
    tile: Tile,
    descriptors: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    activation: str,
    residual: Tensor | None,
) -> Callable:
    """What multiplies tensors like these by a tile of one's choice; see :func:`madtp_kernels.triton_utils.prepared`."""
    (capacity, width), columns, dtype = x.shape, weight.shape[0], x.dtype
    tiles = tile.count(capacity, columns)
    programs = min(2 * tiles if tile.halves else tiles, multiprocessors(x) * tile.programs)
    if programs == 0:
        return lambda x, *rest: x.new_empty(capacity, columns)
    stored = descriptors and tile.stored and columns % 8 == 0 and (residual is None or _aligned(residual))
    x_tiles = weight_tiles = half_tiles = residual_tiles = out_tiles = _itself
    if descriptors:
        x_tiles = _described((capacity, width), x.stride(0), tile.rows, tile.depth)
        weight_tiles = _described((columns, width), weight.stride(0), tile.columns, tile.depth)
        half_tiles = _described((columns, width), weight.stride(0), tile.columns // 2, tile.depth)
    if stored:
        out_tiles = _described((capacity, columns), columns, tile.rows, tile.columns // 2)
        if residual is not None:
            residual_tiles = _described((capacity, columns), residual.stride(0), tile.rows, tile.columns // 2)
    sizes = (
        cu_seqlens.shape[0] - 1, x.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), columns, width
    )  # fmt: skip
    start = Launch(
        _linear_kernel, programs,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=GROUP, ACTIVATION=activation,
        DESCRIPTORS=descriptors, STORED=stored, PRECISION=dot_precision(dtype),
        num_warps=tile.warps, num_stages=tile.stages, short=tiles <= programs,
    )  # fmt: skip

    def run(x, weight, bias, cu_seqlens, activation, residual):
        out = x.new_empty(capacity, columns)  # in less time than `torch.empty` reads dtype and device
        start(
            x_tiles(x), weight_tiles(weight), half_tiles(weight) if tile.halves else None, bias, residual_tiles(residual),
            out_tiles(out), cu_seqlens, *sizes,
        )  # fmt: skip
        return out

    return run


def _multiply(tile: Tile, x: Tensor, weight: Tensor, *rest) -> Tensor:
    """A product by a tile of one's choice, for tests and measurements."""
    return _product(tile, _tiles(x, weight) is tiles.COPY_ENGINE, x, weight, *rest)(x, weight, *rest)


@prepared
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, activation: str, residual: Tensor | None
) -> Callable:
    """``[C, out]``; see the public operation for the contract."""
    choice = _tiles(x, weight)
    tile = tiles.choose(choice, _architecture(x.device), multiprocessors(x), *x.shape, weight.shape[0])
    return _product(tile, choice is tiles.COPY_ENGINE, x, weight, bias, cu_seqlens, activation, residual)


def _pair(
    tile: Tile,
    descriptors: bool,
    x: Tensor,
    weight: Tensor,
    other_weight: Tensor,
    bias: Tensor | None,
    other_bias: Tensor | None,
    cu_seqlens: Tensor,
    form: str,
) -> Callable:
    """What runs :func:`linear_pair` for tensors like these by a tile of one's choice."""
    (capacity, width), columns, dtype = x.shape, weight.shape[0], x.dtype
    batch = (cu_seqlens.shape[0] - 1) // (1 if form == "both" else 2)
    shape = reference.pair_shape(capacity, columns, form)
    # Each half may end with a tile of its own.
    tiles = tile.count(2 * capacity if form == "both" else capacity, columns) + cdiv(columns, tile.columns)
    x_tiles = weight_tiles = other_tiles = _itself
    if descriptors:
        x_tiles = _described((capacity, width), x.stride(0), tile.rows, tile.depth)
        weight_tiles, other_tiles = (
            _described((columns, width), w.stride(0), tile.columns, tile.depth) for w in (weight, other_weight)
        )
    sizes = (batch, x.stride(0), weight.stride(0), other_weight.stride(0), columns, width)
    programs = min(tiles, multiprocessors(x) * tile.programs)
    start = Launch(
        _pair_kernel, programs,
        FORM=form, BLOCK_B=256, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=GROUP,
        DESCRIPTORS=descriptors, PRECISION=dot_precision(dtype), num_warps=tile.warps, num_stages=tile.stages,
        short=tiles <= programs,
    )  # fmt: skip

    def run(x, weight, other_weight, bias, other_bias, cu_seqlens, form):
        out = x.new_empty(shape)
        offsets = cu_seqlens.new_empty(2 * batch + 1) if form == "both" else None
        if batch and programs and capacity:  # a descriptor of no row is refused
            start(
                x_tiles(x), weight_tiles(weight), other_tiles(other_weight), bias, other_bias, out, offsets, cu_seqlens, *sizes
            )  # fmt: skip
        elif offsets is not None:
            offsets.zero_()
        return [out] if offsets is None else [out, offsets]

    return run


@prepared
def linear_pair(
    x: Tensor,
    weight: Tensor,
    other_weight: Tensor,
    bias: Tensor | None,
    other_bias: Tensor | None,
    cu_seqlens: Tensor,
    form: str,
) -> Callable:
    """Rows of the result and, of "both", their offsets ``[2B+1]``, as a list; see the public operation for the contract."""
    choice = _tiles(x, weight)
    if choice is not tiles.FLOAT32 and not _aligned(other_weight):
        choice = tiles.UNALIGNED
    rows = x.shape[0] * (2 if form == "both" else 1)
    tile = tiles.choose(choice, _architecture(x.device), multiprocessors(x), rows, x.shape[1], weight.shape[0])
    return _pair(tile, choice is tiles.COPY_ENGINE, x, weight, other_weight, bias, other_bias, cu_seqlens, form)
