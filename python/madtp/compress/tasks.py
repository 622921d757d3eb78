"""What differs between the tasks when a model is trained: examples, losses, costs, and the score on the dev split.

A *batch* is a dict with ``pixels``, ``texts`` (one int64 id tensor each), and what the task's loss needs. One forward of the
model serves all of them; here are no loops, files of runs or processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from .. import flops
from ..layers import Runs
from ..models import Model
from ..processing import clean_sentence, load_image
from ..tasks.annotations import CaptionExample, NLVRExample, read_blip_nlvr, read_blip_vqa, read_captions
from ..tasks.augment import augment
from ..tasks.losses import answer_loss, caption_loss, contrastive_loss, hard_negatives, token_loss
from ..tasks.metrics import recall, vqa_score
from .pairs import forward_pairs

Streams = tuple[list[list[int]], ...]
"""Token counts of each instance before the first layer and after each, per pruned stream of the model."""


class Task:
    """One task; subclasses say what is its own.

    Args:
        model: whose processor and sizes are used.
    """

    score_name: ClassVar[str]
    smallest_batch: ClassVar[int] = 1
    auxiliary: nn.Module | None = None
    """What learns beside the model for the sake of the loss, and is not part of it."""

    def __init__(self, model: Model) -> None:
        self.config, self.processor = model.config, model.processor

    def read(self, path: str | Path, image_root: str | Path, training: bool) -> list:
        """Examples of an annotation file, in its order.

        Raises:
            AnnotationError: a record that is wrong, or an image that is missing.
            OSError: the file cannot be read.
        """
        raise NotImplementedError

    def instance(self, example: Any, random: np.random.Generator | None = None) -> dict:
        """What a model is given of an example; with ``random``, of a random view of it, for training.

        Raises:
            ImageError, TextError: an example that cannot be used.
        """
        raise NotImplementedError

    def collate(self, instances: Sequence[dict]) -> dict:
        """Join instances into a batch."""
        return {
            "pixels": torch.stack([instance["pixels"] for instance in instances]),
            "texts": [instance["text"] for instance in instances],
        }

    def at(self, step: int) -> None:
        """Training has come to this step; for tasks whose loss changes with it."""

    def forward(self, model: Model, batch: dict, temperature: float, summaries: bool = False) -> Any:
        """The model's output for a batch."""
        return model(batch["pixels"], batch["texts"], temperature, summaries=summaries)

    def places(self, batch: dict, numbers: Sequence[int]) -> list:
        """What tells the instances of a batch apart and puts them in order, from the numbers of its examples."""
        return list(numbers)

    def grouped(self, examples: Sequence, texts: int) -> Sequence:
        """Examples of up to ``texts`` texts about the same image or images, which are then encoded once.

        Raises:
            ValueError: a task whose examples are of one text each.
        """
        if texts > 1:
            raise ValueError(f"texts: this task has one text per image, got {texts}")
        return examples

    def loss(
        self, model: Model, batch: dict, output: Any, temperature: float, seed: Sequence[int]
    ) -> dict[str, Tensor]:
        """Terms of the loss, each a mean over the batch. Random choices depend on ``seed``."""
        raise NotImplementedError

    def summaries(self, output: Any, batch: dict) -> tuple[Tensor, Tensor]:
        """``(vision, text)`` alignment summaries ``[B, M, sd_dim]``."""
        return output.summaries

    def states(self, output: Any) -> list[tuple[RaggedBatch, Tensor]]:
        """Final states of the tokens of each pruned stream ``[T, D]``, and their ids ``[T]`` (see :class:`madtp.pruning.Stream`)."""
        raise NotImplementedError

    def streams(self, output: Any, batch: dict) -> Streams:
        """Token counts of each instance of a batch."""
        return flops.stream_lengths(output.vision), flops.stream_lengths(output.text)

    def flops(self, streams: Streams, batch: dict, guided: bool) -> list[flops.Flops]:
        """Cost of each instance at inference."""
        raise NotImplementedError

    def records(self, model: Model, batch: dict, output: Any) -> list:
        """What the score needs of each instance of a batch of the dev split."""
        raise NotImplementedError

    def score(self, records: Sequence) -> float:
        """The score of the dev split, higher is better, from the records of all instances in their order."""
        return sum(records) / len(records)

    def _image(self, path: Path, random: np.random.Generator | None) -> Tensor:
        """Pixels ``[3, S, S]`` of a picture, or of a random view of it."""
        image = load_image(path)
        if random is not None:
            image = augment(image, self.processor.image_size, random)
        return self.processor.image(image)


