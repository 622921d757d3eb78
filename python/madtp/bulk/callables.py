"""Callables for engines that bring rows and take results: Ray Data's `map_batches`, Daft's classes, a loop of one's
own.

    embedder = madtp.Embedder("openai/clip-vit-base-patch32")
    embedder({"image": ["a.jpg", "b.jpg"]})["embedding"]     # float32 [2, 512]

An object is small and can be pickled: the model is loaded at the first call, in the process that makes it. A row that
cannot be answered has its reason in the column "error", and the others of its batch are answered.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from PIL import Image

from .. import predict
from ..pruning import Pruning, rule_named
from ..tasks import TASKS, task_of
from ..weights import load
from .readers import IMAGE_KEYS, Row, Span
from .workers import Failure, attempt

__all__ = ["Answerer", "Captioner", "Embedder", "ImageTask", "answer_all", "to_image"]


def to_image(value) -> str | bytes | Image.Image:
    """Something that `load_image` takes: a path, the bytes of a file, a PIL image, or an array of uint8 [H, W, 3], [H,
    W, 4] or [H, W]; a dictionary with "bytes" or "path", as Hugging Face's datasets have it.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Span):
        return value.read()
    if isinstance(value, (str, os.PathLike, Image.Image)):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    shape = value.shape if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.size else ()
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4)):
        return Image.fromarray(np.array(value[..., 0] if shape[2:] == (1,) else value))  # a copy: it may be read-only
    if value is None or (isinstance(value, float) and value != value):
        raise ValueError("no image: the field is empty")
    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
    raise ValueError(f"image: expected a path, bytes, a PIL image or uint8 [H, W, 3], got {got}")


def answer_all(answer: Callable[[list], list[dict]], instances: list, *, done: bool = False) -> list[dict | Failure]:
    """What a model answers to prepared instances. A batch that it cannot take is halved until the instance is found
    that is to blame, or all fit in memory.

    Args:
        done: whether anything was answered before; where not, and nothing is now, the model is to blame.

    Raises:
        FloatingPointError: none of the first instances has finite results.
    """
    try:
        return answer(instances)
    except (torch.OutOfMemoryError, FloatingPointError) as error:
        if len(instances) > 1:
            # The error's traceback holds the tensors that did not fit.
            error.__traceback__ = None
            half = len(instances) // 2
            found = [
                part for rows in (instances[:half], instances[half:]) for part in answer_all(answer, rows, done=True)
            ]
        else:
            found = [Failure("model", type(error).__name__, str(error).splitlines()[0])]
        if not done and isinstance(error, FloatingPointError) and all(isinstance(one, Failure) for one in found):
            raise
        return found


class Prepare:
    """Turns a row into an instance; picklable, for processes that have no model.

    Args:
        processor: of the model.
        image: whether there is one.
        texts: names of fields that may hold the text, of which the first is taken that a row has; None if there is no
            text.
        text: of rows that have none.
    """

    def __init__(self, processor, image: bool, texts: Sequence[str] | None = None, text: str | None = None) -> None:
        self.processor, self.image, self.texts, self.text = processor, image, texts, text

    def __call__(self, row: Row):
        text = self.text_of(row)
        if not self.image:
            return self.processor.text(text)
        pixels = self.processor.image(to_image(row.image))
        return pixels if text is None else (pixels, self.processor.text(text))

    def text_of(self, row: Row) -> str | None:
        """The text that a row is about, if rows are about texts. Raises ValueError if it has none."""
        if self.texts is None:
            return None
        name = next((name for name in self.texts if name in row.fields), self.texts[0])
        value = row.fields.get(name, self.text)
        if not isinstance(value, str):
            raise ValueError(
                f"no {name!r} in this row" if value is None else f"{name!r} must be a string, got {value!r}"
            )
        return value


