"""What the records of an evaluation amount to: quality, cost, time, and how many tokens were kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..tasks import Task

__all__ = ["figures"]

Steps = dict[str, list[dict]]


def figures(task: Task, steps: Steps, processes: int = 1, options: dict | None = None) -> dict:
    """Figures of one strength, as JSON values.

    Args:
        task: whose records they are.
        steps: records, as :func:`madtp.evaluate.run.evaluate` gives them.
        processes: that ran side by side.
        options: with which the task's steps were run.

    Returns:
        samples: how many of a step's.
        quality: metric -> value; from 0 to 1, but CIDEr. For retrieval "image_to_text R@1" and so on.
        gflops, gflops_full: mean of an instance, without the matching of pairs.
        seconds, per_second: of an instance, see :data:`madtp.evaluate.run.TIMING`.
        steps: the same by step; for "match" per pair of an image and a text.
        tokens: stream -> per layer, before the first and after each, {"min", "mean", "max"}.
        templates: where statements have them, template -> {"samples", "accuracy"}.
        not_run: where a metric could not be computed, name -> why; tokenizer: of captions, see
            :class:`madtp.tasks.caption_metrics.CaptionScores`.
    """
    costs = {name: _costs(name, records, processes) for name, records in steps.items()}
    instance = [cost for name, cost in costs.items() if name != "match"]
    seconds = math.fsum(cost["seconds"] for cost in instance)
    return {
        "samples": {name: len(records) for name, records in steps.items() if name != "match"},
        **task.quality(steps, options or {}),
        "gflops": math.fsum(cost["gflops"] for cost in instance),
        "gflops_full": math.fsum(cost["gflops_full"] for cost in instance),
        "seconds": seconds,
        "per_second": processes / seconds,
        "steps": costs,
        "tokens": {
            stream: _spread(record[field] for record in steps[step] for field in fields)
            for stream, (step, fields) in task.streams_of_records.items()
        },
    }


def _costs(name: str, records: Sequence[dict], processes: int) -> dict:
    count = sum(len(record["logits"]) for record in records) if name == "match" else len(records)
    keys = ("gflops", "gflops_full", "seconds")
    means = {key: math.fsum(record[key] for record in records) / count for key in keys}
    return {"count": count, **means, "per_second": processes / means["seconds"]}


def _spread(samples: Iterable[Sequence[int]]) -> list[dict]:
    return [
        {"min": min(counts), "mean": sum(counts) / len(counts), "max": max(counts)}
        for counts in zip(*samples, strict=True)
    ]
