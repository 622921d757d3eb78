"""The CUDA sources on a machine without a GPU: nvcc compiles them, and they run in `cuda_emulator` on the CPU.

The emulator (see `cuda_emulator/cuda_runtime.h`) executes the very sources, launchers and tensor code included,
thread by thread, and reports accesses out of bounds, misaligned ones and barriers that not all threads reach. It
cannot show speed, nor the instructions that the sources name: of the tensor cores' products and the asynchronous
copies it executes the documented meaning. On a machine with a GPU the other test files run the "cuda" backend.
"""

import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sysconfig
from pathlib import Path

import pytest
import test_conformance
import torch
from conftest import GOLDEN
from helpers import (
    CASES,
    OPERATIONS,
    attention_case,
    compaction_case,
    importance_case,
    run,
    scoring_case,
    take_samples,
    with_spare_rows,
)
from test_properties import check_attention, check_compaction, check_importance, check_scores
from torch.utils import cpp_extension

from madtp_kernels import RaggedBatch, backends, build

SOURCES = sorted((build.source_dir() / "cuda").glob("*.cu"))
HEADERS = [*(build.source_dir() / "cuda").glob("*.cuh"), build.source_dir() / "cuda" / "ops.h"]
EMULATOR = Path(__file__).parent / "cuda_emulator"
NVCC = build.find_nvcc()
MODULE = "cuda_emulated"
STATIC_SHARED_BYTES = 48 * 1024  # what a block may have without asking for more

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
FOUR = ["attention", "attention_importance", "score_tokens", "compact"]
every_operation = pytest.mark.parametrize("op", FOUR)


# ---- compilation ----------------------------------------------------------------------------------------


def test_there_are_sources_of_every_operation():
    assert [source.stem for source in SOURCES] == ["attention", "compaction", "importance", "scoring"]


@pytest.mark.parametrize("source", [*SOURCES, *HEADERS], ids=lambda path: path.name)
def test_free_of_torch(source):
    """So that nvcc compiles them on a machine whose torch has no CUDA headers."""
    included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source.read_text(), re.MULTILINE)
    assert not [name for name in included if re.match(r"torch|ATen|c10|pybind11|cuda/dispatch", name)]


