"""Train the small dense BLIP-NLVR on shapes, from scratch. Goes on where it stopped when it is started again.

  python experiments/shapes/train_dense.py --directory runs/dense --output python/madtp/data/shapes/dense

Plain classification stays at chance for a very long time. What makes it learn: first the image encoder alone
tells, for each patch, which shape and colour lies there; then the statements come, simple templates first,
and the text encoder also tells the two counts that a statement is about, and has one head of its
cross-attention shown where to look. The heads for that are dropped afterwards.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from dense import answer_statements, encode_images, forward_pairs
from torch import nn
from tqdm import tqdm

from madtp import NLVRConfig, TextConfig, VisionConfig, save_pretrained
from madtp.compress.run import Run
from madtp.compress.schedule import linear_decay
from madtp.data import synthetic
from madtp.data.synthetic import COLOURS, MAX_COUNT, SHAPES, TEMPLATES, Shapes
from madtp.tasks.nlvr import NLVRProcessor
from madtp.tasks.nlvr.model import NLVR

CONFIG = NLVRConfig(
    vision=VisionConfig(
        image_size=96, patch_size=8, embed_dim=96, depth=12, num_heads=3, sd_num=100, sd_dim=96
    ),
    text=TextConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384, vocab_size=54,
        max_position_embeddings=16, encoder_width=96,
    ),
    merge_from=2,
)  # fmt: skip


class Stage(NamedTuple):
    """A part of the run."""

    until: int
    """Step at which it ends."""
    templates: tuple[str, ...]
    """Of its statements. Without any, the image encoder learns alone."""
    pairs: int
    """Per step."""
    statements: int
    """Per pair."""
    images: bool
    """Whether the image encoder learns. Where it does not, a step costs less than half, and the text encoder,
    which takes longest to find out what it is there for, sees as many statements."""
    guided: bool
    """Whether a head of the cross-attention is shown where to look. Without it answers stay at chance."""


SIMPLE = ("exist", "both", "neither", "only")
STAGES = (
    Stage(500, (), 16, 0, True, False),
    Stage(850, SIMPLE, 16, 8, True, False),
    Stage(1150, SIMPLE, 8, 16, False, True),
    Stage(1750, (*SIMPLE, "count", "at least", "more"), 8, 16, False, True),
    Stage(2000, TEMPLATES, 8, 16, False, True),
    Stage(2900, TEMPLATES, 16, 8, True, True),
)
STEPS = STAGES[-1].until


class Heads(nn.Module):
    """What is learnt beside the answers; not part of the model."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(width, 1 + len(SHAPES) + 1 + len(COLOURS) + 2)
        self.count = nn.Linear(width, 2 * (1 + MAX_COUNT))


def patch_loss(heads: Heads, embeds: torch.Tensor, batch: synthetic.Batch) -> torch.Tensor:
    """Shape, colour, and whether an object begins, for each patch. Empty patches are many, and weigh less."""
    logits = heads.patch(embeds[:, 1:]).float().flatten(0, 1)
    total = logits.new_zeros(())
    targets = (batch.patch_shapes, batch.patch_colours, batch.patch_anchors)
    for part, target in zip(logits.split((1 + len(SHAPES), 1 + len(COLOURS), 2), -1), targets, strict=True):
        weight = torch.tensor([0.3] + [1.0] * (part.shape[-1] - 1))
        total = total + F.cross_entropy(part, target.flatten(), weight)
    return total


def glance_loss(glances: torch.Tensor, batch: synthetic.Batch) -> torch.Tensor:
    """One cross-attention head of each layer but the first: equally at CLS and at each object in question.

    The more objects there are the less is left for CLS, which is a way to count them.
    """
    target = F.pad(batch.relevant.float(), (1, 0), value=1.0)
    target = target / target.sum(-1, keepdim=True)
    return -(target * glances[1:].float().log_softmax(-1)).sum(-1).mean()


def losses(model: NLVR, heads: Heads, batch: synthetic.Batch, stage: Stage) -> dict[str, torch.Tensor]:
    """The terms of the loss: of the image encoder if it learns, and of the statements if there are any."""
    terms = {}
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(stage.images):
            images = encode_images(model, batch.pixels)
        if stage.images:
            terms["patch"] = (0.7 if stage.templates else 1.0) * patch_loss(heads, images, batch)
        if stage.templates:
            logits, states, glances = answer_statements(model, images, batch.input_ids, batch.lengths)
            counts = heads.count(states).float().unflatten(-1, (2, -1))
            terms["answer"] = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
            terms["count"] = 0.8 * F.cross_entropy(counts.flatten(0, 2), batch.counts.flatten())
            if stage.guided:
                terms["glance"] = 0.5 * glance_loss(glances, batch)
    return terms


