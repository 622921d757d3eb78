"""Ragged attention with log-sum-exp on the GPU: PyTorch's flash kernel where it serves and is faster, a Triton kernel elsewhere.

PyTorch's kernel takes float16 and bfloat16 without a key bias. The kernel here takes the rest: float32, a key bias, head
widths and strides the other refuses, older PyTorch, and Triton's interpreter; and, on Hopper, heads of at most 64, in two
thirds of the time: PyTorch's kernel knows none of that architecture's instructions. Gradients are always made here: PyTorch's
kernel knows none of the log-sum-exp, which the importance needs, and adds up in no fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import unit_stride
from ..triton_utils import (
    LN2,
    LOG2E,
    Launch,
    after_previous,
    block,
    capability,
    cdiv,
    dot_precision,
    launch,
    on_device_of_first,
    prepared,
    product,
    reach_far,
    within,
)


@triton.jit
def _attend(
    acc, row_max, row_sum, q_tile,
    k, v, key_bias, k_token, v_token,
    first_key, last_key, len_k, last_visible, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys first_key:last_key. Pointers stand at key 0 of this sample and head.

    The scale is positive. Where nothing is added to the logits, the largest is that of the largest product, and scaling is one
    instruction with the subtraction of the maximum. That of the largest logit is not 0 then, but what rounding it took away,
    which cancels in the end, unless logits reach :func:`_furthest`.
    """
    o_d = tl.arange(0, BLOCK_D)
    # Offsets within a block stay the same, a step adds one number to a pointer: few instructions besides those that count.
    k_rows = within(tl.arange(0, BLOCK_N), k_token, o_d, FAR)
    v_rows = within(tl.arange(0, BLOCK_N), v_token, o_d, FAR)
    for start in range(first_key, last_key, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        begin = tl.cast(start, tl.int64)
        m_kv = tl.full((BLOCK_N, BLOCK_D), True, tl.int1)
        if MASKED:
            m_kv = m_kv & (o_n < len_k)[:, None]
        if HEAD_DIM != BLOCK_D:
            m_kv = m_kv & (o_d < HEAD_DIM)[None, :]
        k_tile = tl.load(k + begin * k_token + k_rows, mask=m_kv, other=0.0)
        s = product(q_tile, tl.trans(k_tile), None, PRECISION)  # [M, N]
        factor = scale_log2
        if key_bias is not None:
            s *= scale_log2  # base-2 logits
            s += (tl.load(key_bias + o_n, mask=o_n < len_k, other=0.0) * LOG2E)[None, :]
            factor = 1.0
        if MASKED:
            s = tl.where((o_n < len_k)[None, :], s, float("-inf"))
            if CAUSAL:
                s = tl.where(o_n[None, :] <= last_visible[:, None], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
        # A row that has seen no key yet stands at -inf, one with an infinite logit at +inf; subtracting 0 instead keeps exp2
        # from meeting inf - inf.
        base = tl.where(tl.abs(new_max) == float("inf"), 0.0, new_max)
        p = tl.exp2(s * factor - base[:, None])
        decay = tl.exp2(row_max - base)
        row_sum = row_sum * decay + tl.sum(p, 1)
        v_tile = tl.load(v + begin * v_token + v_rows, mask=m_kv, other=0.0)
        acc = product(p.to(v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["capacity", "query_blocks"])
def _attention_kernel(
    q, k, v, key_bias, out, lse, cu_seqlens_q, cu_seqlens_k,
    q_token, q_head, k_token, k_head, v_token, v_head, capacity, query_blocks, scale_log2,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, CAUSAL: tl.constexpr, FAR: tl.constexpr,
    FURTHEST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one sample, against all its keys. GROUP heads share a key head.

    At most TAIL keys that are left over by whole blocks take a block of their own size: an image of 24 x 24 patches and a
    class token has one.
    """
    after_previous()
    pid = tl.program_id(0)
    i_m = pid % query_blocks
    i_h = (pid // query_blocks) % HEADS
    i_b = pid // (query_blocks * HEADS)
    bos_q = tl.load(cu_seqlens_q + i_b)
    len_q = tl.load(cu_seqlens_q + i_b + 1) - bos_q
    if i_m * BLOCK_M >= len_q:
        return
    bos_k = tl.load(cu_seqlens_k + i_b)
    len_k = tl.load(cu_seqlens_k + i_b + 1) - bos_k

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    rows = bos_q.to(tl.int64) + o_m
    m_q = (o_m < len_q)[:, None] & (o_d < HEAD_DIM)[None, :]
    q_tile = tl.load(q + rows[:, None] * q_token + i_h.to(tl.int64) * q_head + o_d[None, :], mask=m_q, other=0.0)
    key_head = (i_h // GROUP).to(tl.int64)
    k += bos_k.to(tl.int64) * k_token + key_head * k_head
    v += bos_k.to(tl.int64) * v_token + key_head * v_head
    if key_bias is not None:
        key_bias += bos_k

    # Keys before `whole` are seen by every query of the block and fill whole blocks: they need no mask.
    last_visible = o_m + (len_k - len_q)  # with CAUSAL, bottom-right aligned
    seen_by_all = len_k
    end = len_k
    if CAUSAL:
        seen_by_all = tl.maximum(tl.minimum(i_m * BLOCK_M + 1 + len_k - len_q, len_k), 0)
        end = tl.maximum(tl.minimum((i_m + 1) * BLOCK_M + len_k - len_q, len_k), 0)
    whole = seen_by_all // BLOCK_N * BLOCK_N

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q_tile, k, v, key_bias, k_token, v_token, 0, whole, len_k, last_visible, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, False, FAR, PRECISION,
    )  # fmt: skip
    if end - whole > TAIL:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, k, v, key_bias, k_token, v_token, whole, end, len_k, last_visible, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, True, FAR, PRECISION,
        )  # fmt: skip
    elif TAIL > 0:
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, k, v, key_bias, k_token, v_token, whole, end, len_k, last_visible, scale_log2,
            HEAD_DIM, BLOCK_D, TAIL, CAUSAL, True, FAR, PRECISION,
        )  # fmt: skip

    if key_bias is None:
        beyond = (tl.abs(row_max) >= FURTHEST) & (tl.abs(row_max) < float("inf"))
        row_sum = tl.where(beyond, float("nan"), row_sum)
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # no key: out = 0, and lse = -inf + log(0)
    tl.store(
        out + rows[:, None] * (HEADS * HEAD_DIM) + i_h * HEAD_DIM + o_d[None, :], acc.to(out.dtype.element_ty), mask=m_q
    )
    tl.store(lse + i_h.to(tl.int64) * capacity + rows, (row_max + tl.log2(row_sum)) * LN2, mask=o_m < len_q)


def _blocks(dtype: torch.dtype, block_d: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, pipeline stages."""
    if dtype == torch.float32:
        # Exact float32 products run on the ordinary units and keep their operands in registers: small tiles.
        return {64: (64, 32, 8, 1), 128: (32, 32, 8, 1)}.get(max(block_d, 64), (16, 32, 8, 1))
    return {64: (64, 64, 4, 3), 128: (64, 64, 8, 2)}.get(max(block_d, 64), (64, 32, 8, 2))


def _furthest(dtype: torch.dtype) -> float:
    """Logits to base 2 whose rounding the probabilities, unscaled, still hold: below 2^64 in float32 and bfloat16, 2^4 in float16."""
    return 2.0**26 if dtype == torch.float16 else 2.0**30


def _register_limit(q: Tensor, block_d: int) -> dict[str, int]:
    """On Hopper a fourth program fits a multiprocessor if the others leave it registers: 216 us for 234 (64 x 577 tokens, H200)."""
    narrow = q.dtype != torch.float32 and block_d <= 64
    return {"maxnreg": 128} if narrow and capability(q.device)[0] == 9 else {}


def _triton_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_bias, with_lse
) -> Callable:
    (capacity, heads, head_dim), device = q.shape, q.device
    block_d = block(head_dim)
    block_m, block_n, warps, stages = _blocks(q.dtype, block_d)
    query_blocks = cdiv(max_seqlen_q, block_m)
    programs = (cu_seqlens_q.shape[0] - 1) * heads * query_blocks
    sizes = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), capacity, query_blocks,
        scale * LOG2E.value,
    )  # fmt: skip
    attend = Launch(
        _attention_kernel, programs,
        HEADS=heads, GROUP=heads // k.shape[1], HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n,
        TAIL=0 if q.dtype == torch.float32 else 16, CAUSAL=causal,
        FAR=reach_far(block_n, k, v), FURTHEST=_furthest(q.dtype), PRECISION=dot_precision(q.dtype), num_warps=warps,
        num_stages=stages, **_register_limit(q, block_d),
    )  # fmt: skip

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_bias, with_lse=True):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(heads, capacity, dtype=torch.float32, device=device)
        if programs:
            attend(q, k, v, key_bias, out, lse, cu_seqlens_q, cu_seqlens_k, *sizes)
        return out, lse

    return run


