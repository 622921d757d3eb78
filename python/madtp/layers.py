"""LayerNorm and attention of packed tokens ``[T, D]``: over themselves, over what a decoder remembers, over another
modality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import (
    RaggedBatch,
    attention,
    attention_importance,
    attention_received,
    attention_with_importance,
    backends,
    layer_norm,
    native,
)
from madtp_kernels.beside import DONE, beside, recorded
from madtp_kernels.registration import at_once
from madtp_kernels.segments import sample_of

from .linear import Linear, all_plain, cpu_serves, fused_norm, kernels_serve, normed, project, watched
from .pruning import Pruning, Tokens
from .pruning.base import LateTokens


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension, which at inference is :func:`madtp_kernels.layer_norm` where its x are tokens: as a linear
    layer it leaves spare rows out, and it takes little more than half as long."""

    def forward(self, x: Tensor | Tokens, tokens: RaggedBatch | None = None) -> Tensor:
        """``x [C, D]``, or the values of tokens, to ``[C, D]``.

        ``tokens`` is the batch whose rows x has; rows beyond its last token are undefined in the result.
        """
        if isinstance(x, Tokens):
            if x.normed is not None and x.normed[0] is self:
                return x.normed[1]
            x, tokens = x.values, x
        weight, bias, eps = self.affine
        if x.is_cuda:
            if kernels_serve(x, weight, tokens):
                if torch.is_autocast_enabled("cuda"):
                    x = x.to(torch.promote_types(x.dtype, torch.float32))
                return layer_norm(x, weight, bias, tokens.cu_seqlens, eps)
        elif tokens is not None and weight is not None and cpu_serves(x, weight, bias):
            return native.load().layer_norm(x, weight, bias, tokens.cu_seqlens, eps)
        elif (
            torch.is_autocast_enabled("cpu")
            and weight.dtype != torch.float32
            and {x.dtype, torch.get_autocast_dtype("cpu")} != {weight.dtype}
        ):
            # Half of two kinds is computed in float32, as CUDA's autocast computes any; PyTorch has no kernel for it on a CPU.
            return F.layer_norm(x.float(), self.normalized_shape, weight.float(), bias.float(), eps)
        return super().forward(x)

    @property
    def affine(self) -> tuple[Tensor, Tensor, float]:
        """The weight ``[D]``, the bias ``[D]`` and eps as they are now."""
        own = self._parameters  # where `self.weight` looks last
        weight = own["weight"] if "weight" in own else self.weight  # noqa: SIM401 (the slow way only where needed)
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        return weight, bias, self.eps

    @property
    def is_plain(self) -> bool:
        """Whether calling it with tokens does what its class does, and nobody watches."""
        return type(self) is LayerNorm and not watched(self)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose weight is not drawn on the device "meta", where models are loaded: for numbers that nobody sees PyTorch
    would import its compiler, which takes more than a second."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(NamedTuple):
    """What a self-attention sub-layer hands on: to its output projection, and to the rule that prunes after it."""

    out: Tensor
    """``[T, H * d]``, the heads concatenated, before the output projection."""
    tokens: Tokens | None = None
    """The tokens that attended to themselves; None, as all that follows, in a step of a decoder."""
    queries: Tensor | None = None
    """``[T, H, d]``."""
    keys: Tensor | None = None
    """``[T, H, d]``."""
    lse: Tensor | None = None
    """``[H, T]`` float32 log-sum-exp of the logits."""
    attention_received: Tensor | None = None
    """``[T]`` float32: sum over the queries but the first of each sample of the maximum over heads; None unless
    ``Pruning.importance`` is "max"."""
    cls_attention: Tensor | None = None
    """``[T]`` float32: attention of the first token, heads weighted by the norm of their output; None likewise."""
    causal: bool = False
    backend: str | None = None

    def received(self, heads: str = "mean", queries: slice | Tensor | None = None) -> Tensor:
        """``[T]`` float32 attention that each token receives from chosen queries: see
        :func:`madtp_kernels.attention_received`, which this runs."""
        tokens = self.tokens
        return attention_received(
            self.queries, self.keys, self.lse, tokens.cu_seqlens, tokens.max_seqlen, heads=heads, queries=queries,
            causal=self.causal, key_bias=tokens.key_bias, backend=self.backend,
        )  # fmt: skip


