"""Limits of a merging rule for a wanted cost, from a few inputs without labels: layer after layer, several schedules,
the best stays.

Nothing is trained. A schedule says how many tokens each layer is to merge on average; thresholds follow as quantiles of
the scores in one forward, and the schedule is scaled until the inputs cost what is wanted. Of several schedules the one
whose features are most like the dense model's is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import LayerTrace, Pruning, rule_named
from .merging import MergingPruning

Forward = Callable[[Pruning], tuple[Tensor, "Sequence[float] | Tensor"]]
"""All calibration inputs through the model under a rule, in one batch: what the model makes of each, features ``[N, D]``
or tokens ``[N, T, D]`` (see :func:`madtp.pruning.original_tokens`), and GFLOPs of each input ``[N]``."""


@dataclass(frozen=True)
class Schedule:
    """How the tokens that go are spread over the layers."""

    kind: str
    """"counts": numbers of tokens, or "shares" of the tokens that are left."""
    weight: Callable[[float, int], float]
    """What a layer merges relative to the others, by its depth from 0 (first) to 1 (last) and its number."""
    most_later: float = math.inf
    """What a layer merges at most, but for the first two."""

    def limits(self, scale: float, layers: int) -> tuple[float, ...]:
        """The limit of each layer at a scale."""
        values = [scale * self.weight(layer / max(layers - 1, 1), layer) for layer in range(layers)]
        values = [value if layer < 2 else min(value, self.most_later) for layer, value in enumerate(values)]
        return tuple(min(value, 1.0) for value in values) if self.kind == "shares" else tuple(values)


SCHEDULES: dict[str, Schedule] = {
    "steep": Schedule("counts", lambda depth, layer: 2 * depth),
    "rising": Schedule("counts", lambda depth, layer: 0.5 + depth),
    "flat": Schedule("counts", lambda depth, layer: 1.0),
    "shares": Schedule("shares", lambda depth, layer: 1.0),
    "early": Schedule("shares", lambda depth, layer: 4.0 if layer < 2 else 1.0),
    "first": Schedule("shares", lambda depth, layer: 1.2 if layer == 0 else 1.0, most_later=0.06),
}
"""From those by which late layers merge most to those by which the first do: a search may go from one to the next."""


@dataclass(frozen=True)
class Calibration:
    """A rule with its limits set, and what is known of it."""

    rule: MergingPruning
    target: float
    """Share of the dense model's GFLOPs that was to be saved."""
    saving: float
    """Share that the inputs save on average."""
    deviation: float
    """Standard deviation of the saving over inputs: divided by the square root of their number, the error of the
    mean."""
    least: float
    most: float
    """Saving of the input that saves least, and of the one that saves most."""
    cosine: float
    """Mean cosine of features, or of tokens, to the dense model's."""
    cosine_p10: float
    """Its tenth percentile."""
    inputs: int
    schedule: str
    gflops: float
    dense_gflops: float
    tried: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Saving and mean cosine of every schedule, and of the best one with other variants of the rule."""

    @property
    def uncertainty(self) -> float:
        """How far from :attr:`saving` the mean of as many other inputs of the kind may be (two standard errors)."""
        return 2 * self.deviation / math.sqrt(self.inputs)

    def inputs_for(self, uncertainty: float) -> int:
        """How many inputs it takes for an uncertainty, as 0.01."""
        return math.ceil((2 * self.deviation / uncertainty) ** 2)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, the rule as it describes itself."""
        return {**asdict(replace(self, rule=None)), "rule": self.rule.to_dict()}