def architectures():
    """Those of the build that this nvcc knows."""
    listed = subprocess.run([NVCC.path, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return [number for number in build.CUDA_ARCHITECTURES if f"compute_{number}" in listed.stdout.split()]


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nvcc_compiles_without_spills(source, tmp_path):
    """For every architecture, without warnings, register spills or stack frames, in static shared memory."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures()]
    flags = ["-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{build.source_dir()}"]
    # The emulator's compiler has seen what runs on the host.
    command = [NVCC.path, *flags, *targets, "-fatbin", source, "-o", tmp_path / "kernels.fatbin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = done.stderr.split("Compiling entry function ")[1:]
    assert {int(re.search(r"for 'sm_(\d+)'", kernel)[1]) for kernel in kernels} == set(architectures())
    for kernel in kernels:
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in kernel, kernel
        shared = re.search(r"(\d+) bytes smem", kernel)
        assert shared is None or int(shared[1]) <= STATIC_SHARED_BYTES, kernel


# ---- execution ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The extension module with the four operations, compiled for the emulator."""
    try:
        compiler = build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("cuda_emulator")
    includes = [f"-I{EMULATOR}", f"-I{build.source_dir()}"]
    for path in (*cpp_extension.include_paths(), sysconfig.get_path("include")):
        includes += ["-isystem", path]
    # Jumps between stacks look like mistakes to fortified functions.
    flags = ["-U_FORTIFY_SOURCE", "-std=c++20", "-fPIC", "-g1"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", f"-DMODULE_NAME={MODULE}"]
    # Whatever would corrupt memory or trap on a GPU has to raise here.
    kernel_flags = ["-O2", "-fno-strict-aliasing", "-x", "c++"]
    kernel_flags += ["-fsanitize=bounds,alignment,null,shift,signed-integer-overflow,integer-divide-by-zero"]

    def compiled(source):
        result = folder / f"{source.name}.o"
        own = kernel_flags if source.suffix == ".cu" else []
        subprocess.run([*compiler, *flags, *own, *includes, "-c", source, "-o", result], check=True)
        return result

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compiled, [*sorted(EMULATOR.glob("*.cpp")), *SOURCES]))
    library = folder / f"{MODULE}.so"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += [f"-l{name}" for name in ("torch_python", "torch", "torch_cpu", "c10")]
    subprocess.run([*compiler, "-shared", *objects, *libraries, "-o", library], check=True)
    specification = importlib.util.spec_from_file_location(MODULE, library)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def at_the_end_of_memory(value):
    """A copy with the same strides and alignment whose last element is the last of the allocation."""
    if not torch.is_tensor(value) or value.numel() == 0:
        return value
    before = value.storage_offset() % (16 // value.element_size())
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    buffer = value.new_empty(before + extent)
    return buffer.as_strided(value.shape, value.stride(), before).copy_(value)


@pytest.fixture
def cuda(emulated, monkeypatch):
    """The "cuda" backend on CPU tensors; an access beyond one of them raises. Returns the emulator."""
    resolve = backends.resolve

    def resolve_emulated(op, package, requested, leading, cuda_lacks=None):
        if requested != "cuda" or cuda_lacks:
            return resolve(op, package, requested, leading, cuda_lacks)

        def implementation(*arguments):
            emulated.guard_allocations(True)
            try:
                return getattr(emulated, op)(*map(at_the_end_of_memory, arguments))
            finally:
                emulated.guard_allocations(False)

        return "cuda", implementation

    monkeypatch.setattr(backends, "resolve", resolve_emulated)
    yield emulated
    emulated.set_order(0)


# Blocks take 64 tokens: lengths around that, empty samples, single tokens.
LENGTHS = [5, 0, 1, 66, 130, 2]
TWO_BLOCKS = [5, 0, 1, 66, 2]


@every_dtype
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (2, 40), (1, 3), (5, 1), (2, 100), (1, 256)])
@pytest.mark.parametrize("causal, bias", [(False, False), (True, True)], ids=["plain", "causal-bias"])
def test_attention_and_importance(heads, head_dim, causal, bias, dtype, cuda, generator):
    options = {"causal": causal, "bias": bias, "gain": 2.0}
    lengths = LENGTHS if heads * head_dim < 100 else TWO_BLOCKS
    check_attention(attention_case(generator, lengths, heads, head_dim, dtype, **options), "cuda")
    check_importance(importance_case(generator, lengths, heads, head_dim, dtype, **options), "cuda")


@every_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])
def test_cross_attention(causal, dtype, cuda, generator):
    """More keys than queries, fewer, none; under the causal mask some queries see no key."""
    lengths, key_lengths = [3, 70, 65, 0, 7, 1], [70, 5, 64, 9, 0, 130]
    options = {"key_lengths": key_lengths, "causal": causal, "bias": True}
    check_attention(attention_case(generator, lengths, 2, 64, dtype, **options), "cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v", "key_bias"])
