"""Dropping the tokens that do not matter: public function, checks, dispatch, registration, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`, the CPU kernel in `csrc/cpu/ops/compaction.cpp`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, repeats
from ..ragged import RaggedBatch
from ..registration import call, define, differentiate
from . import reference

__all__ = ["Compacted", "compact"]


class Compacted(NamedTuple):
    """Result of :func:`compact`. All per-token tensors share the offsets of ``tokens``."""

    tokens: RaggedBatch
    """Surviving rows ``[T', D]``; the merged token of a pruned sample is its last row."""
    ids: Tensor
    """``[T']`` int32: where each row came from; ``merged_id`` for merged tokens."""
    sizes: Tensor | None
    """``[T']`` float32: how many original tokens each row stands for; None without input sizes."""
    normed: Tensor | None
    """``[T', D]``: LayerNorm of the rows; None if it was not asked for."""


def compact(
    x: RaggedBatch,
    importance: Tensor,
    threshold: Tensor | None = None,
    *,
    keep_count: Tensor | None = None,
    protected: Tensor | None = None,
    groups: Tensor | None = None,
    min_keep: Tensor | None = None,
    ids: Tensor | None = None,
    sizes: Tensor | None = None,
    merged_id: int = -1,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    exact: bool | None = None,
    backend: str | None = None,
) -> Compacted:
    """Keep each sample's tokens with ``importance > threshold`` and merge the others into one token, appended last.

    Token 0 of a sample always survives. Kept tokens stay in order. The merged token is
    ``sum_dropped w_j x_j / (sum_dropped w_j + 1e-8)`` with ``w = importance`` (times ``sizes``, where given). A sample of which
    no token survives, or fewer than two would be dropped, is left as it is (MADTP's rule; arXiv 2403.02991, section 3.3).

    Args:
        x: tokens ``[T, D]``.
        importance: ``[T]`` float32; token 0's entries do not matter.
        threshold: ``[B]`` float32; strict comparison. Exactly one of threshold and keep_count is given.
        keep_count: ``[B]`` int32: keep this many best tokens instead (ties: the earlier one), for fixed-ratio methods.
        protected: ``[T]`` bool: further tokens that always survive.
        groups: ``[B]`` int32 in 0..B-1: samples of one group all keep the largest count among them (BLIP-NLVR's official code
            ties the two images of a pair), filled up by the next best tokens.
        min_keep: ``[B]`` int32: prune a sample only if more than this many tokens survive (0 by default).
        ids: ``[T]`` int32 carried through; by default a token's position in its sample.
        sizes: ``[T]`` float32: originals that each token stands for; summed up in the merged token.
        merged_id: id of the merged tokens.
        norm: ``(weight [D], bias [D] or None, eps)`` of a LayerNorm to apply to the result in the same pass.
        exact: result buffer without spare rows. This reads the new size on the host, hence the default: True on the CPU,
            False on a device and under torch.compile, where the result keeps the capacity of x and nothing waits.
        backend: force an implementation.

    Returns:
        :class:`Compacted`. ``max_seqlen`` is tight for an exact result, otherwise the old bound.

    Raises:
        ValueError: an argument does not fit, or (CPU, or debug mode) non-finite importance or threshold.
        BackendError: a backend asked for by name cannot run.
    """
    if not isinstance(x, RaggedBatch):
        raise ValueError(f"x: expected a RaggedBatch of tokens [T, D], got {checks.describe(x)}")
    values, cu_seqlens, device = x.values, x.cu_seqlens, x.device
    weight, bias, eps = norm if isinstance(norm, tuple) and len(norm) == 3 else (None, None, 0.0)
    key = None
    if norm is None or weight is not None:
        per_sample = (threshold, keep_count, cu_seqlens, groups, min_keep)
        key = repeats.signature(
            compact, (values, importance, *per_sample, protected, ids, sizes, weight, bias),
            (x.max_seqlen, merged_id, eps, exact, backend),
        )  # fmt: skip
        if repeat := repeats.find(key):
            result = repeat(
                values, importance, threshold, keep_count, cu_seqlens, x.max_seqlen, protected, groups, min_keep, ids, sizes,
                merged_id, weight, bias, eps, bool(exact),
            )  # fmt: skip
            return compacted(result, x.max_seqlen, bool(exact), sizes, weight)
    checks.floats("x.values", values, 2, "[T, D]")
    tokens, batch = values.shape[0], cu_seqlens.shape[0] - 1
    score_dtype = torch.promote_types(values.dtype, torch.float32)
    checks.tensor("importance", importance, (tokens,), "[T]", score_dtype, device)
    checks.finite("importance", importance, cu_seqlens)
    if (threshold is None) == (keep_count is None):
        came = "neither" if threshold is None else "both"
        raise ValueError(f"threshold, keep_count: expected exactly one of them, got {came}")
    if threshold is not None:
        checks.tensor("threshold", threshold, (batch,), "[B]", score_dtype, device)
        checks.finite("threshold", threshold)
    per_token = (("protected", protected, torch.bool), ("ids", ids, torch.int32), ("sizes", sizes, torch.float32))
    for name, value, dtype in per_token:
        if value is not None:
            checks.tensor(name, value, (tokens,), "[T]", dtype, device)
    for name, value in (("keep_count", keep_count), ("groups", groups), ("min_keep", min_keep)):
        if value is None:
            continue
        checks.tensor(name, value, (batch,), "[B]", torch.int32, device)
        if checks.may_read(value) and batch and (value.min() < 0 or (name == "groups" and value.max() >= batch)):
            legal = f"0..B-1 = 0..{batch - 1}" if name == "groups" else ">= 0"
            raise ValueError(f"{name}: expected {legal}, got {value.min()}..{value.max()}")
    if norm is not None:
        if not isinstance(norm, tuple) or len(norm) != 3:
            raise ValueError(f"norm: expected (weight, bias, eps), got {checks.describe(norm)}")
        checks.tensor("norm weight", weight, (values.shape[1],), "[D]", checks.FLOATS, device)
        if bias is not None:
            checks.tensor("norm bias", bias, (values.shape[1],), "[D]", checks.FLOATS, device)
        checks.positive("norm eps", eps)
    if not isinstance(merged_id, int) or isinstance(merged_id, bool) or not -(2**31) <= merged_id < 2**31:
        raise ValueError(f"merged_id: expected an int32, got {checks.describe(merged_id)}")
    if exact is None:
        exact = device.type == "cpu" and not torch.compiler.is_compiling()
    checks.flag("exact", exact)

    result = call(
        "compact", checks.unit_stride(values), *map(checks.unit_stride, (importance, threshold, keep_count, cu_seqlens)),
        x.max_seqlen, *map(checks.unit_stride, (protected, groups, min_keep, ids, sizes)), merged_id,
        checks.unit_stride(weight), checks.unit_stride(bias), eps, exact, backend or "",
    )  # fmt: skip
    longest = x.max_seqlen
    if exact and not torch.compiler.is_compiling() and device.type == "cpu":
        longest = checks.longest_sample(result[1])
    repeats.remember(key, backend, values, ("compact", "compaction"))
    return compacted(result, longest, exact, sizes, weight)


def compacted(result: tuple, longest: int, exact: bool, sizes: Tensor | None, weight: Tensor | None) -> Compacted:
    """What an implementation returned, for a caller who passed these ``sizes`` and this weight of a LayerNorm or None."""
    values, cu_out, ids_out, sizes_out, normed = result
    return Compacted(
        RaggedBatch.unchecked(values, cu_out, longest, not exact),
        ids_out,
        None if sizes is None else sizes_out,
        None if weight is None else normed,
    )


_dispatch = backends.dispatch("compact", "compaction")


def _run(*args):
    values, cu_out, ids_out, sizes_out, normed = _dispatch(*args)
    # An operator returns tensors; the Triton kernel makes none that nobody asked for.
    sizes_out = values.new_empty(0, dtype=torch.float32) if sizes_out is None else sizes_out
    return values, cu_out, ids_out, sizes_out, values.new_empty(0) if normed is None else normed


def _fake(
    x, importance, threshold, keep_count, cu_seqlens, max_seqlen, protected, groups, min_keep, ids, sizes, merged_id,
    norm_weight, norm_bias, norm_eps, exact, backend,
):  # fmt: skip
    rows = torch.library.get_ctx().new_dynamic_size() if exact else x.shape[0]
    return (
        x.new_empty(rows, x.shape[1]),
        torch.empty_like(cu_seqlens),
        cu_seqlens.new_empty(rows),
        x.new_empty(0 if sizes is None else rows, dtype=torch.float32),
        x.new_empty(0) if norm_weight is None else x.new_empty(rows, x.shape[1]),
    )


def _fake_norm_backward(values, weight, bias, eps, cu_out, d_normed):
    d_bias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return values.new_empty(values.shape), weight.new_empty(weight.shape), d_bias


def _run_backward(x, importance, threshold, keep_count, cu_seqlens, max_seqlen, protected, groups, min_keep, sizes, cu_out,
                  d_values, backend):  # fmt: skip
    # The selection once more, on one column: which row each result row came from.
    rows = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)
    exact = d_values.shape[0] != x.shape[0] and x.device.type == "cpu"
    _, _, source, _, _ = _run(
        importance[:, None].to(x.dtype), importance, threshold, keep_count, cu_seqlens, max_seqlen, protected, groups,
        min_keep, rows, None, -1, None, None, 0.0, exact, backend,
    )  # fmt: skip
    return reference.compact_backward(x, importance, cu_seqlens, sizes, cu_out, source[: d_values.shape[0]], d_values)


