"""Score and cost of examples, and the strength of the pruning at which they cost what they should."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..model import Model
from ..processes import gathered_lists
from ..search import find_strength
from ..tasks import Task
from .loaders import evaluation_batches
from .objective import costs_of

__all__ = ["Evaluation", "evaluate", "strength_for"]


class Evaluation(NamedTuple):
    """Of a split at one strength of the pruning."""

    score: float | None
    gflops: float
    """Mean official GFLOPs of an instance."""
    dense: float
    """The same without pruning."""

    def to_dict(self) -> dict:
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
    temperature: float,
    *,
    batch_size: int,
    workers: int = 0,
    score: bool = True,
) -> Evaluation:
    """Score and cost of examples, each counted once, however many processes share them; without ``score`` the cost only."""
    found = []
    for numbers, batch in evaluation_batches(task, examples, batch_size=batch_size, workers=workers):
        output = task.forward(model, batch, temperature)
        places = task.places(batch, numbers)
        records = task.records(model, batch, output) if score else [None] * len(places)
        found += zip(places, costs_of(task, output, batch, temperature), records, strict=True)
    found = sorted(gathered_lists(found), key=lambda item: item[0])
    measured, dense = (sum(costs[i] for _, costs, _ in found) / len(found) for i in (0, 1))
    return Evaluation(task.score([record for *_, record in found]) if score else None, measured, dense)


def strength_for(
    model: Model, task: Task, examples: Sequence, goal: float, start: float, *, batch_size: int, workers: int = 0
) -> float:
    """The strength at which a model costs a share ``goal`` of what it costs without pruning; ``start`` if there is none."""

    def share(strength: float) -> float:
        found = evaluate(model, task, examples, strength, batch_size=batch_size, workers=workers, score=False)
        return found.gflops / found.dense

    try:
        return find_strength(share, goal, start)
    except ValueError:  # a model that has been trained is not thrown away; its cost is in the result
        return start
