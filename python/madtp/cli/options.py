"""Options that every command with a model has, and the model they describe."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

_log = logging.getLogger("madtp")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


THREADS = "CPU threads (default: torch's choice; on a machine that is busy, 1 is often the fastest by far)"

_GROUPS = {
    "instance": "nothing (default)",
    "pair": "the two images of a pair",
    "batch": "all images and all texts of a batch, as in the official code",
}


def add_model(parser: argparse.ArgumentParser, *, demo: bool = False) -> None:
    """Which model; `demo` says whether the bundled ones will do."""
    bundled = "demo or demo-dense (small, bundled, for pictures of shapes), " if demo else ""
    parser.add_argument(
        "--model",
        required=True,
        metavar="SOURCE",
        help=f"checkpoint file, model directory, hub id, {bundled}or random:base (real size, random weights)",
    )


def add_model_options(
    parser: argparse.ArgumentParser,
    *,
    groupings: Sequence[str] = ("instance", "batch"),
    text_modes: bool = False,
    temperature: bool = True,
) -> None:
    """Everything but the model itself.

    Args:
        groupings: those that the command's models have.
        text_modes: whether they have two modes of pruned text.
        temperature: whether there is one, for the command to run at.
    """
    group = parser.add_argument_group("how the model runs")
    if temperature:
        pruning = group.add_mutually_exclusive_group()
        pruning.add_argument(
            "--temperature",
            type=float,
            metavar="T",
            help="pruning temperature, higher prunes more (default: the checkpoint's)",
        )
        pruning.add_argument(
            "--dense", action="store_true", help="do not prune (the same as --temperature 0)"
        )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="precision (default: float32)",
    )
    group.add_argument(
        "--backend",
        choices=["reference", "cpu", "triton", "cuda"],
        help="force an implementation of the kernels (default: the best there is)",
    )
    group.add_argument(
        "--grouping",
        choices=groupings,
        default="instance",
        help="what keeps equally many tokens: "
        + "; ".join(f"{name}: {_GROUPS[name]}" for name in groupings),
    )
    if text_modes:
        group.add_argument(
            "--text-mode",
            choices=["clean", "compat"],
            help="how texts are pruned: as they are, or padded as in the official code, with which its "
            "checkpoints were trained (default: the saved model's, or clean)",
        )
    group.add_argument(
        "--tokenizer",
        metavar="SOURCE",
        help="directory, vocabulary file or hub id (default: the saved model's, or from the hub the one that "
        "models of its kind were trained with)",
    )
    group.add_argument("--threads", type=positive, metavar="N", help=THREADS)


def check_device(name: str) -> None:
    """Raise ValueError for a device that is not there: loading a model onto it would find that out much later."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = "is built without CUDA" if torch.version.cuda is None else f"sees {torch.cuda.device_count()} of them"
        raise ValueError(f"--device {name}: there is no such GPU; torch {torch.__version__} {why}")


def only_with(args: argparse.Namespace, condition: bool, what: str, *names: str) -> None:
    """End with a usage error if options were given that say nothing unless ``condition`` holds, which is ``what``."""
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if given and not condition:
        args.usage_error(f"{', '.join(given)}: of no use {what}")


def load_model(args: argparse.Namespace, tasks: Sequence[str], *, words: bool = True):
    """The model that the options describe, which has to be for one of `tasks`. With `words`, a missing
    tokenizer is found out now.
    """
    import torch

    import madtp

    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    temperature = 0.0 if getattr(args, "dense", False) else getattr(args, "temperature", None)
    asked = getattr(args, "temperatures", None) or [temperature]
    for value in asked:
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"temperature: expected a number >= 0, got {value}")
    # Random weights are of any task, files tell theirs.
    task = tasks[0] if len(tasks) == 1 or args.model == "random:base" else None
    model = madtp.load(
        args.model,
        task=task,
        temperature=None if None in asked else max(asked),
        text_mode=getattr(args, "text_mode", None),
        device=args.device,
        dtype=getattr(torch, args.dtype),
        backend=args.backend,
        tokenizer=args.tokenizer,
        grouping=args.grouping,
    )
    if model.config.task not in tasks:
        expected = " or ".join(map(repr, tasks))
        raise ValueError(f"{args.model}: holds a model for task {model.config.task!r}, not {expected}")
    if model.temperature == 0 and asked == [None]:
        _log.warning(
            "%s has no pruning temperature, so nothing is pruned: give --temperature%s",
            args.model,
            ", for example 8" if args.model == "random:base" else ", or see `madtp compress` and `madtp calibrate`",
        )
    if words:
        _ = model.processor.tokenizer
    return model
