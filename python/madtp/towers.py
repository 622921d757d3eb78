"""Image and text towers of CLIP and its kin (SigLIP, DINOv2, ViT): pre-norm blocks, and one vector for each image or text.

One implementation serves all families; what differs between them is in :class:`madtp.config.CLIPVisionConfig` and
:class:`madtp.config.CLIPTextConfig`. What their weights are called elsewhere is in :mod:`madtp.weights.key_maps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, attention

from .config import CLIPConfig
from .guidance import QueryModel
from .layers import Embedding, LayerNorm
from .linear import Linear, ScaledLinear, mlp, project, reads_as
from .pruning import MADTP, EViT, LayerTrace, Pruning, Tokens
from .pruning.official import Official, fill_up, with_minimum
from .rows import first_of, first_rows, ids_of, rows_of
from .vision import Block, cut_patches, of_one_dtype, project_patches, reading, run_blocks


class Features(NamedTuple):
    """Images or texts, encoded on their own."""

    features: Tensor
    """``[B, E]``; as they are from a tower, of length 1 in BLIP retrieval."""
    tokens: Tokens
    """Final tokens ``[T, D]``, of a tower before its last LayerNorm; those of images are what BLIP's matching looks at."""
    trace: list[LayerTrace]
    """One record per layer."""
    alignment_features: Tensor | None
    """``[B, M, sd_dim]`` summed over the layers; None if not asked for."""


class Patches(NamedTuple):
    """Images cut into patches, each with its own grid."""

    vectors: RaggedBatch
    """``[T, 3 * patch * patch]``, row by row of each image; the numbers in the order of the tower's weights."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of each image's patches; where there is no image, of those that there could be."""


def interpolate_positions(positions: Tensor, grid: tuple[int, int], prefix: int = 1, mode: str = "bicubic") -> Tensor:
    """Position embedding ``[1, prefix + S * S, D]`` for another grid (rows, columns) of patches: ``[1, prefix + P, D]``.

    The prefix stays as it is. ``mode`` is one of :attr:`madtp.config.CLIPVisionConfig.positions` but "fixed".

    Raises:
        ValueError: the trained patches do not form a square.
    """
    side = round((positions.shape[1] - prefix) ** 0.5)
    if side * side + prefix != positions.shape[1]:
        raise ValueError(f"pos_embed: {positions.shape[1] - prefix} patches do not form a square grid")
    if (side, side) == grid:
        return positions
    kept, patches = positions[:, :prefix], positions[:, prefix:]
    patches = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
    options = {"mode": mode.split()[0], "align_corners": False, "antialias": mode.endswith("antialias")}
    # PyTorch's antialiased interpolation to a width of 1 is wrong (2.13, CPU), that to a height of 1 is not.
    if grid[1] == 1:
        patches = F.interpolate(patches.mT.contiguous(), size=grid[::-1], **options).mT
    else:
        patches = F.interpolate(patches.contiguous(), size=grid, **options)
    return torch.cat([kept, patches.flatten(2).mT.to(positions.dtype)], 1)


