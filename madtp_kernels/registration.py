"""How an operation becomes a `torch.ops.madtp_kernels` operator: schema, implementation, fake implementation, autograd.

The registered operator serves torch.compile, autograd and the other transforms. A plain eager call needs none of them, and the
boundary costs microseconds: :func:`call` goes straight to the implementation then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library import autograd as _autograd
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from . import backends, native

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
    if name.endswith("_backward"):
        _library.impl(name, _refusing_second_gradients(name), "Autograd", with_keyset=True)
    else:
        _autograd_kernels[name] = _without_gradient(name)
        _library.impl(name, _refusing_torch_func(name), "Autograd", with_keyset=True)


def define_gradient(schema: str, run: Callable) -> None:
    """Register an operator ``name_backward`` and, through it, the gradient of the operator ``name``, which was defined before.

    The names in its schema say what is kept for it and what it returns, so that nothing else has to be written.

    Args:
        schema: ``name_backward(...) -> (...)``. An argument is named as an input or an output of the operator, or ``d_`` and an
            output: the gradient there. Outputs without such an argument are not differentiable. A result is named ``d_`` and
            the input whose gradient it is, and has its shape and dtype; of an input that is None it is empty, with the dtype
            of the last gradient.
        run: called with the arguments of the schema on every device.
    """
    backward_name = schema.partition("(")[0]
    name = backward_name.removesuffix("_backward")
    forward, backward = getattr(torch.ops.madtp_kernels, name).default._schema, torch._C.parse_schema(schema)
    input_names, output_names = ([argument.name for argument in part] for part in (forward.arguments, forward.returns))
    arguments, results = ([argument.name for argument in part] for part in (backward.arguments, backward.returns))
    tensors = [argument.name for argument in backward.arguments if "Tensor" in str(argument.type)]
    kept_tensors = [n for n in tensors if n in input_names or n in output_names]
    kept_options = [n for n in arguments if n not in tensors]
    differentiable = [n for n in output_names if f"d_{n}" in arguments]

    def fake(*args):
        given = dict(zip(arguments, args, strict=True))
        like = [given[result.removeprefix("d_")] for result in results]
        empty = given[tensors[-1]].new_empty
        made = tuple(empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in like)
        return made if len(made) > 1 else made[0]

    def setup_context(ctx, inputs, output):
        output = output if isinstance(output, tuple) else (output,)
        values = dict(zip(input_names, inputs, strict=True)) | dict(zip(output_names, output, strict=True))
        ctx.mark_non_differentiable(*(values[n] for n in output_names if n not in differentiable))
        ctx.save_for_backward(*(values[n] for n in kept_tensors))
        ctx.options = {n: values[n] for n in kept_options}

    def gradient(ctx, *grads):
        kept = dict(zip(kept_tensors, ctx.saved_tensors, strict=True))
        values = kept | ctx.options | {f"d_{n}": grad for n, grad in zip(output_names, grads, strict=True)}
        found = getattr(torch.ops.madtp_kernels, backward_name)(*(values[n] for n in arguments))
        found = dict(zip(results, found if isinstance(found, (tuple, list)) else (found,), strict=True))
        return tuple(None if kept.get(n) is None else found.get(f"d_{n}") for n in input_names)

    define(schema, run, fake)
    differentiate(name, setup_context, gradient)


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
    """Whether no gradient, transform, mode or subclass of tensors is involved, and memory holds what the tensors say."""
    return _plain()(args)


@functools.cache
def _plain() -> Callable[[tuple], bool]:
    """That of the extension if it was compiled before, in a fraction of the time."""
    extension = native.find()
    return _plain_in_python if extension is None else extension.plain


def in_one_call(tensors: tuple, backend: str | None, *operations: tuple[str, str, Tensor]) -> bool:
    """Whether one call of the extension may stand for several operations on CPU tensors: it serves them all, and nothing has to look
    at them separately.

    Args:
        tensors: of all operations. backend: what the caller asked for.
        operations: name, folder and leading tensor of each that decides.
    """
    if torch.compiler.is_compiling() or not plain(tensors):
        return False
    return all(backends.resolve(op, package, backend or "", leading)[0] == "cpu" for op, package, leading in operations)


def at_once(operation: Callable, *args: object) -> Any:
    """What an operation of the extension that stands for several returns; None where an operand does not fit: one by one they serve it,
    or say which it is."""
    try:
        return operation(*args)
    except (TypeError, ValueError, RuntimeError):
        return None


def transforms_or_modes() -> bool:
    """Whether `torch.func`, forward-mode differentiation or a dispatch mode would look at a call."""
    return bool(
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _plain_in_python(args: tuple) -> bool:
    if transforms_or_modes():
        return False
    differentiates = torch.is_grad_enabled()
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is torch.nn.Parameter:
            # Shapes without numbers, memory of the opposite sign, zeros without memory: PyTorch makes plain tensors of the latter
            # for an operator.
            flagged = arg.is_neg() or arg.is_conj() or arg._is_zerotensor()
            if (differentiates and arg.requires_grad) or arg.is_meta or flagged:
                return False
        elif isinstance(arg, Tensor) or (kind is tuple and not _plain_in_python(arg)):
            return False
    return True


def _refusing_torch_func(name: str) -> Callable:
    def run(keyset, *args):
        if forward_ad._current_level >= 0:
            for arg in pytree.tree_leaves(args):
                if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
                    raise NotImplementedError(
                        f"madtp_kernels.{name} has no forward-mode derivative (torch.func.jvp): differentiate in reverse mode"
                    )
        transforms = torch._C._functorch.peek_interpreter_stack() is not None and torch.is_grad_enabled()
        if transforms and any(isinstance(arg, Tensor) and arg.requires_grad for arg in pytree.tree_leaves(args)):
            raise NotImplementedError(
                f"madtp_kernels.{name} cannot be differentiated by torch.func (grad, vjp, jacrev): use torch.autograd"
            )
        return _autograd_kernels[name](keyset, *args)

    return run


def _refusing_second_gradients(name: str) -> Callable:
    """Gradients of gradients (`create_graph=True`) would be zero without a word: no kernel differentiates its gradient."""
    operator = getattr(torch.ops.madtp_kernels, name).default
    message = f"madtp_kernels.{name.removesuffix('_backward')} has no second derivative"

    def run(keyset, *args):
        with torch.no_grad():  # within it, a gradient may be computed by PyTorch's own
            found = operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if not (torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args)):
            return found
        tensors = found if isinstance(found, (tuple, list)) else (found,)
        raises = torch._C._functions.DelayedError(message.encode(), len(tensors))
        return raises(*(tensor.detach().requires_grad_() for tensor in tensors))

    return run


def _without_gradient(name: str) -> Callable:
    operator = getattr(torch.ops.madtp_kernels, name).default

    def run(keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return run
