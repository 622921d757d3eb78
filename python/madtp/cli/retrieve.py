"""`madtp retrieve`: which images does a text describe, and which texts describe an image?"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..tasks import task_of
from ..tasks.base import image_of
from .batch import (
    UNFINISHED,
    Item,
    TokenMeter,
    add_images,
    add_output,
    check_output,
    image_rows,
    report,
    run_rows,
    settings_of,
    truncation,
)
from .embed import TASKS
from .options import add_model, add_model_options, load_model, positive

_log = logging.getLogger("madtp")

_EXAMPLES = f"""\
examples:
  madtp retrieve --model DIR photos/ --index photos.index --text "a dog on a beach"
  madtp retrieve --model DIR photos/ --index photos.index --texts queries.txt --top 20 --output found.jsonl
  madtp retrieve --model DIR --index photos.index --text "a cat"
  madtp retrieve --model DIR photos/ --texts captions.txt --direction image-to-text --top 1

The index keeps the features of the images: the next time, only those that are new or have changed are
encoded. With a BLIP model, the best matches are scored again by the classifier that looks at image and text
together, and ordered by its logit ("match") plus the similarity, as BLIP does. CLIP has the similarity only.

a row of the output; row is the number of the query:
  {{"row": 1, "text": "a dog on a beach",
   "images": [{{"image": "photos/a.jpg", "similarity": 0.41, "match": 2.1}}, ...], ...}}
{UNFINISHED}"""


def add_parser(commands) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "retrieve",
        help="find images by text, or texts by image",
        description="Finds the images that texts describe, or the texts that describe images (BLIP retrieval "
        "models, CLIP).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    add_images(parser, '{"image": "a.jpg"}')
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given several times")
    parser.add_argument("--texts", metavar="FILE", help="texts, one per line or a JSON list (-: from standard input)")
    parser.add_argument(
        "--direction",
        choices=["text-to-image", "image-to-text"],
        default="text-to-image",
        help="what is asked for what (default: text-to-image)",
    )
    parser.add_argument(
        "--index", metavar="FILE", help="keep the features of the images here; without images, search those that it has"
    )
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="matches per query (default: 10)")
    parser.add_argument(
        "--rerank",
        type=int,
        metavar="K",
        help="score the best K again with BLIP's classifier, which reads the pictures (default: 16; 0 for CLIP, which "
        "has none, and where only an index is given)",
    )
    add_output(parser, "images or texts")
    add_model_options(parser, text_modes=True)
    parser.set_defaults(run=run, usage_error=parser.error)


def run(args: argparse.Namespace) -> int:
    """Rank images for texts, or texts for images."""
    from ..files import check_output as check_file
    from ..inputs import read_texts

    if bool(args.text) == bool(args.texts):
        args.usage_error("give either --text or --texts")
    texts = args.text or read_texts(args.texts)
    rows = None
    if args.images or args.input:
        rows = _rows(args)
        if args.index:
            check_file(args.index, option="--index")
    elif not args.index:
        args.usage_error("give images, --input or an --index to search")
    elif not Path(args.index).exists():
        raise ValueError(f"{args.index}: there is no such index; give images to make it from")
    check_output(args, rows or ())
    model = load_model(args, TASKS)
    rerank, classifies = args.rerank, task_of(model).matches
    if rerank is None:
        rerank = 16 if classifies and rows is not None else 0
    if rerank < 0 or (rerank and not classifies):
        expected = "at least 0" if classifies else "0, since CLIP has no classifier"
        raise ValueError(f"--rerank: expected {expected}, got {rerank}")

    rows, features, failed = _features(args, model, rows)
    if args.direction == "image-to-text":
        return _image_to_text(args, model, texts, rows, features, failed, rerank)
    usable = [row["image"] for number, row in enumerate(rows, 1) if number not in failed]
    code = _text_to_image(args, model, texts, usable, features, rerank)
    return max(code, report(failed, len(rows), "images could not be searched"))


def _rows(args: argparse.Namespace) -> list[dict]:
    from ..jsonl import numbered, row_of

    source, folder = image_rows(args)
    rows = []
    for number, row in numbered(source):
        try:
            row = row_of(row) if isinstance(row, bytes) else row
            rows.append({**row, "image": str(image_of(row, folder))})
        except ValueError as error:
            raise ValueError(f"{args.input}, line {number}: {error}") from error
    return rows


def _features(args, model, rows: list[dict] | None):
    """Images, those of the index unless they are given, features ``[N, P]`` of the ones that can be used, and why the
    others, by number from 1, cannot."""
    from ..index import Index, to_text
    from ..predict import embed_images

    settings = settings_of(args, model, texts=False)
    for name in ("model", "tokenizer", "device", "backend"):  # the fingerprint has what matters
        del settings[name]
    kept = TokenMeter(["image_tokens"])

    def embed(pixels: list) -> list[dict]:
        return kept.seen(
            [
                {"features": to_text(embedding.features), "image_tokens": embedding.tokens}
                for embedding in embed_images(model, pixels)[0]
            ]
        )

    if rows is None:
        with Index(args.index, settings, write=False) as index:
            if not index.images:
                raise ValueError(f"{args.index}: this index is empty")
            return [{"image": image} for image in index.images], index.features(index.images), {}
    images = [row["image"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = args.index or Path(folder) / "index"
        try:
            with Index(path, settings) as index:
                options = {"unit": "images", "note": kept.note, "progress": False if args.quiet else None}
                added, failed = index.update(images, model.processor.image, embed, args.batch_size, **options)
                features = index.features([image for number, image in enumerate(images, 1) if number not in failed])
        except KeyboardInterrupt:
            if args.index:
                print("madtp: interrupted; the index has what is done", file=sys.stderr)
            raise
    if args.index and not args.quiet:
        print(f"{args.index}: {added} of {len(images)} images encoded anew", file=sys.stderr)
    if len(failed) == len(images):
        raise ValueError(f"none of {len(images)} images can be used; the first: {failed[1]}")
    return rows, features, failed


def _text_to_image(args, model, texts, images, features, rerank: int) -> int:
    import torch

    from ..predict import embed_texts

    collection = torch.from_numpy(features)

    def prepare(number: int, row: dict) -> Item:
        return Item(number, Path(), model.processor.text(row["text"]), truncation(model, row["text"]))

    def answer(items: list[Item]) -> list[dict]:
        ids = [item.inputs for item in items]
        embeddings, _ = embed_texts(model, ids)
        similarity = torch.stack([embedding.features for embedding in embeddings]) @ collection.mT
        found = _best(similarity, max(args.top, rerank))
        pairs = [(image, text) for text, row in enumerate(found) for image in row[:rerank]]
        matches = _match(args, model, images, ids, pairs)
        return [
            {
                "images": _ranked(
                    "image",
                    [(images[image], similarity[text, image], matches.get((image, text))) for image in row],
                    args.top,
                ),
                "text_tokens": embeddings[text].tokens,
                **items[text].added,
            }
            for text, row in enumerate(found)
        ]

    return run_rows(
        args,
        [{"text": text} for text in texts],
        prepare,
        answer,
        settings=_settings(args, model, rerank, images, features),
        tokens=["text_tokens"],
        keep=["text"],
        unit="texts",
    )


def _image_to_text(args, model, texts, rows, features, failed, rerank: int) -> int:
    import torch

    from ..predict import embed_images, embed_texts, match

    ids, embeddings = [model.processor.text(text) for text in texts], []
    if truncated := sum(map(model.processor.cuts, texts)):
        _log.warning("%d texts are not read to their end, since the model reads no more", truncated)
    for start in range(0, len(ids), args.batch_size):
        embeddings += embed_texts(model, ids[start : start + args.batch_size])[0]
    collection = torch.stack([embedding.features for embedding in embeddings])
    usable = [number for number in range(1, len(rows) + 1) if number not in failed]
    place = {number: position for position, number in enumerate(usable)}

    def prepare(number: int, row: dict) -> Item:
        if number in failed:
            raise ValueError(failed[number])
        return Item(number, Path(row["image"]), model.processor.image(row["image"]) if rerank else None)

    def answer(items: list[Item]) -> list[dict]:
        queries = torch.from_numpy(features[[place[item.row] for item in items]])
        similarity = queries @ collection.mT
        found = _best(similarity, max(args.top, rerank))
        matches = {}
        if rerank:
            _, output = embed_images(model, [item.inputs for item in items])
            pairs = [(image, text) for image, row in enumerate(found) for text in row[:rerank]]
            matches = dict(zip(pairs, match(model, output.tokens, ids, pairs), strict=True))
        return [
            {
                "texts": _ranked(
                    "text",
                    [(texts[text], similarity[image, text], matches.get((image, text))) for text in row],
                    args.top,
                )
            }
            for image, row in enumerate(found)
        ]

    return run_rows(
        args,
        rows,
        prepare,
        answer,
        settings=_settings(args, model, rerank, texts, collection.numpy()),
        tokens=[],
        answers=["texts"],
        keep=["image"],
    )


def _settings(args, model, rerank: int, names: Sequence[str], features) -> dict:
    """What determines the matches; among it the collection that is searched."""
    digest = hashlib.sha256(json.dumps(list(names)).encode() + features.tobytes())
    return settings_of(
        args,
        model,
        direction=args.direction,
        text_mode=model.config.text_mode,
        top=args.top,
        rerank=rerank,
        collection=f"sha256 {digest.hexdigest()[:16]}",
    )


def _best(similarity, count: int) -> list[list[int]]:
    """Columns of each row with the largest values, in descending order, equal ones by number."""
    return similarity.sort(dim=1, descending=True, stable=True).indices[:, :count].tolist()


def _match(args, model, images: Sequence[str], ids: list, pairs: list[tuple[int, int]]) -> dict:
    """Logits of (image, text) pairs, of images that are read here, each once."""
    from ..predict import embed_images, match

    logits = {}
    needed = sorted({image for image, _ in pairs})
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(needed), args.batch_size):
            numbers = needed[start : start + args.batch_size]
            pixels = list(pool.map(model.processor.image, (images[number] for number in numbers)))
            _, output = embed_images(model, pixels)
            here = [pair for pair in pairs if pair[0] in numbers]
            local = [(numbers.index(image), text) for image, text in here]
            logits |= zip(here, match(model, output.tokens, ids, local), strict=True)
    return logits


def _ranked(kind: str, matches: list[tuple], count: int) -> list[dict]:
    """Records of (name, similarity, logit or None), the most similar first: those with logits go before."""
    again = [found for found in matches if found[2] is not None]
    again.sort(key=lambda found: -(found[2] + float(found[1])))
    rest = [found for found in matches if found[2] is None]
    return [
        {
            kind: name,
            "similarity": round(float(similarity), 6),
            **({} if logit is None else {"match": round(logit, 6)}),
        }
        for name, similarity, logit in (again + rest)[:count]
    ]
