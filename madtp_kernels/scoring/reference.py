"""MADTP's token importance and pruning threshold in plain PyTorch: the oracle for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import segments
from ..importance.reference import EPS
from ..ragged import pack, spans


def score_tokens(
    x: Tensor,
    dictionary: Tensor,
    received: Tensor,
    cls: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    temperature: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """importance = (received/sum + max_m G/sum + cls) / 3 and threshold = min_m sum_j softmax_j(G/temperature) importance_j.

    G = x dictionary^T + bias is the alignment of the sample's tokens j >= 1 with the dictionary entries m. The softmax runs
    over the tokens, for each entry. Only the importance carries a gradient: the threshold decides, it does not weigh.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    entries = dictionary.to(dtype)
    importance, threshold = [], []
    for start, stop in spans(cu_seqlens):
        alignment = x[start + 1 : stop].to(dtype) @ entries.mT  # [N, M]
        if bias is not None:
            alignment = alignment + bias.to(dtype)
        best = alignment.amax(1)
        received_b = received[start + 1 : stop].to(dtype)
        score = (
            received_b / (received_b.sum() + EPS) + best / (best.sum() + EPS) + cls[start + 1 : stop].to(dtype)
        ) / 3
        first = score.new_zeros(min(1, stop - start))
        importance.append(torch.cat([first, score]))
        weights = (alignment.detach() / temperature).softmax(0)
        threshold.append((weights * score.detach()[:, None]).sum(0).amin()[None])
    empty = torch.empty(0, dtype=dtype, device=x.device)
    return pack(importance, empty, x.shape[0]), pack(threshold, empty, len(threshold))


def score_tokens_backward(
    x: Tensor,
    dictionary: Tensor,
    received: Tensor,
    cls: Tensor,
    cu_seqlens: Tensor,
    bias: Tensor | None,
    d_importance: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dictionary, received, cls and bias (empty without one); the alignment is recomputed.

    For a term u/(sum u + eps) of the importance with gradient e: du_j = (e_j - sum_k e_k u_k / U) / U, U = sum u + eps. The
    alignment term u_j = max_m G_jm passes its gradient to the entry that attains the maximum.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    row = torch.arange(x.shape[0], device=x.device)
    sample = segments.sample_of(cu_seqlens, x.shape[0])
    scored = (row < cu_seqlens[-1]) & (row != cu_seqlens[:-1].long()[sample]) if len(cu_seqlens) > 1 else row < 0
    error = torch.where(scored, d_importance.to(dtype) / 3, 0.0)

    def through_share(u: Tensor) -> Tensor:
        u = torch.where(scored, u, 0.0)
        total = segments.sums(u, cu_seqlens) + EPS
        mean = segments.sums(error * u, cu_seqlens) / total
        return torch.where(scored, (error - mean[sample]) / total[sample], 0.0) if len(total) else error

    wide, entries = x.to(dtype), dictionary.to(dtype)
    alignment = wide @ entries.mT if bias is None else wide @ entries.mT + bias.to(dtype)  # [C, M]
    best, entry = alignment.max(1)
    d_best = through_share(best)
    dx = torch.where(scored[:, None], d_best[:, None] * entries[entry], 0.0)
    chosen = torch.zeros_like(alignment).scatter_(1, entry[:, None], d_best[:, None])
    d_dictionary = chosen.mT @ torch.where(scored[:, None], wide, 0.0)
    d_bias = received.new_zeros(0) if bias is None else chosen.sum(0).to(bias.dtype)
    d_received = through_share(received.to(dtype)).to(received.dtype)
    return dx.to(x.dtype), d_dictionary.to(dictionary.dtype), d_received, error.to(cls.dtype), d_bias