def _fake_backward(x, importance, threshold, keep_count, cu_seqlens, max_seqlen, protected, groups, min_keep, sizes, cu_out,
                   d_values, backend):  # fmt: skip
    return x.new_empty(x.shape), importance.new_empty(importance.shape)


def _setup_context(ctx, inputs, output):
    (
        x, importance, threshold, keep_count, cu_seqlens, ctx.max_seqlen, protected, groups, min_keep, _, sizes, _,
        norm_weight, norm_bias, ctx.norm_eps, _, ctx.backend,
    ) = inputs  # fmt: skip
    values, cu_out, ids_out, sizes_out, _ = output
    ctx.mark_non_differentiable(cu_out, ids_out, sizes_out)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x, importance, threshold, keep_count, cu_seqlens, protected, groups, min_keep, sizes, cu_out, values,
        norm_weight, norm_bias,
    )  # fmt: skip


def _backward(ctx, d_values, _cu, _ids, _sizes, d_normed):
    *selection, protected, groups, min_keep, sizes, cu_out, values, norm_weight, norm_bias = ctx.saved_tensors
    d_weight = d_bias = None
    if d_normed is not None and norm_weight is not None:
        through_norm, d_weight, d_bias = torch.ops.madtp_kernels.compact_norm_backward(
            values, norm_weight, norm_bias, ctx.norm_eps, cu_out, d_normed
        )
        d_values = through_norm if d_values is None else d_values + through_norm
        d_bias = None if norm_bias is None else d_bias
    grads = [None] * 17
    if d_values is not None:
        grads[:2] = torch.ops.madtp_kernels.compact_backward(
            *selection, ctx.max_seqlen, protected, groups, min_keep, sizes, cu_out, d_values, ctx.backend
        )
    grads[12:14] = d_weight, d_bias
    return tuple(grads)


