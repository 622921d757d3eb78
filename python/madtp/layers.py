"""LayerNorm and attention of packed tokens ``[T, D]``: over themselves, over what a decoder remembers, over another modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, attention, attention_with_importance, layer_norm

from .linear import Linear
from .pruning import Pruning, Stream


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension, which on a GPU leaves out the rows beyond the tokens of a bound batch."""

    def forward(self, x: Tensor, tokens: RaggedBatch | None = None) -> Tensor:
        """``x [C, D]`` to ``[C, D]``; rows beyond the last token of ``tokens``, the batch whose rows x has, are then undefined."""
        if tokens is not None and tokens.bound and x.is_cuda and not torch.is_autocast_enabled("cuda"):
            return layer_norm(x, self.weight, self.bias, tokens.cu_seqlens, self.eps)
        return super().forward(x)


class Attended(NamedTuple):
    """What a self-attention sub-layer hands on."""

    out: Tensor
    """``[T, H * d]``, the heads concatenated, before the output projection."""
    received: Tensor | None
    """``[T]`` float32 attention that each token receives; None in a dense layer, as is ``cls``."""
    cls: Tensor | None


def self_attention(qkv: Tensor, stream: Stream, pruning: Pruning, *, causal: bool = False) -> Attended:
    """Attention of every sample over itself from ``qkv [T, 3, H, d]``; with its importance if the layer is to prune."""
    tokens = stream.tokens
    q, k, v = qkv.unbind(1)
    options = {"causal": causal, "key_bias": stream.key_bias, "backend": pruning.backend}
    if pruning.active:
        out, _, received, cls = attention_with_importance(q, k, v, tokens.cu_seqlens, tokens.max_seqlen, **options)
        return Attended(out.flatten(1), received, cls)
    lengths = (tokens.cu_seqlens, tokens.cu_seqlens, tokens.max_seqlen, tokens.max_seqlen)
    out, _ = attention(q, k, v, *lengths, **options)
    return Attended(out.flatten(1), None, None)


def cached_attention(qkv: Tensor, samples: int, cache, layer: int, visible: Tensor | None = None) -> Attended:
    """Causal attention of the newest tokens of each sample over themselves and all earlier ones, which ``cache`` holds.

    Args:
        qkv: ``[N * L, 3, H, d]``, L new tokens for each of the N samples.
        samples: N.
        cache: of `transformers`, one entry ``[N, H, tokens, d]`` per layer; the new keys and values are added to it.
        layer: number of the layer.
        visible: ``[N, tokens]`` bool, False for earlier or new tokens that are padding. A token that would see none sees itself.
    """
    q, k, v = qkv.unflatten(0, (samples, -1)).permute(2, 0, 3, 1, 4)  # [N, H, L, d] each
    k, v = cache.update(k, v, layer)
    new, seen = q.shape[2], k.shape[2]
    mask = None if new == 1 else torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    if visible is not None:
        itself = torch.arange(seen, device=q.device) == torch.arange(seen - new, seen, device=q.device)[:, None]
        mask = visible[:, None, None] & (True if mask is None else mask)  # [N, 1, L, tokens]
        mask = mask | itself & ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return Attended(out.transpose(1, 2).flatten(2).flatten(0, 1), None, None)


class Keys(NamedTuple):
    """Keys and values of one cross-attention, computed once for all queries that look at them."""

    kv: Tensor
    """``[S, 2, H, d]``."""
    cu_seqlens: Tensor
    max_seqlen: int
    key_bias: Tensor | None


class Runs(NamedTuple):
    """Which query samples look at the same key sample: the beams of an image, the candidate answers to a question."""

    starts: Tensor
    """``[K+1]`` int64: key sample k serves the query samples ``starts[k]:starts[k+1]``."""
    longest: int
    """Upper bound of the length of a run (host integer)."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Runs:
        """From the number of query samples of each key sample."""
        starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        return cls(starts.to(device), max(lengths, default=0))


class CrossAttention(nn.Module):
    """Ragged queries over ragged keys of another modality; returns the heads concatenated, before any output projection."""

    def __init__(self, width: int, key_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.kv = Linear(key_width, 2 * width)

    def keys(self, stream: Stream) -> Keys:
        """Keys and values of ``stream.tokens [S, key_width]``."""
        tokens = stream.tokens
        kv = self.kv(tokens.values, tokens=tokens).unflatten(-1, (2, self.num_heads, -1))
        return Keys(kv, tokens.cu_seqlens, tokens.max_seqlen, stream.key_bias)

    def forward(
        self, x: RaggedBatch, keys: Stream | Keys, backend: str | None = None, runs: Runs | None = None
    ) -> Tensor:
        """``x [T, D]`` attends to ``keys``: ``[T, D]``. Without ``runs``, sample b looks at key sample b."""
        if isinstance(keys, Stream):
            keys = self.keys(keys)
        q = self.query(x.values, tokens=x).unflatten(-1, (self.num_heads, -1))
        cu_seqlens, max_seqlen = x.cu_seqlens, x.max_seqlen
        if runs is not None:  # to the kernel, a run is one sample with the queries of all
            cu_seqlens, max_seqlen = cu_seqlens[runs.starts], max_seqlen * runs.longest
        out, _ = attention(
            q, keys.kv[:, 0], keys.kv[:, 1], cu_seqlens, keys.cu_seqlens, max_seqlen, keys.max_seqlen,
            key_bias=keys.key_bias, backend=backend,
        )  # fmt: skip
        return out.flatten(1)