def split_heads(x: Tensor, *parts: int) -> Tensor:
    """``x [C, parts[0] * parts[1] * ... * d]`` as ``[C, *parts, d]``. (`Tensor.unflatten` takes twice as long.)"""
    rows, width = x.shape
    return x.view(rows, *parts, width // math.prod(parts))


def self_attention(
    qkv: Tensor,
    tokens: Tokens,
    heads: int,
    pruning: Pruning,
    project: Callable[[Tensor], Tokens],
    *,
    causal: bool = False,
) -> tuple[Tokens, Attention]:
    """Attention of every sample over itself, with the importance that the rule wants, and the output projection.

    Args:
        qkv: ``[T, 3 * H * d]``.
        tokens: whose queries, keys and values they are.
        heads: H.
        pruning: the rule that follows.
        project: from the result ``[T, H * d]``, the heads concatenated, to the tokens that the rule gets.
        causal: tokens attend to themselves and to earlier ones only.
    """
    q, k, v = split_heads(qkv, 3, heads).unbind(1)
    cu_seqlens, most, backend = tokens.cu_seqlens, tokens.max_seqlen, pruning.backend
    options = {"causal": causal, "key_bias": tokens.key_bias, "backend": backend}
    wants_importance = pruning.active and pruning.importance
    received = cls = None
    if pruning.active and type(tokens) is Tokens and recorded(qkv):
        out, lse = attention(q, k, v, cu_seqlens, cu_seqlens, most, most, **options)
        y = LateTokens.of(*beside(qkv, lambda: project(out.flatten(1))))
        if wants_importance:
            received, cls = attention_importance(q, k, out, lse, cu_seqlens, most, **options)
    else:
        if wants_importance:
            out, lse, received, cls = attention_with_importance(q, k, v, cu_seqlens, most, **options)
        else:
            out, lse = attention(q, k, v, cu_seqlens, cu_seqlens, most, most, **options)
        y = project(out.flatten(1))
    return y, Attention(out.flatten(1), tokens, q, k, lse, received, cls, causal, backend)


def attention_sublayer(
    x: Tokens,
    norm: LayerNorm,
    qkv: Linear,
    out: Linear,
    heads: int,
    pruning: Pruning,
    *,
    norm_first: bool,
    causal: bool = False,
) -> tuple[Tokens, Attention]:
    """x + out(attention(qkv(norm(x)))), or norm(x + out(attention(qkv(x)))): :func:`self_attention` with all that is around it.

    On a CPU at inference the extension does it in one call, where nobody watches the modules.
    """
    values = x.values
    if not (values.is_cuda or recorded(values)) and all_plain(qkv, out) and (inside := fused_norm(norm, x.dtype)):
        weights = (*qkv.affine, *out.affine)
        serves = cpu_serves(values, *weights, *inside[:2], x.key_bias)
        if serves and backends.resolve("attention", "attention", pruning.backend or "", values)[0] == "cpu":
            wants_importance = bool(pruning.active and pruning.importance)
            found = at_once(
                native.load().self_attention, values, *inside, norm_first, *weights, heads, x.cu_seqlens, x.max_seqlen, causal,
                x.key_bias, wants_importance,
            )  # fmt: skip
            if found is not None:
                y, q, k, attended, lse, received, cls = found
                attention = Attention(attended.flatten(1), x, q, k, lse, received, cls, causal, pruning.backend)
                return x.with_values(y), attention

    def project(attended: Tensor) -> Tokens:
        if norm_first:
            return x.with_values(out(attended, residual=values, tokens=x))
        return x.with_values(normed(attended, out, norm, values, x))

    entering = norm(x) if norm_first else values
    return self_attention(qkv(entering, tokens=x), x, heads, pruning, project, causal=causal)


def single_attention(
    values: Tensor, qkv: Linear, tokens: Tokens, rows: Tensor, heads: int, backend: str | None, causal: bool = False
) -> Tensor:
    """What :func:`self_attention` gives to the tokens in ``rows [B]``, one of each sample, without the queries of the
    others.

    Args:
        values: ``[T, D]`` of all tokens, as they enter the projection ``qkv``.

    Returns:
        ``[B, H * d]``.
    """
    width, one = qkv.out_features // 3, tokens.single(rows)
    q = project(values[rows], qkv.weight[:width], qkv.bias[:width], tokens=one).unflatten(-1, (heads, -1))
    kv = project(values, qkv.weight[width:], qkv.bias[width:], tokens=tokens).unflatten(-1, (2, heads, -1))
    bias = tokens.key_bias
    if causal and len(rows):  # a rule may have put tokens behind the one that is read
        number = torch.arange(len(values), device=rows.device)
        behind = number > rows[sample_of(tokens.cu_seqlens, len(number))]
        hidden = behind.to(torch.promote_types(values.dtype, torch.float32)) * -1e4
        bias = hidden if bias is None else bias + hidden
    lengths = (one.cu_seqlens, tokens.cu_seqlens, 1, tokens.max_seqlen)
    out, _ = attention(q, *kv.unbind(1), *lengths, key_bias=bias, with_lse=False, backend=backend)
    return out.flatten(1)


def cached_attention(
    qkv: Tensor, samples: int, heads: int, cache, layer: int, visible: Tensor | None = None
) -> Attention:
    """Causal attention of the newest tokens of each sample over themselves and all earlier ones, which ``cache`` holds.

    Args:
        qkv: ``[N * L, 3 * H * d]``, L new tokens for each of the N samples.
        samples, heads: N, H.
        cache: of `transformers`, one entry ``[N, H, tokens, d]`` per layer; the new keys and values are added to it.
        layer: number of the layer.
        visible: ``[N, tokens]`` bool, False for earlier or new tokens that are padding. A token that would see none
            sees itself.
    """
    q, k, v = qkv.view(samples, -1, 3, heads, qkv.shape[-1] // (3 * heads)).permute(2, 0, 3, 1, 4)  # [N, H, L, d] each
    k, v = cache.update(k, v, layer)
    new, seen = q.shape[2], k.shape[2]
    mask = None if new == 1 else torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    if visible is not None:
        itself = torch.arange(seen, device=q.device) == torch.arange(seen - new, seen, device=q.device)[:, None]
        mask = visible[:, None, None] & (True if mask is None else mask)  # [N, 1, L, tokens]
        mask = mask | itself & ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return Attention(out.transpose(1, 2).flatten(2).flatten(0, 1))


class Keys(NamedTuple):
    """Keys and values of one cross-attention, computed once for all queries that look at them."""

    kv: Tensor
    """``[S, 2, H, d]``."""
    cu_seqlens: Tensor
    max_seqlen: int
    key_bias: Tensor | None


class QueryGroups(NamedTuple):
    """Which query samples look at the same key sample: the beams of an image, the candidate answers to a question."""

    starts: Tensor
    """``[K+1]`` int64: key sample k serves the query samples ``starts[k]:starts[k+1]``."""
    longest: int
    """Upper bound of the size of a group (host integer)."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> QueryGroups:
        """From the number of query samples of each key sample."""
        starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        return cls(starts.to(device), max(lengths, default=0))


class CrossAttention(nn.Module):
    """Ragged queries over ragged keys of another modality; returns the heads concatenated, before any output
    projection."""

    def __init__(self, width: int, key_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = Linear(width, width)
        self.kv = Linear(key_width, 2 * width)

    def keys(self, tokens: Tokens) -> Keys:
        """Keys and values of ``tokens [S, key_width]``."""
        kv = split_heads(self.kv(tokens.values, tokens=tokens), 2, self.num_heads)
        return Keys(kv, tokens.cu_seqlens, tokens.max_seqlen, tokens.key_bias)

    def forward(
        self, x: Tokens, keys: Tokens | Keys, backend: str | None = None, query_groups: QueryGroups | None = None
    ) -> Tensor:
        """``x [T, D]`` attends to ``keys``: ``[T, D]``. Without ``query_groups``, sample b looks at key sample b."""
        if isinstance(keys, Tokens):
            keys, pending = beside(x.values, partial(self.keys, keys))
        else:
            pending = DONE
        q = split_heads(self.query(x.values, tokens=x), self.num_heads)
        pending.join()
        cu_seqlens, max_seqlen = x.cu_seqlens, x.max_seqlen
        if query_groups is not None:  # to the kernel, a group is one sample with the queries of all
            cu_seqlens, max_seqlen = cu_seqlens[query_groups.starts], max_seqlen * query_groups.longest
        out, _ = attention(
            q, *keys.kv.unbind(1), cu_seqlens, keys.cu_seqlens, max_seqlen, keys.max_seqlen,
            key_bias=keys.key_bias, with_lse=False, backend=backend,
        )  # fmt: skip
        return out.flatten(1)

    def through(
        self,
        out: Linear,
        x: Tokens,
        keys: Tokens | Keys,
        backend: str | None = None,
        query_groups: QueryGroups | None = None,
    ) -> Tensor:
        """out(:meth:`forward`), ``[T, N]``. On a CPU at inference one call of the extension does it, where nobody watches the layers."""
        alone = query_groups is None and isinstance(keys, Tokens) and type(self) is CrossAttention and not watched(self)
        if alone and not (x.values.is_cuda or recorded(x.values)) and all_plain(self.query, self.kv, out):
            query, kv, last = self.query.affine, self.kv.affine, out.affine
            serves = cpu_serves(x.values, *query, keys.values, *kv, *last, keys.key_bias)
            if serves and backends.resolve("attention", "attention", backend or "", x.values)[0] == "cpu":
                found = at_once(
                    native.load().cross_attention, x.values, *query, keys.values, *kv, *last, self.num_heads, x.cu_seqlens,
                    keys.cu_seqlens, x.max_seqlen, keys.max_seqlen, keys.key_bias,
                )  # fmt: skip
                if found is not None:
                    return found
        return out(self(x, keys, backend, query_groups), tokens=x)
