"""What the Triton kernels share: constants, block sizes, and questions about the device they are compiled for.

Kernels live with their operations. Nothing here waits for a device.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)  # log(x) is log2(x) * LN2
EPS = tl.constexpr(1e-8)  # MADTP adds it to every denominator
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # kernels run through Triton's interpreter


def on_device_of_first(function: Callable) -> Callable:
    """Make the device of the first argument the current one during the call: Triton launches on the current device."""

    @functools.wraps(function)
    def guarded(first: Tensor, *rest):
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device(first.device):
            return function(first, *rest)

    return guarded


def prepared(prepare: Callable) -> Callable:
    """Decorator that makes an operation of a function that decides how it runs.

    ``prepare`` gets the arguments of the operation and returns a function of the same arguments, which allocates results and
    launches. That serves every later call whose tensors have the same dtypes, devices, shapes, strides and alignment, and whose
    other arguments are the same (:mod:`madtp_kernels.repeats`), so it must not hold a tensor.
    """

    @on_device_of_first
    @functools.wraps(prepare)
    def operation(*args):
        return prepare(*args)(*args)

    operation.prepare = prepare
    return operation


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) of any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def multiprocessors(tensor: Tensor) -> int:
    """Number of multiprocessors of the device of a tensor; 1 for the interpreter, which runs programs one by one."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 1


# How a compiled kernel is run has no public interface; these are the versions for which `launch` was checked.
_KNOWN_TRITON = triton.__version__.split(".")[:2] in (["3", "6"], ["3", "7"]) and torch.version.hip is None
# Triton's own method: whoever puts another in its place, before or after this import, wants to see all launches.
_RUN = (
    JITFunction.run
    if getattr(JITFunction.run, "__globals__", None) is vars(sys.modules[JITFunction.__module__])
    else None
)
# Compiled kernels by specialisation: what was compiled, the constants that are passed, the device, and how it is run.
_compiled: dict[tuple, tuple[object, tuple, int, tuple[Callable, Callable]]] = {}


def _watched(kernel: JITFunction) -> bool:
    """Whether somebody wants to see the launches of a kernel (profilers, tests), or to have it compiled in a way of his own."""
    runtime = triton.knobs.runtime
    return bool(
        JITFunction.run is not _RUN
        or kernel.pre_run_hooks
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.debug
        or getattr(runtime, "add_stages_inspection_hook", None)
        or triton.knobs.compilation.instrumentation_mode
    )


@triton.jit
def after_previous():
    """First statement of every kernel: wait for the kernel before it, and let the next one come.

    On sm_90 and later a short kernel is launched while the one before still runs (:func:`_runs`): its programs are there when that
    ends. The wait is for all of the kernel before, hence for all before that, too.
    """
    if not INTERPRETED:  # noqa: SIM102 (the interpreter knows no target)
        if cuda_capability_geq(9, 0):
            gdc_wait()
            gdc_launch_dependents()


SHORT = 256  # programs that the smallest device of sm_90 runs at once, two on a multiprocessor


def _runs(compiled) -> tuple[Callable, Callable]:
    """How Triton runs a compiled kernel: after the one before it, or while that still runs (programmatic dependent launch).

    A forward of 360 short kernels (one pair) takes 2,259 us on an H200 with overlapping launches and 2,395 without; one of long
    kernels (64 pairs) 10,850 and 10,554.
    """
    run = compiled.run
    if not hasattr(run, "launch_pdl") or compiled.metadata.target.arch < 90:
        return run, run
    overlapping = copy.copy(run)
    overlapping.launch_pdl = True
    return run, overlapping


@functools.cache
def _specialised(kernel: JITFunction) -> tuple[bool, ...]:
    """For each parameter, whether a number passed there decides what is compiled."""
    return tuple(not parameter.do_not_specialize for parameter in kernel.params)


def specialisation(kernel: JITFunction, args: tuple, constants: dict) -> tuple | None:
    """All that decides which variant of a kernel Triton compiles for run-time arguments and constants; None if unknown.

    Of tensors, alone or in a tuple, the dtype and whether the address is a multiple of 16 bytes; of integers whether they are 1
    or multiples of 16, where the kernel does not ask to leave that out; of descriptors dtype and shape of a block.
    """
    key: list = [kernel.fn, driver.active.get_current_device()]
    for arg, specialised in zip(args, _specialised(kernel), strict=False):
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter:
            key.append(arg.dtype)
            key.append(not arg.data_ptr() & 15)
        elif arg is None or kind is float:
            key.append(kind)
        elif kind is int and -(2**31) <= arg < 2**31:
            key.append(specialised and (2 if arg == 1 else not arg & 15))
        elif issubclass(kind, TensorDescriptor):
            key.append(arg.base.dtype)
            key.append(tuple(arg.block_shape))
        elif kind is tuple and all(type(part) is Tensor for part in arg):
            key.append(tuple((part.dtype, not part.data_ptr() & 15) for part in arg))
        else:
            return None
    key.extend(constants.items())
    return tuple(key)


