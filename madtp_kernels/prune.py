"""Scoring and compaction together: what one layer does to its tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .compaction import Compacted, compact
from .ragged import RaggedBatch
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
    backend: str | None = None,
    **options,
) -> Pruned:
    """Score the tokens that entered a block and drop the ones that do not matter from its attention's result.

    Args:
        x: tokens ``[T, D]`` after the attention sub-layer: the rows that are kept and merged.
        entering: ``[T, D]`` the tokens as they entered the block: what is compared with the dictionary.
        dictionary, received, cls, temperature, bias: as in :func:`~madtp_kernels.score_tokens`.
        options: the keyword options of :func:`~madtp_kernels.compact`.

    Returns:
        :class:`Pruned`. Two launches on a GPU.

    Raises:
        ValueError, BackendError: as the two operations.
    """
    importance, threshold = score_tokens(
        entering, dictionary, received, cls, x.cu_seqlens, x.max_seqlen, temperature, bias=bias, backend=backend
    )
    return Pruned(compact(x, importance, threshold, backend=backend, **options), importance, threshold)
