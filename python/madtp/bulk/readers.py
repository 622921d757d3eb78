"""Where rows come from: folders and files of images, JSON Lines, CSV, parquet, webdataset tars, standard input.

Whatever the source, at most one shard's rows are in memory, and images are read where they are decoded.
"""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import hashlib
import itertools
import lzma
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..files import STANDARD, first_twice, open_regular, parse_json
from ..inputs import IMAGE_SUFFIXES, stream_images
from ..jsonl import row_of, to_line

__all__ = ["Row", "Shard", "Source", "Span", "expand_braces"]

SHARD_SIZE = 10_000
IMAGE_KEYS = tuple("image image_path path jpg jpeg png webp bytes image_bytes file_name filename file".split())
"""Where rows have their image unless it is said: the first of these that there is."""

_BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_TABLES = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
# Columns of images, by pyarrow's names.
_READABLE = ("string", "large_string", "binary", "large_binary", "fixed_size_binary")
_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


@dataclass(frozen=True)
class Span:
    """Bytes in a file; read by whoever decodes them."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The bytes. Raises ValueError where the file ends before them."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError(f"truncated: {len(content)} of {self.size} bytes are there")
        return content


class Row(NamedTuple):
    """One row of a shard."""

    number: int
    """Its place in the shard, from 0."""
    key: str
    """What names it in the shard: a path, the key of a tar's member, or the place in a file."""
    image: str | bytes | Span | None = None
    fields: dict = {}  # noqa: RUF012
    """Everything else: what its result is accompanied by."""
    error: str | None = None
    """Why there is nothing to answer."""


class Shard(NamedTuple):
    """Rows whose results are files of their own."""

    number: int
    name: str
    """The file, or the first of its rows."""
    digest: str
    """Of what tells whether it is the same shard: of rows that are listed, their content; of files, name and size."""
    rows: Callable[[], Iterator[Row]]


