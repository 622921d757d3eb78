"""Vision transformers with random weights, and calls of their blocks with and without pruning."""

from __future__ import annotations

import functools
from collections.abc import Callable

import inputs
import torch
from measure import DEVICE, DTYPES
from torch import Tensor

from madtp.config import VisionConfig
from madtp.pruning import MADTP, Pruning, Tokens
from madtp.vision import Block, VisionTransformer
from madtp.weights import randomize
from madtp_kernels import RaggedBatch

DENSE = MADTP(0.0)


@functools.cache
def vision_transformer(dtype: str, depth: int) -> VisionTransformer:
    """ViT-B/16 with ``depth`` blocks; the same weights in every dtype."""
    with torch.device("meta"):
        model = VisionTransformer(VisionConfig(image_size=inputs.IMAGE_SIZE, depth=depth))
    model = model.to(DTYPES[dtype]).to_empty(device=DEVICE)
    randomize(model)
    return model.eval()


@functools.cache
def dictionary(dtype: str) -> Tensor:
    rng = inputs.generator(9)
    return torch.randn(inputs.ENTRIES, inputs.WIDTH, generator=rng).to(DEVICE, DTYPES[dtype])


@functools.cache
def embedded(dtype: str, count: int, depth: int) -> RaggedBatch:
    """Tokens of ``count`` images as they enter the first block."""
    with torch.inference_mode():
        pixels = inputs.images(count, inputs.IMAGE_SIZE).to(DEVICE, DTYPES[dtype])
        return vision_transformer(dtype, depth).embed(pixels)


def subset(tokens: RaggedBatch, lengths: list[int]) -> RaggedBatch:
    """The first token and a random choice of the others of each sample, in order, so that sample b has ``lengths[b]``."""
    rng = inputs.generator(10)
    rows = []
    for sample, length in zip(tokens.to_list(), lengths, strict=True):
        chosen = 1 + torch.randperm(sample.shape[0] - 1, generator=rng)[: length - 1].sort().values
        rows.append(torch.cat([sample[:1], sample[chosen.to(sample.device)]]))
    return RaggedBatch.from_list(rows)


def dense_call(block: Block, tokens: RaggedBatch) -> Callable[[], Tokens]:
    """The block without pruning."""
    stream = Tokens.start(tokens)
    return lambda: block(stream, None, DENSE, 0)[0]


def pruned_call(
    block: Block, tokens: RaggedBatch, guide: Tensor, temperature: float, backend: str | None = None
) -> Callable[[], Tokens]:
    """The block with its own importance, scoring and pruning."""
    stream, pruning = Tokens.start(tokens), MADTP(temperature, backend=backend)
    return lambda: block(stream, (guide, None), pruning, 0)[0]


def ruled_call(block: Block, tokens: RaggedBatch, rule: Pruning) -> Callable[[], Tokens]:
    """The block with a rule that needs no dictionary."""
    stream = Tokens.start(tokens)
    return lambda: block(stream, None, rule, 0)[0]


def run_blocks(blocks, tokens: RaggedBatch, guide: Tensor | None, temperatures, backend: str | None = None) -> Tokens:
    """Block after block, each pruning at its own temperature (0: dense)."""
    stream = Tokens.start(tokens)
    for layer, (block, temperature) in enumerate(zip(blocks, temperatures, strict=True)):
        stream, _ = block(stream, (guide, None), MADTP(temperature, backend=backend), layer)
    return stream


def share_left(before: Tokens, after: Tokens) -> float:
    return after.num_tokens / before.num_tokens


def temperature_for(block: Block, stream: Tokens, guide: Tensor, share: float, layer: int = 0) -> tuple[float, Tokens]:
    """The temperature at which this block lets about ``share`` of the tokens through, and what then leaves it."""
    low, high = 0.05, 500.0
    for _ in range(8):
        middle = (low * high) ** 0.5
        left, _ = block(stream, (guide, None), MADTP(middle), layer)
        low, high = (middle, high) if share_left(stream, left) > share else (low, middle)
    left, _ = block(stream, (guide, None), MADTP(low), layer)
    return low, left


@functools.cache
def gentle_temperatures(depth: int, share: float) -> tuple[float, ...]:
    """For each block of the float32 model the temperature at which it drops ``1 - share`` of an image's tokens."""
    with torch.inference_mode():
        guide = dictionary("float32")
        stream, found = Tokens.start(embedded("float32", 1, depth)), []
        for layer, block in enumerate(vision_transformer("float32", depth).blocks):
            temperature, stream = temperature_for(block, stream, guide, share, layer)
            found.append(temperature)
    return tuple(found)
