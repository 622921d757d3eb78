"""MADTP models on ragged batches: BLIP with token pruning that saves wall-clock time.

``madtp.load(...)`` gives a model; the kernels below it are in ``madtp_kernels``.
"""

import importlib.util

from madtp_kernels import __version__

from .config import CLIPConfig, CLIPTextConfig, TextConfig, VisionConfig
from .tasks.caption.model import CaptionConfig
from .tasks.nlvr.model import NLVRConfig
from .tasks.retrieval.model import RetrievalConfig
from .tasks.vqa.model import VQAConfig
from .weights import CheckpointError, load, save_pretrained


def __getattr__(name: str):
    if name in ("Answerer", "Captioner", "Embedder"):
        from .bulk import callables

        return getattr(callables, name)
    if name in ("apply_patch", "pruned", "remove_patch"):  # transformers takes seconds to import
        from . import patch

        return getattr(patch, name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f".{name}", __name__)  # `madtp.predict` and others need no import of their own
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Answerer",
    "CLIPConfig",
    "CLIPTextConfig",
    "CaptionConfig",
    "Captioner",
    "CheckpointError",
    "Embedder",
    "NLVRConfig",
    "RetrievalConfig",
    "TextConfig",
    "VQAConfig",
    "VisionConfig",
    "__version__",
    "apply_patch",
    "load",
    "pruned",
    "remove_patch",
    "save_pretrained",
]
