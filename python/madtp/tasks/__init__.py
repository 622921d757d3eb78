"""The tasks, a folder each: inputs and answers, evaluation, cost, loss and score, and in `model` the network.

Shared by them: annotation files, metrics, losses, augmentation. To add a task, write a folder with a subclass of
:class:`Task` and list its class in :data:`TASKS`.
"""

from ..model import Model
from .base import Answer, ImageInputs, Inputs, Options, Prepared, Recipe, Task
from .caption import CaptionTask
from .clip import CLIPTask
from .nlvr import NLVRTask
from .pairs import PairsTask
from .retrieval import RetrievalTask
from .vqa import VQATask

__all__ = ["TASKS", "Answer", "ImageInputs", "Inputs", "Options", "PairsTask", "Prepared", "Recipe", "Task", "task_of"]

TASKS: dict[str, type[Task]] = {task.name: task for task in (NLVRTask, VQATask, CaptionTask, RetrievalTask, CLIPTask)}
"""All tasks by name; the only registry."""


def task_of(model: Model) -> Task:
    """The task of a model."""
    return TASKS[model.config.task](model)
