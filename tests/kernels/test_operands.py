"""What reaches the kernels without the public functions' checks, or after them: refused by name, never a damaged memory."""

import numpy as np
import pytest
import torch
from helpers import CASES, DEVICE, OPERATIONS, backends_here, compaction_case, missing, normal, offsets, scoring_case
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from madtp_kernels import (
    RaggedBatch,
    attention,
    compact,
    layer_norm,
    linear,
    merge_tokens,
    registration,
    top_tokens,
    unmerge,
)

pytestmark = pytest.mark.skipif(DEVICE != "cpu" or missing("cpu") is not None, reason=f"on {DEVICE}: {missing('cpu')}")

LENGTHS = [5, 0, 1, 9]
BAD_OFFSETS = [[0, 5, 5, 6, 10**6], [0, 5, 4, 6, 15], [-3, 5, 5, 6, 15], [0, -(2**31), 5, 6, 15]]
every_operation = pytest.mark.parametrize("op", CASES)
every_damage = pytest.mark.parametrize("bad", BAD_OFFSETS, ids=str)


def offsets_of(case):
    return (
        case["x"].cu_seqlens
        if isinstance(case.get("x"), RaggedBatch)
        else case.get("cu_seqlens_k", case.get("cu_seqlens"))
    )


@every_operation
@every_damage
def test_offsets_that_change_after_they_were_checked(op, bad, generator):
    """Through NumPy, which nothing notices."""
    case = CASES[op](generator, LENGTHS)
    OPERATIONS[op](**case, backend="cpu")
    offsets_of(case).numpy()[:] = bad
    with pytest.raises(ValueError, match="^cu_seqlens(_q|_k)?: "):
        OPERATIONS[op](**case, backend="cpu")


