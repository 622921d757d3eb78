"""Ask a model: from pictures and sentences to answers, with what each answer cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import flops

__all__ = ["NLVRAnswer", "nlvr", "nlvr_batch"]


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
    answers = []
    for start in range(0, len(pairs), batch_size):
        instances = [model.processor(*pair) for pair in pairs[start : start + batch_size]]
        answers += nlvr_batch(model, instances)[0]
    return answers


def nlvr_batch(model, instances: Sequence[tuple]):
    """Answers to instances that `model.processor` prepared, and the model's output for all of them."""
    pixels, ids = model.processor.collate(instances)
    with torch.inference_mode():
        output = model(pixels, ids)
        probabilities = output.logits.float().softmax(-1)[:, 1].tolist()
    if not all(0 <= probability <= 1 for probability in probabilities):
        raise FloatingPointError(
            f"logits are not finite in {model.dtype}; float32 or bfloat16 have the range"
        )
    vision, text = flops.stream_lengths(output.vision), flops.stream_lengths(output.text)
    costs = flops.from_output(model.config, output, guided=model.temperature > 0)
    left, right = vision[: len(instances)], vision[len(instances) :]
    return [
        NLVRAnswer(*fields) for fields in zip(probabilities, left, right, text, costs, strict=True)
    ], output
