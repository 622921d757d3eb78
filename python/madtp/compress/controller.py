"""The search for the temperature at which a model costs what it should, while it goes on learning."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["TemperatureController", "find_temperature"]


class TemperatureController:
    """Follows a target cost by bracketing: steps are halved when the target lies behind, and grow until then.

    A model that learns changes what it costs at the same temperature, so that a bracket does not stay one.
    Steps are factors, because what a temperature does depends on its ratio to the products with the
    dictionary.

    Args:
        temperature: where to begin; above 0.
        tolerance: relative deviation of the cost that is left alone.
        step: largest factor of one step.
        window: measurements that are averaged before each step.
    """

    def __init__(
        self, temperature: float = 1.0, tolerance: float = 0.02, step: float = 2.0, window: int = 10
    ) -> None:
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
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
        self.temperature *= math.exp(side * self._step)
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
        start: above 0.
        tolerance: relative deviation of the cost that is good enough.

    Raises:
        ValueError: no temperature between 1e-6 and 1e6 costs so much, or so little.
    """
    low = high = None  # temperatures that cost too much, and too little
    temperature = start
    for _ in range(60):
        if not 1e-6 < temperature < 1e6:
            raise ValueError(
                f"target: no temperature reaches {target}; {low or high} costs {cost(low or high)}"
            )
        measured = cost(temperature)
        if abs(measured - target) <= tolerance * target:
            break
        if measured > target:
            low = temperature
        else:
            high = temperature
        temperature = (
            temperature * 2 if high is None else temperature / 2 if low is None else math.sqrt(low * high)
        )
        if low and high and high < low * (1 + 1e-5):
            break  # counts of tokens jump here; nothing lies closer to the target
    return temperature
