"""Linear layers by the fastest path torch has on this machine, with bias, activation and the residual sum in the same pass.

On a CPU at inference oneDNN is called directly, with weights packed once: torch's own `linear` goes to another library for
float32, repacks at each call, and leaves GELU and sums to separate passes. Which of the two is faster is measured, once per
dtype, not guessed from the processor's name. On a GPU a pruned batch lies in a buffer larger than its tokens, whose number
the host does not know: `madtp_kernels.linear` leaves the spare rows out. At inference it serves every layer of tokens there,
pruned or not, so that a sample's bits do not depend on its neighbours. Everywhere else this is
`torch.nn.functional.linear`.
"""

from __future__ import annotations

import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, linear

# Rows of an MLP that are taken through both layers at a time on the CPU: the hidden activations (four times as wide) then
# stay in the cache and in memory that the allocator reuses, instead of fresh pages for every call. 512 to 1024 measured best.
MLP_ROWS = 1024

ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class Linear(nn.Linear):
    """`nn.Linear` whose forward can also apply an activation or add a residual."""

    def forward(
        self,
        x: Tensor,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
        tokens: RaggedBatch | None = None,
    ) -> Tensor:
        """``x [C, in]`` to ``[C, out]``: activation(x W^T + b), or x W^T + b + residual.

        ``activation`` is one of :data:`ACTIVATIONS`: the exact GELU, or OpenAI's x * sigmoid(1.702 x). ``tokens`` is the batch
        whose rows x has; rows beyond its last token are then undefined in the result.
        """
        differentiated = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        ours = tokens is not None and x.is_cuda and (tokens.bound or not differentiated)
        if ours and not torch.is_autocast_enabled("cuda"):
            return linear(
                x, self.weight, self.bias, tokens.cu_seqlens, activation=activation, residual=residual
            )
        if _packable(x, self.weight):
            weight = _packed(self)
            if residual is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, self.bias, "add")
            kind, algorithm = ("gelu", "none") if activation == "gelu" else ("none", "")
            y = torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, kind, [], algorithm)
            # oneDNN has no QuickGELU. The rows are fresh from the product and belong to nobody else.
            return y.mul_((1.702 * y).sigmoid_()) if activation == "quick_gelu" else y
        y = F.linear(x, self.weight, self.bias)
        if activation is not None:
            y = ACTIVATIONS[activation](y)
        return y if residual is None else y + residual


def mlp(
    x: Tensor, first: Linear, second: Linear, residual: Tensor, activation: str = "gelu", *, tokens: RaggedBatch
) -> Tensor:
    """residual + second(activation(first(x))) for ``x [C, D]``, the rows of ``tokens``."""
    if x.shape[0] <= MLP_ROWS or not _packable(x, first.weight):
        return second(first(x, activation=activation, tokens=tokens), residual=residual, tokens=tokens)
    out = torch.empty_like(residual)
    for rows in range(0, x.shape[0], MLP_ROWS):
        chunk = slice(rows, rows + MLP_ROWS)
        out[chunk] = second(first(x[chunk], activation=activation), residual=residual[chunk])
    return out


_by_measurement = True


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Inside the ``with`` block layers take torch's own `linear`, whatever is faster: every process computes the same numbers."""
    global _by_measurement
    before, _by_measurement = _by_measurement, False
    try:
        yield
    finally:
        _by_measurement = before


def _packable(x: Tensor, weight: Tensor) -> bool:
    """Whether this call can take oneDNN's fused path, and the path is the faster one here."""
    return (
        x.device.type == "cpu"
        and x.shape[0] > 0
        and x.dtype == weight.dtype
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.compiler.is_compiling()
        and _by_measurement
        and _onednn_is_faster(x.dtype)
    )


def _packed(layer: Linear) -> Tensor:
    """The layer's weight in oneDNN's layout."""
    return derived(layer, (layer.weight,), lambda: torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach()))


# Module -> (what the tensors were when the result was made, a sample of their elements, the result).
_derived: weakref.WeakKeyDictionary[nn.Module, tuple[list[tuple], list[Tensor], Any]] = weakref.WeakKeyDictionary()


def derived(module: nn.Module, sources: Sequence[Tensor], make: Callable[[], Any]) -> Any:
    """What ``make`` computes from CPU tensors, kept with the module until one of them is changed or replaced.

    Writes through `.data` do not count as changes to PyTorch, so a sample of 64 elements is compared as well: that finds any
    update of the whole tensor. Someone who edits single elements through `.data` has to assign a new parameter.
    """
    keys = [(t.data_ptr(), t.dtype, None if t.is_inference() else t._version) for t in sources]
    samples = [t.detach().flatten()[:: max(1, t.numel() // 64)] for t in sources]
    found = _derived.get(module)
    if found is None or found[0] != keys or not all(map(torch.equal, found[1], samples)):
        found = _derived[module] = (keys, [sample.clone() for sample in samples], make())
    return found[2]


@functools.cache
def _onednn_is_faster(dtype: torch.dtype) -> bool:
    """Time both paths on a layer of a ViT-B block (tens of milliseconds, once per process and dtype)."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    with torch.inference_mode():
        x, weight, bias = (torch.ones(*shape, dtype=dtype) for shape in ((384, 768), (768, 768), (768,)))
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)
            paths = (
                lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""),
                lambda: F.linear(x, weight, bias),
            )
            best = [float("inf")] * 2
            for path in paths:
                path()  # creates the primitive
            for _ in range(5):
                for number, path in enumerate(paths):
                    start = time.perf_counter()
                    path()
                    best[number] = min(best[number], time.perf_counter() - start)
        except RuntimeError:  # a processor without this dtype in oneDNN
            return False
    # Fusing GELU and residual sums saves a pass over the activations, so a tie goes to oneDNN.
    return best[0] <= best[1] * 1.05
