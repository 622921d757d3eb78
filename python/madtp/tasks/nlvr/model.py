"""BLIP-NLVR with MADTP pruning: is a statement about two images true?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from ...config import Config, TextConfig, VisionConfig, check_sizes
from ...layers import QueryGroups
from ...linear import Linear
from ...model import Model, renamed
from ...pruning import LayerTrace, Pruning, Tokens
from ...rows import first_rows
from ...text import TextEncoder
from ...vision import Encoded, VisionTransformer


@dataclass(frozen=True)
class NLVRConfig(Config):
    """BLIP-NLVR: two images and a statement, true or false."""

    task: ClassVar[str] = "nlvr"
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    merge_from: int = 6
    """First text layer that concatenates its two image streams through a merge layer; earlier ones average them."""

    def __post_init__(self) -> None:
        check_sizes(self, "")


@dataclass(frozen=True)
class NLVROutput:
    """Result of :class:`NLVR`."""

    logits: Tensor
    """``[B, 2]``; class 1 means that the statement is true."""
    vision: list[LayerTrace]
    """Per vision layer; samples are the left images, then the right images."""
    text: list[LayerTrace]
    """Per text layer; samples are the B statements."""
    image_embeds: Tokens
    """Final image tokens ``[T, D]`` of the images."""
    last_hidden_state: Tokens
    """Final text states ``[T, D]``; the first of each sample is what the head sees."""
    alignment_features: tuple[Tensor, Tensor] | None = None
    """``(vision [2P, M, sd_dim], text [B, M, sd_dim])`` of P pairs and B statements, if asked for."""


class NLVR(Model):
    """Two images and a statement per sample, ragged from the embeddings to the head.

    Beside the groupings of every model there is "pair", which ties the two images of a pair as the official code does
    at batch size 1.
    """

    groupings = ("instance", "pair", "batch")

    def __init__(self, config: NLVRConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        width = config.text.hidden_size
        self.visual_encoder = VisionTransformer(config.vision)
        self.text_encoder = TextEncoder(config.text, config.vision.sd_dim, config.merge_from)
        self.cls_head = nn.Sequential(Linear(width, width), nn.ReLU(), Linear(width, 2))

    @renamed
    def forward(
        self,
        pixels: Tensor,
        input_ids: RaggedBatch | Sequence[Tensor],
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
        statements: Sequence[int] | None = None,
    ) -> NLVROutput:
        """Answer B statements about P pairs of images. Images are pruned without regard to the statement.

        Args:
            pixels: ``[2P, 3, S, S]`` normalised images in the model's dtype: the P left ones, then the P right ones.
            input_ids: B texts of int64 ids with [ENC] at position 0, as a ragged batch ``[T]`` or a list; pair by pair.
            pruning: for this call instead of the model's own; a number is MADTP at that temperature.
            alignment_features: also return them (training).
            statements: how many there are about each pair, whose images are encoded once for all of them; by default one.

        Returns:
            The output for all statements; ``vision``, ``image_embeds`` and the vision features ``[2P, M, sd_dim]`` are
            those of the images.

        Raises:
            ValueError: sizes that do not fit the model or each other.
        """
        input_ids = self._ids(input_ids)
        statements = [1] * input_ids.batch_size if statements is None else statements
        pairs = len(statements)
        if sum(statements) != input_ids.batch_size:
            raise ValueError(
                f"statements: expected {input_ids.batch_size} in all, one per text, got {list(statements)}"
            )
        if len(pixels) != 2 * pairs:
            raise ValueError(f"pixels: expected two images for each of {pairs} texts, got {len(pixels)} images")
        paired = {}
        if self.grouping == "pair":
            paired["groups"] = torch.arange(2 * pairs, dtype=torch.int32, device=self.device) % pairs
        rule = self._pruning(pruning, 2 * pairs, **paired)
        images = self.visual_encoder(self._pixels(pixels), self.space_dict, rule, alignment_features)
        return self.read(images, input_ids, statements, pruning, alignment_features)

    def read(
        self,
        images: Encoded,
        input_ids: RaggedBatch,
        statements: Sequence[int],
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
    ) -> NLVROutput:
        """The second half of :meth:`forward`, from the encoded images and texts on the model's device."""
        groups = None if all(count == 1 for count in statements) else QueryGroups.of(statements, self.device)
        rule = self._pruning(pruning, input_ids.batch_size)
        text = self.text_encoder(
            input_ids, (images.tokens,), self.space_dict, rule, alignment_features, query_groups=groups
        )
        return NLVROutput(
            logits=self.cls_head(first_rows(text.tokens)),
            vision=images.trace,
            text=text.trace,
            image_embeds=images.tokens,
            last_hidden_state=text.tokens,
            alignment_features=(images.alignment_features, text.alignment_features) if alignment_features else None,
        )
