"""Ask a model: from pictures and sentences to answers, with what each answer cost."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .tasks import Answer, task_of
from .tasks.caption import CaptionAnswer
from .tasks.nlvr import NLVRAnswer
from .tasks.pairs import Embedding
from .tasks.vqa import VQAAnswer

__all__ = [
    "Answer",
    "CaptionAnswer",
    "Embedding",
    "NLVRAnswer",
    "VQAAnswer",
    "answer",
    "caption",
    "embed_images",
    "embed_texts",
    "match",
    "nlvr",
    "vqa",
]


def answer(model, inputs: Sequence, batch_size: int = 8, **options) -> list[Answer]:
    """Answers of a model to inputs of its task, in their order.

    Args:
        model: of a task that gives answers, with a processor.
        inputs: what the processor takes; several things as a tuple. Images are paths, bytes of files or PIL images.
        batch_size: how many the model is given at a time.
        options: of the task's ``answer`` (see :mod:`madtp.tasks`).

    Raises:
        ImageError, TextError: the first input that cannot be used (`madtp.jsonl` goes on past such rows).
        FloatingPointError: the model's dtype cannot hold its activations.
        ValueError: inputs that are no sequence or not of as many things as the model takes, or a batch size below 1.
    """
    task, answers = task_of(model), []
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
    if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Sequence):
        raise ValueError(f"inputs: expected a sequence, got a {type(inputs).__name__}")
    if model.processor is None:
        raise ValueError("model: expected one with a processor, as madtp.load gives it")
    takes = inspect.signature(model.processor)
    for start in range(0, len(inputs), batch_size):
        given = [each if isinstance(each, tuple) else (each,) for each in inputs[start : start + batch_size]]
        for number, each in enumerate(given, start):
            try:
                takes.bind(*each)
            except TypeError as error:
                names = ", ".join(takes.parameters)
                raise ValueError(f"inputs[{number}]: expected ({names}), got {len(each)} of them") from error
        answers += task.answer(model, [model.processor(*each) for each in given], **options)[0]
    return answers


def nlvr(model, pairs: Sequence[tuple], batch_size: int = 8) -> list[NLVRAnswer]:
    """Answers to (left image, right image, statement) triples; see :func:`answer`."""
    return answer(_for_task(model, "nlvr"), pairs, batch_size)


def caption(model, images: Sequence, batch_size: int = 8, **options) -> list[CaptionAnswer]:
    """Captions of images; options are those of :meth:`madtp.tasks.caption.CaptionTask.answer`, see :func:`answer`."""
    return answer(_for_task(model, "caption"), images, batch_size, **options)


def vqa(model, questions: Sequence[tuple], batch_size: int = 8, **options) -> list[VQAAnswer]:
    """Answers to (image, question) pairs; options are those of :meth:`madtp.tasks.vqa.VQATask.answer`, see
    :func:`answer`.
    """
    return answer(_for_task(model, "vqa"), questions, batch_size, **options)


def _for_task(model, name: str):
    """The model, which has to be for this task."""
    if task_of(model).name != name:
        raise ValueError(f"model: expected one for task {name!r}, got one for {task_of(model).name!r}")
    return model


def embed_images(model, pixels: Sequence[torch.Tensor]) -> tuple[list[Embedding], Any]:
    """Embeddings of images that `model.processor.image` prepared (BLIP retrieval, CLIP), and the encoder's output."""
    return task_of(model).embed_images(model, pixels)


def embed_texts(model, ids: Sequence[torch.Tensor]) -> tuple[list[Embedding], Any]:
    """Embeddings of texts that `model.processor.text` prepared (BLIP retrieval, CLIP), and the encoder's output."""
    return task_of(model).embed_texts(model, ids)


def match(model, images, ids: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """How well do the texts belong to the images of these (image, text) pairs? Logits of BLIP retrieval's classifier.

    Args:
        images: ``tokens`` of the output of :func:`embed_images`.
        ids: texts as in :func:`embed_texts`.
        pairs: numbers of images and texts.

    BLIP ranks by these logits plus the similarity of the features.
    """
    return task_of(model).match(model, images, ids, pairs)
