"""A dense BLIP-NLVR over several statements per pair, for training from scratch.

The model's own forward takes two images per statement. Here the images of a pair are encoded once for all its
statements, and everything has one length, so that attention is two matrix products: several times faster to
train on a CPU. It is the same function of the same parameters as `NLVR.forward` at temperature 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.tasks.nlvr.model import NLVR


class PairsOutput(NamedTuple):
    """Result of :func:`forward_pairs`; P pairs with K statements each."""

    logits: Tensor
    """``[P, K, 2]``"""
    states: Tensor
    """``[P, K, D]`` what the head sees of each statement."""
    glances: Tensor
    """``[layers, 2P, K, N + 1]`` logits of the first cross-attention head for each first token."""
    image_embeds: Tensor
    """``[2P, N + 1, D]`` image tokens, the P left images first."""


def forward_pairs(model: NLVR, pixels: Tensor, input_ids: Tensor, lengths: Tensor) -> PairsOutput:
    """Answer K statements about each of P pairs, without pruning.

    Args:
        model: a model without a map between stream and dictionary, or with one; it takes no part.
        pixels: ``[2P, 3, S, S]``: the P left images, then the P right ones.
        input_ids: ``[P, K, T]`` int64, padded with any id at the end.
        lengths: ``[P, K]`` int64 tokens of each statement.
    """
    images = encode_images(model, pixels)
    return PairsOutput(*answer_statements(model, images, input_ids, lengths), images)


def answer_statements(model: NLVR, images: Tensor, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The second half of :func:`forward_pairs`: logits, states and glances.

    It begins with the image tokens ``[2P, N + 1, D]``.
    """
    pairs, per_pair, width = input_ids.shape
    text = model.text_encoder
    positions = torch.arange(width, device=input_ids.device)
    embeddings = text.embeddings
    x = embeddings.LayerNorm(embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(positions))
    padding = positions >= lengths[..., None]
    bias = x.new_zeros(padding.shape).masked_fill(padding, -torch.inf)
    bias = bias.flatten(0, 1)[:, None, None]  # [P K, 1, 1, T]
    glances = []
    x = x.flatten(0, 1)  # [P K, T, D]
    for layer in text.encoder.layer:
        q, k, v = layer.attention.self.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).unbind(2)
        attended = layer.attention.output.dense(attend(q, k, v, bias), residual=x)
        x = layer.attention.output.LayerNorm(attended)
        glances.append(_glance(layer.crossattention, x[:, 0].unflatten(0, (pairs, per_pair)), images))
        x = _twin_cross_attention(layer.crossattention, x.reshape(pairs, per_pair * width, -1), images)
        hidden = layer.intermediate.dense(x, activation="gelu")
        x = layer.output.LayerNorm(layer.output.dense(hidden, residual=x)).reshape(pairs * per_pair, width, -1)
    states = x[:, 0].unflatten(0, (pairs, per_pair))
    return model.cls_head(states), states, torch.stack(glances)


def encode_images(model: NLVR, pixels: Tensor) -> Tensor:
    """``[B, 3, S, S]`` to the final image tokens ``[B, N + 1, D]``, CLS first, without pruning."""
    vision = model.visual_encoder
    tokens = vision.embed(pixels)
    x = tokens.values.unflatten(0, (tokens.batch_size, -1))
    for block in vision.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.num_heads, -1)).unbind(2)
        x = block.attn.proj(attend(q, k, v), residual=x)
        x = block.mlp.fc2(block.mlp.fc1(block.norm2(x), activation="gelu"), residual=x)
    return vision.norm(x)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of ``q [B, Lq, H, d]`` over ``k, v [B, Lk, H, d]`` with an additive bias.

    Returns ``[B, Lq, H * d]``, the heads concatenated.

    Written out because the backward pass of PyTorch's fused attention takes more than half of a training step
    on a CPU.
    """
    logits = (q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.permute(0, 2, 3, 1)  # [B, H, Lq, Lk]
    if bias is not None:
        logits = logits + bias
    return (logits.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2).flatten(2)


def _glance(cross, first: Tensor, images: Tensor) -> Tensor:
    """Where the first head looks for the states ``first [P, K, D]``: logits ``[2P, K, N + 1]``."""
    sides = []
    for attention, image in zip((cross.self0, cross.self1), images.chunk(2), strict=True):
        width = attention.query.out_features // attention.num_heads
        q = F.linear(first, attention.query.weight[:width], attention.query.bias[:width])
        k = F.linear(image, attention.kv.weight[:width], attention.kv.bias[:width])
        sides.append(q * width**-0.5 @ k.mT)
    return torch.cat(sides)


def _twin_cross_attention(cross, x: Tensor, images: Tensor) -> Tensor:
    """``x [P, K * T, D]``: the words of all statements about a pair attend to its images together."""
    sides = []
    for attention, dense, image in zip(
        (cross.self0, cross.self1), (cross.output.dense0, cross.output.dense1), images.chunk(2), strict=True
    ):
        q = attention.query(x).unflatten(-1, (attention.num_heads, -1))
        k, v = attention.kv(image).unflatten(-1, (2, attention.num_heads, -1)).unbind(2)
        sides.append(dense(attend(q, k, v)))
    if cross.output.merge_layer is None:
        both = (sides[0] + sides[1]) / 2 + x
    else:
        both = cross.output.merge_layer(torch.cat(sides, -1), residual=x)
    return cross.output.LayerNorm(both)
