"""`madtp nlvr`, `madtp vqa`, `madtp caption`: one command per task, built from its declaration."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from typing import ClassVar

from ..bulk.callables import ImageTask
from ..options import UsageError, option
from ..tasks import ImageInputs, Task
from .batch import UNFINISHED, Item, Overlays, check_output, run_rows, settings_of, shortened, source_of, truncation
from .bulk import RESUMED, BulkOptions, BulkRun, is_bulk
from .options import BatchOptions, Command, ModelSource, PruningOptions, RunOptions, TextOptions, grouping, load_model


@dataclass(kw_only=True)
class OutputOptions(BatchOptions):
    """Output options."""

    output: str | None = option("where the records go (default, or -: standard output)", metavar="JSONL")


@dataclass(kw_only=True)
class OverlayOptions:
    """Pictures of what was pruned."""

    save_overlay: str | None = option(
        "draw the patches that survive each layer over the image; a picture file for a single image, else a folder",
        metavar="PATH",
    )


@dataclass(kw_only=True)
class Answer(Command):
    """Answer every row and write a record for each."""

    task: ClassVar[type[Task]]

    def run(self) -> int:
        arguments = self.arguments()
        if isinstance(self, BulkOptions) and is_bulk(self):
            return self._many(arguments)
        source, folder = source_of(self)
        check_output(self, source)
        overlays = Overlays(self, source)
        model = load_model(self, [self.task.name])
        task, used, seed = self.task(model), dict(arguments), arguments.pop("seed", None)

        def prepare(number: int, fields: dict) -> Item:
            prepared = task.prepare(fields, folder)
            cut = {} if prepared.text is None else truncation(model, prepared.text)
            return Item(number, prepared.images[0], prepared, cut)

        def answer(items: list[Item]) -> list[dict]:
            seeds = {} if seed is None else {"seeds": [row_seed(seed, item.row) for item in items]}
            answers, output = task.answer(model, [item.inputs.inputs for item in items], **arguments, **seeds)

            def about(place: int, item: Item) -> tuple:
                return item.inputs.images, task.samples(place, len(items)), task.title(item.inputs, answers[place])

            drawn = overlays.draw(items, model, output.vision, about)
            return [
                {**shortened(found.record()), **path, **item.added}
                for item, found, path in zip(items, answers, drawn, strict=True)
            ]

        return run_rows(
            self,
            source,
            prepare,
            answer,
            settings=settings_of(self, model, **self.defaults(), **used),
            tokens=next(iter(task.streams_of_records.values()))[1],
            answers=task.Answer.columns,
            keep=task.passed_on,
            defaults=self.defaults(),
            unit=f"{task.unit}s",
        )

    def _many(self, arguments: dict) -> int:
        """Answers to the rows of a folder of shards."""
        if self.images and self.input:
            raise UsageError("give either images or --input")
        used, seed = dict(arguments), arguments.pop("seed", None)
        return BulkRun(
            options=self,
            make=lambda model: ImageTask(
                model, text=self.text_key, defaults=self.defaults(), arguments=arguments, seed=seed or 0
            ),
            tasks=[self.task.name],
            sources=self.images or list(filter(None, [self.input])),
            name=f"{self.task.Answer.columns[0]}s",
            answers=self.task.Answer.columns,
            tokens=next(iter(self.task.streams_of_records.values()))[1],
            unit=f"{self.task.unit}s",
            settings={"text_key": self.text_key, **self.defaults(), **used},
        ).run()


def row_seed(seed: int, row: int) -> int:
    """A number of its own for each row, so that its answer does not depend on the others."""
    return zlib.crc32(f"{seed} {row}".encode())


def command_of(task: type[Task]) -> type[Command]:
    """The command of a task."""
    text_modes = (TextOptions,) * any(field.name == "text_mode" for field in dataclasses.fields(task.Config))
    many = (BulkOptions,) * issubclass(task.Inputs, ImageInputs)
    bases = (
        Answer,
        *text_modes,
        RunOptions,
        PruningOptions,
        task.Options,
        *many,
        OverlayOptions,
        OutputOptions,
        task.Inputs,
        ModelSource,
    )
    about = {
        "task": task,
        "name": task.name,
        "help": task.help,
        "description": task.description,
        "examples": task.usage + UNFINISHED + "\n" + RESUMED * len(many),
    }
    fields = [("grouping", str, grouping(task.Model.groupings))]
    return dataclasses.make_dataclass(f"{task.__name__}Command", fields, bases=bases, namespace=about, kw_only=True)
