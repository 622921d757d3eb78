"""Gradients that the C++ kernels compute themselves: held against the reference in float64, on uneven batches and strided views."""

import pytest
import torch
from helpers import DEVICE, missing, normal, offsets

from madtp_kernels import backends
from madtp_kernels.attention import reference

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the CPU kernels are tested where the tensors are on the CPU"),
    pytest.mark.skipif(DEVICE == "cpu" and missing("cpu") is not None, reason=str(missing("cpu"))),
]

NAMES = ("d_q", "d_k", "d_v", "d_key_bias")
EVEN = [20, 0, 70, 3, 1, 145]
CROSSED = [66, 4, 0, 12, 33, 40]  # keys of samples of EVEN queries: more, fewer and none; none to look at
SPARE = 3  # rows of a buffer beyond its tokens

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def gradients(case, backend="cpu"):
    """``d_q, d_k, d_v, d_key_bias`` of a case, whose values are in the order of the operation's schema."""
    return backends.resolve("attention_backward", "attention", backend, case["q"])[1](*case.values())


def in_double(case):
    return {n: t.double() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in case.items()}


def rows_with_spare(generator, rows, heads, width, dtype):
    """A view ``[rows + SPARE, heads, width]`` of a wider buffer, NaN in the spare rows."""
    wide = normal(generator, rows + SPARE, heads, 2 * width, dtype=dtype)
    wide[rows:] = float("nan")
    return wide[..., width // 2 : width // 2 + width]


def gradient_case(generator, lengths_q, lengths_k, dtype, heads=2, width=33, causal=False, bias=False):
    tokens_q, tokens_k = sum(lengths_q), sum(lengths_k)
    q = rows_with_spare(generator, tokens_q, heads, width, dtype)
    k, v = (rows_with_spare(generator, tokens_k, heads, width, dtype) for _ in range(2))
    key_bias = rows_with_spare(generator, tokens_k, 1, 1, torch.float32)[:, 0, 0] if bias else None
    lengths = {"cu_q": offsets(lengths_q), "cu_k": offsets(lengths_k), "max_q": max(lengths_q), "max_k": max(lengths_k)}
    options = lengths | {"scale": width**-0.5, "causal": causal, "key_bias": key_bias}
    out, lse = reference.attention(*in_double({"q": q, "k": k, "v": v} | options).values())
    out, lse = out.to(dtype), lse.float()
    d_out = rows_with_spare(generator, tokens_q, width, heads, dtype).mT  # elements of a row are not adjacent
    d_lse = normal(generator, tokens_q + SPARE, heads).mT
    for tensor in (out, lse.mT, d_lse.mT):
        tensor[tokens_q:] = float("nan")
    return {"q": q, "k": k, "v": v, "out": out, "lse": lse} | options | {"d_out": d_out, "d_lse": d_lse}


def assert_near_the_reference(case, tokens_q, tokens_k):
    dtype = case["q"].dtype
    exact, plain = gradients(in_double(case), "reference"), gradients(case, "reference")
    for name, ours, want, usual in zip(NAMES, gradients(case), exact, plain, strict=True):
        assert ours.shape == want.shape and ours.dtype == (torch.float32 if name == "d_key_bias" else dtype)
        assert ours.is_contiguous()
        # bfloat16 and float16: P and dS may be rounded before they are multiplied, and the result is.
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        bound = 2 * (eps * size + (usual.double() - want).abs().max().item() if want.numel() else 0.0)
        error = (ours.double() - want).abs().max().item() if want.numel() else 0.0
        assert error <= bound, f"{name}: error {error:.2e}, at most {bound:.2e} expected"
        assert (ours[tokens_q if name == "d_q" else tokens_k :] == 0).all(), f"{name}: rows without tokens"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "key_bias"])
