"""How other code bases name the weights: one module per layout, each with its mapping as a table and three functions.

    task_of(keys)           the task whose model has these keys, or None if they are not of this layout
    to_ours(state, task)    their key names to ours
    from_ours(state)        and back

`to_ours` takes keys that are ours already as they are. Weights that our models have no use for are named by a table too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from . import blip, blip_hugging_face, clip, clip_hugging_face

# In the order in which they are asked; the first that knows the keys is taken.
LAYOUTS: tuple[ModuleType, ...] = (blip, blip_hugging_face, clip, clip_hugging_face)

# `model_type` in a config.json that transformers wrote -> layout. These have two functions more:
#     config_of(settings, state, task)    sizes from that file
#     parts_of(key)                       the names of their weights that one of ours is stacked of
HUGGING_FACE: dict[str, ModuleType] = {"blip": blip_hugging_face, "clip": clip_hugging_face}


def recognise(state: Mapping[str, Tensor]) -> tuple[ModuleType, str] | None:
    """The layout of a state dict and the task of its model; None if no layout knows it."""
    for layout in LAYOUTS:
        task = layout.task_of(state)
        if task is not None:
            return layout, task
    return None


def for_task(task: str) -> ModuleType:
    """The layout of a task's original checkpoints."""
    return next(layout for layout in LAYOUTS if task in layout.TASKS)