@functools.cache
def _flash() -> tuple[Callable, dict[str, object]] | None:
    """PyTorch's flash attention over packed samples and the options it is always called with; None where it has none.

    The operator itself, not `torch.nn.attention.varlen`: around it that launches one more kernel, takes twice the host's time,
    and in newer versions chooses cuDNN, which takes no ``num_splits``.
    """
    try:
        operator = torch.ops.aten._flash_attention_forward.default
    except AttributeError:
        return None
    known = {argument.name for argument in operator._schema.arguments}
    if not {"cum_seq_q", "cum_seq_k", "max_q", "max_k", "is_causal", "scale"} <= known:
        return None
    # Splitting by the load of the batch would make a sample depend on its neighbours.
    return operator, {"num_splits": 1} if "num_splits" in known else {}


def flash_refusal(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> str | None:
    """Why PyTorch's flash attention cannot serve this call, or None if it can."""
    if not q.is_cuda:
        return "tensors are not on a CUDA device"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes no {q.dtype}"
    if key_bias is not None:
        return "it takes no key bias"
    if q.shape[2] > 256 or q.shape[2] % 8:
        return f"it takes no head width {q.shape[2]}"
    if 0 in (q.shape[0], q.shape[1], k.shape[0]):
        return "there are no queries or no keys"
    if _flash() is None:
        return "this PyTorch has none"
    generation = capability(q.device)
    if generation < (8, 0):
        return "the device is older than sm_80"
    if generation[0] == 9 and q.shape[2] <= 64:
        return "the kernel here is faster on sm_90"
    # It loads 16 bytes at a time from every head.
    if any(t.data_ptr() % 16 or t.stride(0) % 8 or t.stride(1) % 8 for t in (q, k, v)):
        return "a tensor is not aligned to 16 bytes"
    return None


def _flash_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_bias, with_lse
) -> Callable:
    operator, options = _flash()

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_bias, with_lse=True):
        out, lse = operator(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=scale, **options
        )[:2]
        # Its mark of a query that sees no key is +inf, as it is of logits that are NaN or infinite. In self-attention every query
        # sees one, which no shape tells: this is asked at every call. One launch, in place: nobody else holds this tensor.
        if with_lse and cu_seqlens_q.data_ptr() != cu_seqlens_k.data_ptr():
            lse.nan_to_num_(nan=float("nan"), posinf=float("-inf"), neginf=float("-inf"))
        return out, lse

    return run


