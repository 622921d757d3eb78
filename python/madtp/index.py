"""Features of images in a file, so that a collection is encoded once, and later only what is new."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from . import jsonl

_log = logging.getLogger("madtp")

__all__ = ["Index", "from_text", "to_text"]


def to_text(features) -> str:
    """A float32 vector (array or tensor) in printable characters, bit by bit."""
    return base64.b64encode(np.asarray(features, dtype="<f4").tobytes()).decode()


def from_text(text: str) -> np.ndarray:
    """The float32 vector that `to_text` wrote. Raises ValueError if it did not."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


class Index:
    """Features by path, with the size and time of each file when it was read.

    The file is a :class:`madtp.jsonl.Log`: whatever stops an update, what it had written is there next time.
    Files that are gone stay in it, and are not asked for. A file that changed is added anew.

    Args:
        path: of the index; made if it is not there.
        settings: what determines the features, as JSON values.
        write: whether it may be updated; where not, it has to be there.

    A record that is damaged, or whose features are not finite or not as long as the others, counts for nothing.

    Raises:
        madtp.jsonl.ResumeError: an index of another model or other settings, or one in use.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, settings: dict, *, write: bool = True) -> None:
        header = {"index": "image features", **settings}
        self._log = jsonl.Log(path, header, write=write, remedy="remove it, or name another index")
        self._known: dict[str, tuple[list[int], np.ndarray]] = {}
        end, damaged = None, 0
        for record, end in self._log.read():
            damaged += not self._remember(record)
        if write:
            self._log.cut(end)
        if damaged:
            _log.warning("%s: %d damaged records are left out", path, damaged)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_) -> None:
        self._log.__exit__()

    @property
    def images(self) -> list[str]:
        """Absolute paths of all images, in the order in which they were added."""
        return list(self._known)

    def _remember(self, record: dict) -> bool:
        image, state = record.get("image"), [record.get("size"), record.get("mtime_ns")]
        try:
            features = from_text(record["features"])
        except (KeyError, TypeError, ValueError):
            return False
        width = next((len(known) for _, known in self._known.values()), len(features))
        usable = len(features) == width > 0 and np.isfinite(features).all()
        if not (usable and isinstance(image, str) and all(type(number) is int for number in state)):
            return False
        self._known[image] = state, features
        return True

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
            embed: turns up to `batch_size` instances into as many objects with "features", as `to_text`
                writes them.
            options: of :func:`madtp.jsonl.answered`.

        Returns:
            How many were added, and the reason for each image that cannot be used, by its place in `images`,
            from 1.
        """
        rows, states, failed, added = [], {}, {}, 0
        for n, image in enumerate(images, 1):
            known = self._known.get(os.path.abspath(image))
            states[n] = _state(image)  # before the file is read: a later change will be noticed the next time
            if known is None or known[0] != states[n]:
                rows.append((n, {"image": image}))

        def prepared(_: int, row: dict):
            return prepare(Path(row["image"]))

        with contextlib.closing(
            jsonl.answered(rows, prepared, embed, batch_size, total=len(rows), **options)
        ) as batches:
            for records in batches:
                failed |= {record["row"]: record["error"] for record in records if "error" in record}
                new = [
                    {
                        "image": os.path.abspath(images[record["row"] - 1]),
                        **dict(zip(("size", "mtime_ns"), states[record["row"]], strict=True)),
                        "features": record["features"],
                    }
                    for record in records
                    if "error" not in record
                ]
                self._log.append(new)
                for record in new:
                    self._remember(record)
                added += len(new)
        return added, failed

    def features(self, images: Sequence[str | os.PathLike]) -> np.ndarray:
        """Features ``[N, P]`` float32 of images in the index. Raises KeyError for one that is not in it."""
        rows = [self._known[os.path.abspath(image)][1] for image in images]
        return np.stack(rows) if rows else np.empty((0, 0), dtype=np.float32)


def _state(path: str | os.PathLike) -> list[int]:
    try:
        facts = os.stat(path)
    except OSError:  # whoever reads the file will tell
        return [-1, -1]
    return [facts.st_size, facts.st_mtime_ns]
