"""The images of bulk_stopped.py through Ray Data, with an actor that is killed in the middle: are the vectors the same?

    python benchmarks/bulk_stopped.py FOLDER [--images 20000]
    python benchmarks/bulk_ray.py FOLDER [--images 20000]

Embeds the tars that bulk_stopped.py left in FOLDER by `embed` of examples/ray_embed.py with two actors, ends one of
them with SIGKILL when a quarter of the rows has arrived, and compares rows, errors and vectors with those of `madtp
embed` in FOLDER/whole. Ray's own reader takes the tars that are whole; it gives up on the two that are not, which this
package's reader takes apart inside a Ray task.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import ray

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from bulk_stopped import DAMAGED, TARS  # noqa: E402
from ray_embed import embed  # noqa: E402

from madtp.bulk.readers import read_tar  # noqa: E402
from madtp.bulk.writers import read_records  # noqa: E402


def samples(row):
    """The rows of a tar, as Ray's reader gives those of a sound one; bytes are None where there are none."""
    return [
        {"__key__": one.key, "jpg": one.image and one.image.read(), "why": one.error} for one in read_tar(row["item"])
    ]


def actors():
    """Processes with a model, of this cluster."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            try:
                title = (place / "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::") and b"Embedder" in title:
                found.append(int(place.name))
    return sorted(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=20_000)
    args = parser.parse_args()
    whole = args.folder / "whole"
    known = {}
    for path in sorted((whole / "metadata").iterdir()):
        vectors = np.load(whole / f"img_emb/{path.stem.replace('metadata', 'img_emb')}.npy")
        known |= zip((row["image_path"] for row in read_records(path)), vectors, strict=True)
    failed = {row["key"] for path in sorted((whole / "errors").iterdir()) for row in read_records(path)}

    variables = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    # Two for the actors; with no more, nothing could be read.
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    ray.data.DataContext.get_current().enable_progress_bars = False
    tars = [str(args.folder / f"{t:05d}.tar") for t in range(TARS)]
    sound = ray.data.read_webdataset([tar for t, tar in enumerate(tars) if t not in DAMAGED], decoder=None)
    other = ray.data.from_items([tars[t] for t in DAMAGED]).flat_map(samples)
    seen, errors, worst, killed = [], set(), 0.0, None
    began = time.time()
    for dataset in (sound, other):
        for row in embed(dataset, str(args.folder / "model"), actors=2, backend="reference").iter_rows():
            seen.append(row["__key__"])
            if row["error"]:
                errors.add(row["__key__"])
            else:
                worst = max(worst, float(np.abs(row["embedding"] - known[row["__key__"]]).max()))
            if killed is None and len(seen) >= args.images // 4:
                before = actors()
                killed = before[0]
                os.kill(killed, signal.SIGKILL)
                print(f"after {len(seen)} rows: SIGKILL for {killed}, one of the actors {before}")
        print(f"{len(seen)} rows after {time.time() - began:.0f} s; actors at the end: {actors()}")
    print(
        f"{len(seen)} rows, {len(seen) - len(set(seen))} of them twice, {len(set(known) - set(seen))} lost; "
        f"{len(errors)} errors, the same rows: {errors == failed}; largest difference of a vector {worst:.1e}"
    )


if __name__ == "__main__":
    main()
