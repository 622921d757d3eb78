"""Compaction on the GPU: scan, gather, merge and LayerNorm in one launch.

Every program finds out by itself where its rows go: it counts the survivors of the samples before its own (4 bytes a token,
from cache) instead of waiting for a scan launch. Programs take runs of input rows, so nothing has to invert the selection,
and move whole rows, so that a row is read once and LayerNorm needs no second pass. The first program of each sample makes
the merged row instead.

Counts (top-k) and groups of samples need a cut-off score first: one small launch finds it by bisection over the bits of the
scores, which turns "the K best" into "not below the cut-off" for the launch above. Groups under the threshold rule need one
more, to count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import EPS, block, multiprocessors, on_device_of_first

POSITION_BITS = tl.constexpr(30)
BLOCK = 1024  # scores per step
SAMPLES = 16  # samples counted at once


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
def _kept(importance, threshold, cut, protected, bos, o_j, mask, length, RANKED: tl.constexpr):
    """Whether tokens o_j >= 1 of a sample survive if it is pruned; False where masked."""
    if RANKED:
        return _key(importance, protected, bos, o_j, mask, length) >= cut
    kept = tl.load(importance + bos + o_j, mask=mask, other=float("-inf")) > threshold
    if protected is not None:
        kept = kept | (tl.load(protected + bos + o_j, mask=mask, other=0) != 0)
    return kept & mask


@triton.jit
def _is_pruned(kept, length, min_keep):
    """Pruning must leave more than min_keep tokens and drop at least two."""
    return (kept > min_keep) & (length - 1 - kept >= 2)


@triton.jit
def _rows_before(
    importance, threshold, counts, protected, min_keep, cu_seqlens, i_b,
    RANKED: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that the samples before i_b have after pruning."""
    rows = 0
    for start in range(0, i_b, SAMPLES):
        o_b = start + tl.arange(0, SAMPLES)
        m_b = o_b < i_b
        bos = tl.load(cu_seqlens + o_b, mask=m_b, other=0)
        length = tl.load(cu_seqlens + o_b + 1, mask=m_b, other=0) - bos
        if RANKED:
            kept = tl.load(counts + o_b, mask=m_b, other=0)
        else:
            bound = tl.load(threshold + o_b, mask=m_b, other=0.0)
            flags = tl.zeros((SAMPLES, BLOCK), tl.int32)
            for first in tl.range(1, tl.max(length, 0), BLOCK, loop_unroll_factor=4):
                o_j = first + tl.arange(0, BLOCK)[None, :]
                mask = o_j < length[:, None]
                begin = bos.to(tl.int64)[:, None]
                flags += _kept(importance, bound[:, None], 0, protected, begin, o_j, mask, 0, False).to(tl.int32)
            kept = tl.sum(flags, 1)
        least = tl.zeros((SAMPLES,), tl.int32)
        if min_keep is not None:
            least = tl.load(min_keep + o_b, mask=m_b, other=0)
        rows += tl.sum(tl.where(_is_pruned(kept, length, least), kept + 2, length), 0)
    return rows


