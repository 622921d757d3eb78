"""How an operation becomes a `torch.ops.madtp_kernels` operator: schema, implementation, fake implementation, autograd.

The registered operator serves torch.compile, autograd and the other transforms. A plain eager call needs none of them, and the
boundary costs microseconds: :func:`call` goes straight to the implementation then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library import autograd as _autograd
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

_library = torch.library.Library("madtp_kernels", "DEF")
_implementations: dict[str, Callable] = {}
_autograd_kernels: dict[str, Callable] = {}


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Register an operator that allocates its outputs and changes no input.

    Args:
        schema: ``name(Tensor x, ...) -> ...``.
        run: called with the arguments of the schema on every device.
        fake: the same with tensors that have only shapes, for torch.compile and torch.export.
    """
    name = schema.partition("(")[0]
    _implementations[name] = run
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"madtp_kernels::{name}", fake, lib=_library)
    if not name.endswith("_backward"):
        _autograd_kernels[name] = _without_gradient(name)
        _library.impl(name, _refusing_tangents(name), "Autograd", with_keyset=True)


def differentiate(name: str, setup_context: Callable, backward: Callable) -> None:
    """Register the gradient formula of an operator defined before. There is none for forward-mode differentiation."""
    operator = getattr(torch.ops.madtp_kernels, name).default
    _autograd_kernels[name] = _autograd.make_autograd_impl(operator, _autograd.Info(backward, setup_context))


def call(name: str, *args) -> Any:
    """The operator ``name``, or its implementation directly where nothing has to look at the call.

    Raises:
        NotImplementedError: an argument has a tangent.
    """
    if not torch.compiler.is_compiling() and plain(args):
        return _implementations[name](*args)
    return getattr(torch.ops.madtp_kernels, name)(*args)


def plain(args: tuple) -> bool:
    """Whether no gradient, transform, mode or subclass of tensors is involved."""
    if (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or args[0].is_meta  # which has shapes only
    ):
        return False
    differentiates = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter:
            if differentiates and arg.requires_grad:
                return False
        elif isinstance(arg, Tensor) or kind is tuple and arg and not plain(arg):
            return False
    return True


def _refusing_tangents(name: str) -> Callable:
    def run(keyset, *args):
        if forward_ad._current_level >= 0:
            for arg in pytree.tree_leaves(args):
                if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                    raise NotImplementedError(
                        f"madtp_kernels.{name} has no forward-mode derivative (torch.func.jvp): differentiate in reverse mode"
                    )
        return _autograd_kernels[name](keyset, *args)

    return run


def _without_gradient(name: str) -> Callable:
    operator = getattr(torch.ops.madtp_kernels, name).default

    def run(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return run
