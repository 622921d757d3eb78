"""Choosing tokens and merging them on the GPU. Choosing is one launch, which finds the score that the r-th lowest token has by
bisection over its bits. Merging is two, of which the first numbers the rows and lists what goes into others, and the second makes
the rows. In :func:`madtp_kernels.merge_redundant` the choice numbers and lists, too.

A program makes a few rows at once. For each it looks among the tokens of its sample that go into others, and adds them in their
order, the next of every row at a time. Most rows have none, and are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..compaction.triton import load_norm, store_normed
from ..similarity.triton import BLOCK as MEAN_BLOCK
from ..similarity.triton import CHUNK, NONE, as_flags, mean_weight, power_kinds, unpacked, worth
from ..triton_utils import (
    EPS,
    INTERPRETED,
    Launch,
    after_previous,
    block,
    cdiv,
    fill_rest,
    prepared,
    rows_before,
)  # fmt: skip

POSITION_BITS = tl.constexpr(30)
BLOCK = 1024  # tokens per step where rows are not read
MEMBERS = 128  # tokens that go into others, per step
CARRY_BLOCK = tl.constexpr(256)  # elements of a carried row per step
NOBODY = tl.constexpr(2147483647)  # behind the last token of any sample
ANY_NUMBER = 2**31 - 1


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


@triton.jit
def _reached(key, cut, unit):
    """How many keys reach cut + unit, cut + 2 unit and cut + 3 unit; of at most 2^21 keys."""
    first = (key >= cut + unit).to(tl.int64)
    second = (key >= cut + 2 * unit).to(tl.int64)
    third = (key >= cut + 3 * unit).to(tl.int64)
    found = tl.sum(first + (second << 21) + (third << 42), 0)
    return found & 0x1FFFFF, (found >> 21) & 0x1FFFFF, found >> 42


@triton.jit
def _cut(
    scores, free, threshold, bos, length, most, position_bits,
    HAS_THRESHOLD: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A number that the keys of the ``most`` tokens of a sample that go first reach, and no other; 0 if there are no more than that.

    It is found two bits at a time: first 32 of score, then those of the position that can be set. WHOLE: no sample is longer than
    a BLOCK, and its keys stay where they are.
    """
    candidates = 0
    key = tl.full((BLOCK,), -1, tl.int64)
    for start in range(0, length, BLOCK):
        key = _rank(scores, free, threshold, bos, start + tl.arange(0, BLOCK), length, HAS_THRESHOLD)
        candidates += tl.sum((key >= 0).to(tl.int32), 0)
    cut = tl.full((), 0, tl.int64)
    pairs = (position_bits + 1) // 2
    steps = tl.where(candidates > most, 16 + pairs, 0)
    step = 0
    while step < steps:
        bit = tl.where(step < 16, 30 + POSITION_BITS - 2 * step, 2 * (15 + pairs - step))
        unit = tl.full((), 1, tl.int64) << bit.to(tl.int64)
        if WHOLE:
            first, second, third = _reached(key, cut, unit)
        else:
            first = tl.full((), 0, tl.int64)
            second = tl.full((), 0, tl.int64)
            third = tl.full((), 0, tl.int64)
            for start in range(0, length, BLOCK):
                key = _rank(scores, free, threshold, bos, start + tl.arange(0, BLOCK), length, HAS_THRESHOLD)
                more = _reached(key, cut, unit)
                first += more[0]
                second += more[1]
                third += more[2]
        reached = tl.where(third >= most, third, tl.where(second >= most, second, first))
        times = (first >= most).to(tl.int64) + (second >= most).to(tl.int64) + (third >= most).to(tl.int64)
        cut += times * unit
        # Where just as many reach it as should go, no further bit matters.
        step = tl.where((times > 0) & (reached == most), steps, step + 1)
    return cut


@triton.jit
def _most(length, share, uncounted):
    """The share of a sample's tokens, rounded down."""
    return (tl.maximum(length - uncounted, 0).to(tl.float32) * share).to(tl.int32)


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
    most = _most(length, share, uncounted)
    if count is not None:
        most = tl.minimum(most, tl.load(count + i_b))
    if length <= BLOCK:
        cut = _cut(scores, free, threshold, bos, length, most, position_bits, HAS_THRESHOLD, True, BLOCK)
    else:
        cut = _cut(scores, free, threshold, bos, length, most, position_bits, HAS_THRESHOLD, False, BLOCK)
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        key = _rank(scores, free, threshold, bos, o_j, length, HAS_THRESHOLD)
        tl.store(goes + bos + o_j, ((key >= cut) & (most > 0)).to(tl.uint8), mask=o_j < length)
    fill_rest(goes, 0, cu_seqlens, capacity, BLOCK)