class Source:
    """The shards of everything that is named on a command line.

    Args:
        sources: image files, folders, patterns, tars, parquet files, CSV and JSON Lines files, "-" for JSON Lines on
            standard input; names may have braces, as in ``{000..127}.tar``.
        image_key: column, field or suffix of tar members that holds the image; by default the first of
            :data:`IMAGE_KEYS` that a table has, and whatever is an image in a tar.
        shard_size: rows of a shard that is not a tar. Row groups of parquet are never cut.
        images: whether rows need an image; where not, a table without one will do, and files of another kind have a
            text in every line.

    Raises:
        FileNotFoundError: a source that is not there.
        ValueError: a table without a usable image.
        ImportError: parquet without pyarrow.
    """

    def __init__(
        self,
        sources: Sequence[str | os.PathLike],
        *,
        image_key: str | None = None,
        shard_size: int = SHARD_SIZE,
        images: bool = True,
    ) -> None:
        self.image_key, self.shard_size, self.images = image_key, shard_size, images
        self._sources: list[tuple[str, str]] = []
        for source in map(os.fspath, sources):
            for path in expand_braces(source):
                self._add(path)

    def _add(self, source: str) -> None:
        """Note a source with its kind, and find out now what is wrong with it; of many images, only that they are."""
        if source == STANDARD:
            self._sources.append(("lines" if self.images else "texts", source))
            return
        exists = os.path.lexists(source)
        kind = "folder" if os.path.isdir(source) else self._kind(source) if exists else "pattern"
        self._sources.append((kind, source))
        for path in [source] if exists else stream_images([source]):
            kind = self._kind(path)
            if kind == "images":
                break
            if kind == "parquet":
                _parquet(path, self.image_key, self.images)

    def _kind(self, path: str) -> str:
        kind = _kind(path)
        return "texts" if kind == "images" and not self.images and not os.path.isdir(path) else kind

    def _paths(self) -> Iterator[tuple[str, str]]:
        """Kind and name of every file, one by one."""
        seen: set[tuple[int, int]] = set()
        for kind, source in self._sources:
            if kind == "folder":
                yield from (("images", path) for path in stream_images([source], seen))
            elif kind == "pattern":
                yield from ((self._kind(path), path) for path in stream_images([source], seen))
            else:
                yield kind, source

    @property
    def total(self) -> int | None:
        """How many shards there are, if that is known before they are read."""
        if any(kind not in ("tar", "parquet") for kind, _ in self._paths()):
            return None
        return sum(1 for _ in self)

    @property
    def standard_input(self) -> bool:
        """Whether rows come from standard input, which can be read only once."""
        return any(source == STANDARD for _, source in self._sources)

    def __iter__(self) -> Iterator[Shard]:
        numbers = itertools.count()
        for kind, group in itertools.groupby(self._paths(), key=lambda found: found[0]):
            paths = (path for _, path in group)
            if kind == "images":
                yield from self._listed(numbers, paths)
                continue
            for path in paths:
                if kind == "tar":
                    digest = _digest([_size(path)])
                    yield Shard(
                        next(numbers), path, digest, lambda path=path: read_tar(path, self.image_key, self.images)
                    )
                elif kind == "parquet":
                    yield from self._parquet(numbers, path)
                else:
                    yield from self._lines(numbers, path, kind)

    def _listed(self, numbers: Iterator[int], paths: Iterator[str]) -> Iterator[Shard]:
        while chunk := list(itertools.islice(paths, self.shard_size)):
            digest = _digest(chunk)
            yield Shard(
                next(numbers),
                chunk[0],
                digest,
                lambda chunk=chunk: (Row(n, path, path) for n, path in enumerate(chunk)),
            )

    def _lines(self, numbers: Iterator[int], path: str, kind: str) -> Iterator[Shard]:
        """Of files whose rows are read one after the other; a row is its line and fields, or an error."""
        if kind == "texts":
            found = _text_rows(path)
        else:
            found = _json_rows(path) if kind == "lines" else _csv_rows(path, _TABLES[kind])
        while chunk := list(itertools.islice(found, self.shard_size)):
            name = f"{path}:{chunk[0][0]}"
            digest = _digest(to_line(fields).decode() if error is None else error for _, fields, error in chunk)
            yield Shard(next(numbers), name, digest, lambda chunk=chunk: self._rows(path, chunk))

    def _rows(self, path: str, chunk: Iterable[tuple[int, dict, str | None]]) -> Iterator[Row]:
        folder = "" if path == STANDARD else os.path.dirname(path)
        for number, (line, fields, error) in enumerate(chunk):
            yield self._row(number, f"{os.path.basename(path)}:{line}", fields, folder, error)

    def _row(self, number: int, place: str, fields: dict, folder: str, error: str | None = None) -> Row:
        """A row of a table: its image is taken out of its fields."""
        if error is not None:
            return Row(number, place, error=error)
        fields = dict(fields)
        key = self.image_key or next((name for name in IMAGE_KEYS if name in fields), None)
        if key is None or key not in fields:
            missing = (
                f"no {key!r} in this row" if key else f"no image in this row (it has {', '.join(fields) or 'nothing'})"
            )
            return Row(number, place, None, fields, missing if self.images else None)
        image = fields.pop(key)
        if isinstance(image, dict):  # datasets of Hugging Face
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            if "://" in image:
                return Row(number, image, None, fields, f"{image}: addresses are not fetched; give paths or bytes")
            path = os.path.join(folder, image)
            return Row(number, path, path, fields)
        if isinstance(image, (bytes, bytearray)):
            return Row(number, place, bytes(image), fields)
        reason = (
            "no image: the field is empty"
            if image in (None, "")
            else f"{key!r} must be a path or bytes, got {type(image).__name__}"
        )
        return Row(number, place, None, fields, reason if self.images else None)

    def _parquet(self, numbers: Iterator[int], path: str) -> Iterator[Shard]:
        try:
            file, _ = _parquet(path, self.image_key, self.images)
        except OSError as error:  # damaged since it was looked at
            yield _unreadable(next(numbers), path, str(error))
            return
        if file is None:
            yield _unreadable(next(numbers), path, "no parquet file, or one without its end")
            return
        counts = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        groups, rows = [], 0
        for group, count in enumerate(counts):
            if rows and rows + count > self.shard_size:
                yield self._groups(next(numbers), path, groups)
                groups, rows = [], 0
            groups.append(group)
            rows += count
        if rows:
            yield self._groups(next(numbers), path, groups)

    def _groups(self, number: int, path: str, groups: list[int]) -> Shard:
        return Shard(
            number,
            f"{path}:{groups[0]}",
            _digest([f"{_size(path)} {groups}"]),
            lambda: self._parquet_rows(path, groups),
        )

    def _parquet_rows(self, path: str, groups: list[int]) -> Iterator[Row]:
        file, key = _parquet(path, self.image_key, self.images)
        first = sum(file.metadata.row_group(group).num_rows for group in range(groups[0]))
        number, name = 0, os.path.basename(path)
        for group in groups:
            until = number + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=64, row_groups=[group]):
                    for fields in batch.to_pylist():
                        image = {key: fields.pop(key)} if key else {}
                        fields = _json_value(fields) | image
                        yield self._row(number, f"{name}:{first + number}", fields, os.path.dirname(path))
                        number += 1
            except (OSError, ValueError) as error:  # a damaged page: its row group is lost, the others are not
                for lost in range(number, until):
                    yield Row(lost, f"{name}:{first + lost}", error=f"unreadable: {error}")
                number = until


