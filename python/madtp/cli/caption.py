"""`madtp caption`: what is in these images?"""

from __future__ import annotations

import argparse
import zlib

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
)
from .options import add_model, add_model_options, load_model, only_with, positive

_EXAMPLES = f"""\
examples:
  madtp caption --model DIR photo.jpg --save-overlay patches.png
  madtp caption --model model_base_caption_0.5.pth photos/ --output captions.jsonl --batch-size 16
  madtp caption --model DIR 'photos/**/*.jpg' --sample --seed 1 --min-length 10 --max-length 40
  madtp caption --model DIR --input rows.jsonl --output captions.jsonl --dtype bfloat16

a row of captions.jsonl; row is its number in the input, image_tokens are counts before and after each layer:
  {{"row": 1, "image": "photos/a.jpg", "caption": "a dog on a beach", "image_tokens": [577, ...], ...}}
{UNFINISHED}"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "caption",
        help="describe images",
        description="Describes images in a sentence each, by beam search or by sampling.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_images(parser, '{"image": "a.jpg"}')
    add_output(parser)
    add_overlay(parser)
    search = parser.add_argument_group("how captions are written")
    kind = search.add_mutually_exclusive_group()
    kind.add_argument(
        "--num-beams",
        type=positive,
        metavar="N",
        help="of the beam search; 1 is greedy (default: 3)",
    )
    kind.add_argument(
        "--sample", action="store_true", help="sample from the most likely words (nucleus) instead"
    )
    search.add_argument(
        "--top-p", type=float, metavar="P", help="with --sample: probability of those words (default: 0.9)"
    )
    search.add_argument(
        "--seed", type=int, metavar="N", help="with --sample: of the random numbers; each row has its own (default: 0)"
    )
    lengths = "in tokens, prompt included (default: {})"
    search.add_argument("--max-length", type=positive, default=20, metavar="N", help=lengths.format(20))
    search.add_argument("--min-length", type=positive, metavar="N", help=lengths.format("5, or --max-length"))
    add_model_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Caption images."""
    from ..predict import caption_batch

    only_with(args, args.sample, "without --sample", "top_p", "seed")
    top_p, seed = (0.9 if args.top_p is None else args.top_p), args.seed or 0
    if not 0 < top_p <= 1:
        args.usage_error(f"--top-p: expected a number above 0, at most 1, got {top_p}")
    min_length = min(5, args.max_length) if args.min_length is None else args.min_length
    if min_length > args.max_length:
        args.usage_error(f"--min-length: expected at most --max-length {args.max_length}, got {min_length}")
    source, folder = image_rows(args)
    check_output(args, source)
    overlays = Overlays(args, source)
    options = {"max_length": args.max_length, "min_length": min_length}
    options |= {"top_p": top_p} if args.sample else {"num_beams": args.num_beams or 3}
    model = load_model(args, ["caption"])

    def prepare(row: int, fields: dict) -> Item:
        image = image_of(fields, folder)
        return Item(row, image, model.processor(image))

    def answer(items: list[Item]) -> list[dict]:
        seeds = {"seeds": [_seed(seed, item.row) for item in items]} if args.sample else {}
        captions, output = caption_batch(model, [item.inputs for item in items], **options, **seeds)
        pictures = overlays.patches(items, output.vision, model)
        return [
            {
                "caption": caption.caption,
                "image_tokens": caption.image_tokens,
                **cost_of(caption.flops),
                **picture,
            }
            for caption, picture in zip(captions, pictures, strict=True)
        ]

    return run_rows(
        args,
        source,
        prepare,
        answer,
        settings=settings_of(args, model, **options, **({"seed": seed} if args.sample else {})),
        tokens=["image_tokens"],
        answers=["caption"],
        keep=["image"],
    )


def _seed(seed: int, row: int) -> int:
    """A number of its own for each row, so that its caption does not depend on the others."""
    return zlib.crc32(f"{seed} {row}".encode())
