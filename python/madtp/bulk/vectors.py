"""Embeddings on disk: opened as they were written, searched exactly in blocks, and extended by images that are new.

What is opened: a folder of `madtp embed` (see :mod:`madtp.bulk.writers`) or of clip-retrieval, an index of `madtp
retrieve`, which is such a folder too, or one .npy or .safetensors file with its names beside it. Without this package
it is numpy and JSON Lines or parquet: row j of ``img_emb/img_emb_000000.npy`` is what row j of
``metadata/metadata_000000`` is about.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .. import jsonl
from ..resume import ResumeError, locked, read_object, require_same
from .readers import Row, Shard
from .writers import Results, ShardFiles, read_records

__all__ = ["ImageIndex", "Vectors", "candidates"]

_log = logging.getLogger("madtp")

_BLOCK = 1 << 16  # vectors that are compared at a time: 128 MB of 512 numbers
_PAIRS = 1 << 14  # of a query and a vector, whose products are taken in float64 at a time
_ROWS = 10_000  # of a shard of an index


class Vectors:
    """Vectors with names, in the order of their files, which stay on disk.

    Args:
        parts: arrays ``[n, D]`` of float16, float32 or float64, such as memory maps.
        names: of all of their rows.
        alive: which rows count; by default all. Those whose vector is zero or not finite never do.
    """

    def __init__(self, parts: Sequence[np.ndarray], names: Sequence[str], alive: np.ndarray | None = None) -> None:
        self.parts, self.names = [part for part in parts if len(part)], list(names)
        total = sum(map(len, self.parts))
        if total != len(self.names):
            raise ValueError(f"vectors: {total} of them, but {len(self.names)} names")
        widths = {part.shape[1] for part in self.parts}
        if len(widths) > 1:
            raise ValueError(f"vectors: expected one width, got {sorted(widths)}")
        self.alive = np.ones(total, dtype=bool) if alive is None else alive

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def open(cls, path: str | os.PathLike, settings: Mapping | None = None) -> Vectors:
        """Those of a file or folder.

        Args:
            settings: what has to agree with what made them, where that is known.

        Raises:
            FileNotFoundError: nothing there.
            ResumeError: made by something else.
            ValueError: not embeddings, or without names.
        """
        path = Path(path)
        check_index(path)
        said = path / "run.json"
        if settings is not None and said.exists():
            found = read_object(said.read_bytes())
            require_same(path, found and {key: found.get(key) for key in settings}, settings, "name another index")
        found = cls._of_shards(_shards(path)) if path.is_dir() else cls(*_of_file(path))
        if settings is not None and not said.exists():
            _log.warning("%s does not say which model made it; make sure that it is this one", path)
        return found

    @classmethod
    def _of_shards(cls, shards: Iterable[tuple[np.ndarray, list[dict]]]) -> Vectors:
        parts, names, place = [], [], {}
        for array, records in shards:
            parts.append(array)
            for record in records:
                name = record.get("image_path") or record.get("image") or record.get("caption") or record.get("text")
                if record.get("mtime_ns") is not None:  # of an index: what came last counts
                    place.setdefault(name, []).append(len(names))
                names.append(str(name))
        alive = np.ones(len(names), dtype=bool)
        for numbers in place.values():
            alive[numbers[:-1]] = False
        return cls(parts, names, alive)

    def blocks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First row, vectors ``[n, D]`` float32 of length 1, and which of them count; a bounded number at a time."""
        start = 0
        for part in self.parts:
            for first in range(0, len(part), _BLOCK):
                block = np.asarray(part[first : first + _BLOCK], dtype=np.float32)
                with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                    lengths = np.sqrt(np.einsum("nd,nd->n", block, block, dtype=np.float64))
                    alive = self.alive[start : start + len(block)] & np.isfinite(lengths) & (lengths > 0)
                    off = alive & (np.abs(lengths - 1) > 1e-6)  # row by row: blocks change nothing
                    if off.any():
                        block = block.copy()
                        block[off] /= lengths[off, None]
                yield start, np.where(alive[:, None], block, 0).astype(np.float32, copy=False), alive
                start += len(block)

    def usable(self) -> np.ndarray:
        """``[N]`` bool: which rows count."""
        found = [alive for _, _, alive in self.blocks()]
        return np.concatenate(found) if found else np.zeros(0, dtype=bool)

    def rows(self, numbers: Sequence[int]) -> np.ndarray:
        """Vectors ``[n, D]`` float32 of length 1 of some rows, zeros of those that do not count."""
        numbers = np.asarray(numbers, dtype=np.int64)
        found = np.zeros((len(numbers), self.parts[0].shape[1] if self.parts else 0), dtype=np.float32)
        for start, block, _ in self.blocks():
            here = (numbers >= start) & (numbers < start + len(block))
            found[here] = block[numbers[here] - start]
        return found

    def search(self, queries, count: int) -> tuple[list[list[int]], list[list[float]]]:
        """The nearest vectors by cosine.

        Args:
            queries: ``[Q, D]``, of any length but 0.
            count: how many for each; fewer where there are fewer.

        Returns:
            For each query row numbers, the most similar first, equal ones by number, and similarities in -1..1.

        Raises:
            ValueError: another width.
        """
        queries = _unit(queries)
        scores = torch.empty(len(queries), 0, dtype=torch.float64)
        ids = torch.empty(len(queries), 0, dtype=torch.int64)
        for start, block, alive in self.blocks():
            if block.shape[1] != queries.shape[1]:
                raise ValueError(f"queries: {queries.shape[1]} wide, but the vectors are {block.shape[1]} wide")
            block, numbers = torch.from_numpy(block[alive]), torch.from_numpy(np.flatnonzero(alive) + start)
            if not len(block):
                continue
            found = queries.float() @ block.mT
            # All that may be among the best, and those by products that do not depend on the block's size.
            error = 2 * torch.finfo(torch.float32).eps * (8 + block.shape[1])
            least = found.topk(min(count, len(block)), dim=1).values[:, -1:] - error
            near = (found >= least).any(0)
            block, numbers = block[near], numbers[near]
            found = _cosines(queries, block, found[:, near] >= least)
            scores = torch.cat([scores, found], 1)
            ids = torch.cat([ids, numbers.expand(len(queries), -1)], 1)
            order = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
            scores, ids = scores.gather(1, order), ids.gather(1, order)
        return ids.tolist(), scores.tolist()

    def scored(self, queries, ids: Sequence[Sequence[int]], count: int) -> tuple[list[list[int]], list[list[float]]]:
        """The same of candidates that another index found for each query; numbers that are none of ours do not
        count.
        """
        queries = _unit(queries)
        wanted = sorted({number for numbers in ids for number in numbers if 0 <= number < len(self)})
        place = {number: n for n, number in enumerate(wanted)}
        vectors = torch.from_numpy(self.rows(wanted))
        counts = vectors.any(1)
        found_ids, found_scores = [], []
        for query, numbers in zip(queries, ids, strict=True):
            usable = sorted({number for number in numbers if number in place and counts[place[number]]})
            here = vectors[[place[number] for number in usable]]
            (scores,) = _cosines(query[None], here, torch.ones(1, len(here), dtype=torch.bool))
            order = scores.sort(descending=True, stable=True).indices[:count].tolist()
            found_ids.append([usable[n] for n in order])
            found_scores.append(scores[order].tolist())
        return found_ids, found_scores

    def digest(self) -> str:
        """Of names and vectors."""
        digest = hashlib.sha256(json.dumps(self.names).encode(errors="surrogatepass"))
        for _, block, _ in self.blocks():
            digest.update(np.ascontiguousarray(block))
        return f"sha256 {digest.hexdigest()[:16]}"


