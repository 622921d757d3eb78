"""The C++ kernels for CPUs, where they differ from the other backends: instruction sets, threads, memory, and operators.

Their results on any legal shape are checked with everyone's, in `test_properties.py`.
"""

import copy
import os
import pickle
import resource
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import (
    CASES,
    DEVICE,
    attention_case,
    both_case,
    compaction_case,
    merging_case,
    missing,
    normal,
    offsets,
    run,
    spare_rows,
)

from madtp.vision import cut_patches
from madtp_kernels import (
    RaggedBatch,
    attention,
    compact,
    lowest_tokens,
    merge_redundant,
    merge_scores,
    merge_tokens,
    native,
    nearest_kept,
    prune,
    score_tokens,
)

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the CPU kernels are tested where the tensors are on the CPU"),
    pytest.mark.skipif(DEVICE == "cpu" and missing("cpu") is not None, reason=str(missing("cpu"))),
]

TESTS = Path(__file__).parent
LENGTHS = [3, 0, 700, 1, 41, 2, 130, 64, 65]  # several blocks and chunks, and next to nothing

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def same_bits(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- padding ----------------------------------------------------------------------------------------------------------


@every_dtype
def test_keys_hidden_at_the_end_of_a_sample_are_left_out(dtype, generator):
    """A bias of -inf hides padding; the result has the bits that the keys before it give alone, NaN in hidden keys is seen."""
    shown, lengths = [70, 0, 33, 1], [200, 5, 33, 90]
    case = attention_case(generator, lengths, dtype=dtype, bias=True)
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
    rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, shown, strict=False)])
    hidden = torch.ones(sum(lengths), dtype=torch.bool).index_fill(0, rows, False)
    case["key_bias"][hidden] = float("-inf")
    few = case | {name: case[name][rows] for name in ("k", "v", "key_bias")}
    few |= {"cu_seqlens_k": offsets(shown), "max_seqlen_k": max(shown)}
    assert same_bits(run("attention", case, "cpu"), run("attention", few, "cpu"))
    for name in ("k", "v"):
        broken = case | {name: case[name].clone()}
        broken[name][150] = float("nan")  # a hidden key of the first sample
        out, _ = run("attention", broken, "cpu")
        assert out[:200].isnan().all() and out[200:].isfinite().all()


# ---- instruction sets -----------------------------------------------------------------------------------------------


@pytest.fixture
def instruction_set(fresh):
    """A function: what the kernels run with when a set is asked for, or None where the processor lacks it; and stderr."""

    def found(name):
        program = "from madtp_kernels import native; print(native.load().build_info()['cpu'])"
        done = fresh.run(program, env=os.environ | {"MADTP_KERNELS_CPU": name})
        return done.stdout.strip() if done.returncode == 0 else None, done.stderr

    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["avx512bf16", "avx512", "avx2", "portable"])
