"""MADTP models on ragged batches: BLIP with token pruning that saves wall-clock time.

``madtp.load(...)`` gives a model; the kernels below it are in ``madtp_kernels``.
"""

from .checkpoints import CheckpointError, load, save_pretrained
from .config import CaptionConfig, CLIPConfig, CLIPTextConfig, NLVRConfig, RetrievalConfig, TextConfig, VisionConfig, VQAConfig

__all__ = [
    "CLIPConfig",
    "CLIPTextConfig",
    "CaptionConfig",
    "CheckpointError",
    "NLVRConfig",
    "RetrievalConfig",
    "TextConfig",
    "VQAConfig",
    "VisionConfig",
    "load",
    "save_pretrained",
]
