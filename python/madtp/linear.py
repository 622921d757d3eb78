"""Linear layers with bias, activation and the residual sum in one pass.

On a CPU at inference this is the product of `madtp_kernels.linear`, for every dtype but float64 and on every processor: there is
nothing to choose, so the same input gives the same bits in every process, with any number of threads, alone and in any batch. It
multiplies by the weight where it lies. **No packed or derived copy of a weight exists**, so a weight that is edited in place
(through `.data`, `copy_`, an optimizer, NumPy), moved, converted, loaded or replaced by another parameter is the weight of the
next call; there is nothing to notice and nothing to refuse.

On a GPU a pruned batch lies in a buffer larger than its tokens, whose number the host does not know: `madtp_kernels.linear`
leaves the spare rows out. At inference it serves every layer of tokens there, pruned or not, so that a sample's bits do not
depend on its neighbours. Where there are no spare rows and a gradient is needed or autocast is on, and on a CPU also under
torch.compile and without the extension, this is `torch.nn.functional.linear`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, backends, linear, native
from madtp_kernels.checks import describe
from madtp_kernels.linear.reference import activate, defined
from madtp_kernels.registration import plain

# Rows of a product that a library makes in half precision on the CPU are a multiple of this.
ROUNDED = 64


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
        """``x [C, in]`` to ``[C, out]``: activation(x W^T + b), plus the residual.

        ``activation`` is one of :data:`madtp_kernels.linear.ACTIVATIONS`: "gelu" is the exact one, "quick_gelu" OpenAI's
        x * sigmoid(1.702 x). ``tokens`` is the batch whose rows x has; rows beyond its last token are then undefined in the
        result.
        """
        return project(x, *self.affine, activation=activation, residual=residual, tokens=tokens)

    @property
    def affine(self) -> tuple[Tensor, Tensor | None]:
        """The weight ``[out, in]`` and the bias ``[out]`` as they are now."""
        own = self._parameters  # where `self.weight` looks last; a weight that is computed (parametrize) is not there
        weight = own["weight"] if "weight" in own else self.weight  # noqa: SIM401 (the slow way only where needed)
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        return weight, bias


def all_plain(*layers: nn.Module) -> bool:
    """Whether calling each does what :func:`project` does with :attr:`Linear.affine`, and nobody watches."""
    return all(type(layer) is Linear and not watched(layer) for layer in layers)


def watched(module: nn.Module) -> bool:
    """Whether calling a module does something besides its class's ``forward``: hooks, or another ``forward``."""
    everywhere = nn.modules.module
    return bool(touched(module) or everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)


def touched(module: nn.Module) -> bool:
    """Whether somebody has given hooks or another ``forward`` to this module alone."""
    own = module.__dict__
    return bool(
        "forward" in own
        or own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def reads_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the weights of a module say all that a call of it does: its ``forward`` is that of ``kind``, and it has no hooks. What
    was put in its place (an adapter), and what changes its weights when it is called (`torch.nn.utils.prune`), is called instead. Hooks
    for all modules, as profilers set them, change nothing: they see what is called."""
    return type(module).forward is kind.forward and not touched(module)


def through(
    layer: nn.Module,
    x: Tensor,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    tokens: RaggedBatch | None = None,
) -> Tensor:
    """:meth:`Linear.forward` of a layer, or of what was put in its place: an adapter would hand the activation to the layer inside it,
    and add to what comes out."""
    if isinstance(layer, Linear):
        return layer(x, activation=activation, residual=residual, tokens=tokens)
    y = activate(layer(x), activation or "")
    return y if residual is None else y + residual


class ScaledLinear(Linear):
    """A linear layer whose outputs are multiplied by learned factors before the residual is added (LayerScale)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.scale = nn.Parameter(torch.ones(out_features))

    def forward(
        self,
        x: Tensor,
        *,
        activation: str | None = None,
        residual: Tensor | None = None,
        tokens: RaggedBatch | None = None,
    ) -> Tensor:
        """``residual + scale * (x W^T + b)``, as :meth:`Linear.forward`."""
        y = super().forward(x, activation=activation, tokens=tokens)
        if tokens is not None and tokens.bound and torch.is_grad_enabled():
            y = defined(y, tokens.cu_seqlens)  # the gradient of the factors sums over all rows
        y = y * self.scale
        return y if residual is None else y + residual


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    tokens: RaggedBatch | None = None,
) -> Tensor:
    """:meth:`Linear.forward` with a weight ``[out, in]`` that need not be a whole parameter."""
    if x.is_cuda:
        if kernels_serve(x, weight, tokens):
            if not torch.is_autocast_enabled("cuda"):
                return linear(x, weight, bias, tokens.cu_seqlens, activation=activation, residual=residual)
            dtype = torch.get_autocast_dtype("cuda")
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
            y = linear(x, weight, bias, tokens.cu_seqlens, activation=activation)
            return y if residual is None else y + residual
    elif cpu_serves(x, weight, bias, residual):
        return native.load().linear(x, weight, bias, _bounds(tokens), activation or "", residual)
    y = activate(_library_product(x, weight, bias), activation or "")
    return y if residual is None else y + residual


