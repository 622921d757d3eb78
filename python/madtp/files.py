"""Files read and written whole: what is no regular file is recognised, texts do not depend on the locale,
and outputs appear complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "check_output",
    "first_twice",
    "is_regular",
    "name_full",
    "open_regular",
    "parse_json",
    "read_bytes",
    "read_text",
    "replacing",
    "sync",
    "write_json",
    "writing",
]

STANDARD = "-"
"""Name of standard input and output on a command line."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def is_regular(path: str | os.PathLike) -> bool:
    """Whether this is a file on a disk under its own name, or the name of one that is not there yet."""
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):  # /dev/stdin may be a file, but it is not in /dev
        return False
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return str(path) != STANDARD


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A file to read. Raises OSError, at once, for a folder, a pipe, a socket or a device: they may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe nobody writes to would block here
    try:
        _require(path, os.fstat(descriptor).st_mode, stat.S_ISREG)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike) -> bytes:
    """The content of a file or a pipe, or of standard input for "-". Raises OSError, also for a folder or a device."""
    if str(path) == STANDARD:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "standard input is closed")
        return sys.stdin.buffer.read()
    _require(path, os.stat(path).st_mode, lambda mode: stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or _is_terminal(path))
    return Path(path).read_bytes()


def write_standard(content: bytes) -> None:
    """Text in UTF-8 to standard output: as it is, whatever the locale, unless that takes no bytes (in a notebook)."""
    if hasattr(sys.stdout, "buffer"):
        sys.stdout.buffer.write(content)
    else:
        sys.stdout.write(content.decode("utf-8"))
    sys.stdout.flush()


def read_text(path: str | os.PathLike) -> str:
    """The same as text. Raises ValueError if it is not UTF-8; a byte order mark is left out."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from error


def parse_json(content: bytes | str) -> Any:
    """What a user's JSON says.

    Raises:
        ValueError: it is none, or one of its objects has a name twice: the first value would be lost.
        RecursionError: too many levels.
    """
    return json.loads(content, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"the name {first_twice(name for name, _ in pairs)!r} is there twice")
    return found


def first_twice(names: Iterable[str]) -> str | None:
    """The first name that is there more than once; None if they all differ."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _require(path: str | os.PathLike, mode: int, fits) -> None:
    if not fits(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "of another kind")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", str(path))


def _is_terminal(path: str | os.PathLike) -> bool:
    """Whether reading this device ends: that of a terminal does, and that of the null device."""
    if not stat.S_ISCHR(os.stat(path).st_mode):
        return False
    with open(path, "rb", buffering=0) as device:
        return device.isatty() or os.path.samefile(path, os.devnull)


def check_output(path: str | os.PathLike, *, option: str = "output") -> None:
    """Find out now that a file cannot be written later.

    Raises:
        ValueError: a name that is none.
        OSError: a folder, a folder that is not there or cannot be written to, or anything else that is no regular file.
    """
    if str(path) in ("", STANDARD):
        raise ValueError(f"{option}: expected a file name, got {str(path)!r}")
    target = Path(os.path.realpath(path))
    if target.exists():
        _require(path, target.stat().st_mode, stat.S_ISREG)
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {target.parent} for it", str(path))
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"the folder {target.parent} cannot be written to", str(path))


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """A block that writes to a file: the error of a full disk names it."""
    try:
        yield
    except OSError as error:
        name_full(error, path)
        raise


def name_full(error: BaseException | None, path: str | os.PathLike) -> None:
    """Say in the error of a write that found no room (on the disk, in a quota) where that was, which a write does not."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        error.filename = error.filename or str(path)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file to write. ``path`` is replaced by it when the ``with`` block ends well, and else stays what it was.

    Its content and its new name are on the disk before anything that follows. What a symbolic link points to is
    replaced, not the link. Who writes the same file at the same time waits. Raises OSError if ``path`` is there and no
    regular file.
    """
    path = Path(os.path.realpath(path))
    if path.exists():
        _require(path, path.stat().st_mode, stat.S_ISREG)
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), _alone(temporary) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def _alone(path: Path) -> BinaryIO:
    """A file to write, empty, that nobody else has open this way; it may be left over from a process that was killed."""
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "wb")  # noqa: SIM115 (not truncated: another may be at it)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                return file
        file.close()  # whoever had it has given it its name, or removed it


def sync(folder: str | os.PathLike) -> None:
    """Wait until the names of the files in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path: str | os.PathLike, value: Any, indent: int = 2) -> None:
    """Write a JSON file as :func:`replacing` does."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=indent) + "\n").encode())
