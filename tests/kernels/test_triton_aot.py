"""Every Triton kernel, compiled ahead of time for sm_80, sm_90 and sm_100 on a machine without a GPU.

The operations are called as usual on CPU tensors of real size, with a stand-in for Triton's driver that names the target and
with launches replaced by compilation: what is compiled is what a GPU would get, specialisations included. Registers, stack
(which is where spilled registers go) and shared memory are read from the machine code.

    python tests/kernels/test_triton_aot.py 90          prints the table for one target
    python tests/kernels/test_triton_aot.py variants    what batches of 1 to 64 compile, without compiling it
    python tests/kernels/test_triton_aot.py keys        how `launch` and Triton tell variants of a kernel apart
    python tests/kernels/test_triton_aot.py launches    which launches go to Triton, and how often a compiled kernel is run directly
    python tests/kernels/test_triton_aot.py repeats     which eager calls repeat an earlier one, and what they run
"""

import collections
import contextlib
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import madtp_kernels

TARGETS = [80, 90, 100]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# 99 KiB is what a block may take on the smallest relatives of these targets (sm_86, sm_89, sm_120).
SHARED_MEMORY = 99 * 1024
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
MATRIX_KERNELS = {
    "_attention_kernel", "_query_gradient_kernel", "_key_gradient_kernel", "_importance_kernel", "_linear_kernel",
    "_pair_kernel", "_score_kernel", "_nearest_kernel", "_received_kernel",
}  # fmt: skip
COPY_INSTRUCTION = "cp.async.bulk.tensor"
# Tiles that the copy engine fetches: on sm_90 and sm_100, where a block may take 227 KiB.
COPY_ENGINE, COPY_ENGINE_MEMORY = "copy engine", 227 * 1024
WIDE_ACCESS = {"_compact_kernel": ("ld.global.v4", "st.global.v4")}
# 8 warps of 128 registers: the assembler likes to stop there, where two programs fit, at the price of a few words of stack.
SPILL_ALLOWANCE = 32  # bytes a thread
# Besides the usual shape, for sm_90: wide heads and rows, more entries than a block; widths that no block divides.
OTHER_SHAPES = [
    {"head_dim": 128, "heads": 4, "width": 1024, "entries": 300},
    {"head_dim": 80, "heads": 3, "width": 1001, "entries": 7},
]


# ---- in the other process: compile and report ----------------------------------------------------------------------------


class Target:
    """Stands in for Triton's CUDA driver as far as compilation asks: which device, and what is it?"""

    def __init__(self, capability):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self.target


@contextlib.contextmanager
def compiling(capability):
    """Launches inside the block compile for the target and do not run; yields the list of (name, compiled kernel)."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled = []
    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel))
        return kernel

    driver.set_active(Target(capability))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = launch


POINTER = re.compile(
    r"(?:tt\.(?:addptr|splat|broadcast|expand_dims|reshape)|ttg\.convert_layout|arith\.select) (%\w+).*!tt\.ptr"
)
ACCESS = re.compile(r"(load|async_copy_global_to_local|store) (%\w+)|\bbarrier\b")


def unordered(ttgir):
    """Arguments of a kernel from which a program may load what another of its threads stored, with no barrier between. Registers are
    followed from an argument to where they are used as an address; branches count as one after the other.
    """
    argument, stored, found = {}, set(), set()
    for line in ttgir.splitlines():
        if "tt.func public" in line:
            argument = {name: name for name in re.findall(r"(%\w+): !tt\.ptr", line)}
            continue
        if "iter_args" in line:
            argument |= {inner: argument.get(outer) for inner, outer in re.findall(r"(%\w+) = (%\w+)[,)]", line)}
        made, right = re.match(r"\s*(?:(%\w+)(?::\d+)? = )?(.*)", line).groups()
        if made:
            derived = POINTER.match(right)
            argument[made] = argument.get(derived[1]) if derived else None
        if access := ACCESS.search(right):
            what, address = access.groups()
            if what is None:
                stored.clear()
            elif what == "store":
                stored.add(argument.get(address))
            elif argument.get(address) in stored - {None}:
                found.add(argument[address][1:])
    return sorted(found)


def sums(ttgir):
    """How what is added up along an axis lies with the threads, for each sum of float32: that and the order of threads make its bits."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", ttgir, re.MULTILINE))
    pattern = (
        r'"tt\.reduce"\([^)]*\) <\{(axis = \d+)[^}]*\}> \(\{((?:(?!tt\.reduce").)*?)\}\) : \((tensor<\w+xf32, [^)]*)\)'
    )
    return [
        f"{axis} of {re.sub(r'#[a-z0-9]+(?![.a-z0-9])', lambda name: layouts[name[0]], summed)}"
        for axis, body, summed in re.findall(pattern, ttgir, re.DOTALL)
        if "arith.addf" in body
    ]