@triton.jit
def _count(
    importance, threshold, cut, protected, bos, first, last, length, RANKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Number of tokens in first:last of a sample that survive if it is pruned."""
    count = 0
    for start in range(first, last, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        flags = _kept(importance, threshold, cut, protected, bos, o_j, o_j < last, length, RANKED)
        count += tl.sum(flags.to(tl.int32), 0)
    return count


@triton.jit
def _store_normed(normed, rows, tile, mask, o_d, norm_weight, norm_bias, eps, WIDTH, BLOCK_D: tl.constexpr):
    """LayerNorm of rows of a tile [R, BLOCK_D], given in the precision in which they are stored."""
    wide = tile.to(tl.float32)
    m_d = o_d < WIDTH
    centred = tl.where(m_d[None, :], wide - (tl.sum(wide, 1) / WIDTH)[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + eps)
    result = centred * scale[:, None] * tl.load(norm_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    if norm_bias is not None:
        result += tl.load(norm_bias + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + rows[:, None] * WIDTH + o_d[None, :], result.to(tile.dtype), mask=mask)


@triton.jit
def _copy_rows(
    x, importance, threshold, cut, protected, ids, sizes, values, ids_out, sizes_out, normed, norm_weight, norm_bias,
    x_token, bos, begin_out, first, last, length, placed, pruned, eps, WIDTH,
    RANKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Move the surviving rows among first:last of a sample; ``placed`` rows of the sample come before them."""
    o_d = tl.arange(0, BLOCK_D)
    for start in range(first, last, ROWS):
        o_j = start + tl.arange(0, ROWS)
        valid = o_j < last
        kept = _kept(importance, threshold, cut, protected, bos, o_j, valid, length, RANKED)
        kept = valid & (kept | (o_j == 0) | (not pruned))
        order = tl.cumsum(kept.to(tl.int32), 0)
        target = begin_out + placed + order - 1
        placed += tl.max(order, 0)
        mask = kept[:, None] & (o_d < WIDTH)[None, :]
        tile = tl.load(x + (bos + o_j)[:, None] * x_token + o_d[None, :], mask=mask, other=0.0)
        tl.store(values + target[:, None] * WIDTH + o_d[None, :], tile, mask=mask)
        source = o_j
        if ids is not None:
            source = tl.load(ids + bos + o_j, mask=kept, other=0)
        tl.store(ids_out + target, source, mask=kept)
        if sizes is not None:
            tl.store(sizes_out + target, tl.load(sizes + bos + o_j, mask=kept, other=0.0), mask=kept)
        if norm_weight is not None:
            _store_normed(normed, target, tile, mask, o_d, norm_weight, norm_bias, eps, WIDTH, BLOCK_D)


@triton.jit
def _merge_rows(
    x, importance, threshold, cut, protected, sizes, dropped, values, ids_out, sizes_out, normed,
    norm_weight, norm_bias, x_token, bos, target, length, count, merged_id, eps, WIDTH,
    RANKED: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted mean of the ``count`` dropped rows of a sample, stored in row ``target``."""
    # List the dropped tokens, so that the loop over rows reads these and nothing else.
    listed = 0
    weight_total = 0.0
    size_total = 0.0
    for start in range(1, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        mask = o_j < length
        drop = mask & (_kept(importance, threshold, cut, protected, bos, o_j, mask, length, RANKED) == 0)
        order = tl.cumsum(drop.to(tl.int32), 0)
        tl.store(dropped + bos + listed + order - 1, o_j, mask=drop)
        listed += tl.max(order, 0)
        weight = tl.load(importance + bos + o_j, mask=drop, other=0.0)
        if sizes is not None:
            size = tl.load(sizes + bos + o_j, mask=drop, other=0.0)
            weight *= size
            size_total += tl.sum(size, 0)
        weight_total += tl.sum(weight, 0)
    tl.debug_barrier()  # the list is read by other threads than wrote it

    o_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # Whole rounds of the unrolled loop: its eight loads then fly together, and no rest is left to a slow loop.
    for start in tl.range(0, tl.cdiv(count, 8 * ROWS) * (8 * ROWS), ROWS, loop_unroll_factor=8):
        o_r = start + tl.arange(0, ROWS)
        m_r = o_r < count
        rows = bos + tl.load(dropped + bos + o_r, mask=m_r, other=0)
        weight = tl.load(importance + rows, mask=m_r, other=0.0)
        if sizes is not None:
            weight *= tl.load(sizes + rows, mask=m_r, other=0.0)
        mask = m_r[:, None] & (o_d < WIDTH)[None, :]
        acc += weight[:, None] * tl.load(x + rows[:, None] * x_token + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    merged = (tl.sum(acc, 0) / (weight_total + EPS)).to(values.dtype.element_ty)
    tl.store(values + target * WIDTH + o_d, merged, mask=o_d < WIDTH)
    tl.store(ids_out + target, merged_id)
    if sizes is not None:
        tl.store(sizes_out + target, size_total)
    if norm_weight is not None:
        rows = target + tl.arange(0, 1)
        _store_normed(
            normed, rows, merged[None, :], (o_d < WIDTH)[None, :], o_d, norm_weight, norm_bias, eps, WIDTH, BLOCK_D
        )


@triton.jit(do_not_specialize=["slots", "chunk", "merged_id"])
def _compact_kernel(
    x, importance, threshold, counts, cuts, protected, min_keep, ids, sizes, dropped,
    values, cu_out, ids_out, sizes_out, normed, norm_weight, norm_bias, cu_seqlens,
    x_token, slots, chunk, merged_id, eps, WIDTH,
    RANKED: tl.constexpr, COPY_ROWS: tl.constexpr, MERGE_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Slot 0 of a sample writes its offset and merged row; slot i > 0 moves the survivors of its i-th ``chunk`` rows."""
    i_b = tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    first = (slot - 1) * chunk
    if first >= length:
        return
    bound = 0.0
    cut = tl.full((), 0, tl.int64)
    if RANKED:
        cut = tl.load(cuts + i_b)
        kept = tl.load(counts + i_b)
    else:
        bound = tl.load(threshold + i_b)
        kept = _count(importance, bound, cut, protected, bos, 1, length, length, RANKED, BLOCK)
    least = 0
    if min_keep is not None:
        least = tl.load(min_keep + i_b)
    pruned = _is_pruned(kept, length, least)
    begin_out = _rows_before(
        importance, threshold, counts, protected, min_keep, cu_seqlens, i_b, RANKED, SAMPLES, BLOCK // 8
    ).to(tl.int64)  # fmt: skip
    if slot == 0:
        if i_b == 0:
            tl.store(cu_out, 0)
        tl.store(cu_out + i_b + 1, (begin_out + tl.where(pruned, kept + 2, length)).to(tl.int32))
        if pruned:
            _merge_rows(
                x, importance, bound, cut, protected, sizes, dropped, values, ids_out, sizes_out, normed,
                norm_weight, norm_bias, x_token, bos, begin_out + kept + 1, length, length - 1 - kept, merged_id, eps,
                WIDTH, RANKED, MERGE_ROWS, BLOCK_D, BLOCK,
            )  # fmt: skip
    else:
        placed = first
        if pruned:
            placed = _count(importance, bound, cut, protected, bos, 1, first, length, RANKED, BLOCK)
            placed += tl.minimum(first, 1)  # token 0
        _copy_rows(
            x, importance, bound, cut, protected, ids, sizes, values, ids_out, sizes_out, normed,
            norm_weight, norm_bias, x_token, bos, begin_out, first, tl.minimum(first + chunk, length), length,
            placed, pruned, eps, WIDTH, RANKED, COPY_ROWS, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _count_kernel(importance, threshold, protected, counts, cu_seqlens, BLOCK: tl.constexpr):
    """Survivors of each sample by its own threshold."""
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    bound = tl.load(threshold + i_b)
    tl.store(counts + i_b, _count(importance, bound, 0, protected, bos, 1, length, length, False, BLOCK))


@triton.jit(do_not_specialize=["batch", "position_bits"])
def _cut_kernel(
    importance, protected, own_counts, groups, counts, cuts, cu_seqlens, batch, position_bits,
    GROUP_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many tokens each sample keeps, and the key (see `_key`) of the last of them in rank."""
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
    tl.store(counts + i_b, count)

    # The largest key that `count` keys reach, bit by bit: 33 bits of rank, then those of the position that can be set.
    cut = tl.full((), 0, tl.int64)
    for step in range(0, 33 + position_bits):
        bit = tl.where(step < 33, 32 + POSITION_BITS - step, 32 + position_bits - step)
        candidate = cut + (tl.full((), 1, tl.int64) << bit.to(tl.int64))
        reached = 0
        for start in range(1, length, BLOCK):
            o_j = start + tl.arange(0, BLOCK)
            key = _key(importance, protected, bos, o_j, o_j < length, length)
            reached += tl.sum((key >= candidate).to(tl.int32), 0)
        if reached >= count:
            cut = candidate
    tl.store(cuts + i_b, cut)


def _cuts(
    importance: Tensor,
    threshold: Tensor | None,
    keep_count: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    protected: Tensor | None,
    groups: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """counts ``[B]`` int32 and cut-off keys ``[B]`` int64 of the rules that rank."""
    batch = cu_seqlens.shape[0] - 1
    counts = torch.empty(batch, dtype=torch.int32, device=importance.device)
    cuts = torch.empty(batch, dtype=torch.int64, device=importance.device)
    own_counts = keep_count
    if own_counts is None:
        own_counts = torch.empty_like(counts)
        _count_kernel[(batch,)](importance, threshold, protected, own_counts, cu_seqlens, BLOCK=BLOCK, num_warps=4)
    _cut_kernel[(batch,)](
        importance, protected, own_counts, groups, counts, cuts, cu_seqlens, batch, max_seqlen.bit_length(),
        GROUP_BLOCK=256, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return counts, cuts


def _blocks(block_d: int, element_size: int, normed: bool) -> tuple[int, int]:
    """Rows moved at once and rows merged at once.

    32 KiB over 8 warps are 8 loads of 16 bytes a thread, in few enough registers for two or three programs on a
    multiprocessor; LayerNorm holds its rows in float32. The merge keeps eight steps in flight (its loop is unrolled) beside
    a float32 accumulator of one step's size.
    """
    moved = 8192 if normed else 32768 // element_size
    return max(1, min(64, moved // block_d)), max(1, min(64, 8192 // element_size // block_d))


@on_device_of_first
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """values, cu_out, ids_out, sizes_out, normed; see the public operation for the contract."""
    capacity, width = x.shape
    batch = cu_seqlens.shape[0] - 1
    values = torch.empty_like(x, memory_format=torch.contiguous_format)
    cu_out = torch.empty_like(cu_seqlens)
    ids_out = torch.empty(capacity, dtype=torch.int32, device=x.device)
    sizes_out = torch.empty(0 if sizes is None else capacity, dtype=torch.float32, device=x.device)
    normed = x.new_empty(0) if norm_weight is None else torch.empty_like(values)
    if batch == 0:
        rows = 0 if exact else capacity
        return values[:rows], cu_out.zero_(), ids_out[:rows], sizes_out[:rows], normed[:rows]

    ranked = groups is not None or threshold is None
    if protected is not None:
        protected = protected.view(torch.uint8)
    counts = cuts = None
    if ranked:
        counts, cuts = _cuts(importance, threshold, keep_count, cu_seqlens, max_seqlen, protected, groups)
    block_d = block(width)
    copy_rows, merge_rows = _blocks(block_d, x.element_size(), norm_weight is not None)
    # A few programs per multiprocessor: each pays once for counting the samples before its own.
    tiles = triton.cdiv(max_seqlen, copy_rows)
    chunk = copy_rows * max(1, min(16, batch * tiles // (4 * multiprocessors(x))))
    slots = 1 + triton.cdiv(max_seqlen, chunk)
    dropped = torch.empty_like(ids_out)
    _compact_kernel[(batch * slots,)](
        x, importance, threshold, counts, cuts, protected, min_keep, ids, sizes, dropped,
        values, cu_out, ids_out, sizes_out, normed, norm_weight, norm_bias, cu_seqlens,
        x.stride(0), slots, chunk, merged_id, norm_eps, width,
        RANKED=ranked, COPY_ROWS=copy_rows, MERGE_ROWS=merge_rows, BLOCK_D=block_d, SAMPLES=SAMPLES, BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip
    if exact:
        rows = int(cu_out[-1])  # the one wait for the device, asked for by `exact`
        return values[:rows], cu_out, ids_out[:rows], sizes_out[:rows], normed[:rows]
    return values, cu_out, ids_out, sizes_out, normed
