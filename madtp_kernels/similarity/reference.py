"""Which tokens of a sample have alike keys, in plain PyTorch: the oracle for tests and benchmarks.

The cosine of two keys is 0 if one of them is zero or not finite. Among equal cosines the lower row counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import segments
from ..ragged import pack, spans


def unit(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys ``[L, D]`` as factors of cosines: zeros where a key has no direction, and ``[L]`` 1 / norm, 0 for those."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    square = wide.square().sum(1)
    directed = (square > 0) & square.isfinite()
    return wide.where(directed[:, None], 0.0), square.rsqrt().where(directed, 0.0)


def most_alike(
    queries: Tensor, candidates: Tensor, seen: Tensor, known: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """For each of ``queries [Q, D]`` the cosine ``[Q]`` of the most similar of ``candidates [K, D]`` and its index.

    ``seen [Q, K]`` says which candidates count; where none does: -inf and -1. ``known``: 1 / norm of both, as :func:`unit` has
    them.
    """
    (q, q_scale), (k, k_scale) = unit(queries), unit(candidates)
    if known is not None:
        q_scale, k_scale = known
        q, k = (keys.where(scale[:, None] > 0, 0.0) for keys, scale in ((q, q_scale), (k, k_scale)))
    if seen.numel() == 0:
        return q_scale.new_full((seen.shape[0],), float("-inf")), seen.new_full((seen.shape[0],), -1, dtype=torch.int64)
    # The norm of the query does not matter for the choice: it is left to the end, where it cannot make two cosines equal.
    best, index = (q @ k.mT * k_scale).where(seen, float("-inf")).max(1)
    any_seen = seen.any(1)
    cosine = (best * q_scale).clamp(-1, 1).where(any_seen, float("-inf"))
    return cosine, index.where(any_seen, -1)


def nearest_kept(
    keys: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    goes: Tensor | None = None,
    inverse_norms: Tensor | None = None,
) -> Tensor:
    """Row of the kept token of its sample with the most similar key: itself for a kept token, or one that does not go; -1 if none
    is kept."""
    into = []
    for start, stop in spans(cu_seqlens):
        rows = torch.arange(start, stop, device=keys.device)
        survivors = rows[kept[start:stop]]
        seen = torch.ones(stop - start, len(survivors), dtype=torch.bool, device=keys.device)
        known = None if inverse_norms is None else (inverse_norms[start:stop], inverse_norms[survivors])
        _, index = most_alike(keys[start:stop], keys[survivors], seen, known)
        best = survivors[index] if len(survivors) else rows.new_full(rows.shape, -1)
        own = kept[start:stop] if goes is None else kept[start:stop] | ~goes[start:stop]
        into.append(rows.where(own, best).int())
    return pack(into, torch.empty(0, dtype=torch.int32, device=keys.device), keys.shape[0])


def novelty(keys: Tensor, rank: Tensor | None, cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """1 - max { cos(k_i, k_j) : j != i, or j before i in rank } and the row j that attains it (2 and -1 without one)."""
    dtype = torch.promote_types(keys.dtype, torch.float32)
    result, nearest = [], []
    for start, stop in spans(cu_seqlens):
        position = torch.arange(stop - start, device=keys.device)
        seen = position != position[:, None]
        if rank is not None:
            own = rank[start:stop]
            seen = (own > own[:, None]) | (own == own[:, None]) & (position < position[:, None])
        cosine, index = most_alike(keys[start:stop], keys[start:stop], seen)
        result.append((1 - cosine).where(index >= 0, 2.0))
        nearest.append((index + start).where(index >= 0, -1).int())
    like = torch.empty(0, dtype=dtype, device=keys.device)
    return pack(result, like, keys.shape[0]), pack(nearest, like.int(), keys.shape[0])


def novelty_backward(keys: Tensor, nearest: Tensor, cu_seqlens: Tensor, d_novelty: Tensor) -> Tensor:
    """Gradient of the keys: with u = k / |k| and c = <u_i, u_j>, dc/dk_i = (u_j - c u_i) / |k_i|, and so for k_j."""
    row = torch.arange(keys.shape[0], device=keys.device)
    found = (row < cu_seqlens[-1]) & (nearest >= 0)
    wide, scale = unit(keys.where((row < cu_seqlens[-1])[:, None], 0.0))
    other = nearest.long().where(found, row)
    direction = wide * scale[:, None]
    partner = direction[other]
    cosine = (direction * partner).sum(1, keepdim=True)
    # A key without a direction has cosine 0 with all, whatever it is: no gradient reaches its partner either.
    error = -d_novelty.to(wide.dtype).where(found & (scale[other] > 0), 0.0)[:, None]
    dk = error * (partner - cosine * direction) * scale[:, None]
    to_other = error * (direction - cosine * partner) * scale[other][:, None]
    dk = dk + segments.scatter_add(to_other.where(scale[:, None] > 0, 0.0), other, keys.shape[0])
    return dk.to(keys.dtype)


def merge_scores(
    keys: Tensor,
    order: Tensor,
    weight: Tensor | None,
    sizes: Tensor | None,
    free: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    weight_exponent: float,
    novelty_exponent: float,
    size_exponent: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(a / mean a)^p n^q s^r of the free tokens in float64, the novelty n by order, and 1 / |k|."""
    new, _ = novelty(keys, order.masked_fill(~free, -1.0), cu_seqlens, max_seqlen)
    weight = order if weight is None else weight
    scores = worth(new, weight, sizes, free, cu_seqlens, weight_exponent, novelty_exponent, size_exponent)
    return scores, new, unit(keys)[1]


