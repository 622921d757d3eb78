"""BLIP retrieval with MADTP pruning: features of images and texts that can be compared, and a classifier of pairs.

Features of a collection are computed once and compared by their product; the best matches are then scored as pairs,
for which the texts look at the images' tokens, without encoding the images again.

Pruned text exists in two modes, which are different models (`RetrievalConfig.text_mode`):

* "clean": a text is its own tokens, nothing is padded.
* "compat": what MADTP's official code computes, and what its checkpoints were trained with. Texts are padded to 35
  tokens. The padding is never attended to, but is scored, counted, and merged like words.

At temperature 0 both give the same result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from ...config import TEXT_MODES, Config, TextConfig, VisionConfig, check_choices, check_sizes
from ...layers import QueryGroups
from ...linear import Linear
from ...model import Model, renamed
from ...pruning import LayerTrace, Pruning, Tokens
from ...pruning.official import official, padded
from ...rows import first_rows, gather_samples
from ...text import TextEncoder
from ...towers import Features
from ...vision import VisionTransformer

PADDED_LENGTH = 35
"""Tokens that the official code pads texts to."""


@dataclass(frozen=True)
class RetrievalConfig(Config):
    """BLIP retrieval: comparable features of images and texts, and a classifier of pairs."""

    task: ClassVar[str] = "retrieval"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    proj_dim: int = 256
    """Width of the features."""
    text_mode: str = "clean"
    """"clean" or "compat", which are different models once texts are pruned; see the top of this file."""

    def __post_init__(self) -> None:
        check_sizes(self, "")
        check_choices(self, "", text_mode=TEXT_MODES)


class Matches(NamedTuple):
    """Pairs of images and texts, classified."""

    logits: Tensor
    """``[N, 2]``; class 1 means that the text belongs to the image."""
    text: list[LayerTrace]
    """Per text layer; the samples are the pairs, ordered by image (as ``order`` says)."""
    order: Tensor
    """``[N]`` int64: the pair that each sample of ``text`` is."""


@dataclass(frozen=True)
class RetrievalOutput:
    """Result of :class:`Retrieval` for B images and C texts."""

    similarity: Tensor
    """``[B, C]`` cosine similarities."""
    image_embeds: Tensor
    """``[B, P]`` features of length 1."""
    text_embeds: Tensor
    """``[C, P]`` features of length 1."""
    images: Tokens
    """Final image tokens ``[T, D]``."""
    vision: list[LayerTrace]
    """Per vision layer; samples are the B images."""
    text: list[LayerTrace]
    """Per text layer; samples are the C texts."""
    alignment_features: tuple[Tensor, Tensor] | None = None
    """``(vision [B, M, sd_dim], text [C, M, sd_dim])``, if asked for."""


class Retrieval(Model):
    """Image and text encoder, both pruned; the text encoder also reads texts with an image in view."""

    capturable = ("encode_image", "encode_text", "embed_image", "embed_text")

    def __init__(self, config: RetrievalConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.visual_encoder = VisionTransformer(config.vision)
        self.text_encoder = TextEncoder(config.text, config.vision.sd_dim)
        self.vision_proj = Linear(config.vision.embed_dim, config.proj_dim)
        self.text_proj = Linear(config.text.hidden_size, config.proj_dim)
        self.itm_head = Linear(config.text.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(0.07))  # temperature of the contrastive loss; only training uses it

    @renamed
    def forward(
        self,
        pixels: Tensor,
        input_ids: RaggedBatch | Sequence[Tensor],
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
    ) -> RetrievalOutput:
        """Compare B images with C texts; arguments and errors as :meth:`encode_image` and :meth:`encode_text`."""
        image = self.encode_image(pixels, pruning, alignment_features)
        text = self.encode_text(input_ids, pruning, alignment_features)
        return RetrievalOutput(
            similarity=image.features @ text.features.mT,
            image_embeds=image.features,
            text_embeds=text.features,
            images=image.tokens,
            vision=image.trace,
            text=text.trace,
            alignment_features=(image.alignment_features, text.alignment_features) if alignment_features else None,
        )

    @renamed
    def encode_image(
        self,
        pixels: Tensor,
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
        pooled: bool = False,
    ) -> Features:
        """Features of length 1, and tokens, of images.

        Args:
            pixels: ``[B, 3, S, S]`` normalised images.
            pruning: for this call instead of the model's own; a number is MADTP at that temperature.
            alignment_features: also return them (training).
            pooled: only the features are read: the last layer computes no other token, and ``tokens`` holds no other.

        Raises:
            ValueError: pixels of another size, or a temperature that makes no sense.
        """
        rule = self._pruning(pruning, len(pixels))
        tokens, *record = self.visual_encoder(self._pixels(pixels), self.space_dict, rule, alignment_features, pooled)
        return Features(F.normalize(self.vision_proj(first_rows(tokens)), dim=-1), tokens, *record)

    @renamed
    def encode_text(
        self,
        input_ids: RaggedBatch | Sequence[Tensor],
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
        pooled: bool = False,
    ) -> Features:
        """Features of length 1 of texts on their own.

        Args:
            input_ids: C texts of int64 ids with [CLS] at position 0, as a ragged batch ``[T]`` or a list.
            pruning, alignment_features, pooled: as of :meth:`encode_image`.

        Raises:
            ValueError: ids that do not fit the model, or a temperature that makes no sense.
        """
        input_ids = self._ids(input_ids)
        texts, rule = self._padded(input_ids, pruning)
        tokens, *record = self.text_encoder(texts, (), self.space_dict, rule, alignment_features, pooled=pooled)
        return Features(F.normalize(self.text_proj(first_rows(tokens)), dim=-1), tokens, *record)

    def embed_image(self, pixels: Tensor) -> Features:
        """:meth:`encode_image` where only the features are wanted, for which :meth:`match` has no tokens to look at."""
        return self.encode_image(pixels, pooled=True)

    def embed_text(self, input_ids: RaggedBatch | Sequence[Tensor]) -> Features:
        """:meth:`encode_text` where only the features are wanted."""
        return self.encode_text(input_ids, pooled=True)

    @renamed
    def match(
        self,
        images: Tokens,
        input_ids: RaggedBatch | Sequence[Tensor],
        pairs: Sequence[tuple[int, int]],
        pruning: Pruning | float | None = None,
        pooled: bool = False,
    ) -> Matches:
        """Does a text belong to an image? Keys and values of an image are computed once for all of its pairs.

        Args:
            images: ``tokens`` of :meth:`encode_image`.
            input_ids: texts as in :meth:`encode_text`.
            pairs: N pairs (image, text) of numbers, in any order.
            pruning: for this call instead of the model's own; a number is MADTP at that temperature.
            pooled: the last layer computes only the token that the classifier reads; its record says that none was
                dropped.

        Raises:
            ValueError: no pairs, numbers beyond the images or texts, ids that do not fit the model.
        """
        input_ids = self._ids(input_ids)
        batch = images.batch_size
        for image, text in pairs:
            if not (0 <= image < batch and 0 <= text < input_ids.batch_size):
                raise ValueError(f"pairs: ({image}, {text}) is beyond {batch} images and {input_ids.batch_size} texts")
        if not len(pairs):
            raise ValueError("pairs: expected at least one, got none")
        order = sorted(range(len(pairs)), key=lambda number: pairs[number][0])
        counts = [0] * batch
        for image, _ in pairs:
            counts[image] += 1
        order = torch.tensor(order, device=self.device)
        texts = gather_samples(input_ids, torch.tensor([text for _, text in pairs], device=self.device)[order])
        values = texts.values.clone()
        values[texts.cu_seqlens[:-1].long()] = self.config.text.enc_token_id
        texts, rule = self._padded(texts.with_values(values), pruning)
        groups = QueryGroups.of(counts, self.device)
        tokens, trace, _ = self.text_encoder(
            texts, (images,), self.space_dict, rule, query_groups=groups, pooled=pooled
        )
        logits = self.itm_head(first_rows(tokens))
        return Matches(torch.empty_like(logits).index_copy(0, order, logits), trace, order)

    def _padded(self, texts: RaggedBatch, pruning: Pruning | float | None) -> tuple[RaggedBatch, Pruning]:
        """Texts as the mode wants them, and the rule that prunes them."""
        if self.config.text_mode == "clean":
            return texts, self._pruning(pruning, texts.batch_size)
        if texts.max_seqlen > PADDED_LENGTH:
            raise ValueError(
                f"input_ids: a text of {texts.max_seqlen} tokens exceeds the {PADDED_LENGTH} of text_mode 'compat'"
            )
        rule = official(self._pruning(pruning, texts.batch_size), "text_mode 'compat'")
        return padded(texts, PADDED_LENGTH, self.config.text.pad_token_id, self.dtype), rule

    @property
    def longest_text(self) -> int:
        return PADDED_LENGTH if self.config.text_mode == "compat" else super().longest_text
