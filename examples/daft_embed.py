"""Embed the images that a table of paths names, with Daft, and write parquet.

    python examples/daft_embed.py MODEL images.parquet --output embeddings/ --width 512

The table has a column "path"; its other columns are kept. "embedding" is null where "error" says why. The same lines
run on Daft's own engine and, after `daft.set_runner_ray()`, on a cluster.
"""

import argparse

import daft

import madtp


def embed(frame, model, width, *, column="path", gpus=0, batch_size=64, **options):
    """A frame with the columns "embedding" and "error".

    Args:
        frame: has a column with paths or with the bytes of images.
        model: as `madtp.load` takes it.
        width: of its vectors.
        gpus: of a process with a model.
        options: of `madtp.Embedder`.
    """
    vector = daft.DataType.embedding(daft.DataType.float32(), width)

    @daft.cls(gpus=gpus)
    class Embed:
        def __init__(self):
            self.embedder = madtp.Embedder(model, device="cuda" if gpus else "cpu", **options)

        @daft.method.batch(
            return_dtype=daft.DataType.struct({"embedding": vector, "error": daft.DataType.string()}),
            batch_size=batch_size,
        )
        def __call__(self, images):
            found = self.embedder({"image": images.to_pylist()})
            pairs = zip(found["embedding"], found["error"], strict=True)
            return [{"embedding": None if error else vector, "error": error} for vector, error in pairs]

    frame = frame.with_column("found", Embed()(daft.col(column)))
    return frame.select("*", *(frame["found"][name].alias(name) for name in ("embedding", "error"))).exclude("found")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("table", help="a parquet file")
    parser.add_argument("--output", required=True, help="folder of parquet files")
    parser.add_argument("--width", type=int, required=True, help="of the model's vectors")
    parser.add_argument("--gpus", type=float, default=0, help="of a process with a model")
    args = parser.parse_args()
    embed(daft.read_parquet(args.table), args.model, args.width, gpus=args.gpus).write_parquet(args.output)


if __name__ == "__main__":
    main()
