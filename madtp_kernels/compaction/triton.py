"""Compaction on the GPU: one small launch decides, one moves rows, merges and applies LayerNorm.

In :func:`madtp_kernels.prune` the last launch of scoring decides (:func:`select`), and one is left.

The first has one program per sample. It writes where each token goes, which ones are dropped, and how many rows the sample has
afterwards; counts (top-k) and groups of samples need a cut-off score first, which it finds by bisection over the bits of the
scores: that turns "the K best" into "not below the cut-off". Groups under the threshold rule need one launch more, to count.

In the second every program adds up the rows of the samples before its own (4 bytes a sample, from cache) instead of waiting
for a scan. Programs take runs of input rows, so nothing has to invert the selection, and move whole rows, so that a row is read
once and LayerNorm needs no second pass. The merged rows, which take longest, come first. Few rows get shorter runs (:func:`_few_rows`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import EPS, Launch, after_previous, block, cdiv, multiprocessors, prepared, rows_before

POSITION_BITS = tl.constexpr(30)
BLOCK = 1024  # scores per step


@triton.jit
def _key(importance, protected, bos, o_j, mask, length):
    """Rank of tokens of one sample as int64, larger is better: protected, then importance, then the earlier position.

    Distinct for distinct positions, at least 0; -1 where masked.
    """
    score = tl.load(importance + bos + o_j, mask=mask, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True).to(tl.int64)  # one zero, not two
    ordered = tl.where(bits < 0, -1 - bits, bits + 0x80000000)  # unsigned order = order of the floats
    if protected is not None:
        ordered += (tl.load(protected + bos + o_j, mask=mask, other=0) != 0).to(tl.int64) << 32
    key = (ordered << POSITION_BITS) + (length - 1 - o_j)
    return tl.where(mask, key, -1)


@triton.jit
def _above(score, threshold, protected, bos, o_j, mask):
    """Whether tokens o_j of a sample survive by their scores or are protected; False where masked."""
    kept = score > threshold
    if protected is not None:
        kept = kept | (tl.load(protected + bos + o_j, mask=mask, other=0) != 0)
    return kept & mask


@triton.jit
def _kept(importance, threshold, cut, protected, bos, o_j, mask, length, RANKED: tl.constexpr):
    """Whether tokens o_j >= 1 of a sample survive if it is pruned; False where masked."""
    if RANKED:
        return _key(importance, protected, bos, o_j, mask, length) >= cut
    score = tl.load(importance + bos + o_j, mask=mask, other=float("-inf"))
    return _above(score, threshold, protected, bos, o_j, mask)


@triton.jit
def count_kept(importance, threshold, protected, bos, length, BLOCK: tl.constexpr):
    """Number of tokens of a sample that survive by its threshold if it is pruned."""
    count = 0
    for start in range(1, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        flags = _kept(importance, threshold, 0, protected, bos, o_j, o_j < length, length, False)
        count += tl.sum(flags.to(tl.int32), 0)
    return count


@triton.jit
def _pruned(kept, length, min_keep, rows_out, i_b):
    """Whether a sample of which ``kept`` tokens survive is pruned; stores the number of its rows."""
    least = 0
    if min_keep is not None:
        least = tl.load(min_keep + i_b)
    pruned = (kept > least) & (length - 1 - kept >= 2)  # must leave more than min_keep tokens and drop at least two
    tl.store(rows_out + i_b, tl.where(pruned, kept + 2, length))
    return pruned


@triton.jit
def _place(stays, placed, places, dropped, bos, o_j, mask):
    """Store the place of each of consecutive tokens o_j, given how many stay before them, and those dropped; returns how many stay
    up to each. What is not among these is among those dropped: one sum serves both.
    """
    staying = placed + tl.cumsum(stays.to(tl.int32), 0)
    tl.store(places + bos + o_j, tl.where(stays, staying - 1, -1), mask=mask)
    tl.store(dropped + bos + o_j - staying, o_j, mask=mask & (stays == 0))
    return staying


@triton.jit
def select(
    importance, threshold, cut, protected, min_keep, places, dropped, rows_out, i_b, bos, length, kept,
    RANKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one sample, of which ``kept`` tokens survive if it is pruned: the place of each token among the rows that it
    keeps (-1: dropped), a list of those dropped, and the number of its rows.
    """
    pruned = _pruned(kept, length, min_keep, rows_out, i_b)
    placed = 0
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        mask = o_j < length
        prunable = mask & (o_j > 0) & pruned
        stays = _kept(importance, threshold, cut, protected, bos, o_j, prunable, length, RANKED) | (
            mask & (prunable == 0)
        )
        staying = _place(stays, placed, places, dropped, bos, o_j, mask)
        placed = tl.max(staying, 0)