def resources(kernel):
    """Registers, stack and shared memory of a compiled kernel, and how often each instruction of interest occurs."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    ptx = kernel.asm["ptx"]
    order = "".join(re.findall(r"\b([sba])(?:t|ar|tom)\.(?:global|sync)", ptx))  # stores, barriers, atomic operations
    first = re.search(r"griddepcontrol\.wait|\b(?:(?:ld|st|atom|red)\.global|cp\.|prefetch)", ptx)[0]
    words = [*MATRIX_INSTRUCTION.values(), *WIDE_ACCESS["_compact_kernel"], "tf32", COPY_INSTRUCTION]
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": {word: ptx.count(word) for word in words},
        "atomics": order.count("a"),
        "awaited": "sa" not in order,
        "waits_first": first == "griddepcontrol.wait",
        "sums": sums(kernel.asm["ttgir"]),
        "unordered": unordered(kernel.asm["ttgir"]),
        "unordered_without_barriers": unordered(kernel.asm["ttgir"].replace("barrier", "")),
    }


def launches(dtype, capability, tokens=577, heads=12, head_dim=64, width=768, entries=100, *, few=False):
    """Call the operations so that each kernel is launched in each of its variants; yields a label after each call.

    ``few`` leaves variants out that take no more registers than those that stay: of the linear layers there is one for each way
    in which a tile ends, of others the one that takes most (benchmarks/results/triton-kernels.md).
    """
    from madtp_kernels.attention import triton as attention
    from madtp_kernels.compaction import triton as compaction
    from madtp_kernels.importance import triton as importance
    from madtp_kernels.linear import tiles as linear_tiles
    from madtp_kernels.linear import triton as linear
    from madtp_kernels.merging import triton as merging
    from madtp_kernels.normalization import triton as normalization
    from madtp_kernels.received import triton as received
    from madtp_kernels.scoring import triton as scoring
    from madtp_kernels.similarity import triton as similarity
    from madtp_kernels.unmerging import triton as unmerging

    def of(variants, number=1):
        return variants[-number:] if few else variants  # the last one takes most

    cu = torch.tensor([0, tokens], dtype=torch.int32)
    per_token = torch.zeros(tokens)
    q, k, v = torch.zeros(tokens, 3, heads, head_dim, dtype=dtype).unbind(1)
    attention.capability = lambda device: divmod(capability, 10)
    for causal, bias in [(False, None), (True, per_token)]:
        attention.attention(q, k, v, cu, cu, tokens, tokens, 0.125, causal, bias)
        yield "causal, key bias" if causal else "plain"

    out, lse = torch.zeros(tokens, heads, head_dim, dtype=dtype), torch.zeros(heads, tokens)
    attention.attention_backward(
        q, k, v, out, lse, cu, cu, tokens, tokens, 0.125, True, per_token, out, torch.zeros_like(lse)
    )
    yield "causal, key bias"

    linear._copy_engine = lambda device: capability >= 90
    x, weight = torch.zeros(tokens, width, dtype=dtype), torch.zeros(4 * width, width, dtype=dtype)
    hidden = torch.zeros(tokens, 4 * width, dtype=dtype)
    tiles = linear._tiles(x, weight)
    fetched = tiles is linear_tiles.COPY_ENGINE
    more = {tile for tile in linear_tiles.CANDIDATES if tile.stored or tile.halves}
    more |= {entry.tile for entry in linear_tiles.MEASURED.get(capability // 10, ())} - {*tiles}
    every = (*tiles, *sorted(more)) if fetched else tiles
    endings = {(tile.stored, tile.halves): tile for tile in reversed(every)}.values()
    for tile in endings if few else every:
        # Gelu needs most registers, and seconds to compile; with the residual it needs most shared memory where stored.
        activation = "gelu" if tile is tiles[0] or tile.stored or tile.halves else ""
        linear._multiply(tile, x, weight, hidden[0], cu, activation, hidden)
        yield COPY_ENGINE if fetched else f"{tile.rows} x {tile.columns}"
    halves = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    for form, tile in of([("columns", tiles[-1]), ("both", tiles[-1]), ("halves", tiles[0])]):
        linear._pair(tile, fetched, x, weight, weight, hidden[0], hidden[0], halves, form)(
            x, weight, weight, hidden[0], hidden[0], halves, form
        )
        yield COPY_ENGINE if fetched else f"{tile.rows} x {tile.columns}"

    for label, multiprocessors in [("one launch", 1), ("two launches", 1000)]:
        importance.multiprocessors = lambda tensor, count=multiprocessors: count
        importance.attention_importance(q, k, out, lse, cu, tokens, 0.125, False, None)
        yield label

    x, flags = torch.zeros(tokens, width, dtype=dtype), torch.zeros(tokens, dtype=torch.bool)
    for label, *choice in of([
        ("maximum, all options", "max", heads, -1, 5, flags),
        ("mean", "mean", 1, 0, 2**31 - 1, None),
    ]):  # fmt: skip
        bias = per_token if choice[-1] is not None else None
        received.attention_received(q, k, lse, cu, tokens, 0.125, bias is not None, bias, *choice)
        yield label
    for label, rank in of([("against all", None), ("against higher", per_token)]):
        similarity.nearest_kept(x, flags, cu, tokens, None if rank is None else flags, rank)
        similarity.novelty(x, rank, cu, tokens)
        similarity.match_tokens(x, cu, tokens, None if rank is None else cu[:1], 0.5, 1)
        yield label
    similarity.merge_scores(x, per_token, None, per_token, flags, cu, tokens, 0.25, 1.0, 0.3)
    merging.lowest_tokens(per_token, cu[:1], cu, flags, 0.5)
    merging.lowest_tokens(per_token, None, cu, flags, 0.5, 0.5, 1)
    yield "scores of merging"
    best, numbering = (
        torch.zeros(tokens, dtype=torch.int64),
        (per_token.int(),) * 2 + (cu, cu[:1]) + (per_token.int(),) * 2,
    )
    for sizes, free, portion in of([(None, flags, None), (per_token, per_token.int(), 0.5)]):
        similarity.find_redundant(x, per_token, free, cu, tokens)
        limits = (None if portion else 0.5, 0.5, portion, None, 1)
        merging.choose_redundant(
            best, per_token, per_token, sizes, free, None, cu, tokens, (0.25, 1.0, 0.3), *limits
        )  # fmt: skip
        similarity.find_kept(x, per_token, best, *numbering[1:3], cu, tokens)
        norm = (x[0], x[0], 1e-5, True)
        merging.merge_redundant(x, best, numbering, sizes, cu, tokens, False, (per_token.int(),), *norm)
        yield "merging what is redundant" + (", shares" if portion else "")
    normalization.layer_norm(x, x[0], x[0], cu, 1e-5)
    rows = cu[:1].expand(tokens).contiguous()
    merging.merge_tokens(x, rows, per_token, per_token, cu, tokens, "sum", False, (rows, flags, q))
    unmerging.unmerge(x, rows, cu)
    yield "rows"

    dictionary = torch.zeros(entries, width, dtype=dtype)
    scoring.capability = attention.capability
    for label, one_launch, longest in [
        ("one launch", True, tokens), ("two launches", False, tokens), ("two launches, long samples", False, 2000), ("one tile", True, 20),
    ]:  # fmt: skip
        scoring._one_launch = lambda *sizes, choice=one_launch: choice
        for selection, words in of([(None, ""), ((flags, cu[:1]), ", selection")]):
            scoring.score_tokens(x, dictionary, per_token, per_token, cu, longest, 1.0, None, selection)
            yield label + words

    group, protected = torch.zeros(1, dtype=torch.int32), torch.zeros(tokens, dtype=torch.bool)
    norm = torch.zeros(width, dtype=dtype)
    for label, multiprocessors, *options, weight in of([
        ("plain", 1, None, None, None, None, None, None),
        ("LayerNorm", 1, None, None, None, None, None, norm),
        ("all options", 1, protected, group, group, cu[:1].expand(tokens).contiguous(), per_token, norm),
        ("all options, few rows", 1000, protected, group, group, cu[:1].expand(tokens).contiguous(), per_token, norm),
    ], 3):  # fmt: skip
        compaction.multiprocessors = lambda tensor, count=multiprocessors: count
        compaction.compact(
            x, per_token, torch.zeros(1), None, cu, tokens, *options, -1, weight, weight, 1e-6, False
        )  # fmt: skip
        yield label


def variants():
    """For each launch of every operation in batches of 1 to 64: kernel, the constants and options that it is compiled for,
    and what Triton specialises on in its run-time arguments. Nothing is compiled.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from madtp_kernels.attention import triton as attention
    from madtp_kernels.compaction import triton as compaction
    from madtp_kernels.importance import triton as importance
    from madtp_kernels.linear import triton as linear
    from madtp_kernels.merging import triton as merging
    from madtp_kernels.normalization import triton as normalization
    from madtp_kernels.received import triton as received
    from madtp_kernels.scoring import triton as scoring
    from madtp_kernels.similarity import triton as similarity
    from madtp_kernels.unmerging import triton as unmerging

    seen = set()

    def note(self, *args, grid, warmup, **options):
        binder = self.device_caches[0][-1]
        _, specialization, chosen = binder(*args, debug=False, **options)
        constants = [value for kind, value in specialization if kind == "constexpr"]
        found = [(kind, value) for kind, value in specialization if kind != "constexpr"]
        seen.add((self.__name__, str((constants, sorted(chosen.items()), [kind for kind, _ in found])), str(found)))

    driver.set_active(Target(90))
    JITFunction.run = note
    linear._copy_engine, linear._architecture = (lambda device: True), (lambda device: 9)
    for module in (compaction, importance, linear, scoring, normalization):
        module.multiprocessors = lambda tensor: 132
    for batch in (1, 2, 3, 5, 8, 15, 16, 17, 32, 48, 63, 64):
        for dtype, length in [(torch.bfloat16, 577), (torch.float32, 577), (torch.bfloat16, 23)]:
            tokens = batch * length
            cu, group = torch.empty(batch + 1, dtype=torch.int32), torch.empty(batch, dtype=torch.int32)
            x, hidden = torch.empty(tokens, 768, dtype=dtype), torch.empty(tokens, 3072, dtype=dtype)
            weight, dictionary = torch.empty(3072, 768, dtype=dtype), torch.empty(100, 768, dtype=dtype)
            per_token, threshold = torch.empty(tokens), torch.empty(batch)
            q, k, v = torch.empty(tokens, 3, 12, 64, dtype=dtype).unbind(1)
            attention.attention(q, k, v, cu, cu, length, length, 0.125, False, None)
            out, lse = torch.empty(tokens, 12, 64, dtype=dtype), torch.empty(12, tokens)
            importance.attention_importance(q, k, out, lse, cu, length, 0.125, False, None)
            for selection in (None, (None, None)):
                scoring.score_tokens(x, dictionary, per_token, per_token, cu, length, 1.0, None, selection)
            rest = (per_token.int(), None, -1, x[0], x[0], 1e-6, False)
            for groups in (None, group):
                compaction.compact(x, per_token, threshold, None, cu, length, None, groups, None, *rest)
            normalization.layer_norm(x, x[0], x[0], cu, 1e-5)
            linear.linear(x, weight, hidden[0], cu, "gelu", None)
            linear.linear(hidden, weight.view(768, 3072), x[0], cu, "", x)
            twice = torch.empty(2 * batch + 1, dtype=torch.int32)
            for form, offsets in [("both", cu), ("halves", twice), ("columns", twice)]:
                linear.linear_pair(x, weight, weight, hidden[0], hidden[0], offsets, form)
            attention.attention_backward(q, k, v, out, lse, cu, cu, length, length, 0.125, False, None, out, lse)
            received.attention_received(q, k, lse, cu, length, 0.125, False, None, "mean", 1, 0, 1, None)
            flags, rows = torch.empty(tokens, dtype=torch.bool), torch.empty(tokens, dtype=torch.int32)
            similarity.nearest_kept(x, flags, cu, length)
            similarity.nearest_kept(x, flags, cu, length, flags, per_token)
            similarity.novelty(x, None, cu, length)
            similarity.match_tokens(x, cu, length, group, 0.5, 1)
            similarity.merge_scores(x, per_token, None, per_token, flags, cu, length, 0.25, 1.0, 0.3)
            merging.lowest_tokens(per_token, group, cu, flags, 0.5)
            merging.lowest_tokens(per_token, None, cu, flags, 0.5, 0.5, 1)
            similarity.find_redundant(x, per_token, rows, cu, length)
            best, scale = torch.empty(tokens, dtype=torch.int64), torch.empty(tokens)
            limits = ((0.25, 1.0, 0.3), None, 0.5, 0.1, None, 1)
            _, numbering = merging.choose_redundant(best, scale, per_token, per_token, rows, None, cu, length, *limits)
            similarity.find_kept(x, scale, best, *numbering[1:3], cu, length)
            norm = (x[0], x[0], 1e-5, True)
            merging.merge_redundant(x, best, numbering, per_token, cu, length, False, (rows,), *norm)
            merging.merge_tokens(x, rows, per_token, per_token, cu, length, "", False, (rows,))
            merging.merge_tokens(x, rows, per_token, per_token, cu, length, "mean", False, (rows, q))
            unmerging.unmerge(x, rows, cu)
    return sorted(seen)