class NLVRTask(Task):
    """Cross-entropy of true and false. In training a pair is swapped half of the time, with "left" and "right".

    An example is a statement, or several about the same pair: a tuple of such examples.
    """

    score_name = "accuracy"

    def read(self, path, image_root, training):
        return read_blip_nlvr(path, image_root, strict=True)

    def grouped(self, examples, texts):
        if texts == 1 or not isinstance(examples[0], NLVRExample):
            return examples
        pairs: dict[tuple, list[NLVRExample]] = {}
        for example in examples:
            pairs.setdefault((example.left, example.right), []).append(example)
        return [
            tuple(group[start : start + texts]) for group in pairs.values() for start in range(0, len(group), texts)
        ]

    def instance(self, example, random=None):
        statements = example if isinstance(example, tuple) else (example,)
        images, sentences = (statements[0].left, statements[0].right), [one.sentence for one in statements]
        if random is not None and random.random() < 0.5:
            images, sentences = images[::-1], [swap_sides(sentence) for sentence in sentences]
        return {
            "pixels": torch.stack([self._image(image, random) for image in images]),
            "texts": [self.processor.text(sentence) for sentence in sentences],
            "labels": [int(one.label) for one in statements],
        }

    def collate(self, instances):
        left, right = torch.stack([instance["pixels"] for instance in instances], 1)
        return {
            "pixels": torch.cat([left, right]),
            "texts": [text for instance in instances for text in instance["texts"]],
            "labels": torch.tensor([label for instance in instances for label in instance["labels"]]),
            "statements": [len(instance["texts"]) for instance in instances],
        }

    def forward(self, model, batch, temperature, summaries=False):
        return forward_pairs(
            model, batch["pixels"], batch["texts"], batch["statements"], temperature, summaries=summaries
        )

    def places(self, batch, numbers):
        counts = zip(numbers, batch["statements"], strict=True)
        return [(number, statement) for number, count in counts for statement in range(count)]

    def loss(self, model, batch, output, temperature, seed):
        return {"answer": F.cross_entropy(output.logits.float(), batch["labels"].to(model.device))}

    def summaries(self, output, batch):
        vision, text = output.summaries
        counts = torch.tensor(batch["statements"], device=vision.device)
        return vision.unflatten(0, (2, -1)).mean(0).repeat_interleave(counts, 0), text

    def states(self, output):
        return [(output.image_embeds, output.vision[-1].ids), (output.last_hidden_state, output.text[-1].ids)]

    def streams(self, output, batch):
        vision, pairs = flops.stream_lengths(output.vision), len(batch["statements"])
        left, right = (
            [side[pair] for pair, count in enumerate(batch["statements"]) for _ in range(count)]
            for side in (vision[:pairs], vision[pairs:])
        )
        return left, right, flops.stream_lengths(output.text)

    def flops(self, streams, batch, guided):
        return [
            flops.nlvr(self.config, list(zip(left, right, strict=True)), text, guided=guided)
            for left, right, text in zip(*streams, strict=True)
        ]

    def records(self, model, batch, output):
        return (output.logits.argmax(-1).cpu() == batch["labels"]).tolist()


