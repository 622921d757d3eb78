"""The Triton kernels against the reference: through Triton's interpreter on the CPU, as compiled kernels where there is a GPU.

Rows beyond the last token hold NaN, as do all outputs before they are written (conftest), so that whoever reads or forgets a
row shows.
"""

import itertools
import math
import random

import pytest
import torch

pytest.importorskip("triton")
from madtp_kernels import RaggedBatch, merge_redundant, repeats
from madtp_kernels.attention import reference as attention_reference
from madtp_kernels.attention import triton as attention_triton
from madtp_kernels.compaction import reference as compaction_reference
from madtp_kernels.compaction import triton as compaction_triton
from madtp_kernels.importance import reference as importance_reference
from madtp_kernels.importance import triton as importance_triton
from madtp_kernels.linear import reference as linear_reference
from madtp_kernels.linear import tiles as linear_tiles
from madtp_kernels.linear import triton as linear_triton
from madtp_kernels.merge_redundant import _on_gpu as merge_on_gpu
from madtp_kernels.merging import triton as merging_triton
from madtp_kernels.scoring import reference as scoring_reference
from madtp_kernels.scoring import triton as scoring_triton
from madtp_kernels.similarity import triton as similarity_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [5, 0, 1, 37, 2, 70]  # empty, CLS alone, nothing to prune, more than one tile of each kernel
SPARE = 3  # rows of the buffer beyond the last token

FLOAT32_ERROR = 5e-6  # against float64: a few roundings of sums of about a hundred terms around 1


@pytest.fixture(autouse=True)
def seed(generator):
    random.seed(generator.initial_seed())
    torch.manual_seed(generator.initial_seed())


def offsets(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def poisoned(tensor, tokens):
    """The tensor with NaN in the rows that hold no token."""
    tensor[tokens:] = float("nan")
    return tensor


def random_qkv(tokens, heads, width, dtype):
    """Query, key and value as views of one buffer, as a fused projection leaves them."""
    fused = torch.randn(tokens + SPARE, 3, heads, width, device=DEVICE).to(dtype)
    return poisoned(fused, tokens).unbind(1)


def wide(*tensors):
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def assert_near(name, got, expected, bound):
    error = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    assert error <= bound, f"{name}: error {error:.2e}, expected at most {bound:.0e}"


# ---- attention ----------------------------------------------------------------------------------------------------

# Every mask in float32, and each mask in 16 bits: where a key is hidden does not depend on how products are rounded.
KINDS = [(torch.float32, causal, biased) for causal in (False, True) for biased in (False, True)]
KINDS += [(dtype, causal, causal) for dtype in (torch.bfloat16, torch.float16) for causal in (False, True)]
each_kind_of_attention = pytest.mark.parametrize(
    "dtype, causal, biased",
    KINDS,
    ids=[f"{str(d)[6:]}-{'causal' if c else 'full'}{'-key_bias' * b}" for d, c, b in KINDS],
)


def check_attention(implementation, dtype, lengths_q, lengths_k, width, causal, biased):
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    q = random_qkv(sum(lengths_q), 3, width, dtype)[0]
    _, k, v = random_qkv(sum(lengths_k), 3, width, dtype)
    bias = poisoned(torch.randn(k.shape[0], device=DEVICE), sum(lengths_k)) if biased else None
    shared = (cu_q, cu_k, max(lengths_q), max(lengths_k), 0.3, causal)
    expected_out, expected_lse = attention_reference.attention(*wide(q, k, v), *shared, *wide(bias))
    out, lse = implementation(q, k, v, *shared, bias)
    tokens = sum(lengths_q)
    assert out.dtype == dtype and out.is_contiguous() and out.shape == q.shape
    # 16 bits: each probability and the result are rounded once, which moves the result by at most eps * max |v|.
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * v[: sum(lengths_k)].abs().max().item()
    assert_near("out", out[:tokens], expected_out[:tokens], FLOAT32_ERROR + rounding)
    keyless = expected_lse == float("-inf")
    assert torch.equal((lse == float("-inf"))[:, :tokens], keyless[:, :tokens])
    seen = ~keyless[:, :tokens]
    assert_near("lse", lse[:, :tokens][seen], expected_lse[:, :tokens][seen], FLOAT32_ERROR)


def own_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, bias):
    arguments = (q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, bias)
    return attention_triton._triton_attention(*arguments, True)(*arguments)


# On a GPU the operation may choose PyTorch's kernel; elsewhere the choice always falls on the own one.
IMPLEMENTATIONS = [own_kernel] if DEVICE == "cpu" else [own_kernel, attention_triton.attention]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@each_kind_of_attention
def test_self_attention(implementation, dtype, causal, biased):
    check_attention(implementation, dtype, LENGTHS, LENGTHS, 24, causal, biased)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cross_attention_with_queries_that_see_no_key(implementation, dtype, causal):
    check_attention(implementation, dtype, [5, 3, 0, 70, 9, 2], [66, 0, 4, 3, 9, 1], 16, causal, False)


