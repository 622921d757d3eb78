"""Which tokens of a sample have alike keys, on the GPU: products tile by tile, of which only the best per token is kept.

A first launch leaves 1 / |k| of every key, 0 for one without a direction (zero, not finite), whose row then is not even read.
In the second a program owns a block of queries of one sample and walks over blocks of candidates, up to the sample's length.
With a rank all of them are visited. To halve the products, as the CPU does, the tokens of every sample would have to be sorted
by rank: by estimate (not measured) that takes a GPU as long as the products it would spare, 33 GFLOP for 64 images of 577
tokens. Matching takes a third, which finds the cosine that the r-th best pair has by bisection over its bits; so do the scores
of merging, for whose means a program reads all tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import Launch, after_previous, cdiv, dot_precision, prepared, product

POSITION_BITS = tl.constexpr(30)
NORM_ROWS, NORM_COLUMNS = 16, 256
BLOCK = 1024  # tokens per step where only scores are read
# What a query may see.
KEPT, OTHERS, HIGHER, ODD = (tl.constexpr(mode) for mode in range(4))


@triton.jit(do_not_specialize=["batch"])
def _scale_kernel(
    keys, scale, order, free, rank, cu_seqlens, batch, key_row, WIDTH, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """1 / |k| of ROWS keys; 0 for one without a direction. With ``order``, also the rank: -1 for tokens that are not free."""
    after_previous()
    tokens = tl.load(cu_seqlens + batch)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= tokens:
        return
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        o_k = start + tl.arange(0, COLUMNS)
        mask = (rows < tokens)[:, None] & (o_k < WIDTH)[None, :]
        tile = tl.load(keys + rows.to(tl.int64)[:, None] * key_row + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
        squares += tile * tile
    square = tl.sum(squares, 1)
    directed = (square > 0.0) & (square < float("inf"))
    inverse = 1.0 / tl.sqrt_rn(tl.where(directed, square, 1.0))
    tl.store(scale + rows, tl.where(directed, inverse, 0.0), mask=rows < tokens)
    if order is not None:
        may_go = tl.load(free + rows, mask=rows < tokens, other=0) != 0
        value = tl.load(order + rows, mask=rows < tokens, other=0.0)
        tl.store(rank + rows, tl.where(may_go, value, -1.0), mask=rows < tokens)


@triton.jit(do_not_specialize=["query_blocks", "first_free"])
def _nearest_kernel(
    keys, scale, kept, rank, nearest, cosine, cu_seqlens, key_row, query_blocks, first_free, WIDTH,
    SEEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs of (sample, block of queries): the most similar candidate of each, as a row of the batch, and the cosine.

    -1 and -inf without one. KEPT: candidates are the kept tokens, queries the others; kept ones get their own row. ODD: queries
    are the even positions from first_free on, candidates the odd ones.
    """
    after_previous()
    i_b = tl.program_id(0) // query_blocks
    i_m = tl.program_id(0) % query_blocks
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    step: tl.constexpr = 2 if SEEN == ODD else 1
    first_query = 0
    first_candidate = 0
    if SEEN == ODD:
        first_query = first_free + first_free % 2
        first_candidate = first_free + 1 - first_free % 2
    if first_query + step * i_m * BLOCK_M >= length:
        return

    o_m = first_query + step * (i_m * BLOCK_M + tl.arange(0, BLOCK_M))
    m_m = o_m < length
    o_k = tl.arange(0, BLOCK_K)
    scale_m = tl.load(scale + bos + o_m, mask=m_m, other=0.0)
    searching = m_m
    if SEEN == KEPT:
        searching = m_m & (tl.load(kept + bos + o_m, mask=m_m, other=1) == 0)
    if SEEN == HIGHER:
        rank_m = tl.load(rank + bos + o_m, mask=m_m, other=0.0)
    read_m = (searching & (scale_m > 0.0))[:, None]
    query_rows = keys + (bos + o_m)[:, None] * key_row
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    place = tl.full((BLOCK_M,), -1, tl.int32)
    # Nothing to search for, nothing to do: a block of kept tokens.
    last = tl.where(tl.max(searching.to(tl.int32), 0) > 0, length, 0)
    for start in range(first_candidate, last, step * BLOCK_N):
        o_n = start + step * tl.arange(0, BLOCK_N)
        m_n = o_n < length
        if SEEN == KEPT:
            m_n = m_n & (tl.load(kept + bos + o_n, mask=m_n, other=0) != 0)
        scale_n = tl.load(scale + bos + o_n, mask=m_n, other=0.0)
        read_n = (scale_n > 0.0)[:, None]
        candidate_rows = keys + (bos + o_n)[:, None] * key_row
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, WIDTH, BLOCK_K):
            m_k = (k + o_k < WIDTH)[None, :]
            query = tl.load(query_rows + (k + o_k)[None, :], mask=read_m & m_k, other=0.0)
            candidate = tl.load(candidate_rows + (k + o_k)[None, :], mask=read_n & m_k, other=0.0)
            acc = product(query, tl.trans(candidate), acc, PRECISION)
        seen = m_n[None, :]
        if SEEN == OTHERS:
            seen = seen & (o_n[None, :] != o_m[:, None])
        if SEEN == HIGHER:
            rank_n = tl.load(rank + bos + o_n, mask=m_n, other=0.0)[None, :]
            before = (rank_n == rank_m[:, None]) & (o_n[None, :] < o_m[:, None])
            seen = seen & ((rank_n > rank_m[:, None]) | before)
        value = tl.where(seen, acc * scale_n[None, :], float("-inf"))
        top = tl.max(value, 1)
        first = tl.min(tl.where(value == top[:, None], o_n[None, :], 2147483647), 1)
        better = top > best
        best = tl.where(better, top, best)
        place = tl.where(better, first, place)

    found = place >= 0
    row = tl.where(found, bos + place, -1)
    if SEEN == KEPT:
        row = tl.where(searching, row, bos + o_m)
    tl.store(nearest + bos + o_m, row.to(tl.int32), mask=m_m)
    if cosine is not None:
        value = tl.minimum(tl.maximum(tl.where(found, best, 0.0) * scale_m, -1.0), 1.0)
        if SEEN == ODD:
            value = tl.where(found, value, float("-inf"))
        else:
            value = tl.where(found, 1.0 - value, 2.0)
        tl.store(cosine + bos + o_m, value, mask=m_m)


