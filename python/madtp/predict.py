"""Ask a model: from pictures and sentences to answers, with what each answer cost."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from . import flops, graphs
from .pruning import Stream

__all__ = [
    "CaptionAnswer",
    "Embedding",
    "NLVRAnswer",
    "VQAAnswer",
    "caption",
    "caption_batch",
    "embed_images",
    "embed_texts",
    "match",
    "nlvr",
    "nlvr_batch",
    "vqa",
    "vqa_batch",
]


@dataclass(frozen=True)
class NLVRAnswer:
    """Is the statement true of the two images?"""

    probability_true: float
    left_tokens: list[int]
    """Tokens of the left image before the first layer and after each; the others likewise."""
    right_tokens: list[int]
    text_tokens: list[int]
    flops: flops.Flops

    @property
    def answer(self) -> bool:
        return self.probability_true > 0.5


def nlvr(model, pairs: Sequence[tuple], batch_size: int = 8) -> list[NLVRAnswer]:
    """Answers to (left image, right image, statement) triples, in their order.

    Images are paths, bytes of files or PIL images.

    Raises:
        ImageError, TextError: the first triple that cannot be used (`madtp.jsonl` goes on past such rows).
        FloatingPointError: the model's dtype cannot hold its activations.
    """
    return _in_batches(model, pairs, batch_size, nlvr_batch, {})


def nlvr_batch(model, instances: Sequence[tuple]):
    """Answers to instances that `model.processor` prepared, and the model's output for all of them."""
    pixels, ids = model.processor.collate(instances)
    with torch.inference_mode():
        output = graphs.run(model, pixels, ids)
        probabilities = output.logits.float().softmax(-1)[:, 1].tolist()
    if not all(0 <= probability <= 1 for probability in probabilities):
        raise not_finite("logits", model)
    vision, text = flops.stream_lengths(output.vision), flops.stream_lengths(output.text)
    costs = flops.from_output(model.config, output, guided=model.temperature > 0)
    left, right = vision[: len(instances)], vision[len(instances) :]
    return [
        NLVRAnswer(*fields) for fields in zip(probabilities, left, right, text, costs, strict=True)
    ], output


@dataclass(frozen=True)
class CaptionAnswer:
    """What is in the image?"""

    caption: str
    image_tokens: list[int]
    """Tokens before the first layer and after each."""
    flops: flops.Flops


@dataclass(frozen=True)
class VQAAnswer:
    """The answer to a question about an image."""

    answer: str
    image_tokens: list[int]
    """Tokens before the first layer and after each; the others likewise."""
    question_tokens: list[int]
    flops: flops.Flops
    score: float | None = None
    """Of a ranked answer: its log-probability, label-smoothed."""


@dataclass(frozen=True)
class Embedding:
    """An image or a text as a point that others can be compared with."""

    features: torch.Tensor
    """``[P]`` float32 on the CPU, of length 1."""
    tokens: list[int]
    """Tokens before the first layer and after each."""
    flops: flops.Flops


def caption(model, images: Sequence, batch_size: int = 8, **options) -> list[CaptionAnswer]:
    """Captions of images, in their order.

    Images are paths, bytes of files or PIL images. Options are those of :meth:`madtp.models.caption.Caption.generate`.

    Raises:
        ImageError: the first image that cannot be used.
        FloatingPointError: the model's dtype cannot hold its activations.
    """
    return _in_batches(model, [(image,) for image in images], batch_size, caption_batch, options)


def caption_batch(model, instances: Sequence, prompt_ids=None, **options):
    """Captions of instances that `model.processor` prepared, and the model's output for all of them.

    ``prompt_ids [P]`` int64 is what the captions begin with (by default "a picture of "); it is not part of the answer.
    """
    prompt = model.processor.prompt_ids if prompt_ids is None else prompt_ids
    with torch.inference_mode():
        output = graphs.run(model, model.processor.collate(instances))
        _check_finite(model, output.images)
        captions = model.generate(output.images, prompt, **options)
    beams = options.get("num_beams") or (1 if options.get("top_p") else 3)
    answers = []
    for ids, lengths in zip(captions, flops.stream_lengths(output.vision), strict=True):
        cost = flops.caption(model.config, lengths, len(prompt) + len(ids), beams=beams, guided=model.temperature > 0)
        answers.append(CaptionAnswer(model.processor.decode(ids), lengths, cost))
    return answers, output


def vqa(model, questions: Sequence[tuple], batch_size: int = 8, **options) -> list[VQAAnswer]:
    """Answers to (image, question) pairs, in their order. Options as in :func:`vqa_batch`.

    Raises:
        ImageError, TextError: the first pair that cannot be used.
        FloatingPointError: the model's dtype cannot hold its activations.
    """
    return _in_batches(model, questions, batch_size, vqa_batch, options)


