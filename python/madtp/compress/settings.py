"""What determines the result of a training run, beside model and data: its settings, which are options of the commands."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import MISSING, dataclass

from ..options import above_zero, not_negative, not_negative_int, option, positive, share_or_none

__all__ = ["Settings"]

_TRAINING = "training (defaults are those of MADTP's scripts)"
_PRUNING = "pruning"
RUN = "how the run is done"
"""Where the commands' help lists what does not determine what is learnt."""


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run, beside model and data.

    Raises:
        ValueError: a value that makes no sense, or two that exclude each other.
    """

    reduction: float = option("share of the GFLOPs to save, as 0.5; 0: train unpruned", MISSING, type=share_or_none)
    epochs: int = option(
        "passes over the training split; with --steps it does not matter", MISSING, type=positive, metavar="N",
        group=_TRAINING,
    )  # fmt: skip
    batch_size: int = option(
        "examples per process and forward; one is an image (or a pair of them) with its text or texts", MISSING,
        type=positive, metavar="N", group=_TRAINING,
    )  # fmt: skip
    lr: float = option("highest learning rate", MISSING, type=above_zero, metavar="RATE", group=_TRAINING)
    weight_decay: float = option("of all parameters", MISSING, type=not_negative, metavar="W", group=_TRAINING)
    steps: int | None = option(
        "steps of the optimiser, instead of epochs; the learning rate then moves by step", type=positive, metavar="N",
        group=_TRAINING,
    )  # fmt: skip
    texts: int = option(
        "up to so many texts about an image are one example, encoded with one image", 1, type=positive, metavar="K",
        group=_TRAINING,
    )  # fmt: skip
    shuffle: bool = option("train on the examples in their order", True, flag="--no-shuffle", group=_TRAINING)
    accumulate: int = option("forwards per step", 1, type=positive, metavar="N", group=_TRAINING)
    alignment: float = option("weight of the alignment loss", 0.1, type=not_negative, metavar="W", group=_TRAINING)
    distill: float = option(
        "weight of the distance between surviving tokens and what they are in a frozen copy of the model without "
        "pruning; 1 is a good value", 0.0, type=not_negative, metavar="W", group=_PRUNING,
    )  # fmt: skip
    dictionary: str | None = option(
        "what it begins as: tokens of the model (default where the model has no temperature, so was never pruned), or "
        "what the model has", choices=("tokens", "keep"), group=_PRUNING,
    )  # fmt: skip
    controller: str = option(
        "bracket: follow the measured cost at every step; official: move once per epoch, by MADTP's tables", "bracket",
        choices=("bracket", "official"), group=_PRUNING,
    )  # fmt: skip
    temperature: float | None = option(
        "strength at which the controller begins (default: 0.1 for madtp; official: MADTP's)", type=above_zero,
        metavar="T", group=_PRUNING,
    )  # fmt: skip
    ramp: float = option(
        "share of the steps over which the bracket's target falls from the initial cost to the goal", 0.4,
        type=not_negative, metavar="SHARE", group=_PRUNING,
    )  # fmt: skip
    shares: tuple[float, ...] = option(
        "share of the tokens that each vision layer drops, for rules with a limit per layer; the last one is for all "
        "further layers", (), nargs="+", type=share_or_none, metavar="SHARE", group=_PRUNING,
    )  # fmt: skip
    """Thresholds follow the quantiles of the batch, and the strength, which is found once before the first step, is the
    power to which a layer keeps its share of tokens."""
    memory: float = option(
        "of the moving average by which thresholds follow", 0.9, type=share_or_none, metavar="SHARE", group=_PRUNING
    )
    schedule: str = option(
        "when the learning rate moves: by a cosine per epoch (official) or per step, or in a line over the last quarter "
        "of the steps", "epoch", choices=("epoch", "step", "decay"), group=_TRAINING,
    )  # fmt: skip
    warmup: int = option(
        "steps over which the learning rate rises; needs a schedule by step", 0, type=not_negative_int, metavar="N",
        group=_TRAINING,
    )  # fmt: skip
    final_lr: float = option(
        "learning rate at the end, as a share of the highest", 0.0, type=share_or_none, metavar="SHARE", group=_TRAINING
    )
    clip: float | None = option(
        "longest gradient, of all parameters together; longer ones are shortened (default: none)", type=above_zero,
        metavar="NORM", group=_TRAINING,
    )  # fmt: skip
    beta2: float = option(
        "AdamW's memory of squared gradients", 0.999, type=share_or_none, metavar="B", group=_TRAINING
    )
    average: float = option(
        "evaluate and save a moving average of the weights with this memory, as 0.99; 0: none", 0.0, type=share_or_none,
        metavar="MEMORY", group=_TRAINING,
    )  # fmt: skip
    precision: str = option(
        "bfloat16: matrix products in half precision, everything that is kept in float32", "float32",
        choices=("float32", "bfloat16"), group=RUN,
    )  # fmt: skip
    augment: bool = option("train on the pictures as they are", True, flag="--no-augment", group=_TRAINING)
    labels: bool = True
    """Train on the task's loss; without, on the alignment loss only, which is what `madtp calibrate` does."""
    evaluate_every: int | None = option(
        "steps between evaluations on the dev split (default: an epoch)", type=positive, metavar="N", group=_TRAINING
    )
    save_as: str = option("dtype of the saved weights", "float32", choices=("float32", "float16"), group=_TRAINING)
    seed: int = option("of everything random", 42, type=int, metavar="N", group=RUN)

    def __post_init__(self) -> None:
        if not 0 <= self.reduction < 1:
            raise ValueError(f"reduction: expected a share between 0 and 1, got {self.reduction}")
        for name in ("epochs", "batch_size", "accumulate", "texts", "steps", "evaluate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("settings", {}).get("choices")
            if choices and value not in choices and value != field.default:
                raise ValueError(f"{field.name}: expected one of {', '.join(choices)}, got {value!r}")
        for name in ("lr", "weight_decay", "alignment", "distill", "ramp", "warmup", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {value}")
        for name in ("final_lr", "average", "beta2", "memory"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number of at least 0 and below 1, got {getattr(self, name)}")
        object.__setattr__(self, "shares", tuple(self.shares))
        if not all(0 <= share < 1 for share in self.shares):
            raise ValueError(f"shares: expected numbers of at least 0 and below 1, got {self.shares}")
        if self.schedule == "epoch" and (self.warmup or self.steps is not None):
            raise ValueError("schedule: steps and warmup need a schedule by step, got 'epoch'")
        if self.controller == "official" and self.steps is not None:
            raise ValueError("controller: official moves once per epoch; with steps there are none")
        if self.controller == "official" and self.evaluate_every is not None:
            raise ValueError(
                "controller: official moves once per epoch, by its evaluation; evaluate_every asks for others"
            )

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
