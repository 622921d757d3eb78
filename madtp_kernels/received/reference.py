"""Attention received from chosen queries in plain PyTorch: the oracle for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.reference import logits, padded_probabilities
from ..ragged import pack, padded_groups, spans


def chosen(length: int, first: int, last: int, queries: Tensor | None) -> Tensor:
    """``[L]`` bool: the queries of ``first:last``, counted as a Python slice counts, that the mask ``queries [L]`` leaves."""
    rows = torch.zeros(length, dtype=torch.bool, device=None if queries is None else queries.device)
    rows[first:last] = True
    return rows if queries is None else rows & queries


def attention_received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    heads: str,
    sets: int,
    first: int,
    last: int,
    queries: Tensor | None,
) -> Tensor:
    """``[S, C]``: sum_i f_h P_hij over the chosen queries i, f the maximum or mean over the H / S heads h of a set."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    received = []
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    for start, stop in spans(cu_seqlens):
        q_b, k_b = (t[start:stop].to(dtype) for t in (q, k))
        s = logits(q_b, k_b, scale, causal, None if key_bias is None else key_bias[start:stop].to(dtype))
        # A query that sees no key (whatever was biased away) gives nothing.
        p = (s - lse[:, start:stop, None].to(dtype)).exp().where(lse[:, start:stop, None] > float("-inf"), 0)
        p = p.unflatten(0, (sets, -1))  # [S, H / S, L, L]
        p = p.amax(1) if heads == "max" else p.mean(1)
        rows = chosen(stop - start, first, last, None if queries is None else queries[start:stop]).to(q.device)
        received.append(p[:, rows].sum(1).mT)
    return pack(received, q.new_empty(0, sets, dtype=dtype), q.shape[0]).mT.contiguous()


def attention_received_backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    heads: str,
    sets: int,
    first: int,
    last: int,
    queries: Tensor | None,
    d_received: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, lse and key_bias (empty without one), from the probabilities recomputed out of lse.

    dP_hij is d_received_j for a chosen query i: divided by the heads of the set for the mean, shared out among the heads that
    have the maximum for the maximum. dS = P dP, dlse = -sum_j dS.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    dq, dk = (torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format) for _ in range(2))
    d_lse = torch.zeros_like(lse)
    d_bias = torch.zeros(0 if key_bias is None else k.shape[0], dtype=lse.dtype, device=q.device)
    for rows, seen, _, _ in padded_groups(cu_seqlens, cu_seqlens, q.shape[1]):
        q_g, k_g = (t[rows].transpose(1, 2).to(dtype) for t in (q, k))  # [G, H, L, d]
        k_g = k_g.repeat_interleave(groups, 1)
        lse_g = lse[:, rows].transpose(0, 1)[..., None]
        p = padded_probabilities(
            q_g, k_g, lse_g, seen, seen, scale, causal, None if key_bias is None else key_bias[rows]
        )
        length, position = seen.sum(1)[:, None], torch.arange(seen.shape[1], device=q.device)
        begin, end = ((length + edge if edge < 0 else torch.full_like(length, edge)) for edge in (first, last))
        counts = seen & (position >= begin) & (position < end)
        if queries is not None:
            counts = counts & queries[rows]
        p = p.unflatten(1, (sets, -1))  # [G, S, H / S, L, L]
        weight = 1 / p.shape[2]
        if heads == "max":
            highest = p == p.amax(2, keepdim=True)
            weight = highest / highest.sum(2, keepdim=True)
        error = torch.where(seen, d_received[:, rows].to(dtype), 0.0).transpose(0, 1)  # [G, S, L]
        ds = (p * weight * error[:, :, None, None] * counts[:, None, None, :, None]).flatten(1, 2)
        dq[rows[seen]] = (scale * ds @ k_g).transpose(1, 2)[seen]
        dk[rows[seen]] = (scale * ds.mT @ q_g).transpose(1, 2)[seen]
        d_lse[:, rows[seen]] = -ds.sum(-1).transpose(1, 2)[seen].mT.to(lse.dtype)
        if key_bias is not None:
            d_bias[rows[seen]] = ds.sum((1, 2))[seen].to(lse.dtype)
    return dq.to(q.dtype), dk.unflatten(1, (-1, groups)).sum(2).to(k.dtype), d_lse, d_bias
