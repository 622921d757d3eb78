"""`madtp embed`: images or texts as vectors that can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from ..bulk.callables import Embedder
from ..files import check_output as check_file
from ..files import replacing
from ..index import from_text, to_text
from ..inputs import read_texts
from ..jsonl import require_new, to_line
from ..options import UsageError, option, same
from ..predict import embed_images, embed_texts
from ..tasks import ImageInputs
from ..tasks.base import image_of
from .answer import OverlayOptions
from .batch import UNFINISHED, Item, Overlays, check_output, run_rows, settings_of, shortened, source_of, truncation
from .bulk import MANY, RESUMED, BulkOptions, BulkRun, is_bulk
from .options import BatchOptions, Command, ModelSource, PruningOptions, RunOptions, TextOptions, load_model

TASKS = ("retrieval", "clip")
"""Tasks whose models give features of images."""

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


@dataclass(kw_only=True)
class Embed(TextOptions, RunOptions, PruningOptions, BulkOptions, BatchOptions, ImageInputs, ModelSource, Command):
    """Features of images or texts, in a file or, shard by shard, in a folder."""

    name = "embed"
    help = "features of images or texts"
    description = "Turns images or texts into vectors that can be compared (BLIP retrieval models, CLIP)."
    examples = _EXAMPLES

    output: str = option(
        "a .npy or .safetensors file, or a folder, whose name ends with /", required=True, metavar="FILE"
    )
    texts: str | None = option(
        "instead of images: texts, one per line or a JSON list (-: from standard input)", metavar="FILE"
    )
    save_overlay: str | None = same(OverlayOptions, "save_overlay")
    npy_dtype: str | None = option("of vectors (default: float32)", choices=["float32", "float16"], group=MANY)

    def run(self) -> int:
        return self._many() if is_bulk(self) else self._few()

    def _source(self) -> tuple[str | list, Path]:
        """The rows and the folder of their paths, once it is known that features can be written."""
        if Path(self.output).suffix not in (".npy", ".safetensors"):
            raise UsageError(f"--output: expected a name that ends with .npy, .safetensors or /, got {self.output}")
        if self.texts and (self.images or self.input or self.save_overlay):
            raise UsageError("give either images or --texts (--save-overlay goes with images)")
        found = ([{"text": text} for text in read_texts(self.texts)], Path()) if self.texts else source_of(self)
        names = f"{self.output}.jsonl"
        for path in (self.output, names):
            check_file(path, option="--output")
        check_output(self, found[0])
        if not Path(f"{self.output}.partial").exists():
            require_new(names, self.overwrite)
        return found

    def _few(self) -> int:
        """Embed into one file."""
        source, folder = self._source()
        overlays = Overlays(self, source)
        model = load_model(self, TASKS, words=bool(self.texts))
        kind = "text" if self.texts else "image"

        def prepare(row: int, fields: dict):
            if self.texts:
                return Item(row, Path(), model.processor.text(fields["text"]), truncation(model, fields["text"]))
            image = image_of(fields, folder)
            return Item(row, image, model.processor.image(image))

        def answer(items: list) -> list[dict]:
            if self.texts:
                embeddings, _ = embed_texts(model, [item.inputs for item in items])
                pictures = [{}] * len(items)
            else:
                embeddings, output = embed_images(model, [item.inputs for item in items])
                pictures = overlays.draw(items, model, output.trace, lambda place, item: ([item.image], [place], ""))
            return [
                {
                    f"{kind}_tokens": embedding.tokens,
                    **shortened(embedding.record()),
                    **picture,
                    **item.added,
                    "features": to_text(embedding.features),
                }
                for item, embedding, picture in zip(items, embeddings, pictures, strict=True)
            ]

        return run_rows(
            self,
            source,
            prepare,
            answer,
            settings=settings_of(self, model, texts=bool(self.texts), text_mode=model.config.text_mode, kind=kind),
            tokens=[f"{kind}_tokens"],
            answers=["features", "index"],
            keep=[kind],
            unit=f"{kind}s",
            publish=_publish,
        )

    def _many(self) -> int:
        """Embed into a folder."""
        if sum(map(bool, (self.images, self.input, self.texts))) > 1:
            raise UsageError("give one of images, --input and --texts")
        texts = bool(self.texts or self.text_key)
        text = (self.text_key or "text") if texts else None
        kind = "text" if texts else "image"
        return BulkRun(
            options=self,
            make=lambda model: Embedder(model, text=text),
            tasks=TASKS,
            sources=self.images or list(filter(None, [self.input, self.texts])),
            images=not texts,
            words=texts,
            vectors="text" if texts else "img",
            answers=["index"],
            tokens=[f"{kind}_tokens"],
            unit=f"{kind}s",
            settings={"kind": kind, "text_key": text},
        ).run()


def _publish(records: Iterator[dict], output: Path) -> None:
    """Names and features, the latter last: where they are, all is."""
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
        if output.suffix == ".npy":
            np.save(file, array)
        else:
            file.write(save({"features": array}))