def keys():
    """For arguments of all kinds: what `launch` and what Triton makes of them, as text."""
    import triton
    from triton.runtime import driver
    from triton.tools.tensor_descriptor import TensorDescriptor

    from madtp_kernels.linear.triton import _linear_kernel as kernel
    from madtp_kernels.triton_utils import specialisation

    driver.set_active(Target(90))
    x = torch.zeros(64, 64, dtype=torch.bfloat16)
    names = kernel.arg_names[:13]
    cu = torch.zeros(9, dtype=torch.int32)
    usual = dict(zip(names, [x, x, x, x[0], x, x, cu, 8, 64, 64, 64, 64, 64], strict=True))
    tensors = [
        None, x, torch.nn.Parameter(x), x[0, 1:], x[0, 8:], x.float(), x.half(), TensorDescriptor.from_tensor(x, [16, 32]),
        TensorDescriptor.from_tensor(x, [32, 16]), TensorDescriptor.from_tensor(x[8:], [16, 32]),
        TensorDescriptor.from_tensor(x.float(), [16, 32]),
    ]  # fmt: skip
    numbers = [-16, -1, 0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, True, 1.0]
    constants = dict.fromkeys(kernel.arg_names[13:], 16) | {"num_warps": 4, "num_stages": 2}
    cases = [(usual | {name: value}, constants) for name in names[:7] for value in tensors]
    cases += [(usual | {name: value}, constants) for name in names[7:] for value in numbers]
    cases += [(usual, constants | {name: 32}) for name in constants]
    found = []
    binder = kernel.device_caches[0][-1]
    for arguments, fixed in cases:
        _, theirs, options = binder(*arguments.values(), debug=False, **fixed)
        found.append(
            (str(specialisation(kernel, tuple(arguments.values()), fixed)), str((theirs, sorted(options.items()))))
        )
    assert triton.knobs.runtime.debug is False
    return found


