"""Several weights of a file that are one of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["stacked"]


def stacked(state: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
    """These weights on top of each other.

    Raises:
        ValueError: they differ in shape or dtype, or are no floating-point numbers; the message names them.
    """
    parts = [state[key] for key in keys]
    facts = [(list(part.shape), str(part.dtype)) for part in parts]
    if not parts[0].dim() or not parts[0].is_floating_point() or any(fact != facts[0] for fact in facts):
        told = ", ".join(f"{key} {shape} {dtype}" for key, (shape, dtype) in zip(keys, facts, strict=True))
        raise ValueError(f"weights that belong together: expected one shape and one floating-point type, got {told}")
    return torch.cat(parts)
