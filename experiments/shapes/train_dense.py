"""Train the small dense BLIP-NLVR on shapes, from scratch. Goes on where it stopped when it is started again.

  python experiments/shapes/train_dense.py --output runs/dense

Loss and stages are in task.py, the loop is that of `madtp compress` without pruning.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from task import STAGES, DenseTask, Drawn, Stage

from madtp import NLVRConfig, TextConfig, VisionConfig
from madtp.compress.settings import Settings
from madtp.compress.train import train
from madtp.data.synthetic import TEMPLATES, VOCABULARY, Shapes
from madtp.tasks.nlvr import NLVRProcessor
from madtp.tasks.nlvr.model import NLVR

CONFIG = NLVRConfig(
    vision=VisionConfig(image_size=96, patch_size=8, embed_dim=96, depth=12, num_heads=3, sd_num=100, sd_dim=96),
    text=TextConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=3, intermediate_size=384, vocab_size=54,
        max_position_embeddings=16, encoder_width=96,
    ),
    merge_from=2,
)  # fmt: skip
SETTINGS = Settings(
    reduction=0.0, epochs=1, batch_size=1, lr=1e-3, weight_decay=0.03, alignment=0.0, schedule="decay", warmup=200,
    beta2=0.98, clip=1.0, precision="bfloat16", augment=False, shuffle=False, evaluate_every=300, save_as="float16",
)  # fmt: skip


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where the model goes, and the run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = NLVR(CONFIG)
    initialise(model)
    model.processor = NLVRProcessor(
        CONFIG.vision.image_size, CONFIG.text.vocab_size, CONFIG.text.max_position_embeddings, VOCABULARY
    )
    dev = Drawn(Shapes("dev", args.seed), [Stage(4, TEMPLATES, 16, 8, True, False)])
    train(
        model, DenseTask(model), Drawn(Shapes("train", args.seed), STAGES), dev, SETTINGS, args.output,
        origin={"seed": args.seed, "config": CONFIG.to_dict(), "stages": STAGES}, log_every=100, save_every=60,
    )  # fmt: skip


if __name__ == "__main__":
    main()
