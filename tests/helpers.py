"""What several test files share: which backends run here, random inputs of the operations, and the error bound.

A *case* is a dict of keyword arguments of one public operation. Everything random comes from a generator that the caller
seeds. Fixtures and options are in `conftest.py`.
"""

import pytest
import torch
import torch.nn.functional as F

import madtp_kernels
from madtp_kernels import RaggedBatch, backends, build
from madtp_kernels.ragged import offsets_from_lengths

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-8  # MADTP adds it to every denominator

OPERATIONS = {
    "attention": madtp_kernels.attention,
    "attention_importance": madtp_kernels.attention_importance,
    "attention_with_importance": madtp_kernels.attention_with_importance,
    "score_tokens": madtp_kernels.score_tokens,
    "compact": madtp_kernels.compact,
    "attention_received": madtp_kernels.attention_received,
    "nearest_kept": madtp_kernels.nearest_kept,
    "novelty": madtp_kernels.novelty,
    "match_tokens": madtp_kernels.match_tokens,
    "merge_scores": madtp_kernels.merge_scores,
    "lowest_tokens": madtp_kernels.lowest_tokens,
}
SIMILARITY = ("nearest_kept", "novelty", "match_tokens")

# Which axis of an argument counts tokens, by the offsets that describe it. `x` is a tensor or a RaggedBatch.
_QUERY_TOKENS = dict.fromkeys(
    "q out x received cls importance protected ids sizes keys kept goes inverse_norms rank queries order weight free scores".split(),
    0,
) | {"lse": 1}
_KEY_TOKENS = dict.fromkeys("k v key_bias".split(), 0)
_SAMPLES = ("threshold", "keep_count", "min_keep", "count")


def missing(name: str) -> str | None:
    """Why a backend cannot exist here. One that should exist but does not load is not missing: it has to fail its tests."""
    reason = backends.availability(name, DEVICE)
    if name != "cpu" or reason is None:
        return reason
    try:
        build.compiler()
    except build.BuildError:
        return reason
    return None


def backends_here(*, kernels_only: bool = False):
    """Parameters for every backend that tensors on this machine's device may use; missing ones are skipped, with the reason."""
    names = ("reference", "cpu", "triton") if DEVICE == "cpu" else ("reference", "triton", "cuda")
    parameters = []
    for name in names[kernels_only:]:
        reason = missing(name)
        parameters.append(pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason))))
    return parameters


def interpreted(backend: str) -> bool:
    """Whether this backend runs through Triton's interpreter: about a thousand times slower, so for tiny shapes only."""
    return backend == "triton" and DEVICE == "cpu"


def offsets(lengths):
    return offsets_from_lengths(lengths, DEVICE)


def normal(generator, *shape, dtype=torch.float32):
    """Normal numbers, drawn on the CPU so that a seed means the same everywhere."""
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def spare_rows(tensor, rows, axis=0):
    """The tensor with undefined rows appended: NaN, or the largest integer."""
    if rows == 0:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = rows
    if tensor.dtype == torch.bool:
        filling = tensor.new_ones(shape)
    elif tensor.is_floating_point():
        filling = tensor.new_full(shape, float("nan"))
    else:
        filling = tensor.new_full(shape, torch.iinfo(tensor.dtype).max)
    return torch.cat([tensor, filling], axis)


def with_spare_rows(case, rows):
    """The case in a buffer that is larger than its tokens."""
    wide = {}
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            wide[name] = RaggedBatch(spare_rows(value.values, rows), value.cu_seqlens, value.max_seqlen)
        elif torch.is_tensor(value) and name in _QUERY_TOKENS | _KEY_TOKENS:
            wide[name] = spare_rows(value, rows, (_QUERY_TOKENS | _KEY_TOKENS)[name])
        else:
            wide[name] = value
    return wide


# ---- random cases ---------------------------------------------------------------------------------------------------


