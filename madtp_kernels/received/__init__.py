"""Attention that each token receives from chosen queries: public function, checks, dispatch, registration, gradient.

What most pruners rank tokens by (EViT, VisionZip, FastV, SnapKV, ...), without the attention matrix. MADTP's own two terms are
`attention_importance`, which the CPU computes together with the attention. The formula is in `reference.py`, the GPU kernel in
`triton.py`, the CPU kernel in `csrc/cpu/ops/received.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from ..attention import key_head_count
from ..registration import call, define, define_gradient
from . import reference

__all__ = ["attention_received"]

_END = 2**31 - 1


def attention_received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    heads: str = "mean",
    queries: slice | Tensor | None = None,
    per_key_head: bool = False,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """How much attention each token receives from chosen queries of its sample: ``sum_i f_h P_hij``.

    The probabilities ``P_hij = exp(s_hij - lse_hi)`` are recomputed tile by tile from the log-sum-exp that
    :func:`~madtp_kernels.attention` returned; no L x L matrix is stored, and the same input gives the same bits, whatever else
    is in the batch.

    Args:
        q: ``[T, H, d]``; k: ``[T, Hk, d]``, H a multiple of Hk (grouped queries); lse: ``[H, T]`` float32.
        heads: what ``f`` is, "mean" or "max" over the heads.
        queries: which of a sample's queries count. None: all. A slice of positions in the sample: ``slice(1, None)`` all but
            the class token, ``slice(0, 1)`` the class token (EViT, VisionZip), ``slice(-1, None)`` the last one (FastV),
            ``slice(-32, None)`` the last 32 (SnapKV). A mask ``[T]`` bool: those.
        per_key_head: one result for each key head, over the query heads of its group, instead of one over all heads.
        cu_seqlens, max_seqlen, scale, causal, key_bias, backend: as in the attention it belongs to.

    Returns:
        ``[T]`` float32, or ``[Hk, T]`` with per_key_head. Over a sample the mean adds up to the number of chosen queries
        (those that see a key). Gradients flow into q, k, lse and key_bias.

    Raises:
        ValueError: an argument does not fit. BackendError: a backend asked for by name cannot run.
    """
    checks.floats("q", q, 3, "[T, H, d]")
    tokens, query_heads, head_dim = q.shape
    if not 1 <= head_dim <= 256 or query_heads < 1:
        raise ValueError(f"q: expected [T, H, d] with H >= 1 and 1 <= d <= 256, got {checks.describe(q)}")
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    key_heads = key_head_count("k", k, query_heads)
    checks.tensor("k", k, (tokens, key_heads, head_dim), "[T, Hk, d]", q.dtype, q.device)
    checks.tensor("lse", lse, (query_heads, tokens), "[H, T]", score_dtype, q.device)
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, q, "q")
    if key_bias is not None:
        checks.tensor("key_bias", key_bias, (tokens,), "[T]", score_dtype, q.device)
    if heads not in ("mean", "max"):
        raise ValueError(f"heads: expected 'mean' or 'max', got {checks.describe(heads)}")
    scale = head_dim**-0.5 if scale is None else scale
    checks.positive("scale", scale)
    checks.flag("causal", causal)
    first, last, mask = 0, _END, None
    if isinstance(queries, slice):
        first = 0 if queries.start is None else queries.start
        last = _END if queries.stop is None else queries.stop
        edges = all(isinstance(edge, int) and abs(edge) <= _END for edge in (first, last))
        if not edges or queries.step not in (None, 1):
            raise ValueError(f"queries: expected a slice of integers without a step, got {queries}")
    elif queries is not None:
        if not isinstance(queries, Tensor) or queries.dtype != torch.bool:
            got = checks.describe(queries)
            raise ValueError(
                f"queries: expected None, a slice of positions such as slice(-1, None), or bool [T], got {got}"
            )
        checks.tensor("queries", queries, (tokens,), "[T]", torch.bool, q.device)
        mask = checks.unit_stride(queries)
    received = call(
        "attention_received", *map(checks.unit_stride, (q, k, lse, cu_seqlens)), max_seqlen, float(scale), causal,
        checks.unit_stride(key_bias), heads, key_heads if per_key_head else 1, first, last, mask, backend or "",
    )  # fmt: skip
    return received if per_key_head else received[0]


def _fake(q, k, lse, cu_seqlens, max_seqlen, scale, causal, key_bias, heads, sets, first, last, queries, backend):
    return lse.new_empty(sets, q.shape[0])


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale, bool causal, Tensor? key_bias, "
    "str heads, int sets, int first, int last, Tensor? queries"
)
define(
    f"attention_received({_ARGUMENTS}, str backend) -> (Tensor received)",
    backends.dispatch("attention_received", "received"),
    _fake,
)
define_gradient(
    f"attention_received_backward({_ARGUMENTS}, Tensor d_received) "
    "-> (Tensor d_q, Tensor d_k, Tensor d_lse, Tensor d_key_bias)",
    reference.attention_received_backward,
)
