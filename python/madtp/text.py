"""BERT layers on ragged tokens: encoders with MAG and DTP that may look at images, and a decoder that writes text.

One layer serves all: without cross-attention, with one other modality, or with the two images of BLIP-NLVR;
bidirectional or causal. Parameter names are BLIP's, with fused query/key/value projections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, pair_attention

from .config import TextConfig
from .guidance import QueryModel
from .layers import (
    Attention,
    CrossAttention,
    Embedding,
    Keys,
    LayerNorm,
    QueryGroups,
    attention_sublayer,
    cached_attention,
    self_attention,
    single_attention,
)
from .linear import Linear, all_plain, check_device, mlp, normed, reads_as, through, touched, watched
from .pruning import PER_TOKEN, LayerTrace, Pruning, Tokens
from .rows import first_of, ids_of
from .vision import Encoded, reading, run_blocks

EPS = 1e-12  # BERT's LayerNorm


class Embeddings(nn.Module):
    """Word plus position embedding, then LayerNorm. BLIP has no token types."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=EPS)

    def forward(self, input_ids: Tokens, positions: Tensor) -> Tokens:
        """Ids ``[T]`` int64 with their positions ``[T]``, to ``[T, D]``."""
        limit = self.position_embeddings.num_embeddings
        if input_ids.max_seqlen > limit:
            raise ValueError(
                f"input_ids: a text of {input_ids.max_seqlen} tokens exceeds the model's {limit} positions"
            )
        if input_ids.bound:  # rows beyond the last token have positions as if they belonged to the last text
            positions = positions.clamp(max=limit - 1)
        x = self.word_embeddings(ids_of(input_ids)) + self.position_embeddings(positions)
        return input_ids.with_values(self.LayerNorm(x, input_ids))


class Output(nn.Module):
    """LayerNorm of a residual sum: what BERT puts behind each sub-layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.dense = Linear(inputs, width)
        self.LayerNorm = LayerNorm(width, eps=EPS)

    def forward(self, x: Tensor, residual: Tokens) -> Tokens:
        """``x [T, inputs]`` and the tokens ``[T, D]`` that entered the sub-layer, to the tokens that leave it."""
        return residual.with_values(normed(x, self.dense, self.LayerNorm, residual.values, residual))


def reads_as_output(module: nn.Module) -> bool:
    """Whether its parts may be called in place of an :class:`Output`: nobody has changed it, nor would see it called."""
    return reads_as(module, Output) and not watched(module)


class SingleCrossAttention(nn.Module):
    """Words attend to one other modality."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.self = CrossAttention(width, config.encoder_width, config.num_attention_heads)
        self.output = Output(width, width)

    def forward(
        self, x: Tokens, others: Sequence[Tokens | Keys], backend: str | None, query_groups: QueryGroups | None
    ) -> Tokens:
        """``x [T, D]`` and what it looks at, to ``[T, D]``."""
        (other,) = others
        return self.output(self.self(x, other, backend, query_groups), x)


