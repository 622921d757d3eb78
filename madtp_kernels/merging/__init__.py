"""Choosing tokens and merging them into others: public functions, checks, dispatch, registration, gradient.

`compact` is MADTP's rule in one launch: one merged token per sample, its threshold, its exceptions. Here is what other
pruners do: any choice of tokens, dropped, merged into one row of a sample or into a row they name. The formula is in
`reference.py`, the GPU kernel in `triton.py`, the CPU kernel in `csrc/cpu/ops/merging.cpp`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, repeats, segments
from ..ragged import RaggedBatch
from ..registration import call, define, differentiate
from . import reference

__all__ = ["Merged", "lowest_tokens", "merge_tokens", "top_tokens"]


class Merged(NamedTuple):
    """Result of :func:`merge_tokens`: ``tokens, sizes, rows, source, carried``. All per-token tensors but ``rows`` share the
    offsets of ``tokens``."""

    tokens: RaggedBatch
    """``[T', D]``: the kept tokens in their order, and the appended row of a sample last."""
    sizes: Tensor
    """``[T']`` float32: how many original tokens each row stands for."""
    rows: Tensor
    """``[T]`` int32: the row of the result that stands for each token, -1 for none and in rows beyond the last token; what
    :func:`~madtp_kernels.unmerge` takes."""
    source: Tensor
    """``[T']`` int32: the token that each row is made of first, -1 for an appended row."""
    carried: tuple[Tensor, ...]
    """The carried tensors ``[T', ...]``: each row's is that of its source, zero for an appended row."""


def merge_tokens(
    x: RaggedBatch,
    into: Tensor,
    *,
    weights: Tensor | None = None,
    sizes: Tensor | None = None,
    append: str | None = None,
    carry: tuple[Tensor, ...] = (),
    exact: bool | None = None,
    backend: str | None = None,
) -> Merged:
    """Drop tokens, or merge them into others of their sample.

    ``into`` says where each token goes: its own row: it stays; another's: it is merged into that one; -1: it is dropped.
    :func:`~madtp_kernels.nearest_kept` and :func:`~madtp_kernels.match_tokens` return such rows, and a mask, as
    :func:`top_tokens` makes it, says which tokens stay: the others are dropped. A kept token becomes the weighted mean
    ``sum w x / sum w`` over itself and what is merged into it; alone, or without weight, it stays bit for bit.

    Args:
        x: tokens ``[T, D]``.
        into: ``[T]`` int32 rows of the batch; a token that something is merged into has to stay. Or ``[T]`` bool.
        weights: ``[T]`` float32 ``w``; by default the sizes. They need not be positive.
        sizes: ``[T]`` float32: originals that each token stands for, 1 by default; they add up.
        append: one more row, last, for the dropped tokens of each sample that has any: "sum", the weighted sum as it is
            (EViT), or "mean", divided by the sum of the weights + 1e-8 (MADTP). None: they are gone.
        carry: tensors ``[T, ...]`` of any dtype that follow the kept tokens in the same launch: position ids, rotary tables.
        exact: result buffers without spare rows. This reads the new size on the host, hence the default: True on the CPU,
            False on a device and under torch.compile.
        backend: force an implementation.

    Returns:
        :class:`Merged`. Gradients flow into x, weights and the carried tensors. A sample may lose all its tokens.

    Raises:
        ValueError: an argument does not fit, or (CPU, or debug mode) ``into`` names a row of another sample or one that does not
            stay. BackendError: a backend asked for by name cannot run.
    """
    if not isinstance(x, RaggedBatch):
        raise ValueError(f"x: expected a RaggedBatch of tokens [T, D], got {checks.describe(x)}")
    values, cu_seqlens, device = x.values, x.cu_seqlens, x.device
    checks.floats("x.values", values, 2, "[T, D]")
    tokens = values.shape[0]
    checks.tensor("into", into, (tokens,), "[T]", (torch.int32, torch.bool), device)
    if into.dtype == torch.bool:
        into = torch.arange(tokens, dtype=torch.int32, device=device).masked_fill_(~into, -1)
    elif checks.may_read(into) and backends.resolve("merge_tokens", "merging", backend or "", values)[0] != "cpu":
        _check_into(into, cu_seqlens)  # the CPU kernel looks itself
    if append not in (None, "sum", "mean"):
        raise ValueError(f"append: expected None, 'sum' or 'mean', got {checks.describe(append)}")
    score_dtype = torch.promote_types(values.dtype, torch.float32)
    if weights is not None:
        checks.tensor("weights", weights, (tokens,), "[T]", score_dtype, device)
    if sizes is not None:
        checks.tensor("sizes", sizes, (tokens,), "[T]", torch.float32, device)
    if not isinstance(carry, (tuple, list)):
        raise ValueError(f"carry: expected a tuple of tensors [T, ...], got {checks.describe(carry)}")
    for i, carried in enumerate(carry):
        if not checks.dense(carried) or carried.dim() < 1 or carried.shape[0] != tokens or carried.device != device:
            raise ValueError(
                f"carry[{i}]: expected [T, ...] = [{tokens}, ...] on {device}, got {checks.describe(carried)}"
            )
    if exact is None:
        exact = device.type == "cpu" and not torch.compiler.is_compiling()
    checks.flag("exact", exact)
    sizes = values.new_ones(tokens, dtype=torch.float32) if sizes is None else sizes
    weights = sizes.to(score_dtype) if weights is None else weights
    merged, cu_out, sizes_out, rows, source, carried = call(
        "merge_tokens",
        checks.unit_stride(values), *map(checks.unit_stride, (into, weights, sizes, cu_seqlens)), x.max_seqlen, append or "",
        exact, tuple(carry), backend or "",
    )  # fmt: skip
    longest = x.max_seqlen
    if exact and not torch.compiler.is_compiling() and device.type == "cpu":
        longest = checks.longest_sample(cu_out)
    batch = RaggedBatch.unchecked(merged, cu_out, longest, not exact)
    return Merged(batch, sizes_out, rows, source, tuple(carried))


def _check_into(into: Tensor, cu_seqlens: Tensor) -> None:
    defined = into[: int(cu_seqlens[-1])].long()
    row = torch.arange(len(defined), device=into.device)
    sample = segments.sample_of(cu_seqlens, len(defined))
    inside = (defined >= -1) & (defined < len(defined))
    target = defined.where(inside & (defined >= 0), row)
    bad = ~inside | (defined >= 0) & ((sample[target] != sample) | (defined[target] != target))
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"into: expected -1 or a row of the same sample that stays, got {int(into[first])} for token {first}"
        )


