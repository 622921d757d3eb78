"""Attention of packed tokens ``[T, D]``, over themselves or over another modality; nothing is ever padded."""

from __future__ import annotations

from torch import Tensor, nn

from madtp_kernels import RaggedBatch, attention

from .linear import Linear
from .pruning import Stream


def self_attention(
    qkv: Tensor, stream: Stream, *, causal: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of every sample over itself from ``qkv [T, 3, H, d]``: ``out [T, H, d]``, ``lse [H, T]``."""
    tokens = stream.tokens
    return attention(
        qkv[:, 0], qkv[:, 1], qkv[:, 2], tokens.cu_seqlens, tokens.cu_seqlens, tokens.max_seqlen, tokens.max_seqlen,
        causal=causal, key_bias=stream.key_bias, backend=backend,
    )  # fmt: skip


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
