"""`madtp nlvr`, `madtp vqa`, `madtp caption`: one command per task, built from its declaration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from ..options import UsageError, option
from ..tasks import ImageInputs, Prepared, Task
from .batch import UNFINISHED, Overlays, check_output, row_seed, run_rows, settings_of, shortened, source_of, truncation
from .bulk import RESUMED, BulkOptions, BulkRun, is_bulk
from .options import BatchOptions, Command, ModelSource, PruningOptions, RunOptions, TextOptions, grouping, load_model


@dataclass(kw_only=True)
class OutputOptions(BatchOptions):
    """Output options."""

    output: str | None = option("where the records go (default, or -: standard output)", metavar="JSONL")
    save_overlay: str | None = option(
        "draw the patches that survive each layer over the image; a picture file for a single image, else a folder",
        metavar="PATH",
    )


class _Row(NamedTuple):
    row: int
    image: Path
    prepared: Prepared
    added: dict


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
        task, seed = self.task(model), arguments.pop("seed", None)

        def prepare(number: int, fields: dict) -> _Row:
            prepared = task.prepare(fields, folder)
            cut = {} if prepared.text is None else truncation(model, prepared.text)
            return _Row(number, prepared.images[0], prepared, cut)

        def answer(rows: list[_Row]) -> list[dict]:
            seeds = {} if seed is None else {"seeds": [row_seed(seed, row.row) for row in rows]}
            answers, output = task.answer(model, [row.prepared.inputs for row in rows], **arguments, **seeds)

            def picture(place: int, row: _Row):
                from ..report.overlay import overlays_of

                title, samples = task.title(row.prepared, answers[place]), task.samples(place, len(rows))
                return overlays_of(model, row.prepared.images, output.vision, samples, title)

            drawn = overlays.draw(rows, picture)
            return [
                {**shortened(found.record()), **path, **row.added}
                for row, found, path in zip(rows, answers, drawn, strict=True)
            ]

        used = arguments if seed is None else {**arguments, "seed": seed}
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
        from ..bulk.callables import ImageTask

        if self.images and self.input:
            raise UsageError("give either images or --input")
        seed = arguments.pop("seed", None)
        used = arguments if seed is None else {**arguments, "seed": seed}
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