def calibrate(
    forward: Forward,
    method: str | MergingPruning,
    target: float,
    layers: int,
    *,
    schedule: str | None = None,
    adaptive: bool | None = None,
    many: Forward | None = None,
    tolerance: float = 0.002,
) -> Calibration:
    """Set a rule's limits so that a model costs what is wanted.

    Args:
        forward: the model on 20 to 40 inputs without labels. It is called with rules that have to see all inputs at
            once.
        method: a rule, or the name of one in :data:`METHODS` that merges.
        target: share of the dense model's GFLOPs to save, between 0 and 1.
        layers: of the stream that the rule prunes.
        schedule: one of :data:`SCHEDULES`; by default the best: from "flat", "shares" and "early", the search goes on
            to the neighbours of the best one as long as that helps.
        adaptive: thresholds, by which every input keeps its own number of tokens, or the same counts for all; by
            default what the rule is made for.
        many: the model on more inputs, in batches of any size, over which the cost is met in the end; default:
            ``forward``. Inputs save more or less than their mean, by a tenth of the cost: 100 of them tell the mean to
            within a standard error of 1 % (:attr:`Calibration.uncertainty`).
        tolerance: how far from the target the search ends.

    Returns:
        The rule and its figures on the inputs of ``many``.

    Raises:
        ValueError: a rule that has no limits to set, an unknown schedule, or a target that no schedule reaches.
    """
    if isinstance(method, str):
        method = rule_named(method)
    if not isinstance(method, MergingPruning):
        raise ValueError(
            f"method: {method.name!r} has no limits to set; expected a rule that merges, as 'ranked_novelty'"
        )
    if not 0 < target < 1:
        raise ValueError(f"target: expected a share between 0 and 1, got {target!r}")
    if schedule is not None and schedule not in SCHEDULES:
        raise ValueError(f"schedule: expected one of {', '.join(SCHEDULES)}, got {schedule!r}")
    adaptive = method.adaptive if adaptive is None else adaptive
    tried = _Tried(forward, target, tolerance, layers, adaptive, _dense(forward, method))
    rule = tried.choose(method, schedule)
    dense = tried.dense
    if many is not None:
        forward, dense = many, _dense(many, method)
    if many is not None and adaptive:
        rule, features, cost = _at_cost(forward, rule, target, dense.gflops, tolerance)
    else:
        features, cost = _run(forward, rule)
    cosines, savings = _cosines(features, dense.features), 1 - cost / dense.cost
    return Calibration(
        rule=rule, target=target, saving=1 - float(cost.mean()) / dense.gflops,
        deviation=float(savings.std(correction=0)), least=float(savings.min()), most=float(savings.max()),
        cosine=float(cosines.mean()), cosine_p10=float(cosines.quantile(0.1)), inputs=len(cost), schedule=tried.schedule,
        gflops=float(cost.mean()), dense_gflops=dense.gflops, tried=tried.figures,
    )  # fmt: skip


class _Dense(NamedTuple):
    """The unpruned model on some inputs."""

    features: Tensor
    cost: Tensor
    """``[N]`` GFLOPs of each input."""

    @property
    def gflops(self) -> float:
        return float(self.cost.mean())


def _dense(forward: Forward, method: Pruning) -> _Dense:
    return _Dense(*_run(forward, Pruning(backend=method.backend)))


class _Tried:
    """The schedules that were tried for one cost: what each saves, how like the dense model its results are, its rule."""

    def __init__(
        self, forward: Forward, target: float, tolerance: float, layers: int, adaptive: bool, dense: _Dense
    ) -> None:
        self.forward, self.target, self.tolerance = forward, target, tolerance
        self.layers, self.adaptive, self.dense = layers, adaptive, dense
        self.shape = _Shape(layers)
        self.schedule = ""
        self.figures: dict[str, tuple[float, float]] = {}
        self._found: dict[str, tuple[float, MergingPruning]] = {}  # error at the wanted cost, rule

    def choose(self, method: MergingPruning, schedule: str | None) -> MergingPruning:
        """The best rule, by the schedule of that name or by the best one; :attr:`schedule` says which it was."""
        first, *others = method.variants if self.adaptive else method.variants[:1]
        names = list(SCHEDULES)
        further = [schedule] if schedule else ["flat", "shares", "early"]
        while further:
            for name in further:
                self._try(name, first, name)
            place = names.index(self._best())
            neighbours = names[max(place - 1, 0) : place + 2]
            further = [] if schedule else [name for name in neighbours if name not in self._found]
        self.schedule = self._best()
        for number, variant in enumerate(others, 2):
            self._try(self.schedule, variant, f"{self.schedule}, variant {number}")
        error, rule = self._found[self._best()]
        if math.isinf(error):
            nearest = min((saving for saving, _ in self.figures.values()), key=lambda saving: abs(saving - self.target))
            raise ValueError(
                f"target: {method.name!r} saves {nearest:.1%} of the GFLOPs at the nearest, expected {self.target:.1%}"
            )
        return rule

    def _best(self) -> str:
        return min(self._found, key=lambda name: self._found[name][0])

    def _try(self, schedule: str, method: MergingPruning, name: str) -> None:
        attempt = partial(self._attempt, method)
        rule, features, saving = _search(attempt, SCHEDULES[schedule], self.shape, self.target, self.tolerance)
        cosine = float(_cosines(features, self.dense.features).mean())
        self.figures[name] = (saving, cosine)
        missed = self.target - saving
        # Errors grow by about a factor of 2.4 with each tenth of the cost: savings that differ a little compare so.
        error = (1 - cosine) * 2.4 ** (10 * missed)
        self._found[name] = (error if abs(missed) <= max(0.01, self.tolerance) else math.inf, rule)

    def _attempt(
        self, method: MergingPruning, schedule: Schedule, scale: float
    ) -> tuple[MergingPruning, Tensor, float]:
        """The rule at a scale of the schedule, its features, and what it saves."""
        limits = schedule.limits(scale, self.layers)
        if schedule.kind == "counts" and not self.adaptive:
            limits = _whole(limits)
        trial = _Fitting(
            method, schedule.kind, limits, self.adaptive, self.shape, streams=method.streams,
            proportional_attention=method.proportional_attention, backend=method.backend,
        )  # fmt: skip
        features, cost = _run(self.forward, trial)
        return trial.fitted(self.layers), features, 1 - float(cost.mean()) / self.dense.gflops