@pytest.mark.parametrize("width", [1, 64, 100, 200])
def test_head_widths(width):
    check_attention(attention_triton.attention, torch.float32, [3, 40], [3, 40], width, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_of_logits_whose_exponential_overflows(dtype):
    """Whole numbers: equal logits are equal in every precision, others are a hundred apart."""
    lengths, width, scale = [5, 66], 16, 100.0
    q, k, v = torch.randint(-8, 9, (3, 71, 2, width), device=DEVICE).to(dtype)
    shared = (offsets(lengths), offsets(lengths), 66, 66, scale, False)
    out, lse = own_kernel(q, k, v, *shared, None)
    expected_out, expected_lse = attention_reference.attention(*wide(q, k, v), *shared, None)
    assert expected_lse.max() > 2e4
    assert_near("out", out, expected_out, 8 * torch.finfo(dtype).eps)
    assert_near("lse / largest", lse / 1e5, expected_lse / 1e5, 1e-6)


@pytest.mark.parametrize("name, value", [("q", "nan"), ("k", "nan"), ("v", "nan"), ("k", "inf"), ("v", "-inf")])
def test_attention_of_bad_values_is_as_bad_as_the_reference_says(name, value):
    lengths, cu = [5, 70], offsets([5, 70])
    tensors = dict(zip("qkv", random_qkv(sum(lengths), 3, 16, torch.float32), strict=True))
    tensors[name][5 + 67, 1, 2] = float(value)  # in the last block, which is not full
    shared = (cu, cu, 70, 70, 0.3, False, None)
    out, lse = own_kernel(*tensors.values(), *shared)
    expected, expected_lse = attention_reference.attention(*tensors.values(), *shared)
    torch.testing.assert_close(out[:75], expected[:75], atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse[:, :75], expected_lse[:, :75], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert not out[:75].isfinite().all() and out[:5].isfinite().all()


def test_log_sum_exp_of_infinite_logits_is_infinite_unless_one_is_nan():
    cu = offsets([70, 70])
    q, k, v = random_qkv(140, 1, 16, torch.float32)
    q[:, :, 0], k[:, :, 0] = 1.0, 0.0
    q[3, :, 0] = -1.0  # to this query the same keys are at -inf
    k[(0, 69, 70), :, 0] = float("inf")
    k[110, :, 1] = float("nan")
    shared = (cu, cu, 70, 70, 0.3, False, None)
    out, lse = own_kernel(q, k, v, *shared)
    expected, expected_lse = attention_reference.attention(q, k, v, *shared)
    torch.testing.assert_close(lse[:, :140], expected_lse[:, :140], atol=1e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(out[:140], expected[:140], atol=1e-5, rtol=1e-5, equal_nan=True)
    assert lse[:, 3].isfinite().all() and lse[:, 70:140].isnan().all()
    assert (lse[:, :70][:, torch.arange(70) != 3] == float("inf")).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_too_large_for_a_softmax_give_nan(dtype):
    """Scaled in the instruction that subtracts their maximum, they would give 0 or an infinity. Up to there nothing changes."""
    furthest = attention_triton._furthest(dtype)
    logits = torch.tensor([1.0, 2.0**20, furthest / 2, furthest, 4 * furthest]) / 1.4426950408889634 * 1.01
    scale = logits.max().item() / (16 * 2.0**15)
    q = (logits / (16 * scale)).to(dtype)[:, None, None].expand(5, 1, 16).contiguous().to(DEVICE)
    k = torch.tensor([1.0, 0.5, -1.0, 0.0, 0.25], device=DEVICE).to(dtype)[:, None, None].expand(5, 1, 16).contiguous()
    v = torch.randn(5, 1, 16, device=DEVICE).to(dtype)
    cu = offsets([5])
    for bias in (None, torch.zeros(5, device=DEVICE)):
        shared = (cu, cu, 5, 5, scale, False, bias)
        out, lse = own_kernel(q, k, v, *shared)
        expected, expected_lse = attention_reference.attention(*wide(q, k, v), *shared)
        right = 5 if bias is not None else 3
        assert_near("out", out[:right].float(), expected[:right], 2 * torch.finfo(dtype).eps + 1e-3)
        torch.testing.assert_close(lse[:, :right].double(), expected_lse[:, :right], rtol=1e-5, atol=1e-5)
        assert out[right:].isnan().all() and lse[:, right:].isnan().all()


def check_attention_gradient(dtype, lengths_q, lengths_k, width, causal, biased, heads=2, offset=0.0):
    """Against the reference in float64, from the same out and lse; without tokens there is no gradient."""
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
    q = random_qkv(tokens_q, heads, width, dtype)[0]
    _, k, v = random_qkv(tokens_k, heads, width, dtype)
    bias = poisoned(torch.randn(k.shape[0], device=DEVICE) + offset, tokens_k) if biased else None
    lengths = (cu_q, cu_k, max(lengths_q), max(lengths_k), width**-0.5, causal)
    out, lse = attention_reference.attention(*wide(q, k, v), *lengths, *wide(bias))
    out, lse = poisoned(out.to(dtype), tokens_q), lse.float()
    lse[:, tokens_q:] = float("nan")
    d_out = poisoned(torch.randn(q.shape[0], width, heads, device=DEVICE).to(dtype), tokens_q).mT  # last stride not 1
    d_lse = torch.randn(q.shape[0], heads, device=DEVICE).mT
    d_lse[:, tokens_q:] = float("nan")
    got = attention_triton.attention_backward(q, k, v, out, lse, *lengths, bias, d_out, d_lse)
    expected = attention_reference.attention_backward(*wide(q, k, v, out, lse), *lengths, *wide(bias, d_out, d_lse))
    for name, mine, exact, rows in zip(
        ("dq", "dk", "dv", "d_key_bias"), got, expected, (tokens_q, tokens_k, tokens_k, tokens_k), strict=True
    ):
        assert mine.shape == exact.shape and mine.dtype == (torch.float32 if name == "d_key_bias" else dtype)
        # P and dS are rounded to 16 bits before they are multiplied: relative errors of eps in sums of random signs.
        rounding = 2 * torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
        largest = exact.abs().max().item() if exact.numel() else 0.0
        assert_near(name, mine, exact, rounding * max(1.0, largest))
        assert (mine[rows:] == 0).all()


@each_kind_of_attention
def test_self_attention_gradient(dtype, causal, biased):
    check_attention_gradient(dtype, LENGTHS, LENGTHS, 24, causal, biased)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_attention_gradient_with_queries_that_see_no_key(dtype, causal):
    check_attention_gradient(dtype, [5, 3, 0, 140, 9, 2, 7], [66, 0, 4, 3, 9, 1, 150], 16, causal, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 32, 64, 80, 128, 200])
def test_gradient_of_head_widths(width, dtype):
    check_attention_gradient(dtype, [1, 0, 37], [1, 0, 37], width, False, False, heads=1)


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_gradient_of_logits_whose_exponential_overflows(offset):
    check_attention_gradient(torch.bfloat16, [5, 37], [5, 37], 16, False, True, offset=offset)


def test_attention_gradient_is_the_same_alone_and_in_a_batch():
    lengths = [33, 1, 90, 0, 12]
    tensors = [torch.randn(sum(lengths), 2, 16, device=DEVICE) for _ in range(5)]
    lse, d_lse = torch.randn(2, 2, sum(lengths), device=DEVICE)

    def gradients(lengths, rows):
        q, k, v, out, d_out = (t[rows] for t in tensors)
        cu = offsets(lengths)
        return attention_triton.attention_backward(
            q, k, v, out, lse[:, rows], cu, cu, 100, 100, 0.25, False, None, d_out, d_lse[:, rows]
        )[:3]

    together, begin = gradients(lengths, slice(None)), 0
    for length in lengths:
        rows = slice(begin, begin + length)
        for mine, other in zip(gradients([length], rows), together, strict=True):
            assert torch.equal(mine, other[rows])
        begin += length


# ---- importance -----------------------------------------------------------------------------------------------------


def importance_inputs(lengths, dtype, causal, biased, heads=3, width=20):
    q, k, v = random_qkv(sum(lengths), heads, width, dtype)
    cu = offsets(lengths)
    bias = poisoned(torch.randn(q.shape[0], device=DEVICE), sum(lengths)) if biased else None
    shared = (cu, cu, max(lengths), max(lengths), 0.3, causal)
    out, lse = attention_reference.attention(*wide(q, k, v), *shared, *wide(bias))
    out = poisoned(out.to(dtype), sum(lengths))
    lse = lse.float()
    lse[:, sum(lengths) :] = float("nan")
    return q, k, out, lse, cu, max(lengths), 0.3, causal, bias


@each_kind_of_attention
def test_importance(dtype, causal, biased):
    arguments = importance_inputs(LENGTHS, dtype, causal, biased)
    expected = importance_reference.attention_importance(*wide(*arguments[:4]), *arguments[4:8], *wide(arguments[8]))
    got = attention_importance_with(1, *arguments)
    for name, mine, reference in zip(("received", "cls"), got, expected, strict=True):
        # Products of 16-bit inputs are exact in float32: the tolerance is float32's for every dtype, at sums of about 10.
        assert_near(name, mine[: sum(LENGTHS)], reference[: sum(LENGTHS)], 5e-5)


def attention_importance_with(multiprocessors, *arguments):
    """The operation on a device of so many multiprocessors: few mean one program per key block, many one per tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance_triton, "multiprocessors", lambda tensor: multiprocessors)
        return importance_triton.attention_importance(*arguments)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_importance_has_the_same_bits_in_one_launch_and_in_two(causal):
    lengths = [150, 3, 0, 1, 290]
    arguments = importance_inputs(lengths, torch.float16, causal, False, heads=2, width=16)
    one = attention_importance_with(1, *arguments)
    wide = torch.cat([arguments[3], torch.randn(2, 50, device=DEVICE)], 1)  # rows of a larger table
    for lse in (arguments[3], wide[:, :-50]):
        two = attention_importance_with(1000, *arguments[:3], lse, *arguments[4:])
        for mine, other in zip(one, two, strict=True):
            assert torch.equal(mine[: sum(lengths)], other[: sum(lengths)])


# ---- scoring --------------------------------------------------------------------------------------------------------


def scoring_inputs(lengths, dtype, entries, biased, width=48):
    tokens = sum(lengths)
    x = poisoned(torch.randn(tokens + SPARE, 2 * width, device=DEVICE), tokens).to(dtype)[:, :width]
    dictionary = torch.randn(entries, width, device=DEVICE).to(dtype)
    received = poisoned(torch.rand(tokens + SPARE, device=DEVICE), tokens)
    cls = poisoned(torch.rand(tokens + SPARE, device=DEVICE), tokens)
    # With a single entry alignments have either sign, and a sum near 0 would only test conditioning: 40 is 6 sigma away.
    bias = torch.rand(entries, device=DEVICE) + 40 if biased else None
    return x, dictionary, received, cls, offsets(lengths), max(lengths), 1.7, bias


@pytest.mark.parametrize("one_launch", [True, False], ids=["one-launch", "two-launches"])
@pytest.mark.parametrize("entries", [1, 100, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring(dtype, entries, one_launch, monkeypatch):
    monkeypatch.setattr(scoring_triton, "_one_launch", lambda *sizes: one_launch)
    arguments = scoring_inputs(LENGTHS, dtype, entries, biased=entries < 100)
    expected = scoring_reference.score_tokens(*wide(*arguments[:4]), *arguments[4:7], *wide(arguments[7]))
    importance, threshold = scoring_triton.score_tokens(*arguments)
    tokens = sum(LENGTHS)
    assert_near("importance", importance[:tokens], expected[0][:tokens], 2e-6)
    assert_near("threshold", threshold, expected[1], 2e-6)


def test_scoring_has_the_same_bits_in_one_launch_and_in_two(monkeypatch):
    lengths = [300, 1, 40]
    arguments = scoring_inputs(lengths, torch.float32, 30, False)
    results = []
    for one_launch in (True, False):
        monkeypatch.setattr(scoring_triton, "_one_launch", lambda *sizes, choice=one_launch: choice)
        results.append(scoring_triton.score_tokens(*arguments))
    assert torch.equal(results[0][0][: sum(lengths)], results[1][0][: sum(lengths)])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("entries", [30, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring_has_the_same_bits_beside_longer_samples(dtype, entries, monkeypatch):
    """Alone, a sample of one tile leaves nothing behind; beside longer ones its sums are merged with those of tiles it has not."""
    monkeypatch.setattr(scoring_triton, "_one_launch", lambda *sizes: True)
    *tensors, cu, _, temperature, bias = scoring_inputs([50, 0, 1, 65, 2], dtype, entries, biased=True)
    capacity, tokens = len(tensors[0]), int(cu[-1])
    flags = torch.zeros(capacity, dtype=torch.bool, device=DEVICE)
    selection = (flags, torch.zeros_like(cu[1:]))
    results = []
    for longest in (65, 66, 1024, 1025):
        results.append(scoring_triton.score_tokens(*tensors, cu, longest, temperature, bias, selection))
    for importance, threshold, (places, _, rows) in results[1:]:
        assert torch.equal(importance[:tokens], results[0][0][:tokens]) and torch.equal(threshold, results[0][1])
        assert torch.equal(places[:tokens], results[0][2][0][:tokens]) and torch.equal(rows, results[0][2][2])


@pytest.mark.parametrize("one_launch", [True, False], ids=["one-launch", "two-launches"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name, entries", [("x", 3), ("dictionary", 30), ("dictionary", 130), ("bias", 3), ("received", 3), ("cls", 3)]
)
def test_scores_are_no_number_where_the_reference_has_none(name, entries, value, one_launch, monkeypatch):
    """A maximum on a GPU drops a NaN; one entry or token would then go unseen."""
    monkeypatch.setattr(scoring_triton, "_one_launch", lambda *sizes: one_launch)
    lengths = [20, 150]
    arguments = list(scoring_inputs(lengths, torch.float32, entries, biased=True, width=16))
    number = ["x", "dictionary", "received", "cls", "", "", "", "bias"].index(name)
    spoilt = arguments[number].clone()
    spoilt[2 if name in ("dictionary", "bias") else 90] = value
    arguments[number] = spoilt
    expected = scoring_reference.score_tokens(*wide(*arguments[:4]), *arguments[4:7], *wide(arguments[7]))
    for ours, theirs in zip(scoring_triton.score_tokens(*arguments), expected, strict=True):
        count = min(len(ours), sum(lengths))
        torch.testing.assert_close(ours[:count].double(), theirs[:count].double(), atol=1e-5, rtol=1e-5, equal_nan=True)


def test_an_entry_of_which_the_first_tokens_are_infinitely_far(monkeypatch):
    """A tile in which an entry is aligned with no token weighs nothing, beside tiles where it is."""
    for one_launch in (True, False):
        monkeypatch.setattr(scoring_triton, "_one_launch", lambda *sizes, choice=one_launch: choice)
        arguments = list(scoring_inputs([200], torch.float32, 3, biased=False, width=16))
        arguments[0][:130, 0], arguments[1][0, 0] = -3e38, 9.0
        arguments[0][130:, 0], arguments[1][1:, 0] = 1.0, 0.0
        expected = scoring_reference.score_tokens(*wide(*arguments[:4]), *arguments[4:])
        importance, threshold = scoring_triton.score_tokens(*arguments)
        assert threshold.isfinite().all()
        assert_near("threshold", threshold, expected[1], 1e-5)
        assert_near("importance", importance[:200], expected[0][:200], 1e-5)


@pytest.mark.parametrize("one_launch", [True, False], ids=["one launch", "two launches"])
@pytest.mark.parametrize("options", [False, True], ids=["plain", "protected, min_keep"])
def test_scoring_selects_as_compaction_does(options, one_launch, monkeypatch):
    monkeypatch.setattr(scoring_triton, "_one_launch", lambda *sizes: one_launch)
    arguments = scoring_inputs(LENGTHS, torch.float32, 30, False)
    capacity, batch, cu = len(arguments[0]), len(LENGTHS), arguments[4]
    protected = torch.rand(capacity, device=DEVICE) < 0.2 if options else None
    min_keep = torch.randint(0, 30, (batch,), dtype=torch.int32, device=DEVICE) if options else None
    importance, threshold = scoring_triton.score_tokens(*arguments)
    *ours, (places, dropped, rows) = scoring_triton.score_tokens(*arguments, (protected, min_keep))
    assert torch.equal(ours[0][: int(cu[-1])], importance[: int(cu[-1])]) and torch.equal(ours[1], threshold)
    choose = compaction_triton._selection(capacity, batch, max(LENGTHS), True, False)
    flags = None if protected is None else protected.view(torch.uint8)
    theirs = choose(importance, threshold, None, cu, flags, None, min_keep)
    assert torch.equal(places[: int(cu[-1])], theirs[0][: int(cu[-1])]) and torch.equal(rows, theirs[2])
    assert (rows < cu.diff()).any()
    for start, length, kept in zip(cu.tolist(), LENGTHS, rows.tolist()):
        gone = slice(start, start + (length - kept + 1 if kept < length else 0))
        assert torch.equal(dropped[gone], theirs[1][gone])


# ---- compaction -----------------------------------------------------------------------------------------------------

OPTIONS = {
    "threshold": {},
    "protected": {"protected": True},
    "min_keep": {"min_keep": True},
    "ids-sizes": {"ids": True, "sizes": True},
    "norm": {"norm": True},
    "norm-no-bias": {"norm": True, "norm_bias": False},
    "groups": {"groups": True},
    "groups-protected": {"groups": True, "protected": True, "sizes": True},
    "count": {"count": True},
    "count-ties": {"count": True, "ties": True, "protected": True},
    "count-groups": {"count": True, "groups": True, "min_keep": True},
    "everything": {"groups": True, "protected": True, "min_keep": True, "ids": True, "sizes": True, "norm": True},
}


def compaction_inputs(lengths, dtype, exact, options, width=40):
    tokens, batch = sum(lengths), len(lengths)
    rows = tokens + SPARE

    def integers(high, size):
        return torch.randint(0, high, (size,), dtype=torch.int32, device=DEVICE)

    x = poisoned(torch.randn(rows, 2 * width, device=DEVICE), tokens).to(dtype)[:, :width]
    importance = torch.rand(rows, device=DEVICE)
    if options.get("ties"):
        importance = (importance * 4).round() / 4
    counted = options.get("count")
    norm_bias = options.get("norm") and options.get("norm_bias", True)
    return (
        x,
        poisoned(importance, tokens),
        None if counted else torch.rand(batch, device=DEVICE),
        integers(40, batch) if counted else None,
        offsets(lengths),
        max(lengths) + 5,
        torch.rand(rows, device=DEVICE) < 0.2 if options.get("protected") else None,
        integers(batch, batch) if options.get("groups") else None,
        integers(4, batch) if options.get("min_keep") else None,
        integers(1000, rows) if options.get("ids") else None,
        poisoned(torch.rand(rows, device=DEVICE) * 3 + 1, tokens) if options.get("sizes") else None,
        -7,
        torch.randn(width, device=DEVICE).to(dtype) if options.get("norm") else None,
        torch.randn(width, device=DEVICE).to(dtype) if norm_bias else None,
        1e-5,
        exact,
    )


def check_compaction(arguments):
    values, cu_out, ids, sizes, normed = compaction_triton.compact(*arguments)
    expected = compaction_reference.compact(*arguments)
    assert torch.equal(cu_out, expected[1])
    rows = int(cu_out[-1])
    assert (sizes is None, normed is None) == (arguments[10] is None, arguments[12] is None)
    for mine, reference in zip((values, ids, sizes, normed), (expected[0], *expected[2:]), strict=True):
        assert mine is None or (mine.shape == reference.shape and mine.dtype == reference.dtype)
    assert torch.equal(ids[:rows], expected[2][:rows])
    # A float32 sum in another order, then one rounding to the dtype, which may fall the other way.
    close = {"rtol": torch.finfo(values.dtype).eps, "atol": 5e-6}
    torch.testing.assert_close(values[:rows], expected[0][:rows], **close)
    if sizes is not None:
        assert_near("sizes", sizes[:rows], expected[3][:rows], 1e-4)
    if arguments[12] is not None:
        # Of the rows as stored: next to equal tokens, LayerNorm would amplify the last bit of a merged row.
        renormed = compaction_reference.layer_norm(values[:rows], *arguments[12:15])
        torch.testing.assert_close(normed[:rows], renormed, rtol=close["rtol"], atol=2e-5)
    merged = ids[:rows] == -7
    assert torch.equal(values[:rows][~merged], expected[0][:rows][~merged]), "kept rows must be exact copies"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_compaction(options):
    dtype, exact = random.choice(DTYPES), random.random() < 0.5
    print(dtype, "exact" if exact else "bound")
    check_compaction(compaction_inputs(LENGTHS, dtype, exact, options))


def test_compaction_has_the_same_bits_however_many_rows_a_program_moves(monkeypatch):
    """A device that holds the programs of a batch all at once gets more of them, which move fewer rows."""
    dtype = random.choice(DTYPES)
    arguments = compaction_inputs(LENGTHS, dtype, False, {"ids": True, "sizes": True, "norm": True}, width=1000)
    rows, results = int(compaction_reference.compact(*arguments)[1][-1]), []
    for few in (False, True):
        monkeypatch.setattr(compaction_triton, "_few_rows", lambda *sizes, choice=few: choice)
        check_compaction(arguments)
        results.append(compaction_triton.compact(*arguments))
    assert all(torch.equal(few[:rows], many[:rows]) for few, many in zip(*results, strict=True))


def test_rows_fetched_number_by_number_are_not_fetched_in_advance():
    """The addresses would take more registers than a thread has."""
    x = torch.zeros(8, 1024, device=DEVICE)
    assert compaction_triton._few_rows(300, x, 100) and not compaction_triton._few_rows(301, x, 100)
    shifted = torch.zeros(8 * 1024 + 1, device=DEVICE)[1:].view(8, 1024)
    for rows in (x[:, :1001], torch.zeros(8, 1001, device=DEVICE), shifted):
        assert not compaction_triton._few_rows(1, rows, 100)
    assert not compaction_triton._few_rows(1, torch.zeros(1, 8193, device=DEVICE), 100)


def test_compaction_of_many_uneven_samples():
    lengths = [random.choice([0, 1, 2, 3, 8]) for _ in range(37)]  # more samples than are counted at once
    lengths[random.randrange(37)] = 200
    check_compaction(compaction_inputs(lengths, torch.float32, False, {}, width=5))


@pytest.mark.parametrize("threshold", [-1.0, 2.0], ids=["all-kept", "nothing-kept"])
def test_compaction_leaves_a_sample_alone(threshold):
    arguments = list(compaction_inputs(LENGTHS, torch.bfloat16, True, {}))
    arguments[2] = torch.full_like(arguments[2], threshold)
    values, cu_out, ids, *_ = compaction_triton.compact(*arguments)
    assert torch.equal(cu_out, arguments[4])
    assert torch.equal(values, arguments[0][: sum(LENGTHS)])
    assert torch.equal(ids, torch.cat([torch.arange(n) for n in LENGTHS]).to(ids))


# ---- linear ---------------------------------------------------------------------------------------------------------

TILES = {
    torch.float32: [linear_tiles.FLOAT32],
    torch.bfloat16: [linear_tiles.SIXTEEN_BITS, linear_tiles.COPY_ENGINE],
    torch.float16: [linear_tiles.SIXTEEN_BITS, linear_tiles.COPY_ENGINE],
}
EVERY_TILE = [(dtype, tiles, tile) for dtype in DTYPES for tiles in TILES[dtype] for tile in tiles]
each_tile = pytest.mark.parametrize(
    "dtype, tiles, tile", EVERY_TILE, ids=[f"{str(d)[6:]}-{'x'.join(map(str, tile[:3]))}" for d, _, tile in EVERY_TILE]
)


def check_linear(dtype, tiles, tile, activation, undefined):
    """Several tiles in each direction that no tile divides, dealt out to three programs."""
    if tiles is linear_tiles.COPY_ENGINE and DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("has no copy engine")
    lengths, width, columns = [5, 0, 1, 37, 2, 230], 104, 304 if tile.stored else 300
    tokens = sum(lengths)
    x = torch.randn(tokens + SPARE, 2 * width, device=DEVICE).to(dtype)[:, :width]
    weight = (torch.randn(columns, width, device=DEVICE) / width**0.5).to(dtype)
    bias = torch.randn(columns, device=DEVICE).to(dtype)
    residual = torch.randn(tokens + SPARE, columns, device=DEVICE).to(dtype)
    x[tokens:], residual[tokens:] = undefined, undefined
    expected = linear_reference.linear(*wide(x, weight, bias), None, activation, *wide(residual))[:tokens]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_triton, "_tiles", lambda x, weight: tiles)
        patch.setattr(linear_triton, "multiprocessors", lambda tensor: 3 // tile.programs)
        got = linear_triton._multiply(tile, x, weight, bias, offsets(lengths), activation, residual)
    assert got.dtype == dtype
    # One rounding to 16 bits; the interpreter's cuts off.
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * expected.abs().max().item()
    assert_near("out", got[:tokens], expected, FLOAT32_ERROR + rounding)
    return got[tokens:]


@each_tile
def test_linear(dtype, tiles, tile):
    check_linear(dtype, tiles, tile, random.choice(["", "gelu", "gelu_tanh", "quick_gelu", "silu"]), float("nan"))


@pytest.mark.parametrize("dtype, tiles, tile", [(d, tiles, tiles[0]) for d in DTYPES for tiles in TILES[d]])
def test_linear_writes_no_row_without_a_token(dtype, tiles, tile):
    assert check_linear(dtype, tiles, tile, "gelu", 1.0).isnan().all()


def test_linear_stored_by_the_copy_engine():
    tile = next(tile for tile in linear_tiles.CANDIDATES if tile.stored)
    check_linear(torch.bfloat16, linear_tiles.COPY_ENGINE, tile, "gelu", float("nan"))


@pytest.mark.parametrize(
    "fetched, stored", [(False, False), (True, False), (True, True)], ids=["threads", "fetched", "stored"]
)
def test_linear_ends_with_halves_of_tiles(fetched, stored):
    """The bits of whole tiles, and no row more. Sums of whole numbers are exact, in whatever order a processor adds them."""
    if fetched and DEVICE == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("has no copy engine")
    whole = linear_tiles.Tile(64, 64, 64, 4, 3, 1, stored)
    x, weight, bias, residual = (
        torch.randint(-4, 5, size, device=DEVICE).to(torch.bfloat16)
        for size in [(200, 104), (104, 104), (104,), (200, 104)]
    )
    # Two tiles per 64 rows. In the last round of three programs 2, 1 and 0 of 2, 4 and 6 tiles are left: whole, in halves, none;
    # of four programs 2, 0 and 2, in halves. The very last half has 8 columns, or none.
    cases = [(60, 3), (128, 3), (130, 3), (64, 4), (65, 4), (190, 4), (1, 200), (0, 4)]
    for tokens, programs, columns in [(*case, 104) for case in cases] + [(*case, 72) for case in cases[2:5]]:
        few = weight[:columns], bias[:columns], offsets([tokens]), "", residual[:, :columns].contiguous()
        results = []
        for tile in (whole, whole._replace(halves=True)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(linear_triton, "_tiles", lambda x, weight: linear_tiles.COPY_ENGINE if fetched else ())
                patch.setattr(linear_triton, "multiprocessors", lambda tensor, programs=programs: programs)
                results.append(linear_triton._multiply(tile, x, *few))
        assert torch.equal(results[0][:tokens], results[1][:tokens]), (tokens, programs, columns)
        last = tokens if not stored else -(-tokens // 64) * 64
        assert results[1][last:].isnan().all()


def test_linear_shows_bad_values():
    x = torch.tensor([[float("nan")], [float("inf")], [-1.0]], device=DEVICE).expand(3, 16).contiguous()
    weight = torch.ones(1, 16, device=DEVICE)
    for activation in ("", "gelu", "gelu_tanh", "quick_gelu", "silu"):
        got = linear_triton.linear(x, weight, None, offsets([3]), activation, None)[:, 0].tolist()
        assert math.isnan(got[0]) and got[1] == float("inf") and math.isfinite(got[2]), activation


# ---- similarity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_m, block_n", [(32, 64), (64, 64), (64, 128), (128, 128)])
def test_there_are_as_many_tiles_of_cosines_as_a_sample_can_need(block_m, block_n):
    def needed(queries, candidates):
        return -(-queries // block_m) * -(-candidates // block_n)

    modes = [getattr(similarity_triton, name) for name in ("KEPT", "ODD", "OTHERS", "HIGHER")]
    for longest in range(300):
        tiles = {seen: similarity_triton._tiles(longest, seen, block_m, block_n) for seen in modes}
        some_go = [needed(going, length - going) for length in (longest, longest // 2) for going in range(length + 1)]
        assert tiles[similarity_triton.KEPT] == max(some_go)
        for protected in range(4):
            even, odd = (len(range(protected + (protected + i) % 2, longest, 2)) for i in range(2))
            assert tiles[similarity_triton.ODD] >= needed(even, odd)
        columns = -(-longest // block_n)
        pairs = sum((column + 1) * block_n // block_m for column in range(columns))  # on or above the diagonal
        assert tiles[similarity_triton.OTHERS] == tiles[similarity_triton.HIGHER] == pairs


def test_similarity_is_the_same_whatever_bound_of_lengths_chooses_the_tiles():
    """Whole numbers, whose products are exact: tiles of 64 and of 128 find the same, ties included."""
    lengths = [150, 0, 1, 33]
    tokens, cu = sum(lengths), offsets(lengths)
    keys = torch.randint(-3, 4, (tokens, 16), device=DEVICE).bfloat16()
    order, flags = torch.rand(tokens, device=DEVICE), torch.rand(tokens, device=DEVICE) < 0.3

    def found(longest):
        return [
            similarity_triton.nearest_kept(keys, flags, cu, longest),
            similarity_triton.nearest_kept(keys, flags, cu, longest, ~flags, order),
            *similarity_triton.novelty(keys, None, cu, longest),
            *similarity_triton.match_tokens(keys, cu, longest, None, 0.1, 1),
            *similarity_triton.merge_scores(keys, order, None, None, flags, cu, longest, 0.25, 1.0, 0.0),
        ]

    tiles = {similarity_triton._blocks(keys, True, longest)[:2] for longest in (150, 700)}
    assert tiles == {(64, 64), (128, 128)}
    for mine, other in zip(found(150), found(700), strict=True):
        assert torch.equal(mine, other)


def test_similarity_of_samples_longer_than_a_step(monkeypatch):
    """A program that reads a sample's flags or scores step by step finds what it finds in one step."""
    lengths = [70, 0, 33, 1]
    tokens, cu = sum(lengths), offsets(lengths)
    keys, order = torch.randn(tokens, 16, device=DEVICE), torch.rand(tokens, device=DEVICE)
    flags, count = torch.rand(tokens, device=DEVICE) < 0.3, torch.tensor([9, 1, 5, 0], dtype=torch.int32, device=DEVICE)

    def found():
        return [
            similarity_triton.nearest_kept(keys, flags, cu, 70),
            similarity_triton.nearest_kept(keys, flags, cu, 70, ~flags, order),
            *similarity_triton.match_tokens(keys, cu, 70, count, 0.1, 1),
            *similarity_triton.merge_scores(keys, order, None, None, flags, cu, 70, 0.25, 1.0, 0.0),
        ]

    at_once = found()
    monkeypatch.setattr(similarity_triton, "BLOCK", 16)
    monkeypatch.setattr(similarity_triton, "CHUNK", 16)
    for mine, other in zip(found(), at_once, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lengths", [[3, 0, 2], [0], [40]])
def test_nothing_beyond_the_last_token_goes_or_stands_for_one(lengths, monkeypatch):
    """The programs of the samples share what is left of a buffer, step by step."""
    monkeypatch.setattr(merging_triton, "BLOCK", 16)
    tokens, capacity, cu = sum(lengths), sum(lengths) + 70, offsets(lengths)
    scores, free = torch.rand(capacity, device=DEVICE), torch.ones(capacity, dtype=torch.bool, device=DEVICE)
    count = torch.full((len(lengths),), 2, dtype=torch.int32, device=DEVICE)
    goes = merging_triton.lowest_tokens(scores, count, cu, free, None)
    assert goes.view(torch.uint8).sum() == goes[:tokens].sum() == sum(min(length, 2) for length in lengths)
    into = torch.arange(capacity, dtype=torch.int32, device=DEVICE).where(~goes, -1)
    x, ones = torch.randn(capacity, 16, device=DEVICE), torch.ones(capacity, device=DEVICE)
    for append in ("", "sum"):
        _, cu_out, _, rows, source, _ = merging_triton.merge_tokens(
            x, into, ones, ones, cu, max(lengths), append, False, ()
        )
        left = int(cu_out[-1])
        assert (rows[tokens:] == -1).all() and (source[left:] == -1).all()
        assert ((rows[:tokens] == -1) == (goes[:tokens] & (append == ""))).all() and (rows[:tokens] < left).all()
        appended = sum(length > 0 for length in lengths) if append else 0
        assert (source[:left] < 0).sum() == appended


def merged_together(x, keys, order, weight, sizes, free, counts, choice, exponents, norm, carry):
    """What `merge_redundant` does on a GPU from the second call on."""
    steps = (
        similarity_triton.find_redundant, merging_triton.choose_redundant, similarity_triton.find_kept,
        merging_triton.merge_redundant,
    )  # fmt: skip
    tensors = (x.values, keys, order, weight, sizes, free, counts, x.cu_seqlens, *norm[:2])
    options = x.max_seqlen, exponents, choice, norm[2], True, False
    return merge_on_gpu(*(repeats.Prepared(step.prepare) for step in steps), tensors, carry, None, *options)


@pytest.mark.parametrize("sized, dtype", [(False, torch.bfloat16), (True, torch.float32)], ids=["ones", "sizes"])
@pytest.mark.parametrize(
    "choice",
    [{"threshold": 0.8, "share": 0.4, "uncounted": 1}, {"count": [3, 0, 1, 0, 30]}, {"count": 2},
     {"portion": 0.3, "uncounted": 1}, {"portion": 1.0}],
    ids=str,
)  # fmt: skip
def test_merging_what_is_redundant_gives_the_bits_of_its_steps(sized, choice, dtype, monkeypatch):
    """Also where a sample is longer than what a program looks at in one step, and where many tokens go into one."""
    lengths = [9, 0, 1, 5, 37]
    tokens, capacity, cu = sum(lengths), sum(lengths) + 20, offsets(lengths)
    values = torch.randn(capacity, 40, device=DEVICE).to(dtype)
    keys = torch.randint(-2, 3, (capacity, 2, 16), device=DEVICE).to(dtype)  # many like ones
    order = torch.randint(1, 5, (capacity,), device=DEVICE).float()
    weight, sizes = (torch.rand(capacity, device=DEVICE) + 0.5, order.flip(0).clone()) if sized else (None, None)
    ids = torch.cat([torch.arange(length) for length in (*lengths, capacity - tokens)]).int().to(DEVICE)
    carry = (ids, torch.randn(capacity, 3, 2, device=DEVICE))
    norm = torch.randn(40, device=DEVICE).to(dtype), torch.randn(40, device=DEVICE).to(dtype), 1e-6
    x, exponents = RaggedBatch(values, cu, 37), (0.25, 1.0, 0.3)
    count, portion = choice.get("count"), choice.get("portion")
    counts = torch.tensor(count, dtype=torch.int32, device=DEVICE) if isinstance(count, list) else None
    limits = {"threshold": None, "share": 1.0, "uncounted": 0} | choice
    options = {"weight": weight, "sizes": sizes, "carry": carry, "exact": False, "backend": "triton"} | choice
    if counts is not None:
        options["count"] = counts
    (merged, scores, normed, logs) = merge_redundant(
        x, keys, order, free=ids, norm=norm, with_log_sizes=True, **options
    )
    left = int(merged.tokens.cu_seqlens[-1])
    assert left < tokens
    arguments = (
        x, keys, order, weight, sizes, ids, counts,
        (limits["threshold"], limits["share"], portion, count if counts is None else None, limits["uncounted"]),
        exponents, norm, carry,
    )  # fmt: skip
    for steps in ({}, {"BLOCK": 16, "MEMBERS": 8, "CHUNK": 16}):
        for name, size in steps.items():
            monkeypatch.setattr(merging_triton, name, size)
        got, found, normed_too, logs_too = merged_together(*arguments)
        assert torch.equal(found[:tokens], scores[:tokens])
        assert torch.equal(got.tokens.cu_seqlens, merged.tokens.cu_seqlens) and torch.equal(got.rows, merged.rows)
        assert (got.source[left:] == -1).all()
        pairs = [
            (got.tokens.values, merged.tokens.values), (got.sizes, merged.sizes), (got.source, merged.source),
            *zip(got.carried, merged.carried, strict=True), (normed_too, normed), (logs_too, logs),
        ]  # fmt: skip
        assert all(torch.equal(a[:left], b[:left]) for a, b in pairs)


@pytest.mark.parametrize("uncounted", [0, 1])
def test_a_portion_is_rounded_as_pytorch_rounds(uncounted):
    """Also where the product in float32 is a half, and the exact one is not."""
    lengths = [*range(12), 577, 99]
    cu = offsets(lengths)
    for portion in (0.0, 0.1, 0.12, 0.25, 0.3, 0.5, 1.0, 1.5 / 11, 2.5 / 7, 3.5 / 9, 0.5 / 3):
        want = ((cu.diff() - uncounted).clamp(min=0) * portion).round().int()
        zeros = torch.zeros(sum(lengths), device=DEVICE)
        best = torch.full(zeros.shape, -(2**63), dtype=torch.int64, device=DEVICE)
        free = torch.ones(zeros.shape, dtype=torch.bool, device=DEVICE)
        choice = (None, 1.0, portion, None, uncounted)
        _, (_, _, counts, *_) = merging_triton.choose_redundant(
            best, zeros, zeros + 1, None, free, None, cu, 577, (0.25, 1.0, 0.3), *choice
        )
        assert torch.equal(counts[::2], want), portion


# ---- every operation ------------------------------------------------------------------------------------------------


def run_all(lengths, x, qkv, keep_rows):
    """All four operations one after the other, in float32, on the rows of a larger batch."""
    q, k, v = (t[keep_rows] for t in qkv)
    x, cu, longest = x[keep_rows], offsets(lengths), 90
    out, lse = attention_triton.attention(q, k, v, cu, cu, longest, longest, 0.25, False, None)
    received, cls = importance_triton.attention_importance(q, k, out, lse, cu, longest, 0.25, False, None)
    generator = torch.Generator().manual_seed(5)
    dictionary = torch.randn(20, x.shape[1], generator=generator).to(x)
    importance, threshold = scoring_triton.score_tokens(x, dictionary, received, cls, cu, longest, 1.0, None)
    values, cu_out, ids, *_ = compaction_triton.compact(
        x, importance, threshold, None, cu, longest, None, None, None, None, None, -1, None, None, 0.0, False
    )
    return out, received, cls, importance, threshold, values, ids, cu_out


def test_a_sample_has_the_same_bits_alone_and_in_a_batch():
    lengths = [33, 1, 90, 0, 12, 71]
    x = torch.randn(sum(lengths), 24, device=DEVICE)
    qkv = torch.randn(sum(lengths), 3, 2, 16, device=DEVICE).unbind(1)
    together = run_all(lengths, x, qkv, slice(None))
    begin = 0
    for b, length in enumerate(lengths):
        if length:
            alone = run_all([length], x, qkv, slice(begin, begin + length))
            new_begin, new_end = together[-1][b : b + 2].tolist()
            assert int(alone[-1][1]) == new_end - new_begin
            for mine, other in zip(alone[:4], together[:4], strict=True):
                assert torch.equal(mine, other[begin : begin + length])
            assert torch.equal(alone[4][0], together[4][b])
            for mine, other in zip(alone[5:7], together[5:7], strict=True):
                assert torch.equal(mine[: new_end - new_begin], other[new_begin:new_end])
        begin += length


@pytest.mark.filterwarnings("error:divide by zero:RuntimeWarning")  # which on a GPU is undefined
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]], ids=str)
def test_next_to_nothing(lengths):
    tokens, width = sum(lengths), 16
    cu = offsets(lengths)
    q = torch.randn(tokens, 2, width, device=DEVICE)
    longest = max(lengths, default=0)
    out, lse = attention_triton.attention(q, q, q, cu, cu, longest, longest, 1.0, False, None)
    received, cls = importance_triton.attention_importance(q, q, out, lse, cu, longest, 1.0, False, None)
    x = torch.randn(tokens, width, device=DEVICE)
    importance, threshold = scoring_triton.score_tokens(x, x.new_ones(3, width), received, cls, cu, longest, 1.0, None)
    for zeros in (received, cls, importance, threshold):
        assert torch.equal(zeros, torch.zeros_like(zeros))
    values, cu_out, ids, *_ = compaction_triton.compact(
        x, importance, threshold, None, cu, longest, None, None, None, None, None, -1, None, None, 0.0, True
    )
    assert torch.equal(values, x) and torch.equal(cu_out, cu) and torch.equal(ids, torch.zeros_like(ids))
    assert torch.equal(out, q)


