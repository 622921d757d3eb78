"""Options shared by commands that run a model, and loading that model."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import madtp
from madtp_kernels import backends

from ..files import open_regular
from ..options import UsageError, add_options, given, option, parsed, positive
from ..pruning import MADTP, METHODS, Pruning, rule_named

_log = logging.getLogger("madtp")

_HOW = "how the model runs"

_GROUPINGS = {
    "instance": "nothing",
    "pair": "the two images of a pair",
    "batch": "all images and all texts of a batch, as in the official code",
}


@dataclass(kw_only=True)
class Command:
    """A subcommand; its fields are its options. `madtp` adds ``--quiet`` and ``--debug``."""

    name: ClassVar[str]
    help: ClassVar[str]
    description: ClassVar[str]
    examples: ClassVar[str] = ""

    quiet: bool = False
    debug: bool = False
    argv: Sequence[str] = ()
    """The command line, for processes that do a part of it."""

    def run(self) -> int:
        """Run the command; returns the exit code.

        Raises:
            UsageError: options that exclude each other.
        """
        raise NotImplementedError


def register(commands, kind: type[Command]) -> None:
    """Add a subcommand to the parser of `madtp`."""
    parser = commands.add_parser(
        kind.name,
        help=kind.help,
        description=kind.description,
        epilog=kind.examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, kind)
    parser.set_defaults(run=lambda args: parsed(kind, args).run(), usage_error=parser.error)


@dataclass(kw_only=True)
class ModelSource:
    """The model."""

    model: str = option(
        "checkpoint file, model directory, hub id, demo or demo-dense (small, bundled, for pictures of shapes), or "
        "random:base (real size, random weights)",
        required=True,
        metavar="SOURCE",
    )


def method() -> Any:
    """The option ``--method``."""
    text = f"rule of pruning, one of {', '.join(METHODS)} (default: the model's)"
    return option(text, None, metavar="NAME", group=_HOW)


@dataclass(kw_only=True)
class PruningOptions:
    """How much to prune."""

    method: str | None = method()
    strength: float | None = option(
        "how much it prunes: 0 is dense, higher prunes more (default: the model's)",
        type=float,
        metavar="S",
        group=_HOW,
        exclusive="pruning",
    )
    temperature: float | None = option(
        "MADTP's temperature, which is its strength (default: the checkpoint's)",
        type=float,
        metavar="T",
        group=_HOW,
        exclusive="pruning",
    )
    dense: bool = option("do not prune (same as --temperature 0)", False, group=_HOW, exclusive="pruning")


def grouping(choices: Sequence[str]) -> Any:
    """The option ``--grouping`` with these choices."""
    text = "what has to keep equally many tokens: " + "; ".join(f"{name}: {_GROUPINGS[name]}" for name in choices)
    return option(text, "instance", choices=choices, group=_HOW)


@dataclass(kw_only=True)
class RunOptions:
    """Device, precision and the like."""

    device: str = option("cpu, cuda, cuda:1, ...", "cpu", group=_HOW)
    dtype: str = option("precision", "float32", choices=["float32", "bfloat16", "float16"], group=_HOW)
    backend: str | None = option(
        "force an implementation of the kernels (default: the best available)",
        choices=["reference", "cpu", "triton", "cuda"],
        group=_HOW,
    )
    grouping: str = grouping(("instance", "batch"))
    tokenizer: str | None = option(
        "directory, vocabulary file or hub id (default: the saved model's, or the usual one from the hub)",
        metavar="SOURCE",
        group=_HOW,
    )
    hidden_act: str | None = option(
        "activation of a CLIP whose weights do not tell: quick_gelu (OpenAI's), gelu (others, as LAION's)",
        choices=["quick_gelu", "gelu"],
        group=_HOW,
    )
    threads: int | None = option(
        "CPU threads (default: torch's choice; 1 is often fastest on a busy machine)",
        type=positive,
        metavar="N",
        group=_HOW,
    )


@dataclass(kw_only=True)
class TextOptions:
    """For models that prune texts in two ways."""

    text_mode: str | None = option(
        "prune texts as they are, or padded as in the official code, whose checkpoints were trained that way "
        "(default: the saved model's, or clean)",
        choices=["clean", "compat"],
        group=_HOW,
    )


@dataclass(kw_only=True)
class BatchOptions:
    """Batch size, and what to do with existing output."""

    batch_size: int = option("rows per batch", 8, type=positive, metavar="N")
    overwrite: bool = option("start anew, whatever is there", False)


def check_device(name: str) -> None:
    """Raise ValueError for a device that is not there: loading a model onto it would find that out much later."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        why = "is built without CUDA" if torch.version.cuda is None else f"sees {torch.cuda.device_count()} of them"
        raise ValueError(f"--device {name}: there is no such GPU; torch {torch.__version__} {why}")


