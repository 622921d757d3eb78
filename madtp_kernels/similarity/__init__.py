"""Which tokens of a sample have alike keys: public functions, checks, dispatch, registration, gradient.

Training-free merging is made of these: the survivor a dropped token is merged into, how little a token adds to those that
matter more, and ToMe's matching. Formulas are in `reference.py`, the GPU kernels in `triton.py`, the CPU kernels in
`csrc/cpu/ops/similarity.cpp`. Cosines are computed tile by tile: no L x L matrix is stored.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends, checks, repeats
from ..registration import call, define, define_gradient
from . import reference

__all__ = ["MergeScores", "match_tokens", "merge_scores", "nearest_kept", "novelty"]


class MergeScores(NamedTuple):
    """Result of :func:`merge_scores`, ``[T]`` float32 each (float64 for float64 keys)."""

    scores: Tensor
    """What merging a token would cost; 0 of one that is not free, and where it is not a number."""
    novelty: Tensor
    """That of :func:`novelty` by rank."""
    inverse_norms: Tensor
    """``1 / |k|`` of each key, 0 of one that is zero or not finite; what :func:`nearest_kept` takes."""


def _rows(keys: Tensor) -> Tensor:
    """``[T, D]`` or ``[T, H, d]`` keys as ``[T, D]`` rows of unit stride: heads are concatenated."""
    if not checks.dense(keys) or keys.dim() not in (2, 3) or keys.dtype not in checks.FLOATS or 0 in keys.shape[1:]:
        meaning = "[T, D] or [T, H, d] with at least one feature"
        raise ValueError(f"keys: expected floating-point {meaning}, got {checks.describe(keys)}")
    return checks.unit_stride(keys.flatten(1))


def nearest_kept(
    keys: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    goes: Tensor | None = None,
    inverse_norms: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """For each token the kept token of its sample whose key is the most similar (cosine): what a dropped one merges into.

    Args:
        keys: ``[T, D]`` or ``[T, H, d]``: the cosine is that of all features, heads concatenated. Their mean, as ToMe takes
            it, is ``keys.mean(1)``. A key that is zero, or that is not finite, has cosine 0 with every key; so has one whose
            squares float32 does not hold (its numbers should lie within 1e-19 and 1e18).
        kept: ``[T]`` bool: the tokens that stay.
        cu_seqlens, max_seqlen: offsets ``[B+1]`` int32 and an upper bound of the lengths.
        goes: ``[T]`` bool: the tokens that look for one; every other's row is its own. By default all do. With it, the result is
            what :func:`~madtp_kernels.merge_tokens` takes.
        inverse_norms: ``[T]`` float32 (float64 for float64 keys), as :func:`merge_scores` returns them for the same keys: saves
            reading the keys once more, and changes no bit. Nobody checks that they belong to the keys.
        backend: force an implementation.

    Returns:
        ``[T]`` int32 rows of the batch: a kept token's own; -1 where no token of the sample is kept. Among equally similar
        ones the first counts. Carries no gradient.

    Raises:
        ValueError: an argument does not fit. BackendError: a backend asked for by name cannot run.
    """
    key = repeats.signature(nearest_kept, (keys, kept, cu_seqlens, goes, inverse_norms), (max_seqlen, backend))
    if repeat := repeats.find(key):
        return repeat(keys.flatten(1), kept, cu_seqlens, max_seqlen, goes, inverse_norms)
    rows = _rows(keys)
    checks.tensor("kept", kept, (keys.shape[0],), "[T]", torch.bool, keys.device)
    if goes is not None:
        checks.tensor("goes", goes, (keys.shape[0],), "[T]", torch.bool, keys.device)
    if inverse_norms is not None:
        wide = torch.promote_types(keys.dtype, torch.float32)
        checks.tensor("inverse_norms", inverse_norms, (keys.shape[0],), "[T]", wide, keys.device)
        inverse_norms = checks.unit_stride(inverse_norms.detach())
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, keys, "keys")
    result = call(
        "nearest_kept", rows.detach(), checks.unit_stride(kept), checks.unit_stride(cu_seqlens), max_seqlen,
        checks.unit_stride(goes), inverse_norms, backend or "",
    )  # fmt: skip
    repeats.remember(key, backend, rows, ("nearest_kept", "similarity"))
    return result


def novelty(
    keys: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, rank: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """How unlike the other tokens of its sample a token is: ``1 - max_j cos(k_i, k_j)``.

    Args:
        keys, cu_seqlens, max_seqlen, backend: as in :func:`nearest_kept`.
        rank: ``[T]`` float32: compare with tokens of higher rank only (equal ranks: with earlier ones). Of a group of like
            tokens the one of highest rank then is novel, where without a rank none would be.

    Returns:
        ``[T]`` float32 (float64 for float64 keys) from 0 (there is a copy) to 2; a token without others to compare with has 2.
        Gradients flow into the keys.

    Raises:
        ValueError: an argument does not fit, or (CPU, or debug mode) a rank that is not finite. BackendError: a backend
            asked for by name cannot run.
    """
    rows = _rows(keys)
    if rank is not None:
        checks.tensor(
            "rank", rank, (keys.shape[0],), "[T]", torch.promote_types(keys.dtype, torch.float32), keys.device
        )
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, keys, "keys")
    if rank is not None:
        checks.finite("rank", rank, cu_seqlens)
    return call("novelty", rows, checks.unit_stride(rank), checks.unit_stride(cu_seqlens), max_seqlen, backend or "")[0]


def merge_scores(
    keys: Tensor,
    order: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    weight: Tensor | None = None,
    sizes: Tensor | None = None,
    free: Tensor,
    weight_exponent: float = 0.25,
    novelty_exponent: float = 1.0,
    size_exponent: float = 0.3,
    backend: str | None = None,
) -> MergeScores:
    """What merging a token would cost: little if one that matters more is like it, or if it does not matter itself.

    With n the novelty of :func:`novelty` by rank ``order``, a the weight and s the sizes of a sample's free tokens:

        score = (a / mean a) ^ weight_exponent * n ^ novelty_exponent * s ^ size_exponent

    Args:
        keys, cu_seqlens, max_seqlen, backend: as in :func:`nearest_kept`.
        order: ``[T]`` float32 >= 0: what a token matters; tokens are compared with those of higher order only.
        weight: ``[T]`` float32 >= 0; by default the order.
        sizes: ``[T]`` float32; by default 1.
        free: ``[T]`` bool: the tokens that may go. None is compared with the others, which score 0.

    Returns:
        :class:`MergeScores`. Nothing in it carries a gradient.

    Raises:
        ValueError: an argument does not fit, or (CPU, or debug mode) an order or a weight that is not finite. BackendError: a
            backend asked for by name cannot run.
    """
    exponents = (weight_exponent, novelty_exponent, size_exponent)
    key = repeats.signature(
        merge_scores, (keys, order, weight, sizes, free, cu_seqlens), (max_seqlen, *exponents, backend)
    )
    if repeat := repeats.find(key):
        return MergeScores(*repeat(keys.flatten(1), order, weight, sizes, free, cu_seqlens, max_seqlen, *exponents))
    rows, shape = _rows(keys), (keys.shape[0],)
    wide = torch.promote_types(keys.dtype, torch.float32)
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, keys, "keys")
    checks.tensor("order", order, shape, "[T]", wide, keys.device)
    checks.finite("order", order, cu_seqlens)
    if weight is not None:
        checks.tensor("weight", weight, shape, "[T]", wide, keys.device)
        checks.finite("weight", weight, cu_seqlens)
    if sizes is not None:
        checks.tensor("sizes", sizes, shape, "[T]", torch.float32, keys.device)
    checks.tensor("free", free, shape, "[T]", torch.bool, keys.device)
    check_exponents(exponents)
    weight = None if weight is None else weight.detach()
    result = call(
        "merge_scores", rows.detach(), *map(checks.unit_stride, (order.detach(), weight, sizes, free, cu_seqlens)),
        max_seqlen, *exponents, backend or "",
    )  # fmt: skip
    repeats.remember(key, backend, rows, ("merge_scores", "similarity"))
    return MergeScores(*result)


def check_exponents(exponents: tuple[float, float, float]) -> None:
    """Check the exponents of :func:`merge_scores`."""
    for name, value in zip(("weight_exponent", "novelty_exponent", "size_exponent"), exponents, strict=True):
        checks.number(name, value)


def match_tokens(
    keys: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    count: int | Tensor | None = None,
    threshold: float | None = None,
    protected: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ToMe's bipartite soft matching (arXiv 2210.09461, section 3.1): pairs of tokens to merge, in every sample its own.

    Each token at an even position finds the most similar token at an odd one; the pairs with the highest cosine are matched.

    Args:
        keys, cu_seqlens, max_seqlen, backend: as in :func:`nearest_kept`. ToMe takes the mean over heads, ``keys.mean(1)``.
        count: at most this many pairs in each sample: one number, or ``[B]`` int32; never more than half of its unprotected
            tokens. Equal cosines: the earlier token. None: as many as the threshold lets pass.
        threshold: only pairs whose cosine is above it. At least one of count and threshold is given.
        protected: tokens at the head of each sample (class, distillation, registers) that are not merged in either direction.

    Returns:
        ``into [T]`` int32: the row of the batch that each token is merged into, its own if it stays; and ``similarity [T]``
        float32: the best cosine of every token that looked for a partner, matched or not, -inf for the others. Neither
        carries a gradient.

    Raises:
        ValueError: an argument does not fit. BackendError: a backend asked for by name cannot run.
    """
    rows = _rows(keys)
    checks.offsets("cu_seqlens", cu_seqlens, "max_seqlen", max_seqlen, keys, "keys")
    if count is None and threshold is None:
        raise ValueError("count, threshold: expected at least one of them, got neither")
    count = checks.counts(count, cu_seqlens)
    if threshold is not None and (not isinstance(threshold, (int, float)) or threshold != threshold):
        raise ValueError(f"threshold: expected a number, got {checks.describe(threshold)}")
    if not checks.is_integer(protected, 0):
        raise ValueError(f"protected: expected an int >= 0, got {checks.describe(protected)}")
    protected = min(protected, 2**30)  # longer than any sample, and kernels add to it in 32 bits
    return call(
        "match_tokens", rows.detach(), checks.unit_stride(cu_seqlens), max_seqlen, checks.unit_stride(count),
        None if threshold is None else float(threshold), protected, backend or "",
    )  # fmt: skip