def attention_case(
    generator, lengths, heads=2, head_dim=8, dtype=torch.float32, *, key_lengths=None, key_heads=None, causal=False,
    bias=False, gain=1.0,
):  # fmt: skip
    """Self-attention, or cross-attention with ``key_lengths``; ``gain`` sharpens the probabilities."""
    key_heads = key_heads or heads
    key_lengths = lengths if key_lengths is None else key_lengths
    queries, keys = sum(lengths), sum(key_lengths)
    return {
        "q": normal(generator, queries, heads, head_dim, dtype=dtype) * gain,
        "k": normal(generator, keys, key_heads, head_dim, dtype=dtype),
        "v": normal(generator, keys, key_heads, head_dim, dtype=dtype),
        "cu_seqlens_q": offsets(lengths),
        "cu_seqlens_k": offsets(key_lengths),
        "max_seqlen_q": max(lengths, default=0),
        "max_seqlen_k": max(key_lengths, default=0),
        "causal": causal,
        "key_bias": normal(generator, keys) if bias else None,
    }


def importance_case(
    generator, lengths, heads=2, head_dim=8, dtype=torch.float32, *, causal=False, bias=False, gain=1.0
):
    """Queries and keys with the result that the reference's attention has for them."""
    attended = attention_case(generator, lengths, heads, head_dim, dtype, causal=causal, bias=bias, gain=gain)
    out, lse = madtp_kernels.attention(**attended, backend="reference")
    return {
        "q": attended["q"],
        "k": attended["k"],
        "out": out,
        "lse": lse,
        "cu_seqlens": attended["cu_seqlens_q"],
        "max_seqlen": attended["max_seqlen_q"],
        "causal": causal,
        "key_bias": attended["key_bias"],
    }


def both_case(generator, lengths, heads=2, head_dim=8, dtype=torch.float32, **options):
    """Self-attention that is asked for its importance too."""
    case = attention_case(generator, lengths, heads, head_dim, dtype, **options)
    shared = {name: case[name] for name in ("q", "k", "v")}
    shared |= {"cu_seqlens": case["cu_seqlens_q"], "max_seqlen": case["max_seqlen_q"]}
    return shared | {name: case[name] for name in ("causal", "key_bias")}


def scoring_case(generator, lengths, width=16, entries=5, dtype=torch.float32, *, temperature=1.0, bias=False):
    tokens = sum(lengths)
    return {
        "x": normal(generator, tokens, width, dtype=dtype),
        "dictionary": normal(generator, entries, width, dtype=dtype),
        "received": torch.rand(tokens, generator=generator).to(DEVICE),
        "cls": torch.rand(tokens, generator=generator).to(DEVICE) / max(1, *lengths, 1),
        "cu_seqlens": offsets(lengths),
        "max_seqlen": max(lengths, default=0),
        "temperature": temperature,
        "bias": normal(generator, entries) if bias else None,
    }


