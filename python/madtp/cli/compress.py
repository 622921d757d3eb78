"""`madtp compress`: fine-tune a dense model so that it costs less."""

from __future__ import annotations

import argparse

from ..tasks import TASKS
from .options import add_model, only_with, positive
from .training import (
    DRAWN,
    above_zero,
    add_pruning_options,
    add_run_options,
    begin,
    chosen_rule,
    load_source,
    not_negative,
    not_negative_int,
    origin,
    report,
    share_or_none,
)

_EXAMPLES = """\
examples:
  madtp compress --task nlvr --model model_base_nlvr.pth --image-root NLVR2/ --annotations nlvr_train.json \\
      --dev nlvr_dev.json --reduction 0.8 --output nlvr-0.8 --device cuda --precision bfloat16
  torchrun --nproc-per-node 8 -m madtp compress --task vqa --model DIR --image-root COCO/ \\
      --annotations vqa_train.json --dev vqa_val.json --reduction 0.5 --output vqa-0.5 --device cuda
  madtp compress --model demo-dense --annotations shapes:train --dev shapes:dev --texts 8 --steps 1000 --warmup 50 \\
      --lr 5e-4 --distill 1 --method ranked_novelty --shares 0.3 0.3 0.1 --reduction 0.7 --output shapes-0.7
  madtp nlvr --model nlvr-0.8 --images left.jpg right.jpg --text "Both images show a dog."

Annotations are in the formats that BLIP ships: nlvr_*.json, vqa_*.json, coco_karpathy_*.json, flickr30k_*.json
(docs/annotations.md shows a record of each), or the pairs.jsonl that `madtp demo` writes.
The loss is the task's plus 0.1 times the alignment of both modalities (captioning has no text to align). The best
epoch is chosen on the dev split, and the temperature is set there so that the target is met. The same command
goes on after an interruption and gives the same model (to the bit on a CPU). With torchrun a step takes
--batch-size x --accumulate instances of each process; several machines have to share the output folder.

--method names the rule that prunes: madtp (default), ranked_novelty, tome, atm, pitome, evit, topk or random. For
rules with a limit per layer --shares says what share of the tokens each vision layer drops, and thresholds follow the
batch; at the end they are taken anew from the dev split, without its labels.
--texts 8 trains on up to eight statements about a pair of pictures at a time (nlvr), whose pictures are then encoded
once. "shapes:train" and "shapes:dev" instead of files are pairs of shapes, drawn as they are needed (docs/compress.md).

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
    parser.add_argument("--annotations", required=True, metavar="JSON", help="of the training split, or shapes:train")
    parser.add_argument("--dev", required=True, metavar="JSON", help="of the split for choices, or shapes:dev")
    parser.add_argument("--image-root", metavar="DIR", help="where paths in the annotations start")
    parser.add_argument(
        "--reduction", required=True, type=share_or_none, help="share of the GFLOPs to save, as 0.5; 0: train unpruned"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="where the model goes, and the run (DIR/run)")
    parser.add_argument(
        "--image-size", type=positive, metavar="PIXELS", help="train at another size; positions are interpolated"
    )
    group = parser.add_argument_group("training (defaults are those of MADTP's scripts)")
    for name, kind, metavar, what in (
        ("epochs", positive, "N", "passes over the training split"),
        ("steps", positive, "N", "steps of the optimiser, instead of epochs; the learning rate then moves by step"),
        ("batch-size", positive, "N", "examples per process and forward"),
        (
            "texts",
            positive,
            "K",
            "up to so many texts about an image are one example, encoded with one image (default: 1)",
        ),
        ("accumulate", positive, "N", "forwards per step (default: 1)"),
        ("lr", above_zero, "RATE", "highest learning rate"),
        ("final-lr", not_negative, "SHARE", "learning rate at the end, as a share of the highest (default: 0)"),
        ("warmup", not_negative_int, "N", "steps over which the learning rate rises (default: 0)"),
        ("weight-decay", not_negative, "W", "of all parameters"),
        ("clip", above_zero, "NORM", "longest gradient; longer ones are shortened (default: none)"),
        ("beta2", not_negative, "B", "AdamW's memory of squared gradients (default: 0.999)"),
        ("average", not_negative, "MEMORY", "save a moving average of the weights, as 0.99 (default: 0, none)"),
        ("alignment", not_negative, "W", "weight of the alignment loss (default: 0.1)"),
        ("evaluate-every", positive, "N", "steps between evaluations on the dev split (default: an epoch)"),
    ):
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=what)
    group.add_argument(
        "--schedule",
        choices=["epoch", "step", "decay"],
        help="when the learning rate moves: by a cosine per epoch (default) or per step, or in a line at the end",
    )
    group.add_argument("--no-augment", dest="augment", action="store_false", help="train on the pictures as they are")
    group.add_argument(
        "--save-as", choices=["float32", "float16"], help="dtype of the saved weights (default: float32)"
    )
    group = parser.add_argument_group("pruning")
    add_pruning_options(group, distill=", in a frozen copy of the model; 1 is a good value")
    group.add_argument("--method", metavar="NAME", help="the rule that prunes (default: the model's, or madtp)")
    group.add_argument(
        "--rule", action="append", default=[], metavar="NAME=VALUE", help="a setting of the rule; may be given again"
    )
    group.add_argument(
        "--streams", nargs="+", choices=["vision", "text"], help="which tokens are pruned (default: as the rule has it)"
    )
    group.add_argument(
        "--shares",
        nargs="+",
        type=share_or_none,
        metavar="SHARE",
        help="share of the tokens that each vision layer drops; the last one is for all further layers",
    )
    group.add_argument(
        "--controller",
        choices=["bracket", "official"],
        default="bracket",
        help="bracket: follow the measured cost (default); official: move once per epoch, by MADTP's tables",
    )
    group.add_argument(
        "--temperature",
        type=above_zero,
        metavar="T",
        help="strength at which it begins (default: 0.1 for madtp; official: MADTP's)",
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
    from ..compress.examples import read_examples
    from ..compress.settings import Settings
    from ..compress.train import train
    from ..processes import joined

    only_with(args, args.controller == "bracket", "with --controller official", "ramp")
    only_with(args, args.epochs is None, "with --epochs", "steps")
    if args.image_root is None and not all(path.startswith(DRAWN) for path in (args.annotations, args.dev)):
        args.usage_error("--image-root: needed where annotations are files")
    begin(args, args.annotations, args.dev)
    with joined(args.device) as device:
        model = load_source(args, args.task, device)
        source = origin(args, model, args.annotations, args.dev)
        task = TASKS[model.config.task](model)
        only_with(args, task.aligned, f"for {task.name}, which has no text to align pictures with", "alignment")
        keeps = "keep" if model.guided else "tokens"  # before another rule takes the place of the model's
        model.pruning = chosen_rule(model.pruning, args)
        chosen = {name: getattr(args, name, None) for name in Settings.names()}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if args.steps is not None:
            chosen.setdefault("schedule", "step")
        epochs, batch_size, lr, weight_decay = task.recipe[:4]
        settings = Settings(
            **{
                "epochs": epochs, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "dictionary": keeps,
                **chosen,
            }
        )  # fmt: skip
        examples = read_examples(task, args.annotations, args.image_root, settings.texts, training=True)
        dev = read_examples(task, args.dev, args.image_root, settings.texts, training=False)
        result = train(
            model, task, examples, dev, settings, args.output, origin=source, workers=args.workers,
            save_every=args.save_every, log_every=args.log_every, progress=False if args.quiet else None,
        )  # fmt: skip
        return report(result, args)
