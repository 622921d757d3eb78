"""Where results go: for each shard files of its own, which appear whole, and a marker that is written last.

    OUTPUT/run.json                         what the results depend on
    OUTPUT/stats/000000.json                marker of a shard that is done: its source, how many rows, how many failed
    OUTPUT/errors/errors_000000.jsonl       rows without a result, if there are any: key, stage, kind, error

and of embeddings, in the layout of clip-retrieval, which its index tools read:

    OUTPUT/img_emb/img_emb_000000.npy       vectors [n, D] (text_emb/text_emb_000000.npy of texts)
    OUTPUT/metadata/metadata_000000.parquet row j is about vector j

or of captions and answers `captions_000000.jsonl` (or `.parquet`), with every row in it. Files that are being written
are in `OUTPUT/.unfinished`.

A single file of records is :mod:`madtp.jsonl`'s, of which evaluations and retrieval are made, too: it goes on at the
batch where it was stopped, here a shard is done anew.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from ..files import name_full, replacing, sync
from ..jsonl import to_line
from ..resume import ResumeError, locked, read_object, require_same
from .readers import Row, Shard
from .workers import Failure

__all__ = ["Results", "ShardFiles"]

_DIGITS = 6  # of shards' numbers: sorted as text they are in order
_PATIENCE = 10.0  # seconds for a process that was stopped to let go of a shard


class Results:
    """The folder of a run's results.

    Args:
        folder: made if it is not there.
        settings: what determines the results, as JSON values; a folder with others is refused.
        vectors: "img" or "text" for embeddings; None for records.
        name: of the files with records ("captions").
        format: of records, and of what is known about vectors: "parquet" or "jsonl".
        dtype: of vectors, "float32" or "float16".

    Raises:
        ResumeError: a folder of another run, or with other files.
        ImportError: parquet without pyarrow.
        OSError: a folder that cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping,
        *,
        vectors: str | None = None,
        name: str = "records",
        format: str = "parquet",
        dtype: str = "float32",
    ) -> None:
        if format == "parquet":
            require_pyarrow()
        self.folder, self.vectors, self.name, self.format, self.dtype = Path(folder), vectors, name, format, dtype
        self.settings = {**settings, "format": format, **({"vectors": vectors, "npy_dtype": dtype} if vectors else {})}
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "results are a folder, and this is a file", str(folder))
        self.folder.mkdir(parents=True, exist_ok=True)
        self._unfinished = self.folder / ".unfinished"
        self._agree()
        for part in ("stats", "errors", ".unfinished", *([f"{vectors}_emb", "metadata"] if vectors else [])):
            (self.folder / part).mkdir(exist_ok=True)

    def _agree(self) -> None:
        """Be the first to say what the run is, or compare with what was said."""
        path = self.folder / "run.json"
        if not path.exists():
            others = sorted(entry.name for entry in self.folder.iterdir() if entry.name not in (".unfinished",))
            if others:
                raise ResumeError(f"{self.folder}: holds other files ({', '.join(others[:3])}); name another folder")
            self._unfinished.mkdir(exist_ok=True)
            draft = self._unfinished / f"run-{os.getpid()}.json"
            draft.write_bytes(json.dumps(self.settings, indent=1).encode() + b"\n")
            with contextlib.suppress(FileExistsError):  # another process of the same run was faster
                os.link(draft, path)
            draft.unlink()
        require_same(
            self.folder, read_object(path.read_bytes()), self.settings, "name another folder, or give --overwrite"
        )

    @staticmethod
    def clear(folder: str | os.PathLike) -> None:
        """Remove a run's results; whatever else is in the folder stays. Raises ResumeError if it is none of ours."""
        folder = Path(folder)
        if not folder.is_dir() or not any(folder.iterdir()):
            return
        if not (folder / "run.json").is_file():
            raise ResumeError(f"{folder}: no results of a run, so nothing in it is overwritten; name another folder")
        for marker in sorted((folder / "stats").glob("*.json")):
            for name in _read_marker(marker)["files"]:
                (folder / name).unlink(missing_ok=True)
            marker.unlink()
        shutil.rmtree(folder / ".unfinished", ignore_errors=True)
        (folder / "run.json").unlink()
        for part in ("stats", "errors", "metadata", "img_emb", "text_emb"):
            with contextlib.suppress(OSError):
                (folder / part).rmdir()

    # ---- shards ----

    def marker(self, shard: Shard) -> dict | None:
        """What was said of a shard when it was done; None if it is not.

        Raises:
            ResumeError: its rows are other ones now, or a file of its results has another size.
        """
        try:
            found = _read_marker(self.folder / self._marker(shard.number))
        except FileNotFoundError:
            return None
        if found["digest"] != shard.digest:
            raise ResumeError(
                f"{self.folder}: shard {shard.number} was {found['source']} and is {shard.name} now, or its rows have "
                f"changed ({found['digest'][:15]} then, {shard.digest[:15]} now); name another folder, "
                "or give --overwrite"
            )
        for name, size in found["files"].items():
            path = self.folder / name
            if path.exists() and path.stat().st_size != size:  # files that were moved elsewhere are done, too
                raise ResumeError(
                    f"{path} was changed: {path.stat().st_size} bytes, {size} were written; "
                    f"remove {self._marker(shard.number)}, and it is made again"
                )
        return found

    @staticmethod
    def _marker(number: int) -> str:
        return f"stats/{number:0{_DIGITS}}.json"

    @contextlib.contextmanager
    def locked(self, shard: Shard) -> Iterator[None]:
        """Keep other processes away from a shard. Raises ResumeError if one has it for longer than a while."""
        path = self._lock(shard)
        with locked(path, f"{self.folder}: shard {shard.number}", _PATIENCE):
            yield
            path.unlink(missing_ok=True)

    def _lock(self, shard: Shard) -> Path:
        return self._unfinished / f"{shard.number:0{_DIGITS}}.lock"

    def forget_lock(self, shard: Shard) -> None:
        """Remove the lock of a shard that is done: nobody takes it again."""
        self._lock(shard).unlink(missing_ok=True)

    def failures(self, shard: Shard) -> list[dict]:
        """The rows of a shard that is done that failed; none where the file with them is gone."""
        path = self.folder / f"errors/errors_{shard.number:0{_DIGITS}}.jsonl"
        return read_records(path) if path.exists() else []

    def old(self, shard: Shard, marker: Mapping) -> dict[int, dict]:
        """The results of a shard that is done, by row; rows that failed are not among them. Vectors are "embedding".

        Raises:
            ResumeError: files that are gone.
        """
        names = list(marker["files"])
        gone = [name for name in names if not (self.folder / name).exists()]
        if gone:
            raise ResumeError(f"{self.folder / gone[0]} is gone, so its failed rows cannot be added to it")
        vectors, records = None, []
        for name in names:
            if name.endswith(".npy"):
                vectors = np.load(self.folder / name, mmap_mode="r")
            elif not name.startswith("errors"):
                records += read_records(self.folder / name)
        found = {record["row"]: record for record in records if not record.pop("error", None)}
        if vectors is not None:
            for vector, record in zip(vectors, found.values(), strict=True):
                record["embedding"] = vector
        return found