def direct_launches():
    """After each of some launches of a kernel: whether Triton launched it, and what was handed to a compiled kernel."""
    import triton
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from madtp_kernels import triton_utils
    from madtp_kernels.compaction.triton import _count_kernel as kernel

    by_triton, direct, launch = [], [], JITFunction.run

    def run(self, *args, grid, warmup, **options):
        by_triton.append(grid)
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        compiled._run = lambda *passed: direct.append((id(compiled), passed))
        return compiled

    driver.set_active(Target(90))
    JITFunction.run = triton_utils._RUN = run
    scores, threshold, counts, cu = torch.zeros(12), torch.zeros(4), torch.zeros(4), torch.zeros(5, dtype=torch.int32)
    history = []

    def step(*args, programs=1, **constants):
        by_triton.clear(), direct.clear()
        triton_utils.launch(kernel, programs, *args, counts.int(), cu, **({"BLOCK": 64, "num_warps": 4} | constants))
        number, passed = direct[0] if direct else (0, (None,))
        history.append([len(by_triton), len(direct), passed[:3], passed[-1], number])

    step(scores, threshold, None)
    step(scores, threshold, None, programs=7)
    step(scores[1:], threshold, None)
    step(scores[1:], threshold, None)
    step(scores[4:], threshold, None)
    step(scores, threshold, None, BLOCK=128)
    step(scores, threshold, None, BLOCK=128)
    hook = lambda *_, **__: None
    triton.knobs.runtime.launch_enter_hook.add(hook)
    step(scores, threshold, None)
    triton.knobs.runtime.launch_enter_hook.remove(hook)
    kernel.pre_run_hooks.append(hook)
    step(scores, threshold, None)
    kernel.pre_run_hooks.clear()
    step(scores, threshold, None)
    return history


