"""`madtp nlvr`: is a statement about two images true? One pair, or a file of them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from .batch import (
    UNFINISHED,
    Overlays,
    add_input,
    add_output,
    add_overlay,
    check_output,
    cost_of,
    input_rows,
    run_rows,
    settings_of,
    truncation,
)
from .options import add_model, add_model_options, load_model

_EXAMPLES = f"""\
examples:
  madtp nlvr --model model_base_nlvr_0.5.pth --images left.jpg right.jpg \\
      --text "The left image contains twice as many dogs as the right image." --save-overlay patches.png
  madtp nlvr --model DIR --input pairs.jsonl --output answers.jsonl --batch-size 16 --dtype bfloat16

a row of pairs.jsonl (paths are relative to the file; "sentence" may stand for "text"):
  {{"images": ["left.jpg", "right.jpg"], "text": "Both images show a dog."}}

a row of answers.jsonl; row is the line number in the input, tokens are counts before and after each layer:
  {{"row": 1, "images": [...], "text": ..., "answer": true, "probability_true": 0.91, "left_tokens": [...], ...}}
{UNFINISHED}"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "nlvr",
        help="answer statements about pairs of images",
        description="Is a statement about two images true? Give one pair, or a JSON Lines file of pairs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser, demo=True)
    parser.add_argument("--images", nargs=2, metavar=("LEFT", "RIGHT"), help="the two image files of one pair")
    parser.add_argument("--text", help="the statement about them")
    add_input(parser, '{"images": ["left.jpg", "right.jpg"], "text": "Both images show a dog."}')
    add_output(parser, "pairs")
    add_overlay(parser)
    add_model_options(parser, groupings=("instance", "pair", "batch"))
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Answer one pair or a file of them."""
    from ..predict import nlvr_batch
    from ..processing import load_image
    from ..report.overlay import nlvr_overlay

    if not ((args.images and args.text and not args.input) or (args.input and not (args.images or args.text))):
        args.usage_error("give either --images and --text, or --input")
    if args.input:
        source, folder = input_rows(args.input)
    else:
        source, folder = [{"images": args.images, "text": args.text}], Path()
    check_output(args, source)
    overlays = Overlays(args, source)
    model = load_model(args, ["nlvr"])

    def prepare(row: int, fields: dict) -> _Pair:
        images, text = fields.get("images"), fields.get("text", fields.get("sentence"))
        if not (isinstance(images, list) and len(images) == 2 and all(isinstance(path, str) for path in images)):
            raise ValueError(f"'images' must be a list of two paths, got {json.dumps(images)}")
        if not {"text", "sentence"} & set(fields):
            raise ValueError("'text' (or 'sentence') is missing")
        if not isinstance(text, str):
            raise ValueError(f"'text' must be a string, got {json.dumps(text)}")
        left, right = (folder / image for image in images)
        return _Pair(row, left, right, text, model.processor(left, right, text), truncation(model, text))

    def answer(pairs: list[_Pair]) -> list[dict]:
        answers, output = nlvr_batch(model, [pair.inputs for pair in pairs])

        def picture(place: int, pair: _Pair):
            images = [model.processor.view(load_image(path)) for path in (pair.image, pair.right)]
            title = f"{pair.text}  The model says: {answers[place].answer}"
            return nlvr_overlay(*images, output, model.config, pair=place, title=title)

        return [
            {
                "answer": answer.answer,
                "probability_true": round(answer.probability_true, 6),
                "left_tokens": answer.left_tokens,
                "right_tokens": answer.right_tokens,
                "text_tokens": answer.text_tokens,
                **cost_of(answer.flops),
                **drawn,
                **pair.added,
            }
            for pair, answer, drawn in zip(pairs, answers, overlays.draw(pairs, picture), strict=True)
        ]

    return run_rows(
        args,
        source,
        prepare,
        answer,
        settings=settings_of(args, model),
        tokens=("left_tokens", "right_tokens"),
        answers=("answer", "probability_true", "text_tokens"),
        keep=("images", "text", "sentence"),
        unit="pairs",
    )


class _Pair(NamedTuple):
    """One row, ready for the model."""

    row: int
    image: Path
    right: Path
    text: str
    inputs: tuple
    added: dict
