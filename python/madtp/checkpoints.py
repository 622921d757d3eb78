"""Former place of :mod:`madtp.weights`."""

from .towers import interpolate_positions
from .weights import CheckpointError, from_official, initial_weight, load, randomize, save_pretrained, to_official

__all__ = [
    "CheckpointError", "from_official", "initial_weight", "interpolate_positions", "load", "randomize", "save_pretrained",
    "to_official",
]  # fmt: skip
