"""NLVR: is a statement about two images true?"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import flops, graphs
from ...options import UsageError, option
from ...processing import Processor, clean_sentence
from ..annotations import NLVRExample, are_paths, first_object, read_blip_nlvr, read_nlvr2
from ..base import Answer, Inputs, Prepared, Recipe, Task, not_finite
from ..metrics import accuracy
from .model import NLVR, NLVRConfig


@dataclass(frozen=True)
class NLVRAnswer(Answer):
    """Is the statement true of the two images?"""

    probability_true: float
    left_tokens: list[int]
    """Tokens of the left image before the first layer and after each; the others likewise."""
    right_tokens: list[int]
    text_tokens: list[int]

    columns = ("answer", "probability_true", "left_tokens", "right_tokens", "text_tokens")

    @property
    def answer(self) -> bool:
        """Whether the statement is more likely true."""
        return self.probability_true > 0.5


@dataclass(kw_only=True)
class NLVRInputs(Inputs):
    images: Sequence[str] | None = option("the two image files of one pair", nargs=2, metavar=("LEFT", "RIGHT"))
    text: str | None = option("the statement about them")

    def rows(self):
        # An empty statement is given, and its row's error.
        pair = [part is not None for part in (self.images, self.text)]
        if any(pair) if self.input else not all(pair):
            raise UsageError("give either --images and --text, or --input")
        return None if self.input else [{"images": self.images, "text": self.text}]


class NLVRProcessor(Processor):
    """(left image, right image, sentence) for BLIP-NLVR."""

    def images(self, left, right) -> Tensor:
        """Pixels of a pair, float32 [2, 3, image_size, image_size]; sources as in `load_image`, which see for
        errors."""
        return torch.stack([self.image(source) for source in (left, right)])

    def text(self, sentence: str) -> Tensor:
        """Token ids int64 [L] of a sentence: [ENC], word pieces, [SEP]; of the 40 words that BLIP's cleaning keeps,
        as many as the model has positions for. Raises TextError if the sentence is not a string or is empty.
        """
        return self._ids(sentence, clean_sentence, "[ENC]", truncate=self.max_tokens)

    def __call__(self, left, right, sentence: str) -> tuple[Tensor, Tensor]:
        """(pixels [2, 3, S, S] float32, ids [L] int64) of one instance. Raises ImageError, TextError."""
        return self.images(left, right), self.text(sentence)

    @staticmethod
    def collate(instances) -> tuple[Tensor, list[Tensor]]:
        """Join instances into a batch: pixels [2B, 3, S, S], all left images then all right ones, and B id
        tensors."""
        pixels = torch.stack([pixels for pixels, _ in instances], dim=1)  # [2, B, 3, S, S]
        return pixels.flatten(0, 1), [ids for _, ids in instances]


class NLVRTask(Task):
    """Trained on the cross-entropy of true and false; a pair is swapped half of the time, with "left" and "right".

    An example is a statement, or several about the same pair: a tuple of such examples.
    """

    name = "nlvr"
    Config, Processor, Model = NLVRConfig, NLVRProcessor, NLVR

    Answer, Inputs = NLVRAnswer, NLVRInputs
    help = "answer statements about pairs of images"
    description = "Is a statement about two images true? Give one pair, or a JSON Lines file of pairs."
    usage = """\
examples:
  madtp nlvr --model model_base_nlvr_0.5.pth --images left.jpg right.jpg \\
      --text "The left image contains twice as many dogs as the right image." --save-overlay patches.png
  madtp nlvr --model DIR --input pairs.jsonl --output answers.jsonl --batch-size 16 --dtype bfloat16

a row of pairs.jsonl (paths are relative to the file; "sentence" may stand for "text"):
  {"images": ["left.jpg", "right.jpg"], "text": "Both images show a dog."}

a row of answers.jsonl; row is the line number in the input, tokens are counts before and after each layer:
  {"row": 1, "images": [...], "text": ..., "answer": true, "probability_true": 0.91, "left_tokens": [...], ...}
