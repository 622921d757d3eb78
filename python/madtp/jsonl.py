"""Long runs over a JSON Lines file: batched, resumable, one output line for each input row, whatever happens.

While a run goes on its lines are in OUTPUT.partial, of which the first line says what the run is. Lines are
appended batch by batch and forced to disk; OUTPUT itself appears only when it is complete. A run that was
stopped, by Ctrl-C, a crash or a power cut, goes on where it stopped when it is started again in the same way.
What a row means is the caller's business.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

__all__ = ["ResumeError", "Summary", "run"]

_READERS = 8  # threads that prepare rows; image decoding releases the interpreter's lock


class ResumeError(ValueError):
    """The output, or what there is of it, belongs to another run."""


@dataclass
class Summary:
    """`rows` in the output, of which `resumed` were there before, and the reason for each row that failed."""

    rows: int = 0
    resumed: int = 0
    failed: dict[int, str] = field(default_factory=dict)


def run(
    source: str | os.PathLike,
    output: str | os.PathLike,
    prepare: Callable[[dict], object],
    answer: Callable[[list], list[dict]],
    *,
    settings: dict,
    batch_size: int = 8,
    overwrite: bool = False,
) -> Summary:
    """Answer every row of a JSON Lines file.

    Args:
        source: input; each line is a JSON object. Blank lines are passed over.
        output: one JSON object per row of the input, in its order: ``{"row": n, ...}`` with what `answer`
            gave, or ``{"row": n, "error": reason}``; n is the line number in the input, from 1.
        prepare: turns the object of one row into an instance; what it raises is that row's error. Several
            threads call it.
        answer: turns up to `batch_size` instances into as many objects.
        settings: what determines the answers, as JSON values; a stopped run goes on only under the same ones.
        overwrite: begin anew, even if there is an output, complete or not.

    Raises:
        ResumeError: `output` exists, is being written by another process, or was begun with another input or
            other settings.
        OSError: `source` cannot be read or `output` cannot be written.
    """
    output = Path(output)
    digest, total = _scan(source)
    header = {"input": f"sha256 {digest[:16]}", **settings}
    if output.exists() and not overwrite:
        raise ResumeError(f"{output} exists already; remove it, or give --overwrite")
    partial = output.with_name(output.name + ".partial")
    with open(partial, "a+b") as file:
        _lock(file, output)
        if overwrite:
            file.truncate(0)
        summary, last_row = _resume(file, header, partial)
        _work(source, file, prepare, answer, batch_size, last_row, summary, total)
        _publish(file, output)
        partial.unlink()
    return summary


def _scan(source) -> tuple[str, int]:
    """SHA-256 of a file and the number of its lines that are not blank."""
    digest, rows = hashlib.sha256(), 0
    with open(source, "rb") as file:
        for line in file:
            digest.update(line)
            rows += bool(line.strip())
    return digest.hexdigest(), rows


def _lock(file, output: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ResumeError(f"{output} is being written by another process") from error


def _resume(file, header: dict, partial: Path) -> tuple[Summary, int]:
    """Cut off what was not written whole; what is there already, and the last row of it."""
    summary, last_row, end = Summary(), 0, 0
    file.seek(0)
    for number, line in enumerate(file):
        record = _parse(line) if line.endswith(b"\n") else None
        if number == 0:
            if record is None:
                break  # stopped within the first line: nothing was done yet
            if record != header:
                keys = [key for key in {**header, **record} if header.get(key) != record.get(key)]
                differences = "; ".join(
                    f"{key}: {record.get(key)} then, {header.get(key)} now" for key in keys
                )
                raise ResumeError(
                    f"{partial} is of another run ({differences}); remove it, or give --overwrite"
                )
        elif record is None or not isinstance(record.get("row"), int) or record["row"] <= last_row:
            break
        else:
            last_row = record["row"]
            _count(summary, record)
        end += len(line)
    file.truncate(end)
    if end == 0:
        _append(file, [header])
    summary.resumed = summary.rows
    return summary, last_row


def _parse(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _count(summary: Summary, record: dict) -> None:
    summary.rows += 1
    if "error" in record:
        summary.failed[record["row"]] = record["error"]


def _append(file, records: list[dict]) -> None:
    file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    file.flush()
    os.fsync(file.fileno())


def _work(
    source, file, prepare, answer, batch_size: int, last_row: int, summary: Summary, total: int
) -> None:
    with (
        open(source, "rb") as lines,
        ThreadPoolExecutor(_READERS) as pool,
        tqdm(total=total, initial=summary.rows, unit=" rows", disable=None) as bar,
    ):
        rows = ((n, line) for n, line in enumerate(lines, 1) if line.strip() and n > last_row)
        try:
            for batch in _prepared(rows, pool, prepare, batch_size):
                records = _answered(batch, answer)
                _append(file, records)
                for record in records:
                    _count(summary, record)
                bar.update(len(records))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _prepared(
    rows: Iterator[tuple[int, bytes]], pool, prepare, batch_size: int
) -> Iterator[list[tuple[int, Future]]]:
    """Batches of rows, each begun one batch ahead, so that files are read while the model works."""
    ahead: list[tuple[int, Future]] = []
    while True:
        batch = itertools.islice(rows, batch_size)
        ahead, ready = [(n, pool.submit(_prepare_line, prepare, line)) for n, line in batch], ahead
        if ready:
            yield ready
        if not ahead:
            return


def _prepare_line(prepare, line: bytes):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return prepare(row)


def _answered(batch: list[tuple[int, Future]], answer) -> list[dict]:
    instances, failed = {}, {}
    for n, future in batch:
        try:
            instances[n] = future.result()
        except ValueError as error:
            failed[n] = str(error)
        except Exception as error:  # whatever a single row brings about must not end the run
            failed[n] = f"{type(error).__name__}: {error}"
    answers = dict(zip(instances, answer(list(instances.values())), strict=True)) if instances else {}
    return [{"row": n, "error": failed[n]} if n in failed else {"row": n, **answers[n]} for n, _ in batch]


def _publish(file, output: Path) -> None:
    """Everything but the first line becomes `output`, at once or not at all."""
    temporary = output.with_name(output.name + ".tmp")
    file.seek(0)
    file.readline()
    with open(temporary, "wb") as complete:
        shutil.copyfileobj(file, complete)
        complete.flush()
        os.fsync(complete.fileno())
    os.replace(temporary, output)
    folder = os.open(output.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name, before the partial file goes
    os.close(folder)