def _unit(queries) -> torch.Tensor:
    """Queries ``[Q, D]`` of length 1, in float64."""
    return torch.nn.functional.normalize(torch.as_tensor(queries, dtype=torch.float64), dim=-1)


def _cosines(queries: torch.Tensor, vectors: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Products ``[Q, N]`` of the pairs that are marked in ``pairs`` ``[Q, N]``, each by itself in float64; less than
    any of them where there is no mark.
    """
    scores = torch.full(pairs.shape, -2.0, dtype=torch.float64)
    of, to = pairs.nonzero(as_tuple=True)
    products = [(queries[q] * vectors[n]).sum(1) for q, n in zip(of.split(_PAIRS), to.split(_PAIRS), strict=True)]
    if products:
        scores[of, to] = torch.cat(products).clamp(-1, 1)
    return scores


def candidates(path: str | os.PathLike, queries, count: int) -> list[list[int]]:
    """Row numbers that an index of faiss or usearch finds for queries ``[Q, D]``, which it may have made of the same
    files.

    Raises:
        ImportError: the library is not installed.
        ValueError: an index of another width.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if Path(path).suffix == ".usearch":
        try:
            from usearch.index import Index
        except ImportError as error:
            raise ImportError(f"{path}: reading it needs usearch (pip install usearch)") from error
        index = Index.restore(str(path))
        _require_width(path, index.ndim, queries)
        # One by one: of several queries, keys would be filled up with others.
        found = [index.search(query, min(count, len(index))).keys.tolist() for query in queries]
    else:
        try:
            import faiss
        except ImportError as error:
            raise ImportError(f"{path}: reading it needs faiss (pip install faiss-cpu)") from error
        index = faiss.read_index(str(path))
        _require_width(path, index.d, queries)
        found = index.search(queries, min(count, max(1, index.ntotal)))[1].tolist()
    return [[int(number) for number in numbers if number >= 0] for numbers in found]


def _require_width(path: str | os.PathLike, width: int, queries: np.ndarray) -> None:
    if width != queries.shape[1]:
        raise ValueError(f"{path}: holds vectors of {width} numbers, but the model's have {queries.shape[1]}")


def check_index(path: str | os.PathLike, *, grows: bool = False) -> None:
    """Find out, before a model is loaded, that there can be no vectors at this path, or that they cannot become more.

    Raises:
        FileNotFoundError: nothing there.
        ResumeError: a file, which cannot grow.
        ValueError: a file of another kind.
    """
    path = Path(path)
    if not grows and not path.exists():
        raise FileNotFoundError(f"{path}: there are no such embeddings")
    if path.exists() and not path.is_dir():
        if grows:
            raise ResumeError(f"{path}: an index is a folder, and this is a file; remove it, or name another index")
        if path.suffix not in (".npy", ".safetensors"):
            raise ValueError(f"{path}: expected a folder, a .npy or a .safetensors file")


class ImageIndex:
    """A folder of embeddings that follows a collection of images: those that are new or have changed are added.

    A file is known by its absolute path, size and time. Those that are gone stay, and are not asked for.

    Args:
        folder: made if it is not there.
        settings: what determines the vectors, as JSON values.

    Raises:
        ResumeError: an index of another model or other settings, or one in use.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping) -> None:
        check_index(folder, grows=True)
        try:
            self._results = Results(folder, settings, vectors="img", format="jsonl")
        except ResumeError as error:
            reason = str(error).split("; name another folder")[0]
            raise ResumeError(f"{reason}; remove it, or name another index") from error
        self._stack = contextlib.ExitStack()
        self._known: dict[str, tuple[list[int], int]] = {}

    def __enter__(self) -> ImageIndex:
        folder = self._results.folder
        self._stack.enter_context(locked(folder / ".unfinished" / "index.lock", folder))
        self._read()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def _read(self) -> None:
        shards = list(_shards(self._results.folder))
        self.vectors, self._known = Vectors._of_shards(shards), {}
        sound = self.vectors.usable()
        for number, record in enumerate(record for _, records in shards for record in records):
            if sound[number]:
                self._known[record["image_path"]] = [record.get("size"), record.get("mtime_ns")], number
        if damaged := int((self.vectors.alive & ~sound).sum()):
            _log.warning("%s: %d damaged vectors are left out", self._results.folder, damaged)

    def update(
        self,
        images: Sequence[str | os.PathLike],
        prepare: Callable[[Path], object],
        embed: Callable[[list], list[dict]],
        batch_size: int,
        **options,
    ) -> tuple[int, dict[int, str]]:
        """Add the images that are not in the index as they are now.

        Args:
            images: paths.
            prepare: turns a path into an instance; what it raises is why that image cannot be used.
            embed: turns up to `batch_size` instances into as many objects with an array "embedding".
            options: of :func:`madtp.jsonl.answered`.

        Returns:
            How many were added, and the reason for each image that cannot be used, by its place in `images`, from 1.
        """
        rows, states, failed = [], {}, {}
        for n, image in enumerate(images, 1):
            states[n] = _state(image)  # before the file is read: a later change will be noticed the next time
            if self._known.get(os.path.abspath(image), (None,))[0] != states[n]:
                rows.append((n, {"image": image}))

        def prepared(_: int, row: dict):
            return prepare(Path(row["image"]))

        def added() -> Iterator[tuple[np.ndarray, dict]]:
            for record in itertools.chain.from_iterable(batches):
                if "error" in record:
                    failed[record["row"]] = record["error"]
                    continue
                size, time = states[record["row"]]
                image = os.path.abspath(images[record["row"] - 1])
                yield record["embedding"], {"image_path": image, "size": size, "mtime_ns": time}

        before = [int(path.stem) for path in (self._results.folder / "stats").glob("*.json")]
        answered = jsonl.answered(rows, prepared, embed, batch_size, total=len(rows), **options)
        with contextlib.closing(answered) as batches:
            for number, found in itertools.groupby(enumerate(added()), lambda row: row[0] // _ROWS):
                shard = Shard(max(before, default=-1) + 1 + number, "images", "", lambda: iter(()))
                with ShardFiles(self._results, shard) as files:
                    try:
                        for place, (vector, fields) in found:
                            files.add(Row(place % _ROWS, fields["image_path"]), {"embedding": vector}, fields)
                    finally:  # whatever ends it, the vectors that were added so far are kept
                        files.finish()
        self._read()
        return len(rows) - len(failed), failed

    def numbers(self, images: Sequence[str | os.PathLike]) -> list[int]:
        """Rows of images in :attr:`vectors`. Raises KeyError for one that is not in the index."""
        return [self._known[os.path.abspath(image)][1] for image in images]


def _state(path: str | os.PathLike) -> list[int]:
    try:
        facts = os.stat(path)
    except OSError:  # whoever reads the file will tell
        return [-1, -1]
    return [facts.st_size, facts.st_mtime_ns]


# ---- reading ------------------------------------------------------------------------------------------------------


def _shards(folder: Path) -> Iterator[tuple[np.ndarray, list[dict]]]:
    """Vectors and records of each part of a folder; damaged ones are left out, with a warning."""
    arrays = sorted([*folder.glob("img_emb/*.npy"), *folder.glob("text_emb/*.npy")])
    if not arrays and not (folder / "run.json").exists():
        raise ValueError(f"{folder}: no embeddings in this folder (img_emb/*.npy)")
    for path in arrays:
        number = path.stem.rsplit("_", 1)[-1]
        try:
            array = np.load(path, mmap_mode="r")
            found = [
                name
                for suffix in ("jsonl", "parquet")
                if (name := folder / "metadata" / f"metadata_{number}.{suffix}").exists()
            ]
            if not found:
                raise ValueError("there is no metadata for it")
            records = read_records(found[0])
            if array.ndim != 2 or len(array) != len(records):
                raise ValueError(f"vectors {list(array.shape)}, but {len(records)} rows of metadata")
        except (ValueError, OSError, EOFError) as error:
            _log.warning("%s is left out: %s", path, error)
            continue
        yield array, records


def _of_file(path: Path) -> tuple[list[np.ndarray], list[str]]:
    """The vectors of one file, and their names."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            if "features" not in file.keys():  # noqa: SIM118
                raise ValueError(f'{path}: no tensor "features" in this file')
            array = file.get_tensor("features")
    else:
        array = np.load(path, mmap_mode="r")
    beside = path.with_name(path.name + ".jsonl")
    if array.ndim != 2 or not beside.exists():
        raise ValueError(f"{path}: no embeddings, or without {beside.name} beside them")
    records = [record for record in read_records(beside) if "index" in record]
    return [array], [str(record.get("image") or record.get("text")) for record in records]
