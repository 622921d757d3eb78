"""Attention received from chosen queries on the GPU, from recomputed probabilities: no L x L matrix, no atomics.

A program owns a block of keys of one sample and one set of heads, and walks over the blocks of queries that hold chosen ones,
with all heads of the set inside: every sum is made by one program, in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import LOG2E, after_previous, block, cdiv, dot_precision, launch, on_device_of_first, product


@triton.jit
def _edge(position, length):
    """A slice's edge in a sample of this length: negative ones count from the end."""
    return tl.minimum(tl.maximum(tl.where(position < 0, position + length, position), 0), length)


@triton.jit(do_not_specialize=["lse_head", "capacity", "key_blocks", "sets", "first", "last"])
def _received_kernel(
    q, k, lse, key_bias, queries, received, cu_seqlens, q_token, q_head, k_token, k_head, lse_head, capacity, key_blocks,
    sets, first, last, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs of (sample, set of HEADS heads, key block); GROUP heads share a key head."""
    after_previous()
    i_n = tl.program_id(0) % key_blocks
    i_s = (tl.program_id(0) // key_blocks) % sets
    i_b = tl.program_id(0) // (key_blocks * sets)
    bos = tl.load(cu_seqlens + i_b).to(tl.int64)
    length = (tl.load(cu_seqlens + i_b + 1) - bos).to(tl.int32)
    if i_n * BLOCK_N >= length:
        return
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < length
    m_d = (o_d < HEAD_DIM)[None, :]
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if key_bias is not None:
        bias = tl.load(key_bias + bos + o_n, mask=m_n, other=0.0) * LOG2E
    k_rows = k + (bos + o_n)[:, None] * k_token + o_d[None, :]
    begin = _edge(first, length)
    end = _edge(last, length)
    if CAUSAL:
        begin = tl.maximum(begin, i_n * BLOCK_N)  # earlier queries see none of these keys
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, end, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        if queries is not None:
            m_m = m_m & (tl.load(queries + bos + o_m, mask=m_m, other=0) != 0)
        q_rows = q + (bos + o_m)[:, None] * q_token + o_d[None, :]
        gathered = tl.full((BLOCK_M, BLOCK_N), 0.0 if MEAN else float("-inf"), tl.float32)
        for i in range(HEADS):
            head = tl.cast(i_s * HEADS + i, tl.int64)
            q_tile = tl.load(q_rows + head * q_head, mask=m_m[:, None] & m_d, other=0.0)
            k_tile = tl.load(k_rows + head // GROUP * k_head, mask=m_n[:, None] & m_d, other=0.0)
            # Rows that do not count, and those that see no key, get lse = inf, hence probability 0.
            row_lse = tl.load(lse + head * lse_head + bos + o_m, mask=m_m, other=float("inf"))
            row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse) * LOG2E
            z = product(q_tile, tl.trans(k_tile), None, PRECISION) * scale_log2 - row_lse[:, None]
            if MEAN:
                gathered += tl.exp2(z + bias[None, :])
            else:
                gathered = tl.maximum(gathered, z)
        p = gathered if MEAN else tl.exp2(gathered + bias[None, :])
        if CAUSAL:
            p = tl.where(o_n[None, :] <= o_m[:, None], p, 0.0)
        total += tl.sum(p, 0)
    if MEAN:
        total = total / HEADS
    tl.store(received + i_s.to(tl.int64) * capacity + bos + o_n, total, mask=m_n)


def _blocks(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, pipeline stages. The bits of a result depend on them: never on the batch.

    float32 tiles have 32 rows: from 64 on, Triton 3.7 gives some of these products to sm_100's matrix units, as tf32, though
    they are asked for exactly.
    """
    if dtype == torch.float32:
        return (32, 64, 8, 1) if block_d <= 64 else (32, 32, 8, 1)
    return {64: (128, 64, 8, 3), 128: (128, 64, 8, 2)}.get(max(block_d, 64), (64, 64, 8, 2))


@on_device_of_first
def attention_received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    heads: str,
    sets: int,
    first: int,
    last: int,
    queries: Tensor | None,
) -> Tensor:
    """float32 ``[S, C]``; see the public operation for the contract."""
    capacity, query_heads, head_dim = q.shape
    batch = cu_seqlens.shape[0] - 1
    received = torch.empty(sets, capacity, dtype=torch.float32, device=q.device)
    block_d = block(head_dim)
    block_m, block_n, warps, stages = _blocks(q.dtype, block_d)
    key_blocks = cdiv(max_seqlen, block_n)
    if batch * key_blocks * capacity == 0:
        return received
    launch(
        _received_kernel, batch * sets * key_blocks,
        q, k, lse, key_bias, None if queries is None else queries.view(torch.uint8), received, cu_seqlens,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), lse.stride(0), capacity, key_blocks, sets, first, last,
        scale * LOG2E.value,
        HEADS=query_heads // sets, GROUP=query_heads // k.shape[1], HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m,
        BLOCK_N=block_n, CAUSAL=causal, MEAN=heads == "mean", PRECISION=dot_precision(q.dtype), num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return received
