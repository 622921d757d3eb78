"""Answer the held-out statements with a saved model.

  python experiments/shapes/evaluate.py --model runs/madtp-0.8-0 --record results/madtp-0.8-0.json
  python experiments/shapes/evaluate.py --model DIR --grouping batch    as many tokens for all of a batch (16 pairs)
  python experiments/shapes/evaluate.py --model DIR --strength 3.2      another temperature; 0: not pruned
  python experiments/shapes/evaluate.py --model DIR --streams vision    the text is not pruned

If the model comes from `madtp compress`, its record also holds the settings and the curve of the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from task import STATEMENTS, as_batch

import madtp
from madtp import flops
from madtp.data.synthetic import KINDS, TEMPLATES, Batch, Shapes
from madtp.files import replacing
from madtp.pruning import LayerTrace, Pruning
from madtp.tasks.nlvr import NLVRTask
from madtp.tasks.nlvr.model import NLVR
from madtp_kernels.segments import sample_of

TEST_PAIRS, TOGETHER = 512, 16


def objects_left(batch: Batch, trace: list[LayerTrace]) -> torch.Tensor:
    """``[layers]`` share of the objects of which at least one patch is still a token of its own after each layer."""
    objects = batch.patch_anchors > 0
    side = round(objects.shape[1] ** 0.5)
    reach = int((batch.patch_shapes > 0).sum() / objects.sum()) ** 0.5  # patches along an object's edge
    shares = []
    for layer in trace:
        cu_seqlens = layer.cu_seqlens.cpu()
        ids = layer.ids.cpu()[: int(cu_seqlens[-1])]  # a GPU's buffer has room for more
        sample, own = sample_of(cu_seqlens, len(ids)), ids > 0
        left = torch.zeros_like(objects)
        left[sample[own], ids[own].long() - 1] = True
        # Spread every token up and left, to where the first patch of an object that it belongs to would be.
        grid = F.pad(left.unflatten(1, (side, side)).float()[:, None], (0, int(reach) - 1, 0, int(reach) - 1))
        seen = F.max_pool2d(grid, int(reach), stride=1)[:, 0] > 0
        shares.append(seen.flatten(1)[objects].float().mean())
    return torch.stack(shares)


@torch.inference_mode()
def evaluate(model: NLVR, shapes: Shapes, pairs: int, pruning: Pruning) -> dict:
    """Accuracy on the first pairs of a split, overall, by template and kind; GFLOPs, and tokens per layer.

    "objects_left" is the mean of :func:`objects_left` over batches of 16 pairs.
    """
    task, right, seen = NLVRTask(model), Counter(), Counter()
    spent, dense, vision, text, objects = [], [], [], [], []
    for start in range(0, pairs, TOGETHER):
        drawn = shapes.batch(range(start, min(start + TOGETHER, pairs)), STATEMENTS)
        batch = as_batch(drawn)
        output = task.forward(model, batch, pruning)
        streams = task.streams(output, batch)
        spent += task.costs(streams, pruning)
        unpruned = tuple([[lengths[0]] * len(lengths) for lengths in stream] for stream in streams)
        dense += task.costs(unpruned, False)
        vision += flops.stream_lengths(output.vision)
        text += streams[2]
        objects.append(objects_left(drawn, output.vision))
        statements = [statement for row in drawn.statements for statement in row]
        for statement, hit in zip(statements, task.records(model, batch, output), strict=True):
            for group in ("all", statement.template, statement.kind):
                right[group] += hit
                seen[group] += 1
    official, full = (sum(getattr(cost, name) for cost in spent) / len(spent) for name in ("official", "full"))
    return {
        "strength": pruning.strength,
        "accuracy": {group: round(right[group] / seen[group], 4) for group in ("all", *TEMPLATES, *KINDS)},
        "statements": seen["all"],
        "gflops": round(official, 5),
        "gflops_full": round(full, 5),
        "reduction": round(1 - official * len(dense) / sum(cost.official for cost in dense), 4),
        "image_tokens": [round(sum(column) / len(vision), 1) for column in zip(*vision, strict=True)],
        "text_tokens": [round(sum(column) / len(text), 1) for column in zip(*text, strict=True)],
        "objects_left": [round(share, 4) for share in torch.stack(objects).mean(0).tolist()],
    }


def history(folder: Path) -> tuple[dict, list[dict]]:
    """Settings and curve of the run that a model comes from; empty if it comes from none."""
    run = folder / "run"
    if not (run / "settings.json").exists():
        return {}, []
    with open(run / "metrics.jsonl", encoding="utf-8") as lines:
        return json.loads((run / "settings.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a saved model")
    parser.add_argument("--row", help="what the tables call it (default: the rule's name)")
    parser.add_argument("--strength", type=float, help="instead of the model's own; 0: no pruning")
    parser.add_argument("--streams", choices=["vision", "text"], nargs="+", help="which are pruned, if not the model's")
    parser.add_argument("--grouping", choices=["instance", "batch"], default="instance", help="default: instance")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument(
        "--pairs", type=int, default=TEST_PAIRS, help=f"of eight statements each (default: {TEST_PAIRS})"
    )
    parser.add_argument("--device", default="cpu", help="where the model runs (default: cpu)")
    parser.add_argument("--record", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    model = madtp.load(args.model, grouping=args.grouping, device=args.device)
    pruning = model.pruning
    if args.streams:
        pruning = dataclasses.replace(pruning, streams=tuple(args.streams))
    if args.strength is not None:
        pruning = pruning.at(args.strength)
    scale = model.config.vision.image_size // 96
    result = evaluate(model, Shapes("test", args.seed, scale), args.pairs, pruning)
    print(json.dumps(result, indent=2))
    if args.record:
        settings, metrics = history(Path(args.model))
        chosen = {name: getattr(args, name) for name in ("strength", "streams", "grouping", "device")}
        settings |= {"row": args.row or pruning.name, **chosen}
        args.record.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(line) for line in [*metrics, {"test": result}])
        head = json.dumps({"settings": settings, "torch": torch.__version__})
        with replacing(args.record) as file:
            file.write(f'{head[:-1]}, "metrics": [\n{lines}\n]}}\n'.encode())


if __name__ == "__main__":
    main()
