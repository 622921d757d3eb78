"""Token scores and pruning threshold on the GPU, in one pass over the tokens: the alignment with the dictionary is never stored.

Tokens go in tiles. For every dictionary entry a tile leaves five numbers: the largest logit, and four sums weighted by the
exponentials below it: 1, received attention, CLS term, alignment. The threshold is linear in the terms of the importance, so
these and the sums of a tile are enough, and the tiles of a sample merge as those of a softmax do.

Samples of one tile leave nothing: one program each ends with the threshold. About as many samples as multiprocessors hold programs
take one launch, one program per sample, too. Other batches would leave a part of the device idle that way: there every tile gets
a program, and a second, tiny launch merges. All do the same arithmetic in the same order: the bits are the same.

With one pair a program has nobody to wait beside it, and its time is that of its waits for memory: loads that do not need one another
stand before what uses the first of them, and what a program has made stays in its registers.

Whoever merges a sample knows its threshold. Where compaction follows (:func:`madtp_kernels.prune`) it goes on and selects: that
spares compaction a launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compaction.triton import count_kept, empty_selection, select, select_scored
from ..triton_utils import (
    EPS,
    LOG2E,
    Launch,
    after_previous,
    block,
    capability,
    cdiv,
    dot_precision,
    largest_or_nan,
    multiprocessors,
    prepared,
    product,
)

STATISTICS = tl.constexpr(5)  # numbers that a tile leaves per dictionary entry
TOTALS = tl.constexpr(16)  # room for two more, sums over its tokens: tiles start at multiples of 64 bytes
TOKEN_BLOCK = 1024  # tokens per step where only scores are read
_NOTHING = (None, None, None)  # where nothing is selected


@triton.jit
def _alignment(
    x, dictionary, bias, x_token, dictionary_entry, tokens, first_entry, WIDTH, M,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_j, dictionary_m> + bias_m of a block of entries and the tile of ``tokens`` rows that x points at.

    float32 [BLOCK_M, BLOCK_J]. Entries are the rows: the sums over tokens then stay inside a thread, but for four lanes.
    """
    o_j = tl.arange(0, BLOCK_J)
    o_m = first_entry + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    x_rows = x + o_j.to(tl.int64)[:, None] * x_token + o_k[None, :]
    d_rows = dictionary + o_m.to(tl.int64)[:, None] * dictionary_entry + o_k[None, :]
    m_j = (o_j < tokens)[:, None]
    m_m = (o_m < M)[:, None]
    shift = tl.zeros((BLOCK_M,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + o_m, mask=o_m < M, other=0.0)
    alignment = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        m_x, m_d = m_j, m_m
        if not EVEN:
            m_x = m_x & (start + o_k < WIDTH)[None, :]
            m_d = m_d & (start + o_k < WIDTH)[None, :]
        x_tile = tl.load(x_rows + start, mask=m_x, other=0.0)
        d_tile = tl.load(d_rows + start, mask=m_d, other=0.0)
        alignment = product(d_tile, tl.trans(x_tile), alignment, PRECISION)
    return alignment + shift[:, None]


@triton.jit
def _best(alignment, first_entry, M, BLOCK_M: tl.constexpr):
    """The largest alignment of each token with the entries of a block; NaN if one of them is."""
    in_block = first_entry + tl.arange(0, BLOCK_M) < M
    return largest_or_nan(tl.where(in_block[:, None], alignment, float("-inf")), 0)


@triton.jit
def _finite(peak):
    """A peak that can be subtracted: of entries that no token is aligned with it is -inf, and their weights are 0."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _statistics(alignment, best, received, cls, tokens, scale_log2, BLOCK_J: tl.constexpr):
    """Of each entry of a block, over the tokens of a tile: the largest logit, and the sums weighted by the exponentials below it."""
    valid = tl.arange(0, BLOCK_J) < tokens
    y = tl.where(valid[None, :], alignment * scale_log2, float("-inf"))
    peak = tl.max(y, 1)
    w = tl.exp2(y - _finite(peak)[:, None])
    return (
        peak,
        tl.sum(w, 1),
        tl.sum(w * received[None, :], 1),
        tl.sum(w * cls[None, :], 1),
        tl.sum(w * best[None, :], 1),
    )


@triton.jit
def _terms(received, cls, best, received_total, best_total):
    """Three times the importance of tokens, or the same of sums over tokens.

    Scores and thresholds are made in one order: where one token has all the weight, the threshold is its score, to the bit.
    """
    return received / (received_total + EPS) + cls + best / (best_total + EPS)


@triton.jit
def _lower(lowest, mass, received, cls, best, received_total, best_total, first_entry, M, BLOCK_M: tl.constexpr):
    """``lowest`` or, where it is lower, the threshold of the entries of a block, given their sums; NaN if one is."""
    candidate = _terms(received, cls, best, received_total, best_total) / (3.0 * mass)
    in_block = first_entry + tl.arange(0, BLOCK_M) < M
    return tl.minimum(lowest, tl.where(in_block, candidate, float("inf")), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tile(
    x, dictionary, bias, received, cls, importance, left, x_token, dictionary_entry, tokens,
    WIDTH, M, entries, scale_log2, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr, ONE_TILE: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of ``tokens`` tokens that the pointers stand at: the best alignment of each goes to ``importance`` for
    now, the statistics to ``left``. With ONE_TILE it is a whole sample: returns three times its scores and the lowest threshold of
    the entries that fall to each of BLOCK_M.
    """
    o_j = tl.arange(0, BLOCK_J)
    valid = o_j < tokens
    # Here, so that they come while the products are made.
    share = tl.load(received + o_j, mask=valid, other=0.0)
    given = tl.load(cls + o_j, mask=valid, other=0.0)
    if ONE_BLOCK:
        alignment = _alignment(
            x, dictionary, bias, x_token, dictionary_entry, tokens, 0, WIDTH, M, BLOCK_J, BLOCK_M, BLOCK_K, EVEN, PRECISION
        )  # fmt: skip
        best = _best(alignment, 0, M, BLOCK_M)
    else:
        # The sums need the best over all entries first; the products are cheap enough to be made twice.
        best = tl.full((BLOCK_J,), float("-inf"), tl.float32)
        for first_entry in tl.range(0, M, BLOCK_M, disable_licm=True):
            alignment = _alignment(
                x, dictionary, bias, x_token, dictionary_entry, tokens, first_entry, WIDTH, M,
                BLOCK_J, BLOCK_M, BLOCK_K, EVEN, PRECISION,
            )  # fmt: skip
            best = tl.maximum(best, _best(alignment, first_entry, M, BLOCK_M), propagate_nan=tl.PropagateNan.ALL)
    received_total = tl.sum(share, 0)
    # [1]: made of a product, a number would not get through Triton's passes for sm_100 (nor do the results of ONE_TILE).
    best_total = tl.sum(tl.where(valid, best, 0.0)[None, :], 1)
    lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    if not ONE_TILE:
        tl.store(importance + o_j, best, mask=valid)
        tl.store(left + STATISTICS * entries, received_total)
        tl.store(left + STATISTICS * entries + 1 + tl.arange(0, 1), best_total)
    for first_entry in tl.range(0, 1 if ONE_BLOCK else M, BLOCK_M, disable_licm=True):
        if not ONE_BLOCK:
            alignment = _alignment(
                x, dictionary, bias, x_token, dictionary_entry, tokens, first_entry, WIDTH, M,
                BLOCK_J, BLOCK_M, BLOCK_K, EVEN, PRECISION,
            )  # fmt: skip
        peak, mass, by_share, by_given, by_best = _statistics(
            alignment, best, share, given, tokens, scale_log2, BLOCK_J
        )
        if ONE_TILE:
            lowest = _lower(
                lowest, mass, by_share, by_given, by_best, received_total, best_total, first_entry, M, BLOCK_M
            )  # fmt: skip
        else:
            row = left + first_entry + tl.arange(0, BLOCK_M)
            tl.store(row, peak)
            tl.store(row + entries, mass)
            tl.store(row + 2 * entries, by_share)
            tl.store(row + 3 * entries, by_given)
            tl.store(row + 4 * entries, by_best)
    return _terms(share, given, best, received_total, best_total), lowest


@triton.jit
def _lowest(lowest):
    """The lowest of some numbers, NaN if one of them is."""
    return -largest_or_nan(-lowest, 0)


@triton.jit
def _parts(received, cls, importance, begin, start, tokens, BLOCK: tl.constexpr):
    """What the scores of BLOCK tokens from ``start`` on are made of."""
    o_j = start + tl.arange(0, BLOCK)
    rows = begin + o_j
    valid = o_j < tokens
    return (
        tl.load(received + rows, mask=valid, other=0.0),
        tl.load(cls + rows, mask=valid, other=0.0),
        tl.load(importance + rows, mask=valid, other=0.0),
    )


@triton.jit
def _merge(
    received, cls, importance, threshold, left, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens, tiles, M, entries,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, ONE_BLOCK: tl.constexpr, ONE_STEP: tl.constexpr,
    ONE_ROUND: tl.constexpr,
):  # fmt: skip
    """Importance and threshold of one sample, from what its tiles left, and with ``places`` the selection.

    All sums over tiles go in their order, in rounds of however many TILES. Where a sample has at most BLOCK tokens (ONE_STEP) and
    TILES tiles (ONE_ROUND), no loop stands between its loads: they come together.
    """
    begin = bos + 1
    last_token, last_tile = tokens, tiles
    if ONE_STEP:
        last_token = 1
    if ONE_ROUND:
        last_tile = 1
    pitch = STATISTICS * entries + TOTALS
    if ONE_STEP:
        share, given, best = _parts(received, cls, importance, begin, 0, tokens, BLOCK)
    received_total = 0.0
    best_total = 0.0
    for first_tile in range(0, last_tile, TILES):
        for i_t in tl.static_range(TILES):
            totals = left + tl.cast(first_tile + i_t, tl.int64) * pitch + STATISTICS * entries
            received_total += tl.load(totals, mask=first_tile + i_t < tiles, other=0.0)
            best_total += tl.load(totals + 1, mask=first_tile + i_t < tiles, other=0.0)

    lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    for first_entry in range(0, 1 if ONE_BLOCK else M, BLOCK_M):
        o_m = first_entry + tl.arange(0, BLOCK_M)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        for first_tile in range(0, last_tile, TILES):
            for i_t in tl.static_range(TILES):
                row = left + tl.cast(first_tile + i_t, tl.int64) * pitch + o_m
                peak = tl.maximum(peak, tl.load(row, mask=first_tile + i_t < tiles, other=float("-inf")))
        peak = _finite(peak)
        mass = tl.zeros((BLOCK_M,), tl.float32)
        by_share = tl.zeros((BLOCK_M,), tl.float32)
        by_given = tl.zeros((BLOCK_M,), tl.float32)
        by_best = tl.zeros((BLOCK_M,), tl.float32)
        for first_tile in range(0, last_tile, TILES):
            for i_t in tl.static_range(TILES):
                row = left + tl.cast(first_tile + i_t, tl.int64) * pitch + o_m
                present = first_tile + i_t < tiles
                scale = tl.exp2(tl.load(row, mask=present, other=float("-inf")) - peak)
                mass += tl.load(row + entries, mask=present, other=0.0) * scale
                by_share += tl.load(row + 2 * entries, mask=present, other=0.0) * scale
                by_given += tl.load(row + 3 * entries, mask=present, other=0.0) * scale
                by_best += tl.load(row + 4 * entries, mask=present, other=0.0) * scale
        lowest = _lower(lowest, mass, by_share, by_given, by_best, received_total, best_total, first_entry, M, BLOCK_M)
    bound = _lowest(lowest)
    tl.store(threshold + i_b, bound)

    # The scores come last: no load may be moved before a store, so that theirs would keep the statistics waiting.
    score = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, last_token, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        if not ONE_STEP:
            share, given, best = _parts(received, cls, importance, begin, start, tokens, BLOCK)
        score = _terms(share, given, best, received_total, best_total) / 3.0
        tl.store(importance + begin + o_j, score, mask=o_j < tokens)
    if places is not None:
        if ONE_STEP:
            select_scored(score, bound, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens, BLOCK)
        else:
            tl.debug_barrier()  # the selection reads the scores of other threads
            length = tokens + 1
            kept = count_kept(importance, bound, protected, bos, length, BLOCK)
            select(
                importance, bound, 0, protected, min_keep, places, dropped, rows_out, i_b, bos, length, kept, False, BLOCK
            )  # fmt: skip


@triton.jit
def _select_all(places, rows_out, i_b, bos, tokens):
    """The selection of a sample of one token or none: it stays."""
    tl.store(rows_out + i_b, tokens + 1)
    if tokens == 0:
        tl.store(places + bos, 0)


@triton.jit(do_not_specialize=["slots", "one_launch"])
def _score_kernel(
    x, dictionary, bias, received, cls, importance, threshold, left, protected, min_keep, places, dropped, rows_out,
    cu_seqlens, x_token, dictionary_entry, slots, one_launch, WIDTH, M, entries, scale_log2, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, ONE_TILE: tl.constexpr, ONE_STEP: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all tiles of a sample, their merge and, with ``places``, the selection (``one_launch``), or one tile of a
    sample. With ONE_TILE no sample has more, and nothing is left to merge.
    """
    after_previous()
    i_b = tl.program_id(0) // slots
    slot = tl.program_id(0) % slots
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    tokens = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32) - 1  # without token 0
    if slot == 0:
        if tokens >= 0:
            tl.store(importance + bos, 0.0)
        if tokens <= 0:
            tl.store(threshold + i_b, 0.0)
    if slot * BLOCK_J >= tokens:
        if places is not None:  # noqa: SIM102 (known when the kernel is compiled, the other is not)
            if one_launch != 0:
                _select_all(places, rows_out, i_b, bos, tokens)
        return
    if ONE_TILE:
        begin = bos + 1
        score, lowest = _tile(
            x + begin * x_token, dictionary, bias, received + begin, cls + begin, importance, left,
            x_token, dictionary_entry, tokens, WIDTH, M, entries, scale_log2,
            BLOCK_J, BLOCK_M, BLOCK_K, ONE_BLOCK, ONE_TILE, EVEN, PRECISION,
        )  # fmt: skip
        bound = _lowest(lowest)
        tl.store(threshold + i_b, bound)
        score = score / 3.0
        o_j = tl.arange(0, BLOCK_J)
        tl.store(importance + begin + o_j, score, mask=o_j < tokens)
        if places is not None:
            select_scored(score, bound, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens, BLOCK_J)
        return
    # Sample b's tiles are numbered from bos // BLOCK_J + b: never more than its tiles, and known without a scan.
    pitch = STATISTICS * entries + TOTALS
    left += (bos // BLOCK_J + i_b) * pitch
    first_tile, last_tile = slot, slot + 1
    if one_launch != 0:
        last_tile = tl.cdiv(tokens, BLOCK_J)
    for i_t in tl.range(first_tile, last_tile, disable_licm=True):
        begin = bos + 1 + i_t * BLOCK_J
        _tile(
            x + begin * x_token, dictionary, bias, received + begin, cls + begin, importance + begin,
            left + tl.cast(i_t, tl.int64) * pitch, x_token, dictionary_entry,
            tokens - i_t * BLOCK_J, WIDTH, M, entries, scale_log2,
            BLOCK_J, BLOCK_M, BLOCK_K, ONE_BLOCK, ONE_TILE, EVEN, PRECISION,
        )  # fmt: skip
    if one_launch != 0:
        tl.debug_barrier()  # the merge reads what other threads of this program stored
        _merge(
            received, cls, importance, threshold, left, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens,
            last_tile, M, entries, BLOCK_M, BLOCK, 1, ONE_BLOCK, ONE_STEP, False,
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    received, cls, importance, threshold, left, protected, min_keep, places, dropped, rows_out, cu_seqlens, M, entries,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    """One program per sample: the merge and, with ``places``, the selection."""
    after_previous()
    TILES: tl.constexpr = BLOCK // BLOCK_J if ONE_STEP else 4
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    tokens = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32) - 1
    if tokens <= 0:
        if places is not None:
            _select_all(places, rows_out, i_b, bos, tokens)
        return
    left += (bos // BLOCK_J + i_b) * (STATISTICS * entries + TOTALS)
    _merge(
        received, cls, importance, threshold, left, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens,
        tl.cdiv(tokens, BLOCK_J), M, entries, BLOCK_M, BLOCK, TILES, ONE_BLOCK, ONE_STEP, ONE_STEP,
    )  # fmt: skip


def _blocks(dtype: torch.dtype, generation: int) -> tuple[int, int, dict[str, int]]:
    """Tokens of a tile, widths of a step, and how the kernel is compiled. They decide the bits of a result: never the batch.

    On sm_90 two groups of four warps share a product: what follows it, of one program where there is one pair, takes half as long.
    128 registers leave room for two programs on a multiprocessor.
    """
    if dtype == torch.float32:
        return 64, 32, {"num_warps": 8, "num_stages": 1}
    if generation == 9:
        return 64, 64, {"num_warps": 8, "num_stages": 4, "maxnreg": 128}
    return 64, 64, {"num_warps": 4, "num_stages": 4}


def _one_launch(batch: int, tiles: int, multiprocessors: int) -> bool:
    """Whether one program per sample is as fast as one per tile of at most ``tiles`` each and a second launch.

    A multiprocessor holds two programs. The second launch takes about half as long as a tile.
    """
    return cdiv(batch, 2 * multiprocessors) * tiles <= cdiv(batch * tiles, 2 * multiprocessors) + 0.5


@prepared
def score_tokens(
    x: Tensor,
    dictionary: Tensor,
    received: Tensor,
    cls: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    temperature: float,
    bias: Tensor | None,
    selection: tuple[Tensor | None, Tensor | None] | None = None,
) -> Callable:
    """importance ``[C]`` and threshold ``[B]``, float32; see the public operation for the contract.

    With a ``selection``, which is (protected ``[C]``, min_keep ``[B]``) of :func:`madtp_kernels.compact`, also what its first
    launch leaves: see :func:`madtp_kernels.compaction.triton.compact`.
    """
    capacity, width = x.shape
    entries = dictionary.shape[0]
    batch = cu_seqlens.shape[0] - 1
    generation = capability(x.device)[0]
    block_j, block_k, options = _blocks(x.dtype, generation)
    block_m = min(block(entries), 128)
    padded = cdiv(entries, block_m) * block_m
    tiles = max(1, cdiv(max_seqlen - 1, block_j))
    one_launch = _one_launch(batch, tiles, multiprocessors(x))
    slots = 1 if one_launch else tiles
    sizes = (
        x.stride(0), dictionary.stride(0), slots, int(one_launch), width, entries, padded, LOG2E.value / temperature,
    )  # fmt: skip
    one_block, one_step = padded == block_m, max_seqlen <= TOKEN_BLOCK
    score = Launch(
        _score_kernel, batch * slots,
        BLOCK_J=block_j, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK=TOKEN_BLOCK,
        ONE_BLOCK=one_block, ONE_TILE=one_launch and tiles == 1 and generation < 10, ONE_STEP=one_step,
        EVEN=width % block_k == 0, PRECISION=dot_precision(x.dtype), **options,
    )  # fmt: skip
    merge = Launch(
        _merge_kernel, batch,
        BLOCK_J=block_j, BLOCK_M=block_m, BLOCK=TOKEN_BLOCK, ONE_BLOCK=one_block, ONE_STEP=one_step, num_warps=4,
    )  # fmt: skip
    statistics = (capacity // block_j + batch, STATISTICS.value * padded + TOTALS.value)

    def run(x, dictionary, received, cls, cu_seqlens, max_seqlen, temperature, bias, selection=None):
        importance, threshold = received.new_empty(capacity), received.new_empty(batch)
        protected = min_keep = selected = None
        if selection is not None:
            protected, min_keep = selection
            protected = None if protected is None else protected.view(torch.uint8)
            selected = empty_selection(cu_seqlens, capacity)
        if batch:
            left = received.new_empty(statistics)
            chooses = (protected, min_keep, *(selected or _NOTHING))
            score(x, dictionary, bias, received, cls, importance, threshold, left, *chooses, cu_seqlens, *sizes)
            if not one_launch:
                merge(received, cls, importance, threshold, left, *chooses, cu_seqlens, entries, padded)
        return (importance, threshold) if selection is None else (importance, threshold, selected)

    return run
