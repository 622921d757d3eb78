"""Which tokens of a sample have alike keys, on the GPU: products tile by tile, of which only the best per token is kept.

A first launch leaves 1 / |k| of every key, 0 for one without a direction (zero, not finite), unless the caller has them. In
the second a program multiplies a block of keys by another of the same sample, and the best of every token enters its int64 by an
atomic maximum: of the cosine, then of the earlier row, which no order of programs changes. Where every token may see every
other (HIGHER: those of higher rank) both of a pair take the best from one product, so that half of the tiles are visited. For
the nearest kept token the first launch also lists the tokens of a sample that go and those that stay: only the products of one
with the other are computed. A last launch makes results of what was found.

The time is that of fetching keys from the L2 cache: hence large tiles, and two programs to a multiprocessor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import Launch, after_previous, cdiv, dot_precision, prepared, product

POSITION_BITS = tl.constexpr(30)
NORM_ROWS, NORM_COLUMNS = 8, 1024
BLOCK = 1024  # tokens per step where only scores are read
CHUNK = 256  # tokens whose scores a program computes
NONE = tl.constexpr(-(2**63))  # no candidate yet
# What a query may see. From OTHERS on, every token is a query and a candidate.
KEPT, ODD, OTHERS, HIGHER = (tl.constexpr(mode) for mode in range(4))


@triton.jit
def _packed(value, row):
    """int64 of which the largest is that of the largest value (not -inf, not NaN) and of it the lowest row."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # one zero, not two
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # signed order = order of the floats
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - row).to(tl.int64)


@triton.jit
def unpacked(packed):
    """Whether there is one, the value, and its row."""
    ordered = (packed >> 32).to(tl.int32)
    value = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    return packed != NONE, value, 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _list_places(kept, places, counts, cu_seqlens, i_b, BLOCK: tl.constexpr):
    """Positions in a sample: of the tokens that are not kept from its first place on, of the kept ones from its last backwards;
    and how many there are of both."""
    bos = tl.load(cu_seqlens + i_b)
    length = tl.load(cu_seqlens + i_b + 1) - bos
    kept += bos
    places += bos
    before = 0
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        goes = ((o_j < length) & (tl.load(kept + o_j, mask=o_j < length, other=1) == 0)).to(tl.int32)
        earlier = before + tl.cumsum(goes, 0) - goes
        tl.store(places + tl.where(goes != 0, earlier, length - 1 - (o_j - earlier)), o_j, mask=o_j < length)
        before += tl.sum(goes, 0)
    tl.store(counts + 2 * i_b, before)
    tl.store(counts + 2 * i_b + 1, length - before)


@triton.jit(do_not_specialize=["batch"])
def _scale_kernel(
    keys, scale, best, order, free, rank, kept, places, counts, cu_seqlens, batch, key_row, WIDTH,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """1 / |k| of ROWS keys, 0 for one without a direction; and no best candidate yet. Without ``keys`` they are there.

    With ``order``, also the rank: -1 for tokens that are not free. With ``kept``, a kept token is its own best candidate, and
    the first ``batch`` programs list the tokens of a sample each.
    """
    after_previous()
    first = tl.program_id(0) * ROWS
    if kept is not None:
        if tl.program_id(0) < batch:
            _list_places(kept, places, counts, cu_seqlens, tl.program_id(0), BLOCK)
            return
        first -= batch * ROWS
    tokens = tl.load(cu_seqlens + batch)
    if first >= tokens:
        return
    rows = first + tl.arange(0, ROWS)
    if keys is not None:
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, WIDTH, COLUMNS):
            o_k = start + tl.arange(0, COLUMNS)
            mask = (rows < tokens)[:, None] & (o_k < WIDTH)[None, :]
            key_rows = keys + rows.to(tl.int64)[:, None] * key_row
            tile = tl.load(key_rows + o_k[None, :], mask=mask, other=0.0).to(tl.float32)
            squares += tile * tile
        square = tl.sum(squares, 1)
        directed = (square > 0.0) & (square < float("inf"))
        inverse = 1.0 / tl.sqrt_rn(tl.where(directed, square, 1.0))
        tl.store(scale + rows, tl.where(directed, inverse, 0.0), mask=rows < tokens)
    nothing = tl.full((ROWS,), NONE, tl.int64)
    if kept is not None:
        own = _packed(tl.zeros((ROWS,), tl.float32), rows)
        nothing = tl.where(tl.load(kept + rows, mask=rows < tokens, other=0) != 0, own, nothing)
    tl.store(best + rows, nothing, mask=rows < tokens)
    if order is not None:
        may_go = tl.load(free + rows, mask=rows < tokens, other=0) != 0
        value = tl.load(order + rows, mask=rows < tokens, other=0.0)
        tl.store(rank + rows, tl.where(may_go, value, -1.0), mask=rows < tokens)