@prepared
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    with_lse: bool = True,
) -> Callable:
    """out ``[Cq, H, d]`` in the dtype of q and lse ``[H, Cq]`` float32; see the public operation for the contract.

    Not ``with_lse``: what lse holds for a query that sees no key is left undefined.
    """
    chosen = _flash_attention if flash_refusal(q, k, v, key_bias) is None else _triton_attention
    return chosen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, causal, key_bias, with_lse)


# ---- gradient -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["capacity", "query_blocks"])
def _query_gradient_kernel(
    q, k, v, key_bias, out, lse, d_out, d_lse, delta, dq, cu_seqlens_q, cu_seqlens_k,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head, d_out_token, d_out_head, capacity,
    query_blocks, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head of one sample, and their delta = <dout, out> - dlse.

    With P = exp(s - lse) and dP = dout v^T, the gradient of the logits is dS = P (dP - delta).
    """
    after_previous()
    pid = tl.program_id(0)
    i_m = pid % query_blocks
    i_h = ((pid // query_blocks) % HEADS).to(tl.int64)
    i_b = pid // (query_blocks * HEADS)
    bos_q = tl.load(cu_seqlens_q + i_b)
    len_q = tl.load(cu_seqlens_q + i_b + 1) - bos_q
    if i_m * BLOCK_M >= len_q:
        return
    bos_k = tl.load(cu_seqlens_k + i_b)
    len_k = tl.load(cu_seqlens_k + i_b + 1) - bos_k

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_m = o_m < len_q
    m_d = (o_d < HEAD_DIM)[None, :]
    m_q = m_m[:, None] & m_d
    rows = bos_q.to(tl.int64) + o_m
    q_tile = tl.load(q + rows[:, None] * q_token + i_h * q_head + o_d[None, :], mask=m_q, other=0.0)
    d_out_tile = tl.load(d_out + rows[:, None] * d_out_token + i_h * d_out_head + o_d[None, :], mask=m_q, other=0.0)
    out_tile = tl.load(out + rows[:, None] * out_token + i_h * out_head + o_d[None, :], mask=m_q, other=0.0)
    row_delta = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    row_delta -= tl.load(d_lse + i_h * capacity + rows, mask=m_m, other=0.0)
    tl.store(delta + i_h * capacity + rows, row_delta, mask=m_m)
    row_lse = tl.load(lse + i_h * capacity + rows, mask=m_m, other=0.0) * LOG2E

    k += bos_k.to(tl.int64) * k_token + i_h * k_head
    v += bos_k.to(tl.int64) * v_token + i_h * v_head
    if key_bias is not None:
        key_bias += bos_k
    last_visible = o_m + (len_k - len_q)
    end = len_k
    if CAUSAL:
        end = tl.minimum((i_m + 1) * BLOCK_M + len_k - len_q, len_k)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        keys = o_n.to(tl.int64)
        m_n = o_n < len_k
        m_kv = m_n[:, None] & m_d
        k_tile = tl.load(k + keys[:, None] * k_token + o_d[None, :], mask=m_kv, other=0.0)
        v_tile = tl.load(v + keys[:, None] * v_token + o_d[None, :], mask=m_kv, other=0.0)
        s = product(q_tile, tl.trans(k_tile), None, PRECISION) * (scale * LOG2E)
        if key_bias is not None:
            s += (tl.load(key_bias + keys, mask=m_n, other=0.0) * LOG2E)[None, :]
        seen = m_n[None, :]
        if CAUSAL:
            seen = seen & (o_n[None, :] <= last_visible[:, None])
        p = tl.exp2(tl.where(seen, s - row_lse[:, None], float("-inf")))
        dp = product(d_out_tile, tl.trans(v_tile), None, PRECISION)
        ds = p * (dp - row_delta[:, None])
        acc = product(ds.to(k_tile.dtype), k_tile, acc, PRECISION)
    dq_rows = dq + rows[:, None] * (HEADS * HEAD_DIM) + i_h * HEAD_DIM + o_d[None, :]
    tl.store(dq_rows, (acc * scale).to(dq.dtype.element_ty), mask=m_q)


@triton.jit(do_not_specialize=["capacity_q", "capacity_k", "key_blocks"])
def _key_gradient_kernel(
    q, k, v, key_bias, lse, d_out, delta, dk, dv, d_bias, cu_seqlens_q, cu_seqlens_k,
    q_token, q_head, k_token, k_head, v_token, v_head, d_out_token, d_out_head, capacity_q, capacity_k,
    key_blocks, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk, dv and this head's share of the bias gradient, of BLOCK_N keys of one head of one sample.

    It walks over the queries, so that every sum is made by one program, in one order: no atomics. Tiles are transposed,
    [keys, queries].
    """
    after_previous()
    pid = tl.program_id(0)
    i_n = pid % key_blocks
    i_h = ((pid // key_blocks) % HEADS).to(tl.int64)
    i_b = pid // (key_blocks * HEADS)
    bos_k = tl.load(cu_seqlens_k + i_b)
    len_k = tl.load(cu_seqlens_k + i_b + 1) - bos_k
    if i_n * BLOCK_N >= len_k:
        return
    bos_q = tl.load(cu_seqlens_q + i_b)
    len_q = tl.load(cu_seqlens_q + i_b + 1) - bos_q

    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n = o_n < len_k
    m_d = (o_d < HEAD_DIM)[None, :]
    m_k = m_n[:, None] & m_d
    keys = bos_k.to(tl.int64) + o_n
    k_tile = tl.load(k + keys[:, None] * k_token + i_h * k_head + o_d[None, :], mask=m_k, other=0.0)
    v_tile = tl.load(v + keys[:, None] * v_token + i_h * v_head + o_d[None, :], mask=m_k, other=0.0)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if key_bias is not None:
        bias = tl.load(key_bias + keys, mask=m_n, other=0.0) * LOG2E
    q += bos_q.to(tl.int64) * q_token + i_h * q_head
    d_out += bos_q.to(tl.int64) * d_out_token + i_h * d_out_head
    lse += i_h * capacity_q + bos_q
    delta += i_h * capacity_q + bos_q

    first = 0
    if CAUSAL:  # earlier blocks of queries see none of these keys
        first = tl.maximum(i_n * BLOCK_N - (len_k - len_q), 0) // BLOCK_M * BLOCK_M
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    bias_acc = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, len_q, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        rows = o_m.to(tl.int64)
        m_m = o_m < len_q
        m_q = m_m[:, None] & m_d
        q_tile = tl.load(q + rows[:, None] * q_token + o_d[None, :], mask=m_q, other=0.0)
        d_out_tile = tl.load(d_out + rows[:, None] * d_out_token + o_d[None, :], mask=m_q, other=0.0)
        row_lse = tl.load(lse + rows, mask=m_m, other=float("inf")) * LOG2E  # P = 0 beyond the last query
        row_delta = tl.load(delta + rows, mask=m_m, other=0.0)
        s = product(k_tile, tl.trans(q_tile), None, PRECISION) * (scale * LOG2E) + bias[:, None]
        p = tl.exp2(s - row_lse[None, :])
        if CAUSAL:
            p = tl.where(o_n[:, None] <= o_m[None, :] + (len_k - len_q), p, 0.0)
        dv_acc = product(p.to(d_out_tile.dtype), d_out_tile, dv_acc, PRECISION)
        dp = product(v_tile, tl.trans(d_out_tile), None, PRECISION)
        ds = p * (dp - row_delta[None, :])
        if d_bias is not None:
            bias_acc += tl.sum(ds, 1)
        dk_acc = product(ds.to(q_tile.dtype), q_tile, dk_acc, PRECISION)
    dense = keys[:, None] * (HEADS * HEAD_DIM) + i_h * HEAD_DIM + o_d[None, :]
    tl.store(dk + dense, (dk_acc * scale).to(dk.dtype.element_ty), mask=m_k)
    tl.store(dv + dense, dv_acc.to(dv.dtype.element_ty), mask=m_k)
    if d_bias is not None:
        tl.store(d_bias + i_h * capacity_k + keys, bias_acc, mask=m_n)


def _gradient_blocks(dtype: torch.dtype, block_d: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """Queries and keys of a tile, warps, pipeline stages: of the query gradient, and of the key gradient."""
    if dtype == torch.float32:
        for_queries = (32, 32, 8, 1) if block_d <= 64 else (16, 16, 8, 1)
        return for_queries, (32, 32, 8, 1) if block_d <= 128 else (16, 16, 8, 1)
    if block_d <= 64:
        return (128, 64, 8, 2), (64, 128, 8, 2)
    return ((64, 64, 8, 2), (64, 64, 8, 2)) if block_d <= 128 else ((32, 32, 8, 1), (32, 32, 8, 1))


@on_device_of_first
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    d_out: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias (empty without one); zero in rows without tokens. See the reference for the formula."""
    (capacity_q, heads, head_dim), capacity_k = q.shape, k.shape[0]
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    shares = None if key_bias is None else torch.zeros(heads, capacity_k, dtype=torch.float32, device=q.device)
    d_out, d_lse, lse = unit_stride(d_out), d_lse.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    block_d, batch = block(head_dim), cu_seqlens_q.shape[0] - 1
    for_queries, for_keys = _gradient_blocks(q.dtype, block_d)
    query_blocks, key_blocks = cdiv(max_seqlen_q, for_queries[0]), cdiv(max_seqlen_k, for_keys[1])
    shared = {
        "HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "CAUSAL": causal, "PRECISION": dot_precision(q.dtype)
    }  # fmt: skip
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    if batch and query_blocks:
        block_m, block_n, warps, stages = for_queries
        launch(
            _query_gradient_kernel, batch * heads * query_blocks,
            q, k, v, key_bias, out, lse, d_out, d_lse, delta, dq, cu_seqlens_q, cu_seqlens_k,
            *strides, *out.stride()[:2], *d_out.stride()[:2], capacity_q, query_blocks, scale,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
    if batch and key_blocks:
        block_m, block_n, warps, stages = for_keys
        launch(
            _key_gradient_kernel, batch * heads * key_blocks,
            q, k, v, key_bias, lse, d_out, delta, dk, dv, shares, cu_seqlens_q, cu_seqlens_k,
            *strides, *d_out.stride()[:2], capacity_q, capacity_k, key_blocks, scale,
            BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages, **shared,
        )  # fmt: skip
    return dq, dk, dv, lse.new_empty(0) if shares is None else shares.sum(0)
