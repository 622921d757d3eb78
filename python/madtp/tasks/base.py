"""The interface of a task: all that `predict`, `evaluate`, `compress` and the commands know of one."""

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
from ..model import Model
from ..options import UsageError, argument, option
from ..pictures import load_image
from ..processing import Processor
from ..pruning import LayerTrace, Pruning
from .annotations import CaptionExample, is_path, read_captions
from .augment import augment

Streams = tuple[list[list[int]], ...]
"""Token counts of each instance before the first layer and after each, per pruned stream of the model."""
Run = Callable[[str, list[dict], Callable[[dict], object], Callable[[list], list[dict]]], list[dict]]
"""One pass over a split: (name, rows, prepare a row, answer a batch of prepared rows) -> a record for each row."""


@dataclass(frozen=True)
class Answer:
    """A model's answer to one instance, and its cost."""

    flops: flops.Flops

    columns: ClassVar[tuple[str, ...]] = ()
    """Attributes to record, in this order; None is left out."""

    def record(self) -> dict:
        """The answer as JSON values, with its GFLOPs."""
        values = {name: getattr(self, name) for name in self.columns if getattr(self, name) is not None}
        return {**values, "gflops": self.flops.official, "gflops_full": self.flops.full}


class Prepared(NamedTuple):
    """A row that is ready for the model."""

    images: tuple[Path, ...]
    inputs: Any
    """The processor's result."""
    text: str | None = None


@dataclass(kw_only=True)
class Inputs:
    """The inputs of `madtp TASK`; a task adds options that name them directly."""

    input: str | None = option(
        "read rows like the one below instead, one per line (-: standard input); paths start from the folder of the "
        "file, or from the current one for a pipe; other fields of a row are copied to its record",
        metavar="JSONL",
    )

    def rows(self) -> list[dict] | None:
        """The rows that options name directly, with paths from the current folder; None if ``--input`` names them.

        Raises:
            UsageError: both are given, or neither.
        """
        raise NotImplementedError

    def defaults(self) -> dict:
        """Values for fields that rows of ``--input`` leave out."""
        return {}


@dataclass(kw_only=True)
class ImageInputs(Inputs):
    """Images, by files, folders or patterns."""

    images: Sequence[str] = argument(
        "image files, folders (searched recursively), or patterns such as 'photos/**/*.jpg'", nargs="*", metavar="IMAGE"
    )

    def rows(self) -> list[dict] | None:
        if bool(self.images) == bool(self.input):
            raise UsageError("give either images or --input")
        return None if self.input else [{"image": path} for path in find_images(self.images)]


@dataclass(kw_only=True)
class Options:
    """How answers are found; each field is an option of `madtp TASK` and `madtp evaluate`."""

    def arguments(self) -> dict:
        """Arguments for :meth:`Task.answer`, defaults included; "seed" becomes "seeds", one per row.

        Raises:
            UsageError: options that exclude each other.
            ValueError, OSError: an option names a file that cannot be used.
        """
        return {}


class Recipe(NamedTuple):
    """Defaults of `madtp compress`, from MADTP's script for the task."""

    epochs: int
    batch_size: int
    """Per process; the scripts use 8."""
    lr: float
    weight_decay: float
    temperature: float = 1.0
    """Initial temperature of the official controller."""
    steps: tuple[tuple[float, float], ...] = (
        (50, 0.5), (30, 0.3), (20, 0.2), (10, 0.1), (5, 0.05), (2, 0.02), (-float("inf"), 0.01),
    )  # fmt: skip
    """Its steps: (miss, change of the temperature); the first row whose miss in GFLOPs is exceeded applies."""


