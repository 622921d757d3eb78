"""What the evaluation of each task asks a model, and which annotation files it reads.

A task runs one step or several over all samples; a step's records begin with the row that was asked about,
labels included, so that figures can be computed from records alone. Samples are numbered from 0 in the order
of the files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import flops, graphs, predict
from ..index import from_text, to_text
from ..processing import clean_sentence
from ..tasks.annotations import (
    CaptionExample,
    NLVRExample,
    VQAExample,
    first_object,
    read_blip_nlvr,
    read_blip_vqa,
    read_captions,
    read_nlvr2,
    read_vqa_v2,
)

__all__ = ["ANSWERS", "RERANK", "missing_images", "read_examples", "shortlists", "similarities"]

RERANK = 256
"""Candidates that BLIP scores again in both directions, on COCO (128 on Flickr30k)."""
_PAIRS = 512  # texts that look at images at a time

Run = Callable[[str, list[dict], Callable[[dict], object], Callable[[list], list[dict]]], list[dict]]
"""A step: its name, rows, how a row is prepared, how prepared ones are answered; gives all rows' records."""


# ---- annotation files -------------------------------------------------------------------------------------


def read_examples(
    task: str,
    path: str | os.PathLike,
    image_root: str | os.PathLike,
    answers: str | os.PathLike | None = None,
) -> list:
    """Examples of a task, from the original files or from BLIP's.

    Args:
        path: NLVR2's JSON Lines or BLIP's nlvr_*.json; VQA v2's questions or BLIP's vqa_*.json; for captions
            and retrieval BLIP's files of Karpathy's splits.
        image_root: that image paths are relative to.
        answers: VQA v2's annotations, which the original questions need.

    Raises:
        AnnotationError, OSError: a file that cannot be used.
        ValueError: `answers` where they are of no use.
    """
    first = first_object(path)
    blip = first is None or ("images" if task == "nlvr" else "image") in first
    if answers is not None and (task != "vqa" or blip):
        raise ValueError(f"answers: {path} are not the original questions of VQA v2, which have another file")
    if task == "nlvr":
        return (read_blip_nlvr if blip else read_nlvr2)(path, image_root)
    if task == "vqa":
        return read_blip_vqa(path, image_root) if blip else read_vqa_v2(path, image_root, answers)
    return read_captions(path, image_root)


def missing_images(examples: Sequence) -> tuple[list[Path], int]:
    """Images of examples that are not there, each once, and how many images there should be."""
    images = dict.fromkeys(image for example in examples for image in _images_of(example))
    return [image for image in images if not image.is_file()], len(images)


def _images_of(example) -> tuple[Path, ...]:
    return (example.left, example.right) if isinstance(example, NLVRExample) else (example.image,)


# ---- tasks ------------------------------------------------------------------------------------------------


def _cost(cost: flops.Flops) -> dict:
    return {"gflops": cost.official, "gflops_full": cost.full}


def _nlvr(run: Run, model, examples: Sequence[NLVRExample]) -> dict[str, list[dict]]:
    rows = [
        {
            "sample": number,
            "images": [str(example.left), str(example.right)],
            "sentence": example.sentence,
            "label": example.label,
            "template": example.template,
        }
        for number, example in enumerate(examples)
    ]

    def answer(instances: list) -> list[dict]:
        return [
            {
                "answer": answer.answer,
                "probability_true": answer.probability_true,
                "left_tokens": answer.left_tokens,
                "right_tokens": answer.right_tokens,
                "text_tokens": answer.text_tokens,
                **_cost(answer.flops),
            }
            for answer in predict.nlvr_batch(model, instances)[0]
        ]

    return {"pair": run("pair", rows, lambda row: model.processor(*row["images"], row["sentence"]), answer)}


def _vqa(run: Run, model, examples: Sequence[VQAExample], **options) -> dict[str, list[dict]]:
    """`options` are those of :func:`madtp.predict.vqa_batch`."""
    for number, example in enumerate(examples):
        if len(example.answers) < 2:
            raise ValueError(
                f"question {number} ({example.question!r}): {len(example.answers)} answers of annotators to "
                "compare with, two at least are needed; test splits and Visual Genome cannot be scored here"
            )
    rows = [
        {
            "sample": number,
            "image": str(example.image),
            "question": example.question,
            "question_id": example.question_id,
            "answers": list(example.answers),
        }
        for number, example in enumerate(examples)
    ]

    def answer(instances: list) -> list[dict]:
        return [
            {
                "answer": answer.answer,
                **({} if answer.score is None else {"score": answer.score}),
                "image_tokens": answer.image_tokens,
                "question_tokens": answer.question_tokens,
                **_cost(answer.flops),
            }
            for answer in predict.vqa_batch(model, instances, **options)[0]
        ]

    def prepare(row: dict):
        return model.processor(row["image"], row["question"])

    return {"question": run("question", rows, prepare, answer)}


def _caption(run: Run, model, examples: Sequence[CaptionExample], **options) -> dict[str, list[dict]]:
    """`options` are those of :func:`madtp.predict.caption_batch`."""
    rows = [{"sample": number, **row} for number, row in enumerate(_images(examples))]

    def answer(instances: list) -> list[dict]:
        return [
            {"caption": answer.caption, "image_tokens": answer.image_tokens, **_cost(answer.flops)}
            for answer in predict.caption_batch(model, instances, **options)[0]
        ]

    return {"image": run("image", rows, lambda row: model.processor(row["image"]), answer)}


