"""Commands whose output is a folder: options of runs over millions of rows, several processes, their progress."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..bulk.readers import SHARD_SIZE
from ..options import UsageError, option, positive
from .batch import COMMON, TokenMeter, settings_of, shortened, truncation
from .options import load_model, only_with

RESUMED = """\
With a folder as output (a name that ends with /), rows may also come from webdataset tars, CSV and parquet, and results
are written shard by shard: a tar is a shard, and of anything else --shard-size rows. After an interruption, the same
command goes on with the shards that are not done; processes of torchrun and srun share them (see docs/scale.md).
"""
"""For the help of commands over shards."""

MANY = "many rows (with --output FOLDER/)"
"""Title of the options that only a folder has."""


@dataclass(kw_only=True)
class BulkOptions:
    """Options of an output that is a folder."""

    format: str | None = option(
        "of files with records (default: parquet beside vectors, else jsonl)", choices=["parquet", "jsonl"], group=MANY
    )
    image_key: str | None = option("column, field or tar suffix that holds the image", metavar="NAME", group=MANY)
    text_key: str | None = option("column, field or tar suffix that holds the text", metavar="NAME", group=MANY)
    shard_size: int | None = option(
        f"rows of a shard, unless it is a tar (default: {SHARD_SIZE})", type=positive, metavar="N", group=MANY
    )
    shard: str | None = option(
        "do each N-th shard only, from I on (default: all, or this process's)", metavar="I/N", group=MANY
    )
    devices: str | None = option(
        "a process for each of these: all, or a list such as cuda:0,cuda:1 or cpu,cpu", metavar="LIST", group=MANY
    )
    workers: int | None = option(
        "processes that read and decode (default: by the number of cores)", type=int, metavar="N", group=MANY
    )
    batch_tokens: int | None = option(
        "fill batches up to so many tokens, instead of --batch-size", type=positive, metavar="N", group=MANY
    )
    retry_failed: bool | None = option("answer failed rows once more", action="store_true", group=MANY)


class _Child(NamedTuple):
    """What a process is told that was started by another one of the same command."""

    part: str
    place: int
    processes: int
    progress: int
    """Descriptor to write lines of JSON to."""


def is_bulk(options) -> bool:
    """Whether the output is a folder.

    Raises:
        UsageError: options that say nothing where it is not.
    """
    output = options.output
    folder = output is not None and (output.endswith(os.sep) or os.path.isfile(os.path.join(output, "run.json")))
    names = [field.name for field in dataclasses.fields(options) if field.metadata.get("group") == MANY]
    only_with(options, folder, "without --output FOLDER/", *names)
    if folder and options.save_overlay:
        raise UsageError("--save-overlay: of no use with --output FOLDER/")
    return folder


def run_bulk(
    options,
    make: Callable,
    tasks: Sequence[str],
    *,
    sources: Sequence[str],
    images: bool = True,
    words: bool = True,
    name: str = "records",
    vectors: str | None = None,
    answers: Sequence[str] = (),
    tokens: Sequence[str] = (),
    unit: str = "images",
    **settings,
) -> int:
    """Answer the rows of all sources; returns the exit code.

    Args:
        make: a callable of :mod:`madtp.bulk.callables` for the model.
        tasks, words: as for :func:`madtp.cli.options.load_model`.
        sources: as :class:`madtp.bulk.readers.Source` takes them.
        images: whether rows are about images; where not, about texts.
        name, vectors: as for :class:`madtp.bulk.writers.Results`.
        answers, tokens: fields of a result; those with token counts.
        settings: what determines the results, besides the model.
    """
    from ..bulk.readers import Source
    from ..bulk.run import Part, run
    from ..bulk.workers import default_workers
    from ..bulk.writers import Results, require_pyarrow

    if not sources:
        raise UsageError("give images, tars, tables or --input")
    if options.workers is not None and options.workers < 0:
        raise UsageError(f"--workers: expected at least 0, got {options.workers}")
    child = _Child(*json.loads(os.environ["MADTP_BULK"])) if "MADTP_BULK" in os.environ else None
    if child:
        _end_with_parent()
    format = options.format or ("parquet" if vectors else "jsonl")
    if format == "parquet":
        require_pyarrow()
    source = Source(sources, image_key=options.image_key, shard_size=options.shard_size or SHARD_SIZE, images=images)
    part, place, says = Part(), 0, None
    if child:
        part, place = Part.parse(child.part), child.place
    elif options.shard:
        part = Part.parse(options.shard)
    else:
        part, place, says = Part.from_environment()
    if options.overwrite and not child:
        if part.count > 1:
            raise ValueError("--overwrite: other processes may be writing to the folder; remove it instead")
        Results.clear(options.output)
    devices = _devices(options.devices)
    if devices and not child:
        if source.standard_input:
            raise ValueError("--devices: standard input can be read by one process only")
        return _run_children(options, devices, part, source.total, unit, tokens)
    options.device = devices[place % len(devices)] if devices else _own_device(options.device, place)
    processes = child.processes if child else 1
    if processes > 1 and not options.threads and options.device == "cpu":
        options.threads = max(1, len(os.sched_getaffinity(0)) // processes)

    model = load_model(options, tasks, words=words)
    answering = make(model)
    prepare = answering.prepare()
    facts = settings_of(options, model, texts=words, **settings)
    facts["device"] = options.device.split(":")[0]
    facts |= {"image_key": options.image_key, "shard_size": source.shard_size}
    if options.grouping == "batch":
        facts |= {"batch_size": options.batch_size, "batch_tokens": options.batch_tokens}
    dtype = (options.npy_dtype or "float32") if vectors else "float32"
    results = Results(options.output, facts, vectors=vectors, name=name, format=format, dtype=dtype)
    if says and not options.quiet:
        print(f"madtp: process {part.index} of {part.count}, by {says}", file=sys.stderr)

    reserved = {"row", "error", "input", "embedding", *COMMON, *answers, *tokens}
    first = "image_path" if vectors else "image"

    def record(row) -> dict:
        fields = {first: row.key} if images else {}
        hidden = {}
        for key, value in row.fields.items():
            (hidden if key in reserved or key in fields else fields)[key] = value
        with contextlib.suppress(ValueError):  # a row without a text has an error of its own
            text = prepare.text_of(row)
            if text is not None:
                if not any(key in row.fields for key in prepare.texts):  # it is the default
                    fields[prepare.texts[0]] = text
                fields |= truncation(model, text)
        return fields | ({"input": hidden} if hidden else {})

    progress = _Pipe(child.progress) if child else _Bar(unit, tokens, hidden=options.quiet)
    workers = default_workers(options.device, processes) if options.workers is None else options.workers
    try:
        with contextlib.closing(progress):
            summary = run(
                source,
                results,
                prepare,
                lambda instances: [shortened(found) for found in answering.answer(instances)],
                record,
                part=part,
                workers=workers,
                batch_size=options.batch_size,
                batch_tokens=options.batch_tokens,
                tokens=answering.tokens,
                retry_failed=options.retry_failed is True,
                progress=progress,
            )
            if child:
                progress.summary(summary)
    except KeyboardInterrupt:
        if not child:
            _say_interrupted()
        return 130
    if child:
        return 1 if summary.failures else 0
    return _report(options, summary, part, unit)


def _report(options, summary, part, unit: str) -> int:
    """What a run did, and what failed; the exit code."""
    if not summary.shards and not summary.before:
        if part.count > 1:
            return 0  # there are fewer shards than processes
        raise ValueError("there are no rows in any of the sources")
    if not options.quiet:
        before = f", {summary.before} shards were done before" if summary.before else ""
        print(f"{summary.rows} {unit} in {summary.shards} shards of {options.output}{before}")
    if not summary.failures:
        return 0
    print(
        f"madtp: {summary.failures} rows have no result (see {os.path.join(options.output, 'errors')}):",
        file=sys.stderr,
    )
    for shard, key, reason in summary.failed:
        print(f"  {shard}: {key}: {reason}", file=sys.stderr)
    if summary.failures > len(summary.failed):
        print(f"  and {summary.failures - len(summary.failed)} more", file=sys.stderr)
    return 1


def _say_interrupted() -> None:
    print("madtp: interrupted; the same command goes on with the shards that are not done", file=sys.stderr)


# ---- progress -----------------------------------------------------------------------------------------------------


class _Bar:
    """A progress bar: rows a second, tokens kept, and the time left as soon as a first shard tells how many rows there
    are.
    """

    def __init__(self, unit: str, tokens: Sequence[str], *, hidden: bool) -> None:
        from tqdm import tqdm

        self._meter = TokenMeter(tokens)
        self._bar = tqdm(unit=f" {unit}", disable=True if hidden else None)
        self._done = 0

    def rows(self, count: int, answers: list[dict]) -> None:
        self._meter.seen(answers)
        if note := self._meter.note():
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)

    def shards(self, done: int, total: int | None, before: int = 0) -> None:
        if total is not None and not self._bar.disable:
            self._bar.total = round(self._bar.n / (done - before) * (total - before))
            self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


class _Pipe:
    """Tells another process, in lines of JSON."""

    def __init__(self, descriptor: int) -> None:
        self._file = open(descriptor, "w", buffering=1, encoding="utf-8")  # noqa: SIM115

    def rows(self, count: int, answers: list[dict]) -> None:
        kept = [{name: [one[name][0], one[name][-1]] for name in one if name.endswith("_tokens")} for one in answers]
        self._write(rows=count, answers=kept)

    def shards(self, done: int, total: int | None, before: int = 0) -> None:
        self._write(shard=1)

    def summary(self, summary) -> None:
        self._write(summary=vars(summary))

    def _write(self, **message) -> None:
        try:
            self._file.write(json.dumps(message) + "\n")
        except BrokenPipeError:
            raise KeyboardInterrupt from None  # whoever started this process is gone

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


# ---- several processes --------------------------------------------------------------------------------------------


def _devices(names: str | None) -> list[str]:
    """The devices of `--devices`, one process each; none if it was not given."""
    if names is None:
        return []
    if names != "all":
        return [name.strip() for name in names.split(",") if name.strip()] or ["cpu"]
    import torch

    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _own_device(device: str, place: int) -> str:
    """Of several processes on a machine that all were told "cuda", each takes its own GPU."""
    if device != "cuda":
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{place % count}" if count > 1 else device


def _run_children(options, devices: list[str], part, total: int | None, unit: str, tokens: Sequence[str]) -> int:
    """Start a process for each device, show what they do together, and report; the exit code."""
    from ..bulk.run import Summary

    children: list[subprocess.Popen] = []
    selector, summary, shards = selectors.DefaultSelector(), Summary(), 0
    mine = None if total is None else len(range(part.index, total, part.count))
    command = [sys.executable, "-m", "madtp", *(word for word in options.argv if word != "--overwrite")]
    try:
        with contextlib.closing(_Bar(unit, tokens, hidden=options.quiet)) as bar:
            for place in range(len(devices)):
                reader, writer = os.pipe()
                share = f"{part.index * len(devices) + place}/{part.count * len(devices)}"
                told = json.dumps(_Child(share, place, len(devices), writer))
                # In a session of its own: Ctrl-C reaches it through this process, once.
                children.append(
                    subprocess.Popen(
                        command, env={**os.environ, "MADTP_BULK": told}, pass_fds=[writer], start_new_session=True,
                        stdin=subprocess.DEVNULL,
                    )
                )  # fmt: skip
                os.close(writer)
                selector.register(os.fdopen(reader, encoding="utf-8"), selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    line = key.fileobj.readline()
                    if not line.endswith("\n"):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
                        continue
                    message = json.loads(line)
                    if "rows" in message:
                        bar.rows(message["rows"], message["answers"])
                    elif "shard" in message:
                        shards += 1
                        bar.shards(shards, mine)
                    else:
                        _add(summary, message["summary"])
                if any(child.poll() not in (None, 0, 1) for child in children):
                    break
            ended = not selector.get_map()
            codes = [child.wait() if ended else child.poll() for child in children]
        bad = next((code for code in codes if code not in (None, 0, 1)), None)
        if bad == 130:
            _say_interrupted()
        return _report(options, summary, part, unit) if bad is None else 2 if bad < 0 else bad
    except KeyboardInterrupt:
        _say_interrupted()
        return 130
    finally:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGINT)
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
            if child.poll() is None:
                child.kill()


def _add(summary, other: dict) -> None:
    """Count in what another process did."""
    for name in ("shards", "before", "rows", "failures", "waited", "answering"):
        setattr(summary, name, getattr(summary, name) + other[name])
    summary.failed = (summary.failed + [tuple(failure) for failure in other["failed"]])[:20]


def _end_with_parent() -> None:
    """Have Linux interrupt this process when the one that started it ends, however that ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
    PR_SET_PDEATHSIG = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)
    if os.getppid() == 1:
        raise KeyboardInterrupt
