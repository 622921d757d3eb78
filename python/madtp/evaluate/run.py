"""Every sample once: a model's answers to a test split, at several strengths of pruning, on several processes.

Process r of k takes samples r, r + k, r + 2k, ...; there is no padding, so nothing is counted twice. Answers
are collected in files (:mod:`madtp.jsonl`), and a run that was stopped goes on where it stopped. What a task
asks the model is in :mod:`madtp.tasks`, what the records amount to in `figures`.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .. import jsonl
from ..processes import gathered_lists, processes, rank, wait
from ..pruning import MADTP, Pruning
from ..tasks import task_of
from .figures import figures

__all__ = ["TIMING", "evaluate"]

TIMING = (
    "seconds: of the model alone, from prepared inputs to answers and their costs, per instance in batches "
    "of the size given, after one batch of warm-up for each step; on a CPU no image is decoded meanwhile. "
    "per_second: of all processes together. For retrieval an instance is an image and a text; the matching "
    "of pairs comes on top."
)
"""What the times among the figures are."""


def evaluate(
    model,
    examples: Sequence,
    strengths: Sequence[float] | None = None,
    *,
    batch_size: int = 8,
    folder: str | os.PathLike | None = None,
    settings: dict | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    **options,
) -> tuple[list[dict], dict[float, dict[str, list[dict]]]]:
    """Answer every example at every strength of the model's rule of pruning (of MADTP: at every temperature).

    Args:
        model: of any task, with a processor.
        examples: what the reader of `annotations` for the task gives; labels are needed.
        strengths: each once; by default 0 (dense) and the model's own.
        batch_size: samples that the model gets at a time; times depend on it, figures with grouping "batch".
        folder: where answers are kept while the run goes on, so that it can be stopped and started again; it
            is left there. By default nothing is kept.
        settings: what else determines the answers, as JSON values; a stopped run goes on only under the same
            ones.
        overwrite: begin anew, whatever is in the folder.
        progress: whether to show a bar; by default where standard error is a terminal.
        options: of the task's steps, see :mod:`madtp.tasks`.

    Returns:
        Figures per strength, as :func:`madtp.evaluate.figures.figures` has them (only the first process
        computes them; the list is empty in others), and the records they are computed from: strength ->
        step -> one per instance, in order.

    Raises:
        ValueError: an example without a label, or that the model cannot take; options that make no sense.
        madtp.jsonl.ResumeError: a folder of another run.
    """
    task = task_of(model)
    own = model.pruning
    strengths = list(dict.fromkeys((0.0, own.strength)) if strengths is None else strengths)
    dial = dial_of(own)
    if len(set(strengths)) != len(strengths) or not all(0 <= strength < float("inf") for strength in strengths):
        raise ValueError(f"{dial}s: expected different numbers >= 0, got {strengths}")
    if not examples:
        raise ValueError("examples: expected at least one, got none")
    header = {**(settings or {}), f"{dial}s": strengths, "batch_size": batch_size, "processes": processes()}
    results, records = [], {}
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # Nothing is logged there: it says whose folder this is, and keeps other processes out.
        stack.enter_context(jsonl.Log(folder / f"run-{rank()}", header, overwrite=overwrite))
        if overwrite:
            wait()  # until each has locked its part: nothing is removed from a run that goes on
            if rank() == 0:
                _clear(folder)
            wait()
        try:
            for number, strength in enumerate(strengths):
                model.pruning = own.at(strength)
                steps = _Steps(model, folder, number, batch_size, progress)
                records[strength] = task.steps(steps.run, model, examples, **options)
                if rank() == 0:
                    found = figures(task, records[strength], processes(), options)
                    results.append({"method": own.name, dial: strength, **found})
        finally:
            model.pruning = own
    return results, records


def dial_of(rule: Pruning) -> str:
    """What the strength of a rule is called: "temperature" for MADTP, else "strength"."""
    return "temperature" if isinstance(rule, MADTP) else "strength"


def _clear(folder: Path) -> None:
    """Remove what earlier runs left, of however many processes they were."""
    kept = {f"run-{number}" for number in range(processes())}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


class _Steps:
    """The passes over the samples at one strength."""

    def __init__(self, model, folder: Path, number: int, batch_size: int, progress: bool | None) -> None:
        self.model, self.folder, self.number, self.batch_size = model, folder, number, batch_size
        self.progress = progress if rank() == 0 else False

    def run(
        self, name: str, rows: list[dict], prepare: Callable[[dict], object], answer: Callable[[list], list[dict]]
    ) -> list[dict]:
        """Records of all rows, from all processes: a row with what `answer` gave for it, and "seconds".

        Args:
            name: of what a row is.
            rows: with "sample", which numbers them from 0.
            prepare, answer: from a row to an instance, and from instances to objects.

        Raises:
            ValueError: a row that cannot be used; the figures would not be those of the split.
        """
        path = self.folder / f"{self.number}-{name}-{rank()}.jsonl"
        if not path.exists():  # or it was completed before an interruption
            self._answer(path, name, rows, prepare, answer)
        with open(path, "rb") as lines:
            records = gathered_lists([json.loads(line) for line in lines])
        records.sort(key=lambda record: record["sample"])
        if [record["sample"] for record in records] != list(range(len(rows))):
            raise RuntimeError(f"{path}: {len(records)} records, not one for each of {len(rows)} samples")
        return records

    def _answer(self, path: Path, name: str, rows: list[dict], prepare, answer) -> None:
        # On a GPU images are decoded while it works; on a CPU that would be measured as the model's time.
        ahead, warm = self.model.device.type != "cpu", False
        wait = torch.cuda.synchronize if self.model.device.type == "cuda" else lambda: None

        def prepared(row: dict) -> tuple:
            try:
                return prepare(row), None
            except Exception as error:  # ends the run, from the thread that the run is in
                return None, ValueError(f"{name} {row['sample']}: {error}")

        def timed(batch: list) -> list[dict]:
            nonlocal warm
            inputs = []
            for instance, error in batch if ahead else pool.map(prepared, batch):
                if error:
                    raise error
                inputs.append(instance)
            if not warm:
                answer(inputs)
                warm = True
            wait()
            start = time.perf_counter()
            answers = answer(inputs)
            wait()
            seconds = (time.perf_counter() - start) / len(inputs)
            return [{**given, "seconds": seconds} for given in answers]

        mine = rows[rank() :: processes()]
        with ThreadPoolExecutor(jsonl.READERS) as pool:
            jsonl.run(
                mine,
                path,
                lambda _, row: prepared(row) if ahead else row,
                timed,
                settings={},
                batch_size=self.batch_size,
                keep=list(rows[0]),
                unit=f"{name}s",
                note=lambda: f"{dial_of(self.model.pruning)} {self.model.pruning.strength:g}",
                progress=self.progress,
            )
