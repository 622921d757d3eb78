"""What a task is to the rest of the package. `predict`, `evaluate`, `compress` and the commands know nothing else of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from .. import flops
from ..config import Config
from ..inputs import find_images
from ..models.base import Model
from ..options import UsageError, argument, option
from ..processing import Processor, load_image
from .annotations import read_captions
from .augment import augment

Streams = tuple[list[list[int]], ...]
"""Token counts of each instance before the first layer and after each, per pruned stream of the model."""
Run = Callable[[str, list[dict], Callable[[dict], object], Callable[[list], list[dict]]], list[dict]]
"""A pass over a split: its name, rows, how a row is prepared, how prepared ones are answered; gives all rows' records."""


@dataclass(frozen=True)
class Answer:
    """What a model says about one instance, and what that cost."""

    flops: flops.Flops

    columns: ClassVar[tuple[str, ...]] = ()
    """Attributes that a record has, in this order; those that are None are left out."""

    def record(self) -> dict:
        """The answer as JSON values, with its cost in GFLOPs."""
        values = {name: getattr(self, name) for name in self.columns if getattr(self, name) is not None}
        return {**values, "gflops": self.flops.official, "gflops_full": self.flops.full}


class Prepared(NamedTuple):
    """A row, ready for the model."""

    images: tuple[Path, ...]
    inputs: Any
    """What the model's processor made of it."""
    text: str | None = None


@dataclass(kw_only=True)
class Inputs:
    """What `madtp TASK` is asked about; subclasses name it by options of their own, too."""

    input: str | None = option(
        "instead: rows such as those below, one per line (-: from standard input); paths are relative to the file, those of "
        "a pipe to the current folder; other fields of a row are passed on to its record",
        metavar="JSONL",
    )

    def rows(self) -> list[dict] | None:
        """The rows that other options than ``--input`` name, with paths from the current folder; None: that option names
        them.

        Raises:
            UsageError: both, or neither.
        """
        raise NotImplementedError

    def defaults(self) -> dict:
        """Fields that rows of ``--input`` may leave out."""
        return {}


@dataclass(kw_only=True)
class ImageInputs(Inputs):
    """Images: files, folders, patterns."""

    images: Sequence[str] = argument(
        "image files, folders (with all their subfolders), or patterns such as 'photos/**/*.jpg'",
        nargs="*",
        metavar="IMAGE",
    )

    def rows(self) -> list[dict] | None:
        if bool(self.images) == bool(self.input):
            raise UsageError("give either images or --input")
        return None if self.input else [{"image": path} for path in find_images(self.images)]


@dataclass(kw_only=True)
class Options:
    """How a task is answered; a field is an option of `madtp TASK` and of `madtp evaluate`."""

    def arguments(self) -> dict:
        """Arguments of :meth:`Task.answer`, defaults included. With "seed", each row gets a number in "seeds".

        Raises:
            UsageError: options that do not go together.
            ValueError, OSError: a file that an option names and that cannot be used.
        """
        return {}


class Recipe(NamedTuple):
    """Of MADTP's script for a task: what `madtp compress` does by default."""

    epochs: int
    batch_size: int
    """Of each of 8 processes."""
    lr: float
    weight_decay: float
    temperature: float = 1.0
    """Where the official controller begins."""
    steps: tuple[tuple[float, float], ...] = (
        (50, 0.5), (30, 0.3), (20, 0.2), (10, 0.1), (5, 0.05), (2, 0.02), (-float("inf"), 0.01),
    )  # fmt: skip
    """(GFLOPs by which the target is missed, step of the temperature): the first row that is exceeded counts."""


