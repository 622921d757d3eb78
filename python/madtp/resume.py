"""What all runs share that go on where they were stopped: whose files these are, and which process writes to them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import IO

__all__ = ["ResumeError", "lock", "locked", "read_object", "require_same"]


class ResumeError(ValueError):
    """There are files of another run, or of one that another process is at."""


def read_object(content: bytes) -> dict | None:
    """The JSON object that the bytes are; None if they are none, such as a line that was not written whole."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def require_same(path: str | os.PathLike, then: Mapping | None, now: Mapping, remedy: str) -> None:
    """Raise ResumeError unless the run at ``path`` had these settings.

    Args:
        path: what to name in the error.
        then: its settings; None: there are files, but they say nothing of a run.
        now: those of the run that wants to go on.
        remedy: what the user can do.
    """
    if then is None:
        raise ResumeError(f"{path} was not written by a run like this one; {remedy}")
    now = json.loads(json.dumps(now))  # as `then` was read: lists for tuples
    changed = [key for key in {**now, **then} if now.get(key) != then.get(key)]
    if changed:
        shown = "; ".join(f"{key}: {then.get(key)} then, {now.get(key)} now" for key in changed)
        raise ResumeError(f"{path} is of another run ({shown}); {remedy}")


def lock(file: IO, name: object, patience: float = 0.0) -> None:
    """Keep other processes from locking an open file, until it is closed.

    Raises:
        ResumeError: one has locked it already, and for longer than ``patience`` seconds; ``name`` is what it writes.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() >= until:
                raise ResumeError(f"{name} is being written by another process") from error
        time.sleep(0.1)


@contextlib.contextmanager
def locked(path: str | os.PathLike, name: object, patience: float = 0.0) -> Iterator[None]:
    """Keep out of a block other processes that lock the same file, which is made if it is not there; see :func:`lock`."""
    with open(path, "ab") as file:
        lock(file, name, patience)
        yield