@pytest.mark.parametrize("name, value", [("q", "nan"), ("k", "nan"), ("k", "inf"), ("k", "-inf")])
def test_importance_of_bad_logits_is_as_bad_as_the_reference_says(name, value):
    lengths = [5, 70]
    cu = offsets(lengths)
    q, k, v = random_qkv(sum(lengths), 3, 16, torch.float32)
    {"q": q, "k": k}[name][5 + 33, 1, 2] = float(
        value
    )  # one element of one head: a maximum over heads must not hide it
    shared = (cu, max(lengths), 0.3, False, None)
    out, lse = attention_reference.attention(q, k, v, cu, cu, 70, 70, 0.3, False, None)
    expected = importance_reference.attention_importance(q, k, out, lse, *shared)
    got = importance_triton.attention_importance(q, k, out, lse, *shared)
    bad = torch.zeros(0, dtype=torch.bool, device=DEVICE)
    for e, g in zip(expected, got, strict=True):
        e, g = e[:75], g[:75]
        assert torch.equal(e.isnan(), g.isnan())
        assert_near("importance", g[~g.isnan()], e[~e.isnan()], 1e-4)
        bad = torch.cat([bad, e.isnan()])
    assert bad.any() and not bad.all()


def test_a_causal_query_that_is_nan_spoils_what_it_sees_and_nothing_else():
    """Whether also what is hidden from it is left open: the reference and the CPU do that, too."""
    cu = offsets([70, 20])
    q, k, v = random_qkv(90, 2, 16, torch.float32)
    shared = (70, 0.3, True, None)
    out, lse = attention_reference.attention(q, k, v, cu, cu, 70, *shared)
    whole = importance_reference.attention_importance(q, k, out, lse, cu, *shared)[0]
    q[66, 1], lse[1, 66] = float("nan"), float("nan")
    received, cls = importance_triton.attention_importance(q, k, out, lse, cu, *shared)
    expected, _ = importance_reference.attention_importance(q, k, out, lse, cu, *shared)
    assert received[1:67].isnan().all() and expected[1:70].isnan().all()
    torch.testing.assert_close(received[67:90], whole[67:90], atol=1e-5, rtol=1e-5)
    assert received[0] == 0 and (cls[:90] == 0).all()


