"""Images and texts in one space: what retrieval and CLIP have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp_kernels import RaggedBatch

from .. import flops, graphs
from ..index import from_text, to_text
from ..model import Model
from ..pruning import LayerTrace, Pruning
from .annotations import CaptionExample
from .base import Answer, Task, not_finite
from .caption import images_with_captions, single_captions
from .metrics import recall


@dataclass(frozen=True)
class Embedding(Answer):
    """An image or a text as a point that others can be compared with."""

    features: Tensor
    """``[P]`` float32 on the CPU, of length 1."""
    tokens: list[int]
    """Tokens before the first layer and after each."""


class PairsTask(Task):
    """Scored by the mean recall of the similarities of images and captions."""

    unit, headline = "image and text", "r_mean"
    streams_of_records: ClassVar = {"image": ("image", ("image_tokens",)), "text": ("text", ("text_tokens",))}
    score_name = "mean recall"
    smallest_batch = 2
    matches: ClassVar[bool] = False
    """Whether the model has a classifier of pairs."""

    def text(self, caption: str) -> Tensor:
        """Ids of a caption, cleaned and cut to 30 words as in BLIP's data code, which MADTP uses for CLIP too."""
        return self.processor.text(caption)

    def embed_images(self, model: Model, pixels: Sequence[Tensor]) -> tuple[list[Embedding], Any]:
        """Embeddings of images that `model.processor.image` prepared, and the encoder's output."""
        one_shape = len({image.shape for image in pixels}) == 1
        pooled = not self.matches and not model.guided
        encode = model.embed_image if pooled else model.encode_image
        with torch.inference_mode():
            output = graphs.run(encode, torch.stack(list(pixels))) if one_shape else encode(pixels)
        return self._embeddings(model, output, "image", pooled), output

    def embed_texts(self, model: Model, ids: Sequence[Tensor]) -> tuple[list[Embedding], Any]:
        """Embeddings of texts that `model.processor.text` prepared, and the encoder's output."""
        pooled = not model.guided  # the last layer's pruning is part of MADTP's official cost
        with torch.inference_mode():
            output = graphs.run(model.embed_text if pooled else model.encode_text, ids)
        return self._embeddings(model, output, "text", pooled), output

    def _embeddings(self, model: Model, output, kind: str, pooled: bool) -> list[Embedding]:
        features = F.normalize(output.features.float(), dim=-1).cpu()
        if not features.isfinite().all():
            raise not_finite("features", model)
        return [
            Embedding(self.cost(**{kind: lengths}, pruning=model.pruning, pooled=pooled), vector, lengths)
            for vector, lengths in zip(features, flops.stream_lengths(output.trace), strict=True)
        ]

    def cost(
        self,
        image: list[int] | None = None,
        text: list[int] | None = None,
        pruning: Pruning | bool = True,
        pooled: bool = False,
    ) -> flops.Flops:
        """Cost of an image's features, or a text's, or both; ``pooled``: nothing else was computed of the last
        layer.
        """
        raise NotImplementedError

    # ---- evaluation

    def steps(self, run, model, examples):
        """Features of images and texts."""
        images, texts = self.rows(examples)

        def embedded(kind: str, embed) -> Callable[[list], list[dict]]:
            return lambda instances: [
                {f"{kind}_tokens": found.tokens, **found.record(), "features": to_text(found.features)}
                for found in embed(model, instances)[0]
            ]

        return {
            "image": run("image", images, self._pixels, embedded("image", self.embed_images)),
            "text": run("text", texts, lambda row: self.text(row["text"]), embedded("text", self.embed_texts)),
        }

    def rows(self, examples: Sequence[CaptionExample]) -> tuple[list[dict], list[dict]]:
        """Rows of the images, and of the texts."""
        images = images_with_captions(examples)
        texts = [(number, caption) for number, row in enumerate(images) for caption in row.pop("captions")]
        return (
            [{"sample": number, **row} for number, row in enumerate(images)],
            [{"sample": n, "text": caption, "of_image": image} for n, (image, caption) in enumerate(texts)],
        )

    def _pixels(self, row: dict) -> Tensor:
        return self.processor.image(row["image"])

    def quality(self, steps, options):
        scores = self.rankings(steps, **options)
        found = recall(scores[0], [record["of_image"] for record in steps["text"]], scores[1])
        quality = {
            f"{direction} R@{k}": value
            for direction in ("image_to_text", "text_to_image")
            for k, value in getattr(found, direction).items()
        }
        return {"quality": {**quality, "r_mean": found.r_mean}}

    def rankings(self, steps: dict[str, list[dict]]) -> tuple[Tensor, Tensor]:
        """Scores by which texts are ranked for images ``[images, texts]``, and images for texts ``[texts, images]``."""
        similarity = similarities(steps)
        return similarity, similarity.mT

    # ---- training

    def split(self, path, image_root, training):
        examples = super().split(path, image_root, training)
        return single_captions(examples, all_of_them=True) if training else examples

    def instance(self, example, random=None):
        return {
            "pixels": self.image(example.image, random),
            "texts": [self.text(caption) for caption in example.captions],
            "image": str(example.image),
        }

    def collate(self, instances):
        return {
            "pixels": torch.stack([instance["pixels"] for instance in instances]),
            "texts": [text for instance in instances for text in instance["texts"]],
            "counts": [len(instance["texts"]) for instance in instances],
            "identities": torch.tensor([_identity(instance["image"]) for instance in instances]),
        }

    def streams(self, output, batch=None):
        # One image and one of its texts make an instance.
        images, texts = super().streams(output)
        return images, [texts[first] for first in accumulate([0, *batch["counts"][:-1]])]

    def costs(self, streams, pruning, written=(), beams=1):
        return [self.cost(image, text, pruning) for image, text in zip(*streams, strict=True)]

    def records(self, model, batch, output):
        texts = output.text_embeds.float().cpu().split(batch["counts"])
        return list(zip(output.image_embeds.float().cpu(), texts, strict=True))

    def score(self, records):
        images, texts = torch.stack([image for image, _ in records]), [text for _, text in records]
        image_of_text = [number for number, text in enumerate(texts) for _ in range(len(text))]
        return recall(images @ torch.cat(texts).T, image_of_text).r_mean


def similarities(steps: dict[str, list[dict]]) -> Tensor:
    """``[images, texts]`` cosine similarities, of the features in the records."""
    images, texts = (
        torch.stack([torch.from_numpy(from_text(record["features"]).copy()) for record in steps[kind]])
        for kind in ("image", "text")
    )
    return images @ texts.mT


def single_tokens(features: Tensor) -> tuple[RaggedBatch, list[LayerTrace]]:
    """Features ``[B, E]`` as samples of one token each."""
    numbers = torch.arange(len(features) + 1, dtype=torch.int32, device=features.device)
    return RaggedBatch(features, numbers, 1), []


def _identity(image: str) -> int:
    """A number of 62 bits for an image, the same in every process."""
    return int.from_bytes(blake2b(image.encode(), digest_size=8).digest(), "big") >> 2
