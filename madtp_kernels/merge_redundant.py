"""Scores, choice and merging together: what one layer of ranked novelty does to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, native, repeats
from .beside import late
from .merging import Merged, check_choice, lowest_tokens, merge_tokens
from .ragged import RaggedBatch
from .registration import in_one_call
from .similarity import check_exponents, merge_scores, nearest_kept

__all__ = ["MergedRedundant", "merge_redundant"]


class MergedRedundant(NamedTuple):
    """Result of :func:`merge_redundant`."""

    merged: Merged
    scores: Tensor
    """``[T]`` float32 (float64 for float64 keys): what merging each token would have cost."""


def merge_redundant(
    x: RaggedBatch,
    keys: Tensor,
    order: Tensor,
    *,
    free: Tensor,
    weight: Tensor | None = None,
    sizes: Tensor | None = None,
    count: Tensor | None = None,
    threshold: float | None = None,
    share: float = 1.0,
    uncounted: int = 0,
    weight_exponent: float = 0.25,
    novelty_exponent: float = 1.0,
    size_exponent: float = 0.3,
    carry: tuple[Tensor, ...] = (),
    exact: bool | None = None,
    backend: str | None = None,
) -> MergedRedundant:
    """Merge the tokens that cost least, each into the most similar of the free ones that stay.

    These are :func:`~madtp_kernels.merge_scores`, :func:`~madtp_kernels.lowest_tokens`, :func:`~madtp_kernels.nearest_kept` and
    :func:`~madtp_kernels.merge_tokens`, one after the other; on a CPU one call of the extension.

    Args:
        x: tokens ``[T, D]``.
        keys: ``[T, H, d]`` or ``[T, K]``: what tokens are compared by.
        order, free, weight, sizes, weight_exponent, novelty_exponent, size_exponent: as in
            :func:`~madtp_kernels.merge_scores`; the sizes also weigh what is merged.
        count, threshold, share, uncounted: as in :func:`~madtp_kernels.lowest_tokens`.
        carry, exact: as in :func:`~madtp_kernels.merge_tokens`.
        backend: force an implementation of all four.

    Returns:
        :class:`MergedRedundant`. Where all free tokens of a sample go none is left to merge them into: they are dropped.
        Gradients flow into x and the carried tensors.

    Raises:
        ValueError, BackendError: as the four operations.
    """
    key, exponents = None, (weight_exponent, novelty_exponent, size_exponent)
    if isinstance(x, RaggedBatch) and isinstance(carry, tuple):
        values, join = late(x)
        tensors, choice = (
            (values, keys, order, weight, sizes, free, count, x.cu_seqlens),
            (threshold, share, uncounted),
        )
        deciding = ("merge_tokens", "merging", values), ("merge_scores", "similarity", keys)
        on_cpu = values.device.type == "cpu" and isinstance(keys, Tensor)
        if on_cpu and in_one_call((*tensors, *carry), backend, *deciding):
            check_choice(*choice)
            check_exponents(exponents)
            found = _on_cpu(tensors, x.max_seqlen, choice, exponents, exact, carry)
            if found is not None:
                return found
        key = repeats.signature(
            merge_redundant, (*tensors, *carry), (x.max_seqlen, choice, exponents, exact, len(carry), backend)
        )
        if repeat := repeats.find(key):
            return repeat(tensors, x.max_seqlen, choice, exponents, bool(exact), carry, join)
    if not isinstance(x, RaggedBatch):
        raise ValueError(f"x: expected a RaggedBatch of tokens [T, D], got {checks.describe(x)}")
    scores, _, inverse_norms = merge_scores(
        keys, order, x.cu_seqlens, x.max_seqlen, weight=weight, sizes=sizes, free=free, weight_exponent=weight_exponent,
        novelty_exponent=novelty_exponent, size_exponent=size_exponent, backend=backend,
    )  # fmt: skip
    goes = lowest_tokens(
        scores, count, x.cu_seqlens, free=free, threshold=threshold, share=share, uncounted=uncounted, backend=backend
    )
    stays = free > goes  # free and not going, in one operation
    into = nearest_kept(
        keys, stays, x.cu_seqlens, x.max_seqlen, goes=goes, inverse_norms=inverse_norms, backend=backend
    )
    merged = merge_tokens(x, into, sizes=sizes, carry=carry, exact=exact, backend=backend)
    operations = (
        ("merge_scores", "similarity"), ("lowest_tokens", "merging"), ("nearest_kept", "similarity"), ("merge_tokens", "merging"),
    )  # fmt: skip
    repeats.remember(key, backend, keys, *operations, run=_on_gpu)
    return MergedRedundant(merged, scores)


def _on_gpu(
    score,
    choose,
    search,
    merge,
    tensors: tuple,
    longest: int,
    choice: tuple,
    exponents: tuple,
    exact: bool,
    carry: tuple,
    join: Callable[[], None] | None,
) -> MergedRedundant:
    x, keys, order, weight, sizes, free, count, cu_seqlens = tensors
    threshold, share, uncounted = choice
    keys = keys.flatten(1)
    scores, _, inverse_norms = score(keys, order, weight, sizes, free, cu_seqlens, longest, *exponents)
    goes = choose(
        scores, count, cu_seqlens, free, None if threshold is None else float(threshold), float(share), uncounted
    )
    into = search(keys, free > goes, cu_seqlens, longest, goes, inverse_norms)
    if join is not None:
        join()
    stands_for = x.new_ones(x.shape[0], dtype=torch.float32) if sizes is None else sizes
    values, cu_out, sizes_out, rows, source, carried = merge(
        x, into, stands_for, stands_for, cu_seqlens, longest, "", exact, carry
    )
    batch = RaggedBatch.unchecked(values, cu_out, longest, not exact)
    return MergedRedundant(Merged(batch, sizes_out, rows, source, tuple(carried)), scores)


def _on_cpu(
    tensors: tuple, max_seqlen: int, choice: tuple, exponents: tuple, exact: bool | None, carry: tuple
) -> MergedRedundant | None:
    """None where something does not fit: the operations one by one say what."""
    exact = True if exact is None else exact
    checks.flag("exact", exact)
    try:
        (
            values, cu_out, sizes, rows, source, carried, scores, total, longest
        ) = native.load().merge_redundant(*tensors, max_seqlen, *choice, *exponents, exact, carry)  # fmt: skip
    except (TypeError, ValueError, RuntimeError):
        return None
    if values is None:
        return None
    checks.know_offsets(cu_out, total, longest)
    batch = RaggedBatch.unchecked(values, cu_out, longest if exact else max_seqlen, not exact)
    return MergedRedundant(Merged(batch, sizes, rows, source, tuple(carried)), scores)
