"""Attention importance on the GPU, from recomputed probabilities: no L x L matrix, no atomics.

A program owns a block of keys of one sample and walks over blocks of queries with all heads inside, so that the maximum over
heads never leaves its registers. Since max_h exp(z_h) = exp(max_h z_h), one exponential per query and key is enough, not one
per head. Where the batch has too few key blocks to fill the device, every block of queries gets a program of its own, and a
second, tiny launch adds their sums in the order in which the single program would have: the result has the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import (
    EPS,
    LOG2E,
    Launch,
    after_previous,
    block,
    cdiv,
    dot_precision,
    multiprocessors,
    prepared,
    product,
    reach_far,
    within,
)


@triton.jit
def _seen(lse):
    """The log-sum-exp, +inf for a query that sees no key (-inf): it gives nothing."""
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _received(
    q, k, lse, bias, partial, q_token, q_head, k_token, k_head, lse_head, capacity, scale_log2,
    tokens, first_key, first_block, last_block,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Probability that BLOCK_N keys from ``first_key`` on receive, maximum over heads, summed over the queries of first_block:last_block.

    Everything counts from token 1 of the sample: pointers stand there, ``tokens`` is L - 1. With ``partial`` each block's
    sum is stored in the block's row of it as well.
    """
    o_n = first_key + tl.arange(0, BLOCK_N)
    o_m = tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_d = (o_d < HEAD_DIM)[None, :]
    m_k = (o_n < tokens)[:, None] & m_d
    # Offsets within a tile stay the same: what a step adds to a pointer is one number, so that few instructions besides those
    # that count are issued.
    q_tile_rows = within(o_m, q_token, o_d, FAR)
    k_tile_rows = within(tl.arange(0, BLOCK_N), k_token, o_d, FAR)
    k += tl.cast(first_key, tl.int64) * k_token

    received = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    row_lse = tl.load(lse + first_block * BLOCK_M + o_m, mask=o_m < tokens - first_block * BLOCK_M, other=0.0)
    # One flat loop over (query block, head), so that loads are prefetched across the end of a query block. Triton prefetches
    # the operands of products only: the log-sum-exp of the next step is fetched by hand.
    for step in range(first_block * HEADS, last_block * HEADS):
        i_h = step % HEADS
        head = tl.cast(i_h, tl.int64)
        begin = step // HEADS * BLOCK_M
        row = tl.cast(begin, tl.int64)
        m_m = o_m < tokens - begin
        q_tile = tl.load(q + (row * q_token + head * q_head) + q_tile_rows, mask=m_m[:, None] & m_d, other=0.0)
        k_tile = tl.load(k + head * k_head + k_tile_rows, mask=m_k, other=0.0)
        next_begin = (step + 1) // HEADS * BLOCK_M
        next_row = tl.cast((step + 1) % HEADS, tl.int64) * lse_head + next_begin
        next_lse = tl.load(lse + next_row + o_m, mask=o_m < tokens - next_begin, other=0.0)
        s = product(q_tile, tl.trans(k_tile), None, PRECISION)
        best = tl.maximum(best, s * scale_log2 - (_seen(row_lse) * LOG2E)[:, None], propagate_nan=tl.PropagateNan.ALL)
        row_lse = next_lse
        if i_h == HEADS - 1:
            # Rows past the end are zeros here, which times an infinite key is a NaN that no query of the sample has.
            p = tl.where(m_m[:, None], tl.exp2(best + bias[None, :]), 0.0)
            if CAUSAL:
                p = tl.where(o_n[None, :] <= begin + o_m[:, None], p, 0.0)
            block_sum = tl.sum(p, 0)
            received += block_sum
            if partial is not None:
                tl.store(partial + tl.cast(step // HEADS, tl.int64) * capacity + o_n, block_sum, mask=o_n < tokens)
            best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), tl.float32)
    return received


