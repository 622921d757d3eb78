"""How an operation becomes a `torch.ops.madtp_kernels` operator: schema, implementation, fake implementation, autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("madtp_kernels", "DEF")


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Register an operator that allocates its outputs and changes no input.

    Args:
        schema: ``name(Tensor x, ...) -> ...``.
        run: called with the arguments of the schema on every device.
        fake: the same with tensors that have only shapes, for torch.compile and torch.export.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"madtp_kernels::{name}", fake, lib=_library)


def differentiate(name: str, setup_context: Callable, backward: Callable) -> None:
    """Register the gradient formula of an operator defined before."""
    torch.library.register_autograd(
        f"madtp_kernels::{name}", backward, setup_context=setup_context, lib=_library
    )
