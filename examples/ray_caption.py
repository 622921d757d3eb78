"""Caption the images that a table of paths names, with Ray Data, and write JSON Lines.

    python examples/ray_caption.py MODEL images.parquet --output captions/ --actors 8 --gpus 1

The table has a column "image" or "path"; its other columns are kept. "caption" is null where "error" is not.
"""

import argparse

import ray

import madtp


def caption(dataset, model, *, actors=1, batch_size=16, gpus=0, cpus=1, **options):
    """A dataset with captions; arguments as in `ray_embed.embed`, options are those of `madtp.Captioner`."""
    device = "cuda" if gpus else "cpu"
    return dataset.map_batches(
        madtp.Captioner,
        fn_constructor_kwargs={"model": model, "device": device, "threads": max(1, int(cpus)), **options},
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=batch_size,
        num_gpus=gpus,
        num_cpus=cpus,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("table", help="a parquet file")
    parser.add_argument("--output", required=True, help="folder of JSON Lines files")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    parser.add_argument("--cpus", type=float, default=1, help="of each actor")
    args = parser.parse_args()
    dataset = ray.data.read_parquet(args.table)
    options = {"actors": args.actors, "gpus": args.gpus, "cpus": args.cpus, "generation": {"num_beams": 3}}
    caption(dataset, args.model, **options).write_json(args.output)


if __name__ == "__main__":
    main()
