"""Real-size BLIP captioning, image to words with three beams: transformers, our dense model, pruned ones."""

from __future__ import annotations

import functools

import captions
import inputs
import pytest
import torch
from measure import DEVICE, Comparison, Goal, WrongAnswer, require

REDUCTIONS = (0.5, 0.8)  # of the official GFLOPs
BATCHES = inputs.choose([1, 32], [1, 4], [1])


def check() -> None:
    """Two images: dense, every word of a text is as likely to us as to transformers.

    Captions themselves would not do: random weights repeat one word, and which one may hang on the last bits.
    """
    images = captions.pixels("float32", 2)
    ids = torch.randint(1000, 30000, (2, captions.MAX_LENGTH), generator=inputs.generator(9)).to(DEVICE)
    ids[:, : len(captions.PROMPT)] = torch.tensor(captions.PROMPT)
    theirs = captions.hugging_face_logits(images, ids)
    require(captions.logits("float32", images, ids), theirs, 1e-4, "logits of transformers")
    if captions.hugging_face_captions(images, patched=True) != captions.hugging_face_captions(images):
        raise WrongAnswer("captions: the patched model writes others than transformers")
    written = [len(row) for row in captions.captions("float32", images, 0.0)]
    if set(written) != {captions.MAX_LENGTH - len(captions.PROMPT)}:
        raise WrongAnswer(f"captions of {written} words: all candidates should write equally many")


@pytest.mark.parametrize("batch", BATCHES)
def test_captions(run, batch):
    candidates, gflops = {}, {}
    temperatures = {"dense": 0.0, **{f"pruned {r:.0%}": captions.temperature_for(r) for r in REDUCTIONS}}
    for dtype in ("float32", "bfloat16"):
        images = captions.pixels(dtype, batch)
        for name, temperature in temperatures.items():
            candidates[f"{name} {dtype}"] = functools.partial(captions.captions, dtype, images, temperature)
            gflops[f"{name} {dtype}"] = captions.gflops_per_image(dtype, images, temperature)
    images = captions.pixels("float32", batch)
    candidates["transformers float32"] = lambda: captions.hugging_face_captions(images)
    candidates["transformers patched, dense float32"] = lambda: captions.hugging_face_captions(images, patched=True)

    def finish(comparison: Comparison) -> None:
        comparison.facts["gflops_per_image"] = gflops

    run(
        Comparison(
            "BLIP captioning",
            candidates,
            check,
            {"dtype": "float32", "batch": f"{batch} images", "images": batch, "temperature": temperatures},
            gflop=2 * batch * gflops["dense float32"],
            goals=tuple(Goal(name, "transformers float32", 1.0) for name in candidates if name.startswith("dense")),
            synchronising=tuple(candidates),
            finish=finish,
            min_rounds=2,
            warm_up=False,
        )
    )