def _run(forward: Forward, rule: Pruning) -> tuple[Tensor, Tensor]:
    features, gflops = forward(rule)
    return features.detach().double().cpu(), torch.as_tensor(gflops, dtype=torch.float64).cpu()


def _whole(counts: Sequence[float]) -> tuple[float, ...]:
    """Whole numbers that add up to what the counts do, up to every layer: a schedule is met more finely than by rounding
    each."""
    ends = [0, *map(round, accumulate(counts))]
    return tuple(float(end - start) for start, end in pairwise(ends))


def _cosines(features: Tensor, dense: Tensor) -> Tensor:
    """``[N]``: of features ``[N, D]``, or the mean over tokens of ``[N, T, D]``."""
    cosines = F.cosine_similarity(features, dense, dim=-1)
    return cosines if cosines.dim() == 1 else cosines.mean(1)


def _at_cost(
    forward: Forward, rule: MergingPruning, target: float, dense_gflops: float, tolerance: float
) -> tuple[MergingPruning, Tensor, Tensor]:
    """The rule with its thresholds scaled so that the inputs cost what is wanted, their features, and their costs."""
    low, high, best, last = 0.0, math.inf, None, None
    strength, rate = 1.0, 0.5  # how fast the saving grows with the logarithm of the strength
    kind, values = rule.limit
    for _ in range(5):
        # The limits themselves are scaled, so that 1 is the calibrated strength.
        scaled = rule.limited(kind, tuple(value * strength for value in values))
        features, cost = _run(forward, scaled)
        saving = 1 - float(cost.mean()) / dense_gflops
        if best is None or abs(saving - target) < best[0]:
            best = abs(saving - target), scaled, features, cost
        if best[0] <= tolerance:
            break
        if last is not None and last[0] != strength:
            rate = min(max((saving - last[1]) / math.log(strength / last[0]), 0.1), 1.0)
        last = strength, saving
        low, high = (strength, high) if saving < target else (low, strength)
        guess = strength * math.exp((target - saving) / rate)
        strength = guess if low < guess < high else (low + min(high, 2 * low + 1)) / 2
    return best[1:]


class _Shape:
    """What a schedule would save if a layer's cost were proportional to its tokens: good guesses of the scale."""

    def __init__(self, layers: int) -> None:
        self.layers, self.tokens, self.most = layers, 0.0, 1.0

    def saving(self, schedule: Schedule, scale: float) -> float:
        left = total = self.tokens
        cost = 0.0
        for limit in schedule.limits(scale, self.layers):
            cost += left / 3
            gone = min(limit if schedule.kind == "counts" else limit * left, left * self.most)
            left -= gone
            cost += left * 2 / 3
        return 1 - cost / (total * self.layers)

    def scale(self, schedule: Schedule, saving: float) -> float:
        low, high = 0.0, 1.0 if schedule.kind == "shares" else 2 * self.tokens
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.saving(schedule, middle) < saving else (low, middle)
        return high


