"""Figures of one GPU in the order of their worth, each appended to a file as one line of JSON as soon as it is known.

    python benchmarks/gpu_figures.py STAGE [STAGE ...] --out figures.jsonl

`gpu_check.sh` runs it. A figure that fails becomes a line with the error, and the next one goes on; a run that is stopped
keeps every line before. Stages:

    build        compiles the C++ extension and, in processes beside it, the Triton kernels of the stages below; build-tiles
                 those of tune.py, too; build-short only those that the short stages need
    operations   ceilings and the operations of 64 x 577 tokens in bfloat16; operations-short fewer of them
    model        the real-size BLIP-NLVR: as a CUDA graph, eager, its kernels
    ranked       the rule RankedNovelty: its operations, and the model as a graph and eager
    variants     the models recorded as they are, on one stream only, and with other launches overlapping, in turn; and what each
                 launch of one pair adds
    pairs        two linear layers in one launch, beside two launches
    same-sample  how many tokens change when a sample has other neighbours
    launches     one launch of each kernel of interest, for a profiler that starts when it is told to
    small        small uneven cases of every operation against the reference, for compute-sanitizer

Device times are medians over replays of a CUDA graph: ``us`` with the L2 overwritten before each, ``warm_us`` back to back.
``host_us`` is what a call takes until everything is enqueued; ``eager_us`` lies between two events around one such call.
``--dry-run`` takes tiny sizes on whatever device there is, to see that everything is called as it should be.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest import mock

import inputs
import measure
import nlvr
import test_operations
import torch
import torch.nn.functional as F
from blocks import dense_call, dictionary, pruned_call, ruled_call, vision_transformer
from measure import DTYPES, ON_GPU, relative_error

from madtp import layers
from madtp.pruning import RankedNovelty
from madtp_kernels import (
    backends,
    beside,
    layer_norm,
    linear,
    linear_pair,
    lowest_tokens,
    merge_scores,
    merge_tokens,
    nearest_kept,
    prune,
    repeats,
    unmerge,
)

HERE = Path(__file__).resolve()
BATCH = "64 x 577"
PAIRS = (64, 32, 1)
# Of the official GFLOPs of the random real-size model: what `nlvr.temperature_for` finds.
TEMPERATURES = {"dense": 0.0, "pruned 50%": 5.5, "pruned 80%": 16.3}
# Shares of each layer's tokens that go: about a third and a half of the official GFLOPs of the random model.
RANKED = {f"ranked novelty, {share:.0%} a layer": RankedNovelty(shares=(share,)) for share in (0.06, 0.12)}
SECONDS = 0.25  # for the rounds of one figure
TUNERS = 7  # processes that compile the tiles of `tune.py`


class Log:
    """Where figures go. In a rehearsal nothing is timed or written: every call is made once, which compiles its kernels."""

    def __init__(self, path: str | None, rehearsal: bool = False) -> None:
        self.path, self.rehearsal, self.stage, self.errors = path, rehearsal, "", 0

    def write(self, figure: str, **facts) -> None:
        if self.rehearsal and "error" not in facts:
            return
        line = json.dumps({"stage": self.stage, "figure": figure, **facts})
        print(line[:400], flush=True)
        if self.path:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line + "\n")
                file.flush()
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def guarding(self, figure: str, **facts):
        """An exception inside becomes a line."""
        try:
            yield
        except Exception as error:
            self.errors += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error}"[:600]
            self.write(figure, **facts, error=said, at=f"{Path(where.filename).name}:{where.lineno}")

    def time(self, figure: str, call: Callable[[], object], graph: bool = True, **facts) -> None:
        """Time one call and write the line."""
        with self.guarding(figure, **facts):
            if self.rehearsal:
                call()
                _wait()
            else:
                self.write(figure, **facts, **timed(call, graph))

    def check(self, figure: str, call: Callable[[], object], **facts) -> None:
        """Compare with the reference: a line says whether the answer is right."""
        with self.guarding(figure, **facts):
            if not self.rehearsal:
                call()
                self.write(figure, **facts, right=True)


def _wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _count(seconds: float, most: int) -> int:
    """Rounds that fit."""
    return max(3, min(most, int(SECONDS / max(seconds, 1e-6))))


def timed(call: Callable[[], object], graph: bool = True) -> dict:
    """Device and host times of a call, in microseconds."""
    call()
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    rough = time.perf_counter() - start
    hosts, events = [], []
    for _ in range(_count(2 * rough, 20)):
        measure._flush()  # so that the device is busy while the host enqueues
        events.append(_between_events(call, hosts))
        _wait()
    result = {"host_us": statistics.median(hosts) * 1e6, "host_us_min": min(hosts) * 1e6}
    if not ON_GPU:
        return result
    result["eager_us"] = statistics.median(a.elapsed_time(b) for a, b in events) * 1e3
    if not graph:
        return result
    try:
        replay = measure._captured(call)
    except Exception as error:
        _wait()
        return result | {"graph_error": f"{type(error).__name__}: {error}"[:300]}
    replay()
    _wait()
    cold = []
    for _ in range(_count(rough, 30)):
        measure._flush()
        cold.append(_between_events(replay))
    _wait()
    cold = [a.elapsed_time(b) * 1e3 for a, b in cold]
    rounds = _count(rough, 50)

    def many():
        for _ in range(rounds):
            replay()

    start, end = _between_events(many)
    _wait()
    low, high = measure._quartiles(cold)
    return {
        "us": statistics.median(cold), "us_min": min(cold), "us_quartiles": [low, high],
        "warm_us": start.elapsed_time(end) * 1e3 / rounds, **result,
    }  # fmt: skip


def _between_events(call: Callable[[], object], hosts: list[float] | None = None):
    """Events before and after the call, once it is enqueued; how long that took is appended to ``hosts``."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if ON_GPU else None
    if events:
        events[0].record()
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    if events:
        events[1].record()
    if hosts is not None:
        hosts.append(took)
    return events