@pytest.mark.parametrize("lengths_k", [EVEN, CROSSED], ids=["self", "cross"])
@every_dtype
def test_gradients_of_an_uneven_batch(lengths_k, bias, causal, dtype, generator):
    case = gradient_case(generator, EVEN, lengths_k, dtype, bias=bias, causal=causal)
    assert_near_the_reference(case, sum(EVEN), sum(lengths_k))


@pytest.mark.parametrize("width", [1, 16, 64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_of_any_head_width(width, dtype, generator):
    case = gradient_case(generator, [30, 5], [17, 64], dtype, width=width, bias=True)
    assert_near_the_reference(case, 35, 81)


@pytest.mark.parametrize("tokens", [[], [0], [0, 0]])
def test_gradients_of_no_token(tokens, generator):
    case = gradient_case(generator, tokens or [0], tokens or [0], torch.float32, bias=True)
    for ours in gradients(case):
        assert (ours == 0).all()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@every_dtype
def test_gradients_of_a_sample_alone_and_in_a_batch(causal, dtype, generator):
    """The same bits, with any number of threads."""
    case = gradient_case(generator, EVEN, CROSSED, dtype, causal=causal, bias=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    whole = gradients(case)
    torch.set_num_threads(1)
    for ours, theirs in zip(gradients(case), whole, strict=True):
        assert torch.equal(ours, theirs)
    torch.set_num_threads(threads)
    for b in range(len(EVEN)):
        queries = slice(sum(EVEN[:b]), sum(EVEN[: b + 1]))
        keys = slice(sum(CROSSED[:b]), sum(CROSSED[: b + 1]))
        alone = case | {"cu_q": offsets([EVEN[b]]), "cu_k": offsets([CROSSED[b]]), "max_q": EVEN[b], "max_k": CROSSED[b]}
        alone |= {name: case[name][queries] for name in ("q", "out", "d_out")}
        alone |= {name: case[name][:, queries] for name in ("lse", "d_lse")}
        alone |= {name: case[name][keys] for name in ("k", "v", "key_bias")}
        for name, ours, theirs in zip(NAMES, gradients(alone), whole, strict=True):
            assert torch.equal(ours, theirs[queries if name == "d_q" else keys]), f"{name} of sample {b}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@every_dtype
def test_gradients_are_finite_where_the_reference_has_them_so(causal, dtype, value, generator):
    lengths = [20, 0, 70, 3]
    case = gradient_case(generator, lengths, lengths, dtype, causal=causal, bias=True)
    for name in ("q", "k", "v", "out", "d_out", "lse", "d_lse", "key_bias"):
        if (name, value) == ("lse", -float("inf")):
            continue  # means that the query sees no key
        for row in (0, 38, 90):
            poisoned = case[name].clone()
            (poisoned.mT if name in ("lse", "d_lse") else poisoned)[row] = value
            broken = case | {name: poisoned}
            wide = {n: t.float() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in broken.items()}
            for part, ours, want in zip(NAMES, gradients(broken), gradients(wide, "reference"), strict=True):
                same = ours.isfinite() == want.to(ours.dtype).isfinite()
                assert same.all(), f"{part} with {value} in {name}, row {row}"


@pytest.mark.parametrize(
    "name, change",
    [
        ("k", lambda t: t[:, :1]),
        ("v", lambda t: t[:-1]),
        ("out", lambda t: t.double()),
        ("lse", lambda t: t[:1]),
        ("d_out", lambda t: t[..., :-1]),
        ("d_lse", lambda t: t.half()),
        ("key_bias", lambda t: t[:-1]),
        ("cu_k", lambda t: t[:-1]),
    ],
)
def test_gradients_refuse_what_does_not_fit(name, change, generator):
    case = gradient_case(generator, [4, 2], [3, 3], torch.float32, bias=True)
    message = {"cu_k": "cu_seqlens_k"}.get(name, name)
    with pytest.raises(ValueError, match=f"^{message}:"):
        gradients(case | {name: change(case[name])})
