"""Where the networks were before each task had a folder: other names for ``madtp.model`` and ``madtp.tasks.*.model``."""

import sys

from .. import model as base
from ..model import Model
from ..tasks import TASKS, caption, clip, nlvr, retrieval, vqa

MODELS: dict[str, type[Model]] = {name: task.Model for name, task in TASKS.items()}

for _name, _module in {
    "base": base,
    "nlvr": nlvr.model,
    "pairs": nlvr.statements,
    "vqa": vqa.model,
    "caption": caption.model,
    "retrieval": retrieval.model,
    "clip": clip.model,
}.items():
    sys.modules[f"{__name__}.{_name}"] = _module