class AttentionPool(nn.Module):
    """SigLIP's head: a learned query looks at all tokens of an image, then an MLP with a residual.

    A merged token counts as often as the tokens that it stands for: the log of its size is added to its logit.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, *, eps: float, activation: str) -> None:
        super().__init__()
        self.num_heads, self.activation = num_heads, activation
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.attn = nn.Module()
        self.attn.qkv = Linear(width, 3 * width)
        self.attn.proj = Linear(width, width)
        self.norm = LayerNorm(width, eps=eps)
        self.mlp = nn.Module()
        self.mlp.fc1 = Linear(width, hidden)
        self.mlp.fc2 = Linear(hidden, width)

    def forward(self, tokens: Tokens, backend: str | None = None) -> Tensor:
        """Tokens ``[T, D]`` to ``[B, D]``."""
        width, qkv = self.probe.shape[-1], self.attn.qkv
        if reads_as(qkv, Linear):
            weight, bias = qkv.affine
            q = project(self.probe[0], weight[:width], bias[:width])
            kv = project(tokens.values, weight[width:], bias[width:], tokens=tokens)
        else:
            q, kv = qkv(self.probe[0])[:, :width], qkv(tokens.values, tokens=tokens)[:, width:]
        q = q.expand(tokens.batch_size, -1).unflatten(-1, (self.num_heads, -1))
        kv = kv.unflatten(-1, (2, self.num_heads, -1))
        x = self.attn.proj(pooled_attention(q, kv[:, 0], kv[:, 1], tokens, backend))
        rows = RaggedBatch(x, torch.arange(len(x) + 1, dtype=torch.int32, device=x.device), 1)
        return mlp(self.norm(x), self.mlp.fc1, self.mlp.fc2, x, self.activation, tokens=rows)


def pooled_attention(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, backend: str | None, bias: Tensor | None = None
) -> Tensor:
    """One query ``q [B, H, d]`` for each sample over its keys and values ``[T, H, d]``, sizes counted: ``[B, H * d]``."""
    sizes = None if tokens.sizes is None else tokens.sizes.log()
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    bias = sizes if bias is None else bias if sizes is None else bias + sizes
    options = {"key_bias": bias, "backend": backend}
    out, _ = attention(q, k, v, starts, tokens.cu_seqlens, 1, tokens.max_seqlen, **options)
    return out.flatten(1)


def mean_of_patches(tokens: Tokens, prefix: int, num_heads: int, backend: str | None = None) -> Tensor:
    """``[B, D]``: mean of the rows of each sample but the first ``prefix`` ones, weighted by sizes.

    It is attention of a query of zeros: one kernel on every backend, with the same bits alone and in a batch.
    """
    values = tokens.values.unflatten(-1, (num_heads, -1))
    hidden = ((tokens.ids >= 0) & (tokens.ids < prefix)).float() * -1e4 if prefix else None
    query = values.new_zeros(tokens.batch_size, *values.shape[1:])
    return pooled_attention(query, values, values, tokens, backend, hidden)


class ImageTower(nn.Module):
    """A vision transformer whose tokens are packed from the patches on, with one vector for each image."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        vision, eps = config.vision, config.norm_eps
        self.config = vision
        width, hidden = vision.embed_dim, round(vision.embed_dim * vision.mlp_ratio)
        options = {"eps": eps, "activation": config.hidden_act}
        if vision.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if vision.registers:
            self.registers = nn.Parameter(torch.zeros(1, vision.registers, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, vision.num_patches + vision.class_token, width))
        self.patch_embed = nn.Module()
        size, bias = vision.patch_size, vision.patch_bias
        flat = nn.Linear(3 * size * size, width, bias) if vision.patches_last else None
        self.patch_embed.proj = flat or nn.Conv2d(3, width, size, size, bias=bias)
        self.norm_pre = LayerNorm(width, eps=eps) if vision.norm_pre else None
        self.blocks = nn.ModuleList(Block(width, vision.num_heads, hidden, **options) for _ in range(vision.depth))
        if vision.layer_scale:
            for block in self.blocks:
                block.attn.proj, block.mlp.fc2 = ScaledLinear(width, width), ScaledLinear(hidden, width)
        self.query_models = nn.ModuleList(
            QueryModel(width, vision.sd_dim, vision.map_func) for _ in range(vision.depth)
        )
        self.norm_post = LayerNorm(width, eps=eps)
        self.head = AttentionPool(width, vision.num_heads, hidden, **options) if vision.pool == "attention" else None
        self.pooler = Linear(width, width) if vision.pooler else None
        self.proj = Linear(width, config.embed_dim, bias=False) if vision.projection else None

    def cut(self, pixels: Tensor | RaggedBatch | Sequence[Tensor]) -> Patches:
        """Images to patches.

        Args:
            pixels: ``[B, 3, H, W]``, a ragged batch of such images (of which a sample has one or none), or B images
                ``[3, H, W]`` of any shapes.

        Raises:
            ValueError: pixels of a size that the tower does not take.
        """
        vision = self.config
        if not isinstance(pixels, (Tensor, RaggedBatch)):
            pixels = list(pixels)
            if pixels and all(image.shape == pixels[0].shape for image in pixels):
                return self.cut(torch.stack(pixels))
            parts = [self.cut(image[None]) for image in pixels]
            vectors = RaggedBatch.from_list([part.vectors.values for part in parts])
            return Patches(vectors, tuple(grid for part in parts for grid in part.grids))
        images = pixels.values if isinstance(pixels, RaggedBatch) else pixels
        size, side = vision.patch_size, vision.image_size
        high, wide = images.shape[2:] if images.dim() == 4 else (0, 0)
        fits = (high, wide) == (side, side) if vision.positions == "fixed" else high >= size and wide >= size
        if images.dim() != 4 or images.shape[1] != 3 or not fits or high % size or wide % size:
            sides = f"{side}, {side}" if vision.positions == "fixed" else f"multiples of {size}"
            raise ValueError(f"pixels: expected [B, 3, {sides}], got {list(images.shape)}")
        grid = (high // size, wide // size)
        vectors, number = cut_patches(images, size, vision.patches_last), grid[0] * grid[1]
        if isinstance(pixels, RaggedBatch):
            vectors = RaggedBatch(vectors, pixels.cu_seqlens * number, number, True)
        else:
            starts = torch.arange(len(images) + 1, dtype=torch.int32, device=images.device)
            vectors = RaggedBatch(vectors, starts * number, number)
        return Patches(vectors, (grid,) * max(len(images), 1))

    def embed(self, patches: Patches) -> RaggedBatch:
        """Patches to the tokens ``[T, D]`` that enter the first block: class token, registers, patches row by row."""
        vision, proj = self.config, self.patch_embed.proj
        vectors, grids = patches
        x = project_patches(vectors.values, proj, nn.Linear if vision.patches_last else nn.Conv2d, vectors)
        different = sorted(set(grids))
        places = {
            grid: self.pos_embed
            if vision.positions == "fixed"
            else interpolate_positions(self.pos_embed, grid, int(vision.class_token), vision.positions)
            for grid in different
        }
        if len(different) == 1:
            (grid,) = different
            x = x.unflatten(0, (-1, grid[0] * grid[1]))
            lead = self._lead(places[grid])
            x = x + places[grid][:, int(vision.class_token) :]
            x = torch.cat(of_one_dtype(lead.expand(len(x), -1, -1), x), 1)
            length = x.shape[1]
            starts = vectors.cu_seqlens // (grid[0] * grid[1]) * length
            return RaggedBatch(x.flatten(0, 1), starts, length, vectors.bound)
        rows, parts = x.split([high * wide for high, wide in grids]), []
        for grid, own in zip(grids, rows, strict=True):
            parts += [self._lead(places[grid])[0], own + places[grid][0, int(vision.class_token) :]]
        lengths = [high * wide + vision.prefix for high, wide in grids]
        # Of no picture there are no parts.
        return RaggedBatch.from_lengths(torch.cat(of_one_dtype(x[:0], *parts)), lengths)

    def _lead(self, positions: Tensor) -> Tensor:
        """What stands before the patches, ``[1, prefix, D]``; only the class token has a position."""
        parts = [self.cls_token + positions[:, :1]] if self.config.class_token else []
        parts += [self.registers] if self.config.registers else []
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0] if parts else positions[:, :0]

    def pool(self, tokens: Tokens, backend: str | None = None) -> Tensor:
        """``[B, D]``: what stands for each image, of final tokens before the last LayerNorm; without the projection."""
        vision = self.config
        if vision.pool == "class":
            x = self.norm_post(first_rows(tokens))
        else:
            late = vision.pool == "mean" and vision.norm_after_pool
            tokens = tokens if late else tokens.with_values(self.norm_post(tokens))
            if vision.pool == "attention":
                x = self.head(tokens, backend)
            else:
                x = mean_of_patches(tokens, vision.prefix, vision.num_heads, backend)
                x = self.norm_post(x) if late else x
        return x if self.pooler is None else self.pooler(x).tanh()

    def forward(
        self,
        pixels: Tensor | RaggedBatch | Sequence[Tensor] | Patches,
        dictionary: Tensor | None,
        pruning: Pruning,
        alignment_features: bool = False,
        states: list[Tokens] | None = None,
        pooled: bool = False,
    ) -> Features:
        """Encode images.

        Args:
            pixels: as :meth:`cut` takes them, or patches.
            dictionary, pruning, alignment_features: as :func:`madtp.vision.run_blocks`.
            states: a list to which the tokens before the first block and after each are added.
            pooled: only the features are read. Where they are those of the class token, the last block computes no other
                token, and the result has no other. Without effect where ``states`` are asked for.

        Raises:
            ValueError: pixels of a size that the tower does not take, or no dictionary where one is needed.
        """
        tokens = self.embed(pixels if isinstance(pixels, Patches) else self.cut(pixels))
        if self.norm_pre is not None:
            tokens = tokens.with_values(self.norm_pre(tokens.values, tokens))
        if pruning.active and not self.config.class_token and _reads_class_token(pruning):
            raise ValueError(
                f"pruning: {pruning.name} scores tokens by the attention of a class token, which this tower lacks"
            )
        tokens = Tokens.start(tokens, prefix=self.config.prefix)
        rule = with_minimum(pruning.on("vision", len(self.blocks)), tokens.batch_size, tokens.device)
        blocks = reading(self.blocks, first_of) if pooled and self.config.pool == "class" else self.blocks
        if states is not None:
            states.append(tokens)
            blocks = [partial(_recorded, block, states) for block in self.blocks]
        tokens, *record = run_blocks(blocks, self.query_models, tokens, dictionary, rule, alignment_features)
        x = self.pool(tokens, pruning.backend)
        return Features(x if self.proj is None else self.proj(x), tokens, *record)


