"""Which implementation of an operation runs.

Each operation has up to four implementations with one contract: ``reference`` (plain PyTorch, any device), ``cpu`` (C++),
``triton`` (GPU) and ``cuda`` (C++/CUDA). An automatic choice goes by the device of the tensors and falls back, with one log
line, when an implementation is missing or refuses the arguments; a forced one raises with the reason. Forced by the
``backend=`` argument of an operation, by :func:`use`, or by the environment variable ``MADTP_KERNELS_BACKEND``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator

import torch

from . import native

NAMES = ("reference", "cpu", "triton", "cuda")
"""Backends, as arguments and `MADTP_KERNELS_BACKEND` name them."""
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}

_log = logging.getLogger("madtp_kernels")
_forced: str | None = os.environ.get("MADTP_KERNELS_BACKEND") or None


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run; the message says why."""


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def use(name: str | None) -> Iterator[None]:
    """Force a backend for all operations inside the ``with`` block; None restores the automatic choice."""
    global _forced
    previous, _forced = _forced, None if name is None else _checked(name)
    try:
        yield
    finally:
        _forced = previous


def forced() -> str | None:
    """The backend forced by :func:`use` or the environment, or None."""
    return None if _forced is None else _checked(_forced)


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors through Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _triton_missing() -> str | None:
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def availability(name: str, device_type: str) -> str | None:
    """None if the backend can run on tensors of this device type ("cpu", "cuda"), else the reason why not."""
    if _checked(name) == "reference":
        return None
    if name == "triton":
        if device_type == "cpu" and not interpreted():
            return "triton runs on CPU tensors only through its interpreter (TRITON_INTERPRET=1)"
        if device_type == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return _triton_missing()
    if name != device_type:
        return f"the {name} backend takes {name} tensors"
    if name == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    try:
        extension = native.load()
    except native.Unavailable as error:
        return str(error)
    if name == "cuda" and not extension.build_info()["cuda"]:
        missing = "no GPU, no nvcc or no CUDA build of torch"
        return f"the extension was built without CUDA ({missing} then; MADTP_KERNELS_CUDA=1 tries again)"
    return None


# What a backend has no code for: PyTorch's own kernels do it, called by the reference.
_LEFT_TO_PYTORCH = {
    "cpu": ("unmerge", "linear_pair"),
    "triton": ("attention_importance_backward",),
    "cuda": (
        "attention_backward",
        "attention_importance_backward",
        "unmerge",
        "linear",
        "linear_pair",
        "lowest_tokens",
    ),
}
# What the extension has for the CPU only.
_WITHOUT_CUDA = (
    "nearest_kept", "novelty", "merge_scores", "match_tokens", "layer_norm", "attention_received", "merge_tokens",
)  # fmt: skip
_NO_SOURCE = "there is no CUDA source for it: the triton backend serves GPUs"


@functools.cache
def _implementation(op: str, package: str, name: str) -> Callable:
    if op in _LEFT_TO_PYTORCH.get(name, ()):
        name = "reference"
    if name in ("reference", "triton"):
        implementation = getattr(importlib.import_module(f"madtp_kernels.{package}.{name}"), op)
        return _without_autocast(implementation) if name == "reference" else implementation
    return getattr(native.load(), op)


def _without_autocast(reference: Callable) -> Callable:
    """A function made of PyTorch's operators, which autocast would make less precise than the kernels of other backends."""

    @functools.wraps(reference)
    def run(leading, *args):
        device = leading.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return reference(leading, *args)
        with torch.autocast(device, enabled=False):
            return reference(leading, *args)

    return run


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)


@functools.cache
def _resolve(
    op: str, package: str, name: str | None, device_type: str, dtype: torch.dtype, cuda_lacks: str | None = None
) -> tuple[str, Callable]:
    candidates = (name,) if name else _PREFERENCE.get(device_type, ("reference",))
    for candidate in candidates:
        reason = availability(candidate, device_type)
        if reason is None and candidate == "cuda":
            reason = cuda_lacks or (_NO_SOURCE if op in _WITHOUT_CUDA else None)
        if reason is None and dtype == torch.float64 and candidate != "reference":
            reason = "float64 is left to the reference"
        if reason is None:
            return candidate, _implementation(op, package, candidate)
        if name:
            raise BackendError(f"{op}: backend {name!r} was asked for but cannot run on {device_type}: {reason}")
        _log_once(f"{op}: backend {candidate!r} is not used on {device_type}: {reason}")
    raise AssertionError("the reference takes everything")


def resolve(
    op: str, package: str, requested: str, leading: torch.Tensor, cuda_lacks: str | None = None
) -> tuple[str, Callable]:
    """The backend that serves this call, by name, and its function (positional arguments of the operation's schema).

    Args:
        op: name of the operation; package: its folder.
        requested: the caller's choice, "" for none; leading: the tensor whose device and dtype decide.
        cuda_lacks: what of this call the CUDA sources cannot do, for the message; None if nothing.

    Raises:
        BackendError: a backend asked for by name (argument, :func:`use`, environment) cannot run.
        ValueError: no backend has that name.
    """
    name = _checked(requested) if requested else forced()
    return _resolve(op, package, name, leading.device.type, leading.dtype, cuda_lacks)


def dispatch(op: str, package: str) -> Callable:
    """What a registered operation runs: its arguments in the order of the schema, which ends with the backend's name."""

    def run(*args):
        *args, backend = args
        return resolve(op, package, backend, args[0])[1](*args)

    return run
