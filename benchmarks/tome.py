"""ToMe on a ViT-B/16 of random weights: this project's operations against eager batched PyTorch, dense and merging.

    python benchmarks/tome.py --batch 8 --merge 24 --dtype float32

Candidates take turns; the time of each is its least of several rounds. All images have the same number of tokens and lose the
same number, so that the eager form needs no padding. Nothing is printed unless both forms agree: after two layers in every digit
that rounding leaves, after all of them closely. From the second merge on the pairs are others, because the authors'
code moves destinations behind the sources that are left, where the operations keep tokens in their order, and pairs are sought
between even and odd places.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F

from madtp_kernels import RaggedBatch, attention, layer_norm, linear, match_tokens, merge_tokens

WIDTH, HEADS = 768, 12


def make_weights(depth, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
    norms = {"norm1": torch.ones(WIDTH), "norm2": torch.ones(WIDTH)}
    blocks = []
    for _ in range(depth):
        matrices = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        blocks.append({name: value.to(dtype) for name, value in (matrices | norms).items()})
    return blocks


def eager(x, blocks, merge):
    """x ``[B, N, D]``; PyTorch's attention, ToMe as its authors' code does it: gather and scatter_reduce on padded batches."""
    batch, tokens, _ = x.shape
    size = x.new_ones(batch, tokens, 1)
    for w in blocks:
        qkv = F.linear(F.layer_norm(x, (WIDTH,), w["norm1"]), w["qkv"])
        q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = size.log()[:, None, :, 0].unsqueeze(1) if merge else None
        x = x + F.linear(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2), w["out"])
        if merge:
            metric = F.normalize(k.mean(1), dim=-1)
            scores = metric[:, ::2] @ metric[:, 1::2].mT
            scores[:, 0] = float("-inf")
            best, partner = scores.max(-1)
            order = best.argsort(-1, descending=True)
            stays, gone = order[:, merge:].sort(1).values, order[:, :merge]
            target = partner.gather(1, gone)[..., None]

            def fold(t, gone=gone, stays=stays, target=target):
                a, b, wide = t[:, ::2], t[:, 1::2], t.shape[2]
                moved = a.gather(1, gone[..., None].expand(-1, -1, wide))
                b = b.scatter_reduce(1, target.expand(-1, -1, wide), moved, "sum")
                return torch.cat([a.gather(1, stays[..., None].expand(-1, -1, wide)), b], 1)

            total = fold(size)
            x, size = fold(x * size) / total, total
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, (WIDTH,), w["norm2"]), w["up"])), w["down"])
    return x[:, 0]


def ragged(x, blocks, merge):
    """x: RaggedBatch; the operations of this project."""
    sizes = torch.ones(x.values.shape[0])
    for w in blocks:
        cu, most = x.cu_seqlens, x.max_seqlen
        qkv = linear(layer_norm(x.values, w["norm1"], None, cu), w["qkv"], None, cu).unflatten(1, (3, HEADS, -1))
        q, k, v = qkv.unbind(1)
        out, _ = attention(q, k, v, cu, cu, most, most, key_bias=sizes.log() if merge else None)
        x = x.with_values(linear(out.flatten(1), w["out"], None, cu, residual=x.values))
        if merge:
            merged = merge_tokens(x, match_tokens(k.mean(1), cu, most, count=merge)[0], sizes=sizes)
            x, sizes = merged.tokens, merged.sizes
            cu = x.cu_seqlens
        hidden = linear(layer_norm(x.values, w["norm2"], None, cu), w["up"], None, cu, activation="gelu")
        x = x.with_values(linear(hidden, w["down"], None, cu, residual=x.values))
    return x.values[x.cu_seqlens[:-1].long()]


def flops(depth, tokens, merge):
    total = 0
    for _ in range(depth):
        total += 2 * tokens * 4 * WIDTH**2 + 4 * tokens**2 * WIDTH
        tokens -= min(merge, (tokens - 1) // 2)
        total += 2 * tokens * 8 * WIDTH**2
    return total


def check(name, ours, theirs, dtype, most):
    """1 - cosine of the class tokens; in bfloat16 near ties between pairs fall either way."""
    error = 1 - F.cosine_similarity(ours.double(), theirs.double()).min().item()
    if not error < (most if dtype == torch.float32 else 0.02):
        raise SystemExit(f"{name}: ours and the eager form disagree, 1 - cosine {error:.2e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=577)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--merge", type=int, default=24, help="tokens that each layer merges away")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    blocks = make_weights(options.depth, dtype)
    padded = torch.randn(options.batch, options.tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    batch = RaggedBatch.from_list(list(padded))
    calls = {
        "eager dense": lambda: eager(padded, blocks, 0),
        "eager ToMe": lambda: eager(padded, blocks, options.merge),
        "dense": lambda: ragged(batch, blocks, 0),
        "ToMe": lambda: ragged(batch, blocks, options.merge),
    }
    with torch.inference_mode():
        short = blocks[:2]
        check("two layers", ragged(batch, short, options.merge), eager(padded, short, options.merge), dtype, 1e-7)
        times = dict.fromkeys(calls, float("inf"))
        for _ in range(options.rounds):
            results = {}
            for name, call in calls.items():
                start = time.perf_counter()
                results[name] = call()
                times[name] = min(times[name], time.perf_counter() - start)
        check("dense", results["dense"], results["eager dense"], dtype, 1e-7)
        check("ToMe", results["ToMe"], results["eager ToMe"], dtype, 1e-3)
    ratio = flops(options.depth, options.tokens, 0) / flops(options.depth, options.tokens, options.merge)
    record = vars(options) | {
        "threads": torch.get_num_threads(),
        "ms": {name: round(1000 * t, 1) for name, t in times.items()},
        "flops_ratio": round(ratio, 3),
        "speedup": round(times["dense"] / times["ToMe"], 3),
        "share_of_flops_ratio": round(times["dense"] / times["ToMe"] / ratio, 3),
        "eager_share": round(times["eager dense"] / times["eager ToMe"] / ratio, 3),
        "over_eager_tome": round(times["eager ToMe"] / times["ToMe"], 3),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