def device_state() -> dict:
    """Clocks, power and temperature as the card is found; none of it is changed."""
    fields = (
        "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,"
        "clocks_event_reasons.active"
    )
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    values = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    return dict(zip(fields.split(","), values.split(", "), strict=True))


# ---- build ----------------------------------------------------------------------------------------------------------


def build(log: Log, tiles: bool = False, parts: Sequence[str] | None = None) -> None:
    """The extension in one process, the rehearsals of the stages in fifteen others; a line when each is done.

    ``tiles``: those of `tune.py`, too. ``parts``: rehearse only these.
    """
    extension = (
        "import torch\nfrom madtp_kernels import native\ninfo = dict(native.load().build_info())\nprint(info)\n"
        "assert info['cuda'] or not torch.cuda.is_available(), 'the extension was built without CUDA'"
    )
    commands = {"extension": ([sys.executable, "-c", extension], {"MADTP_KERNELS_BUILD": "1"})}
    setting = {"MADTP_KERNELS_BUILD": "0", "OMP_NUM_THREADS": "2"}
    for part in range(TUNERS if tiles and ON_GPU and not DRY else 0):
        share = ["--rehearsal", "--part", f"{part}/{TUNERS}"]
        commands[f"tune {part}"] = ([sys.executable, str(HERE.parent / "tune.py"), *share], setting)
    if parts is None and not DRY:
        for model in ("clip-l14", "siglip2-b16-512"):
            share = ["--model", model, "--dtype", "bfloat16", "--batch", "2", "--rounds", "1"]
            commands[f"encoders {model}"] = ([sys.executable, str(HERE.parent / "encoders.py"), *share], setting)
    parts = REHEARSALS if parts is None else parts
    for name, together in {"rehearsals": parts}.items() if DRY else ((part, [part]) for part in parts):
        commands[name] = ([sys.executable, str(HERE), *together, "--rehearsal"], setting)

    def run(name: str) -> bool:
        command, setting = commands[name]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, *(["--dry-run"] if DRY and name == "rehearsals" else [])],
            env=os.environ | setting, capture_output=True, text=True,
        )  # fmt: skip
        seconds = round(time.perf_counter() - start, 1)
        ends = {} if done.returncode == 0 else {"error": (done.stdout + done.stderr)[-1500:]}
        log.write(name, seconds=seconds, **ends, **({"output": done.stdout[-600:]} if name == "extension" else {}))
        return done.returncode == 0

    if ON_GPU:
        with log.guarding("device before"):
            log.write("device before", **device_state())
    with concurrent.futures.ThreadPoolExecutor(16 if not DRY else 1) as pool:
        done = dict(zip(commands, pool.map(run, commands), strict=True))
    if not done["extension"]:
        raise SystemExit(1)


# ---- operations -----------------------------------------------------------------------------------------------------


def ceilings(log: Log) -> None:
    with log.guarding("copy"):
        log.write("copy", gbps=measure.copy_gbps())
    with log.guarding("product 8192"):
        log.write("product 8192", tflops=measure.product_gflops(torch.bfloat16) / 1e3)
    data = test_operations.Multiplied("bfloat16", BATCH, 1.0, first=True)
    log.time("product 36928x768x3072", lambda: F.linear(data.x, data.weight), gflop=data.gflop)
    if ON_GPU:
        with log.guarding("device after products"):
            log.write("device after products", **device_state())


def attended(log: Log) -> None:
    data = test_operations.Attended("bfloat16", BATCH)
    state = data.attend()
    log.time("attention", data.attend)
    log.time("importance", lambda: data.importance(*state))
    log.time("attention + importance", data.attend_with_importance)
    log.check("attention and importance against the reference", data.check_importance)
    if log.rehearsal:
        return
    log.time("sdpa, default", data.fused)
    if not ON_GPU:
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):

        def sdpa(name=name):
            with sdpa_kernel(getattr(SDPBackend, name)):
                return data.fused()

        log.time(f"sdpa, {name}", sdpa)
    with log.guarding("varlen_attn"):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = data.qkv.values.unbind(1)
        log.time("varlen_attn", lambda: varlen_attn(q, k, v, data.cu, data.cu, data.most, data.most))


