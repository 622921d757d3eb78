"""VQA: a question about an image, answered in words or by the best of a list."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch

from ... import flops, graphs
from ...inputs import read_texts
from ...layers import QueryGroups
from ...options import UsageError, given, option, positive
from ...processing import Processor, clean_question
from ..annotations import VQAExample, first_object, read_blip_vqa, read_vqa_v2
from ..base import Answer, ImageInputs, Options, Prepared, Recipe, Task, check_finite, image_of
from ..losses import answer_loss
from ..metrics import vqa_accuracy, vqa_score
from .model import VQA, VQAConfig

HOW = "how answers are found"
"""Group of options in the help."""


@dataclass(frozen=True)
class VQAAnswer(Answer):
    """The answer to a question about an image."""

    answer: str
    image_tokens: list[int]
    """Tokens before the first layer and after each; the others likewise."""
    question_tokens: list[int]
    score: float | None = None
    """Of a ranked answer: its log-probability, label-smoothed."""

    columns = ("answer", "score", "image_tokens", "question_tokens")


@dataclass(kw_only=True)
class VQAInputs(ImageInputs):
    question: str | None = option("the question about all images that have none", metavar="TEXT")

    def rows(self):
        rows = super().rows()
        if rows is not None and self.question is None:
            raise UsageError("--question is missing")
        return rows and [{**row, **self.defaults()} for row in rows]

    def defaults(self):
        return {} if self.question is None else {"question": self.question}


@dataclass(kw_only=True)
class VQAOptions(Options):
    answers: str | None = option(
        "choose among these, one per line or a JSON list; by default answers are written", metavar="FILE", group=HOW
    )
    top_k: int | None = option(
        "of the list, score in full those that begin most likely (default: 128)", type=positive, metavar="K", group=HOW
    )
    num_beams: int | None = option(
        "of the beam search for written answers; 1 is greedy (default: 3)", type=positive, metavar="N", group=HOW
    )
    max_length: int | None = option(
        "of written answers, in tokens (default: 10)", type=positive, metavar="N", group=HOW
    )
    min_length: int | None = option("of written answers, in tokens (default: 1)", type=positive, metavar="N", group=HOW)

    def arguments(self):
        if not self.answers:
            if useless := given(self, ("top_k",)):
                raise UsageError(f"{useless}: of no use without --answers")
            return {
                "num_beams": self.num_beams or 3,
                "max_length": self.max_length or 10,
                "min_length": self.min_length or 1,
            }
        if useless := given(self, ("num_beams", "max_length", "min_length")):
            raise UsageError(f"{useless}: of no use with --answers")
        return {"candidates": read_texts(self.answers), "k": self.top_k or 128}


class VQAProcessor(Processor):
    """(image, question) for BLIP-VQA."""

    _clean = staticmethod(clean_question)

    def text(self, question: str) -> Tensor:
        """Token ids int64 [L] of a question: [ENC], word pieces, [SEP]; at most 35, as in BLIP. Raises TextError
        if the question is not a string or is empty."""
        return self._ids(question, clean_question, "[ENC]", truncate=min(35, self.max_tokens))

    def answer(self, answer: str) -> Tensor:
        """Token ids int64 [L] of a candidate answer: [DEC], word pieces, [SEP]. Raises TextError if it is not a
        string or is too long."""
        return self._ids(answer, str, "[DEC]")

    def __call__(self, image, question: str) -> tuple[Tensor, Tensor]:
        """(pixels [3, S, S] float32, ids [L] int64) of one instance. Raises ImageError, TextError."""
        return self.image(image), self.text(question)

    @staticmethod
    def collate(instances) -> tuple[Tensor, list[Tensor]]:
        """Join instances into a batch: pixels [B, 3, S, S] and B id tensors."""
        return torch.stack([pixels for pixels, _ in instances]), [ids for _, ids in instances]


class VQATask(Task):
    """Trained on the weighted label-smoothed loss of all answers to a question; scored by greedy answers."""

    name = "vqa"
    Config, Processor, Model = VQAConfig, VQAProcessor, VQA

    Answer = VQAAnswer
    Inputs, Options, EvaluationOptions = VQAInputs, VQAOptions, VQAOptions
    help = "answer questions about images"
    description = "Answers questions about images, in words of its own or with the best of a list."
    usage = """\
examples:
  madtp vqa --model DIR photo.jpg --question "How many dogs are there?"
  madtp vqa --model model_base_vqa_0.5.pth photos/ --question "Is it raining?" --output answers.jsonl
  madtp vqa --model DIR --input questions.jsonl --output answers.jsonl --answers answer_list.txt

a row of questions.jsonl (--question serves rows without one; paths are relative to the file):
  {"image": "a.jpg", "question": "What is the dog doing?"}

a row of answers.jsonl; row is its number in the input, tokens are counts before and after each layer:
  {"row": 1, "image": "a.jpg", "question": ..., "answer": "running", "image_tokens": [901, ...], ...}
