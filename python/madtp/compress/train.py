"""The training loop of `madtp compress` and `madtp calibrate`: to a target cost, resumable, in one process or several.

A run lives in a directory (:class:`madtp.compress.run.Run`). Everything random depends on the seed and the position in the
run, so that a run that was killed goes on exactly, and processes differ in nothing but their share of the batches.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from madtp_kernels import RaggedBatch

from ..weights import save_pretrained
from ..files import locked, replacing
from ..guidance import alignment_loss
from ..models import Model
from ..tasks.losses import distillation_loss, mean_over_processes, processes, rank
from .controller import TemperatureController, find_temperature
from .dictionary import dictionary_from_examples
from .loaders import evaluation_batches, steps_per_epoch, training_batches
from .official import OfficialController
from .run import CHECKPOINT, Run
from .schedule import cosine
from .tasks import Task

START = 0.1  # temperature of the bracketing controller
TOLERATED = 1.05  # a model is eligible on the dev split if it costs at most this multiple of the target
MEASURED = 256  # examples of the dev split on which temperatures are tried


@dataclass(frozen=True)
class Settings:
    """What determines the result of a run, beside model and data."""

    reduction: float
    """Share of the official GFLOPs to save, between 0 and 1."""
    epochs: int
    batch_size: int
    """Instances of one forward of one process."""
    lr: float
    weight_decay: float
    accumulate: int = 1
    """Forwards per step of the optimiser."""
    alignment: float = 0.1
    """Weight of the alignment loss."""
    distill: float = 0.0
    """Weight of the distance of the surviving tokens from what they are in the model as it was, without pruning."""
    dictionary: str | None = None
    """"tokens": the dictionary begins as tokens of the model; "keep": as it is; by default as it is where the model has a
    temperature, which says that it has been pruned with it."""
    controller: str = "bracket"
    """"bracket" follows the target at every step; "official" moves once per epoch, by the published tables."""
    temperature: float | None = None
    """Where the controller begins; by default 0.1, or where the official script does."""
    ramp: float = 0.4
    """Share of the steps over which the bracketing controller's target falls from the initial cost to the goal."""
    schedule: str = "epoch"
    """The learning rate follows its cosine per "epoch" (official) or per "step"."""
    precision: str = "float32"
    """"bfloat16": matrix products of training in half precision (autocast)."""
    augment: bool = True
    """Train on random views of the pictures."""
    labels: bool = True
    """Train on the task's loss; without, on the alignment loss only."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.reduction < 1:
            raise ValueError(f"reduction: expected a share between 0 and 1, got {self.reduction}")
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, choices in (
            ("controller", ("bracket", "official")),
            ("schedule", ("epoch", "step")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.dictionary not in ("tokens", "keep", None):
            raise ValueError(f"dictionary: expected tokens, keep or None, got {self.dictionary!r}")
        for name in ("lr", "weight_decay", "alignment", "distill", "ramp"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a number >= 0, got {getattr(self, name)}")


class Evaluation(NamedTuple):
    """Of a split at one temperature."""

    score: float | None
    gflops: float
    """Mean official GFLOPs of an instance."""
    dense: float
    """The same without pruning."""

    def to_dict(self) -> dict:
        return {
            "score": self.score,
            "gflops": round(self.gflops, 6),
            "reduction": round(1 - self.gflops / self.dense, 4),
        }


class Objective(nn.Module):
    """From a batch to the loss; one module, so that DistributedDataParallel sees one forward."""

    def __init__(self, model: Model, task: Task, settings: Settings) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.alignment, self.distill, self.labels = settings.alignment, settings.distill, settings.labels
        # A caption decoder has no summaries to align with.
        self.aligns = settings.alignment > 0 and model.config.task != "caption"

    def forward(
        self, batch: dict, temperature: float, seed: Sequence[int], dense: Sequence[RaggedBatch] = ()
    ) -> tuple[Tensor, dict[str, Tensor], tuple[float, float]]:
        """Loss, its terms without gradient, and official GFLOPs per instance: measured, and without pruning.

        ``dense`` are the states of :class:`Teacher` for the same batch, with distillation.
        """
        aligns = self.aligns and temperature > 0
        output = self.model(batch["pixels"], batch["texts"], temperature, summaries=aligns)
        terms = self.task.loss(self.model, batch, output, temperature, seed) if self.labels else {}
        if aligns:
            terms["alignment"] = self.alignment * alignment_loss(*self.task.summaries(output))
        if self.distill > 0:
            streams = zip(self.task.states(output), dense, strict=True)
            terms["distillation"] = self.distill * sum(distillation_loss(*state, target) for state, target in streams)
        costs = mean_costs(self.task, output, batch, temperature)
        return sum(terms.values()), {name: term.detach() for name, term in terms.items()}, costs


class Teacher:
    """A copy of a model as it is now, which runs without pruning and never learns. It belongs to each process alone."""

    def __init__(self, model: Model, task: Task) -> None:
        self.task = task
        shared = {id(model.processor): model.processor}  # a tokenizer need not be copied
        self.model = copy.deepcopy(model, shared).requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: dict) -> list[RaggedBatch]:
        """Final states of the tokens of each stream of the task."""
        output = self.model(batch["pixels"], batch["texts"], 0.0)
        return [tokens for tokens, _ in self.task.states(output)]


def costs_of(task: Task, output, batch: dict, temperature: float) -> list[tuple[float, float]]:
    """Official GFLOPs of each instance of a batch: measured, and what it would cost without pruning."""
    streams = task.streams(output, batch)
    unpruned = tuple([[lengths[0]] * len(lengths) for lengths in stream] for stream in streams)
    measured = task.flops(streams, batch, temperature > 0)
    return [(a.official, b.official) for a, b in zip(measured, task.flops(unpruned, batch, False), strict=True)]


def mean_costs(task: Task, output, batch: dict, temperature: float) -> tuple[float, float]:
    """Means of :func:`costs_of`."""
    columns = zip(*costs_of(task, output, batch, temperature), strict=True)
    measured, dense = (sum(column) / len(column) for column in columns)
    return measured, dense


@torch.inference_mode()
def evaluate(
    model: Model,
    task: Task,
    examples: Sequence,
    temperature: float,
    *,
    batch_size: int,
    workers: int = 0,
    score: bool = True,
) -> Evaluation:
    """Score and cost of examples, each counted once, however many processes share them; without ``score`` the cost only."""
    found = []
    for numbers, batch in evaluation_batches(task, examples, batch_size=batch_size, workers=workers):
        output = model(batch["pixels"], batch["texts"], temperature)
        records = task.records(model, batch, output) if score else [None] * len(numbers)
        found += zip(numbers, costs_of(task, output, batch, temperature), records, strict=True)
    if processes() > 1:
        shares = [None] * processes()
        dist.all_gather_object(shares, found)
        found = [item for share in shares for item in share]
    found.sort(key=lambda item: item[0])
    measured, dense = (sum(costs[i] for _, costs, _ in found) / len(found) for i in (0, 1))
    return Evaluation(task.score([record for *_, record in found]) if score else None, measured, dense)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that `torchrun` started, if it did; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


class _Follower(Run):
    """The run in the other processes: reads the checkpoint, writes nothing."""

    def _cut_log(self) -> None:
        pass

    def log(self, **metrics) -> None:
        pass

    def save(self) -> None:
        pass


class _Start:
    """What was measured before the first step: the share of the dense cost from which the bracketing target falls."""

    share = 1.0

    def state_dict(self) -> dict:
        return {"share": self.share}

    def load_state_dict(self, state: dict) -> None:
        self.share = state["share"]


class _Best:
    """The best model of the dev split so far. Its weights lie beside the checkpoint, named by their step."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.score, self.step = directory, None, None

    def offer(self, model: Model, score: float, step: int) -> None:
        if self.score is not None and score <= self.score:
            return
        self.score, self.step = score, step
        if rank() == 0:
            state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
            with replacing(self._path(step)) as file:
                file.write(safetensors.torch.save(state))

    def restore(self, model: Model) -> None:
        """Load the best weights; leaves the model alone if none were eligible."""
        if self.step is not None:
            model.load_state_dict(safetensors.torch.load_file(self._path(self.step)))

    def remove_others(self) -> None:
        """Once a checkpoint names the best step, no other one is needed."""
        for path in self.directory.glob("best-*.safetensors"):
            if self.step is None or path != self._path(self.step):
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.directory / f"best-{step:08d}.safetensors"

    def state_dict(self) -> dict:
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state: dict) -> None:
        self.score, self.step = state["score"], state["step"]