def compaction_case(
    generator, lengths, width=16, dtype=torch.float32, *, by_count=False, groups=False, protected=False, min_keep=False,
    ids=False, sizes=False, norm=False, exact=None, ties=False,
):  # fmt: skip
    """``ties`` draws importance and threshold from five values: ranking has to break ties, and scores meet the threshold."""
    tokens, batch = sum(lengths), len(lengths)

    def scores(size):
        if ties:
            return torch.randint(1, 6, (size,), generator=generator).to(DEVICE).float() / 5
        return torch.rand(size, generator=generator).to(DEVICE)

    def integers(high, size):
        return torch.randint(0, high, (size,), generator=generator, dtype=torch.int32).to(DEVICE)

    most = max(lengths, default=0)
    return {
        "x": RaggedBatch(normal(generator, tokens, width, dtype=dtype), offsets(lengths), most),
        "importance": scores(tokens),
        "threshold": None if by_count else scores(batch),
        "keep_count": integers(most + 2, batch) if by_count else None,
        "protected": (torch.rand(tokens, generator=generator) < 0.1).to(DEVICE) if protected else None,
        "groups": integers(max(1, batch // 2), batch) if groups else None,
        "min_keep": integers(4, batch) if min_keep else None,
        "ids": integers(1000, tokens) if ids else None,
        "sizes": 1 + integers(9, tokens).float() if sizes else None,
        "norm": (normal(generator, width), normal(generator, width), 1e-6) if norm else None,
        "exact": exact,
    }


def received_case(
    generator, lengths, heads=2, head_dim=8, dtype=torch.float32, *, key_heads=None, causal=False, bias=False,
    reduction="mean", queries=None, per_key_head=False,
):  # fmt: skip
    """Queries and keys with the log-sum-exp of the reference; ``queries="mask"`` draws a mask."""
    attended = attention_case(generator, lengths, heads, head_dim, dtype, key_heads=key_heads, causal=causal, bias=bias)
    _, lse = madtp_kernels.attention(**attended, backend="reference")
    if queries == "mask":
        queries = (torch.rand(sum(lengths), generator=generator) < 0.5).to(DEVICE)
    return {
        "q": attended["q"],
        "k": attended["k"],
        "lse": lse,
        "cu_seqlens": attended["cu_seqlens_q"],
        "max_seqlen": attended["max_seqlen_q"],
        "causal": causal,
        "key_bias": attended["key_bias"],
        "heads": reduction,
        "queries": queries,
        "per_key_head": per_key_head,
    }


def keys_case(generator, lengths, width=8, dtype=torch.float32):
    """Keys of two heads, every fourth one much like an earlier one."""
    tokens = sum(lengths)
    keys = normal(generator, tokens, 2, width)
    keys[4::4] = keys[: tokens - 4 : 4] + 0.1 * keys[4::4] if tokens > 4 else keys[4::4]
    return {"keys": keys.to(dtype), "cu_seqlens": offsets(lengths), "max_seqlen": max(lengths, default=0)}


def nearest_case(generator, lengths, width=8, dtype=torch.float32, *, goes=False, inverse_norms=False):
    case = keys_case(generator, lengths, width, dtype)
    if goes:
        case["goes"] = (torch.rand(sum(lengths), generator=generator) < 0.7).to(DEVICE)
    if inverse_norms:
        wide = case["keys"].to(torch.promote_types(dtype, torch.float32))
        case["inverse_norms"] = 1 / wide.flatten(1).norm(dim=1)
    return case | {"kept": (torch.rand(sum(lengths), generator=generator) < 0.5).to(DEVICE)}


def novelty_case(generator, lengths, width=8, dtype=torch.float32, *, rank=False):
    case = keys_case(generator, lengths, width, dtype)
    if rank:  # few values, so that equal ones are ordered by position
        case["rank"] = (
            torch.randint(0, 5, (sum(lengths),), generator=generator)
            .to(DEVICE)
            .to(torch.promote_types(dtype, torch.float32))
        )
    return case


def matching_case(generator, lengths, width=8, dtype=torch.float32, *, count=True, threshold=None, protected=1):
    case = keys_case(generator, lengths, width, dtype)
    counts = torch.randint(0, 5, (len(lengths),), generator=generator, dtype=torch.int32).to(DEVICE)
    return case | {"count": counts if count else None, "threshold": threshold, "protected": protected}


def merging_case(generator, lengths, width=8, dtype=torch.float32, *, weight=False, sizes=True):
    case, tokens = keys_case(generator, lengths, width, dtype), sum(lengths)
    wide = torch.promote_types(dtype, torch.float32)

    def drawn(most):  # few values, so that equal ones are ordered by position
        return torch.randint(0, most, (tokens,), generator=generator).to(DEVICE)

    return case | {
        "order": drawn(5).to(wide),
        "weight": 1 + drawn(5).to(wide) if weight else None,
        "sizes": 1 + drawn(4).float() if sizes else None,
        "free": drawn(5) > 0,
    }


def choice_case(generator, lengths, dtype=torch.float32, *, count=True, threshold=1.5, share=1.0, uncounted=0):
    tokens = sum(lengths)
    scores = torch.randint(0, 12, (tokens,), generator=generator) / 4
    counts = torch.randint(0, 5, (len(lengths),), generator=generator, dtype=torch.int32).to(DEVICE)
    return {
        "scores": scores.to(DEVICE).to(torch.promote_types(dtype, torch.float32)),
        "count": counts if count else None,
        "cu_seqlens": offsets(lengths),
        "free": (torch.rand(tokens, generator=generator) < 0.8).to(DEVICE),
        "threshold": threshold,
        "share": share,
        "uncounted": uncounted,
    }


CASES = {
    "attention": attention_case,
    "attention_importance": importance_case,
    "attention_with_importance": both_case,
    "score_tokens": scoring_case,
    "compact": compaction_case,
    "attention_received": received_case,
    "nearest_kept": nearest_case,
    "novelty": novelty_case,
    "match_tokens": matching_case,
    "merge_scores": merging_case,
    "lowest_tokens": choice_case,
}


# ---- running them ---------------------------------------------------------------------------------------------------


def flat(op, result):
    """The tensors that an operation returned, as a tuple."""
    if op != "compact":
        return (result,) if torch.is_tensor(result) else tuple(result)
    tensors = (result.tokens.values, result.tokens.cu_seqlens, result.ids, result.sizes, result.normed)
    return tuple(t for t in tensors if t is not None)


def total(case):
    """Number of query tokens that the offsets of a case describe."""
    if "cu_seqlens_q" in case:
        return int(case["cu_seqlens_q"][-1])
    return int(case["cu_seqlens"][-1]) if "cu_seqlens" in case else case["x"].num_tokens


def run(op, case, backend=None):
    """Results of one call without their undefined rows."""
    results = flat(op, OPERATIONS[op](**case, backend=backend))
    if op == "compact":
        rows = int(results[1][-1])
        return (results[0][:rows], results[1], *(t[:rows] for t in results[2:]))
    rows = total(case)
    if op in ("attention", "attention_with_importance"):
        return results[0][:rows], results[1][:, :rows], *(r[:rows] for r in results[2:])
    if op == "attention_received":
        return (results[0][..., :rows],)
    per_token = op in ("attention_importance", "merge_scores") or op in SIMILARITY
    return (results[0][:rows], *(t[:rows] if per_token else t for t in results[1:]))


def in_float64(case):
    """The same numbers in double precision. Token sizes stay float32, as their contract says."""
    double = {}
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            double[name] = value.to(torch.float64)
        elif torch.is_tensor(value) and value.is_floating_point() and name != "sizes":
            double[name] = value.double()
        else:
            double[name] = value
    return double


def take_samples(case, samples):
    """The case of some of its samples, in the order given. Not for cases with groups."""
    queries = next((case[n] for n in ("cu_seqlens", "cu_seqlens_q") if n in case), None)
    queries = case["x"].cu_seqlens if queries is None else queries
    keys = case.get("cu_seqlens_k", queries)

    def rows_of(cu):
        bounds = cu.tolist()
        picked = [torch.arange(bounds[b], bounds[b + 1]) for b in samples]
        return torch.cat(picked).to(DEVICE), offsets([len(p) for p in picked]), max(map(len, picked))

    query_rows, query_cu, query_most = rows_of(queries)
    key_rows, key_cu, key_most = rows_of(keys)
    order = torch.tensor(samples, device=DEVICE)
    part = {}
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            part[name] = RaggedBatch(value.values[query_rows], query_cu, query_most)
        elif name in ("cu_seqlens", "cu_seqlens_q"):
            part[name] = query_cu
        elif name == "cu_seqlens_k":
            part[name] = key_cu
        elif name.startswith("max_seqlen"):
            part[name] = key_most if name.endswith("_k") else query_most
        elif not torch.is_tensor(value):
            part[name] = value
        elif name in _QUERY_TOKENS:
            part[name] = value.index_select(_QUERY_TOKENS[name], query_rows)
        elif name in _KEY_TOKENS:
            part[name] = value[key_rows]
        else:
            part[name] = value[order] if name in _SAMPLES else value
    return part


# ---- the same formulas in eager PyTorch, every step in the dtype of the input --------------------------------------


def _samples(cu):
    bounds = cu.tolist()
    return list(zip(bounds, bounds[1:], strict=False))


def _eager_logits(q, k, causal, key_bias):
    s = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    if key_bias is not None:
        s = s + key_bias.to(s.dtype)
    if causal:
        hidden = torch.ones(s.shape[1:], dtype=torch.bool, device=s.device).triu(1 + k.shape[0] - q.shape[0])
        s = s.masked_fill(hidden, float("-inf"))
    return s


def eager_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=False, key_bias=None, **_):
    outs, lses = [], []
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    for (q0, q1), (k0, k1) in zip(_samples(cu_seqlens_q), _samples(cu_seqlens_k), strict=True):
        s = _eager_logits(q[q0:q1], k[k0:k1], causal, None if key_bias is None else key_bias[k0:k1])
        p = s.softmax(-1).nan_to_num(0)  # a query that sees no key
        outs.append(torch.einsum("hij,jhd->ihd", p, v[k0:k1]))
        lses.append(s.logsumexp(-1) if k1 > k0 else s.new_full(s.shape[:2], float("-inf")))
    return torch.cat(outs), torch.cat(lses, 1)


def eager_attention_importance(q, k, out, cu_seqlens, causal=False, key_bias=None, **_):
    received, cls = [], []
    for start, stop in _samples(cu_seqlens):
        p = _eager_logits(q[start:stop], k[start:stop], causal, None if key_bias is None else key_bias[start:stop])
        p = p.softmax(-1)
        norm = out[start:stop].norm(dim=-1).mT
        per_token = torch.stack([p[:, 1:].amax(0).sum(0), (p[:, 0] * norm / (norm.sum(0) + EPS)).sum(0)]) \
            if stop > start else p.new_zeros(2, 0)  # fmt: skip
        per_token[:, :1] = 0
        received.append(per_token[0])
        cls.append(per_token[1])
    return torch.cat(received), torch.cat(cls)


def eager_attention_with_importance(q, k, v, cu_seqlens, max_seqlen, **options):
    out, lse = eager_attention(q, k, v, cu_seqlens, cu_seqlens, **options)
    return out, lse, *eager_attention_importance(q, k, out, cu_seqlens, **options)


def eager_score_tokens(x, dictionary, received, cls, cu_seqlens, temperature, bias=None, **_):
    importance, threshold = [], []
    for start, stop in _samples(cu_seqlens):
        g = x[start + 1 : stop] @ dictionary.mT + (0 if bias is None else bias.to(x.dtype))
        r, c, best = received[start + 1 : stop].to(x.dtype), cls[start + 1 : stop].to(x.dtype), g.amax(1)
        score = (r / (r.sum() + EPS) + best / (best.sum() + EPS) + c) / 3
        importance.append(F.pad(score, (min(1, stop - start), 0)))
        threshold.append(((g / temperature).softmax(0) * score[:, None]).sum(0).amin())
    return torch.cat(importance), torch.stack(threshold)


def eager_merge(x, weight):
    """Weighted mean of rows, in the dtype of x."""
    weight = weight.to(x.dtype)
    return (x * weight[:, None]).sum(0) / (weight.sum() + EPS)


EAGER = {
    "attention": eager_attention,
    "attention_importance": eager_attention_importance,
    "attention_with_importance": eager_attention_with_importance,
    "score_tokens": eager_score_tokens,
}


def assert_no_worse_than_torch(ours, eager, exact, magnitude, what):
    """The error is at most twice the one that PyTorch makes in the same dtype (flash-attention's rule).

    In small problems PyTorch may happen to hit the exact number. So that this does not count against a kernel, there is an
    absolute floor: four float32 roundings of the largest intermediate ``magnitude`` that enters the result, and one rounding
    of the largest result in its own dtype.

    Where PyTorch's formula is further from ``exact`` than roundings go, one of the two is wrong, and the bound means nothing.
    """
    assert ours.shape == exact.shape, what
    if exact.numel() == 0:
        return
    assert not ours.isnan().any(), f"{what}: NaN"

    def error(values):
        return (
            torch.where(values.double() == exact, 0.0, (values.double() - exact).abs()).nan_to_num(0, 0, 0).max().item()
        )

    assert (ours.isinf() == exact.isinf()).all(), what
    largest = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    floor = 4 * torch.finfo(torch.float32).eps * magnitude + torch.finfo(ours.dtype).eps * largest
    rounding = 1000 * torch.finfo(eager.dtype).eps * max(magnitude, largest)
    assert error(eager) <= rounding, f"{what}: two formulas differ by {error(eager):.3g}, roundings by {rounding:.3g}"
    bound = 2 * error(eager) + floor
    assert error(ours) <= bound, f"{what}: error {error(ours):.3g}, PyTorch's {error(eager):.3g}, floor {floor:.3g}"


def clearance(trace, row):
    """How far the scores of one sample stay from its thresholds in all layers, relative to their mean: where that is little,
    rounding decides which tokens are kept, and two ways to compute the same may differ."""
    least = float("inf")
    for record in trace:
        if record.importance is None:
            continue
        scores = record.importance[record.cu_seqlens_in[row] : record.cu_seqlens_in[row + 1]][1:]
        if len(scores) > 2:  # fewer tokens are never pruned, whatever they score
            least = min(least, ((scores - record.threshold[row]).abs() / scores.abs().mean()).min().item())
    return least