def _search(attempt, schedule: Schedule, shape: _Shape, target: float, tolerance: float):
    """The attempt whose saving is nearest to the target: what a guess missed is added to the next one."""
    guess, best, low, high, seen = target, None, 0.0, 1.0, None
    for _ in range(6):
        # How many tokens there are is known after the first attempt.
        scale = shape.scale(schedule, guess) if shape.tokens else 8.0 if schedule.kind == "counts" else 0.05
        result = attempt(schedule, scale)
        missed = target - result[2]
        if best is None or abs(missed) < abs(best[2] - target):
            best = result
        if abs(missed) <= tolerance:
            break
        guess = shape.saving(schedule, scale)
        low, high = (max(low, guess), high) if missed > 0 else (low, min(high, guess))
        # What a rule saves may grow more slowly than the guess: the last two attempts tell how fast.
        rate = 1.0
        if seen is not None and abs(seen[0] - guess) > 1e-6:
            rate = min(max((result[2] - seen[1]) / (guess - seen[0]), 0.1), 1.0)
        seen = (guess, result[2])
        guess += missed / rate
        if not low < guess < high:
            guess = (low + high) / 2
    return best


@dataclass(frozen=True)
class _Fitting(Pruning):
    """Runs a rule on all calibration inputs at once and sets each layer's limit before that layer merges."""

    name: ClassVar[str] = "fitting"

    rule: MergingPruning = field(default_factory=MergingPruning)
    kind: str = "shares"
    wanted: tuple[float, ...] = ()
    adaptive: bool = True
    shape: _Shape | None = field(default=None, compare=False)
    record: list[float] = field(default_factory=list, compare=False)

    def on(self, stream, layers):
        rule = super().on(stream, layers)
        return replace(self, rule=self.rule.on(stream, layers)) if rule is self else rule

    importance, needs_dictionary = (property(attrgetter(f"rule.{name}")) for name in ("importance", "needs_dictionary"))
    strength = 1.0

    def count(self, cost, layer, before, after, **sizes):
        if self.wanted[layer]:
            self.rule.limited("shares", (1.0,)).count(cost, layer, before, after, **sizes)

    def fitted(self, layers: int) -> MergingPruning:
        ran = len(self.record)
        if ran == layers - 1:  # a last layer of which only one row is read merges nothing
            self.record.append(0.0)
        if len(self.record) != layers:
            raise ValueError(f"forward: expected one pass of {layers} layers with all inputs, in one stream; {ran} ran")
        if self.adaptive:
            return self.rule.limited("thresholds", tuple(self.record))
        return self.rule.limited(self.kind, self.wanted)

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        if layer != len(self.record):
            raise ValueError("forward: calibration needs all inputs in one batch, and one stream that is pruned")
        rule = replace(self.rule, backend=self.backend)
        if layer == 0:
            self.shape.tokens = float(rule.prunable(tokens).double().mean())
            self.shape.most = rule.most
        if not self.adaptive:
            self.record.append(0.0)
            return rule.limited(self.kind, self.wanted)(
                tokens, block_input=block_input, attention=attention, dictionary=dictionary, layer=layer, norm=norm
            )
        wanted = self.wanted[layer]
        if wanted <= 0:
            self.record.append(0.0)
            return tokens, LayerTrace(tokens.cu_seqlens, tokens.cu_seqlens, tokens.ids)
        score, free, found = rule.score(tokens, block_input, attention, dictionary, layer)
        may = rule.lowest(tokens, score, free)
        pool = score[may].sort().values
        number = float(rule.prunable(tokens).sum()) * wanted if self.kind == "shares" else wanted * tokens.batch_size
        number = min(round(number), len(pool))
        threshold = 0.0
        if number:
            above = pool[min(number, len(pool) - 1)]
            threshold = max(float((pool[number - 1].double() + above.double()) / 2), 1e-12)
        self.record.append(threshold)
        return rule.merge(tokens, attention, score, may & (score <= threshold), found, layer, threshold)
