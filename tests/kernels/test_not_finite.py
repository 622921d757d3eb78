"""NaN and infinity anywhere in the operands: the C++ kernels give NaN, infinities and numbers where the reference does.

A maximum that drops a NaN, or a block that leaves out what the reference multiplies by zero, gives plausible scores for broken
inputs.
"""

import os

import pytest
import torch
from helpers import DEVICE, attention_case, both_case, importance_case, missing, offsets, run, scoring_case

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the CPU kernels are tested where the tensors are on the CPU"),
    pytest.mark.skipif(DEVICE == "cpu" and missing("cpu") is not None, reason=str(missing("cpu"))),
]

INFINITY = float("inf")
LENGTHS = [20, 0, 70, 3, 1, 130]  # several blocks, panels and strips; the last queries and keys fill none

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
every_value = pytest.mark.parametrize("value", [float("nan"), INFINITY, -INFINITY])


def in_float32(case):
    return {n: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in case.items()}


def assert_as_reference(op, case):
    names = ("out", "lse", "received", "cls") if op == "attention_with_importance" else ("first", "second")
    # Weights of attention in bfloat16 have eight bits: an output is off by half of the last one times the mean of |v|, at most
    # about 2, however near to zero it is itself. How accurate the kernels are is tested elsewhere (test_properties.py).
    atol = 2**-8 if torch.bfloat16 in (t.dtype for t in case.values() if torch.is_tensor(t)) else 3e-3
    for name, ours, want in zip(names, run(op, case, "cpu"), run(op, in_float32(case), "reference"), strict=False):
        ours, want = ours.float(), want.to(ours.dtype).float()
        torch.testing.assert_close(ours, want, rtol=3e-2, atol=atol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def poison(case, name, value, position):
    """The case with one element of one argument replaced; `position` is a share of its elements."""
    poisoned = case[name].clone()
    flat = poisoned.view(-1)
    flat[int(position * (flat.numel() - 1))] = value
    return case | {name: poisoned}


# Where an instruction set is forced, fewer: there are several of them (test_cpu_backend.py).
POSITIONS = (0.03, 1.0) if "MADTP_KERNELS_CPU" in os.environ else (0.0, 0.03, 0.41, 0.73, 1.0)


@every_value
@every_dtype
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["q", "k", "v", "key_bias"])
def test_attention_with_importance(name, causal, dtype, value, generator):
    case = both_case(generator, LENGTHS, 2, 33, dtype, causal=causal, bias=name == "key_bias")
    for position in POSITIONS:
        assert_as_reference("attention_with_importance", poison(case, name, value, position))


@every_value
@every_dtype
@pytest.mark.parametrize("name", ["q", "k", "out", "lse", "key_bias"])
def test_importance(name, dtype, value, generator):
    for causal in (False, True):
        case = importance_case(generator, LENGTHS, 2, 33, dtype, causal=causal, bias=name == "key_bias")
        if name in ("q", "k", "key_bias"):  # with the log-sum-exp that belongs to it
            attended = both_case(generator, LENGTHS, 2, 33, dtype, causal=causal, bias=name == "key_bias")
        for position in POSITIONS:
            if name in ("out", "lse"):
                if name == "lse" and value == -INFINITY:
                    continue  # says that the query sees no key, which these queries do
                assert_as_reference("attention_importance", poison(case, name, value, position))
                continue
            whole = poison(attended, name, value, position)
            out, lse, *_ = run("attention_with_importance", in_float32(whole), "reference")
            alone = {n: whole[n] for n in ("q", "k", "cu_seqlens", "max_seqlen", "causal", "key_bias")}
            assert_as_reference("attention_importance", alone | {"out": out.to(dtype), "lse": lse})


@every_value
@every_dtype
@pytest.mark.parametrize("name", ["x", "dictionary", "bias"])
def test_scoring(name, dtype, value, generator):
    case = scoring_case(generator, LENGTHS, 40, 21, dtype, bias=name == "bias")
    for position in POSITIONS:
        assert_as_reference("score_tokens", poison(case, name, value, position))


@every_dtype
def test_an_entry_at_minus_infinity_for_the_first_tokens_only(dtype, generator):
    """The online softmax over tokens meets blocks in which an entry has no finite alignment."""
    case = scoring_case(generator, [260], 4, 3, dtype)
    case["x"][:] = torch.rand(260, 4, generator=generator)
    case["x"][1:200, 0] = -6e4 if dtype == torch.float16 else -3e38
    case["dictionary"][:, 0] = (
        torch.tensor([6e4, 0.0, 0.0]) if dtype == torch.float16 else torch.tensor([3.0, 0.0, 0.0])
    )
    assert_as_reference("score_tokens", case)


@every_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_hidden_keys(causal, dtype, generator):
    """Keys at -inf are not seen; a query that sees none gets 0 and -inf, and gives no importance."""
    case = both_case(generator, [40, 19, 3], 3, 32, dtype, causal=causal)
    hidden = torch.rand(62, generator=generator) < 0.5
    hidden[40:59] = True
    case["key_bias"] = torch.zeros(62).masked_fill(hidden, -INFINITY)
    assert_as_reference("attention_with_importance", case)
    out, lse, received, cls = run("attention_with_importance", case, "cpu")
    nothing = slice(40, 59)
    assert (out[nothing] == 0).all() and (lse[:, nothing] == -INFINITY).all()
    assert (received[nothing] == 0).all() and (cls[nothing] == 0).all()
    alone = {n: case[n] for n in ("q", "k", "cu_seqlens", "max_seqlen", "causal", "key_bias")}
    assert_as_reference("attention_importance", alone | {"out": out, "lse": lse})


@every_dtype
def test_cross_attention(dtype, generator):
    case = attention_case(generator, [9, 30, 2], 2, 64, dtype, key_lengths=[70, 0, 33])
    for name in ("q", "k", "v"):
        for value in (float("nan"), INFINITY):
            assert_as_reference("attention", poison(case, name, value, 0.6))
    assert offsets([70, 0, 33]).tolist() == case["cu_seqlens_k"].tolist()
