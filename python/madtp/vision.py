"""Pre-norm transformer blocks on ragged tokens, with MAG and DTP in each, and BLIP's vision transformer made of
them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, native
from madtp_kernels.registration import at_once

from .config import VisionConfig
from .guidance import QueryModel, alignment_features
from .layers import LayerNorm, attention_sublayer, single_attention
from .linear import Linear, extension_serves, mlp, project, reads_as, touched
from .pruning import LayerTrace, Pruning, Tokens
from .rows import first_of


class Encoded(NamedTuple):
    """What an encoder of images or texts returns."""

    tokens: Tokens
    """Final tokens ``[T, D]``, of images after the last LayerNorm; the first of each sample stands for it."""
    trace: list[LayerTrace]
    """One record per layer."""
    alignment_features: Tensor | None
    """``[B, M, sd_dim]`` summed over the layers; None if not asked for."""


class Block(nn.Module):
    """x + attention(norm1(x)), then pruning, then x + mlp(norm2(x)): BLIP's ViT and both towers of CLIP.

    Args:
        width, num_heads, hidden: sizes of the tokens, the attention, the MLP.
        eps: of the LayerNorms.
        activation: of the MLP, see :class:`madtp.linear.Linear`.
        causal: tokens attend to themselves and to earlier ones only.
    """

    def __init__(
        self, width: int, num_heads: int, hidden: int, *, eps: float, activation: str = "gelu", causal: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.activation, self.causal = num_heads, activation, causal
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = nn.Module()
        self.attn.qkv = Linear(width, 3 * width)
        self.attn.proj = Linear(width, width)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = Linear(width, hidden)
        self.mlp.fc2 = Linear(hidden, width)

    def forward(
        self, x: Tokens, dictionary: tuple[Tensor, Tensor | None] | None, pruning: Pruning, layer: int
    ) -> tuple[Tokens, LayerTrace]:
        """Tokens ``[T, D]`` through the block; ``dictionary`` as the rule sees it
        (:meth:`madtp.guidance.QueryModel.fold`)."""
        y, attention = attention_sublayer(
            x, self.norm1, self.attn.qkv, self.attn.proj, self.num_heads, pruning, norm_first=True, causal=self.causal
        )
        norm = self.norm2 if isinstance(self.norm2, LayerNorm) else None  # no rule applies what was put in its place
        y, trace = pruning(y, block_input=x, attention=attention, dictionary=dictionary, layer=layer, norm=norm)
        return self._feed_forward(y), trace

    def _feed_forward(self, y: Tokens) -> Tokens:
        first, second = self.mlp.fc1, self.mlp.fc2
        if y.normed is not None:
            return y.with_values(mlp(self.norm2(y), first, second, y.values, self.activation, tokens=y))
        norm, values = self.norm2, y.values
        return y.with_values(mlp(values, first, second, values, self.activation, tokens=y, norm=norm, norm_first=True))

    def read(
        self, x: Tokens, dictionary: object, pruning: Pruning, layer: int, *, rows: Callable[[Tokens], Tensor]
    ) -> tuple[Tokens, LayerTrace]:
        """:meth:`forward` of the last block where one token of each sample is read: the others get neither queries nor
        MLP.

        Args:
            x, pruning: as in :meth:`forward`; nothing is pruned, as no token that is left would be read.
            rows: tokens -> ``[B]`` int64 rows that are read.

        Returns:
            One token of each sample, and a record that says that all tokens went through.
        """
        read = rows(x)
        out = single_attention(self.norm1(x), self.attn.qkv, x, read, self.num_heads, pruning.backend, self.causal)
        y = x.single(read)
        y = y.with_values(self.attn.proj(out, residual=y.values, tokens=y))
        return self._feed_forward(y), LayerTrace(x.cu_seqlens, x.cu_seqlens, x.ids)

    @property
    def is_plain(self) -> bool:
        """Whether :meth:`read` may stand for a call: no hooks watch the block, or the projection of which it takes a part."""
        return type(self) is Block and not touched(self) and reads_as(self.attn.qkv, Linear)


def run_blocks(
    blocks: Sequence[Block],
    query_models: Sequence[QueryModel],
    tokens: Tokens,
    dictionary: Tensor | None,
    pruning: Pruning,
    with_features: bool,
) -> tuple[Tokens, list[LayerTrace], Tensor | None]:
    """Tokens through all blocks, each with its query model.

    Returns:
        The final tokens, one record per block, and the alignment features ``[B, M, sd_dim]`` summed over the blocks
        (None unless ``with_features``).

    Raises:
        ValueError: no dictionary where the rule or the features need one.
    """
    compares = pruning.active and pruning.needs_dictionary
    if dictionary is None and (compares or with_features):
        raise ValueError("dictionary: pruning needs one, got None")
    trace, features, folded, folded_by = [], None, None, None
    for layer, (block, query_model) in enumerate(zip(blocks, query_models, strict=True)):
        if with_features:
            found = alignment_features(tokens, dictionary, query_model)
            features = found if features is None else features + found
        if compares and query_model is not folded_by:
            folded, folded_by = query_model.fold(dictionary), query_model
        seen = folded
        if seen is not None and seen[0].dtype != tokens.dtype:  # autocast makes tokens of another dtype than weights
            seen = (seen[0].to(tokens.dtype), seen[1])
        tokens, record = block(tokens, seen, pruning, layer)
        trace.append(record)
    return tokens, trace, features


def reading(blocks: Sequence, rows: Callable[[Tokens], Tensor]) -> Sequence[Callable]:
    """The blocks where of the last one only ``rows`` are read, see :meth:`Block.read`; the blocks themselves, all of whose tokens then
    come out, where that would leave out what somebody does when it is called."""
    *others, last = blocks
    return [*others, partial(last.read, rows=rows)] if getattr(last, "is_plain", False) else blocks


def project_patches(rows: Tensor, proj: nn.Module, kind: type[nn.Module], tokens: RaggedBatch) -> Tensor:
    """Patches ``[P, 3 * size * size]`` to tokens ``[P, D]``, by one product: a convolution whose stride is its kernel is a linear layer
    on patches. Where somebody watches it, or has put another module in its place, that is called; each patch then is a picture of its
    own. ``kind``: `nn.Conv2d` or `nn.Linear`."""
    if reads_as(proj, kind):
        return project(rows, proj.weight.flatten(1), proj.bias, tokens=tokens)
    size = math.isqrt(rows.shape[1] // 3)
    return proj(rows if kind is nn.Linear else rows.unflatten(1, (3, size, size))).flatten(1)


def of_one_dtype(*parts: Tensor) -> list[Tensor]:
    """Tensors in the dtype that holds all their numbers: under autocast `torch.cat` takes no half but autocast's own."""
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return [part.to(dtype) for part in parts]


