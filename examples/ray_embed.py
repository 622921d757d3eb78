"""Embed webdataset tars, or folders of images, with Ray Data: any number of machines, each actor with a model of its
own.

    python examples/ray_embed.py MODEL 'laion/*.tar' --output embeddings/ --actors 8 --gpus 1

Rows keep their columns; "embedding" is float32 of length 1, and "error" says why a row has none. A shard's rows are
answered once more where an actor dies, and none is lost or there twice.
"""

import argparse
import glob

import ray

import madtp


def embed(dataset, model, *, actors=1, batch_size=64, gpus=0, cpus=1, **options):
    """A dataset with embeddings.

    Args:
        dataset: rows with images: bytes ("jpg", "png", "bytes"), paths ("path") or arrays ("image").
        model: as `madtp.load` takes it, from every machine.
        actors: processes with a model.
        gpus, cpus: of each.
        options: of `madtp.Embedder`.
    """
    device = "cuda" if gpus else "cpu"
    return dataset.map_batches(
        madtp.Embedder,
        fn_constructor_kwargs={"model": model, "device": device, "threads": max(1, int(cpus)), **options},
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=batch_size,
        num_gpus=gpus,
        num_cpus=cpus,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("source", help="a pattern of tars, or a folder of images")
    parser.add_argument("--output", required=True, help="folder of parquet files")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--cpus", type=float, default=1, help="of each actor")
    args = parser.parse_args()
    if args.source.endswith(".tar"):
        dataset = ray.data.read_webdataset(sorted(glob.glob(args.source)), decoder=None)
    else:
        dataset = ray.data.read_binary_files(args.source, include_paths=True).drop_columns(["bytes"])
    embed(dataset, args.model, actors=args.actors, gpus=args.gpus, cpus=args.cpus).write_parquet(args.output)


if __name__ == "__main__":
    main()
