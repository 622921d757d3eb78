"""Captioning: what is in an image?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch

from ... import flops, graphs
from ...options import UsageError, given, option, positive
from ...processing import Processor, clean_sentence
from ..annotations import CaptionExample
from ..base import Answer, ImageInputs, Options, Recipe, Task, check_finite
from ..caption_metrics import caption_scores
from ..losses import caption_loss, token_loss
from .model import Caption, CaptionConfig

HOW = "how captions are written"
"""Group of options in the help."""


@dataclass(frozen=True)
class CaptionAnswer(Answer):
    """What is in the image?"""

    caption: str
    image_tokens: list[int]
    """Tokens before the first layer and after each."""

    columns = ("caption", "image_tokens")


@dataclass(kw_only=True)
class BeamOptions(Options):
    """Of the beam search that an evaluation uses."""

    num_beams: int | None = option(
        "of the beam search; 1 is greedy (default: 3)", type=positive, metavar="N", group=HOW, exclusive="kind"
    )
    max_length: int = option("in tokens, prompt included", 20, type=positive, metavar="N", group=HOW)
    min_length: int | None = option(
        "in tokens, prompt included (default: 5, or --max-length)", type=positive, metavar="N", group=HOW
    )

    def arguments(self):
        min_length = min(5, self.max_length) if self.min_length is None else self.min_length
        if min_length > self.max_length:
            raise UsageError(f"--min-length: expected at most --max-length {self.max_length}, got {min_length}")
        return {"max_length": self.max_length, "min_length": min_length, "num_beams": self.num_beams or 3}


@dataclass(kw_only=True)
class CaptionOptions(BeamOptions):
    """Of the beam search or, with ``sample``, of nucleus sampling."""

    sample: bool = option("sample from the most likely words (nucleus) instead", False, group=HOW, exclusive="kind")
    top_p: float | None = option(
        "with --sample: probability of those words (default: 0.9)", type=float, metavar="P", group=HOW
    )
    seed: int | None = option(
        "with --sample: of the random numbers; each row has its own (default: 0)", type=int, metavar="N", group=HOW
    )

    def arguments(self):
        found = super().arguments()
        if not self.sample:
            if useless := given(self, ("top_p", "seed")):
                raise UsageError(f"{useless}: of no use without --sample")
            return found
        top_p = 0.9 if self.top_p is None else self.top_p
        if not 0 < top_p <= 1:
            raise UsageError(f"--top-p: expected a number above 0, at most 1, got {top_p}")
        del found["num_beams"]
        return {**found, "top_p": top_p, "seed": self.seed or 0}


class CaptionProcessor(Processor):
    """An image for BLIP captioning, and the prompt that its captions begin with."""

    prompt = "a picture of "

    @property
    def prompt_ids(self) -> Tensor:
        """Token ids int64 [P] of the prompt: [DEC] and the words, without [SEP]."""
        return self._ids(self.prompt, str, "[DEC]")[:-1]

    def text(self, caption: str) -> Tensor:
        """Token ids int64 [L] of a caption to learn from, at most 30 words: the prompt, word pieces, [SEP]; at most 40,
        as in BLIP. Raises TextError if the caption is not a string or is empty."""
        return self._ids(
            caption, lambda text: self.prompt + clean_sentence(text, 30), "[DEC]", truncate=min(40, self.max_tokens)
        )

    def __call__(self, image) -> Tensor:
        """Pixels [3, S, S] float32 of one instance. Raises ImageError."""
        return self.image(image)

    @staticmethod
    def collate(instances) -> Tensor:
        """Join instances into a batch: pixels [B, 3, S, S]."""
        return torch.stack(list(instances))


class CaptionTask(Task):
    """Trained on the label-smoothed loss of the words after the prompt; scored by its negative on first captions."""

    name = "caption"
    Config, Processor, Model = CaptionConfig, CaptionProcessor, Caption

    Answer = CaptionAnswer
    Inputs, Options, EvaluationOptions = ImageInputs, CaptionOptions, BeamOptions
    help = "describe images"
    description = "Describes images in a sentence each, by beam search or by sampling."
    usage = """\
examples:
  madtp caption --model DIR photo.jpg --save-overlay patches.png
  madtp caption --model model_base_caption_0.5.pth photos/ --output captions.jsonl --batch-size 16
  madtp caption --model DIR 'photos/**/*.jpg' --sample --seed 1 --min-length 10 --max-length 40
  madtp caption --model DIR --input rows.jsonl --output captions.jsonl --dtype bfloat16

