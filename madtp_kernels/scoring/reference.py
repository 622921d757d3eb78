"""MADTP's token importance and pruning threshold in plain PyTorch: the oracle for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

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
