"""Fine-tune the dense model on shapes with pruning, to a share of its GFLOPs. Goes on where it stopped.

  python experiments/shapes/compress.py --model experiments/shapes/models/dense --directory runs/0.8 \\
      --reduction 0.8

The loss is that of the answers plus 0.1 times the alignment of the summaries of both modalities, and with
--counts also that of the two counts a statement is about, which the dense model has learnt with; the head for
it is dropped again. The cost that is aimed at falls to the target over the first part of the run, and the
temperature follows it. At the end the temperature is set on the dev split, and the test split is answered
once.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import madtp
from madtp import flops, save_pretrained
from madtp.compress.controller import TemperatureController, find_temperature
from madtp.compress.pairs import costs, forward_pairs
from madtp.compress.run import Run
from madtp.compress.schedule import cosine
from madtp.data.synthetic import KINDS, MAX_COUNT, TEMPLATES, Batch, Shapes
from madtp.guidance import alignment_loss
from madtp.models.base import first_rows
from madtp.models.nlvr import NLVR
from madtp_kernels import RaggedBatch


def texts(batch: Batch) -> RaggedBatch:
    """The statements of a batch, pair by pair, without padding."""
    ids, lengths = batch.input_ids.flatten(0, 1), batch.lengths.flatten().tolist()
    return RaggedBatch.from_list([row[:length] for row, length in zip(ids, lengths, strict=True)])


def dense_gflops(model: NLVR, split: Shapes) -> float:
    """Mean official GFLOPs of a statement without pruning."""
    with torch.inference_mode():
        batch = split.batch(range(4))
        output = forward_pairs(model, batch.pixels, texts(batch), 8, 0.0)
    return mean(costs(model, output, 8), "official")


def mean(values: list[flops.Flops], name: str) -> float:
    return sum(getattr(value, name) for value in values) / len(values)


@torch.inference_mode()
def evaluate(model: NLVR, split: Shapes, pairs: int, temperature: float) -> dict:
    """Accuracy on the first pairs of a split, overall, by template and kind; GFLOPs, and tokens per layer."""
    right, seen, spent = Counter(), Counter(), []
    vision, text = [], []
    for start in range(0, pairs, 16):
        batch = split.batch(range(start, min(start + 16, pairs)))
        output = forward_pairs(model, batch.pixels, texts(batch), 8, temperature)
        spent += costs(model, output, 8)
        vision += flops.stream_lengths(output.vision)
        text += flops.stream_lengths(output.text)
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
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the dense model")
    parser.add_argument("--directory", type=Path, required=True, help="checkpoint and log of the run")
    parser.add_argument("--output", type=Path, help="where the compressed model goes")
    parser.add_argument("--record", type=Path, help="JSON file for settings and metrics")
    parser.add_argument(
        "--reduction", type=float, default=0.8, help="share of the GFLOPs to save (default: 0.8)"
    )
    parser.add_argument("--use-sizes", action="store_true", help="merged tokens weigh what they stand for")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step (default: 8)")
    parser.add_argument("--statements", type=int, default=8, help="statements per pair (default: 8)")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument(
        "--alignment", type=float, default=0.1, help="weight of the alignment loss (default: 0.1)"
    )
    parser.add_argument("--counts", type=float, default=0.0, help="weight of the counts (default: 0)")
    parser.add_argument(
        "--ramp", type=float, default=0.4, help="share of the steps over which the target falls"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = madtp.load(args.model)
    model.use_sizes = args.use_sizes
    # The pairs come after those that the dense model has learnt from.
    train, dev, first_pair = Shapes("train"), Shapes("dev"), 100_000 + 1_000_000 * args.seed
    controller = TemperatureController(0.1)
    dense = dense_gflops(model, dev)
    # The lowest temperature already prunes: the target falls from what that costs, not from the dense cost.
    start, goal = evaluate(model, dev, 16, controller.temperature)["gflops"], (1 - args.reduction) * dense
    model.train()
    head = nn.Linear(model.config.text.hidden_size, 2 * (1 + MAX_COUNT))
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.03, fused=True)
    scheduler = cosine(optimizer, args.steps, warmup=50)
    parts = {"model": model, "head": head, "optimizer": optimizer, "scheduler": scheduler}
    paths = ("model", "directory", "output", "record")
    settings = {name: value for name, value in vars(args).items() if name not in paths}
    run = Run(args.directory, parts | {"controller": controller}, settings)

    with tqdm(total=args.steps, initial=run.step, unit=" steps", mininterval=5) as bar:
        while run.step < args.steps:
            first = first_pair + run.step * args.pairs
            batch = train.batch(range(first, first + args.pairs), args.statements)
            output = forward_pairs(
                model,
                batch.pixels,
                texts(batch),
                args.statements,
                controller.temperature,
                summaries=args.alignment > 0,
            )
            terms = {"answer": F.cross_entropy(output.logits, batch.labels.flatten())}
            if args.alignment:
                vision, text = output.summaries
                both = vision.unflatten(0, (2, -1)).mean(0).repeat_interleave(args.statements, 0)
                terms["alignment"] = args.alignment * alignment_loss(both, text)
            if args.counts:
                counts = head(first_rows(output.last_hidden_state)).unflatten(-1, (2, -1))
                terms["counts"] = args.counts * F.cross_entropy(counts.flatten(0, 1), batch.counts.flatten())
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            cost = mean(costs(model, output, args.statements), "official")
            share = min(run.step / max(args.ramp * args.steps, 1), 1.0)
            target = start + share * (goal - start)
            used = controller.temperature
            controller.update(cost, target)
            run.advance(
                **{name: term.item() for name, term in terms.items()},
                accuracy=(output.logits.argmax(-1) == batch.labels.flatten()).float().mean().item(),
                gflops=cost, target=target, temperature=used,
            )  # fmt: skip
            bar.update()
            if run.step % 50 == 0:
                run.log(train=run.averages())
            if run.step % 200 == 0:
                run.log(dev=evaluate(model, dev, 32, controller.temperature))
    run.save()

    model.half().float().eval()  # the weights as they are saved
    model.temperature = find_temperature(
        lambda temperature: evaluate(model, dev, 64, temperature)["gflops"], goal, controller.temperature
    )
    result = evaluate(model, Shapes("test"), 512, model.temperature)
    result["reduction"] = round(1 - result["gflops"] / dense, 4)
    run.log(test=result)
    print(json.dumps(result, indent=2))
    if args.record:
        run.record(args.record)
    if args.output:
        save_pretrained(model.half(), args.output)


if __name__ == "__main__":
    main()
