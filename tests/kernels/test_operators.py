"""The operations as PyTorch operators: registration, gradients, torch.compile, inference mode, determinism, odd memory.

Numbers are compared with the reference here; how accurate they are is the business of `test_properties.py`.
"""

import pytest
import torch
from helpers import (
    CASES,
    DEVICE,
    OPERATIONS,
    SIMILARITY,
    backends_here,
    compaction_case,
    flat,
    interpreted,
    normal,
    offsets,
    run,
    spare_rows,
    total,
    with_spare_rows,
)

from madtp_kernels import RaggedBatch, attention, attention_importance, compact, prune, score_tokens
from madtp_kernels.compaction import reference as compaction_reference

LENGTHS = [5, 0, 1, 9]
OPTIONS = {
    "attention": [
        {},
        {"causal": True},
        {"bias": True},
        {"key_heads": 1, "causal": True, "bias": True},
        {"key_lengths": [3, 2, 0, 7], "causal": True, "bias": True},
    ],
    "attention_importance": [{}, {"causal": True, "bias": True}],
    "attention_with_importance": [{}, {"causal": True, "bias": True}],
    "score_tokens": [{}, {"bias": True, "temperature": 0.3}],
    "attention_received": [
        {},
        {"causal": True, "bias": True, "reduction": "max", "queries": slice(-4, None)},
        {"key_heads": 1, "queries": "mask", "per_key_head": True},
    ],
    "nearest_kept": [{}, {"goes": True, "inverse_norms": True}],
    "novelty": [{}, {"rank": True}],
    "match_tokens": [{}, {"count": False, "threshold": 0.3, "protected": 0}],
    "merge_scores": [{"weight": True}],
    "lowest_tokens": [{}, {"count": False, "share": 0.4, "uncounted": 1}],
    "compact": [
        {},
        {"by_count": True, "ties": True},
        {"groups": True, "protected": True, "min_keep": True, "ids": True, "sizes": True, "norm": True},
        {"sizes": True, "norm": True, "exact": False},
    ],
}
VARIANTS = [
    pytest.param(op, options, id=f"{op}-{'+'.join(options) or 'plain'}")
    for op, many in OPTIONS.items()
    for options in many
]
every_backend = pytest.mark.parametrize("backend", backends_here())


def variants_on(backends, only=None):
    """Every variant on every backend, or on one ``only``; on others, and through the interpreter, the one with the most
    options of each operation."""
    fullest = [max(many, key=len) for many in OPTIONS.values()]
    return [
        pytest.param(*variant.values, *backend.values, marks=backend.marks, id=f"{backend.values[0]}-{variant.id}")
        for backend in backends
        for variant in VARIANTS
        if (only in (None, backend.values[0]) and not interpreted(backend.values[0]))
        or any(variant.values[1] is options for options in fullest)
    ]


every_case = pytest.mark.parametrize("op, options, backend", variants_on(backends_here()))
# The interpreter has one thread and one order of sums: that its bits repeat says nothing of a GPU, where these run too.
every_case_at_speed = pytest.mark.parametrize(
    "op, options, backend", variants_on([b for b in backends_here() if not interpreted(b.values[0])])
)
# A compiled graph calls the operator, whatever backend that runs.
every_compiled_case = pytest.mark.parametrize(
    "op, options, backend", variants_on(backends_here(), only="reference" if DEVICE == "cpu" else "triton")
)
WITHOUT_GRADIENT = ("nearest_kept", "match_tokens", "merge_scores", "lowest_tokens")
every_differentiable_variant = pytest.mark.parametrize(
    "op, options", [v for v in VARIANTS if v.values[0] not in WITHOUT_GRADIENT]
)

# float32 sums in another order
CLOSE = dict(atol=2e-5, rtol=2e-5)


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


# ---- registration


