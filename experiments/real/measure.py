"""Every rule without training on a real encoder and real photographs: what features lose at what cost. Resumable:
settings that the record holds are not run again.

  python experiments/real/measure.py --weights weights/vit-s.safetensors --photos PHOTOS --record results/224.jsonl
  python experiments/real/measure.py ... --image-size 448 --savings .33 .43 --test 80 --record results/448.jsonl

Each rule is calibrated on some photographs and measured on others: cosine of the features to those of the unpruned
encoder, and whether the nearest of 120 further photographs is the same. GFLOPs are products of
matrices, one multiply-add each, and include the cosines by which a rule finds and the sums by which it merges tokens.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import encoder
import torch
import torch.nn.functional as F

from madtp import flops
from madtp.pruning import ATM, EViT, PiToMe, Pruning, RankedNovelty, ToMe, calibrate
from madtp.pruning.merging import MergingPruning

SETTINGS: dict[str, tuple[MergingPruning, dict]] = {
    "ranked novelty": (RankedNovelty(), {}),
    "tome": (ToMe(), {}),
    "tome, authors' order": (ToMe(authors_order=True), {}),
    "atm": (ATM(), {}),
    "pitome": (PiToMe(), {}),
    "evit": (EViT(), {}),
    "equal counts": (RankedNovelty(), {"adaptive": False}),
    "second look": (RankedNovelty(second_look=1.0), {}),
    "no second look": (RankedNovelty(second_look=0.0), {}),
    "averaged keys": (RankedNovelty(keys="averaged"), {}),
    "per-head keys": (RankedNovelty(keys="per_head"), {}),
    "order by norm": (RankedNovelty(order="norm"), {}),
    "order by cls": (RankedNovelty(order="cls"), {}),
    "order by index": (RankedNovelty(order="index", weight="attention"), {}),
    "averaged keys, order by norm": (RankedNovelty(keys="averaged", order="norm"), {}),
    "pitome, protect": (PiToMe(form="protect"), {}),
}
"""What is compared: a rule, and how it is calibrated."""


def gflops(model, rule: Pruning, lengths: list[int]) -> float:
    """Cost of one image: products of the encoder and of the rule."""
    return flops.vit(model.config, lengths, pruning=rule).official


def runner(model, values: torch.Tensor, batch_size: int, seen: dict | None = None):
    """What :func:`madtp.pruning.calibrate` calls: images through the encoder under a rule."""

    dense: dict = {}

    @torch.inference_mode()
    def forward(rule: Pruning):
        if rule.name in dense:  # asked for by every calibration
            return dense[rule.name]
        features, lengths = [], []
        start = time.process_time()
        for part in values.split(batch_size):
            output = model(part, None, rule)
            features.append(output.tokens.values[output.tokens.cu_seqlens[:-1].long()])
            lengths += flops.stream_lengths(output.trace)
        if seen is not None:
            seen.update(seconds=time.process_time() - start, lengths=lengths)
        result = torch.cat(features), [gflops(model, rule, row) for row in lengths]
        if rule.name == Pruning.name:
            dense[rule.name] = result
        return result

    return forward


def nearest(features: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return (F.normalize(features, dim=1) @ F.normalize(bank, dim=1).mT).argmax(1)


def figures(model, rule, values, dense, bank, batch_size) -> dict:
    """What a rule does to images."""
    seen: dict = {}
    features, costs = runner(model, values, batch_size, seen)(rule)
    cosine = F.cosine_similarity(features.double(), dense.double(), dim=1)
    whole = gflops(model, Pruning(), seen["lengths"][0][:1] * len(seen["lengths"][0]))
    saved = 1 - torch.tensor(costs, dtype=torch.float64) / whole
    tokens = torch.tensor(seen["lengths"], dtype=torch.float64)
    return {
        "saving": round(float(saved.mean()), 4),
        "saving_sd": round(float(saved.std()), 4),
        "saving_p10_p90": [round(float(q), 4) for q in saved.quantile(torch.tensor([0.1, 0.9]).double())],
        "cosine": round(float(cosine.mean()), 5),
        "cosine_p10": round(float(cosine.quantile(0.1)), 5),
        "same_nearest": round(
            float((nearest(features.float(), bank.float()) == nearest(dense.float(), bank.float())).double().mean()), 4
        ),
        "images": len(values),
        "images_per_cpu_second": round(len(values) / seen["seconds"], 2),
        "tokens": [round(float(n), 1) for n in tokens.mean(0)],
        "tokens_sd": [round(float(n), 1) for n in tokens.std(0)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="what encoder.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder of *.jpg")
    parser.add_argument("--record", type=Path, required=True, help="JSON lines, one per setting; appended to")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--savings", nargs="+", type=float, default=[0.3, 0.4, 0.5, 0.58], help="shares of the GFLOPs")
    parser.add_argument("--schedule", nargs="+", help="of calibration, for each saving (default: it chooses)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels, a multiple of 14 (default: 224)")
    parser.add_argument("--test", type=int, default=200, help="photographs to measure on (default: 200)")
    parser.add_argument("--calibrate", type=int, default=32, help="photographs that choose thresholds (default: 32)")
    parser.add_argument("--many", type=int, default=0, help="photographs over which the cost is met (default: those)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the encoder")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    done = set()
    if args.record.exists():
        rows = [json.loads(line) for line in args.record.read_text().splitlines()]
        done = {(row["setting"], row["target"]) for row in rows}
    dtype = getattr(torch, args.dtype)
    model = encoder.load(args.weights, args.image_size).to(dtype)

    def load(paths: list[Path]) -> torch.Tensor:
        return encoder.pixels(paths, args.image_size).to(dtype)

    photos = encoder.photographs(args.photos)
    test = load(photos[: args.test])
    others = photos[args.test :]
    calibration = runner(model, load(others[: args.calibrate]), args.calibrate)
    many = runner(model, load(others[: args.many]), args.batch_size) if args.many else None
    dense, _ = runner(model, test, args.batch_size)(Pruning())
    bank, _ = runner(model, load(others[:120]), args.batch_size)(Pruning())
    args.record.parent.mkdir(parents=True, exist_ok=True)
    # All rules at one cost before the next cost: an interrupted run has something to compare.
    for place, saving in enumerate(args.savings):
        for name in args.settings:
            if (name, saving) in done:
                continue
            rule, options = SETTINGS[name]
            options = options | ({"schedule": args.schedule[place]} if args.schedule else {})
            start = time.perf_counter()
            row = {"setting": name, "target": saving, "image_size": args.image_size}
            try:
                found = calibrate(
                    calibration, rule, saving, model.config.depth,
                    many=many if options.get("adaptive", rule.adaptive) else None, **options,
                )  # fmt: skip
            except ValueError as error:
                print(json.dumps(row | {"failed": str(error)}), flush=True)
                continue
            row |= {
                "calibration": {
                    "seconds": round(time.perf_counter() - start, 1), "schedule": found.schedule, "inputs":
                    found.inputs, "saving": round(found.saving, 4), "cosine": round(found.cosine, 5),
                    "tried": {k: [round(v, 5) for v in pair] for k, pair in found.tried.items()},
                },
                **figures(model, found.rule, test, dense, bank, args.batch_size),
                "rule": found.rule.to_dict(), "torch": torch.__version__, "threads": args.threads, "dtype": args.dtype,
            }  # fmt: skip
            with args.record.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: row[key] for key in ("setting", "target", "saving", "cosine", "same_nearest")}, flush=True)


if __name__ == "__main__":
    main()
