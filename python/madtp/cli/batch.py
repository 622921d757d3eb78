"""What the commands over many rows share: where rows come from, where records go, what is said about them."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .. import jsonl
from ..files import STANDARD, is_regular, open_regular, replacing, write_standard
from ..files import check_output as check_file
from ..fingerprint import fingerprint
from ..pruning import MADTP
from ..report.overlay import overlays_of
from ..tasks.base import digested

_log = logging.getLogger("madtp")

UNFINISHED = """\
Records are collected in OUTPUT.partial until all are there. After an interruption, the same command goes on
where it stopped. An image that cannot be used does not stop the run: its record has "error" instead of a
result, and the exit code is 1.
"""
"""For the help of commands over a file of rows."""


COMMON = ("gflops", "gflops_full", "overlay", "truncated")
"""Fields that records of several commands have."""


class Item(NamedTuple):
    """One row, ready for the model."""

    row: int
    image: Path
    inputs: object
    """What was made of it for the model."""
    added: dict = {}  # noqa: RUF012
    """What else its record says."""


def source_of(options) -> tuple[str | list, Path]:
    """The rows that the options name, those of a pipe read already, and the folder that their paths are relative to."""
    rows, path = options.rows(), options.input
    if rows is not None:
        return rows, Path()
    if not is_regular(path):
        return jsonl.held(path), Path()
    open_regular(path).close()  # whatever keeps it from being read is found out now
    return path, Path(path).parent


def truncation(model, text: str) -> dict:
    """What a record says of a text that the model does not read to its end."""
    return {"truncated": True} if model.processor.cuts(text) else {}


def check_output(args: argparse.Namespace, source: str | Sequence = ()) -> None:
    """Find out before the model is loaded what would keep records from being written."""
    if args.output == STANDARD:
        args.output = None
    if args.output is None:
        if sys.stdout is None:
            raise ValueError("standard output is closed; give --output")
    elif not _is_stream(args.output):
        check_file(args.output, option="--output")
        if not os.path.exists(args.output + ".partial"):
            jsonl.require_new(args.output, args.overwrite)
        refuse_inputs(args, args.output, source)


def _is_stream(path: str) -> bool:
    """Whether records are written to it one after the other, and it is never replaced: a pipe or a device."""
    return os.path.exists(path) and not is_regular(path) and not os.path.isdir(path)


def refuse_inputs(args: argparse.Namespace, path: str | os.PathLike, source: str | Sequence = ()) -> None:
    """Raise ValueError if a file that is to be written is one of those that are read."""
    if not os.path.exists(path):
        return
    options = ("input", "texts", "answers", "annotations", "vqa_annotations", "model", "tokenizer")
    named = [getattr(args, name, None) for name in options]
    rows = source if not isinstance(source, str) else ()
    images = [image for row in rows if isinstance(row, dict) for image in row.get("images", [row.get("image")])]
    for name in filter(None, [*named, *images]):
        if os.path.exists(name) and os.path.samefile(path, name):
            raise ValueError(f"{path}: this command reads it, and cannot write to it")


class Overlays:
    """Draws what `--save-overlay` asks for, if anything.

    Raises, before anything is computed, ValueError or OSError for a path that cannot be written, exists already, or
    holds the pictures themselves.
    """

    def __init__(self, args: argparse.Namespace, source: str | Sequence) -> None:
        self.path = None if args.save_overlay is None else Path(args.save_overlay)
        if self.path is None:
            return
        named, suffix = f"--save-overlay {args.save_overlay}", self.path.suffix.lower()
        self.single = not self.path.is_dir() and not args.save_overlay.endswith("/") and bool(suffix)
        resumes = args.output and os.path.exists(f"{args.output}.partial")
        if self.single:
            self._format = _picture_format(suffix)
            if self._format is None:
                raise ValueError(f"{named}: no format of pictures that can be written; a folder's name ends with /")
            if isinstance(source, str) or len(source) > 1:
                raise ValueError(f"{named}: expected a folder, since there may be several images")
            check_file(self.path, option="--save-overlay")
            exists = self.path.exists()
            refuse_inputs(args, self.path, source)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            check_file(self.path / "1.png", option="--save-overlay")
            exists = any(self.path.iterdir())
            rows = [row for row in source if isinstance(row, dict)] if exists and not isinstance(source, str) else ()
            folders = {os.path.dirname(image) for row in rows for image in row.get("images", [row.get("image")])}
            if any(os.path.exists(folder or ".") and os.path.samefile(folder or ".", self.path) for folder in folders):
                raise ValueError(f"{named}: the pictures themselves are in this folder; name another one")
        if exists and not args.overwrite and not resumes:
            what = "exists already" if self.single else "is not empty"
            raise ValueError(f"{named}: {what}; name another one, or give --overwrite")

    def draw(self, items: Sequence[Item], model, traces, about: Callable[[int, Item], tuple]) -> list[dict]:
        """Draws a batch of items, and says what to add to their records.

        Args:
            traces: of the batch's vision layers.
            about: paths of an item's images, their samples in the traces, and a title; of its place and itself.
        """
        if self.path is None:
            return [{}] * len(items)
        added = []
        for place, item in enumerate(items):
            path = self.path if self.single else self.path / f"{item.row:06d}-{item.image.stem}.png"
            if path.exists() and os.path.samefile(path, item.image):
                raise ValueError(f"--save-overlay: {path} is the picture itself")
            with replacing(path) as file:
                images, samples, title = about(place, item)
                picture = overlays_of(model, images, traces, samples, title)
                picture.save(file, self._format if self.single else "PNG")
            added.append({"overlay": str(path)})
        return added


def _picture_format(suffix: str) -> str | None:
    """Pillow's name of the format that it can write to such files."""
    name = Image.registered_extensions().get(suffix)
    return name if name in Image.SAVE else None


