"""`madtp nlvr`: is a statement about two images true? One pair, or a file of them."""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from .batch import add_batch, cost_of, run_rows, settings_of
from .options import add_model, add_model_options, load_model

_EXAMPLES = """\
examples:
  madtp nlvr --model model_base_nlvr_0.5.pth --images left.jpg right.jpg \\
      --text "The left image contains twice as many dogs as the right image." --save-overlay patches.png
  madtp nlvr --model DIR --input pairs.jsonl --output answers.jsonl --batch-size 16 --dtype bfloat16

a row of pairs.jsonl (paths are relative to the file; "sentence" may stand for "text"):
  {"images": ["left.jpg", "right.jpg"], "text": "Both images show a dog."}

a row of answers.jsonl, in the order of the input; row is the line number there:
  {"row": 1, "answer": true, "probability_true": 0.91, "left_tokens": [...], ...}
  {"row": 2, "error": "cat.jpg: No such file or directory"}
Answers are collected in answers.jsonl.partial until all are there. After an interruption, the same command
goes on where it stopped. A row that cannot be answered does not stop the run, but makes the exit code 1.
"""


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
    single = parser.add_argument_group("one pair")
    single.add_argument("--images", nargs=2, metavar=("LEFT", "RIGHT"), help="the two image files")
    single.add_argument("--text", help="the statement")
    single.add_argument(
        "--save-overlay", metavar="PNG", help="draw the surviving patches of each layer over the images"
    )
    many = parser.add_argument_group("many pairs")
    many.add_argument("--input", metavar="JSONL", help="pairs, one JSON object per line")
    many.add_argument("--output", metavar="JSONL", help="where the answers go")
    add_batch(many, "pairs")
    add_model_options(parser, groupings=("instance", "pair", "batch"))
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Answer one pair or a file of them."""
    single = [args.images, args.text]
    many = [args.input, args.output]
    if all(single) and not any(many):
        return _one(args)
    if all(many) and not any([*single, args.save_overlay]):
        return _many(args)
    args.usage_error(
        "give either --images and --text, or --input and --output (--save-overlay goes with --images)"
    )


def _one(args: argparse.Namespace) -> int:
    from .. import flops
    from ..predict import nlvr_batch
    from ..processing import load_image
    from ..report.overlay import nlvr_overlay

    images = [load_image(path) for path in args.images]
    model = load_model(args, ["nlvr"])
    instance = model.processor(*images, args.text)
    (answer,), output = nlvr_batch(model, [instance])
    print(f"answer        {answer.answer}  (probability of True: {answer.probability_true:.3f})")
    streams = {
        "left image": answer.left_tokens,
        "right image": answer.right_tokens,
        "text": answer.text_tokens,
    }
    for name, tokens in streams.items():
        print(f"{name:12}  {tokens[0]} tokens, {tokens[-1]} after {len(tokens) - 1} layers: {tokens}")
    unpruned = [[tokens[0]] * len(tokens) for tokens in streams.values()]
    dense = flops.nlvr(model.config, list(zip(*unpruned[:2], strict=True)), unpruned[2], guided=False)
    print(f"GFLOPs        {answer.flops.official:.4g}  (dense: {dense.official:.4g})")

    # The first call has also loaded kernels and packed weights; a second one tells what an answer takes.
    start = time.perf_counter()
    nlvr_batch(model, [instance])
    print(f"time          {(time.perf_counter() - start) * 1000:.1f} ms")
    print(f"peak memory   {_peak_gib(model.device):.2f} GiB")
    if args.save_overlay:
        nlvr_overlay(*images, output, model.config).save(args.save_overlay)
        print(f"overlay       {args.save_overlay}")
    return 0


def _peak_gib(device) -> float:
    """Most memory in use so far: of the GPU, or of this process."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _many(args: argparse.Namespace) -> int:
    from ..predict import nlvr_batch

    folder = Path(args.input).parent
    model = load_model(args, ["nlvr"])

    def prepare(_: int, row: dict):
        images, text = row.get("images"), row.get("text", row.get("sentence"))
        if not (
            isinstance(images, list) and len(images) == 2 and all(isinstance(path, str) for path in images)
        ):
            raise ValueError(f"'images' must be a list of two paths, got {images!r}")
        if text is None:
            raise ValueError("'text' (or 'sentence') is missing")
        return model.processor(folder / images[0], folder / images[1], text)

    return run_rows(
        args,
        args.input,
        prepare,
        lambda instances: [_record(answer) for answer in nlvr_batch(model, instances)[0]],
        settings=settings_of(args, model),
        tokens=("left_tokens", "right_tokens"),
        unit="pairs",
    )


def _record(answer) -> dict:
    return {
        "answer": answer.answer,
        "probability_true": round(answer.probability_true, 6),
        "left_tokens": answer.left_tokens,
        "right_tokens": answer.right_tokens,
        "text_tokens": answer.text_tokens,
        **cost_of(answer.flops),
    }