class Answering:
    """What the callables share: a model that is loaded when it is needed, and batches of columns.

    Args:
        model: as :func:`madtp.load` takes it; or a model that is loaded, for use in this process only.
        device: "cpu", "cuda", "cuda:1".
        dtype: "float32", "bfloat16" or "float16".
        image: name of the column with images: bytes of files, paths, PIL images, arrays of uint8, dictionaries with
            "bytes" or "path". By default the first of "image", "image_path", "path", "jpg", "png", ... that a batch
            has.
        batch_size: the most rows that the model gets at a time; by default as many as a call has.
        threads: that decode; by default 8.
        method: a rule of pruning by its name in ``madtp.pruning.METHODS``, as a dictionary (``Pruning.to_dict()``), or
            itself; by default the model's.
        strength: of the rule; by default its own.
        options: of :func:`madtp.load`, such as ``temperature``.

    A call takes columns (arrays or lists, by name) and returns the same ones, without images that are no paths, and the
    results. Arrays that it is given are not written to.
    """

    tasks: ClassVar[tuple[str, ...]]
    images: bool = True
    """Whether rows have an image."""

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        image: str | None = None,
        batch_size: int | None = None,
        threads: int = 8,
        method: str | Mapping | Pruning | None = None,
        strength: float | None = None,
        **options,
    ) -> None:
        loaded, settings = isinstance(model, torch.nn.Module), {"method": method, "strength": strength, **options}
        if loaded and (given := [name for name, value in settings.items() if value is not None]):
            raise ValueError(f"{', '.join(given)}: of no use with a model that is loaded already")
        self._method, self._strength = method, strength
        self._source, self._device, self._dtype, self._options = model, str(device), str(dtype), options
        self._image, self._batch_size, self._threads = image, batch_size, threads
        self._model, self._answered = model if loaded else None, False

    def __getstate__(self) -> dict:
        if isinstance(self._source, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__}: made of a loaded model, which stays in its process; name its source instead"
            )
        return {**self.__dict__, "_model": None}

    @property
    def model(self):
        """The model; loaded now if it was not.

        Raises:
            ValueError: a device that is not there, or a model for another task.
        """
        if self._model is None:
            if self._device.startswith("cuda") and not torch.cuda.is_available():
                raise ValueError(
                    f"device: {self._device!r}, but this process sees no GPU (an actor of Ray's does with num_gpus=1)"
                )
            task = self.tasks[0] if self._source == "random:base" else None
            rule = rule_named(self._method) if isinstance(self._method, str) else self._method
            rule = Pruning.from_dict(rule) if isinstance(rule, Mapping) else rule
            options = {"task": task, "pruning": rule, **self._options}
            model = load(
                self._source, device=self._device, dtype=getattr(torch, self._dtype.removeprefix("torch.")), **options
            )
            if model.config.task not in self.tasks:
                expected = " or ".join(map(repr, self.tasks))
                raise ValueError(f"{self._source}: holds a model for task {model.config.task!r}, not {expected}")
            if self._strength is not None:
                model.pruning = model.pruning.at(self._strength)
            self._model = model
        return self._model

    def prepare(self) -> Prepare:
        """What turns a row into an instance for :meth:`answer`, in any process."""
        raise NotImplementedError

    def answer(self, instances: list) -> list[dict]:
        """Results of prepared instances: JSON values, and the array "embedding"."""
        raise NotImplementedError

    def tokens(self, instance) -> int:
        """How many tokens an instance has at the first layer: what fills a batch."""
        pixels, *texts = instance if isinstance(instance, tuple) else (instance,)
        if pixels.dim() == 1:  # a text's ids
            return len(pixels)
        vision = self.model.config.vision
        count = math.prod(side // vision.patch_size for side in pixels.shape[-2:]) + getattr(vision, "prefix", 1)
        return count + sum(len(ids) for ids in texts)

    def columns(self, answers: list[dict | Failure]) -> dict[str, np.ndarray]:
        """The results of a batch, as columns of its length."""
        raise NotImplementedError

    def __call__(self, batch: Mapping[str, Sequence]) -> dict[str, np.ndarray]:
        columns = {name: values if isinstance(values, np.ndarray) else list(values) for name, values in batch.items()}
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns: expected the same length, got {lengths}")
        count = next(iter(lengths.values()), 0)
        key = self._image_column(columns)
        others = [name for name in columns if name != key]
        rows = [
            Row(n, str(n), columns[key][n] if key else None, {name: _plain(columns[name][n]) for name in others})
            for n in range(count)
        ]
        prepare = self.prepare()
        with ThreadPoolExecutor(self._threads) as pool:
            instances = list(pool.map(lambda row: attempt(prepare, row), rows))
        usable = [n for n, instance in enumerate(instances) if not isinstance(instance, Failure)]
        answers, step = list(instances), self._batch_size or max(1, count)
        for start in range(0, len(usable), step):
            places = usable[start : start + step]
            found = answer_all(self.answer, [instances[n] for n in places], done=self._answered)
            self._answered = True
            for n, one in zip(places, found, strict=True):
                answers[n] = one
        errors = [f"{one.kind}: {one.reason}" if isinstance(one, Failure) else None for one in answers]
        kept = {
            name: np.asarray(columns[name]) if isinstance(columns[name], np.ndarray) else _objects(columns[name])
            for name in others
        }
        if key and all(value is None or isinstance(value, (str, os.PathLike)) for value in columns[key]):
            kept = {key: _objects(columns[key]), **kept}
        return {**kept, **self.columns(answers), "error": _objects(errors)}

    def _image_column(self, columns: Mapping[str, Sequence]) -> str | None:
        if not self.images:
            return None
        key = self._image or next((name for name in IMAGE_KEYS if name in columns), None)
        if key not in columns:
            wanted = f"no column {key!r}" if key else "no column with images is known"
            raise ValueError(f"image: {wanted}, the batch has {', '.join(columns) or 'none'}")
        return key


def _plain(value):
    """A value as Python has it: texts of numpy's are strings, too."""
    return value.item() if isinstance(value, np.generic) else value


def _objects(values: Sequence) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = list(values)
    return array


def _counts(answers: list[dict | Failure], name: str) -> np.ndarray:
    """Token counts [N, layers + 1] int32, zeros where there is no result."""
    width = max((len(one[name]) for one in answers if not isinstance(one, Failure)), default=0)
    rows = [[0] * width if isinstance(one, Failure) else one[name] for one in answers]
    return np.array(rows, dtype=np.int32).reshape(len(rows), width)


class Embedder(Answering):
    """Images, or texts, as vectors of length 1 (CLIP, BLIP retrieval).

    Adds the columns "embedding" (float32 [N, D], NaN in rows without a result), "image_tokens" or "text_tokens" (int32
    [N, layers + 1], tokens before the first layer and after each) and "error".

    Args:
        text: name of a column of texts, which are embedded instead of images.
        options: see :class:`Answering`.
    """

    tasks = ("clip", "retrieval")

    def __init__(self, model: str | os.PathLike, *, text: str | None = None, **options) -> None:
        super().__init__(model, **options)
        self._text, self.images = text, text is None

    def prepare(self) -> Prepare:
        return Prepare(self.model.processor, self.images, None if self.images else [self._text])

    @property
    def _tokens(self) -> str:
        return "image_tokens" if self.images else "text_tokens"

    def answer(self, instances: list) -> list[dict]:
        embed = predict.embed_images if self.images else predict.embed_texts
        return [
            {**one.record(), self._tokens: one.tokens, "embedding": one.features.numpy()}
            for one in embed(self.model, instances)[0]
        ]

    def columns(self, answers: list[dict | Failure]) -> dict[str, np.ndarray]:
        vectors = np.full((len(answers), self.width), np.nan, dtype=np.float32)
        for n, one in enumerate(answers):
            if not isinstance(one, Failure):
                vectors[n] = one["embedding"]
        return {"embedding": vectors, self._tokens: _counts(answers, self._tokens)}

    @cached_property
    def width(self) -> int:
        """D, of the model's vectors."""
        processor = self.model.processor
        blank = processor.image(Image.new("RGB", (8, 8))) if self.images else processor.text("a")
        return len(self.answer([blank])[0]["embedding"])


class ImageTask(Answering):
    """Answers of a task that asks about one image, with a text or without.

    Args:
        text: name of the column with texts, if it is not the task's.
        defaults: texts by the task's name for them, for rows that have none.
        arguments: of the task's ``answer``.
        seed: where answers are sampled (``{"top_p": 0.9}``); each image has random numbers of its own, so that its
            answer depends on it and the seed alone.
        options: see :class:`Answering`.
    """

    tasks = tuple(TASKS)

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        text: str | None = None,
        defaults: Mapping[str, str] | None = None,
        arguments: Mapping | None = None,
        seed: int = 0,
        **options,
    ) -> None:
        super().__init__(model, **options)
        self._text, self._defaults, self._arguments, self._seed = text, defaults or {}, dict(arguments or {}), seed

    @property
    def _task(self):
        return task_of(self.model)

    def prepare(self) -> Prepare:
        _, *names = self._task.passed_on  # the image, and what is asked about it
        given = next((self._defaults[name] for name in names if name in self._defaults), None)
        texts = ([self._text] if self._text else names) if names else None
        return Prepare(self.model.processor, True, texts, given)

    def answer(self, instances: list) -> list[dict]:
        arguments = dict(self._arguments)
        if arguments.get("top_p") is not None:
            arguments["seeds"] = [zlib.crc32(pixels.numpy().tobytes(), self._seed) for pixels in instances]
        return [one.record() for one in self._task.answer(self.model, instances, **arguments)[0]]

    def columns(self, answers: list[dict | Failure]) -> dict[str, np.ndarray]:
        return {
            name: _counts(answers, name)
            if name.endswith("_tokens")
            else _objects([None if isinstance(one, Failure) else one.get(name) for one in answers])
            for name in self._task.Answer.columns
        }


