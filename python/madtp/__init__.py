"""MADTP models on ragged batches: BLIP with token pruning that saves wall-clock time.

``madtp.load(...)`` gives a model; the kernels below it are in ``madtp_kernels``.
"""

from .checkpoints import CheckpointError, load, save_pretrained
from .config import NLVRConfig, TextConfig, VisionConfig

__all__ = ["CheckpointError", "NLVRConfig", "TextConfig", "VisionConfig", "load", "save_pretrained"]
