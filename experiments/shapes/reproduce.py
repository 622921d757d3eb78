"""Make everything that docs/results.md shows, from nothing: train the dense model, compress, calibrate,
evaluate, time, report. Goes on where it stopped: what has its result is not done again.

  make reproduce                              in an environment of its own, into reproduction/
  make reproduce ARGS=--dry-run               what it would do, and how long that takes
  make reproduce JOBS=4                       four runs at a time, one thread each
  make reproduce ARGS=--short                 the main row only, from the dense model of the package

Records are DIR/results/NAME.json, the report is DIR/results.md, models are DIR/NAME. What else is in
DIR is of no use afterwards: checkpoints, and what each command printed. The list of
runs below is also what report.py goes by; experiments/shapes/results holds such records.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

SHAPES = Path(__file__).parent


class Run(NamedTuple):
    """A run of `madtp compress`."""

    method: str
    """Row of the tables, one of :data:`METHODS`."""
    reduction: float
    seed: int
    own_steps: int | None = None
    """If not those of :data:`STEPS`."""

    @property
    def name(self) -> str:
        """Of its record and its model."""
        return f"{self.method}-{self.reduction}-{self.seed}" + (f"-{self.own_steps}" if self.own_steps else "")

    @property
    def steps(self) -> int:
        """How many it takes at 145 tokens."""
        return self.own_steps or STEPS[self.reduction]


METHODS: dict[str, tuple[str, ...]] = {
    "ranked-novelty": ("--method", "ranked_novelty", "--rule", "second_look=0", "--ramp", "0"),
    "ranked-novelty-importance": (
        "--method",
        "ranked_novelty",
        "--rule",
        "second_look=0",
        "--rule",
        "order=importance",
        "--ramp",
        "0",
    ),
    "madtp-sizes": ("--method", "madtp", "--use-sizes"),
    "madtp": ("--method", "madtp"),
    "madtp-nearest": ("--method", "madtp_nearest"),
    "tome": ("--method", "tome", "--ramp", "0"),
    "cls": ("--method", "evit", "--ramp", "0"),
    "random": ("--method", "random", "--use-sizes", "--streams", "vision"),
}
"""Options of each way to prune."""
LIMITED = ("ranked_novelty", "tome", "evit")
"""Methods of `madtp compress` that take shares."""
SHARES = {
    0.3: (0.05,),
    0.5: (0.12,),
    0.6: (0.2, 0.2, 0.12),
    0.7: (0.3, 0.3, 0.1),
    0.8: (0.53, 0.4, 0.2, 0.12),
    0.85: (0.6, 0.5, 0.2, 0.12),
}
"""Share of the tokens that each layer drops, for rules with a limit per layer."""
STEPS = {0.3: 500, 0.5: 500, 0.6: 1000, 0.7: 1000, 0.8: 2800, 0.85: 2800}
RATE = {0.3: 2e-4, 0.5: 2e-4, 0.6: 5e-4, 0.7: 5e-4, 0.8: 7e-4, 0.85: 7e-4}


class Lever(NamedTuple):
    """One thing that a run changes. The strength is set so that shares meet the same cost."""

    said: str
    """In words."""
    options: tuple[str, ...]
    steps: int = 1000


LEVERS = {
    "average": Lever("averaged weights", ("--average", "0.99")),
    "half-rate": Lever("half of the learning rate", ("--lr", "3.5e-4")),
    "double-rate": Lever("twice the learning rate", ("--lr", "1.4e-3")),
    "flat": Lever("the same share in all layers", ("--shares", "0.3")),
    "early": Lever("more in the first layer, less in the others", ("--shares", "0.6", "0.4", "0.15", "0.08")),
    "late": Lever("less in the first layer, more in the others", ("--shares", "0.4", "0.4", "0.3", "0.14")),
    "annealed": Lever("thresholds that rise over 0.4 of the steps", ("--ramp", "0.4")),
    "texts-24": Lever("24 statements about a pair instead of 8", ("--texts", "24")),
    "texts-24-2800": Lever("24 statements, 2800 steps", ("--texts", "24"), 2800),
}
LEVERED = Run("ranked-novelty", 0.8, 0, own_steps=1000)
"""The run that each lever changes."""
COMPARED = tuple(
    Run(method, 0.8, 0, own_steps=1000)
    for method in ("ranked-novelty", "madtp", "madtp-nearest", "tome", "cls", "random")
)
"""Ways to prune, with as many steps of the same data."""
SEEDS = tuple(Run("ranked-novelty", 0.8, seed, own_steps=5600) for seed in (0, 1, 2))
"""The main row."""
AS_LONG = tuple(run._replace(method="madtp") for run in SEEDS)
"""The paper's rule for as many steps as the main row."""
SHIPPED = SEEDS[2]
"""The pruned model that the package holds: the best of them on the dev split."""
RUNS = (
    *SEEDS, *COMPARED, *AS_LONG,
    *(Run("ranked-novelty", reduction, 0) for reduction in (0.5, 0.6, 0.7, 0.8, 0.85)),
    *(Run(method, reduction, 0) for method in ("madtp", "madtp-nearest") for reduction in (0.5, 0.6, 0.7)),
    Run("madtp-nearest", 0.8, 0),
    *(Run(method, 0.8, 0, own_steps=1000) for method in ("ranked-novelty-importance", "madtp-sizes")),
)  # fmt: skip
"""In the order of their worth."""
SHORT = (Run("ranked-novelty", 0.8, 0),)
"""Of `--short`: the best method at 80 %, for half as many steps as the model of the package."""
CALIBRATED = (0.3, 0.5)
"""Reductions for which MADTP's dictionary and temperature are learnt, and nothing else."""
ANATOMY = {
    "shipped-as-it-is": {},
    "shipped-milder": {"strength": 0.5},
    "shipped-unpruned": {"strength": 0},
}
"""The same model under other conditions: where its errors come from."""
BATCH_MAXIMUM = Run("madtp", 0.8, 0, own_steps=1000)
"""The model that is also evaluated with equally many tokens for all samples of a batch."""
WHOLE_TEXT = Run("madtp-sizes", 0.8, 0, own_steps=1000)
"""The model that is also evaluated without pruning its text."""
LARGE, LARGE_STEPS = tuple(Run(method, 0.8, 0) for method in ("ranked-novelty", "madtp")), 500
"""Runs at 577 tokens: pictures are drawn at twice the size."""
LARGE_RATE = {"ranked-novelty": 2e-4, "madtp": 5e-4}
"""RankedNovelty begins so well there that a higher rate does harm."""
LARGE_DENSE = {
    "large-dense-begun": (0.8, 2800, 7e-4, 8),
    "large-dense-further": (0.6, 1000, 5e-4, 8),
    "large-dense": (0, 200, 3e-4, 8),
    "large-dense-longer": (0, 350, 4e-4, 8),
    "large-dense-again": (0.6, 800, 5e-4, 8),
    "large-dense-last": (0, 500, 4e-4, 8),
    "large-dense-final": (0, 400, 4e-4, 24),
}
"""Reduction, steps, highest rate and statements about a pair, of the trainings, one after the other, that make the dense model at 577
tokens of the package's, from interpolated positions. RankedNovelty prunes in some: a step at 80 % takes a quarter of the time, one
at 60 % half."""
LARGE_TESTED = ("large-dense", "large-dense-final")
"""Those whose test is recorded: the one that runs begin with, and the last."""
TIMED = sorted(
    (
        run
        for run in RUNS
        if run == SHIPPED or (run.method in ("ranked-novelty", "madtp") and run not in (*SEEDS, *COMPARED, *AS_LONG))
    ),
    key=lambda run: (run.method, run.reduction, run.steps),
    reverse=True,
)
SECONDS = {"pruned": 0.9, "large": 5.0}
"""Of a step on one thread of an Emerald Rapids core whose neighbour is busy; the other figures are minutes."""
MINUTES = {
    "dense": 30, "pairs": 0.2, "calibrate": 4, "evaluate": 1, "timing": 5, "report": 0.2,
}  # fmt: skip
"""How long each other kind of job takes on one thread of two cores; timing takes all threads."""
COMMON = (
    "--texts", "8", "--batch-size", "16", "--warmup", "50", "--weight-decay", "0.03", "--beta2", "0.98", "--clip", "1",
    "--precision", "bfloat16", "--no-augment", "--workers", "0", "--save-as", "float16",
    "--save-every", "60",
)  # fmt: skip
"""Of every run."""