def cut_patches(images: Tensor, size: int, channels_last: bool = False) -> Tensor:
    """``[B, 3, H, W]`` to ``[B * P, 3 * size * size]``: the patches of each image row by row, in one copy.

    Their numbers come channel by channel, as in the weights of a convolution, or pixel by pixel.
    """
    dtype, run = images.dtype, size * images.element_size()
    if (
        images.is_cuda
        and not channels_last
        and run % 8 == 0
        and not images.requires_grad
        and _begins_at_8_bytes(images)
    ):
        images = images.view(torch.int64)  # a GPU's copy takes its time by numbers, not by bytes
    width = run // images.element_size()
    cut = images.unflatten(2, (-1, size)).unflatten(4, (-1, width))  # [B, 3, rows, size, columns, width]
    rows = cut.permute(0, 2, 4, *((3, 5, 1) if channels_last else (1, 3, 5))).flatten(3).flatten(0, 2)
    return rows if rows.dtype == dtype else rows.view(dtype)


def _begins_at_8_bytes(images: Tensor) -> bool:
    """Whether a contiguous tensor may be read 8 bytes at a time: its place in its memory is what PyTorch asks for, and its address,
    which memory of others (NumPy, DLPack) may have anywhere, is what a GPU faults at."""
    if torch.compiler.is_compiling() or not images.is_contiguous():  # a compiler knows no address
        return False
    return images.storage_offset() * images.element_size() % 8 == images.data_ptr() % 8 == 0


