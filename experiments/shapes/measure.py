"""Time saved models against the dense one: one statement about two pictures at a time, 32, and 64 at once.

  python experiments/shapes/measure.py --models DENSE PRUNED... --output results/timing-cpu.json

All models answer the same 64 statements of the test split, each about a pair of its own, through their
ordinary forward; the dense one uses fused attention. They take turns in one process. In batches, models pruned by MADTP
also run as batch-maximum execution, where all samples keep as many tokens as the one that needs most.
Before anything is timed, a batch has to give the answers that its statements get alone. The record says on
which device, with how many threads, and at which revision. benchmarks/ has the clocks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import madtp
from madtp import flops
from madtp.data.synthetic import Shapes
from madtp.pruning import MADTP, Pruning
from madtp.tasks.nlvr.model import NLVR, NLVROutput

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.measure import (
    DEVICE,
    DTYPES,
    Comparison,
    WrongAnswer,
    compare,
    require,
    time_lines,
    write_records,
)  # fmt: skip

STATEMENTS = 64
AGREE = {"float32": 1e-3, "bfloat16": 0.3}
"""Relative error between a batch and its statements alone; in bfloat16 a token may go either way."""
MAXIMUM = ", batch maximum"

Pairs = tuple[torch.Tensor, list[torch.Tensor]]
"""Pixels ``[2B, 3, S, S]``, left pictures first, and B texts."""


def draw(dtype: torch.dtype, side: int) -> Pairs:
    """The first statement about each of the first pairs of the test split, on pictures of so many pixels a side."""
    batch = Shapes("test", scale=side // 96).batch(range(STATEMENTS), statements=1)
    lengths = batch.lengths.flatten().tolist()
    ids = [row[:n].to(DEVICE) for row, n in zip(batch.input_ids.flatten(0, 1), lengths, strict=True)]
    return batch.pixels.to(DEVICE, dtype), ids


def split(pairs: Pairs, size: int) -> list[Pairs]:
    """Batches of so many statements, in order."""
    pixels, ids = pairs
    left, right = pixels.split(size), pixels[len(ids) :].split(size)
    starts = range(0, len(ids), size)
    return [(torch.cat([left[n], right[n]]), ids[start : start + size]) for n, start in enumerate(starts)]


def gflops(model: NLVR, outputs: list[NLVROutput]) -> float:
    """Mean official GFLOPs of a statement."""
    costs = [cost for output in outputs for cost in flops.from_output(model.config, output, pruning=model.pruning)]
    return sum(cost.official for cost in costs) / len(costs)


def check(name: str, model: NLVR, batches: list[Pairs], singles: list[Pairs], dtype: str) -> float:
    """GFLOPs of a statement.

    Raises:
        WrongAnswer: a batch differs from its statements alone.
    """
    together = [model(*batch) for batch in batches]
    alone = torch.cat([model(*single).logits for single in singles])
    require(torch.cat([output.logits for output in together]), alone, AGREE[dtype], name)
    return gflops(model, together)


def check_maximum(name: str, model: NLVR, batches: list[Pairs]) -> float:
    """The same for batch-maximum execution: pictures of a batch keep equally many tokens, and answers are finite.

    Raises:
        WrongAnswer: they do not.
    """
    outputs = [model(*batch) for batch in batches]
    for output in outputs:
        if len(set(map(tuple, flops.stream_lengths(output.vision)))) != 1 or not output.logits.isfinite().all():
            raise WrongAnswer(f"{name}: pictures keep different numbers of tokens, or answers are not finite")
    return gflops(model, outputs)


def comparisons(
    models: dict[str, NLVR], dtype: str, sizes: list[int], rounds: int, progress: Callable
) -> list[Comparison]:
    """All statements in batches of each of `sizes`. `progress` is called after each timed call."""
    pairs = draw(DTYPES[dtype], next(iter(models.values())).config.vision.image_size)
    singles = split(pairs, 1)

    def answer(model: NLVR, batches: list[Pairs], grouping: str) -> Callable:
        def call() -> None:
            model.grouping = grouping
            for batch in batches:
                model(*batch)
            progress()

        return call

    # Batch maximum is how released MADTP prunes; other rules know no batch.
    pruned = {
        name: model for name, model in models.items() if model.pruning.active and isinstance(model.pruning, MADTP)
    }
    strengths = {name: model.pruning.strength for name, model in models.items()}

    def comparison(size: int) -> Comparison:
        batches = split(pairs, size)
        candidates = {name: answer(model, batches, "instance") for name, model in models.items()}
        if size > 1:
            candidates |= {name + MAXIMUM: answer(model, batches, "batch") for name, model in pruned.items()}
        facts = {"dtype": dtype, "batch": size, "statements": STATEMENTS, "strength": strengths}

        def check_all() -> None:
            cost = facts["gflops_per_statement"] = {}
            for name, model in models.items():
                model.grouping = "instance"
                cost[name] = check(name, model, batches, singles, dtype)
            for name, model in pruned.items() if size > 1 else ():
                model.grouping = "batch"
                cost[name + MAXIMUM] = check_maximum(name, model, batches)

        return Comparison("shapes", candidates, check_all, facts, capture=False, min_rounds=rounds, warm_up=False)

    return [comparison(size) for size in sizes]


def name_of(folder: Path) -> str:
    """Of a model: its folder's, or where that is just "model", that of the folder which it is in."""
    return folder.parent.name if folder.name == "model" else folder.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", required=True, metavar="DIR", help="saved models; the first one is run dense"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file of times")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32"], help="default: float32")
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 32, STATEMENTS], metavar="N",
        help=f"statements at a time, a divisor of {STATEMENTS} (default: 1 32 {STATEMENTS})",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="times that each model answers (default: 15)")
    parser.add_argument("--device-name", metavar="NAME", help="what to call this machine")
    args = parser.parse_args()
    names = [name_of(Path(source).resolve()) for source in args.models]
    if len(set(names)) < len(names) or args.rounds < 1:
        parser.error("--models: expected folders of different names; --rounds: expected a number >= 1")
    if wrong := [size for size in args.batches if size < 1 or STATEMENTS % size]:
        parser.error(f"--batches: expected divisors of {STATEMENTS}, got {' '.join(map(str, wrong))}")

    records = []
    with tqdm(unit=" calls") as bar:
        for dtype in args.dtypes:
            models = {
                name: madtp.load(source, device=DEVICE, dtype=DTYPES[dtype])
                for name, source in zip(names, args.models, strict=True)
            }
            models[names[0]].pruning = Pruning()
            if dense := [name for name in names[1:] if not models[name].pruning.active]:
                parser.error(f"--models: {', '.join(dense)}: no strength, so not pruned")
            todo = comparisons(models, dtype, args.batches, args.rounds, bar.update)
            bar.reset(sum(len(comparison.candidates) for comparison in todo) * args.rounds)
            for comparison in todo:
                bar.set_description(f"{dtype}, batch {comparison.facts['batch']}")
                records.append(compare(comparison))
    write_records(args.output, records, args.device_name)
    print("\n".join(time_lines(records)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
