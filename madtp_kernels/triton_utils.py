"""What the Triton kernels share: constants, block sizes, and questions about the device they are compiled for.

Kernels live with their operations. Nothing here waits for a device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
EPS = tl.constexpr(1e-8)  # MADTP adds it to every denominator
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def on_device_of_first(function: Callable) -> Callable:
    """Make the device of the first argument the current one during the call: Triton launches on the current device."""

    @functools.wraps(function)
    def guarded(first: Tensor, *rest):
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return guarded


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """Number of multiprocessors of the device of a tensor; 1 for the interpreter, which runs programs one by one."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 1


def cdiv(size: int, unit: int) -> int:
    """How many units cover ``size``. (`triton.cdiv` does the same in ten times the time: launches count.)"""
    return -(-size // unit)


def block(size: int, least: int = 16) -> int:
    """The power of two that covers ``size``, at least ``least`` (16 is the smallest side of a matrix product)."""
    return max(least, 1 << (size - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a matrix product: float32 inputs are never rounded to tf32, a kept set may hang on them."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """a b + acc in float32. Triton's interpreter cannot multiply bfloat16 matrices: there they are widened, which is exact."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)
