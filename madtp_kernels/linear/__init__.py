"""A linear layer over the tokens of a capacity buffer: public function, checks, dispatch, registration, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`, the CPU kernel in `csrc/cpu/ops/linear.cpp`. The backend "cuda" is the
reference: PyTorch's own product over all rows of the buffer, because the libraries that PyTorch calls on a GPU take the number of
rows from the host, which does not know it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks, repeats
from ..registration import call, define, differentiate
from . import reference

__all__ = ["linear"]

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")
_MOST_TOKENS = 2**31 - 1


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation(x weight^T + bias) + residual`` for the first ``T = cu_seqlens[B]`` rows of x.

    After a layer has pruned, T is known to the device only. The Triton kernel reads it there, so that its time follows the
    tokens, not the buffer; so does the CPU kernel. The reference and "cuda" multiply all C rows.

    The CPU kernel reads the weight where it lies and keeps nothing of it. A row's result has the same bits whatever the number of
    rows and threads, and memory does not grow with the different numbers of rows, as it does in libraries that compile a
    product for each.

    Args:
        x: ``[C, in]`` float32, bfloat16 or float16 (float64 on the reference); rows beyond T are undefined.
        weight: ``[out, in]`` and bias ``[out]`` as in :func:`torch.nn.functional.linear`, in the dtype of x.
        cu_seqlens: ``[B+1]`` int32 offsets, of which only the last one matters; None: all rows of x count.
        activation: None, "gelu" (exact, by erf), "gelu_tanh" (its approximation by tanh, SigLIP's), "quick_gelu"
            (``z sigmoid(1.702 z)``, CLIP's) or "silu" (``z sigmoid(z)``).
        residual: ``[C, out]`` in the dtype of x, added last.
        backend: force "reference", "cpu", "triton" or "cuda"; by default chosen from the device.

    Returns:
        ``[C, out]`` in the dtype of x; rows beyond T are undefined. Accumulation is in float32, and float32 inputs are
        multiplied as such, not as tf32, unless PyTorch itself was told otherwise and its product serves. The gradients
        of x and residual are zero beyond T.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        BackendError: a backend asked for by name cannot run.
    """
    key = repeats.signature(linear, (x, weight, bias, cu_seqlens, residual), (activation, backend))
    if repeat := repeats.find(key):
        return repeat(x, weight, bias, cu_seqlens, activation or "", residual)
    checks.floats("x", x, 2, "[C, in]")
    checks.tensor("weight", weight, (None, x.shape[1]), "[out, in]", x.dtype, x.device)
    if bias is not None:
        checks.tensor("bias", bias, (weight.shape[0],), "[out]", x.dtype, x.device)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device)
    else:
        checks.offsets("cu_seqlens", cu_seqlens, "T", _MOST_TOKENS, x, "x")
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: expected None or one of {names}, got {checks.describe(activation)}")
    if residual is not None:
        checks.tensor("residual", residual, (x.shape[0], weight.shape[0]), "[C, out]", x.dtype, x.device)
    result = call(
        "linear", checks.unit_stride(x), checks.unit_stride(weight), checks.unit_stride(bias), checks.unit_stride(cu_seqlens),
        activation or "", checks.unit_stride(residual), backend or "",
    )  # fmt: skip
    if cu_seqlens is not None:
        repeats.remember(key, backend, x, ("linear", "linear"))
    return result


_run = backends.dispatch("linear", "linear")


def _fake(x, weight, bias, cu_seqlens, activation, residual, backend):
    return x.new_empty(x.shape[0], weight.shape[0])


def _run_backward(x, weight, bias, cu_seqlens, activation, d_out, backend):
    if activation:  # the values before it are computed again: keeping them would be the largest tensor of a block
        z = _run(x, weight, bias, cu_seqlens, "", None, backend)
        d_out = reference.activation_backward(z, d_out, activation)
    return reference.linear_backward(x, weight, cu_seqlens, d_out)


def _fake_backward(x, weight, bias, cu_seqlens, activation, d_out, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, bias, cu_seqlens, ctx.activation, residual, ctx.backend = inputs
    ctx.save_for_backward(x, weight, bias, cu_seqlens)
    ctx.has_residual = residual is not None


def _backward(ctx, d_out):
    x, weight, bias, cu_seqlens = ctx.saved_tensors
    d_residual = reference.defined(d_out, cu_seqlens) if ctx.has_residual else None
    dx, d_weight, d_bias = torch.ops.madtp_kernels.linear_backward(
        x, weight, bias, cu_seqlens, ctx.activation, d_out, ctx.backend
    )
    return dx, d_weight, None if bias is None else d_bias, None, None, d_residual, None


define(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, str activation, Tensor? residual, str backend) "
    "-> Tensor",
    _run,
    _fake,
)
define(
    "linear_backward(Tensor x, Tensor weight, Tensor? bias, Tensor cu_seqlens, str activation, Tensor d_out, str backend) "
    "-> (Tensor dx, Tensor d_weight, Tensor d_bias)",
    _run_backward,
    _fake_backward,
)
differentiate("linear", _setup_context, _backward)