def _match_tokens(keys, cu_seqlens, max_seqlen, count, threshold, protected, backend):
    if threshold is not None and keys.dtype != torch.float64:
        # To the precision of the cosines, so that every backend compares them with the same number.
        threshold = ctypes.c_float(threshold).value
    return backends.dispatch("match_tokens", "similarity")(
        keys, cu_seqlens, max_seqlen, count, threshold, protected, backend
    )


def _per_token(keys, *dtypes):
    dtype = torch.promote_types(keys.dtype, torch.float32)
    return tuple(keys.new_empty(keys.shape[0], dtype=d or dtype) for d in dtypes)


define(
    "nearest_kept(Tensor keys, Tensor kept, Tensor cu_seqlens, SymInt max_seqlen, Tensor? goes, Tensor? inverse_norms, "
    "str backend) -> Tensor",
    backends.dispatch("nearest_kept", "similarity"),
    lambda keys, *_: _per_token(keys, torch.int32)[0],
)
define(
    "novelty(Tensor keys, Tensor? rank, Tensor cu_seqlens, SymInt max_seqlen, str backend) "
    "-> (Tensor novelty, Tensor nearest)",
    backends.dispatch("novelty", "similarity"),
    lambda keys, *_: _per_token(keys, None, torch.int32),
)
define_gradient(
    "novelty_backward(Tensor keys, Tensor nearest, Tensor cu_seqlens, Tensor d_novelty) -> (Tensor d_keys)",
    reference.novelty_backward,
)
define(
    "merge_scores(Tensor keys, Tensor order, Tensor? weight, Tensor? sizes, Tensor free, Tensor cu_seqlens, SymInt max_seqlen, "
    "float weight_exponent, float novelty_exponent, float size_exponent, str backend) "
    "-> (Tensor scores, Tensor novelty, Tensor inverse_norms)",
    backends.dispatch("merge_scores", "similarity"),
    lambda keys, *_: _per_token(keys, None, None, None),
)
define(
    "match_tokens(Tensor keys, Tensor cu_seqlens, SymInt max_seqlen, Tensor? count, float? threshold, int protected, "
    "str backend) -> (Tensor into, Tensor similarity)",
    _match_tokens,
    lambda keys, *_: _per_token(keys, torch.int32, None),
)
