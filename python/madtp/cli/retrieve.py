"""`madtp retrieve`: which images does a text describe, and which texts describe an image?"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from .. import predict
from ..bulk.vectors import ImageIndex, Vectors, candidates, check_index
from ..files import check_output as check_file
from ..files import open_regular
from ..inputs import read_texts
from ..jsonl import numbered, row_of
from ..options import UsageError, option, positive
from ..tasks import ImageInputs, task_of
from ..tasks.base import image_of
from .answer import OutputOptions
from .batch import UNFINISHED, Item, TokenMeter, check_output, report, run_rows, settings_of, source_of, truncation
from .embed import TASKS
from .options import Command, ModelSource, PruningOptions, RunOptions, TextOptions, load_model

_log = logging.getLogger("madtp")

_EXAMPLES = f"""\
examples:
  madtp retrieve --model DIR photos/ --index photos.index --text "a dog on a beach"
  madtp retrieve --model DIR photos/ --index photos.index --texts queries.txt --top 20 --output found.jsonl
  madtp retrieve --model DIR --index photos.index --text "a cat"
  madtp retrieve --model DIR photos/ --texts captions.txt --direction image-to-text --top 1

The index is a folder like those of madtp embed: the next time, only images that are new or have changed are
encoded. Embeddings of madtp embed are searched as they are (docs/scale.md). With a BLIP model, the best matches are
scored again by the classifier that looks at image and text together, and ordered by its logit ("match") plus the
similarity, as BLIP does. CLIP has the similarity only.

