"""A threshold per layer, for rules that have one: from the scores of some inputs, and following those of the batch in
training.

No labels are needed. A layer is to drop a share of the tokens that enter it on average; how many a single image keeps
is its own affair. Layers are calibrated one after the other, because what one drops decides what the next one sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model import Model
from ..processes import from_first, gathered_rows
from ..pruning import LayerTrace, Pruning
from ..tasks import Task

__all__ = ["Dial", "Following", "calibrate_thresholds", "dial_for", "has_thresholds", "layer_shares"]


def has_thresholds(rule: Pruning) -> bool:
    """Whether a rule has a threshold per layer, which somebody has to set."""
    return hasattr(rule, "thresholds")


def layer_shares(shares: Sequence[float], layers: int, factor: float = 1.0) -> list[float]:
    """The share that each layer drops: the last one given stands for all further layers.

    Args:
        shares: at least 0 and below 1; at least one.
        layers: how many there are.
        factor: a layer keeps its share of tokens to this power: 0 keeps everything, 1 is as given.

    Raises:
        ValueError: no shares, more than layers, or some that are none.
    """
    if not 0 < len(shares) <= layers or not all(0 <= share < 1 for share in shares):
        raise ValueError(f"shares: expected 1 to {layers} numbers of at least 0 and below 1, got {tuple(shares)}")
    every = [*shares, *[shares[-1]] * (layers - len(shares))]
    return [1 - (1 - share) ** factor for share in every]


def scores(layer: LayerTrace) -> Tensor:
    """``[N]`` float32: the scores of the tokens that entered a layer but the first of each sample, of all processes."""
    entered = int(layer.cu_seqlens_in[-1])
    prunable = torch.ones(entered, dtype=torch.bool, device=layer.importance.device)
    prunable[layer.cu_seqlens_in[:-1].long()] = False
    return gathered_rows(layer.importance[:entered][prunable].detach().float())


NOTHING = torch.finfo(torch.float32).tiny
"""A threshold that only a token exceeds which is worth nothing at all."""


def quantile(values: Tensor, share: float) -> float:
    """The value that a share of the values does not exceed; :data:`NOTHING` for a share of none."""
    count = round(share * len(values))
    return max(values.kthvalue(count).values.item(), NOTHING) if count else NOTHING


@torch.inference_mode()
def calibrate_thresholds(
    model: Model, task: Task, batches: Sequence[dict], rule: Pruning, shares: Sequence[float]
) -> Pruning:
    """The rule with thresholds at which each vision layer drops its share of the tokens of these batches.

    Args:
        model: prunes the batches; its weights stay.
        task: of that model.
        batches: this process's; labels are not looked at.
        rule: whose limits are replaced.
        shares: one per layer.
    """
    thresholds: list[float] = []
    for layer, share in enumerate(shares):
        rule = rule.limited("thresholds", (*thresholds, *[NOTHING] * (len(shares) - layer)))
        found = [scores(task.forward(model, batch, rule).vision[layer]) for batch in batches]
        thresholds.append(from_first(quantile(torch.cat(found), share)))
    return rule.limited("thresholds", tuple(thresholds))


class Dial:
    """A rule as training turns it: at a strength, which a controller moves.

    Args:
        rule: at any strength.
        start: strength at which training begins by default.
    """

    start = 0.1

    def __init__(self, rule: Pruning) -> None:
        self.rule = rule

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest strength."""
        return self.rule.bounds

    def at(self, strength: float) -> Pruning:
        """The rule of a step."""
        return self.rule.at(strength)

    def calibrate(self, model: Model, task: Task, batches: Sequence[dict], strength: float) -> Pruning:
        """The rule at a strength for the model as it is now."""
        return self.at(strength)

    def follow(self, found: Sequence[Tensor], strength: float) -> None:
        """Take in the scores of a step, ``[N]`` for each layer."""


class Following(Dial):
    """Thresholds that move with the model: each batch pulls them to the quantiles of its own scores.

    The strength is the power to which a layer keeps its share of tokens: 1 is the shares as given.

    Args:
        rule: with a threshold per layer.
        shares: which each layer drops; the last one stands for all further layers.
        layers: how many there are.
        memory: of the moving average.
    """

    start, bounds = 0.5, (1e-2, 1e2)

    def __init__(self, rule: Pruning, shares: Sequence[float], layers: int, memory: float) -> None:
        super().__init__(rule)
        self.shares, self.layers, self.memory = shares, layers, memory
        layer_shares(shares, layers)

    def at(self, strength):
        return self.rule

    def calibrate(self, model, task, batches, strength):
        shares = layer_shares(self.shares, self.layers, strength)
        self.rule = calibrate_thresholds(model, task, batches, self.rule, shares)
        return self.rule

    def follow(self, found, strength):
        moved = []
        for old, values, share in zip(
            self.rule.thresholds, found, layer_shares(self.shares, self.layers, strength), strict=True
        ):
            new = from_first(quantile(values, share))
            # A layer that begins or ceases to drop tokens does so at once: the way from or to nothing has no middle.
            jumps = NOTHING in (old, new)
            moved.append(new if jumps else self.memory * old + (1 - self.memory) * new)
        self.rule = self.rule.limited("thresholds", tuple(moved))

    def state_dict(self):
        return {"thresholds": list(self.rule.thresholds)}

    def load_state_dict(self, state):
        self.rule = self.rule.limited("thresholds", tuple(state["thresholds"]))


def dial_for(rule: Pruning, shares: Sequence[float], layers: int, memory: float) -> Dial:
    """How training turns a rule.

    Args:
        rule: with or without thresholds.
        shares: dropped by each layer; empty if the rule knows itself.
        layers: of the vision tower.
        memory: of thresholds that follow.

    Raises:
        ValueError: shares for a rule that has no use for them, or none for one that has.
    """
    if not has_thresholds(rule):
        if shares:
            raise ValueError(f"shares: the rule {rule.name!r} decides itself how many tokens each layer keeps")
        return Dial(rule)
    if not rule.adaptive:
        return Dial(rule.limited("shares", tuple(layer_shares(shares, layers))) if shares else rule)
    return Following(rule, shares or rule.default_shares, layers, memory)