def top_tokens(
    scores: Tensor,
    count: int | Tensor | None,
    cu_seqlens: Tensor,
    *,
    threshold: float | Tensor | None = None,
    protected: int | Tensor = 0,
    unit: int = 1,
) -> Tensor:
    """The tokens of highest score of every sample, as a mask; ties: the earlier token.

    In PyTorch's own operators on every device (two stable sorts, none without a count); nothing waits for it.

    Args:
        scores: ``[T]`` floating point.
        count: how many tokens (of units: how many units) to keep in each sample: one number, or ``[B]`` int32. 0 is legal; more
            than there are keeps all. None: all above the threshold.
        cu_seqlens: ``[B+1]`` int32 offsets.
        threshold: keep tokens of higher score only: a number, or ``[B]`` in the dtype of the scores.
        protected: tokens that are kept besides, and do not count: the first so many of each sample (class and register
            tokens), or ``[T]`` bool. Of units: a unit with such a token.
        unit: runs of so many rows stay or go together, by their mean score (the 2 x 2 patches that Qwen-VL merges): every
            length is a multiple of it.

    Returns:
        ``[T]`` bool; False in rows beyond the last sample.

    Raises:
        ValueError: an argument does not fit, or (CPU, or debug mode) a negative count, scores that are not finite, or a length
            that is no multiple of the unit.
    """
    if not checks.dense(scores) or scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(f"scores: expected floating-point [T], got {checks.describe(scores)}")
    checks.offsets("cu_seqlens", cu_seqlens, "T", 2**31 - 1, scores, "scores")
    checks.finite("scores", scores, cu_seqlens)
    batch, capacity, device = cu_seqlens.shape[0] - 1, scores.shape[0], scores.device
    count = checks.counts(count, cu_seqlens)
    if isinstance(threshold, Tensor):
        checks.tensor("threshold", threshold, (batch,), "[B]", scores.dtype, device)
        if checks.may_read(threshold) and threshold.isnan().any():
            raise ValueError("threshold: expected numbers, got NaN")
    elif threshold is not None and (not isinstance(threshold, (int, float)) or threshold != threshold):
        raise ValueError(f"threshold: expected a number or [B], got {checks.describe(threshold)}")
    if count is None and threshold is None:
        raise ValueError("count, threshold: expected at least one of them, got neither")
    if isinstance(protected, Tensor):
        checks.tensor("protected", protected, (capacity,), "[T]", torch.bool, device)
    elif not checks.is_integer(protected, 0):
        raise ValueError(f"protected: expected an int >= 0 or bool [T], got {checks.describe(protected)}")
    if not checks.is_integer(unit, 1):
        raise ValueError(f"unit: expected an int >= 1, got {checks.describe(unit)}")
    row = torch.arange(capacity, device=device)
    valid = row < cu_seqlens[-1]
    if batch == 0:
        return valid
    sample = segments.sample_of(cu_seqlens, capacity)
    guarded = valid & (protected if isinstance(protected, Tensor) else row - cu_seqlens[sample] < protected)
    if unit > 1:
        if checks.may_read(cu_seqlens) and (cu_seqlens % unit).any():
            raise ValueError(
                f"cu_seqlens: expected lengths that are multiples of the unit {unit}, got {cu_seqlens.tolist()}"
            )
        units, shared = (t[: capacity // unit * unit].unflatten(0, (-1, unit)) for t in (scores, guarded))
        chosen = top_tokens(units.mean(1), count, cu_seqlens // unit, threshold=threshold, protected=shared.any(1))
        return torch.cat([chosen.repeat_interleave(unit), chosen.new_zeros(capacity % unit)])
    ranked = valid & ~guarded
    if threshold is not None:
        ranked &= scores > (threshold[sample] if isinstance(threshold, Tensor) else threshold)
    if count is None:
        return ranked | guarded
    # By score, then by sample; what is not ranked stands behind the others of its sample.
    order = scores.where(ranked, float("-inf")).argsort(descending=True, stable=True)
    order = order[sample.where(valid, batch)[order].argsort(stable=True)]
    place = torch.empty_like(order).index_copy_(0, order, row) - cu_seqlens[sample]
    return ranked & (place < count[sample]) | guarded


def lowest_tokens(
    scores: Tensor,
    count: Tensor | None,
    cu_seqlens: Tensor,
    *,
    free: Tensor,
    threshold: float | None = None,
    share: float = 1.0,
    uncounted: int = 0,
    backend: str | None = None,
) -> Tensor:
    """The tokens of lowest score of every sample, as a mask: what goes, where :func:`top_tokens` says what stays.

    Args:
        scores: ``[T]`` float32 (or float64).
        count: ``[B]`` int32: at most so many of each sample; None: no such limit. Of equal scores the later token.
        cu_seqlens: ``[B+1]`` int32 offsets.
        free: ``[T]`` bool: the tokens to choose from.
        threshold: only tokens whose score is at most this.
        share: at most this share of a sample's tokens without ``uncounted`` of them, rounded down; the product is one of float32.
        backend: force an implementation.

    Returns:
        ``[T]`` bool; False in rows beyond the last sample.

    Raises:
        ValueError: an argument does not fit, or (CPU, or debug mode) a negative count or scores that are not finite.
            BackendError: a backend asked for by name cannot run.
    """
    key = repeats.signature(lowest_tokens, (scores, count, cu_seqlens, free), (threshold, share, uncounted, backend))
    if repeat := repeats.find(key):
        return repeat(
            scores, count, cu_seqlens, free, None if threshold is None else float(threshold), float(share), uncounted
        )
    if not checks.dense(scores) or scores.dim() != 1 or scores.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"scores: expected float32 or float64 [T], got {checks.describe(scores)}")
    checks.offsets("cu_seqlens", cu_seqlens, "T", 2**31 - 1, scores, "scores")
    checks.finite("scores", scores, cu_seqlens)
    if count is not None:
        checks.tensor("count", count, (cu_seqlens.shape[0] - 1,), "[B]", torch.int32, scores.device)
        if checks.may_read(count) and len(count) and count.min() < 0:
            raise ValueError(f"count: expected >= 0, got {count.min()}")
    checks.tensor("free", free, (scores.shape[0],), "[T]", torch.bool, scores.device)
    check_choice(threshold, share, uncounted)
    result = call(
        "lowest_tokens", *map(checks.unit_stride, (scores.detach(), count, cu_seqlens, free)),
        None if threshold is None else float(threshold), float(share), uncounted, backend or "",
    )  # fmt: skip
    repeats.remember(key, backend, scores, ("lowest_tokens", "merging"))
    return result


def check_choice(threshold: float | None, share: float, uncounted: int) -> None:
    """Check the numbers by which :func:`lowest_tokens` chooses."""
    if threshold is not None and (not isinstance(threshold, (int, float)) or threshold != threshold):
        raise ValueError(f"threshold: expected a number, got {checks.describe(threshold)}")
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"share: expected a number from 0 to 1, got {checks.describe(share)}")
    if not checks.is_integer(uncounted, 0):
        raise ValueError(f"uncounted: expected an int >= 0, got {checks.describe(uncounted)}")


def counts_of(
    cu_seqlens: Tensor, *, count: Tensor | int | None = None, portion: float | None = None, uncounted: int = 0
) -> Tensor | None:
    """What :func:`lowest_tokens` takes as count, from the count or the portion of :func:`~madtp_kernels.merge_redundant`."""
    if portion is None:
        return count if isinstance(count, Tensor) else checks.counts(count, cu_seqlens)  # a tensor is looked at later
    if count is not None:
        raise ValueError("count, portion: expected at most one of them, got both")
    if isinstance(portion, bool) or not isinstance(portion, (int, float)) or not 0 <= portion <= 1:
        raise ValueError(f"portion: expected a share from 0 to 1, got {checks.describe(portion)}")
    return ((cu_seqlens.diff() - uncounted).clamp(min=0) * float(portion)).round().int()


def _fake(x, into, weights, sizes, cu_seqlens, max_seqlen, append, exact, carry, backend):
    rows = torch.library.get_ctx().new_dynamic_size() if exact else x.shape[0]
    return (
        x.new_empty(rows, x.shape[1]),
        torch.empty_like(cu_seqlens),
        sizes.new_empty(rows),
        into.new_empty(x.shape[0]),
        into.new_empty(rows),
        [tensor.new_empty((rows, *tensor.shape[1:])) for tensor in carry],
    )


def _differentiable(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def _setup_context(ctx, inputs, output):
    x, _, weights, _, _, _, ctx.append, _, carry, _ = inputs
    *_, rows, source, carried = output
    ctx.mark_non_differentiable(*output[1:5], *(t for t in carried if not _differentiable(t)))
    ctx.save_for_backward(x, weights, rows, source)
    ctx.differentiable = [_differentiable(tensor) for tensor in carry]


def _backward(ctx, d_values, _cu, _sizes, _rows, _source, d_carried):
    x, weights, rows, source = ctx.saved_tensors
    dx, d_weights = torch.ops.madtp_kernels.merge_tokens_backward(x, weights, rows, source, ctx.append, d_values)
    d_carry = [
        reference.follow_backward(d, source, x.shape[0]) if differentiable else None
        for differentiable, d in zip(ctx.differentiable, d_carried, strict=True)
    ]
    return dx, None, d_weights, None, None, None, None, None, d_carry, None


define(
    "lowest_tokens(Tensor scores, Tensor? count, Tensor cu_seqlens, Tensor free, float? threshold, float share, int uncounted, "
    "str backend) -> Tensor",
    backends.dispatch("lowest_tokens", "merging"),
    lambda scores, count, cu_seqlens, free, *_: torch.empty_like(free),
)
define(
    "merge_tokens(Tensor x, Tensor into, Tensor weights, Tensor sizes, Tensor cu_seqlens, SymInt max_seqlen, str append, "
    "bool exact, Tensor[] carry, str backend) "
    "-> (Tensor values, Tensor cu_seqlens_out, Tensor sizes_out, Tensor rows, Tensor source, Tensor[] carried)",
    backends.dispatch("merge_tokens", "merging"),
    _fake,
)
define(
    "merge_tokens_backward(Tensor x, Tensor weights, Tensor rows, Tensor source, str append, Tensor d_values) "
    "-> (Tensor dx, Tensor d_weights)",
    reference.merge_tokens_backward,
    lambda x, weights, *_: (x.new_empty(x.shape), weights.new_empty(weights.shape)),
)
differentiate("merge_tokens", _setup_context, _backward)