define(
    "compact(Tensor x, Tensor importance, Tensor? threshold, Tensor? keep_count, Tensor cu_seqlens, SymInt max_seqlen, "
    "Tensor? protected, Tensor? groups, Tensor? min_keep, Tensor? ids, Tensor? sizes, int merged_id, "
    "Tensor? norm_weight, Tensor? norm_bias, float norm_eps, bool exact, str backend) "
    "-> (Tensor values, Tensor cu_seqlens_out, Tensor ids_out, Tensor sizes_out, Tensor normed)",
    _run,
    _fake,
)
define(
    "compact_backward(Tensor x, Tensor importance, Tensor? threshold, Tensor? keep_count, Tensor cu_seqlens, "
    "SymInt max_seqlen, Tensor? protected, Tensor? groups, Tensor? min_keep, Tensor? sizes, Tensor cu_seqlens_out, "
    "Tensor d_values, str backend) -> (Tensor dx, Tensor d_importance)",
    _run_backward,
    _fake_backward,
)
define(
    "compact_norm_backward(Tensor values, Tensor weight, Tensor? bias, float eps, Tensor cu_seqlens_out, Tensor d_normed) "
    "-> (Tensor d_values, Tensor d_weight, Tensor d_bias)",
    reference.layer_norm_backward,
    _fake_norm_backward,
)
differentiate("compact", _setup_context, _backward)
