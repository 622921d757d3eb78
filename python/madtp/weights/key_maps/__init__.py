"""How other code bases name the weights: a table per layout, and what is read from their configurations.

    task_of(keys)                       the task whose model has these keys, or None if they are not of this layout
    to_ours(state, task)                their key names to ours
    from_ours(state)                    and back
    config_of(settings, state, task)    sizes, where a configuration lies beside the weights

`to_ours` takes keys that are ours already as they are. Weights that our models have no use for are named by a table too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from . import blip, blip_hugging_face, clip, open_clip
from .transformers_towers import FAMILIES

# `model_type` in a config.json that transformers wrote -> layout.
HUGGING_FACE: dict[str, Any] = {"blip": blip_hugging_face, **FAMILIES}

# In the order in which they are asked; the first that knows the keys is taken.
LAYOUTS: tuple[Any, ...] = (blip, blip_hugging_face, clip, FAMILIES["clip"], FAMILIES["siglip"])

__all__ = ["FAMILIES", "HUGGING_FACE", "LAYOUTS", "for_task", "open_clip", "recognise"]


def recognise(state: Mapping[str, Tensor]) -> tuple[Any, str] | None:
    """The layout of a state dict and the task of its model; None if no layout knows it."""
    for layout in LAYOUTS:
        task = layout.task_of(state)
        if task is not None:
            return layout, task
    return None


def for_task(task: str) -> Any:
    """The layout of a task's original checkpoints."""
    return next(layout for layout in LAYOUTS if task in layout.TASKS)
