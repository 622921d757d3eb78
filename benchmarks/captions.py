"""Real-size BLIP captioning with random weights on synthetic pictures: as we run it, and as transformers does."""

from __future__ import annotations

import functools

import inputs
import torch
from measure import DEVICE, DTYPES
from torch import Tensor

import madtp
from madtp import flops
from madtp.tasks.caption.model import Caption, CaptionConfig
from madtp.weights.key_maps import blip_hugging_face

PROMPT = (30522, 1037, 3861, 1997)  # [DEC] a picture of
BEAMS, MAX_LENGTH, MIN_LENGTH = 3, 20, 5  # as in BLIP's evaluation
COUNTED_TOKENS = 15  # of text, in published GFLOPs


@functools.cache
def model(dtype: str) -> Caption:
    """Random weights with peaked attention; the same in every dtype."""
    return madtp.load("random:base", config=inputs.config(CaptionConfig), device=DEVICE, dtype=DTYPES[dtype])


@functools.cache
def pixels(dtype: str, count: int) -> Tensor:
    return inputs.images(count, model(dtype).config.vision.image_size).to(DEVICE, DTYPES[dtype])


def captions(dtype: str, images: Tensor, temperature: float) -> list[list[int]]:
    """Ids after the prompt: one forward of the image encoder and a beam search."""
    net = model(dtype)
    with torch.inference_mode():
        found = net.generate(
            net(images, pruning=temperature).images, torch.tensor(PROMPT), num_beams=BEAMS, max_length=MAX_LENGTH,
            min_length=MIN_LENGTH,
        )  # fmt: skip
    return [ids.tolist() for ids in found]


@functools.cache
def hugging_face(patched: bool = False):
    """`BlipForConditionalGeneration` with the weights of :func:`model`, in float32; as it is, or patched, without pruning."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    ours = model("float32")
    vision, text = ours.config.vision, ours.config.text
    config = BlipConfig(
        vision_config={
            "image_size": vision.image_size, "patch_size": vision.patch_size, "layer_norm_eps": vision.layer_norm_eps,
            "num_hidden_layers": vision.depth,
        },
        text_config={
            "vocab_size": text.vocab_size, "encoder_hidden_size": vision.embed_dim,
            "num_attention_heads": text.num_attention_heads, "num_hidden_layers": text.num_hidden_layers,
        },
    )  # fmt: skip
    theirs = BlipForConditionalGeneration(config).eval()
    missing, unexpected = theirs.load_state_dict(blip_hugging_face.from_ours(ours.state_dict()), strict=False)
    if unexpected or any(not key.endswith("position_ids") for key in missing):
        raise ValueError(f"weights do not fit transformers' model: missing {missing}, unexpected {unexpected}")
    theirs = theirs.to(DEVICE)
    if patched:
        madtp.apply_patch(theirs, temperature=0.0)
    return theirs


def hugging_face_captions(images: Tensor, patched: bool = False) -> list[list[int]]:
    """The same captions from transformers, eager as it is or patched."""
    theirs = hugging_face(patched)
    separator = theirs.config.text_config.sep_token_id
    prompt = torch.tensor([[*PROMPT, separator]], device=images.device).repeat(
        len(images), 1
    )  # it cuts off the last id
    with torch.inference_mode():
        rows = theirs.generate(
            images, prompt, num_beams=BEAMS, max_length=MAX_LENGTH, min_length=MIN_LENGTH, do_sample=False
        )
    ends = (separator, theirs.config.text_config.pad_token_id)
    found = []
    for row in rows[:, len(PROMPT) :].tolist():
        stop = next((number for number, token in enumerate(row) if token in ends), len(row))
        found.append(row[:stop])
    return found


def logits(dtype: str, images: Tensor, ids: Tensor) -> Tensor:
    """``[B, L, V]`` of our dense model, for texts ``ids [B, L]``."""
    with torch.inference_mode():
        found = model(dtype)(images, list(ids), pruning=0.0).logits
    return found.values.unflatten(0, ids.shape)


def hugging_face_logits(images: Tensor, ids: Tensor) -> Tensor:
    """The same from transformers."""
    theirs = hugging_face()
    with torch.inference_mode():
        states = theirs.vision_model(images).last_hidden_state
        return theirs.text_decoder(ids, encoder_hidden_states=states).logits


def gflops_per_image(dtype: str, images: Tensor, temperature: float) -> float:
    """Official GFLOPs of an image and a caption of :data:`COUNTED_TOKENS` tokens, on average."""
    net = model(dtype)
    with torch.inference_mode():
        lengths = flops.stream_lengths(net(images, pruning=temperature).vision)
    costs = [flops.caption(net.config, row, COUNTED_TOKENS, pruning=temperature > 0) for row in lengths]
    return sum(cost.official for cost in costs) / len(costs)


@functools.cache
def temperature_for(reduction: float, count: int = 8) -> float:
    """The temperature at which the first ``count`` images need ``reduction`` fewer official GFLOPs, within one percent.

    The first guesses are earlier results for the same inputs, so that one probe usually does.
    """
    dtype = "bfloat16"
    images = pixels(dtype, count)
    dense = gflops_per_image(dtype, images[:1], 0.0)  # every image costs the same

    def saved(temperature: float) -> float:
        return 1 - gflops_per_image(dtype, images, temperature) / dense

    return inputs.temperature_that_saves(reduction, saved, {0.5: 6.6, 0.8: 19.0}.get(reduction))