def launch(kernel: JITFunction, programs: int, *args, short: bool | None = None, **constants) -> tuple | None:
    """``kernel[(programs,)](*args, **constants)`` with constants last: in a fraction of the time from the second launch on.

    Triton binds, describes and looks up the arguments at every launch, which takes longer than many of these kernels. Here the
    compiled kernel is found by :func:`specialisation` and run. Where anything is unknown or watched, Triton launches.

    Args:
        short: whether the programs are over together and soon, so that the launch may overlap with the kernel before; by default
            if the device runs all of them at once.

    Returns:
        What was run directly, for :class:`Launch`; None where Triton launched.
    """
    if not _KNOWN_TRITON or type(kernel) is not JITFunction or _watched(kernel):
        kernel[(programs,)](*args, **constants)
        return None
    key = specialisation(kernel, args, constants)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[(programs,)](*args, **constants)
        if key is not None and compiled is not None:
            rest = kernel.arg_names[len(args) :]
            _compiled[key] = compiled, tuple(constants[name] for name in rest), key[1], _runs(compiled)
        return None
    compiled, rest, device, runs = found
    run = runs[programs <= SHORT if short is None else short]
    stream = driver.active.get_current_stream(device)
    run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *rest)
    return compiled, rest, device, run


class Launch:
    """A launch for run-time arguments that are specialised alike at every call: the compiled kernel is looked up once.

    Args:
        kernel, programs, short, constants: as of :func:`launch`. The device has to be the current one, and the same at every call.
    """

    __slots__ = ("constants", "found", "kernel", "programs")

    def __init__(self, kernel: JITFunction, programs: int, **constants) -> None:
        self.kernel, self.programs, self.constants, self.found = kernel, programs, constants, None

    def __call__(self, *args) -> None:
        if self.found is None or _watched(self.kernel):
            self.found = launch(self.kernel, self.programs, *args, **self.constants)
            return
        compiled, rest, device, run = self.found
        stream = driver.active.get_current_stream(device)
        run(self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *rest)


def cdiv(size: int, unit: int) -> int:
    """How many units cover ``size``. (`triton.cdiv` does the same in ten times the time: launches count.)"""
    return -(-size // unit)


def block(size: int, least: int = 16) -> int:
    """The power of two that covers ``size``, at least ``least`` (16 is the smallest side of a matrix product)."""
    return max(least, 1 << (size - 1).bit_length())


def reach_far(rows: int, *tensors: Tensor) -> bool:
    """Whether ``rows`` rows of a tensor, those of a tile, reach as far as 2^31 numbers: as FAR of :func:`within`."""
    return any(rows * tensor.stride(0) >= 2**31 for tensor in tensors)


@triton.jit
def within(rows, pitch, columns, FAR: tl.constexpr):
    """Offsets within a tile whose rows lie ``pitch`` numbers apart: in 32 bits, which take half of the registers, unless FAR."""
    if FAR:
        rows = rows.to(tl.int64)
    return rows[:, None] * pitch + columns[None, :]


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


@triton.jit
def has_nan(x, axis):
    """Whether a float32 along the axis is NaN, which maxima and minima on a GPU drop: its bits are those beyond infinity."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis) > 0x7F800000


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_or_nan(x, axis):
    """The largest float32 along the axis, NaN if one of them is."""
    if INTERPRETED:  # there, a reduction by a function of one's own takes a step per number
        return tl.where(has_nan(x, axis), float("nan"), tl.max(x, axis))
    return tl.reduce(x, axis, _larger_or_nan)


@triton.jit
def fill_rest(values, value, cu_seqlens, capacity, BLOCK: tl.constexpr):
    """Store ``value`` in the rows beyond the last token: each of as many programs as there are samples a part of them."""
    programs = tl.num_programs(0)
    first = tl.load(cu_seqlens + programs) + tl.program_id(0) * BLOCK
    for start in range(first, capacity, programs * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        tl.store(values + rows, value, mask=rows < capacity)


SAMPLES = tl.constexpr(512)  # whose rows are added up at once


@triton.jit
def rows_before(rows, i_b):
    """Sum of the ``rows`` (int32) of the samples before sample ``i_b``: 4 bytes a sample, from cache, instead of waiting for a scan."""
    before = 0
    for start in range(0, i_b, SAMPLES):
        o_b = start + tl.arange(0, SAMPLES)
        before += tl.sum(tl.load(rows + o_b, mask=o_b < i_b, other=0), 0)
    return before
