"""merge_tokens, top_tokens and lowest_tokens against formulas written out here in float64, row by row; and back again with unmerge."""

import pytest
import torch
from helpers import DEVICE, backends_here, interpreted, normal, offsets, spare_rows

from madtp_kernels import (
    RaggedBatch,
    attention,
    attention_received,
    lowest_tokens,
    match_tokens,
    merge_tokens,
    nearest_kept,
    top_tokens,
    unmerge,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_backend = pytest.mark.parametrize("backend", backends_here())
LENGTHS = [9, 0, 1, 4, 70, 3]


def case_of(generator, backend="reference", lengths=None, dtype=torch.float32, width=16):
    """Tokens that stay, are merged into others and are dropped; one sample loses all, one nothing."""
    lengths = lengths or ([9, 0, 1, 4, 3] if interpreted(backend) else LENGTHS)
    into, start = [], 0
    for b, length in enumerate(lengths):
        stays = [i for i in range(length) if torch.rand((), generator=generator) < 0.4]
        stays = list(range(length)) if b == 3 else [] if b == len(lengths) - 1 else stays
        for i in range(length):
            other = torch.randint(-1, len(stays), (), generator=generator).item() if stays else -1
            into.append(start + i if i in stays else start + stays[other] if other >= 0 else -1)
        start += length
    tokens = sum(lengths)
    return {
        "x": RaggedBatch(normal(generator, tokens, width, dtype=dtype), offsets(lengths), max(lengths)),
        "into": torch.tensor(into, dtype=torch.int32, device=DEVICE),
        "weights": torch.rand(tokens, generator=generator).to(DEVICE),
        "sizes": torch.randint(1, 9, (tokens,), generator=generator).float().to(DEVICE),
    }


def formula(x, into, weights, sizes, append=None):
    """Lists of (values, size, source, members) for every sample, in float64."""
    samples, bounds = [], x.cu_seqlens.tolist()
    target = into.tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        rows = [(i, [j for j in range(a, b) if target[j] == i]) for i in range(a, b) if target[i] == i]
        dropped = [j for j in range(a, b) if target[j] < 0]
        rows += [(-1, dropped)] if append and dropped else []
        result = []
        for source, members in rows:
            w, values = weights[members].double(), x.values[members].double()
            total = (w[:, None] * values).sum(0)
            if source < 0:
                merged = total if append == "sum" else total / (w.sum() + 1e-8)
            else:
                merged = values[0] if len(members) == 1 else total / w.sum()
            result.append((merged, sizes[members].sum().item(), source, members))
        samples.append(result)
    return samples


@pytest.mark.parametrize("append", [None, "sum", "mean"])
@every_dtype
@every_backend
def test_formula(backend, dtype, append, generator):
    case = case_of(generator, backend, dtype=dtype)
    expected = [row for sample in formula(**case, append=append) for row in sample]
    for exact in (True, False):
        result = merge_tokens(**case, append=append, exact=exact, backend=backend)
        count = int(result.tokens.cu_seqlens[-1])
        assert count == len(expected) and result.tokens.values.shape[0] == (count if exact else len(case["into"]))
        assert result.tokens.values.dtype == dtype and result.tokens.bound is not exact
        assert result.tokens.lengths.tolist() == [len(s) for s in formula(**case, append=append)]
        rows = [-1] * len(case["into"])
        for r, (values, size, source, members) in enumerate(expected):
            bound = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(result.tokens.values[r].double(), values, atol=bound * 4, rtol=bound)
            assert result.sizes[r] == size and result.source[r] == source
            if source >= 0 and len(members) == 1:
                assert torch.equal(result.tokens.values[r], case["x"].values[source])
            for j in members:
                rows[j] = r
        assert result.rows.tolist() == rows


@every_backend
def test_a_sample_has_the_same_bits_alone(backend, generator):
    case = case_of(generator, backend, dtype=torch.bfloat16)
    whole = merge_tokens(**case, append="sum", backend=backend)
    bounds, out = case["x"].cu_seqlens.tolist(), whole.tokens.cu_seqlens.tolist()
    for b, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {name: case[name][start:stop] for name in ("into", "weights", "sizes")}
        part["into"] = part["into"].where(part["into"] < 0, part["into"] - start)
        x = RaggedBatch(case["x"].values[start:stop], offsets([stop - start]), stop - start)
        alone = merge_tokens(x, **part, append="sum", backend=backend)
        assert torch.equal(alone.tokens.values, whole.tokens.values[out[b] : out[b + 1]])
        assert torch.equal(alone.sizes, whole.sizes[out[b] : out[b + 1]])


@every_backend
def test_rows_beyond_the_last_offset_and_views_do_not_matter(backend, generator):
    case = case_of(generator, backend)
    expected = merge_tokens(**case, append="mean", backend=backend)
    wide = {name: spare_rows(case[name], 5) for name in ("into", "weights", "sizes")}
    tall = RaggedBatch(spare_rows(case["x"].values, 5), case["x"].cu_seqlens, 1000)
    columns = torch.stack([case["x"].values] * 2, 2)[..., 1]
    for given in (wide | {"x": tall}, case | {"x": case["x"].with_values(columns)}):
        got = merge_tokens(**given, append="mean", backend=backend)
        assert torch.equal(got.tokens.values, expected.tokens.values) and torch.equal(got.sizes, expected.sizes)
        assert torch.equal(got.tokens.cu_seqlens, expected.tokens.cu_seqlens)
        count = len(case["into"])
        assert torch.equal(got.rows[:count], expected.rows) and (got.rows[count:] == -1).all()


@every_backend
def test_carried_tensors_follow_their_tokens(backend, generator):
    """Position ids, a rotary table, flags: what belongs to a kept token, zero for an appended row."""
    case = case_of(generator, backend)
    tokens = len(case["into"])
    wide = normal(generator, tokens, 5, 130)[:, 1:4].half()  # a view, in more than one step
    flags = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
    carry = (torch.arange(tokens, device=DEVICE), normal(generator, tokens, 3, 2), flags, wide, flags[:, None][:, :0])
    carry += (normal(generator, tokens, 2).to(torch.float8_e4m3fn),)
    result = merge_tokens(**case, append="sum", carry=carry, backend=backend)
    for r, source in enumerate(result.source.tolist()):
        for before, after in zip(carry, result.carried, strict=True):
            assert after.dtype == before.dtype
            expected = before[source] if source >= 0 else torch.zeros_like(before[0])
            assert after[r].tolist() == expected.tolist()


@every_backend
def test_as_an_operator(backend, generator):
    case = case_of(generator, backend, lengths=[4, 0, 1, 2, 5])
    x = case["x"].values.requires_grad_()
    rest = (case["weights"].requires_grad_(), case["sizes"], case["x"].cu_seqlens, 5)
    carry = [torch.arange(len(x), device=DEVICE), normal(generator, len(x), 3).requires_grad_()]
    operator = torch.ops.madtp_kernels.merge_tokens.default
    torch.library.opcheck(operator, (x, case["into"], *rest, "mean", True, carry, backend))

    def call(x, into):
        batch = RaggedBatch(x, rest[2], 5)
        result = merge_tokens(batch, into, append="sum", carry=tuple(carry), exact=False, backend=backend)
        return (*result[1:4], *result.carried)

    torch._dynamo.reset()
    rows = int(merge_tokens(**case, append="sum").tokens.cu_seqlens[-1])
    for ours, theirs in zip(
        torch.compile(call, fullgraph=True, backend="aot_eager")(x, case["into"]), call(x, case["into"]), strict=True
    ):
        assert torch.equal(ours[:rows], theirs[:rows])


@pytest.mark.parametrize("append", [None, "sum", "mean"])
def test_gradcheck(append, generator):
    case = case_of(generator, lengths=[5, 0, 1, 3, 6, 2], width=3)
    x, weights = case["x"].values.double().requires_grad_(), case["weights"].double().requires_grad_()

    def function(x, weights):
        batch = RaggedBatch(x, case["x"].cu_seqlens, 6)
        return merge_tokens(batch, case["into"], weights=weights, append=append).tokens.values

    assert torch.autograd.gradcheck(function, (x, weights), nondet_tol=0.0)


@every_backend
def test_carried_numbers_whose_sign_is_a_flag(backend, generator):
    """A rotary table as complex numbers, conjugated: the memory holds those that were not."""
    case = case_of(generator, backend)
    table = torch.randn(len(case["into"]), 3, dtype=torch.complex64, generator=generator).to(DEVICE)
    flagged = table.conj(), table.conj().imag
    result = merge_tokens(**case, carry=flagged, backend=backend)
    for before, after in zip(flagged, result.carried, strict=True):
        assert torch.equal(
            after.resolve_conj().resolve_neg(), before.resolve_conj().resolve_neg()[result.source.long()]
        )


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_gradient_of_carried_tensors(backend, dtype, generator):
    """That of a row goes to its source, the others have none; integers beside them have none at all."""
    case = case_of(generator, backend)
    carry = torch.randn(len(case["into"]), 2, generator=generator).to(DEVICE, dtype).requires_grad_()
    ids = torch.arange(len(carry), device=DEVICE)
    result = merge_tokens(**case, append="sum", carry=(ids, carry), backend=backend)
    seed = torch.arange(1.0, 1 + result.carried[1].numel(), device=DEVICE).reshape(result.carried[1].shape).to(dtype)
    grad = torch.autograd.grad(result.carried[1], carry, seed)[0]
    expected = torch.zeros_like(grad)
    for r, source in enumerate(result.source.tolist()):
        if source >= 0:
            expected[source] = seed[r]
    assert torch.equal(grad, expected) and not result.carried[0].requires_grad


@pytest.mark.parametrize("append", [None, "sum", "mean"])
@every_backend
def test_a_mask_says_which_tokens_stay(backend, append, generator):
    case = case_of(generator, backend)
    case["x"] = RaggedBatch(spare_rows(case["x"].values, 4), case["x"].cu_seqlens, case["x"].max_seqlen)
    case |= {name: spare_rows(case[name], 4) for name in ("weights", "sizes")}
    mask = (torch.rand(len(case["sizes"]), generator=generator) < 0.4).to(DEVICE)
    rows = torch.arange(len(mask), device=DEVICE).where(mask, -1).int()
    expected = merge_tokens(**case | {"into": rows}, append=append, backend=backend)
    got = merge_tokens(**case | {"into": mask}, append=append, backend=backend)
    count = got.tokens.num_tokens
    for ours, theirs in zip(got[1:4], expected[1:4], strict=True):
        assert torch.equal(ours[:count], theirs[:count])
    assert torch.equal(got.tokens.values[:count], expected.tokens.values[:count])


@pytest.mark.parametrize("append", [None, "sum", "mean"])
@every_backend
def test_gradients_see_tokens_only(backend, append, generator):
    """Spare rows full of NaN, in the input and in the gradient of the result, reach no gradient, and have none."""
    case = case_of(generator, backend)
    grads = []
    for spare in (0, 5):
        values, weights = (spare_rows(t, spare).requires_grad_() for t in (case["x"].values, case["weights"]))
        x = RaggedBatch(values, case["x"].cu_seqlens, case["x"].max_seqlen)
        into, sizes = (spare_rows(case[name], spare) for name in ("into", "sizes"))
        out = merge_tokens(x, into, weights=weights, sizes=sizes, append=append, exact=False, backend=backend).tokens
        count = out.num_tokens
        seed = torch.linspace(-1, 1, count * 16, device=DEVICE).reshape(count, 16)
        seed = spare_rows(seed, out.values.shape[0] - count)
        grads.append(torch.autograd.grad(out.values, (values, weights), seed))
    for alone, buffered in zip(*grads, strict=True):
        torch.testing.assert_close(buffered[: len(alone)], alone)
        assert (buffered[len(alone) :] == 0).all()


@every_backend
def test_merging_into_the_nearest_survivor_and_back(backend, generator):
    """Sizes add up, unmerge gives every token its group's row, and what was not merged is bit-equal."""
    lengths = [9, 0, 1, 6] if interpreted(backend) else [40, 0, 1, 17]
    x = RaggedBatch(normal(generator, sum(lengths), 16), offsets(lengths), max(lengths))
    mask = torch.arange(sum(lengths), device=DEVICE) % 3 == 0
    mask[x.cu_seqlens[:-1][x.lengths > 0].long()] = True
    for into in (
        nearest_kept(x.values, mask, x.cu_seqlens, x.max_seqlen, backend=backend),
        match_tokens(x.values, x.cu_seqlens, x.max_seqlen, count=3, backend=backend)[0],
    ):
        merged = merge_tokens(x, into, backend=backend)
        totals = merged.tokens.with_values(merged.sizes).to_list()
        assert [int(t.sum()) for t in totals] == lengths and int(merged.sizes.max()) > 1
        back = unmerge(merged.tokens.values, merged.rows, x.cu_seqlens, backend=backend)
        for i, target in enumerate(into.tolist()):
            members = (into == target).nonzero()[:, 0]
            torch.testing.assert_close(back[i], x.values[members].mean(0))
            assert len(members) > 1 or torch.equal(back[i], x.values[i])


@every_backend
def test_a_row_without_weight_stays(backend, generator):
    x = RaggedBatch(normal(generator, 3, 4), offsets([3]), 3)
    into = torch.tensor([1, 1, 1], dtype=torch.int32, device=DEVICE)
    weights = torch.zeros(3, device=DEVICE)
    merged = merge_tokens(x, into, weights=weights, backend=backend)
    assert torch.equal(merged.tokens.values, x.values[1:2]) and merged.sizes.tolist() == [3]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
@every_backend
def test_nothing_to_merge(backend, lengths, generator):
    x = RaggedBatch(normal(generator, 0, 4), offsets(lengths), 0)
    merged = merge_tokens(x, torch.zeros(0, dtype=torch.int32, device=DEVICE), append="sum", backend=backend)
    assert merged.tokens.values.shape == (0, 4) and merged.tokens.cu_seqlens.tolist() == [0] * (len(lengths) + 1)


@pytest.mark.skipif(DEVICE != "cpu", reason="values of a device are read in debug mode only")
@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(3, 4)}, "^x: expected a RaggedBatch"),
    ({"into": torch.zeros(5)}, r"^into: expected \[T\] = int32 or bool\[5\]"),
    ({"into": [0, 1, 2, 3, 5]}, "^into: expected -1 or a row of the same sample that stays, got 5 for token 4"),
    ({"into": [0, 1, 2, 3, -2]}, "^into: expected -1 or a row .* got -2 for token 4"),
    ({"into": [3, 1, 2, 3, 4]}, "^into: expected -1 or a row .* got 3 for token 0"),  # of another sample
    ({"into": [1, 2, 2, 3, 4]}, "^into: expected -1 or a row .* got 1 for token 0"),  # which does not stay
    ({"append": "max"}, "^append: expected None, 'sum' or 'mean', got str 'max'"),
    ({"weights": torch.zeros(4)}, r"^weights: expected \[T\] = float32\[5\]"),
    ({"sizes": torch.zeros(5, dtype=torch.float64)}, r"^sizes: expected \[T\] = float32\[5\]"),
    ({"carry": (torch.zeros(4),)}, r"^carry\[0\]: expected \[T, ...\] = \[5, ...\] on cpu"),
    ({"carry": torch.zeros(5)}, r"^carry: expected a tuple of tensors \[T, ...\], got float32\[5\]"),
    ({"carry": (torch.ones(5).to_sparse(),)}, r"^carry\[0\]: expected .* of layout torch.sparse_coo"),
    ({"weights": torch.nested.nested_tensor([torch.ones(5)])}, r"^weights: expected \[T\] .* got NestedTensor"),
    ({"exact": "yes"}, "^exact: expected True or False, got str 'yes'"),
])  # fmt: skip
def test_refuses(change, message, generator):
    case = {"x": RaggedBatch(normal(generator, 5, 4), offsets([3, 2]), 3), "into": torch.arange(5, dtype=torch.int32)}
    change = {n: torch.tensor(v, dtype=torch.int32) if isinstance(v, list) else v for n, v in change.items()}
    with pytest.raises(ValueError, match=message):
        merge_tokens(**case | change)


