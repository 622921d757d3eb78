"""The search for the setting at which a fixed model costs what it should."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

__all__ = ["BOUNDS", "find_strength", "search_intervals"]

BOUNDS = (1e-6, 1e6)
"""Lowest and highest strength; beyond them nothing changes any more."""


def _bounded(strength: float, bounds: tuple[float, float]) -> float:
    return min(max(strength, bounds[0]), bounds[1])


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

    low = high = None  # strengths that cost too much, and too little
    strength = _bounded(start, bounds)
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
            strength = _bounded(strength * 2 if high is None else strength / 2, bounds)
            continue
        strength = math.sqrt(low * high)
        if high < low * (1 + 1e-5):
            break  # counts of tokens jump here; nothing lies closer to the target
    return strength


def search_intervals(
    cost: Callable[[float], float],
    target: float,
    name: str,
    tolerance: float = 0.02,
    bounds: tuple[float, float] = BOUNDS,
) -> float:
    """The strength at which a model costs ``target``, where a higher strength mostly costs less, but not always: a layer in
    which no token would survive MADTP is left alone. So all intervals between the strengths of a ladder may hold the target.

    Args:
        cost: measures at a strength.
        target: above 0.
        name: of the target, for the error.
        tolerance: relative deviation of the cost that will do; the search goes on to a tenth of it while it can.
        bounds: lowest and highest strength to try, besides 0.

    Returns:
        The strength; 0 where the model costs no more than the target without pruning.

    Raises:
        ValueError: no strength that was tried costs so much within the tolerance; with the nearest costs that there are.
    """
    tried: dict[float, float] = {}

    def measured(strength: float) -> float:
        tried[strength] = cost(strength)
        return tried[strength]

    def close(found: float, within: float) -> bool:
        return abs(found / target - 1) <= within

    content = tolerance / 10
    if measured(0.0) <= target or close(tried[0.0], content):
        return 0.0
    last = start = _bounded(1.0, bounds)
    falling = measured(start) > target

    def ladder(factor: float) -> list[tuple[float, float]]:
        """Neighbouring strengths from the start on, within the bounds."""
        rungs = (factor**n for n in range(1, 6))
        return list(pairwise([start, *(rung for rung in rungs if bounds[0] <= rung <= bounds[1])]))

    up, down = ladder(4.0), ladder(0.25)
    for before, strength in up + down if falling else down + up:
        if close(tried[last], content):
            return last
        last = strength
        measured(strength)
        low, high = sorted((before, strength))
        falls = tried[low] > target
        if falls == (tried[high] > target):
            continue
        # Until the next step would change no more than one token.
        while high > low * 1.001 and not close(tried[last], content):
            last = (low * high) ** 0.5
            low, high = (last, high) if (measured(last) > target) == falls else (low, last)
        if close(tried[last], tolerance):
            return last
    best = min(tried, key=lambda strength: abs(tried[strength] - target))
    if close(tried[best], tolerance):
        return best
    reached = sorted(set(tried.values()))
    nearest = [*[r for r in reached if r < target][-1:], *[r for r in reached if r > target][:1]]
    raise ValueError(
        f"{name}: {target:.4g} is out of reach on these samples, which allow {reached[0]:.4g} to {reached[-1]:.4g}; the closest "
        f"{'are' if len(nearest) > 1 else 'is'} {' and '.join(f'{found:.4g}' for found in nearest)}"
    )
