"""What the kernels are compared with: the same results from eager PyTorch, without tricks and without handicaps.

Attention on padded batches (materialised, and fused by `scaled_dot_product_attention`), scoring and compaction in
vectorised PyTorch, the batch-maximum compaction of the released pruners, and a whole dense BLIP-NLVR.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.tasks.nlvr.model import NLVR

EPS = 1e-8  # MADTP adds it to every denominator


# ---- attention on padded batches [B, H, L, d] --------------------------------------------------------------------


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention with its matrix: out ``[B, H, L, d]`` and the probabilities ``[B, H, L, L]``; ``mask [B, L]`` or None."""
    logits = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
    probabilities = logits.softmax(-1)
    return probabilities @ v, probabilities


def eager_importance(out: Tensor, probabilities: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """MADTP's received and CLS attention ``[B, L - 1]`` from the attention matrix."""
    received = probabilities[:, :, 1:, 1:].amax(1)
    if mask is not None:
        received = received * mask[:, 1:, None]
    norm = out[:, :, 1:].norm(dim=-1)
    cls = (probabilities[:, :, 0, 1:] * norm / (norm.sum(1, keepdim=True) + EPS)).sum(1)
    return received.sum(1), cls


# ---- scoring and compaction --------------------------------------------------------------------------------------


def eager_scores(
    x: Tensor, dictionary: Tensor, received: Tensor, cls: Tensor, temperature: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Importance ``[B, N]`` and threshold ``[B]`` of padded tokens ``x [B, N, D]`` without their first."""
    alignment = (x @ dictionary.mT).float()
    best = alignment.amax(-1)
    logits = alignment / temperature
    if mask is not None:
        best = best * mask
        logits = logits.masked_fill(~mask[..., None], float("-inf"))
    importance = (
        received / (received.sum(-1, keepdim=True) + EPS) + best / (best.sum(-1, keepdim=True) + EPS) + cls
    ) / 3
    threshold = (logits.softmax(1) * importance[..., None]).sum(1).amin(-1)
    return importance, threshold


def eager_compact(x: Tensor, importance: Tensor, threshold: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Every sample by its own count, packed: rows ``[T', D]`` and their offsets. For batches that prune every sample."""
    lengths = cu_seqlens.diff()
    sample = torch.repeat_interleave(lengths)
    first = cu_seqlens[:-1].long()
    keep = importance > threshold[sample]
    keep[first] = True
    kept = torch.zeros_like(lengths).index_add_(0, sample, keep.int())
    weight = importance.masked_fill(keep, 0.0)
    total = weight.new_zeros(len(lengths)).index_add_(0, sample, weight)
    merged = x.new_zeros(len(lengths), x.shape[1], dtype=torch.float32)
    merged.index_add_(0, sample, weight[:, None] * x)
    merged /= total[:, None] + EPS
    cu_out = F.pad((kept + 1).cumsum(0, dtype=torch.int32), (1, 0))
    values = x.new_empty(int(cu_out[-1]), x.shape[1])
    is_merged = torch.zeros(len(values), dtype=torch.bool, device=x.device)
    is_merged[cu_out[1:].long() - 1] = True
    values[~is_merged] = x[keep]
    values[is_merged] = merged.to(x.dtype)
    return values, cu_out


def batch_maximum_compact(x: Tensor, importance: Tensor, threshold: Tensor) -> Tensor:
    """As MADTP and its peers do it: every sample of ``x [B, L, D]`` keeps the largest count of the batch; ``importance``
    is ``[B, L]``, its first column is not looked at."""
    scores = importance[:, 1:]
    count = int((scores > threshold[:, None]).sum(1).max())
    order = scores.topk(scores.shape[1], sorted=True).indices
    rows = x[:, 1:].gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    weight = scores.gather(1, order[:, count:])
    weight = (weight / (weight.sum(1, keepdim=True) + EPS)).to(x.dtype)
    merged = (rows[:, count:] * weight[..., None]).sum(1, keepdim=True)
    return torch.cat([x[:, :1], rows[:, :count], merged], 1)


# ---- a dense ViT block and a dense BLIP-NLVR ----------------------------------------------------------------------


def dense_block(block, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """One ViT block on padded tokens ``x [B, L, D]`` with `scaled_dot_product_attention`; ``mask [B, 1, 1, L]`` or None."""
    batch, length, width = x.shape
    heads = block.num_heads
    h = _norm(block.norm1, x)
    q, k, v = _linear(block.attn.qkv, h).view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + _linear(block.attn.proj, out.transpose(1, 2).reshape(batch, length, width))
    h = _norm(block.norm2, x)
    return x + _linear(block.mlp.fc2, F.gelu(_linear(block.mlp.fc1, h)))


class PlainNLVR:
    """A dense BLIP-NLVR on padded batches in plain PyTorch, with the weights of one of our models (not copied)."""

    def __init__(self, model: NLVR) -> None:
        self.model = model

    def __call__(self, pixels: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
        """``pixels [2B, 3, S, S]`` (left images, then right ones), ``input_ids`` and ``mask`` ``[B, L]``: logits ``[B, 2]``."""
        vision, text = self.model.visual_encoder, self.model.text_encoder
        proj = vision.patch_embed.proj
        x = F.conv2d(pixels, proj.weight, proj.bias, proj.stride).flatten(2).mT
        x = torch.cat([vision.cls_token.expand(len(x), -1, -1), x], 1) + vision.pos_embed
        for block in vision.blocks:
            x = dense_block(block, x)
        left, right = _norm(vision.norm, x).chunk(2)

        embeddings = text.embeddings
        h = embeddings.word_embeddings.weight[input_ids]
        h = h + embeddings.position_embeddings.weight[: input_ids.shape[1]]
        h = _norm(embeddings.LayerNorm, h)
        for layer in text.encoder.layer:
            h = self._text_layer(layer, h, left, right, mask[:, None, None])
        head = self.model.cls_head
        return _linear(head[2], F.relu(_linear(head[0], h[:, 0])))

    @staticmethod
    def _text_layer(layer, x: Tensor, left: Tensor, right: Tensor, mask: Tensor) -> Tensor:
        heads = layer.num_heads
        q, k, v = _heads(_linear(layer.attention.self.qkv, x), 3, heads)
        out = _merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        x = _norm(layer.attention.output.LayerNorm, _linear(layer.attention.output.dense, out) + x)

        cross = layer.crossattention
        seen = []
        for image, projections, dense in (
            (left, cross.self0, cross.output.dense0),
            (right, cross.self1, cross.output.dense1),
        ):
            (q,) = _heads(_linear(projections.query, x), 1, heads)
            k, v = _heads(_linear(projections.kv, image), 2, heads)
            seen.append(_linear(dense, _merge_heads(F.scaled_dot_product_attention(q, k, v))))
        merge = cross.output.merge_layer
        both = (seen[0] + seen[1]) / 2 if merge is None else _linear(merge, torch.cat(seen, -1))
        x = _norm(cross.output.LayerNorm, both + x)
        hidden = F.gelu(_linear(layer.intermediate.dense, x))
        return _norm(layer.output.LayerNorm, _linear(layer.output.dense, hidden) + x)


def _linear(layer, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _norm(layer, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)


def _heads(x: Tensor, parts: int, heads: int) -> Tensor:
    """``[B, L, parts * D]`` to ``[parts, B, H, L, d]``."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4)


def _merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)
