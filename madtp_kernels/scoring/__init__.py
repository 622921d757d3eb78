"""Token importance against a cross-modal dictionary, and the pruning threshold: public function, checks, dispatch, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`, the CPU kernel in `csrc/cpu/ops/scoring.cpp`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks, repeats
from ..registration import call, define, define_gradient
from . import reference

__all__ = ["score_tokens"]


def score_tokens(
    x: Tensor,
    dictionary: Tensor,
    received: Tensor,
    cls: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    temperature: float,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """MADTP's token importance and per-sample threshold (arXiv 2403.02991, section 3.3).

    ``G = x dictionary^T + bias``; ``importance = (received/sum + max_m G/sum + cls) / 3``;
    ``threshold = min_m sum_j softmax_j(G/temperature) importance_j``, sums and softmax over the sample's tokens but the first.

    Args:
        x: ``[T, D]`` the tokens that *enter* the block.
        dictionary: ``[M, D]`` alignment entries, in the dtype of x.
        received, cls: ``[T]`` float32 from :func:`~madtp_kernels.attention_importance` of the same block.
        cu_seqlens, max_seqlen: offsets ``[B+1]`` int32 and an upper bound of the lengths.
        temperature: > 0; higher prunes more.
        bias: ``[M]`` float32 added to the alignment of each entry. A linear map ``x W^T + b`` before the dictionary S folds
            into dictionary ``S W`` and bias ``S b``.
        backend: force an implementation.

    Returns:
        ``importance [T]`` float32 (0 for token 0; it sums to about one over a sample and may be negative), and
        ``threshold [B]`` float32 (0 for a sample without prunable tokens). Gradients flow into x, dictionary, bias, received
        and cls through the importance; the threshold carries none.

    Raises:
        ValueError: an argument does not fit, an empty dictionary, a temperature that is not a finite number > 0, or (CPU,
            or debug mode) non-finite received or cls. BackendError: a backend asked for by name cannot run.
    """
    key = repeats.signature(
        score_tokens, (x, dictionary, received, cls, cu_seqlens, bias), (max_seqlen, temperature, backend)
    )
    if repeat := repeats.find(key):
        return repeat(x, dictionary, received, cls, cu_seqlens, max_seqlen, float(temperature), bias)
    checks.floats("x", x, 2, "[T, D]")
    score_dtype = torch.promote_types(x.dtype, torch.float32)
    checks.tensor("dictionary", dictionary, (None, x.shape[1]), "[M, D]", x.dtype, x.device)
    if dictionary.shape[0] == 0:
        raise ValueError(f"dictionary: expected at least one entry [M, D], got {checks.describe(dictionary)}")
    checks.tensor("received", received, (x.shape[0],), "[T]", score_dtype, x.device)
    checks.tensor("cls", cls, (x.shape[0],), "[T]", score_dtype, x.device)
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, x, "x")
    checks.positive("temperature", temperature)
    if bias is not None:
        checks.tensor("bias", bias, (dictionary.shape[0],), "[M]", score_dtype, x.device)
    checks.finite("received", received, cu_seqlens)
    checks.finite("cls", cls, cu_seqlens)
    *tensors, bias = map(checks.unit_stride, (x, dictionary, received, cls, cu_seqlens, bias))
    result = call("score_tokens", *tensors, max_seqlen, float(temperature), bias, backend or "")
    repeats.remember(key, backend, x, ("score_tokens", "scoring"))
    return result


def _fake(x, dictionary, received, cls, cu_seqlens, max_seqlen, temperature, bias, backend):
    return received.new_empty(x.shape[0]), received.new_empty(cu_seqlens.shape[0] - 1)


define(
    "score_tokens(Tensor x, Tensor dictionary, Tensor received, Tensor cls, Tensor cu_seqlens, SymInt max_seqlen, "
    "float temperature, Tensor? bias, str backend) -> (Tensor importance, Tensor threshold)",
    backends.dispatch("score_tokens", "scoring"),
    _fake,
)
define_gradient(
    "score_tokens_backward(Tensor x, Tensor dictionary, Tensor received, Tensor cls, Tensor cu_seqlens, Tensor? bias, "
    "Tensor d_importance) -> (Tensor d_x, Tensor d_dictionary, Tensor d_received, Tensor d_cls, Tensor d_bias)",
    reference.score_tokens_backward,
)
