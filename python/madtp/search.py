"""The search for the setting at which a fixed model costs what it should."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["BOUNDS", "find_strength"]

BOUNDS = (1e-6, 1e6)
"""Lowest and highest strength; beyond them nothing changes any more."""


def find_strength(
    cost: Callable[[float], float],
    target: float,
    start: float,
    tolerance: float = 0.01,
    bounds: tuple[float, float] = BOUNDS,
) -> float:
    """The strength of a pruning (MADTP: the temperature) at which a model costs ``target``, bracketed and then
    bisected.

    Args:
        cost: measures at a strength, in the unit of the target; falls as the strength rises.
        target: above 0.
        start: where to begin; the nearest of ``bounds`` where it is beyond them.
        tolerance: relative deviation of the cost that is good enough.
        bounds: lowest and highest strength to try.

    Raises:
        ValueError: no strength within the bounds costs so much, or so little; or a start that is not a number.
    """
    if math.isnan(start):
        raise ValueError(f"start: expected a number, got {start}")

    def bounded(strength: float) -> float:
        return min(max(strength, bounds[0]), bounds[1])

    low = high = None  # strengths that cost too much, and too little
    strength = bounded(start)
    for _ in range(60):
        measured = cost(strength)
        if abs(measured - target) <= tolerance * target:
            break
        if measured > target:
            low = strength
        else:
            high = strength
        if strength == bounds[measured > target]:
            raise ValueError(f"target: no strength reaches {target}; {strength:g} costs {measured}")
        if low is None or high is None:
            strength = bounded(strength * 2 if high is None else strength / 2)
            continue
        strength = math.sqrt(low * high)
        if high < low * (1 + 1e-5):
            break  # counts of tokens jump here; nothing lies closer to the target
    return strength
