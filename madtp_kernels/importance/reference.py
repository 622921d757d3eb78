"""The attention terms of MADTP's token importance in plain PyTorch: the oracle for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention.reference import logits
from ..ragged import pack, spans

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
        p = (s - lse[:, start:stop, None]).exp()[:, :, 1:]  # [H, L, N]
        norm = out_b[1:].norm(dim=-1).mT  # [H, N]
        share = norm / (norm.sum(0) + EPS)
        first = q.new_zeros(1, dtype=dtype)
        received += [first, p[:, 1:].amax(0).sum(0)]
        cls += [first, (p[:, 0] * share).sum(0)]
    empty = torch.empty(0, dtype=dtype, device=q.device)
    return pack(received, empty, q.shape[0]), pack(cls, empty, q.shape[0])
