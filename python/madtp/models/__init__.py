"""The task models, one file each, on shared ragged layers."""

from .base import Model
from .caption import Caption
from .clip import CLIP
from .nlvr import NLVR
from .retrieval import Retrieval
from .vqa import VQA

# One entry per task.
MODELS: dict[str, type[Model]] = {"nlvr": NLVR, "vqa": VQA, "caption": Caption, "retrieval": Retrieval, "clip": CLIP}