def kernels_serve(x: Tensor, weight: Tensor, tokens: RaggedBatch | None) -> bool:
    """Whether rows ``x`` of ``tokens`` on a GPU go through our kernels: at inference, and where there may be spare rows. These hold
    any number, of which a gradient of zero makes NaN in that of a weight; our kernels leave them out."""
    if tokens is None or tokens.bound:
        return tokens is not None
    differentiates = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return not (differentiates or torch.is_autocast_enabled("cuda"))


def normed(x: Tensor, layer: Linear, norm: nn.LayerNorm, residual: Tensor, tokens: RaggedBatch) -> Tensor:
    """norm(residual + layer(x)) for ``x [C, in]``, the rows of ``tokens``; ``norm`` is a :class:`madtp.layers.LayerNorm`.

    On a GPU one call serves both, where nobody watches the modules.
    """
    if x.is_cuda and all_plain(layer) and getattr(norm, "is_plain", False) and not torch.is_autocast_enabled("cuda"):
        weight, bias = layer.affine
        if kernels_serve(x, weight, tokens):
            return linear(x, weight, bias, tokens.cu_seqlens, residual=residual, norm=norm.affine)
    return norm(through(layer, x, residual=residual, tokens=tokens), tokens)


def mlp(
    x: Tensor,
    first: Linear,
    second: Linear,
    residual: Tensor,
    activation: str = "gelu",
    *,
    tokens: RaggedBatch,
    norm: nn.LayerNorm | None = None,
    norm_first: bool = False,
) -> Tensor:
    """residual + second(activation(first(x))) for ``x [C, D]``, the rows of ``tokens``.

    With ``norm``, a :class:`madtp.layers.LayerNorm`, that of the sum; ``norm_first``: instead that of x goes in, which are the values
    of ``tokens``.
    """
    if not x.is_cuda and all_plain(first, second):
        inside, weights = fused_norm(norm, x.dtype), (*first.affine, *second.affine)
        if inside is not None and cpu_serves(x, *weights, residual, *inside[:2]):
            return native.load().mlp(x, *weights, _bounds(tokens), activation, residual, *inside, norm_first)
    if norm_first:
        x, norm = norm(tokens), None
    hidden = through(first, x, activation=activation, tokens=tokens)
    if norm is not None:
        return normed(hidden, second, norm, residual, tokens)
    return through(second, hidden, residual=residual, tokens=tokens)


def check_device(x: Tensor, weight: Tensor) -> None:
    """Refuse a weight on another device. Of a product of numbers with a weight on "meta", which was never loaded, PyTorch returns
    whatever lies in memory."""
    if x.device != weight.device:
        raise ValueError(f"weight: expected it on {x.device}, as what it is multiplied with, got {describe(weight)}")


def _library_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, for which the library beneath need not compile a product for each number of rows that pruning leaves.

    In half precision on a CPU oneDNN does so, forward and twice backward, and that takes longer than the products of a
    training step. Rows of zeros round the number up; they have no part in a gradient.
    """
    check_device(x, weight)
    if x.device.type != "cpu" or x.dim() != 2 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    half = torch.is_autocast_enabled("cpu") or x.dtype in (torch.bfloat16, torch.float16)
    spare = -x.shape[0] % ROUNDED if half else 0
    return F.linear(F.pad(x, (0, 0, 0, spare)), weight, bias)[: x.shape[0]] if spare else F.linear(x, weight, bias)


def fused_norm(norm: nn.LayerNorm | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, float] | None:
    """Weight, bias and eps with which another operation of the extension applies a :class:`madtp.layers.LayerNorm`; no weight if there
    is none to apply, None where the module has to be called."""
    if norm is None:
        return None, None, 0.0
    if not getattr(norm, "is_plain", False):  # an adapter in its place says nothing
        return None
    affine = norm.affine
    return affine if affine[0] is not None and affine[0].dtype == dtype else None


def cpu_serves(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the CPU kernels, which check their operands themselves, serve a call with rows ``x`` and these tensors."""
    return x.dim() == 2 and x.stride(1) == 1 and extension_serves(x, weight, *others)


def extension_serves(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether a call with these tensors is one for the CPU kernels: at inference, without autocast or torch.compile."""
    if not (x.device.type == "cpu" and x.dtype == weight.dtype):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not plain((x, weight, *others)):
        return False
    return backends.resolve("linear", "linear", "", x)[0] == "cpu"


def _bounds(tokens: RaggedBatch | None) -> Tensor | None:
    """The offsets of rows of which some may be spare."""
    return tokens.cu_seqlens if tokens is not None and tokens.bound else None