def repeated_calls():
    """For linear layers and prunings called in different ways: by how many kernels Triton launched, how many were run directly,
    how many specialisations were looked up; and whether what was run got this call's tensors."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from madtp_kernels import RaggedBatch, backends, checks, linear, merge_redundant, prune, repeats, triton_utils
    from madtp_kernels.linear import triton as linear_triton

    by_triton, direct, looked_up, launch, look_up = [], [], [], JITFunction.run, triton_utils.specialisation

    def run(self, *args, grid, warmup, **options):
        by_triton.append(grid)
        compiled = launch(self, *args, grid=grid, warmup=True, **options)
        compiled._run = lambda *passed: direct.append(passed)
        return compiled

    def specialisation(*args):
        looked_up.append(args)
        return look_up(*args)

    driver.set_active(Target(90))
    JITFunction.run = triton_utils._RUN = run
    triton_utils.specialisation = specialisation
    linear_triton._copy_engine = lambda device: False
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.current_device = lambda: None
    triton_utils._multiprocessors = lambda device: 132
    checks.may_read = lambda tensor: debug
    backends.availability, backends._PREFERENCE = lambda name, device_type: None, {"cpu": ("triton",)}
    debug, history = False, []

    def call(function, *args, **options):
        by_triton.clear(), direct.clear(), looked_up.clear()
        function(*args, **options)
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        passed = {arg.data_ptr() for args in direct for arg in args if isinstance(arg, torch.Tensor)}
        own = all(tensor.data_ptr() in passed for tensor in tensors)
        history.append([len(by_triton), len(direct), len(looked_up), own])

    x, weight, cu = (
        torch.zeros(9, 64, dtype=torch.bfloat16),
        torch.zeros(32, 64, dtype=torch.bfloat16),
        torch.tensor([0, 8]).int(),
    )
    for _ in range(3):
        call(linear, x, weight, None, cu)
    call(linear, torch.zeros_like(x), weight.clone(), None, cu.clone())
    call(linear, torch.zeros(9 * 64 + 1, dtype=x.dtype)[1:].view(9, 64), weight, None, cu)  # not aligned
    call(linear, x[:7], weight, None, cu)  # fewer rows
    call(linear, x, weight, None, cu, residual=torch.zeros(9, 32, dtype=x.dtype))
    weight.requires_grad_()
    with torch.no_grad():
        call(linear, x, weight, None, cu)
    call(linear, x, weight, None, cu)  # with a gradient
    weight.requires_grad_(False)
    debug = True
    call(linear, x, weight, None, cu)
    debug = False
    call(linear, x, weight, None, cu)
    repeats.forget()
    call(linear, x, weight, None, cu)
    for _ in range(2):
        call(linear, x, weight, None, None)  # offsets are made each time

    normed = {"residual": torch.zeros(9, 32, dtype=x.dtype), "norm": (weight[:, 0].contiguous(), None, 1e-6)}
    for _ in range(4):
        call(linear, x, weight, None, cu, **normed)
    tokens, scores, ids = RaggedBatch(x, cu, 8, bound=True), torch.zeros(9), torch.zeros(9, dtype=torch.int32)
    for _ in range(4):
        call(prune, tokens, x, weight, scores, scores.clone(), 1.0, ids=ids, norm=(weight[0], None, 1e-6), exact=False)
    try:
        call(prune, tokens, x, weight, scores[:8], scores, 1.0, exact=False)
    except ValueError as error:
        history.append(str(error))
    before, options = history.copy(), {"free": torch.ones(9, dtype=torch.bool), "carry": (ids,), "exact": False}
    history.clear()
    for threshold in (0.5, 0.5, 0.5, 0.5, 0.7, None):
        call(merge_redundant, tokens, x.unflatten(1, (2, 32)), scores, threshold=threshold, **options)
    return before, history


def report(capability, few=False):
    """Resources of every kernel for one target.

    Where there are to be ``few``: every variant in bfloat16 for sm_90; few variants in float16 and of other shapes for sm_90, and
    in bfloat16 and float32 for every target.
    """
    cases = [("bfloat16", {}, few and capability != 90), ("float32", {}, few)]
    if capability == 90 or not few:
        cases += [("float16", {}, few)]
    if capability == 90:
        cases += [("bfloat16", shape, few) for shape in OTHER_SHAPES]
    rows = []
    with compiling(capability) as compiled:
        for dtype, shape, some in cases:
            for label in launches(DTYPES[dtype], capability, **shape, few=some):
                case = {"dtype": dtype, "case": label, "shape": shape}
                rows += [{"kernel": name, **case, **resources(kernel)} for name, kernel in compiled]
                compiled.clear()
    return rows


def describe(row):
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    used = " ".join(f"{word} x{count}" for word, count in row["instructions"].items() if count)
    return (
        f"{row['kernel']:20} {row['dtype']:9} {row['case']:17} {row['warps']} warps {row['registers']:4} registers "
        f"{row['stack']:4} B stack {row['shared']:7} B shared  {used} {shape}"
    )


# ---- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers():
    """What every command prints, from one process without Triton's interpreter, by command."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # which takes a sixth of the time, and no register
    done = subprocess.run([sys.executable, __file__, "all"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture
def reports(answers):
    """Rows of every target."""
    return {target: answers[str(target)] for target in TARGETS}


def test_no_kernel_is_compiled_again_for_another_batch_size(answers):
    found = answers["variants"]
    assert {name for name, *_ in found} == kernels_in_the_source()
    by_constants = collections.defaultdict(set)
    for name, constants, specialised in found:
        by_constants[name, constants].add(specialised)
    twice = {key: values for key, values in by_constants.items() if len(values) > 1}
    assert not twice, "\n".join(f"{key}: {value}" for key, values in twice.items() for value in sorted(values))


def test_launch_tells_variants_apart_as_triton_does(answers):
    ours, theirs = collections.defaultdict(set), collections.defaultdict(set)
    for key, specialised in answers["keys"]:
        if key != "None":  # left to Triton
            ours[key].add(specialised)
            theirs[specialised].add(key)
    assert len(ours) > 40
    assert all(len(values) == 1 for values in ours.values()), ours  # else a kernel would be run with wrong assumptions
    assert all(len(values) == 1 for values in theirs.values()), theirs


def test_launch_runs_compiled_kernels_unless_somebody_watches(answers):
    steps = answers["launches"]
    assert [step[0] for step in steps] == [1, 0, 1, 0, 0, 1, 0, 1, 1, 0]
    assert [step[1] for step in steps] == [0, 1, 0, 1, 1, 0, 1, 0, 0, 1]
    aligned, unaligned, *rest = (step for step in steps if step[1])
    assert aligned[2] == [7, 1, 1] and unaligned[2] == [1, 1, 1]
    assert [step[3] for step in (aligned, unaligned, *rest)] == [64, 64, 64, 128, 64]
    numbers = [step[4] for step in (aligned, unaligned, *rest)]
    assert numbers[0] == numbers[2] == numbers[4] and len(set(numbers)) == 3


def test_repeated_calls_run_the_kernels_of_the_last_time_and_no_others(answers):
    """Columns: launched by Triton, run directly, looked up, with the tensors of this call."""
    before, redundant = answers["repeats"]
    *linears, first, second, third, fourth, message = before
    *linears, bare, bare_again = linears[:-4]
    assert bare == bare_again == [0, 1, 1, True]
    with_norm = before[-9:-5]
    assert [row[:3] for row in with_norm] == [[1, 1, 2], [0, 2, 2], [0, 2, 0], [0, 2, 0]] and with_norm[-1][3]
    assert linears[:4] == [[1, 0, 1, False], [0, 1, 1, True], [0, 1, 0, True], [0, 1, 0, True]]
    unaligned, shorter, with_residual, without_gradient, with_gradient, debugged, again, forgotten = linears[4:]
    assert unaligned[:3] == [1, 0, 1] and with_residual[:3] == [1, 0, 1]
    assert shorter == [0, 1, 1, True]  # the same kernel, found by its specialisation
    assert with_gradient == debugged == forgotten == [0, 1, 1, True]
    assert without_gradient == again == [0, 1, 0, True]
    # The second time, scoring selects, by another variant of its kernel.
    assert first[0] == 3 and second[:3] == [1, 1, 2]
    assert third == [0, 2, 1, True] and fourth == [0, 2, 0, True]
    assert message.startswith("received: expected [T]")
    # What follows the scores is one operation after the other at first, which are nine launches. When the call is first repeated,
    # it is five, of which the choice and the merging are other kernels.
    launched, looked, again, last, other_threshold, without = redundant
    assert launched[0] > 0 and launched[0] + launched[1] == 9
    assert looked == [2, 3, 5, True] and again == [0, 5, 2, True] and last == [0, 5, 0, True]
    assert other_threshold[:2] == [0, 9] and without[0] == 1  # the choice without a threshold is another kernel


def kernels_in_the_source():
    modules = Path(madtp_kernels.__file__).parent.glob("*/triton.py")
    return {
        name for module in modules for name in re.findall(r"^def (_\w+_kernel)\(", module.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(reports, target):
    compiled = collections.defaultdict(set)
    for row in reports[target]:
        compiled[row["dtype"]].add(row["kernel"])
    assert compiled.keys() == DTYPES.keys() - ({"float16"} if target != 90 else {})
    assert all(found == kernels_in_the_source() for found in compiled.values())


@pytest.mark.parametrize("target", TARGETS)
def test_registers_are_not_spilled(reports, target):
    spilling = [describe(row) for row in reports[target] if row["stack"] > SPILL_ALLOWANCE]
    assert not spilling, "\n".join(spilling)


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_fits_the_smallest_relative(reports, target):
    limits = {COPY_ENGINE: COPY_ENGINE_MEMORY}
    large = [describe(row) for row in reports[target] if row["shared"] > limits.get(row["case"], SHARED_MEMORY)]
    assert not large, "\n".join(large)


@pytest.mark.parametrize("target", TARGETS)
def test_two_compactions_fit_a_multiprocessor(reports, target):
    # One program waits for memory while another computes; 65,536 registers are there for all.
    rows = [row for row in reports[target] if row["kernel"] == "_compact_kernel" and not row["shape"]]
    assert rows and all(2 * 32 * row["warps"] * row["registers"] <= 65536 for row in rows)


@pytest.mark.parametrize("target", TARGETS)
def test_matrix_products_use_the_matrix_units(reports, target):
    rows = [row for row in reports[target] if row["kernel"] in MATRIX_KERNELS and not row["shape"]]
    for row in rows:
        used = {word for word in MATRIX_INSTRUCTION.values() if row["instructions"][word]}
        expected = set() if row["dtype"] == "float32" else {MATRIX_INSTRUCTION[target]}
        assert used == expected, describe(row)
        assert row["dtype"] != "float32" or not row["instructions"]["tf32"], describe(row)


@pytest.mark.parametrize("target", TARGETS)
def test_linear_layers_in_16_bits_are_fetched_by_the_copy_engine(reports, target):
    rows = [row for row in reports[target] if row["kernel"] in ("_linear_kernel", "_pair_kernel") and not row["shape"]]
    for row in rows:
        assert bool(row["instructions"][COPY_INSTRUCTION]) == (row["case"] == COPY_ENGINE), describe(row)
    fetched = {row["dtype"] for row in rows if row["case"] == COPY_ENGINE}
    assert fetched == {80: set(), 90: {"bfloat16", "float16"}, 100: {"bfloat16"}}[target]


@pytest.mark.parametrize("target", TARGETS)
def test_rows_move_in_accesses_of_16_bytes(reports, target):
    rows = [row for row in reports[target] if row["kernel"] in WIDE_ACCESS and not row["shape"]]
    for row in rows:
        assert all(row["instructions"][word] for word in WIDE_ACCESS[row["kernel"]]), describe(row)


@pytest.mark.parametrize("target", TARGETS)
def test_counters_are_zero_before_any_thread_counts(reports, target):
    """Threads wait for one another between their stores and their atomic operations."""
    rows = [row for row in reports[target] if row["atomics"]]
    # What _nearest_kernel maximises was set by the launch before.
    assert {row["kernel"] for row in rows} == {"_nearest_kernel"}
    assert all(row["awaited"] for row in rows)


@pytest.mark.parametrize("target", TARGETS)
def test_no_access_to_memory_is_moved_before_the_wait_for_the_kernel_before(reports, target):
    assert {row["waits_first"] for row in reports[target]} == {target >= 90}


@pytest.mark.parametrize("target", TARGETS)
def test_no_thread_loads_what_another_one_may_still_have_to_store(reports, target):
    assert not [describe(row) for row in reports[target] if row["unordered"]]
    needed = {(row["kernel"], *row["unordered_without_barriers"]) for row in reports[target]}
    assert {row for row in needed if len(row) > 1} == {
        ("_choose_kernel", "scores"), ("_score_kernel", "importance", "left"), ("_merge_kernel", "importance"),
    }  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_sums_have_the_same_bits_in_every_form_that_a_batch_may_choose(reports, target):
    """As far as layouts decide: of importance, one launch or two; of scores, samples of one tile or more, too; of merged rows, few or
    many."""
    found = collections.defaultdict(set)
    for row in reports[target]:
        if row["kernel"] in ("_importance_kernel", "_score_kernel") or (
            row["kernel"] == "_compact_kernel" and "all options" in row["case"]
        ):
            found[row["kernel"], row["dtype"], str(row["shape"])].add(tuple(row["sums"]))
    assert len({kernel for kernel, *_ in found}) == 3
    for case, forms in found.items():
        assert len(forms) == 1 and len(forms.pop()) >= 3, case


COMMANDS = {
    **{str(target): functools.partial(report, target, few=True) for target in TARGETS},
    "variants": variants, "keys": keys, "launches": direct_launches, "repeats": repeated_calls,
}  # fmt: skip


def answer(command):
    return COMMANDS[command]()


if __name__ == "__main__":
    command = sys.argv[1]
    if command == "all":  # each in a process of its own, for they replace parts of Triton; imports are shared
        fork = multiprocessing.get_context("fork")
        with fork.Pool(len(os.sched_getaffinity(0)), maxtasksperchild=1) as pool:
            print(json.dumps(dict(zip(COMMANDS, pool.map(answer, COMMANDS, chunksize=1), strict=True))))
    elif command.isdecimal():
        print("\n".join(map(describe, report(int(command)))))
    else:
        print(json.dumps(answer(command)))
