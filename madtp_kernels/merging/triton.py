"""Choosing tokens and merging them on the GPU. Choosing is one launch, which finds the score that the r-th lowest token has by
bisection over its bits. Of merging, a handful of PyTorch's operators number the rows, and one launch makes them.

Tokens are sorted by the row they go to, so that a row's members lie side by side: its sum is made by one program, in the order
of the tokens, and nothing is added atomically.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import EPS, Launch, block, launch, on_device_of_first, prepared
from .reference import number_rows

POSITION_BITS = tl.constexpr(30)
BLOCK = 1024  # scores per step
CARRY_BLOCK = tl.constexpr(256)  # elements of a carried row per step


@triton.jit
def _rank(scores, free, threshold, bos, o_j, length, HAS_THRESHOLD: tl.constexpr):
    """Tokens that may go as int64, larger goes earlier: the lower score, then the later position. Distinct and >= 0; -1 for
    tokens that stay.
    """
    m_j = o_j < length
    value = tl.load(scores + bos + o_j, mask=m_j, other=0.0)
    may_go = m_j & (tl.load(free + bos + o_j, mask=m_j, other=0) != 0)
    if HAS_THRESHOLD:
        may_go = may_go & (value <= threshold)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True).to(tl.int64)  # one zero, not two
    descending = tl.where(bits < 0, 0xFFFFFFFF + 1 + bits, 0x7FFFFFFF - bits)
    return tl.where(may_go, (descending << POSITION_BITS) + o_j, -1)


@triton.jit(do_not_specialize=["threshold", "position_bits"])
def _lowest_kernel(
    scores, count, free, goes, cu_seqlens, threshold, position_bits, HAS_THRESHOLD: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sample: goes[j] = whether token j is one of the ``count`` that go first."""
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    most = tl.load(count + i_b)
    candidates = 0
    for start in range(0, length, BLOCK):
        key = _rank(scores, free, threshold, bos, start + tl.arange(0, BLOCK), length, HAS_THRESHOLD)
        candidates += tl.sum((key >= 0).to(tl.int32), 0)
    # The largest key that `most` keys reach, bit by bit: 32 bits of score, then those of the position that can be set. Where
    # no more may go than should, all do.
    cut = tl.full((), 0, tl.int64)
    steps = tl.where(candidates > most, 32 + position_bits, 0)
    for step in range(steps):
        bit = tl.where(step < 32, 31 + POSITION_BITS - step, 31 + position_bits - step)
        candidate = cut + (tl.full((), 1, tl.int64) << bit.to(tl.int64))
        reached = 0
        for start in range(0, length, BLOCK):
            key = _rank(scores, free, threshold, bos, start + tl.arange(0, BLOCK), length, HAS_THRESHOLD)
            reached += tl.sum((key >= candidate).to(tl.int32), 0)
        if reached >= most:
            cut = candidate
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        key = _rank(scores, free, threshold, bos, o_j, length, HAS_THRESHOLD)
        tl.store(goes + bos + o_j, ((key >= cut) & (most > 0)).to(tl.uint8), mask=o_j < length)


@triton.jit(do_not_specialize=["batch"])
def _merge_kernel(
    x, weights, sizes, into, order, first, cu_out, values, sizes_out, source, carry, carried, batch, x_row, WIDTH,
    CARRY_WIDTHS: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One program: one row of the result. `carry` and `carried` are tuples of contiguous rows of CARRY_WIDTHS elements."""
    row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    if row >= tl.load(cu_out + batch):
        tl.store(source + row, -1)
        return
    begin = tl.load(first + row)
    end = tl.load(first + row + 1)
    total = 0.0
    total_size = 0.0
    own = tl.full((), -1, tl.int64)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(begin, end):
        token = tl.load(order + i)
        weight = tl.load(weights + token)
        total += weight
        total_size += tl.load(sizes + token)
        if tl.load(into + token) == token:
            own = token
        acc += weight * tl.load(x + token * x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    is_kept = own >= 0
    stays = is_kept & ((end - begin == 1) | (total == 0.0))
    divisor = tl.where(is_kept, total, 1.0 if SUM else total + EPS)
    result = acc / tl.where(stays, 1.0, divisor)
    result = result.to(values.dtype.element_ty)
    copied = tl.load(x + own * x_row + o_d, mask=m_d & stays, other=0.0)
    tl.store(values + row * WIDTH + o_d, tl.where(stays, copied, result), mask=m_d)
    tl.store(sizes_out + row, total_size)
    tl.store(source + row, own.to(tl.int32))
    for i in tl.static_range(len(CARRY_WIDTHS)):
        for start in range(0, CARRY_WIDTHS[i], CARRY_BLOCK):
            o_c = start + tl.arange(0, CARRY_BLOCK)
            m_c = o_c < CARRY_WIDTHS[i]
            element = tl.load(carry[i] + own * CARRY_WIDTHS[i] + o_c, mask=m_c & is_kept, other=0)
            tl.store(carried[i] + row * CARRY_WIDTHS[i] + o_c, element, mask=m_c)


@prepared
def lowest_tokens(scores: Tensor, count: Tensor, cu_seqlens: Tensor, free: Tensor, threshold: float | None) -> Callable:
    """``[C]`` bool; see the public operation for the contract."""
    batch, bits = cu_seqlens.shape[0] - 1, scores.shape[0].bit_length()
    choose = Launch(_lowest_kernel, batch, HAS_THRESHOLD=threshold is not None, BLOCK=BLOCK, num_warps=4)

    def run(scores, count, cu_seqlens, free, threshold):
        # False beyond the last sample, as the contract says.
        goes = torch.zeros_like(free)
        if batch:
            bound = 0.0 if threshold is None else threshold
            choose(scores, count, free.view(torch.uint8), goes.view(torch.uint8), cu_seqlens, bound, bits)
        return goes

    return run


@on_device_of_first
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
    """values, cu_out, sizes_out, rows, source, carried; see the public operation for the contract."""
    capacity, width = x.shape
    cu_out, rows, _ = number_rows(into, cu_seqlens, append != "")
    target, order = rows.where(rows >= 0, capacity).sort(stable=True)
    first = torch.searchsorted(target, torch.arange(capacity + 1, device=x.device))
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    sizes_out = torch.empty(capacity, dtype=torch.float32, device=x.device)
    source = torch.empty(capacity, dtype=torch.int32, device=x.device)
    carry = [tensor.contiguous() for tensor in carry]
    carried = [torch.empty_like(tensor) for tensor in carry]
    if capacity:
        launch(
            _merge_kernel, capacity,
            x, weights, sizes, into, order, first, cu_out, values, sizes_out, source, tuple(map(_as_numbers, carry)),
            tuple(map(_as_numbers, carried)), cu_out.shape[0] - 1, x.stride(0), width,
            CARRY_WIDTHS=tuple(tensor[0].numel() * (2 if tensor.is_complex() else 1) for tensor in carry),
            BLOCK_D=block(width), SUM=append == "sum", num_warps=4,
        )  # fmt: skip
    defined = int(cu_out[-1]) if exact else capacity  # the one wait for the device, asked for by `exact`
    results = (tensor[:defined] for tensor in carried)
    return values[:defined], cu_out, sizes_out[:defined], rows.int(), source[:defined], list(results)


def _as_numbers(tensor: Tensor) -> Tensor:
    """A tensor of a type that Triton knows over the same memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