def _unreadable(number: int, path: str, reason: str) -> Shard:
    rows = [Row(0, os.path.basename(path), error=reason)]
    return Shard(number, path, _digest([_size(path)]), lambda: iter(rows))


def _size(path: str) -> str:
    try:
        return f"{os.path.basename(path)} {os.stat(path).st_size}"
    except OSError:
        return f"{os.path.basename(path)} absent"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")
    return f"sha256 {digest.hexdigest()[:32]}"


def _kind(path: str) -> str:
    """What a file is, by its first bytes; by its name where they say nothing."""
    if os.path.isdir(path):
        return "images"
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES:  # there may be millions of them
        return "images"
    try:
        with open_regular(path) as file:
            start = file.read(2 * _BLOCK)
    except OSError:
        start = b""
    if start[257:262] == b"ustar":
        return "tar"
    if start[:4] == b"PAR1" or suffix == ".parquet":
        return "parquet"
    if path.lower().endswith(_TARS):
        return "tar"
    if suffix in _TABLES:
        return suffix
    return "lines" if suffix in _LINES else "images"


def expand_braces(pattern: str) -> list[str]:
    """Names that a pattern with ``{000..127}`` or ``{a,b}`` stands for, as in a shell; one without them stands for
    itself.
    """
    found = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if found is None or os.path.exists(pattern):
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span is None:
        if ".." in found[1]:
            return [pattern]
        choices = found[1].split(",")
    else:
        first, last = int(span[1]), int(span[2])
        width = max(len(span[1]), len(span[2])) if "0" in (span[1][0], span[2][0]) else 1
        step = 1 if first <= last else -1
        choices = [f"{number:0{width}}" for number in range(first, last + step, step)]
    return [name for choice in choices for name in expand_braces(before + choice + after)]


# ---- tars ---------------------------------------------------------------------------------------------------------


def read_tar(path: str, image_key: str | None = None, images: bool = True) -> Iterator[Row]:
    """Samples of a webdataset tar, in the order of their first members.

    A sample's key is the member's path up to the first dot of its name; the rest, in lower case, says what it is.
    ``txt`` becomes the field "caption", and the entries of ``json`` become fields. Members without a suffix, named
    ``__x__`` or beginning with a dot are passed over. Members of a sample need not be neighbours. A key with two
    members of one kind, or several images of which none is chosen, is an error; so is a member that is a link, and
    every damaged part of the archive, and nothing else is lost.
    """
    with _plain(path) as (plain, broken):
        samples: dict[str, dict[str, Span | None]] = {}
        twice: dict[str, str] = {}
        for name, span in _members(plain, broken):
            folder, base = os.path.split(name)
            stem, dot, field = base.partition(".")
            if not dot or not stem or (stem.startswith("__") and stem.endswith("__")):
                continue
            members = samples.setdefault(os.path.join(folder, stem), {})
            field = field.lower()
            if field in members:
                twice.setdefault(os.path.join(folder, stem), name)
            members[field] = span
        number = -1
        for number, (key, members) in enumerate(samples.items()):
            if key in twice:
                yield Row(number, key, error=f"duplicate key: {twice[key]} is there twice")
            elif None in members.values():
                field = next(field for field, span in members.items() if span is None)
                yield Row(number, key, error=f"its {field} is a link or a sparse file; only plain ones are read")
            else:
                row = _sample(number, key, members, image_key, images)
                if plain != path and row.image is not None:  # a temporary file, gone before the row is decoded
                    try:
                        row = row._replace(image=row.image.read())
                    except ValueError as error:
                        row = row._replace(image=None, error=str(error))
                yield row
        for more, reason in enumerate(broken, number + 1):
            yield Row(more, os.path.basename(path), error=reason)
        if number < 0 and not broken:
            yield Row(0, os.path.basename(path), error="no samples in this archive")