# ---- top_tokens


@pytest.mark.parametrize("ties", [False, True])
def test_the_best_tokens(ties, generator):
    lengths = [9, 0, 1, 4, 70]
    scores = normal(generator, sum(lengths))
    scores = (scores * 2).round() if ties else scores
    counts = torch.tensor([3, 2, 0, 9, 20], dtype=torch.int32, device=DEVICE)
    protected = (torch.rand(sum(lengths), generator=generator) < 0.2).to(DEVICE)
    for guard in (None, protected):
        for count in (counts, 2, 0):
            got = top_tokens(
                spare_rows(scores, 4), count, offsets(lengths), protected=0 if guard is None else spare_rows(guard, 4)
            )
            assert not got[sum(lengths) :].any()
            start = 0
            for b, length in enumerate(lengths):
                r = int(counts[b]) if torch.is_tensor(count) else count
                own, free = scores[start : start + length].tolist(), range(length)
                free = [i for i in free if guard is None or not guard[start + i]]
                best = sorted(free, key=lambda i, own=own: (-own[i], i))[:r]
                kept = got[start : start + length].nonzero()[:, 0].tolist()
                assert kept == sorted(set(best) | set(range(length)) - set(free))
                start += length


def test_above_a_threshold(generator):
    """For each sample its own, a number for all, and no more than so many of them."""
    lengths = [9, 0, 1, 40]
    scores = spare_rows(normal(generator, sum(lengths)), 3)
    bounds = torch.tensor([0.5, 0.0, -9.0, 0.2], device=DEVICE)
    rows = torch.repeat_interleave(bounds, torch.tensor(lengths, device=DEVICE))
    own = top_tokens(scores, None, offsets(lengths), threshold=bounds)
    assert own[:50].tolist() == (scores[:50] > rows).tolist() and not own[50:].any()
    shared = top_tokens(scores, None, offsets(lengths), threshold=0.5)
    assert shared[:50].tolist() == (scores[:50] > 0.5).tolist()
    few = top_tokens(scores, 3, offsets(lengths), threshold=0.5)
    assert (few == (shared & top_tokens(scores, 3, offsets(lengths)))).all()
    assert top_tokens(scores, None, offsets(lengths), threshold=100.0, protected=1).nonzero()[:, 0].tolist() == [
        0,
        9,
        10,
    ]