def test_a_key_at_minus_infinity_receives_nothing():
    """Rows beyond the last query are zeros in a tile: times infinity they are NaN, and must not count."""
    q, k, v = random_qkv(70, 3, 16, torch.float32)
    q[:, :, 2], k[33, :, 2] = 1.0, float("-inf")
    shared = (offsets([70]), 70, 0.3, False, None)
    out, lse = attention_reference.attention(q, k, v, shared[0], *shared[:2], *shared[1:])
    received, cls = importance_triton.attention_importance(q, k, out, lse, *shared)
    assert received[33] == 0 and cls[33] == 0
    assert received[:70].isfinite().all() and cls[:70].isfinite().all() and received[34:70].gt(0).all()


def test_queries_that_see_no_key_give_no_importance():
    cu = offsets([3, 70])
    q, k, v = random_qkv(73, 3, 16, torch.float32)
    bias = torch.zeros(k.shape[0], device=DEVICE)
    bias[:3] = float("-inf")
    out, lse = own_kernel(q, k, v, cu, cu, 70, 70, 0.3, False, bias)
    assert (lse[:, :3] == float("-inf")).all() and (out[:3] == 0).all() and lse[:, 3:73].isfinite().all()
    received, cls = importance_triton.attention_importance(q, k, out, lse, cu, 70, 0.3, False, bias)
    assert (received[:3] == 0).all() and (cls[:3] == 0).all()
    assert received[:73].isfinite().all() and received[4:73].gt(0).all()