def _sample(number: int, key: str, members: dict[str, Span], image_key: str | None, images: bool) -> Row:
    fields, span = {}, None
    try:
        if "json" in members:
            try:
                content = parse_json(members["json"].read())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"its json is none: {error}") from error
            fields |= row_of(to_line(content)) if isinstance(content, dict) else {"json": content}
        if "txt" in members:
            fields["caption"] = members["txt"].read().decode()
        if images or image_key:
            found = [image_key] if image_key else [field for field in members if f".{field}" in IMAGE_SUFFIXES]
            if len(found) > 1:
                raise ValueError(f"several images ({', '.join(found)}); --image-key says which")
            if not found or found[0] not in members:
                raise ValueError(f"no {found[0] if found else 'image'} (there is {', '.join(members)})")
            span = members[found[0]]
    except (ValueError, RecursionError) as error:
        return Row(number, key, None, fields, str(error))
    return Row(number, key, span, fields)


@contextlib.contextmanager
def _plain(path: str) -> Iterator[tuple[str, list[str]]]:
    """A tar as a file with places in it: itself, or what a compressed one holds, in a temporary file; and what is broken."""
    try:
        with open_regular(path) as file:
            start = file.read(8)
    except OSError as error:
        yield os.devnull, [f"unreadable: {error.strerror or error}"]
        return
    opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        yield path, []
        return
    broken = []
    with tempfile.NamedTemporaryFile(prefix="madtp-", suffix=".tar") as temporary:
        try:
            with opener(path, "rb") as file:
                shutil.copyfileobj(file, temporary, 1 << 20)
        except (OSError, EOFError, lzma.LZMAError) as error:
            broken.append(f"damaged archive: {error}")
        temporary.flush()
        yield temporary.name, broken


def _members(path: str, broken: list[str]) -> Iterator[tuple[str, Span | None]]:
    """Names and places of a tar's files, None of those that are links or have holes. What is neither a member nor
    filling is said in ``broken``, and skipped.
    """
    size = os.path.getsize(path)
    if size == 0:
        if not broken:
            broken.append("the archive is empty")
        return
    with open(path, "rb") as file:
        end, archive = 0, None
        while True:
            try:
                if archive is None:  # what follows a damaged header is looked through block by block for the next one
                    archive = tarfile.TarFile(fileobj=file, mode="r", ignore_zeros=True)
                member = archive.next()
            except (tarfile.TarError, ValueError, OverflowError, OSError) as error:
                if archive is None:
                    broken.append(f"no archive: {error}")
                    return
                archive.offset += _BLOCK
                if archive.offset >= size:
                    broken.append(f"damaged archive at byte {archive.offset - _BLOCK}: {error}")
                    return
                continue
            archive.members = []
            start = size if member is None else member.offset
            if start > end and _is_damaged(file, end, start):
                broken.append(f"damaged archive: bytes {end} to {start} are no member")
            if member is None:
                return
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK if member.isreg() else member.offset_data
            if not member.isdir() and not os.path.basename(member.name).startswith("."):
                plain = member.isreg() and not member.issparse()
                yield member.name.removeprefix("./"), Span(path, member.offset_data, member.size) if plain else None


