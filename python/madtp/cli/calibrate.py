"""`madtp calibrate`: make a model cost less without training it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..pruning import METHODS, MergingPruning
from ..tasks import TASKS
from .options import add_model, positive
from .training import above_zero, add_pruning_options, add_run_options, begin, load_source, origin, report, share

MERGING = [name for name, rule in METHODS.items() if issubclass(rule, MergingPruning)]
"""Rules that have limits to calibrate."""
_EXAMPLES = """\
examples:
  madtp calibrate --model model_base_retrieval_coco.pth --pairs pairs.jsonl --reduction 0.3 --output retrieval-0.3
  madtp calibrate --model DIR --pairs pairs.jsonl --reduction 0.5 --use-sizes --output DIR-0.5 --device cuda
  madtp calibrate --model DIR --pairs pairs.jsonl --reduction 0.4 --method ranked_novelty --output DIR-0.4

a row of pairs.jsonl (paths are relative to the file; "sentence", "question", "caption" may stand for "text"):
  {"image": "dog.jpg", "text": "a dog on a beach"}
  {"images": ["left.jpg", "right.jpg"], "text": "Both images show a dog."}    (nlvr)

Only the dictionary learns, by the alignment of pictures with texts; the model's own weights stay, so that no labels
are needed, and little time. The temperature is then set so that the target is met on up to 256 of the pairs. It costs
more accuracy than `madtp compress`. More learning is not better: entries that grow alike see the same few tokens, which
puts low reductions out of reach; where the target was missed, the exit code is 1. Captioning has no text to align. The
same command goes on after an interruption.

With --method nothing learns: the rule's limit for each layer is set so that the target is met, in seconds to minutes.
20 to 40 pairs choose how the tokens that go are spread over the layers, by what is left of the image features; all
pairs meet the target. Inputs save more or less than their mean (the spread is printed): 200 tell it to within 1 %.

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
    parser.add_argument("--task", choices=list(TASKS), help="default: what the model tells")
    parser.add_argument("--pairs", required=True, metavar="JSONL", help="pictures and texts, one JSON object per line")
    parser.add_argument("--image-root", metavar="DIR", help="where paths start (default: the folder of the pairs)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--reduction", type=share, help="share of the GFLOPs to save, as 0.3")
    target.add_argument("--keep-ratio", type=share, metavar="R", help="share of the GFLOPs to keep, as 0.7")
    target.add_argument("--target-gflops", type=above_zero, metavar="G", help="GFLOPs of an instance (with --method)")
    parser.add_argument(
        "--method", choices=MERGING, help="set the limits of this rule (default: learn the dictionary of MADTP)"
    )
    parser.add_argument(
        "--inputs",
        type=positive,
        default=40,
        metavar="N",
        help="with --method: pairs that choose a schedule (default: 40)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the model goes, and the run (DIR/run)")
    group = parser.add_argument_group("learning")
    group.add_argument(
        "--steps", type=positive, default=100, help="how many, rounded up to whole epochs (default: 100)"
    )
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
    if args.keep_ratio is not None:
        args.reduction = 1 - args.keep_ratio
    if args.method is not None:
        return _set_limits(args)
    if args.reduction is None:
        args.usage_error("--target-gflops: expects --method")
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


def _set_limits(args: argparse.Namespace) -> int:
    """Set the limits of a rule, save the model and what is known of the calibration."""
    import madtp

    from ..compress.calibrate import calibrate_rule, read_pairs
    from ..files import replacing

    model = load_source(args, args.task, args.device)
    pairs = read_pairs(args.pairs, model.config.task, args.image_root)
    found = calibrate_rule(
        model, pairs, args.method, args.reduction, target_gflops=args.target_gflops, inputs=args.inputs,
        batch_size=args.batch_size,
    )  # fmt: skip
    model.pruning = found.rule
    madtp.save_pretrained(model, args.output)
    with replacing(Path(args.output) / "calibration.json") as file:
        record = {"model": args.model, "pairs": args.pairs, **found.to_dict()}
        file.write((json.dumps(record, indent=2) + "\n").encode())
    print(f"{args.method}, schedule {found.schedule}: {found.gflops:.4g} GFLOPs of {found.dense_gflops:.4g}")
    print(f"saved on {found.inputs} inputs: {found.saving:.1%} (expected on others: within {found.uncertainty:.1%})")
    if found.uncertainty > 0.01:
        print(f"to meet a target to within 1% on others, give about {found.inputs_for(0.01)} inputs")
    print(f"saved by one input: {found.least:.1%} to {found.most:.1%}, standard deviation {found.deviation:.1%}")
    print(f"cosine to dense features: {found.cosine:.5f}, tenth percentile {found.cosine_p10:.5f}")
    print(args.output)
    return 0
