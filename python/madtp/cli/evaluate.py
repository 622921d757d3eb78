"""`madtp evaluate`: how good a model is on a test split, dense and pruned, and what it costs."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from ..evaluate.run import evaluate
from ..files import check_output
from ..jsonl import require_new
from ..options import UsageError, given, help_of, option, positive
from ..processes import joined, processes, rank
from ..report import results as report
from ..report.plots import require_matplotlib
from ..tasks import TASKS, Task, task_of
from ..tasks.annotations import require_images
from .batch import refuse_inputs, settings_of, shown
from .options import (
    BatchOptions,
    Command,
    ModelSource,
    RunOptions,
    TextOptions,
    check_source,
    grouping,
    load_model,
    method,
    strengths_of,
)

_EXAMPLES = """\
examples:
  madtp evaluate --model model_base_nlvr_0.5.pth --annotations nlvr_test.json \\
      --image-root NLVR2/images --output nlvr.json --plots plots
  madtp evaluate --model DIR --annotations nlvr_test.json --temperature 0 1 2 4 --records records.jsonl
  madtp evaluate --model DIR --annotations vqa_val.json --image-root coco --answers answer_list.json
  madtp evaluate --model DIR --annotations v2_OpenEnded_mscoco_val2014_questions.json --image-root coco \\
      --vqa-annotations v2_mscoco_val2014_annotations.json
  madtp evaluate --model DIR --annotations coco_karpathy_test.json --image-root coco --limit 500
  torchrun --nproc-per-node 8 -m madtp evaluate --model DIR --annotations flickr30k_test.json \\
      --image-root flickr30k --rerank 128 --device cuda --output flickr.json