def check_backend(name: str | None, device: str) -> None:
    """Raise ValueError for a backend, forced by ``--backend`` or the environment, that cannot run here: the first batch would find
    that out."""
    option = "MADTP_KERNELS_BACKEND" if name is None else "--backend"
    try:
        name = name or backends.forced()
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error
    reason = name and backends.availability(name, device.partition(":")[0])
    if reason:
        raise ValueError(f"{option} {name}: {reason}")


def check_source(options, *files: str) -> None:
    """Find out before the model is loaded which file or folder is missing, or that random weights need a task."""
    for path in files:
        open_regular(path).close()
    if options.image_root and not os.path.isdir(options.image_root):
        raise ValueError(f"--image-root: {options.image_root} is no folder")
    if options.model == "random:base" and options.task is None:
        raise UsageError("--task: random:base is for any task, so it has to be named")


def only_with(options, condition: bool, what: str, *names: str) -> None:
    """Raise UsageError if options were given that say nothing unless ``condition`` holds, which is ``what``."""
    if not condition and (useless := given(options, names)):
        raise UsageError(f"{useless}: of no use {what}")


def strengths_of(options) -> tuple[str, list[float | None]]:
    """Which dial the options turn, "temperature" or "strength", and where to; [None]: where it is.

    Raises:
        ValueError: a number that makes no sense.
    """
    if getattr(options, "dense", False):
        return "temperature", [0.0]
    for dial in ("temperature", "strength"):
        found = getattr(options, dial, None)
        if found is not None:
            found = found if isinstance(found, list) else [found]
            for value in found:
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{dial}: expected a number >= 0, got {value}")
            return dial, found
    return "temperature", [None]


def rule_of(options) -> Pruning | None:
    """The rule that ``--method`` names.

    Raises:
        UsageError: there is no such rule, or it has no temperature.
    """
    name = getattr(options, "method", None)
    if name is None:
        return None
    if name != MADTP.name and getattr(options, "temperature", None):
        raise UsageError(f"--temperature: of no use with --method {name}; give --strength")
    try:
        return rule_named(name, "--method")
    except ValueError as error:
        raise UsageError(str(error)) from error


def load_model(options, tasks: Sequence[str], *, words: bool = True):
    """The model that options describe, which has to be for one of ``tasks``. With ``words``, a missing tokenizer is
    found out now.
    """
    check_device(options.device)
    check_backend(options.backend, options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    dial, asked = strengths_of(options)
    rule, strength = rule_of(options), None if None in asked else max(asked)
    # Random weights are of any task, files tell theirs.
    task = tasks[0] if len(tasks) == 1 or options.model == "random:base" else None
    model = madtp.load(
        options.model,
        task=task,
        temperature=strength if rule is None and dial == "temperature" else None,
        pruning=rule,
        text_mode=getattr(options, "text_mode", None),
        hidden_act=getattr(options, "hidden_act", None),
        device=options.device,
        dtype=getattr(torch, options.dtype),
        backend=options.backend,
        tokenizer=options.tokenizer,
        grouping=options.grouping,
    )
    if model.config.task not in tasks:
        expected = " or ".join(map(repr, tasks))
        raise ValueError(f"{options.model}: holds a model for task {model.config.task!r}, not {expected}")
    if strength is not None and (rule is not None or dial == "strength"):
        model.pruning = model.pruning.at(strength)
    if not model.pruning.active and asked == [None]:
        _log.warning(
            "%s has no pruning temperature, so nothing is pruned: give --temperature%s",
            options.model,
            ", for example 8" if options.model == "random:base" else ", or see `madtp compress` and `madtp calibrate`",
        )
    if words:
        _ = model.processor.tokenizer
    return model
