"""nearest_kept, novelty, merge_scores and match_tokens against formulas written out here in float64, at the edges of what is legal.

That they are operators, that neighbours do not matter, and what they refuse is tested with all operations (test_operators,
test_batch_invariance, test_contracts).
"""

import math

import pytest
import torch
from helpers import DEVICE, backends_here, interpreted, keys_case, merging_case, normal, offsets

from madtp_kernels import BackendError, backends, match_tokens, merge_scores, nearest_kept, novelty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_backend = pytest.mark.parametrize("backend", backends_here())
LENGTHS = [9, 0, 1, 2, 70, 250]  # more than one tile of each kernel
ERROR = 2e-6  # of a cosine from float32 sums


def lengths_for(backend):
    return [9, 0, 1, 2, 70] if interpreted(backend) else LENGTHS


def samples(case):
    bounds = case["cu_seqlens"].tolist()
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def cosines(keys):
    """All pairs of one sample, in float64; 0 with a key that has no direction."""
    keys = keys.double().flatten(1).cpu()
    norm = keys.norm(dim=1, keepdim=True)
    unit = torch.where((norm > 0) & norm.isfinite(), keys / norm, 0.0)
    return unit @ unit.mT


def check_nearest(case, kept, got):
    for rows in samples(case):
        table, stays = cosines(case["keys"][rows]), kept[rows].cpu()
        for i, row in enumerate(got[rows].tolist()):
            if stays[i] or not stays.any():
                assert row == (rows.start + i if stays[i] else -1)
                continue
            assert stays[row - rows.start]
            assert table[i, row - rows.start] >= table[i][stays].max() - ERROR


def formula_novelty(keys, rank=None):
    table = cosines(keys)
    length = len(table)
    for i in range(length):
        for j in range(length):
            if i == j or (rank is not None and (rank[j], -j) <= (rank[i], -i)):
                table[i, j] = -1
    return 1 - table.amax(1) if length else table.new_zeros(0)


@every_dtype
@every_backend
def test_the_nearest_kept_token(backend, dtype, generator):
    case = keys_case(generator, lengths_for(backend), 32, dtype)
    kept = (torch.rand(case["keys"].shape[0], generator=generator) < 0.3).to(DEVICE)
    check_nearest(case, kept, nearest_kept(case["keys"], kept, case["cu_seqlens"], case["max_seqlen"], backend=backend))


@every_backend
def test_only_what_goes_looks_for_a_kept_token(backend, generator):
    """The others' rows are their own, so that `merge_tokens` takes the result as it is."""
    case = keys_case(generator, lengths_for(backend), 32)
    draws = torch.rand(case["keys"].shape[0], generator=generator).to(DEVICE)
    kept, goes = draws < 0.4, draws > 0.7
    goes[:2] = kept[:2] = True  # what stays is its own in any case
    kept[9:10] = False
    all_looked = nearest_kept(**case, kept=kept, backend=backend)
    got = nearest_kept(**case, kept=kept, goes=goes, backend=backend)
    own = torch.arange(len(got), dtype=torch.int32, device=DEVICE)
    assert torch.equal(got, torch.where(goes, all_looked, own)) and not torch.equal(got, all_looked)


@pytest.mark.parametrize("keep", [True, False])
@every_backend
def test_all_kept_and_none_kept(backend, keep, generator):
    case = keys_case(generator, [3, 0, 1])
    kept = torch.full((4,), keep, device=DEVICE)
    got = nearest_kept(**case, kept=kept, backend=backend)
    assert got.tolist() == (list(range(4)) if keep else [-1] * 4)