def test_bad_values_are_as_bad_as_the_reference_says(name, value, cuda, generator):
    """A maximum that drops a NaN, or a NaN taken for no key, would give plausible scores."""
    case = attention_case(generator, [5, 70], 3, 16, bias=True)
    case[name] = case[name].clone()
    case[name][(40, 1, 2) if case[name].dim() == 3 else 40] = value
    found = {backend: run("attention", case, backend) for backend in ("cuda", "reference")}
    for ours, expected in zip(found["cuda"], found["reference"], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5, equal_nan=True)
    out, lse = found["reference"]
    whole = {n: case[n] for n in ("q", "k", "key_bias")} | {"out": out, "lse": lse}
    whole |= {"cu_seqlens": case["cu_seqlens_q"], "max_seqlen": 70}
    for ours, expected in zip(
        *(run("attention_importance", whole, backend) for backend in ("cuda", "reference")), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_queries_that_see_no_key_give_no_importance(cuda, generator):
    case = attention_case(generator, [3, 70], 2, 16, bias=True)
    case["key_bias"][:3] = -float("inf")
    out, lse = run("attention", case, "cuda")
    assert (out[:3] == 0).all() and (lse[:, :3] == -float("inf")).all()
    whole = {n: case[n] for n in ("q", "k", "key_bias")} | {"out": out, "lse": lse}
    received, cls = run("attention_importance", whole | {"cu_seqlens": case["cu_seqlens_q"], "max_seqlen": 70}, "cuda")
    assert (received[:3] == 0).all() and (cls[:3] == 0).all() and (received[4:] > 0).all()


def test_importance_of_more_query_blocks_than_shares(cuda, generator):
    check_importance(importance_case(generator, [1100], 1, 8, torch.bfloat16), "cuda")
    check_importance(importance_case(generator, [1100], 1, 8, torch.bfloat16, causal=True), "cuda")


@every_dtype
@pytest.mark.parametrize("width, entries", [(64, 5), (40, 128), (3, 1), (100, 129), (96, 300)])
@pytest.mark.parametrize("temperature, bias", [(1.0, False), (0.05, True)], ids=["plain", "sharp-bias"])
def test_scores(width, entries, temperature, bias, dtype, cuda, generator):
    options = {"temperature": temperature, "bias": bias}
    check_scores(scoring_case(generator, LENGTHS, width, entries, dtype, **options), "cuda")


def test_the_smallest_temperature_there_may_be(cuda, generator):
    smallest = torch.finfo(torch.float32).tiny
    importance, threshold = run("score_tokens", scoring_case(generator, LENGTHS, temperature=smallest), "cuda")
    assert importance.isfinite().all() and threshold.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name, entries", [("x", 5), ("dictionary", 5), ("dictionary", 130), ("bias", 5)])
def test_scores_are_no_number_where_the_reference_has_none(name, entries, value, cuda, generator):
    case = scoring_case(generator, [20, 150], 16, entries, bias=True)
    case[name] = case[name].clone()
    case[name][2 if name in ("dictionary", "bias") else 90] = value
    for ours, expected in zip(*(run("score_tokens", case, backend) for backend in ("cuda", "reference")), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4, equal_nan=True)


OPTIONS = "by_count groups protected min_keep ids sizes norm".split()


@every_dtype
@pytest.mark.parametrize("width", [40, 3])
@pytest.mark.parametrize("chosen", [*OPTIONS, "", "ties", " ".join(OPTIONS), "groups protected ties sizes"])
def test_compaction(width, chosen, dtype, cuda, generator):
    options = dict.fromkeys(chosen.split(), True)
    lengths = [*LENGTHS, 3, 300]
    for exact in (True, False):
        check_compaction(compaction_case(generator, lengths, width, dtype, exact=exact, **options), "cuda")


@every_dtype
def test_compaction_of_wide_rows_and_of_many_samples(dtype, cuda, generator):
    check_compaction(compaction_case(generator, [20, 9], 1104, dtype, norm=True, sizes=True), "cuda")
    check_compaction(compaction_case(generator, [2, 0, 1, 5] * 65, 8, dtype, groups=True), "cuda")


def test_compaction_ranks_any_scores(cuda, generator):
    """Negative, equal, and the two zeros, which are equal too."""
    scores = torch.tensor([9.0, -0.0, 0.0, -1.0, 0.0, -0.0, -2.0, -1e-40, 1e-40, -1.0])
    for keep in range(1, 8):
        case = compaction_case(generator, [10], 8, by_count=True)
        case |= {"importance": scores, "keep_count": torch.tensor([keep], dtype=torch.int32)}
        check_compaction(case, "cuda")


@every_operation
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1], [1, 0, 1]], ids=str)
def test_batches_with_nothing_to_do(op, lengths, cuda, generator):
    case = CASES[op](generator, lengths)
    for ours, expected in zip(run(op, case, "cuda"), run(op, case, "reference"), strict=True):
        torch.testing.assert_close(ours, expected)


def optional_of(op):
    return OPTIONS[1:] if op == "compact" else ["bias"]


def full_case(op, generator, lengths, dtype=torch.float32):
    return CASES[op](generator, lengths, dtype=dtype, **dict.fromkeys(optional_of(op), True))


def same(results, others):
    return all(torch.equal(a, b) for a, b in zip(results, others, strict=True))


@every_dtype
@every_operation
def test_no_row_beyond_the_last_sample_is_read_or_written(op, dtype, cuda, generator):
    """Spare rows are NaN on input and stay as allocated on output. The length bound need not be tight."""
    case = full_case(op, generator, LENGTHS, dtype)
    wide = with_spare_rows(case, 70)
    for name, value in wide.items():
        if name.startswith("max_seqlen"):
            wide[name] = value + 1000
        elif isinstance(value, RaggedBatch):
            wide[name] = RaggedBatch(value.values, value.cu_seqlens, value.max_seqlen + 1000)
    if op == "compact":
        wide["exact"] = case["exact"] = False
    assert same(run(op, wide, "cuda"), run(op, case, "cuda"))
    rows = sum(LENGTHS)
    results = OPERATIONS[op](**wide, backend="cuda")
    if op == "compact":
        rows = int(results.tokens.cu_seqlens[-1])
        spare = [t[rows:] for t in (results.tokens.values, results.sizes, results.normed)]
        assert (results.ids[rows:] == torch.iinfo(torch.int32).max).all()
    else:
        per_token = results[:1] if op == "score_tokens" else results
        spare = [t[:, rows:] if op == "attention" and t.dim() == 2 else t[rows:] for t in per_token]
    assert all(t.isnan().all() and t.numel() for t in spare)


