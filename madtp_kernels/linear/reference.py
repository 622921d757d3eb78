"""The linear layer with activation and residual in plain PyTorch: the oracle, and what serves without Triton.

It multiplies every row of the buffer (cuBLAS, oneDNN); rows beyond T give rows beyond T, which nobody reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FORMS = ("both", "halves", "columns")  # which rows of `linear_pair` go through which layer
QUICK_GELU = 1.702  # z sigmoid(1.702 z), CLIP's approximation of GELU


def activate(z: Tensor, activation: str) -> Tensor:
    """``activation`` is "" (none), "gelu" (exact, by erf), "gelu_tanh", "quick_gelu" or "silu"."""
    if activation == "gelu":
        return F.gelu(z)
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if activation == "silu":
        return F.silu(z)
    return z * torch.sigmoid(QUICK_GELU * z) if activation == "quick_gelu" else z


def activation_backward(z: Tensor, d_out: Tensor, activation: str) -> Tensor:
    """Gradient of z from that of activate(z)."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(d_out, z)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_backward(d_out, z, approximate="tanh")
    if activation == "silu":
        return torch.ops.aten.silu_backward(d_out, z)
    if activation == "quick_gelu":
        s = torch.sigmoid(QUICK_GELU * z)
        return d_out * (s + QUICK_GELU * z * s * (1 - s))
    return d_out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, activation: str, residual: Tensor | None
) -> Tensor:
    """activation(x weight^T + bias) + residual."""
    out = activate(F.linear(x, weight, bias), activation)
    return out if residual is None else out + residual


def linear_backward(x: Tensor, weight: Tensor, cu_seqlens: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias from that of z = x weight^T + bias.

    Sums over tokens leave out the rows beyond T, whatever they hold; dx is zero there, so that sums of other layers may
    run over all rows. Nothing waits for the device.
    """
    dz = defined(dz, cu_seqlens)
    return dz @ weight, dz.mT @ defined(x, cu_seqlens), dz.sum(0)


def defined(rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """``rows [C, ...]`` with zeros beyond T."""
    token = torch.arange(rows.shape[0], device=rows.device) < cu_seqlens[-1]
    return rows.where(token[:, None], 0)


def pair_shape(capacity: int, columns: int, form: str) -> tuple[int, int]:
    """Of the result of :func:`linear_pair` for ``capacity`` rows and weights of ``columns`` rows."""
    if form == "columns":
        return capacity // 2, 2 * columns
    return (2 * capacity if form == "both" else capacity), columns


def linear_pair(
    x: Tensor,
    weight: Tensor,
    other_weight: Tensor,
    bias: Tensor | None,
    other_bias: Tensor | None,
    cu_seqlens: Tensor,
    form: str,
) -> list[Tensor]:
    """Two linear layers: all rows by both, the second ones behind the first; or each half of the samples by its own, in its
    place or with its columns behind those of the first. And, of "both", the offsets of twice the samples.

    Nothing waits for the device: the rows of the second half are found there.
    """
    batch = cu_seqlens.shape[0] - 1
    half = cu_seqlens[batch if form == "both" else batch // 2]
    row = torch.arange(pair_shape(x.shape[0], 1, form)[0], device=x.device)
    second = row + half if form == "columns" else row - half if form == "both" else row
    most = max(x.shape[0] - 1, 0)
    results = (
        F.linear(x[rows.clamp(0, most)], *parameters)
        for rows, parameters in ((row, (weight, bias)), (second, (other_weight, other_bias)))
    )
    if form == "columns":
        return [torch.cat([*results], 1)]
    ours, theirs = results
    out = ours.where((row < half)[:, None], theirs)
    if form == "halves":
        return [out]
    return [out, torch.cat([cu_seqlens, cu_seqlens[1:] + half])]
