"""What one program of a Triton kernel may owe to another one of its launch: nothing. Through the interpreter, which runs them one
after the other, the last goes first here; a buffer that one program reads and another writes would show. And what launches owe to
each other: a kernel that comes early waits."""

import ast
import types
from pathlib import Path

import pytest
import torch
from helpers import CASES, DEVICE, OPERATIONS, flat, normal, offsets, with_spare_rows

from madtp_kernels import (
    RaggedBatch,
    layer_norm,
    linear,
    linear_pair,
    merge_tokens,
    repeats,
    unmerge,
)
from madtp_kernels.merge_redundant import _on_gpu as merge_on_gpu
from madtp_kernels.prune import _on_gpu as prune_on_gpu

interpreter = pytest.importorskip("triton.runtime.interpreter")
pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU runs programs in its own order")

LENGTHS, SPARE = [5, 0, 1, 20, 2], 3
LONG = [3, 70, 0, 2]  # more than one block of tokens


@pytest.fixture
def backwards(monkeypatch):
    """A call that runs something with the order of programs turned round."""
    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def call(function):
        with monkeypatch.context() as reverse:
            reverse.setattr(builder, "set_grid_idx", lambda x, y, z: place(builder.grid_dim[0] - 1 - x, y, z))
            return function()

    return call


def defined(results):
    """Every tensor without its rows beyond the last token, which are NaN or the largest integer."""
    return [t.nan_to_num(7) if t.is_floating_point() else t for t in results]


@pytest.mark.parametrize("op", OPERATIONS)
def test_operations(op, backwards, generator):
    options = {
        "compact": {"sizes": True, "norm": True},
        "novelty": {"rank": True},
        "attention_importance": {"bias": True},
    }
    case = with_spare_rows(CASES[op](generator, LENGTHS, **options.get(op, {})), SPARE)
    call = lambda: defined(flat(op, OPERATIONS[op](**case, backend="triton")))
    for ours, theirs in zip(backwards(call), call(), strict=True):
        assert torch.equal(ours, theirs)


def test_forms_of_several_launches(backwards, generator, monkeypatch):
    """As they are where a device has many multiprocessors, and where groups of samples keep equally many tokens."""
    from madtp_kernels.importance import triton as importance
    from madtp_kernels.scoring import triton as scoring

    monkeypatch.setattr(importance, "multiprocessors", lambda tensor: 1000)
    monkeypatch.setattr(scoring, "_one_launch", lambda *sizes: False)
    for op, options in [
        ("attention_importance", {}),
        ("score_tokens", {}),
        ("compact", {"groups": True, "sizes": True}),
    ]:
        case = CASES[op](generator, LONG, **options)
        call = lambda op=op, case=case: defined(flat(op, OPERATIONS[op](**case, backend="triton")))
        for ours, theirs in zip(backwards(call), call(), strict=True):
            assert torch.equal(ours, theirs), op


