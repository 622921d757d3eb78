"""Argument checks shared by all operations, and the debug switch.

A check that only looks at shapes, dtypes and devices always runs, and so does one that reads values of CPU tensors. One
that would have to wait for a device runs only in debug mode (`MADTP_KERNELS_DEBUG=1` or `set_debug(True)`).
"""

from __future__ import annotations

import functools
import math
import os
import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from . import native

_debug = os.environ.get("MADTP_KERNELS_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Turn on or off the checks that have to read tensors back from a device."""
    global _debug
    _debug = bool(enabled)


def may_read(tensor: Tensor) -> bool:
    """Whether a check may look at the values of this tensor: on the CPU always, on a device in debug mode."""
    if not (tensor.is_cpu or _debug):
        return False
    # Under torch.func.vmap it has as many values as there are rows; the kernels look at each row's.
    return not (
        torch.compiler.is_compiling()
        or isinstance(tensor, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def describe(value: object) -> str:
    """Shape, dtype and device of a tensor, or the value itself, for error messages."""
    if isinstance(value, Tensor) and value.is_nested:  # which may have no shape to show
        return f"NestedTensor of layout {value.layout}"
    if isinstance(value, Tensor) and value.layout != torch.strided:
        return (
            f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} of layout {value.layout} on {value.device}"
        )
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def dense(value: object) -> bool:
    """Whether it is a tensor whose numbers lie in memory as its shape and strides say."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def tensor(
    name: str,
    value: Tensor,
    shape: tuple[int | None, ...],
    meaning: str,
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Check one tensor argument; None in ``shape`` matches any size. ``meaning`` is e.g. ``"[T, D]"``."""
    fits = dense(value)
    if fits and value.dtype is dtype and value.shape == shape and value.device == device:
        return  # most calls
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    fits = fits and value.dim() == len(shape) and value.dtype in dtypes and value.device == device
    if fits and tuple(value.shape) != shape:
        for got, want in zip(value.shape, shape, strict=True):
            fits = fits and (want is None or got == want)
    if not fits:
        sizes = ", ".join("*" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name}: expected {meaning} = {kinds}[{sizes}] on {device}, got {describe(value)}")


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that operations take."""


def floats(name: str, value: Tensor, dims: int, meaning: str) -> None:
    """Check the leading tensor of an operation, which the others have to match."""
    if not dense(value) or value.dim() != dims or value.dtype not in FLOATS:
        raise ValueError(f"{name}: expected floating-point {meaning}, got {describe(value)}")


def offsets(name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: int, values: Tensor, values_name: str) -> None:
    """Check offsets and the length bound against the buffer they describe."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name}: expected int32 offsets [B+1], got {describe(cu_seqlens)}")
    tensor(name, cu_seqlens, cu_seqlens.shape, "[B+1]", torch.int32, values.device)
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)):
        raise ValueError(f"{max_name}: expected an int >= 0, got {describe(max_seqlen)}")
    if isinstance(max_seqlen, int) and max_seqlen < 0:
        raise ValueError(f"{max_name}: expected an int >= 0, got {max_seqlen}")
    if not may_read(cu_seqlens):
        return
    rows, longest = _known_offsets(name, cu_seqlens)
    if longest > max_seqlen:
        b = int((cu_seqlens.diff() > max_seqlen).nonzero()[0])
        raise ValueError(f"{max_name}: {max_seqlen} is below the length {int(cu_seqlens.diff()[b])} of sample {b}")
    if rows > values.shape[0]:
        raise ValueError(f"{name}: offsets end at {rows}, beyond the {values.shape[0]} rows of {values_name}")


# Of offsets that were read: themselves, their version, number of rows, longest sample. Not an attribute of the tensor, which would go
# along with copies and pickles of it, whose versions count other writes.
_known: dict[int, tuple] = {}