class Task:
    """One task; subclasses say what is its own.

    An *instance* is what the processor made of one input; a *batch*, in training, is a dict with ``pixels``, ``texts`` (one
    int64 id tensor each), and what the loss needs.

    Args:
        model: whose processor and sizes are used.
    """

    name: ClassVar[str]
    Config: ClassVar[type[Config]]
    Processor: ClassVar[type[Processor]]
    Model: ClassVar[type[Model]]

    # ---- the command `madtp NAME`, for tasks that have one

    Answer: ClassVar[type[Answer]]
    Inputs: ClassVar[type[Inputs] | None] = None
    Options: ClassVar[type[Options]] = Options
    help: ClassVar[str] = ""
    description: ClassVar[str] = ""
    usage: ClassVar[str] = ""
    """Examples of the command, and of its rows."""
    passed_on: ClassVar[tuple[str, ...]] = ("image",)
    """Fields of a row that its record begins with, also where it failed."""

    # ---- evaluation

    unit: ClassVar[str]
    """What one instance is."""
    step: ClassVar[str]
    """What a row of the evaluation is."""
    headline: ClassVar[str]
    """The figure of quality that stands for the others."""
    streams_of_records: ClassVar[dict[str, tuple[str, tuple[str, ...]]]]
    """Stream -> step, and the fields of its records with token counts; the first stream is that of the images."""
    EvaluationOptions: ClassVar[type[Options]] = Options
    separate_answers: ClassVar[bool] = False
    """Whether :meth:`read` takes ``answers``, a file of their own."""

    # ---- training

    recipe: ClassVar[Recipe]
    score_name: ClassVar[str]
    smallest_batch: ClassVar[int] = 1
    auxiliary: nn.Module | None = None
    """What learns beside the model for the sake of the loss, and is not part of it."""
    aligned: ClassVar[bool] = True
    """Whether the model reads texts with pruning, to which images can be aligned."""
    images_per_example: ClassVar[int] = 1

    def __init__(self, model: Model) -> None:
        self.config, self.processor = model.config, model.processor

    # ---- answers

    def prepare(self, row: dict, folder: Path = Path()) -> Prepared:
        """What the model is given of a row.

        Raises:
            ValueError: a row that is wrong; ImageError, TextError: one that cannot be used.
        """
        image = self.image_path(row, folder)
        return Prepared((image,), self.processor(image))

    @staticmethod
    def image_path(row: dict, folder: Path) -> Path:
        """The image of a row."""
        image = row.get("image")
        if not isinstance(image, str):
            raise ValueError(f"'image' must be a path, got {image!r}")
        return folder / image

    def answer(self, model: Model, instances: Sequence, **options) -> tuple[list[Answer], Any]:
        """Answers to instances, and the model's output for all of them.

        Raises:
            FloatingPointError: the model's dtype cannot hold its activations.
        """
        raise NotImplementedError

    def samples(self, place: int, count: int) -> tuple[int, ...]:
        """Which samples of the vision layers are the images of one of ``count`` instances."""
        return (place,)

    def title(self, prepared: Prepared, answer: Answer) -> str:
        """A line above a picture of the instance."""
        return ""

    # ---- evaluation

    def read(self, path: str | Path, image_root: str | Path, strict: bool = False) -> list:
        """Examples of an annotation file, in its order.

        Args:
            path: in a format of ``docs/annotations.md``.
            image_root: where image paths start.
            strict: images have to be there.

        Raises:
            AnnotationError: a record that is wrong, or an image that is missing.
            OSError: the file cannot be read.
        """
        return read_captions(path, image_root, strict)

    def images_of(self, example: Any) -> tuple[Path, ...]:
        return (example.image,)

    def rows(self, examples: Sequence) -> list[dict]:
        """Examples as rows with labels, which :meth:`prepare` takes; "sample" numbers them from 0.

        Raises:
            ValueError: an example without a label.
        """
        raise NotImplementedError

    def steps(self, run: Run, model: Model, examples: Sequence, **options) -> dict[str, list[dict]]:
        """Ask a model about every example: step -> records, which begin with the row.

        A task has one step or several; figures are computed from records alone.
        """

        def answer(prepared: list[Prepared]) -> list[dict]:
            return [answer.record() for answer in self.answer(model, [row.inputs for row in prepared], **options)[0]]

        return {self.step: run(self.step, self.rows(examples), self.prepare, answer)}

    def quality(self, steps: dict[str, list[dict]], options: dict) -> dict:
        """Figures of quality, {"quality": metric -> value, ...}, from the records of all steps, run with these options."""
        raise NotImplementedError

    # ---- training

    @staticmethod
    def example(images: Sequence[Path], text: str, number: int) -> Any:
        """An example without a label, for calibration."""
        raise NotImplementedError

    def split(self, path: str | Path, image_root: str | Path, training: bool) -> list:
        """Examples that a model is trained on, or (``training`` false) scored on between epochs; errors as :meth:`read`."""
        return self.read(path, image_root, strict=True)

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

    def grouped(self, examples: Sequence, texts: int) -> Sequence:
        """Examples of up to ``texts`` texts about the same image or images, which are then encoded once.

        Raises:
            ValueError: a task whose examples are of one text each.
        """
        if texts > 1:
            raise ValueError(f"texts: this task has one text per image, got {texts}")
        return examples

    def places(self, batch: dict, numbers: Sequence[int]) -> list:
        """What tells the instances of a batch apart and puts them in order, from the numbers of its examples."""
        return list(numbers)

    def at(self, step: int) -> None:
        """Training has come to this step; for tasks whose loss changes with it."""

    def forward(self, model: Model, batch: dict, temperature: float, alignment_features: bool = False) -> Any:
        """The model's output for a batch."""
        return model(batch["pixels"], batch["texts"], temperature, alignment_features=alignment_features)

    def loss(
        self, model: Model, batch: dict, output: Any, temperature: float, seed: Sequence[int]
    ) -> dict[str, Tensor]:
        """Terms of the loss, each a mean over the batch. Random choices depend on ``seed``."""
        raise NotImplementedError

    def alignment_features(self, output: Any, batch: dict) -> tuple[Tensor, Tensor]:
        """``(vision, text)`` alignment features ``[B, M, sd_dim]``."""
        return output.alignment_features

    def states(self, output: Any) -> list[tuple[RaggedBatch, Tensor]]:
        """Final states of the tokens of each pruned stream ``[T, D]``, and their ids ``[T]``."""
        raise NotImplementedError

    def streams(self, output: Any, batch: dict | None = None) -> Streams:
        """Token counts of each instance of a model's output, for a batch in training."""
        return flops.stream_lengths(output.vision), flops.stream_lengths(output.text)

    def costs(self, streams: Streams, guided: bool, written: Sequence[int] = (), beams: int = 1) -> list[flops.Flops]:
        """Cost of each instance at inference.

        Args:
            streams: token counts.
            guided: whether the dictionary was consulted.
            written: tokens that a decoder, where there is one, writes for each instance.
            beams: of its search.
        """
        raise NotImplementedError

    def written(self, batch: dict) -> list[int]:
        """Tokens that a decoder writes for each instance of a batch."""
        return []

    def records(self, model: Model, batch: dict, output: Any) -> list:
        """What the score needs of each instance of a batch of the dev split."""
        raise NotImplementedError

    def score(self, records: Sequence) -> float:
        """The score of the dev split, higher is better, from the records of all instances in their order."""
        return sum(records) / len(records)

    def image(self, path: Path, random: np.random.Generator | None) -> Tensor:
        """Pixels ``[3, S, S]`` of a picture, or of a random view of it."""
        image = load_image(path)
        if random is not None:
            image = augment(image, self.processor.image_size, random)
        return self.processor.image(image)


def not_finite(what: str, model: Model) -> FloatingPointError:
    """The error of a model whose results are no numbers, with what helps."""
    why = (
        "float32 or bfloat16 have the range"
        if model.dtype == torch.float16
        else "its weights are damaged, or have diverged"
    )
    return FloatingPointError(f"{what} are not finite in {model.dtype}; {why}")


def check_finite(model: Model, states) -> None:
    """Raise FloatingPointError if states that a model computed are no numbers."""
    if not states.exact().values.isfinite().all():
        raise not_finite("states", model)


def digested(value: Any) -> str:
    """A digest of JSON values that stands for them among a run's settings."""
    return f"sha256 {hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]}"
