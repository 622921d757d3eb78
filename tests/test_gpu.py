"""What only a GPU can show: no wait for the device in a forward, CUDA graphs that follow new data and lengths, launch counts.

Skipped without a CUDA device. `benchmarks/gpu_check.sh` runs this file.
"""

import contextlib
import logging

import pytest
import test_graphs
import torch
from helpers import CASES, OPERATIONS, backends_here, flat, normal, offsets, run, spare_rows, total, with_spare_rows

from madtp import NLVRConfig, graphs, layers
from madtp.config import TextConfig, VisionConfig
from madtp.pruning import MADTP, RankedNovelty, Tokens
from madtp.tasks.nlvr.model import NLVR
from madtp.weights import randomize
from madtp_kernels import (
    RaggedBatch,
    attention,
    backends,
    beside,
    layer_norm,
    linear,
    linear_pair,
    lowest_tokens,
    merge_redundant,
    merge_scores,
    merge_tokens,
    nearest_kept,
    prune,
    repeats,
    top_tokens,
    unmerge,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
each_kernel = pytest.mark.parametrize("backend", backends_here(kernels_only=True))
each_operation = pytest.mark.parametrize("op", OPERATIONS)


@contextlib.contextmanager
def no_synchronisation():
    """Whatever waits for the device inside raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call):
    """The call as a CUDA graph: a function that replays it and returns the tensors it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, tunes, allocates workspaces
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay():
        graph.replay()
        return results

    return replay


@pytest.fixture(autouse=True)
def only_what_has_a_source(request):
    arguments = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if arguments.get("backend") == "cuda" and arguments.get("op") in backends._WITHOUT_CUDA:
        pytest.skip("there is no CUDA source for it")


@pytest.fixture
def as_in_use():
    """PyTorch's default algorithms: its deterministic ones, which the other tests ask for, may wait for the device."""
    torch.use_deterministic_algorithms(False)


# ---- the operations -------------------------------------------------------------------------------------------------


def capacity_case(op, generator, lengths, capacity, most, dtype):
    """A case whose tensors have ``capacity`` rows and whose length bound is ``most``, whatever the lengths are."""
    case = with_spare_rows(CASES[op](generator, lengths, dtype=dtype), capacity - sum(lengths))
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            case[name] = RaggedBatch(value.values, value.cu_seqlens, most)
        elif name.startswith("max_seqlen"):
            case[name] = most
    return case


def tensors_of(case):
    for name, value in case.items():
        if isinstance(value, RaggedBatch):
            yield f"{name}.values", value.values
            yield f"{name}.cu_seqlens", value.cu_seqlens
        elif torch.is_tensor(value):
            yield name, value


@each_kernel
@each_operation
@each_dtype
def test_small_uneven_batch_agrees_with_the_reference(op, backend, dtype, generator):
    """Small enough for compute-sanitizer: empty samples, single tokens, lengths around a tile's, spare rows full of NaN."""
    case = with_spare_rows(CASES[op](generator, [0, 1, 2, 3, 0, 17, 64, 65, 129, 0], dtype=dtype), 5)
    tolerance = 1e-3 if dtype == torch.float32 else 2e-2
    for ours, exact in zip(run(op, case, backend), run(op, case, "reference"), strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@each_kernel
@each_operation
@each_dtype
def test_operation_does_not_wait_for_the_device(op, backend, dtype, generator):
    case = capacity_case(op, generator, [70, 0, 33, 1, 128], 400, 150, dtype)
    OPERATIONS[op](**case, backend=backend)  # compiles
    with no_synchronisation():
        OPERATIONS[op](**case, backend=backend)


@each_kernel
@each_operation
@each_dtype
def test_operation_in_a_graph_follows_new_data_and_lengths(op, backend, dtype, generator):
    case = capacity_case(op, generator, [70, 0, 33, 1, 128], 400, 150, dtype)
    replay = captured(lambda: flat(op, OPERATIONS[op](**case, backend=backend)))
    for lengths in ([3, 150, 0, 90, 20], [0, 0, 1, 0, 0], [80, 80, 80, 80, 80]):
        fresh = capacity_case(op, generator, lengths, 400, 150, dtype)
        expected = flat(op, OPERATIONS[op](**fresh, backend=backend))
        for (_, target), (_, source) in zip(tensors_of(case), tensors_of(fresh), strict=True):
            target.copy_(source)
        results = replay()
        rows = int(expected[1][-1]) if op == "compact" else total(fresh)
        for ours, theirs in zip(results, expected, strict=True):
            defined = ours.shape.index(400) if 400 in ours.shape else None
            if defined is not None:
                ours, theirs = ours.narrow(defined, 0, rows), theirs.narrow(defined, 0, rows)
            assert torch.equal(ours, theirs), lengths


def merging_case(generator, lengths, capacity, dtype, width=128):
    """Scores, keys, values and what they carry, in a buffer of ``capacity`` rows."""
    return dict(
        x=RaggedBatch(normal(generator, capacity, width, dtype=dtype), offsets(lengths), 150),
        keys=normal(generator, capacity, 2, 16, dtype=dtype),
        scores=normal(generator, capacity),
        sizes=torch.randint(1, 5, (capacity,), generator=generator).float().cuda(),
        ids=torch.randint(0, 99, (capacity, 3), generator=generator).cuda(),
        norm=normal(generator, width, dtype=dtype),
    )


def merge_and_back(x, keys, scores, sizes, ids, norm, backend):
    """What training-free pruners are made of, of every kind: offsets, then tensors with a row per token that is left, then
    one with a row per token that there was."""
    keep = top_tokens(scores, 20, x.cu_seqlens, protected=1)
    into = nearest_kept(keys, keep, x.cu_seqlens, x.max_seqlen, backend=backend)
    merged = merge_tokens(x, into, sizes=sizes, carry=(ids,), exact=False, backend=backend)
    normed = layer_norm(merged.tokens.values, norm, None, merged.tokens.cu_seqlens, backend=backend)
    back = unmerge(merged.tokens.values, merged.rows, x.cu_seqlens, backend=backend)
    return merged.tokens.cu_seqlens, merged.tokens.values, merged.sizes, merged.carried[0], normed, back


def defined(case, results):
    cu_out, *rows, back = results
    return [cu_out, *(t[: int(cu_out[-1])] for t in rows), back[: case["x"].num_tokens]]


@each_dtype
def test_merging_agrees_with_the_reference(dtype, generator):
    case = merging_case(generator, [0, 1, 2, 3, 0, 17, 64, 65, 129, 0], 300, dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    ours, exact = (defined(case, merge_and_back(**case, backend=name)) for name in ("triton", "reference"))
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@each_dtype
def test_merging_what_is_redundant_gives_the_bits_of_its_steps(dtype, generator, as_in_use):
    for lengths in ([70, 0, 33, 1, 128], [3, 150, 0, 90, 20]):
        case = merging_case(generator, lengths, 300, dtype)
        x, keys, sizes = case["x"], case["keys"], case["sizes"]
        order, free = case["scores"].abs(), case["scores"] > -1
        common = {"free": free, "sizes": sizes}
        scores, _, norms = merge_scores(keys, order, x.cu_seqlens, x.max_seqlen, **common)
        goes = lowest_tokens(scores, None, x.cu_seqlens, free=free, threshold=0.7)
        into = nearest_kept(keys, free > goes, x.cu_seqlens, x.max_seqlen, goes=goes, inverse_norms=norms)
        want = merge_tokens(x, into, sizes=sizes, carry=(case["ids"],))
        number = int(want.tokens.cu_seqlens[-1])
        for _ in range(3):  # checked, then as it was done before
            got, found, *_ = merge_redundant(x, keys, order, threshold=0.7, carry=(case["ids"],), **common)
            assert torch.equal(found[: x.num_tokens], scores[: x.num_tokens])
            assert torch.equal(got.tokens.cu_seqlens, want.tokens.cu_seqlens) and torch.equal(got.rows, want.rows)
            pairs = [
                (got.tokens.values, want.tokens.values),
                (got.sizes, want.sizes),
                (got.carried[0], want.carried[0]),
            ]
            assert all(torch.equal(a[:number], b[:number]) for a, b in pairs)


def redundant_call(generator, lengths, capacity, dtype):
    """Arguments of `merge_redundant` with all that its last launch can do besides."""
    case = merging_case(generator, lengths, capacity, dtype)
    width = case["x"].values.shape[1]
    return dict(
        x=case["x"],
        keys=case["keys"],
        order=case["scores"].abs(),
        free=torch.cat([torch.arange(length) for length in (*lengths, capacity - sum(lengths))]).int().cuda(),
        sizes=case["sizes"],
        carry=(case["ids"],),
        norm=(normal(generator, width, dtype=dtype), normal(generator, width, dtype=dtype), 1e-6),
    )


@each_dtype
@pytest.mark.parametrize("limit", [{"portion": 0.3, "uncounted": 1}, {"count": 5}, {"threshold": 0.7}], ids=str)
def test_merging_normalises_and_takes_logarithms_in_the_same_pass(limit, dtype, generator, as_in_use):
    for lengths in ([70, 0, 33, 1, 128], [3, 150, 0, 90, 20]):
        case = redundant_call(generator, lengths, 300, dtype)
        repeats.forget()
        first, *others = (merge_redundant(**case, **limit, with_log_sizes=True) for _ in range(3))
        left = int(first.merged.tokens.cu_seqlens[-1])
        assert 0 < left < sum(lengths)
        for found in others:  # in five launches
            merged = found.merged
            assert torch.equal(found.scores[: sum(lengths)], first.scores[: sum(lengths)])
            assert torch.equal(merged.rows, first.merged.rows)
            assert torch.equal(merged.tokens.cu_seqlens, first.merged.tokens.cu_seqlens)
            assert (merged.source[left:] == -1).all()
            pairs = [
                (merged.tokens.values, first.merged.tokens.values), (merged.sizes, first.merged.sizes),
                (merged.source, first.merged.source), (found.normed, first.normed),
            ]  # fmt: skip
            assert all(torch.equal(a[:left], b[:left]) for a, b in pairs)
            torch.testing.assert_close(found.log_sizes[:left], merged.sizes[:left].log(), rtol=2e-7, atol=0)


@each_dtype
def test_what_merges_the_redundant_has_the_same_bits_alone_and_in_a_batch(dtype, generator, as_in_use):
    lengths = [70, 0, 33, 1, 128]
    case = redundant_call(generator, lengths, sum(lengths), dtype)
    merge_redundant(**case, portion=0.3, with_log_sizes=True)
    whole = merge_redundant(**case, portion=0.3, with_log_sizes=True)
    begin = 0
    for b, length in enumerate(lengths):
        if not length:
            continue
        rows = slice(begin, begin + length)
        part = {name: case[name][rows].clone() for name in ("keys", "order", "free", "sizes")}
        part |= {"x": RaggedBatch(case["x"].values[rows].clone(), offsets([length]), length), "norm": case["norm"]}
        merge_redundant(**part, portion=0.3, with_log_sizes=True)
        alone = merge_redundant(**part, portion=0.3, with_log_sizes=True)
        first, last = whole.merged.tokens.cu_seqlens[b : b + 2].tolist()
        for mine, other in [
            (alone.merged.tokens.values, whole.merged.tokens.values), (alone.merged.sizes, whole.merged.sizes),
            (alone.normed, whole.normed), (alone.log_sizes, whole.log_sizes),
        ]:  # fmt: skip
            assert torch.equal(mine[: last - first], other[first:last])
        assert torch.equal(alone.scores[:length], whole.scores[rows])
        begin += length


@each_dtype
def test_merging_the_redundant_waits_for_nothing_and_follows_new_data_in_a_graph(dtype, generator, as_in_use):
    case = redundant_call(generator, [70, 0, 33, 1, 128], 400, dtype)

    def call(case=case):
        return merge_redundant(**case, portion=0.3, uncounted=1, with_log_sizes=True)

    call(), call()
    with no_synchronisation():
        call()
    replay = captured(call)
    for lengths in ([3, 150, 0, 90, 20], [0, 0, 1, 0, 0], [80, 80, 80, 80, 80]):
        fresh = redundant_call(generator, lengths, 400, dtype) | {"norm": case["norm"]}
        want = call(fresh)
        left = int(want.merged.tokens.cu_seqlens[-1])
        for (_, target), (_, source) in zip(tensors_of(case), tensors_of(fresh), strict=True):
            target.copy_(source)
        got = replay()
        assert torch.equal(got.merged.rows[: sum(lengths)], want.merged.rows[: sum(lengths)]), lengths
        for mine, other in [(got.merged.tokens.values, want.merged.tokens.values), (got.normed, want.normed)]:
            assert torch.equal(mine[:left], other[:left]), lengths


@each_dtype
def test_merging_does_not_wait_for_the_device(dtype, generator, as_in_use):
    case = merging_case(generator, [70, 0, 33, 1, 128], 400, dtype)
    merge_and_back(**case, backend="triton")  # compiles
    with no_synchronisation():
        merge_and_back(**case, backend="triton")


@each_dtype
def test_merging_in_a_graph_follows_new_data_and_lengths(dtype, generator, as_in_use):
    case = merging_case(generator, [70, 0, 33, 1, 128], 400, dtype)
    replay = captured(lambda: merge_and_back(**case, backend="triton"))
    for lengths in ([3, 150, 0, 90, 20], [0, 0, 1, 0, 0], [80, 80, 80, 80, 80]):
        fresh = merging_case(generator, lengths, 400, dtype)
        expected = defined(fresh, merge_and_back(**fresh, backend="triton"))
        for (_, target), (_, source) in zip(tensors_of(case), tensors_of(fresh), strict=True):
            target.copy_(source)
        for ours, theirs in zip(defined(case, replay()), expected, strict=True):
            assert torch.equal(ours, theirs), lengths


# Triton: scores of tiles, their merge, selection, rows. CUDA C++: alignments, thresholds, selection, offsets, rows.
MOST_LAUNCHES = {"triton": 4, "cuda": 5}
CONVERSIONS = {"triton": 0, "cuda": 2}  # weight and bias of a LayerNorm in 16 bits, to float32


def pruning_case(generator, lengths, capacity, dtype, width=128, entries=100):
    """Arguments of `prune` in a buffer of ``capacity`` rows."""
    x = normal(generator, capacity, width, dtype=dtype)
    return dict(
        x=RaggedBatch(x, offsets(lengths), max(lengths)),
        entering=normal(generator, capacity, width, dtype=dtype),
        dictionary=normal(generator, entries, width, dtype=dtype),
        received=normal(generator, capacity).exp(),
        cls=normal(generator, capacity).exp() / max(lengths),
        temperature=20.0,
        norm=(normal(generator, width, dtype=dtype), normal(generator, width, dtype=dtype), 1e-6),
    )


@each_kernel
@each_dtype
def test_from_scores_to_normalised_rows_in_few_launches(backend, dtype, generator, as_in_use):
    case = pruning_case(generator, [577, 300, 577, 120], 2000, dtype)
    prune(**case, backend=backend)
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        prune(**case, backend=backend)
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    most = MOST_LAUNCHES[backend] + (CONVERSIONS[backend] if dtype != torch.float32 else 0)
    assert len(launched) <= most, launched


@each_kernel
def test_pruning_does_not_wait_for_the_device(backend, generator, as_in_use):
    case = pruning_case(generator, [577, 300, 0, 1, 577, 120], 2000, torch.bfloat16)
    prune(**case, backend=backend)
    with no_synchronisation():
        prune(**case, backend=backend)


# ---- linear layers --------------------------------------------------------------------------------------------------


def linear_case(generator, lengths, capacity, dtype, width=128, columns=384, activation="gelu"):
    """Arguments of `linear` in a buffer of ``capacity`` rows, NaN beyond the last token."""
    spare = capacity - sum(lengths)
    return dict(
        x=spare_rows(normal(generator, sum(lengths), width, dtype=dtype), spare),
        weight=normal(generator, columns, width, dtype=dtype) / width**0.5,
        bias=normal(generator, columns, dtype=dtype),
        cu_seqlens=offsets(lengths),
        activation=activation,
        residual=spare_rows(normal(generator, sum(lengths), columns, dtype=dtype), spare),
    )


def check_linear(case, got):
    rows = total(case)
    exact = {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in case.items()}
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
    expected = linear(**exact, backend="reference")[:rows]
    torch.testing.assert_close(got[:rows].double(), expected, rtol=tolerance, atol=tolerance)


@each_kernel
@each_dtype
@pytest.mark.parametrize("width", [128, 100, 7], ids=lambda width: f"width-{width}")
def test_small_uneven_linear_agrees_with_the_reference(width, backend, dtype, generator):
    """Widths that the copy engine takes, that end inside a tile, and that are not aligned."""
    for columns in (300, 33):
        case = linear_case(generator, [0, 1, 17, 0, 129, 65], 230, dtype, width, columns)
        check_linear(case, linear(**case, backend=backend))


@each_dtype
def test_every_tile_gives_the_same_bits_for_any_number_of_rows(dtype, generator):
    from madtp_kernels.linear import triton as implementation

    # 168 tiles of 128 x 256: on 132 multiprocessors 36 are left, which are taken in halves.
    case = linear_case(generator, [577] * 3, 577 * 6, dtype, 768, 3072) | {"residual": None}
    tiles = implementation._tiles(case["x"], case["weight"])
    tried = tiles + (implementation.tiles.CANDIDATES if tiles is implementation.tiles.COPY_ENGINE else ())
    expected = linear(**case, backend="triton")
    check_linear(case, expected)
    rows = total(case)
    alone = case | {"x": case["x"][5:6], "cu_seqlens": offsets([1])}
    for tile in tried:
        names = ("x", "weight", "bias", "cu_seqlens", "activation", "residual")
        got, single = (implementation._multiply(tile, *(c[name] for name in names)) for c in (case, alone))
        assert torch.equal(got[:rows], expected[:rows]), tile
        assert torch.equal(single, expected[5:6]), tile


@each_kernel
@each_dtype
def test_linear_does_not_wait_for_the_device(backend, dtype, generator, as_in_use):
    case = linear_case(generator, [70, 0, 33, 1], 400, dtype)
    leaves = [case[name].requires_grad_() for name in ("x", "weight", "bias", "residual")]

    def step():
        out = linear(**case, backend=backend)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    step()
    with no_synchronisation():
        gradients = step()
    assert all(gradient.isfinite().all() for gradient in gradients)


@each_kernel
@each_dtype
def test_linear_in_a_graph_follows_new_data_and_lengths(backend, dtype, generator):
    case = linear_case(generator, [70, 0, 33, 1], 400, dtype)
    replay = captured(lambda: linear(**case, backend=backend))
    for lengths in ([3, 150, 0, 90], [0, 0, 1, 0], [100, 100, 100, 100]):
        fresh = linear_case(generator, lengths, 400, dtype)
        for (_, target), (_, source) in zip(tensors_of(case), tensors_of(fresh), strict=True):
            target.copy_(source)
        check_linear(fresh, replay())


# ---- gradients ------------------------------------------------------------------------------------------------------


def pair_case(generator, form, lengths, capacity, dtype, width=128, columns=256):
    """Arguments of `linear_pair` in a buffer of ``capacity`` rows; for "columns" the lengths of one half."""
    lengths = [*lengths, *lengths] if form == "columns" else lengths
    x = spare_rows(normal(generator, sum(lengths), width, dtype=dtype), capacity - sum(lengths))
    parameters = [
        tuple(normal(generator, *shape, dtype=dtype) for _ in range(2)) for shape in ((columns, width), (columns,))
    ]
    return RaggedBatch(x, offsets(lengths), 150, bound=True), *parameters


@pytest.mark.parametrize("form", ["both", "halves", "columns"])
@each_dtype
def test_a_pair_of_layers_has_the_bits_of_two_in_a_graph_too(form, dtype, generator, as_in_use):
    x, weights, biases = pair_case(generator, form, [70, 0, 33, 1], 400, dtype)
    replay = captured(lambda: linear_pair(x, weights, biases, form=form))
    for lengths in ([3, 150, 0, 20], [0, 0, 1, 0], [40, 50, 60, 45]):
        fresh, *_ = pair_case(generator, form, lengths, 400, dtype)
        x.values.copy_(fresh.values), x.cu_seqlens.copy_(fresh.cu_seqlens)
        ours = replay()
        with no_synchronisation():
            linear_pair(x, weights, biases, form=form)
        rows = int(x.cu_seqlens[-1])
        cut = rows if form == "both" else int(x.cu_seqlens[x.batch_size // 2])
        first, second = (
            linear(x.values, *layer, offsets([rows]))[:rows] for layer in zip(weights, biases, strict=True)
        )
        expected = {
            "both": (first, second),
            "halves": (first[:cut], second[cut:]),
            "columns": (first[:cut], second[cut:]),
        }
        expected = torch.cat(expected[form], 1 if form == "columns" else 0)
        assert torch.equal(ours.values[: len(expected)], expected), lengths
        assert int(ours.cu_seqlens[-1]) == len(expected)


@each_dtype
@pytest.mark.parametrize("options", [{}, {"causal": True, "bias": True}], ids=["plain", "causal-bias"])
def test_attention_gradient_does_not_wait_and_agrees(options, dtype, generator, as_in_use):
    lengths = [70, 0, 33, 1, 577, 128]
    case = CASES["attention"](generator, lengths, heads=3, head_dim=64, dtype=dtype, **options)
    leaves = [case[name].requires_grad_() for name in ("q", "k", "v")]
    seeds = normal(generator, *leaves[0].shape, dtype=dtype), normal(generator, 3, sum(lengths))

    def gradients(backend):
        return torch.autograd.grad(attention(**case, backend=backend), leaves, seeds)

    gradients("triton")
    with no_synchronisation():
        ours = gradients("triton")
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    for mine, exact in zip(ours, gradients("reference"), strict=True):
        torch.testing.assert_close(mine, exact, rtol=tolerance, atol=tolerance)
    for mine, again in zip(ours, gradients("triton"), strict=True):
        assert torch.equal(mine, again)


@each_dtype
def test_attention_gradient_in_a_graph_follows_new_data_and_lengths(dtype, generator):
    case = capacity_case("attention", generator, [70, 0, 33, 1, 128], 400, 150, dtype)
    d_out = normal(generator, *case["q"].shape, dtype=dtype)

    def step(case):
        leaves = [case[name].detach().requires_grad_() for name in ("q", "k", "v")]
        out, _ = attention(**case | dict(zip("qkv", leaves, strict=True)), backend="triton")
        return torch.autograd.grad(out, leaves, d_out)

    replay = captured(lambda: step(case))
    for lengths in ([3, 150, 0, 90, 20], [0, 0, 1, 0, 0], [80, 80, 80, 80, 80]):
        fresh = capacity_case("attention", generator, lengths, 400, 150, dtype)
        expected = step(fresh)
        for (_, target), (_, source) in zip(tensors_of(case), tensors_of(fresh), strict=True):
            target.copy_(source)
        for ours, theirs in zip(replay(), expected, strict=True):
            assert torch.equal(ours, theirs), lengths


# ---- whole forwards -------------------------------------------------------------------------------------------------


VISION = VisionConfig(image_size=96, patch_size=16, embed_dim=128, depth=3, num_heads=2, sd_num=20, sd_dim=128)
TEXT = TextConfig(
    hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, vocab_size=200,
    max_position_embeddings=64, encoder_width=128,
)  # fmt: skip
TEMPERATURE = 4.0
BATCH, MOST_WORDS = 3, 20


def small_model(dtype, backend):
    model = NLVR(NLVRConfig(VISION, TEXT, merge_from=1), TEMPERATURE, backend=backend).cuda().to(dtype)
    randomize(model)
    return model.eval()


def pictures(generator, dtype):
    return normal(generator, 2 * BATCH, 3, VISION.image_size, VISION.image_size, dtype=dtype)


def statements(generator, lengths):
    """Word ids in a buffer for ``BATCH`` of the longest statements; the rows that are left over name a word that exists."""
    ids = torch.zeros(BATCH * MOST_WORDS, dtype=torch.int64)
    ids[: sum(lengths)] = torch.randint(1, TEXT.vocab_size, (sum(lengths),), generator=generator)
    return RaggedBatch(ids.cuda(), offsets(lengths), MOST_WORDS)


@each_kernel
@each_dtype
@torch.inference_mode()
def test_vision_blocks_do_not_wait_for_the_device(backend, dtype, generator, as_in_use):
    model = small_model(dtype, backend)
    pixels, pruning = pictures(generator, dtype), MADTP(TEMPERATURE, backend=backend)
    model.visual_encoder(pixels, model.space_dict, pruning)
    with no_synchronisation():
        output = model.visual_encoder(pixels, model.space_dict, pruning)
    assert output.trace[-1].pruned.any()


@each_kernel
@each_dtype
@torch.inference_mode()
def test_vision_blocks_in_a_graph_follow_ragged_input(backend, dtype, generator, as_in_use):
    """The graph is captured for one set of token numbers and replayed with others, in the same buffers."""
    model = small_model(dtype, backend)
    guide, pruning = (model.space_dict, None), MADTP(TEMPERATURE, backend=backend)

    def forward(tokens):
        stream, traces = Tokens.start(tokens), []
        for layer, block in enumerate(model.visual_encoder.blocks):
            stream, trace = block(stream, guide, pruning, layer)
            traces.append(trace)
        return stream.values, stream.cu_seqlens, stream.ids

    capacity, most, width = 130, 50, VISION.embed_dim
    values = normal(generator, capacity, width, dtype=dtype)
    static = RaggedBatch(values, offsets([40, 50, 10, 30]), most)
    replay = captured(lambda: forward(static))
    for lengths in ([37, 37, 37, 10], [5, 0, 50, 1], [12, 13, 14, 15]):
        fresh = RaggedBatch(normal(generator, capacity, width, dtype=dtype), offsets(lengths), most)
        expected, expected_cu, expected_ids = forward(fresh)
        static.values.copy_(fresh.values)
        static.cu_seqlens.copy_(fresh.cu_seqlens)
        ours, cu, ids = replay()
        assert torch.equal(cu, expected_cu)
        rows = int(cu[-1])
        assert torch.equal(ids[:rows], expected_ids[:rows])
        torch.testing.assert_close(ours[:rows], expected[:rows])


@each_kernel
@each_dtype
@torch.inference_mode()
def test_whole_model_does_not_wait_for_the_device(backend, dtype, generator, as_in_use):
    model = small_model(dtype, backend)
    pixels, words = pictures(generator, dtype), statements(generator, [9, 20, 14])
    model(pixels, words)
    with no_synchronisation():
        output = model(pixels, words)
    assert output.logits.isfinite().all()


@each_kernel
@each_dtype
@torch.inference_mode()
def test_whole_model_in_a_graph_follows_new_pairs(backend, dtype, generator, as_in_use):
    model = small_model(dtype, backend)
    pixels, words = pictures(generator, dtype), statements(generator, [9, 20, 14])
    replay = captured(lambda: model(pixels, words))
    for lengths in ([20, 20, 20], [1, 7, 13]):
        other_pixels, other_words = pictures(generator, dtype), statements(generator, lengths)
        expected = model(other_pixels, other_words)
        pixels.copy_(other_pixels)
        words.values.copy_(other_words.values)
        words.cu_seqlens.copy_(other_words.cu_seqlens)
        output = replay()
        torch.testing.assert_close(output.logits, expected.logits)
        for ours, theirs in zip(output.vision + output.text, expected.vision + expected.text, strict=True):
            assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)


@torch.inference_mode()
def test_a_recording_runs_beside_itself_and_gives_the_same_bits(generator, monkeypatch, as_in_use):
    """Projections, keys and values are recorded on a second stream; a recording on one stream writes the same."""
    model = small_model(torch.bfloat16, None)
    pixels, words = pictures(generator, torch.bfloat16), statements(generator, [9, 20, 14])
    works = []
    monkeypatch.setattr(layers, "beside", lambda x, work: works.append(x) or beside.beside(x, work))
    both = captured(lambda: model(pixels, words))().logits.clone()
    assert len(works) > 2, "nothing ran beside anything"
    for module in (beside, layers):
        monkeypatch.setattr(module, "recorded", lambda x: False)
    assert torch.equal(both, captured(lambda: model(pixels, words))().logits)


@each_kernel
@torch.inference_mode()
def test_whole_model_agrees_with_the_reference(backend, generator, as_in_use):
    model = small_model(torch.float32, backend)
    pixels, words = pictures(generator, torch.float32), statements(generator, [9, 20, 14])
    ours = model(pixels, words)
    model.backend = "reference"
    exact = model(pixels, words)
    for a, b in zip(ours.vision + ours.text, exact.vision + exact.text, strict=True):
        assert torch.equal(a.cu_seqlens, b.cu_seqlens)
    torch.testing.assert_close(ours.logits, exact.logits, rtol=1e-3, atol=1e-3)


@each_dtype
@torch.inference_mode()
def test_both_images_at_once_as_one_after_the_other(dtype, generator, as_in_use):
    """The text encoder splits the images itself where a module is watched."""
    model = small_model(dtype, None)
    pixels, words = pictures(generator, dtype), statements(generator, [9, 20, 14])
    at_once = model(pixels, words)
    handle = model.text_encoder.encoder.layer[0].crossattention.self1.kv.register_forward_hook(lambda *_: None)
    assert not model.text_encoder._serves_both_at_once(at_once.image_embeds)
    apart = model(pixels, words)
    handle.remove()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(at_once.logits, apart.logits, rtol=tolerance, atol=tolerance)


@each_dtype
@pytest.mark.parametrize(
    "limit", [{"shares": (0.2,)}, {"thresholds": (0.5,)}, {"thresholds": (0.5,), "second_look": 1.0}]
)
@torch.inference_mode()
def test_ranked_novelty_in_a_graph_is_what_runs_eagerly(limit, dtype, generator, as_in_use):
    model = small_model(dtype, None)
    model.pruning = RankedNovelty(**limit)
    for count in (4, 4, 4, 8, 8, 8):
        inputs = pairs_of(generator, dtype, lengths_of(generator, count))
        ours, theirs = graphs.run(model, *inputs), model(*inputs)
        assert torch.equal(ours.logits, theirs.logits)
        for a, b in zip(ours.vision, theirs.vision, strict=True):
            assert torch.equal(a.cu_seqlens, b.cu_seqlens)
        assert bool(theirs.vision[-1].pruned.any())
    assert len(model.graphs) == 2


# ---- graphs of the product ------------------------------------------------------------------------------------------


def pairs_of(generator, dtype, lengths, most=32):
    """Pixels and words of as many pairs. The words lie in the buffer of a bucket, so eager runs take the same path."""
    ids = torch.zeros(len(lengths) * most, dtype=torch.int64)
    ids[: sum(lengths)] = torch.randint(1, TEXT.vocab_size, (sum(lengths),), generator=generator)
    pixels = normal(generator, 2 * len(lengths), 3, VISION.image_size, VISION.image_size, dtype=dtype)
    return pixels, RaggedBatch(ids.cuda(), offsets(lengths), most, bound=True)


def lengths_of(generator, count):
    return torch.randint(1, 33, (count,), generator=generator).tolist()


@each_kernel
@each_dtype
@torch.inference_mode()
def test_full_buckets_replay_what_runs_eagerly_bit_by_bit(backend, dtype, generator, as_in_use):
    model = small_model(dtype, backend)
    for temperature in (0.0, TEMPERATURE, 16.0):
        model.temperature = temperature
        for count in (4, 1, 8, 2, 4, 12, 8, 1, 4, 2, 12, 4):
            inputs = pairs_of(generator, dtype, lengths_of(generator, count))
            ours, theirs = graphs.run(model, *inputs), model(*inputs)
            assert torch.equal(ours.logits, theirs.logits)
            for a, b in zip(ours.vision + ours.text, theirs.vision + theirs.text, strict=True):
                assert torch.equal(a.cu_seqlens, b.cu_seqlens)
                rows = int(b.cu_seqlens[-1])
                assert torch.equal(a.ids[:rows], b.ids[:rows])
        assert bool(theirs.vision[-1].pruned.any()) == (temperature > 0)
    assert len(model.graphs) == 15


@each_kernel
@pytest.mark.parametrize("name, method", test_graphs.CALLS, ids=lambda part: part.replace(", ", "-"))
@torch.inference_mode()
def test_every_task_replays_any_batch(name, method, backend, generator, as_in_use):
    """Buckets that are filled up, in float32: other rows of a product may round differently, kept tokens stay the same."""
    model = test_graphs.make(name, recorder=graphs.CudaRecorder).cuda()
    model.backend = backend
    data = test_graphs.draw(generator)
    call = test_graphs.bound(model, method)
    for count in (3, 4, 3, 4, 3, 5, 7, 6, 4, 1, 11, 9, 10, 1, 3):
        numbers = torch.randperm(test_graphs.COUNT, generator=generator)[:count].tolist()
        inputs = test_graphs.inputs_of(name, method, data, numbers)
        test_graphs.check_same(graphs.run(call, *inputs), call(*inputs), tolerance=1e-4)
    assert 4 <= len(model.graphs) <= 6


@each_kernel
@each_dtype
@torch.inference_mode()
def test_a_replay_does_not_wait_for_the_device(backend, dtype, generator, as_in_use):
    model = small_model(dtype, backend)
    batches = [pairs_of(generator, dtype, lengths_of(generator, count)) for count in (3, 4, 4, 3, 4, 3)]
    for inputs in batches:
        graphs.run(model, *inputs)
    assert len(model.graphs) == 2
    with no_synchronisation():
        results = [graphs.run(model, *inputs) for inputs in batches]
    for ours, inputs in zip(results, batches, strict=True):
        torch.testing.assert_close(ours.logits, model(*inputs).logits, rtol=2e-2, atol=2e-2)


@torch.inference_mode()
def test_replays_on_several_streams_do_not_mix(generator, as_in_use):
    model = small_model(torch.float32, None)
    batches = [pairs_of(generator, torch.float32, lengths_of(generator, count)) for count in (4, 8) * 10]
    expected = [model(*inputs).logits for inputs in batches]
    for inputs in batches[:4]:
        graphs.run(model, *inputs)
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in range(3)], []
    for number, inputs in enumerate(batches):
        with torch.cuda.stream(streams[number % 3]):
            results.append(graphs.run(model, *inputs).logits)
    torch.cuda.synchronize()
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


@torch.inference_mode()
def test_graphs_share_memory_and_give_it_back(generator, as_in_use):
    model = small_model(torch.bfloat16, None)
    model.graphs.limit = 3
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    reserved = []
    for _ in range(3):
        held = []
        for count in (64, 64, 48, 48, 32, 32, 24, 24, 16, 16, 64, 64):
            graphs.run(model, *pairs_of(generator, torch.bfloat16, lengths_of(generator, count)))
            held.append(model.graphs.bytes)
        assert len(model.graphs) == 3
        assert held[1] > 0
        assert held[-1] <= 4 * held[1], "smaller batches, and the same one again, find most of their memory in the pool"
        model.graphs.clear()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert model.graphs.bytes == 0
        reserved.append(torch.cuda.memory_reserved())
    # The first round leaves workspaces of cuBLAS behind, one for each stream that was ever used.
    assert reserved[1:] == reserved[:1] * 2


@torch.inference_mode()
def test_a_forward_that_waits_is_not_recorded_and_harms_nothing(generator, as_in_use, caplog):
    """The reference reads offsets on the host. A recording that fails would break the allocator and random numbers."""
    graphs._log_once.cache_clear()
    model = small_model(torch.float32, "reference")
    inputs = pairs_of(generator, torch.float32, [9, 20, 14, 5])
    expected = model(*inputs).logits
    with caplog.at_level(logging.WARNING, "madtp"):
        for _ in range(3):
            assert torch.equal(graphs.run(model, *inputs).logits, expected)
    (record,) = caplog.records
    assert "it waits for the device at" in record.message and len(model.graphs) == 0
    torch.cuda.empty_cache()
    torch.randn(3, device="cuda")
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        model.capture(*inputs)
    model.backend = None
    for _ in range(3):
        ours = graphs.run(model, *inputs).logits
    assert len(model.graphs) == 1
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@each_dtype
@torch.inference_mode()
def test_capture_by_hand_follows_new_pairs_and_written_weights(dtype, generator, as_in_use):
    model = small_model(dtype, None)
    torch.cuda.synchronize()
    captured = model.capture(*pairs_of(generator, dtype, [9, 20, 14]), pruning=16.0)
    for _ in range(3):
        inputs = pairs_of(generator, dtype, lengths_of(generator, 3))
        expected = model(*inputs, pruning=16.0)
        with no_synchronisation():
            output = captured(*inputs)
        assert torch.equal(output.logits, expected.logits)
    for weights in (model.cls_head[0].weight, model.visual_encoder.blocks[0].attn.qkv.weight, model.space_dict):
        weights.mul_(0.9)
        assert torch.equal(captured(*inputs).logits, model(*inputs, pruning=16.0).logits)
    model.cls_head[0].weight = torch.nn.Parameter(model.cls_head[0].weight.clone())
    with pytest.raises(ValueError, match="weights have been replaced"):
        captured(*inputs)


@torch.inference_mode()
def test_a_pool_outlives_its_graphs(generator, as_in_use):
    model = small_model(torch.float32, None)
    for count in (2, 3, 2):
        inputs = pairs_of(generator, torch.float32, lengths_of(generator, count))
        assert torch.equal(model.capture(*inputs)(*inputs).logits, model(*inputs).logits)