def _known_offsets(name: str, cu_seqlens: Tensor) -> tuple[int, int]:
    """Number of rows and length of the longest sample. Read once per tensor: the result is kept until it is written to
    (of a tensor made under inference_mode writes are not counted; the kernels look again themselves)."""
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    known = _known.get(id(cu_seqlens))
    if known is None or known[0]() is not cu_seqlens or known[1] != version:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0:
            raise ValueError(f"{name}: expected offsets that start at 0, got {bounds[0]} first")
        longest = 0
        for b, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if stop < start:
                raise ValueError(f"{name}: offsets decrease from {start} to {stop} at sample {b}")
            longest = max(longest, stop - start)
        return know_offsets(cu_seqlens, bounds[-1], longest)
    return known[2:]


def know_offsets(cu_seqlens: Tensor, rows: int, longest: int) -> tuple[int, int]:
    """Note what an operation has found out of offsets that it made itself, so that nobody reads them again."""
    key, version = id(cu_seqlens), 0 if cu_seqlens.is_inference() else cu_seqlens._version
    _known[key] = (weakref.ref(cu_seqlens, lambda _, known=_known: known.pop(key, None)), version, rows, longest)
    return rows, longest


def longest_sample(cu_seqlens: Tensor) -> int:
    """Length of the longest sample, read on the host."""
    return _known_offsets("cu_seqlens", cu_seqlens)[1]


def finite(name: str, value: Tensor, cu_seqlens: Tensor | None = None) -> None:
    """Check that scores are finite; with ``cu_seqlens`` only the defined rows count."""
    if not may_read(value):
        return
    count = value.shape[0] if cu_seqlens is None else _known_offsets("cu_seqlens", cu_seqlens)[0]
    if type(value) is Tensor and value.dtype is torch.float32 and value.is_cpu:
        looks = _all_finite()
        if looks is not None and looks(value, count):
            return
    rows = value if count == value.shape[0] else value[:count]
    # NaN and infinity reach the sum. One that overflows without them is looked at again.
    if math.isfinite(rows.detach().sum() if rows.requires_grad else rows.sum()):
        return
    bad = (~torch.isfinite(rows)).sum().item()
    if bad:
        raise ValueError(f"{name}: expected finite scores, got {bad} NaN or infinite of {rows.numel()}")


@functools.cache
def _all_finite() -> Callable[[Tensor, int], bool] | None:
    """Of the extension, if it was compiled before: a tenth of the time."""
    extension = native.find()
    return None if extension is None else extension.all_finite


_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def positive(name: str, value: float) -> None:
    """Check a host-side number that has to be > 0 and, like its inverse, within the range of float32, in which kernels use it."""
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:  # for NaN too, and torch.compile can trace it
        raise ValueError(f"{name}: expected a finite number > 0, got {describe(value)}")
    if not _LEAST <= value <= _MOST:
        raise ValueError(f"{name}: expected a number within the range of float32, {_LEAST} to {_MOST}, got {value!r}")


def number(name: str, value: float) -> None:
    """Check a host-side number that has to be finite."""
    if not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {describe(value)}")


def is_integer(value: object, least: int) -> bool:
    """Whether it is an int of at least so much; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def counts(count: Tensor | int | None, cu_seqlens: Tensor) -> Tensor | None:
    """How many of each sample, ``[B]`` int32: such a tensor itself, or one full of a number; None stays None."""
    batch, device = cu_seqlens.shape[0] - 1, cu_seqlens.device
    if isinstance(count, Tensor):
        tensor("count", count, (batch,), "[B]", torch.int32, device)
        if may_read(count) and batch and count.min() < 0:
            raise ValueError(f"count: expected >= 0, got {count.min()}")
    elif count is not None:
        if not is_integer(count, 0):
            raise ValueError(f"count: expected an int >= 0 or int32 [B], got {describe(count)}")
        return torch.full((batch,), min(count, 2**31 - 1), dtype=torch.int32, device=device)
    return count


def flag(name: str, value: bool) -> None:
    """Check a switch: a word such as "no" would be taken for True."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {describe(value)}")


def unit_stride(value: Tensor | None) -> Tensor | None:
    """The tensor itself if its last dimension is dense, else a contiguous copy: what the kernels rely on. None stays None."""
    if value is None:
        return None
    return value if value.stride(-1) == 1 or (value.shape[-1] <= 1 and value.is_contiguous()) else value.contiguous()
