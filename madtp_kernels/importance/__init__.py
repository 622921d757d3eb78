"""How much attention each token receives, without the attention matrix: public function, checks, dispatch, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`, the CPU kernels in `csrc/cpu/ops/importance.cpp` and
`importance_backward.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks, repeats
from ..registration import call, define, define_gradient

__all__ = ["attention_importance"]


def attention_importance(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The two attention terms of MADTP's token importance (arXiv 2403.02991, section 3.3).

    The probabilities ``P_hij = exp(s_hij - lse_hi)`` are recomputed tile by tile from the log-sum-exp that
    :func:`~madtp_kernels.attention` returned; no L x L matrix is stored. Arguments as for self-attention, plus its results:

    Args:
        q, k: ``[T, H, d]``; out: ``[T, H, d]`` in the same dtype; lse: ``[H, T]`` float32.
        cu_seqlens, max_seqlen, scale, causal, key_bias, backend: as in the attention they belong to.

    Returns:
        ``received [T]`` float32: ``sum_{i>=1} max_h P_hij``, and ``cls [T]`` float32:
        ``sum_h P_h0j |out_hj| / (sum_h |out_hj| + 1e-8)``. Token 0 of a sample takes part in neither; its entries are 0.
        The same input gives the same bits, whatever else is in the batch. A query whose log-sum-exp is NaN makes that of every
        key it sees NaN; of keys hidden from it by the causal mask the CPU and the reference do so, too, and GPUs do not.

    Raises:
        ValueError: an argument does not fit. BackendError: a backend asked for by name cannot run.
    """
    key = repeats.signature(
        attention_importance, (q, k, out, lse, cu_seqlens, key_bias), (max_seqlen, scale, causal, backend)
    )
    if repeat := repeats.find(key):
        scale = q.shape[2] ** -0.5 if scale is None else float(scale)
        return repeat(q, k, out, lse, cu_seqlens, max_seqlen, scale, causal, key_bias)
    checks.floats("q", q, 3, "[T, H, d]")
    if not 1 <= q.shape[2] <= 256 or q.shape[1] < 1:
        raise ValueError(f"q: expected [T, H, d] with H >= 1 and 1 <= d <= 256, got {checks.describe(q)}")
    shape = tuple(q.shape)
    score_dtype = torch.promote_types(q.dtype, torch.float32)
    checks.tensor("k", k, shape, "[T, H, d]", q.dtype, q.device)
    checks.tensor("out", out, shape, "[T, H, d]", q.dtype, q.device)
    checks.tensor("lse", lse, (shape[1], shape[0]), "[H, T]", score_dtype, q.device)
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, q, "q")
    if key_bias is not None:
        checks.tensor("key_bias", key_bias, (shape[0],), "[T]", score_dtype, q.device)
    scale = shape[2] ** -0.5 if scale is None else scale
    checks.positive("scale", scale)
    checks.flag("causal", causal)
    *tensors, key_bias = map(checks.unit_stride, (q, k, out, lse, cu_seqlens, key_bias))
    result = call("attention_importance", *tensors, max_seqlen, float(scale), causal, key_bias, backend or "")
    repeats.remember(key, backend, q, ("attention_importance", "importance"))
    return result


def _fake(q, k, out, lse, cu_seqlens, max_seqlen, scale, causal, key_bias, backend):
    return lse.new_empty(q.shape[0]), lse.new_empty(q.shape[0])


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor out, Tensor lse, Tensor cu_seqlens, SymInt max_seqlen, float scale, bool causal, "
    "Tensor? key_bias"
)
define(
    f"attention_importance({_ARGUMENTS}, str backend) -> (Tensor received, Tensor cls)",
    backends.dispatch("attention_importance", "importance"),
    _fake,
)
define_gradient(
    f"attention_importance_backward({_ARGUMENTS}, Tensor d_received, Tensor d_cls, str backend) "
    "-> (Tensor d_q, Tensor d_k, Tensor d_out, Tensor d_lse, Tensor d_key_bias)",
    backends.dispatch("attention_importance_backward", "importance"),
)
