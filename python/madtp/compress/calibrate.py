"""Calibration of a model whose weights stay as they are, from pairs without labels.

MADTP's dictionary is learnt, and the limits of rules that merge tokens are set.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..model import Model
from ..pruning import Calibration, MergingPruning, Pruning, calibrate, original_tokens
from ..rows import first_rows
from ..tasks import TASKS, task_of
from ..tasks.annotations import are_paths, read_lines


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
    for record in read_lines(path):
        row = record.value
        text = next((row[key] for key in ("text", "sentence", "question", "caption") if key in row), None)
        if not isinstance(text, str):
            raise record.error("'text': expected a string")
        images = [row.get("image")] if count == 1 else row.get("images")
        if not are_paths(images, count):
            raise record.error("'image': expected a path" if count == 1 else "'images': expected two paths")
        files = [root / image for image in images]
        for file in files:
            if not file.is_file():
                raise record.error(f"image is not there: {file}")
        examples.append(TASKS[task].example(files, text, record.number))
    return examples


def calibrate_rule(
    model: Model,
    examples: Sequence,
    method: str | MergingPruning,
    reduction: float | None = None,
    *,
    target_gflops: float | None = None,
    inputs: int = 40,
    batch_size: int = 16,
) -> Calibration:
    """Set the limits of a rule for a model and a cost, from examples without labels; nothing is trained.

    Args:
        model: of any task; it keeps its own rule.
        examples: as :func:`read_pairs` returns them. The first ``inputs`` choose the schedule, all meet the cost.
        method: a rule, or its name; see :func:`madtp.pruning.calibrate`.
        reduction: share of the GFLOPs to save, or
        target_gflops: what an instance is to cost on average.
        inputs: how many examples go through the model at once.
        batch_size: of the other passes.

    Raises:
        ValueError: not one of the two targets, or what :func:`madtp.pruning.calibrate` raises.
        ImageError, TextError: an example cannot be used.
    """
    if (reduction is None) == (target_gflops is None):
        raise ValueError("reduction, target_gflops: expected one of them")
    task = task_of(model)
    instances = [task.instance(example) for example in examples]

    def over(instances: list, size: int):
        batches = [task.collate(instances[start : start + size]) for start in range(0, len(instances), size)]

        @torch.inference_mode()
        def forward(rule: Pruning):
            features, costs = [], []
            for batch in batches:
                output = task.forward(model, batch, rule)
                features.append(_read(task.states(output)))
                costs += task.costs(task.streams(output, batch), rule, task.written(batch))
            return torch.cat(features), [cost.official for cost in costs]

        return forward

    model.eval()
    first = over(instances[:inputs], inputs)
    if reduction is None:
        dense = first(Pruning())[1]
        reduction = 1 - target_gflops / (sum(dense) / len(dense))
    many = over(instances, batch_size) if len(instances) > inputs else None
    return calibrate(first, method, reduction, model.config.vision.depth, many=many)


def _read(states: list) -> torch.Tensor:
    """What decides on a model's answers, to compare with the dense model's, from :meth:`madtp.tasks.base.Task.states`.

    Returns:
        ``[N, D]`` the first token of a text that has looked at the images, or the feature of an image; or
        ``[N, T, D]`` all tokens of an image where it is them that others look at.
    """
    recorded = [place for place, (_, trace) in enumerate(states) if trace]
    if not recorded:
        return states[0][0].values
    tokens, trace = states[recorded[-1]]
    if recorded[-1]:
        return first_rows(tokens)
    return original_tokens(tokens, trace).unflatten(0, (tokens.batch_size, -1))