@pytest.mark.parametrize("first", [0, 1, 2, 5])
def test_first_tokens_stand_apart(first, generator):
    """Class and register tokens are kept, whatever their score, and do not count."""
    lengths = [9, 0, 3, 12]
    scores, cu_seqlens = normal(generator, sum(lengths)), offsets(lengths)
    place = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    scores[place < first] = -9.0
    got = top_tokens(scores, 2, cu_seqlens, protected=first)
    assert torch.equal(got, top_tokens(scores, 2, cu_seqlens, protected=place < first))
    assert got[place < first].all()
    assert [int(part.sum()) for part in got.split(lengths)] == [min(n, first + 2) for n in lengths]


def test_units_stay_together(generator):
    """Groups of four rows by their mean: what a 2 x 2 merger behind the tower needs."""
    lengths = [24, 0, 64, 4]
    scores = normal(generator, sum(lengths))
    scores[24 + 8 : 24 + 12] = 10.0
    got = top_tokens(scores, 1, offsets(lengths), unit=4).unflatten(0, (-1, 4))
    assert (got.all(1) == got.any(1)).all() and got.any(1).sum() == 3 and got[6 + 2].all()


@pytest.mark.skipif(DEVICE != "cpu", reason="values of a device are read in debug mode only")
@pytest.mark.parametrize("change, message", [
    ({"scores": torch.zeros(3, 2)}, r"^scores: expected floating-point \[T\]"),
    ({"scores": torch.tensor([1.0, float("nan"), 0, 0, 0, 0])}, "^scores: expected finite scores"),
    ({"count": -1}, "^count: expected an int >= 0"),
    ({"count": torch.tensor([-1, 0], dtype=torch.int32)}, "^count: expected >= 0, got -1"),
    ({"count": 0.5}, "^count: expected an int >= 0"),
    ({"protected": torch.zeros(5, dtype=torch.bool)}, r"^protected: expected \[T\] = bool\[6\]"),
    ({"protected": -1}, "^protected: expected an int >= 0 or bool"),
    ({"threshold": "high"}, "^threshold: expected a number or"),
    ({"threshold": torch.zeros(3)}, r"^threshold: expected \[B\] = float32\[2\]"),
    ({"threshold": float("nan")}, "^threshold: expected a number or"),
    ({"threshold": torch.tensor([0.0, float("nan")])}, "^threshold: expected numbers, got NaN"),
    ({"count": None}, "^count, threshold: expected at least one of them, got neither"),
    ({"unit": 0}, "^unit: expected an int >= 1"),
    ({"unit": 4}, "^cu_seqlens: expected lengths that are multiples of the unit 4"),
])  # fmt: skip
def test_top_tokens_refuses(change, message):
    case = {"scores": torch.zeros(6), "count": 1, "cu_seqlens": offsets([4, 2])}
    with pytest.raises(ValueError, match=message):
        top_tokens(**case | change)


