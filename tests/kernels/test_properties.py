"""Any legal shape: every backend against the float64 reference, with at most twice the error of PyTorch in the same dtype.

Hypothesis draws the shapes and a seed; it prints what it takes to repeat a failure. PyTorch's own error is that of the eager
formulas in `helpers.py`, whose every step is in the dtype of the input.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    EAGER,
    EPS,
    assert_no_worse_than_torch,
    attention_case,
    backends_here,
    both_case,
    compaction_case,
    eager_merge,
    in_float64,
    interpreted,
    run,
    scoring_case,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from madtp_kernels import compact

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Where an instruction set is forced, less is drawn: there are several of them (test_cpu_backend.py).
FORCED = "MADTP_KERNELS_CPU" in os.environ

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_backend = pytest.mark.parametrize("backend", backends_here())


def settings_for(backend, examples):
    """Triton's interpreter takes a second for what the others do in a millisecond."""
    examples = max(5, examples // 4) if FORCED else examples
    return settings(
        max_examples=3 if interpreted(backend) else examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def lengths_of(tokens, batch):
    """Sample lengths with empty and single-token samples among them, and now and then one that dwarfs the others."""
    short = st.one_of(st.sampled_from([0, 1, 2, 3]), st.integers(0, max(1, tokens // 8)))
    many = st.lists(short, min_size=1, max_size=batch).filter(lambda lengths: sum(lengths) <= tokens)
    giant = st.tuples(
        st.lists(st.integers(0, 2), max_size=batch - 1), st.integers(0, tokens // 2), st.integers(0, batch)
    )
    uneven = giant.map(lambda drawn: drawn[0][: drawn[2]] + [drawn[1]] + drawn[0][drawn[2] :])
    return st.one_of(many, uneven)


def draw_lengths(data, backend):
    few = st.sampled_from([[3, 0, 1, 7], [9], [1, 5]])
    return data.draw(few if interpreted(backend) else lengths_of(300, 12), "lengths")


def generator_of(data):
    return torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))


def each_example(backend, examples, check):
    """Run ``check(data)`` on drawn data; a plain call, so that fixtures and parameters stay pytest's."""

    @settings_for(backend, examples)
    @given(st.data())
    def examine(data):
        check(data)

    examine()


# ---- bounds on intermediate numbers: what one rounding can do


def largest(tensor):
    return tensor.double().abs().max().item() if tensor.numel() else 0.0


def largest_norm(tensor):
    return tensor.double().norm(dim=-1).max().item() if tensor.numel() else 0.0


def largest_logit(case):
    """By Cauchy and Schwarz."""
    bias = 0.0 if case.get("key_bias") is None else largest(case["key_bias"])
    return largest_norm(case["q"]) * largest_norm(case["k"]) * case["q"].shape[-1] ** -0.5 + bias


def samples_of(cu_seqlens):
    bounds = cu_seqlens.tolist()
    return [slice(start + 1, stop) for start, stop in zip(bounds, bounds[1:], strict=False) if stop > start + 1]


# ---- the checks, one per operation


def check_attention(case, backend):
    exact = run("attention", in_float64(case), "reference")
    ours = run("attention", case, backend)
    eager = EAGER["attention"](**case)
    logit = largest_logit(case)
    assert ours[0].dtype == case["q"].dtype and ours[1].dtype == torch.float32
    assert_no_worse_than_torch(ours[0], eager[0], exact[0], (1 + logit) * largest(case["v"]), "out")
    assert_no_worse_than_torch(ours[1], eager[1], exact[1], 1 + logit, "lse")


def check_importance(case, backend):
    exact = run("attention_importance", in_float64(case), "reference")
    ours = run("attention_importance", case, backend)
    eager = EAGER["attention_importance"](**case)
    for name, a, b, c in zip(("received", "cls"), ours, eager, exact, strict=True):
        assert a.dtype == torch.float32
        assert_no_worse_than_torch(a, b, c, (1 + largest_logit(case)) * largest(c), name)
    first = [s.start - 1 for s in samples_of(case["cu_seqlens"])]
    assert (ours[0][first] == 0).all() and (ours[1][first] == 0).all()


MEASURES = ("out", "lse", "received", "cls")


def check_both(case, backend):
    """Attention with importance in one call, and as the two operations in a row, against one evaluation of the formulas."""
    exact = run("attention_with_importance", in_float64(case), "reference")
    eager = EAGER["attention_with_importance"](**case)
    cu, most = case["cu_seqlens"], case["max_seqlen"]
    shared = {name: case[name] for name in ("q", "k", "causal", "key_bias")}
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": most, "max_seqlen_k": most}
    out, lse = run("attention", {**shared, "v": case["v"], **lengths}, backend)
    importance = {**shared, "out": out, "lse": lse, "cu_seqlens": cu, "max_seqlen": most}
    in_a_row = (out, lse, *run("attention_importance", importance, backend))
    logit = largest_logit(case)
    magnitudes = (
        (1 + logit) * largest(case["v"]),
        1 + logit,
        (1 + logit) * largest(exact[2]),
        (1 + logit) * largest(exact[3]),
    )
    first = [s.start - 1 for s in samples_of(cu)]
    for found in (run("attention_with_importance", case, backend), in_a_row):
        assert found[0].dtype == case["q"].dtype and all(part.dtype == torch.float32 for part in found[1:])
        assert (found[2][first] == 0).all() and (found[3][first] == 0).all()
        for name, *results, magnitude in zip(MEASURES, found, eager, exact, magnitudes, strict=True):
            assert_no_worse_than_torch(*results, magnitude, name)


def check_scores(case, backend):
    exact = run("score_tokens", in_float64(case), "reference")
    ours = run("score_tokens", case, backend)
    eager = EAGER["score_tokens"](**case)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    # The sum of alignments may nearly cancel: then the shares are large and feel every rounding.
    product = largest_norm(case["x"]) * largest_norm(case["dictionary"])
    product += 0.0 if case["bias"] is None else largest(case["bias"])
    magnitude = 1.0
    x, dictionary = case["x"].double(), case["dictionary"].double()
    for rows in samples_of(case["cu_seqlens"]):
        alignment = x[rows] @ dictionary.mT + (0 if case["bias"] is None else case["bias"].double())
        best = alignment.amax(1)
        share = product / abs(best.sum().item() + EPS)
        magnitude = max(magnitude, share * (1 + share * len(best)))
    assert_no_worse_than_torch(ours[0], eager[0], exact[0], magnitude, "importance")
    magnitude += product / case["temperature"] * largest(exact[0])
    assert_no_worse_than_torch(ours[1], eager[1], exact[1], magnitude, "threshold")


def check_compaction(case, backend):
    """Rows, counts and ids exactly; merged rows and norms within the bound."""
    double = in_float64(case) | {"norm": None}
    exact = compact(**double, backend="reference")
    result = compact(**case, backend=backend)
    rows, cu_out = exact.tokens.num_tokens, exact.tokens.cu_seqlens
    assert torch.equal(result.tokens.cu_seqlens, cu_out)
    assert torch.equal(result.ids[:rows], exact.ids[:rows])
    if case["exact"] is not False:
        assert result.tokens.values.shape[0] == rows
    else:
        assert result.tokens.values.shape[0] == case["x"].values.shape[0]
    if case["sizes"] is not None:
        # Sums of small whole numbers are exact in any order.
        assert torch.equal(result.sizes[:rows], exact.sizes[:rows])
    values, expected = result.tokens.values[:rows], exact.tokens.values[:rows]
    lengths = list(zip(case["x"].lengths.tolist(), exact.tokens.lengths.tolist(), strict=True))
    merged_rows = [int(cu_out[b + 1]) - 1 for b, (before, after) in enumerate(lengths) if after < before]
    kept_rows = sorted(set(range(rows)) - set(merged_rows))
    assert torch.equal(values[kept_rows].double(), expected[kept_rows]), "kept rows are copies"
    origin = compact(**case | {"ids": None, "norm": None}, backend="reference")
    for b, (before, after) in enumerate(lengths):
        if after == before:
            continue
        start, stop = case["x"].cu_seqlens[b : b + 2].tolist()
        own = origin.ids[int(cu_out[b]) : int(cu_out[b + 1])].tolist()
        dropped = sorted(set(range(before)) - set(own))
        x, weight = case["x"].values[start:stop][dropped], case["importance"][start:stop][dropped]
        weight = weight if case["sizes"] is None else weight * case["sizes"][start:stop][dropped]
        spread = weight.double().abs().sum().item() / abs(weight.double().sum().item() + EPS)
        row = int(cu_out[b + 1]) - 1
        eager = eager_merge(x, weight)
        magnitude = spread * (1 + spread) * largest(x)
        assert_no_worse_than_torch(values[row], eager, expected[row], magnitude, f"merged row of sample {b}")
    if case["norm"] is not None and rows:
        weight, bias, eps = case["norm"]
        normed = result.normed[:rows]
        assert normed.dtype == values.dtype
        exact_norm = F.layer_norm(values.double(), values.shape[1:], weight.double(), bias.double(), eps)
        eager = F.layer_norm(values, values.shape[1:], weight.to(values.dtype), bias.to(values.dtype), eps)
        deviation = (values.double().var(1, correction=0) + eps).rsqrt()
        sharpness = (values.double().abs().amax(1) * deviation).max().item()
        magnitude = sharpness * (1 + sharpness) * largest(weight) + largest(bias)
        assert_no_worse_than_torch(normed, eager, exact_norm, magnitude, "normed")


# ---- drawn shapes


@every_dtype
@every_backend
def test_attention(backend, dtype):
    def check(data):
        lengths = draw_lengths(data, backend)
        cross = data.draw(st.booleans(), "cross")
        small = interpreted(backend)
        key_lengths = None
        if cross:
            most = 6 if small else 60
            key_lengths = [data.draw(st.integers(0, most)) for _ in lengths] if len(lengths) < 20 else lengths[::-1]
        heads = data.draw(st.integers(1, 3 if small else 33), "heads")
        head_dim = data.draw(
            st.sampled_from([32, 17] if small else [32, 40, 48, 64, 80, 96, 128, 1, 17, 33, 72, 100, 256])
        )
        options = {"causal": data.draw(st.booleans(), "causal"), "bias": data.draw(st.booleans(), "bias")}
        options["gain"] = data.draw(st.sampled_from([1.0, 4.0]), "gain")
        case = attention_case(generator_of(data), lengths, heads, head_dim, dtype, key_lengths=key_lengths, **options)
        check_attention(case, backend)

    each_example(backend, 20, check)


@every_dtype
@every_backend
def test_attention_with_importance(backend, dtype):
    def check(data):
        lengths = draw_lengths(data, backend)
        small = interpreted(backend)
        heads = data.draw(st.integers(1, 3 if small else 33), "heads")
        head_dim = data.draw(
            st.sampled_from([32, 17] if small else [32, 40, 48, 64, 80, 96, 128, 1, 17, 33, 72, 100, 256])
        )
        options = {"causal": data.draw(st.booleans(), "causal"), "bias": data.draw(st.booleans(), "bias")}
        options["gain"] = data.draw(st.sampled_from([1.0, 4.0]), "gain")
        check_both(both_case(generator_of(data), lengths, heads, head_dim, dtype, **options), backend)

    each_example(backend, 20, check)


@every_dtype
@every_backend
def test_score_tokens(backend, dtype):
    def check(data):
        lengths = draw_lengths(data, backend)
        small = interpreted(backend)
        width = data.draw(st.integers(1, 24 if small else 200), "width")
        entries = data.draw(st.integers(1, 9) if small else st.one_of(st.just(1), st.integers(2, 512)), "entries")
        temperature = data.draw(st.sampled_from([0.1, 0.5, 1.0, 10.0, 1000.0]), "temperature")
        bias = data.draw(st.booleans(), "bias")
        case = scoring_case(generator_of(data), lengths, width, entries, dtype, temperature=temperature, bias=bias)
        check_scores(case, backend)

    each_example(backend, 20, check)


@every_dtype
@every_backend
def test_compact(backend, dtype):
    def check(data):
        lengths = draw_lengths(data, backend)
        width = data.draw(st.integers(1, 24 if interpreted(backend) else 200), "width")
        names = "by_count groups protected min_keep ids sizes norm ties".split()
        options = {name: data.draw(st.booleans(), name) for name in names}
        options["exact"] = data.draw(st.sampled_from([None, True, False]), "exact")
        check_compaction(compaction_case(generator_of(data), lengths, width, dtype, **options), backend)

    each_example(backend, 25, check)


# ---- the corners of the range, each with every operation


CORNERS = {
    "257 samples, one of them long": [2, 0, 1, 5] * 64 + [300],
    "one sample of one token": [1],
    "nothing but empty samples": [0] * 9,
    "577 tokens as in ViT-B at 384 pixels": [577],
}


@every_dtype
@pytest.mark.parametrize("name", CORNERS)
@every_backend
def test_corner(backend, name, dtype, generator):
    lengths = CORNERS[name]
    if interpreted(backend) and sum(lengths) > 20:
        pytest.skip("too much for the interpreter")
    heads, width = (2, 32) if interpreted(backend) else (3, 133)
    check_both(both_case(generator, lengths, heads, 64, dtype), backend)
    check_scores(scoring_case(generator, lengths, width, 100, dtype), backend)
    check_compaction(compaction_case(generator, lengths, width, dtype, sizes=True, norm=True), backend)


@pytest.mark.parametrize("backend", backends_here(kernels_only=True))
def test_five_thousand_tokens(backend, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    lengths = [1500 if FORCED else 5000, 3]
    check_both(both_case(generator, lengths, 1, 64), backend)
    check_scores(scoring_case(generator, lengths, 64, 512), backend)
    check_compaction(compaction_case(generator, lengths, 64, sizes=True, norm=True), backend)


@pytest.mark.parametrize("backend", backends_here(kernels_only=True))
def test_33_heads_and_512_entries_in_every_dtype(backend, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    lengths = [40, 1, 7]
    for dtype in DTYPES:
        check_both(both_case(generator, lengths, 33, 32, dtype), backend)
        check_scores(scoring_case(generator, lengths, 30, 512, dtype), backend)


# ---- what holds whatever the numbers are


@every_backend
def test_pruning_preserves_what_the_tokens_stand_for(backend):
    """Sizes add up to the number of original tokens, ids of kept tokens stay in order, and no sample grows."""

    def check(data):
        lengths = draw_lengths(data, backend)
        names = "by_count groups protected min_keep".split()
        options = {name: data.draw(st.booleans(), name) for name in names}
        case = compaction_case(generator_of(data), lengths, 8, sizes=True, **options)
        result = compact(**case, backend=backend)
        before = case["x"].with_values(case["sizes"]).to_list()
        for b, (sizes, ids) in enumerate(
            zip(
                result.tokens.with_values(result.sizes).to_list(),
                result.tokens.with_values(result.ids).to_list(),
                strict=True,
            )
        ):
            ids = ids.tolist()
            assert sizes.sum() == before[b].sum()
            assert len(ids) <= lengths[b]
            if len(ids) == lengths[b]:
                assert ids == list(range(lengths[b]))
                continue
            assert ids[0] == 0 and ids[-1] == -1 and ids[:-1] == sorted(set(ids[:-1]))
            kept = set(ids[1:-1])
            needed = 0 if case["min_keep"] is None else int(case["min_keep"][b])
            assert len(kept) > needed and lengths[b] - 1 - len(kept) >= 2
            start = int(case["x"].cu_seqlens[b])
            scores = case["importance"][start : start + lengths[b]].tolist()
            worst_kept = min(scores[i] for i in kept)
            if case["protected"] is not None:
                flags = case["protected"][start : start + lengths[b]].tolist()
                if not options["by_count"]:
                    assert all(i in kept for i in range(1, lengths[b]) if flags[i])
                worst_kept = min((scores[i] for i in kept if not flags[i]), default=1e9)
            assert all(scores[i] <= worst_kept for i in range(1, lengths[b]) if i not in kept)

    each_example(backend, 30, check)


@every_backend
def test_scores_and_threshold_share_the_scale_of_the_tokens(backend, generator):
    """Importance adds up to two thirds plus the CLS term's third, and the threshold lies between the scores."""
    lengths = [4, 3] if interpreted(backend) else [50, 3, 200]
    case = scoring_case(generator, lengths, 16, 8)
    case["x"] = case["x"] + 3 * case["dictionary"].mean(0)  # alignment well above zero
    importance, threshold = run("score_tokens", case, backend)
    for b, rows in enumerate(samples_of(case["cu_seqlens"])):
        expected = (2 + case["cls"][rows].sum()) / 3
        torch.testing.assert_close(importance[rows].sum(), expected, atol=1e-5, rtol=1e-5)
        rounding = 1e-6 * importance[rows].abs().max()
        assert importance[rows].min() - rounding <= threshold[b] <= importance[rows].max() + rounding


@every_backend
def test_the_token_at_a_cold_threshold_goes(backend, generator):
    """Where the best token of every entry has all its weight, the threshold is a token's score, to the bit: it is not above
    itself, and is not kept because of rounding."""
    lengths, entries = [4, 70, 150], 12
    case = scoring_case(generator, lengths, entries, entries, temperature=1e-3)
    case["dictionary"] = torch.eye(entries).to(case["x"])
    for rows in samples_of(case["cu_seqlens"]):  # whole numbers, no two of them alike for an entry
        order = [torch.randperm(rows.stop - rows.start + 1, generator=generator)[1:] for _ in range(entries)]
        case["x"][rows] = torch.stack(order, 1).to(case["x"])
    importance, threshold = run("score_tokens", case, backend)
    for b, rows in enumerate(samples_of(case["cu_seqlens"])):
        assert threshold[b] == importance[rows][case["x"][rows].argmax(0)].min()