@triton.jit
def _corner(tile, RATIO: tl.constexpr):
    """Row and column of a tile above or on the diagonal: column after column, of which the i-th has (i + 1) RATIO rows."""
    number = tile // RATIO
    column = ((tl.sqrt_rn((8 * number + 1).to(tl.float32)) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > number, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= number, column + 1, column)
    return tile - RATIO * (column * (column + 1) // 2), column


@triton.jit
def _offer(best, value, rows, candidates, AXIS: tl.constexpr, PLACES: tl.constexpr):
    """Have the largest value along an axis considered for ``best`` of the rows; -inf is none."""
    top = tl.max(value, AXIS)
    row = tl.full(top.shape, 0, tl.int32)
    if PLACES:
        row = tl.min(
            tl.where(value == tl.expand_dims(top, AXIS), tl.expand_dims(candidates, 1 - AXIS), 2147483647), AXIS
        )
    tl.atomic_max(best + rows, _packed(top, row), mask=top > float("-inf"), sem="relaxed")


@triton.jit
def _candidates(places, bos, length, first, candidates, first_free, SEEN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of the batch of a sample's candidates from the ``first``-th on, and which of them there are."""
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = o_n < candidates
    if SEEN == KEPT:
        o_n = tl.load(places + bos + length - 1 - o_n, mask=m_n, other=0)
    elif SEEN == ODD:
        o_n = first_free + 1 - first_free % 2 + 2 * o_n
    return bos + o_n, m_n


@triton.jit
def _halves(table):
    """The left and the right half of a table."""
    halves = tl.reshape(table, (table.shape[0], 2, table.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def _compare(acc, best, scale, rank, o_m, m_m, o_n, m_n, SEEN: tl.constexpr, PLACES: tl.constexpr):
    """Offer the products ``acc`` of queries o_m and candidates o_n to those who may see them."""
    # A key without a direction may be NaN: what it was multiplied with is chosen away, and 0 with every key.
    scale_m = tl.load(scale + o_m, mask=m_m, other=0.0)
    scale_n = tl.load(scale + o_n, mask=m_n, other=0.0)
    acc = tl.where((scale_m > 0.0)[:, None] & (scale_n > 0.0)[None, :], acc, 0.0)
    # The norm of the query does not matter for the choice: it is left to the end, where it cannot make two cosines equal.
    if SEEN >= OTHERS:
        pair = o_m[:, None] < tl.where(m_n, o_n, -1)[None, :]
        forth = pair
        back = pair
        if SEEN == HIGHER:
            rank_m = tl.load(rank + o_m, mask=m_m, other=0.0)[:, None]
            rank_n = tl.load(rank + o_n, mask=m_n, other=0.0)[None, :]
            forth = pair & (rank_n > rank_m)
            back = pair & (rank_n <= rank_m)
        _offer(best, tl.where(back, acc * scale_m[:, None], float("-inf")), o_n, o_m, 0, PLACES)
    else:
        forth = m_m[:, None] & m_n[None, :]
    _offer(best, tl.where(forth, acc * scale_n[None, :], float("-inf")), o_m, o_n, 1, PLACES)


@triton.jit(do_not_specialize=["tiles", "first_free"])
def _nearest_kernel(
    keys, scale, rank, places, counts, best, cu_seqlens, key_row, tiles, first_free, WIDTH,
    SEEN: tl.constexpr, PLACES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the products of BLOCK_M queries and BLOCK_N candidates of a sample, of which each query's best is offered.

    Of two tokens that may see each other, the later one is the candidate here, and each is offered to the other. KEPT: queries
    are the tokens that `places` lists first, candidates those that it lists last. ODD: queries are the even positions from
    first_free on, candidates the odd ones. WHOLE: BLOCK_K divides the width.
    """
    after_previous()
    i_b = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    bos = tl.load(cu_seqlens + i_b)
    length = tl.load(cu_seqlens + i_b + 1) - bos
    if SEEN >= OTHERS:
        i_m, i_n = _corner(tile, BLOCK_N // BLOCK_M)
        queries = length
        candidates = length
    else:
        if SEEN == KEPT:
            queries = tl.load(counts + 2 * i_b)
            candidates = tl.load(counts + 2 * i_b + 1)
        else:
            queries = tl.maximum(length - first_free + 1 - first_free % 2, 0) // 2
            candidates = tl.maximum(length - first_free + first_free % 2, 0) // 2
        query_blocks = tl.maximum(tl.cdiv(queries, BLOCK_M), 1)
        i_m = tile % query_blocks
        i_n = tile // query_blocks
    if (i_m * BLOCK_M >= queries) | (i_n * BLOCK_N >= candidates):
        return

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < queries
    if SEEN == KEPT:
        o_m = tl.load(places + bos + o_m, mask=m_m, other=0)
    elif SEEN == ODD:
        o_m = first_free + first_free % 2 + 2 * o_m
    o_m += bos
    o_n, m_n = _candidates(places, bos, length, i_n * BLOCK_N, candidates, first_free, SEEN, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    query_rows = keys + o_m.to(tl.int64)[:, None] * key_row + o_k[None, :]
    candidate_rows = keys + o_n.to(tl.int64)[:, None] * key_row + o_k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, WIDTH, BLOCK_K):
        mask_m = m_m[:, None]
        mask_n = m_n[:, None]
        if not WHOLE:
            m_k = (k + o_k < WIDTH)[None, :]
            mask_m = mask_m & m_k
            mask_n = mask_n & m_k
        query = tl.load(query_rows + k, mask=mask_m, other=0.0)
        candidate = tl.load(candidate_rows + k, mask=mask_n, other=0.0)
        acc = product(query, tl.trans(candidate), acc, PRECISION)

    # Sixteen candidates at a time: what is known of all of them would take the registers of a second program.
    left, right = _halves(acc)
    parts = _halves(left) + _halves(right)
    if BLOCK_N == 128:
        parts = _halves(parts[0]) + _halves(parts[1]) + _halves(parts[2]) + _halves(parts[3])
    for part in tl.static_range(BLOCK_N // 16):
        o_n, m_n = _candidates(places, bos, length, i_n * BLOCK_N + 16 * part, candidates, first_free, SEEN, 16)
        _compare(parts[part], best, scale, rank, o_m, m_m, o_n, m_n, SEEN, PLACES)


@triton.jit(do_not_specialize=["batch"])
def _found_kernel(best, scale, goes, nearest, cosine, cu_seqlens, batch, SEEN: tl.constexpr, BLOCK: tl.constexpr):
    """The most similar candidate of each token, as a row of the batch, or -1; and what is asked of their cosine. Of a token that
    does not go, its own row.

    ODD: the cosine, -inf without a candidate. OTHERS, HIGHER: the novelty, 2 without one.
    """
    after_previous()
    tokens = tl.load(cu_seqlens + batch)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found, value, row = unpacked(tl.load(best + rows, mask=rows < tokens, other=0))
    chosen = tl.where(found, row, -1)
    if goes is not None:
        chosen = tl.where(tl.load(goes + rows, mask=rows < tokens, other=0) != 0, chosen, rows)
    tl.store(nearest + rows, chosen, mask=rows < tokens)
    if cosine is not None:
        value = tl.minimum(tl.maximum(value * tl.load(scale + rows, mask=rows < tokens, other=0.0), -1.0), 1.0)
        if SEEN == ODD:
            value = tl.where(found, value, float("-inf"))
        else:
            value = tl.where(found, 1.0 - value, 2.0)
        tl.store(cosine + rows, value, mask=rows < tokens)


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


@triton.jit
def _power(x, exponent, KIND: tl.constexpr):
    """x ** exponent for x >= 0, in float64. KIND: the exponent where it is 0 or 1, else -1."""
    if KIND == 0:
        return tl.full(x.shape, 1.0, tl.float64)
    if KIND == 1:
        return x
    return tl.exp2(tl.log2(x) * exponent)


@triton.jit
def mean_weight(weight, free, bos, length, BLOCK: tl.constexpr):
    """The mean of the weights of a sample's free tokens, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, length, BLOCK):
        o_j = start + tl.arange(0, BLOCK)
        may_go = tl.load(free + bos + o_j, mask=o_j < length, other=0) != 0
        total += tl.load(weight + bos + o_j, mask=may_go, other=0.0).to(tl.float64)
        number += may_go.to(tl.int32)
    return tl.sum(total, 0) / tl.maximum(tl.sum(number, 0), 1).to(tl.float64)


@triton.jit
def worth(
    best, scale, weight, sizes, free, rows, m_j, mean, weight_exponent, novelty_exponent, size_exponent,
    WEIGHT: tl.constexpr, NOVELTY: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of tokens: (a / mean a)^p n^q s^r in float64 as the reference, 0 for what is not a number; and the novelty n."""
    found, cosine, _ = unpacked(tl.load(best + rows, mask=m_j, other=0))
    cosine *= tl.load(scale + rows, mask=m_j, other=0.0)
    novelty = tl.where(found, 1.0 - tl.minimum(tl.maximum(cosine, -1.0), 1.0), 2.0)
    may_go = tl.load(free + rows, mask=m_j, other=0) != 0
    share = tl.load(weight + rows, mask=may_go, other=0.0).to(tl.float64) / mean
    score = _power(share, weight_exponent, WEIGHT)
    score *= _power(novelty.to(tl.float64), novelty_exponent, NOVELTY)
    if sizes is not None:
        size = tl.load(sizes + rows, mask=m_j, other=1.0).to(tl.float64)
        score *= _power(size, size_exponent, SIZE)
    score = tl.where(may_go & (score == score), tl.minimum(score, 3.4028234663852886e38), 0.0)
    return score.to(tl.float32), novelty


@triton.jit(do_not_specialize=["chunks", "weight_exponent", "novelty_exponent", "size_exponent"])
def _worth_kernel(
    best, scale, new, weight, sizes, free, scores, cu_seqlens, chunks, weight_exponent, novelty_exponent, size_exponent,
    WEIGHT: tl.constexpr, NOVELTY: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program: the scores of CHUNK tokens of a sample, and their novelty."""
    after_previous()
    i_b = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * CHUNK
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    if first >= length:
        return
    mean = mean_weight(weight, free, bos, length, BLOCK)
    o_j = first + tl.arange(0, CHUNK)
    m_j = o_j < length
    score, novelty = worth(
        best, scale, weight, sizes, free, bos + o_j, m_j, mean, weight_exponent, novelty_exponent, size_exponent,
        WEIGHT, NOVELTY, SIZE,
    )  # fmt: skip
    tl.store(new + bos + o_j, novelty, mask=m_j)
    tl.store(scores + bos + o_j, score, mask=m_j)


def power_kinds(weight: float, novelty: float, size: float) -> dict[str, int]:
    """What :func:`worth` is compiled for: each exponent where it is 0 or 1, else -1."""
    exponents = {"WEIGHT": weight, "NOVELTY": novelty, "SIZE": size}
    return {name: int(exponent) if exponent in (0, 1) else -1 for name, exponent in exponents.items()}


def as_flags(mask: Tensor) -> Tensor:
    """A mask as numbers, 0 for False; int32 is one already."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def _blocks(keys: Tensor, mutual: bool, max_seqlen: int) -> tuple[int, int, int, int, int]:
    """Queries and candidates (64 or 128) of a tile, features of a step, warps, stages. No bit depends on them.

    Small tiles serve short samples, and pruned ones in buffers of no more than some hundred tokens each; large tiles fetch less.

    ``mutual``: tokens see each other; then a multiple of the queries are candidates. float32 tiles have 32 rows: from 64 on,
    Triton 3.7 gives some of these products to sm_100's matrix units, as tf32, though they are asked for exactly.
    """
    if keys.dtype == torch.float32:
        return 32, 64, 32, 4, 2
    if (
        keys.data_ptr() % 16 or keys.stride(0) % 8
    ):  # fetched number by number: more addresses would not fit the registers
        return 64, 64, 32, 8, 2
    if max_seqlen <= 640:
        return (64, 64, 64, 4, 3) if mutual else (64, 64, 64, 4, 4)
    return (128, 128, 64, 8, 3) if mutual else (64, 128, 64, 4, 3)


def _tiles(max_seqlen: int, seen: tl.constexpr, block_m: int, block_n: int) -> int:
    """How many tiles a sample of this many tokens may have."""
    if seen.value >= OTHERS.value:
        columns = cdiv(max_seqlen, block_n)
        return columns * (columns + 1) // 2 * (block_n // block_m)
    if seen is ODD:
        half = cdiv(max_seqlen, 2)
        return cdiv(half, block_m) * cdiv(half, block_n)
    # Worst where some tokens more than whole blocks are queries.
    return max((cdiv(n, block_m) * cdiv(max_seqlen - n, block_n) for n in range(1, max_seqlen, block_m)), default=0)


def _search(
    keys: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    seen: tl.constexpr,
    first_free: int = 0,
    places: bool = True,
    scaled: bool = False,
) -> Callable:
    """What searches: from keys, cu_seqlens, and what else decides, each token's best candidate, packed, and 1 / |k|.

    ``rank`` is what candidates need more of; ``order`` the same but for tokens that are not ``free``, which have least. If
    ``scaled``, 1 / |k| are given, too.
    """
    (capacity, width), device = keys.shape, keys.device
    batch = cu_seqlens.shape[0] - 1
    compare = _compare_all(keys, cu_seqlens, max_seqlen, seen, first_free, places)
    lists = batch if seen is KEPT else 0
    rows = BLOCK if scaled else NORM_ROWS
    scaling = Launch(
        _scale_kernel, lists + cdiv(capacity, rows), ROWS=rows, COLUMNS=NORM_COLUMNS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    sizes = (batch, keys.stride(0), width)

    def run(keys, cu_seqlens, *, scale=None, kept=None, rank=None, order=None, free=None):
        best = torch.empty(capacity, dtype=torch.int64, device=device)
        unscaled = None if scaled else keys
        if not scaled:
            scale = torch.empty(capacity, dtype=torch.float32, device=device)
        rank = rank if order is None else torch.empty_like(scale)
        listed = counts = None
        if kept is not None:
            listed, counts = (torch.empty(size, dtype=torch.int32, device=device) for size in (capacity, 2 * batch))
        if capacity and batch:
            new_rank = rank if order is not None else None
            scaling(unscaled, scale, best, order, free, new_rank, kept, listed, counts, cu_seqlens, *sizes)
            compare(keys, scale, rank, listed, counts, best, cu_seqlens)
        return best, scale

    return run


def _compare_all(
    keys: Tensor, cu_seqlens: Tensor, max_seqlen: int, seen: tl.constexpr, first_free: int = 0, places: bool = True
) -> Callable:
    """The launch that compares all who may see each other, from keys, scale, rank, listed, counts, best and cu_seqlens."""
    width, batch = keys.shape[1], cu_seqlens.shape[0] - 1
    block_m, block_n, block_k, warps, stages = _blocks(keys, seen.value >= OTHERS.value, max_seqlen)
    tiles = _tiles(max_seqlen, seen, block_m, block_n)
    if not tiles:
        return lambda *_: None
    sizes = (keys.stride(0), tiles, first_free, width)
    launch = Launch(
        _nearest_kernel, batch * tiles,
        SEEN=seen, PLACES=places, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        WHOLE=width % block_k == 0, PRECISION=dot_precision(keys.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return lambda *tensors: launch(*tensors, *sizes)


def _find(
    keys: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    seen: tl.constexpr,
    first_free: int = 0,
    cosines: bool = True,
    scaled: bool = False,
) -> Callable:
    """The same as :func:`_search`, for the nearest rows int32 ``[C]`` and, if asked for, the cosines or novelty ``[C]``."""
    capacity, device, batch = keys.shape[0], keys.device, cu_seqlens.shape[0] - 1
    search = _search(keys, cu_seqlens, max_seqlen, seen, first_free, scaled=scaled)
    finding = Launch(_found_kernel, cdiv(capacity, BLOCK), SEEN=seen, BLOCK=BLOCK, num_warps=4)

    def run(keys, cu_seqlens, *, goes=None, **what):
        best, scale = search(keys, cu_seqlens, **what)
        nearest = torch.empty(capacity, dtype=torch.int32, device=device)
        cosine = torch.empty_like(scale) if cosines else None
        if capacity and batch:
            finding(best, scale, goes, nearest, cosine, cu_seqlens, batch)
        return nearest, cosine

    return run


@prepared
def nearest_kept(
    keys: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    goes: Tensor | None = None,
    inverse_norms: Tensor | None = None,
) -> Callable:
    """``[C]`` int32; see the public operation for the contract."""
    find = _find(keys, cu_seqlens, max_seqlen, KEPT, cosines=False, scaled=inverse_norms is not None)

    def run(keys, kept, cu_seqlens, max_seqlen, goes=None, inverse_norms=None):
        goes = None if goes is None else goes.view(torch.uint8)
        return find(keys, cu_seqlens, goes=goes, scale=inverse_norms, kept=kept.view(torch.uint8))[0]

    return run


@prepared
def novelty(keys: Tensor, rank: Tensor | None, cu_seqlens: Tensor, max_seqlen: int) -> Callable:
    """novelty float32 ``[C]`` and the rows it was measured from, int32 ``[C]``; see the public operation for the contract."""
    find = _find(keys, cu_seqlens, max_seqlen, OTHERS if rank is None else HIGHER)

    def run(keys, rank, cu_seqlens, max_seqlen):
        nearest, result = find(keys, cu_seqlens, rank=rank)
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
    """scores, novelty and 1 / |k|, float32 ``[C]``; see the public operation for the contract."""
    batch, chunks = cu_seqlens.shape[0] - 1, cdiv(max_seqlen, CHUNK)
    search = _search(keys, cu_seqlens, max_seqlen, HIGHER, places=False)
    rate = Launch(
        _worth_kernel, batch * chunks,
        **power_kinds(*exponents), BLOCK=BLOCK, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip

    def run(keys, order, weight, sizes, free, cu_seqlens, max_seqlen, *exponents):
        free = free.view(torch.uint8)
        best, scale = search(keys, cu_seqlens, order=order, free=free)
        scores, new = torch.empty_like(scale), torch.empty_like(scale)
        if batch and chunks:
            weight = order if weight is None else weight
            rate(best, scale, new, weight, sizes, free, scores, cu_seqlens, chunks, *exponents)
        return scores, new, scale

    return run


@prepared
def find_redundant(keys: Tensor, order: Tensor, free: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Callable:
    """In :func:`madtp_kernels.merge_redundant`, what scores are made of: each token's best candidate of higher order, packed
    int64 ``[C]``, and 1 / |k|. ``free`` may be int32."""
    search = _search(keys, cu_seqlens, max_seqlen, HIGHER, places=False)

    def run(keys, order, free, cu_seqlens, max_seqlen):
        return search(keys, cu_seqlens, order=order, free=as_flags(free))

    return run


@prepared
def find_kept(
    keys: Tensor, scale: Tensor, best: Tensor, listed: Tensor, counts: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Callable:
    """There, too: have the tokens that are listed last considered for the ``best`` of those that are listed first."""
    compare = _compare_all(keys, cu_seqlens, max_seqlen, KEPT)

    def run(keys, scale, best, listed, counts, cu_seqlens, max_seqlen):
        compare(keys, scale, None, listed, counts, best, cu_seqlens)

    return run


@prepared
def match_tokens(
    keys: Tensor, cu_seqlens: Tensor, max_seqlen: int, count: Tensor | None, threshold: float | None, protected: int
) -> Callable:
    """into int32 and similarity float32, ``[C]``; see the public operation for the contract."""
    batch, bits = cu_seqlens.shape[0] - 1, max_seqlen.bit_length()
    find = _find(keys, cu_seqlens, max_seqlen, ODD, protected)
    match = Launch(_match_kernel, batch, HAS_THRESHOLD=threshold is not None, BLOCK=BLOCK, num_warps=4)

    def run(keys, cu_seqlens, max_seqlen, count, threshold, protected):
        nearest, similarity = find(keys, cu_seqlens)
        into = torch.empty_like(nearest)
        if keys.shape[0] and batch:
            bound = 0.0 if threshold is None else threshold
            match(nearest, similarity, count, into, cu_seqlens, bound, protected, bits)
        return into, similarity

    return run
