"""What determines the result of a training run, beside model and data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run, beside model and data.

    Raises:
        ValueError: a value that makes no sense, or two that exclude each other.
    """

    reduction: float
    """Share of the official GFLOPs to save, below 1; with 0 the model is trained without pruning."""
    epochs: int
    """Passes over the training split; with ``steps`` it does not matter."""
    batch_size: int
    """Examples of one forward of one process. An example is an image (or a pair of them) with its text or texts."""
    lr: float
    """Highest learning rate."""
    weight_decay: float
    steps: int | None = None
    """Steps of the optimiser, instead of epochs."""
    texts: int = 1
    """At most so many texts about the same image make one example, whose image is encoded once for all of them."""
    shuffle: bool = True
    """Train on the examples in random order, another one in each epoch."""
    accumulate: int = 1
    """Forwards per step of the optimiser."""
    alignment: float = 0.1
    """Weight of the alignment loss."""
    distill: float = 0.0
    """Weight of the distance of the surviving tokens from what they are in the model as it was, without pruning."""
    dictionary: str | None = None
    """"tokens": the dictionary begins as tokens of the model; "keep": as it is; by default as it is where the model
    prunes by it already."""
    controller: str = "bracket"
    """"bracket" follows the target at every step; "official" moves once per epoch, by the published tables."""
    temperature: float | None = None
    """Strength at which the controller begins (MADTP: the temperature); by default the rule's, or the official
    script's."""
    ramp: float = 0.4
    """Share of the steps over which the bracketing controller's target falls from the initial cost to the goal."""
    shares: tuple[float, ...] = ()
    """Share of the tokens that each vision layer drops, for rules with a limit per layer; the last one stands for all
    further layers. Thresholds follow the quantiles of the batch, and the strength, which is found once before the first
    step, is the power to which a layer keeps its share of tokens."""
    memory: float = 0.9
    """Of the moving average by which thresholds follow."""
    schedule: str = "epoch"
    """The learning rate follows its cosine per "epoch" (official) or per "step"; "decay" stays at the highest rate and
    falls in a line over the last quarter of the steps."""
    warmup: int = 0
    """Steps over which the learning rate rises to the highest one; needs a schedule by step."""
    final_lr: float = 0.0
    """The learning rate at the end, as a share of the highest one."""
    clip: float | None = None
    """Longest gradient (of all parameters together, L2); longer ones are shortened to it."""
    beta2: float = 0.999
    """AdamW's memory of squared gradients."""
    average: float = 0.0
    """Memory of a moving average of the weights, which is what is evaluated and saved; 0: none."""
    precision: str = "float32"
    """"bfloat16": matrix products of training in half precision (autocast)."""
    augment: bool = True
    """Train on random views of the pictures."""
    labels: bool = True
    """Train on the task's loss; without, on the alignment loss only."""
    evaluate_every: int | None = None
    """Steps between evaluations on the dev split; by default an epoch."""
    save_as: str = "float32"
    """Or "float16": the saved weights, which are those that the pruning is set for in the end."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.reduction < 1:
            raise ValueError(f"reduction: expected a share between 0 and 1, got {self.reduction}")
        for name in ("epochs", "batch_size", "accumulate", "texts", "steps", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name, choices in (
            ("controller", ("bracket", "official")),
            ("schedule", ("epoch", "step", "decay")),
            ("precision", ("float32", "bfloat16")),
            ("save_as", ("float32", "float16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.dictionary not in ("tokens", "keep", None):
            raise ValueError(f"dictionary: expected tokens, keep or None, got {self.dictionary!r}")
        for name in ("lr", "weight_decay", "alignment", "distill", "ramp", "warmup", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        for name, end in (("final_lr", 1.0), ("average", 1.0), ("beta2", 1.0), ("memory", 1.0)):
            if not 0 <= getattr(self, name) < end:
                raise ValueError(f"{name}: expected a number of at least 0 and below 1, got {getattr(self, name)}")
        object.__setattr__(self, "shares", tuple(self.shares))
        if not all(0 <= share < 1 for share in self.shares):
            raise ValueError(f"shares: expected numbers of at least 0 and below 1, got {self.shares}")
        if self.schedule == "epoch" and (self.warmup or self.steps is not None):
            raise ValueError("schedule: steps and warmup need a schedule by step, got 'epoch'")
        if self.controller == "official" and self.steps is not None:
            raise ValueError("controller: official moves once per epoch; with steps there are none")

    def to_dict(self) -> dict:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def names(cls) -> list[str]:
        """Of all settings."""
        return [field.name for field in dataclasses.fields(cls)]

    @classmethod
    def defaults(cls) -> dict:
        """The values of settings that need not be given: what a run without them did."""
        fields = dataclasses.fields(cls)
        return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
