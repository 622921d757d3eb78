"""What training-free merging costs beside a dense layer: novelty by rank, and the nearest survivor of what is dropped.

    python benchmarks/similarity.py --batch 8 --tokens 577 --dtype float32

Keys of a ViT-B/16, heads concatenated or averaged; one token in ten is dropped. Candidates take turns, the time of each is its
least.
Rates are of the pairs that count, a multiply-add as 2; the ceiling is PyTorch's own matrix product in the same run.
"""

from __future__ import annotations

import argparse
import json
import time

import tome
import torch

from madtp_kernels import RaggedBatch, nearest_kept, novelty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=577)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    dtype, total = getattr(torch, options.dtype), options.batch * options.tokens
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(options.batch, options.tokens, tome.WIDTH, generator=generator).to(dtype)
    batch, weights = RaggedBatch.from_list(list(x)), tome.make_weights(1, dtype)
    cu, most = batch.cu_seqlens, options.tokens
    keys = torch.randn(total, 3, tome.HEADS, 64, generator=generator).to(dtype)[:, 1]
    averaged = keys.mean(1)
    rank, kept = torch.rand(total, generator=generator), torch.rand(total, generator=generator) < 0.9
    left, right = x.flatten(0, 1), weights[0]["up"].mT.contiguous()
    calls = {
        "dense layer": lambda: tome.ragged(batch, weights, 0),
        "matrix product": lambda: left @ right,
        "novelty": lambda: novelty(keys, cu, most, rank=rank),
        "nearest_kept": lambda: nearest_kept(keys, kept, cu, most),
        "novelty, averaged keys": lambda: novelty(averaged, cu, most, rank=rank),
        "nearest_kept, averaged keys": lambda: nearest_kept(averaged, kept, cu, most),
    }
    pairs = options.batch * options.tokens * (options.tokens - 1) / 2
    survivors = kept.view(options.batch, -1).sum(1)
    merged = int((survivors * (options.tokens - survivors)).sum())
    gflop = {
        "matrix product": 2 * total * right.numel() / 1e9,
        "novelty": 2 * pairs * tome.WIDTH / 1e9,
        "nearest_kept": 2 * merged * tome.WIDTH / 1e9,
    }
    least = dict.fromkeys(calls, float("inf"))
    with torch.inference_mode():
        for round_ in range(options.rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                if round_:  # the first warms up
                    least[name] = min(least[name], time.perf_counter() - start)
    layer = least["dense layer"]
    record = vars(options) | {
        "threads": torch.get_num_threads(),
        "ms": {name: round(1000 * seconds, 2) for name, seconds in least.items()},
        "gflop_per_s": {name: round(amount / least[name], 1) for name, amount in gflop.items()},
        "share_of_layer": round((least["novelty"] + least["nearest_kept"]) / layer, 4),
        "share_of_layer_averaged": round(sum(t for n, t in least.items() if n.endswith("averaged keys")) / layer, 4),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
