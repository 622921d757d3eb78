"""Former place of :mod:`madtp.weights`."""

from .weights.files import CheckpointError
from .weights.loading import (
    from_official,
    initial_weight,
    interpolate_positions,
    load,
    randomize,
    save_pretrained,
    to_official,
)

__all__ = [
    "CheckpointError", "from_official", "initial_weight", "interpolate_positions", "load", "randomize", "save_pretrained",
    "to_official",
]  # fmt: skip