class Job(NamedTuple):
    """A command, done when its result exists; without one it is always done again."""

    kind: str
    name: str
    command: tuple[str, ...]
    """What follows the interpreter."""
    result: Path | None
    minutes: float | None = None
    """How long it takes, if its kind does not say it."""

    @property
    def takes(self) -> float:
        """Minutes on one thread."""
        return MINUTES[self.kind] if self.minutes is None else self.minutes

    @property
    def done(self) -> bool:
        return self.result is not None and self.result.exists()


def script(name: str, **options: object) -> tuple[str, ...]:
    """A command of this folder, with options by name."""
    arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    return (str(SHAPES / name), *arguments)


def training(
    model: object, output: Path, steps: int, rate: float, scale: int = 1, **options: object
) -> tuple[str, ...]:
    """A command that trains a saved model on shapes."""
    drawn, pairs = ("", 256) if scale == 1 else (f",scale={scale}", 64)
    size = () if scale == 1 else ("--image-size", str(96 * scale))
    return (
        "-m", "madtp", "compress", "--model", str(model), "--annotations", f"shapes:train{drawn}", "--dev",
        f"shapes:dev,pairs={pairs}{drawn}", "--output", str(output), "--steps", str(steps), "--lr", str(rate),
        "--evaluate-every", str(steps // 5), *COMMON, *size,
        *(part for option, value in options.items() for part in (f"--{option}", str(value))),
    )  # fmt: skip


def compression(run: Run, model: object, output: Path, steps: int, scale: int = 1) -> tuple[str, ...]:
    """The command of a run."""
    rate = RATE[run.reduction] if scale == 1 else LARGE_RATE[run.method]
    command = training(model, output, steps, rate, scale, reduction=run.reduction, seed=run.seed, distill=1)
    return (*command, *rule(run.method, run.reduction))


def rule(method: str, reduction: float) -> tuple[str, ...]:
    """Options of a way to prune."""
    shares = ("--shares", *map(str, SHARES[reduction])) if METHODS[method][1] in LIMITED else ()
    return (*METHODS[method], *shares)


def stages(directory: Path, device: str = "cpu", short: bool = False) -> list[list[Job]]:
    """All jobs: those of a stage need nothing but the stages before. Timings are called by `device`.

    The short form begins with the dense model of the package, and makes the main row only.
    """
    results = directory / "results"

    def model(name: str) -> Path:
        return directory / name

    def evaluated(name: str, source: object, **options: object) -> Job:
        record = results / f"{name}.json"
        return Job("evaluate", name, script("evaluate.py", model=source, **options, record=record), record)

    def trained(run: Run, dense: object, scale: int = 1) -> Job:
        name = run.name if scale == 1 else f"large-{run.name}"
        steps = run.steps if scale == 1 else LARGE_STEPS
        minutes = steps * SECONDS["pruned" if scale == 1 else "large"] / 60 + 2
        command = compression(run, dense, model(name), steps, scale)
        return Job("compress", f"train-{name}", command, model(name) / "result.json", minutes)

    def levered(name: str) -> Job:
        run, output = LEVERED._replace(own_steps=LEVERS[name].steps), model(f"lever-{name}")
        job = trained(run, dense)
        # Of an option given twice the last counts.
        command = (*compression(run, dense, output, run.steps), *LEVERS[name].options)
        return job._replace(name=f"train-lever-{name}", command=command, result=output / "result.json")

    def dense_test(source: object) -> Job:
        return evaluated("dense-test", source, strength=0, row="dense")

    def tested(runs: Sequence[Run]) -> list[Job]:
        return [evaluated(run.name, model(run.name), row=run.method) for run in runs]

    report = Job("report", "report", script("report.py", results=results, output=directory / "results.md"), None)
    if short:
        return [[*(trained(run, "demo-dense") for run in SHORT), dense_test("demo-dense")], tested(SHORT), [report]]

    dense, large = model("dense"), model("large-dense")
    large_dense, source = [], "demo-dense"
    for seed, (name, (reduction, steps, rate, texts)) in enumerate(LARGE_DENSE.items()):
        command = training(source, model(name), steps, rate, 2, reduction=reduction, seed=seed, texts=texts)
        command += rule("ranked-novelty", reduction) if reduction else ()
        minutes = steps * SECONDS["large"] * (1 - reduction) / 60
        large_dense.append(Job("compress", f"train-{name}", command, model(name) / "result.json", minutes))
        source = model(name)
    pairs = directory / "pairs" / "train.jsonl"
    drawn = ("-m", "madtp.data.synthetic", "--output", str(pairs.parent), "--split", "train", "--pairs", "600")
    calibrated = []
    for reduction in CALIBRATED:
        output = model(f"calibrated-{reduction}")
        options = ("--reduction", str(reduction), "--output", str(output), "--use-sizes", "--workers", "0")
        calibrate = ("-m", "madtp", "calibrate", "--model", str(dense), "--pairs", str(pairs), *options)
        calibrated.append(Job("calibrate", f"calibrate-{reduction}", calibrate, output / "result.json"))
    timed = {
        f"timing-{device}": [dense, *(model(run.name) for run in TIMED)],
        f"large-timing-{device}": [model(LARGE_TESTED[-1]), model("large-dense-begun")],
    }
    timings = [
        Job("timing", name, (*script("measure.py", output=results / f"{name}.json"), "--models", *map(str, models)),
            results / f"{name}.json")
        for name, models in timed.items()
    ]  # fmt: skip
    return [
        [
            Job("dense", "train-dense", script("train_dense.py", output=dense), dense / "result.json"),
            Job("pairs", "pairs", drawn, pairs),
            large_dense[0],
        ],
        *([job] for job in large_dense[1:]),
        [
            *(trained(run, dense) for run in RUNS),
            *(trained(run, large, 2) for run in LARGE),
            *map(levered, LEVERS),
            *calibrated,
            dense_test(dense),
            *(evaluated(name, model(name), strength=0, row="dense") for name in LARGE_TESTED),
            evaluated("large-dense-begun", model("large-dense-begun"), row="ranked-novelty"),
            *(evaluated(name, "demo", row=SHIPPED.method, **options) for name, options in ANATOMY.items()),
        ],
        [
            *tested(RUNS),
            *(evaluated(f"lever-{name}", model(f"lever-{name}"), row=LEVERED.method) for name in LEVERS),
            *(evaluated(f"large-{run.name}", model(f"large-{run.name}"), row=run.method) for run in LARGE),
            evaluated(
                f"batch-maximum-{BATCH_MAXIMUM.reduction}", model(BATCH_MAXIMUM.name), grouping="batch",
                row=BATCH_MAXIMUM.method,
            ),
            evaluated(
                f"whole-text-{WHOLE_TEXT.reduction}", model(WHOLE_TEXT.name), streams="vision", row=WHOLE_TEXT.method
            ),
            *(
                evaluated(f"calibrated-{reduction}", model(f"calibrated-{reduction}"), row="calibrated")
                for reduction in CALIBRATED
            ),
        ],
        *([timing] for timing in timings),
        [report],
    ]  # fmt: skip


def minutes(jobs: list[list[Job]], at_once: int) -> float:
    """About how long the jobs that are not done take."""
    total = 0.0
    for stage in jobs:
        each = [job.takes for job in stage if not job.done]
        total += max(sum(each) / at_once, max(each, default=0))
    return total


def spoken(minutes: float) -> str:
    return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes"


def start(job: Job, logs: Path) -> subprocess.Popen:
    """Start a job; what it prints goes to its log."""
    environment = dict(os.environ)
    if job.kind != "timing":  # alone on the machine, which it measures
        environment["OMP_NUM_THREADS"] = "1"
    with open(logs / f"{job.name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *job.command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )


def do(jobs: list[Job], at_once: int, logs: Path, bar: tqdm) -> None:
    """Do the jobs of a stage, some at a time. If one fails the others are stopped, and go on another time.

    Raises:
        RuntimeError: a command failed.
    """
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job.name] = (start(job, logs), job, time.monotonic())
            bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)
            for process, job, since in list(running.values()):
                if process.poll() is None:
                    continue
                del running[job.name]
                if process.returncode or not (job.done or job.result is None):
                    log = logs / f"{job.name}.log"
                    end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
                    raise RuntimeError(
                        f"{job.name} failed with exit code {process.returncode}; the end of {log}:\n{end}"
                    )
                bar.write(f"{job.name}: {spoken((time.monotonic() - since) / 60)}")
                bar.update()
    finally:
        for process, _, _ in running.values():
            process.terminate()
        for process, _, _ in running.values():
            process.wait()


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text}")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=Path("reproduction"), metavar="DIR",
        help="for everything (default: reproduction)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--short", action="store_true", help="the main row only")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    args = parser.parse_args()
    import torch  # not before: --help has to be quick

    directory = args.directory.resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    todo = stages(directory, device, args.short)
    jobs = [job for stage in todo for job in stage]
    left = [job for job in jobs if not job.done]
    if args.dry_run:
        for job in jobs:
            print(f"# {job.name}" + (": done" if job.done else ""))
            print("python", shlex.join(job.command))
    else:
        print("to do: " + ", ".join(job.name for job in left))
    print(
        f"{len(left)} of {len(jobs)} jobs are left: about {spoken(minutes(todo, args.jobs))} with "
        f"{args.jobs} at a time, {spoken(minutes(todo, 2))} on two cores"
    )
    if args.dry_run:
        return 0

    logs = directory / "logs"
    for folder in (logs, directory / "results"):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which stops the commands
    try:
        with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit=" jobs") as bar:
            for stage in todo:
                do([job for job in stage if not job.done], args.jobs, logs, bar)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"{error}\nThe same command goes on.", file=sys.stderr)
        return 1
    print((logs / "report.log").read_text(encoding="utf-8").splitlines()[-1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
