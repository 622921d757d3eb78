"""A million vectors on disk, searched exactly in blocks: time and memory at a tenth, a third and all of them.

    python benchmarks/bulk_search.py FOLDER [--vectors 1000000] [--width 512] [--queries 8]

Writes random vectors of length 1 to FOLDER in the layout of `madtp embed` (2 GB, unless they are there), and searches
growing parts of it for the ten nearest of each query. Memory is what the process holds itself, not the pages of files,
which the system may drop at any time. Queries are some of the vectors, slightly turned, and have to find them.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from madtp.bulk.vectors import Vectors

SHARD = 10_000


def make(folder, count, width):
    """Shards that are not there yet."""
    for part in ("img_emb", "metadata"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(-(-count // SHARD)):
        path = folder / f"img_emb/img_emb_{number:06d}.npy"
        if path.exists():
            continue
        vectors = np.random.default_rng(number).standard_normal((SHARD, width), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        with open(folder / f"metadata/metadata_{number:06d}.jsonl", "w") as file:
            for row in range(SHARD):
                file.write(json.dumps({"row": row, "image_path": f"photos/{number:06d}/{row:06d}.jpg"}) + "\n")
        np.save(path, vectors)


def own_memory():
    """MB that are this process's own, as Linux says."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def search(whole, count, queries):
    """Search the first `count` vectors: seconds, and the MB that were this process's own beside what it held before."""
    vectors = Vectors(whole.parts[: count // SHARD], whole.names[:count])
    places = np.linspace(0, count - 1, queries).astype(int)
    turned = vectors.rows(places) + np.random.default_rng(0).normal(0, 0.02, (queries, vectors.parts[0].shape[1]))
    held, most, times, blocks = own_memory(), 0.0, [], vectors.blocks

    def watched():
        nonlocal most
        for block in blocks():
            yield block
            most = max(most, own_memory())

    vectors.blocks = watched
    for _ in range(3):
        began = time.perf_counter()
        ids, _ = vectors.search(turned, 10)
        times.append(time.perf_counter() - began)
    assert [found[0] for found in ids] == places.tolist(), "another vector is nearer than the one that was turned"
    return min(times), most - held


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--queries", type=int, default=8)
    args = parser.parse_args()
    make(args.folder, args.vectors, args.width)
    held, began = own_memory(), time.perf_counter()
    whole = Vectors.open(args.folder)
    took = time.perf_counter() - began
    print(f"{len(whole):,} vectors opened in {took:.1f} s; their names hold {own_memory() - held:.0f} MB")
    search(whole, SHARD, args.queries)  # warms up
    for count in (args.vectors // 10, args.vectors // 3, args.vectors):
        count = count // SHARD * SHARD
        took, memory = search(whole, count, args.queries)
        size = count * args.width * 4 / 1e9
        print(
            f"{count:9,} vectors, {size:.2f} GB: {args.queries} queries in {took:.2f} s ({size / took:.1f} GB/s, "
            f"{torch.get_num_threads()} threads), {memory:.0f} MB beside the names"
        )


if __name__ == "__main__":
    main()
