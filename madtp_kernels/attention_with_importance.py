"""Self-attention together with its importance: one pass over the logits where the backend has one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends, checks, native, repeats
from .attention import attention, checked
from .importance import attention_importance
from .registration import call, define

__all__ = ["attention_with_importance"]


def attention_with_importance(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`~madtp_kernels.attention` of every sample over itself, and its :func:`~madtp_kernels.attention_importance`.

    On the CPU backend both come from one pass, so that the logits are not computed twice; elsewhere, and where a gradient is
    needed, one operation follows the other. Arguments and errors are those of the two.

    Returns:
        ``out [T, H, d]``, ``lse [H, T]``, ``received [T]``, ``cls [T]``.
    """
    key = repeats.signature(
        attention_with_importance, (q, k, v, cu_seqlens, key_bias), (max_seqlen, scale, causal, backend)
    )
    if repeat := repeats.find(key):
        scale = q.shape[2] ** -0.5 if scale is None else float(scale)
        return repeat(q, k, v, cu_seqlens, max_seqlen, scale, causal, key_bias)
    checks.floats("q", q, 3, "[T, H, d]")
    checks.tensor("k", k, tuple(q.shape), "[T, H, d]", q.dtype, q.device)
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, q, "q")
    inputs = [t for t in (q, k, v, key_bias) if isinstance(t, Tensor)]
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    separate = wants_grad or torch.compiler.is_compiling()
    if separate or backends.resolve("attention", "attention", backend or "", q)[0] != "cpu":
        options = {"scale": scale, "causal": causal, "key_bias": key_bias, "backend": backend}
        out, lse = attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
        result = out, lse, *attention_importance(q, k, out, lse, cu_seqlens, max_seqlen, **options)
        operations = ("attention", "attention"), ("attention_importance", "importance")
        repeats.remember(key, backend, q, *operations, run=_one_after_the_other)
        return result
    q, k, v, cu_seqlens, _, max_seqlen, _, scale, causal, key_bias = checked(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, causal, key_bias, with_offsets=False
    )
    return call("attention_with_importance", q, k, v, cu_seqlens, max_seqlen, scale, causal, key_bias)


def _one_after_the_other(attention, attention_importance, q, k, v, cu_seqlens, max_seqlen, scale, causal, key_bias):
    out, lse = attention(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale, causal, key_bias)
    return out, lse, *attention_importance(q, k, out, lse, cu_seqlens, max_seqlen, scale, causal, key_bias)


def _run(*args):
    return native.load().attention_with_importance(*args)


def _fake(q, k, v, cu_seqlens, max_seqlen, scale, causal, key_bias):
    scores = q.new_empty(q.shape[0], dtype=torch.float32)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return q.new_empty(q.shape), lse, scores, torch.empty_like(scores)


define(
    "attention_with_importance(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale, "
    "bool causal, Tensor? key_bias) -> (Tensor out, Tensor lse, Tensor received, Tensor cls)",
    _run,
    _fake,
)
