"""What the records of an evaluation amount to: quality, cost, time, and how many tokens were kept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from ..tasks.caption_metrics import caption_scores
from ..tasks.metrics import accuracy, recall, vqa_accuracy
from .tasks import RERANK, shortlists, similarities

__all__ = ["HEADLINE", "UNITS", "figures"]

Steps = dict[str, list[dict]]

HEADLINE = {
    "nlvr": "accuracy",
    "vqa": "accuracy",
    "caption": "CIDEr",
    "retrieval": "r_mean",
    "clip": "r_mean",
}
"""By task: the figure of quality that stands for the others."""
UNITS = {
    "nlvr": "pair",
    "vqa": "question",
    "caption": "image",
    "retrieval": "image and text",
    "clip": "image and text",
}
"""By task: what one instance is."""

_STREAMS = {
    "nlvr": {"image": ("pair", ("left_tokens", "right_tokens")), "text": ("pair", ("text_tokens",))},
    "vqa": {"image": ("question", ("image_tokens",)), "question": ("question", ("question_tokens",))},
    "caption": {"image": ("image", ("image_tokens",))},
    "retrieval": {"image": ("image", ("image_tokens",)), "text": ("text", ("text_tokens",))},
}
_STREAMS["clip"] = _STREAMS["retrieval"]


def figures(task: str, steps: Steps, processes: int = 1, *, rerank: int = RERANK) -> dict:
    """Figures of one temperature, as JSON values.

    Args:
        task: of the model.
        steps: records, as :func:`madtp.evaluate.run.evaluate` gives them.
        processes: that ran side by side.
        rerank: of retrieval.

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
        **_quality(task, steps, rerank),
        "gflops": math.fsum(cost["gflops"] for cost in instance),
        "gflops_full": math.fsum(cost["gflops_full"] for cost in instance),
        "seconds": seconds,
        "per_second": processes / seconds,
        "steps": costs,
        "tokens": {
            stream: _spread(record[field] for record in steps[step] for field in fields)
            for stream, (step, fields) in _STREAMS[task].items()
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


def _quality(task: str, steps: Steps, rerank: int) -> dict:
    if task == "nlvr":
        return _nlvr(steps["pair"])
    if task == "vqa":
        records = dict(enumerate(steps["question"]))
        given = {number: record["answer"] for number, record in records.items()}
        wanted = {number: record["answers"] for number, record in records.items()}
        return {"quality": {"accuracy": vqa_accuracy(given, wanted)}}
    if task == "caption":
        return _caption(steps["image"])
    return _recall(steps, rerank)


def _nlvr(records: Sequence[dict]) -> dict:
    def of(some: Sequence[dict]) -> float:
        return accuracy([record["answer"] for record in some], [record["label"] for record in some])

    found = {"quality": {"accuracy": of(records)}}
    templates = defaultdict(list)
    for record in records:
        if record["template"] is not None:
            templates[record["template"]].append(record)
    if templates:
        found["templates"] = {
            name: {"samples": len(some), "accuracy": of(some)} for name, some in sorted(templates.items())
        }
    return found


def _caption(records: Sequence[dict]) -> dict:
    captions = {record["sample"]: record["caption"] for record in records}
    references = {record["sample"]: record["captions"] for record in records}
    try:
        scores = caption_scores(captions, references)
    except ImportError as error:
        return {"quality": {}, "not_run": {"all metrics": str(error)}}
    return {"quality": scores.scores, "not_run": scores.skipped, "tokenizer": scores.tokenizer}


def _recall(steps: Steps, rerank: int) -> dict:
    similarity = similarities(steps)
    image_to_text, text_to_image = similarity, similarity.mT
    if "match" in steps:
        # BLIP: the similarity plus the logit; who is on no short list comes last.
        again = torch.full_like(similarity, -torch.inf)
        for image, record in enumerate(steps["match"]):
            texts = record["texts"]
            again[image, texts] = similarity[image, texts] + torch.tensor(record["logits"])
        image_to_text, text_to_image = (torch.full_like(a, -torch.inf) for a in (again, again.mT))
        for scores, source, lists in zip(
            (image_to_text, text_to_image), (again, again.mT), shortlists(similarity, rerank), strict=True
        ):
            listed = torch.tensor(lists)
            scores.scatter_(1, listed, source.gather(1, listed))
    found = recall(image_to_text, [record["of_image"] for record in steps["text"]], text_to_image)
    quality = {
        f"{direction} R@{k}": value
        for direction in ("image_to_text", "text_to_image")
        for k, value in getattr(found, direction).items()
    }
    return {"quality": {**quality, "r_mean": found.r_mean}}