a row of rows.jsonl:
  {"image": "a.jpg"}

a row of captions.jsonl; row is its number in the input, image_tokens are counts before and after each layer:
  {"row": 1, "image": "photos/a.jpg", "caption": "a dog on a beach", "image_tokens": [577, ...], ...}
"""

    unit, headline = "image", "CIDEr"
    streams_of_records: ClassVar = {"image": ("image", ("image_tokens",))}

    recipe = Recipe(5, 32, 1e-5, 0.05)
    score_name = "minus loss"
    aligned = False

    def answer(self, model, instances, prompt_ids: torch.Tensor | None = None, **options):
        """Captions of images.

        Args:
            prompt_ids: ``[P]`` int64 that the captions begin with (by default "a picture of "); no part of the answer.
            options: of :meth:`madtp.tasks.caption.model.Caption.generate`.

        Raises:
            FloatingPointError: the model's dtype cannot hold its activations.
        """
        prompt = self.processor.prompt_ids if prompt_ids is None else prompt_ids
        with torch.inference_mode():
            output = graphs.run(model, self.processor.collate(instances))
            check_finite(model, output.images)
            captions = model.generate(output.images, prompt, **options)
        beams = options.get("num_beams") or (1 if options.get("top_p") else 3)
        streams, lengths = self.streams(output), [len(prompt) + len(ids) for ids in captions]
        costs = self.costs(streams, model.pruning, lengths, beams)
        columns = zip(costs, map(self.processor.decode, captions), *streams, strict=True)
        return [CaptionAnswer(*values) for values in columns], output

    # ---- evaluation

    def rows(self, examples):
        return [{"sample": number, **row} for number, row in enumerate(images_with_captions(examples))]

    def quality(self, steps, options):
        captions, references = ({r["sample"]: r[key] for r in steps["image"]} for key in ("caption", "captions"))
        try:
            scores = caption_scores(captions, references)
        except ImportError as error:
            return {"quality": {}, "not_run": {"all metrics": str(error)}}
        return {"quality": scores.scores, "not_run": scores.skipped, "tokenizer": scores.tokenizer}

    # ---- training

    def split(self, path, image_root, training):
        return single_captions(super().split(path, image_root, training), all_of_them=training)

    def instance(self, example, random=None):
        (caption,) = example.captions
        return {"pixels": self.image(example.image, random), "text": self.processor.text(caption)}

    def loss(self, model, batch, output, pruning, seed):
        texts = RaggedBatch.from_list(batch["texts"]).to(model.device)
        return {"caption": caption_loss(output.logits, texts, len(self.processor.prompt_ids))}

    def states(self, output):
        return [(output.images, output.vision)]

    def streams(self, output, batch=None):
        return (flops.stream_lengths(output.vision),)

    def costs(self, streams, pruning, written=(), beams=1):
        return [
            flops.caption(self.config, image, length, beams=beams, pruning=pruning)
            for image, length in zip(*streams, written, strict=True)
        ]

    def written(self, batch):
        return list(map(len, batch["texts"]))

    def records(self, model, batch, output):
        texts = RaggedBatch.from_list(batch["texts"]).to(model.device)
        losses, counts = token_loss(output.logits, texts, len(self.processor.prompt_ids))
        parts = zip(texts.with_values(losses).to_list(), texts.with_values(counts).to_list(), strict=True)
        return [(float(loss.sum()), int(count.sum())) for loss, count in parts]

    def score(self, records):
        return -sum(loss for loss, _ in records) / sum(count for _, count in records)


def images_with_captions(examples: Sequence[CaptionExample]) -> list[dict]:
    """One row per image, also where there is an example per caption."""
    rows: dict = {}
    for example in examples:
        row = {"image": str(example.image), "image_id": example.image_id, "captions": []}
        rows.setdefault(example.image_id, row)["captions"] += example.captions
    return list(rows.values())


def single_captions(examples: Sequence[CaptionExample], *, all_of_them: bool) -> list[CaptionExample]:
    """An example per caption, or one with the first caption of each image."""
    return [
        CaptionExample(example.image, example.image_id, (caption,))
        for example in examples
        for caption in (example.captions if all_of_them else example.captions[:1])
    ]
