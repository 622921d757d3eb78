"""Grouped-query attention: several query heads share a key head. Against keys repeated for each of them, in float64."""

import pytest
import torch
from helpers import (
    DEVICE,
    EAGER,
    assert_no_worse_than_torch,
    attention_case,
    backends_here,
    in_float64,
    interpreted,
    run,
)

from madtp_kernels import BackendError, attention, attention_with_importance, backends

every_backend = pytest.mark.parametrize("backend", backends_here())
HEADS = [(32, 8), (28, 4), (12, 2), (8, 1), (48, 2), (40, 2), (80, 4)]  # of decoders in use


def repeated(case):
    group = case["q"].shape[1] // case["k"].shape[1]
    return case | {name: case[name].repeat_interleave(group, 1) for name in "kv"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, key_heads", HEADS)
@every_backend
def test_the_same_as_keys_that_are_repeated(backend, heads, key_heads, dtype, generator):
    if interpreted(backend) and (heads > 12 or dtype == torch.float16):
        pytest.skip("too much for the interpreter")
    lengths = [3, 0, 5] if interpreted(backend) else [70, 0, 1, 33]
    case = attention_case(generator, lengths, heads, 16, dtype, key_heads=key_heads, causal=True, bias=True)
    exact = run("attention", in_float64(repeated(case)), "reference")
    eager = EAGER["attention"](**case)
    for ours, theirs, expected in zip(run("attention", case, backend), eager, exact, strict=True):
        assert_no_worse_than_torch(ours, theirs, expected, 60.0, f"{heads} over {key_heads}")


@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 120, 128])
@every_backend
def test_head_widths_in_use(backend, head_dim, generator):
    lengths = [3, 2] if interpreted(backend) else [20, 3]
    case = attention_case(generator, lengths, 4, head_dim, torch.bfloat16, key_heads=2, key_lengths=lengths[::-1])
    exact = run("attention", in_float64(repeated(case)), "reference")
    for ours, theirs, expected in zip(run("attention", case, backend), EAGER["attention"](**case), exact, strict=True):
        assert_no_worse_than_torch(ours, theirs, expected, 60.0, f"head width {head_dim}")


@every_backend
def test_a_sample_has_the_same_bits_alone(backend, generator):
    lengths = [3, 5] if interpreted(backend) else [40, 33]
    case = attention_case(generator, lengths, 4, 8, key_heads=2, causal=True)
    out, lse = run("attention", case, backend)
    start = lengths[0]
    alone = case | {name: case[name][start:] for name in "qkv"}
    alone |= dict.fromkeys(
        ("cu_seqlens_q", "cu_seqlens_k"), torch.tensor([0, lengths[1]], dtype=torch.int32, device=DEVICE)
    )
    ours = run("attention", alone, backend)
    check = (
        torch.testing.assert_close if backend == "reference" else lambda a, b: torch.equal(a, b) or pytest.fail("bits")
    )
    check(ours[0], out[start:])
    check(ours[1], lse[:, start:])


@pytest.mark.parametrize("heads, key_heads", [(32, 5), (2, 4), (3, 2)])
def test_heads_that_make_no_groups(heads, key_heads, generator):
    case = attention_case(generator, [4], heads, 8, key_heads=key_heads)
    with pytest.raises(ValueError, match=rf"^k: expected \[Tk, Hk, d\] with Hk a divisor of the {heads} query heads"):
        attention(**case)


def test_what_does_not_group_says_so(generator, monkeypatch):
    case = attention_case(generator, [4], 4, 8, key_heads=2)
    with pytest.raises(ValueError, match=r"^k: expected \[T, H, d\] = float32\[4, 4, 8\]"):
        attention_with_importance(case["q"], case["k"], case["v"], case["cu_seqlens_q"], 4)
    monkeypatch.setattr(backends, "availability", lambda name, device: None)
    monkeypatch.setattr(backends, "_implementation", lambda op, package, name: name)
    backends._resolve.cache_clear()
    try:
        with pytest.raises(BackendError, match="^attention: backend 'cuda' .* as many key heads as query heads"):
            attention(**case, backend="cuda")
    finally:
        backends._resolve.cache_clear()
