"""Finds, or compiles at first use, and loads the C++ extension ``_C``; ``build.py`` compiles.

The extension belongs to one version of torch: the one inside the package is used only if it was compiled for the torch that
runs, otherwise one is compiled into the user's cache.
"""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
import types
from pathlib import Path
from typing import BinaryIO

from . import build

_KEPT = 3600  # seconds that a failure to compile is remembered, so that not every start of Python finds it out again
_lock = threading.Lock()
_loaded: types.ModuleType | None = None
_failure: str | None = None


class Unavailable(RuntimeError):
    """There is no C++ extension here and none can be compiled; the message says why."""


def cache_dir() -> Path:
    """Where extensions compiled at first use live, ``$XDG_CACHE_HOME/madtp_kernels`` or ``~/.cache/...``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "madtp_kernels"


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
                _loaded = _find() or build.import_library(compile_into(cache_dir()))
            except OSError as error:
                _failure = f"{error} (the cache is {cache_dir()})"
            except (RuntimeError, ImportError) as error:
                _failure = str(error)
        if _loaded is None:
            raise Unavailable(_failure)
        return _loaded


def find() -> types.ModuleType | None:
    """The extension module ``_C`` if it was compiled before, else None: for what only saves time by it."""
    global _loaded
    with _lock:
        _loaded = _loaded or _find()
        return _loaded


def _find() -> types.ModuleType | None:
    cached = _subfolder(cache_dir())
    for folder in filter(build.fits, (Path(__file__).resolve().parent, cached)):
        try:
            return build.import_library(folder / build.LIBRARY_NAME)
        except ImportError:  # a system library has changed under it: compile another
            if folder == cached:
                (cached / "_C.json").unlink(missing_ok=True)
    return None


def _subfolder(root: str | os.PathLike) -> Path:
    return Path(root) / build.environment_tag() / build.source_hash()


def compile_into(root: str | os.PathLike, anew: bool = False) -> Path:
    """Compile into a subfolder for this environment and these sources; one process at a time.

    Args:
        root: the folder.
        anew: even if it is there, or has failed within the last hour: what it was compiled with may have changed.

    Raises:
        build.BuildError: it is forbidden, something is missing, or the compiler fails.
    """
    setting, folder = build.setting(), _subfolder(root)
    if setting == "0":
        why = f"{build.SETTING}=0 forbids compiling one"
        raise build.BuildError(f"no extension compiled for {build.environment_tag()} is installed, and {why}")
    build.check_requirements()
    command, failure = shlex.join(build.compiler()), folder / "failure.json"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "lock", "wb") as lock:
        _acquire(lock)
        if not anew and build.fits(folder):
            return folder / build.LIBRARY_NAME  # another process compiled it while this one waited
        if not anew and setting != "1" and (earlier := _earlier_failure(failure, command)):
            raise build.BuildError(f"{earlier} (details in {failure}; {build.SETTING}=1 tries again)")
        build.say(f"compiling the C++ kernels for {build.environment_tag()} with {command}, once: a minute or two")
        start = time.monotonic()
        try:
            library = build.compile_extension(folder)
        except build.BuildError as error:
            if error.transient:
                raise
            record = dict(compiler=command, reason=str(error), output=error.output.splitlines())
            failure.write_text(json.dumps(record, indent=2), encoding="utf-8")
            raise build.BuildError(f"{error} (details in {failure})", error.output) from error
        failure.unlink(missing_ok=True)
        build.say(f"compiled in {time.monotonic() - start:.0f} s, kept in {folder}")
        return library


def _earlier_failure(path: Path, command: str) -> str | None:
    record = build.read_record(path)
    if record.get("compiler") != command or abs(time.time() - path.stat().st_mtime) > _KEPT:
        return None
    return record.get("reason")


def _acquire(lock: BinaryIO) -> None:
    import fcntl  # not on Windows, where the build has already been refused

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        build.say("waiting for another process that compiles the C++ kernels")
        fcntl.flock(lock, fcntl.LOCK_EX)
