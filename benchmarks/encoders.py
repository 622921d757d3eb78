"""Images per second of dense encoders against transformers with PyTorch's fused attention: same weights, random, of real size.

    python benchmarks/encoders.py                                   # CLIP B/32, eight images
    python benchmarks/encoders.py --models clip-b32 clip-l14 siglip2-b16-512 --batch 8 --dtype bfloat16

Candidates take turns; the figure is that of the fastest round. A model whose features differ from transformers' is not timed.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import madtp
from madtp.tasks import TASKS
from madtp.weights.key_maps import HUGGING_FACE

SIZES = {
    "clip-b32": (CLIPVisionModel, CLIPVisionConfig(image_size=224, patch_size=32)),
    "clip-l14": (
        CLIPVisionModel,
        CLIPVisionConfig(
            image_size=224,
            patch_size=14,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
        ),
    ),
    "siglip2-b16-512": (SiglipVisionModel, SiglipVisionConfig(image_size=512, patch_size=16)),
}


def candidates(name: str, dtype: torch.dtype):
    """(forward of transformers, forward of ours on the same weights, pixels of one image)."""
    kind, config = SIZES[name]
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    theirs = kind(config).eval()
    family = HUGGING_FACE[config.model_type]
    state = theirs.state_dict()
    with torch.device("meta"):
        ours = TASKS["clip"].Model(family.config_of(config.to_dict(), state))
    state = dict(family.to_ours(state))
    missing = {key: torch.zeros(value.shape) for key, value in ours.state_dict().items() if key not in state}
    ours.load_state_dict(state | missing, assign=True)
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype)
    return (
        lambda pixels: theirs(pixels).pooler_output,
        lambda pixels: ours.encode_image(pixels).features,
        (3, config.image_size, config.image_size),
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=["clip-b32"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    for name in options.models:
        theirs, ours, shape = candidates(name, dtype)
        pixels = torch.randn(options.batch, *shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        similarity = torch.cosine_similarity(theirs(pixels).float(), ours(pixels).float()).min()
        if similarity < (0.99999 if dtype == torch.float32 else 0.999):
            raise SystemExit(f"{name}: features differ, cosine {similarity}")
        least = {"transformers": float("inf"), "madtp": float("inf")}
        for _ in range(options.rounds):
            for who, forward in (("transformers", theirs), ("madtp", ours)):
                start = time.perf_counter()
                forward(pixels)
                least[who] = min(least[who], time.perf_counter() - start)
        rates = {who: round(options.batch / seconds, 2) for who, seconds in least.items()}
        print(
            json.dumps(
                {
                    "model": name,
                    "dtype": options.dtype,
                    "batch": options.batch,
                    "threads": options.threads,
                    "madtp": madtp.__version__,
                }
                | {"images_per_second": rates, "ratio": round(rates["madtp"] / rates["transformers"], 3)}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