@triton.jit
def _rounded_share(length, share, uncounted):
    """The share of a sample's tokens, rounded to the nearest number, from a half to the even one. The product is one of float32,
    made in float64 so that no sum joins it."""
    number = tl.maximum(length - uncounted, 0).to(tl.float64)
    product = (number * (tl.zeros((), tl.float32) + share).to(tl.float64)).to(tl.float32)
    below = product.to(tl.int32)
    rest = product - below.to(tl.float32)
    return below + ((rest > 0.5) | ((rest == 0.5) & (below % 2 == 1))).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "weight_exponent", "novelty_exponent", "size_exponent", "threshold", "share", "portion", "number", "uncounted",
        "position_bits", "capacity",
    ]
)  # fmt: skip
def _choose_kernel(
    best, scale, weight, sizes, free, count, scores, places, listed, counts, rows_out, rows, source, cu_seqlens,
    weight_exponent, novelty_exponent, size_exponent, threshold, share, portion, number, uncounted, position_bits, capacity,
    WEIGHT: tl.constexpr, NOVELTY: tl.constexpr, SIZE: tl.constexpr, HAS_THRESHOLD: tl.constexpr, HAS_PORTION: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, MEAN_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample: what its tokens are worth, which of them go, and what :func:`_place_kernel` says of those that do.

    ``listed`` and ``counts`` are also those of the search for the kept tokens that they go into, behind which stand all that are
    free; and what goes has no ``best`` candidate yet.
    """
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    mean = mean_weight(weight, free, bos, length, MEAN_BLOCK)
    for start in range(0, length, CHUNK):
        o_j = start + tl.arange(0, CHUNK)
        m_j = o_j < length
        score, _ = worth(
            best, scale, weight, sizes, free, bos + o_j, m_j, mean, weight_exponent, novelty_exponent, size_exponent,
            WEIGHT, NOVELTY, SIZE,
        )  # fmt: skip
        tl.store(scores + bos + o_j, score, mask=m_j)
    tl.debug_barrier()  # all scores are there, and `best` was read

    most = tl.minimum(_most(length, share, uncounted), number)
    if HAS_PORTION:
        most = tl.minimum(most, _rounded_share(length, portion, uncounted))
    if count is not None:
        most = tl.minimum(most, tl.load(count + i_b))
    cut = _cut(scores, free, threshold, bos, length, most, position_bits, HAS_THRESHOLD, WHOLE, BLOCK)
    gone = 0
    kept = 0
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        m_j = o_j < length
        key = _rank(scores, free, threshold, bos, o_j, length, HAS_THRESHOLD)
        goes = (key >= cut) & (most > 0)
        stays_free = m_j & (goes == 0) & (tl.load(free + bos + o_j, mask=m_j, other=0) != 0)
        both = goes.to(tl.int32) + (stays_free.to(tl.int32) << 16)
        earlier = tl.cumsum(both, 0) - both
        earlier_gone = gone + (earlier & 0xFFFF)
        tl.store(places + bos + o_j, tl.where(goes, -1, o_j - earlier_gone), mask=m_j)
        entry = tl.where(goes, earlier_gone, length - 1 - kept - (earlier >> 16))
        tl.store(listed + bos + entry, o_j, mask=goes | stays_free)
        tl.store(best + bos + o_j, tl.full((BLOCK,), NONE, tl.int64), mask=goes)
        tl.store(source + bos + o_j, -1, mask=m_j)
        total = tl.sum(both, 0)
        gone += total & 0xFFFF
        kept += total >> 16
    tl.store(counts + 2 * i_b, gone)
    tl.store(counts + 2 * i_b + 1, kept)
    tl.store(rows_out + i_b, length - gone)
    fill_rest(rows, -1, cu_seqlens, capacity, BLOCK)
    fill_rest(source, -1, cu_seqlens, capacity, BLOCK)


@triton.jit(do_not_specialize=["capacity"])
def _place_kernel(
    into,
    places,
    listed,
    counts,
    rows_out,
    rows,
    source,
    cu_seqlens,
    capacity,
    APPEND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per sample: the place of each kept token among those of its sample (-1: not kept); a list of the tokens that go
    into others from its first place on, and of those that are dropped from its last backwards; how many there are of both; and the
    number of rows of the sample.

    ``source`` is -1 from here on, and ``rows`` beyond the last token, so that whoever gathers all rows stays inside.
    """
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    placed = 0
    moved = 0
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        m_j = o_j < length
        target = tl.load(into + bos + o_j, mask=m_j, other=-1)
        stays = target == bos + o_j
        goes = (target >= 0) & (stays == 0)
        both = stays.to(tl.int32) + (goes.to(tl.int32) << 16)
        earlier = tl.cumsum(both, 0) - both
        place = placed + (earlier & 0xFFFF)
        earlier_moved = moved + (earlier >> 16)
        tl.store(places + bos + o_j, tl.where(stays, place, -1), mask=m_j)
        entry = tl.where(goes, earlier_moved, length - 1 - (o_j - place - earlier_moved))
        tl.store(listed + bos + entry, o_j, mask=m_j & (stays == 0))
        tl.store(source + bos + o_j, -1, mask=m_j)
        total = tl.sum(both, 0)
        placed += total & 0xFFFF
        moved += total >> 16
    dropped = length - placed - moved
    tl.store(counts + 2 * i_b, moved)
    tl.store(counts + 2 * i_b + 1, dropped)
    if APPEND:
        placed += tl.minimum(dropped, 1)
    tl.store(rows_out + i_b, placed)
    fill_rest(rows, -1, cu_seqlens, capacity, BLOCK)
    fill_rest(source, -1, cu_seqlens, capacity, BLOCK)


@triton.jit
def _target(into, best, rows, mask):
    """The rows of the batch that tokens go into, from ``into`` or from the ``best`` candidates of a search; -1 where there is none."""
    if best is None:
        target = tl.load(into + rows, mask=mask, other=-1)
    else:
        found, _, row = unpacked(tl.load(best + rows, mask=mask, other=NONE))
        target = tl.where(found, row, -1)
    return target


@triton.jit
def _next_token(listed, into, best, bos, count, own, after, found, MEMBERS: tl.constexpr):
    """For rows ``own``: the position of the next token behind ``after`` that goes into each, or ``found`` if that comes before."""
    for start in range(0, count, MEMBERS):
        o_i = start + tl.arange(0, MEMBERS)
        token = tl.load(listed + bos + o_i, mask=o_i < count, other=0)
        target = _target(into, best, bos + token, o_i < count)
        hit = (target[None, :] == own[:, None]) & (token[None, :] > after[:, None])
        found = tl.minimum(found, tl.min(tl.where(hit, token[None, :], NOBODY), 1))
    return found


@triton.jit
def _weight(weights, rows, mask):
    if weights is None:
        weight = mask.to(tl.float32)
    else:
        weight = tl.load(weights + rows, mask=mask, other=0.0)
    return weight


@triton.jit
def _append(
    x, weights, sizes, listed, values, sizes_out, rows, source, carried, bos, length, row, dropped, x_row, WIDTH,
    CARRY_WIDTHS: tl.constexpr, BLOCK_D: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """The row of a sample for its dropped tokens."""
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < WIDTH
    acc = tl.zeros((BLOCK_D,), tl.float32)
    total = 0.0
    total_size = 0.0
    for i in range(dropped):
        token = bos + tl.load(listed + bos + length - 1 - i)
        tl.store(rows + token, row.to(tl.int32))
        weight = tl.load(weights + token)
        acc += weight * tl.load(x + token * x_row + o_d, mask=m_d, other=0.0).to(tl.float32)
        total += weight
        total_size += tl.load(sizes + token)
    result = acc / (1.0 if SUM else total + EPS)
    tl.store(values + row * WIDTH + o_d, result.to(values.dtype.element_ty), mask=m_d)
    tl.store(sizes_out + row, total_size)
    tl.store(source + row, -1)
    for i in tl.static_range(len(CARRY_WIDTHS)):
        for start in range(0, CARRY_WIDTHS[i], CARRY_BLOCK):
            o_c = start + tl.arange(0, CARRY_BLOCK)
            nothing = tl.zeros((CARRY_BLOCK,), carried[i].dtype.element_ty)
            tl.store(carried[i] + row * CARRY_WIDTHS[i] + o_c, nothing, mask=o_c < CARRY_WIDTHS[i])


@triton.jit(do_not_specialize=["slots"])
def _merge_kernel(
    x, weights, sizes, into, best, places, listed, counts, rows_out, values, cu_out, sizes_out, logs, normed, norm_weight, norm_bias,
    rows, source, carry, carried, cu_seqlens, x_row, slots, eps, WIDTH,
    CARRY_WIDTHS: tl.constexpr, CARRY_BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, MEMBERS: tl.constexpr,
    SUM: tl.constexpr, APPEND: tl.constexpr,
):  # fmt: skip
    """``slots`` programs per sample: the first writes the offset and the appended row, each other one the rows of those of ROWS
    tokens that are kept. `carry` and `carried` are tuples of contiguous rows of CARRY_WIDTHS elements, moved CARRY_BLOCKS at a time.

    Without weights and sizes all are 1. ``logs`` and ``normed`` are the logarithms of the new sizes, and the new rows after LayerNorm.
    """
    after_previous()
    i_b = tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    if (slot - 1) * ROWS >= length:
        return
    before = rows_before(rows_out, i_b)
    begin_out = before.to(tl.int64)
    if slot == 0:
        number = tl.load(rows_out + i_b)
        if i_b == 0:
            tl.store(cu_out, 0)
        tl.store(cu_out + i_b + 1, before + number)
        if APPEND:
            dropped = tl.load(counts + 2 * i_b + 1)
            if dropped > 0:
                _append(
                    x, weights, sizes, listed, values, sizes_out, rows, source, carried, bos, length, begin_out + number - 1,
                    dropped, x_row, WIDTH, CARRY_WIDTHS, BLOCK_D, SUM,
                )  # fmt: skip
        return

    o_r = (slot - 1) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < length
    token = bos + o_r
    own = token.to(tl.int32)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < WIDTH)[None, :]
    copied = tl.load(x + token[:, None] * x_row + o_d[None, :], mask=m_r[:, None] & m_d, other=0.0)
    place = tl.load(places + token, mask=m_r, other=-1)
    size = _weight(sizes, token, m_r)
    kept = place >= 0
    count = tl.load(counts + 2 * i_b)
    others = tl.zeros((ROWS,), tl.int32)
    for start in range(0, count, MEMBERS):
        o_i = start + tl.arange(0, MEMBERS)
        member = bos + tl.load(listed + bos + o_i, mask=o_i < count, other=0)
        target = _target(into, best, member, o_i < count)
        others += tl.sum((target[None, :] == own[:, None]).to(tl.int32), 1)
    merges = others > 0
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    total_size = tl.zeros((ROWS,), tl.float32)
    last = tl.full((ROWS,), -1, tl.int32)
    for _ in range(0, tl.max(others, 0) + (tl.max(others, 0) > 0).to(tl.int32), 2):
        # Two of each row, so that one wait for memory does for both.
        first = tl.where(merges & (o_r > last), o_r, NOBODY)
        first = _next_token(listed, into, best, bos, count, own, last, first, MEMBERS)
        second = tl.where(merges & (o_r > first), o_r, NOBODY)
        second = _next_token(listed, into, best, bos, count, own, first, second, MEMBERS)
        last = second
        m_1 = first != NOBODY
        m_2 = second != NOBODY
        row_1 = bos + tl.where(m_1, first, 0)
        row_2 = bos + tl.where(m_2, second, 0)
        tile_1 = tl.load(x + row_1[:, None] * x_row + o_d[None, :], mask=m_1[:, None] & m_d, other=0.0)
        tile_2 = tl.load(x + row_2[:, None] * x_row + o_d[None, :], mask=m_2[:, None] & m_d, other=0.0)
        weight_1 = _weight(weights, row_1, m_1)
        weight_2 = _weight(weights, row_2, m_2)
        acc += weight_1[:, None] * tile_1.to(tl.float32)
        acc += weight_2[:, None] * tile_2.to(tl.float32)
        total += weight_1
        total += weight_2
        total_size += _weight(sizes, row_1, m_1)
        total_size += _weight(sizes, row_2, m_2)
    stays = (merges == 0) | (total == 0.0)
    mean = (acc / tl.where(stays, 1.0, total)[:, None]).to(values.dtype.element_ty)
    result = tl.where(stays[:, None], copied, mean)
    size = tl.where(merges, total_size, size)
    row = begin_out + place
    mask = kept[:, None] & m_d
    tl.store(values + row[:, None] * WIDTH + o_d[None, :], result, mask=mask)
    tl.store(sizes_out + row, size, mask=kept)
    if logs is not None:
        # As PyTorch has it. (Triton's own is of lower precision; the interpreter knows no other.)
        log = tl.log(size) if INTERPRETED else libdevice.log(size)
        tl.store(logs + row, log, mask=kept)
    tl.store(source + row, own, mask=kept)
    target = _target(into, best, token, m_r & (kept == 0))
    there = tl.load(places + target, mask=target >= 0, other=-1)
    goes_to = tl.where(kept, row, tl.where(target >= 0, begin_out + there, -1)).to(tl.int32)
    tl.store(rows + token, goes_to, mask=m_r & (kept | (target >= 0) | (APPEND == 0)))
    for i in tl.static_range(len(CARRY_WIDTHS)):
        for start in range(0, CARRY_WIDTHS[i], CARRY_BLOCKS[i]):
            o_c = start + tl.arange(0, CARRY_BLOCKS[i])
            m_c = kept[:, None] & (o_c < CARRY_WIDTHS[i])[None, :]
            element = tl.load(carry[i] + token[:, None] * CARRY_WIDTHS[i] + o_c[None, :], mask=m_c, other=0)
            tl.store(carried[i] + row[:, None] * CARRY_WIDTHS[i] + o_c[None, :], element, mask=m_c)
    if norm_weight is not None:
        scale, shift = load_norm(norm_weight, norm_bias, o_d, WIDTH)
        store_normed(normed, row, result, mask, o_d, scale, shift, eps, WIDTH, norm_bias is not None)


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
def choose_redundant(
    best: Tensor,
    scale: Tensor,
    weight: Tensor,
    sizes: Tensor | None,
    free: Tensor,
    count: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    exponents: tuple[float, float, float],
    threshold: float | None,
    share: float,
    portion: float | None,
    number: int | None,
    uncounted: int,
) -> Callable:
    """In :func:`madtp_kernels.merge_redundant`: scores, and what :func:`_place_kernel` says of those that go."""
    batch, capacity = cu_seqlens.shape[0] - 1, best.shape[0]
    at_once = min(block(max_seqlen), BLOCK)
    choose = Launch(
        _choose_kernel, batch,
        **power_kinds(*exponents), HAS_THRESHOLD=threshold is not None, HAS_PORTION=portion is not None,
        WHOLE=max_seqlen <= at_once, BLOCK=at_once, CHUNK=CHUNK, MEAN_BLOCK=MEAN_BLOCK, num_warps=4,
    )  # fmt: skip
    numbers = (
        *exponents, threshold or 0.0, share, portion or 0.0, ANY_NUMBER if number is None else min(number, ANY_NUMBER), uncounted,
        max_seqlen.bit_length(), capacity,
    )  # fmt: skip

    def run(best, scale, weight, sizes, free, count, cu_seqlens, *rest):
        scores = torch.empty_like(scale)
        places, listed, counts, rows_out, rows, source = _numbering(cu_seqlens, capacity)
        choose(
            best, scale, weight, sizes, as_flags(free), count, scores, places, listed, counts, rows_out, rows, source, cu_seqlens,
            *numbers,
        )  # fmt: skip
        return scores, (places, listed, counts, rows_out, rows, source)

    return run


def _numbering(cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, ...]:
    """Room for places, listed, counts, rows_out, rows and source of :func:`_place_kernel`.

    Each of its own: the address of a part of one buffer would be aligned for some capacities, and the kernels be compiled for both.
    """
    batch = cu_seqlens.shape[0] - 1
    return tuple(cu_seqlens.new_empty(size) for size in (capacity, capacity, 2 * batch, batch, capacity, capacity))


def _merging(
    x: Tensor, cu_seqlens: Tensor, max_seqlen: int, carry: Sequence[Tensor], append: str = "", eps: float = 0.0
) -> Callable:
    """The launch that makes the rows, from all that :func:`_merge_kernel` takes up to ``cu_seqlens``."""
    width, block_d = x.shape[1], block(x.shape[1])
    # Few rows, so that four programs or five fit a multiprocessor. Of up to 2048 numbers, a row's lie with the threads as in the
    # kernel of LayerNorm, and add up to the same bits.
    rows = max(1, min(16, 2048 // block_d))
    slots = 1 + cdiv(max_seqlen, rows)
    programs = (cu_seqlens.shape[0] - 1) * slots
    widths = tuple(tensor[:1].numel() * (2 if tensor.is_complex() else 1) for tensor in carry)
    launch = Launch(
        _merge_kernel, programs,
        CARRY_WIDTHS=widths, CARRY_BLOCKS=tuple(min(256, block(width, 1)) for width in widths),
        BLOCK_D=block_d, ROWS=rows, MEMBERS=MEMBERS, SUM=append == "sum", APPEND=append != "", num_warps=4,
    )  # fmt: skip
    numbers = (x.stride(0), slots, eps, width)
    return lambda *tensors: launch(*tensors, *numbers)


@prepared
def merge_redundant(
    x: Tensor,
    best: Tensor,
    numbering: tuple[Tensor, ...],
    sizes: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    exact: bool,
    carry: Sequence[Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    with_logs: bool,
) -> Callable:
    """In :func:`madtp_kernels.merge_redundant`: values, cu_out, sizes_out, rows, source, carried, normed, logs, of which the last two
    are None where not asked for; from what the search for kept tokens left in ``best``, and :func:`choose_redundant` besides."""
    capacity = x.shape[0]
    merge = _merging(x, cu_seqlens, max_seqlen, carry, eps=eps)
    with_norm = norm_weight is not None

    def run(x, best, numbering, sizes, cu_seqlens, max_seqlen, exact, carry, norm_weight, norm_bias, eps, with_logs):
        places, listed, counts, rows_out, rows, source = numbering
        values, cu_out = torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(cu_seqlens)
        sizes_out = torch.empty(capacity, dtype=torch.float32, device=x.device)
        normed, logs = (
            torch.empty_like(values) if with_norm else None,
            torch.empty_like(sizes_out) if with_logs else None,
        )
        carry, carried, *numbers = _following(carry)
        merge(
            x, sizes, sizes, None, best, places, listed, counts, rows_out, values, cu_out, sizes_out, logs, normed,
            norm_weight, norm_bias, rows, source, *numbers, cu_seqlens,
        )  # fmt: skip
        if not exact:
            return values, cu_out, sizes_out, rows, source, carried, normed, logs
        defined = int(cu_out[-1])  # the one wait for the device, asked for by `exact`
        first = (None if t is None else t[:defined] for t in (values, sizes_out, source, normed, logs))
        values, sizes_out, source, normed, logs = first
        return values, cu_out, sizes_out, rows, source, [t[:defined] for t in carried], normed, logs

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
    capacity, device, batch = x.shape[0], x.device, cu_seqlens.shape[0] - 1
    place = Launch(_place_kernel, batch, APPEND=append != "", BLOCK=BLOCK, num_warps=4)
    merge = _merging(x, cu_seqlens, max_seqlen, carry, append)

    def run(x, into, weights, sizes, cu_seqlens, max_seqlen, append, exact, carry):
        values = torch.empty_like(x, memory_format=torch.contiguous_format)
        sizes_out = torch.empty(capacity, dtype=torch.float32, device=device)
        places, listed, counts, rows_out, rows, source = _numbering(cu_seqlens, capacity)
        carry, carried, *numbers = _following(carry)
        if not batch or not capacity:
            cu_out = torch.zeros_like(cu_seqlens)
            rows.fill_(-1)
            source.fill_(-1)
        else:
            cu_out = torch.empty_like(cu_seqlens)
            place(into, places, listed, counts, rows_out, rows, source, cu_seqlens, capacity)
            merge(
                x, weights, sizes, into, None, places, listed, counts, rows_out, values, cu_out, sizes_out, None, None, None, None,
                rows, source, *numbers, cu_seqlens,
            )  # fmt: skip
        if not exact:
            return values, cu_out, sizes_out, rows, source, carried
        defined = int(cu_out[-1])  # the one wait for the device, asked for by `exact`
        return values[:defined], cu_out, sizes_out[:defined], rows, source[:defined], [t[:defined] for t in carried]

    return run


def _following(carry: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Carried tensors without gaps, room for what becomes of them, and both as the kernel takes them."""
    carry = [tensor.contiguous() for tensor in carry]
    carried = [torch.empty_like(tensor) for tensor in carry]
    return carry, carried, tuple(map(_as_numbers, carry)), tuple(map(_as_numbers, carried))


def _as_numbers(tensor: Tensor) -> Tensor:
    """A tensor of a type that Triton knows over the same memory."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
