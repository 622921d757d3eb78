"""CLIP with MADTP pruning in both towers: how well do images and texts go together?

Pruned text exists in two modes, which are different models (`CLIPConfig.text_mode`):

* "clean": a text is its own tokens, nothing is padded. Kept tokens stay in order, and the end-of-text token (EOT), from
  whose state the feature is read, is never dropped. Merged tokens stand behind it, where it cannot see them; they count
  for what later layers keep, and for the alignment summaries.
* "compat": what MADTP's official code computes on a GPU, and what its checkpoints were trained with. Texts are padded with
  zeros to the full context, and the padding is scored, kept and merged like words. The causal mask follows the order that the
  official top-k leaves (:func:`madtp.pruning.weakest_last`), and the feature is read at EOT's original position, whichever
  token is there by then. A layer is pruned only if more than that position + 2 tokens survive.

At temperature 0 both give the same features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, checks
from madtp_kernels.segments import sample_of

from ..config import CLIPConfig
from ..guidance import QueryModel
from ..pruning import LayerTrace, Pruning, Stream
from ..vision import Block, embed_patches, run_blocks
from .base import Model, first_rows

EPS = 1e-5  # CLIP's LayerNorm


class Features(NamedTuple):
    """What a tower returns."""

    features: Tensor
    """``[B, E]``, not normalised."""
    stream: Stream
    """Final tokens ``[T, D]``, before the last LayerNorm."""
    trace: list[LayerTrace]
    """One record per block."""
    summary: Tensor | None
    """``[B, M, sd_dim]`` alignment summaries summed over the blocks; None if not asked for."""


@dataclass(frozen=True)
class CLIPOutput:
    """Result of :class:`CLIP` for B images and C texts."""

    logits_per_image: Tensor
    """``[B, C]``: cosine similarities times the model's scale. Its transpose is the logits per text."""
    image_embeds: Tensor
    """``[B, E]`` features of length 1."""
    text_embeds: Tensor
    """``[C, E]`` features of length 1."""
    image_features: Tensor
    """``[B, E]`` features as they are."""
    text_features: Tensor
    """``[C, E]`` features as they are."""
    vision: list[LayerTrace]
    """Per vision layer; samples are the B images."""
    text: list[LayerTrace]
    """Per text layer; samples are the C texts."""
    summaries: tuple[Tensor, Tensor] | None = None
    """``(vision [B, M, sd_dim], text [C, M, sd_dim])`` alignment summaries, if asked for."""


class CLIPVision(nn.Module):
    """CLIP's vision transformer: LayerNorm before the first block, a query map in every block, the feature from CLS."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        vision = config.vision
        self.config = vision
        width, hidden = vision.embed_dim, round(vision.embed_dim * vision.mlp_ratio)
        options = {"eps": EPS, "activation": config.hidden_act}
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, vision.num_patches + 1, width))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, vision.patch_size, vision.patch_size, bias=False)
        self.norm_pre = nn.LayerNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(Block(width, vision.num_heads, hidden, **options) for _ in range(vision.depth))
        self.query_models = nn.ModuleList(QueryModel(width, vision.sd_dim, vision.map_func) for _ in range(vision.depth))
        self.norm_post = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, pixels: Tensor, dictionary: Tensor, pruning: Pruning, summaries: bool = False) -> Features:
        """Encode ``pixels [B, 3, S, S]``; other arguments and errors as :func:`madtp.vision.run_blocks`."""
        tokens = embed_patches(pixels, self.patch_embed.proj, self.cls_token, self.pos_embed, self.config.image_size)
        stream = Stream.start(tokens.with_values(self.norm_pre(tokens.values)), pruning.use_sizes)
        stream, *record = run_blocks(self.blocks, self.query_models, stream, dictionary, pruning, summaries)
        return Features(self.proj(self.norm_post(first_rows(stream.tokens))), stream, *record)


class CLIPText(nn.Module):
    """CLIP's causal text transformer; the feature comes from the end-of-text token, which is the last of a text."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        text, sd_dim = config.text, config.vision.sd_dim
        width, layers = text.hidden_size, range(text.num_hidden_layers)
        options = {"eps": EPS, "activation": config.hidden_act, "causal": True}
        self.token_embeddings = nn.Embedding(text.vocab_size, width)
        self.position_embeddings = nn.Embedding(text.max_position_embeddings, width)
        self.blocks = nn.ModuleList(
            Block(width, text.num_attention_heads, text.intermediate_size, **options) for _ in layers
        )
        self.query_models = nn.ModuleList(QueryModel(width, sd_dim, config.vision.map_func) for _ in layers)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.proj = nn.Linear(width, config.embed_dim, bias=False)

    def forward(
        self, input_ids: RaggedBatch, dictionary: Tensor, pruning: Pruning, summaries: bool = False, compat: bool = False
    ) -> Features:
        """Encode texts ``[T]`` int64 of which each ends with EOT.

        Args:
            input_ids: without padding.
            dictionary, pruning, summaries: as :func:`madtp.vision.run_blocks`.
            compat: the official mode of pruned text (see the module).

        Raises:
            ValueError: a text beyond the context, or active pruning without a dictionary.
        """
        context = self.position_embeddings.num_embeddings
        if input_ids.max_seqlen > context:
            raise ValueError(f"input_ids: a text of {input_ids.max_seqlen} tokens exceeds the model's {context} positions")
        eot = input_ids.lengths - 1
        if compat and (pruning.active or summaries):  # a dense EOT sees nothing of the padding behind it
            input_ids = _pad(input_ids, context)
            min_keep = eot + 2
            if pruning.groups is not None:  # the official rule takes the maximum of the batch
                min_keep = min_keep.amax(0, keepdim=True).expand_as(eot).contiguous()
            pruning = dataclasses.replace(pruning, min_keep=min_keep, weakest_last=True)
        else:
            pruning = dataclasses.replace(pruning, min_keep=torch.ones_like(eot), protected_ids=eot)
        stream = Stream.start(input_ids, pruning.use_sizes)
        x = self.token_embeddings(input_ids.values) + self.position_embeddings(stream.ids.clamp(max=context - 1))
        stream, *record = run_blocks(
            self.blocks, self.query_models, stream.with_values(x), dictionary, pruning, summaries
        )
        rows = stream.tokens.cu_seqlens[:-1] + eot if pruning.weakest_last else rows_of(stream, eot)
        return Features(self.proj(self.norm(stream.tokens.values[rows.long()])), stream, *record)