def _reads_class_token(pruning: Pruning) -> bool:
    """Whether a rule needs the attention of a class token, which SigLIP has not."""
    rule = pruning.rule if isinstance(pruning, Official) else pruning
    orders = {getattr(rule, "order", None), getattr(rule, "weight", None)}
    return isinstance(rule, (MADTP, EViT)) or bool(orders & {"cls", "importance"})


def _recorded(block: Block, states: list[Tokens], *inputs) -> tuple[Tokens, LayerTrace]:
    """A block whose result is kept, too."""
    tokens, trace = block(*inputs)
    states.append(tokens)
    return tokens, trace


class TextTower(nn.Module):
    """A text transformer; the feature comes from the last token of a text: its end-of-text token, or the last place that
    padding fills."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        text, eps, layers = config.text, config.norm_eps, range(config.text.num_hidden_layers)
        width = text.hidden_size
        sd_dim, mapped = (config.vision.sd_dim, config.vision.map_func) if config.vision else (width, False)
        options = {"eps": eps, "activation": config.text_act or config.hidden_act, "causal": text.causal}
        self.token_embeddings = Embedding(text.vocab_size, width)
        self.position_embeddings = Embedding(text.max_position_embeddings, width)
        self.blocks = nn.ModuleList(
            Block(width, text.num_attention_heads, text.intermediate_size, **options) for _ in layers
        )
        self.query_models = nn.ModuleList(QueryModel(width, sd_dim, mapped or width != sd_dim) for _ in layers)
        self.norm = LayerNorm(width, eps=eps)
        self.proj = Linear(width, config.embed_dim, bias=text.projection_bias) if text.projection else None

    def forward(
        self,
        input_ids: RaggedBatch,
        dictionary: Tensor | None,
        pruning: Pruning,
        alignment_features: bool = False,
        compat: bool = False,
        pooled: bool = False,
    ) -> Features:
        """Encode texts ``[T]`` int64; the last token of each answers for it.

        Args:
            input_ids: without padding, unless the tower was trained with it.
            dictionary, pruning, alignment_features: as :func:`madtp.vision.run_blocks`.
            compat: the official mode of pruned text (see :mod:`madtp.tasks.clip.model`).
            pooled: only the features are read: the last block computes no other token, and the result has no other (but
                in the official mode).

        Raises:
            ValueError: a text beyond the context, or no dictionary where one is needed.
        """
        context = self.position_embeddings.num_embeddings
        if input_ids.max_seqlen > context:
            raise ValueError(
                f"input_ids: a text of {input_ids.max_seqlen} tokens exceeds the model's {context} positions"
            )
        eot, rule = input_ids.lengths - 1, pruning.on("text", len(self.blocks))
        compat = compat and (rule.active or alignment_features)  # a dense EOT sees nothing of the padding behind it
        if compat:
            tokens = Tokens.start(fill_up(input_ids, context, 0)[0])
            rule = with_minimum(rule, len(eot), eot.device, eot + 2, weakest_last=True)
        else:
            tokens = Tokens.start(input_ids, protected_ids=eot)
            rule = with_minimum(rule, len(eot), eot.device)
        x = self.token_embeddings(ids_of(tokens)) + self.position_embeddings(tokens.ids.clamp(max=context - 1))

        def last(tokens: Tokens) -> Tensor:
            return (tokens.cu_seqlens[:-1] + eot).long() if compat else rows_of(tokens, eot)

        pooled = pooled and not compat  # there, which token is read is known only when the last block has pruned
        blocks = reading(self.blocks, last) if pooled else self.blocks
        tokens, *record = run_blocks(
            blocks, self.query_models, tokens.with_values(x), dictionary, rule, alignment_features
        )
        x = self.norm(tokens.values[last(tokens)] if blocks is self.blocks else tokens.values)
        return Features(x if self.proj is None else self.proj(x), tokens, *record)
