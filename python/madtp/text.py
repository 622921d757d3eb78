"""BLIP-NLVR's text encoder on ragged tokens: BERT layers whose words attend to two ragged images, with MAG and DTP."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from .config import NLVRConfig, TextConfig
from .guidance import QueryModel, alignment_summary
from .layers import CrossAttention, self_attention
from .linear import Linear, mlp
from .pruning import LayerTrace, Pruning, Stream, prune_layer

EPS = 1e-12  # BERT's LayerNorm


class TextOutput(NamedTuple):
    """What a text encoder returns."""

    stream: Stream
    """Final hidden states ``[T, D]``; the first of each sample stands for the statement."""
    trace: list[LayerTrace]
    """One record per layer."""
    summary: Tensor | None
    """``[B, M, sd_dim]`` alignment summaries summed over the layers; None if not asked for."""


class Embeddings(nn.Module):
    """Word plus position embedding, then LayerNorm. BLIP has no token types."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=EPS)

    def forward(self, input_ids: RaggedBatch, positions: Tensor) -> RaggedBatch:
        """Ids ``[T]`` int64 with their positions ``[T]``, to ``[T, D]``."""
        limit = self.position_embeddings.num_embeddings
        if input_ids.max_seqlen > limit:
            raise ValueError(f"input_ids: a text of {input_ids.max_seqlen} tokens exceeds the model's {limit} positions")
        x = self.word_embeddings(input_ids.values) + self.position_embeddings(positions)
        return input_ids.with_values(self.LayerNorm(x))


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
        self.output.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.output.merge_layer = Linear(2 * width, width) if merges else None

    def forward(self, x: RaggedBatch, images: tuple[Stream, Stream], backend: str | None) -> Tensor:
        """``x [T, D]`` and the tokens of both images of each sample, to ``[T, D]``."""
        left = self.output.dense0(self.self0(x, images[0], backend))
        right = self.output.dense1(self.self1(x, images[1], backend))
        if self.output.merge_layer is None:
            both = (left + right) / 2 + x.values
        else:
            both = self.output.merge_layer(torch.cat([left, right], -1), residual=x.values)
        return self.output.LayerNorm(both)


class Layer(nn.Module):
    """Self-attention, pruning, cross-attention with the words that are left, feed-forward; LayerNorm after each sum."""

    def __init__(self, config: TextConfig, merges: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention = nn.Module()
        self.attention.self = nn.Module()
        self.attention.self.qkv = Linear(width, 3 * width)
        self.attention.output = nn.Module()
        self.attention.output.dense = Linear(width, width)
        self.attention.output.LayerNorm = nn.LayerNorm(width, eps=EPS)
        self.crossattention = TwinCrossAttention(config, merges)
        self.intermediate = nn.Module()
        self.intermediate.dense = Linear(width, config.intermediate_size)
        self.output = nn.Module()
        self.output.dense = Linear(config.intermediate_size, width)
        self.output.LayerNorm = nn.LayerNorm(width, eps=EPS)

    def forward(
        self,
        stream: Stream,
        images: tuple[Stream, Stream],
        guide: tuple[Tensor, Tensor | None] | None,
        pruning: Pruning,
        layer: int,
    ) -> tuple[Stream, LayerTrace]:
        entering = stream.tokens.values
        qkv = self.attention.self.qkv(entering).unflatten(-1, (3, self.num_heads, -1))
        attended = self_attention(qkv, stream, pruning)
        summed = self.attention.output.dense(attended.out, residual=entering)
        stream = stream.with_values(self.attention.output.LayerNorm(summed))
        if pruning.active:
            stream, _, trace = prune_layer(
                stream, entering, attended.received, attended.cls, guide, pruning, layer
            )
        else:
            trace = LayerTrace(stream.tokens.cu_seqlens, stream.tokens.cu_seqlens, stream.ids)
        x = self.crossattention(stream.tokens, images, pruning.backend)
        x = mlp(x, self.intermediate.dense, self.output.dense, residual=x)
        return stream.with_values(self.output.LayerNorm(x)), trace


class NLVRTextEncoder(nn.Module):
    """Text encoder of BLIP-NLVR. Parameter names are BLIP's (`text_encoder.*`), with fused query/key/value projections."""

    def __init__(self, config: NLVRConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config.text)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            Layer(config.text, merges=i >= config.merge_from) for i in range(config.text.num_hidden_layers)
        )
        map_func = config.text.hidden_size != config.vision.sd_dim
        self.encoder.txt_query_model = QueryModel(config.text.hidden_size, config.vision.sd_dim, map_func)

    def forward(
        self,
        input_ids: RaggedBatch,
        images: tuple[Stream, Stream],
        dictionary: Tensor | None,
        pruning: Pruning,
        summaries: bool = False,
    ) -> TextOutput:
        """Encode statements with their two images.

        Args:
            input_ids: ``[T]`` int64, [ENC] at position 0 of each statement.
            images: left and right image tokens; sample b belongs to statement b.
            dictionary, pruning, summaries: as in the vision transformer.

        Raises:
            ValueError: a text beyond the position embeddings, or active pruning without a dictionary.
        """
        if dictionary is None and (pruning.active or summaries):
            raise ValueError("dictionary: pruning needs one, got None")
        query_model = self.encoder.txt_query_model
        guide = query_model.fold(dictionary) if pruning.active else None
        stream = Stream.start(input_ids, pruning.use_sizes)
        embedded = self.embeddings(input_ids, stream.ids)
        stream = stream.with_values(embedded.values)
        trace, summary = [], None
        for number, layer in enumerate(self.encoder.layer):
            if summaries:
                seen = alignment_summary(stream.tokens, dictionary, query_model)
                summary = seen if summary is None else summary + seen
            stream, record = layer(stream, images, guide, pruning, number)
            trace.append(record)
        return TextOutput(stream, trace, summary)
