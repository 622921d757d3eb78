"""BLIP retrieval: images and texts in one space, of which the best matches are classified as pairs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ... import flops, graphs
from ...options import UsageError, option
from ...processing import Processor, clean_sentence
from ..base import Options, Recipe, not_finite
from ..losses import contrastive_loss, hard_negatives
from ..pairs import PairsTask, similarities, single_tokens
from .model import Retrieval, RetrievalConfig

RERANK = 256
"""Candidates that BLIP scores again in both directions, on COCO (128 on Flickr30k)."""
_PAIRS = 512  # texts that look at images at a time


@dataclass(kw_only=True)
class RetrievalOptions(Options):
    rerank: int = option(
        "match the best K of each image and of each text in pairs", RERANK, type=int, metavar="K", group="retrieval"
    )

    def arguments(self):
        if self.rerank < 0:
            raise UsageError(f"--rerank: expected at least 0, got {self.rerank}")
        return {"rerank": self.rerank}


class RetrievalProcessor(Processor):
    """Images and sentences for BLIP retrieval, each on its own."""

    def text(self, sentence: str) -> Tensor:
        """Token ids int64 [L] of a sentence of at most 30 words: [CLS], word pieces, [SEP]; at most 35, as in
        BLIP. Raises TextError if the sentence is not a string or is empty."""
        return self._ids(sentence, lambda text: clean_sentence(text, 30), "[CLS]", truncate=min(35, self.max_tokens))


class RetrievalTask(PairsTask):
    """Trained on the contrast of images and texts (ITC), and on the classification of pairs with hard negatives (ITM).

    Simpler than the official recipe: no momentum encoders, no soft targets, no queue; negatives of the contrast come
    from the batch of all processes, those of the classification from that of the process.
    """

    name = "retrieval"
    Config, Processor, Model = RetrievalConfig, RetrievalProcessor, Retrieval
    EvaluationOptions = RetrievalOptions
    recipe = Recipe(5, 32, 1e-7, 0.05)
    matches = True

    def cost(self, image=None, text=None, pruning=True, pooled=False, match: tuple[int, list[int]] | None = None):
        return flops.retrieval(self.config, image=image, text=text, match=match, pruning=pruning, pooled=pooled)

    def match(self, model: Retrieval, images, ids: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> list[float]:
        """How well do the texts belong to the images of these pairs? See :func:`madtp.predict.match`."""
        with torch.inference_mode():
            scores = model.match(images, ids, pairs).logits[:, 1].float()
        if not scores.isfinite().all():
            raise not_finite("logits", model)
        return scores.tolist()

    # ---- evaluation

    def steps(self, run, model, examples, rerank: int = RERANK):
        """Features; then the best ``rerank`` of each image and each text as pairs."""
        steps = super().steps(run, model, examples)
        if rerank:
            texts = functools.cache(lambda number: self.text(steps["text"][number]["text"]))

            def prepare(row: dict):
                return self._pixels(row), [texts(number) for number in row["texts"]]

            rows = _match_rows(steps["image"], similarities(steps), rerank)
            steps["match"] = run("match", rows, prepare, functools.partial(self._match, model))
        return steps

    def _match(self, model: Retrieval, instances: list[tuple]) -> list[dict]:
        """Logits of each image with each of its texts, and what that cost beside the image."""
        pixels, texts = zip(*instances, strict=True)
        pruning, logits, costs = model.pruning, [], []
        with torch.inference_mode():
            encoded = graphs.run(model.encode_image, torch.stack(pixels))
            image_tokens = encoded.tokens.lengths.tolist()
            pairs = [(image, text) for image, own in enumerate(texts) for text in own]
            for start in range(0, len(pairs), _PAIRS):
                part = pairs[start : start + _PAIRS]
                numbered = [(image, n) for n, (image, _) in enumerate(part)]
                matches = model.match(encoded.tokens, [text for _, text in part], numbered)
                logits += matches.logits[:, 1].float().tolist()
                lengths = dict(zip(matches.order.tolist(), flops.stream_lengths(matches.text), strict=True))
                costs += [
                    self.cost(match=(image_tokens[image], lengths[n]), pruning=pruning)
                    for n, (image, _) in enumerate(part)
                ]
        if not all(torch.tensor(logits).isfinite()):
            raise not_finite("logits", model)
        records, start = [], 0
        for own in map(len, texts):
            part = slice(start, start + own)
            official, full = (sum(getattr(cost, count) for cost in costs[part]) for count in ("official", "full"))
            records.append({"logits": logits[part], "gflops": official, "gflops_full": full})
            start += own
        return records

    def rankings(self, steps, rerank: int = RERANK):
        similarity = similarities(steps)
        if "match" not in steps:
            return similarity, similarity.mT
        # The similarity plus the logit; who is on no short list comes last.
        again = torch.full_like(similarity, -torch.inf)
        for image, record in enumerate(steps["match"]):
            texts = record["texts"]
            again[image, texts] = similarity[image, texts] + torch.tensor(record["logits"])
        rankings = tuple(torch.full_like(scores, -torch.inf) for scores in (again, again.mT))
        for scores, source, lists in zip(rankings, (again, again.mT), shortlists(similarity, rerank), strict=True):
            listed = torch.tensor(lists)
            scores.scatter_(1, listed, source.gather(1, listed))
        return rankings

    # ---- training

    def loss(self, model, batch, output, pruning, seed):
        identities = batch["identities"].to(model.device)
        scale = 1 / model.temp.clamp(0.001, 0.5)
        itc = contrastive_loss(output.image_embeds, output.text_embeds, scale, identities)
        similarity = scale * output.image_embeds @ output.text_embeds.mT
        generator = torch.Generator().manual_seed(int(np.random.default_rng(seed).integers(2**62)))
        count = len(identities)
        pairs = [(i, i) for i in range(count)]
        for_images = hard_negatives(similarity, identities, generator)
        for_texts = hard_negatives(similarity.mT, identities, generator)
        pairs += [(image, text) for image, text in enumerate(for_images) if text is not None]
        pairs += [(image, text) for text, image in enumerate(for_texts) if image is not None]
        logits = model.match(output.images, batch["texts"], pairs, pruning).logits.float()
        labels = (torch.arange(len(pairs), device=model.device) < count).long()
        return {"contrast": itc, "match": F.cross_entropy(logits, labels)}

    def states(self, output):
        return [(output.images, output.vision), single_tokens(output.text_embeds)]


def shortlists(similarity: Tensor, rerank: int) -> tuple[list[list[int]], list[list[int]]]:
    """The `rerank` most similar texts of each image, and images of each text; all if there are fewer."""
    images, texts = similarity.shape
    return (
        similarity.topk(min(rerank, texts), dim=1).indices.tolist(),
        similarity.mT.topk(min(rerank, images), dim=1).indices.tolist(),
    )


def _match_rows(images: list[dict], similarity: Tensor, rerank: int) -> list[dict]:
    """For each image the texts that either short list pairs it with: it is encoded once for all of them."""
    texts_of_images, images_of_texts = shortlists(similarity, rerank)
    wanted = [set(texts) for texts in texts_of_images]
    for text, found in enumerate(images_of_texts):
        for image in found:
            wanted[image].add(text)
    return [
        {"sample": row["sample"], "image": row["image"], "texts": sorted(texts)}
        for row, texts in zip(images, wanted, strict=True)
    ]
