"""Scores, choice and merging together: what one layer of ranked novelty does to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, native, repeats
from .beside import late
from .merging import Merged, check_choice, counts_of, lowest_tokens, merge_tokens
from .normalization import layer_norm
from .ragged import RaggedBatch
from .registration import at_once, in_one_call
from .similarity import check_exponents, merge_scores, nearest_kept

__all__ = ["MergedRedundant", "merge_redundant"]


class MergedRedundant(NamedTuple):
    """Result of :func:`merge_redundant`."""

    merged: Merged
    scores: Tensor
    """``[T]`` float32 (float64 for float64 keys): what merging each token would have cost."""
    normed: Tensor | None = None
    """``[T', D]``: the tokens that are left after LayerNorm; None if not asked for."""
    log_sizes: Tensor | None = None
    """``[T']`` float32 (float64 for float64 tokens): the logarithms of their sizes; None if not asked for."""


def merge_redundant(
    x: RaggedBatch,
    keys: Tensor,
    order: Tensor,
    *,
    free: Tensor,
    weight: Tensor | None = None,
    sizes: Tensor | None = None,
    count: Tensor | int | None = None,
    portion: float | None = None,
    threshold: float | None = None,
    share: float = 1.0,
    uncounted: int = 0,
    weight_exponent: float = 0.25,
    novelty_exponent: float = 1.0,
    size_exponent: float = 0.3,
    carry: tuple[Tensor, ...] = (),
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    with_log_sizes: bool = False,
    exact: bool | None = None,
    backend: str | None = None,
) -> MergedRedundant:
    """Merge the tokens that cost least, each into the most similar of the free ones that stay.

    These are :func:`~madtp_kernels.merge_scores`, :func:`~madtp_kernels.lowest_tokens`, :func:`~madtp_kernels.nearest_kept` and
    :func:`~madtp_kernels.merge_tokens`, one after the other; on a CPU one call of the extension, on a GPU five launches.

    Args:
        x: tokens ``[T, D]``.
        keys: ``[T, H, d]`` or ``[T, K]``: what tokens are compared by.
        order, weight, sizes, weight_exponent, novelty_exponent, size_exponent: as in
            :func:`~madtp_kernels.merge_scores`; the sizes also weigh what is merged.
        free: ``[T]``: the tokens that may go: bool, or int32 of which 0 says no, such as positions where only the first token of
            a sample stays.
        count: at most so many of each sample: one number, or ``[B]`` int32.
        portion: at most this share of a sample's tokens without ``uncounted`` of them, rounded to the nearest number, from a half
            to the even one; the product is one of float32. Not with a count.
        threshold, share, uncounted: as in :func:`~madtp_kernels.lowest_tokens`.
        carry, exact: as in :func:`~madtp_kernels.merge_tokens`.
        norm: weight ``[D]``, bias ``[D]`` or None, and eps of a LayerNorm that follows.
        with_log_sizes: return the logarithms of the sizes, too: what proportional attention adds to the logits of keys.
        backend: force an implementation of all four.

    Returns:
        :class:`MergedRedundant`. Where all free tokens of a sample go none is left to merge them into: they are dropped.
        Gradients flow into x, the carried tensors, and weight and bias of the LayerNorm.

    Raises:
        ValueError, BackendError: as the four operations.
    """
    key, exponents = None, (weight_exponent, novelty_exponent, size_exponent)
    if not isinstance(x, RaggedBatch):
        raise ValueError(f"x: expected a RaggedBatch of tokens [T, D], got {checks.describe(x)}")
    (values, join), cu_seqlens = late(x), x.cu_seqlens
    number, counts = (None, count) if count is None or isinstance(count, Tensor) else (count, None)
    if norm is not None and not (isinstance(norm, tuple) and len(norm) == 3):
        raise ValueError(
            f"norm: expected a tuple of weight [D], bias [D] or None, and eps, got {checks.describe(norm)}"
        )
    if isinstance(carry, tuple):
        norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
        tensors = (values, keys, order, weight, sizes, free, counts, cu_seqlens, norm_weight, norm_bias)
        chosen = (threshold, share, portion, number, uncounted)
        options = (x.max_seqlen, exponents, chosen, eps, with_log_sizes, bool(exact))
        told_apart = (x.max_seqlen, *exponents, *chosen, eps, with_log_sizes, exact, len(carry), backend)
        key = repeats.signature(merge_redundant, (*tensors, *carry), told_apart)
        if repeat := repeats.find(key):
            return repeat(tensors, carry, join, *options)
    counts = counts_of(cu_seqlens, count=count, portion=portion, uncounted=uncounted)
    found = None
    deciding = ("merge_tokens", "merging", values), ("merge_scores", "similarity", keys)
    if values.device.type == "cpu" and isinstance(keys, Tensor) and isinstance(carry, tuple):
        tensors = (values, keys, order, weight, sizes, free, counts, cu_seqlens)
        choice = (threshold, share, uncounted)
        if in_one_call((*tensors, *carry), backend, *deciding):
            check_choice(*choice)
            check_exponents(exponents)
            found = _on_cpu(tensors, x.max_seqlen, choice, exponents, with_log_sizes, exact, carry)
    if found is None:
        free = free != 0 if isinstance(free, Tensor) and free.dtype == torch.int32 else free
        scores, _, inverse_norms = merge_scores(
            keys, order, cu_seqlens, x.max_seqlen, weight=weight, sizes=sizes, free=free, weight_exponent=weight_exponent,
            novelty_exponent=novelty_exponent, size_exponent=size_exponent, backend=backend,
        )  # fmt: skip
        goes = lowest_tokens(
            scores,
            counts,
            cu_seqlens,
            free=free,
            threshold=threshold,
            share=share,
            uncounted=uncounted,
            backend=backend,
        )
        stays = free > goes  # free and not going, in one operation
        into = nearest_kept(
            keys, stays, cu_seqlens, x.max_seqlen, goes=goes, inverse_norms=inverse_norms, backend=backend
        )
        found = MergedRedundant(merge_tokens(x, into, sizes=sizes, carry=carry, exact=exact, backend=backend), scores)
    left = found.merged
    if norm is not None:
        norm_weight, norm_bias, eps = norm
        normed = layer_norm(left.tokens.values, norm_weight, norm_bias, left.tokens.cu_seqlens, eps, backend=backend)
        found = found._replace(normed=normed)
    if with_log_sizes and found.log_sizes is None:
        found = found._replace(log_sizes=left.sizes.to(torch.promote_types(x.dtype, torch.float32)).log())
    if key is not None and x.max_seqlen and len(values) and len(cu_seqlens) > 1:
        served = [backends.resolve(op, package, backend or "", leading)[0] for op, package, leading in deciding]
        if served == ["triton", "triton"]:
            steps = (
                ("find_redundant", "similarity"), ("choose_redundant", "merging"), ("find_kept", "similarity"),
                ("merge_redundant", "merging"),
            )  # fmt: skip
            repeats.remember(key, backend, keys, *steps, run=_on_gpu)
    return found


def _on_gpu(
    find: Callable,
    choose: Callable,
    search: Callable,
    merge: Callable,
    tensors: tuple,
    carry: tuple,
    join: Callable[[], None] | None,
    longest: int,
    exponents: tuple,
    choice: tuple,
    eps: float,
    with_log_sizes: bool,
    exact: bool,
) -> MergedRedundant:
    """Two launches find what scores are made of; one scores, chooses and numbers the rows; one searches, and the last merges."""
    x, keys, order, weight, sizes, free, count, cu_seqlens, norm_weight, norm_bias = tensors
    keys = keys.flatten(1)
    best, scale = find(keys, order, free, cu_seqlens, longest)
    weight = order if weight is None else weight
    scores, numbering = choose(best, scale, weight, sizes, free, count, cu_seqlens, longest, exponents, *choice)
    _, listed, numbers, *_ = numbering
    search(keys, scale, best, listed, numbers, cu_seqlens, longest)
    if join is not None:
        join()
    values, cu_out, sizes_out, rows, source, carried, normed, log_sizes = merge(
        x, best, numbering, sizes, cu_seqlens, longest, exact, carry, norm_weight, norm_bias, eps, with_log_sizes
    )
    batch = RaggedBatch.unchecked(values, cu_out, longest, not exact)
    return MergedRedundant(Merged(batch, sizes_out, rows, source, tuple(carried)), scores, normed, log_sizes)


def _on_cpu(
    tensors: tuple,
    max_seqlen: int,
    choice: tuple,
    exponents: tuple,
    with_log_sizes: bool,
    exact: bool | None,
    carry: tuple,
) -> MergedRedundant | None:
    """None where something does not fit: the operations one by one say what."""
    exact = True if exact is None else exact
    checks.flag("exact", exact)
    options = (max_seqlen, *choice, *exponents, with_log_sizes, exact, carry)
    found = at_once(native.load().merge_redundant, *tensors, *options)
    if found is None or found[0] is None:
        return None
    values, cu_out, sizes, rows, source, carried, scores, log_sizes, total, longest = found
    checks.know_offsets(cu_out, total, longest)
    batch = RaggedBatch.unchecked(values, cu_out, longest if exact else max_seqlen, not exact)
    return MergedRedundant(Merged(batch, sizes, rows, source, tuple(carried)), scores, log_sizes=log_sizes)
