"""What a strength of pruning keeps and costs on samples, and the search for one that meets a target."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch

from .. import flops
from ..pruning import Tokens
from ..search import search_intervals
from ..tasks import TASKS
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
    if TASKS[engine.task].aligned and ids is not None and len(ids) != len(samples["pixel_values"]):
        raise ValueError(f"samples: expected a text for each of {len(samples['pixel_values'])} images, got {len(ids)}")
    model.pruning = engine.at(strength)
    with torch.no_grad():
        pixels = {name: samples[name].to(model.device) for name in _PIXELS if name in samples}
        images, trace = engine.images(**pixels)
        vision = flops.stream_lengths(trace)
        shares = [length / lengths[0] for lengths in vision for length in lengths[1:]]
        keep_ratio = sum(shares) / len(shares)
        costs = _COSTS[engine.task](engine, vision, images, ids, samples.get("attention_mask"))
    gflops = None if costs is None else sum(cost.official for cost in costs) / len(costs)
    return Step(strength, keep_ratio, gflops)


def _looking(engine: Engine, images: Tokens, ids: Tensor, mask: Tensor | None) -> tuple[RaggedBatch, list[list[int]]]:
    """BLIP's texts, and their token counts with the images in view."""
    device = engine.model.device
    texts, _ = ragged_ids(ids.to(device), None if mask is None else mask.to(device), None)
    return texts, flops.stream_lengths(engine.texts(texts, images)[1])


Counts = list[list[int]]
"""Tokens of each instance before the first layer and after each."""


def _caption_costs(engine: Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    """Cost of each instance of the samples; None where they have no texts."""
    model = engine.model
    return [flops.caption(model.config, lengths, _CAPTION_TOKENS, pruning=model.pruning) for lengths in vision]


def _vqa_costs(engine: Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    if ids is None:
        return None
    model, pairs = engine.model, zip(vision, _looking(engine, images, ids, mask)[1], strict=True)
    return [flops.vqa(model.config, i, t, _ANSWER_TOKENS, pruning=model.pruning) for i, t in pairs]


def _retrieval_costs(engine: Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    if ids is None:
        return None
    model, (texts, looking) = engine.model, _looking(engine, images, ids, mask)
    alone = flops.stream_lengths(engine.texts(texts, None)[1])
    return [
        flops.retrieval(model.config, image=i, text=a, match=(i[-1], t), pruning=model.pruning)
        for i, t, a in zip(vision, looking, alone, strict=True)
    ]


def _clip_costs(engine: Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    model = engine.model
    if model.config.text is None:
        texts = [None] * len(vision)
    elif ids is None:
        return None
    else:
        texts = flops.stream_lengths(model.encode_text(texts_of(model, ids.to(model.device))[0]).trace)
    pairs = zip(vision, texts, strict=True)
    return [flops.clip(model.config, image=i, text=t, pruning=model.pruning) for i, t in pairs]


_COSTS = {"caption": _caption_costs, "vqa": _vqa_costs, "retrieval": _retrieval_costs, "clip": _clip_costs}


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