class VisionTransformer(nn.Module):
    """BLIP's ViT, whose tokens are packed from the patches on. Parameter names are BLIP's (`visual_encoder.*`)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        eps = config.layer_norm_eps
        self.blocks = nn.ModuleList(Block(width, config.num_heads, hidden, eps=eps) for _ in range(config.depth))
        self.norm = LayerNorm(width, eps=eps)
        self.img_query_model = QueryModel(width, config.sd_dim, config.map_func)

    def embed(self, pixels: Tensor | RaggedBatch) -> Tokens:
        """Images to the tokens ``[B * (P + 1), D]`` that enter the first block: CLS, then the patches row by row, with positions.

        Args:
            pixels: ``[B, 3, S, S]``, or a ragged batch of such images, of which a sample has one or none.

        Raises:
            ValueError: pixels of another size.
        """
        size, number, cls_token, pos_embed = (
            self.config.image_size,
            self.config.num_patches,
            self.cls_token,
            self.pos_embed,
        )
        images = pixels.values if isinstance(pixels, RaggedBatch) else pixels
        if images.dim() != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"pixels: expected [B, 3, {size}, {size}], got {list(images.shape)}")
        if isinstance(pixels, RaggedBatch):
            starts, bound = pixels.cu_seqlens, True
        else:
            starts, bound = torch.arange(len(images) + 1, dtype=torch.int32, device=images.device), False
        length = number + 1
        ids = torch.arange(length, dtype=torch.int32, device=images.device).repeat(len(images))
        x = self._embedded(images)
        if x is not None:
            return Tokens.unchecked(x, starts * length, length, bound, ids=ids)
        rows = cut_patches(images, self.config.patch_size)
        patches = RaggedBatch.unchecked(rows, starts * number, number, bound)
        x = project_patches(rows, self.patch_embed.proj, nn.Conv2d, patches).unflatten(0, (len(images), number))
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cuda" if images.is_cuda else "cpu"):
            x = torch.cat(of_one_dtype(cls_token.expand(len(x), -1, -1), x), 1) + pos_embed
        else:  # the same sums, written once
            embedded, x = x, x.new_empty(len(x), number + 1, x.shape[2])
            x[:, :1] = cls_token + pos_embed[:, :1]
            torch.add(embedded, pos_embed[:, 1:], out=x[:, 1:])
        return Tokens.unchecked(x.flatten(0, 1), starts * length, length, bound, ids=ids)

    def _embedded(self, images: Tensor) -> Tensor | None:
        """The tokens in one pass over the pixels; None where the extension has none for them."""
        proj = self.patch_embed.proj
        if images.is_cuda or not reads_as(proj, nn.Conv2d):
            return None
        weights = (proj.weight, proj.bias, self.cls_token.flatten(), self.pos_embed[0])
        if not extension_serves(images, *weights):
            return None
        return at_once(native.load().embed_patches, images.contiguous(), *weights)

    def forward(
        self,
        pixels: Tensor,
        dictionary: Tensor | None,
        pruning: Pruning,
        alignment_features: bool = False,
        pooled: bool = False,
    ) -> Encoded:
        """Encode images.

        Args:
            pixels: ``[B, 3, S, S]`` normalised images.
            dictionary: ``[M, sd_dim]`` cross-modal dictionary; may be None where the rule needs none.
            pruning: the rule.
            alignment_features: also sum up what each dictionary entry sees (training).
            pooled: only CLS tokens are read: the last block computes no other, and the result has no other.

        Raises:
            ValueError: pixels of another size, or no dictionary where one is needed.
        """
        query_models = [self.img_query_model] * len(self.blocks)
        blocks = reading(self.blocks, first_of) if pooled else self.blocks
        tokens, *record = run_blocks(
            blocks, query_models, self.embed(pixels), dictionary, pruning.on("vision", len(blocks)), alignment_features
        )
        return Encoded(tokens.with_values(self.norm(tokens)), *record)
