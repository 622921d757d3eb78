"""What a strength of pruning keeps and costs on samples, and the search for one that meets a target."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import flops
from ..config import CLIPConfig
from ..pruning import Tokens
from ..search import search_intervals
from ..tasks import PairsTask, task_of
from .engine import Engine
from .tensors import ragged_ids, texts_of

_log = logging.getLogger("madtp")

_PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")

# Tokens of a text that is counted where none is written yet: a caption, prompt included, as in the official figures; an answer
# of one word.
_CAPTION_TOKENS, _ANSWER_TOKENS = 15, 2

_TOLERANCE = 0.02  # of what a search finds, relative to the target


class Step(NamedTuple):
    """What a strength of pruning does to the samples, on average."""

    strength: float
    """Of the rule: MADTP's temperature."""
    keep_ratio: float
    """Image tokens that leave a layer, as a share of those that enter the first; mean over layers and images."""
    gflops: float | None
    """Of an instance, counted as the official code does (:mod:`madtp.flops`); None where the samples have no texts that the
    model needs."""

    @property
    def temperature(self) -> float:
        """The same, as MADTP calls it."""
        return self.strength


def measure(engine: Engine, samples: Mapping[str, Tensor], strength: float) -> Step:
    """What a strength keeps and costs."""
    if "pixel_values" not in samples:
        raise ValueError(f"samples: expected 'pixel_values', got {', '.join(samples) or 'nothing'}")
    ids, model = samples.get("input_ids"), engine.model
    if task_of(model).aligned and ids is not None and len(ids) != len(samples["pixel_values"]):
        raise ValueError(f"samples: expected a text for each of {len(samples['pixel_values'])} images, got {len(ids)}")
    model.pruning = engine.at(strength)
    with torch.no_grad():
        pixels = {name: samples[name].to(model.device) for name in _PIXELS if name in samples}
        images, trace = engine.images(**pixels)
        vision = flops.stream_lengths(trace)
        shares = [length / lengths[0] for lengths in vision for length in lengths[1:]]
        keep_ratio = sum(shares) / len(shares)
        costs = _costs(engine, vision, images, ids, samples.get("attention_mask"))
    gflops = None if costs is None else sum(cost.official for cost in costs) / len(costs)
    return Step(strength, keep_ratio, gflops)


def _costs(
    engine: Engine, vision: list[list[int]], images: Tokens, ids: Tensor | None, mask: Tensor | None
) -> list[flops.Flops] | None:
    """Cost of each instance of the samples, of whose images are given the token counts before the first layer and after
    each, and the tokens that are left; None where they lack the texts that the model needs."""
    model = engine.model
    task, rule = task_of(model), model.pruning
    if not task.aligned:
        return task.costs((vision,), rule, [_CAPTION_TOKENS] * len(vision))
    if model.config.text is None:
        return task.costs((vision, [None] * len(vision)), rule)
    if ids is None:
        return None
    if isinstance(model.config, CLIPConfig):
        texts, _ = texts_of(model, ids.to(model.device))
        return task.costs((vision, flops.stream_lengths(model.encode_text(texts).trace)), rule)
    texts, _ = ragged_ids(ids.to(model.device), None if mask is None else mask.to(model.device), None)
    looking = flops.stream_lengths(engine.texts(texts, images)[1])
    if not isinstance(task, PairsTask):
        return task.costs((vision, looking), rule, [_ANSWER_TOKENS] * len(vision))
    alone = flops.stream_lengths(engine.texts(texts, None)[1])
    return [
        flops.retrieval(model.config, image=image, text=text, match=(image[-1], counts), pruning=rule)
        for image, text, counts in zip(vision, alone, looking, strict=True)
    ]


def find(engine: Engine, samples: Mapping[str, Tensor], name: str, target: float) -> tuple[Step, tuple[Step, ...]]:
    """The strength that meets a target (``name``: "keep_ratio" or "target_gflops"), and all that were tried on the way.

    Raises:
        ValueError: no strength does, or the samples lack the texts that the cost of an instance needs.
    """
    what, steps = name.removeprefix("target_"), {}

    def value(strength: float) -> float:
        steps[strength] = measure(engine, samples, strength)
        found = getattr(steps[strength], what)
        if found is None:
            raise ValueError(f"samples: {name} needs 'input_ids' too for a model for task {engine.task!r}")
        return found

    found = steps[search_intervals(value, target, name, _TOLERANCE, engine.rule.bounds)]
    if getattr(found, what) < target * (1 - _TOLERANCE):
        _log.warning("%s: %.4g is more than the model costs without pruning, %.4g", name, target, getattr(found, what))
    return found, tuple(steps.values())
