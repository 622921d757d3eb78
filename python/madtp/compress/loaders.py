"""Batches for training and evaluation: which examples, in which order, in which process.

The order of an epoch depends on the seed and the epoch, the random view of an example on the seed, the epoch and its
number. So a run that goes on, and a run in several processes, see what an uninterrupted one in a single process sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..processes import processes, rank
from ..tasks import Task


class _Views(Dataset):
    """Examples by (epoch, number); an epoch of None is the example as it is."""

    def __init__(self, task: Task, examples: Sequence, seed: int) -> None:
        self.task, self.examples, self.seed = task, examples, seed

    def __getitem__(self, place: tuple[int | None, int]) -> dict:
        epoch, number = place
        random = None if epoch is None else np.random.default_rng((self.seed, epoch, number))
        return self.task.instance(self.examples[number], random)


def steps_per_epoch(count: int, batch_size: int, accumulate: int) -> int:
    """Whole steps in an epoch; the examples that are left over differ from epoch to epoch.

    Raises:
        ValueError: fewer examples than a step takes.
    """
    size = batch_size * accumulate * processes()
    if count < size:
        raise ValueError(
            f"{count} training examples are fewer than one step takes: batch size {batch_size} x accumulate "
            f"{accumulate} x {processes()} processes"
        )
    return count // size


def training_batches(
    task: Task,
    examples: Sequence,
    *,
    batch_size: int,
    accumulate: int,
    seed: int,
    steps: range,
    views: bool,
    workers: int,
    shuffle: bool = True,
) -> Iterator[dict]:
    """The batches of this process, ``accumulate`` for each step of ``steps``; with ``views`` of random views, with
    ``shuffle`` in another random order in each epoch."""
    together = batch_size * processes()  # what all processes take through the model at the same time
    size, count = together * accumulate, len(examples)
    per_epoch = steps_per_epoch(count, batch_size, accumulate)

    def places() -> Iterator[list[tuple[int | None, int]]]:
        epoch = order = None
        for step in steps:
            if epoch != step // per_epoch:
                epoch = step // per_epoch
                order = np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)
            first = step % per_epoch * size + rank() * batch_size
            for start in range(first, first + size, together):
                numbers = order[start : start + batch_size].tolist()
                yield [(epoch if views else None, number) for number in numbers]

    return iter(_loader(task, examples, seed, places(), workers))


def evaluation_batches(
    task: Task, examples: Sequence, *, batch_size: int, workers: int
) -> Iterator[tuple[list[int], dict]]:
    """The share of this process of all examples, as they are: every one in one process, with its number."""
    numbers = range(rank(), len(examples), processes())
    batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    places = [[(None, number) for number in batch] for batch in batches]
    loader = _loader(task, examples, 0, places, workers)
    return zip(map(list, batches), loader, strict=True)


def _loader(task: Task, examples: Sequence, seed: int, places, workers: int) -> DataLoader:
    return DataLoader(
        _Views(task, examples, seed),
        batch_sampler=places,
        collate_fn=task.collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(0),  # else it draws from the generator that a checkpoint holds
    )
