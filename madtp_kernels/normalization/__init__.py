"""LayerNorm over the tokens of a capacity buffer: public function, checks, dispatch, registration, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`, the CPU kernel in `csrc/cpu/ops/layer_norm.cpp`.
"""

from __future__ import annotations

from torch import Tensor

from .. import backends, checks, repeats
from ..registration import call, define, define_gradient
from . import reference

__all__ = ["layer_norm"]

_MOST_TOKENS = 2**31 - 1


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, eps: float = 1e-5, *, backend: str | None = None
) -> Tensor:
    """LayerNorm of the first ``T = cu_seqlens[B]`` rows of x; T is read on the device.

    Args:
        x: ``[C, D]``; rows beyond T are undefined.
        weight, bias: ``[D]`` floating point, of any precision; bias may be None.
        cu_seqlens: ``[B+1]`` int32 offsets; only the last one matters.
        eps: > 0, added to the variance.
        backend: force an implementation.

    Returns:
        ``[C, D]`` in the dtype of x, statistics in float32 (float64 for float64); rows beyond T are undefined. The gradient
        of x is zero there.

    Raises:
        ValueError: an argument does not fit. BackendError: a backend asked for by name cannot run.
    """
    key = repeats.signature(layer_norm, (x, weight, bias, cu_seqlens), (eps, backend))
    if repeat := repeats.find(key):
        return repeat(x, weight, bias, cu_seqlens, float(eps))
    checks.floats("x", x, 2, "[C, D]")
    if x.shape[1] == 0:
        raise ValueError(f"x: expected at least one feature [C, D], got {checks.describe(x)}")
    checks.tensor("weight", weight, (x.shape[1],), "[D]", checks.FLOATS, x.device)
    if bias is not None:
        checks.tensor("bias", bias, (x.shape[1],), "[D]", checks.FLOATS, x.device)
    checks.offsets("cu_seqlens", cu_seqlens, "T", _MOST_TOKENS, x, "x")
    checks.positive("eps", eps)
    tensors = map(checks.unit_stride, (x, weight, bias, cu_seqlens))
    result = call("layer_norm", *tensors, float(eps), backend or "")
    repeats.remember(key, backend, x, ("layer_norm", "normalization"))
    return result


define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, float eps, str backend) -> (Tensor out)",
    backends.dispatch("layer_norm", "normalization"),
    lambda x, *_: x.new_empty(x.shape),
)
define_gradient(
    "layer_norm_backward(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, float eps, Tensor d_out) "
    "-> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    reference.layer_norm_backward,
)
