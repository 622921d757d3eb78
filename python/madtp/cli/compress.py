"""`madtp compress`: fine-tune a dense model so that it costs less."""

from __future__ import annotations

import argparse

from ..tasks import TASKS
from .options import add_model, only_with, positive
from .training import (
    above_zero,
    add_pruning_options,
    add_run_options,
    begin,
    load_source,
    not_negative,
    origin,
    report,
    share,
)

_EXAMPLES = """\
examples:
  madtp compress --task nlvr --model model_base_nlvr.pth --image-root NLVR2/ --annotations nlvr_train.json \\
      --dev nlvr_dev.json --reduction 0.8 --output nlvr-0.8 --device cuda --precision bfloat16
  torchrun --nproc-per-node 8 -m madtp compress --task vqa --model DIR --image-root COCO/ \\
      --annotations vqa_train.json --dev vqa_val.json --reduction 0.5 --output vqa-0.5 --device cuda
  madtp nlvr --model nlvr-0.8 --images left.jpg right.jpg --text "Both images show a dog."

Annotations are in the formats that BLIP ships: nlvr_*.json, vqa_*.json, coco_karpathy_*.json, flickr30k_*.json
(docs/annotations.md shows a record of each), or the pairs.jsonl that `madtp demo` writes.
The loss is the task's plus 0.1 times the alignment of both modalities (captioning has no text to align). The best
epoch is chosen on the dev split, and the temperature is set there so that the target is met. The same command
goes on after an interruption and gives the same model (to the bit on a CPU). With torchrun a step takes
--batch-size x --accumulate instances of each process; several machines have to share the output folder.

A model that was never pruned begins with a dictionary of its own tokens, drawn from up to 64 training examples: with
random entries even the lowest temperature drops about half of the tokens. --distill 1 also pulls the tokens that
survive towards what they are without pruning; that takes one more forward per batch, without gradient, and a second
copy of the weights. On the small model of experiments/shapes it helped much.

Retrieval and clip train with the negatives of the batch, without MADTP's momentum encoders and queue.
The exit code is 1 where the target was missed. Training has no dropout and no stochastic depth.
"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "compress",
        help="fine-tune a dense model to a share of its GFLOPs",
        description="Fine-tune a dense model with pruning, to a target reduction of its GFLOPs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser, demo=True)
    parser.add_argument("--task", choices=list(TASKS), help="what the model is for (default: what it tells)")
    parser.add_argument("--annotations", required=True, metavar="JSON", help="of the training split")
    parser.add_argument("--dev", required=True, metavar="JSON", help="of the split on which choices are made")
    parser.add_argument("--image-root", required=True, metavar="DIR", help="where paths in the annotations start")
    parser.add_argument("--reduction", required=True, type=share, help="share of the GFLOPs to save, as 0.5")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the model goes, and the run (DIR/run)")
    group = parser.add_argument_group("training (defaults are those of MADTP's scripts)")
    for name, kind, what in (
        ("epochs", positive, "passes over the training split"),
        ("batch-size", positive, "instances per process and forward"),
        ("lr", above_zero, "highest learning rate"),
        ("weight-decay", not_negative, "of all parameters"),
    ):
        group.add_argument(f"--{name}", type=kind, help=what)
    group.add_argument("--accumulate", type=positive, default=1, metavar="N", help="forwards per step (default: 1)")
    group.add_argument(
        "--alignment", type=not_negative, metavar="W", help="weight of the alignment loss (default: 0.1)"
    )
    add_pruning_options(group, distill=", in a frozen copy of the model; 1 is a good value")
    group.add_argument(
        "--schedule", choices=["epoch", "step"], default="epoch", help="when the learning rate moves (default: epoch)"
    )
    group.add_argument(
        "--no-augment", dest="augment", action="store_false", help="train on the pictures as they are"
    )
    group = parser.add_argument_group("temperature")
    group.add_argument(
        "--controller",
        choices=["bracket", "official"],
        default="bracket",
        help="bracket: follow the measured cost (default); official: move once per epoch, by MADTP's tables",
    )
    group.add_argument(
        "--temperature", type=above_zero, metavar="T", help="where it begins (default: 0.1; official: MADTP's)"
    )
    group.add_argument(
        "--ramp",
        type=not_negative,
        metavar="SHARE",
        help="share of the steps over which the bracket's target falls to the goal (default: 0.4)",
    )
    add_run_options(parser)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Train, or go on, and save the model."""
    from ..compress.settings import Settings
    from ..compress.train import train
    from ..processes import joined

    only_with(args, args.controller == "bracket", "with --controller official", "ramp")
    begin(args, args.annotations, args.dev)
    with joined(args.device) as device:
        model = load_source(args, args.task, device)
        name = model.config.task
        task = TASKS[name](model)
        only_with(args, task.aligned, f"for {name}, which has no text to align pictures with", "alignment")
        examples = task.split(args.annotations, args.image_root, training=True)
        dev = task.split(args.dev, args.image_root, training=False)
        given = (args.epochs, args.batch_size, args.lr, args.weight_decay)
        epochs, batch_size, lr, weight_decay = (
            own if value is None else value for value, own in zip(given, task.recipe[:4], strict=True)
        )
        settings = Settings(
            reduction=args.reduction, epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay,
            accumulate=args.accumulate, alignment=0.1 if args.alignment is None else args.alignment,
            distill=args.distill, dictionary=args.dictionary, controller=args.controller, temperature=args.temperature,
            ramp=0.4 if args.ramp is None else args.ramp,
            schedule=args.schedule, precision=args.precision, augment=args.augment, seed=args.seed,
        )  # fmt: skip
        result = train(
            model, task, examples, dev, settings, args.output,
            origin=origin(args, model, args.annotations, args.dev), workers=args.workers, save_every=args.save_every,
            log_every=args.log_every, progress=False if args.quiet else None,
        )  # fmt: skip
        return report(result, args)
