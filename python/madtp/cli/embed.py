"""`madtp embed`: images or texts as vectors that can be compared."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from .batch import (
    UNFINISHED,
    Item,
    Overlays,
    add_batch,
    add_images,
    add_overlay,
    check_output,
    cost_of,
    image_of,
    image_rows,
    run_rows,
    settings_of,
    truncation,
)
from .bulk import RESUMED, add_bulk, is_bulk, run_bulk
from .options import add_model, add_model_options, load_model

TASKS = ("retrieval", "clip")

_EXAMPLES = f"""\
examples:
  madtp embed --model DIR photos/ --output photos.npy
  madtp embed --model openai/clip-vit-large-patch14 'photos/**/*.jpg' --output photos.safetensors
  madtp embed --model DIR --texts captions.txt --output captions.npy

photos.npy holds float32 features of length 1, [images, width], so that a product is a cosine similarity;
photos.safetensors has them as the tensor "features". Names are in photos.npy.jsonl, one row per input:
  {{"row": 1, "image": "photos/a.jpg", "image_tokens": [577, ...], "gflops": 33.1, ..., "index": 0}}
where index is the row of the features.
{UNFINISHED}
  madtp embed --model DIR 'laion/{{00000..00127}}.tar' --output embeddings/ --devices all

{RESUMED}"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "embed",
        help="features of images or texts",
        description="Turns images or texts into vectors that can be compared (BLIP retrieval models, CLIP).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_images(parser, '{"image": "a.jpg"}')
    parser.add_argument(
        "--texts",
        metavar="FILE",
        help="instead of images: texts, one per line or a JSON list (-: from standard input)",
    )
    parser.add_argument(
        "--output", metavar="FILE", required=True, help="a .npy or .safetensors file, or a folder, with a / at its end"
    )
    add_batch(parser, "images or texts")
    add_overlay(parser)
    add_bulk(parser, vectors=True, text="column, field or tar suffix with texts, which are embedded instead of images")
    add_model_options(parser, text_modes=True)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Embed images or texts."""
    from ..files import check_output as check_file
    from ..index import to_text
    from ..inputs import read_texts
    from ..predict import embed_images, embed_texts

    if is_bulk(args):
        return _run_bulk(args)
    if Path(args.output).suffix not in _WRITERS:
        expected = ", ".join(_WRITERS) + " or /"
        args.usage_error(f"--output: expected a name that ends with {expected}, got {args.output}")
    if args.texts and (args.images or args.input or args.save_overlay):
        args.usage_error("give either images or --texts (--save-overlay goes with images)")
    if args.texts:
        source, folder = [{"text": text} for text in read_texts(args.texts)], Path()
    else:
        source, folder = image_rows(args)
    for path in (args.output, f"{args.output}.jsonl"):
        check_file(path, option="--output")
    check_output(args, source)
    names = f"{args.output}.jsonl"
    if Path(names).exists() and not args.overwrite and not Path(f"{args.output}.partial").exists():
        raise ValueError(f"{names} exists already; remove it, or give --overwrite")
    overlays = Overlays(args, source)
    model = load_model(args, TASKS, words=bool(args.texts))
    kind = "text" if args.texts else "image"

    def prepare(row: int, fields: dict):
        if args.texts:
            return Item(row, Path(), model.processor.text(fields["text"]), truncation(model, fields["text"]))
        image = image_of(fields, folder)
        return Item(row, image, model.processor.image(image))

    def answer(items: list) -> list[dict]:
        if args.texts:
            embeddings, _ = embed_texts(model, [item.inputs for item in items])
            pictures = [{}] * len(items)
        else:
            embeddings, output = embed_images(model, [item.inputs for item in items])
            pictures = overlays.patches(items, output.trace, model)
        return [
            {
                f"{kind}_tokens": embedding.tokens,
                **cost_of(embedding.flops),
                **picture,
                **item.added,
                "features": to_text(embedding.features),
            }
            for item, embedding, picture in zip(items, embeddings, pictures, strict=True)
        ]

    return run_rows(
        args,
        source,
        prepare,
        answer,
        settings=settings_of(args, model, texts=bool(args.texts), text_mode=model.config.text_mode, kind=kind),
        tokens=[f"{kind}_tokens"],
        answers=["features", "index"],
        keep=[kind],
        unit=f"{kind}s",
        publish=_publish,
    )


def _run_bulk(args: argparse.Namespace) -> int:
    """Embed what a folder of shards is made of."""
    from ..bulk.callables import Embedder

    if args.save_overlay:
        args.usage_error("--save-overlay: of no use with --output FOLDER/")
    if sum(map(bool, (args.images, args.input, args.texts))) > 1:
        args.usage_error("give one of images, --input and --texts")
    texts = bool(args.texts or args.text_key)
    text = (args.text_key or "text") if texts else None
    kind = "text" if texts else "image"
    return run_bulk(
        args,
        lambda model: Embedder(model, text=text),
        TASKS,
        sources=args.images or list(filter(None, [args.input, args.texts])),
        images=not texts,
        words=texts,
        vectors="text" if texts else "img",
        answers=["index"],
        tokens=[f"{kind}_tokens"],
        unit=f"{kind}s",
        kind=kind,
        text_key=text,
    )


def _publish(records: Iterator[dict], output: Path) -> None:
    """Names and features, the latter last: where they are, all is."""
    import numpy as np

    from ..files import replacing
    from ..index import from_text
    from ..jsonl import to_line

    features = []
    with replacing(output.with_name(output.name + ".jsonl")) as names:
        for record in records:
            if "features" in record:
                vector = from_text(record.pop("features"))
                record["index"] = len(features)
                features.append(vector)
            names.write(to_line(record))
    array = np.stack(features) if features else np.empty((0, 0), dtype=np.float32)
    with replacing(output) as file:
        _WRITERS[output.suffix](file, array)


def _write_npy(file, array) -> None:
    import numpy as np

    np.save(file, array)


def _write_safetensors(file, array) -> None:
    from safetensors.numpy import save

    file.write(save({"features": array}))


_WRITERS = {".npy": _write_npy, ".safetensors": _write_safetensors}
