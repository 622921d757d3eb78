"""Eager calls on a GPU that repeat an earlier one in all that was checked and decided: no check and no look-up is made twice.

A layer is launched from Python in less time than it runs only where Python does next to nothing. What the operations check of
their arguments, which backend serves them and which variants of its kernels are compiled depends on dtypes, devices, shapes,
strides and alignment of tensors and on the other arguments: :func:`signature` is all of that as one key, and the buffers of a
bound batch keep their shapes from layer to layer. Under autograd, transforms, modes, torch.compile and in debug mode, and for
tensors of the CPU, there is no key, and every call goes the long way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from . import backends, checks, native
from .registration import transforms_or_modes

_KINDS = (Tensor, torch.nn.Parameter)
_MOST = 4096  # keys; a process that serves ever new shapes starts anew then
_known: dict[tuple, Callable] = {}


def signature(operation: Callable, tensors: tuple[Tensor | None, ...], options: tuple) -> tuple | None:
    """All that decides how a call runs, or None where it has to be looked at.

    Args:
        operation: the public function; tensors: its tensors, the leading one first; options: its other arguments, hashable.
            A float counts by its value.
    """
    if torch.compiler.is_dynamo_compiling():  # other compilers set a mode
        return None
    leading = tensors[0]
    if type(leading) not in _KINDS or not leading.is_cuda or leading.device.index != torch.cuda.current_device():
        return None
    if checks.may_read(leading):
        return None
    facts = _facts()(tensors)
    # True equals 1, and is refused where it means nothing.
    return None if facts is None else (operation, options, tuple(map(type, options)), backends.forced(), facts)


@functools.cache
def _facts() -> Callable[[tuple[Tensor | None, ...]], Hashable | None]:
    """What describes tensors: of the extension if it was compiled, in a tenth of the time."""
    extension = native.find()
    return _facts_in_python if extension is None else extension.signature


def _facts_in_python(tensors: tuple[Tensor | None, ...]) -> tuple | None:
    """Dtype, device, shape, strides and alignment of each tensor; None under a transform or a mode, at a subclass, a gradient,
    or a last dimension that is not dense, of which a copy would be made."""
    if transforms_or_modes():
        return None
    differentiates = torch.is_grad_enabled()
    facts: list = []
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
            continue
        if (
            type(tensor) not in _KINDS
            or tensor.layout is not torch.strided
            or (differentiates and tensor.requires_grad)
        ):
            return None
        stride = tensor.stride()
        if stride and stride[-1] != 1:
            return None
        facts += (tensor.dtype, tensor.device, tensor.shape, stride, tensor.data_ptr() & 15)
    return tuple(facts)


def find(key: tuple | None) -> Callable | None:
    """How a call with this signature was done before, as a function of the arguments of its implementation; else None."""
    try:
        return _known.get(key)
    except TypeError:  # an argument that cannot be hashed is none that an operation takes
        return None


def remember(
    key: tuple | None, backend: str | None, leading: Tensor, *operations: tuple[str, str], run: Callable | None = None
) -> None:
    """Keep how a call that succeeded was done, if Triton's kernels did all of it.

    Args:
        key: its signature; None: nothing is kept.
        backend: what the caller asked for; leading: the tensor whose device and dtype decide.
        operations: name and folder of each implementation.
        run: called with the implementations, and then with what the caller of :func:`find` passes; by default the one
            implementation is called.
    """
    if key is None:
        return
    resolved = [backends.resolve(name, folder, backend or "", leading) for name, folder in operations]
    if any(name != "triton" for name, _ in resolved):
        return
    if len(_known) >= _MOST:
        _known.clear()
    prepared = [Prepared(implementation.prepare) for _, implementation in resolved]
    _known[key] = prepared[0] if run is None else functools.partial(run, *prepared)


def forget() -> None:
    """Start anew: for whoever puts another choice of tiles or launches in the place of an operation's own."""
    _known.clear()


class Prepared:
    """An operation for calls that are all alike: what it decides at the first serves all.

    Args:
        prepare: see :func:`madtp_kernels.triton_utils.prepared`.
    """

    __slots__ = ("prepare", "run")

    def __init__(self, prepare: Callable) -> None:
        self.prepare, self.run = prepare, None

    def __call__(self, *args):
        if self.run is None:
            self.run = self.prepare(*args)
        return self.run(*args)