def scored(log: Log) -> None:
    data = test_operations.Scored("bfloat16", BATCH)
    tokens = sum(data.lengths)
    log.time("score", data.score)
    log.time("compact", data.compacted, rows_in=tokens, rows_out=data.rows_out)
    log.time("compact + LayerNorm", lambda: data.compacted(norm=True))
    log.time("prune + LayerNorm", lambda: data.pruned(norm=True))
    with log.guarding("score, forms"):
        from madtp_kernels.scoring import triton as scoring

        chosen = scoring._one_launch
        try:
            for name, one in (("score, one launch", True), ("score, two launches", False)):
                scoring._one_launch = lambda *sizes, one=one: one
                repeats.forget()
                log.time(name, data.score)
        finally:
            scoring._one_launch = chosen
    from madtp_kernels.compaction import triton as compaction

    chosen = compaction._blocks
    for rows, run in ((4, 8), (4, 16), (4, 32), (8, 8), (8, 16), (8, 32), (16, 16)) if ON_GPU else ():
        compaction._blocks = lambda *sizes, form=(rows, run): form
        repeats.forget()
        for norm in (False, True):
            log.time("compact, forms", lambda norm=norm: data.compacted(norm=norm), rows=rows, run=run, norm=norm)
    compaction._blocks = chosen
    repeats.forget()
    log.check("score against the reference", data.check_score)
    log.check("compact against the reference", data.check_compaction)
    if not log.rehearsal:
        copy, gbytes = data.copy_of(tokens, data.rows_out)
        log.time("copy of compact's bytes", copy, gbytes=gbytes)
        copy, gbytes = data.copy_of(tokens, 2 * data.rows_out)
        log.time("copy of compact + LayerNorm's bytes", copy, gbytes=gbytes)
        log.time("alignment product", lambda: F.linear(data.entering, data.dictionary))


def normalised(log: Log) -> None:
    """LayerNorm of the rows in use, and of all."""
    norm = torch.nn.LayerNorm(inputs.WIDTH).to(measure.DEVICE, torch.bfloat16)
    x = inputs.tokens(inputs.lengths_of(BATCH), inputs.WIDTH, dtype=torch.bfloat16, seed=13)
    for share in (1.0, 0.5, 0.2):
        used = round(len(x) * share)
        cu_seqlens = torch.tensor([0, used], dtype=torch.int32, device=measure.DEVICE)
        log.time("LayerNorm", lambda cu=cu_seqlens: layer_norm(x, norm.weight, norm.bias, cu), share=share)
        if not log.rehearsal:
            log.time("F.layer_norm over the tokens", lambda n=used: norm(x[:n]), share=share)


def multiplied(log: Log, first: bool, shares: Sequence[float] = (1.0, 0.5, 0.2)) -> None:
    layer = "768->3072 + GELU" if first else "3072->768 + residual"
    for share in (0.5,) if log.rehearsal else shares:
        data = test_operations.Multiplied("bfloat16", BATCH, share, first)
        facts = {"layer": layer, "share": share, "gflop": data.gflop}
        for name, call in data.candidates().items():
            log.time(name, call, **facts)
        used = slice(data.rows)
        log.time("bare product over the buffer", lambda d=data: F.linear(d.x, d.weight, d.bias), **facts)
        log.time("bare product over the tokens", lambda d=data, r=used: F.linear(d.x[r], d.weight, d.bias), **facts)
        log.check(f"{layer} against the reference", data.check, share=share)


def cuda_backend(log: Log) -> None:
    """The same operations by the C++ kernels that stand in for Triton."""
    if not ON_GPU:
        return
    data = test_operations.Attended("bfloat16", BATCH)
    state = data.attend()
    log.time("importance", lambda: data.importance(*state, backend="cuda"), backend="cuda")
    log.time("attention", lambda: data.attend("cuda"), backend="cuda")
    data = test_operations.Scored("bfloat16", BATCH)
    log.time("score", lambda: data.score(backend="cuda"), backend="cuda")
    log.time("compact", lambda: data.compacted(backend="cuda"), backend="cuda")
    log.time("compact + LayerNorm", lambda: data.compacted(norm=True, backend="cuda"), backend="cuda")


# ---- model ----------------------------------------------------------------------------------------------------------


def pairs_of(log: Log, dtype: str, count: int) -> nlvr.Pairs:
    if log.rehearsal:  # which tokens stay does not matter, and drawing blobs takes seconds
        inputs.images = lambda count, size=384, seed=0: torch.rand(count, 3, size, size, device=measure.DEVICE)
    return nlvr.pairs(dtype, count)


