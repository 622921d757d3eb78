"""attention_received against the attention matrix written out in float64: heads, chosen queries, groups, causal, key bias."""

import pytest
import torch
from helpers import DEVICE, backends_here, interpreted, received_case, run

from madtp_kernels import attention, attention_received

every_backend = pytest.mark.parametrize("backend", backends_here())
CHOICES = [None, slice(1, None), slice(0, 1), slice(-1, None), slice(-40, None), slice(2, -3), slice(5, 5), "mask"]


def formula(case):
    """The matrix, head by head and query by query."""
    q, k, bias = case["q"].double(), case["k"].double(), case["key_bias"]
    heads, key_heads = q.shape[1], k.shape[1]
    k = k.repeat_interleave(heads // key_heads, 1)
    columns, bounds = [], case["cu_seqlens"].tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        s = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * q.shape[2] ** -0.5
        s = s if bias is None else s + bias[a:b].double()
        if case["causal"]:
            s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf"))
        p = s.softmax(-1) if b > a else s
        queries = case["queries"]
        chosen = (
            range(b - a)
            if queries is None
            else range(b - a)[queries]
            if isinstance(queries, slice)
            else queries[a:b].nonzero()[:, 0]
        )
        p = p[:, list(chosen)].unflatten(0, (key_heads if case["per_key_head"] else 1, -1))
        columns.append((p.amax(1) if case["heads"] == "max" else p.mean(1)).sum(1))
    result = torch.cat(columns, 1)
    return result if case["per_key_head"] else result[0]


def check(case, backend, dtype=torch.float32):
    (got,) = run("attention_received", case, backend)
    expected = formula(case)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    # The log-sum-exp is rounded to float32; sums of up to 100 probabilities.
    torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "max"])
@pytest.mark.parametrize("queries", CHOICES, ids=str)
@every_backend
def test_chosen_queries(backend, queries, reduction, causal, generator):
    if interpreted(backend) and (reduction == "max") == causal:
        pytest.skip("half of the combinations are enough through the interpreter")
    lengths = [5, 0, 1, 70] if interpreted(backend) else [5, 0, 1, 2, 70, 130]
    options = {"reduction": reduction, "causal": causal, "bias": causal, "queries": queries}
    check(received_case(generator, lengths, 3, 8, **options), backend)


@pytest.mark.parametrize("per_key_head", [False, True])
@pytest.mark.parametrize("heads, key_heads", [(6, 2), (4, 1), (7, 7), (40, 2)])
@every_backend
def test_grouped_queries(backend, heads, key_heads, per_key_head, generator):
    if interpreted(backend) and heads > 7:
        pytest.skip("too much for the interpreter")
    for reduction in ("mean", "max"):
        options = {
            "key_heads": key_heads,
            "per_key_head": per_key_head,
            "reduction": reduction,
            "queries": slice(-3, None),
        }
        check(received_case(generator, [5, 1, 20], heads, 8, causal=True, **options), backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128])
@every_backend
def test_head_widths_and_16_bits(backend, head_dim, dtype, generator):
    check(received_case(generator, [20, 3], 2, head_dim, dtype), backend)


@every_backend
def test_the_mean_adds_up_to_the_number_of_queries(backend, generator):
    lengths = [4, 0, 1, 9]
    case = received_case(generator, lengths, queries="mask")
    (got,) = run("attention_received", case, backend)
    bounds = case["cu_seqlens"].tolist()
    for a, b in zip(bounds, bounds[1:], strict=False):
        torch.testing.assert_close(got[a:b].sum(), case["queries"][a:b].sum().float(), atol=1e-5, rtol=1e-5)


@every_backend
def test_heads_in_two_shards_are_heads_in_one(backend, generator):
    """What tensor parallelism needs: the mean of the means and the maximum of single heads' maxima."""
    case = received_case(generator, [6, 9], 4, 8)
    halves = [
        case | {"q": case["q"][:, s], "k": case["k"][:, s], "lse": case["lse"][s]} for s in (slice(0, 2), slice(2, 4))
    ]
    whole, shards = (
        run("attention_received", case, backend)[0],
        [run("attention_received", c, backend)[0] for c in halves],
    )
    torch.testing.assert_close(torch.stack(shards).mean(0), whole, atol=1e-6, rtol=1e-6)


@every_backend
def test_logits_beyond_the_range_of_float16(backend, generator):
    q = torch.full((6, 1, 8), 200.0, dtype=torch.float16, device=DEVICE)
    k = (q.cpu() * (1 + torch.arange(6).half()[:, None, None] / 8)).to(DEVICE)
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
    _, lse = attention(q, k, q, cu_seqlens, cu_seqlens, 6, 6, backend=backend)
    got = attention_received(q, k, lse, cu_seqlens, 6, backend=backend)
    assert got.isfinite().all() and got[5] > 5.9


@every_backend
def test_queries_that_see_no_key_give_nothing(backend, generator):
    """All keys biased away: a log-sum-exp of -inf."""
    case = received_case(generator, [3, 4], bias=True)
    case["key_bias"][:3] = float("-inf")
    case["lse"] = attention(
        case["q"],
        case["k"],
        case["k"],
        case["cu_seqlens"],
        case["cu_seqlens"],
        4,
        4,
        key_bias=case["key_bias"],
        backend="reference",
    )[1]
    (got,) = run("attention_received", case, backend)
    assert (got[:3].nan_to_num(7) == 0).all() and got[3:].isfinite().all()


@pytest.mark.parametrize("options, message", [
    ({"heads": "sum"}, "^heads: expected 'mean' or 'max', got str 'sum'"),
    ({"queries": slice(None, None, 2)}, "^queries: expected a slice of integers without a step"),
    ({"queries": slice(0.5, None)}, "^queries: expected a slice of integers without a step"),
    ({"queries": 3}, r"^queries: expected None, a slice of positions .* or bool \[T\], got int 3"),
    ({"queries": torch.tensor([3, 6])}, r"^queries: expected None, a slice of .* or bool \[T\], got int64\[2\]"),
    ({"queries": torch.ones(6, dtype=torch.bool, device=DEVICE)}, r"^queries: expected \[T\] = bool\[7\]"),
    ({"k": torch.zeros(7, 4, 8, device=DEVICE)}, "^k: expected .* Hk a divisor of the 2 query heads"),
])  # fmt: skip
def test_refuses(options, message, generator):
    with pytest.raises(ValueError, match=message):
        attention_received(**received_case(generator, [3, 4]) | options)
