"""Choosing tokens and merging them on the GPU. Choosing is one launch, which finds the score that the r-th lowest token has by
bisection over its bits. Merging is two, of which the first numbers the rows and the second makes them.

A row that several tokens go into is summed by one program, which looks for them among all of its sample, in their order: nothing
but the numbers of members is added atomically. Most rows have none, and are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import EPS, Launch, after_previous, block, fill_rest, prepared, rows_before

POSITION_BITS = tl.constexpr(30)
BLOCK = 1024  # tokens per step where rows are not read
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


@triton.jit(do_not_specialize=["threshold", "share", "uncounted", "position_bits", "capacity"])
def _lowest_kernel(
    scores, count, free, goes, cu_seqlens, threshold, share, uncounted, position_bits, capacity,
    HAS_THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample: goes[j] = whether token j is one of those that go first, ``count`` and the ``share`` at most; 0 beyond
    the last sample."""
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    most = (tl.maximum(length - uncounted, 0).to(tl.float32) * share).to(tl.int32)
    if count is not None:
        most = tl.minimum(most, tl.load(count + i_b))
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
    fill_rest(goes, 0, cu_seqlens, capacity, BLOCK)


@triton.jit(do_not_specialize=["capacity"])
def _place_kernel(
    into, places, members, dropped, drops, rows_out, rows, source, cu_seqlens, capacity,
    APPEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample: the place of each kept token among those of its sample (-1: not kept), how many others go into
    it, the number of rows of the sample; with APPEND also the numbers of the tokens that are dropped, and how many.

    ``rows`` and ``source`` are -1 from here on: for what goes nowhere, and beyond the last token, so that whoever gathers all rows
    stays inside.
    """
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    placed = 0
    listed = 0
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        mask = o_j < length
        target = tl.load(into + bos + o_j, mask=mask, other=0)
        kept = mask & (target == bos + o_j)
        order = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(places + bos + o_j, tl.where(kept, placed + order - 1, -1), mask=mask)
        tl.store(members + bos + o_j, 0, mask=mask)
        tl.store(rows + bos + o_j, -1, mask=mask)
        tl.store(source + bos + o_j, -1, mask=mask)
        placed += tl.max(order, 0)
        if APPEND:
            gone = mask & (target < 0)
            order = tl.cumsum(gone.to(tl.int32), 0)
            tl.store(dropped + bos + listed + order - 1, o_j, mask=gone)
            listed += tl.max(order, 0)
    if APPEND:
        tl.store(drops + i_b, listed)
        placed += tl.minimum(listed, 1)
    tl.store(rows_out + i_b, placed)
    fill_rest(rows, -1, cu_seqlens, capacity, BLOCK)
    fill_rest(source, -1, cu_seqlens, capacity, BLOCK)
    tl.debug_barrier()  # members are 0 before anybody counts
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        target = tl.load(into + bos + o_j, mask=o_j < length, other=-1)
        tl.atomic_add(members + target, 1, mask=(target >= 0) & (target != bos + o_j))


@triton.jit
def _add_token(acc, total, total_size, x, weights, sizes, token, x_row, o_d, m_d):
    """Sums over a row's tokens so far, and one more."""
    weight = tl.load(weights + token)
    acc += weight * tl.load(x + token * x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
    return acc, total + weight, total_size + tl.load(sizes + token)


@triton.jit(do_not_specialize=["slots"])
def _merge_kernel(
    x, weights, sizes, into, places, members, dropped, drops, rows_out, values, cu_out, sizes_out, rows, source, carry,
    carried, cu_seqlens, x_row, slots, WIDTH, CARRY_WIDTHS: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
    APPEND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``slots`` programs per sample: the first writes the offset and the appended row, each other one the row of a token that
    is kept. `carry` and `carried` are tuples of contiguous rows of CARRY_WIDTHS elements.
    """
    after_previous()
    i_b = tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    if slot > length:
        return
    before = rows_before(rows_out, i_b)
    begin_out = before.to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    acc = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    total_size = 0.0
    if slot == 0:
        count = tl.load(rows_out + i_b)
        if i_b == 0:
            tl.store(cu_out, 0)
        tl.store(cu_out + i_b + 1, before + count)
        if APPEND:
            left = tl.load(drops + i_b)
            row = begin_out + count - 1
            if left > 0:
                for i in range(left):
                    token = bos + tl.load(dropped + bos + i)
                    tl.store(rows + token, row.to(tl.int32))
                    acc, total, total_size = _add_token(
                        acc, total, total_size, x, weights, sizes, token, x_row, o_d, m_d
                    )  # fmt: skip
                result = acc / (1.0 if SUM else total + EPS)
                tl.store(values + row * WIDTH + o_d, result.to(values.dtype.element_ty), mask=m_d)
                tl.store(sizes_out + row, total_size)
                tl.store(source + row, -1)
                for i in tl.static_range(len(CARRY_WIDTHS)):
                    for start in range(0, CARRY_WIDTHS[i], CARRY_BLOCK):
                        o_c = start + tl.arange(0, CARRY_BLOCK)
                        nothing = tl.zeros((CARRY_BLOCK,), carried[i].dtype.element_ty)
                        tl.store(carried[i] + row * CARRY_WIDTHS[i] + o_c, nothing, mask=o_c < CARRY_WIDTHS[i])
        return

    own = bos + slot - 1
    target = tl.load(into + own)
    if target != own:
        if target >= 0:
            tl.store(rows + own, (begin_out + tl.load(places + target)).to(tl.int32))
        return
    row = begin_out + tl.load(places + own)
    tl.store(rows + own, row.to(tl.int32))
    alone = tl.load(members + own) == 0
    if alone:
        total_size = tl.load(sizes + own)
    else:  # in the order of the tokens
        for start in range(0, length, BLOCK):
            o_j = start + tl.arange(0, BLOCK)
            hit = tl.load(into + bos + o_j, mask=o_j < length, other=-1) == own
            last = -1
            for _ in range(tl.sum(hit.to(tl.int32), 0)):
                last = tl.min(tl.where(hit & (o_j > last), o_j, 2147483647), 0)
                acc, total, total_size = _add_token(
                    acc, total, total_size, x, weights, sizes, bos + last, x_row, o_d, m_d
                )  # fmt: skip
    stays = alone | (total == 0.0)
    result = (acc / tl.where(stays, 1.0, total)).to(values.dtype.element_ty)
    copied = tl.load(x + own * x_row + o_d, mask=m_d & stays, other=0.0)
    tl.store(values + row * WIDTH + o_d, tl.where(stays, copied, result), mask=m_d)
    tl.store(sizes_out + row, total_size)
    tl.store(source + row, own.to(tl.int32))
    for i in tl.static_range(len(CARRY_WIDTHS)):
        for start in range(0, CARRY_WIDTHS[i], CARRY_BLOCK):
            o_c = start + tl.arange(0, CARRY_BLOCK)
            m_c = o_c < CARRY_WIDTHS[i]
            element = tl.load(carry[i] + own * CARRY_WIDTHS[i] + o_c, mask=m_c, other=0)
            tl.store(carried[i] + row * CARRY_WIDTHS[i] + o_c, element, mask=m_c)


@prepared
def lowest_tokens(
    scores: Tensor,
    count: Tensor | None,
    cu_seqlens: Tensor,
    free: Tensor,
    threshold: float | None,
    share: float = 1.0,
    uncounted: int = 0,
) -> Callable:
    """``[C]`` bool; see the public operation for the contract."""
    batch, capacity = cu_seqlens.shape[0] - 1, scores.shape[0]
    bits = capacity.bit_length()
    choose = Launch(_lowest_kernel, batch, HAS_THRESHOLD=threshold is not None, BLOCK=BLOCK, num_warps=4)

    def run(scores, count, cu_seqlens, free, threshold, share=1.0, uncounted=0):
        if not batch:
            return torch.zeros_like(free)
        goes = torch.empty_like(free)
        bound = 0.0 if threshold is None else threshold
        flags = (free.view(torch.uint8), goes.view(torch.uint8))
        choose(scores, count, *flags, cu_seqlens, bound, share, uncounted, bits, capacity)
        return goes

    return run


@prepared
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
) -> Callable:
    """values, cu_out, sizes_out, rows, source, carried; see the public operation for the contract."""
    (capacity, width), device, batch = x.shape, x.device, cu_seqlens.shape[0] - 1
    slots = max_seqlen + 1
    place = Launch(_place_kernel, batch, APPEND=append != "", BLOCK=BLOCK, num_warps=4)
    merge = Launch(
        _merge_kernel, batch * slots,
        CARRY_WIDTHS=tuple(tensor[:1].numel() * (2 if tensor.is_complex() else 1) for tensor in carry),
        BLOCK_D=block(width), SUM=append == "sum", APPEND=append != "", BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip

    def run(x, into, weights, sizes, cu_seqlens, max_seqlen, append, exact, carry):
        values = torch.empty_like(x, memory_format=torch.contiguous_format)
        sizes_out = torch.empty(capacity, dtype=torch.float32, device=device)
        rows, source = (torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(2))
        carry = [tensor.contiguous() for tensor in carry]
        carried = [torch.empty_like(tensor) for tensor in carry]
        if not batch or not capacity:
            cu_out = torch.zeros_like(cu_seqlens)
            rows.fill_(-1)
            source.fill_(-1)
        else:
            cu_out = torch.empty_like(cu_seqlens)
            # Each of its own: the address of a half of one buffer would be aligned for some capacities, and the kernels be
            # compiled for both.
            places, members = (torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(2))
            rows_out = torch.empty(batch, dtype=torch.int32, device=device)
            dropped = drops = None
            if append:
                dropped, drops = torch.empty_like(places), torch.empty_like(rows_out)
            place(into, places, members, dropped, drops, rows_out, rows, source, cu_seqlens, capacity)
            merge(
                x, weights, sizes, into, places, members, dropped, drops, rows_out, values, cu_out, sizes_out, rows, source,
                tuple(map(_as_numbers, carry)), tuple(map(_as_numbers, carried)), cu_seqlens, x.stride(0), slots, width,
            )  # fmt: skip
        if not exact:
            return values, cu_out, sizes_out, rows, source, carried
        defined = int(cu_out[-1])  # the one wait for the device, asked for by `exact`
        return values[:defined], cu_out, sizes_out[:defined], rows, source[:defined], [t[:defined] for t in carried]

    return run


def _as_numbers(tensor: Tensor) -> Tensor:
    """A tensor of a type that Triton knows over the same memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
