"""A run over shards: rows are read and decoded ahead of the model, results are written shard by shard."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .callables import answer_all
from .readers import Row, Shard, Source, Span
from .workers import Decoders, Failure
from .writers import Results, ShardFiles

__all__ = ["Part", "Progress", "Summary", "run"]

_CHUNK = 8  # rows that a decoder gets at a time
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Part:
    """Which of a run's shards are this process's: number ``index`` of ``count``, counted from 0."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"--shard: expected i/n with i from 0 to n - 1, got {self.index}/{self.count}")

    @classmethod
    def parse(cls, text: str) -> Part:
        """Of "i/n". Raises ValueError."""
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal()):
            raise ValueError(f"--shard: expected i/n, as in 0/8, got {text!r}")
        return cls(int(index), int(count))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> tuple[Part, int, str | None]:
        """What torchrun or SLURM (srun, also in job arrays) say: the part, the place among this machine's processes,
        who says so.
        """

        def number(name: str, default: int | None = None) -> int:
            text = environment.get(name, "" if default is None else str(default))
            if not text.strip().isdecimal():
                raise ValueError(f"{name}: expected a number in this variable of the environment, got {text!r}")
            return int(text)

        if "RANK" in environment and "WORLD_SIZE" in environment:
            index, count, place = number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK", 0)
            says = ["RANK and WORLD_SIZE"]
        else:
            index, count, place, says = 0, 1, number("SLURM_LOCALID", 0), []
            if "SLURM_ARRAY_TASK_ID" in environment and number("SLURM_ARRAY_TASK_COUNT", 1) > 1:
                first, step = number("SLURM_ARRAY_TASK_MIN", 0), max(1, number("SLURM_ARRAY_TASK_STEP", 1))
                index, count = (number("SLURM_ARRAY_TASK_ID") - first) // step, number("SLURM_ARRAY_TASK_COUNT")
                says.append("the job array")
            # A batch script has SLURM_NTASKS too, but is one process; only what srun starts has the number of its step.
            tasks = number("SLURM_STEP_NUM_TASKS", 1)
            if tasks > 1:
                index, count = index * tasks + number("SLURM_PROCID"), count * tasks
                says.append("srun")
        if not 0 <= index < count:
            raise ValueError(f"{' and '.join(says)}: process {index} of {count}, which are counted from 0")
        return cls(index, count), place, " and ".join(says) or None

    def has(self, number: int) -> bool:
        """Whether a shard belongs to this part."""
        return number % self.count == self.index


@dataclass
class Summary:
    """What a run did."""

    shards: int = 0
    """That were done now."""
    before: int = 0
    """That had been done before."""
    rows: int = 0
    """In the shards that were done now."""
    failed: list[tuple[str, str, str]] = field(default_factory=list)
    """(shard, key, reason) of the first rows that failed, in shards of this part."""
    failures: int = 0
    """How many failed, in all shards of this part."""
    waited: float = 0.0
    """Seconds in which the model waited for rows."""
    answering: float = 0.0
    """Seconds in which the model was at work."""

    def fail(self, shard: Shard, key: str, reason: str) -> None:
        """Count in a row."""
        self.failures += 1
        if len(self.failed) < 20:
            self.failed.append((shard.name, key, reason))


class Progress:
    """Told how a run goes on; does nothing."""

    def shards(self, done: int, total: int | None, before: int = 0) -> None:
        """So many shards are done of so many, and so many of them had been done before."""

    def rows(self, count: int, answers: list[dict]) -> None:
        """So many rows more are done, these of them with an answer."""