"""
    passed_on = ("image", "question")

    unit, headline = "question", "accuracy"
    separate_answers = True
    streams_of_records: ClassVar = {
        "image": ("question", ("image_tokens",)),
        "question": ("question", ("question_tokens",)),
    }

    recipe = Recipe(
        3, 16, 2e-5, 0.05, 0.5, ((50, 0.25), (30, 0.15), (10, 0.1), (5, 0.05), (2, 0.01), (-float("inf"), 0.0))
    )
    score_name = "VQA score"

    def prepare(self, row, folder=Path()):
        image, question = image_of(row, folder), row.get("question")
        if "question" not in row:
            raise ValueError("'question' is missing, and there is no --question")
        if not isinstance(question, str):
            raise ValueError(f"'question' must be a string, got {json.dumps(question)}")
        return Prepared((image,), self.processor(image, question), question)

    def answer(self, model, instances, candidates: Sequence[str] | None = None, k: int | None = None, **options):
        """Answers to questions.

        Args:
            candidates: rank these, by scoring the ``k`` (128 by default) that begin most likely; by default answers are
                written.
            options: of :meth:`madtp.tasks.vqa.model.VQA.generate`, for answers that are written.

        Raises:
            ValueError: ``k`` without candidates, or options beside them.
            FloatingPointError: the model's dtype cannot hold its activations.
        """
        if candidates is None and k is not None:
            raise ValueError(f"k: only candidates are ranked, and there are none, got {k}")
        if candidates is not None and options:
            raise ValueError(
                f"{', '.join(options)}: only written answers take options of generation, and candidates are ranked"
            )
        pixels, ids = self.processor.collate(instances)
        with torch.inference_mode():
            output = graphs.run(model, pixels, ids)
            check_finite(model, output.questions)
            if candidates is None:
                written = model.generate(output.questions, **options)
                texts, scores = [self.processor.decode(words) for words in written], [None] * len(written)
                lengths, beams = [1 + len(words) for words in written], options.get("num_beams") or 3
            else:
                answers = _candidate_ids(self.processor, tuple(candidates))
                ranking = model.rank(output.questions, answers, 128 if k is None else k)
                texts = [candidates[number] for number in ranking.best.tolist()]
                scores = ranking.scores.amax(1).tolist()
                lengths = [1 + sum(len(answers[c]) for c in chosen) for chosen in ranking.candidates.tolist()]
                beams = 1
        streams = self.streams(output)
        columns = zip(self.costs(streams, model.pruning, lengths, beams), texts, *streams, scores, strict=True)
        return [VQAAnswer(*values) for values in columns], output

    # ---- evaluation

    def read(self, path, image_root, strict=False, answers: str | Path | None = None):
        """As :meth:`Task.read`; ``answers`` are VQA v2's annotations, which the original questions need."""
        first = first_object(path)
        if first is not None and "image" not in first:
            return read_vqa_v2(path, image_root, answers, strict)
        if answers is not None:
            raise ValueError(f"answers: {path} are not the original questions of VQA v2, which have another file")
        return read_blip_vqa(path, image_root, image_root, strict)

    def rows(self, examples):
        for number, example in enumerate(examples):
            if len(example.answers) < 2:
                raise ValueError(
                    f"question {number} ({example.question!r}): {len(example.answers)} answers of annotators to "
                    "compare with, two at least are needed; test splits and Visual Genome cannot be scored here"
                )
        return [
            {
                "sample": number,
                "image": str(example.image),
                "question": example.question,
                "question_id": example.question_id,
                "answers": list(example.answers),
            }
            for number, example in enumerate(examples)
        ]

    def quality(self, steps, options):
        records = dict(enumerate(steps["question"]))
        answers, wanted = ({n: record[key] for n, record in records.items()} for key in ("answer", "answers"))
        return {"quality": {"accuracy": vqa_accuracy(answers, wanted)}}

    # ---- training

    @staticmethod
    def example(images, text, number):
        # Nothing learns from the answer; its length is part of what an instance costs.
        return VQAExample(images[0], text, None, ("yes",), "vg")

    def split(self, path, image_root, training):
        examples = super().split(path, image_root, training)
        if not examples[0].answers:
            raise ValueError(f"{path}: the questions have no answers")
        return examples

    def instance(self, example, random=None):
        weights = example.answer_weights()
        return {
            "pixels": self.image(example.image, random),
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

    def loss(self, model, batch, output, pruning, seed):
        answers, decoder = batch["answers"].to(model.device), model.text_decoder
        groups = QueryGroups.of(batch["counts"], model.device)
        states = decoder(answers, decoder.keys(output.questions), query_groups=groups, backend=model.backend)
        logits = states.with_values(decoder.logits(states.values))
        return {"answer": answer_loss(logits, answers, batch["weights"].to(model.device), len(batch["counts"]))}

    def states(self, output):
        return [(output.image_embeds, output.vision), (output.questions, output.text)]

    def costs(self, streams, pruning, written=(), beams=1):
        return [
            flops.vqa(self.config, image, question, length, beams=beams, pruning=pruning)
            for image, question, length in zip(*streams, written, strict=True)
        ]

    def written(self, batch):
        # That of the first answer as it was given, whatever the model would write.
        first = torch.tensor([0, *batch["counts"][:-1]]).cumsum(0)
        return batch["answers"].lengths[first].tolist()

    def records(self, model, batch, output):
        answers = [self.processor.decode(ids) for ids in model.generate(output.questions, num_beams=1)]
        return [
            vqa_score(answer, given) if len(given) > 1 else float(answer == given[0])
            for answer, given in zip(answers, batch["given"], strict=True)
        ]


@functools.lru_cache(maxsize=1)
def _candidate_ids(processor: VQAProcessor, candidates: tuple[str, ...]) -> list[torch.Tensor]:
    """Ids of candidate answers: the same ones for every batch, and official lists have thousands."""
    return [processor.answer(candidate) for candidate in candidates]