@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["one tile", "more"])
@pytest.mark.parametrize("multiprocessors", [1, 1000])
def test_what_follows_attention(lengths, multiprocessors, backwards, generator, monkeypatch):
    """The launches of repeated calls, which hand on what is placed and listed, by the form for few and for many programs."""
    from madtp_kernels.compaction import triton as compaction
    from madtp_kernels.merging import triton as merging
    from madtp_kernels.scoring import triton as scoring
    from madtp_kernels.similarity import triton as similarity

    for module in (compaction, scoring):
        monkeypatch.setattr(module, "multiprocessors", lambda tensor: multiprocessors)
    tokens, capacity, cu, longest = sum(lengths), sum(lengths) + SPARE, offsets(lengths), max(lengths)
    x, order, received = normal(generator, capacity, 32), *normal(generator, 2, capacity).abs()
    ids, weight, dictionary = torch.arange(capacity).int(), normal(generator, 32), normal(generator, 6, 32) / 32
    for tensor in (x, order, received):
        tensor[tokens:] = float("nan")

    def run(operation, steps, *arguments):
        return operation(*(repeats.Prepared(step.prepare) for step in steps), *arguments)

    def call():
        tensors = (x, x, dictionary, None, received, order, cu, None, None, None, ids, order, weight, weight)
        pruned, importance, threshold = run(
            prune_on_gpu, (scoring.score_tokens, compaction.compact), tensors, longest, 1.0, -1, 1e-6, False, None
        )  # fmt: skip
        steps = (similarity.find_redundant, merging.choose_redundant, similarity.find_kept, merging.merge_redundant)
        tensors = (x, x, order, None, order, ids, None, cu, weight, weight)
        choice = (None, 0.5, 0.3, None, 1)
        merged, scores, *more = run(
            merge_on_gpu, steps, tensors, (ids,), None, longest, (0.25, 1.0, 0.3), choice, 1e-6, True, False
        )
        left = merged.tokens
        return defined([
            pruned.tokens.values, pruned.tokens.cu_seqlens, pruned.ids, pruned.sizes, pruned.normed, importance, threshold,
            left.values, left.cu_seqlens, merged.sizes, merged.rows, merged.source, *merged.carried, scores, *more,
        ])  # fmt: skip

    ours, theirs = backwards(call), call()
    assert theirs[1][-1] < tokens and theirs[8][-1] < tokens
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_linear_that_ends_with_halves_of_tiles(backwards, generator, monkeypatch):
    from madtp_kernels.linear import triton as implementation

    monkeypatch.setattr(implementation, "multiprocessors", lambda tensor: 4)
    tile = implementation.Tile(16, 32, 16, 4, 2, 1, halves=True)
    rows = sum(LONG) + SPARE  # in 5 blocks, hence 10 tiles: two whole ones for each program, then a half
    x, weight, residual = (normal(generator, *shape) for shape in ((rows, 16), (40, 16), (rows, 40)))
    call = lambda: defined([implementation._multiply(tile, x, weight, None, offsets(LONG), "", residual)])
    assert torch.equal(*backwards(call), *call())


def test_rows_and_layers(backwards, generator):
    tokens = sum(LONG)
    x = RaggedBatch(normal(generator, tokens + SPARE, 16), offsets(LONG), 70, bound=True)
    weights, biases = ([normal(generator, *shape) for _ in range(2)] for shape in ((24, 16), (24,)))
    into = torch.arange(tokens + SPARE, dtype=torch.int32)
    into[4:63:2], into[63:68], into[1] = 3, -1, 0

    def call():
        merged = merge_tokens(x, into, append="mean", carry=(into,), exact=False, backend="triton")
        pair = linear_pair(x, weights, biases, form="both", backend="triton")
        return defined([
            merged.tokens.values, merged.tokens.cu_seqlens, merged.sizes, merged.rows, merged.source, *merged.carried, pair.values,
            pair.cu_seqlens,
            linear(x.values, weights[0], biases[0], x.cu_seqlens, activation="gelu", backend="triton"),
            layer_norm(x.values, biases[0][:16], None, x.cu_seqlens, backend="triton"),
            unmerge(merged.tokens.values, merged.rows, x.cu_seqlens, backend="triton"),
        ])  # fmt: skip

    for ours, theirs in zip(backwards(call), call(), strict=True):
        assert torch.equal(ours, theirs)


# ---- launches that overlap ----------------------------------------------------------------------------------------------


def test_every_kernel_waits_first_for_the_one_before():
    """A kernel that is launched early may touch no memory before it has waited, not even its offsets."""
    import madtp_kernels

    number = 0
    for path in sorted(Path(madtp_kernels.__file__).parent.glob("*/triton.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                first = node.body[1] if ast.get_docstring(node) else node.body[0]
                assert ast.unparse(first) == "after_previous()", f"{path}: {node.name}"
                number += 1
    assert number > 20


class Launcher:
    """Stands in for Triton's: says how it was called."""

    def __init__(self):
        self.launch_pdl = False

    def __call__(self, *args):
        return self.launch_pdl


@pytest.mark.parametrize("arch, overlap", [(80, False), (90, True), (100, True)])
def test_only_short_launches_overlap_and_only_where_kernels_wait(arch, overlap):
    from madtp_kernels import triton_utils

    metadata = types.SimpleNamespace(target=types.SimpleNamespace(arch=arch))
    long, short = triton_utils._runs(types.SimpleNamespace(run=Launcher(), metadata=metadata))
    assert (long(), short()) == (False, overlap)
    of_another_kind = types.SimpleNamespace(run=len, metadata=metadata)
    assert triton_utils._runs(of_another_kind) == (len, len)
