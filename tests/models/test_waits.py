"""No forward waits for its device: run with tensors that have shapes but no values.

Whoever asks such a tensor for a value (`.item()`, `nonzero`, a Python `if`) gets an exception, as on a GPU in its strict mode
(test_gpu.py), but on any machine.
"""

import dataclasses

import pytest
import test_clip
import torch
from test_tasks import CONFIGS, TEXT, VISION

from madtp import NLVRConfig
from madtp.pruning import METHODS
from madtp.tasks import TASKS
from madtp_kernels import RaggedBatch

TEXTS, TOKENS = 3, 25

NLVR = NLVRConfig(VISION, TEXT, merge_from=2)
CLIP = test_clip.SIZES
CASES = {
    "nlvr": (NLVR, {}),
    "nlvr, pairs": (NLVR, {"grouping": "pair"}),
    "nlvr, batch": (NLVR, {"grouping": "batch"}),
    "nlvr, sizes": (NLVR, {"proportional_attention": True}),
    "caption": (CONFIGS["caption"], {}),
    "vqa": (CONFIGS["vqa"], {}),
    "retrieval": (CONFIGS["retrieval"], {}),
    "retrieval, compat": (dataclasses.replace(CONFIGS["retrieval"], text_mode="compat"), {}),
    "clip": (CLIP, {}),
    "clip, compat": (dataclasses.replace(CLIP, text_mode="compat"), {}),
}


def inputs(task, size):
    images = 2 * TEXTS if task == "nlvr" else TEXTS
    pixels = torch.empty(images, 3, size, size, device="meta")
    ids = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    offsets = torch.empty(TEXTS + 1, dtype=torch.int32, device="meta")
    return pixels, RaggedBatch(ids, offsets, 12)


def without_values(task, *arguments, **options):
    """A model whose weights have shapes only."""
    with torch.device("meta"):
        return TASKS[task].Model(*arguments, **options).eval()


@pytest.mark.parametrize("features", [False, True], ids=["", "features"])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_forward(name, temperature, features):
    task = name.partition(",")[0]
    config, options = CASES[name]
    model = without_values(task, config, temperature, **options)
    with torch.inference_mode():
        model(*inputs(task, config.vision.image_size), alignment_features=features)


@pytest.mark.parametrize("name", ["nlvr", "retrieval", "clip"])
@pytest.mark.parametrize("rule", METHODS)
def test_rules(rule, name):
    config, _ = CASES[name]
    model = without_values(name, config, METHODS[rule](proportional_attention=True).at(0.4))
    with torch.inference_mode():
        model(*inputs(name, config.vision.image_size))


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("name", ["retrieval", "retrieval, compat", "clip", "clip, compat"])
def test_embeddings(name, temperature):
    config, _ = CASES[name]
    model = without_values(name.partition(",")[0], config, temperature)
    pixels, texts = inputs(name, config.vision.image_size)
    with torch.inference_mode():
        model.embed_image(pixels), model.embed_text(texts)


def test_waiting_is_noticed():
    with pytest.raises(RuntimeError, match="meta"):
        int(torch.empty(2, dtype=torch.int32, device="meta")[-1])