def _images(examples: Sequence[CaptionExample]) -> list[dict]:
    """One row per image, also where there is an example per caption."""
    rows: dict = {}
    for example in examples:
        row = {"image": str(example.image), "image_id": example.image_id, "captions": []}
        rows.setdefault(example.image_id, row)["captions"] += example.captions
    return list(rows.values())


def _retrieval(
    run: Run, model, examples: Sequence[CaptionExample], rerank: int = RERANK
) -> dict[str, list[dict]]:
    """Features of images and texts; then, for BLIP, the best `rerank` of each image and each text as pairs.

    As in BLIP's data code, which MADTP uses for CLIP too, captions are cleaned and cut to 30 words.
    """
    images = _images(examples)
    image_rows = [
        {"sample": number, "image": row["image"], "image_id": row["image_id"]}
        for number, row in enumerate(images)
    ]
    captions = [(number, caption) for number, row in enumerate(images) for caption in row["captions"]]
    text_rows = [
        {"sample": number, "text": caption, "of_image": image}
        for number, (image, caption) in enumerate(captions)
    ]

    def embedded(kind: str, embed) -> Callable[[list], list[dict]]:
        return lambda instances: [
            {
                f"{kind}_tokens": embedding.tokens,
                **_cost(embedding.flops),
                "features": to_text(embedding.features),
            }
            for embedding in embed(model, instances)[0]
        ]

    def pixels(row: dict) -> Tensor:
        return model.processor.image(row["image"])

    def ids(row: dict) -> Tensor:
        text = row["text"]
        return model.processor.text(clean_sentence(text, 30) if model.config.task == "clip" else text)

    steps = {
        "image": run("image", image_rows, pixels, embedded("image", predict.embed_images)),
        "text": run("text", text_rows, ids, embedded("text", predict.embed_texts)),
    }
    if model.config.task == "retrieval" and rerank:
        texts = functools.cache(lambda number: ids(text_rows[number]))
        rows = _match_rows(image_rows, similarities(steps), rerank)

        def prepare(row: dict):
            return pixels(row), row["texts"], [texts(number) for number in row["texts"]]

        steps["match"] = run("match", rows, prepare, lambda instances: _match(model, instances))
    return steps


def similarities(steps: dict[str, list[dict]]) -> Tensor:
    """``[images, texts]`` cosine similarities, of the features in the records."""
    images, texts = (
        torch.stack([torch.from_numpy(from_text(record["features"]).copy()) for record in steps[kind]])
        for kind in ("image", "text")
    )
    return images @ texts.mT


def shortlists(similarity: Tensor, rerank: int) -> tuple[list[list[int]], list[list[int]]]:
    """The `rerank` most similar texts of each image, and images of each text; all if there are fewer."""
    images, texts = similarity.shape
    return (
        similarity.topk(min(rerank, texts), dim=1).indices.tolist(),
        similarity.mT.topk(min(rerank, images), dim=1).indices.tolist(),
    )


def _match_rows(image_rows: list[dict], similarity: Tensor, rerank: int) -> list[dict]:
    """For each image the texts that either short list pairs it with: it is encoded once for all of them."""
    texts_of_images, images_of_texts = shortlists(similarity, rerank)
    wanted = [set(texts) for texts in texts_of_images]
    for text, images in enumerate(images_of_texts):
        for image in images:
            wanted[image].add(text)
    return [
        {"sample": row["sample"], "image": row["image"], "texts": sorted(texts)}
        for row, texts in zip(image_rows, wanted, strict=True)
    ]


def _match(model, instances: list[tuple]) -> list[dict]:
    """Logits of each image with each of its texts, and what that cost beside the image."""
    pixels, numbers, ids = zip(*instances, strict=True)
    guided = model.temperature > 0
    logits, costs = [], []
    with torch.inference_mode():
        encoded = graphs.run(model.encode_image, torch.stack(pixels))
        image_tokens = encoded.stream.tokens.lengths.tolist()
        pairs = [(image, text) for image, texts in enumerate(ids) for text in texts]
        for start in range(0, len(pairs), _PAIRS):
            part = pairs[start : start + _PAIRS]
            numbered = [(image, n) for n, (image, _) in enumerate(part)]
            matches = model.match(encoded.stream, [text for _, text in part], numbered)
            logits += matches.logits[:, 1].float().tolist()
            lengths = dict(zip(matches.order.tolist(), flops.stream_lengths(matches.text), strict=True))
            costs += [
                flops.retrieval(model.config, match=(image_tokens[image], lengths[n]), guided=guided)
                for n, (image, _) in enumerate(part)
            ]
    if not all(torch.tensor(logits).isfinite()):
        raise predict.not_finite("logits", model)
    records, start = [], 0
    for texts in numbers:
        own = slice(start, start + len(texts))
        records.append(
            {
                "logits": logits[own],
                "gflops": sum(cost.official for cost in costs[own]),
                "gflops_full": sum(cost.full for cost in costs[own]),
            }
        )
        start += len(texts)
    return records


ANSWERS = {"nlvr": _nlvr, "vqa": _vqa, "caption": _caption, "retrieval": _retrieval, "clip": _retrieval}
"""By task: runs the steps, and gives the records of each."""