def _alone(function: Callable) -> Callable:
    """Runs ``function(model, task, examples, dev, settings, output, ...)`` where no other run has the same output."""

    @functools.wraps(function)
    def run(model, task, examples, dev, settings, output, **options) -> dict:
        directory = Path(output) / "run"
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory / "lock") if rank() == 0 else contextlib.nullcontext():
            return function(model, task, examples, dev, settings, output, **options)

    return run


@_alone
def train(
    model: Model,
    task: Task,
    examples: Sequence,
    dev: Sequence,
    settings: Settings,
    output: str | os.PathLike,
    *,
    origin: dict | None = None,
    workers: int = 0,
    save_every: float = 300,
    log_every: int = 10,
    progress: bool | None = None,
) -> dict:
    """Train a model to a target cost, and save it with its temperature.

    Args:
        model: in float32, the same at each call; those of its parameters that require a gradient are trained.
        task: of that model.
        examples: to train on.
        dev: the split on which temperatures are set and, with labels, the best epoch is chosen.
        settings: what determines the result.
        output: directory for the saved model and ``result.json``; the run itself is in ``output/run``: ``metrics.jsonl``,
            the checkpoint, and TensorBoard's files where it is installed. Called again in the same way, a run goes on.
            Where several machines train together, they have to share it.
        origin: what else the result depends on, as JSON values: the run only goes on if they are the same.
        workers: processes that prepare pictures, per training process; 0: none beside it.
        save_every: seconds between checkpoints.
        log_every: steps between lines of metrics.
        progress: whether to show a bar; by default where standard error is a terminal.

    Returns:
        The result: temperature, score and cost on the dev split, those of the dense model, the chosen step.

    Raises:
        ValueError: settings or data that do not fit.
        FloatingPointError: the loss is not a finite number.
        BlockingIOError: another process trains to the same output.
    """
    if settings.batch_size < task.smallest_batch and settings.labels:
        raise ValueError(f"batch_size: this task's loss compares instances and needs at least {task.smallest_batch}")
    output, quiet = Path(output), None if progress is None else not progress
    per_epoch = steps_per_epoch(len(examples), settings.batch_size, settings.accumulate)
    total, device = settings.epochs * per_epoch, model.device
    size = {"batch_size": settings.batch_size, "workers": workers}
    goal = 1 - settings.reduction
    if settings.dictionary is None:
        settings = dataclasses.replace(settings, dictionary="keep" if model.temperature > 0 else "tokens")
    teacher = Teacher(model, task) if settings.distill > 0 else None

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    by_step = settings.schedule == "step"
    scheduler = cosine(optimizer, total if by_step else settings.epochs)
    brackets = settings.controller == "bracket"
    if brackets:
        temperature = START if settings.temperature is None else settings.temperature
        controller = TemperatureController(temperature, window=max(1, min(10, total // 20)))
    else:
        controller = OfficialController(model.config.task, settings.temperature)

    directory = output / "run"
    start, best = _Start(), _Best(directory)
    if not (directory / CHECKPOINT).exists():
        if settings.dictionary == "tokens":
            _take_tokens(model, task, examples, settings.seed)
        if brackets:
            # Any temperature already prunes: the target falls from what the first one costs, not from the dense cost.
            first = evaluate(model, task, dev[:MEASURED], temperature, score=False, **size)
            start.share = max(first.gflops / first.dense, goal)
            if first.gflops < goal * first.dense:
                controller.temperature = _temperature_for(model, task, dev[:MEASURED], goal, temperature, size)
    parts = {
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "controller": controller, "start": start,
        "best": best,
    }  # fmt: skip
    identity = {
        **dataclasses.asdict(settings), **(origin or {}), "use_sizes": model.use_sizes, "processes": processes(),
        "steps": total,
    }  # fmt: skip
    if rank() == 0:
        run = Run(directory, parts, identity, save_every=math.inf)
    _wait()  # the first one tidies up before the others read
    if rank() != 0:
        run = _Follower(directory, parts, identity, save_every=math.inf)
    board = _Board(directory, run.step)

    def log(**metrics) -> None:
        run.log(**metrics)
        board.add(metrics, run.step)

    def logged(name: str):
        records = [record[name] for record in run.metrics() if name in record] if rank() == 0 else None
        return _from_first(records[-1] if records else None)

    if (result := logged("result")) is not None:
        return result
    if logged("dense") is None and settings.labels:
        _wait()
        log(dense=evaluate(model, task, dev, 0.0, **size).to_dict())

    objective = Objective(model, task, settings)
    if processes() > 1:
        # Which parameters take part may depend on what is pruned.
        objective = DistributedDataParallel(objective, find_unused_parameters=True)
    batches = training_batches(
        task, examples, batch_size=settings.batch_size, accumulate=settings.accumulate, seed=settings.seed,
        steps=range(run.step, total), views=settings.augment, workers=workers,
    )  # fmt: skip
    saved = time.monotonic()
    with tqdm(total=total, initial=run.step, unit=" steps", desc="training", disable=quiet if rank() == 0 else True) as bar, _divergence(run):
        while run.step < total:
            means = _step(objective, teacher, optimizer, batches, controller.temperature, settings, run.step, device)
            used, epoch_ends = controller.temperature, (run.step + 1) % per_epoch == 0
            if brackets:
                share = min(run.step / max(settings.ramp * total, 1), 1.0)
                controller.update(means["gflops"] / means["dense_gflops"], start.share + share * (goal - start.share))
            lr = optimizer.param_groups[0]["lr"]
            if by_step or epoch_ends:
                scheduler.step()
            run.advance(**means, temperature=used)
            bar.update()
            bar.set_postfix(loss=f"{means['loss']:.4g}", temperature=f"{used:.3g}", refresh=False)
            if run.step % log_every == 0 or epoch_ends:
                log(train=run.averages(), lr=lr)
            if epoch_ends and settings.labels:
                evaluation = evaluate(model, task, dev, controller.temperature, **size)
                log(dev={"temperature": controller.temperature, **evaluation.to_dict()}, epoch=run.step // per_epoch)
                if evaluation.gflops <= TOLERATED * goal * evaluation.dense:
                    best.offer(model, evaluation.score, run.step)
                if not brackets:
                    controller.update(evaluation.gflops, goal * evaluation.dense)
            if time.monotonic() - saved >= save_every or run.step == total:
                run.save()
                if rank() == 0:
                    best.remove_others()
                saved = time.monotonic()
    _wait()  # for the best weights to be there

    best.restore(model)
    with _divergence(run):
        model.temperature = _temperature_for(model, task, dev[:MEASURED], goal, controller.temperature, size)
        evaluation = evaluate(model, task, dev, model.temperature, score=settings.labels, **size)
    result = {"temperature": model.temperature, "step": best.step if best.step is not None else total}
    result |= evaluation.to_dict() | {"dense_gflops": round(evaluation.dense, 6)}
    if settings.labels:
        result |= {"score_name": task.score_name, "dense_score": logged("dense")["score"]}
    if rank() == 0:
        save_pretrained(model, output)
        with replacing(output / "result.json") as file:
            file.write((json.dumps(result, indent=2) + "\n").encode())
    log(result=result)
    board.close()
    _wait()
    return result


@contextlib.contextmanager
def _divergence(run: Run) -> Iterator[None]:
    """Say of a model that was trained until it computes no numbers any more what has happened to it."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        if run.step == 0 or "finite" not in str(error):
            raise
        raise FloatingPointError(f"training has diverged by step {run.step}; try a lower learning rate ({error})") from error


def _take_tokens(model: Model, task: Task, examples: Sequence, seed: int) -> None:
    """Begin with a dictionary of the model's own tokens, to the bit the same in every process."""
    entries = dictionary_from_examples(model, task, examples, seed)
    if processes() > 1:
        dist.broadcast(entries, 0)
    with torch.no_grad():
        model.space_dict.copy_(entries)


def _step(
    objective, teacher, optimizer, batches, temperature: float, settings: Settings, step: int, device
) -> dict[str, float]:
    """One step of the optimiser; means over its batches, of all processes."""
    sums: dict[str, Tensor] = {}
    for number in range(settings.accumulate):
        batch = next(batches)
        last = number == settings.accumulate - 1
        alone = contextlib.nullcontext() if last or processes() == 1 else objective.no_sync()
        half = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
        with alone:
            with half:
                dense = () if teacher is None else teacher(batch)
                loss, terms, costs = objective(batch, temperature, (settings.seed, step, number, rank()), dense)
            (loss / settings.accumulate).backward()
        values = {"loss": loss.detach(), **terms, "gflops": costs[0], "dense_gflops": costs[1]}
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + torch.as_tensor(value, dtype=torch.float64, device="cpu")
    vector = (torch.stack(list(sums.values())) / settings.accumulate).to(device)
    means = dict(zip(sums, mean_over_processes(vector).tolist(), strict=True))
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"the loss is {means['loss']} at step {step + 1}; try a lower learning rate")
    optimizer.step()
    optimizer.zero_grad()
    return means


def _temperature_for(model: Model, task: Task, dev: Sequence, goal: float, start: float, size: dict) -> float:
    """The temperature at which a model costs a share ``goal`` of what it costs without pruning; ``start`` if there is none."""
    dense = evaluate(model, task, dev, 0.0, score=False, **size).gflops

    def cost(temperature: float) -> float:
        return evaluate(model, task, dev, temperature, score=False, **size).gflops

    try:
        return find_temperature(cost, goal * dense, start or START)
    except ValueError:  # a model that has been trained is not thrown away; its cost is in the result
        return start


def missed(result: dict, reduction: float) -> str | None:
    """What a result lacks of the reduction that it was to have, if anything."""
    cost, goal = result["gflops"] / result["dense_gflops"], 1 - reduction
    if cost <= TOLERATED * goal and cost >= goal + 1 - TOLERATED:
        return None
    return f"{1 - cost:.1%} fewer GFLOPs instead of {reduction:.1%}; no temperature was found that comes closer"


class _Board:
    """TensorBoard's files, where it is installed."""

    def __init__(self, directory: Path, step: int) -> None:
        self._writer = None
        if rank() == 0:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def add(self, metrics: dict, step: int) -> None:
        if self._writer is None:
            return
        for name, value in metrics.items():
            values = value if isinstance(value, dict) else {"": value}
            for part, number in values.items():
                if isinstance(number, (int, float)):
                    self._writer.add_scalar(f"{name}/{part}".rstrip("/"), number, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _from_first(value):
    """What the first process says."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _wait() -> None:
    if processes() > 1:
        dist.barrier()