@every_dtype
@every_backend
def test_novelty(backend, dtype, generator):
    lengths = [9, 0, 1, 2, 70] if interpreted(backend) else [9, 0, 1, 2, 130]
    case = keys_case(generator, lengths, 32, dtype)
    rank = torch.randint(0, 6, (case["keys"].shape[0],), generator=generator).float().to(DEVICE)
    plain, ordered = novelty(**case, backend=backend), novelty(**case, rank=rank, backend=backend)
    assert plain.dtype == ordered.dtype == torch.float32
    for rows in samples(case):
        keys = case["keys"][rows]
        torch.testing.assert_close(plain[rows].double().cpu(), formula_novelty(keys), atol=ERROR, rtol=0)
        expected = formula_novelty(keys, rank[rows].tolist())
        torch.testing.assert_close(ordered[rows].double().cpu(), expected, atol=ERROR, rtol=0)
        if len(keys):
            first = max(range(len(keys)), key=lambda i: (float(rank[rows][i]), -i))
            assert ordered[rows][first] == 2


@pytest.mark.parametrize("weight", [False, True], ids=["by order", "by weight"])
@every_dtype
@every_backend
def test_what_merging_would_cost(backend, dtype, weight, generator):
    case = merging_case(generator, lengths_for(backend), 32, dtype, weight=weight, sizes=not weight)
    exponents = {"weight_exponent": 0.5, "novelty_exponent": 2.0, "size_exponent": 0.3}
    scores, new, inverse_norms = merge_scores(**case, **exponents, backend=backend)
    assert scores.dtype == new.dtype == torch.float32
    for rows in samples(case):
        free = case["free"][rows].cpu()
        order = case["order"][rows].double().cpu().where(free, -1.0)
        expected = formula_novelty(case["keys"][rows], order.tolist())
        torch.testing.assert_close(new[rows].double().cpu(), expected, atol=ERROR, rtol=0)
        worth = (case["weight"] if weight else case["order"])[rows].double().cpu()
        sizes = 1.0 if weight else case["sizes"][rows].double().cpu() ** 0.3
        expected = (worth / worth[free].mean()) ** 0.5 * expected**2 * sizes
        expected = torch.nan_to_num(expected.where(free, 0.0))
        torch.testing.assert_close(scores[rows].double().cpu(), expected, atol=2e-5, rtol=1e-5)
        norms = case["keys"][rows].double().flatten(1).norm(dim=1)
        torch.testing.assert_close(inverse_norms[rows].double(), 1 / norms, atol=0, rtol=1e-6)


@every_dtype
@every_backend
def test_norms_that_are_known_are_not_computed_again(backend, dtype, generator):
    """Not a bit changes, keys without a direction included; and what is given is what counts."""
    lengths = lengths_for(backend)
    case = merging_case(generator, lengths, 32, dtype)
    case["keys"][[0, 5, 30]] = torch.tensor([0.0, math.nan, math.inf], dtype=dtype, device=DEVICE)[:, None, None]
    norms = merge_scores(**case, backend=backend).inverse_norms
    assert (norms[[0, 5, 30]] == 0).all() and norms.dtype == torch.float32
    given = (case["keys"], case["free"], case["cu_seqlens"], case["max_seqlen"])
    into = nearest_kept(*given, backend=backend)
    assert torch.equal(nearest_kept(*given, inverse_norms=norms, backend=backend), into)
    apart = torch.stack([norms, norms], 1)[:, 0]
    assert torch.equal(nearest_kept(*given, inverse_norms=apart, backend=backend), into)
    nothing = nearest_kept(*given, inverse_norms=torch.zeros_like(norms), backend=backend)
    for rows in samples(case):  # all are equally near then
        first = case["free"][rows].nonzero()[:1, 0] + rows.start
        alone = ~case["free"][rows]
        assert (nothing[rows][alone] == (first if len(first) else -1)).all()