@every_dtype
@every_operation
def test_strided_and_misaligned_views(op, dtype, cuda, generator):
    """Views into a larger buffer, also such that rows cannot be read 16 bytes at a time."""
    case = full_case(op, generator, LENGTHS, dtype)
    expected = run(op, case, "cuda")
    for before, between in ((0, 24), (8, 16), (1, 7), (3, 0)):

        def view(value, before=before, between=between):
            buffer = value.new_empty(*value.shape[:-1], before + value.shape[-1] + between)
            return buffer[..., before : before + value.shape[-1]].copy_(value)

        viewed = dict(case)
        for name in {"q", "k", "v", "out", "lse", "x", "dictionary"} & set(case):
            ragged = isinstance(case[name], RaggedBatch)
            viewed[name] = case[name].with_values(view(case[name].values)) if ragged else view(case[name])
        results = run(op, viewed, "cuda")
        # The CLS term and merged rows are summed in another order where rows are read element by element.
        if before % 8 == between % 8 == 0:
            assert same(results, expected)
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_interleaved_queries_keys_and_values(cuda, generator):
    """q, k, v as a fused projection leaves them: [T, 3, H, d]."""
    qkv = torch.randn(sum(LENGTHS), 3, 4, 32, generator=generator)
    case = attention_case(generator, LENGTHS, 4, 32)
    case |= dict(zip("qkv", qkv.unbind(1), strict=True))
    check_attention(case, "cuda")


@every_dtype
@every_operation
def test_a_sample_has_the_same_bits_alone_and_in_a_batch(op, dtype, cuda, generator):
    options = {"protected": True, "sizes": True, "norm": True} if op == "compact" else {"bias": True}
    case = CASES[op](generator, LENGTHS, dtype=dtype, **options)
    batch = run(op, take_samples(case, [4, 3, 0]), "cuda")
    alone = [run(op, take_samples(case, [i]), "cuda") for i in (4, 3, 0)]
    for i, together in enumerate(batch):
        if op == "compact" and i == 1:  # the offsets
            continue
        axis = 1 if op == "attention" and i == 1 else 0
        assert torch.equal(together, torch.cat([results[i] for results in alone], axis))


@every_dtype
@every_operation
def test_the_order_in_which_threads_and_blocks_run_does_not_matter(op, dtype, cuda, generator):
    """A missing barrier, or a sum in the order of arrival, would show."""
    cases = [full_case(op, generator, [70, 3, 135], dtype)]
    if op == "compact":
        cases.append(compaction_case(generator, [70, 3, 300], 40, dtype, by_count=True))
    for case in cases:
        expected = run(op, case, "cuda")
        for order in (1, 2, 3):
            cuda.set_order(order)
            assert same(run(op, case, "cuda"), expected)
        cuda.set_order(0)


@pytest.mark.parametrize("family, check", [
    ("unit", test_conformance.test_reduction_rule),
    ("vit_a", test_conformance.test_vision_transformer),
    ("nlvr_4l", test_conformance.test_nlvr),
])  # fmt: skip
def test_official_results(family, check, cuda):
    """Kept tokens and numbers of the official code, checked as for the other backends."""
    check(GOLDEN / family, "cuda", *(["pair"] if family.startswith("nlvr") else []))


def test_the_emulator_reports_what_a_gpu_would_not(emulated):
    """An access beyond the end of a tensor, here by offsets that do not fit it."""
    emulated.guard_allocations(True)
    q, cu_seqlens = torch.zeros(4, 1, 8), torch.tensor([0, 600], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="memory that is not allocated"):
        emulated.attention(q, q, q, cu_seqlens, cu_seqlens, 600, 600, 1.0, False, None)
    emulated.guard_allocations(False)