# ---- sizes count


@pytest.mark.parametrize("backend", backends_here())
def test_a_token_of_size_n_counts_as_n_copies(backend, generator):
    """Proportional attention: the same output, and what the copies receive together is what the token receives."""
    sizes = torch.tensor([1, 3, 2, 1], device=DEVICE)
    q, k, v = normal(generator, 3, 4, 2, 8)
    copies = [t.repeat_interleave(sizes, 0) for t in (q, k, v)]
    one, many, bias = offsets([4]), offsets([7]), sizes.float().log()
    options = {"queries": slice(0, 1), "backend": backend}
    out, lse = attention(q, k, v, one, one, 4, 4, key_bias=bias, backend=backend)
    expected, expected_lse = attention(*copies, many, many, 7, 7, backend=backend)
    first = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)[:-1]])
    torch.testing.assert_close(out, expected[first], atol=2e-6, rtol=2e-6)
    received = attention_received(q, k, lse, one, 4, key_bias=bias, **options)
    spread = attention_received(*copies[:2], expected_lse, many, 7, **options)
    together = torch.stack([part.sum() for part in spread.split(sizes.tolist())])
    torch.testing.assert_close(received, together, atol=2e-6, rtol=2e-6)
    plain = attention(q, k, v, one, one, 4, 4, backend=backend)[0]
    assert (plain - out).abs().max() > 1e-3  # sizes do change the result
    # Merged, it weighs as many, too; nobody has to say so.
    x, into = normal(generator, 4, 16), torch.tensor([0, 0, 0, 3], dtype=torch.int32, device=DEVICE)
    merged = merge_tokens(RaggedBatch(x, one, 4), into, sizes=sizes.float(), backend=backend)
    into = torch.tensor([0] * 6 + [6], dtype=torch.int32, device=DEVICE)
    apart = merge_tokens(RaggedBatch(x.repeat_interleave(sizes, 0), many, 7), into, backend=backend)
    torch.testing.assert_close(merged.tokens.values[:2], apart.tokens.values[:2], atol=2e-6, rtol=2e-6)
    assert merged.sizes[:2].tolist() == apart.sizes[:2].tolist() == [6, 1]