def forwards(log: Log, count: int, rules: Mapping[str, float | RankedNovelty] | None = None) -> None:
    pairs = pairs_of(log, "bfloat16", count)
    net = nlvr.model("bfloat16")
    layers = net.config.vision.depth + net.config.text.num_hidden_layers
    for name, rule in (TEMPERATURES if rules is None else rules).items():
        facts = {"pairs": count, "layers": layers}
        call = functools.partial(nlvr.answer, "bfloat16", pairs, rule)
        with log.guarding(name, **facts):
            if not log.rehearsal:
                counted = rule if rules else rule > 0
                facts["gflops_per_pair"] = nlvr.gflops_per_pair("bfloat16", call(), pruning=counted)
        log.time(name, call, **facts)
        if ON_GPU and not log.rehearsal:
            with log.guarding(f"{name}, model.capture", **facts):
                forward = net.capture(pairs.pixels, pairs.input_ids, pruning=rule)
                replay = functools.partial(forward, pairs.pixels, pairs.input_ids)
                log.time(f"{name}, model.capture", replay, graph=False, **facts)
            if rules:
                continue
            # Copies of inputs and results, and a look at every weight, included: what `madtp.predict` waits for.
            with log.guarding(f"{name}, madtp.graphs", **facts):
                product = functools.partial(nlvr.answer_by_graph, "bfloat16", pairs, rule)
                for _ in range(3):  # runs, records, replays
                    product()
                log.time(f"{name}, madtp.graphs", product, graph=False, **facts, recordings=len(net.graphs))
    if not log.rehearsal and not rules:
        log.time("dense, plain PyTorch", lambda: nlvr.plain_answer("bfloat16", pairs), pairs=count)


