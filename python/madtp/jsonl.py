"""Long runs over many rows: batched, resumable, one record for each row, whatever happens.

While a run goes on its records are in OUTPUT.partial, of which the first line says what the run is. They are
appended batch by batch and forced to disk; OUTPUT itself appears only when it is complete. A run that was
stopped, by Ctrl-C, a crash or a power cut, goes on where it stopped when it is started again in the same way.
What a row means is the caller's business.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import io
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .files import is_regular, open_regular, parse_json, read_bytes, replacing, writing
from .resume import ResumeError, lock, read_object, require_same

__all__ = [
    "Log",
    "ResumeError",
    "Summary",
    "answered",
    "held",
    "numbered",
    "require_new",
    "row_of",
    "run",
    "split_fields",
    "to_line",
]

READERS = 8  # threads that prepare rows; image decoding releases the interpreter's lock

_REMEDY = "remove it, or give --overwrite"
_DEEPEST = 100  # levels of a row's lists and objects; Python's reader and writer give up at different depths

Rows = str | os.PathLike | Sequence[dict | bytes]
"""A JSON Lines file, a pipe or "-" for standard input, each line an object, blank lines passed over; or the objects, or
the lines, themselves."""


@dataclass
class Summary:
    """`rows` in the output, of which `resumed` were there before, and the reason for each row that failed."""

    rows: int = 0
    resumed: int = 0
    failed: dict[int, str] = field(default_factory=dict)

    def count(self, records: Iterable[dict]) -> None:
        """Add records of rows."""
        for record in records:
            self.rows += 1
            if "error" in record:
                self.failed[record["row"]] = record["error"]


def run(
    source: Rows,
    output: str | os.PathLike,
    prepare: Callable[[int, dict], object],
    answer: Callable[[list], list[dict]],
    *,
    settings: dict,
    batch_size: int = 8,
    overwrite: bool = False,
    publish: Callable[[Iterator[dict], Path], None] | None = None,
    **options,
) -> Summary:
    """Answer every row.

    Args:
        source: the rows. A row's number is its line in the file, or its place in the sequence, from 1.
        output: one JSON object per row, in their order: ``{"row": n, ...}`` with what `answer` gave, or
            ``{"row": n, "error": reason}``.
        prepare: turns the number and the object of one row into an instance; what it raises is that row's
            error. Several threads call it.
        answer: turns up to `batch_size` instances into as many objects.
        settings: what determines the answers, as JSON values; a stopped run goes on only under the same ones.
        overwrite: begin anew, even if there is an output, complete or not.
        publish: writes all records to the path `output`, if that is not to be JSON Lines; called at the end,
            and again where that was interrupted.
        options: of :func:`answered`.

    A run goes on at the beginning of a batch, so that its batches are those of a run that was not stopped:
    with the same `batch_size` the output has the same bytes.

    Raises:
        ResumeError: `output` exists, is being written by another process, or was begun with other rows or
            other settings.
        OSError: `source` cannot be read or `output` cannot be written.
    """
    output = Path(output)
    source = held(source)
    digest, total = _scan(source)
    partial = output.with_name(output.name + ".partial")
    if not partial.exists():
        require_new(output, overwrite)
    publish = publish or _publish
    with Log(partial, {"input": f"sha256 {digest[:16]}", **settings}, overwrite=overwrite) as log:
        summary, last_row = _resume(log, batch_size, total, source)
        if output.exists() and not overwrite:
            if summary.rows < total or not _is_published(_checked(log, source), publish, output):
                require_new(output, overwrite)
            partial.unlink(missing_ok=True)  # the run was stopped after it had written the output
            return summary
        rows = ((n, row) for n, row in numbered(source) if n > last_row)
        options = {"total": total, "initial": summary.rows, **options}
        with contextlib.closing(answered(rows, prepare, answer, batch_size, **options)) as batches:
            for records in batches:
                log.append(records)
                summary.count(records)
        publish(_checked(log, source), output)
        partial.unlink(missing_ok=True)
    return summary


def require_new(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise ResumeError for a file that is there and must not be replaced."""
    if not overwrite and os.path.exists(path):
        raise ResumeError(f"{path} exists already; {_REMEDY}")


def held(source: Rows) -> Rows:
    """The same rows, in memory where they come from what can be read only once."""
    if isinstance(source, (str, os.PathLike)) and not is_regular(source):
        return io.BytesIO(read_bytes(source)).readlines()
    return source


