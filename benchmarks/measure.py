"""How the benchmarks measure: candidates take turns, a wrong answer is not timed, ceilings come from the same run.

A :class:`Comparison` names its candidates and what their times have to satisfy; :func:`compare` checks it, times it and
returns one flat record that goes to pytest-benchmark's ``extra_info`` and into the JSON files that `report.py` reads.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import madtp_kernels
from madtp_kernels import backends, native

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Larger than any cache: what a timed call reads comes from memory, on a GPU because it is overwritten in between.
_LARGE_BYTES = 2**31 if ON_GPU else 2**28


class WrongAnswer(AssertionError):
    """A candidate does not compute what it should; it is not timed."""


@dataclass(frozen=True)
class Goal:
    """``time(candidate) <= at_most * time(baseline)``."""

    candidate: str
    baseline: str
    at_most: float


@dataclass
class Comparison:
    """Candidates that are timed in turn.

    Attributes:
        name: what is compared; together with ``facts`` it identifies a record.
        candidates: name to a call without arguments. The first is the subject: what pytest-benchmark's table shows.
        check: raises :class:`WrongAnswer` unless the candidates compute what they should; it also warms them up.
        facts: sizes and settings, copied into the record.
        gflop, gbytes: arithmetic (a multiply-add is 2) and least memory traffic of the subject, in 1e9.
        goals: what the times have to satisfy; reported, not asserted: a slow machine is not a wrong program.
        synchronising: candidates that wait for the device by themselves and cannot be captured in a CUDA graph.
        capture: on a GPU, time replays of a CUDA graph, so that launch gaps of Python stay out of small operations.
        finish: called after the rounds, before the record is made: may add facts and goals that follow from the results.
        budget: seconds that the rounds may take, as long as ``min_rounds`` are done.
        warm_up: a pass over all candidates before the rounds; where a pass takes tens of seconds, the check has to do.
    """

    name: str
    candidates: dict[str, Callable[[], object]]
    check: Callable[[], None]
    facts: dict[str, object] = field(default_factory=dict)
    gflop: float = 0.0
    gbytes: float = 0.0
    goals: tuple[Goal, ...] = ()
    synchronising: tuple[str, ...] = ()
    capture: bool = True
    finish: Callable[[Comparison], None] | None = None
    budget: float = 0.5 if ON_GPU else 1.5
    min_rounds: int = 3
    warm_up: bool = True


# ---- clocks -------------------------------------------------------------------------------------------------------


@functools.cache
def _large_buffer() -> torch.Tensor:
    return torch.empty(_LARGE_BYTES // 4, dtype=torch.float32, device=DEVICE).normal_()


@functools.cache
def _scratch() -> torch.Tensor:
    return torch.empty(2**30, dtype=torch.uint8, device=DEVICE)


def _flush() -> None:
    """Evict the GPU's L2. It also takes longer than a launch, so the events below wait for the device, not for Python."""
    if ON_GPU:
        _scratch().zero_()


def _seconds(call: Callable[[], object]) -> float:
    """Duration of one call, on the device's own clock where it has one."""
    if not ON_GPU:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as replays of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(_keep_alive=result):
        graph.replay()

    return replay


# ---- ceilings -----------------------------------------------------------------------------------------------------


def _median_seconds(call: Callable[[], object], rounds: int = 7) -> float:
    call()
    times = []
    for _ in range(rounds):
        _flush()
        times.append(_seconds(call))
    return statistics.median(times)


@functools.cache
def copy_gbps() -> float:
    """Memory bandwidth of a large copy, bytes read plus bytes written, GB/s."""
    source, target = _large_buffer().chunk(2)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source)) / 1e9


