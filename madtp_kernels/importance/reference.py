"""The attention terms of MADTP's token importance in plain PyTorch: the oracle for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.reference import logits, padded_probabilities
from ..ragged import pack, padded_groups, spans

EPS = 1e-8  # MADTP adds it to every denominator


def attention_importance(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """received_j = sum_{i>=1} max_h P_hij and cls_j = sum_h P_h0j |out_hj| / (sum_h |out_hj| + eps), for j >= 1.

    P = exp(s - lse) are the attention probabilities, token 0 of each sample is its CLS token. The maximum over heads is
    taken before the sum over queries. Both results are 0 for token 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    received, cls = [], []
    for start, stop in spans(cu_seqlens):
        if start == stop:
            continue
        q_b, k_b, out_b = (t[start:stop].to(dtype) for t in (q, k, out))
        s = logits(q_b, k_b, scale, causal, None if key_bias is None else key_bias[start:stop].to(dtype))
        lse_b = lse[:, start:stop, None]
        p = torch.where(lse_b == float("-inf"), 0.0, (s - lse_b).exp())[:, :, 1:]  # [H, L, N]
        norm = out_b[1:].norm(dim=-1).mT  # [H, N]
        share = norm / (norm.sum(0) + EPS)
        first = q.new_zeros(1, dtype=dtype)
        received += [first, p[:, 1:].amax(0).sum(0)]
        cls += [first, (p[:, 0] * share).sum(0)]
    empty = torch.empty(0, dtype=dtype, device=q.device)
    return pack(received, empty, q.shape[0]), pack(cls, empty, q.shape[0])


def attention_importance_backward(
    q: Tensor,
    k: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    d_received: Tensor,
    d_cls: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, out, lse and key_bias (empty without one), from the probabilities recomputed out of lse.

    With P = exp(s - lse): dP_hij is d_received_j for i >= 1 and the head that has the maximum (shared out among equal
    heads), and d_cls_j share_hj for i = 0; dS = P dP, dlse = -sum_j dS. The share |out_hj| / (sum_h |out_hj| + eps) gives
    the gradient of out.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, d_out = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, out))
    d_lse = torch.zeros_like(lse)
    d_bias = torch.zeros(0 if key_bias is None else k.shape[0], dtype=lse.dtype, device=q.device)
    for rows, seen, _, _ in padded_groups(cu_seqlens, cu_seqlens, q.shape[1]):
        q_g, k_g, out_g = (t[rows].transpose(1, 2).to(dtype) for t in (q, k, out))  # [G, H, L, d]
        lse_g = lse[:, rows].transpose(0, 1)[..., None]
        p = padded_probabilities(
            q_g, k_g, lse_g, seen, seen, scale, causal, None if key_bias is None else key_bias[rows]
        )
        prunable = seen.clone()
        prunable[:, 0] = False  # token 0 receives nothing
        received, cls = (torch.where(prunable, d[rows].to(dtype), 0.0) for d in (d_received, d_cls))  # [G, L]

        highest = p == p.amax(1, keepdim=True)
        ds = p * highest / highest.sum(1, keepdim=True) * received[:, None, None]
        norm = out_g.norm(dim=-1)  # [G, H, L]
        total = norm.sum(1, keepdim=True) + EPS
        ds[:, :, 0] = p[:, :, 0] * norm / total * cls[:, None]
        # d share_hj = P_h0j d_cls_j;  d norm = (d share - sum_h share d share) / total;  d out = d norm out / |out|.
        d_share = p[:, :, 0] * cls[:, None]
        d_norm = (d_share - (d_share * norm / total).sum(1, keepdim=True)) / total
        direction = torch.where(norm[..., None] > 0, out_g / norm[..., None], 0.0)

        d_out[rows[seen]] = (d_norm[..., None] * direction).transpose(1, 2)[seen].to(out.dtype)
        dq[rows[seen]] = (scale * ds @ k_g).transpose(1, 2)[seen].to(q.dtype)
        dk[rows[seen]] = (scale * ds.mT @ q_g).transpose(1, 2)[seen].to(k.dtype)
        d_lse[:, rows[seen]] = -ds.sum(-1).transpose(1, 2)[seen].mT.to(lse.dtype)
        if key_bias is not None:
            d_bias[rows[seen]] = ds.sum((1, 2))[seen].to(lse.dtype)
    return dq, dk, d_out, d_lse, d_bias