class Captioner(ImageTask):
    """Captions of images (BLIP). Adds "caption", "image_tokens" and "error".

    Args:
        generation: of :meth:`madtp.tasks.caption.model.Caption.generate`, such as ``{"num_beams": 1}`` or ``{"top_p":
            0.9}``.
        options: see :class:`ImageTask` and :class:`Answering`.
    """

    tasks = ("caption",)

    def __init__(self, model: str | os.PathLike, *, generation: Mapping | None = None, **options) -> None:
        super().__init__(model, arguments=generation, **options)


class Answerer(ImageTask):
    """Answers to questions about images (BLIP). Adds "answer", "score" of ranked ones, "image_tokens",
    "question_tokens" and "error".

    Args:
        question: for rows that have none in the column "question" (or the one that ``text`` names).
        candidates: answers to choose from; by default answers are written.
        generation: of :meth:`madtp.tasks.vqa.model.VQA.generate`.
        options: see :class:`ImageTask` and :class:`Answering`.
    """

    tasks = ("vqa",)

    def __init__(
        self,
        model: str | os.PathLike,
        *,
        question: str | None = None,
        candidates: Sequence[str] | None = None,
        generation: Mapping | None = None,
        **options,
    ) -> None:
        chosen = {} if candidates is None else {"candidates": list(candidates)}
        defaults = {} if question is None else {"question": question}
        super().__init__(model, defaults=defaults, arguments={**chosen, **(generation or {})}, **options)
