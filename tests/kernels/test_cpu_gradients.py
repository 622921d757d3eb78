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
IMPORTANCE_NAMES = ("d_q", "d_k", "d_out", "d_lse", "d_key_bias")
EVEN = [20, 0, 70, 3, 1, 145]
CROSSED = [66, 4, 0, 12, 33, 40]  # keys of samples of EVEN queries: more, fewer and none; none to look at
SPARE = 3  # rows of a buffer beyond its tokens

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def gradients(case, backend="cpu"):
    """The results of `attention_backward` or `attention_importance_backward` for a case in the order of its schema, by name."""
    importance = "d_received" in case
    operation = ("attention_importance_backward", "importance") if importance else ("attention_backward", "attention")
    results = backends.resolve(*operation, backend, case["q"])[1](*case.values())
    return dict(zip(IMPORTANCE_NAMES if importance else NAMES, results, strict=True))


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


def importance_case(generator, lengths, dtype, heads=3, width=33, causal=False, bias=False):
    attended = gradient_case(generator, lengths, lengths, dtype, heads, width, causal, bias)
    case = {name: attended[name] for name in ("q", "k", "out", "lse")} | {
        "cu": offsets(lengths),
        "longest": max(lengths),
    }
    case |= {name: attended[name] for name in ("scale", "causal", "key_bias")}
    for name in ("d_received", "d_cls"):
        case[name] = rows_with_spare(generator, sum(lengths), 1, 1, torch.float32)[:, 0, 0]
    return case


def assert_near_the_reference(case, tokens_q, tokens_k):
    dtype = case["q"].dtype
    exact, plain = gradients(in_double(case), "reference"), gradients(case, "reference")
    for name, ours in gradients(case).items():
        want, usual = exact[name], plain[name]
        assert ours.shape == want.shape and ours.dtype == (torch.float32 if name in ("d_lse", "d_key_bias") else dtype)
        assert ours.is_contiguous()
        # bfloat16 and float16: P and dS may be rounded before they are multiplied, and the result is.
        eps = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-6
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        bound = 2 * (eps * size + (usual.double() - want).abs().max().item() if want.numel() else 0.0)
        error = (ours.double() - want).abs().max().item() if want.numel() else 0.0
        assert error <= bound, f"{name}: error {error:.2e}, at most {bound:.2e} expected"
        rows = ours.mT if name == "d_lse" else ours
        assert (rows[tokens_q if name == "d_q" else tokens_k :] == 0).all(), f"{name}: rows without tokens"


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
    for ours in gradients(case).values():
        assert (ours == 0).all()
    for ours in gradients(importance_case(generator, tokens or [0], torch.float32, bias=True)).values():
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
    for name, ours in gradients(case).items():
        assert torch.equal(ours, whole[name])
    torch.set_num_threads(threads)
    for b in range(len(EVEN)):
        queries = slice(sum(EVEN[:b]), sum(EVEN[: b + 1]))
        keys = slice(sum(CROSSED[:b]), sum(CROSSED[: b + 1]))
        alone = case | {
            "cu_q": offsets([EVEN[b]]),
            "cu_k": offsets([CROSSED[b]]),
            "max_q": EVEN[b],
            "max_k": CROSSED[b],
        }
        alone |= {name: case[name][queries] for name in ("q", "out", "d_out")}
        alone |= {name: case[name][:, queries] for name in ("lse", "d_lse")}
        alone |= {name: case[name][keys] for name in ("k", "v", "key_bias")}
        for name, ours in gradients(alone).items():
            assert torch.equal(ours, whole[name][queries if name == "d_q" else keys]), f"{name} of sample {b}"


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "key_bias"])
@every_dtype
def test_gradients_of_importance(bias, causal, dtype, generator):
    case = importance_case(generator, EVEN, dtype, bias=bias, causal=causal)
    assert_near_the_reference(case, sum(EVEN), sum(EVEN))


@pytest.mark.parametrize("heads, width", [(1, 16), (2, 100), (12, 64)])
def test_gradients_of_importance_of_any_heads(heads, width, generator):
    assert_near_the_reference(importance_case(generator, [40, 5], torch.float32, heads, width), 45, 45)


def test_equal_heads_share_the_gradient_of_importance(generator):
    case = importance_case(generator, [30], torch.float32, heads=2)
    case |= {name: case[name][:, :1].expand(-1, 2, -1) for name in ("q", "k", "out")}
    case["lse"] = case["lse"][:1].expand(2, -1)
    results = gradients(case)
    assert_near_the_reference(case, 30, 30)
    assert torch.equal(results["d_q"][:, 0], results["d_q"][:, 1])


@every_dtype
def test_gradients_of_importance_of_a_sample_alone_and_in_a_batch(dtype, generator):
    case = importance_case(generator, EVEN, dtype, bias=True)
    whole = gradients(case)
    for b in range(len(EVEN)):
        rows = slice(sum(EVEN[:b]), sum(EVEN[: b + 1]))
        alone = case | {"cu": offsets([EVEN[b]]), "longest": EVEN[b], "lse": case["lse"][:, rows]}
        alone |= {name: case[name][rows] for name in ("q", "k", "out", "key_bias", "d_received", "d_cls")}
        for name, ours in gradients(alone).items():
            theirs = whole[name][:, rows] if name == "d_lse" else whole[name][rows]
            assert torch.equal(ours, theirs), f"{name} of sample {b}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_gradients_of_importance_are_finite_where_the_reference_has_them_so(value, generator):
    case = importance_case(generator, [20, 0, 70, 3], torch.float32, bias=True)
    for name in ("q", "k", "out", "lse", "key_bias", "d_received", "d_cls"):
        if (name, value) == ("lse", -float("inf")):
            continue  # means that the query sees no key
        for row in (0, 38, 90):
            poisoned = case[name].clone()
            (poisoned.mT if name == "lse" else poisoned)[row] = value
            wanted = gradients(case | {name: poisoned}, "reference")
            for part, ours in gradients(case | {name: poisoned}).items():
                assert (ours.isfinite() == wanted[part].isfinite()).all(), f"{part} with {value} in {name}, row {row}"


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
            wanted = gradients(wide, "reference")
            for part, ours in gradients(broken).items():
                same = ours.isfinite() == wanted[part].to(ours.dtype).isfinite()
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