@triton.jit
def select_scored(
    score, threshold, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens, BLOCK: tl.constexpr
):
    """:func:`select` by the threshold, of a sample whose scores are at hand: those of all ``tokens`` <= BLOCK after token 0."""
    o_j = 1 + tl.arange(0, BLOCK)
    mask = o_j <= tokens
    kept = _above(score, threshold, protected, bos, o_j, mask)
    pruned = _pruned(tl.sum(kept.to(tl.int32), 0), tokens + 1, min_keep, rows_out, i_b)
    tl.store(places + bos, 0)  # token 0 stays
    _place(mask & (kept | (pruned == 0)), 1, places, dropped, bos, o_j, mask)


@triton.jit
def _select_kernel(
    importance, threshold, protected, min_keep, places, dropped, rows_out, cu_seqlens, BLOCK: tl.constexpr
):
    """One program per sample: selection by its threshold."""
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    bound = tl.load(threshold + i_b)
    kept = count_kept(importance, bound, protected, bos, length, BLOCK)
    select(importance, bound, 0, protected, min_keep, places, dropped, rows_out, i_b, bos, length, kept, False, BLOCK)


@triton.jit
def _count_kernel(importance, threshold, protected, counts, cu_seqlens, BLOCK: tl.constexpr):
    """One program per sample: survivors by its own threshold."""
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    tl.store(counts + i_b, count_kept(importance, tl.load(threshold + i_b), protected, bos, length, BLOCK))


