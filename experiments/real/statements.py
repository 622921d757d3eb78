"""Rules without training on an NLVR model of pictures of shapes: right answers on held-out statements.

  python experiments/real/statements.py --record experiments/real/results/shapes.jsonl
  python experiments/real/statements.py --model reproduction/large-dense-final --record experiments/real/results/shapes-577.jsonl

Limits are set on pairs of the training split, without their labels; the texts are not pruned. Resumable.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import madtp
from madtp.compress.calibrate import calibrate_rule
from madtp.data.synthetic import Shapes, ShapesExamples
from madtp.pruning import ATM, PiToMe, Pruning, RankedNovelty, ToMe
from madtp.tasks import task_of

SETTINGS = {
    "ranked novelty": RankedNovelty(),
    "tome": ToMe(),
    "atm": ATM(),
    "pitome": PiToMe(),
    "no second look": RankedNovelty(second_look=0.0),
    "second look": RankedNovelty(second_look=1.0),
    "per-head keys": RankedNovelty(keys="per_head"),
}


@torch.inference_mode()
def evaluate(model, shapes: Shapes, rule: Pruning, pairs: int) -> tuple[float, float, float, int]:
    """Share of right answers, mean GFLOPs, those without the rule's own work, and the number of statements."""
    task, examples, right, costs, network = task_of(model), ShapesExamples(shapes, range(pairs)), [], [], []
    for start in range(0, pairs, 16):
        batch = task.collate([task.instance(examples[i]) for i in range(start, min(start + 16, pairs))])
        output = task.forward(model, batch, rule)
        right += task.records(model, batch, output)
        streams = task.streams(output, batch)
        costs += [cost.official for cost in task.costs(streams, rule)]
        network += [cost.official for cost in task.costs(streams, Pruning())]
    number = len(right)
    return sum(right) / number, sum(costs) / number, sum(network) / number, number


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, required=True, help="JSON lines, one per setting; appended to")
    parser.add_argument("--model", default="demo-dense", help="a saved model (default: the package's dense one)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--savings", nargs="+", type=float, default=[0.53, 0.67, 0.74, 0.79])
    parser.add_argument("--pairs", type=int, default=256, help="of eight statements each (default: 256)")
    parser.add_argument("--calibrate", type=int, default=40, help="pairs that set the limits (default: 40)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if args.record.exists():
        done = {(row["setting"], row["target"]) for row in map(json.loads, args.record.read_text().splitlines())}
    model = madtp.load(args.model)
    scale = model.config.vision.image_size // 96
    test = Shapes("test", scale=scale)
    dense = evaluate(model, test, Pruning(), args.pairs)
    print(f"dense: {dense[0]:.4f} of {dense[3]} statements, {dense[1]:.4f} GFLOPs", flush=True)
    pairs = ShapesExamples(Shapes("train", scale=scale), range(args.calibrate), 1)
    args.record.parent.mkdir(parents=True, exist_ok=True)
    for saving in args.savings:
        for name in args.settings:
            if (name, saving) in done:
                continue
            start = time.perf_counter()
            try:
                found = calibrate_rule(model, pairs, SETTINGS[name], saving, inputs=args.calibrate)
            except ValueError as error:
                print(json.dumps({"setting": name, "target": saving, "failed": str(error)}), flush=True)
                continue
            seconds = time.perf_counter() - start
            accuracy, gflops, network, statements = evaluate(model, test, found.rule, args.pairs)
            row = {
                "setting": name, "target": saving, "saving": round(1 - gflops / dense[1], 4),
                "saving_of_network": round(1 - network / dense[1], 4),
                "accuracy": round(accuracy, 4), "dense_accuracy": round(dense[0], 4), "statements": statements,
                "calibration": {
                    "seconds": round(seconds, 1), "schedule": found.schedule, "cosine": round(found.cosine, 5),
                    "saving": round(found.saving, 4), "tried": found.tried,
                },
                "rule": found.rule.to_dict(), "torch": torch.__version__,
            }  # fmt: skip
            with args.record.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: row[key] for key in ("setting", "target", "saving", "accuracy")}, found.schedule, flush=True)


if __name__ == "__main__":
    main()