class VQATask(Task):
    """Weighted label-smoothed loss of all answers to a question; scored by the answers that a greedy search writes."""

    score_name = "VQA score"

    def read(self, path, image_root, training):
        examples = read_blip_vqa(path, image_root, image_root, strict=True)
        if not examples[0].answers:
            raise ValueError(f"{path}: the questions have no answers")
        return examples

    def instance(self, example, random=None):
        weights = example.answer_weights()
        return {
            "pixels": self._image(example.image, random),
            "text": self.processor.text(example.question),
            "answers": [self.processor.answer(answer) for answer in weights],
            "weights": list(weights.values()),
            "given": example.answers,
        }

    def collate(self, instances):
        answers = [answer for instance in instances for answer in instance["answers"]]
        return super().collate(instances) | {
            "answers": RaggedBatch.from_list(answers),
            "counts": [len(instance["answers"]) for instance in instances],
            "weights": torch.tensor([weight for instance in instances for weight in instance["weights"]]),
            "given": [instance["given"] for instance in instances],
        }

    def loss(self, model, batch, output, temperature, seed):
        answers, decoder = batch["answers"].to(model.device), model.text_decoder
        runs = Runs.of(batch["counts"], model.device)
        states = decoder(answers, decoder.keys(output.questions), runs=runs, backend=model.backend)
        logits = states.with_values(decoder.logits(states.values))
        return {"answer": answer_loss(logits, answers, batch["weights"].to(model.device), len(batch["counts"]))}

    def states(self, output):
        return [(output.image_embeds, output.vision[-1].ids), (output.questions.tokens, output.questions.ids)]

    def flops(self, streams, batch, guided):
        # The decoder's part is that of the first answer as it was given, whatever the model would write.
        first = torch.tensor([0, *batch["counts"][:-1]]).cumsum(0)
        lengths = batch["answers"].lengths[first].tolist()
        return [
            flops.vqa(self.config, image, question, length, guided=guided)
            for image, question, length in zip(*streams, lengths, strict=True)
        ]

    def records(self, model, batch, output):
        answers = [self.processor.decode(ids) for ids in model.generate(output.questions, num_beams=1)]
        return [
            vqa_score(answer, given) if len(given) > 1 else float(answer == given[0])
            for answer, given in zip(answers, batch["given"], strict=True)
        ]


class CaptionTask(Task):
    """Label-smoothed loss of the words after the prompt; the score is minus that of the first captions of dev images."""

    score_name = "minus loss"

    def read(self, path, image_root, training):
        return single_captions(read_captions(path, image_root, strict=True), all_of_them=training)

    def instance(self, example, random=None):
        (caption,) = example.captions
        return {"pixels": self._image(example.image, random), "text": self.processor.text(caption)}

    def loss(self, model, batch, output, temperature, seed):
        texts = RaggedBatch.from_list(batch["texts"]).to(model.device)
        return {"caption": caption_loss(output.logits, texts, len(self.processor.prompt_ids))}

    def states(self, output):
        return [(output.images.tokens, output.images.ids)]

    def streams(self, output, batch):
        return (flops.stream_lengths(output.vision),)

    def flops(self, streams, batch, guided):
        return [
            flops.caption(self.config, image, len(text), guided=guided)
            for image, text in zip(*streams, batch["texts"], strict=True)
        ]

    def records(self, model, batch, output):
        texts = RaggedBatch.from_list(batch["texts"]).to(model.device)
        losses, counts = token_loss(output.logits, texts, len(self.processor.prompt_ids))
        parts = zip(texts.with_values(losses).to_list(), texts.with_values(counts).to_list(), strict=True)
        return [(float(loss.sum()), int(count.sum())) for loss, count in parts]

    def score(self, records):
        return -sum(loss for loss, _ in records) / sum(count for _, count in records)