@triton.jit(do_not_specialize=["batch", "position_bits"])
def _rank_kernel(
    importance, protected, min_keep, own_counts, groups, places, dropped, rows_out, cu_seqlens, batch, position_bits,
    GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample: selection of as many of the best tokens as its count, or the largest of its group, says."""
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    count = tl.load(own_counts + i_b)
    if groups is not None:
        group = tl.load(groups + i_b)
        count = 0
        for start in range(0, batch, GROUP_BLOCK):
            o_b = start + tl.arange(0, GROUP_BLOCK)
            member = tl.load(groups + o_b, mask=o_b < batch, other=-1) == group
            begin = tl.load(cu_seqlens + o_b, mask=member, other=0)
            prunable = tl.load(cu_seqlens + o_b + 1, mask=member, other=0) - begin - 1
            own = tl.minimum(tl.load(own_counts + o_b, mask=member, other=0), prunable)
            count = tl.maximum(count, tl.max(tl.where(member, own, 0), 0))
    count = tl.maximum(tl.minimum(count, length - 1), 0)

    # The largest key that `count` keys reach, bit by bit: 33 bits of rank, then those of the position that can be set.
    cut = tl.full((), 0, tl.int64)
    for step in range(33 + position_bits):
        bit = tl.where(step < 33, 32 + POSITION_BITS - step, 32 + position_bits - step)
        candidate = cut + (tl.full((), 1, tl.int64) << bit.to(tl.int64))
        reached = 0
        for start in range(1, length, BLOCK):
            o_j = start + tl.arange(0, BLOCK)
            key = _key(importance, protected, bos, o_j, o_j < length, length)
            reached += tl.sum((key >= candidate).to(tl.int32), 0)
        if reached >= count:
            cut = candidate
    select(importance, 0.0, cut, protected, min_keep, places, dropped, rows_out, i_b, bos, length, count, True, BLOCK)


@triton.jit
def load_norm(norm_weight, norm_bias, o_d, WIDTH):
    """Scale and shift of LayerNorm as they are stored; what is not there is 0."""
    scale, shift = 0.0, 0.0
    if norm_weight is not None:
        scale = tl.load(norm_weight + o_d, mask=o_d < WIDTH, other=0.0)
        if norm_bias is not None:
            shift = tl.load(norm_bias + o_d, mask=o_d < WIDTH, other=0.0)
    return scale, shift


@triton.jit
def store_normed(normed, rows, tile, mask, o_d, norm_scale, norm_shift, eps, WIDTH, SHIFTED: tl.constexpr):
    """LayerNorm of rows of a tile [R, BLOCK_D], given in the precision in which they are stored."""
    wide = tile.to(tl.float32)
    m_d = o_d < WIDTH
    centred = tl.where(m_d[None, :], wide - (tl.sum(wide, 1) / WIDTH)[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
    result = centred * scale[:, None] * norm_scale.to(tl.float32)[None, :]
    if SHIFTED:
        result += norm_shift.to(tl.float32)[None, :]
    tl.store(normed + rows[:, None] * WIDTH + o_d[None, :], result.to(tile.dtype), mask=mask)


@triton.jit
def _copy_rows(
    x, places, rows_out, ids, sizes, values, ids_out, sizes_out, normed, norm_weight, norm_bias,
    x_token, i_b, bos, first, length, eps, WIDTH, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    """Move the surviving rows among CHUNK of a sample from ``first`` on.

    Of FEW there is a single step, whose rows are read before it is known which of them survive: what counts there is the wait, and
    elsewhere the bytes. Of several steps each fetches the places of the next.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < WIDTH)[None, :]
    last = tl.minimum(first + CHUNK, length)
    o_j = first + tl.arange(0, ROWS)
    if FEW or CHUNK > ROWS:
        place = tl.load(places + bos + o_j, mask=o_j < last, other=-1)
    if FEW:
        tile = tl.load(x + (bos + o_j)[:, None] * x_token + o_d[None, :], mask=(o_j < last)[:, None] & m_d, other=0.0)
        norm_scale, norm_shift = load_norm(norm_weight, norm_bias, o_d, WIDTH)
    begin_out = rows_before(rows_out, i_b).to(tl.int64)
    for start in range(0 if FEW else first, 1 if FEW else last, ROWS):
        if not FEW:
            o_j = start + tl.arange(0, ROWS)
            if CHUNK == ROWS:
                place = tl.load(places + bos + o_j, mask=o_j < last, other=-1)
        kept = place >= 0
        target = begin_out + place
        mask = kept[:, None] & m_d
        if CHUNK > ROWS:
            place = tl.load(places + bos + o_j + ROWS, mask=o_j + ROWS < last, other=-1)
        if not FEW:
            tile = tl.load(x + (bos + o_j)[:, None] * x_token + o_d[None, :], mask=mask, other=0.0)
        source = o_j
        if ids is not None:
            source = tl.load(ids + bos + o_j, mask=kept, other=0)
        if sizes is not None:
            tl.store(sizes_out + target, tl.load(sizes + bos + o_j, mask=kept, other=0.0), mask=kept)
        tl.store(values + target[:, None] * WIDTH + o_d[None, :], tile, mask=mask)
        tl.store(ids_out + target, source, mask=kept)
        if norm_weight is not None:
            if not FEW:
                norm_scale, norm_shift = load_norm(norm_weight, norm_bias, o_d, WIDTH)
            store_normed(normed, target, tile, mask, o_d, norm_scale, norm_shift, eps, WIDTH, norm_bias is not None)


