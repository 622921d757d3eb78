"""A linear layer over the tokens of a capacity buffer: public function, checks, dispatch, registration, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`, the CPU kernel in `csrc/cpu/ops/linear.cpp`. The backend "cuda" is the
reference: PyTorch's own product over all rows of the buffer, because the libraries that PyTorch calls on a GPU take the number of
rows from the host, which does not know it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks, repeats
from ..normalization import layer_norm
from ..ragged import RaggedBatch
from ..registration import call, define, differentiate
from . import reference

__all__ = ["linear", "linear_pair"]

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
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation(x weight^T + bias) + residual`` for the first ``T = cu_seqlens[B]`` rows of x, and its LayerNorm.

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
        norm: ``(weight [out], bias [out] or None, eps)`` of a LayerNorm that follows: the result is that of
            :func:`~madtp_kernels.layer_norm`, whose call is spared.
        backend: force "reference", "cpu", "triton" or "cuda"; by default chosen from the device.

    Returns:
        ``[C, out]`` in the dtype of x; rows beyond T are undefined. Accumulation is in float32, and float32 inputs are
        multiplied as such, not as tf32, unless PyTorch itself was told otherwise and its product serves. The gradients
        of x and residual are zero beyond T.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        BackendError: a backend asked for by name cannot run.
    """
    if norm is None:
        key = repeats.signature(linear, (x, weight, bias, cu_seqlens, residual), (activation, backend))
        if repeat := repeats.find(key):
            return repeat(x, weight, bias, cu_seqlens, activation or "", residual)
    else:
        if not isinstance(norm, tuple) or len(norm) != 3:
            raise ValueError(f"norm: expected (weight, bias, eps), got {checks.describe(norm)}")
        gain, shift, eps = norm
        key = repeats.signature(
            linear, (x, weight, bias, cu_seqlens, residual, gain, shift), (activation, eps, backend)
        )
        if repeat := repeats.find(key):
            return repeat(x, weight, bias, cu_seqlens, activation or "", residual, gain, shift, float(eps))
    checks.floats("x", x, 2, "[C, in]")
    checks.tensor("weight", weight, (None, x.shape[1]), "[out, in]", x.dtype, x.device)
    if bias is not None:
        checks.tensor("bias", bias, (weight.shape[0],), "[out]", x.dtype, x.device)
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, x.shape[0]], dtype=torch.int32, device=x.device)
        key = None  # the next call without offsets has to make its own
    else:
        checks.offsets("cu_seqlens", cu_seqlens, "T", _MOST_TOKENS, x, "x")
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation: expected None or one of {names}, got {checks.describe(activation)}")
    if residual is not None:
        checks.tensor("residual", residual, (x.shape[0], weight.shape[0]), "[C, out]", x.dtype, x.device)
    if norm is not None:
        checks.tensor("norm weight", gain, (weight.shape[0],), "[out]", checks.FLOATS, x.device)
        if shift is not None:
            checks.tensor("norm bias", shift, (weight.shape[0],), "[out]", checks.FLOATS, x.device)
        checks.positive("norm eps", eps)
    *tensors, residual = map(checks.unit_stride, (x, weight, bias, cu_seqlens, residual))
    result = call("linear", *tensors, activation or "", residual, backend or "")
    if norm is None:
        repeats.remember(key, backend, x, ("linear", "linear"))
        return result
    result = layer_norm(result, gain, shift, cu_seqlens, eps, backend=backend)
    repeats.remember(key, backend, x, ("linear", "linear"), ("layer_norm", "normalization"), run=_normed)
    return result


def _normed(multiply, normalise, x, weight, bias, cu_seqlens, activation, residual, gain, shift, eps) -> Tensor:
    return normalise(multiply(x, weight, bias, cu_seqlens, activation, residual), gain, shift, cu_seqlens, eps)


