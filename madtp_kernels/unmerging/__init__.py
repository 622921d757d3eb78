"""Tokens back from merged ones: public function, checks, dispatch, registration, gradient.

The formula is in `reference.py`, the GPU kernel in `triton.py`. The backend "cpu" is the reference: PyTorch's own indexing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends, checks
from ..registration import call, define, define_gradient
from . import reference

__all__ = ["unmerge"]


def unmerge(x: Tensor, rows: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """Every original token gets a copy of the row that stands for it, as dense prediction needs them.

    Args:
        x: ``[C', D]`` rows after merging.
        rows: ``[C]`` int32: for each original token its row of x; -1 for one that was dropped and merged nowhere, which
            gets zeros. Merged twice: ``rows_first -> rows_second`` compose by indexing.
        cu_seqlens: ``[B+1]`` int32 offsets of the *original* tokens; only the last one, T, matters.
        backend: force an implementation.

    Returns:
        ``[C, D]`` in the dtype of x; rows beyond T are undefined. The gradient of x is the sum over the tokens a row stands
        for, in a fixed order; zero for a row that stands for none.

    Raises:
        ValueError: an argument does not fit, or (CPU, or debug mode) a row beyond x. BackendError: a backend asked for by
            name cannot run.
    """
    checks.floats("x", x, 2, "[C', D]")
    checks.tensor("rows", rows, (None,), "[C]", torch.int32, x.device)
    checks.offsets("cu_seqlens", cu_seqlens, "T", 2**31 - 1, rows, "rows")
    if checks.may_read(rows):
        defined = rows[: int(cu_seqlens[-1])]
        if len(defined) and (defined.max() >= x.shape[0] or defined.min() < -1):
            raise ValueError(f"rows: expected -1..{x.shape[0] - 1}, got {defined.min()}..{defined.max()}")
    return call("unmerge", *map(checks.unit_stride, (x, rows, cu_seqlens)), backend or "")


define(
    "unmerge(Tensor x, Tensor rows, Tensor cu_seqlens, str backend) -> (Tensor out)",
    backends.dispatch("unmerge", "unmerging"),
    lambda x, rows, *_: x.new_empty(rows.shape[0], x.shape[1]),
)
define_gradient(
    "unmerge_backward(Tensor x, Tensor rows, Tensor cu_seqlens, Tensor d_out) -> (Tensor d_x)",
    reference.unmerge_backward,
)