def _is_damaged(file, start: int, end: int) -> bool:
    """Whether there is anything but zeros, in steps."""
    file.seek(start)
    while start < end:
        block = file.read(min(1 << 20, end - start))
        if block.strip(b"\0"):
            return True
        if not block:
            return False
        start += len(block)
    return False


# ---- tables -------------------------------------------------------------------------------------------------------


def _json_rows(path: str) -> Iterator[tuple[int, dict, str | None]]:
    """Line number, object, and the reason why there is none; blank lines are passed over."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, row_of(line), None
            except ValueError as error:
                yield number, {}, str(error)


def _text_rows(path: str) -> Iterator[tuple[int, dict, str | None]]:
    """The same of a file with a text in every line; blank ones are passed over."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError:
                yield number, {}, "not UTF-8"
                continue
            if text:
                yield number, {"text": text}, None


def _csv_rows(path: str, delimiter: str) -> Iterator[tuple[int, dict, str | None]]:
    """Line number, fields by the names of the first row, and the reason why there are none.

    Quoted fields may hold line feeds. Where a quote is out of place only the line that it is in is lost.
    """
    with _opened(path) as file:
        lines = (line.decode("utf-8-sig" if n == 0 else "utf-8", "surrogateescape") for n, line in enumerate(file))
        back: deque[str] = deque()
        names: list[str] | None = None
        place = 1
        while True:
            used: list[str] = []

            def feed(used=used):
                while True:
                    line = back.popleft() if back else next(lines, None)
                    if line is None:
                        return
                    used.append(line)
                    yield line

            try:
                values = next(csv.reader(feed(), delimiter=delimiter, strict=True), None)
                error = None
            except csv.Error as reason:
                values, error = [], f"not a row of this table: {reason}"
                back.extendleft(reversed(used[1:]))
                del used[1:]
            if values is None:
                return
            first, place = place, place + len(used)
            if error is None and not values:
                continue
            if names is None:
                if error is not None:
                    raise ValueError(f"{path}: the names of its columns cannot be read: {error}")
                names = values
                # Columns without a name, as spreadsheets leave them, have nothing to lose.
                _require_names(path, filter(None, names))
            elif error is not None:
                yield first, {}, error
            elif len(values) != len(names):
                yield first, {}, f"{len(values)} fields, {len(names)} are expected"
            else:
                yield first, dict(zip(names, values, strict=True)), None


def _require_names(path: str, names: Iterable[str]) -> None:
    if (name := first_twice(names)) is not None:
        raise ValueError(f"{path}: two of its columns are called {name!r}, of which one would be lost")


def _opened(path: str):
    """Lines of a file, or of standard input as they come."""
    if path != STANDARD:
        return open_regular(path)
    if sys.stdin is None:
        raise OSError("standard input is closed")
    return contextlib.nullcontext(sys.stdin.buffer)


def _parquet(path: str, image_key: str | None, images: bool):
    """The open file and the column with its images; no file where it is none, or damaged.

    Raises:
        ImportError: without pyarrow.
        ValueError: no such column, or one that cannot hold images.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from error
    try:
        file = pq.ParquetFile(path, memory_map=False)
    except pa.ArrowInvalid:
        return None, None
    names = file.schema_arrow.names
    _require_names(path, names)
    key = image_key or next((name for name in IMAGE_KEYS if name in names), None)
    if key is None or key not in names:
        if not images and image_key is None:
            return file, None
        wanted = f"no column {key!r}" if key else "no column with images is found"
        raise ValueError(f"{path}: {wanted}, only {', '.join(names)}; --image-key names one")
    kind = file.schema_arrow.field(key).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    inner = {kind.field(n).name for n in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
    readable = any(getattr(pa.types, f"is_{name}")(kind) for name in _READABLE)
    if images and not inner & {"bytes", "path"} and not readable:
        raise ValueError(f"{path}: column {key!r}: expected paths, bytes or a struct of both, got {kind}")
    return file, key


def _json_value(value):
    """The same in values of JSON, without bytes."""
    if isinstance(value, dict):
        return {str(name): _json_value(inner) for name, inner in value.items() if not isinstance(inner, bytes)}
    if isinstance(value, list):
        return [_json_value(inner) for inner in value if not isinstance(inner, bytes)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)
