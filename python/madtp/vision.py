"""BLIP's vision transformer on ragged tokens, with MAG and DTP in every block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from .config import VisionConfig
from .guidance import QueryModel, alignment_summary
from .layers import self_attention
from .linear import Linear, mlp
from .pruning import LayerTrace, Pruning, Stream, prune_layer


class VisionOutput(NamedTuple):
    """What an image encoder returns."""

    stream: Stream
    """Final tokens ``[T, D]`` after the last LayerNorm; the first of each image is its CLS token."""
    trace: list[LayerTrace]
    """One record per block."""
    summary: Tensor | None
    """``[B, M, sd_dim]`` alignment summaries summed over the blocks; None if not asked for."""


class Block(nn.Module):
    """x + attention(norm1(x)), then pruning, then x + mlp(norm2(x))."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.num_heads = config.num_heads
        self.attn = nn.Module()
        self.attn.qkv = Linear(width, 3 * width)
        self.attn.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1 = Linear(width, int(width * config.mlp_ratio))
        self.mlp.fc2 = Linear(int(width * config.mlp_ratio), width)

    def forward(
        self, stream: Stream, guide: tuple[Tensor, Tensor | None] | None, pruning: Pruning, layer: int
    ) -> tuple[Stream, LayerTrace]:
        entering = stream.tokens.values
        qkv = self.attn.qkv(self.norm1(entering)).unflatten(-1, (3, self.num_heads, -1))
        attended = self_attention(qkv, stream, pruning)
        stream = stream.with_values(self.attn.proj(attended.out, residual=entering))
        if pruning.active:
            norm = (self.norm2.weight, self.norm2.bias, self.norm2.eps)
            stream, normed, trace = prune_layer(
                stream, entering, attended.received, attended.cls, guide, pruning, layer, norm=norm
            )
        else:
            normed = self.norm2(stream.tokens.values)
            trace = LayerTrace(stream.tokens.cu_seqlens, stream.tokens.cu_seqlens, stream.ids)
        return stream.with_values(mlp(normed, self.mlp.fc1, self.mlp.fc2, stream.tokens.values)), trace


class VisionTransformer(nn.Module):
    """ViT whose tokens are packed from the patches on. Parameter names are BLIP's (`visual_encoder.*`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.embed_dim))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, config.embed_dim, config.patch_size, config.patch_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.img_query_model = QueryModel(config.embed_dim, config.sd_dim, config.map_func)

    def embed(self, pixels: Tensor) -> RaggedBatch:
        """``pixels [B, 3, S, S]`` to tokens ``[B * (P + 1), D]``: CLS, then the patches row by row."""
        size, patch = self.config.image_size, self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels: expected [B, 3, {size}, {size}], got {list(pixels.shape)}")
        # A convolution whose stride is its kernel is a linear layer on patches.
        patches = F.pixel_unshuffle(pixels, patch).flatten(2).mT  # [B, P, 3 * patch * patch]
        proj = self.patch_embed.proj
        x = F.linear(patches, proj.weight.flatten(1), proj.bias)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        length = x.shape[1]
        cu_seqlens = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * length
        return RaggedBatch(x.flatten(0, 1), cu_seqlens, length)

    def forward(
        self, pixels: Tensor, dictionary: Tensor | None, pruning: Pruning, summaries: bool = False
    ) -> VisionOutput:
        """Encode images.

        Args:
            pixels: ``[B, 3, S, S]`` normalised images.
            dictionary: ``[M, sd_dim]`` cross-modal dictionary; may be None when the pruning is inactive.
            pruning: temperature, groups, backend.
            summaries: also sum up what each dictionary entry sees (training).

        Raises:
            ValueError: pixels of another size, or active pruning without a dictionary.
        """
        if dictionary is None and (pruning.active or summaries):
            raise ValueError("dictionary: pruning needs one, got None")
        guide = self.img_query_model.fold(dictionary) if pruning.active else None
        stream = Stream.start(self.embed(pixels), pruning.use_sizes)
        trace, summary = [], None
        for layer, block in enumerate(self.blocks):
            if summaries:
                seen = alignment_summary(stream.tokens, dictionary, self.img_query_model)
                summary = seen if summary is None else summary + seen
            stream, record = block(stream, guide, pruning, layer)
            trace.append(record)
        return VisionOutput(stream.with_values(self.norm(stream.tokens.values)), trace, summary)
