"""Token scores and pruning threshold on the GPU, in one pass over the tokens: the alignment with the dictionary is never stored.

Tokens go in tiles. For every dictionary entry a tile leaves four numbers: the largest logit, and three sums weighted by the
exponentials below it: 1, received share + CLS term, alignment. The threshold is linear in the terms of the importance, so
these are enough, and the tiles of a sample merge as an online softmax does.

Samples of one tile, or about as many as multiprocessors hold programs, take one launch, one program per sample. Other batches would
leave a part of the device idle that way: there every tile gets a program, and a second, tiny launch merges. Both do the same
arithmetic in the same order: the bits are the same.

Whoever merges a sample knows its threshold. Where compaction follows (:func:`madtp_kernels.prune`) it goes on and selects: that
spares compaction a launch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..compaction.triton import count_kept, empty_selection, select
from ..triton_utils import (
    EPS,
    LOG2E,
    Launch,
    after_previous,
    block,
    cdiv,
    dot_precision,
    has_nan,
    largest_or_nan,
    multiprocessors,
    prepared,
    product,
)

STATISTICS = tl.constexpr(4)  # numbers that a tile leaves per dictionary entry
_NOTHING = (None, None, None)  # where nothing is selected
TOKEN_BLOCK = 1024  # tokens per step where only scores are read


@triton.jit
def _total(values, begin, tokens, BLOCK: tl.constexpr):
    """Sum of values[begin:begin+tokens]."""
    total = 0.0
    for start in range(0, tokens, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(values + begin + o_j, mask=o_j < tokens, other=0.0), 0)
    return total


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
    alignment = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        m_x, m_d = m_j, m_m
        if not EVEN:
            m_x = m_x & (start + o_k < WIDTH)[None, :]
            m_d = m_d & (start + o_k < WIDTH)[None, :]
        x_tile = tl.load(x_rows + start, mask=m_x, other=0.0)
        d_tile = tl.load(d_rows + start, mask=m_d, other=0.0)
        alignment = product(d_tile, tl.trans(x_tile), alignment, PRECISION)
    if bias is not None:
        alignment += tl.load(bias + o_m, mask=o_m < M, other=0.0)[:, None]
    return alignment


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
def _leave_statistics(
    alignment, best, received, cls, received_total, tokens, left, entries, scale_log2,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store the four numbers per entry of one tile; ``left`` points at the first, each kind takes ``entries`` numbers."""
    o_j = tl.arange(0, BLOCK_J)
    left += tl.arange(0, BLOCK_M)
    y = tl.where((o_j < tokens)[None, :], alignment * scale_log2, float("-inf"))
    peak = tl.max(y, 1)
    w = tl.exp2(y - _finite(peak)[:, None])
    tl.store(left, peak)
    tl.store(left + entries, tl.sum(w, 1))
    tl.store(left + 3 * entries, tl.sum(w * best[None, :], 1))
    score = tl.load(received + o_j, mask=o_j < tokens, other=0.0) / (received_total + EPS)
    score += tl.load(cls + o_j, mask=o_j < tokens, other=0.0)
    tl.store(left + 2 * entries, tl.sum(w * score[None, :], 1))


