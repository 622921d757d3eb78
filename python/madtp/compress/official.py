"""The temperature as MADTP's official scripts move it: once per epoch, by steps from a table."""

from __future__ import annotations

from typing import ClassVar

from ..tasks import Recipe
from .run import Saved


class OfficialController(Saved):
    """Adds to the temperature or takes from it, by how many GFLOPs an epoch's model misses the target.

    The tables are made for the sizes that MADTP was published with. Other than in its scripts the temperature is the
    same on every process, VQA's cost is measured, and 0 (no pruning) is as low as it gets.

    Args:
        recipe: of the task, whose table is followed.
        temperature: where to begin; by default where the task's script does.
    """

    saved: ClassVar = {"temperature": "strength"}

    def __init__(self, recipe: Recipe, temperature: float | None = None) -> None:
        self.strength = recipe.temperature if temperature is None else float(temperature)
        self._steps = recipe.steps

    def update(self, cost: float, target: float) -> float:
        """The next temperature, after the mean official GFLOPs ``cost`` of an instance at the present one."""
        missed = abs(cost - target)
        step = next(step for limit, step in self._steps if missed > limit)
        self.strength = max(0.0, self.strength + (step if cost > target else -step))
        return self.strength
