"""Score and cost of examples under a rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..model import Model
from ..processes import gathered_lists
from ..pruning import Pruning
from ..tasks import Task
from .loaders import evaluation_batches
from .objective import costs_of

__all__ = ["Evaluation", "evaluate"]


class Evaluation(NamedTuple):
    """Of a split under one rule."""

    score: float | None
    gflops: float
    """Mean official GFLOPs of an instance."""
    dense: float
    """The same without pruning."""

    def to_dict(self) -> dict:
        """As JSON values."""
        return {
            "score": self.score,
            "gflops": round(self.gflops, 6),
            "reduction": round(1 - self.gflops / self.dense, 4),
        }


@torch.inference_mode()
def evaluate(
    model: Model,
    task: Task,
    examples: Sequence,
    pruning: Pruning | float,
    *,
    batch_size: int,
    workers: int = 0,
    score: bool = True,
) -> Evaluation:
    """Score and cost of examples, each counted once, however many processes share them; without ``score`` the cost
    only."""
    pruning, found = model.rule(pruning), []
    for numbers, batch in evaluation_batches(task, examples, batch_size=batch_size, workers=workers):
        output = task.forward(model, batch, pruning)
        places = task.places(batch, numbers)
        records = task.records(model, batch, output) if score else [None] * len(places)
        found += zip(places, costs_of(task, output, batch, pruning), records, strict=True)
    found = sorted(gathered_lists(found), key=lambda item: item[0])
    measured, dense = (sum(costs[i] for _, costs, _ in found) / len(found) for i in (0, 1))
    return Evaluation(task.score([record for *_, record in found]) if score else None, measured, dense)
