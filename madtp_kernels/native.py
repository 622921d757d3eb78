"""Finds, or compiles at first use, and loads the C++ extension ``_C``; ``build.py`` compiles.

The extension belongs to one version of torch: the one inside the package is used only if it was compiled for the torch that
runs, otherwise one is compiled into the user's cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

from . import build

_KEPT = 3600  # seconds that a failure to compile is remembered, so that not every start of Python finds it out again
_lock = threading.Lock()
_loaded: types.ModuleType | None = None
_failure: str | None = None


class Unavailable(RuntimeError):
    """There is no C++ extension here and none can be compiled; the message says why."""


def cache_dir() -> Path:
    """Where extensions compiled at first use live, ``$XDG_CACHE_HOME/madtp_kernels`` or ``~/.cache/...``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "madtp_kernels" / build.environment_tag()


def load() -> types.ModuleType:
    """The extension module ``_C``, found or compiled. The outcome is remembered; later calls cost a look-up.

    Raises:
        Unavailable: there is none, and none could be compiled.
    """
    global _loaded, _failure
    if _loaded is not None:
        return _loaded
    with _lock:
        if _loaded is None and _failure is None:
            try:
                _loaded = _find_or_compile()
            except OSError as error:
                _failure = f"{error} (the cache is $XDG_CACHE_HOME/madtp_kernels, or ~/.cache/madtp_kernels)"
            except (RuntimeError, ImportError) as error:
                _failure = str(error)
        if _loaded is None:
            raise Unavailable(_failure)
        return _loaded


def find() -> types.ModuleType | None:
    """The extension module ``_C`` if it was compiled before, else None: for what only saves time by it."""
    global _loaded
    if _loaded is None:
        with _lock:
            _loaded = _loaded or _find()
    return _loaded


def _find() -> types.ModuleType | None:
    cached = cache_dir() / build.source_hash()
    for folder in (Path(__file__).resolve().parent, cached):
        if build.fits(folder):
            # Where it does not load, a system library has changed under it: compile another.
            with contextlib.suppress(ImportError):
                return build.import_library(folder / build.LIBRARY_NAME)
            if folder == cached:
                (cached / "_C.json").unlink(missing_ok=True)
    return None


def _find_or_compile() -> types.ModuleType:
    return _find() or build.import_library(_compile(cache_dir() / build.source_hash()))


def _compile(folder: Path) -> Path:
    setting = build.setting()
    if setting == "0":
        tag = build.environment_tag()
        raise build.BuildError(
            f"no extension compiled for {tag} is installed, and {build.SETTING}=0 forbids compiling one"
        )
    build.check_requirements()
    command, failure = shlex.join(build.compiler()), folder / "failure.json"
    with _exclusive(folder.parent):
        if build.fits(folder):
            return folder / build.LIBRARY_NAME  # another process compiled it while this one waited
        if setting != "1" and (earlier := _earlier_failure(failure, command)):
            raise build.BuildError(f"{earlier} (details in {failure}; {build.SETTING}=1 tries again)")
        build.say(f"compiling the C++ kernels for {build.environment_tag()} with {command}, once: a minute or two")
        start = time.monotonic()
        try:
            library = build.compile_extension(folder, object_dir=folder.parent / "objects")
        except build.BuildError as error:
            if error.transient:
                raise
            folder.mkdir(parents=True, exist_ok=True)
            record = {
                "compiler": command,
                "reason": str(error),
                "time": time.time(),
                "output": error.output.splitlines(),
            }
            failure.write_text(json.dumps(record, indent=2), encoding="utf-8")
            raise build.BuildError(f"{error} (details in {failure})") from error
        failure.unlink(missing_ok=True)
        build.say(f"compiled in {time.monotonic() - start:.0f} s, kept in {folder}")
        return library


def _earlier_failure(path: Path, command: str) -> str | None:
    record = build.read_record(path)
    reason, when = record.get("reason"), record.get("time")
    if record.get("compiler") != command or not isinstance(reason, str) or not isinstance(when, (int, float)):
        return None
    return reason if 0 <= time.time() - when < _KEPT else None


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One process at a time inside, over all that share the folder."""
    import fcntl  # not on Windows, where the build has already been refused

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            build.say("waiting for another process that compiles the C++ kernels")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
