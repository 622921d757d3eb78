"""Random changes of training pictures, as in BLIP's training: crop, mirror, and two random operations.

Everything is drawn from the generator that is passed in, so that a picture's changes depend on its seed only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_GREY = (128, 128, 128)
_BILINEAR = Image.Resampling.BILINEAR


def augment(image: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """A training view of an RGB picture, ``size x size``.

    A random crop of half to all of the area (bicubic), mirrored half of the time, then RandomAugment(2, 5): twice one of
    :data:`OPERATIONS` is drawn, and applied half of the time at half of its strength. Signs of geometric ones are random.
    """
    width, height = image.size
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=crop_box(width, height, random))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    for number in random.integers(len(OPERATIONS), size=2).tolist():
        apply, sign = random.random() < 0.5, 1 if random.random() < 0.5 else -1
        if apply:
            image = list(OPERATIONS.values())[number](image, 0.5, sign)
    return image


def crop_box(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """A crop with 0.5 to 1 of the area and an aspect ratio of 3/4 to 4/3 (left, top, right, bottom).

    Where ten draws do not fit into the picture, it is the largest central crop with an aspect ratio in that range.
    """
    for _ in range(10):
        area = random.uniform(0.5, 1.0) * width * height
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if w <= width and h <= height:
            left, top = (int(random.integers(spare + 1)) for spare in (width - w, height - h))
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * 4 / 3)))
    h = min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _affine(image: Image.Image, a: float, b: float, c: float, d: float, e: float, f: float) -> Image.Image:
    """Output pixel (x, y) is input pixel (ax + by + c, dx + ey + f); grey where there is none."""
    return image.transform(image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), _BILINEAR, fillcolor=_GREY)


def _enhancement(strength: float) -> float:
    # BLIP's formula: the strength it trains with, 0.5, leaves brightness and sharpness as they are.
    return 0.1 + 1.8 * strength


# Name -> operation on (image, strength 0..1, sign).
OPERATIONS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "Identity": lambda image, strength, sign: image,
    "AutoContrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "Brightness": lambda image, strength, sign: ImageEnhance.Brightness(image).enhance(_enhancement(strength)),
    "Sharpness": lambda image, strength, sign: ImageEnhance.Sharpness(image).enhance(_enhancement(strength)),
    "Equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "ShearX": lambda image, strength, sign: _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0),
    "ShearY": lambda image, strength, sign: _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0),
    "TranslateX": lambda image, strength, sign: _affine(image, 1, 0, sign * 10 * strength, 0, 1, 0),
    "TranslateY": lambda image, strength, sign: _affine(image, 1, 0, 0, 0, 1, sign * 10 * strength),
    "Rotate": lambda image, strength, sign: image.rotate(sign * 30 * strength, _BILINEAR, fillcolor=_GREY),
}