def vqa_batch(model, instances: Sequence[tuple], candidates: Sequence[str] | None = None, k: int | None = None, **options):
    """Answers to instances that `model.processor` prepared, and the model's output for all of them.

    Args:
        candidates: rank these, by scoring the ``k`` (128 by default) that begin most likely; by default answers are written.
        options: of :meth:`madtp.models.vqa.VQA.generate`, for answers that are written.

    Raises:
        ValueError: ``k`` without candidates, or options beside them.
    """
    if candidates is None and k is not None:
        raise ValueError(f"k: only candidates are ranked, and there are none, got {k}")
    if candidates is not None and options:
        raise ValueError(f"{', '.join(options)}: only written answers take options of generation, and candidates are ranked")
    pixels, ids = model.processor.collate(instances)
    guided, processor = model.temperature > 0, model.processor
    with torch.inference_mode():
        output = graphs.run(model, pixels, ids)
        _check_finite(model, output.questions)
        if candidates is None:
            written = model.generate(output.questions, **options)
            texts, scores = [processor.decode(words) for words in written], [None] * len(written)
            lengths, beams = [1 + len(words) for words in written], options.get("num_beams", 3)
        else:
            answers = _candidate_ids(processor, tuple(candidates))
            ranking = model.rank(output.questions, answers, 128 if k is None else k)
            texts = [candidates[number] for number in ranking.best.tolist()]
            scores = ranking.scores.amax(1).tolist()
            lengths = [1 + sum(len(answers[c]) for c in chosen) for chosen in ranking.candidates.tolist()]
            beams = 1
    streams = flops.stream_lengths(output.vision), flops.stream_lengths(output.text)
    return [
        VQAAnswer(
            text, image, question, flops.vqa(model.config, image, question, length, beams=beams, guided=guided), score
        )
        for text, image, question, length, score in zip(texts, *streams, lengths, scores, strict=True)
    ], output


@functools.lru_cache(maxsize=1)
def _candidate_ids(processor, candidates: tuple[str, ...]) -> list[torch.Tensor]:
    """Ids of candidate answers: the same ones for every batch, and official lists have thousands."""
    return [processor.answer(candidate) for candidate in candidates]


def embed_images(model, pixels: Sequence[torch.Tensor]):
    """Embeddings of images that `model.processor.image` prepared (BLIP retrieval, CLIP), and the encoder's output."""
    with torch.inference_mode():
        output = graphs.run(model.encode_image, torch.stack(list(pixels)))
    return _embeddings(model, output, "image"), output


def embed_texts(model, ids: Sequence[torch.Tensor]):
    """Embeddings of texts that `model.processor.text` prepared (BLIP retrieval, CLIP), and the encoder's output."""
    with torch.inference_mode():
        output = graphs.run(model.encode_text, ids)
    return _embeddings(model, output, "text"), output


def match(model, images: Stream, ids: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """How well do the texts belong to the images of these (image, text) pairs? Logits of BLIP retrieval's classifier.

    Args:
        images: ``stream`` of the output of :func:`embed_images`.
        ids: texts as in :func:`embed_texts`.
        pairs: numbers of images and texts.

    BLIP ranks by these logits plus the similarity of the features.
    """
    with torch.inference_mode():
        scores = model.match(images, ids, pairs).logits[:, 1].float()
    if not scores.isfinite().all():
        raise not_finite("logits", model)
    return scores.tolist()


def not_finite(what: str, model) -> FloatingPointError:
    """The error of a model whose results are no numbers, with what helps."""
    why = "float32 or bfloat16 have the range" if model.dtype == torch.float16 else "its weights are damaged, or have diverged"
    return FloatingPointError(f"{what} are not finite in {model.dtype}; {why}")


def _in_batches(model, inputs: Sequence[tuple], batch_size: int, answer, options: dict) -> list:
    answers = []
    for start in range(0, len(inputs), batch_size):
        instances = [model.processor(*given) for given in inputs[start : start + batch_size]]
        answers += answer(model, instances, **options)[0]
    return answers


def _embeddings(model, output, kind: str) -> list[Embedding]:
    features = F.normalize(output.features.float(), dim=-1).cpu()
    if not features.isfinite().all():
        raise not_finite("features", model)
    count = getattr(flops, model.config.task)
    return [
        Embedding(feature, lengths, count(model.config, **{kind: lengths}, guided=model.temperature > 0))
        for feature, lengths in zip(features, flops.stream_lengths(output.trace), strict=True)
    ]


def _check_finite(model, states: Stream) -> None:
    if not states.tokens.exact().values.isfinite().all():
        raise not_finite("states", model)