class TwinCrossAttention(nn.Module):
    """Words attend to each of two images; the results are averaged or, in later layers, merged by a linear layer."""

    def __init__(self, config: TextConfig, merges: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.self0 = CrossAttention(width, config.encoder_width, config.num_attention_heads)
        self.self1 = CrossAttention(width, config.encoder_width, config.num_attention_heads)
        self.output = nn.Module()
        self.output.dense0 = Linear(width, width)
        self.output.dense1 = Linear(width, width)
        self.output.LayerNorm = LayerNorm(width, eps=EPS)
        self.output.merge_layer = Linear(2 * width, width) if merges else None

    def forward(
        self, x: Tokens, others: Sequence[Tokens | Keys], backend: str | None, query_groups: QueryGroups | None
    ) -> Tokens:
        """``x [T, D]`` and the tokens of both images of each sample, to ``[T, D]``.

        ``others`` are the left and the right images; or one batch of all left and then all right ones, for which every
        kernel is launched once, not twice (only at inference, and without ``query_groups``).
        """
        output, merge, norm = self.output, self.output.merge_layer, self.output.LayerNorm
        if len(others) == 1:
            seen = self._seen_in_both(x, others[0], backend)
            left, right = seen.tensor_split(2, 1) if merge is None else (None, None)
        else:
            left = self.self0.through(output.dense0, x, others[0], backend, query_groups)
            right = self.self1.through(output.dense1, x, others[1], backend, query_groups)
            seen = None if merge is None else torch.cat([left, right], -1)
        if merge is None:
            return x.with_values(norm(torch.add(x.values, left + right, alpha=0.5), x))
        return x.with_values(normed(seen, merge, norm, x.values, x))

    def _seen_in_both(self, x: Tokens, images: Tokens, backend: str | None) -> Tensor:
        """``[C, 2D]`` what the words see in the left and in the right ``images``, which are one batch."""
        left, right, output = self.self0, self.self1, self.output
        return pair_attention(
            x, images,
            _pair_of(left.query, right.query), _pair_of(left.kv, right.kv), _pair_of(output.dense0, output.dense1),
            left.num_heads, key_bias=images.key_bias, backend=backend,
        )  # fmt: skip

    @property
    def is_plain(self) -> bool:
        """Whether the layers that both images have are called as they are, so that both can be served at once."""
        cross = (self.self0, self.self1)
        return all_plain(*(c.query for c in cross), *(c.kv for c in cross), self.output.dense0, self.output.dense1)


def _pair_of(first: Linear, second: Linear) -> tuple:
    """Weights and biases of two layers."""
    (weight, bias), (other_weight, other_bias) = first.affine, second.affine
    return (weight, other_weight), (bias, other_bias)


class Layer(nn.Module):
    """Self-attention, pruning, cross-attention with the words that are left, feed-forward; LayerNorm after each sum."""

    def __init__(self, config: TextConfig, crossattention: nn.Module, causal: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.causal = config.num_attention_heads, causal
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        self.attention.self.qkv = Linear(width, 3 * width)
        self.attention.output = Output(width, width)
        self.crossattention = crossattention
        self.intermediate = nn.Module()
        self.intermediate.dense = Linear(width, config.intermediate_size)
        self.output = Output(config.intermediate_size, width)

    def forward(
        self,
        x: Tokens,
        dictionary: tuple[Tensor, Tensor | None] | None,
        pruning: Pruning,
        layer: int,
        *,
        others: Sequence[Tokens | Keys] = (),
        query_groups: QueryGroups | None = None,
        cache=None,
        visible: Tensor | None = None,
    ) -> tuple[Tokens, LayerTrace]:
        """Tokens through the layer. With no ``others`` cross-attention is left out; ``cache`` makes a decoding step of
        it, for which ``visible`` is as in :func:`madtp.layers.cached_attention`."""
        if cache is None:
            y, attention = self._attend(x, pruning)
        else:
            qkv = self.attention.self.qkv(x.values, tokens=x)
            attention = cached_attention(qkv, x.batch_size, self.num_heads, cache, layer, visible)
            y = self.attention.output(attention.out, x)
        y, trace = pruning(y, block_input=x, attention=attention, dictionary=dictionary, layer=layer)
        if others:
            y = self.crossattention(y, others, pruning.backend, query_groups)
        return self._feed_forward(y), trace

    def _attend(self, x: Tokens, pruning: Pruning) -> tuple[Tokens, Attention]:
        qkv, output, heads, causal = self.attention.self.qkv, self.attention.output, self.num_heads, self.causal
        if reads_as_output(output):
            norm = output.LayerNorm
            return attention_sublayer(x, norm, qkv, output.dense, heads, pruning, norm_first=False, causal=causal)
        project = partial(output, residual=x)
        return self_attention(qkv(x.values, tokens=x), x, heads, pruning, project, causal=causal)

    def _feed_forward(self, y: Tokens) -> Tokens:
        first, out = self.intermediate.dense, self.output
        if not reads_as_output(out):
            return out(through(first, y.values, activation="gelu", tokens=y), y)
        return y.with_values(mlp(y.values, first, out.dense, y.values, tokens=y, norm=out.LayerNorm))

    def read(
        self,
        x: Tokens,
        dictionary: object,
        pruning: Pruning,
        layer: int,
        *,
        rows: Callable[[Tokens], Tensor],
        others: Sequence[Tokens | Keys] = (),
        query_groups: QueryGroups | None = None,
    ) -> tuple[Tokens, LayerTrace]:
        """As :meth:`madtp.vision.Block.read`: of the last layer, what becomes of one token of each sample."""
        read, qkv = rows(x), self.attention.self.qkv
        out = single_attention(x.values, qkv, x, read, self.num_heads, pruning.backend, self.causal)
        y = self.attention.output(out, x.single(read))
        if others:
            y = self.crossattention(y, others, pruning.backend, query_groups)
        return self._feed_forward(y), LayerTrace(x.cu_seqlens, x.cu_seqlens, x.ids)

    @property
    def is_plain(self) -> bool:
        """Whether :meth:`read` may stand for a call: no hooks watch the layer, or the projection of which it takes a part."""
        return type(self) is Layer and not touched(self) and reads_as(self.attention.self.qkv, Linear)


class TextEncoder(nn.Module):
    """Text encoder of BLIP (`text_encoder.*`).

    Args:
        config: sizes.
        sd_dim: width of a dictionary entry.
        merge_from: None for one other modality. Else there are two, and from this layer on they are merged by a linear
            layer.
    """

    def __init__(self, config: TextConfig, sd_dim: int, merge_from: int | None = None) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList()
        for number in range(config.num_hidden_layers):
            single = merge_from is None
            cross = SingleCrossAttention(config) if single else TwinCrossAttention(config, number >= merge_from)
            self.encoder.layer.append(Layer(config, cross))
        self.looks_at_two = merge_from is not None
        self.encoder.txt_query_model = QueryModel(config.hidden_size, sd_dim, config.hidden_size != sd_dim)

    def forward(
        self,
        input_ids: RaggedBatch,
        others: Sequence[Tokens],
        dictionary: Tensor | None,
        pruning: Pruning,
        alignment_features: bool = False,
        *,
        query_groups: QueryGroups | None = None,
        positions: Tensor | None = None,
        pooled: bool = False,
    ) -> Encoded:
        """Encode texts, alone or with what they look at.

        Args:
            input_ids: ``[T]`` int64.
            others: the tokens of each other modality (images), none for the text alone; sample b belongs to text b. Of two
                images there may be one batch of all left and then all right ones.
            dictionary, pruning, alignment_features: as in the vision transformer.
            query_groups: consecutive texts that share a sample of ``others``.
            positions: ``[T]`` int64; by default counted from the first token of each text.
            pooled: only the first token of each text is read; the last layer computes no other, and the result has no
                other.

        Raises:
            ValueError: a text beyond the position embeddings, more to look at than the encoder has layers for, or no
                dictionary where one is needed.
        """
        most = 2 if self.looks_at_two else 1
        if len(others) > most:
            raise ValueError(f"others: expected the tokens of at most {most}, got {len(others)}")
        if self.looks_at_two and len(others) == 1 and (query_groups or not self._serves_both_at_once(others[0])):
            others = split(others[0])
        tokens = input_ids if isinstance(input_ids, Tokens) else Tokens.start(input_ids)
        tokens = self.embeddings(tokens, tokens.ids if positions is None else positions)
        layers = reading(self.encoder.layer, first_of) if pooled else self.encoder.layer
        layers = [partial(layer, others=others, query_groups=query_groups) for layer in layers]
        query_models = [self.encoder.txt_query_model] * len(layers)
        return Encoded(
            *run_blocks(layers, query_models, tokens, dictionary, pruning.on("text", len(layers)), alignment_features)
        )

    def _serves_both_at_once(self, images: Tokens) -> bool:
        """Where launches count and no gradient is wanted."""
        return (
            images.values.is_cuda
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cuda")
            and all(layer.crossattention.is_plain for layer in self.encoder.layer)
        )


def split(images: Tokens) -> tuple[Tokens, Tokens]:
    """The left images (the first half of the samples) and the right images, without waiting for a device."""
    batch = images.batch_size // 2
    offset, rows = images.cu_seqlens[batch], images.values.shape[0]
    parts = {name: part for name in PER_TOKEN if (part := getattr(images, name)) is not None}
    if images.device.type == "cpu" or not images.bound:
        # On a GPU only images that were never pruned have an exact buffer, and those are all of one length.
        cut = int(offset) if images.device.type == "cpu" else rows // 2
        left, right = ({name: part[side] for name, part in parts.items()} for side in (slice(cut), slice(cut, None)))
    else:
        # The cut is known to the device only: move the right rows to the front of a buffer of the same capacity.
        source = (torch.arange(rows, device=images.device) + offset).clamp(max=rows - 1)
        left, right = parts, {name: part[source] for name, part in parts.items()}
    shared = {
        "max_seqlen": images.max_seqlen,
        "bound": images.bound and images.device.type != "cpu",
        "prefix": images.prefix,
    }
    return (
        Tokens.unchecked(cu_seqlens=images.cu_seqlens[: batch + 1], **left, **shared),
        Tokens.unchecked(cu_seqlens=images.cu_seqlens[batch:] - offset, **right, **shared),
    )


class LMHead(nn.Module):
    """Hidden states to logits over the vocabulary; the word embeddings are the output layer too."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.transform = nn.Module()
        self.transform.dense = Linear(width, width)
        self.transform.LayerNorm = LayerNorm(width, eps=EPS)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor, word_embeddings: Tensor) -> Tensor:
        """``x [T, D]`` to ``[T, V]``."""
        x = self.transform.LayerNorm(through(self.transform.dense, x, activation="gelu"))
        check_device(x, word_embeddings)
        return F.linear(x, word_embeddings, self.bias)


class TextDecoder(nn.Module):
    """Text decoder of BLIP (`text_decoder.*`): causal, never pruned, looks at the ragged states of an encoder."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.bert = nn.Module()
        self.bert.embeddings = Embeddings(config)
        self.bert.encoder = nn.Module()
        self.bert.encoder.layer = nn.ModuleList(
            Layer(config, SingleCrossAttention(config), causal=True) for _ in range(config.num_hidden_layers)
        )
        self.cls = nn.Module()
        self.cls.predictions = LMHead(config)

    def keys(self, memory: Tokens) -> list[Keys]:
        """What every layer looks at, from encoder states ``[S, encoder_width]``: computed once for all steps and
        beams."""
        return [layer.crossattention.self.keys(memory) for layer in self.bert.encoder.layer]

    def forward(
        self,
        input_ids: RaggedBatch,
        keys: Sequence[Keys],
        *,
        query_groups: QueryGroups | None = None,
        cache=None,
        positions: Tensor | None = None,
        visible: Tensor | None = None,
        backend: str | None = None,
    ) -> RaggedBatch:
        """Hidden states ``[T, D]`` of texts; :meth:`logits` makes predictions of them.

        Args:
            input_ids: ``[T]`` int64. With a ``cache`` only the newest tokens, equally many of each text.
            keys: from :meth:`keys`.
            query_groups: consecutive texts that share a sample of ``keys``.
            cache: of `transformers`: keys and values of the earlier tokens, to which this call adds.
            positions: ``[T]`` int64; by default counted from the first token of each text, which may be in the cache.
            visible: with a ``cache``, which tokens are no padding; see :func:`madtp.layers.cached_attention`.
            backend: force an implementation of the kernels.

        Raises:
            ValueError: a text beyond the position embeddings.
        """
        tokens, dense = Tokens.start(input_ids), Pruning(backend=backend)
        if positions is None:
            positions = tokens.ids if cache is None else tokens.ids + cache.get_seq_length()
        tokens = self.bert.embeddings(tokens, positions)
        for number, (layer, key) in enumerate(zip(self.bert.encoder.layer, keys, strict=True)):
            tokens, _ = layer(
                tokens, None, dense, number, others=(key,), query_groups=query_groups, cache=cache, visible=visible
            )
        return tokens

    def logits(self, states: Tensor) -> Tensor:
        """``[T, D]`` to ``[T, V]``: what comes after each token."""
        return self.cls.predictions(states, self.bert.embeddings.word_embeddings.weight)