def settings_of(args: argparse.Namespace, model, *, texts: bool = True, **more) -> dict:
    """What determines a command's records; with `texts`, the tokenizer too."""
    pruning = {"temperature": model.pruning.strength}
    if not isinstance(model.pruning, MADTP):
        pruning = {"pruning": json.loads(json.dumps(model.pruning.to_dict()))}  # as it is read again: lists for tuples
    return {
        "task": model.config.task,
        "model": str(args.model),
        **pruning,
        **{name: getattr(args, name) for name in ("dtype", "device", "backend", "grouping", "tokenizer")},
        **shown(more),
        "fingerprint": fingerprint(model, texts=texts),
    }


def shown(options: dict) -> dict:
    """Options as settings of a run: lists by a digest."""
    return {name: digested(value) if isinstance(value, list) else value for name, value in options.items()}


def shortened(record: dict) -> dict:
    """A record with six decimals."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in record.items()}


def run_rows(
    args: argparse.Namespace,
    source,
    prepare: Callable[[int, dict], object],
    answer: Callable[[list], list[dict]],
    *,
    settings: dict,
    tokens: Sequence[str],
    unit: str = "images",
    answers: Sequence[str] = (),
    **options,
) -> int:
    """Records of all rows to `args.output` or standard output, then what failed to standard error.

    Args:
        source, prepare, answer, settings, options: as in :func:`madtp.jsonl.run`.
        tokens: fields of a record with token counts per layer; the progress bar shows the mean of their last.
        answers: other fields that `answer` gives, beside those of :data:`COMMON`.

    Returns:
        The exit code.
    """
    meter = TokenMeter(tokens)
    options = {"unit": unit, "note": meter.note, "answers": [*answers, *tokens, *COMMON], **options}
    if args.quiet:
        options["progress"] = False

    truncated = 0

    def noted(instances: list) -> list[dict]:
        nonlocal truncated
        records = meter.seen(answer(instances))
        truncated += sum("truncated" in record for record in records)
        return records

    if args.output is None or _is_stream(args.output):
        summary = _streamed(args, source, prepare, noted, options)
    else:
        try:
            summary = jsonl.run(
                source,
                args.output,
                prepare,
                noted,
                settings=settings,
                batch_size=args.batch_size,
                overwrite=args.overwrite,
                **options,
            )
        except KeyboardInterrupt:
            print("madtp: interrupted; the same command goes on from here", file=sys.stderr)
            return 130
        resumed = f" ({summary.resumed} of them from an earlier run)" if summary.resumed else ""
        if not args.quiet:
            print(f"{summary.rows} rows{resumed} in {args.output}")
    if not summary.rows:  # a filter that let nothing pass, a wrong file: no success
        print("madtp: error: no rows in the input", file=sys.stderr)
        return 2
    if truncated:
        marked = 'since the model reads no more ("truncated": true)'
        _log.warning("%d texts were not read to their end, %s", truncated, marked)
    return report(summary.failed, summary.rows)


def _streamed(args: argparse.Namespace, source, prepare, answer, options: dict):
    """Records of all rows as they come, to standard output or to a pipe or device; counts of them."""
    summary, rows = jsonl.Summary(), list(jsonl.numbered(source))
    # A terminal shows the records themselves.
    options = {"total": len(rows), "progress": False if sys.stdout and sys.stdout.isatty() else None, **options}
    with contextlib.ExitStack() as stack:
        out = None if args.output is None else stack.enter_context(open(args.output, "ab"))
        batches = jsonl.answered(rows, prepare, answer, args.batch_size, **options)
        for records in stack.enter_context(contextlib.closing(batches)):
            lines = b"".join(map(jsonl.to_line, records))
            if out is None:
                write_standard(lines)
            else:
                out.write(lines)
                out.flush()
            summary.count(records)
    return summary


def report(failed: dict[int, str], rows: int, what: str = "rows could not be answered") -> int:
    """Say which rows failed, at most 20 of them; the exit code."""
    if not failed:
        return 0
    first = [f"row {row}: {reason}" for row, reason in list(failed.items())[:20]]
    return complain(f"{len(failed)} of {rows} {what}", first, len(failed))


def complain(what: str, first: Sequence[str], count: int) -> int:
    """Say what failed, the ``first`` of so many by name; the exit code."""
    print(f"madtp: {what}:", file=sys.stderr)
    for failure in first:
        print(f"  {failure}", file=sys.stderr)
    if count > len(first):
        print(f"  and {count - len(first)} more", file=sys.stderr)
    return 1


class TokenMeter:
    """The mean number of tokens that were left at the end, of those that there were at the beginning."""

    def __init__(self, fields: Sequence[str]) -> None:
        self.fields = fields
        self.streams = self.before = self.after = 0

    def seen(self, records: list[dict]) -> list[dict]:
        """Count in some records; returns them."""
        for record in records:
            for name in self.fields:
                self.streams += 1
                self.before += record[name][0]
                self.after += record[name][-1]
        return records

    def note(self) -> str:
        """For the progress bar."""
        if not self.streams:
            return ""
        return f"{self.after / self.streams:.1f} of {self.before / self.streams:.1f} tokens kept"