@every_operation
def test_offsets_under_compile(op, generator):
    case = CASES[op](generator, LENGTHS)
    if isinstance(case.get("x"), RaggedBatch):
        values, longest = case["x"].values, case["x"].max_seqlen

        def function(cu_seqlens):
            return OPERATIONS[op](**case | {"x": RaggedBatch(values, cu_seqlens, longest)}, backend="cpu")[0].values
    else:
        names = [name for name in ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k") if name in case]

        def function(cu_seqlens):
            return OPERATIONS[op](**case | dict.fromkeys(names, cu_seqlens), backend="cpu")

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager")
    compiled(offsets(LENGTHS))
    for bad in BAD_OFFSETS:
        with pytest.raises(ValueError, match="^cu_seqlens(_q|_k)?: "):
            compiled(torch.tensor(bad, dtype=torch.int32))


def direct(monkeypatch, call):
    """``torch.ops.madtp_kernels.X`` and the arguments that the public function gives it."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(registration, "plain", lambda args: False)
        for name in registration._implementations:
            operator = getattr(torch.ops.madtp_kernels, name)
            patch.setattr(torch.ops.madtp_kernels, name, lambda *args, o=operator: seen.append((o, args)) or o(*args))
        call()
    return seen[0]


@every_operation
def test_operands_of_another_size(op, generator, monkeypatch):
    """Every tensor but the offsets in turn one row shorter than it should be, or of another dtype."""
    case = CASES[op](
        generator, LENGTHS, **{"bias": True} if op == "score_tokens" else {}
    )  # which ties the number of entries
    operator, args = direct(monkeypatch, lambda: OPERATIONS[op](**case, backend="cpu"))
    shortened = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg is not offsets_of(case)]
    assert shortened
    for i in shortened:
        with pytest.raises(ValueError, match=r"^[a-z_ ]+(, [a-z]+)?: "):
            operator(*args[:i], args[i][:-1].clone(), *args[i + 1 :])
        if args[i].is_floating_point():
            with pytest.raises((ValueError, RuntimeError)):
                operator(*args[:i], args[i].to(torch.int64), *args[i + 1 :])


def test_groups_beyond_the_batch(generator, monkeypatch):
    case = compaction_case(generator, LENGTHS, groups=True)
    operator, args = direct(monkeypatch, lambda: compact(**case, backend="cpu"))
    (place,) = (i for i, arg in enumerate(args) if arg is case["groups"])
    for bad in ([0, 0, 4, 0], [-1, 0, 0, 0], [0, 2**31 - 1, 0, 0]):
        with pytest.raises(ValueError, match=r"^groups: expected 0..B-1 = 0..3, got "):
            operator(*args[:place], torch.tensor(bad, dtype=torch.int32), *args[place + 1 :])


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 1.5, True])
def test_a_merged_id_that_is_no_int32(value, backend, generator):
    with pytest.raises(ValueError, match="^merged_id: expected an int32, got "):
        compact(**compaction_case(generator, LENGTHS), merged_id=value, backend=backend)


@pytest.mark.parametrize("backend", backends_here())
@pytest.mark.parametrize("value", [1e39, 1e-39, 5e-324])
def test_a_temperature_and_a_scale_beyond_float32(value, backend, generator):
    with pytest.raises(ValueError, match="^temperature: expected a number within the range of float32"):
        OPERATIONS["score_tokens"](**scoring_case(generator, LENGTHS) | {"temperature": value}, backend=backend)
    for op in ("attention", "attention_importance", "attention_with_importance"):
        with pytest.raises(ValueError, match="^scale: expected a number within the range of float32"):
            OPERATIONS[op](**CASES[op](generator, LENGTHS), scale=value, backend=backend)


def leading(op):
    return {"compact": "importance", "score_tokens": "x"}.get(
        op, "keys" if "keys" in op or op in ("novelty", "match_tokens", "nearest_kept") else "q"
    )


@pytest.mark.parametrize("backend", backends_here())
@every_operation
def test_forward_mode_differentiation_is_refused(op, backend, generator):
    """Tangents of zero would be an answer, and a wrong one."""
    if backend == "triton":
        pytest.skip("the refusal comes before any backend")
    if op in ("nearest_kept", "match_tokens", "merge_scores", "lowest_tokens"):
        pytest.skip("differentiates nothing, and says so")
    case, name = CASES[op](generator, LENGTHS), leading(op)

    def function(value):
        return OPERATIONS[op](**case | {name: value}, backend=backend)[0]

    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(function, (case[name],), (torch.ones_like(case[name]),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        function(forward_ad.make_dual(case[name], torch.ones_like(case[name])))
    # PyTorch's refusal speaks of an autograd.Function of nobody's.
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(NotImplementedError, match=r"^madtp_kernels\.\w+ cannot be differentiated by torch.func"):
            transform(lambda value: function(value).sum())(case[name])


def test_memory_that_does_not_hold_what_a_tensor_says(generator):
    """The sign of an imaginary part that was conjugated is a flag, and zeros may have no memory at all: kernels read that."""
    x, weight, cu_seqlens = normal(generator, 15, 8), normal(generator, 8, 8), offsets(LENGTHS)
    q, k, v = normal(generator, 3, 15, 2, 8).unbind(0)
    for function in (
        lambda sign: linear(sign(x), weight, None, cu_seqlens),
        lambda sign: linear(x, sign(weight), None, cu_seqlens),
        lambda sign: layer_norm(sign(x), weight[0], None, cu_seqlens),
        lambda sign: attention(q, k, sign(v), cu_seqlens, cu_seqlens, 9, 9)[0],
        lambda sign: merge_tokens(RaggedBatch(sign(x), cu_seqlens, 9), x[:, 0] > 0, append="sum").tokens.values,
    ):
        assert torch.equal(function(torch._neg_view), function(torch.neg))
    with pytest.raises(ValueError, match=r"^x: expected adjacent elements in a row, got strides \[0, 0\]"):
        linear(torch._efficientzerotensor((15, 8)), weight, None, cu_seqlens)


def test_vmap_is_a_loop(generator):
    """Over values, scores and offsets, whose rows are looked at one by one; a gradient flows through."""
    q, k, v = normal(generator, 3, 15, 2, 8).unbind(0)
    cu_seqlens = torch.stack([offsets(LENGTHS), offsets([4, 4, 4, 3])])

    def attend(q, cu_seqlens):
        return attention(q, k, v, cu_seqlens, cu_seqlens, 9, 9)[0]

    def first(scores, cu_seqlens):
        return top_tokens(scores, 2, cu_seqlens)

    many, scores = torch.stack([q, k]).requires_grad_(), normal(generator, 2, 15)
    for function, values in ((attend, many), (first, scores)):
        for which in (cu_seqlens, cu_seqlens[:1].expand(2, -1)):
            expected = torch.stack([function(*pair) for pair in zip(values, which, strict=True)])
            assert torch.equal(torch.func.vmap(function)(values, which), expected)
        expected = torch.stack([function(value, cu_seqlens[1]) for value in values])
        assert torch.equal(torch.func.vmap(function, (0, None))(values, cu_seqlens[1]), expected)
    (ours,) = torch.autograd.grad(torch.func.vmap(attend)(many, cu_seqlens).sum(), many)
    (theirs,) = torch.autograd.grad(sum(attend(*pair).sum() for pair in zip(many, cu_seqlens, strict=True)), many)
    assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="expected offsets that start at 0, got 1 first"):
        torch.func.vmap(attend)(many, cu_seqlens + 1)


def test_forward_mode_differentiation_of_the_rest_is_refused(generator):
    x, weight, cu_seqlens = normal(generator, 15, 8), normal(generator, 8, 8), offsets(LENGTHS)
    for function in (
        lambda x: linear(x, weight, None, cu_seqlens),
        lambda x: layer_norm(x, weight[0], None, cu_seqlens, 1e-6),
    ):
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.func.jvp(function, (x,), (x,))


def test_a_gradient_of_a_gradient_is_refused(generator):
    """No kernel differentiates its gradient: to a penalty on gradients it would add zero."""
    for op in sorted(set(CASES) - {"nearest_kept", "match_tokens", "merge_scores", "lowest_tokens"}):
        case = CASES[op](generator, LENGTHS) | ({"norm": None} if op == "compact" else {})
        check_that_second_gradients_raise(lambda value, op=op, case=case: OPERATIONS[op](**case | value)[0], op, case)
    x, weight, cu_seqlens = normal(generator, 15, 8), normal(generator, 8, 8), offsets(LENGTHS)
    batch, ones = RaggedBatch(x, cu_seqlens, 9), torch.ones(8)
    into = torch.arange(15, dtype=torch.int32)
    for function in (
        lambda value: linear(value["x"], weight, None, cu_seqlens, activation="gelu"),
        lambda value: layer_norm(value["x"], weight[0], None, cu_seqlens, 1e-6),
        lambda value: unmerge(value["x"], into, cu_seqlens),
        lambda value: merge_tokens(batch.with_values(value["x"]), into > 2, append="mean").tokens.values,
        lambda value: (
            compact(
                batch.with_values(value["x"]), torch.ones(15), torch.full((4,), -1.0), norm=(ones, ones, 1e-6)
            ).normed
        ),
    ):
        check_that_second_gradients_raise(function, "x", {"x": x})


def check_that_second_gradients_raise(function, op, case):
    name = "x" if op in ("compact", "x", "prune") else leading(op)
    whole = case[name]
    leaf = (whole.values if isinstance(whole, RaggedBatch) else whole).detach().requires_grad_()
    result = function({name: whole.with_values(leaf) if isinstance(whole, RaggedBatch) else leaf})
    result = result.values if isinstance(result, RaggedBatch) else result
    (gradient,) = torch.autograd.grad(result.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^madtp_kernels\.\w+ has no second derivative"):
        (leaf.sum() + gradient.square().sum()).backward()


def test_not_a_number_ranks_as_in_the_reference(generator, monkeypatch):
    """Above all numbers, whatever its sign bit."""
    case = compaction_case(generator, LENGTHS, by_count=True)
    operator, args = direct(monkeypatch, lambda: compact(**case, backend="cpu"))
    importance = args[1].clone()
    importance[2], importance[8] = torch.nan, torch.nan
    importance.numpy().view(np.uint32)[9] = 0xFFC00000  # NaN with its sign set
    results = [operator(args[0], importance, *args[2:-1], backend) for backend in ("cpu", "reference")]
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)) or torch.allclose(
            ours, theirs, equal_nan=True, atol=1e-5
        )


def test_a_batch_with_other_values_is_not_checked_again(generator, monkeypatch):
    tokens = RaggedBatch.from_list([normal(generator, 3, 4), normal(generator, 2, 4)])
    from madtp_kernels import checks

    monkeypatch.setattr(checks, "offsets", lambda *_: pytest.fail("offsets were read again"))
    assert tokens.with_values(normal(generator, 5, 7)).values.shape == (5, 7)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="^cu_seqlens: offsets end at 5, beyond the 4 rows of values"):
        tokens.with_values(normal(generator, 4, 7))
    tokens.cu_seqlens[-1] = 4  # a write that PyTorch counts is seen
    tokens.with_values(normal(generator, 4, 7))


@every_operation
def test_the_formula_is_as_precise_under_autocast(op, generator):
    """Its products would be of bfloat16, where those of kernels are of the operands' precision."""
    case = CASES[op](generator, LENGTHS)
    expected = OPERATIONS[op](**case, backend="reference")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = OPERATIONS[op](**case, backend="reference")
    for ours, theirs in zip(*(pytree.tree_leaves(result) for result in (found, expected)), strict=True):
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