class CLIP(Model):
    """Images and texts in one space, ragged from the embeddings to the features."""

    capturable = ("encode_image", "encode_text")

    def __init__(self, config: CLIPConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.visual = CLIPVision(config)
        self.text = CLIPText(config)

    def encode_image(self, pixels: Tensor, temperature: float | None = None, summaries: bool = False) -> Features:
        """Features of images ``[B, 3, S, S]``, normalised pixels. See :meth:`forward`."""
        pixels = self._pixels(pixels)
        pruning = self._pruning(self._temperature(temperature), len(pixels))
        min_keep = torch.ones(len(pixels), dtype=torch.int32, device=self.device)
        pruning = dataclasses.replace(pruning, min_keep=min_keep)
        return self.visual(pixels, self.space_dict, pruning, summaries)

    def encode_text(
        self, input_ids: RaggedBatch | Sequence[Tensor], temperature: float | None = None, summaries: bool = False
    ) -> Features:
        """Features of texts of int64 ids, each from its start token to its end-of-text token. See :meth:`forward`."""
        input_ids = self._ids(input_ids)
        pruning = self._pruning(self._temperature(temperature), input_ids.batch_size)
        return self.text(input_ids, self.space_dict, pruning, summaries, compat=self.config.text_mode == "compat")

    def _check_ids(self, input_ids: RaggedBatch, name: str) -> None:
        super()._check_ids(input_ids, name)
        check_ends(input_ids, self.config.text.eos_token_id, name)

    def forward(
        self,
        pixels: Tensor,
        input_ids: RaggedBatch | Sequence[Tensor],
        temperature: float | None = None,
        summaries: bool = False,
    ) -> CLIPOutput:
        """Compare every image with every text.

        Args:
            pixels: ``[B, 3, S, S]`` normalised images.
            input_ids: C texts of int64 ids without padding, as a ragged batch ``[T]`` or a list; each ends with its
                end-of-text token.
            temperature: for this call instead of the model's own.
            summaries: also return the alignment summaries (training).

        Raises:
            ValueError: sizes or ids that do not fit the model.
        """
        images = self.encode_image(pixels, temperature, summaries)
        texts = self.encode_text(input_ids, temperature, summaries)
        image_embeds, text_embeds = F.normalize(images.features, dim=-1), F.normalize(texts.features, dim=-1)
        return CLIPOutput(
            logits_per_image=self.logit_scale.exp() * image_embeds @ text_embeds.mT,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            image_features=images.features,
            text_features=texts.features,
            vision=images.trace,
            text=texts.trace,
            summaries=(images.summary, texts.summary) if summaries else None,
        )


def check_ends(input_ids: RaggedBatch, eos_token_id: int | None, name: str = "input_ids") -> None:
    """Every text ends with its first end-of-text token; checked where reading the ids is free.

    Raises:
        ValueError: a text without an end, or with something behind it.
    """
    if not checks.may_read(input_ids.values):
        return
    for number, text in enumerate(input_ids.to_list()):
        end = int(text.max()) if eos_token_id is None else eos_token_id
        if [*text.tolist(), end].index(end) != len(text) - 1:
            raise ValueError(
                f"{name}: expected texts without padding that end with their first end-of-text token, id {end}; "
                f"text {number} is {text.tolist()}"
            )


def _pad(input_ids: RaggedBatch, length: int) -> RaggedBatch:
    """Texts filled up with zeros to ``length`` tokens each."""
    padded, _ = input_ids.to_padded(0)
    padded = F.pad(padded, (0, length - padded.shape[1]))
    cu_seqlens = torch.arange(len(padded) + 1, dtype=torch.int32, device=padded.device) * length
    return RaggedBatch(padded.flatten(), cu_seqlens, length)


def rows_of(stream: Stream, ids: Tensor) -> Tensor:
    """``[B]`` int64: in which row each sample has the token with that id ``[B]``. Does not wait for a device."""
    rows = torch.arange(len(stream.ids), device=ids.device)
    sample = sample_of(stream.tokens.cu_seqlens, len(rows))
    found = (stream.ids == ids[sample]) & (rows < stream.tokens.cu_seqlens[-1])
    return rows.new_zeros(len(ids) + 1).scatter_(0, sample.where(found, len(ids)), rows)[:-1]
