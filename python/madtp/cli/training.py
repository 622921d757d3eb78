"""What `madtp compress` and `madtp calibrate` have in common: options of a training run, and what it prints."""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

import madtp

from ..compress.examples import DRAWN, digest
from ..compress.settings import RUN, Settings
from ..compress.train import missed
from ..files import check_output
from ..fingerprint import fingerprint
from ..options import not_negative, option, positive, same
from ..processes import rank
from ..pruning import MADTP, METHODS, Pruning
from ..tasks import TASKS
from .options import ModelSource, RunOptions, check_backend, check_device, check_source


@dataclass(kw_only=True)
class TrainingOptions(ModelSource):
    """How a run is done, as opposed to what it learns."""

    task: str | None = option("what the model is for (default: what it tells)", choices=list(TASKS))
    output: str = option("where the model goes, and the run (DIR/run)", MISSING, metavar="DIR")
    use_sizes: bool = option(
        "merged tokens weigh what they stand for; saved with the model (default: as the model was saved)", False,
        group="pruning",
    )  # fmt: skip
    hidden_act: str | None = same(RunOptions, "hidden_act", group=RUN)
    device: str = same(
        RunOptions, "device", "cpu", help="cpu, cuda, cuda:1, ...; under torchrun cpu or cuda", group=RUN
    )
    workers: int = option("processes that prepare pictures; 0: none", 2, type=int, metavar="N", group=RUN)
    threads: int | None = same(RunOptions, "threads", group=RUN)
    save_every: float = option("seconds between checkpoints", 300.0, type=not_negative, metavar="S", group=RUN)
    log_every: int = option("steps between lines of metrics", 10, type=positive, metavar="N", group=RUN)
    backend: str | None = same(RunOptions, "backend", group=RUN)
    tokenizer: str | None = same(RunOptions, "tokenizer", group=RUN)


def begin(options: TrainingOptions, *files: str, record: str = "run/settings.json") -> None:
    """Find out before the model is loaded what is missing, and what cannot be written.

    Args:
        files: annotations that have to be there.
        record: a file in the output by which a model there is known as one of an earlier run: any other is not replaced.
    """
    check_source(options, *(path for path in files if not path.startswith(DRAWN)))
    if options.workers < 0:
        raise ValueError(f"--workers: expected a number >= 0, got {options.workers}")
    check_device(options.device)
    check_backend(options.backend, options.device)
    output = Path(options.output)
    if not (output / record).exists() and any(
        (output / name).exists() for name in ("config.json", "model.safetensors")
    ):
        raise ValueError(f"--output: {output} holds a model that no run of this command made; name another folder")
    (output / record).parent.mkdir(parents=True, exist_ok=True)
    check_output(output / record, option="--output")


def load_source(options: TrainingOptions, task: str | None, device: str):
    """The model to train, on this process's device, with its own temperature; what it lacks is initialised from the
    seed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(Settings.seed if options.seed is None else options.seed)
    model = madtp.load(
        options.model, task=task, device=device, backend=options.backend, tokenizer=options.tokenizer,
        use_sizes=options.use_sizes or None, image_size=getattr(options, "image_size", None), hidden_act=options.hidden_act,
    )  # fmt: skip
    _ = model.processor.tokenizer  # a missing one is found out now
    return model


def chosen_rule(pruning, options: TrainingOptions):
    """The rule that a command names, or the model's own ``pruning``.

    Raises:
        ValueError: no such rule, or a setting that it does not have.
    """
    own = pruning if pruning.name in METHODS else MADTP(proportional_attention=pruning.proportional_attention)
    if options.method not in (None, *METHODS):
        raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {options.method!r}")
    settings = own.to_dict() if options.method in (None, own.name) else {"method": options.method}
    for setting in options.rule or ():
        name, found, value = setting.partition("=")
        if not found:
            raise ValueError(f"--rule: expected NAME=VALUE, got {setting!r}")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value  # a word
    if options.use_sizes:
        settings["proportional_attention"] = True
    if options.streams:
        settings["streams"] = tuple(options.streams)
    return Pruning.from_dict(settings)


def origin(options: TrainingOptions, model, *files: str) -> dict:
    """What a run depends on beside its settings: it does not go on with another model or other data."""
    data = [digest(path) for path in files]
    return {"task": model.config.task, "model": options.model, "data": data, "fingerprint": fingerprint(model)}


def report(result: dict, options: TrainingOptions) -> int:
    """Print the result of a run; the exit code, which is 1 where the target was missed."""
    miss = missed(result, options.reduction)
    if rank() == 0:
        print(json.dumps(result, indent=2))
        if not options.quiet:
            run = Path(options.output) / "run"
            print(f"model in {options.output}; {run} holds the metrics and the checkpoint, which is no longer needed")
        if miss:
            print(f"madtp: the target was missed: {miss}", file=sys.stderr)
    return 1 if miss else 0