def ranked_operations(log: Log) -> None:
    """What RankedNovelty adds to a layer: scores, choice, nearest survivors, merging; each against the reference."""
    lengths = inputs.lengths_of(BATCH)
    x = inputs.packed(inputs.tokens(lengths, inputs.WIDTH, dtype=torch.bfloat16, seed=20), lengths)
    cu, most = x.cu_seqlens, x.max_seqlen
    keys = inputs.tokens(lengths, 12, inputs.WIDTH // 12, dtype=torch.bfloat16, seed=21)
    order, sizes = (inputs.tokens(lengths, dtype=torch.float32, seed=seed).abs() + 0.1 for seed in (22, 23))
    free = torch.ones_like(order, dtype=torch.bool)
    free[cu[:-1].long()] = False
    count = (cu.diff() * 0.12).int()

    def score(backend=None):
        return merge_scores(keys, order, cu, most, sizes=sizes, free=free, backend=backend)

    scores, new, inverse_norms = score("reference" if DRY else None)

    def choose(backend=None):
        return lowest_tokens(scores, count, cu, free=free, backend=backend)

    goes = choose()

    def search(backend=None):
        return nearest_kept(keys, ~goes, cu, most, inverse_norms=inverse_norms, backend=backend)

    into = search()

    def merge(backend=None):
        return merge_tokens(x, into, sizes=sizes, exact=False, backend=backend)

    def check():
        exact = new if DRY else score("reference")[1]
        assert (exact - score()[1]).abs().max() < 2e-2, "novelty"
        assert torch.equal(choose("reference"), goes), "lowest tokens"
        ours, theirs = merge(), merge("reference")
        assert torch.equal(ours.tokens.cu_seqlens, theirs.tokens.cu_seqlens), "merged"
        rows = int(theirs.tokens.cu_seqlens[-1])
        assert relative_error(ours.tokens.values[:rows], theirs.tokens.values[:rows].double()) < 1e-2, "merged"

    for name, call in [
        ("merge_scores", score), ("lowest_tokens", choose), ("nearest_kept", search), ("merge_tokens", merge)
    ]:  # fmt: skip
        log.time(name, call, tokens=sum(lengths))
    log.check("ranked novelty against the reference", check)


def ranked_block(log: Log) -> None:
    block = vision_transformer("bfloat16", 1).blocks[0]
    for count in (128, 2) if not DRY else (1,):
        lengths = [577] * count
        x = inputs.packed(inputs.tokens(lengths, inputs.WIDTH, dtype=torch.bfloat16, seed=8), lengths)
        for name, rule in RANKED.items():
            log.time(f"vision block, {name}", ruled_call(block, x, rule), images=count)


def paired(log: Log) -> None:
    """Two linear layers in one launch, beside two launches: the words' queries, keys and values of images, projections."""
    width, pairs = inputs.WIDTH, PAIRS[0]
    for form, samples, length, columns in [
        ("both", pairs, 20, width), ("halves", 2 * pairs, 150, 2 * width), ("columns", 2 * pairs, 20, width)
    ]:  # fmt: skip
        lengths = [length] * samples
        x = inputs.packed(inputs.tokens(lengths, width, dtype=torch.bfloat16, seed=30), lengths)
        weights, biases = (
            tuple(inputs.tokens([n], *rest, dtype=torch.bfloat16, seed=n + i) / width**0.5 for i in range(2))
            for n, *rest in ([columns, width], [columns])
        )
        half = len(x.values) if form == "both" else len(x.values) // 2
        cu = torch.tensor([0, half], dtype=torch.int32, device=measure.DEVICE)

        def two(x=x, weights=weights, biases=biases, half=half, cu=cu):
            rows = x.values, x.values[-half:]
            return [linear(r[:half], w, b, cu) for r, w, b in zip(rows, weights, biases, strict=True)]

        def one(x=x, weights=weights, biases=biases, form=form):
            return linear_pair(x, weights, biases, form=form).values

        log.time("linear_pair", one, form=form, rows=len(x.values), columns=columns)
        log.time("linear twice", two, form=form, rows=len(x.values), columns=columns)

        def check(one=one, two=two, form=form):
            expected = torch.cat(two(), 1 if form == "columns" else 0)
            if ON_GPU:
                assert torch.equal(one(), expected), "other bits than two layers"
            assert relative_error(one(), expected.double()) < 1e-2, "other values than two layers"

        log.check("linear_pair against linear", check, form=form)


def vision_block(log: Log) -> None:
    """Host and device time of a single layer, as the model calls it."""
    block = vision_transformer("bfloat16", 1).blocks[0]
    for count in (128, 2) if not DRY else (1,):
        lengths = [577] * count
        x = inputs.packed(inputs.tokens(lengths, inputs.WIDTH, dtype=torch.bfloat16, seed=8), lengths)
        log.time("vision block, dense", dense_call(block, x), images=count)
        log.time("vision block, pruned", pruned_call(block, x, dictionary("bfloat16"), 5.5), images=count)


def agreement(log: Log) -> None:
    """Of two pairs: the dense model against plain PyTorch, the pruned ones against the reference backend."""
    sample = pairs_of(log, "bfloat16", 2)
    with log.guarding("dense against plain PyTorch"):
        plain, dense = nlvr.plain_answer("bfloat16", sample), nlvr.answer("bfloat16", sample, 0.0).logits
        log.write("dense against plain PyTorch", relative_error=relative_error(dense, plain))
    for name, temperature in list(TEMPERATURES.items())[1:]:
        with log.guarding(f"{name} against the reference"):
            ours, exact = (nlvr.answer("bfloat16", sample, temperature, backend=b) for b in (None, "reference"))
            costs = [nlvr.gflops_per_pair("bfloat16", output, pruning=True) for output in (ours, exact)]
            error = relative_error(ours.logits, exact.logits)
            log.write(f"{name} against the reference", relative_error=error, gflops_per_pair=costs)


def kernels(log: Log) -> None:
    """Which kernels a forward launches, how often, and what they take."""
    if log.rehearsal:
        return
    for count in dict.fromkeys((PAIRS[0], PAIRS[-1])):
        _kernels_of(log, count)


def _device_events(call: Callable[[], object]) -> list:
    """What runs on the device during a call, by PyTorch's profiler."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if ON_GPU else [])
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        _wait()
    return [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


def _kernels_of(log: Log, count: int) -> None:
    pairs = pairs_of(log, "bfloat16", count)
    for name, temperature in reversed(TEMPERATURES.items()):
        with log.guarding(f"kernels, {name}"):
            call = functools.partial(nlvr.answer, "bfloat16", pairs, temperature)
            call()
            _wait()
            table: dict[str, list[float]] = {}
            for event in _device_events(call):
                entry = table.setdefault(event.name, [0, 0.0])
                entry[0] += 1
                entry[1] += event.device_time_total
            top = sorted(table.items(), key=lambda item: -item[1][1])
            log.write(
                f"kernels, {name}", pairs=count, launches=sum(n for n, _ in table.values()),
                device_us=sum(us for _, us in table.values()),
                top=[{"name": kernel[:140], "launches": n, "us": round(us, 1)} for kernel, (n, us) in top[:25]],
            )  # fmt: skip


# ---- how launches overlap -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording(one_stream: bool = False, short: int | None = None):
    """Recordings made here have no second stream, or let launches of up to ``short`` programs overlap."""
    with contextlib.ExitStack() as stack:
        if one_stream:
            for module in (beside, layers):
                stack.enter_context(mock.patch.object(module, "recorded", lambda x: False))
        if short is not None:
            from madtp_kernels import triton_utils

            stack.enter_context(mock.patch.object(triton_utils, "SHORT", short))
        repeats.forget()  # what was prepared before launches as it was decided then
        yield
    repeats.forget()


VARIANTS = {
    "as it is": {}, "one stream": {"one_stream": True}, "nothing overlaps": {"short": 0}, "up to 64 overlap": {"short": 64},
    "up to 132 overlap": {"short": 132}, "up to 528 overlap": {"short": 528},
}  # fmt: skip


def variants(log: Log) -> None:
    """Whether a second stream and overlapping launches pay: models recorded in several ways, replayed in turn."""
    rules = {**TEMPERATURES, **dict(list(RANKED.items())[-1:])}
    for count in dict.fromkeys((PAIRS[-1], PAIRS[0])):
        pairs = pairs_of(log, "bfloat16", count)
        for name, rule in rules.items():
            facts = {"pairs": count, "rule": name}
            with log.guarding(f"{name}, variants", **facts):
                _in_turn(log, functools.partial(nlvr.answer, "bfloat16", pairs, rule), facts)


def _in_turn(log: Log, call: Callable[[], object], facts: dict) -> None:
    replays = {}
    for variant, options in VARIANTS.items():
        with recording(**options):
            call()
            _wait()
            if ON_GPU and not log.rehearsal:
                replays[variant] = measure._captured(call)
                replays[variant]()
                _wait()
    times: dict[str, list[float]] = {variant: [] for variant in replays}
    for _ in range(30 if facts["pairs"] == 1 else 8):
        for variant, replay in replays.items():
            measure._flush()
            start, end = _between_events(replay)
            _wait()
            times[variant].append(start.elapsed_time(end) * 1e3)
    for variant, found in times.items():
        log.write(variant, **facts, us=statistics.median(found), us_min=min(found))
    if replays and facts["pairs"] == 1:
        log.write("launches in order", **facts, launches=_in_order(replays["as it is"]))


def _in_order(replay: Callable[[], object]) -> list[list]:
    """Of each launch of a replay the kernel, and the microseconds from the end of all before it to its own end."""
    events = sorted(_device_events(replay), key=lambda event: event.time_range.start)
    order, last = [], events[0].time_range.start if events else 0
    for event in events:
        end = event.time_range.end
        order.append([event.name[:40], round(max(0, end - last), 1)])
        last = max(last, end)
    return order


# ---- the same sample ------------------------------------------------------------------------------------------------


def _kept(output, pair: int, batch: int) -> list[list[int]]:
    """Ids that leave each layer: of the pair's left image, its right image, its statement."""
    lists = []
    for traces, sample in ((output.vision, pair), (output.vision, batch + pair), (output.text, pair)):
        for trace in traces:
            start, stop = trace.cu_seqlens[sample : sample + 2].tolist()
            lists.append(trace.ids[start:stop].tolist())
    return lists


def _compare(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """Ids in which they differ, and layers."""
    differing = [len(set(a) ^ set(b)) for a, b in zip(ours, theirs, strict=True)]
    return sum(differing), sum(map(bool, differing))


def same_sample(log: Log, dtype: str) -> None:
    count = PAIRS[0] if not DRY else 2
    pairs, temperature = pairs_of(log, dtype, count), TEMPERATURES["pruned 50%"]
    together = nlvr.answer(dtype, pairs, temperature)
    if log.rehearsal:
        nlvr.answer(dtype, pairs.take(0, 1), temperature)
        _wait()
        return
    again = nlvr.answer(dtype, pairs, temperature)
    order = torch.randperm(count, generator=inputs.generator(3))
    ids = pairs.input_ids.to_list()
    images = torch.cat([order, count + order]).to(pairs.pixels.device)
    shuffled = nlvr.answer(dtype, nlvr.Pairs.of(pairs.pixels[images], [ids[i] for i in order.tolist()]), temperature)
    chosen = sorted({0, 1, count // 3, count // 2, count - 1})
    for what in ("again", "permuted", "alone"):
        with log.guarding(what, dtype=dtype):
            differing, layers, logits = 0, 0, 0.0
            for pair in chosen:
                if what == "alone":
                    other = nlvr.answer(dtype, pairs.take(pair, pair + 1), temperature)
                    place, batch = 0, 1
                else:
                    other, batch = (again if what == "again" else shuffled), count
                    place = pair if what == "again" else order.tolist().index(pair)
                expected = _kept(together, pair, count)
                ids_here, layers_here = _compare(expected, _kept(other, place, batch))
                differing, layers = differing + ids_here, layers + layers_here
                logits = max(logits, (other.logits[place] - together.logits[pair]).abs().max().item())
            log.write(
                what, dtype=dtype, samples=len(chosen), differing_ids=differing, differing_layers=layers,
                layers=len(chosen) * len(expected), ids=sum(map(len, expected)), logits_differ_by=logits,
            )  # fmt: skip


# ---- bare launches --------------------------------------------------------------------------------------------------


def launches(log: Log) -> None:
    """Each kernel once between the profiler's start and stop."""
    if not ON_GPU:
        return
    data, scores = test_operations.Attended("bfloat16", BATCH), test_operations.Scored("bfloat16", BATCH)
    state = data.attend()
    calls = [lambda: data.importance(*state), scores.compacted, scores.score, data.attend]
    for first in (True, False):
        layer = test_operations.Multiplied("bfloat16", BATCH, 1.0, first)
        with log.guarding("launches"):
            from madtp_kernels.linear import triton as implementation

            arguments = (layer.x, layer.weight, layer.bias, layer.cu, layer.activation or "", layer.residual)
            tile = implementation._tiles(layer.x, layer.weight)[0 if first else 1]
            calls.insert(1, functools.partial(implementation._multiply, tile, *arguments))
    for call in calls:
        with log.guarding("launches"):
            call()
            _wait()
            torch.cuda.profiler.start()
            call()
            _wait()
            torch.cuda.profiler.stop()


def small(log: Log) -> None:
    """Empty samples, single tokens, lengths around a tile's, spare rows full of NaN."""
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    import helpers

    generator = inputs.generator(0)
    # In a rehearsal the extension is still being compiled.
    kernels = (("triton",) if log.rehearsal else ("triton", "cuda")) if ON_GPU else ("cpu",)
    for dtype in DTYPES.values():
        for op in helpers.OPERATIONS:
            case = helpers.CASES[op](generator, [0, 1, 2, 3, 0, 17, 64, 65, 129, 0], dtype=dtype)
            case = helpers.with_spare_rows(case, 5)
            exact = helpers.run(op, case, "reference")
            for backend in kernels:
                if backend == "cuda" and op in backends._WITHOUT_CUDA:
                    continue
                facts = {"dtype": str(dtype), "backend": backend}
                with log.guarding(op, **facts):
                    pairs = zip(helpers.run(op, case, backend), exact, strict=True)
                    errors = [(a.double() - b.double()).abs().nan_to_num(0).max().item() for a, b in pairs if b.numel()]
                    log.write(op, **facts, largest_errors=errors)
        with log.guarding("rows and layers", dtype=str(dtype)):
            _small_rows_and_layers(log, dtype, kernels[0])
        with log.guarding("linear", dtype=str(dtype)):
            if not ON_GPU:
                continue
            from madtp_kernels.linear import tiles
            from madtp_kernels.linear import triton as implementation

            cu = torch.tensor([0, 212], dtype=torch.int32, device=measure.DEVICE)
            for width, columns in ((128, 304), (128, 300), (100, 33), (7, 33)):
                x, weight = (inputs.tokens([n], width, dtype=dtype, seed=n) for n in (230, columns))
                residual = inputs.tokens([230], columns, dtype=dtype, seed=1)
                tried = implementation._tiles(x, weight)
                if columns % 8 == 0:  # also stored by the copy engine
                    tried = [tile for tile in tiles.CANDIDATES if tile.stored][:1] if tried is tiles.COPY_ENGINE else ()
                for tile in tried:
                    ours = implementation._multiply(tile, x, weight, None, cu, "gelu", residual)[:212]
                    exact = F.gelu(x[:212].double() @ weight.double().mT) + residual[:212].double()
                    facts = {"dtype": str(dtype), "tile": [*tile], "width": width, "columns": columns}
                    log.write("linear", **facts, relative_error=relative_error(ours, exact))


def _small_rows_and_layers(log: Log, dtype: torch.dtype, backend: str) -> None:
    """Selection by scoring, which a second call of the same shapes takes; merging; two layers in one launch."""
    lengths = [0, 1, 2, 3, 0, 17, 64, 65, 129, 0]
    cu, tokens = inputs.packed(inputs.tokens([281], 1, dtype=dtype, seed=1), [281]).cu_seqlens, 281
    x = inputs.packed(inputs.tokens([tokens], 64, dtype=dtype, seed=2), lengths)
    entries, weights = (
        inputs.tokens([30], 64, dtype=dtype, seed=3),
        inputs.tokens([128], 64, dtype=dtype, seed=4).chunk(2),
    )
    scores = inputs.tokens([tokens], 1, dtype=torch.float32, seed=5)[:, 0].exp()
    for _ in range(2):
        pruned = prune(x, x.values, entries, scores, scores / 129, 20.0, exact=False, backend=backend).compacted
    keep = scores > 1
    norms = merge_scores(x.values, scores, x.cu_seqlens, x.max_seqlen, free=~keep, backend=backend).inverse_norms
    into = nearest_kept(x.values, keep, x.cu_seqlens, x.max_seqlen, inverse_norms=norms, backend=backend)
    merged = merge_tokens(x, into, append="mean", carry=(pruned.ids,), exact=False, backend=backend)
    layer_norm(merged.tokens.values, entries[0], None, merged.tokens.cu_seqlens, backend=backend)
    unmerge(merged.tokens.values, merged.rows, x.cu_seqlens, backend=backend)
    pair = linear_pair(x, weights, (None, None), form="both", backend=backend)
    linear_pair(pair, weights, (None, None), form="columns", backend=backend)
    linear(x.values, weights[0], None, cu, norm=(entries[0], None, 1e-6), backend=backend)
    _wait()
    log.write("rows and layers", dtype=str(dtype), rows=int(pruned.tokens.cu_seqlens[-1]))


# ---- command line ---------------------------------------------------------------------------------------------------

DRY = False
PARTS: dict[str, Callable[[Log], None]] = {
    "build": build,
    "build-tiles": functools.partial(build, tiles=True),
    "build-short": lambda log: build(
        log, parts=[part for part in REHEARSALS if part not in ("same-float32", "layer-norm")]
    ),
    "ceilings": ceilings,
    "attention": attended,
    "scoring": scored,
    "layer-norm": normalised,
    "linear-gelu": functools.partial(multiplied, first=True),
    "linear-residual": functools.partial(multiplied, first=False),
    "linear-gelu-full": functools.partial(multiplied, first=True, shares=(1.0,)),
    "linear-residual-full": functools.partial(multiplied, first=False, shares=(1.0,)),
    "cuda-backend": cuda_backend,
    **{f"nlvr-{count}": functools.partial(forwards, count=count) for count in PAIRS},
    "block": vision_block,
    "ranked-operations": ranked_operations,
    "ranked-block": ranked_block,
    **{f"ranked-{count}": functools.partial(forwards, count=count, rules=RANKED) for count in PAIRS},
    "pairs": paired,
    "agreement": agreement,
    "kernels": kernels,
    "variants": variants,
    "same-bfloat16": functools.partial(same_sample, dtype="bfloat16"),
    "same-float32": functools.partial(same_sample, dtype="float32"),
    "launches": launches,
    "small": small,
}
STAGES = {
    "operations": ["ceilings", "attention", "scoring", "layer-norm", "linear-gelu", "linear-residual", "cuda-backend"],
    "operations-short": ["ceilings", "attention", "scoring", "linear-gelu-full", "linear-residual-full"],
    "model": [f"nlvr-{count}" for count in PAIRS] + ["kernels", "block", "agreement"],
    "ranked": ["ranked-operations", *(f"ranked-{count}" for count in PAIRS if count != 32), "ranked-block"],
    "same-sample": ["same-bfloat16", "same-float32"],
}
# Parts that compile something of their own, the longest first.
REHEARSALS = [
    "linear-gelu", "same-float32", *(f"nlvr-{count}" for count in PAIRS), "linear-residual", "attention", "scoring", "block",
    "agreement", "same-bfloat16", "small", "ranked-64", "ranked-1", "ranked-operations", "pairs", "layer-norm",
]  # fmt: skip


def dry_run() -> None:
    """Sizes that a slow machine computes in a second."""
    global DRY, BATCH, PAIRS, SECONDS
    DRY, BATCH, PAIRS, SECONDS = True, "2 x 33", (1,), 0.01
    measure._LARGE_BYTES = 2**22
    nlvr.model = functools.cache(_small_model)


def _small_model(dtype: str):
    from madtp import NLVRConfig
    from madtp.config import TextConfig, VisionConfig
    from madtp.tasks.nlvr.model import NLVR
    from madtp.weights import randomize

    vision = VisionConfig(image_size=96, patch_size=16, embed_dim=128, depth=2, num_heads=2, sd_num=20, sd_dim=128)
    text = TextConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, vocab_size=200,
        max_position_embeddings=64, encoder_width=128,
    )  # fmt: skip
    net = NLVR(NLVRConfig(vision, text, merge_from=1), 4.0).to(DTYPES[dtype]).to(measure.DEVICE)
    randomize(net)
    return net.eval()


def _device_is_usable() -> bool:
    """After a kernel's fault nothing runs in this process any more."""
    if not ON_GPU:
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def table(path: str) -> int:
    """The figures of a file, one short line each."""
    known = set("stage figure us warm_us host_us eager_us host_us_min us_min us_quartiles top".split())
    print(f"{'figure':<34} {'us':>9} {'warm':>9} {'eager':>9} {'host':>9}")
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        times = [record.get(name) for name in ("us", "warm_us", "eager_us", "host_us")]
        shown = " ".join(f"{'-' if time is None else format(time, '.1f'):>9}" for time in times)
        facts = {key: value for key, value in record.items() if key not in known}
        rest = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in facts.items())
        print(f"{record['figure'][:34]:<34} {shown} {rest[:110]}".rstrip())
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}, or one of {', '.join(PARTS)}")
    parser.add_argument("--out", metavar="FILE", help="append the lines here; they are printed in any case")
    parser.add_argument("--rehearsal", action="store_true", help="make every call once and time nothing")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--table", metavar="FILE", help="print the lines of a file as a table instead")
    arguments = parser.parse_args()
    if arguments.table:
        return table(arguments.table)
    parts = [part for stage in arguments.stages for part in STAGES.get(stage, [stage])]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no stage {', '.join(sorted(unknown))}")
    if arguments.dry_run:
        dry_run()
    log = Log(arguments.out, arguments.rehearsal)
    with torch.inference_mode():
        for number, part in enumerate(parts):
            log.stage = part
            with log.guarding(part):
                PARTS[part](log)
            if not _device_is_usable() and parts[number + 1 :]:
                flags = [flag for flag in sys.argv[1:] if flag not in arguments.stages]
                os.execv(sys.executable, [sys.executable, str(HERE), *parts[number + 1 :], *flags])
    return 1 if log.errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
