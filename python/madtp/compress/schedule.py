"""Learning rates over a run, as factors of the highest one."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_decay(optimizer: Optimizer, steps: int, warmup: int = 0, final: float = 0.0) -> LambdaLR:
    """Rises over ``warmup`` steps, stays, and falls to the share ``final`` over the last quarter of ``steps``."""

    def factor(step: int) -> float:
        left = min(max(steps - step, 0) / max(steps / 4, 1), 1.0)
        return min((step + 1) / max(warmup, 1), final + (1 - final) * left)

    return LambdaLR(optimizer, factor)


def cosine(optimizer: Optimizer, steps: int, warmup: int = 0, final: float = 0.0) -> LambdaLR:
    """Half a cosine from the highest rate to the share ``final`` of it, after a linear rise over ``warmup`` steps."""

    def factor(step: int) -> float:
        wave = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
        return min((step + 1) / max(warmup, 1), 1.0) * (final + (1 - final) * wave)

    return LambdaLR(optimizer, factor)
