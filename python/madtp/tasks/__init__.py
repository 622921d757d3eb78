"""Everything that differs from task to task: a file each, with what is asked and answered, evaluated and learnt.

What they share: annotation files, metrics, losses, augmentation. A new task is a file with a subclass of :class:`Task`, and its
class among :data:`TASKS`.
"""

from ..models.base import Model
from .base import Answer, ImageInputs, Inputs, Options, Prepared, Recipe, Task
from .caption import CaptionTask
from .clip import CLIPTask
from .nlvr import NLVRTask
from .pairs import PairsTask
from .retrieval import RetrievalTask
from .vqa import VQATask

__all__ = ["TASKS", "Answer", "ImageInputs", "Inputs", "Options", "PairsTask", "Prepared", "Recipe", "Task", "task_of"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (NLVRTask, VQATask, CaptionTask, RetrievalTask, CLIPTask)}
"""By name; the only registry of tasks."""


def task_of(model: Model) -> Task:
    """The task of a model, with its processor and sizes."""
    return TASKS[model.config.task](model)