def test_lesser_instruction_sets(name, instruction_set, fresh_command):
    """All properties hold with the kernels of older processors too; the best set is tested by default. Of avx512bf16 what it has
    beside avx512: products of bfloat16."""
    found, _ = instruction_set(name)
    if found is None:
        pytest.skip(f"this processor does not have {name}")
    assert found == name
    files = ["test_properties.py", "../test_batch_invariance.py", "test_not_finite.py", "test_cpu_gradients.py"]
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    chosen = "(cpu or finite) and not nlvr" + " and (bfloat16 or every_dtype)" * (name == "avx512bf16")
    options = ["-q", "-x", "--assert", "plain", "-k", chosen]  # what fails is looked at by hand
    done = fresh_command.run(
        program, *options, *files, env=os.environ | {"MADTP_KERNELS_CPU": name}, cwd=TESTS, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def test_unknown_instruction_set_is_refused_by_name(instruction_set):
    found, said = instruction_set("avx1024")
    assert found is None and "avx1024" in said and "portable" in said


def test_tiles_leave_those_of_pytorch_alone(generator, instruction_set):
    """AMX tiles are configured per thread: PyTorch's products give the same bits before, between and after ours."""
    if instruction_set("amx")[0] is None:
        pytest.skip("this processor does not have amx")
    weight, x = (normal(generator, 96, 96, dtype=torch.bfloat16) for _ in range(2))
    case = both_case(generator, [40], 2, 64, torch.bfloat16)
    heads = case["q"].transpose(0, 1)[None]

    def theirs():
        return torch.nn.functional.linear(x, weight), torch.nn.functional.scaled_dot_product_attention(
            heads, heads, heads
        )

    want_theirs, want_ours = theirs(), run("attention_with_importance", case, "cpu")
    for _ in range(3):
        assert same_bits(run("attention_with_importance", case, "cpu"), want_ours)
        assert same_bits(theirs(), want_theirs)


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every_dtype
@pytest.mark.parametrize("op", CASES)
def test_same_bits_with_any_number_of_threads(op, dtype, threads, generator):
    case = CASES[op](generator, LENGTHS, dtype=dtype)
    threads(1)
    alone = run(op, case, "cpu")
    for count in (2, 3, 7):
        threads(count)
        for _ in range(3):
            assert same_bits(run(op, case, "cpu"), alone), f"{count} threads"


def test_calls_from_several_python_threads(generator):
    """The kernels let go of the interpreter and share their kept memory: calls at the same time do not meet in it."""
    cases = [both_case(generator, [400 + 31 * i, i], heads=4, head_dim=64) for i in range(4)]
    alone = [run("attention_with_importance", case, "cpu") for case in cases]
    wrong = []

    def call(i):
        for _ in range(8):
            if not same_bits(run("attention_with_importance", cases[i], "cpu"), alone[i]):
                wrong.append(i)

    workers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---- attention ------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("head_dim", [1, 31, 33, 64, 80, 96, 128, 200, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_one_pass_gives_the_bits_of_attention_alone(dtype, head_dim, causal, generator):
    case = both_case(generator, [5, 0, 100, 17], 3, head_dim, dtype, causal=causal, bias=True)
    both = run("attention_with_importance", case, "cpu")
    alone = {name: case[name] for name in ("q", "k", "v", "causal", "key_bias")}
    cu, most = case["cu_seqlens"], case["max_seqlen"]
    alone |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": most, "max_seqlen_k": most}
    assert same_bits(both[:2], run("attention", alone, "cpu"))


def test_queries_in_pieces_give_the_bits_of_the_whole(generator):
    """The blocks that a sample is cut into leave no trace: neither does cutting its queries by hand."""
    case = attention_case(generator, [100], 2, 64, key_lengths=[333])
    whole = run("attention", case, "cpu")
    for first, last in ((0, 1), (1, 50), (50, 100)):
        piece = case | {"q": case["q"][first:last], "cu_seqlens_q": offsets([last - first])}
        out, lse = run("attention", piece, "cpu")
        assert torch.equal(out, whole[0][first:last]) and torch.equal(lse, whole[1][:, first:last])


@every_dtype
def test_keys_at_minus_infinity_are_not_seen(dtype, generator):
    case = attention_case(generator, [40, 9], 2, 32, dtype)
    hidden = torch.rand(49, generator=generator) < 0.5
    hidden[0], hidden[40:] = False, True  # the second sample sees nothing
    case["key_bias"] = torch.zeros(49).masked_fill(hidden, float("-inf"))
    out, lse = run("attention", case, "cpu")
    seen = case | {
        "k": case["k"][~hidden],
        "v": case["v"][~hidden],
        "key_bias": None,
        "cu_seqlens_k": offsets([int((~hidden).sum()), 0]),
    }
    want_out, want_lse = run("attention", seen, "reference")
    torch.testing.assert_close(out, want_out, rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-2)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert (out[40:] == 0).all() and (lse[:, 40:] == float("-inf")).all()


@pytest.mark.parametrize("gain", [1e-6, 300.0, 3e4])
def test_logits_of_any_size(gain, generator):
    """Thousands apart: no overflow, the largest takes all."""
    case = both_case(generator, [50, 7], 3, 16, gain=gain)
    ours, want = run("attention_with_importance", case, "cpu"), run("attention_with_importance", case, "reference")
    for a, b in zip(ours, want, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_not_a_number_spreads_to_its_sample_only(generator):
    case = attention_case(generator, [20, 30], 2, 16)
    case["q"][3, 0, 5] = float("nan")
    out, lse = run("attention", case, "cpu")
    assert out[3, 0].isnan().all() and lse[0, 3].isnan()
    out[3, 0], lse[0, 3] = 0, 0
    assert out.isfinite().all() and lse.isfinite().all()


PEAK = """
import resource, torch
from madtp_kernels import attention_with_importance, ragged
length = 12_000
q, k, v = torch.randn(3, length, 2, 16).unbind()
cu = ragged.offsets_from_lengths([length], "cpu")
attention_with_importance(*(t[:10] for t in (q, k, v)), ragged.offsets_from_lengths([10], "cpu"), 10, backend="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention_with_importance(q, k, v, cu, length, backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_grows_with_tokens_only(fresh):
    """One head's probabilities of 12,000 tokens would take 576 MB; queries, keys and values take 1.5 MB each."""
    done = fresh.run(PEAK, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 40e6


# ---- compaction -----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("by_count", [False, True])
def test_exact_and_bounded_results_hold_the_same_rows(dtype, by_count, generator):
    case = compaction_case(
        generator, LENGTHS, 37, dtype, by_count=by_count, protected=True, sizes=True, ids=True, norm=True
    )
    exact = run("compact", case | {"exact": True}, "cpu")
    bounded = compact(**case | {"exact": False}, backend="cpu")
    assert bounded.tokens.values.shape[0] == case["x"].values.shape[0]
    assert same_bits(exact, run("compact", case | {"exact": False}, "cpu"))
    assert exact[0].shape[0] == int(exact[1][-1])


def test_kept_rows_are_copies_bit_for_bit(generator):
    """NaN payloads and negative zeros included."""
    case = compaction_case(generator, [64, 300], 50)
    case["x"].values[::7] = -0.0
    case["x"].values[::11] = float("nan")
    values, cu, ids = run("compact", case, "cpu")[:3]
    for b, start in enumerate((0, 64)):
        rows = slice(int(cu[b]), int(cu[b + 1]) - 1)  # without the merged one
        want = case["x"].values[start + ids[rows].long()]
        assert torch.equal(values[rows].view(torch.int32), want.view(torch.int32))


def test_rows_with_gaps_between_them(generator):
    wide = normal(generator, 200, 2, 24)
    for x in (wide[:, 0], wide[:, 1]):
        case = compaction_case(generator, [150, 50], 24) | {"x": RaggedBatch(x, offsets([150, 50]), 150)}
        dense = case | {"x": RaggedBatch(x.contiguous(), offsets([150, 50]), 150)}
        assert same_bits(run("compact", case, "cpu"), run("compact", dense, "cpu"))


# ---- scoring and compaction in one call -----------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("options", [(), ("protected", "sizes", "ids", "norm"), ("groups", "min_keep")], ids=str)
def test_one_call_gives_the_bits_of_two(dtype, options, generator):
    case = compaction_case(generator, LENGTHS, 37, dtype, **dict.fromkeys(options, True))
    x, *_ = (case.pop(name) for name in ("x", "importance", "threshold", "keep_count", "exact"))
    entering, dictionary = normal(generator, *x.values.shape).to(dtype), normal(generator, 21, 37).to(dtype)
    received, cls = torch.rand(2, len(x.values), generator=generator)
    for exact in (True, False):
        scores = score_tokens(entering, dictionary, received, cls, x.cu_seqlens, x.max_seqlen, 0.7)
        want = compact(x, *scores, exact=exact, **case)
        got, *ours = prune(x, entering, dictionary, received, cls, 0.7, exact=exact, **case)
        assert same_bits(ours, scores)
        rows, total = got.tokens, int(want.tokens.cu_seqlens[-1])
        assert (rows.max_seqlen, rows.bound) == (want.tokens.max_seqlen, want.tokens.bound)
        assert torch.equal(rows.cu_seqlens, want.tokens.cu_seqlens) and rows.values.shape == want.tokens.values.shape
        pairs = zip((rows.values, *got[1:]), (want.tokens.values, *want[1:]), strict=True)
        assert all((a is None) == (b is None) and (a is None or torch.equal(a[:total], b[:total])) for a, b in pairs)


@pytest.mark.parametrize("name", ["received", "cls", "dictionary", "entering"])
def test_one_call_refuses_scores_that_are_not_finite_as_two_do(name, generator):
    x = RaggedBatch(normal(generator, 12, 16), offsets([5, 7]), 7)
    operands = {"entering": normal(generator, 12, 16), "dictionary": normal(generator, 3, 16)}
    operands |= dict(zip(("received", "cls"), torch.rand(2, 12, generator=generator), strict=True))
    operands[name].view(-1)[-1] = float("nan")
    named = name if name in ("received", "cls") else "importance"
    with pytest.raises(ValueError, match=f"{named}: expected finite scores, got"):
        prune(x, **operands, temperature=1.0)


# ---- what a layer of ranked novelty does, in one call -----------------------------------------------------------------


def redundant_case(generator, lengths, dtype=torch.float32, **options):
    case = merging_case(generator, lengths, 24, dtype, **options)
    x = RaggedBatch(normal(generator, sum(lengths), 37).to(dtype), case.pop("cu_seqlens"), case.pop("max_seqlen"))
    return case | {
        "x": x,
        "carry": (torch.arange(sum(lengths), dtype=torch.int32), normal(generator, sum(lengths), 2, 3)),
    }


def one_by_one(x, keys, order, *, free, weight, sizes, count=None, carry, exact, **choice):
    scores, _, norms = merge_scores(keys, order, x.cu_seqlens, x.max_seqlen, free=free, weight=weight, sizes=sizes)
    goes = lowest_tokens(scores, count, x.cu_seqlens, free=free, **choice)
    into = nearest_kept(keys, free & ~goes, x.cu_seqlens, x.max_seqlen, goes=goes, inverse_norms=norms)
    return merge_tokens(x, into, sizes=sizes, carry=carry, exact=exact), scores


@every_dtype
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"sizes": False}], ids=str)
@pytest.mark.parametrize(
    "choice", [{"threshold": 0.9}, {"threshold": 1.5, "share": 0.4, "uncounted": 1}, {"count": 3}], ids=str
)
def test_one_call_gives_the_bits_of_four(dtype, options, choice, generator):
    case = redundant_case(generator, LENGTHS, dtype, **options) | choice
    if "count" in choice:
        case["count"] = torch.full((len(LENGTHS),), 3, dtype=torch.int32)
    for exact in (True, False):
        got, scores, *_ = merge_redundant(**case, exact=exact)
        want, same = one_by_one(**case, exact=exact)
        total = int(want.tokens.cu_seqlens[-1])
        assert total < len(same) and torch.equal(scores, same) and torch.equal(got.rows, want.rows)
        assert (got.tokens.max_seqlen, got.tokens.bound) == (want.tokens.max_seqlen, want.tokens.bound)
        assert (
            torch.equal(got.tokens.cu_seqlens, want.tokens.cu_seqlens)
            and got.tokens.values.shape == want.tokens.values.shape
        )
        found, wanted = ((m.tokens.values, m.sizes, m.source, *m.carried) for m in (got, want))
        assert all(torch.equal(a[:total], b[:total]) for a, b in zip(found, wanted, strict=True))


def test_one_call_takes_operands_that_lie_apart(generator):
    case = redundant_case(generator, [40, 9], weight=True) | {"threshold": 1.5}
    spread = {
        name: torch.stack([value, value], -1)[..., 0] for name, value in case.items() if isinstance(value, torch.Tensor)
    }
    spread["x"] = RaggedBatch(torch.stack([case["x"].values] * 2, -1)[..., 0], case["x"].cu_seqlens, 40)
    (got, scores, *_), (want, same, *_) = merge_redundant(**case | spread), merge_redundant(**case)
    assert torch.equal(scores, same) and torch.equal(got.tokens.values, want.tokens.values)


REDUNDANT_REFUSALS = {
    "order": (lambda order: order.index_fill(0, torch.tensor([3]), float("nan")), "^order: expected finite scores, got 1"),
    "weight": (lambda weight: weight.index_fill(0, torch.tensor([3]), float("inf")), "^weight: expected finite scores, got 1"),
    "free": (lambda free: free.long(), r"^free: expected \[T\] = bool"),
    "sizes": (lambda sizes: sizes[:-1], r"^sizes: expected \[T\] = float32"),
    "keys": (lambda keys: keys.to_sparse(), r"^keys: expected floating-point .* of layout torch.sparse_coo"),
    "carry": (lambda carry: (carry[0][:-1],), r"^carry\[0\]: expected \[T, ...\]"),
    "x": (lambda x: x.values, "^x: expected a RaggedBatch"),
    "threshold": (lambda _: "low", "^threshold: expected a number, got str 'low'"),
    "share": (lambda _: True, "^share: expected a number from 0 to 1, got bool True"),
    "exact": (lambda _: "no", "^exact: expected True or False, got str 'no'"),
    "novelty_exponent": (lambda _: float("nan"), "^novelty_exponent: expected a finite number"),
    "count": (lambda _: torch.tensor([2, -1], dtype=torch.int32), "^count: expected >= 0, got -1"),
    "keys, empty": (lambda keys: keys[:, :0], r"^keys: expected .* with at least one feature"),
    "keys, nested": (lambda keys: torch.nested.nested_tensor([keys]), "^keys: expected .* got NestedTensor"),
    "order, nested": (lambda order: torch.nested.nested_tensor([order]), r"^order: expected \[T\] .* got NestedTensor"),
    "carry, sparse": (lambda carry: (carry[0].to_sparse(),), r"^carry\[0\]: expected .* of layout torch.sparse_coo"),
    "carry, nested": (lambda carry: (torch.nested.nested_tensor([carry[1]]),), r"^carry\[0\]: .* got NestedTensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUNDANT_REFUSALS)
def test_one_call_refuses_what_four_do(name, generator):
    case = redundant_case(generator, [5, 7], weight=True) | {"threshold": 0.9}
    bad, message = REDUNDANT_REFUSALS[name]
    name = name.partition(",")[0]
    with pytest.raises(ValueError, match=message):
        merge_redundant(**case | {name: bad(case.get(name))})


def test_one_call_refuses_scores_that_are_infinite(generator):
    """Weights below 0, whose mean is 0."""
    case = redundant_case(generator, [4]) | {"weight": torch.tensor([-1.0, 1, 1, -1]), "weight_exponent": 1.0}
    case["free"][:] = True
    with pytest.raises(ValueError, match="^scores: expected finite scores, got "):
        merge_redundant(**case)


def test_one_call_refuses_samples_that_have_become_longer(generator):
    case = redundant_case(generator, [5, 7]) | {"threshold": 0.9}
    case["x"].cu_seqlens[1] = 1
    with pytest.raises(ValueError, match="^max_seqlen: 7 is below the length 11 of sample 1"):
        merge_redundant(**case)


def test_gradients_go_the_long_way(generator):
    case = redundant_case(generator, LENGTHS) | {"threshold": 1.5}
    want = merge_redundant(**case).merged.tokens.values
    case["x"].values.requires_grad_()
    got = merge_redundant(**case).merged.tokens.values
    assert torch.equal(got, want)
    got.sum().backward()
    assert case["x"].values.grad.isfinite().all() and case["x"].values.grad.any()


# ---- a whole MLP ----------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("lengths", [[1], LENGTHS, [1500, 700]], ids=str)
@pytest.mark.parametrize("width, hidden_width", [(33, 130), (160, 640)])
def test_an_mlp_gives_the_bits_of_two_layers(dtype, lengths, width, hidden_width, threads, generator):
    """Of small layers each thread takes rows of its own, of large ones the threads share the features."""
    threads(2)
    rows, extension = sum(lengths) + 3, native.load()
    x, residual = (normal(generator, rows, width).to(dtype) for _ in range(2))
    first, second = (normal(generator, *shape).to(dtype) for shape in ((hidden_width, width), (width, hidden_width)))
    bias = normal(generator, hidden_width).to(dtype)
    for cu_seqlens in (None, offsets(lengths)):
        hidden = extension.linear(x, first, bias, cu_seqlens, "gelu", None)
        want = extension.linear(hidden, second, None, cu_seqlens, "", residual)
        defined = rows if cu_seqlens is None else rows - 3
        apart = (first.T.contiguous().T, bias, second.T.contiguous().T, None)
        for weights in ((first, bias, second, None), apart):
            assert same_bits([extension.mlp(x, *weights, cu_seqlens, "gelu", residual)[:defined]], [want[:defined]])


def test_an_mlp_whose_layers_do_not_fit(generator):
    x, first, second = (normal(generator, *shape) for shape in ((5, 8), (32, 8), (8, 31)))
    with pytest.raises(ValueError, match="^weight2: expected"):
        native.load().mlp(x, first, None, second, None, None, "gelu", x)
    with pytest.raises(ValueError, match="^residual: expected"):
        native.load().mlp(x, first, None, normal(generator, 8, 32), None, None, "gelu", x[:-1])


@every_dtype
@pytest.mark.parametrize("width, hidden_width", [(33, 130), (160, 640)])
@pytest.mark.parametrize("first", [True, False], ids=["norm first", "norm last"])
def test_a_layer_norm_inside_gives_the_bits_of_one_apart(dtype, width, hidden_width, first, threads, generator):
    threads(2)
    extension, lengths = native.load(), [1, 700, 0, 41]
    cu_seqlens, tokens = offsets(lengths), sum(lengths)
    x, residual = (normal(generator, tokens + 3, width).to(dtype) for _ in range(2))
    weights = [
        normal(generator, *shape).to(dtype) for shape in ((hidden_width, width), (hidden_width,), (width, hidden_width))
    ]
    for bias in (normal(generator, width).to(dtype), None):
        norm = normal(generator, width).to(dtype), bias, 1e-5
        entering = extension.layer_norm(x, *norm[:2], cu_seqlens, norm[2]) if first else x
        want = extension.mlp(entering, *weights, None, cu_seqlens, "gelu", residual)
        want = want if first else extension.layer_norm(want, *norm[:2], cu_seqlens, norm[2])
        got = extension.mlp(x, *weights, None, cu_seqlens, "gelu", residual, *norm, first)
        assert same_bits([got[:tokens]], [want[:tokens]])
    with pytest.raises(ValueError, match="^norm_weight: expected"):
        extension.mlp(x, *weights, None, cu_seqlens, "gelu", residual, norm[0][:-1], None, 1e-5, first)


# ---- patches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "side, features, shape", [(8, 32, (3, 48, 24)), (3, 33, (1, 9, 12)), (16, 48, (3, 208, 208)), (2, 0, (3, 4, 4))]
)
@pytest.mark.parametrize("samples", [0, 1, 3])
def test_embedded_patches_have_the_bits_of_a_product_and_a_sum(side, features, shape, samples, threads, generator):
    extension, number = native.load(), shape[1] * shape[2] // side**2
    images, weight = normal(generator, samples, *shape), normal(generator, features, shape[0], side, side)
    offset, cls, positions = (normal(generator, *lead, features) for lead in ((), (), (number + 1,)))
    for bias in (offset, None):
        patches = extension.linear(cut_patches(images, side), weight.flatten(1), bias, None, "", None)
        patches = patches.view(samples, number, features) + positions[1:]
        want = torch.cat([(cls + positions[0]).expand(samples, 1, features), patches], 1).flatten(0, 1)
        for count in (1, 2):
            threads(count)
            assert torch.equal(extension.embed_patches(images, weight, bias, cls, positions), want)


def test_patches_that_one_pass_does_not_serve(generator):
    extension = native.load()
    cls, positions = normal(generator, 64), normal(generator, 5, 64)
    images, weight = normal(generator, 2, 3, 64, 64), normal(generator, 64, 3, 32, 32)
    assert extension.embed_patches(images, weight, None, cls, positions) is None  # weights of 768 KiB
    images, weight = images[:, :, :8, :8].contiguous(), weight[..., :4, :4].contiguous()
    assert extension.embed_patches(images, weight, None, cls, positions) is not None
    half = (t if t is None else t.bfloat16() for t in (images, weight, None, cls, positions))
    assert extension.embed_patches(*half) is None
    for name, wrong in {
        "images": (images[:, :, :7].contiguous(), weight, None, cls, positions),
        "weight": (images, weight[:, :2].contiguous(), None, cls, positions),
        "bias": (images, weight, cls[:-1], cls, positions),
        "cls": (images, weight, None, cls[:-1], positions),
        "positions": (images, weight, None, cls, positions[:-1]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            extension.embed_patches(*wrong)


# ---- attention between its linear layers ------------------------------------------------------------------------------


def test_attention_layers_refuse_weights_that_do_not_fit(generator):
    extension, cu_seqlens = native.load(), offsets([3, 4])
    x, qkv, out = (normal(generator, *shape) for shape in ((7, 16), (48, 16), (16, 16)))

    def self_attention(qkv=qkv, out=out, heads=2, norm=None, key_bias=None, longest=4):
        return extension.self_attention(
            x, norm, None, 1e-5, True, qkv, None, out, None, heads, cu_seqlens, longest, False, key_bias, True
        )  # fmt: skip

    def cross_attention(q=qkv[:16], kv=qkv[:32], out=out, heads=2, others=x, cu=cu_seqlens, longest=(4, 4)):
        return extension.cross_attention(x, q, None, others, kv, None, out, None, heads, cu_seqlens, cu, *longest, None)

    assert len(self_attention()) == 7 and cross_attention().shape == x.shape
    wide = normal(generator, 3 * 257, 16)
    for name, call in (
        ("qkv_weight", lambda: self_attention(heads=5)),
        ("qkv_weight", lambda: self_attention(qkv=wide, heads=1)),
        ("max_seqlen", lambda: self_attention(longest=3)),
        ("weight", lambda: self_attention(out=out[:, :-1])),
        ("residual", lambda: self_attention(out=out[:-1])),
        ("norm_weight", lambda: self_attention(norm=x[0, 1:])),
        ("key_bias", lambda: self_attention(key_bias=x[0])),
        ("q_weight", lambda: cross_attention(heads=3)),
        ("q_weight", lambda: cross_attention(q=wide[:257], kv=wide[:514], heads=1)),
        ("kv_weight", lambda: cross_attention(kv=qkv)),
        ("cu_seqlens_k", lambda: cross_attention(others=x[:-1])),
        ("cu_seqlens_k", lambda: cross_attention(cu=offsets([1, 2, 4]))),
        ("max_seqlen_q", lambda: cross_attention(longest=(3, 4))),
        ("max_seqlen_k", lambda: cross_attention(longest=(4, 3))),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            call()


# ---- memory of results ------------------------------------------------------------------------------------------------


def test_large_results_are_tensors_like_others(generator):
    """Their memory is kept for later calls when nobody has them any more, and not before."""
    extension = native.load()
    x, weight = normal(generator, 9000, 64), normal(generator, 96, 64)  # 3.3 MiB

    def product(k):
        return extension.linear(x * k, weight, None, None, "", None)

    results = [product(k) for k in range(6)]
    wanted = [result.clone() for result in results]
    assert len({result.data_ptr() for result in results}) == len(results)
    del results[::2], wanted[::2]
    more = [product(k) for k in range(6)]
    assert same_bits(results, wanted) and same_bits(more[1::2], wanted)
    result = more[1]
    assert pickle.loads(pickle.dumps(result)).equal(result) and copy.deepcopy(result).equal(result)
    assert result.clone().share_memory_().equal(result)
    grown = result.clone().set_(result.untyped_storage()).resize_(2 * result.numel())
    assert grown[: result.numel()].equal(wanted[0].flatten())
    worker = threading.Thread(target=more.clear)
    worker.start()
    worker.join()
    with torch.inference_mode():
        assert product(1).is_inference()


def test_results_come_without_new_pages(generator):
    """Pages that the system has to clear first took a quarter of a forward."""
    x, weight = (
        normal(generator, 40_000, 32),
        normal(generator, 96, 32),
    )  # 15 MiB, of which the C library returns some to the system

    def new_pages():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        kept = [native.load().linear(x, weight, None, None, "", None) for _ in range(4)]
        del kept
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    new_pages()
    assert max(new_pages() for _ in range(3)) < 1000  # of 15,000


# ---- the extension itself -------------------------------------------------------------------------------------------


def test_module_and_operators_are_the_same_functions(generator):
    module, operators = native.load(), torch.ops.madtp_native
    q, k, v = (normal(generator, 12, 2, 8) for _ in range(3))
    cu = offsets([5, 7])
    both = (q, k, v, cu, 7, 0.3, False, None)
    attended = module.attention(q, k, v, cu, cu, 7, 7, 0.3, False, None)
    assert same_bits(operators.attention(q, k, v, cu, cu, 7, 7, 0.3, False, None), attended)
    importance = module.attention_importance(q, k, *attended, cu, 7, 0.3, False, None)
    assert same_bits(operators.attention_importance(q, k, *attended, cu, 7, 0.3, False, None), importance)
    assert same_bits(operators.attention_with_importance(*both), module.attention_with_importance(*both))
    x, dictionary = normal(generator, 12, 16), normal(generator, 3, 16)
    scoring = (x, dictionary, *importance, cu, 7, 1.0, None)
    scores = module.score_tokens(*scoring)
    assert same_bits(operators.score_tokens(*scoring), scores)
    compaction = (x, *scores, None, cu, 7, None, None, None, None, None, -1, None, None, 1e-6, True)
    assert same_bits(operators.compact(*compaction), module.compact(*compaction))


def test_double_precision_is_refused_by_name():
    q = torch.zeros(4, 1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="q: the cpu backend takes float32, bfloat16 and float16, got Double"):
        native.load().attention(q, q, q, offsets([4]), offsets([4]), 4, 4, 1.0, False, None)


@every_dtype
def test_nothing_is_read_beyond_the_last_sample(dtype, generator):
    """The buffer ends in rows of NaN, and the last sample has a length that fills no block, vector or pair."""
    case = attention_case(generator, [40, 37], 2, 33, dtype, bias=True)
    want = run("attention", case, "cpu")
    spare = {name: spare_rows(case[name], 3) for name in ("q", "k", "v", "key_bias")}
    assert same_bits(run("attention", case | spare, "cpu"), want)
    out, lse = attention(**case | spare, backend="cpu")
    assert out.shape[0] == 80 and lse.shape == (2, 80)
