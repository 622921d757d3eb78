"""Scoring and compaction together: what one layer does to its tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from . import checks, native, repeats
from .beside import late
from .compaction import Compacted, compact, compacted
from .ragged import RaggedBatch
from .registration import in_one_call
from .scoring import score_tokens

__all__ = ["Pruned", "prune"]


class Pruned(NamedTuple):
    """Result of :func:`prune`."""

    compacted: Compacted
    importance: Tensor
    """``[T]`` float32 score of every token that entered."""
    threshold: Tensor
    """``[B]`` float32: what a token's score had to exceed."""


def prune(
    x: RaggedBatch,
    entering: Tensor,
    dictionary: Tensor,
    received: Tensor,
    cls: Tensor,
    temperature: float,
    *,
    bias: Tensor | None = None,
    protected: Tensor | None = None,
    groups: Tensor | None = None,
    min_keep: Tensor | None = None,
    ids: Tensor | None = None,
    sizes: Tensor | None = None,
    merged_id: int = -1,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    exact: bool | None = None,
    backend: str | None = None,
) -> Pruned:
    """Score the tokens that entered a block and drop the ones that do not matter from its attention's result.

    On a CPU this is one call of the extension. Its attention comes before it in another, because the projection of its result
    lies between the two.

    Args:
        x: tokens ``[T, D]`` after the attention sub-layer: the rows that are kept and merged.
        entering: ``[T, D]`` the tokens as they entered the block: what is compared with the dictionary.
        dictionary, received, cls, temperature, bias: as in :func:`~madtp_kernels.score_tokens`.
        protected, groups, min_keep, ids, sizes, merged_id, norm, exact: as in :func:`~madtp_kernels.compact`.
        backend: force an implementation of both.

    Returns:
        :class:`Pruned`. Two launches on a GPU, three where scoring takes two.

    Raises:
        ValueError, BackendError: as the two operations.
    """
    weight, shift, eps = norm if isinstance(norm, tuple) and len(norm) == 3 else (None, None, 0.0)
    if isinstance(x, RaggedBatch) and (norm is None or weight is not None):
        (values, join), cu_seqlens, longest = late(x), x.cu_seqlens, x.max_seqlen
        tensors = (
            values,
            entering,
            dictionary,
            bias,
            received,
            cls,
            cu_seqlens,
            protected,
            groups,
            min_keep,
            ids,
            sizes,
            weight,
            shift,
        )
        if values.device.type == "cpu" and in_one_call(tensors, backend, ("score_tokens", "scoring", values)):
            pruned = _on_cpu(tensors, x, temperature, merged_id, eps, exact)
            if pruned is not None:
                return pruned
        key = repeats.signature(prune, tensors, (longest, temperature, merged_id, eps, exact, backend))
        if repeat := repeats.find(key):
            return repeat(tensors, longest, temperature, merged_id, eps, bool(exact), join)
    else:
        key = None
    if not isinstance(x, RaggedBatch):
        raise ValueError(f"x: expected a RaggedBatch of tokens [T, D], got {checks.describe(x)}")
    checks.floats("x.values", x.values, 2, "[T, D]")
    checks.tensor("entering", entering, tuple(x.values.shape), "[T, D]", x.dtype, x.device)
    importance, threshold = score_tokens(
        entering, dictionary, received, cls, x.cu_seqlens, x.max_seqlen, temperature, bias=bias, backend=backend
    )
    result = compact(
        x, importance, threshold, protected=protected, groups=groups, min_keep=min_keep, ids=ids, sizes=sizes,
        merged_id=merged_id, norm=norm, exact=exact, backend=backend,
    )  # fmt: skip
    repeats.remember(key, backend, entering, ("score_tokens", "scoring"), ("compact", "compaction"), run=_on_gpu)
    return Pruned(result, importance, threshold)


def _on_gpu(
    score,
    compact,
    tensors: tuple,
    longest: int,
    temperature: float,
    merged_id: int,
    eps: float,
    exact: bool,
    join: Callable[[], None] | None,
) -> Pruned:
    x, entering, dictionary, bias, received, cls, cu_seqlens, protected, groups, min_keep, ids, sizes, weight, shift = (
        tensors
    )
    chosen = None
    if groups is None:  # the program that scores a sample also selects
        importance, threshold, chosen = score(
            entering, dictionary, received, cls, cu_seqlens, longest, temperature, bias, (protected, min_keep)
        )
    else:
        importance, threshold = score(entering, dictionary, received, cls, cu_seqlens, longest, temperature, bias)
    if join is not None:
        join()
    result = compact(
        x, importance, threshold, None, cu_seqlens, longest, protected, groups, min_keep, ids, sizes, merged_id, weight, shift,
        eps, exact, chosen,
    )  # fmt: skip
    return Pruned(compacted(result, longest, exact, sizes, weight), importance, threshold)


def _on_cpu(
    tensors: tuple, x: RaggedBatch, temperature: float, merged_id: int, eps: float, exact: bool | None
) -> Pruned | None:
    """None where scores are not finite: the operations one by one say which."""
    checks.tensor("entering", tensors[1], tuple(x.values.shape), "[T, D]", x.dtype, x.device)
    checks.positive("temperature", temperature)
    weight, sizes = tensors[12], tensors[11]
    if weight is not None:
        checks.positive("norm eps", eps)
    exact = True if exact is None else exact
    checks.flag("exact", exact)
    values, *rest = map(checks.unit_stride, tensors)
    (
        *result, importance, threshold, rows, longest
    ) = native.load().prune(values, *rest[:6], x.max_seqlen, temperature, *rest[6:11], merged_id, *rest[11:], eps, exact)  # fmt: skip
    if result[0] is None:
        return None
    checks.know_offsets(result[1], rows, longest)
    result = compacted(result, longest if exact else x.max_seqlen, exact, sizes, weight)
    return Pruned(result, importance, threshold)
