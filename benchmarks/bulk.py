"""From JPEG files to records: how many images a second, and what share of the time the model waits for them.

    python benchmarks/bulk.py [--images 300] [--device cuda] [--dtype bfloat16] [--temperature 8] [--workers N]

CLIP ViT-B/32 with random weights; photographs of 640 x 480 made of noise and shapes, about 90 KB each, read from a
folder; the command's own defaults for everything else. The first shard warms up and does not count.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import madtp
from madtp.bulk.callables import Embedder
from madtp.bulk.readers import Source
from madtp.bulk.run import run
from madtp.bulk.workers import attempt, default_workers
from madtp.bulk.writers import Results
from madtp.config import CLIPConfig, CLIPTextConfig, VisionConfig


def photographs(folder, count):
    """JPEG files with as much detail as photographs have."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        picture = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = random.integers(-20, 20, picture.shape, dtype=np.int16)
        Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number:06d}.jpg", quality=85)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    vision = VisionConfig(224, 32, embed_dim=768, depth=12, num_heads=12, sd_dim=768, map_func=True)
    config = CLIPConfig(vision, CLIPTextConfig(512, 12, 8, 2048), embed_dim=512)
    options = {"config": config, "temperature": args.temperature, "device": args.device, "backend": args.backend}
    model = madtp.load("random:base", dtype=getattr(torch, args.dtype), **options)
    embedder = Embedder(model)
    workers = default_workers(args.device) if args.workers is None else args.workers

    def answer(instances):
        return [{name: value for name, value in one.items() if name != "gflops"} for one in embedder.answer(instances)]

    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        pictures.mkdir()
        photographs(pictures, args.images)
        prepare, row = embedder.prepare(), next(next(iter(Source([pictures]))).rows())
        began = time.perf_counter()
        for _ in range(20):
            attempt(prepare, row)
        decoding = (time.perf_counter() - began) / 20
        for name, source in (("warm-up", Source([sorted(pictures.iterdir())[0]])), ("run", Source([pictures]))):
            results = Results(Path(folder) / name, {}, vectors="img", format="jsonl")
            began = time.perf_counter()
            summary = run(
                source, results, prepare, answer, lambda row: {"image_path": row.key},
                workers=workers, batch_size=args.batch_size,
            )  # fmt: skip
            took = time.perf_counter() - began
    print(
        f"{summary.rows / took:.1f} images/s ({args.device}, {args.dtype}, {torch.get_num_threads()} threads, "
        f"{workers} decoders); the model waited {summary.waited / took:.1%} of {took:.1f} s, worked "
        f"{summary.answering / took:.1%}; decoding takes a core {1e3 * decoding:.1f} ms an image"
    )


if __name__ == "__main__":
    main()
