"""The search for the temperature at which a model costs what it should, while it goes on learning."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["TEMPERATURES", "TemperatureController", "find_temperature"]

TEMPERATURES = (1e-6, 1e6)
"""Lowest and highest; beyond them nothing changes any more."""


class TemperatureController:
    """Follows a target cost by bracketing: steps are halved when the target lies behind, and grow until then.

    A model that learns changes what it costs at the same temperature, so that a bracket does not stay one.
    Steps are factors, because what a temperature does depends on its ratio to the products with the
    dictionary.

    Args:
        temperature: where to begin; within :data:`TEMPERATURES`, which it never leaves.
        tolerance: relative deviation of the cost that is left alone.
        step: largest factor of one step.
        window: measurements that are averaged before each step.

    Raises:
        ValueError: a temperature beyond the bounds, or a step that is none.
    """

    def __init__(
        self, temperature: float = 1.0, tolerance: float = 0.02, step: float = 2.0, window: int = 10
    ) -> None:
        lowest, highest = TEMPERATURES
        if not lowest <= temperature <= highest:
            raise ValueError(f"temperature: expected {lowest:g} to {highest:g}, got {temperature}")
        if not step > 1:
            raise ValueError(f"step: expected a factor > 1, got {step}")
        self.temperature, self.tolerance, self.largest = float(temperature), tolerance, math.log(step)
        self._window, self._costs = window, []
        self._step, self._side = self.largest, 0

    def update(self, cost: float, target: float) -> float:
        """The next temperature, after a cost (in any unit) that was measured at the present one."""
        self._costs.append(cost)
        if len(self._costs) < self._window:
            return self.temperature
        cost, self._costs = sum(self._costs) / self._window, []
        if abs(cost - target) <= self.tolerance * target:
            return self.temperature
        side = 1 if cost > target else -1  # a higher temperature prunes more
        if side == -self._side:
            self._step = max(self._step / 2, math.log(1.005))
        elif side == self._side:
            self._step = min(self._step * 1.5, self.largest)
        self._side = side
        self.temperature = _bounded(self.temperature * math.exp(side * self._step))
        return self.temperature

    def state_dict(self) -> dict:
        return {"temperature": self.temperature, "step": self._step, "side": self._side, "costs": self._costs}

    def load_state_dict(self, state: dict) -> None:
        self.temperature, self._step, self._side = state["temperature"], state["step"], state["side"]
        self._costs = list(state["costs"])


def find_temperature(
    cost: Callable[[float], float], target: float, start: float, tolerance: float = 0.01
) -> float:
    """The temperature at which a fixed model costs ``target``, bracketed and then bisected.

    Args:
        cost: measures at a temperature, in the unit of the target; falls as the temperature rises.
        target: above 0.
        start: where to begin; the nearest of :data:`TEMPERATURES` where it is beyond them.
        tolerance: relative deviation of the cost that is good enough.

    Raises:
        ValueError: no temperature within the bounds costs so much, or so little; or a start that is not a number.
    """
    if math.isnan(start):
        raise ValueError(f"start: expected a number, got {start}")
    low = high = None  # temperatures that cost too much, and too little
    temperature = _bounded(start)
    for _ in range(60):
        measured = cost(temperature)
        if abs(measured - target) <= tolerance * target:
            break
        if measured > target:
            low = temperature
        else:
            high = temperature
        if temperature == TEMPERATURES[measured > target]:
            raise ValueError(f"target: no temperature reaches {target}; {temperature:g} costs {measured}")
        if low is None or high is None:
            temperature = _bounded(temperature * 2 if high is None else temperature / 2)
            continue
        temperature = math.sqrt(low * high)
        if high < low * (1 + 1e-5):
            break  # counts of tokens jump here; nothing lies closer to the target
    return temperature


def _bounded(temperature: float) -> float:
    return min(max(temperature, TEMPERATURES[0]), TEMPERATURES[1])
