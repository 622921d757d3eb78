"""Inputs of the benchmarks: drawn from fixed seeds, so that every machine and every run times the same work."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import DEVICE, ON_GPU
from torch import Tensor

from madtp_kernels import RaggedBatch

HEADS, HEAD_DIM, WIDTH, ENTRIES, LENGTH = 12, 64, 768, 100, 577
IMAGE_SIZE, DEPTH = 384, 12

# Eight samples whose mean is about half of 577: what the later layers of a pruned model see.
UNEVEN = (577, 61, 433, 205, 349, 97, 541, 277)

SMALL = False


def shrink() -> None:
    """Make everything tiny, before the benchmarks themselves are imported (``--small``)."""
    global LENGTH, IMAGE_SIZE, DEPTH, UNEVEN, SMALL
    LENGTH, IMAGE_SIZE, DEPTH, UNEVEN, SMALL = 37, 96, 2, (37, 15, 28, 19, 22, 17, 35, 18), True


def choose(on_gpu, on_cpu, small):
    """What is for this machine, or the small one."""
    return small if SMALL else on_gpu if ON_GPU else on_cpu


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lengths_of(batch: str) -> list[int]:
    """``"8 x 577"`` or ``"8 uneven"`` (any multiple of 8) to sample lengths."""
    count, _, kind = batch.partition(" ")
    if kind == "uneven":
        return list(UNEVEN) * (int(count) // len(UNEVEN))
    return [int(kind.removeprefix("x "))] * int(count)


def spread_lengths(batch: int, mean: int, spread: float) -> list[int]:
    """``batch`` lengths with this mean, evenly spaced, whose standard deviation is ``spread`` times the mean."""
    steps = torch.linspace(-1, 1, batch, dtype=torch.float64)
    steps = steps / steps.std(unbiased=False)
    return (mean * (1 + spread * steps)).round().long().tolist()


def packed(values: Tensor, lengths: list[int]) -> RaggedBatch:
    """Rows ``[T, ...]`` of samples of these lengths, on the device that is measured."""
    return RaggedBatch.from_lengths(values.to(DEVICE), lengths)


def tokens(lengths: list[int], *shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers ``[T, *shape]`` on the device."""
    return torch.randn(sum(lengths), *shape, generator=generator(seed)).to(DEVICE, dtype)


def images(count: int, size: int, seed: int = 0) -> Tensor:
    """``[count, 3, size, size]`` pictures of smooth blobs; each image has its own mixture of coarse and fine
    structure, so that images differ in how many of their tokens matter."""
    rng = generator(seed)
    pictures = torch.zeros(count, 3, size, size)
    for cells in (2, 4, 8, 16, 32):
        amplitude = torch.rand(count, 1, 1, 1, generator=rng) ** 2
        noise = torch.randn(count, 3, cells, cells, generator=rng)
        pictures += amplitude * F.interpolate(noise, size=(size, size), mode="bicubic")
    return pictures / pictures.std((1, 2, 3), keepdim=True)


def texts(count: int, vocabulary: int, seed: int = 0) -> list[Tensor]:
    """``count`` statements of 14 to 28 random word ids."""
    rng = generator(seed + 1)
    lengths = torch.randint(14, 29, (count,), generator=rng).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=rng) for length in lengths]


def temperature_that_saves(reduction: float, saved: Callable[[float], float], first: float | None = None) -> float:
    """The temperature from 0.5 to 64 at which ``saved(temperature)``, a share of the GFLOPs, is ``reduction`` within
    0.01."""
    from madtp.search import find_strength  # not above: benchmarks of kernels alone need no model layer

    if SMALL:
        return first or 5.7
    left = 1 - reduction
    return find_strength(lambda temperature: 1 - saved(temperature), left, first or 5.7, 0.01 / left, (0.5, 64.0))


def config(kind: type):
    """The real sizes of a task's model, or a small one's."""
    from madtp.config import TextConfig, VisionConfig

    vision, text = VisionConfig(image_size=IMAGE_SIZE, depth=DEPTH), TextConfig(num_hidden_layers=DEPTH)
    return kind(vision=vision, text=text)