class ShardFiles:
    """A shard's results on their way to disk. Vectors and lines are written as they come, tables are held until the
    end.
    """

    def __init__(self, results: Results, shard: Shard) -> None:
        self._results, self._shard = results, shard
        self._stem = f"{shard.number:0{_DIGITS}}"
        self._records: list[dict] = []
        self._failures: list[dict] = []
        self._rows = self._vectors = 0
        self._npy = self._width = None

    def __enter__(self) -> ShardFiles:
        for left in self._results._unfinished.glob(f"{self._stem}-*"):
            left.unlink()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        name_full(error, self._results.folder)
        if self._npy is not None:
            with contextlib.suppress(OSError):  # what is done is on the disk
                self._npy.close()
        for left in self._results._unfinished.glob(f"{self._stem}-*"):
            left.unlink()

    def add(self, row: Row, result: dict | Failure, fields: Mapping) -> None:
        """A row with its result, or why it has none; rows come in their order.

        Args:
            fields: what else its record says, before the result.
        """
        self._rows += 1
        start = {"row": row.number, **fields}
        if isinstance(result, Failure):
            self._failures.append(
                {"row": row.number, "key": row.key, "stage": result.stage, "kind": result.kind, "error": result.reason}
            )
            if not self._results.vectors:
                self._records.append({**start, "error": result.reason})
            return
        result = dict(result)
        if self._results.vectors:
            self._write(np.asarray(result.pop("embedding")))
        self._records.append({**start, **result})

    def _write(self, vector: np.ndarray) -> None:
        if self._npy is None:
            self._npy = open(self._draft("npy"), "wb")  # noqa: SIM115
            self._width = len(vector)
            self._header(0)
        self._npy.write(np.ascontiguousarray(vector, dtype=self._type).tobytes())
        self._vectors += 1

    @property
    def _type(self) -> np.dtype:
        return np.dtype(self._results.dtype).newbyteorder("<")

    def _header(self, rows: int) -> None:
        """At the beginning of the file; it leaves room for any number of rows."""
        self._npy.seek(0)
        descr = np.lib.format.dtype_to_descr(self._type)
        np.lib.format.write_array_header_1_0(
            self._npy, {"descr": descr, "fortran_order": False, "shape": (rows, self._width)}
        )

    def _draft(self, suffix: str) -> Path:
        return self._results._unfinished / f"{self._stem}-{suffix}"

    def _names(self) -> dict[str, str]:
        """What each draft is called in the end."""
        results, stem = self._results, self._stem
        if not results.vectors:
            names = {"records": f"{results.name}_{stem}.{results.format}"}
        else:
            kind = f"{results.vectors}_emb"
            names = {"npy": f"{kind}/{kind}_{stem}.npy", "records": f"metadata/metadata_{stem}.{results.format}"}
        return {**names, "errors": f"errors/errors_{stem}.jsonl"}

    def finish(self) -> None:
        """Put everything under its own name, on the disk, and the marker after it.

        A shard without a single vector has no file of them, since tools that read pairs of files pass over empty ones.
        """
        folder, sizes = self._results.folder, {}
        place = folder / self._results._marker(self._shard.number)
        place.unlink(missing_ok=True)
        if self._npy is not None:
            self._header(self._vectors)
            _flush(self._npy)
        for kind, records, format in (
            ("records", self._records, self._results.format),
            ("errors", self._failures, "jsonl"),
        ):
            if records:
                with open(self._draft(kind), "wb") as file:
                    write_records(file, records, format)
                    _flush(file)
        for kind, name in self._names().items():
            draft = self._draft(kind)
            if draft.exists():
                sizes[name] = draft.stat().st_size
                os.replace(draft, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)  # of a run before this one
        for parent in {(folder / name).parent for name in sizes}:
            sync(parent)
        marker = {
            "shard": self._shard.number,
            "source": self._shard.name,
            "digest": self._shard.digest,
            "rows": self._rows,
            "failed": len(self._failures),
            "files": sizes,
        }
        with replacing(place) as file:
            file.write(to_line(marker))


