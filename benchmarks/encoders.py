"""Images per second of encoders, dense and pruned, against transformers with PyTorch's fused attention: same weights,
random, of real size.

    python benchmarks/encoders.py --model clip-b32
    python benchmarks/encoders.py --model clip-l14 --dtype bfloat16 --rounds 2
    python benchmarks/encoders.py --model siglip2-b16-512 --dtype bfloat16 --rounds 2
    python benchmarks/encoders.py --model clip-l14 --dtype bfloat16 --batch 64 --rounds 20

On a GPU every candidate, transformers too, is a CUDA graph that is replayed: what Python takes is left out for all of them.
Candidates take turns; the figure is that of the fastest round. A model whose dense features differ from transformers' is
not timed. "efficiency" is the gain in time of pruning divided by its gain in GFLOPs, over our own dense model; GFLOPs
are official ones, the rule's cosines and merging included.
"""

from __future__ import annotations

import argparse
import json

import measure
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import madtp
from madtp import flops
from madtp.pruning import Pruning, RankedNovelty, ToMe
from madtp.tasks import TASKS
from madtp.weights.key_maps import HUGGING_FACE

SIZES = {
    "clip-b32": (CLIPVisionModel, {"image_size": 224, "patch_size": 32}),
    "clip-l14": (
        CLIPVisionModel,
        {
            "image_size": 224, "patch_size": 14, "hidden_size": 1024, "intermediate_size": 4096,
            "num_hidden_layers": 24, "num_attention_heads": 16,
        },
    ),
    "siglip2-b16-512": (SiglipVisionModel, {"image_size": 512, "patch_size": 16}),
}  # fmt: skip
CONFIGS = {CLIPVisionModel: CLIPVisionConfig, SiglipVisionModel: SiglipVisionConfig}
RULES = {
    "ranked novelty": RankedNovelty,
    "averaged keys": lambda **kw: RankedNovelty(keys="averaged", **kw),
    "tome": ToMe,
}


def encoders(name: str, dtype: torch.dtype):
    """(encoder of transformers, ours with the same weights, its configuration)."""
    kind, sizes = SIZES[name]
    config = CONFIGS[kind](**sizes, attn_implementation="sdpa")
    torch.manual_seed(0)
    with measure.DEVICE:
        theirs = kind(config).eval()
    family, state = HUGGING_FACE[config.model_type], theirs.state_dict()
    with torch.device("meta"):
        ours = TASKS["clip"].Model(family.config_of(config.to_dict(), state))
    state = dict(family.to_ours(state))
    with measure.DEVICE:
        missing = {key: torch.zeros(value.shape) for key, value in ours.state_dict().items() if key not in state}
    ours.load_state_dict(state | missing, assign=True)
    return theirs.to(dtype), ours.to(dtype).eval(), config


@torch.inference_mode()
def figures(name: str, batch: int, rounds: int, dtype: torch.dtype, share: float) -> dict:
    """Images per second of each candidate, and what pruning saves."""
    theirs, ours, config = encoders(name, dtype)
    generator = torch.Generator().manual_seed(1)
    size = config.image_size
    # Coarse pictures, as photographs are: neighbours are alike.
    pixels = torch.nn.functional.interpolate(torch.randn(batch, 3, 16, 16, generator=generator), size=(size, size))
    pixels = (pixels + 0.2 * torch.randn(batch, 3, size, size, generator=generator)).to(measure.DEVICE, dtype)
    rules = {"madtp": Pruning()} | {rule: make(shares=(share,)) for rule, make in RULES.items()}
    gflops, calls = {}, {"transformers": lambda: theirs(pixels).pooler_output}
    for who, rule in rules.items():
        lengths = flops.stream_lengths(ours.encode_image(pixels, rule).trace)
        costs = [flops.clip(ours.config, image=row, pruning=rule).official for row in lengths]
        gflops[who] = sum(costs) / len(costs)
        calls[who] = lambda rule=rule: ours.encode_image(pixels, rule, pooled=True).features
    similarity = torch.cosine_similarity(calls["transformers"]().float(), calls["madtp"]().float()).min()
    if similarity < (0.99999 if dtype == torch.float32 else 0.999):
        raise SystemExit(f"{name}: features differ, cosine {similarity}")
    if measure.ON_GPU:
        calls = {who: measure._captured(call) for who, call in calls.items()}
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for who, call in calls.items():
            least[who] = min(least[who], measure._seconds(call))
    dense = least["madtp"], gflops["madtp"]
    return {
        "images_per_second": {who: round(batch / seconds, 2) for who, seconds in least.items()},
        "over_transformers": round(least["transformers"] / least["madtp"], 3),
        "saved": {who: round(1 - cost / dense[1], 3) for who, cost in gflops.items() if who != "madtp"},
        "efficiency": {
            who: round(dense[0] / least[who] / (dense[1] / cost), 3) for who, cost in gflops.items() if who != "madtp"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="clip-b32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--share", type=float, default=0.08, help="of the tokens, merged in each layer (default: 0.08)")
    parser.add_argument("--out", metavar="FILE", help="append the line here, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    found = figures(options.model, options.batch, options.rounds, dtype, options.share)
    device = torch.cuda.get_device_name() if measure.ON_GPU else "cpu"
    settings = {name: value for name, value in vars(options).items() if name != "out"} | {"device": device}
    versions = {"version": madtp.__version__, "torch": torch.__version__}
    line = json.dumps({"figure": f"encoders, {options.model}", **settings, **versions, **found})
    print(line)
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
