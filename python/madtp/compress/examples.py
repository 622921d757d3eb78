"""Where examples come from: annotation files, or pairs of shapes that are drawn as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..data.synthetic import ShapesExamples
from ..tasks import Task

__all__ = ["DRAWN", "digest", "read_examples"]

DRAWN = "shapes:"
"""What a source of examples begins with that is no file."""


def read_examples(task: Task, source: str, image_root: str | None, texts: int = 1, *, training: bool) -> Sequence:
    """Examples of an annotation file, or drawn ones for ``shapes:SPLIT`` (see :meth:`ShapesExamples.parse`).

    Args:
        task: whose format the file has.
        source: path or name.
        image_root: folder that paths start from.
        texts: up to so many texts about the same image make one example.
        training: whether they are trained on.

    Raises:
        AnnotationError: a record that is wrong, or an image that is missing.
        ValueError: a task that has no use for such examples.
        OSError: the file cannot be read.
    """
    if not source.startswith(DRAWN):
        return task.grouped(task.split(source, image_root, training), texts)
    if task.images_per_example != 2:
        raise ValueError(f"{source}: holds statements about two pictures, which a model for {task.name} cannot answer")
    return ShapesExamples.parse(source, texts)


def digest(source: str) -> str:
    """What identifies a source of examples: the name of drawn ones, 16 hexadecimal digits of a file's SHA-256."""
    return source if source.startswith(DRAWN) else hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16]
