"""From a batch to the loss: what the task asks, the alignment of the modalities, and what a dense model makes of the
tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from ..guidance import alignment_loss
from ..model import Model
from ..pruning import Pruning
from ..tasks import Task
from .distillation import assignment, distillation_loss
from .settings import Settings
from .thresholds import has_thresholds, scores

__all__ = ["Objective", "Result", "Teacher", "costs_of"]


class Result(NamedTuple):
    """Of a forward in training."""

    loss: Tensor
    terms: dict[str, Tensor]
    """Of the loss, without gradient."""
    costs: tuple[float, float]
    """Official GFLOPs per instance: measured, and without pruning."""
    scores: list[Tensor]
    """``[N]`` per vision layer, of the tokens that may be dropped, for a rule with thresholds."""


class Objective(nn.Module):
    """From a batch to the loss; one module, so that DistributedDataParallel sees one forward."""

    def __init__(self, model: Model, task: Task, settings: Settings) -> None:
        super().__init__()
        self.model, self.task, self.auxiliary = model, task, task.auxiliary
        self.alignment, self.distill, self.labels = settings.alignment, settings.distill, settings.labels
        self.aligns = settings.alignment > 0 and task.aligned

    def forward(
        self, batch: dict, pruning: Pruning | float, seed: Sequence[int], dense: Sequence[RaggedBatch] = ()
    ) -> Result:
        """Loss and cost of a batch. ``dense`` are the states of :class:`Teacher` for the same batch, with
        distillation."""
        pruning = self.model.rule(pruning)
        aligns = self.aligns and pruning.active and pruning.needs_dictionary
        output = self.task.forward(self.model, batch, pruning, aligns)
        terms = self.task.loss(self.model, batch, output, pruning, seed) if self.labels else {}
        if aligns:
            terms["alignment"] = self.alignment * alignment_loss(*self.task.alignment_features(output, batch))
        if self.distill > 0:
            losses = []
            for (tokens, trace), target in zip(self.task.states(output), dense, strict=True):
                rows = assignment(trace) if trace else torch.arange(len(tokens.values), device=tokens.device)
                losses.append(distillation_loss(tokens, rows, target))
            terms["distillation"] = self.distill * sum(losses)
        costs = costs_of(self.task, output, batch, pruning)
        measured, without = (sum(column) / len(costs) for column in zip(*costs, strict=True)) if costs else (0.0, 0.0)
        found = [scores(layer) for layer in output.vision] if has_thresholds(pruning) else []
        return Result(
            sum(terms.values()), {name: term.detach() for name, term in terms.items()}, (measured, without), found
        )


class Teacher:
    """A copy of a model as it is now, which runs without pruning and never learns. It belongs to each process alone.

    Args:
        model: the one that is trained, or another that makes as many tokens of as many numbers.
        task: of the one that is trained.
        dtype: in which the copy computes. Autocast has no say: without it the kernels of inference run, in half the time.
    """

    def __init__(self, model: Model, task: Task, dtype: torch.dtype = torch.float32) -> None:
        self.task, self.dtype = task, dtype
        shared = {id(model.processor): model.processor}  # a tokenizer need not be copied
        self.model = copy.deepcopy(model, shared).requires_grad_(False).to(dtype)

    @torch.no_grad()
    def __call__(self, batch: dict) -> list[RaggedBatch]:
        """Final states of the tokens of each stream of the task."""
        batch = {
            name: value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
        }
        with torch.autocast(self.model.device.type, enabled=False):
            output = self.task.forward(self.model, batch, Pruning())
        return [tokens for tokens, _ in self.task.states(output)]


def costs_of(task: Task, output, batch: dict, pruning: Pruning) -> list[tuple[float, float]]:
    """Official GFLOPs of each instance of a batch: measured, and what it would cost without pruning."""
    streams = task.streams(output, batch)
    unpruned = tuple([[lengths[0]] * len(lengths) for lengths in stream] for stream in streams)
    written = task.written(batch)
    measured = task.costs(streams, pruning, written)
    return [(a.official, b.official) for a, b in zip(measured, task.costs(unpruned, False, written), strict=True)]
