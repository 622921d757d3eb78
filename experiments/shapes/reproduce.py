"""Make everything that docs/results.md shows, from nothing: train the dense model, compress, calibrate,
evaluate, time, report. Goes on where it stopped: what has its result is not done again.

  make reproduce                              in an environment of its own, into reproduction/
  make reproduce ARGS=--dry-run               what it would do, and how long that takes
  make reproduce JOBS=4                       four runs at a time, one thread each

Records are DIR/results/NAME.json, the report is DIR/results.md, models are DIR/NAME/model. What else is in
DIR is of no use afterwards: checkpoints, what each command printed, answers of the dense model. The list of
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
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

SHAPES = Path(__file__).parent


class Run(NamedTuple):
    """A run of compress.py."""

    method: str
    reduction: float
    seed: int

    @property
    def name(self) -> str:
        """Of its record and its model."""
        return f"{self.method}-{self.reduction}-{self.seed}"


RUNS = (
    *(Run("madtp-sizes", reduction, seed) for reduction in (0.8, 0.5) for seed in (0, 1, 2)),
    *(Run("madtp-sizes", reduction, 0) for reduction in (0.7, 0.6, 0.3)),
    *(Run("madtp", reduction, 0) for reduction in (0.8, 0.5)),
    *(Run(method, 0.8, 0) for method in ("random", "cls", "no-alignment", "vision-only")),
)
SHIPPED, SHIPPED_STEPS = Run("madtp-sizes", 0.8, 0), 1600
"""The pruned model that the package holds: one of the runs, but trained longer. It is called "shipped"."""
ANATOMY = {
    "shipped-as-it-is": {},
    "shipped-text-whole": {"method": "vision-only"},
    "shipped-milder": {"temperature": 3.2},
    "shipped-unpruned": {"temperature": 0},
}
"""The same model under other conditions: where its errors come from."""
CALIBRATED = (0.3, 0.5)
"""Reductions for which only dictionary and temperature are learnt."""
BATCH_MAXIMUM = Run("madtp-sizes", 0.8, 0)
"""The model that is also evaluated with equally many tokens for all samples of a group."""
GROUP = 32
TIMED = [run for run in RUNS if run.seed == 0 and run.method in ("madtp-sizes", "madtp")]
MINUTES = {
    "dense": 22, "pairs": 0.2, "compress": 11, "shipped": 30, "calibrate": 4, "evaluate": 1, "timing": 5, "report": 0.2,
}  # fmt: skip
"""How long each kind of job takes on one thread of two cores; timing takes all threads."""


class Job(NamedTuple):
    """A command, done when its result exists; without one it is always done again."""

    kind: str
    name: str
    command: tuple[str, ...]
    """What follows the interpreter."""
    result: Path | None

    @property
    def done(self) -> bool:
        return self.result is not None and self.result.exists()


def script(name: str, **options: object) -> tuple[str, ...]:
    """A command of this folder, with options by name."""
    arguments = [part for option, value in options.items() for part in (f"--{option}", str(value))]
    return (str(SHAPES / name), *arguments)


def stages(directory: Path, device: str = "cpu") -> list[list[Job]]:
    """All jobs: those of a stage need nothing but the stages before. Timings are called by `device`."""
    results = directory / "results"

    def model(name: str) -> Path:
        return directory / name / "model"

    def trained(kind: str, name: str, program: str, **options: object) -> Job:
        record = results / f"{name}.json"
        command = script(
            program, **options, directory=directory / name / "run", output=model(name), record=record
        )
        return Job(kind, name, command, record)

    def evaluated(name: str, source: str, **options: object) -> Job:
        record = results / f"{name}.json"
        command = script("evaluate.py", model=model(source), **options, record=record)
        return Job("evaluate", name, command, record)

    dense, pairs, compressed, calibrated = model("dense"), directory / "pairs" / "train.jsonl", [], []
    for run in RUNS:
        options = {**run._asdict(), "model": dense, "teacher-cache": directory / f"teacher-{run.seed}"}
        compressed.append(trained("compress", run.name, "compress.py", **options))
    options = {**SHIPPED._asdict(), "model": dense, "teacher-cache": directory / f"teacher-{SHIPPED.seed}"}
    compressed.append(trained("shipped", "shipped", "compress.py", steps=SHIPPED_STEPS, **options))
    for reduction in CALIBRATED:
        output = model(f"calibrated-{reduction}")
        command = ("-m", "madtp", "calibrate", "--model", str(dense), "--pairs", str(pairs))
        command += ("--reduction", str(reduction), "--output", str(output), "--use-sizes", "--workers", "0")
        calibrated.append(Job("calibrate", f"calibrate-{reduction}", command, output / "result.json"))
    drawn = ("-m", "madtp.data.synthetic", "--output", str(pairs.parent), "--split", "train")
    drawn += ("--pairs", "600")
    timing = results / f"timing-{device}.json"
    report = directory / "results.md"
    timed = [str(dense), *(str(model(run.name)) for run in sorted(TIMED, reverse=True))]
    return [
        [trained("dense", "dense", "train_dense.py"), Job("pairs", "pairs", drawn, pairs)],
        [*compressed, *calibrated, evaluated("dense-test", "dense", temperature=0)],
        [
            evaluated(f"batch-maximum-{BATCH_MAXIMUM.reduction}", BATCH_MAXIMUM.name, groups=GROUP),
            *(evaluated(f"calibrated-{reduction}", f"calibrated-{reduction}") for reduction in CALIBRATED),
            *(evaluated(name, "shipped", **options) for name, options in ANATOMY.items()),
        ],
        [Job("timing", "timing", (*script("measure.py", output=timing), "--models", *timed), timing)],
        [Job("report", "report", script("report.py", results=results, output=report), None)],
    ]


def minutes(jobs: list[list[Job]], at_once: int) -> float:
    """About how long the jobs that are not done take."""
    total = 0.0
    for stage in jobs:
        each = [MINUTES[job.kind] for job in stage if not job.done]
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("reproduction"), metavar="DIR",
        help="for everything (default: reproduction)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=positive, default=2, help="runs at a time, a thread each (default: 2)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    args = parser.parse_args()
    import torch  # not before: --help has to be quick

    directory = args.directory.resolve()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    todo = stages(directory, device)
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
