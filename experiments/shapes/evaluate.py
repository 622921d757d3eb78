"""Answer the held-out statements with a saved model.

  python experiments/shapes/evaluate.py --model runs/madtp-sizes-0.8-0/model --record results/x.json
  python experiments/shapes/evaluate.py --model DIR --groups 32     as many tokens for 32 samples in succession
  python experiments/shapes/evaluate.py --model DIR --method vision-only    the text is not pruned
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from methods import METHODS, Method
from pairs import costs, forward_pairs

import madtp
from madtp import flops
from madtp.data.synthetic import KINDS, TEMPLATES, Batch, Shapes
from madtp.files import replacing
from madtp.pruning import LayerTrace
from madtp.tasks.nlvr.model import NLVR
from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of

TEST_PAIRS = 512


def texts(batch: Batch) -> RaggedBatch:
    """The statements of a batch, pair by pair, without padding."""
    ids, lengths = batch.input_ids.flatten(0, 1), batch.lengths.flatten().tolist()
    return RaggedBatch.from_list([row[:length] for row, length in zip(ids, lengths, strict=True)])


def mean(values: list[flops.Flops], name: str) -> float:
    return sum(getattr(value, name) for value in values) / len(values)


def objects_left(batch: Batch, trace: list[LayerTrace]) -> torch.Tensor:
    """``[layers]`` share of the objects of which at least one patch is still a token of its own after each layer."""
    objects, side = batch.patch_anchors > 0, round(batch.patch_anchors.shape[1] ** 0.5)
    shares = []
    for layer in trace:
        sample, own = sample_of(layer.cu_seqlens, len(layer.ids)), layer.ids > 0
        left = torch.zeros_like(objects)
        left[sample[own], layer.ids[own].long() - 1] = True
        # An object is two by two patches: spread every token up and left, to where the object's first patch would be.
        grid = F.pad(left.unflatten(1, (side, side)), (0, 1, 0, 1))
        seen = grid[:, :-1, :-1] | grid[:, 1:, :-1] | grid[:, :-1, 1:] | grid[:, 1:, 1:]
        shares.append(seen.flatten(1)[objects].float().mean())
    return torch.stack(shares)


@torch.inference_mode()
def evaluate(
    model: NLVR, split: Shapes, pairs: int, temperature: float, method: Method, groups: int = 1
) -> dict:
    """Accuracy on the first pairs of a split, overall, by template and kind; GFLOPs, and tokens per layer.

    "objects_left" is the mean of :func:`objects_left` over batches of 16 pairs.
    """
    right, seen, spent = Counter(), Counter(), []
    vision, text, objects = [], [], []
    for start in range(0, pairs, 16):
        batch = split.batch(range(start, min(start + 16, pairs)))
        output = forward_pairs(
            model, batch.pixels, texts(batch), 8, temperature, rules=method.rules, groups=groups
        )
        spent += costs(model, output, 8)
        vision += flops.stream_lengths(output.vision)
        text += flops.stream_lengths(output.text)
        objects.append(objects_left(batch, output.vision))
        hits = (output.logits.argmax(-1) == batch.labels.flatten()).tolist()
        statements = [statement for row in batch.statements for statement in row]
        for statement, hit in zip(statements, hits, strict=True):
            for group in ("all", statement.template, statement.kind):
                right[group] += hit
                seen[group] += 1
    return {
        "temperature": temperature,
        "accuracy": {group: round(right[group] / seen[group], 4) for group in ("all", *TEMPLATES, *KINDS)},
        "statements": seen["all"],
        "gflops": round(mean(spent, "official"), 5),
        "gflops_full": round(mean(spent, "full"), 5),
        "image_tokens": [round(sum(column) / len(vision), 1) for column in zip(*vision, strict=True)],
        "text_tokens": [round(sum(column) / len(text), 1) for column in zip(*text, strict=True)],
        "objects_left": [round(share, 4) for share in torch.stack(objects).mean(0).tolist()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a saved model")
    parser.add_argument("--temperature", type=float, help="instead of the model's own; 0: no pruning")
    parser.add_argument("--method", choices=METHODS, help="default: MADTP, with sizes if the model has them")
    parser.add_argument("--groups", type=int, default=1, metavar="N", help="batch-maximum execution (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--record", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    model = madtp.load(args.model)
    temperature = model.temperature if args.temperature is None else args.temperature
    method = METHODS[args.method or ("madtp-sizes" if model.pruning.proportional_attention else "madtp")]
    split = Shapes("test", args.seed)
    result = evaluate(model, split, TEST_PAIRS, temperature, method, args.groups)
    dense = evaluate(model, split, TEST_PAIRS, 0.0, method)["gflops"] if temperature else result["gflops"]
    result["reduction"] = round(1 - result["gflops"] / dense, 4)
    print(json.dumps(result, indent=2))
    if args.record:
        settings = {name: getattr(args, name) for name in ("temperature", "method", "groups", "seed")}
        args.record.parent.mkdir(parents=True, exist_ok=True)
        with replacing(args.record) as file:
            record = {"settings": settings, "torch": torch.__version__, "metrics": [{"test": result}]}
            file.write((json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
