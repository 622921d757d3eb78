"""`madtp vqa`: questions about images."""

from __future__ import annotations

import argparse
import hashlib
import json

from .batch import (
    UNFINISHED,
    Item,
    Overlays,
    add_images,
    add_output,
    add_overlay,
    check_output,
    cost_of,
    image_of,
    image_rows,
    run_rows,
    settings_of,
    truncation,
)
from .options import add_model, add_model_options, load_model, only_with, positive

_EXAMPLES = f"""\
examples:
  madtp vqa --model DIR photo.jpg --question "How many dogs are there?"
  madtp vqa --model model_base_vqa_0.5.pth photos/ --question "Is it raining?" --output answers.jsonl
  madtp vqa --model DIR --input questions.jsonl --output answers.jsonl --answers answer_list.txt

a row of questions.jsonl (--question serves rows without one; paths are relative to the file):
  {{"image": "a.jpg", "question": "What is the dog doing?"}}

a row of answers.jsonl; row is its number in the input, tokens are counts before and after each layer:
  {{"row": 1, "image": "a.jpg", "question": ..., "answer": "running", "image_tokens": [901, ...], ...}}
{UNFINISHED}"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "vqa",
        help="answer questions about images",
        description="Answers questions about images, in words of its own or with the best of a list.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_images(parser, '{"image": "a.jpg", "question": "What is it?"}')
    parser.add_argument("--question", metavar="TEXT", help="the question about all images that have none")
    add_output(parser)
    add_overlay(parser)
    search = parser.add_argument_group("how answers are found")
    search.add_argument(
        "--answers",
        metavar="FILE",
        help="choose among these, one per line or a JSON list; by default answers are written",
    )
    search.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help="of the list, score in full those that begin most likely (default: 128)",
    )
    search.add_argument(
        "--num-beams",
        type=positive,
        metavar="N",
        help="of the beam search for written answers; 1 is greedy (default: 3)",
    )
    search.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="of written answers, in tokens (default: 10)",
    )
    add_model_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Answer questions."""
    from ..inputs import read_texts
    from ..predict import vqa_batch

    only_with(args, bool(args.answers), "without --answers", "top_k")
    only_with(args, not args.answers, "with --answers", "num_beams", "max_length")
    if args.images and args.question is None:
        args.usage_error("--question is missing")
    source, folder = image_rows(args)
    check_output(args, source)
    overlays = Overlays(args, source)
    if args.answers:
        candidates, k = read_texts(args.answers), args.top_k or 128
        digest = hashlib.sha256(json.dumps(candidates).encode()).hexdigest()[:16]
        options, settings = {"candidates": candidates, "k": k}, {"answers": digest, "k": k}
    else:
        options = settings = {"num_beams": args.num_beams or 3, "max_length": args.max_length or 10}
    model = load_model(args, ["vqa"])

    def prepare(row: int, fields: dict) -> Item:
        image = image_of(fields, folder)
        if "question" not in fields:
            raise ValueError("'question' is missing, and there is no --question")
        if not isinstance(fields["question"], str):
            raise ValueError(f"'question' must be a string, got {json.dumps(fields['question'])}")
        return Item(row, image, model.processor(image, fields["question"]), truncation(model, fields["question"]))

    def answer(items: list[Item]) -> list[dict]:
        answers, output = vqa_batch(model, [item.inputs for item in items], **options)
        pictures = overlays.patches(items, output.vision, model)
        return [
            {
                "answer": answer.answer,
                **({} if answer.score is None else {"score": round(answer.score, 6)}),
                "image_tokens": answer.image_tokens,
                "question_tokens": answer.question_tokens,
                **cost_of(answer.flops),
                **picture,
                **item.added,
            }
            for item, answer, picture in zip(items, answers, pictures, strict=True)
        ]

    return run_rows(
        args,
        source,
        prepare,
        answer,
        settings=settings_of(args, model, question=args.question, **settings),
        tokens=["image_tokens"],
        answers=["answer", "score", "question_tokens"],
        keep=["image", "question"],
        defaults={} if args.question is None else {"question": args.question},
    )
