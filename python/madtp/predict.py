"""Ask a model: from pictures and sentences to answers, with what each answer cost."""

from __future__ import annotations

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
    """
    task, answers = task_of(model), []
    for start in range(0, len(inputs), batch_size):
        given = [each if isinstance(each, tuple) else (each,) for each in inputs[start : start + batch_size]]
        answers += task.answer(model, [model.processor(*each) for each in given], **options)[0]
    return answers


def nlvr(model, pairs: Sequence[tuple], batch_size: int = 8) -> list[NLVRAnswer]:
    """Answers to (left image, right image, statement) triples; see :func:`answer`."""
    return answer(model, pairs, batch_size)


def caption(model, images: Sequence, batch_size: int = 8, **options) -> list[CaptionAnswer]:
    """Captions of images; options are those of :meth:`madtp.tasks.caption.CaptionTask.answer`, see :func:`answer`."""
    return answer(model, images, batch_size, **options)


def vqa(model, questions: Sequence[tuple], batch_size: int = 8, **options) -> list[VQAAnswer]:
    """Answers to (image, question) pairs; options are those of :meth:`madtp.tasks.vqa.VQATask.answer`, see
    :func:`answer`.
    """
    return answer(model, questions, batch_size, **options)


def embed_images(model, pixels: Sequence[torch.Tensor]) -> tuple[list[Embedding], Any]:
    """Embeddings of images that `model.processor.image` prepared (BLIP retrieval, CLIP), and the encoder's output."""
    return task_of(model).embed_images(model, pixels)


def embed_texts(model, ids: Sequence[torch.Tensor]) -> tuple[list[Embedding], Any]:
    """Embeddings of texts that `model.processor.text` prepared (BLIP retrieval, CLIP), and the encoder's output."""
    return task_of(model).embed_texts(model, ids)


def match(model, images, ids: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """How well do the texts belong to the images of these (image, text) pairs? Logits of BLIP retrieval's classifier.

    Args:
        images: ``stream`` of the output of :func:`embed_images`.
        ids: texts as in :func:`embed_texts`.
        pairs: numbers of images and texts.

    BLIP ranks by these logits plus the similarity of the features.
    """
    return task_of(model).match(model, images, ids, pairs)