@functools.cache
def product_gflops(dtype: torch.dtype) -> float:
    """The best rate that this torch reaches on a large matrix product in this dtype, GFLOP/s (a multiply-add is 2)."""
    n = 8192 if ON_GPU else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    paths = [lambda: F.linear(a, b)]
    with torch.inference_mode():
        if not ON_GPU and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            packed = torch.ops.mkldnn._reorder_linear_weight(b)
            paths.append(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
        return 2 * n**3 / min(_median_seconds(path, rounds=5) for path in paths) / 1e9


# ---- comparisons --------------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare(comparison: Comparison, benchmark=None, patience: int = 1) -> dict:
    """Check the candidates, time them in turn, and return the record.

    Args:
        comparison: what to time.
        benchmark: pytest-benchmark's fixture; its table then shows the subject, its ``extra_info`` holds the record.
        patience: this many times the rounds; 0: one.

    Raises:
        WrongAnswer: the check failed; nothing was timed.
    """
    comparison.check()
    calls = dict(comparison.candidates)
    if ON_GPU and comparison.capture:
        calls = {n: c if n in comparison.synchronising else _captured(c) for n, c in calls.items()}
    subject, *others = calls

    times: dict[str, list[float]] = {name: [] for name in calls}
    rounds = max(1, patience * comparison.min_rounds)
    if comparison.warm_up:
        first = {}
        for name, call in calls.items():  # with the memory that the other candidates leave behind
            _flush()
            first[name] = _seconds(call)
        total = sum(first.values())
        rounds = max(rounds, min(50, int(patience * comparison.budget / total)))
        if total > 4 and rounds > 1:  # so long a pass is as good as a round
            times = {name: [seconds] for name, seconds in first.items()}
            rounds -= 1

    turns = itertools.count()

    def time_others() -> None:
        turn = next(turns) % max(1, len(others))
        for name in others[turn:] + others[:turn]:
            _flush()
            times[name].append(_seconds(calls[name]))
        _flush()

    def time_subject() -> None:
        times[subject].append(_seconds(calls[subject]))

    if benchmark is None:
        for _ in range(rounds):
            time_others()
            time_subject()
    else:
        benchmark.pedantic(time_subject, setup=time_others, rounds=rounds, iterations=1)
    if comparison.finish:
        comparison.finish(comparison)
    record = _record(comparison, times)
    if benchmark is not None:
        benchmark.extra_info.update(record)
    return record


def _quartiles(values: list[float]) -> list[float]:
    """The first and the third."""
    return statistics.quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else 2 * values


def _record(comparison: Comparison, times: dict[str, list[float]]) -> dict:
    medians = {name: statistics.median(values) for name, values in times.items()}
    subject = next(iter(medians))
    dtype = comparison.facts.get("dtype")
    record = {
        "name": comparison.name,
        **comparison.facts,
        "subject": subject,
        "milliseconds": {name: seconds * 1e3 for name, seconds in medians.items()},
        "fastest_milliseconds": {name: min(values) * 1e3 for name, values in times.items()},
        "quartile_milliseconds": {name: [s * 1e3 for s in _quartiles(values)] for name, values in times.items()},
        "ratio": {name: medians[subject] / seconds for name, seconds in medians.items() if name != subject},
        "rounds": len(times[subject]),
    }
    if comparison.gflop:
        record["gflops"] = comparison.gflop / medians[subject]
        record["of_product"] = record["gflops"] / product_gflops(DTYPES[dtype])
    if comparison.gbytes:
        record["gbps"] = comparison.gbytes / medians[subject]
        record["of_copy"] = record["gbps"] / copy_gbps()
    record["goals"] = [
        {
            "candidate": goal.candidate,
            "baseline": goal.baseline,
            "at_most": goal.at_most,
            "ratio": medians[goal.candidate] / medians[goal.baseline],
            "met": medians[goal.candidate] <= goal.at_most * medians[goal.baseline],
        }
        for goal in comparison.goals
    ]
    return record


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """``|ours - exact| / |exact|`` in float64; NaN if anything is."""
    exact = exact.double()
    return ((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


def require(ours: torch.Tensor, exact: torch.Tensor, at_most: float, what: str) -> None:
    """Raise :class:`WrongAnswer` unless the relative error is small and everything is finite."""
    if ours.shape != exact.shape:
        raise WrongAnswer(f"{what}: shape {list(ours.shape)} instead of {list(exact.shape)}")
    error = relative_error(ours, exact)
    if not error <= at_most:  # catches NaN
        raise WrongAnswer(f"{what}: relative error {error:.3g}, at most {at_most:.3g} is right")


# ---- environment and files ----------------------------------------------------------------------------------------


def _cpu_info() -> dict[str, str]:
    """The first processor's entry of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


# What decides how fast products run: the flags of the kernel, and what they are called here.
_FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_bf16": "AMX BF16",
}


def cpu_features() -> list[str]:
    """The instruction sets of this processor that matter to matrix products."""
    flags = _cpu_info().get("flags", "").split()
    return [name for flag, name in _FEATURES.items() if flag in flags]


def processor_lines(records: Path) -> list[str]:
    """This processor, and which of the recorded devices it resembles: figures of another kind are not comparable.

    Args:
        records: the folder of results, one folder per device.
    """
    features, kernels = cpu_features(), environment_kernels()
    lines = [f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads; "
             f"{', '.join(features) or 'no vector extensions known here'}; kernels: {kernels}"]  # fmt: skip
    for folder in sorted(path for path in records.iterdir() if path.is_dir()):
        files = sorted(folder.glob("*.json"))
        if not folder.name.startswith("cpu-") or not files:
            continue
        recorded = json.loads(files[-1].read_text(encoding="utf-8"))["environment"]
        theirs = recorded.get("extension", {}).get("cpu")
        same = recorded.get("cpu") == _cpu_name() and theirs == kernels
        verdict = "this kind of processor" if same else "another processor: compare ratios at most, not times"
        lines.append(f"{folder.name}: {recorded.get('cpu')}, kernels {theirs}: {verdict}")
    return lines


def environment_kernels() -> str:
    """The instruction set that the CPU kernels of this process use, or why there are none."""
    try:
        return native.load().build_info()["cpu"]
    except native.Unavailable as error:
        return f"none ({error})"


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def environment(device_name: str | None = None) -> dict:
    """What a record depends on besides the code: device, versions, threads, the backend that served, ceilings."""
    if not device_name:
        device_name = (
            torch.cuda.get_device_name() if ON_GPU else f"{_cpu_name()} ({len(os.sched_getaffinity(0))} cores)"
        )
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    try:
        extension = dict(native.load().build_info())
    except native.Unavailable as error:
        extension = {"unavailable": str(error)}
    served, _ = backends.resolve("attention", "attention", "", torch.empty(0, device=DEVICE))
    return {
        "device": device_name,
        "cpu": _cpu_name(),
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "backend": served,
        "copy_gbps": copy_gbps(),
        "product_gflops": {name: product_gflops(dtype) for name, dtype in DTYPES.items()},
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton_version,
        "madtp_kernels": madtp_kernels.__version__,
        "extension": extension,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def slug(name: str) -> str:
    """A device's name as a folder's: ``AMD EPYC (2 cores)`` to ``amd-epyc-2-cores``."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def write_records(path: Path, records: Iterable[dict], device_name: str | None = None) -> None:
    """Write a JSON file of records with the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(device_name), "records": list(records)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def goal_lines(records: Iterable[dict]) -> list[str]:
    """One line for each goal: what was asked, what was measured."""
    lines = []
    for record in records:
        facts = " ".join(str(record[key]) for key in ("dtype", "batch") if key in record)
        for goal in record["goals"]:
            verdict = "met   " if goal["met"] else "MISSED"
            lines.append(
                f"{verdict} {goal['ratio']:6.3f} (goal {goal['at_most']:.3f})  {record['name']} {facts}: "
                f"{goal['candidate']} / {goal['baseline']}"
            )
    return lines


def time_lines(records: Iterable[dict]) -> list[str]:
    """One line for each record: median milliseconds of every candidate, and the fraction of the ceilings."""
    lines = []
    for record in records:
        facts = " ".join(str(record[key]) for key in ("dtype", "batch") if key in record)
        times = ", ".join(f"{name} {value:.4g}" for name, value in record["milliseconds"].items())
        rates = "".join(
            f"; {record[rate]:.3g} {unit} = {record[fraction]:.0%} of a {ceiling}"
            for rate, unit, fraction, ceiling in (
                ("gflops", "GFLOP/s", "of_product", "matrix product"),
                ("gbps", "GB/s", "of_copy", "large copy"),
            )
            if rate in record
        )
        lines.append(f"{record['name']} {facts}: {times} ms{rates}")
    return lines