# ---- the choice between PyTorch's kernel and the own one ---------------------------------------------------------------


class OnCuda(torch.Tensor):
    """A CPU tensor that claims to be on a CUDA device: the choice looks at nothing else."""

    is_cuda = True


@pytest.fixture
def flash(monkeypatch):
    """Install a stand-in for PyTorch's flash attention; returns what it was called with."""
    calls = []

    def operator(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, **options):
        calls.append({"dropout": dropout, "causal": causal, "debug": debug, **options})
        return q.clone(), torch.full((q.shape[1], q.shape[0]), float("inf")), None, None, None

    monkeypatch.setattr(attention_triton, "_flash", lambda: (operator, {"num_splits": 1}))
    monkeypatch.setattr(attention_triton, "capability", lambda device: (8, 0))
    return calls


def refusal(head_dim=64, dtype=torch.bfloat16, bias=None, spoil=lambda t: t):
    fused = torch.zeros(8, 3, 2, head_dim, dtype=dtype).as_subclass(OnCuda)
    return attention_triton.flash_refusal(*(spoil(t) for t in fused.unbind(1)), bias)


def test_flash_attention_serves_16_bits_without_bias(flash):
    assert refusal() is None and refusal(dtype=torch.float16) is None


@pytest.mark.parametrize(
    "case",
    [
        {"dtype": torch.float32},
        {"head_dim": 60},
        {"head_dim": 264},
        {"bias": torch.zeros(8)},
        {"spoil": lambda t: t[:0]},
        {"spoil": lambda t: t[..., 1:9]},  # not aligned to 16 bytes
    ],
    ids=["float32", "d=60", "d=264", "key_bias", "empty", "misaligned"],
)
def test_flash_attention_refuses(flash, case):
    assert refusal(**case)


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)])
def test_flash_attention_serves_what_it_is_faster_at(flash, monkeypatch, capability):
    """Hopper's narrow heads are measured (benchmarks/results); what is not measured stays with PyTorch."""
    monkeypatch.setattr(attention_triton, "capability", lambda device: capability)
    assert (refusal(head_dim=64) is None) == (capability in [(8, 0), (8, 9), (10, 0)])
    assert (refusal(head_dim=128) is None) == (capability >= (8, 0))


def test_flash_attention_of_this_pytorch_takes_what_it_is_called_with():
    operator, options = attention_triton._flash()
    names = [argument.name for argument in operator._schema.arguments]
    first = [
        "query",
        "key",
        "value",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
    ]
    assert names[: len(first)] == first and {"scale", *options} <= set(names)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_marks_queries_without_keys_as_the_contract_does(flash, causal):
    q = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    cu = offsets([4]).cpu()
    itself, other = ((q, q, q, cu, keys, 4, 4, 0.5, causal, None) for keys in (cu, cu.clone()))
    # A call is prepared for all later ones of the same shapes, which do not tell self- from cross-attention.
    for prepared_for in (itself, other):
        flash.clear()
        _, lse = attention_triton._flash_attention(*prepared_for, True)(*other)
        assert flash == [{"dropout": 0.0, "causal": causal, "debug": False, "scale": 0.5, "num_splits": 1}]
        assert (lse == float("-inf")).all(), "flash marks a query without keys by +inf"