@torch.inference_mode()
def evaluate(model: NLVR, heads: Heads, split: Shapes, pairs: int) -> dict:
    """Accuracy on the first pairs of a split, overall, by template, by kind; and of the patches."""
    right, seen, patches = Counter(), Counter(), []
    for start in range(0, pairs, 16):
        batch = split.batch(range(start, min(start + 16, pairs)))
        output = forward_pairs(model, batch.pixels, batch.input_ids, batch.lengths)
        correct = output.logits.argmax(-1) == batch.labels
        shape, colour, _ = heads.patch(output.image_embeds[:, 1:]).split(
            (1 + len(SHAPES), 1 + len(COLOURS), 2), -1
        )
        both = (shape.argmax(-1) == batch.patch_shapes) & (colour.argmax(-1) == batch.patch_colours)
        patches.append(both[batch.patch_shapes > 0])
        for statements, row in zip(batch.statements, correct.tolist(), strict=True):
            for statement, hit in zip(statements, row, strict=True):
                for group in ("all", statement.template, statement.kind):
                    right[group] += hit
                    seen[group] += 1
    accuracy = {
        group: round(right[group] / seen[group], 4) for group in ("all", *TEMPLATES, *synthetic.KINDS)
    }
    return {
        "accuracy": accuracy,
        "statements": seen["all"],
        "patches": round(torch.cat(patches).float().mean().item(), 4),
    }


def initialise(model: NLVR) -> None:
    """Position embeddings of the patches start as sines and cosines of row and column."""
    side = CONFIG.vision.image_size // CONFIG.vision.patch_size
    frequencies = 1 / 100 ** (torch.arange(CONFIG.vision.embed_dim // 4) / (CONFIG.vision.embed_dim // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], -1)  # [side, D / 2]
    grid = torch.cat([waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)], -1)
    with torch.no_grad():
        model.visual_encoder.pos_embed[0, 1:] = grid.flatten(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="checkpoint and log of the run")
    parser.add_argument("--output", type=Path, help="where the trained model goes")
    parser.add_argument("--record", type=Path, help="JSON file for settings and metrics")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model, heads = NLVR(CONFIG), Heads(CONFIG.vision.embed_dim)
    initialise(model)
    parameters = [p for name, p in model.named_parameters() if name != "space_dict"] + list(
        heads.parameters()
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.03},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=1e-3, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    scheduler = linear_decay(optimizer, STEPS, warmup=200)
    settings = {"seed": args.seed, "config": CONFIG.to_dict(), "stages": STAGES}
    parts = {"model": model, "heads": heads, "optimizer": optimizer, "scheduler": scheduler}
    run = Run(args.directory, parts, settings)
    train, dev = Shapes("train", args.seed), Shapes("dev", args.seed)

    with tqdm(total=STEPS, initial=run.step, unit=" steps", mininterval=5) as bar:
        while run.step < STEPS:
            stage = next(stage for stage in STAGES if run.step < stage.until)
            first = run.step * 16
            batch = train.batch(range(first, first + stage.pairs), stage.statements, stage.templates)
            terms = losses(model, heads, batch, stage)
            sum(terms.values()).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.advance(**{name: term.item() for name, term in terms.items()})
            bar.update()
            if run.step % 100 == 0:
                run.log(loss=run.averages())
            if run.step % 300 == 0 or run.step == STEPS:
                result = evaluate(model, heads, dev, 64)
                run.log(dev=result)
                bar.write(f"step {run.step}: {result['patches']} of patches, {result['accuracy']}")
    run.save()

    model.half().float()  # the weights as they are saved: float16 holds them in half the size
    result = evaluate(model, heads, Shapes("test", args.seed), 512)
    run.log(test=result)
    print(json.dumps(result, indent=2))
    if args.record:
        run.record(args.record)
    if args.output:
        model.processor = NLVRProcessor(
            CONFIG.vision.image_size,
            CONFIG.text.vocab_size,
            CONFIG.text.max_position_embeddings,
            synthetic.VOCABULARY,
        )
        save_pretrained(model.half(), args.output)


if __name__ == "__main__":
    main()