def run(
    source: Source,
    results: Results,
    prepare: Callable[[Row], object],
    answer: Callable[[list], list[dict]],
    record: Callable[[Row], dict],
    *,
    part: Part = Part(),
    workers: int = 1,
    batch_size: int = 32,
    batch_tokens: int | None = None,
    tokens: Callable[[object], int] | None = None,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Answer the rows of all shards of a part that are not done.

    Args:
        prepare: turns a row into an instance; picklable, called in ``workers`` processes.
        answer: turns instances into as many results: JSON values, and an array "embedding".
        record: what a row's record has besides its result.
        batch_size: the most rows that the model gets at a time.
        batch_tokens: the most tokens instead, which ``tokens`` counts for an instance; a single one may have more.
        retry_failed: answer the failed rows of shards that are done once more.

    Raises:
        ResumeError: results of other rows or settings, or a shard that another process is writing.
        OSError: what cannot be read or written at all.
        FloatingPointError: the model's dtype cannot hold its activations.
    """
    summary, progress = Summary(), progress or Progress()
    total = source.total
    if total is not None:
        total = len(range(part.index, total, part.count))
    size = (lambda _: 1) if batch_tokens is None else tokens
    most = batch_size if batch_tokens is None else batch_tokens
    ahead = 2 * workers + 2 * max(1, batch_size // _CHUNK)
    with (
        Decoders(prepare, workers) as decoders,
        _Ahead(source, results, part, decoders, ahead, retry_failed, summary) as feed,
    ):
        for shard, old, lock in feed.shards():
            with lock, ShardFiles(results, shard) as files:
                for batch in _batches(feed.rows(), size, most):
                    began = time.perf_counter()
                    found = _answered(batch, answer, done=summary.rows > 0)
                    for row, result in found:
                        kept = isinstance(result, _Kept)
                        files.add(row, old[row.number] if kept else result, {} if kept else record(row))
                        if isinstance(result, Failure):
                            summary.fail(shard, row.key, result.reason)
                    summary.rows += len(batch)
                    summary.answering += time.perf_counter() - began
                    progress.rows(len(batch), [result for _, result in found if isinstance(result, dict)])
                files.finish()
            summary.shards += 1
            progress.shards(summary.shards + summary.before, total, summary.before)
        summary.waited = feed.waited
    return summary


class _Kept:
    """In place of an instance: the row's result is there from an earlier run."""


def _answered(batch: list[tuple[Row, object]], answer: Callable[[list], list[dict]], done: bool) -> list[tuple]:
    """Rows with their results, those that need no answer as they are."""
    places = [n for n, (_, given) in enumerate(batch) if not isinstance(given, (Failure, _Kept))]
    answers = dict(zip(places, answer_all(answer, [batch[n][1] for n in places], done=done) if places else []))
    return [(row, answers.get(n, given)) for n, (row, given) in enumerate(batch)]


def _batches(
    rows: Iterator[tuple[Row, object]], size: Callable[[object], int], most: int
) -> Iterator[list[tuple[Row, object]]]:
    batch, together = [], 0
    for row, given in rows:
        own = 0 if isinstance(given, (Failure, _Kept)) else size(given)
        if batch and (together + own > most or len(batch) >= 4096):
            yield batch
            batch, together = [], 0
        batch.append((row, given))
        together += own
    if batch:
        yield batch


class _Ahead:
    """Reads shards and has their rows decoded in a thread of its own, a bounded number of rows ahead."""

    def __init__(self, source, results, part, decoders, ahead: int, retry_failed: bool, summary: Summary) -> None:
        self._source, self._results, self._part, self._decoders = source, results, part, decoders
        self._retry, self._summary = retry_failed, summary
        self._items: queue.Queue = queue.Queue(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self.waited = 0.0

    def __enter__(self) -> _Ahead:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._items.get(timeout=0.05)
            self._thread.join(0.05)

    # ---- what the thread does ----

    def _put(self, item: object) -> None:
        while True:
            if self._stopped.is_set():
                raise _StoppedError
            with contextlib.suppress(queue.Full):
                self._items.put(item, timeout=0.1)
                return

    def _feed(self) -> None:
        try:
            for shard in self._source:
                if self._stopped.is_set():
                    return
                if self._part.has(shard.number) and (claim := self._claim(shard)) is not None:
                    self._put((shard, *claim))
                    for rows in _chunks(shard.rows()):
                        old = claim[0]
                        todo = [row for row in rows if row.number not in old]
                        self._put((rows, self._decoders.submit(todo), old))
                    self._put(None)
            self._put(_StoppedError())
        except _StoppedError:
            return
        except BaseException as error:  # for the thread that asks
            with contextlib.suppress(_StoppedError):
                self._put(error)

    def _claim(self, shard: Shard) -> tuple[dict[int, dict], contextlib.ExitStack] | None:
        """The results that stay, and the lock of a shard that is to be done; None if it is."""
        marker = self._results.marker(shard)
        if not self._again(marker):
            self._results.forget_lock(shard)  # of a process that was killed after the shard was done
            self._count(shard, marker)
            return None
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._results.locked(shard))
            marker = self._results.marker(shard)  # another process may just have finished it
            if not self._again(marker):
                self._count(shard, marker)
                return None
            return self._results.old(shard, marker) if marker else {}, stack.pop_all()

    def _again(self, marker: Mapping | None) -> bool:
        return marker is None or (self._retry and marker["failed"] > 0)

    def _count(self, shard: Shard, marker: Mapping) -> None:
        self._summary.before += 1
        if marker["failed"]:
            for failure in self._results.failures(shard):
                self._summary.fail(shard, failure["key"], failure["error"])

    # ---- what the others ask for ----

    def _next(self):
        began = time.perf_counter()
        item = self._items.get()
        self.waited += time.perf_counter() - began
        if isinstance(item, BaseException) and not isinstance(item, _StoppedError):
            raise item
        return item

    def shards(self) -> Iterator[tuple[Shard, dict[int, dict], contextlib.ExitStack]]:
        """Shards to do, with the results that stay and the lock; between them :meth:`rows` has to be used up."""
        while not isinstance(item := self._next(), _StoppedError):
            yield item

    def rows(self) -> Iterator[tuple[Row, object]]:
        """The rows of the shard that came last, with their instances, in order."""
        while (item := self._next()) is not None:
            rows, future, old = item
            began = time.perf_counter()
            instances = iter(future.result())
            self.waited += time.perf_counter() - began
            for row in rows:
                yield row, _Kept() if row.number in old else next(instances)


class _StoppedError(Exception):
    """There are no more rows, or nobody wants them."""


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows a few at a time; fewer where their bytes are many."""
    chunk, size = [], 0
    for row in rows:
        chunk.append(row)
        size += len(row.image) if isinstance(row.image, bytes) else row.image.size if isinstance(row.image, Span) else 0
        if len(chunk) == _CHUNK or size > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
