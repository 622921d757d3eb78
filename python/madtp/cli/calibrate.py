"""`madtp calibrate`: make a model cost less without training it."""

from __future__ import annotations

import argparse

from ..tasks import TASKS
from .options import add_model, positive
from .training import above_zero, add_pruning_options, add_run_options, begin, load_source, origin, report, share

_EXAMPLES = """\
examples:
  madtp calibrate --model model_base_retrieval_coco.pth --pairs pairs.jsonl --reduction 0.3 --output retrieval-0.3
  madtp calibrate --model DIR --pairs pairs.jsonl --reduction 0.5 --use-sizes --output DIR-0.5 --device cuda

a row of pairs.jsonl (paths are relative to the file; "sentence", "question", "caption" may stand for "text"):
  {"image": "dog.jpg", "text": "a dog on a beach"}
  {"images": ["left.jpg", "right.jpg"], "text": "Both images show a dog."}    (nlvr)

Only the dictionary learns, by the alignment of pictures with texts; the model's own weights stay, so that no labels
are needed, and little time. The temperature is then set so that the target is met on up to 256 of the pairs. It costs
more accuracy than `madtp compress`. More learning is not better: entries that grow alike see the same few tokens, which
puts low reductions out of reach; where the target was missed, the exit code is 1. Captioning has no text to align. The
same command goes on after an interruption.

A model that was never pruned begins with a dictionary of its own tokens, drawn from up to 64 pairs: with random
entries even the lowest temperature drops about half of the tokens.
"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "calibrate",
        help="prune a model without training it, from pairs without labels",
        description="Learn only the dictionary and the temperature for a target, from image-text pairs without labels.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser, demo=True)
    parser.add_argument("--task", choices=[name for name, task in TASKS.items() if task.aligned], help="default: what the model tells")
    parser.add_argument("--pairs", required=True, metavar="JSONL", help="pictures and texts, one JSON object per line")
    parser.add_argument("--image-root", metavar="DIR", help="where paths start (default: the folder of the pairs)")
    parser.add_argument("--reduction", required=True, type=share, help="share of the GFLOPs to save, as 0.3")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the model goes, and the run (DIR/run)")
    group = parser.add_argument_group("learning")
    group.add_argument("--steps", type=positive, default=100, help="how many, rounded up to whole epochs (default: 100)")
    group.add_argument("--batch-size", type=positive, default=16, help="pairs per step and process (default: 16)")
    group.add_argument("--lr", type=above_zero, default=1e-3, help="highest learning rate (default: 0.001)")
    add_pruning_options(group, distill="")
    add_run_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Learn the dictionary, or go on, and save the model."""
    import numpy as np

    from ..compress.calibrate import freeze_all_but_dictionary, read_pairs
    from ..compress.loaders import steps_per_epoch
    from ..compress.settings import Settings
    from ..compress.train import train
    from ..processes import joined

    begin(args, args.pairs)
    with joined(args.device) as device:
        model = load_source(args, args.task, device)
        name = model.config.task
        if not TASKS[name].aligned:
            raise ValueError(f"{args.model}: holds a model for task {name!r}, which has no text to align pictures with")
        source = origin(args, model, args.pairs)
        freeze_all_but_dictionary(model)
        pairs = read_pairs(args.pairs, name, args.image_root)
        per_epoch = steps_per_epoch(len(pairs), args.batch_size, 1)
        if per_epoch > args.steps:  # no more pairs than the steps take, from all over the file
            chosen = np.random.default_rng(args.seed).permutation(len(pairs))[: len(pairs) * args.steps // per_epoch]
            pairs, per_epoch = [pairs[number] for number in chosen], args.steps
        epochs = -(-args.steps // per_epoch)
        settings = Settings(
            reduction=args.reduction, epochs=epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=0.0,
            alignment=1.0, distill=args.distill, dictionary=args.dictionary, schedule="step",
            precision=args.precision, labels=False, seed=args.seed,
        )  # fmt: skip
        result = train(
            model, TASKS[name](model), pairs, pairs, settings, args.output, origin=source, workers=args.workers,
            save_every=args.save_every, log_every=args.log_every, progress=False if args.quiet else None,
        )  # fmt: skip
        return report(result, args)