@every_backend
def test_a_sample_where_nothing_matters_costs_nothing(backend):
    """0 / 0 is 0, and a token that is not free is compared with nothing."""
    keys = torch.ones(4, 1, 8, device=DEVICE)
    free = torch.tensor([False, True, True, True], device=DEVICE)
    scores, new, _ = merge_scores(keys, torch.zeros(4, device=DEVICE), offsets([4]), 4, free=free, backend=backend)
    assert (scores == 0).all()
    torch.testing.assert_close(new, torch.tensor([0.0, 2.0, 0.0, 0.0], device=DEVICE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("exponent", [0.0, -1.0])
@every_backend
def test_what_may_not_go_scores_nothing_whatever_the_exponent(backend, exponent, generator):
    """0 ** 0 is 1, and the others' weight counts as 0."""
    case = merging_case(generator, [7, 1, 5], 8, torch.float32)
    scores, *_ = merge_scores(**case, weight_exponent=exponent, backend=backend)
    assert (scores[~case["free"]] == 0).all() and (scores[case["free"]] > 0).any()


@every_backend
def test_scores_of_a_buffer_without_samples(backend):
    keys, order, free = torch.ones(3, 4), torch.ones(3), torch.ones(3, dtype=torch.bool)
    scores, new, norms = merge_scores(
        *(t.to(DEVICE) for t in (keys, order)), offsets([]), 0, free=free.to(DEVICE), backend=backend
    )
    assert scores.shape == new.shape == norms.shape == (3,)


@every_backend
def test_of_a_group_of_copies_one_is_novel(backend, generator):
    """Against all others every copy is redundant; against those of higher rank the first of them is not."""
    keys = normal(generator, 1, 2, 8).repeat(6, 1, 1)
    rank = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0, -1.0], device=DEVICE)
    plain = novelty(keys, offsets([6]), 6, backend=backend)
    ordered = novelty(keys, offsets([6]), 6, rank=rank, backend=backend)
    assert (plain >= 0).all() and (plain < 1e-6).all()
    assert ordered[1] == 2 and (ordered[[0, 2, 3, 4, 5]] < 1e-6).all()


@every_dtype
@every_backend
def test_a_key_without_a_direction_is_like_nothing(backend, dtype, generator):
    """Zero, NaN and infinity: cosine 0 with every key, their own kind included. Nobody else sees them."""
    keys = normal(generator, 8, 2, 8, dtype=dtype)
    keys[1], keys[2, 0, 3], keys[5, 1, 0] = 0, math.nan, math.inf
    case = {"keys": keys, "cu_seqlens": offsets([8]), "max_seqlen": 8}
    result = novelty(**case, backend=backend)
    assert (result[[1, 2, 5]] == 1).all()
    torch.testing.assert_close(result.double().cpu(), formula_novelty(keys), atol=ERROR, rtol=0)
    kept = torch.tensor([i in (2, 3, 6) for i in range(8)], device=DEVICE)
    got = nearest_kept(**case, kept=kept, backend=backend)
    check_nearest(case, kept, got)
    assert got[1] == got[5] == 2  # 0 with all of them: the first
    into, similarity = match_tokens(**case, count=4, protected=0, backend=backend)
    assert similarity[2] == 0 and similarity[[0, 4, 6]].isfinite().all() and into[2] == 1


@every_backend
def test_equally_similar_the_first_counts(backend):
    """Whole numbers whose sums and norms are exact in every precision, in a sample of more than one tile."""
    axes = torch.eye(16, device=DEVICE)
    order = torch.arange(150, device=DEVICE) % 3
    keys = 2 * axes[order][:, None]
    kept = torch.arange(150, device=DEVICE) >= 75
    got = nearest_kept(keys, kept, offsets([150]), 150, backend=backend)
    assert torch.equal(got[:75].long(), 75 + torch.arange(75, device=DEVICE) % 3)
    into, similarity = match_tokens(keys, offsets([150]), 150, count=5, protected=1, backend=backend)
    # Even position i has class i % 3; the first odd position of that class is 3, 1, 5.
    first = {0: 3, 1: 1, 2: 5}
    expected = {i: first[i % 3] for i in (2, 4, 6, 8, 10)}
    assert into.tolist() == [expected.get(i, i) for i in range(150)]
    assert (similarity[2::2] == 1).all() and (similarity[1::2] == -math.inf).all() and similarity[0] == -math.inf


