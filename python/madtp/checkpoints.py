"""Former name of :mod:`madtp.weights`, for one release."""

import warnings

from .weights import CheckpointError, from_official, initial_weight, load, randomize, save_pretrained, to_official

__all__ = [
    "CheckpointError", "from_official", "initial_weight", "load", "randomize", "save_pretrained", "to_official",
]  # fmt: skip

warnings.warn("madtp.checkpoints: renamed to madtp.weights", DeprecationWarning, stacklevel=2)
