"""A training run in a directory: a checkpoint from which it goes on exactly, and a log of metrics.

A checkpoint holds everything that the rest of the run depends on, and replaces the one before it in one step,
so that a run killed at any moment goes on from the last one as if nothing had happened: same batches, same
numbers. The log is cut back to the checkpoint then.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch

from ..files import replacing, write_json, writing
from ..resume import ResumeError, require_same

__all__ = ["Run", "Saved"]

CHECKPOINT, METRICS, SETTINGS = "checkpoint.pt", "metrics.jsonl", "settings.json"


class Saved:
    """A part of a checkpoint: what it is under ``saved``, names in the checkpoint to attributes."""

    saved: ClassVar[Mapping[str, str]] = {}

    def state_dict(self) -> dict:
        return {name: copy.copy(getattr(self, attribute)) for name, attribute in self.saved.items()}

    def load_state_dict(self, state: Mapping) -> None:
        for name, attribute in self.saved.items():
            setattr(self, attribute, copy.copy(state[name]))


class Run:
    """What is trained, and where it is kept.

    Args:
        directory: made if it is missing.
        parts: whatever has `state_dict` and `load_state_dict`: model, heads, optimiser, scheduler,
            controller.
        settings: what determines the result, as JSON values; a run goes on only under the same ones.
        defaults: values of settings that a run which does not name them had.

    Attributes:
        step: steps that were done, the sampler's position.

    Raises:
        ResumeError: the directory holds a run with other settings.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        parts: Mapping[str, object],
        settings: dict,
        defaults: Mapping[str, object] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.parts, self.settings = parts, settings
        self.defaults = json.loads(json.dumps(defaults or {}))
        self.step, self.seconds = 0, 0.0
        self._sums: dict[str, float] = {}
        self._counted = 0
        self._since = time.monotonic()
        if (self.directory / CHECKPOINT).exists():
            self._resume()
        self._cut_log()

    def _resume(self) -> None:
        path = self.directory / CHECKPOINT
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            found, wanted = {**self.defaults, **json.loads(state["settings"])}, {**self.defaults, **self.settings}
            require_same(self.directory, found, wanted, "remove it, or name another directory")
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            torch.set_rng_state(state["random"])
            if torch.cuda.is_available() and state["random_cuda"]:
                torch.cuda.set_rng_state_all(state["random_cuda"])
            self.step, self.seconds = state["step"], state["seconds"]
            self._sums, self._counted = state["sums"], state["counted"]
        except (ResumeError, PermissionError, torch.OutOfMemoryError):
            raise
        # What a damaged file makes of it is anything: EOFError, KeyError, Invalid argument, ...
        except Exception as error:
            kind = type(error).__name__
            raise ResumeError(
                f"{path}: damaged, or no checkpoint of such a run ({kind}); remove {self.directory} to begin anew"
            ) from error

    def _cut_log(self) -> None:
        """Drop what was logged after the checkpoint: those steps are done again. Say under which settings they are."""
        write_json(self.directory / SETTINGS, self.settings, indent=1)
        path = self.directory / METRICS
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        kept = []
        for line in filter(None, lines):
            try:
                record = json.loads(line)
            except ValueError:
                break  # a line that was not written whole
            if record["step"] > self.step:
                break
            kept.append(line + b"\n")
        with replacing(path) as file:
            file.write(b"".join(kept))

    def advance(self, **metrics: float) -> None:
        """Count a step, and its metrics for :meth:`averages`."""
        self.step += 1
        self._counted += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def averages(self) -> dict[str, float]:
        """Means of the steps' metrics since the last call; they are part of the checkpoint too."""
        means = {name: round(value / self._counted, 4) for name, value in self._sums.items()}
        self._sums, self._counted = {}, 0
        return means

    def elapsed(self) -> float:
        """Seconds of training so far, over all sittings."""
        return self.seconds + time.monotonic() - self._since

    def log(self, **metrics) -> None:
        """Append a line of metrics at the present step."""
        record = {"step": self.step, "seconds": round(self.elapsed(), 1), **metrics}
        with writing(self.directory / METRICS), open(self.directory / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict]:
        """Everything that was logged."""
        with open(self.directory / METRICS, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]

    def save(self) -> None:
        """Write the checkpoint, once the lines of the present step are in the log: a run that goes on adds none of them."""
        state = {
            "step": self.step,
            "seconds": self.elapsed(),
            "settings": json.dumps(self.settings),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "sums": self._sums,
            "counted": self._counted,
        }
        with replacing(self.directory / CHECKPOINT) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # "unexpected pos", where a write has found the disk full
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