class _Pairs(Task):
    """Images and captions in one space, scored by the mean recall of their similarities."""

    score_name = "mean recall"
    smallest_batch = 2

    def read(self, path, image_root, training):
        examples = read_captions(path, image_root, strict=True)
        return single_captions(examples, all_of_them=True) if training else examples

    def instance(self, example, random=None):
        return {
            "pixels": self._image(example.image, random),
            "texts": [self.processor.text(self._clean(caption)) for caption in example.captions],
            "image": str(example.image),
        }

    def _clean(self, caption: str) -> str:
        return caption

    def collate(self, instances):
        return {
            "pixels": torch.stack([instance["pixels"] for instance in instances]),
            "texts": [text for instance in instances for text in instance["texts"]],
            "counts": [len(instance["texts"]) for instance in instances],
            "identities": torch.tensor([_identity(instance["image"]) for instance in instances]),
        }

    def streams(self, output, batch):
        # One image and one of its texts make an instance.
        text, first = flops.stream_lengths(output.text), [0]
        for count in batch["counts"][:-1]:
            first.append(first[-1] + count)
        return flops.stream_lengths(output.vision), [text[number] for number in first]

    def records(self, model, batch, output):
        texts = output.text_embeds.float().cpu().split(batch["counts"])
        return list(zip(output.image_embeds.float().cpu(), texts, strict=True))

    def score(self, records):
        images, texts = torch.stack([image for image, _ in records]), [text for _, text in records]
        image_of_text = [number for number, text in enumerate(texts) for _ in range(len(text))]
        return recall(images @ torch.cat(texts).T, image_of_text).r_mean


class RetrievalTask(_Pairs):
    """Contrast of images and texts (ITC), and classification of pairs with hard negatives of the batch (ITM).

    Simpler than the official recipe: no momentum encoders, no soft targets, no queue; negatives of the contrast come from the
    batch of all processes, those of the classification from that of the process.
    """

    def loss(self, model, batch, output, temperature, seed):
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
        logits = model.match(output.images, batch["texts"], pairs, temperature).logits.float()
        labels = (torch.arange(len(pairs), device=model.device) < count).long()
        return {"contrast": itc, "match": F.cross_entropy(logits, labels)}

    def states(self, output):
        return [(output.images.tokens, output.images.ids), _features(output.text_embeds)]

    def flops(self, streams, batch, guided):
        return [
            flops.retrieval(self.config, image=image, text=text, guided=guided)
            for image, text in zip(*streams, strict=True)
        ]


class CLIPTask(_Pairs):
    """Contrast of images and texts. As retrieval without momentum towers and queue."""

    def _clean(self, caption):
        return clean_sentence(caption, 30)

    def loss(self, model, batch, output, temperature, seed):
        scale = model.logit_scale.clamp(0, 4.6052).exp()
        identities = batch["identities"].to(model.device)
        return {"contrast": contrastive_loss(output.image_embeds, output.text_embeds, scale, identities)}

    def states(self, output):
        return [_features(output.image_embeds), _features(output.text_embeds)]

    def flops(self, streams, batch, guided):
        return [
            flops.clip(self.config, image=image, text=text, guided=guided) for image, text in zip(*streams, strict=True)
        ]


# One entry per task.
TASKS: dict[str, type[Task]] = {
    "nlvr": NLVRTask,
    "vqa": VQATask,
    "caption": CaptionTask,
    "retrieval": RetrievalTask,
    "clip": CLIPTask,
}


def swap_sides(sentence: str) -> str:
    """The sentence with the words "left" and "right" exchanged, in lower case."""
    return re.sub(r"\b(left|right)\b", lambda m: "right" if m[0].lower() == "left" else "left", sentence, flags=re.I)


def single_captions(examples: Sequence[CaptionExample], *, all_of_them: bool) -> list[CaptionExample]:
    """An example per caption, or one with the first caption of each image."""
    return [
        CaptionExample(example.image, example.image_id, (caption,))
        for example in examples
        for caption in (example.captions if all_of_them else example.captions[:1])
    ]


def _features(features: Tensor) -> tuple[RaggedBatch, Tensor]:
    """Features ``[B, E]`` as samples of one token each."""
    numbers = torch.arange(len(features) + 1, dtype=torch.int32, device=features.device)
    return RaggedBatch(features, numbers, 1), torch.zeros_like(numbers[1:])


def _identity(image: str) -> int:
    """A number of 62 bits for an image, the same in every process."""
    return int.from_bytes(blake2b(image.encode(), digest_size=8).digest(), "big") >> 2
