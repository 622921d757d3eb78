"""What `madtp compress` and `madtp calibrate` have in common: options of a training run, and what it prints."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from .options import THREADS, check_device, positive

DRAWN = "shapes:"
"""What examples begin with that are drawn, not read; that of madtp.compress.examples, which is slow to import."""


def share(text: str) -> float:
    """An argparse type: a number between 0 and 1, both excluded."""
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"expected a share between 0 and 1, got {text}")
    return number


def not_negative(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return number


def share_or_none(text: str) -> float:
    """An argparse type: a number of at least 0 and below 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"expected a share of at least 0 and below 1, got {text}")
    return number


def not_negative_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, got {text}")
    return number


def above_zero(text: str) -> float:
    """An argparse type: a finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text}")
    return number


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """How a run is done, as opposed to what it learns."""
    group = parser.add_argument_group("how the run is done")
    group.add_argument(
        "--hidden-act",
        choices=["quick_gelu", "gelu"],
        help="activation of a CLIP whose weights do not tell: quick_gelu (OpenAI's), gelu (others, as LAION's)",
    )
    group.add_argument(
        "--device", default="cpu", help="cpu, cuda, cuda:1, ...; under torchrun cpu or cuda (default: cpu)"
    )
    group.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="bfloat16: matrix products in half precision, everything that is kept in float32 (default: float32)",
    )
    group.add_argument(
        "--workers", type=int, default=2, metavar="N", help="processes that prepare pictures (default: 2; 0: none)"
    )
    group.add_argument("--threads", type=positive, metavar="N", help=THREADS)
    group.add_argument("--seed", type=int, default=42, help="of everything random (default: 42)")
    group.add_argument(
        "--save-every", type=not_negative, default=300, metavar="S", help="seconds between checkpoints (default: 300)"
    )
    group.add_argument(
        "--log-every", type=positive, default=10, metavar="N", help="steps between lines of metrics (default: 10)"
    )
    group.add_argument(
        "--backend",
        choices=["reference", "cpu", "triton", "cuda"],
        help="force an implementation of the kernels (default: the best there is)",
    )
    group.add_argument("--tokenizer", metavar="SOURCE", help="directory, vocab.txt or hub id (default: the model's)")


def add_pruning_options(group, *, distill: str) -> None:
    """Options of what is learnt that both commands have; ``distill`` says what a distillation learns there."""
    group.add_argument(
        "--dictionary",
        choices=["tokens", "keep"],
        help="what it begins as: tokens of the model (default where the model has no temperature, so was never pruned), "
        "or what the model has",
    )
    group.add_argument(
        "--distill",
        type=not_negative,
        default=0.0,
        metavar="W",
        help=f"weight of the distance between surviving tokens and what they are without pruning{distill} (default: 0)",
    )
    group.add_argument(
        "--use-sizes",
        action="store_true",
        help="merged tokens weigh what they stand for; saved with the model (default: as the model was saved)",
    )


def begin(args: argparse.Namespace, *files: str) -> None:
    """Find out before the model is loaded what is missing, and what cannot be written."""
    from ..files import check_output, open_regular

    for path in files:
        if not path.startswith(DRAWN):
            open_regular(path).close()
    if args.image_root and not Path(args.image_root).is_dir():
        raise ValueError(f"--image-root: {args.image_root} is no folder")
    if args.model == "random:base" and args.task is None:
        args.usage_error("--task: random:base is for any task, so it has to be named")
    if args.workers < 0:
        raise ValueError(f"--workers: expected a number >= 0, got {args.workers}")
    check_device(args.device)
    Path(args.output, "run").mkdir(parents=True, exist_ok=True)
    check_output(Path(args.output, "result.json"), option="--output")


def load_source(args: argparse.Namespace, task: str | None, device: str):
    """The model to train, on this process's device, with its own temperature; what it lacks is initialised from the
    seed."""
    import torch

    import madtp

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = madtp.load(
        args.model, task=task, device=device, backend=args.backend, tokenizer=args.tokenizer,
        use_sizes=args.use_sizes or None, image_size=getattr(args, "image_size", None), hidden_act=args.hidden_act,
    )  # fmt: skip
    _ = model.processor.tokenizer  # a missing one is found out now
    return model


def chosen_rule(pruning, args: argparse.Namespace):
    """The rule that a command names, or the model's own ``pruning``.

    Raises:
        ValueError: no such rule, or a setting that it does not have.
    """
    from ..pruning import MADTP, METHODS, Pruning

    own = pruning if pruning.name in METHODS else MADTP(proportional_attention=pruning.proportional_attention)
    if args.method not in (None, *METHODS):
        raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {args.method!r}")
    settings = own.to_dict() if args.method in (None, own.name) else {"method": args.method}
    for setting in args.rule:
        name, _, value = setting.partition("=")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value  # a word
    if args.use_sizes:
        settings["proportional_attention"] = True
    if args.streams:
        settings["streams"] = tuple(args.streams)
    return Pruning.from_dict(settings)


def origin(args: argparse.Namespace, model, *files: str) -> dict:
    """What a run depends on beside its settings: it does not go on with another model or other data."""
    from ..compress.examples import digest
    from ..fingerprint import fingerprint

    data = [digest(path) for path in files]
    return {"task": model.config.task, "model": args.model, "data": data, "fingerprint": fingerprint(model)}


def report(result: dict, args: argparse.Namespace) -> int:
    """Print the result of a run; the exit code, which is 1 where the target was missed."""
    from ..compress.train import missed
    from ..processes import rank

    miss = missed(result, args.reduction)
    if rank() == 0:
        print(json.dumps(result, indent=2))
        if not args.quiet:
            run = Path(args.output) / "run"
            print(f"model in {args.output}; {run} holds the metrics and the checkpoint, which is no longer needed")
        if miss:
            print(f"madtp: the target was missed: {miss}", file=sys.stderr)
    return 1 if miss else 0