# ---- lowest_tokens


@pytest.mark.parametrize("threshold", [None, 1.0, -1.0])
@every_backend
def test_the_lowest_tokens(backend, threshold, generator):
    lengths = [9, 0, 1, 4, 70, 3]
    tokens = sum(lengths)
    scores = (torch.randint(0, 8, (tokens,), generator=generator) / 4).to(DEVICE)  # with ties
    free = (torch.rand(tokens, generator=generator) < 0.7).to(DEVICE)
    count = torch.tensor([3, 2, 1, 0, 30, 99], dtype=torch.int32, device=DEVICE)
    got = lowest_tokens(scores, count, offsets(lengths), free=free, threshold=threshold, backend=backend)
    start, expected = 0, []
    for length, most in zip(lengths, count.tolist(), strict=True):
        rows = [
            row for row in range(start, start + length) if free[row] and (threshold is None or scores[row] <= threshold)
        ]
        rows.sort(key=lambda row: (float(scores[row]), -row))
        expected += rows[:most]
        start += length
    assert got.nonzero()[:, 0].tolist() == sorted(expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 2 / 3 * (1 + 1e-6), 1.0])
@every_backend
def test_a_share_of_the_tokens_at_most(backend, share, generator):
    """Rounded down, of the tokens that count; a count that is given limits, too."""
    lengths = [9, 0, 1, 4, 70, 3]
    scores, free = torch.rand(sum(lengths), generator=generator).to(DEVICE), torch.ones(sum(lengths), dtype=torch.bool)
    free[[0, 9, 10, 14, 84]] = False  # the first of each
    options = {"free": free.to(DEVICE), "share": share, "uncounted": 1, "backend": backend}
    goes = lowest_tokens(scores, None, offsets(lengths), **options)
    most = [int(max(length - 1, 0) * share) for length in lengths]
    assert [int(part.sum()) for part in goes.split(lengths)] == most
    given = [0, 1, 1, 2, 3, 9]
    count = torch.tensor(given, dtype=torch.int32, device=DEVICE)
    goes = lowest_tokens(scores, count, offsets(lengths), **options)
    assert torch.equal(
        goes,
        lowest_tokens(
            scores,
            torch.minimum(count, torch.tensor(most, device=DEVICE).int()),
            offsets(lengths),
            free=options["free"],
        ),
    )


