"""DTP, the dynamic token pruning of one layer, and the record it leaves. Paper: arXiv 2403.02991, section 3.3.

The arithmetic is in `madtp_kernels`; here is what a model has to carry from layer to layer for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch, prune


@dataclass(frozen=True)
class Pruning:
    """How one stream (vision or text) is pruned during one forward."""

    temperature: float
    """0: dense. Higher prunes more."""
    groups: Tensor | None = None
    """``[B]`` int32: samples of a group keep the same number of tokens (official batches)."""
    use_sizes: bool = False
    """Let merged tokens weigh what they stand for, in attention and in further merges (not in the paper)."""
    backend: str | None = None

    @property
    def active(self) -> bool:
        return self.temperature > 0


@dataclass(frozen=True)
class Stream:
    """Tokens on their way through the layers."""

    tokens: RaggedBatch
    ids: Tensor
    """``[T]`` int32: position of the original token in its sample; -(1 + layer) for a token merged in that layer."""
    sizes: Tensor | None = None
    """``[T]`` float32: how many original tokens each stands for; only with ``Pruning.use_sizes``."""

    @classmethod
    def start(cls, tokens: RaggedBatch, use_sizes: bool) -> Stream:
        """Every token stands for itself."""
        row = torch.arange(tokens.values.shape[0], device=tokens.device)
        sample = torch.searchsorted(tokens.cu_seqlens[1:], row, right=True, out_int32=True)
        first = tokens.cu_seqlens[sample.clamp(max=max(tokens.batch_size - 1, 0))] if tokens.batch_size else row
        sizes = torch.ones_like(row, dtype=torch.float32) if use_sizes else None
        return cls(tokens, (row - first).to(torch.int32), sizes)

    def with_values(self, values: Tensor) -> Stream:
        return replace(self, tokens=self.tokens.with_values(values))

    @property
    def key_bias(self) -> Tensor | None:
        """Log of the sizes: makes a merged token count as the tokens it stands for."""
        return None if self.sizes is None else self.sizes.log()


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did to its tokens. Everything stays on the device until somebody reads it."""

    cu_seqlens_in: Tensor
    """``[B+1]`` int32 offsets of the tokens that entered."""
    cu_seqlens: Tensor
    """``[B+1]`` int32 offsets of the tokens that left."""
    ids: Tensor
    """``[T']`` int32 of the tokens that left (see :class:`Stream`); token 0 of each sample has id 0."""
    importance: Tensor | None = None
    """``[T]`` float32 of the tokens that entered; None in a dense layer."""
    threshold: Tensor | None = None
    """``[B]`` float32; None in a dense layer."""

    @property
    def lengths_in(self) -> Tensor:
        return self.cu_seqlens_in.diff()

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()

    @property
    def pruned(self) -> Tensor:
        """``[B]`` bool: pruning always shortens a sample."""
        return self.lengths < self.lengths_in

    @property
    def kept(self) -> Tensor:
        """``[B]`` prunable tokens that survived as themselves (neither token 0 nor this layer's merged token)."""
        return self.lengths - 1 - self.pruned.int()


def prune_layer(
    stream: Stream,
    entering: Tensor,
    received: Tensor,
    cls: Tensor,
    guide: tuple[Tensor, Tensor | None],
    pruning: Pruning,
    layer: int,
    *,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
) -> tuple[Stream, Tensor | None, LayerTrace]:
    """Prune the tokens after a block's attention sub-layer.

    Args:
        stream: tokens ``[T, D]`` after the attention sub-layer (residual added).
        entering: ``[T, D]`` the tokens as they entered the block.
        received, cls: ``[T]`` float32, the importance of the block's attention.
        guide: folded dictionary ``[M, D]`` and bias ``[M]`` or None.
        layer: number of the layer, for the ids of merged tokens.
        norm: LayerNorm that follows, done in the same pass.

    Returns:
        The stream that goes on, the normalised rows (None without ``norm``), and the record of the layer.
    """
    dictionary, bias = guide
    result = prune(
        stream.tokens, entering, dictionary, received, cls, pruning.temperature, bias=bias, backend=pruning.backend,
        ids=stream.ids, sizes=stream.sizes, merged_id=-(1 + layer), groups=pruning.groups, norm=norm,
    )  # fmt: skip
    tokens, ids, sizes, normed = result.compacted
    trace = LayerTrace(stream.tokens.cu_seqlens, tokens.cu_seqlens, ids, result.importance, result.threshold)
    return Stream(tokens, ids, sizes), normed, trace