def worth(
    new: Tensor,
    weight: Tensor,
    sizes: Tensor | None,
    free: Tensor,
    cu_seqlens: Tensor,
    weight_exponent: float,
    novelty_exponent: float,
    size_exponent: float,
) -> Tensor:
    """The score of :func:`merge_scores`, of tokens whose novelty ``new [C]`` is known. Nothing waits for a device."""
    if cu_seqlens.shape[0] == 1:
        return torch.zeros_like(new)
    free = free & (torch.arange(len(free), device=free.device) < cu_seqlens[-1])
    weight = weight.double().where(free, 0.0)
    number = segments.sums(free.double(), cu_seqlens)
    mean = segments.sums(weight, cu_seqlens) / number.clamp(min=1)
    sample = segments.sample_of(cu_seqlens, len(free))
    score = (weight / mean[sample]) ** weight_exponent * new.double() ** novelty_exponent
    if sizes is not None and size_exponent:
        score = score * sizes.double() ** size_exponent
    score = score.where(free, 0.0)
    return torch.nan_to_num(score, nan=0.0).clamp(max=torch.finfo(torch.float32).max).to(new.dtype)


def match_tokens(
    keys: Tensor, cu_seqlens: Tensor, max_seqlen: int, count: Tensor | None, threshold: float | None, protected: int
) -> tuple[Tensor, Tensor]:
    """ToMe's bipartite soft matching: the row each token is merged into, and the cosine of each source's best pair.

    Sources are the even positions of a sample, destinations the odd ones; the first ``protected`` positions are neither. The
    ``count`` sources (at most half of the others) with the most similar destination are matched, if above ``threshold``.
    """
    into, similarity = [], []
    for b, (start, stop) in enumerate(spans(cu_seqlens)):
        rows = torch.arange(start, stop, device=keys.device)
        position = torch.arange(stop - start, device=keys.device)
        free = position >= protected
        source, target = rows[free & (position % 2 == 0)], rows[free & (position % 2 == 1)]
        seen = torch.ones(len(source), len(target), dtype=torch.bool, device=keys.device)
        cosine, index = most_alike(keys[source], keys[target], seen)
        most = max(0, stop - start - protected) // 2
        most = most if count is None else min(most, int(count[b]))
        chosen = cosine.argsort(descending=True, stable=True)[:most]
        if threshold is not None:
            chosen = chosen[cosine[chosen] > threshold]
        matched = rows.clone()
        matched[source[chosen] - start] = target[index[chosen]]
        into.append(matched.int())
        similarity.append(cosine.new_full(rows.shape, float("-inf")).index_copy_(0, source - start, cosine))
    like = torch.empty(0, dtype=torch.promote_types(keys.dtype, torch.float32), device=keys.device)
    return pack(into, like.int(), keys.shape[0]), pack(similarity, like, keys.shape[0])
