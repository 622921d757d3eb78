"""The training loop of `madtp compress` and `madtp calibrate`: to a target cost, resumable, in one process or several.

A run lives in a directory (:class:`madtp.compress.run.Run`). Everything random depends on the seed and the position in
the run, so that a run that was killed goes on exactly, and processes differ in nothing but their share of the batches.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import safetensors.torch
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..files import replacing, write_json
from ..model import Model
from ..processes import from_first, mean_over_processes, processes, rank, wait
from ..pruning import MADTP, METHODS, Pruning
from ..resume import locked
from ..search import find_strength
from ..tasks import Task
from ..weights import save_pretrained
from ..weights.files import read_file
from .average import WeightAverage
from .controller import BracketController, RampController
from .dictionary import dictionary_from_examples
from .evaluation import Evaluation, evaluate
from .loaders import evaluation_batches, steps_per_epoch, training_batches
from .objective import Objective, Teacher
from .official import OfficialController
from .run import CHECKPOINT, Run, Saved
from .schedule import cosine, linear_decay
from .settings import Settings
from .thresholds import Following, dial_for

__all__ = ["Trainer", "missed", "train"]

TOLERATED = 1.05  # a model is eligible on the dev split if it costs at most this multiple of the target
MEASURED = 256  # examples of the dev split on which strengths are tried
CALIBRATED = 32  # examples from which thresholds are taken at the beginning; at the end it is MEASURED


def train(
    model: Model,
    task: Task,
    examples: Sequence,
    dev: Sequence,
    settings: Settings,
    output: str | os.PathLike,
    **options,
) -> dict:
    """Train a model to a target cost, and save it with its pruning.

    Arguments are those of :class:`Trainer`. ``output`` gets the saved model and ``result.json``; the run itself is in
    ``output/run``: ``metrics.jsonl``, the checkpoint, and TensorBoard's files where it is installed. Called again in the
    same way, a run goes on. Where several machines train together, they have to share it.

    Returns:
        The result: temperature, score and cost on the dev split, those of the dense model, the chosen step.

    Raises:
        ValueError: settings or data that do not fit.
        FloatingPointError: the loss is not a finite number.
        ResumeError: another process trains to the same output.
    """
    directory = Path(output) / "run"
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / "lock", output) if rank() == 0 else contextlib.nullcontext():
        trainer = Trainer(model, task, examples, dev, settings, output, **options)
        if (result := trainer.prepare()) is not None:
            return result
        while not trainer.done:
            trainer.epoch()
        return trainer.finish()


def _tokens(model: Model) -> str:
    """The task of a model, and the numbers and sizes of its tokens."""
    vision, text = model.config.vision, model.config.text
    words = "" if text is None else f", words of {text.hidden_size}"
    return f"{model.config.task}, {vision.num_patches} patches of {vision.embed_dim} numbers{words}"


class Trainer:
    """A training run in three parts: :meth:`prepare`, :meth:`epoch` until it is :attr:`done`, :meth:`finish`.

    :func:`train` goes through them, and keeps other processes out.

    Args:
        model: in float32, the same at each call; those of its parameters that require a gradient are trained.
        task: of that model.
        examples: to train on.
        dev: the split on which the strength of the pruning is set and, with labels, the best weights are chosen.
        settings: what determines the result.
        output: directory for what :func:`train` says.
        teacher: whose tokens those that survive are pulled to with distillation; by default the model as it is now.
        origin: what else the result depends on, as JSON values: the run only goes on if they are the same.
        workers: processes that prepare pictures, per training process; 0: none beside it.
        save_every: seconds between checkpoints.
        log_every: steps between lines of metrics.
        progress: whether to show a bar; by default where standard error is a terminal.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        examples: Sequence,
        dev: Sequence,
        settings: Settings,
        output: str | os.PathLike,
        *,
        teacher: Model | None = None,
        origin: dict | None = None,
        workers: int = 0,
        save_every: float = 300,
        log_every: int = 10,
        progress: bool | None = None,
    ) -> None:
        if settings.batch_size < task.smallest_batch and settings.labels:
            raise ValueError(
                f"batch_size: this task's loss compares instances and needs at least {task.smallest_batch}"
            )
        if settings.dictionary is None:
            settings = replace(settings, dictionary="keep" if model.guided else "tokens")
        self.model, self.task, self.examples, self.dev, self.settings = model, task, examples, dev, settings
        self.output, self.origin, self.workers = Path(output), origin or {}, workers
        self.directory = self.output / "run"
        self.save_every, self.log_every, self.progress = save_every, log_every, progress

        self.per_epoch = steps_per_epoch(len(examples), settings.batch_size, settings.accumulate)
        self.total = settings.steps or settings.epochs * self.per_epoch
        self.interval = settings.evaluate_every or self.per_epoch
        self.prunes, self.goal = settings.reduction > 0, 1 - settings.reduction
        self.brackets = self.prunes and settings.controller == "bracket"
        rule = model.pruning if model.pruning.name in METHODS else MADTP()
        self.dial = dial_for(rule, settings.shares, model.config.vision.depth, settings.memory)
        if self.prunes and not self.brackets and not isinstance(rule, MADTP):
            raise ValueError(f"controller: official has tables for madtp only, got the rule {rule.name!r}")

        half = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
        if teacher is not None and (made := _tokens(teacher)) != (wanted := _tokens(model)):
            raise ValueError(f"teacher: expected a model of {wanted}, got one of {made}")
        self.teacher = Teacher(model if teacher is None else teacher, task, half) if settings.distill > 0 else None
        self.objective: nn.Module = Objective(model, task, settings)
        # What is learnt beside the model (heads of auxiliary losses) belongs to the task.
        trained = [parameter for parameter in self.objective.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, settings.beta2)
        )
        self.scheduler = self._schedule()
        self.controller = self._controller()
        self.average = WeightAverage(model, settings.average)
        self.start, self.best = _Start(), _Best(self.directory)

    def _schedule(self) -> torch.optim.lr_scheduler.LambdaLR:
        settings = self.settings
        make = linear_decay if settings.schedule == "decay" else cosine
        steps = settings.epochs if settings.schedule == "epoch" else self.total
        return make(self.optimizer, steps, settings.warmup, settings.final_lr)

    def _controller(self) -> BracketController | RampController | OfficialController:
        settings = self.settings
        if self.prunes and not self.brackets:
            return OfficialController(self.task.recipe, settings.temperature)
        strength = self.dial.start if settings.temperature is None else settings.temperature
        if isinstance(self.dial, Following):
            return RampController(strength, settings.ramp * self.total)
        return BracketController(strength, window=max(1, min(10, self.total // 20)), bounds=self.dial.bounds)

    # ---- prepare

    def prepare(self) -> dict | None:
        """Begin the run, or go on with it; the result, if it is finished already."""
        if not (self.directory / CHECKPOINT).exists() and self.prunes:
            self._begin()
        parts = {
            "model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler,
            "controller": self.controller, "start": self.start, "best": self.best,
        }  # fmt: skip
        if isinstance(self.dial, Following):
            parts["thresholds"] = self.dial
        if self.settings.average:
            parts["average"] = self.average
        if self.task.auxiliary is not None:
            parts["auxiliary"] = self.task.auxiliary
        identity = {
            **self.settings.to_dict(),
            **self.origin,
            **self._rule(),
            "processes": processes(),
            "steps": self.total,
        }
        defaults = {**Settings.defaults(), "pruning": MADTP(MADTP.bounds[0]).to_dict()}
        if rank() == 0:
            self.run = Run(self.directory, parts, identity, defaults)
        wait()  # the first one tidies up before the others read
        if rank() != 0:
            self.run = _Follower(self.directory, parts, identity, defaults)
        self.board = _Board(self.directory, self.run.step)

        if (result := self._logged("result")) is not None:
            return result
        if self._logged("dense") is None and self.settings.labels:
            wait()
            self._log(dense=self._evaluate(Pruning()).to_dict())
        if processes() > 1:
            # Which parameters take part may depend on what is pruned.
            self.objective = DistributedDataParallel(self.objective, find_unused_parameters=True)
        self.batches = training_batches(
            self.task, self.examples, batch_size=self.settings.batch_size, accumulate=self.settings.accumulate,
            seed=self.settings.seed, steps=range(self.run.step, self.total), views=self.settings.augment,
            shuffle=self.settings.shuffle, workers=self.workers,
        )  # fmt: skip
        self.saved = time.monotonic()
        return None

    def _rule(self) -> dict:
        """What the result depends on of the rule, under the names that runs have always had it."""
        rule = self.dial.rule if not isinstance(self.dial, Following) else self.dial.rule.limited("shares", ())
        dial = replace(rule.at(rule.bounds[0]), proportional_attention=False)  # whatever it is set to at present
        return {"use_sizes": rule.proportional_attention, "pruning": dial.to_dict()}

    def _begin(self) -> None:
        """What a run has to know before its first step."""
        if self.settings.dictionary == "tokens" and self.dial.rule.needs_dictionary:
            _take_tokens(self.model, self.task, self.examples, self.settings.seed)
        if not self.brackets:
            return
        if isinstance(self.dial, Following):
            self.controller.goal = self._strength()
            self._calibrated(self.controller.strength)
            return
        # Any temperature already prunes: the target falls from what the first one costs, not from the dense cost.
        first = self._evaluate(self._calibrated(self.controller.strength), self.dev[:MEASURED], score=False)
        self.start.share = max(first.gflops / first.dense, self.goal)
        if first.gflops < self.goal * first.dense or self.settings.ramp == 0:
            self.controller.strength = self._strength()
            self._calibrated(self.controller.strength)

    def _calibrated(self, strength: float, count: int = CALIBRATED) -> Pruning:
        """The rule for the model as it is now; ``count`` examples of the dev split set its thresholds, if it has
        any."""
        batches = []
        if isinstance(self.dial, Following):
            batches = [batch for _, batch in evaluation_batches(self.task, self.dev[:count], **self._size())]
        return self.dial.calibrate(self.model, self.task, batches, strength)

    # ---- epoch

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.run.step >= self.total

    @property
    def pruning(self) -> Pruning:
        """The rule of the present step."""
        return self.dial.at(self.controller.strength) if self.prunes else Pruning()

    def epoch(self) -> None:
        """Train until the dev split is due, and evaluate it."""
        quiet = None if self.progress is None else not self.progress
        end = min((self.run.step // self.interval + 1) * self.interval, self.total)
        with (
            tqdm(
                total=self.total, initial=self.run.step, unit=" steps", desc="training",
                disable=quiet if rank() == 0 else True,
            ) as bar,
            _divergence(self.run),
        ):  # fmt: skip
            while self.run.step < end:
                used, means = self.controller.strength, self._step()
                bar.update()
                bar.set_postfix(loss=f"{means['loss']:.4g}", strength=f"{used:.3g}", refresh=False)
                if self.run.step == end and self.settings.labels:
                    self._choose()
                if time.monotonic() - self.saved >= self.save_every or self.done:
                    self._save()

    def _step(self) -> dict[str, float]:
        """One step of the optimiser, and everything that moves with it; the means of its metrics."""
        settings, step, used = self.settings, self.run.step, self.controller.strength
        self.task.at(step)
        means = self._learn()
        if isinstance(self.controller, RampController):
            self.controller.advance()
        elif self.brackets:
            share = min(step / max(settings.ramp * self.total, 1), 1.0)
            target = self.start.share + share * (self.goal - self.start.share)
            self.controller.update(means["gflops"] / means["dense_gflops"], target)
        lr = self.optimizer.param_groups[0]["lr"]
        if settings.schedule != "epoch" or (step + 1) % self.per_epoch == 0:
            self.scheduler.step()
        self.average.update(self.model)
        self.run.advance(**means, **({self.dial_name: used} if self.prunes else {}))
        if self.run.step % self.log_every == 0 or self.run.step % self.interval == 0:
            self._log(train=self.run.averages(), lr=lr)
        return means

    def _learn(self) -> dict[str, float]:
        """Gradients, and the step that the optimiser makes of them; means over its batches, of all processes."""
        settings, device = self.settings, self.model.device
        sums: dict[str, Tensor] = {}
        found: list[list[Tensor]] = []
        for number in range(settings.accumulate):
            batch = next(self.batches)
            last = number == settings.accumulate - 1
            alone = contextlib.nullcontext() if last or processes() == 1 else self.objective.no_sync()
            half = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")
            with alone:
                with half:
                    dense = () if self.teacher is None else self.teacher(batch)
                    seed = (settings.seed, self.run.step, number, rank())
                    loss, terms, costs, scores = self.objective(batch, self.pruning, seed, dense)
                (loss / settings.accumulate).backward()
            found.append(scores)
            values = {"loss": loss.detach(), **terms, "gflops": costs[0], "dense_gflops": costs[1]}
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + torch.as_tensor(value, dtype=torch.float64, device="cpu")
        vector = (torch.stack(list(sums.values())) / settings.accumulate).to(device)
        means = dict(zip(sums, mean_over_processes(vector).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(
                f"the loss is {means['loss']} at step {self.run.step + 1}; try a lower learning rate"
            )
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(self.objective.parameters(), settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if found[0]:
            self.dial.follow([torch.cat(layer) for layer in zip(*found, strict=True)], self.controller.strength)
        return means

    def _choose(self) -> None:
        """Evaluate the dev split, and keep the weights if they are the best so far."""
        with self.average.shown(self.model):
            evaluation = self._evaluate(self.pruning)
            strength = {self.dial_name: self.controller.strength} if self.prunes else {}
            self._log(dev={**strength, **evaluation.to_dict()}, epoch=-(-self.run.step // self.per_epoch))
            if evaluation.gflops <= TOLERATED * self.goal * evaluation.dense:
                self.best.offer(self.model, evaluation.score, self.run.step)
        if self.prunes and not self.brackets:
            self.controller.update(evaluation.gflops, self.goal * evaluation.dense)

    def _save(self) -> None:
        self.run.save()
        if rank() == 0:
            self.best.remove_others()
        self.saved = time.monotonic()

    # ---- finish

    def finish(self) -> dict:
        """Take the best weights, set the strength of the pruning, and save the model; the result."""
        wait()  # for the best weights to be there
        model, settings = self.model, self.settings
        if self.best.step is None:
            self.average.put(model)
        self.best.restore(model)
        if settings.save_as == "float16":  # the weights as they are saved
            model.half().float()
        with _divergence(self.run):
            rule = self._set() if self.prunes else Pruning()
            evaluation = self._evaluate(rule, score=settings.labels)
        step = self.best.step if self.best.step is not None else self.total
        result = {self.dial_name: rule.strength, "step": step} | evaluation.to_dict()
        result |= {"dense_gflops": round(evaluation.dense, 6), "pruning": rule.to_dict()}
        if settings.labels:
            result |= {"score_name": self.task.score_name, "dense_score": self._logged("dense")["score"]}
        if self.prunes:
            model.pruning = rule
        if rank() == 0:
            save_pretrained(model.half() if settings.save_as == "float16" else model, self.output)
            write_json(self.output / "result.json", result)
        model.float()
        self._log(result=result)
        self.board.close()
        wait()
        return result

    def _set(self) -> Pruning:
        """The rule at which the dev split costs what it should."""
        if not isinstance(self.dial, Following):
            return self.dial.at(self._strength())
        # New thresholds for the weights as they are in the end; then all of them move together by what is missing.
        rule = self._calibrated(self.controller.strength, MEASURED)
        return rule.at(self._solve(rule.at, 1.0, rule.bounds))

    # ---- what they share

    def _size(self) -> dict:
        return {"batch_size": self.settings.batch_size, "workers": self.workers}

    @property
    def dial_name(self) -> str:
        """What metrics call the strength."""
        return "temperature" if isinstance(self.dial.rule, MADTP) else "strength"

    def _evaluate(self, pruning: Pruning, examples: Sequence | None = None, score: bool = True) -> Evaluation:
        examples = self.dev if examples is None else examples
        return evaluate(self.model, self.task, examples, pruning, score=score, **self._size())

    def _strength(self) -> float:
        """The strength at which the dev split costs what it should; the present one if there is none."""
        return self._solve(self._calibrated, self.controller.strength or self.dial.start, self.dial.bounds)

    def _solve(self, at: Callable[[float], Pruning], start: float, bounds: tuple[float, float]) -> float:
        """The strength at which the rule ``at(strength)`` costs what it should on the dev split; ``start`` if there is
        none."""

        def share(strength: float) -> float:
            found = self._evaluate(at(strength), self.dev[:MEASURED], score=False)
            return found.gflops / found.dense

        try:
            return find_strength(share, self.goal, start, bounds=bounds)
        except ValueError:  # a model that has been trained is not thrown away; its cost is in the result
            return start

    def _log(self, **metrics) -> None:
        self.run.log(**metrics)
        self.board.add(metrics, self.run.step)

    def _logged(self, name: str):
        """The last metric of this name, in every process; None if there is none."""
        records = [record[name] for record in self.run.metrics() if name in record] if rank() == 0 else None
        return from_first(records[-1] if records else None)


class _Follower(Run):
    """The run in the other processes: reads the checkpoint, writes nothing."""

    def _cut_log(self) -> None:
        pass

    def log(self, **metrics) -> None:
        pass

    def save(self) -> None:
        pass


class _Start(Saved):
    """What was measured before the first step: the share of the dense cost from which the bracketing target falls."""

    saved: ClassVar = {"share": "share"}
    share = 1.0


class _Best(Saved):
    """The best model of the dev split so far. Its weights lie beside the checkpoint, named by their step."""

    saved: ClassVar = {"score": "score", "step": "step"}

    def __init__(self, directory: Path) -> None:
        self.directory, self.score, self.step = directory, None, None

    def offer(self, model: Model, score: float, step: int) -> None:
        """Take the model's weights if it scores higher than any before."""
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
            model.load_state_dict(read_file(self._path(self.step))[0])  # which names a damaged or missing one

    def remove_others(self) -> None:
        """Once a checkpoint names the best step, no other one is needed."""
        for path in self.directory.glob("best-*.safetensors"):
            if self.step is None or path != self._path(self.step):
                path.unlink()

    def _path(self, step: int) -> Path:
        return self.directory / f"best-{step:08d}.safetensors"


@contextlib.contextmanager
def _divergence(run: Run) -> Iterator[None]:
    """Say of a model that was trained until it computes no numbers any more what has happened to it."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        if run.step == 0 or "finite" not in str(error):
            raise
        raise FloatingPointError(
            f"training has diverged by step {run.step}; try a lower learning rate ({error})"
        ) from error


def _take_tokens(model: Model, task: Task, examples: Sequence, seed: int) -> None:
    """Begin with a dictionary of the model's own tokens, to the bit the same in every process."""
    entries = dictionary_from_examples(model, task, examples, seed)
    if processes() > 1:
        dist.broadcast(entries, 0)
    with torch.no_grad():
        model.space_dict.copy_(entries)


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
