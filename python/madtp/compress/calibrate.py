"""Calibration of a model whose weights stay as they are: only the dictionary is learnt, from pairs without labels."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..files import open_regular
from ..model import Model
from ..tasks import TASKS
from ..tasks.annotations import AnnotationError


def freeze_all_but_dictionary(model: Model) -> list[str]:
    """Let only the dictionary and the maps between tokens and dictionary learn; returns their names."""
    names = []
    for name, parameter in model.named_parameters():
        learns = name == "space_dict" or ".q_map." in name
        parameter.requires_grad_(learns)
        if learns:
            names.append(name)
    return names


def read_pairs(path: str | os.PathLike, task: str, image_root: str | os.PathLike | None = None) -> Sequence:
    """Examples without labels from a JSON Lines file.

    A row is {"image": path, "text": ...}, for nlvr {"images": [left, right], "text": ...}; "sentence", "question" and
    "caption" may stand for "text". Paths start from ``image_root``, by default from the folder of the file.

    Raises:
        AnnotationError: a row that is wrong, an image that is missing, or no rows.
        OSError: the file cannot be read.
    """
    path, count = Path(path), TASKS[task].images_per_example
    root = path.parent if image_root is None else Path(image_root)
    examples = []
    with open_regular(path) as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AnnotationError(path, number, f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise AnnotationError(path, number, "expected an object")
        text = next((row[key] for key in ("text", "sentence", "question", "caption") if key in row), None)
        if not isinstance(text, str):
            raise AnnotationError(path, number, "'text': expected a string")
        images = [row.get("image")] if count == 1 else row.get("images")
        wanted = "'image': expected a path" if count == 1 else "'images': expected two paths"
        if not isinstance(images, list) or len(images) != count:
            raise AnnotationError(path, number, wanted)
        if not all(isinstance(image, str) and image for image in images):
            raise AnnotationError(path, number, wanted)
        files = [root / image for image in images]
        for file in files:
            if not file.is_file():
                raise AnnotationError(path, number, f"image is not there: {file}")
        examples.append(TASKS[task].example(files, text, number))
    if not examples:
        raise AnnotationError(path, None, "there are no rows")
    return examples
