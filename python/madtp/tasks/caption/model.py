"""BLIP captioning with MADTP pruning: what is in an image?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch

from ...config import Config, TextConfig, VisionConfig
from ...model import Model, renamed
from ...pruning import LayerTrace, Pruning, Tokens
from ...text import TextDecoder
from ...vision import VisionTransformer


@dataclass(frozen=True)
class CaptionConfig(Config):
    """BLIP captioning: a decoder describes an image."""

    task: ClassVar[str] = "caption"
    text_module: ClassVar[str] = "text_decoder.bert."
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True)
class CaptionOutput:
    """Result of :class:`Caption`."""

    images: Tokens
    """Final image tokens ``[T, D]`` of the B images, at which the decoder looks."""
    vision: list[LayerTrace]
    """Per vision layer."""
    logits: RaggedBatch | None = None
    """``[T, V]`` for each token of the texts, what comes after it; None where no texts were given."""
    alignment_features: Tensor | None = None
    """``[B, M, sd_dim]`` of the images, if asked for."""


class Caption(Model):
    """Image encoder with pruning, text decoder without."""

    def __init__(self, config: CaptionConfig, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        self.visual_encoder = VisionTransformer(config.vision)
        self.text_decoder = TextDecoder(config.text)

    @renamed
    def forward(
        self,
        pixels: Tensor,
        input_ids: RaggedBatch | Sequence[Tensor] | None = None,
        pruning: Pruning | float | None = None,
        alignment_features: bool = False,
    ) -> CaptionOutput:
        """Encode B images and, where there are texts, predict each of their tokens from the earlier ones.

        Args:
            pixels: ``[B, 3, S, S]`` normalised images.
            input_ids: B captions of int64 ids with [DEC] at position 0, as a ragged batch ``[T]`` or a list.
            pruning: for this call instead of the model's own; a number is MADTP at that temperature.
            alignment_features: also return them (training).

        Raises:
            ValueError: sizes that do not fit the model or each other.
        """
        rule = self._pruning(pruning, len(pixels))
        if input_ids is not None:
            input_ids = self._ids(input_ids)
            if len(input_ids) != len(pixels):
                raise ValueError(f"input_ids: expected a text for each of {len(pixels)} images, got {len(input_ids)}")
        vision = self.visual_encoder(self._pixels(pixels), self.space_dict, rule, alignment_features)
        logits = None
        if input_ids is not None:
            keys = self.text_decoder.keys(vision.tokens)
            states = self.text_decoder(input_ids, keys, backend=self.backend)
            logits = input_ids.with_values(self.text_decoder.logits(states.values))
        return CaptionOutput(vision.tokens, vision.trace, logits, vision.alignment_features)

    def generate(
        self,
        images: Tokens,
        prompt_ids: Tensor,
        *,
        num_beams: int | None = None,
        max_length: int | None = None,
        min_length: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        **options,
    ) -> list[Tensor]:
        """Captions of encoded images, by beam search or, with ``top_p``, by nucleus sampling.

        Args:
            images: ``output.images`` of a forward.
            prompt_ids: ``[P]`` int64 that each caption begins with, [DEC] first.
            num_beams: of the beam search; 1 is greedy, and 3 is the default.
            max_length, min_length: in tokens, the prompt included; by default 20, unless ``max_new_tokens`` is given,
                and 5 or, where texts end before, as long as they may be.
            top_p: sample from the most likely tokens that together have this probability (0.9 in BLIP).
            repetition_penalty: by default 1 (none), and 1.1 when sampling, as in BLIP.
            options: see :func:`madtp.generation.generate`.

        Returns:
            One int64 tensor per image: what follows the prompt, without [SEP] and padding.

        Raises:
            ValueError: lengths beyond the model's positions, a prompt that is not ``[P]`` int64, a ``top_p`` beyond
                0..1 or beside ``num_beams``, or an option that is not served.
        """
        from ...generation import generate

        if prompt_ids.dim() != 1 or prompt_ids.dtype != torch.int64 or not len(prompt_ids):
            raise ValueError(f"prompt_ids: expected int64 [P], got {prompt_ids.dtype} {list(prompt_ids.shape)}")
        if top_p is not None:
            if not 0 < top_p <= 1:
                raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")
            if num_beams not in (None, 1):
                raise ValueError(f"num_beams: top_p samples, without beams, got {num_beams}")
            # 50 was the default of the transformers release that the official code runs on.
            options = {"do_sample": True, "top_p": top_p, "top_k": 50, **options}
            num_beams = 1
        if repetition_penalty is None:
            repetition_penalty = 1.0 if top_p is None else 1.1
        if max_length is None and options.get("max_new_tokens") is None:
            max_length = 20
        if min_length is None:
            min_length = min(5, len(prompt_ids) + options["max_new_tokens"] if max_length is None else max_length)
        prompts = prompt_ids.to(self.device).expand(images.batch_size, -1)
        return generate(
            self.text_decoder, images, prompts, backend=self.backend, num_beams=3 if num_beams is None else num_beams,
            max_length=max_length, min_length=min_length, repetition_penalty=repetition_penalty, **options,
        )  # fmt: skip