@triton.jit
def _cls(
    q, k, out, lse, bias, q_head, k_token, k_head, out_token, out_head, lse_head, scale_log2, tokens, o_n,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """What the CLS query gives to keys o_n, heads weighted by the norm of their output there.

    q and lse stand at token 0 of the sample, k and out at token 1.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    m_tile = (o_n < tokens)[:, None] & m_d[None, :]
    k_rows = k + o_n.to(tl.int64)[:, None] * k_token + o_d[None, :]
    out_rows = out + o_n.to(tl.int64)[:, None] * out_token + o_d[None, :]
    weighted = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    # What a head needs is fetched some heads before: of products Triton would see to that by itself, these are none.
    for i_h in tl.range(0, HEADS, num_stages=STAGES):
        head = tl.cast(i_h, tl.int64)
        query = tl.load(q + head * q_head + o_d, mask=m_d, other=0.0).to(tl.float32)
        k_tile = tl.load(k_rows + head * k_head, mask=m_tile, other=0.0).to(tl.float32)
        out_tile = tl.load(out_rows + head * out_head, mask=m_tile, other=0.0).to(tl.float32)
        logit = tl.sum(k_tile * query[None, :], 1) * scale_log2 + bias
        norm = tl.sqrt(tl.sum(out_tile * out_tile, 1))
        weighted += tl.exp2(logit - _seen(tl.load(lse + head * lse_head)) * LOG2E) * norm
        total += norm
    return weighted / (total + EPS)


@triton.jit(do_not_specialize=["lse_head", "capacity", "key_blocks", "slots"])
def _importance_kernel(
    q, k, out, lse, key_bias, received, cls, partial, cu_seqlens,
    q_token, q_head, k_token, k_head, out_token, out_head, lse_head, capacity, key_blocks, slots,
    scale_log2,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs of (sample, key block): the first does the CLS term, the others the received attention.

    Without ``partial`` one program takes all query blocks; with it, program 1 + i takes query block i.
    """
    after_previous()
    pid = tl.program_id(0)
    slot = pid % slots
    i_n = (pid // slots) % key_blocks
    i_b = pid // (slots * key_blocks)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    tokens = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32) - 1  # without token 0, which gets no importance
    if i_n == 0 and slot == 0 and tokens >= 0:
        tl.store(received + bos, 0.0)
        tl.store(cls + bos, 0.0)
    if i_n * BLOCK_N >= tokens:
        return

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if key_bias is not None:
        bias = tl.load(key_bias + bos + 1 + o_n, mask=o_n < tokens, other=0.0) * LOG2E
    q += bos * q_token
    lse += bos
    k += (bos + 1) * k_token
    if slot == 0:
        given = tl.zeros((BLOCK_N,), tl.float32)
        if not CAUSAL:  # a causal CLS query sees only itself
            given = _cls(
                q, k, out + (bos + 1) * out_token, lse, bias, q_head, k_token, k_head, out_token, out_head, lse_head,
                scale_log2, tokens, o_n, HEADS, HEAD_DIM, BLOCK_D, BLOCK_N, STAGES,
            )  # fmt: skip
        tl.store(cls + bos + 1 + o_n, given, mask=o_n < tokens)
        return

    first_block = 0
    if CAUSAL:
        first_block = i_n * BLOCK_N // BLOCK_M  # earlier queries see none of these keys
    last_block = tl.cdiv(tokens, BLOCK_M)
    if partial is not None:
        partial += bos + 1
        first_block = tl.maximum(first_block, slot - 1)
        last_block = tl.minimum(last_block, slot)
    total = _received(
        q + q_token, k, lse + 1, bias, partial, q_token, q_head, k_token, k_head, lse_head, capacity, scale_log2,
        tokens, i_n * BLOCK_N, first_block, last_block, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, FAR, PRECISION,
    )  # fmt: skip
    if partial is None:
        tl.store(received + bos + 1 + o_n, total, mask=o_n < tokens)


@triton.jit(do_not_specialize=["capacity", "token_blocks"])
def _add_blocks_kernel(
    partial, received, cu_seqlens, capacity, token_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """received = the sum over the query blocks of a sample, in their order."""
    after_previous()
    pid = tl.program_id(0)
    bos = tl.load(cu_seqlens + pid // token_blocks).to(tl.int64)
    tokens = (tl.load(cu_seqlens + pid // token_blocks + 1) - bos).to(tl.int32) - 1
    o_n = (pid % token_blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i_m in range(tl.cdiv(tokens, BLOCK_M)):
        m_n = o_n < tokens
        if CAUSAL:
            m_n = m_n & (o_n // BLOCK_N * BLOCK_N // BLOCK_M <= i_m)  # the blocks left out were never stored
        total += tl.load(partial + tl.cast(i_m, tl.int64) * capacity + bos + 1 + o_n, mask=m_n, other=0.0)
    tl.store(received + bos + 1 + o_n, total, mask=o_n < tokens)


def _blocks(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, pipeline stages. The bits of a result depend on them: never on the batch."""
    if dtype == torch.float32:
        return (64, 64, 8, 1) if block_d <= 128 else (32, 32, 8, 1)
    return {64: (64, 64, 4, 4), 128: (128, 64, 8, 2)}.get(max(block_d, 64), (64, 64, 8, 2))


@prepared
def attention_importance(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
) -> Callable:
    """received and cls, float32 ``[C]``; see the public operation for the contract."""
    capacity, heads, head_dim = q.shape
    batch = cu_seqlens.shape[0] - 1
    if batch == 0 or capacity == 0:
        return lambda q, *rest: (q.new_empty(capacity, dtype=torch.float32), q.new_empty(capacity, dtype=torch.float32))
    block_d = block(head_dim)
    block_m, block_n, warps, stages = _blocks(q.dtype, block_d)
    key_blocks = max(1, cdiv(max_seqlen - 1, block_n))
    query_blocks = cdiv(max_seqlen - 1, block_m)
    split = query_blocks > 1 and batch * key_blocks < 2 * multiprocessors(q)
    slots = 1 + (query_blocks if split else 1)
    # Fetched in advance, the CLS term is sooner there where everything is waited for, but its registers are everybody's: beside
    # programs that take all query blocks it costs more than it gives (64 x 577 tokens on an H100: 217 us, 193 without).
    cls_stages = stages if split or query_blocks == 1 else 1
    sizes = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), out.stride(0), out.stride(1), lse.stride(0),
        capacity, key_blocks, slots, scale * LOG2E.value,
    )  # fmt: skip
    recompute = Launch(
        _importance_kernel, batch * key_blocks * slots,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, CAUSAL=causal,
        FAR=reach_far(max(block_m, block_n), q, k), PRECISION=dot_precision(q.dtype), STAGES=cls_stages,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    token_blocks = cdiv(max_seqlen - 1, 128)
    add_blocks = Launch(
        _add_blocks_kernel,
        batch * token_blocks,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK=128,
        CAUSAL=causal,
        num_warps=4,
    )

    def run(q, k, out, lse, cu_seqlens, max_seqlen, scale, causal, key_bias):
        received, cls = lse.new_empty(capacity), lse.new_empty(capacity)
        partial = lse.new_empty(query_blocks, capacity) if split else None
        recompute(q, k, out, lse, key_bias, received, cls, partial, cu_seqlens, *sizes)
        if split:
            add_blocks(partial, received, cu_seqlens, capacity, token_blocks)
        return received, cls

    return run
