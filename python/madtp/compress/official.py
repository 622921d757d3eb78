"""The temperature as MADTP's official scripts move it: once per epoch, by steps from a table."""

from __future__ import annotations

import math

_NLVR = ((30, 1.0), (10, 0.5), (5, 0.25), (1, 0.1), (-math.inf, 0.01))
_VQA = ((50, 0.25), (30, 0.15), (10, 0.1), (5, 0.05), (2, 0.01), (-math.inf, 0.0))
_OTHERS = ((50, 0.5), (30, 0.3), (20, 0.2), (10, 0.1), (5, 0.05), (2, 0.02), (-math.inf, 0.01))
# Task -> (GFLOPs by which the target is missed, step), the first row that is exceeded counts.
STEPS = {"nlvr": _NLVR, "vqa": _VQA, "caption": _OTHERS, "retrieval": _OTHERS, "clip": _OTHERS}
START = {"nlvr": 1.0, "vqa": 0.5, "caption": 1.0, "retrieval": 1.0, "clip": 1.0}


class OfficialController:
    """Adds to the temperature or takes from it, by how many GFLOPs an epoch's model misses the target.

    The tables are made for the sizes that MADTP was published with. Other than in its scripts the temperature is the same on
    every process, VQA's cost is measured, and 0 (no pruning) is as low as it gets.

    Args:
        task: whose table.
        temperature: where to begin; by default where the task's script does.
    """

    def __init__(self, task: str, temperature: float | None = None) -> None:
        self.strength, self._steps = START[task] if temperature is None else float(temperature), STEPS[task]

    def update(self, cost: float, target: float) -> float:
        """The next temperature, after the mean official GFLOPs ``cost`` of an instance at the present one."""
        missed = abs(cost - target)
        step = next(step for limit, step in self._steps if missed > limit)
        self.strength = max(0.0, self.strength + (step if cost > target else -step))
        return self.strength

    def state_dict(self) -> dict:
        return {"temperature": self.strength}

    def load_state_dict(self, state: dict) -> None:
        self.strength = state["temperature"]
