"""What the commands over many rows share: where rows come from, where records go, what is said about them."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .options import positive

UNFINISHED = """\
Records are collected in OUTPUT.partial until all are there. After an interruption, the same command goes on
where it stopped. An image that cannot be used does not stop the run: its record has "error" instead of a
result, and the exit code is 1.
"""


class Item(NamedTuple):
    """One row, ready for the model."""

    row: int
    image: Path
    inputs: object
    """What the model's processor made of it."""


def add_images(parser: argparse.ArgumentParser, row: str) -> None:
    """Where images come from; `row` is an example of a row of `--input`."""
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE",
        help="image files, folders (with all their subfolders), or patterns such as 'photos/**/*.jpg'",
    )
    parser.add_argument(
        "--input",
        metavar="JSONL",
        help=f"instead of images: rows such as {row}, one per line; paths are relative to the file",
    )


def add_output(parser: argparse.ArgumentParser, unit: str = "images") -> None:
    """Where records go, and how many rows the model gets at a time."""
    parser.add_argument("--output", metavar="JSONL", help="where the records go (default: standard output)")
    add_batch(parser, unit)


def add_batch(parser: argparse.ArgumentParser, unit: str) -> None:
    """How many rows the model gets at a time, and what to do with an output that is there."""
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help=f"{unit} per batch (default: 8)"
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew although there is an output")


def add_overlay(parser: argparse.ArgumentParser) -> None:
    """Pictures of surviving patches."""
    parser.add_argument(
        "--save-overlay",
        metavar="PATH",
        help="draw the surviving patches of each layer over the image: a picture file for a single image, or "
        "a folder",
    )


def image_rows(args: argparse.Namespace) -> tuple[str | list[dict], Path]:
    """The rows that the options name, and the folder that their paths are relative to."""
    from ..inputs import find_images

    if bool(args.images) == bool(args.input):
        args.usage_error("give either images or --input")
    if args.input:
        return args.input, Path(args.input).parent
    return [{"image": path} for path in find_images(args.images)], Path()


def image_of(row: dict, folder: Path) -> Path:
    """The path of a row's image."""
    image = row.get("image")
    if not isinstance(image, str):
        raise ValueError(f"'image' must be a path, got {image!r}")
    return folder / image


class Overlays:
    """Draws what `--save-overlay` asks for, if anything.

    Raises ValueError if a single picture is to hold many images.
    """

    def __init__(self, path: str | None, source: str | Sequence[dict]) -> None:
        from ..inputs import IMAGE_SUFFIXES

        self.path = None if path is None else Path(path)
        self.single = path is not None and self.path.suffix.lower() in IMAGE_SUFFIXES
        if self.single and (isinstance(source, str) or len(source) > 1):
            raise ValueError(f"--save-overlay {path}: expected a folder, since there may be several images")
        if self.path is not None and not self.single:
            self.path.mkdir(parents=True, exist_ok=True)

    def draw(self, items: Sequence[Item], traces, config) -> list[dict]:
        """What to add to the records of a batch, whose images are the samples of `traces`, layer by layer."""
        if self.path is None:
            return [{}] * len(items)
        from ..processing import load_image
        from ..report.overlay import overlay

        added = []
        for sample, item in enumerate(items):
            path = self.path if self.single else self.path / f"{item.row:06d}-{item.image.stem}.png"
            overlay(load_image(item.image), traces, config, sample=sample).save(path)
            added.append({"overlay": str(path)})
        return added


def settings_of(args: argparse.Namespace, model, **more) -> dict:
    """What determines a command's records."""
    return {
        "task": model.config.task,
        "model": str(args.model),
        "model_files": _identity(args.model),
        "temperature": model.temperature,
        **{name: getattr(args, name) for name in ("dtype", "device", "backend", "grouping", "tokenizer")},
        **more,
    }


def cost_of(flops) -> dict:
    """GFLOPs of a record."""
    return {"gflops": round(flops.official, 6), "gflops_full": round(flops.full, 6)}


def run_rows(
    args: argparse.Namespace,
    source,
    prepare: Callable[[int, dict], object],
    answer: Callable[[list], list[dict]],
    *,
    settings: dict,
    tokens: Sequence[str],
    unit: str = "images",
    **options,
) -> int:
    """Records of all rows to `args.output` or standard output, then what failed to standard error.

    Args:
        source, prepare, answer, settings, options: as in :func:`madtp.jsonl.run`.
        tokens: fields of a record with token counts per layer; the progress bar shows the mean of their last.

    Returns:
        The exit code.
    """
    from .. import jsonl

    kept = Kept(tokens)
    options = {"unit": unit, "note": kept.note, **options}

    def noted(instances: list) -> list[dict]:
        return kept.seen(answer(instances))

    if args.output is None:
        summary, rows = jsonl.Summary(), list(jsonl.numbered(source))
        # A terminal shows the records themselves.
        options |= {"total": len(rows), "progress": False if sys.stdout.isatty() else None}
        with contextlib.closing(
            jsonl.answered(rows, prepare, noted, args.batch_size, **options)
        ) as batches:
            for records in batches:
                sys.stdout.flush()
                sys.stdout.buffer.write(b"".join(map(jsonl.to_line, records)))  # UTF-8, whatever the locale
                sys.stdout.flush()
                summary.count(records)
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
        print(f"{summary.rows} rows{resumed} in {args.output}")
    return report(summary.failed, summary.rows)


def report(failed: dict[int, str], rows: int, what: str = "rows could not be answered") -> int:
    """Say which rows failed, at most 20 of them; the exit code."""
    if not failed:
        return 0
    print(f"madtp: {len(failed)} of {rows} {what}:", file=sys.stderr)
    for row, reason in list(failed.items())[:20]:
        print(f"  row {row}: {reason}", file=sys.stderr)
    if len(failed) > 20:
        print(f"  and {len(failed) - 20} more", file=sys.stderr)
    return 1


class Kept:
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


def _identity(source: str) -> str | None:
    """Changes when the files of a model do; None for a source that is not on disk."""
    path = Path(source)
    if not path.exists():
        return None
    files = [path] if path.is_file() else sorted(child for child in path.rglob("*") if child.is_file())
    facts = [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