def _checked(log: Log, source: Rows) -> Iterator[dict]:
    """The records, one for each row, or ResumeError: whoever else writes to the file, what is published is complete."""
    records = (record for record, _ in log.read())
    for row, record in itertools.zip_longest((n for n, _ in numbered(source)), records):
        if record is None or record.get("row") != row:
            found = "no record" if record is None else f"record {record.get('row')}"
            raise ResumeError(
                f"{log.path} was changed by something else: {found} where that of row {row} is due; "
                "the same command goes on from the records before"
            )
        yield record


def _is_published(records: Iterator[dict], publish: Callable[[Iterator[dict], Path], None], output: Path) -> bool:
    """Whether the output is what these records make."""
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.", dir=output.parent) as folder:
        publish(records, Path(folder) / output.name)
        names = os.listdir(folder)
        return filecmp.cmpfiles(folder, output.parent, names, shallow=False)[0] == names


def answered(
    rows: Iterable[tuple[int, dict | bytes]],
    prepare: Callable[[int, dict], object],
    answer: Callable[[list], list[dict]],
    batch_size: int,
    *,
    total: int | None = None,
    initial: int = 0,
    keep: Sequence[str] = (),
    answers: Sequence[str] | None = None,
    defaults: dict | None = None,
    unit: str = "rows",
    note: Callable[[], str] | None = None,
    progress: bool | None = None,
) -> Iterator[list[dict]]:
    """Records of numbered rows, batch by batch; files are read while the model works.

    Args:
        rows: number, and object or line of JSON.
        prepare, answer, batch_size: as in :func:`run`.
        total, initial, unit: of the progress bar: all rows, those done before, what they are.
        keep: keys of a row's object that its record begins with, also where it failed.
        answers: keys of what `answer` gives. Where they are named, a record has all other keys of its row too; those
            that are among `answers`, or "row", "error" or "input", are in an object "input".
        defaults: of keys that a row lacks.
        note: what to show behind the progress bar; asked after each batch.
        progress: whether to show it; by default where standard error is a terminal.
    """
    hidden = None if progress is None else not progress
    with (
        ThreadPoolExecutor(READERS) as pool,
        tqdm(total=total, initial=initial, unit=f" {unit}", disable=hidden) as bar,
    ):
        try:
            ready = partial(_prepare, prepare, partial(_kept, keep, answers), defaults or {})
            for batch in _prepared(iter(rows), pool, ready, batch_size):
                records = _records(batch, answer)
                yield records
                if note:
                    bar.set_postfix_str(note(), refresh=False)
                bar.update(len(records))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def numbered(source: Rows) -> Iterator[tuple[int, dict | bytes]]:
    """Rows with their numbers; those of a file as lines, blank ones left out."""
    with _opened(held(source)) as rows:
        yield from ((n, row) for n, row in enumerate(rows, 1) if not isinstance(row, bytes) or row.strip())


def _opened(source: Rows) -> contextlib.AbstractContextManager[Iterable]:
    return open_regular(source) if isinstance(source, (str, os.PathLike)) else contextlib.nullcontext(source)


def to_line(record: dict) -> bytes:
    """A record as a line of JSON Lines, in UTF-8. File names that are not UTF-8 come back as they were."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _scan(source: Rows) -> tuple[str, int]:
    """SHA-256 of the rows and their number."""
    digest, rows = hashlib.sha256(), 0
    with _opened(source) as lines:
        for row in lines:
            line = row if isinstance(row, bytes) else to_line(row)
            digest.update(line)
            rows += bool(line.strip())
    return digest.hexdigest(), rows


class Log(contextlib.AbstractContextManager):
    """Records in a file that only grows, locked by one process. Its first line says what they are.

    Lines are forced to disk as they are appended, so that a crash can harm no more than the last of them.

    Args:
        path: of the file; made if it is not there.
        header: what the records are; a file that begins otherwise is refused.
        overwrite: drop what is there.

    Raises:
        ResumeError: another header, a file that is not of this kind, or one that another process writes.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, header: dict, *, overwrite: bool = False) -> None:
        self.path, self.header = Path(path), header
        if not is_regular(path):
            raise ResumeError(f"{path} is no regular file; {_REMEDY}")
        self._file = open(path, "a+b")  # noqa: SIM115 (closed by `__exit__`)
        try:
            lock(self._file, path)
            if overwrite:
                self._file.truncate(0)
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def __exit__(self, *_) -> None:
        with writing(self.path):  # again what a write that failed has left
            self._file.close()

    def _begin(self) -> None:
        self._file.seek(0)
        first, header = self._file.readline(), to_line(self.header)
        # New, or stopped within its first line.
        if not first.endswith(b"\n") and header.startswith(first):
            self._file.truncate(0)
            self.append([self.header])
            first = header
        require_same(self.path, read_object(first), self.header, _REMEDY)
        self._start = len(first)

    def read(self) -> Iterator[tuple[dict, int]]:
        """Records from the first to the last that was written whole, each with the place where it ends."""
        self._file.seek(self._start)
        end = self._start
        for line in self._file:
            record = read_object(line) if line.endswith(b"\n") else None
            if record is None:
                return
            end += len(line)
            yield record, end

    def cut(self, end: int | None = None) -> None:
        """Drop what comes after this place; by default all records."""
        self._file.truncate(self._start if end is None else end)

    def append(self, records: list[dict]) -> None:
        """Write records and wait until they are on disk."""
        with writing(self.path):
            self._file.write(b"".join(map(to_line, records)))
            self._file.flush()
            os.fsync(self._file.fileno())