def linear_pair(
    x: RaggedBatch,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    *,
    form: str,
    backend: str | None = None,
) -> RaggedBatch:
    """Two linear layers of one shape on the tokens of a ragged batch, in one launch on a GPU.

    What looks at two things with weights of its own for each, as the words of BLIP-NLVR look at two images, is written for
    twice as many samples: the second half goes through the second layer.

    Args:
        x: tokens ``[C, in]`` of B samples; rows beyond the last token are undefined.
        weights, biases: two of ``[out, in]`` and of ``[out]`` (None: none), in the dtype of x.
        form: what is multiplied by which:
            "both": all tokens by both. The result ``[2C, out]`` has 2B samples, first those of the first layer.
            "halves": B is even; the samples of the first half by the first layer, the others by the second: ``[C, out]``.
            "columns": likewise, of halves whose lengths are the same, as "both" makes them. The result ``[C/2, 2 out]`` has
            B/2 samples: the columns of the first layer, then those of the second.
        backend: force "reference" or "triton"; by default chosen from the device.

    Returns:
        The tokens, each with the bits that :func:`linear` gives it (Triton); rows beyond the last are undefined.

    Raises:
        ValueError: an argument does not fit. NotImplementedError: a gradient is wanted. BackendError: a backend asked for by
            name cannot run.
    """
    for name, pair in (("weights", weights), ("biases", biases)):
        if not isinstance(pair, (tuple, list)):
            raise ValueError(f"{name}: expected a tuple of two, got {checks.describe(pair)}")
        if len(pair) != 2:
            raise ValueError(f"{name}: expected a tuple of two, got {len(pair)}")
    (weight, other_weight), (bias, other_bias) = weights, biases
    values, cu_seqlens = x.values, x.cu_seqlens
    tensors = (values, weight, other_weight, bias, other_bias, cu_seqlens)
    key = repeats.signature(linear_pair, tensors, (form, backend))
    if repeat := repeats.find(key):
        return _paired(x, repeat(*tensors, form), form)
    checks.floats("x.values", values, 2, "[C, in]")
    checks.tensor("weights[0]", weight, (None, values.shape[1]), "[out, in]", values.dtype, values.device)
    checks.tensor("weights[1]", other_weight, tuple(weight.shape), "[out, in]", values.dtype, values.device)
    for number, vector in enumerate((bias, other_bias)):
        if vector is not None:
            checks.tensor(f"biases[{number}]", vector, (weight.shape[0],), "[out]", values.dtype, values.device)
    if form not in reference.FORMS:
        raise ValueError(f"form: expected one of {', '.join(map(repr, reference.FORMS))}, got {checks.describe(form)}")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise NotImplementedError("linear_pair: there is no gradient; call linear twice, or under torch.no_grad()")
    if form != "both" and x.batch_size % 2:
        raise ValueError(f"x: expected an even number of samples for form {form!r}, got {x.batch_size}")
    result = call("linear_pair", *map(checks.unit_stride, tensors), form, backend or "")
    repeats.remember(key, backend, values, ("linear_pair", "linear"))
    return _paired(x, result, form)


def _paired(x: RaggedBatch, result: list[Tensor], form: str) -> RaggedBatch:
    if form == "both":
        values, offsets = result
    else:
        (values,), offsets = result, x.cu_seqlens
        if form == "columns":
            offsets = offsets[: x.batch_size // 2 + 1]
    return RaggedBatch.unchecked(values, offsets, x.max_seqlen, x.bound)


def _fake_pair(x, weight, other_weight, bias, other_bias, cu_seqlens, form, backend):
    out = x.new_empty(reference.pair_shape(x.shape[0], weight.shape[0], form))
    return [out, cu_seqlens.new_empty(2 * cu_seqlens.shape[0] - 1)] if form == "both" else [out]


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
define(
    "linear_pair(Tensor x, Tensor weight, Tensor other_weight, Tensor? bias, Tensor? other_bias, Tensor cu_seqlens, str form, "
    "str backend) -> Tensor[]",
    backends.dispatch("linear_pair", "linear"),
    _fake_pair,
)
