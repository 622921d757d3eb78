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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..bulk.readers import SHARD_SIZE, Source
from ..bulk.run import Part, Summary, run
from ..bulk.workers import default_workers
from ..bulk.writers import Results, require_pyarrow
from ..jsonl import split_fields
from ..options import UsageError, option, positive
from .batch import COMMON, TokenMeter, complain, settings_of, shortened, truncation
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


@dataclass(kw_only=True)
class BulkRun:
    """A command's answers to the rows of all sources, in a folder.

    Args:
        options: of the command.
        make: a callable of :mod:`madtp.bulk.callables` for the model.
        tasks, words: as for :func:`madtp.cli.options.load_model`.
        sources: as :class:`madtp.bulk.readers.Source` takes them.
        images: whether rows are about images; where not, about texts.
        name, vectors: as for :class:`madtp.bulk.writers.Results`.
        answers, tokens: fields of a result; those with token counts.
        unit: what rows are called.
        settings: what determines the results, besides the model.
    """

    options: Any
    make: Callable
    tasks: Sequence[str]
    sources: Sequence[str]
    images: bool = True
    words: bool = True
    name: str = "records"
    vectors: str | None = None
    answers: Sequence[str] = ()
    tokens: Sequence[str] = ()
    unit: str = "images"
    settings: dict = dataclasses.field(default_factory=dict)

    def run(self) -> int:
        """Do the part of this process; returns the exit code."""
        options = self.options
        if not self.sources:
            raise UsageError("give images, tars, tables or --input")
        if options.workers is not None and options.workers < 0:
            raise UsageError(f"--workers: expected at least 0, got {options.workers}")
        child = _Child(*json.loads(os.environ["MADTP_BULK"])) if "MADTP_BULK" in os.environ else None
        if child:
            _end_with_parent()
        options.format = options.format or ("parquet" if self.vectors else "jsonl")
        if options.format == "parquet":
            require_pyarrow()
        size = options.shard_size or SHARD_SIZE
        source = Source(self.sources, image_key=options.image_key, shard_size=size, images=self.images)
        if child:
            return self._answer(source, Part.parse(child.part), child.place, child)
        part, place, says = (Part.parse(options.shard), 0, None) if options.shard else Part.from_environment()
        if options.overwrite:
            if part.count > 1:
                raise ValueError("--overwrite: other processes may be writing to the folder; remove it instead")
            Results.clear(options.output)
        if options.devices is not None:
            if source.standard_input:
                raise ValueError("--devices: standard input can be read by one process only")
            return self._in_children(part, source.total)
        if says and not options.quiet:
            print(f"madtp: process {part.index} of {part.count}, by {says}", file=sys.stderr)
        return self._answer(source, part, place)

    def _answer(self, source, part, place: int, child: _Child | None = None) -> int:
        """Answer the rows of a part in this process, number ``place`` of its machine."""
        options, processes = self.options, child.processes if child else 1
        devices = _devices(options.devices)
        options.device = devices[place % len(devices)] if devices else _own_device(options.device, place)
        if processes > 1 and not options.threads and options.device == "cpu":
            options.threads = max(1, len(os.sched_getaffinity(0)) // processes)
        model = load_model(options, self.tasks, words=self.words)
        answering = self.make(model)
        prepare = answering.prepare()
        progress = _Pipe(child.progress) if child else _Bar(self.unit, self.tokens, hidden=options.quiet)
        workers = default_workers(options.device, processes) if options.workers is None else options.workers
        try:
            with contextlib.closing(progress):
                summary = run(
                    source,
                    self._results(model, source),
                    prepare,
                    lambda instances: [shortened(found) for found in answering.answer(instances)],
                    partial(self._record, model, prepare),
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
        return self._report(summary, part)

    def _results(self, model, source):
        """Where results go, with all that they depend on."""
        options = self.options
        facts = settings_of(options, model, texts=self.words, **self.settings)
        facts["device"] = options.device.split(":")[0]
        facts |= {"image_key": options.image_key, "shard_size": source.shard_size}
        if options.grouping == "batch":
            facts |= {"batch_size": options.batch_size, "batch_tokens": options.batch_tokens}
        dtype = (options.npy_dtype or "float32") if self.vectors else "float32"
        return Results(options.output, facts, vectors=self.vectors, name=self.name, format=options.format, dtype=dtype)

    def _record(self, model, prepare, row) -> dict:
        """What the record of a row has besides its result."""
        first = "image_path" if self.vectors else "image"
        own = {"embedding", *COMMON, *self.answers, *self.tokens}
        fields, hidden = split_fields(row.fields, own | {first} if self.images else own)
        fields = ({first: row.key} if self.images else {}) | fields
        with contextlib.suppress(ValueError):  # a row without a text has an error of its own
            text = prepare.text_of(row)
            if text is not None:
                if not any(key in row.fields for key in prepare.texts):  # it is the default
                    fields[prepare.texts[0]] = text
                fields |= truncation(model, text)
        return fields | hidden

    def _report(self, summary, part) -> int:
        """Say what a run did, and what failed; the exit code."""
        options = self.options
        if not summary.shards and not summary.before:
            if part.count > 1:
                return 0  # there are fewer shards than processes
            raise ValueError("there are no rows in any of the sources")
        if not options.quiet:
            before = f", {summary.before} shards were done before" if summary.before else ""
            print(f"{summary.rows} {self.unit} in {summary.shards} shards of {options.output}{before}")
        if not summary.failures:
            return 0
        errors = os.path.join(options.output, "errors")
        what = f"{summary.failures} rows have no result (see {errors})"
        return complain(what, [": ".join(failure) for failure in summary.failed], summary.failures)

    def _in_children(self, part, total: int | None) -> int:
        """Start a process for each device, show what they do together, and report; the exit code."""
        summary, processes = Summary(), _Processes(self.options.argv)
        mine = None if total is None else len(range(part.index, total, part.count))
        try:
            with contextlib.closing(_Bar(self.unit, self.tokens, hidden=self.options.quiet)) as bar:
                count = len(_devices(self.options.devices))
                for place in range(count):
                    processes.start(f"{part.index * count + place}/{part.count * count}", place, count)
                shards = 0
                for message in processes.messages():
                    if "rows" in message:
                        bar.rows(message["rows"], message["answers"])
                    elif "shard" in message:
                        shards += 1
                        bar.shards(shards, mine)
                    else:
                        _add(summary, message["summary"])
            bad = processes.failure()
        except KeyboardInterrupt:
            bad = 130
        finally:
            processes.stop()
        if bad == 130:
            _say_interrupted()
        return self._report(summary, part) if bad is None else 2 if bad < 0 else bad


def _say_interrupted() -> None:
    print("madtp: interrupted; the same command goes on with the shards that are not done", file=sys.stderr)


# ---- progress -----------------------------------------------------------------------------------------------------


class _Bar:
    """A progress bar: rows a second, tokens kept, and the time left as soon as a first shard tells how many rows there
    are.
    """

    def __init__(self, unit: str, tokens: Sequence[str], *, hidden: bool) -> None:
        self._meter = TokenMeter(tokens)
        self._bar = tqdm(unit=f" {unit}", disable=True if hidden else None)

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
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def _own_device(device: str, place: int) -> str:
    """Of several processes on a machine that all were told "cuda", each takes its own GPU."""
    if device != "cuda":
        return device
    count = torch.cuda.device_count()
    return f"cuda:{place % count}" if count > 1 else device


class _Processes:
    """The processes that a command starts to do a part of it each.

    Args:
        argv: the command line.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "madtp", *(word for word in argv if word != "--overwrite")]
        self._children: list[subprocess.Popen] = []
        self._selector = selectors.DefaultSelector()

    def start(self, part: str, place: int, count: int) -> None:
        """Start number ``place`` of ``count``."""
        reader, writer = os.pipe()
        environment = {**os.environ, "MADTP_BULK": json.dumps(_Child(part, place, count, writer))}
        # In a session of its own: Ctrl-C reaches it through this process, once.
        self._children.append(
            subprocess.Popen(
                self._command, env=environment, pass_fds=[writer], start_new_session=True, stdin=subprocess.DEVNULL
            )
        )
        os.close(writer)
        self._selector.register(os.fdopen(reader, encoding="utf-8"), selectors.EVENT_READ)

    def messages(self) -> Iterator[dict]:
        """What the processes tell, until all have ended, or one has failed."""
        while self._selector.get_map() and not any(child.poll() not in (None, 0, 1) for child in self._children):
            for key, _ in self._selector.select():
                line = key.fileobj.readline()
                if line.endswith("\n"):
                    yield json.loads(line)
                else:
                    self._selector.unregister(key.fileobj)
                    key.fileobj.close()

    def failure(self) -> int | None:
        """The exit code of one that failed; None if none did."""
        ended = not self._selector.get_map()
        codes = [child.wait() if ended else child.poll() for child in self._children]
        return next((code for code in codes if code not in (None, 0, 1)), None)

    def stop(self) -> None:
        """Interrupt those that still run."""
        running = [child for child in self._children if child.poll() is None]
        for child in running:
            child.send_signal(signal.SIGINT)
        for child in running:
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