@every_backend
def test_there_is_one_zero(backend):
    """A cosine below zero that no float32 can tell from it is as good as one that is zero: the first counts."""
    keys = torch.zeros(150, 1, 8, device=DEVICE)
    keys[:, 0, 0] = -1.0  # opposite to the first key: worse than both, and between them
    keys[[0, 1, 149]] = 0.0
    keys[0, 0, 0], keys[1, 0, 0], keys[1, 0, 1], keys[149, 0, 2] = 2e-19, -1e-19, 1e15, 1.0
    assert -3e-38 < (keys[0] @ keys[1].mT).item() < 0  # the norm of 1e15 divides it to -0
    kept = torch.arange(150, device=DEVICE) > 0
    assert nearest_kept(keys, kept, offsets([150]), 150, backend=backend)[0] == 1


@pytest.mark.parametrize("width", [32, 36, 512, 1536])
@every_backend
def test_keys_from_64_to_3072_features(backend, width, generator):
    case = keys_case(generator, [11, 3, 1], width, torch.bfloat16)
    kept = torch.arange(15, device=DEVICE) % 3 == 0
    check_nearest(case, kept, nearest_kept(**case, kept=kept, backend=backend))
    got = novelty(**case, backend=backend)
    for rows in samples(case):
        torch.testing.assert_close(got[rows].double().cpu(), formula_novelty(case["keys"][rows]), atol=ERROR, rtol=0)


@every_backend
def test_large_and_small_keys(backend, generator):
    """Norms cancel, up to where their square leaves float32."""
    keys = normal(generator, 12, 16)
    scale = 10.0 ** torch.arange(-17, 19, 3, device=DEVICE)[:, None]
    for factors in (scale, scale.flip(0)):
        got = novelty(keys * factors, offsets([12]), 12, backend=backend)
        torch.testing.assert_close(got.double().cpu(), formula_novelty(keys), atol=ERROR, rtol=0)


# ---- matching