@pytest.mark.parametrize("option", [{"share": 1.5}, {"share": float("nan")}, {"share": True}, {"uncounted": -1}])
def test_shares_that_are_none_are_refused(option):
    scores, free = torch.zeros(3, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match=f"^{next(iter(option))}: expected .* got "):
        lowest_tokens(scores, None, offsets([3]), free=free, **option)


@every_backend
def test_what_goes_is_what_does_not_stay(backend, generator):
    """The lowest r tokens are all but the highest n - r, ties included."""
    scores = (torch.randint(0, 5, (40,), generator=generator) / 2).to(DEVICE)
    count = torch.tensor([7, 11], dtype=torch.int32, device=DEVICE)
    cu_seqlens, free = offsets([25, 15]), torch.ones(40, dtype=torch.bool, device=DEVICE)
    goes = lowest_tokens(scores, count, cu_seqlens, free=free, backend=backend)
    stays = top_tokens(scores, torch.tensor([18, 4], dtype=torch.int32, device=DEVICE), cu_seqlens)
    assert torch.equal(goes, ~stays)


@every_backend
def test_a_buffer_without_samples_has_no_rows(backend):
    """Whoever gathers all rows of the buffer finds that no token went anywhere."""
    tokens = RaggedBatch(torch.ones(3, 2, device=DEVICE), offsets([]), 0, bound=True)
    into = torch.arange(3, dtype=torch.int32, device=DEVICE)
    merged = merge_tokens(tokens, into, exact=False, backend=backend)
    assert merged.rows.tolist() == merged.source.tolist() == [-1, -1, -1]


@every_backend
def test_rows_beyond_the_samples_are_not_chosen(backend):
    scores, free = spare_rows(torch.zeros(3, device=DEVICE), 2), torch.ones(5, dtype=torch.bool, device=DEVICE)
    count = torch.tensor([9], dtype=torch.int32, device=DEVICE)
    got = lowest_tokens(scores, count, offsets([3]), free=free, threshold=1.0, backend=backend)
    assert got.tolist() == [True, True, True, False, False]
    scores = torch.tensor([0.0, 1.0, 2.0, 9.0, 9.0], device=DEVICE)  # what is left of another batch
    for options in (
        {"count": 9},
        {"count": count},
        {"count": None, "threshold": -1.0},
        {"count": 0, "protected": free},
    ):
        assert top_tokens(scores, cu_seqlens=offsets([3]), **options).tolist() == [True, True, True, False, False]