What is measured follows from the model: accuracy for nlvr and vqa, captioning metrics, recall at 1, 5 and 10
in both directions for retrieval (BLIP's ranks the best again in pairs) and clip. Annotations are the original
files of NLVR2 and VQA v2, or those that BLIP ships, of which captions and retrieval take Karpathy's splits.

Each sample is pruned on its own (unless --grouping says otherwise) and counted once, however large the
batches and however many processes there are. With --records, a run that was interrupted goes on where it
stopped when the same command is given again. docs/annotations.md shows a record of each format; `madtp demo` writes
pairs.jsonl, which can be evaluated at once.
"""
_RESULTS = "where results go, beside the table on the terminal"


@dataclass(kw_only=True)
class Evaluate(TextOptions, RunOptions, BatchOptions, ModelSource, Command):
    """What is evaluated, how, and where the results go; :func:`command` adds the options of all tasks."""

    name = "evaluate"
    help = "quality, cost and speed on a test split"
    description = "Evaluates a model on a test split, dense and pruned: quality, cost, time, tokens."
    examples = _EXAMPLES

    task: str | None = option("of random:base; other models know theirs", choices=list(TASKS))
    annotations: str = option("samples with labels", required=True, metavar="FILE")
    vqa_annotations: str | None = option(
        "where --annotations are VQA v2's original questions: their answers", metavar="FILE"
    )
    image_root: str | None = option("what image paths start from (default: the annotations' folder)", metavar="DIR")
    limit: int | None = option("only the first N of the annotations", type=positive, metavar="N")
    method: str | None = method()
    grouping: str = grouping(("instance", "pair", "batch"))
    strength: list[float] | None = option(
        "how much the rule prunes, 0 is dense (default: 0 and the model's)",
        type=float,
        nargs="+",
        metavar="S",
        exclusive="strength",
    )
    temperature: list[float] | None = option(
        "MADTP's temperatures, which are its strengths (default: 0 and the checkpoint's)",
        type=float,
        nargs="+",
        metavar="T",
        exclusive="strength",
    )
    output: str | None = option("all figures, with settings and versions", metavar="JSON", group=_RESULTS)
    records: str | None = option(
        "what the model said to each sample; lets a run go on", metavar="JSONL", group=_RESULTS
    )
    plots: str | None = option("quality.png and tokens.png (needs matplotlib)", metavar="DIR", group=_RESULTS)

    def run(self) -> int:
        parts = self._begin()
        # Records are gathered through the CPU, wherever models run; a process that is done waits for the slowest.
        with joined("cpu", timedelta(days=7)):
            return self._evaluate(parts)

    def _evaluate(self, parts: Path | None) -> int:
        device, (_, asked) = self.device, strengths_of(self)
        if device == "cuda" and processes() > 1:
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        model = load_model(self, [self.task] if self.task else list(TASKS))
        task = task_of(model)
        options, examples = self._task_options(task), self._read(task)
        settings = self._settings(model, device, options, len(examples))
        try:
            results, records = evaluate(
                model,
                examples,
                None if asked == [None] else asked,
                batch_size=self.batch_size,
                folder=parts,
                settings=settings,
                overwrite=self.overwrite,
                progress=False if self.quiet else None,
                **options,
            )
        except KeyboardInterrupt:
            kept = "the same command goes on from here" if parts else "without --records nothing is kept"
            print(f"madtp: interrupted; {kept}", file=sys.stderr)
            return 130
        if rank() == 0:
            settings |= {"batch_size": self.batch_size, "processes": processes(), "threads": torch.get_num_threads()}
            written = report.write(self, task, settings, results, records)
            if parts:
                shutil.rmtree(parts)
            # Last, since whoever reads it may have gone.
            print("\n".join([*report.table(results, task, settings), *([] if self.quiet else written)]))
        return 0

    def _begin(self) -> Path | None:
        """Where answers are kept until all are there, if at all.

        What cannot be read or written, or would replace something unasked, is found out here, before the model is
        loaded.
        """
        check_source(self, *filter(None, (self.annotations, self.vqa_annotations)))
        parts = None if self.records is None else Path(self.records + ".parts")
        for name in ("output", "records"):
            path = getattr(self, name)
            if path is None:
                continue
            check_output(path, option=f"--{name}")
            refuse_inputs(self, path)
            if not (parts and parts.exists()):
                require_new(path, self.overwrite)
        if self.plots:
            require_matplotlib()
            Path(self.plots).mkdir(parents=True, exist_ok=True)
            check_output(Path(self.plots) / "quality.png", option="--plots")
        return parts

    def _task_options(self, task: Task) -> dict:
        """Options of the model's task; those of others are refused."""
        own = {field.name for field in dataclasses.fields(task.EvaluationOptions)}
        others = [name for name in _options_of_tasks() if name not in own]
        if not task.separate_answers:
            others.append("vqa_annotations")
        if useless := given(self, others):
            raise ValueError(f"{useless}: of no use for {task.name}")
        found = {name: getattr(self, name) for name in own if getattr(self, name) is not None}
        try:
            return task.EvaluationOptions(**found).arguments()
        except UsageError as error:
            raise ValueError(f"{task.name}: {error}") from error

    def _read(self, task: Task) -> list:
        """The examples; raises ValueError for images that are not there."""
        more = {} if self.vqa_annotations is None else {"answers": self.vqa_annotations}
        root = self.image_root or Path(self.annotations).parent
        examples = task.read(self.annotations, root, **more)[: self.limit]
        images = (image for example in examples for image in task.images_of(example))
        require_images(self.annotations, dict.fromkeys(images))
        return examples

    def _settings(self, model, device: str, options: dict, samples: int) -> dict:
        """What determines the answers."""
        files = [Path(path) for path in (self.annotations, self.vqa_annotations) if path]
        settings = settings_of(
            self,
            model,
            device=device,
            text_mode=getattr(model.config, "text_mode", None),
            annotations={path.name: f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" for path in files},
            image_root=self.image_root,
            examples=samples,
            options=shown(options),
        )
        settings.pop("temperature", None)  # there are several
        return settings


def _options_of_tasks() -> dict[str, list[tuple[str, dataclasses.Field]]]:
    """Options of evaluation by name: the tasks that have it, and what it is there."""
    found: dict[str, list[tuple[str, dataclasses.Field]]] = {}
    for task in TASKS.values():
        for field in dataclasses.fields(task.EvaluationOptions):
            found.setdefault(field.name, []).append((task.name, field))
    return found


def command() -> type[Command]:
    """The command, with the options of all tasks, of which those of the model's count."""
    fields = []
    for name, uses in _options_of_tasks().items():
        texts = {task: help_of(field) for task, field in uses}
        alike = len(set(texts.values())) == 1
        text = next(iter(texts.values())) if alike else "; ".join(f"{task}: {text}" for task, text in texts.items())
        settings = uses[0][1].metadata["settings"]
        fields.append((name, object, option(text, None, group=", ".join(texts), **settings)))
    return dataclasses.make_dataclass("EvaluateCommand", fields, bases=(Evaluate,), kw_only=True)
