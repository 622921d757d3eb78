"""`madtp demo`: the bundled model on the bundled pictures, dense and pruned."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import resources
from pathlib import Path

from .options import add_model_options, load_model

_MOST_ROUNDS, _MOST_SECONDS = 20, 5.0  # of timing


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "demo",
        help="a small model on bundled pictures",
        description="Answers statements about bundled pictures, dense and pruned; compares cost and time.",
    )
    parser.add_argument(
        "--model",
        default="demo",
        metavar="SOURCE",
        help="another model, such as random:base (real size, random weights)",
    )
    parser.add_argument(
        "--output-dir",
        default="demo-output",
        metavar="DIR",
        help="where the overlay goes (default: demo-output)",
    )
    add_model_options(parser, groupings=("instance", "pair", "batch"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer the bundled statements, dense and pruned, and print what that took."""
    import torch

    from .. import flops
    from ..predict import nlvr_batch
    from ..processing import load_image
    from ..report.overlay import nlvr_overlay

    model = load_model(args, ["nlvr"])
    if not model.temperature and not args.dense:
        raise ValueError(
            f"{args.model} comes without a pruning temperature: give one, for example --temperature 5"
        )
    if args.model in ("demo", "random:base"):
        print(
            "NOTE: this model is untrained, its weights are random: its answers mean nothing. What the demo\n"
            "shows is the pruning: which tokens are kept, what that costs, how long it takes.\n"
        )
    data = Path(str(resources.files("madtp"))) / "data" / "demo"
    rows = [json.loads(line) for line in (data / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    instances = [model.processor(*(data / name for name in row["images"]), row["text"]) for row in rows]

    with model.dense():
        dense, _ = nlvr_batch(model, instances)
    pruned, output = nlvr_batch(model, instances)
    print(f"{'dense':16}{f'pruned (T={model.temperature:g})':16}statement")
    for row, *pair in zip(rows, dense, pruned, strict=True):
        columns = [f"{answer.answer!s:6}{answer.probability_true:.2f}" for answer in pair]
        print(f"{columns[0]:16}{columns[1]:16}[{' | '.join(row['images'])}] {row['text']}")

    vision, text = flops.stream_lengths(output.vision), flops.stream_lengths(output.text)
    print(f"\ntokens (min / mean / max)   {len(vision)} images          {len(text)} texts")
    for layer in range(max(len(vision[0]), len(text[0]))):
        name = f"after layer {layer}" if layer else "input"
        print(f"  {name:24}  {_spread(vision, layer):20}{_spread(text, layer)}".rstrip())

    costs = [statistics.mean(answer.flops.official for answer in answers) for answers in (dense, pruned)]
    times = _time(
        model, instances, synchronize=torch.cuda.synchronize if model.device.type == "cuda" else None
    )
    threads = f"{torch.get_num_threads()} threads" if model.device.type == "cpu" else str(model.device)
    print(f"\n{'':26}dense     pruned    ratio   ({args.dtype}, {threads}, {len(rows)} pairs per batch)")
    for name, (before, after), unit in (("GFLOPs per pair", costs, ""), ("time per pair", times, " ms")):
        print(f"{name:24}  {f'{before:.4g}{unit}':10}{f'{after:.4g}{unit}':10}{before / after:.2f}x")
    if args.model == "demo":
        print("A model this small spends its time on fixed costs; at the real size:")
        print("  madtp demo --model random:base --temperature 5")

    directory = Path(args.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    picture = directory / "overlay.png"
    nlvr_overlay(*(load_image(data / name) for name in rows[0]["images"]), output, model.config).save(picture)
    print(f"\nsurviving patches of the first pair: {picture}")
    return 0


def _spread(lengths: list[list[int]], layer: int) -> str:
    if layer >= len(lengths[0]):
        return ""
    counts = [sample[layer] for sample in lengths]
    return f"{min(counts)} / {statistics.mean(counts):.1f} / {max(counts)}"


def _time(model, instances, synchronize) -> tuple[float, float]:
    """Median milliseconds per pair, dense and pruned, in alternation so that both see the same machine."""
    import torch

    pixels, ids = model.processor.collate(instances)
    temperatures = (0.0, model.temperature)
    times: dict[float, list[float]] = {temperature: [] for temperature in temperatures}
    begin = time.perf_counter()
    while True:
        for temperature in temperatures:
            start = time.perf_counter()
            with torch.inference_mode():
                model(pixels, ids, temperature=temperature)
            if synchronize:
                synchronize()
            times[temperature].append(time.perf_counter() - start)
        rounds = len(times[0.0])
        if rounds >= _MOST_ROUNDS or time.perf_counter() - begin > _MOST_SECONDS:
            return tuple(statistics.median(times[t]) * 1000 / len(instances) for t in temperatures)
