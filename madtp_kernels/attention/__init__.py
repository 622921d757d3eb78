"""Ragged attention that also returns the log-sum-exp: public function, checks, dispatch, registration, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`, the CPU kernels in `csrc/cpu/ops/attention.cpp` and
`attention_backward.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks, repeats
from ..registration import call, define, define_gradient

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    with_lse: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of every sample's queries over the same sample's keys.

    Args:
        q: ``[Tq, H, d]``, k and v: ``[Tk, Hk, d]``; float32, bfloat16 or float16 (float64 on the reference). Views of a
            larger buffer are fine. Self-attention passes the same offsets twice, cross-attention two different ones. With
            fewer key heads (H a multiple of Hk) queries are grouped: head h looks at key head ``h // (H / Hk)``.
        cu_seqlens_q, cu_seqlens_k: ``[B+1]`` int32 offsets of the samples in q and in k, v.
        max_seqlen_q, max_seqlen_k: upper bounds of the sample lengths (host integers).
        scale: factor of the logits; ``d ** -0.5`` if None.
        causal: query i sees keys j <= i + Lk - Lq only (aligned at the end of the sample).
        key_bias: ``[Tk]`` float32 added to every logit of a key: the log of a merged token's size makes attention
            proportional (ToMe, arXiv 2210.09461, section 3.3).
        with_lse: False: nobody reads lse, which is None then. On a GPU that may spare a launch.
        backend: force "reference", "cpu", "triton" or "cuda"; by default chosen from the device.

    Returns:
        ``out [Tq, H, d]`` in the dtype of q, and ``lse [H, Tq]`` float32, the natural log-sum-exp of the logits. A query
        that sees no key has out = 0 and lse = -inf. Accumulation is in float32. A logit that is NaN makes both NaN; one that
        is +inf, and none NaN, makes lse +inf and out NaN. Where PyTorch's flash attention serves (Triton backend, before or
        after sm_90 and for heads wider than 64), lse of either is an infinity, and out is NaN. The Triton backend without a key
        bias gives NaN for logits from 7e8 on (4e7 in float16), whose float32 neighbours lie too far apart for a softmax.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        BackendError: a backend asked for by name cannot run.
    """
    lengths = (max_seqlen_q, max_seqlen_k)
    key = repeats.signature(
        attention, (q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias), (*lengths, scale, causal, with_lse, backend)
    )
    if repeat := repeats.find(key):
        scale = q.shape[2] ** -0.5 if scale is None else float(scale)
        out, lse = repeat(q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, scale, causal, key_bias, with_lse)
    else:
        arguments = checked(q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, scale, causal, key_bias)
        out, lse = call("attention", *arguments, backend or "")
        repeats.remember(key, backend, q, ("attention", "attention"))
    return out, lse if with_lse else None


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None,
    causal: bool,
    key_bias: Tensor | None,
    with_offsets: bool = True,
) -> tuple:
    """The arguments of an attention as the implementations rely on them, or the ValueError that :func:`attention` describes.

    ``with_offsets``: False where the caller has checked offsets, and lengths, of queries and keys.
    """
    checks.floats("q", q, 3, "[Tq, H, d]")
    heads, head_dim = q.shape[1:]
    if not 1 <= head_dim <= 256 or heads < 1:
        raise ValueError(f"q: expected [Tq, H, d] with H >= 1 and 1 <= d <= 256, got {checks.describe(q)}")
    key_heads = key_head_count("k", k, heads)
    checks.tensor("k", k, (None, key_heads, head_dim), "[Tk, H, d]", q.dtype, q.device)
    checks.tensor("v", v, (k.shape[0], key_heads, head_dim), "[Tk, H, d]", q.dtype, q.device)
    if with_offsets:
        checks.offsets("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q, "q")
        checks.offsets("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k, "k")
        checks.tensor("cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), "[B+1]", torch.int32, q.device)
    if key_bias is not None:
        score_dtype = torch.promote_types(q.dtype, torch.float32)
        checks.tensor("key_bias", key_bias, (k.shape[0],), "[Tk]", score_dtype, q.device)
    scale = head_dim**-0.5 if scale is None else scale
    checks.positive("scale", scale)
    checks.flag("causal", causal)
    return (
        checks.unit_stride(q), checks.unit_stride(k), checks.unit_stride(v), checks.unit_stride(cu_seqlens_q),
        checks.unit_stride(cu_seqlens_k), max_seqlen_q, max_seqlen_k, float(scale), causal, checks.unit_stride(key_bias),
    )  # fmt: skip


def key_head_count(name: str, k: Tensor, heads: int) -> int:
    """Key heads of ``k [Tk, Hk, d]`` for this many query heads, or a ValueError. Wrong dimensions are left to another check."""
    if not isinstance(k, Tensor) or k.dim() != 3:
        return heads
    if k.shape[1] < 1 or heads % k.shape[1]:
        meaning = f"[Tk, Hk, d] with Hk a divisor of the {heads} query heads"
        raise ValueError(f"{name}: expected {meaning}, got {checks.describe(k)}")
    return k.shape[1]


NO_GROUPS = "its kernels take as many key heads as query heads"


def _run(*args):
    *args, backend = args
    q, k, v, *rest = args
    groups = q.shape[1] // k.shape[1]
    name, implementation = backends.resolve("attention", "attention", backend, q, NO_GROUPS if groups > 1 else None)
    if groups == 1 or name != "cpu":
        return implementation(*args)
    # The C++ kernel pairs head with head: every first query head of a group, every second one, ... on the same keys.
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1::-1], dtype=torch.float32)
    for i in range(groups):
        out[:, i::groups], lse[i::groups] = implementation(q[:, i::groups], k, v, *rest)
    return out, lse


def _fake(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, key_bias, backend):
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=score_dtype)


def _run_backward(q, k, v, *args):
    *args, backend = args
    groups = q.shape[1] // k.shape[1]
    _, implementation = backends.resolve("attention_backward", "attention", backend, q)
    if groups == 1:
        return implementation(q, k, v, *args)
    dq, dk, dv, d_bias = implementation(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), *args)
    return dq, sum_groups(dk, groups), sum_groups(dv, groups), d_bias


def sum_groups(gradient: Tensor, groups: int) -> Tensor:
    """The gradient ``[T, H, d]`` of keys that were repeated for each query head as that of the ``[T, H / groups, d]`` keys."""
    wide = gradient.unflatten(1, (-1, groups)).to(torch.promote_types(gradient.dtype, torch.float32))
    return wide.sum(2).to(gradient.dtype)


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float scale, bool causal, Tensor? key_bias, str backend) -> (Tensor out, Tensor lse)",
    _run,
    _fake,
)
define_gradient(
    "attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, bool causal, Tensor? key_bias, "
    "Tensor d_out, Tensor d_lse, str backend) -> (Tensor d_q, Tensor d_k, Tensor d_v, Tensor d_key_bias)",
    _run_backward,
)
