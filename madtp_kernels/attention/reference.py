"""The formula of ragged attention in plain PyTorch: the oracle for tests and benchmarks."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..ragged import pack, padded_groups, spans


def logits(q: Tensor, k: Tensor, scale: float, causal: bool, key_bias: Tensor | None) -> Tensor:
    """Logits of one sample, ``[H, Lq, Lk]``: scale * <q_hi, k_hj> + key_bias_j, -inf where a causal query may not look.

    Causal attention is aligned at the end: query i sees keys j <= i + Lk - Lq.
    """
    device = q.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        s = torch.einsum("ihd,jhd->hij", q, k) * scale  # in the dtype of the operands, which lse has
    if key_bias is not None:
        s = s + key_bias
    if causal:
        blind = torch.ones(s.shape[1:], dtype=torch.bool, device=s.device).triu(k.shape[0] - q.shape[0] + 1)
        s = s.masked_fill(blind, float("-inf"))
    return s


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out_hi = sum_j softmax_j(s_hij) v_hj and lse_hi = log sum_j exp(s_hij), sample by sample."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if k.shape[1] != q.shape[1]:  # grouped queries
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(spans(cu_seqlens_q), spans(cu_seqlens_k), strict=True):
        # Queries at the front that see no key: all of them without keys, the surplus ones under a causal mask.
        blind = q1 - q0 if k1 == k0 else max(0, (q1 - q0) - (k1 - k0)) if causal else 0
        q_b, k_b, v_b = (t.to(dtype) for t in (q[q0 + blind : q1], k[k0:k1], v[k0:k1]))
        s = logits(q_b, k_b, scale, causal, None if key_bias is None else key_bias[k0:k1].to(dtype))
        lse = s.logsumexp(-1) if k1 > k0 else s.new_zeros(s.shape[:2])  # [H, Lq - blind]
        # A query whose keys all stand at -inf sees none of them.
        p = torch.where(lse[..., None] == float("-inf"), 0.0, (s - lse[..., None]).exp())
        out = torch.einsum("hij,jhd->ihd", p, v_b)
        outs.append(torch.cat([out.new_zeros(blind, *out.shape[1:]), out]).to(q.dtype))
        lses.append(torch.cat([lse.new_full((blind, lse.shape[0]), float("-inf")), lse.mT]))
    empty = torch.empty(0, q.shape[1], dtype=dtype, device=q.device)
    return pack(outs, q, q.shape[0]), pack(lses, empty, q.shape[0]).mT.contiguous()


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    d_out: Tensor,
    d_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias (empty without one), from the probabilities recomputed out of lse.

    With P = exp(s - lse): dS = P * (dP - sum_j(P dP) + dlse), where dP = dout v^T and sum_j(P dP) = <dout, out>.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    d_bias = torch.zeros(0 if key_bias is None else k.shape[0], dtype=dtype, device=q.device)
    for rows_q, seen_q, rows_k, seen_k in padded_groups(cu_seqlens_q, cu_seqlens_k, q.shape[1]):
        q_g, out_g, d_out_g = (t[rows_q].transpose(1, 2).to(dtype) for t in (q, out, d_out))  # [G, H, Lq, d]
        k_g, v_g = (t[rows_k].transpose(1, 2).to(dtype) for t in (k, v))
        lse_g, d_lse_g = (t[:, rows_q].transpose(0, 1)[..., None].to(dtype) for t in (lse, d_lse))  # [G, H, Lq, 1]
        p = padded_probabilities(
            q_g, k_g, lse_g, seen_q, seen_k, scale, causal, None if key_bias is None else key_bias[rows_k]
        )
        mean_dp = (d_out_g * out_g).sum(-1, keepdim=True)
        ds = p * (d_out_g @ v_g.mT - mean_dp + d_lse_g)
        dq[rows_q[seen_q]] = (scale * ds @ k_g).transpose(1, 2)[seen_q].to(q.dtype)
        dk[rows_k[seen_k]] = (scale * ds.mT @ q_g).transpose(1, 2)[seen_k].to(k.dtype)
        dv[rows_k[seen_k]] = (p.mT @ d_out_g).transpose(1, 2)[seen_k].to(v.dtype)
        if key_bias is not None:
            d_bias[rows_k[seen_k]] = ds.sum((1, 2))[seen_k]
    return dq, dk, dv, d_bias


def padded_probabilities(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seen_q: Tensor,
    seen_k: Tensor,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
) -> Tensor:
    """``[G, H, Lq, Lk]`` probabilities exp(s - lse) of samples padded to the same lengths.

    They are 0 for padding, for queries that see no key, and where a causal query may not look.

    Args:
        q, k: ``[G, H, L, d]``; lse: ``[G, H, Lq, 1]``; seen_q, seen_k: ``[G, L]``, which rows exist.
    """
    s = q @ k.mT * scale
    if key_bias is not None:
        s = s + key_bias[:, None, None].to(s.dtype)
    hidden = ~(seen_q[:, :, None] & seen_k[:, None])  # [G, Lq, Lk]
    if causal:
        row, column = (torch.arange(n, device=q.device) for n in s.shape[-2:])
        ahead = (seen_k.sum(1) - seen_q.sum(1))[:, None, None]
        hidden = hidden | (column > row[:, None] + ahead)
    # Masked before the exponential: what stands there may be infinite, and would give NaN times zero in a gradient.
    hidden = hidden[:, None] | (lse == float("-inf"))
    return (s - lse).masked_fill(hidden, float("-inf")).exp()
