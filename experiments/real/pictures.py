"""What survives, layer by layer: a sheet of photographs under a calibrated rule of a record.

  python experiments/real/pictures.py --weights weights/vit-s.safetensors --photos PHOTOS --record results/224.jsonl \\
      --output docs/survivors.jpg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import encoder
import torch
from PIL import Image, ImageOps

from madtp.pruning import Pruning
from madtp.report.overlay import overlays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="what encoder.py wrote")
    parser.add_argument("--photos", type=Path, required=True, help="folder of *.jpg")
    parser.add_argument("--record", type=Path, required=True, help="of measure.py")
    parser.add_argument("--setting", default="ranked novelty")
    parser.add_argument("--target", type=float, default=0.5, help="saving of the record's row (default: 0.5)")
    parser.add_argument("--count", type=int, default=12, help="photographs (default: 12)")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 6, 9, 12])
    parser.add_argument("--height", type=int, default=96, help="pixels of one picture (default: 96)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = map(json.loads, args.record.read_text().splitlines())
    row = next(row for row in rows if (row["setting"], row["target"]) == (args.setting, args.target))
    size = row["image_size"]
    model, paths = encoder.load(args.weights, size), encoder.photographs(args.photos)[: args.count]
    with torch.inference_mode():
        trace = model(encoder.pixels(paths, size), None, Pruning.from_dict(row["rule"])).trace
    images = []
    for path in paths:
        with Image.open(path) as image:
            # The grid of patches is square, as the encoder squashes: the picture is shown as the encoder sees it.
            images.append(ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    config = SimpleNamespace(vision=model.config)
    half = -(-len(images) // 2)
    sheets = [
        overlays(images[part], trace, config, range(*part.indices(len(images))), layers=args.layers, height=args.height)
        for part in (slice(half), slice(half, None))
    ]
    sheet = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)), "white")
    x = 0
    for part in sheets:
        sheet.paste(part, (x, 0))
        x += part.width
    sheet.save(args.output, quality=82)


if __name__ == "__main__":
    main()