def schema_arguments(op, case, backend):
    """The positional arguments of `torch.ops.madtp_kernels.<op>`."""
    if op == "compact":
        x, norm = case["x"], case["norm"] or (None, None, 0.0)
        selection = (case[n] for n in ("importance", "threshold", "keep_count"))
        options = (case[n] for n in ("protected", "groups", "min_keep", "ids", "sizes"))
        exact = True if case["exact"] is None else case["exact"]
        return (x.values, *selection, x.cu_seqlens, x.max_seqlen, *options, -1, *norm, exact, backend)
    if op == "score_tokens":
        return (*case.values(), backend)
    if op == "attention_received":
        queries, first, last = case["queries"], 0, 2**31 - 1
        if isinstance(queries, slice):
            queries, first = None, queries.start
        sets = case["k"].shape[1] if case["per_key_head"] else 1
        names = ("q", "k", "lse", "cu_seqlens", "max_seqlen")
        options = (0.5, case["causal"], case["key_bias"], case["heads"], sets, first, last, queries)
        return (*(case[n] for n in names), *options, backend)
    if op == "merge_scores":
        names = ("order", "weight", "sizes", "free", "cu_seqlens", "max_seqlen")
        return (case["keys"].flatten(1), *(case[n] for n in names), 0.25, 1.0, 0.3, backend)
    if op == "lowest_tokens":
        return (
            *(case[n] for n in ("scores", "count", "cu_seqlens", "free", "threshold", "share", "uncounted")),
            backend,
        )
    if op in SIMILARITY:
        before = {"nearest_kept": ["kept"], "novelty": ["rank"], "match_tokens": []}[op]
        after = {"nearest_kept": ["goes", "inverse_norms"], "match_tokens": ["count", "threshold", "protected"]}.get(
            op, []
        )
        names = [*before, "cu_seqlens", "max_seqlen", *after]
        return (case["keys"].flatten(1), *(case.get(n) for n in names), backend)
    *first, causal, key_bias = case.values()
    return (*first, 0.5, causal, key_bias, *([] if op == "attention_with_importance" else [backend]))


def differentiable(case):
    """The case with gradients asked for wherever the operation gives any."""
    leaves = {}
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            leaves[name] = value.with_values(value.values.detach().requires_grad_())
        elif name == "norm" and value is not None:
            leaves[name] = (value[0].detach().requires_grad_(), value[1].detach().requires_grad_(), value[2])
        elif torch.is_tensor(value) and value.is_floating_point() and name not in ("threshold", "sizes", "rank"):
            leaves[name] = value.detach().requires_grad_()
        else:
            leaves[name] = value
    return leaves


def leaves_of(case):
    """Names and tensors of a case whose gradients are asked for."""
    found = {}
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            found[name] = value.values
        elif name == "norm" and value is not None:
            found |= {"norm weight": value[0], "norm bias": value[1]}
        elif torch.is_tensor(value) and value.requires_grad:
            found[name] = value
    return {name: value for name, value in found.items() if value.requires_grad}


@every_case
def test_opcheck(op, options, backend, generator):
    if op == "attention_with_importance" and backend != "cpu":
        pytest.skip("an operator of its own on the CPU backend only, elsewhere two operators in a row")
    case = CASES[op](generator, [3, 0, 1, 4] if interpreted(backend) else LENGTHS, **options)
    if options.get("exact") is False:
        case["threshold"] -= 2  # nothing is dropped: opcheck compares every row, so that all have to be defined
    operator = getattr(torch.ops.madtp_kernels, op).default
    # Attention with importance is two operators where a gradient is needed.
    if op not in WITHOUT_GRADIENT and op != "attention_with_importance":
        case = differentiable(case)
    # How an operator is registered does not depend on its backend, but what it returns and leaves alone does.
    chosen = {"test_utils": ("test_schema", "test_faketensor")} if interpreted(backend) else {}
    torch.library.opcheck(operator, schema_arguments(op, case, backend), **chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("op", sorted(set(OPERATIONS) - {"attention_with_importance"}))
def test_opcheck_in_other_dtypes(op, dtype, generator):
    case = CASES[op](generator, LENGTHS, dtype=dtype)
    if dtype == torch.float64:
        names = ("received", "cls", "importance", "threshold")
        case |= {n: case[n].double() for n in names if torch.is_tensor(case.get(n))}
    operator = getattr(torch.ops.madtp_kernels, op).default
    case = case if op in WITHOUT_GRADIENT else differentiable(case)
    torch.library.opcheck(operator, schema_arguments(op, case, ""))


# ---- gradients


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_a_compactions_layer_norm_do_not_wait(bias, generator):
    """Rows beyond the last one, which nobody reads from the device, may hold anything."""
    values, d_out = (spare_rows(normal(generator, 6, 5), 3) for _ in range(2))
    weight, shift = normal(generator, 5), normal(generator, 5) if bias else None
    backward = torch.ops.madtp_kernels.compact_norm_backward
    ours = backward(values, weight, shift, 1e-6, offsets([4, 0, 2]), d_out)
    exact = backward(values[:6], weight, shift, 1e-6, offsets([6]), d_out[:6])
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got[:6], expected)
    assert (ours[0][6:] == 0).all()
    meta = [None if t is None else t.to("meta") for t in (values, weight, shift, offsets([4, 0, 2]), d_out)]
    compaction_reference.layer_norm_backward(*meta[:3], 1e-6, *meta[3:])  # reading a number would raise


