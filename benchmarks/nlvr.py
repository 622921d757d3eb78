"""The real-size BLIP-NLVR with random weights on synthetic pairs: as we run it, dense and pruned, and in plain PyTorch."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import inputs
import torch
from baselines import PlainNLVR
from measure import DEVICE, DTYPES
from torch import Tensor

import madtp
from madtp import flops, graphs
from madtp.pruning import Pruning
from madtp.tasks.nlvr.model import NLVR, NLVRConfig, NLVROutput
from madtp_kernels import RaggedBatch


@functools.cache
def model(dtype: str) -> NLVR:
    """Random weights with peaked attention; the same in every dtype."""
    return madtp.load("random:base", config=inputs.config(NLVRConfig), device=DEVICE, dtype=DTYPES[dtype])


@dataclass
class Pairs:
    """Pairs of images with a statement each, ready for the device."""

    pixels: Tensor
    """``[2B, 3, S, S]``: the left images, then the right ones."""
    input_ids: RaggedBatch
    padded_ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, pixels: Tensor, ids: list[Tensor]) -> Pairs:
        ragged = RaggedBatch.from_list(ids).to(DEVICE)
        padded, mask = ragged.to_padded(0)
        return cls(pixels, ragged, padded, mask)

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, start: int, stop: int) -> Pairs:
        batch = len(self)
        pixels = torch.cat([self.pixels[start:stop], self.pixels[batch + start : batch + stop]])
        return Pairs.of(pixels, self.input_ids.to_list()[start:stop])


@functools.cache
def pairs(dtype: str, count: int) -> Pairs:
    config = model(dtype).config
    pixels = inputs.images(2 * count, config.vision.image_size).to(DEVICE, DTYPES[dtype])
    return Pairs.of(pixels, inputs.texts(count, config.text.vocab_size))


def answer(
    dtype: str, batch: Pairs, temperature: float, *, grouping: str = "instance", backend: str | None = None
) -> NLVROutput:
    """One forward of our model."""
    net = model(dtype)
    net.grouping, net.backend = grouping, backend
    return net(batch.pixels, batch.input_ids, pruning=temperature)


def answer_by_graph(dtype: str, batch: Pairs, temperature: float) -> NLVROutput:
    """One forward as `madtp.predict` runs it: on a GPU the third one of a batch size replays a CUDA graph."""
    net = model(dtype)
    net.grouping, net.backend, net.temperature = "instance", None, temperature
    return graphs.run(net, batch.pixels, batch.input_ids)


def one_by_one(dtype: str, singles: list[Pairs], temperature: float) -> list[NLVROutput]:
    return [answer(dtype, single, temperature) for single in singles]


@functools.cache
def plain(dtype: str) -> PlainNLVR:
    return PlainNLVR(model(dtype))


def plain_answer(dtype: str, batch: Pairs) -> Tensor:
    """Logits of the dense model in plain PyTorch."""
    return plain(dtype)(batch.pixels, batch.padded_ids, batch.mask)


def gflops_per_pair(dtype: str, output: NLVROutput, *, pruning: Pruning | bool) -> float:
    """Mean official GFLOPs (one multiply-add = 1) of the pairs of a forward."""
    costs = flops.from_output(model(dtype).config, output, pruning=pruning)
    return sum(cost.official for cost in costs) / len(costs)


def dense_gflops_per_pair(dtype: str, batch: Pairs) -> float:
    """The same without pruning, which takes no forward to know."""
    config = model(dtype).config
    image = [[config.vision.num_patches + 1] * 2] * (config.vision.depth + 1)
    layers = config.text.num_hidden_layers + 1
    costs = [flops.nlvr(config, image, [length] * layers, pruning=False) for length in batch.input_ids.lengths.tolist()]
    return sum(cost.official for cost in costs) / len(costs)


@functools.cache
def temperature_for(reduction: float, count: int = 8) -> float:
    """The temperature at which the first ``count`` pairs need ``reduction`` fewer official GFLOPs, within one percent.

    Found by bisection in bfloat16, which is fastest, and used for every dtype; what a run really needed is counted from its
    own tokens. The first guesses are earlier results for the same inputs, so that one probe usually does.
    """
    dtype = "bfloat16"
    with torch.inference_mode():
        sample = pairs(dtype, count)
        dense = dense_gflops_per_pair(dtype, sample)

        def saved(temperature: float) -> float:
            return 1 - gflops_per_pair(dtype, answer(dtype, sample, temperature), pruning=True) / dense

        return inputs.temperature_that_saves(reduction, saved, {0.5: 5.5, 0.8: 16.3}.get(reduction))
