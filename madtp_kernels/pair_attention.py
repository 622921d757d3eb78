"""Cross-attention to two things at once, with the projections around it: four launches on a GPU where one after the other takes
eight."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import repeats
from .attention import attention
from .beside import beside
from .linear import linear_pair
from .ragged import RaggedBatch

__all__ = ["pair_attention"]

Layers = tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
"""Weights and biases of two linear layers of one shape."""


def pair_attention(
    x: RaggedBatch,
    others: RaggedBatch,
    queries: Layers,
    keys: Layers,
    outputs: Layers,
    heads: int,
    *,
    key_bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """What the tokens of B samples see in two other things each, which have layers of their own: BLIP-NLVR's two images.

    Args:
        x: tokens ``[C, D]`` of B samples.
        others: tokens ``[S, K]`` of 2B samples: what each sample looks at first, then what each looks at second.
        queries, keys, outputs: two layers each, for :func:`~madtp_kernels.linear_pair`: ``[D, D]``, ``[2 D, K]`` (keys, then
            values) and ``[D', D]``.
        heads: of the attention.
        key_bias: ``[S]`` float32 added to the logits of each key.
        backend: force an implementation of the attention.

    Returns:
        ``[C, 2 D']``: the outputs of the first, then of the second; rows beyond the last token are undefined.

    Raises:
        ValueError, NotImplementedError, BackendError: as :func:`~madtp_kernels.linear_pair` and :func:`~madtp_kernels.attention`.
    """
    layers = (*queries[0], *queries[1], *keys[0], *keys[1], *outputs[0], *outputs[1])
    tensors = (x.values, x.cu_seqlens, others.values, others.cu_seqlens, key_bias, *layers)
    lengths = (x.max_seqlen, others.max_seqlen)
    key = repeats.signature(pair_attention, tensors, (heads, *lengths, backend))
    if repeat := repeats.find(key):
        return repeat(tensors, heads, *lengths)
    q = linear_pair(x, *queries, form="both")
    kv = linear_pair(others, *keys, form="halves")
    out, _ = attention(
        q.values.unflatten(1, (heads, -1)), *kv.values.unflatten(1, (2, heads, -1)).unbind(1), q.cu_seqlens,
        others.cu_seqlens, *lengths, key_bias=key_bias, with_lse=False, backend=backend,
    )  # fmt: skip
    result = linear_pair(q.with_values(out.flatten(1)), *outputs, form="columns").values
    pair = ("linear_pair", "linear")
    repeats.remember(key, backend, x.values, pair, pair, ("attention", "attention"), pair, run=_repeated)
    return result


def _repeated(
    ask: Callable,
    look: Callable,
    attend: Callable,
    gather: Callable,
    tensors: tuple,
    heads: int,
    longest: int,
    most: int,
) -> Tensor:
    """By implementations that know the arguments of an earlier call."""
    x, cu_seqlens, others, cu_others, key_bias, *layers = tensors
    (kv,), pending = beside(x, lambda: look(others, *layers[4:8], cu_others, "halves"))
    q, cu_both = ask(x, *layers[:4], cu_seqlens, "both")
    pending.join()
    rows, width = q.shape
    head_dim = width // heads
    k, v = kv.view(kv.shape[0], 2, heads, head_dim).unbind(1)
    out, _ = attend(
        q.view(rows, heads, head_dim), k, v, cu_both, cu_others, longest, most, head_dim**-0.5, False, key_bias, False
    )  # fmt: skip
    (result,) = gather(out.view(rows, width), *layers[8:], cu_both, "columns")
    return result
