"""Eager calls on a GPU that repeat an earlier one in all that was checked and decided: no check and no look-up is made twice.

A layer is launched from Python in less time than it runs only where Python does next to nothing. What the operations check of
their arguments, which backend serves them and which variants of its kernels are compiled depends on dtypes, devices, shapes,
strides and alignment of tensors and on the other arguments: :func:`signature` is all of that as one key, and the buffers of a
bound batch keep their shapes from layer to layer. Under autograd, transforms, modes, torch.compile and in debug mode, and for
tensors of the CPU, there is no key, and every call goes the long way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, checks

_KINDS = (Tensor, torch.nn.Parameter)
_MOST = 4096  # keys; a process that serves ever new shapes starts anew then
_known: dict[tuple, Callable] = {}


def signature(operation: Callable, tensors: tuple[Tensor | None, ...], options: tuple) -> tuple | None:
    """All that decides how a call runs, or None where it has to be looked at.

    Args:
        operation: the public function; tensors: its tensors, the leading one first; options: its other arguments, hashable.
            A float counts by its value.
    """
    if torch.compiler.is_compiling():
        return None
    leading = tensors[0]
    if type(leading) not in _KINDS or not leading.is_cuda:
        return None
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or checks.may_read(leading)
    ):
        return None
    differentiates = torch.is_grad_enabled()
    key = [operation, options, backends.forced()]
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            continue
        if type(tensor) not in _KINDS or (differentiates and tensor.requires_grad):
            return None
        stride = tensor.stride()
        if stride and stride[-1] != 1:  # a copy would be made
            return None
        key += (tensor.dtype, tensor.device, tensor.shape, stride, tensor.data_ptr() & 15)
    return tuple(key)


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
    from .triton_utils import Replayed

    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = Replayed(run, tuple(implementation for _, implementation in resolved))