@triton.jit
def _merge_rows(
    x, importance, sizes, dropped, rows_out, values, cu_out, ids_out, sizes_out, normed, norm_weight, norm_bias,
    x_token, i_b, bos, length, merged_id, eps, WIDTH, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The offset of a sample, and the weighted mean of those of its rows that are listed in ``dropped``, its last row."""
    o_d = tl.arange(0, BLOCK_D)
    o_r = tl.arange(0, ROWS)
    rows = tl.load(rows_out + i_b)
    # The numbers of a step's rows are fetched during the step before: one wait per step, and few steps, for one program has to
    # read all rows while the others that move some each come and go. The first come before it is known how many are listed.
    number = tl.load(dropped + bos + o_r, mask=o_r < length, other=0)
    before = rows_before(rows_out, i_b)
    if i_b == 0:
        tl.store(cu_out, 0)
    tl.store(cu_out + i_b + 1, before + rows)
    if rows < length:  # pruning always shortens a sample
        count = length + 1 - rows
        acc = tl.zeros((BLOCK_D,), tl.float32)
        weights = tl.zeros((ROWS,), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        for start in tl.range(0, count, ROWS, num_stages=3 if FEW else 1):
            m_r = start + o_r < count
            source = bos + number
            number = tl.load(dropped + bos + start + ROWS + o_r, mask=start + ROWS + o_r < count, other=0)
            mask = m_r[:, None] & (o_d < WIDTH)[None, :]
            tile = tl.load(x + source[:, None] * x_token + o_d[None, :], mask=mask, other=0.0)
            weight = tl.load(importance + source, mask=m_r, other=0.0)
            if sizes is not None:
                size = tl.load(sizes + source, mask=m_r, other=0.0)
                weight *= size
                total += size
            weights += weight
            acc += tl.sum(weight[:, None] * tile.to(tl.float32), 0)
        norm_scale, norm_shift = load_norm(norm_weight, norm_bias, o_d, WIDTH)
        merged = (acc / (tl.sum(weights, 0) + EPS)).to(values.dtype.element_ty)
        target = (before + rows - 1).to(tl.int64)
        tl.store(values + target * WIDTH + o_d, merged, mask=o_d < WIDTH)
        tl.store(ids_out + target, merged_id)
        if sizes is not None:
            tl.store(sizes_out + target, tl.sum(total, 0))
        if norm_weight is not None:
            store_normed(
                normed, target + tl.arange(0, 1), merged[None, :], (o_d < WIDTH)[None, :], o_d, norm_scale, norm_shift, eps, WIDTH,
                norm_bias is not None,
            )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "slots", "merged_id"])
def _compact_kernel(
    x, importance, places, dropped, rows_out, ids, sizes, values, cu_out, ids_out, sizes_out, normed,
    norm_weight, norm_bias, cu_seqlens, x_token, batch, slots, merged_id, eps, WIDTH,
    CHUNK: tl.constexpr, COPY_ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The first programs write the offset and the merged row of a sample each, the others move the survivors of a run of
    CHUNK rows: ``slots`` of them per sample.
    """
    after_previous()
    merges = tl.program_id(0) < batch
    number = tl.program_id(0) - batch
    i_b = tl.where(merges, tl.program_id(0), number // slots)
    first = tl.where(merges, 0, number % slots * CHUNK)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    if (first >= length) & (merges == 0):
        return
    if merges:
        _merge_rows(
            x, importance, sizes, dropped, rows_out, values, cu_out, ids_out, sizes_out, normed, norm_weight, norm_bias,
            x_token, i_b, bos, length, merged_id, eps, WIDTH, MERGE_ROWS, BLOCK_D, FEW,
        )  # fmt: skip
    else:
        _copy_rows(
            x, places, rows_out, ids, sizes, values, ids_out, sizes_out, normed, norm_weight, norm_bias,
            x_token, i_b, bos, first, length, eps, WIDTH, CHUNK, COPY_ROWS, BLOCK_D, FEW,
        )  # fmt: skip


def empty_selection(cu_seqlens: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what is decided for each token of a batch, int32: its place ``[C]`` among the rows of its sample (-1: dropped);
    numbers ``[C]`` of those dropped, packed from the start of each sample on; rows ``[B]`` of each sample.
    """
    make = cu_seqlens.new_empty
    return make(capacity), make(capacity), make(cu_seqlens.shape[0] - 1)


def _selection(
    capacity: int,
    batch: int,
    max_seqlen: int,
    by_threshold: bool,
    grouped: bool,
) -> Callable:
    """What makes a :func:`selection <empty_selection>` from importance, threshold, keep_count, cu_seqlens, protected, groups,
    min_keep.
    """
    by_own_threshold = Launch(_select_kernel, batch, BLOCK=BLOCK, num_warps=4)
    count = Launch(_count_kernel, batch, BLOCK=BLOCK, num_warps=4)
    rank = Launch(_rank_kernel, batch, GROUP_BLOCK=256, BLOCK=BLOCK, num_warps=4)
    longest_bits = max_seqlen.bit_length()

    def run(importance, threshold, keep_count, cu_seqlens, protected, groups, min_keep):
        places, dropped, rows_out = empty_selection(cu_seqlens, capacity)
        if by_threshold and not grouped:
            by_own_threshold(importance, threshold, protected, min_keep, places, dropped, rows_out, cu_seqlens)
            return places, dropped, rows_out
        if by_threshold:
            keep_count = torch.empty_like(rows_out)
            count(importance, threshold, protected, keep_count, cu_seqlens)
        rank(
            importance, protected, min_keep, keep_count, groups, places, dropped, rows_out, cu_seqlens, batch, longest_bits
        )  # fmt: skip
        return places, dropped, rows_out

    return run


def _blocks(block_d: int, element_size: int, normed: bool) -> tuple[int, int]:
    """Rows moved in a step, rows that a program moves.

    32768 bytes over 4 warps are 16 loads of 16 bytes a thread. LayerNorm holds its rows in float32, so that few of them leave
    registers for as many programs on a multiprocessor.
    """
    moved = max(1, min(64, (4096 if normed else 32768 // element_size) // block_d))
    return moved, max(moved, min(64, 16384 // block_d))


def _few_rows(programs: int, x: Tensor, multiprocessors: int) -> bool:
    """Whether a device holds ``programs`` that move a step of rows each. Then none of them waits for another: what takes time are the
    waits for memory within one, and merging may fetch two steps of rows in advance, into 64 KiB of shared memory.

    Only rows that are fetched 16 bytes at a time: number by number, the addresses of three steps would not fit the registers.
    """
    width = x.shape[1]
    fetched_wide = not (x.data_ptr() % 16 or x.stride(0) % 16 or width % 16)  # the multiples that Triton knows of
    return fetched_wide and programs <= 3 * multiprocessors and block(width) * x.element_size() <= 32768


def _merged_at_once(block_d: int, element_size: int) -> int:
    """Rows merged in a step: 16 loads of 16 bytes a thread. The bits of a merged row depend on it: never on the batch."""
    return max(1, min(64, 32768 // element_size // block_d))


@prepared
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
    selection: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Callable:
    """values, cu_out, ids_out, sizes_out, normed, the last two None where not asked for; see the public operation for the
    contract.

    ``selection``: what was decided before, as :func:`empty_selection` has it.
    """
    (capacity, width), batch = x.shape, cu_seqlens.shape[0] - 1
    sized, with_norm = sizes is not None, norm_weight is not None
    block_d = block(width)
    copy_rows, chunk = _blocks(block_d, x.element_size(), with_norm)
    few = _few_rows(batch + batch * cdiv(max_seqlen, copy_rows), x, multiprocessors(x))
    if few:
        chunk = copy_rows
    slots = max(1, cdiv(max_seqlen, chunk))  # programs are divided by it
    numbers = (x.stride(0), batch, slots, merged_id, norm_eps, width)
    choose = _selection(capacity, batch, max_seqlen, threshold is not None, groups is not None)
    move = Launch(
        _compact_kernel, batch + batch * slots,
        CHUNK=chunk, COPY_ROWS=copy_rows, MERGE_ROWS=_merged_at_once(block_d, x.element_size()), BLOCK_D=block_d,
        FEW=few, short=few or None, num_warps=4,
    )  # fmt: skip

    def run(
        x, importance, threshold, keep_count, cu_seqlens, max_seqlen, protected, groups, min_keep, ids, sizes, merged_id,
        norm_weight, norm_bias, norm_eps, exact, selection=None,
    ):  # fmt: skip
        values, cu_out, ids_out = (
            x.new_empty(capacity, width),
            torch.empty_like(cu_seqlens),
            cu_seqlens.new_empty(capacity),
        )
        sizes_out = importance.new_empty(capacity) if sized else None
        normed = torch.empty_like(values) if with_norm else None
        if batch == 0:
            rows = 0 if exact else capacity
            return _first(rows, values, cu_out.zero_(), ids_out, sizes_out, normed)
        if selection is None:
            protected = None if protected is None else protected.view(torch.uint8)
            selection = choose(importance, threshold, keep_count, cu_seqlens, protected, groups, min_keep)
        places, dropped, rows_out = selection
        move(
            x, importance, places, dropped, rows_out, ids, sizes, values, cu_out, ids_out, sizes_out, normed,
            norm_weight, norm_bias, cu_seqlens, *numbers,
        )  # fmt: skip
        if exact:
            rows = int(cu_out[-1])  # the one wait for the device, asked for by `exact`
            return _first(rows, values, cu_out, ids_out, sizes_out, normed)
        return values, cu_out, ids_out, sizes_out, normed

    return run


def _first(rows: int, values: Tensor, cu_out: Tensor, *per_row: Tensor | None) -> tuple:
    """Results without their rows from ``rows`` on."""
    return values[:rows], cu_out, *(None if t is None else t[:rows] for t in per_row)