def tome(keys, r, protected, threshold=None):
    """Bipartite soft matching of one sample as ToMe defines it, in float64: pairs {source: destination}."""
    table, length = cosines(keys), len(keys)
    sources = [i for i in range(0, length, 2) if i >= protected]
    targets = [i for i in range(1, length, 2) if i >= protected]
    if not targets:
        return {}
    best = {i: max(targets, key=lambda j: (table[i, j].item(), -j)) for i in sources}
    ranked = sorted(sources, key=lambda i: (-table[i, best[i]].item(), i))[: min(r, (length - protected) // 2)]
    return {i: best[i] for i in ranked if threshold is None or table[i, best[i]] > threshold}


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@every_backend
def test_tome(backend, protected, generator):
    """Different counts per sample; a count beyond half of the free tokens; a threshold instead of, or with, a count."""
    lengths = [9, 0, 1, 2, 6] if interpreted(backend) else [9, 0, 1, 2, 3, 4, 5, 6, 100, 237]
    case = keys_case(generator, lengths, 8)
    counts = torch.randint(0, 12, (len(lengths),), generator=generator, dtype=torch.int32)
    options = ((counts, None), (3, None), (10**6, None), (None, 0.5), (counts, 0.2), (0, -1.0))
    for count, threshold in options[: 1 if protected else 2] if interpreted(backend) else options:
        given = count.to(DEVICE) if torch.is_tensor(count) else count
        into, similarity = match_tokens(**case, count=given, threshold=threshold, protected=protected, backend=backend)
        assert into.dtype == torch.int32 and similarity.dtype == torch.float32
        for b, rows in enumerate(samples(case)):
            r = 10**6 if count is None else int(counts[b]) if torch.is_tensor(count) else count
            pairs = tome(case["keys"][rows], r, protected, threshold)
            assert into[rows].tolist() == [rows.start + pairs.get(i, i) for i in range(lengths[b])]
            looked = [i >= protected and i % 2 == 0 and lengths[b] > protected + 1 for i in range(lengths[b])]
            found = similarity[rows].isfinite().tolist()
            assert found == [a and any(j % 2 for j in range(protected, lengths[b])) for a in looked]


@every_backend
def test_none_above_the_threshold_is_none_merged(backend, generator):
    case = keys_case(generator, [7, 4])
    into, _ = match_tokens(**case, threshold=1.0, backend=backend)
    assert into.tolist() == list(range(11))


@pytest.mark.parametrize("options, message", [
    ({}, "^count, threshold: expected at least one of them, got neither"),
    ({"count": -1}, r"^count: expected an int >= 0 or int32 \[B\], got int -1"),
    ({"count": True}, "^count: expected an int >= 0 .* got bool True"),
    ({"count": torch.tensor([1, -1], dtype=torch.int32, device=DEVICE)}, "^count: expected >= 0, got -1"),
    ({"threshold": math.nan}, "^threshold: expected a number, got float nan"),
    ({"threshold": "high"}, "^threshold: expected a number, got str"),
    ({"count": 1, "protected": -1}, "^protected: expected an int >= 0, got int -1"),
    ({"count": 1, "protected": None}, "^protected: expected an int >= 0, got NoneType"),
])  # fmt: skip
def test_matching_refuses(options, message, generator):
    if DEVICE != "cpu" and torch.is_tensor(options.get("count")):
        pytest.skip("values of a device are read in debug mode only")
    with pytest.raises(ValueError, match=message):
        match_tokens(**keys_case(generator, [4, 3]), **options)


@every_backend
def test_more_than_there_are_is_all(backend, generator):
    case = keys_case(generator, [4, 3]) | {"backend": backend}
    assert torch.equal(match_tokens(**case, count=2**40)[0], match_tokens(**case, count=4)[0])
    for protected in (2**31 - 1, 2**63 - 1, 2**80):
        assert match_tokens(**case, count=4, protected=protected)[0].tolist() == list(range(7))


@pytest.mark.parametrize("name", ["weight_exponent", "novelty_exponent", "size_exponent"])
def test_exponents_are_finite_numbers(name, generator):
    for value in (math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match=f"^{name}: expected a finite number"):
            merge_scores(**merging_case(generator, [4, 3]), **{name: value})


@pytest.mark.parametrize("shape", [(5,), (5, 0), (5, 2, 0), (5, 2, 3, 4)], ids=str)
def test_keys_of_no_shape_for_keys(shape):
    with pytest.raises(ValueError, match=r"^keys: expected floating-point \[T, D\] or \[T, H, d\]"):
        novelty(torch.zeros(shape, device=DEVICE), offsets([5]), 5)


@pytest.mark.parametrize("op", ["nearest_kept", "novelty", "match_tokens", "layer_norm", "compact"])
def test_the_cuda_backend_says_that_it_has_no_source(op, monkeypatch):
    monkeypatch.setattr(backends, "availability", lambda name, device: None)
    monkeypatch.setattr(backends, "_implementation", lambda op, package, name: name)
    backends._resolve.cache_clear()
    try:
        if op == "compact":
            assert backends._resolve(op, "", "cuda", "cuda", torch.float32) == ("cuda", "cuda")
        else:
            with pytest.raises(
                BackendError, match=f"^{op}: backend 'cuda' .* no CUDA source for it: the triton backend"
            ):
                backends._resolve(op, "", "cuda", "cuda", torch.float32)
    finally:
        backends._resolve.cache_clear()


@every_backend
def test_a_threshold_is_compared_in_the_precision_of_the_cosines(backend, generator):
    """A number that differs from a cosine by less than float32 can tell is that cosine, and a pair has to be above it."""
    case = keys_case(generator, [20])
    _, similarity = match_tokens(**case, threshold=-2.0, backend=backend)
    attained = similarity[similarity.isfinite()].median().item()
    below = attained - 1e-12
    into = [match_tokens(**case, threshold=value, backend=backend)[0] for value in (attained, below)]
    assert torch.equal(*into)
    own = (similarity == attained).nonzero()[:, 0]
    assert torch.equal(into[0][own].long(), own)  # not above itself
    lower, _ = match_tokens(**case, threshold=attained - 1e-4, backend=backend)
    assert (lower[own] != own).all()