a row of the output; row is the number of the query:
  {{"row": 1, "text": "a dog on a beach",
   "images": [{{"image": "photos/a.jpg", "similarity": 0.41, "match": 2.1}}, ...], ...}}
{UNFINISHED}"""


@dataclass(kw_only=True)
class Retrieve(TextOptions, RunOptions, PruningOptions, OutputOptions, ImageInputs, ModelSource, Command):
    """Images that texts describe, or texts that describe images."""

    name = "retrieve"
    help = "find images by text, or texts by image"
    description = (
        "Finds the images that texts describe, or the texts that describe images (BLIP retrieval models, CLIP)."
    )
    examples = _EXAMPLES

    text: Sequence[str] | None = option("a text; may be given several times", action="append", metavar="TEXT")
    texts: str | None = option("texts, one per line or a JSON list (-: from standard input)", metavar="FILE")
    direction: str = option("what is asked for what", "text-to-image", choices=["text-to-image", "image-to-text"])
    index: str | None = option(
        "keep the vectors of the images in this folder; without images, search those that are there, or in a folder or "
        "file of madtp embed",
        metavar="FOLDER",
    )
    ann: str | None = option(
        "with --index and without images: an index of faiss or usearch (.usearch) over the same vectors, which names "
        "candidates",
        metavar="FILE",
    )
    top: int = option("matches per query", 10, type=positive, metavar="N")
    rerank: int | None = option(
        "score the best K again with BLIP's classifier, which reads the pictures (default: 16; 0 for CLIP, which has "
        "none, and where only an index is given)",
        type=int,
        metavar="K",
    )

    def run(self) -> int:
        if bool(self.text) == bool(self.texts):
            raise UsageError("give either --text or --texts")
        if self.ann and (not self.index or self.images or self.input or self.direction == "image-to-text"):
            raise UsageError("--ann: of no use but where texts search an --index")
        texts = self.text or read_texts(self.texts)
        rows = None
        if self.images or self.input:
            rows = self._rows()
            if self.index and not os.path.exists(self.index):
                check_file(self.index.rstrip(os.sep), option="--index")
            elif self.index:
                check_index(self.index, grows=True)
        elif not self.index:
            raise UsageError("give images, --input or an --index to search")
        elif not Path(self.index).exists():
            raise ValueError(f"{self.index}: there is no such index; give images to make it from")
        else:
            check_index(self.index)
        if self.ann:
            open_regular(self.ann).close()
        if self.rerank is not None and self.rerank < 0:
            raise ValueError(f"--rerank: expected at least 0, got {self.rerank}")
        check_output(self, rows or ())
        model = load_model(self, TASKS)
        rerank, classifies = self.rerank, task_of(model).matches
        if rerank is None:
            rerank = 16 if classifies and rows is not None else 0
        if rerank and not classifies:
            raise ValueError(f"--rerank: expected 0, since CLIP has no classifier, got {rerank}")

        rows, collection, failed = self._collection(model, rows)
        if self.direction == "image-to-text":
            return self._image_to_text(model, texts, rows, collection, failed, rerank)
        code = self._text_to_image(model, texts, collection, rerank)
        return max(code, report(failed, len(rows), "images could not be searched"))

    def _rows(self) -> list[dict]:
        source, folder = source_of(self)
        rows = []
        for number, row in numbered(source):
            try:
                row = row_of(row) if isinstance(row, bytes) else row
                rows.append({**row, "image": str(image_of(row, folder))})
            except ValueError as error:
                raise ValueError(f"{self.input}, line {number}: {error}") from error
        return rows

    def _collection(self, model, rows: list[dict] | None):
        """Images, those of the index unless they are given, the vectors of the ones that can be used, and why the others,
        by number from 1, cannot."""
        settings = settings_of(self, model, texts=False)
        for name in ("model", "tokenizer", "device", "backend"):  # the fingerprint has what matters
            del settings[name]
        if rows is None:
            vectors = Vectors.open(self.index, settings)
            names = [name for name, alive in zip(vectors.names, vectors.usable(), strict=True) if alive]
            if not names:
                raise ValueError(f"{self.index}: this index is empty")
            return [{"image": name} for name in names], vectors, {}
        return rows, *self._encoded(model, [row["image"] for row in rows], settings)

    def _encoded(self, model, images: list[str], settings: dict):
        """The vectors of the images that can be used, and why the others cannot; the index has them afterwards."""
        meter = TokenMeter(["image_tokens"])

        def embed(pixels: list) -> list[dict]:
            return meter.seen(
                [
                    {"embedding": embedding.features.numpy(), "image_tokens": embedding.tokens}
                    for embedding in predict.embed_images(model, pixels)[0]
                ]
            )

        with tempfile.TemporaryDirectory() as folder:
            path = self.index or Path(folder) / "index"
            try:
                with ImageIndex(path, settings) as index:
                    options = {"unit": "images", "note": meter.note, "progress": False if self.quiet else None}
                    added, failed = index.update(images, model.processor.image, embed, self.batch_size, **options)
                    usable = [image for number, image in enumerate(images, 1) if number not in failed]
                    vectors = Vectors([index.vectors.rows(index.numbers(usable))], usable)
            except KeyboardInterrupt:
                if self.index:
                    print("madtp: interrupted; the index has what is done", file=sys.stderr)
                raise
        if self.index and not self.quiet:
            print(f"{self.index}: {added} of {len(images)} images encoded anew", file=sys.stderr)
        if len(failed) == len(images):
            raise ValueError(f"none of {len(images)} images can be used; the first: {failed[1]}")
        return vectors, failed

    def _text_to_image(self, model, texts, collection, rerank: int) -> int:
        count = max(self.top, rerank)

        def prepare(number: int, row: dict) -> Item:
            return Item(number, Path(), model.processor.text(row["text"]), truncation(model, row["text"]))

        def answer(items: list[Item]) -> list[dict]:
            ids = [item.inputs for item in items]
            embeddings, _ = predict.embed_texts(model, ids)
            queries = torch.stack([embedding.features for embedding in embeddings])
            if self.ann:  # more than are asked for, since its own order may be coarser
                found, scores = collection.scored(queries, candidates(self.ann, queries, max(100, 4 * count)), count)
            else:
                found, scores = collection.search(queries, count)
            pairs = [(image, text) for text, row in enumerate(found) for image in row[:rerank]]
            matches = self._match(model, collection.names, ids, pairs)
            logits = [[matches.get((image, text)) for image in row] for text, row in enumerate(found)]
            ranked = map(partial(_ranked, "image", collection.names, self.top), found, scores, logits)
            return [
                {"images": images, "text_tokens": embedding.tokens, **item.added}
                for item, embedding, images in zip(items, embeddings, ranked, strict=True)
            ]

        return run_rows(
            self,
            [{"text": text} for text in texts],
            prepare,
            answer,
            settings=self._settings(model, rerank, collection),
            tokens=["text_tokens"],
            keep=["text"],
            unit="texts",
        )

    def _image_to_text(self, model, texts, rows, collection, failed, rerank: int) -> int:
        ids, embeddings = [model.processor.text(text) for text in texts], []
        if truncated := sum(map(model.processor.cuts, texts)):
            _log.warning("%d texts are not read to their end, since the model reads no more", truncated)
        for start in range(0, len(ids), self.batch_size):
            embeddings += predict.embed_texts(model, ids[start : start + self.batch_size])[0]
        described = Vectors([np.stack([embedding.features.numpy() for embedding in embeddings])], texts)
        usable = [number for number in range(1, len(rows) + 1) if number not in failed]
        place = dict(zip(usable, np.flatnonzero(collection.usable()).tolist(), strict=True))

        def prepare(number: int, row: dict) -> Item:
            if number in failed:
                raise ValueError(failed[number])
            return Item(number, Path(row["image"]), model.processor.image(row["image"]) if rerank else None)

        def answer(items: list[Item]) -> list[dict]:
            queries = collection.rows([place[item.row] for item in items])
            found, scores = described.search(queries, max(self.top, rerank))
            matches = {}
            if rerank:
                _, output = predict.embed_images(model, [item.inputs for item in items])
                pairs = [(image, text) for image, row in enumerate(found) for text in row[:rerank]]
                matches = dict(zip(pairs, predict.match(model, output.tokens, ids, pairs), strict=True))
            logits = [[matches.get((image, text)) for text in row] for image, row in enumerate(found)]
            ranked = map(partial(_ranked, "text", texts, self.top), found, scores, logits)
            return [{"texts": matches} for matches in ranked]

        return run_rows(
            self,
            rows,
            prepare,
            answer,
            settings=self._settings(model, rerank, collection, texts=described.digest()),
            tokens=[],
            answers=["texts"],
            keep=["image"],
        )

    def _settings(self, model, rerank: int, collection, **more) -> dict:
        """What determines the matches; among it the collection that is searched."""
        return settings_of(
            self,
            model,
            direction=self.direction,
            text_mode=model.config.text_mode,
            top=self.top,
            rerank=rerank,
            ann=self.ann,
            collection=collection.digest(),
            **more,
        )

    def _match(self, model, images: Sequence[str], ids: list, pairs: list[tuple[int, int]]) -> dict:
        """Logits of (image, text) pairs, of images that are read here, each once."""
        logits = {}
        needed = sorted({image for image, _ in pairs})
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(needed), self.batch_size):
                numbers = needed[start : start + self.batch_size]
                pixels = list(pool.map(model.processor.image, (images[number] for number in numbers)))
                _, output = predict.embed_images(model, pixels)
                here = [pair for pair in pairs if pair[0] in numbers]
                local = [(numbers.index(image), text) for image, text in here]
                logits |= zip(here, predict.match(model, output.tokens, ids, local), strict=True)
        return logits


def _ranked(
    kind: str, names: Sequence[str], count: int, ids: Sequence[int], scores: Sequence[float], logits: Sequence
) -> list[dict]:
    """Records of the best matches of one query: those with logits first, by logit plus similarity, then the others, whose
    logits are None, as they come, the most similar first."""
    matches = sorted(
        zip(ids, scores, logits, strict=True),
        key=lambda found: (found[2] is None, 0.0 if found[2] is None else -(found[2] + found[1])),
    )
    return [
        {kind: names[n], "similarity": round(score, 6), **({} if logit is None else {"match": round(logit, 6)})}
        for n, score, logit in matches[:count]
    ]
