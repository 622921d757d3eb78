"""From a batch to the loss: what the task asks, the alignment of the modalities, and what a dense model makes of the tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from ..guidance import alignment_loss
from ..model import Model
from ..tasks import Task
from ..tasks.losses import distillation_loss
from .settings import Settings

__all__ = ["Objective", "Teacher", "costs_of", "mean_costs"]


class Objective(nn.Module):
    """From a batch to the loss; one module, so that DistributedDataParallel sees one forward."""

    def __init__(self, model: Model, task: Task, settings: Settings) -> None:
        super().__init__()
        self.model, self.task, self.auxiliary = model, task, task.auxiliary
        self.alignment, self.distill, self.labels = settings.alignment, settings.distill, settings.labels
        self.aligns = settings.alignment > 0 and task.aligned

    def forward(
        self, batch: dict, temperature: float, seed: Sequence[int], dense: Sequence[RaggedBatch] = ()
    ) -> tuple[Tensor, dict[str, Tensor], tuple[float, float]]:
        """Loss, its terms without gradient, and official GFLOPs per instance: measured, and without pruning.

        ``dense`` are the states of :class:`Teacher` for the same batch, with distillation.
        """
        aligns = self.aligns and temperature > 0
        output = self.task.forward(self.model, batch, temperature, alignment_features=aligns)
        terms = self.task.loss(self.model, batch, output, temperature, seed) if self.labels else {}
        if aligns:
            terms["alignment"] = self.alignment * alignment_loss(*self.task.alignment_features(output, batch))
        if self.distill > 0:
            streams = zip(self.task.states(output), dense, strict=True)
            terms["distillation"] = self.distill * sum(distillation_loss(*state, target) for state, target in streams)
        costs = mean_costs(self.task, output, batch, temperature)
        return sum(terms.values()), {name: term.detach() for name, term in terms.items()}, costs


class Teacher:
    """A copy of a model as it is now, which runs without pruning and never learns. It belongs to each process alone."""

    def __init__(self, model: Model, task: Task) -> None:
        self.task = task
        shared = {id(model.processor): model.processor}  # a tokenizer need not be copied
        self.model = copy.deepcopy(model, shared).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: dict) -> list[RaggedBatch]:
        """Final states of the tokens of each stream of the task."""
        output = self.task.forward(self.model, batch, 0.0)
        return [tokens for tokens, _ in self.task.states(output)]


def costs_of(task: Task, output, batch: dict, temperature: float) -> list[tuple[float, float]]:
    """Official GFLOPs of each instance of a batch: measured, and what it would cost without pruning."""
    streams = task.streams(output, batch)
    unpruned = tuple([[lengths[0]] * len(lengths) for lengths in stream] for stream in streams)
    written = task.written(batch)
    measured, dense = task.costs(streams, temperature > 0, written), task.costs(unpruned, False, written)
    return [(a.official, b.official) for a, b in zip(measured, dense, strict=True)]


def mean_costs(task: Task, output, batch: dict, temperature: float) -> tuple[float, float]:
    """Means of :func:`costs_of`."""
    columns = zip(*costs_of(task, output, batch, temperature), strict=True)
    measured, dense = (sum(column) / len(column) for column in columns)
    return measured, dense
