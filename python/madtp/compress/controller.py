"""How strongly the steps of a training run prune: by a search that follows the cost, or on a ramp to what is known.

Either has the strength of the next step and a state for checkpoints. Only the search asks what a step has cost.
"""

from __future__ import annotations

import math
from typing import ClassVar

from ..search import BOUNDS
from .run import Saved

__all__ = ["BracketController", "RampController"]

_TOLERANCE = 0.02  # relative deviation of the cost that is left alone
_LARGEST = math.log(2.0)  # step, as the logarithm of its factor


class BracketController(Saved):
    """Follows a target cost by bracketing: steps are halved when the target lies behind, and grow until then.

    A model that learns changes what it costs at the same strength, so that a bracket does not stay one. Steps are
    factors, because what a temperature does depends on its ratio to the products with the dictionary.

    Args:
        strength: where to begin (MADTP: the temperature); within the bounds, which it never leaves.
        window: measurements that are averaged before each step.
        bounds: lowest and highest strength.

    Raises:
        ValueError: a strength beyond the bounds.
    """

    saved: ClassVar = {"temperature": "strength", "step": "_step", "side": "_side", "costs": "_costs"}

    def __init__(self, strength: float = 1.0, window: int = 10, bounds: tuple[float, float] = BOUNDS) -> None:
        lowest, highest = self._bounds = bounds
        if not lowest <= strength <= highest:
            raise ValueError(f"strength: expected {lowest:g} to {highest:g}, got {strength}")
        self.strength = float(strength)
        self._window, self._costs = window, []
        self._step, self._side = _LARGEST, 0

    def update(self, cost: float, target: float) -> float:
        """The next strength, after a cost (in any unit) that was measured at the present one."""
        self._costs.append(cost)
        if len(self._costs) < self._window:
            return self.strength
        cost, self._costs = sum(self._costs) / self._window, []
        if abs(cost - target) <= _TOLERANCE * target:
            return self.strength
        side = 1 if cost > target else -1  # a higher strength prunes more
        if side == -self._side:
            self._step = max(self._step / 2, math.log(1.005))
        elif side == self._side:
            self._step = min(self._step * 1.5, _LARGEST)
        self._side = side
        self.strength = min(max(self.strength * math.exp(side * self._step), self._bounds[0]), self._bounds[1])
        return self.strength


class RampController(Saved):
    """For rules whose layers drop a share of their tokens: the strength rises evenly to the goal, and stays.

    A share costs the same whatever the model learns, so that there is nothing to look for after the first step. A
    bracket would even do harm: thresholds follow their shares with a delay, and it would answer to its own past steps,
    ever more loudly.

    Args:
        goal: the strength at which the model costs what it should.
        steps: after which it is reached.
    """

    saved: ClassVar = {"goal": "goal", "taken": "_taken"}

    def __init__(self, goal: float, steps: float) -> None:
        self.goal, self.steps, self._taken = goal, steps, 0

    @property
    def strength(self) -> float:
        """Of the next step."""
        return self.goal * min(self._taken / self.steps, 1.0) if self.steps else self.goal

    def advance(self) -> None:
        """Count a step."""
        self._taken += 1