"""
    passed_on = ("images", "text", "sentence")

    unit, headline = "pair", "accuracy"
    streams_of_records: ClassVar = {
        "image": ("pair", ("left_tokens", "right_tokens")),
        "text": ("pair", ("text_tokens",)),
    }

    recipe = Recipe(15, 16, 3e-6, 0.05, steps=((30, 1.0), (10, 0.5), (5, 0.25), (1, 0.1), (-float("inf"), 0.01)))
    score_name = "accuracy"
    images_per_example = 2

    def prepare(self, row, folder=Path()):
        images, text = row.get("images"), row.get("text", row.get("sentence"))
        if not are_paths(images, 2):
            raise ValueError(f"'images' must be a list of two paths, got {json.dumps(images)}")
        if not {"text", "sentence"} & set(row):
            raise ValueError("'text' (or 'sentence') is missing")
        if not isinstance(text, str):
            raise ValueError(f"'text' must be a string, got {json.dumps(text)}")
        left, right = (folder / image for image in images)
        return Prepared((left, right), self.processor(left, right, text), text)

    def answer(self, model, instances):
        pixels, ids = self.processor.collate(instances)
        with torch.inference_mode():
            output = graphs.run(model, pixels, ids)
            probabilities = output.logits.float().softmax(-1)[:, 1].tolist()
        if not all(0 <= probability <= 1 for probability in probabilities):
            raise not_finite("logits", model)
        streams = self.streams(output)
        columns = zip(self.costs(streams, model.pruning), probabilities, *streams, strict=True)
        return [NLVRAnswer(*values) for values in columns], output

    def samples(self, place, count):
        return place, count + place

    def title(self, prepared, answer):
        return f"{prepared.text}  The model says: {answer.answer}"

    # ---- evaluation

    def read(self, path, image_root, strict=False):
        first = first_object(path)
        return (read_blip_nlvr if first is None or "images" in first else read_nlvr2)(path, image_root, strict)

    def images_of(self, example):
        return example.left, example.right

    def rows(self, examples):
        return [
            {
                "sample": number,
                "images": [str(example.left), str(example.right)],
                "sentence": example.sentence,
                "label": example.label,
                "template": example.template,
            }
            for number, example in enumerate(examples)
        ]

    def quality(self, steps, options):
        def of(records: Sequence[dict]) -> float:
            return accuracy([record["answer"] for record in records], [record["label"] for record in records])

        found, templates = {"quality": {"accuracy": of(steps["pair"])}}, defaultdict(list)
        for record in steps["pair"]:
            if record["template"] is not None:
                templates[record["template"]].append(record)
        if templates:
            found["templates"] = {
                name: {"samples": len(some), "accuracy": of(some)} for name, some in sorted(templates.items())
            }
        return found

    # ---- training

    @staticmethod
    def example(images, text, number):
        return NLVRExample(*images, text, False)

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
            "pixels": torch.stack([self.image(image, random) for image in images]),
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

    def places(self, batch, numbers):
        counts = zip(numbers, batch["statements"], strict=True)
        return [(number, statement) for number, count in counts for statement in range(count)]

    def forward(self, model, batch, pruning, alignment_features=False):
        return model(batch["pixels"], batch["texts"], pruning, alignment_features, batch["statements"])

    def loss(self, model, batch, output, pruning, seed):
        return {"answer": F.cross_entropy(output.logits.float(), batch["labels"].to(model.device))}

    def alignment_features(self, output, batch):
        vision, text = output.alignment_features
        counts = torch.tensor(batch["statements"], device=vision.device)
        return vision.unflatten(0, (2, -1)).mean(0).repeat_interleave(counts, 0), text

    def states(self, output):
        return [(output.image_embeds, output.vision), (output.last_hidden_state, output.text)]

    def streams(self, output, batch=None):
        vision, text = flops.stream_lengths(output.vision), flops.stream_lengths(output.text)
        statements = [1] * len(text) if batch is None else batch["statements"]
        pairs = [pair for pair, count in enumerate(statements) for _ in range(count)]
        return [vision[pair] for pair in pairs], [vision[len(statements) + pair] for pair in pairs], text

    def costs(self, streams, pruning, written=(), beams=1):
        return [
            flops.nlvr(self.config, list(zip(left, right, strict=True)), text, pruning=pruning)
            for left, right, text in zip(*streams, strict=True)
        ]

    def records(self, model, batch, output):
        return (output.logits.argmax(-1).cpu() == batch["labels"]).tolist()


def swap_sides(sentence: str) -> str:
    """The sentence with the words "left" and "right" exchanged, in lower case."""
    return re.sub(r"\b(left|right)\b", lambda m: "right" if m[0].lower() == "left" else "left", sentence, flags=re.I)