@triton.jit
def _tile(
    x, dictionary, bias, received, cls, importance, left, x_token, dictionary_entry, tokens, received_total,
    WIDTH, M, entries, scale_log2, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tile of ``tokens`` tokens that the pointers stand at: the best alignment of each goes to ``importance`` for
    now, the statistics to ``left``.
    """
    o_j = tl.arange(0, BLOCK_J)
    if ONE_BLOCK:
        alignment = _alignment(
            x,
            dictionary,
            bias,
            x_token,
            dictionary_entry,
            tokens,
            0,
            WIDTH,
            M,
            BLOCK_J,
            BLOCK_M,
            BLOCK_K,
            EVEN,
            PRECISION,
        )
        best = _best(alignment, 0, M, BLOCK_M)
        tl.store(importance + o_j, best, mask=o_j < tokens)
        _leave_statistics(
            alignment, best, received, cls, received_total, tokens, left, entries, scale_log2, BLOCK_J, BLOCK_M
        )
    else:
        # The sums need the best over all entries first; the products are cheap enough to be made twice.
        best = tl.full((BLOCK_J,), float("-inf"), tl.float32)
        for first_entry in tl.range(0, M, BLOCK_M, disable_licm=True):
            alignment = _alignment(
                x, dictionary, bias, x_token, dictionary_entry, tokens, first_entry, WIDTH, M,
                BLOCK_J, BLOCK_M, BLOCK_K, EVEN, PRECISION,
            )  # fmt: skip
            best = tl.maximum(best, _best(alignment, first_entry, M, BLOCK_M), propagate_nan=tl.PropagateNan.ALL)
        tl.store(importance + o_j, best, mask=o_j < tokens)
        for first_entry in tl.range(0, M, BLOCK_M, disable_licm=True):
            alignment = _alignment(
                x, dictionary, bias, x_token, dictionary_entry, tokens, first_entry, WIDTH, M,
                BLOCK_J, BLOCK_M, BLOCK_K, EVEN, PRECISION,
            )  # fmt: skip
            _leave_statistics(
                alignment, best, received, cls, received_total, tokens, left + first_entry, entries, scale_log2,
                BLOCK_J, BLOCK_M,
            )  # fmt: skip


@triton.jit
def _merge(
    received, cls, importance, threshold, left, begin, tokens, tiles, received_total, M, entries,
    BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Importance of one sample, from what its tiles left, and its threshold, which is stored and returned."""
    best_total = _total(importance, begin, tokens, BLOCK)
    for start in range(0, tokens, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        valid = o_j < tokens
        # In the order of the threshold's sums: where one token has all the weight, the threshold is its score, to the bit.
        score = tl.load(received + begin + o_j, mask=valid, other=0.0) / (received_total + EPS)
        score += tl.load(cls + begin + o_j, mask=valid, other=0.0)
        score += tl.load(importance + begin + o_j, mask=valid, other=0.0) / (best_total + EPS)
        tl.store(importance + begin + o_j, score / 3.0, mask=valid)

    lowest = tl.full((BLOCK_M,), float("inf"), tl.float32)
    for first_entry in range(0, M, BLOCK_M):
        o_m = first_entry + tl.arange(0, BLOCK_M)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        mass = tl.zeros((BLOCK_M,), tl.float32)
        weighted = tl.zeros((BLOCK_M,), tl.float32)
        aligned = tl.zeros((BLOCK_M,), tl.float32)
        for i_t in range(tiles):
            row = left + tl.cast(i_t, tl.int64) * (STATISTICS * entries) + o_m
            tile_peak = tl.load(row)
            new_peak = tl.maximum(peak, tile_peak)
            old = tl.exp2(peak - _finite(new_peak))
            new = tl.exp2(tile_peak - _finite(new_peak))
            mass = mass * old + tl.load(row + entries) * new
            weighted = weighted * old + tl.load(row + 2 * entries) * new
            aligned = aligned * old + tl.load(row + 3 * entries) * new
            peak = new_peak
        candidate = (weighted + aligned / (best_total + EPS)) / (3.0 * mass)
        lowest = tl.minimum(lowest, tl.where(o_m < M, candidate, float("inf")), propagate_nan=tl.PropagateNan.ALL)
    bound = tl.where(has_nan(lowest, 0), float("nan"), tl.min(lowest, 0))
    tl.store(threshold, bound)
    return bound


@triton.jit
def _select(importance, bound, protected, min_keep, places, dropped, rows_out, i_b, bos, length, BLOCK: tl.constexpr):
    """What compaction's first launch would leave for a sample of which all scores are stored."""
    kept = count_kept(importance, bound, protected, bos, length, BLOCK)
    select(importance, bound, 0, protected, min_keep, places, dropped, rows_out, i_b, bos, length, kept, False, BLOCK)


@triton.jit(do_not_specialize=["slots", "one_launch"])
def _score_kernel(
    x, dictionary, bias, received, cls, importance, threshold, left, protected, min_keep, places, dropped, rows_out,
    cu_seqlens, x_token, dictionary_entry, slots, one_launch, WIDTH, M, entries, scale_log2, BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: all tiles of a sample, their merge and, with ``places``, the selection (``one_launch``), or one tile of a
    sample.
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
            if one_launch != 0:  # one token or none: it stays
                _select(importance, 0.0, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens + 1, BLOCK)
        return
    # Sample b's tiles are numbered from bos // BLOCK_J + b: never more than its tiles, and known without a scan.
    left += (bos // BLOCK_J + i_b) * (STATISTICS * entries)
    received_total = _total(received, bos + 1, tokens, BLOCK)
    first_tile, last_tile = slot, slot + 1
    if one_launch != 0:
        last_tile = tl.cdiv(tokens, BLOCK_J)
    for i_t in tl.range(first_tile, last_tile, disable_licm=True):
        begin = bos + 1 + i_t * BLOCK_J
        _tile(
            x + begin * x_token, dictionary, bias, received + begin, cls + begin, importance + begin,
            left + tl.cast(i_t, tl.int64) * (STATISTICS * entries), x_token, dictionary_entry,
            tokens - i_t * BLOCK_J, received_total, WIDTH, M, entries, scale_log2,
            BLOCK_J, BLOCK_M, BLOCK_K, ONE_BLOCK, EVEN, PRECISION,
        )  # fmt: skip
    if one_launch != 0:
        tl.debug_barrier()  # the merge reads what other threads of this program stored
        bound = _merge(
            received, cls, importance, threshold + i_b, left, bos + 1, tokens, last_tile, received_total, M, entries,
            BLOCK_M, BLOCK,
        )  # fmt: skip
        if places is not None:
            tl.debug_barrier()  # the selection reads the scores of other threads
            _select(importance, bound, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens + 1, BLOCK)


@triton.jit
def _merge_kernel(
    received, cls, importance, threshold, left, protected, min_keep, places, dropped, rows_out, cu_seqlens, M, entries,
    BLOCK_J: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample: the merge and, with ``places``, the selection."""
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    tokens = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32) - 1
    if tokens <= 0:
        if places is not None:
            _select(importance, 0.0, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens + 1, BLOCK)
        return
    left += (bos // BLOCK_J + i_b) * (STATISTICS * entries)
    received_total = _total(received, bos + 1, tokens, BLOCK)
    bound = _merge(
        received, cls, importance, threshold + i_b, left, bos + 1, tokens, tl.cdiv(tokens, BLOCK_J), received_total,
        M, entries, BLOCK_M, BLOCK,
    )  # fmt: skip
    if places is not None:
        tl.debug_barrier()  # the selection reads the scores of other threads
        _select(importance, bound, protected, min_keep, places, dropped, rows_out, i_b, bos, tokens + 1, BLOCK)


def _blocks(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Tokens of a tile, widths of a step, warps, pipeline stages. They decide the bits of a result: never the batch."""
    return (64, 32, 8, 1) if dtype == torch.float32 else (64, 64, 4, 4)


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
    block_j, block_k, warps, stages = _blocks(x.dtype)
    block_m = min(block(entries), 128)
    padded = cdiv(entries, block_m) * block_m
    tiles = max(1, cdiv(max_seqlen - 1, block_j))
    one_launch = _one_launch(batch, tiles, multiprocessors(x))
    slots = 1 if one_launch else tiles
    sizes = (
        x.stride(0), dictionary.stride(0), slots, int(one_launch), width, entries, padded, LOG2E.value / temperature,
    )  # fmt: skip
    score = Launch(
        _score_kernel, batch * slots,
        BLOCK_J=block_j, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK=TOKEN_BLOCK,
        ONE_BLOCK=padded == block_m, EVEN=width % block_k == 0, PRECISION=dot_precision(x.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    merge = Launch(_merge_kernel, batch, BLOCK_J=block_j, BLOCK_M=block_m, BLOCK=TOKEN_BLOCK, num_warps=warps)
    statistics = (capacity // block_j + batch, STATISTICS.value, padded)

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
