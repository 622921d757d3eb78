"""Attention of packed tokens ``[T, D]``, over themselves or over another modality; nothing is ever padded."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from madtp_kernels import RaggedBatch, attention, attention_with_importance

from .linear import Linear
from .pruning import Pruning, Stream


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


class CrossAttention(nn.Module):
    """Ragged queries over ragged keys of another modality; returns the heads concatenated, before any output projection."""

    def __init__(self, width: int, key_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.kv = Linear(key_width, 2 * width)

    def forward(self, x: RaggedBatch, keys: Stream, backend: str | None = None) -> Tensor:
        """``x [T, D]`` attends to ``keys.tokens [S, key_width]`` of the same sample: ``[T, D]``."""
        head_dim = self.query.out_features // self.num_heads
        q = self.query(x.values).unflatten(-1, (self.num_heads, head_dim))
        kv = self.kv(keys.tokens.values).unflatten(-1, (2, self.num_heads, head_dim))
        out, _ = attention(
            q, kv[:, 0], kv[:, 1], x.cu_seqlens, keys.tokens.cu_seqlens, x.max_seqlen, keys.tokens.max_seqlen,
            key_bias=keys.key_bias, backend=backend,
        )  # fmt: skip
        return out.flatten(1)