def _read_marker(path: Path) -> dict:
    """What says that a shard is done. Raises ResumeError where it is damaged."""
    found = read_object(path.read_bytes())
    if found is None or not {"source", "digest", "failed", "files"} <= found.keys():
        raise ResumeError(f"{path} is damaged; remove it, and its shard is made again")
    return found


def _flush(file: IO) -> None:
    """Wait until a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def require_pyarrow() -> None:
    """Raises ImportError, with what helps, where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError("parquet needs pyarrow (pip install pyarrow); --format jsonl needs nothing") from error


def write_records(file, records: Iterable[Mapping], format: str) -> None:
    """Records as JSON Lines, or as a parquet table with a column for every field that any of them has."""
    if format == "jsonl":
        file.writelines(map(to_line, records))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = list(records)
    names = dict.fromkeys(name for record in records for name in record)
    table = pa.table({name: _column([record.get(name) for record in records]) for name in names})
    pq.write_table(table, file)


def _column(values: list):
    """An Arrow array of JSON values; where they have no common type, of texts: strings as they are, JSON of all others.
    Names of files that are not UTF-8 have escapes in place of the bytes that are not.
    """
    import pyarrow as pa

    for plain in (lambda value: value, _escaped):
        try:
            return pa.array(list(map(plain, values)))
        except UnicodeEncodeError:
            continue
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            break
    return pa.array([value if value is None else _text(value) for value in values])


def _text(value) -> str:
    return _escaped(value) if isinstance(value, str) else to_line(value).decode().rstrip("\n")


def _escaped(value):
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return {_escaped(name): _escaped(inner) for name, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


def read_records(path: str | os.PathLike) -> list[dict]:
    """The records of a file that :func:`write_records` wrote."""
    if str(path).endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.read_table(path).to_pylist()
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]