def in_double(case):
    wide = {}
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            wide[name] = value.to(torch.float64)
        elif name == "norm" and value is not None:
            wide[name] = (value[0].double(), value[1].double(), value[2])
        elif torch.is_tensor(value) and value.is_floating_point() and name != "sizes":
            wide[name] = value.double()
        else:
            wide[name] = value
    return wide


def floats_with_gradient(op, case, backend):
    results = flat(op, OPERATIONS[op](**case, backend=backend))
    return tuple(r for r in results if r.requires_grad)


@every_differentiable_variant
def test_gradcheck(op, options, generator):
    size = {"heads": 2, "head_dim": 2} if op.startswith("attention") else {"width": 5}
    options = {**options, "ties": False} if "ties" in options else options  # a small change decides a tie: a jump
    # Where a query sees one key, all heads have the maximum, and a small change decides which.
    lengths = [5, 0, 6] if op == "attention_received" else [3, 0, 1, 4]
    case = differentiable(in_double(CASES[op](generator, lengths, **size, **options)))
    leaves = list(leaves_of(case).values())

    def function(*tensors):
        new = dict(zip(leaves_of(case), tensors, strict=True))
        call = dict(case)
        for name in case:
            if isinstance(case[name], RaggedBatch):
                call[name] = case[name].with_values(new[name])
            elif name == "norm" and case[name] is not None:
                call[name] = (new["norm weight"], new["norm bias"], case[name][2])
            elif name in new:
                call[name] = new[name]
        results = floats_with_gradient(op, call, "reference")
        if op == "compact":  # rows that are not defined have no gradient to check
            rows = int(flat(op, OPERATIONS[op](**call, backend="reference"))[1][-1])
            return tuple(r[:rows] for r in results)
        # A query that sees no key has a log-sum-exp of -inf, which numerical differences cannot handle.
        return tuple(torch.where(r.isfinite(), r, 0.0) for r in results)

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "op, options, backend",
    [case for case in variants_on(backends_here(kernels_only=True)) if case.values[0] not in WITHOUT_GRADIENT],
)
def test_gradients_agree_with_the_reference(op, options, dtype, backend, generator):
    if interpreted(backend) and dtype != torch.float32:
        pytest.skip("one dtype is enough through the interpreter")
    lengths = [4, 0, 1, 5] if interpreted(backend) else LENGTHS
    case = CASES[op](generator, lengths, dtype=dtype, **{k: v for k, v in options.items() if k != "key_lengths"})
    seeds, grads = None, {}
    for name in (backend, "reference"):
        own = differentiable(case)
        results = floats_with_gradient(op, own, name)
        if op == "compact":
            rows = int(flat(op, OPERATIONS[op](**case, backend=name))[1][-1])
            results = tuple(r[:rows] for r in results)
        results = tuple(torch.where(r.isfinite(), r, 0.0) for r in results)
        seeds = seeds or [normal(generator, *r.shape, dtype=r.dtype) for r in results]
        grads[name] = torch.autograd.grad(results, leaves_of(own).values(), seeds)
    # What a backend computed forward enters its gradients with one rounding of the dtype.
    tolerance = dict(atol=1e-4, rtol=1e-4) if dtype == torch.float32 else dict(atol=4e-2, rtol=4e-2)
    for name, ours, theirs in zip(leaves_of(differentiable(case)), grads[backend], grads["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_selection_and_threshold_carry_no_gradient(generator):
    case = differentiable(CASES["score_tokens"](generator, LENGTHS))
    importance, threshold = score_tokens(**case)
    assert importance.requires_grad and not threshold.requires_grad
    tokens = RaggedBatch(case["x"], case["cu_seqlens"], case["max_seqlen"])
    result = compact(
        tokens,
        importance,
        threshold,
        sizes=torch.ones_like(importance),
        norm=(torch.ones(16, device=DEVICE), None, 1e-6),
    )
    assert result.tokens.values.requires_grad and result.normed.requires_grad
    assert not result.ids.is_floating_point() and not result.sizes.requires_grad
    assert not result.tokens.cu_seqlens.requires_grad


def test_dictionary_and_merge_weights_learn_through_a_pruned_layer(generator):
    """The one path by which pruning trains the dictionary: merged tokens weigh their members by importance."""
    tokens = RaggedBatch(normal(generator, 30, 16), offsets([20, 10]), 20)
    dictionary = normal(generator, 5, 16).requires_grad_()
    received = torch.rand(30, generator=generator).to(DEVICE)
    result = prune(tokens, tokens.values, dictionary, received, received, 0.5)
    assert int(result.compacted.tokens.cu_seqlens[-1]) < 30
    result.compacted.tokens.values.square().sum().backward()
    assert dictionary.grad.isfinite().all() and dictionary.grad.abs().max() > 0


# ---- torch.compile


def compiled(function, backend="aot_eager", **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def call_of(op, case, backend):
    """The operation as a function of its tensors, which is what a compiled graph takes."""
    tensors = {n: v for n, v in case.items() if torch.is_tensor(v)}
    rest = {n: v for n, v in case.items() if not torch.is_tensor(v)}

    def function(tensors):
        return flat(op, OPERATIONS[op](**tensors, **rest, backend=backend))

    return function, tensors


def defined(op, results, rows):
    if op == "compact":
        rows = int(results[1][-1])
        return (results[0][:rows], results[1], *(r[:rows] for r in results[2:]))
    return results


@every_compiled_case
def test_compile_without_graph_breaks(op, options, backend, generator):
    case = CASES[op](generator, [3, 0, 1, 4] if interpreted(backend) else LENGTHS, **options)
    function, tensors = call_of(op, case, backend)
    ours = defined(op, compiled(function)(tensors), total(case))
    check = close if op == "attention_with_importance" else same  # which is compiled as two operators in a row
    check(ours, run(op, case, backend))


@pytest.mark.parametrize("op", OPERATIONS)
def test_one_graph_serves_batches_of_any_size(op, generator):
    sizes = {"entries": 6} if op == "score_tokens" else {}  # unlike B + 1, or the compiler would take the two for one
    case = CASES[op](generator, LENGTHS, **sizes)
    rest = {n: v for n, v in case.items() if not torch.is_tensor(v) and not isinstance(v, RaggedBatch)}
    rest = {n: (64 if n.startswith("max_seqlen") else v) for n, v in rest.items()}

    def function(tensors):
        if op != "compact":
            return flat(op, OPERATIONS[op](**tensors, **rest))
        tensors = dict(tensors)
        x = RaggedBatch(tensors.pop("values"), tensors.pop("cu_seqlens"), 64)
        return flat(op, compact(x, **tensors, **rest))

    function = compiled(function, dynamic=True)
    for lengths in (LENGTHS, [7, 2], [1, 2, 3, 4, 5, 6, 7], [40, 0, 3]):
        case = CASES[op](generator, lengths, **sizes)
        tensors = {n: v for n, v in case.items() if torch.is_tensor(v)}
        if op == "compact":
            tensors |= {"values": case["x"].values, "cu_seqlens": case["x"].cu_seqlens}
        with torch._dynamo.config.patch(error_on_recompile=lengths is not LENGTHS):
            check = close if op == "attention_with_importance" else same
            check(defined(op, function(tensors), sum(lengths)), run(op, case))


@every_backend
def test_compiled_compaction_with_an_exact_result(backend, generator):
    """The number of surviving rows is known at run time only: a graph with an unbacked size."""
    case = compaction_case(generator, [3, 1, 4] if interpreted(backend) else LENGTHS, sizes=True, norm=True, exact=True)
    function, tensors = call_of("compact", case, backend)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        ours = compiled(function)(tensors)
    same(ours, run("compact", case, backend))
    assert ours[0].shape[0] == int(ours[1][-1])


def layer(x, cu_seqlens, dictionary, backend=""):
    """What a block does to its tokens, from attention to the pruned rows."""
    most, width = 9, x.shape[1]
    qkv = x.reshape(x.shape[0], 1, 2, width // 2).expand(-1, 3, -1, -1)
    q, k, v = qkv.unbind(1)
    out, lse = attention(q, k, v, cu_seqlens, cu_seqlens, most, most, backend=backend)
    received, cls = attention_importance(q, k, out, lse, cu_seqlens, most, backend=backend)
    tokens = RaggedBatch(x + out.flatten(1), cu_seqlens, most)
    norm = (torch.ones(width, device=x.device), None, 1e-6)
    result = prune(tokens, x, dictionary, received, cls, 0.5, norm=norm, backend=backend, exact=False)
    kept = result.compacted.tokens
    return (
        kept.values,
        kept.cu_seqlens,
        result.compacted.ids,
        result.compacted.normed,
        result.importance,
        result.threshold,
    )


@every_backend
def test_compiled_prune_with_gradients(backend, generator):
    x = normal(generator, 15, 16)
    dictionary, cu_seqlens = normal(generator, 5, 16), offsets(LENGTHS)
    results, grads = [], []
    for function in (layer, compiled(layer)):
        leaves = [x.clone().requires_grad_(), dictionary.clone().requires_grad_()]
        values, cu_out, ids, normed, importance, threshold = function(leaves[0], cu_seqlens, leaves[1], backend)
        rows = int(cu_out[-1])
        grads.append(torch.autograd.grad((values[:rows].square().sum() + normed[:rows].sum(0).square().sum()), leaves))
        results.append((values[:rows], cu_out, ids[:rows], normed[:rows], importance, threshold))
    same(results[0], results[1])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_inductor_compiles_a_pruned_layer(generator):
    x, dictionary, cu_seqlens = normal(generator, 15, 16), normal(generator, 5, 16), offsets(LENGTHS)
    expected = layer(x, cu_seqlens, dictionary)
    ours = compiled(layer, backend="inductor")(x, cu_seqlens, dictionary)
    rows = int(expected[1][-1])
    for position, (a, b) in enumerate(zip(ours, expected, strict=True)):
        a, b = (a[:rows], b[:rows]) if position in (0, 2, 3) else (a, b)
        torch.testing.assert_close(a, b, **CLOSE)


# ---- inference mode, determinism


@every_case_at_speed
def test_inference_mode_gives_the_same_bits(op, options, backend, generator):
    case = CASES[op](generator, LENGTHS, **options)
    expected = run(op, case, backend)
    with torch.inference_mode():
        ours = run(op, case, backend)
        assert all(r.is_inference() for r in ours)
    same(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_case_at_speed
def test_same_input_same_bits(op, options, backend, dtype, generator):
    lengths, repeats = [*LENGTHS, 90, 33, 2, 64], 3
    options = {k: v for k, v in options.items() if k != "key_lengths"}
    case = CASES[op](generator, lengths, dtype=dtype, **options)
    threads = torch.get_num_threads()
    expected = run(op, case, backend)
    try:
        for repeat in range(1, repeats):
            torch.set_num_threads(1 + repeat % 2)  # neither the run nor the number of threads changes a bit
            same(run(op, case, backend), expected)
    finally:
        torch.set_num_threads(threads)


# ---- odd memory: rows beyond T, strided views, offsets beyond 2^31 elements


@pytest.mark.parametrize("rows", [1, 70])
@every_case
def test_rows_beyond_the_last_offset_do_not_matter(op, options, backend, rows, generator):
    if interpreted(backend) and rows > 1:
        pytest.skip("one spare row is enough through the interpreter")
    case = CASES[op](generator, [3, 0, 1, 4] if interpreted(backend) else LENGTHS, **options)
    expected = run(op, case, backend)
    ours = run(op, with_spare_rows(case, rows), backend)
    same(ours, expected)


def test_gradients_do_not_depend_on_rows_beyond_the_last_offset(generator):
    for op in set(OPTIONS) - set(WITHOUT_GRADIENT):
        for options in OPTIONS[op]:
            case = CASES[op](generator, LENGTHS, **options)
            grads = []
            for own in (differentiable(case), differentiable(with_spare_rows(case, 5))):
                results = run(op, own)
                loss = sum(torch.where(r.isfinite(), r, 0.0).square().sum() for r in results if r.requires_grad)
                grads.append(torch.autograd.grad(loss, leaves_of(own).values()))
            for name, exact, wide in zip(leaves_of(differentiable(case)), *grads, strict=True):
                part = wide[tuple(slice(size) for size in exact.shape)]
                torch.testing.assert_close(
                    part, exact, **CLOSE, msg=lambda m, o=op, n=name: f"{o}, gradient of {n}: {m}"
                )


def strided(value, generator):
    """Equal values in a view whose every stride is unusual, the last one included."""
    wide = normal(generator, *(size * 2 + 1 for size in value.shape)).to(value.dtype)
    view = wide[tuple(slice(1, 1 + 2 * size, 2) for size in value.shape)]
    view.copy_(value)
    return view


def token_strided(value, generator):
    """Equal values in a view of a larger buffer whose last dimension is dense, as a slice of fused projections is."""
    wide = normal(generator, value.shape[0], 3, *value.shape[1:]).to(value.dtype)
    wide[:, 1] = value
    return wide[:, 1]


@pytest.mark.parametrize("view", [strided, token_strided])
@every_case
def test_views_of_larger_buffers(op, options, backend, view, generator):
    case = CASES[op](generator, [3, 0, 1, 4] if interpreted(backend) else LENGTHS, **options)
    expected = run(op, case, backend)
    views = {}
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            cu_seqlens = strided(value.cu_seqlens, generator)
            views[name] = RaggedBatch(view(value.values, generator), cu_seqlens, value.max_seqlen)
        elif name == "norm" and value is not None:
            views[name] = (strided(value[0], generator), strided(value[1], generator), value[2])
        elif torch.is_tensor(value):
            views[name] = view(value, generator) if value.dim() > 1 else strided(value, generator)
            assert torch.equal(views[name], value)
        else:
            views[name] = value
    close(run(op, views, backend), expected)  # matrix libraries may choose another algorithm for other strides


@pytest.mark.parametrize("backend", backends_here(kernels_only=True))
def test_addresses_beyond_32_bits(backend, generator, monkeypatch):
    """Tokens 2^27 elements apart: the last ones lie beyond 2^31 elements. Only the rows that are used exist in memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    apart, lengths = 2**27, [3, 16]
    tokens = sum(lengths)

    def far(value):
        spread = torch.empty(tokens * apart, dtype=value.dtype, device=DEVICE)
        view = spread.as_strided(value.shape, (apart, *value.stride()[1:]))
        view.copy_(value)
        return view

    for op in OPERATIONS:
        case = CASES[op](generator, lengths, dtype=torch.bfloat16)
        expected = run(op, case, backend)
        for name in {"x", "q", "k", "v", "out", "keys"} & case.keys():
            value = case[name]
            moved = value.with_values(far(value.values)) if isinstance(value, RaggedBatch) else far(value)
            same(run(op, case | {name: moved}, backend), expected)