class Task:
    """One task. Subclasses override what is specific to it.

    An *instance* is what the processor returns for one input. In training, a *batch* is a dict with ``pixels``,
    ``texts`` (one int64 id tensor each), and whatever the loss needs.

    Args:
        model: provides the processor and the configuration.
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
    """Fields of a row that its record starts with, even if the row fails."""

    # ---- evaluation

    unit: ClassVar[str]
    """Noun for one instance, and name of the step in which an evaluation asks about all of them."""
    headline: ClassVar[str]
    """The metric to plot."""
    streams_of_records: ClassVar[dict[str, tuple[str, tuple[str, ...]]]]
    """Stream -> (step, fields of its records that hold token counts); images come first."""
    EvaluationOptions: ClassVar[type[Options]] = Options
    separate_answers: ClassVar[bool] = False
    """Whether :meth:`read` takes ``answers``, a separate file."""

    # ---- training

    recipe: ClassVar[Recipe]
    score_name: ClassVar[str]
    smallest_batch: ClassVar[int] = 1
    auxiliary: nn.Module | None = None
    """Heads that only the loss needs; trained with the model, not saved with it."""
    aligned: ClassVar[bool] = True
    """Whether the model prunes texts, so that images can be aligned with them."""
    images_per_example: ClassVar[int] = 1

    def __init__(self, model: Model) -> None:
        self.config, self.processor = model.config, model.processor

    # ---- answers

    def prepare(self, row: dict, folder: Path = Path()) -> Prepared:
        """Turn a row into an instance.

        Raises:
            ValueError: the row is malformed; ImageError, TextError: its image or text cannot be used.
        """
        image = image_of(row, folder)
        return Prepared((image,), self.processor(image))

    def answer(self, model: Model, instances: Sequence, **options) -> tuple[list[Answer], Any]:
        """Answer a batch of instances; also returns the model's output.

        Raises:
            FloatingPointError: the model's dtype cannot hold its activations.
        """
        raise NotImplementedError

    def samples(self, place: int, count: int) -> tuple[int, ...]:
        """Which samples of the vision traces are the images of instance ``place`` of ``count``."""
        return (place,)

    def title(self, prepared: Prepared, answer: Answer) -> str:
        """Title for a picture of the instance."""
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
        """Picture files of an example."""
        return (example.image,)

    def rows(self, examples: Sequence) -> list[dict]:
        """Rows with labels for :meth:`prepare`; "sample" counts them from 0.

        Raises:
            ValueError: an example has no label.
        """
        raise NotImplementedError

    def steps(self, run: Run, model: Model, examples: Sequence, **options) -> dict[str, list[dict]]:
        """Ask a model about every example: step -> records, each of which starts with its row.

        Figures are computed from these records alone.
        """

        def answer(prepared: list[Prepared]) -> list[dict]:
            return [answer.record() for answer in self.answer(model, [row.inputs for row in prepared], **options)[0]]

        return {self.unit: run(self.unit, self.rows(examples), self.prepare, answer)}

    def quality(self, steps: dict[str, list[dict]], options: dict) -> dict:
        """Metrics, as {"quality": {metric: value}, ...}, from the records of all steps and the options of the run."""
        raise NotImplementedError

    # ---- training

    @staticmethod
    def example(images: Sequence[Path], text: str, number: int) -> Any:
        """An unlabelled example, for calibration."""
        return CaptionExample(images[0], number, (text,))

    def split(self, path: str | Path, image_root: str | Path, training: bool) -> list:
        """Examples to train on or, if not ``training``, to score on between epochs; raises as :meth:`read`."""
        return self.read(path, image_root, strict=True)

    def instance(self, example: Any, random: np.random.Generator | None = None) -> dict:
        """Turn an example into an instance; with ``random``, a random view of it, for training.

        Raises:
            ImageError, TextError: its image or text cannot be used.
        """
        raise NotImplementedError

    def collate(self, instances: Sequence[dict]) -> dict:
        """Join instances into a batch."""
        return {
            "pixels": torch.stack([instance["pixels"] for instance in instances]),
            "texts": [instance["text"] for instance in instances],
        }

    def grouped(self, examples: Sequence, texts: int) -> Sequence:
        """Group up to ``texts`` texts about the same images into one example, so that the images are encoded once.

        Raises:
            ValueError: the task has one text per image.
        """
        if texts > 1:
            raise ValueError(f"texts: this task has one text per image, got {texts}")
        return examples

    def places(self, batch: dict, numbers: Sequence[int]) -> list:
        """Sort keys of the instances of a batch, from the numbers of its examples."""
        return list(numbers)

    def at(self, step: int) -> None:
        """Called at each step of training, for losses that change with it."""

    def forward(self, model: Model, batch: dict, pruning: Pruning | float, alignment_features: bool = False) -> Any:
        """The model's output for a batch."""
        return model(batch["pixels"], batch["texts"], pruning, alignment_features)

    def loss(
        self, model: Model, batch: dict, output: Any, pruning: Pruning | float, seed: Sequence[int]
    ) -> dict[str, Tensor]:
        """Terms of the loss, each a mean over the batch. Random choices depend on ``seed``."""
        raise NotImplementedError

    def alignment_features(self, output: Any, batch: dict) -> tuple[Tensor, Tensor]:
        """``(vision, text)`` alignment features ``[B, M, sd_dim]``."""
        return output.alignment_features

    def states(self, output: Any) -> list[tuple[RaggedBatch, list[LayerTrace]]]:
        """Final states of the tokens of each pruned stream ``[T, D]`` and its records; without records for features."""
        raise NotImplementedError

    def streams(self, output: Any, batch: dict | None = None) -> Streams:
        """Token counts of each instance of a model's output, for a batch in training."""
        return flops.stream_lengths(output.vision), flops.stream_lengths(output.text)

    def costs(
        self, streams: Streams, pruning: Pruning | bool, written: Sequence[int] = (), beams: int = 1
    ) -> list[flops.Flops]:
        """Cost of each instance at inference.

        Args:
            streams: token counts.
            pruning: the rule that was active; True: MADTP, False: none.
            written: tokens that a decoder, where there is one, writes for each instance.
            beams: of its search.
        """
        raise NotImplementedError

    def written(self, batch: dict) -> list[int]:
        """Tokens that a decoder writes for each instance of a batch."""
        return []

    def records(self, model: Model, batch: dict, output: Any) -> list:
        """What :meth:`score` needs to know of each instance of a batch."""
        raise NotImplementedError

    def score(self, records: Sequence) -> float:
        """The score of the dev split (higher is better) from all records, in order."""
        return sum(records) / len(records)

    def image(self, path: Path, random: np.random.Generator | None) -> Tensor:
        """Pixels ``[3, S, S]`` of a picture, or of a random view of it."""
        image = load_image(path)
        if random is not None:
            image = augment(image, self.processor.image_size, random)
        return self.processor.image(image)


def image_of(row: dict, folder: Path) -> Path:
    """The path of a row's image."""
    image = row.get("image")
    if not is_path(image):
        raise ValueError(f"'image' must be a path, got {image!r}")
    return folder / image


def not_finite(what: str, model: Model) -> FloatingPointError:
    """The error for results that are not finite, with a remedy."""
    why = (
        "float32 or bfloat16 have the range"
        if model.dtype == torch.float16
        else "its weights are damaged, or have diverged"
    )
    return FloatingPointError(f"{what} are not finite in {model.dtype}; {why}")


def check_finite(model: Model, states) -> None:
    """Raise FloatingPointError unless all states are finite."""
    if not states.exact().values.isfinite().all():
        raise not_finite("states", model)


def digested(value: Any) -> str:
    """A digest of JSON values, to record them among a run's settings."""
    return f"sha256 {hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]}"