def _resume(log: Log, batch_size: int, total: int, source: Rows) -> tuple[Summary, int]:
    """Cut off what is not a whole batch of the first rows; what is there already, and the last row of it."""
    summary, last_row, end, batch = Summary(), 0, None, []
    for (row, _), (record, place) in zip(numbered(source), log.read(), strict=False):
        if record.get("row") != row:
            break
        batch.append(record)
        if len(batch) == batch_size or summary.rows + len(batch) == total:
            summary.count(batch)
            last_row, end, batch = row, place, []
    log.cut(end)
    summary.resumed = summary.rows
    return summary, last_row


def _prepared(
    rows: Iterator[tuple[int, dict | bytes]], pool, prepare, batch_size: int
) -> Iterator[list[tuple[int, Future]]]:
    """Batches of rows, each begun one batch ahead."""
    ahead: list[tuple[int, Future]] = []
    while True:
        batch = itertools.islice(rows, batch_size)
        ahead, ready = [(n, pool.submit(prepare, n, row)) for n, row in batch], ahead
        if ready:
            yield ready
        if not ahead:
            return


def _prepare(prepare, kept, defaults: dict, n: int, row: dict | bytes) -> tuple[dict, object, str | None]:
    """What the record begins with, the instance, and the reason why there is none."""
    start = {}
    try:
        if isinstance(row, bytes):
            row = row_of(row)
        row = {**row, **{key: value for key, value in defaults.items() if key not in row}}
        start = kept(row)
        return start, prepare(n, row), None
    except ValueError as error:
        return start, None, str(error)
    except Exception as error:  # whatever a single row brings about must not end the run
        return start, None, f"{type(error).__name__}: {error}"


def _kept(keep: Sequence[str], answers: Sequence[str] | None, row: dict) -> dict:
    """What a record has of its row."""
    kept = {key: row[key] for key in keep if key in row}
    if answers is None:
        return kept
    shown, hidden = split_fields({key: value for key, value in row.items() if key not in kept}, answers)
    return kept | shown | hidden


def split_fields(fields: Mapping, answers: Iterable[str]) -> tuple[dict, dict]:
    """Fields of a row that its record may have as they are, and the others, as an object "input": names that records have
    themselves, among them those in ``answers``."""
    own = {"row", "error", "input", *answers}
    hidden = {key: value for key, value in fields.items() if key in own}
    return {key: value for key, value in fields.items() if key not in own}, {"input": hidden} if hidden else {}


def row_of(line: bytes) -> dict:
    """The object in a line. Raises ValueError for anything else, and for what could not be written again."""
    try:
        row = parse_json(line)
        _check(row, _DEEPEST)
    except RecursionError as error:
        raise ValueError(f"not JSON of at most {_DEEPEST} levels") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def _check(value, levels: int) -> None:
    """Raise for what could not be written again."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    if isinstance(value, (dict, list)):
        if not levels:
            raise RecursionError
        for inner in value.values() if isinstance(value, dict) else value:
            _check(inner, levels - 1)


def _records(batch: list[tuple[int, Future]], answer) -> list[dict]:
    prepared = [(n, *future.result()) for n, future in batch]
    instances = [instance for _, _, instance, reason in prepared if reason is None]
    answers = answer(instances) if instances else []
    if len(answers) != len(instances):
        raise RuntimeError(f"{len(answers)} answers to {len(instances)} instances")
    answers = iter(answers)
    return [
        {"row": n, **kept, **(next(answers) if reason is None else {"error": reason})}
        for n, kept, _, reason in prepared
    ]


def _publish(records: Iterator[dict], output: Path) -> None:
    with replacing(output) as file:
        file.writelines(map(to_line, records))
