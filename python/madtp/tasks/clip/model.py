"""CLIP with MADTP pruning in both towers: how well do images and texts go together?

Pruned text exists in two modes, which are different models (`CLIPConfig.text_mode`):

* "clean": a text is its own tokens, nothing is padded. Kept tokens stay in order, and the end-of-text token (EOT), from
  whose state the feature is read, is never dropped. Merged tokens stand behind it, where it cannot see them; they count
  for what later layers keep, and for the alignment features.
* "compat": what MADTP's official code computes on a GPU, and what its checkpoints were trained with. Texts are padded
  with zeros to the full context, and the padding is scored, kept and merged like words. The causal mask follows the
  order that the official top-k leaves (:func:`madtp.pruning.official.weakest_last`), and the feature is read at EOT's
  original position, whichever token is there by then. A layer is pruned only if more than that position + 2 tokens
  survive.

At temperature 0 both give the same features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, checks

from ...config import CLIPConfig
from ...model import Model, renamed
from ...pruning import LayerTrace, Pruning
from ...towers import Features, ImageTower, Patches, TextTower


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
    alignment_features: tuple[Tensor, Tensor] | None = None
    """``(vision [B, M, sd_dim], text [C, M, sd_dim])``, if asked for."""


class CLIP(Model):
    """Images and texts in one space, ragged from the embeddings to the features."""

    capturable = ("encode_image", "encode_text", "embed_image", "embed_text")

    def __init__(self, config: CLIPConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        if config.vision and config.text:
            self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        if config.logit_bias:
            self.logit_bias = nn.Parameter(torch.zeros(()))
        if config.vision:
            self.visual = ImageTower(config)
        if config.text:
            self.text = TextTower(config)

    @renamed
    def encode_image(
        self,
        pixels: Tensor | RaggedBatch | Sequence[Tensor] | Patches,
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
        pooled: bool = False,
    ) -> Features:
        """Features of images, normalised pixels ``[B, 3, S, S]``, or B images ``[3, H, W]`` where the tower takes
        pictures of several shapes; see :meth:`madtp.towers.ImageTower.cut` and :meth:`forward`.

        Raises:
            ValueError: a model without an image tower, or pixels that it does not take.
        """
        if self.config.vision is None:
            raise ValueError("encode_image: this model has a text tower only")
        pixels = self._patches(pixels)
        batch = pixels.vectors.batch_size if isinstance(pixels, Patches) else len(pixels)
        return self.visual(pixels, self.space_dict, self._pruning(pruning, batch), alignment_features, pooled=pooled)

    @renamed
    def encode_text(
        self,
        input_ids: RaggedBatch | Sequence[Tensor],
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
        pooled: bool = False,
    ) -> Features:
        """Features of texts of int64 ids, each from its start token to its end-of-text token. See :meth:`forward`."""
        if self.config.text is None:
            raise ValueError("encode_text: this model has an image tower only")
        input_ids = self._ids(input_ids)
        rule, compat = self._pruning(pruning, input_ids.batch_size), self.config.text_mode == "compat"
        return self.text(input_ids, self.space_dict, rule, alignment_features, compat, pooled=pooled)

    def embed_image(self, pixels: Tensor | RaggedBatch | Sequence[Tensor] | Patches) -> Features:
        """:meth:`encode_image` where only the features are wanted: the last block computes nothing that they are not
        read from, and ``tokens`` may hold one token of each image."""
        return self.encode_image(pixels, pooled=True)

    def embed_text(self, input_ids: RaggedBatch | Sequence[Tensor]) -> Features:
        """:meth:`encode_text` where only the features are wanted."""
        return self.encode_text(input_ids, pooled=True)

    def _check_ids(self, input_ids: RaggedBatch, name: str) -> None:
        super()._check_ids(input_ids, name)
        text = self.config.text
        if not text.padded:
            check_ends(input_ids, text.eos_token_id, name)
        elif checks.may_read(input_ids.values) and (input_ids.lengths != text.max_position_embeddings).any():
            raise ValueError(
                f"{name}: expected texts that are filled up to {text.max_position_embeddings} tokens, as in training, "
                f"got {input_ids.lengths.tolist()}"
            )

    def _patches(self, pixels: Tensor | RaggedBatch | Sequence[Tensor] | Patches) -> Tensor | RaggedBatch | Patches:
        if isinstance(pixels, Patches):
            return pixels._replace(vectors=self._pixels(pixels.vectors))
        if isinstance(pixels, (Tensor, RaggedBatch)):
            return self._pixels(pixels)
        return self.visual.cut([self._pixels(image) for image in pixels])

    @renamed
    def forward(
        self,
        pixels: Tensor,
        input_ids: RaggedBatch | Sequence[Tensor],
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
    ) -> CLIPOutput:
        """Compare every image with every text.

        Args:
            pixels: ``[B, 3, S, S]`` normalised images.
            input_ids: C texts of int64 ids without padding, as a ragged batch ``[T]`` or a list; each ends with its
                end-of-text token.
            pruning: for this call instead of the model's own; a number is MADTP at that temperature.
            alignment_features: also return them (training).

        Raises:
            ValueError: sizes or ids that do not fit the model.
        """
        images = self.encode_image(pixels, pruning, alignment_features)
        texts = self.encode_text(input_ids, pruning, alignment_features)
        image_embeds, text_embeds = F.normalize(images.features, dim=-1), F.normalize(texts.features, dim=-1)
        return CLIPOutput(
            logits_per_image=self.logit_scale.exp() * image_embeds @ text_embeds.mT + getattr(self, "logit_bias", 0.0),
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            image_features=images.features,
            text_features=texts.features,
            vision=images.trace,
            text=texts.trace,
            alignment_features=(images.alignment_features, texts.alignment_features) if alignment_features else None,
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
