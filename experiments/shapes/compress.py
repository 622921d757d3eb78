"""Fine-tune the dense model on shapes with pruning, to a share of its GFLOPs. Goes on where it stopped.

  python experiments/shapes/compress.py --model python/madtp/data/shapes/dense --method madtp-sizes \\
      --reduction 0.8 --directory runs/madtp-sizes-0.8-0 --record results/madtp-sizes-0.8-0.json

The loss is that of the answers, plus how far the surviving tokens of images and texts are from what the dense
model makes of them, plus (MADTP) 0.1 times the alignment of the features of both modalities. The cost that is
aimed at falls to the target over the first part of the run, and the temperature follows it. At the end the
temperature is set on the dev split, and the test split is answered once.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluate import TEST_PAIRS, evaluate, mean, texts
from methods import METHODS
from pairs import costs, forward_pairs
from torch import Tensor, nn
from tqdm import tqdm

import madtp
from madtp import save_pretrained
from madtp.compress.controller import BracketController
from madtp.compress.dictionary import dictionary_from_tokens
from madtp.compress.run import Run
from madtp.compress.schedule import cosine
from madtp.data.synthetic import Batch, Shapes
from madtp.guidance import alignment_loss
from madtp.search import find_strength
from madtp.tasks.losses import distillation_loss
from madtp.tasks.nlvr.model import NLVR
from madtp_kernels import RaggedBatch

STATEMENTS = 8  # per pair


class Teacher:
    """What the dense model makes of the tokens of a batch. All runs of a seed see the same batches, so it is kept.

    Args:
        model: the dense model.
        directory: shared by runs; None keeps nothing.
    """

    def __init__(self, model: NLVR, directory: Path | None) -> None:
        self.model, self.directory = model.requires_grad_(False), directory

    @torch.no_grad()
    def __call__(self, batch: Batch, first: int) -> tuple[RaggedBatch, RaggedBatch]:
        """Final states of images and texts in float32; ``first`` is the number of the batch's first pair."""
        path = self.directory and self.directory / f"{first}-{len(batch.statements)}.pt"
        if path and path.exists():
            states = torch.load(path, weights_only=True)
        else:
            output = forward_pairs(self.model, batch.pixels, texts(batch), STATEMENTS, 0.0)
            parts = (output.image_embeds, output.last_hidden_state)
            states = [(part.values.half(), part.cu_seqlens, part.max_seqlen) for part in parts]
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                own = path.with_suffix(f".{os.getpid()}")  # another run may be about to write the same
                torch.save(states, own)
                os.replace(own, path)
        images, statements = (RaggedBatch(values.float(), *rest) for values, *rest in states)
        return images, statements


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the dense model")
    parser.add_argument("--method", choices=METHODS, default="madtp-sizes", help="default: madtp-sizes")
    parser.add_argument("--directory", type=Path, required=True, help="checkpoint and log of the run")
    parser.add_argument("--output", type=Path, help="where the compressed model goes")
    parser.add_argument("--record", type=Path, help="JSON file for settings and metrics")
    parser.add_argument(
        "--reduction", type=float, default=0.8, help="share of the GFLOPs to save (default: 0.8)"
    )
    parser.add_argument("--steps", type=int, default=500, help="default: 500")
    parser.add_argument("--pairs", type=int, default=16, help="pairs per step (default: 16)")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate (default: 5e-4)")
    parser.add_argument("--distill", type=float, default=1.0, help="weight of the dense model's states (default: 1)")
    parser.add_argument(
        "--ramp", type=float, default=0.2, help="share of the steps over which the target falls (default: 0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data and the dictionary (default: 0)")
    parser.add_argument("--teacher-cache", type=Path, help="where runs of a seed share what the dense model says")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    method = METHODS[args.method]
    model, teacher = madtp.load(args.model), Teacher(madtp.load(args.model), args.teacher_cache)
    model.pruning = replace(model.pruning, proportional_attention=method.use_sizes)
    # The pairs come after those that the dense model has learnt from.
    train, dev, first_pair = Shapes("train"), Shapes("dev"), 100_000 + 1_000_000 * args.seed
    dense = evaluate(model, dev, 16, 0.0, method)["gflops"]
    shown = train.batch(range(first_pair, first_pair + args.pairs), STATEMENTS)
    entries = dictionary_from_tokens(
        model,
        lambda: forward_pairs(model, shown.pixels, texts(shown), STATEMENTS, 0.0, alignment_features=True),
        torch.Generator().manual_seed(args.seed),
    )
    with torch.no_grad():
        model.space_dict.copy_(entries)

    controller = BracketController(method.start)
    # Any temperature already prunes: the target falls from what the first one costs, not from the dense cost.
    goal = (1 - args.reduction) * dense
    start = max(evaluate(model, dev, 16, controller.strength, method)["gflops"], goal)
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.03, fused=True)
    scheduler = cosine(optimizer, args.steps, warmup=50)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "controller": controller}
    paths = ("model", "directory", "output", "record", "teacher_cache")
    run = Run(args.directory, parts, {name: value for name, value in vars(args).items() if name not in paths})

    def loss_terms(batch: Batch, first: int) -> tuple[dict[str, Tensor], float, float]:
        """The terms of the loss, accuracy, and GFLOPs of a statement."""
        with torch.autocast("cpu", torch.bfloat16):
            output = forward_pairs(
                model, batch.pixels, texts(batch), STATEMENTS, controller.strength, method.alignment > 0,
                rules=method.rules,
            )  # fmt: skip
        labels = batch.labels.flatten()
        terms = {"answer": F.cross_entropy(output.logits.float(), labels)}
        if args.distill:
            images, statements = teacher(batch, first)
            terms["images"] = args.distill * distillation_loss(output.image_embeds, output.vision[-1].ids, images)
            terms["texts"] = args.distill * distillation_loss(output.last_hidden_state, output.text[-1].ids, statements)
        if method.alignment:
            vision, text = output.alignment_features
            both = vision.unflatten(0, (2, -1)).mean(0).repeat_interleave(STATEMENTS, 0)
            terms["alignment"] = method.alignment * alignment_loss(both, text)
        right = (output.logits.argmax(-1) == labels).float().mean().item()
        return terms, right, mean(costs(model, output, STATEMENTS), "official")

    with tqdm(total=args.steps, initial=run.step, unit=" steps", mininterval=5) as bar:
        while run.step < args.steps:
            first = first_pair + run.step * args.pairs
            terms, right, cost = loss_terms(train.batch(range(first, first + args.pairs), STATEMENTS), first)
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            target = start + min(run.step / max(args.ramp * args.steps, 1), 1.0) * (goal - start)
            used = controller.strength
            controller.update(cost, target)
            run.advance(
                **{name: term.item() for name, term in terms.items()},
                accuracy=right, gflops=cost, target=target, temperature=used,
            )  # fmt: skip
            bar.update()
            if run.step % 50 == 0:
                run.log(train=run.averages())
            if run.step % 200 == 0:
                run.log(dev=evaluate(model, dev, 32, controller.strength, method))
    run.save()

    model.half().float().eval()  # the weights as they are saved
    model.temperature = find_strength(
        lambda temperature: evaluate(model, dev, 64, temperature, method)["gflops"], goal, controller.strength
    )
    result = evaluate(model, Shapes("test"), TEST_PAIRS, model.temperature, method)
    result["reduction"] = round(1 - result["gflops"] / dense, 4)
    run.log(test=result)
    print(json.dumps(result, indent=2))
    if args.output:
        save_pretrained(model.half(), args.output)
    if args.record:  # last: a record says that everything is there
        run.record(args.record)


if __name__ == "__main__":
    main()
