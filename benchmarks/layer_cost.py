"""What a layer costs besides its arithmetic: microseconds on a model so small that nothing else counts.

    python benchmarks/layer_cost.py [--threads 1] [--dtype float32]

One image and one text of a few tokens of width 32 go through the blocks of BLIP-NLVR, dense and pruned; the time of a layer is
that of all twelve (or four) divided by their number, the least of many rounds. Candidates take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import measure
import torch

from madtp.config import TextConfig, VisionConfig
from madtp.pruning import MADTP
from madtp.text import TextEncoder
from madtp.vision import VisionTransformer
from madtp_kernels import RaggedBatch

WIDTH, LAYERS, ROUNDS = 32, 12, 200


def candidates(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Name of what a layer of it is timed, to a forward of :data:`LAYERS` layers."""
    torch.manual_seed(0)
    vision = VisionTransformer(
        VisionConfig(image_size=32, patch_size=8, embed_dim=WIDTH, depth=LAYERS, num_heads=2, sd_num=8, sd_dim=WIDTH)
    )
    text = TextEncoder(
        TextConfig(vocab_size=50, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
                   num_attention_heads=2, encoder_width=WIDTH, max_position_embeddings=32), WIDTH,
    )  # fmt: skip
    dictionary = torch.randn(8, WIDTH).to(dtype)
    vision, text = vision.to(dtype).eval(), text.to(dtype).eval()
    pixels = torch.randn(1, 3, 32, 32).to(dtype)
    ids = RaggedBatch.from_list([torch.arange(20)])

    def see(temperature: float) -> Callable[[], object]:
        return lambda: vision(pixels, dictionary, MADTP(temperature))

    def read(temperature: float) -> Callable[[], object]:
        return lambda: text(ids, [], dictionary, MADTP(temperature))

    return {"image, dense": see(0.0), "image, pruned": see(1.0), "text, dense": read(0.0), "text, pruned": read(1.0)}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    calls = candidates(getattr(torch, options.dtype))
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - start)
    print(
        measure.processor_lines(Path(__file__).parent / "results")[0],
        f"; {options.dtype}, torch {torch.__version__}",
        sep="",
    )
    for name, seconds in least.items():
        print(f"{name:14s} {seconds / LAYERS * 1e6:6.0f} us per layer")


if __name__ == "__main__":
    main()