@triton.jit
def _rank(similarity, bos, o_j, mask, length):
    """Cosines of sources as int64, larger is better: cosine, then the earlier position. Distinct and >= 0; -1 where masked."""
    value = tl.load(similarity + bos + o_j, mask=mask, other=0.0)
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True).to(tl.int64)  # one zero, not two
    ordered = tl.where(bits < 0, -1 - bits, bits + 0x80000000)  # unsigned order = order of the floats
    return tl.where(mask, (ordered << POSITION_BITS) + (length - 1 - o_j), -1)


@triton.jit(do_not_specialize=["threshold", "first_free", "position_bits"])
def _match_kernel(
    nearest, similarity, count, into, cu_seqlens, threshold, first_free, position_bits,
    HAS_THRESHOLD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample: into[source] = its candidate for the best sources, every other token's own row."""
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    most = tl.maximum(length - first_free, 0) // 2
    if count is not None:
        most = tl.minimum(most, tl.maximum(tl.load(count + i_b), 0))
    # The largest rank that `most` sources reach, bit by bit: 32 bits of cosine, then those of the position that can be set.
    cut = tl.full((), 0, tl.int64)
    for step in range(32 + position_bits):
        bit = tl.where(step < 32, 31 + POSITION_BITS - step, 31 + position_bits - step)
        candidate = cut + (tl.full((), 1, tl.int64) << bit.to(tl.int64))
        reached = 0
        for start in range(first_free, length, BLOCK):
            o_j = start + tl.arange(0, BLOCK)
            mask = (o_j < length) & (o_j % 2 == 0)
            reached += tl.sum((_rank(similarity, bos, o_j, mask, length) >= candidate).to(tl.int32), 0)
        if reached >= most:
            cut = candidate
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        m_j = o_j < length
        source = m_j & (o_j >= first_free) & (o_j % 2 == 0)
        matched = source & (most > 0) & (_rank(similarity, bos, o_j, source, length) >= cut)
        if HAS_THRESHOLD:
            matched = matched & (tl.load(similarity + bos + o_j, mask=source, other=float("-inf")) > threshold)
        row = tl.load(nearest + bos + o_j, mask=matched, other=0).to(tl.int64)
        tl.store(into + bos + o_j, tl.where(matched, row, bos + o_j).to(tl.int32), mask=m_j)
        tl.store(similarity + bos + o_j, float("-inf"), mask=m_j & (source == 0))


@triton.jit
def _power(x, exponent, KIND: tl.constexpr):
    """x ** exponent for x >= 0, in float64. KIND: the exponent where it is 0 or 1, else -1."""
    if KIND == 0:
        return tl.full(x.shape, 1.0, tl.float64)
    if KIND == 1:
        return x
    return tl.exp2(tl.log2(x) * exponent)


@triton.jit(do_not_specialize=["weight_exponent", "novelty_exponent", "size_exponent"])
def _worth_kernel(
    new, weight, sizes, free, scores, cu_seqlens, weight_exponent, novelty_exponent, size_exponent,
    WEIGHT: tl.constexpr, NOVELTY: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample: (a / mean a)^p n^q s^r, in float64 as the reference; 0 for what is not a number."""
    after_previous()
    i_b = tl.program_id(0)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        may_go = tl.load(free + bos + o_j, mask=o_j < length, other=0) != 0
        total += tl.load(weight + bos + o_j, mask=may_go, other=0.0).to(tl.float64)
        number += may_go.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(number, 0), 1).to(tl.float64)
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        m_j = o_j < length
        may_go = tl.load(free + bos + o_j, mask=m_j, other=0) != 0
        share = tl.load(weight + bos + o_j, mask=may_go, other=0.0).to(tl.float64) / mean
        score = _power(share, weight_exponent, WEIGHT)
        novelty = tl.load(new + bos + o_j, mask=m_j, other=0.0).to(tl.float64)
        score *= _power(novelty, novelty_exponent, NOVELTY)
        if sizes is not None:
            size = tl.load(sizes + bos + o_j, mask=m_j, other=1.0).to(tl.float64)
            score *= _power(size, size_exponent, SIZE)
        score = tl.where(may_go & (score == score), tl.minimum(score, 3.4028234663852886e38), 0.0)
        tl.store(scores + bos + o_j, score.to(tl.float32), mask=m_j)


def _blocks(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """Queries and candidates of a tile, features of a step, warps, stages. Bits of a result depend on them: never on the batch.

    float32 tiles have 32 rows: from 64 on, Triton 3.7 gives some of these products to sm_100's matrix units, as tf32, though
    they are asked for exactly.
    """
    return (32, 64, 32, 4, 2) if dtype == torch.float32 else (128, 64, 64, 8, 3)


def _search(
    keys: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    seen: tl.constexpr,
    first_free: int = 0,
    cosines: bool = True,
) -> Callable:
    """What searches: from keys, cu_seqlens, and what else decides, the nearest rows ``[C]`` and the cosines ``[C]``.

    ``rank`` is what candidates need more of; ``order`` the same but for tokens that are not ``free``, which have least.
    """
    (capacity, width), device = keys.shape, keys.device
    batch = cu_seqlens.shape[0] - 1
    block_m, block_n, block_k, warps, stages = _blocks(keys.dtype)
    query_blocks = cdiv(max_seqlen, block_m * (2 if seen is ODD else 1))
    sizes = (batch, keys.stride(0), width)
    scaling = Launch(_scale_kernel, cdiv(capacity, NORM_ROWS), ROWS=NORM_ROWS, COLUMNS=NORM_COLUMNS, num_warps=4)
    searching = Launch(
        _nearest_kernel, batch * query_blocks,
        SEEN=seen, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION=dot_precision(keys.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip

    def run(keys, cu_seqlens, *, kept=None, rank=None, order=None, free=None):
        nearest = torch.empty(capacity, dtype=torch.int32, device=device)
        cosine = torch.empty(capacity, dtype=torch.float32, device=device) if cosines else None
        if capacity and batch and query_blocks:
            scale = torch.empty(capacity, dtype=torch.float32, device=device)
            rank = rank if order is None else torch.empty_like(scale)
            scaling(keys, scale, order, free, rank if order is not None else None, cu_seqlens, *sizes)
            searching(
                keys, scale, kept, rank, nearest, cosine, cu_seqlens, keys.stride(0), query_blocks, first_free, width
            )  # fmt: skip
        return nearest, cosine

    return run


@prepared
def nearest_kept(keys: Tensor, kept: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Callable:
    """``[C]`` int32; see the public operation for the contract."""
    search = _search(keys, cu_seqlens, max_seqlen, KEPT, cosines=False)

    def run(keys, kept, cu_seqlens, max_seqlen):
        return search(keys, cu_seqlens, kept=kept.view(torch.uint8))[0]

    return run


@prepared
def novelty(keys: Tensor, rank: Tensor | None, cu_seqlens: Tensor, max_seqlen: int) -> Callable:
    """novelty float32 ``[C]`` and the rows it was measured from, int32 ``[C]``; see the public operation for the contract."""
    search = _search(keys, cu_seqlens, max_seqlen, OTHERS if rank is None else HIGHER)

    def run(keys, rank, cu_seqlens, max_seqlen):
        nearest, result = search(keys, cu_seqlens, rank=rank)
        return result, nearest

    return run


@prepared
def merge_scores(
    keys: Tensor,
    order: Tensor,
    weight: Tensor | None,
    sizes: Tensor | None,
    free: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *exponents: float,
) -> Callable:
    """scores and novelty float32 ``[C]``; see the public operation for the contract."""
    batch, device, capacity = cu_seqlens.shape[0] - 1, keys.device, keys.shape[0]
    search = _search(keys, cu_seqlens, max_seqlen, HIGHER)
    kinds = [int(exponent) if exponent in (0, 1) else -1 for exponent in exponents]
    rate = Launch(
        _worth_kernel, batch, WEIGHT=kinds[0], NOVELTY=kinds[1], SIZE=kinds[2], BLOCK=BLOCK, num_warps=4
    )  # fmt: skip

    def run(keys, order, weight, sizes, free, cu_seqlens, max_seqlen, *exponents):
        free = free.view(torch.uint8)
        _, new = search(keys, cu_seqlens, order=order, free=free)
        scores = torch.empty(capacity, dtype=torch.float32, device=device)
        if batch:
            rate(new, order if weight is None else weight, sizes, free, scores, cu_seqlens, *exponents)
        return scores, new

    return run


@prepared
def match_tokens(
    keys: Tensor, cu_seqlens: Tensor, max_seqlen: int, count: Tensor | None, threshold: float | None, protected: int
) -> Callable:
    """into int32 and similarity float32, ``[C]``; see the public operation for the contract."""
    batch, bits = cu_seqlens.shape[0] - 1, max_seqlen.bit_length()
    search = _search(keys, cu_seqlens, max_seqlen, ODD, first_free=protected)
    match = Launch(_match_kernel, batch, HAS_THRESHOLD=threshold is not None, BLOCK=BLOCK, num_warps=4)

    def run(keys, cu_seqlens, max_seqlen, count, threshold, protected):
        nearest, similarity = search(keys, cu_seqlens)
        into = torch.empty_like(nearest)
        if keys.shape[0] and batch:
            bound = 0.0 if threshold is None else threshold
            match(nearest, similarity, count, into, cu_seqlens, bound, protected, bits)
        return into, similarity

    return run
