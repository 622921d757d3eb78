"""How a picture becomes the pixels that a model was trained on: resizing, cropping, scaling, normalisation.

The settings are those of transformers' `preprocessor_config.json`, which saved models hold too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["ImageTransform"]

# CLIP's statistics, in the [0, 1] range, which BLIP uses too.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# What transformers' processors do where a file is silent.
_DEFAULTS = {
    "do_resize": True,
    "resample": int(Image.Resampling.BICUBIC),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": _MEAN,
    "image_std": _STD,
    "half_to_even": False,  # ours, in files that we write
    "do_convert_rgb": True,  # where it is false theirs fails for all but RGB pictures, with which it makes no difference
}
_HALF, _IMAGENET = (0.5, 0.5, 0.5), {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_WHOLE = {"do_center_crop": False, "crop_size": None, "default_to_square": True}
_CENTRE = {"do_center_crop": True, "crop_size": 224, "default_to_square": False}
_FAMILIES: dict[str, dict] = {
    "clip": {"size": {"shortest_edge": 224}, **_CENTRE},
    "blip": {"size": {"height": 384, "width": 384}, **_WHOLE},
    "siglip": {"size": {"height": 224, "width": 224}, **_WHOLE, "image_mean": _HALF, "image_std": _HALF},
    "siglip2": {
        "size": None, **_WHOLE, "image_mean": _HALF, "image_std": _HALF, "resample": int(Image.Resampling.BILINEAR),
        "patch_size": 16, "max_num_patches": 256,
    },
    "dinov2": {"size": {"shortest_edge": 256}, **_CENTRE, **_IMAGENET},
    "vit": {
        "size": {"height": 224, "width": 224}, **_WHOLE, "image_mean": _HALF, "image_std": _HALF,
        "resample": int(Image.Resampling.BILINEAR),
    },
}  # fmt: skip
# Classes of transformers' image processors -> family.
_TYPES = {"CLIP": "clip", "Blip": "blip", "Siglip": "siglip", "Siglip2": "siglip2", "Bit": "dinov2", "ViT": "vit"}
_TYPE = re.compile(rf"({'|'.join(_TYPES)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
# Settings that change no pixel, or are about what a processor returns.
_INERT = frozenset(
    "image_processor_type feature_extractor_type processor_class _valid_processor_keys auto_map return_tensors data_format "
    "input_data_format device disable_grouping image_seq_length pad_size transformers_version _commit_hash".split()
)

_MOST_PIXELS = 120_000_000  # of a picture after resizing: one of 1 x 100000 pixels grows, too


@dataclass(frozen=True)
class ImageTransform:
    """Makes pixels, float32 ``[3, height, width]``, of an RGB picture.

    To the bit what transformers' PIL processors make of it (`CLIPImageProcessorPil`, `BlipImageProcessorPil`).
    """

    resize: int | tuple[int, int] | None
    """What the shorter side becomes, the longer in proportion; or (height, width), whatever the proportions were."""
    crop: tuple[int, int] | None = None
    """(height, width) of the middle that is cut out afterwards; black where the picture is smaller."""
    resample: int = _DEFAULTS["resample"]
    """PIL's number of the filter."""
    scale: float | None = _DEFAULTS["rescale_factor"]
    mean: tuple[float, float, float] | None = _MEAN
    std: tuple[float, float, float] | None = _STD
    half_to_even: bool = False
    """Where an odd number of pixels is cut off: torchvision's rounding, which open_clip has, instead of transformers'."""
    patch: int | None = None
    """With ``max_patches``: sides become multiples of this many pixels (SigLIP 2 NaFlex)."""
    max_patches: int | None = None
    """Pictures keep their proportions, as large as this many patches allow."""

    @classmethod
    def open_clip(cls, size: int, mode: str, filter_: str, mean=None, std=None) -> ImageTransform:
        """open_clip's transform for evaluation, without torchvision.

        Args:
            size: side of the square.
            mode: "shortest" (and the middle) or "squash".
            filter_: "bicubic" or "bilinear".
            mean, std: three numbers each; None for OpenAI's.

        Raises:
            ValueError: a mode, a filter or numbers that are not among these.
        """
        if mode not in ("shortest", "squash"):
            raise ValueError(f"resize_mode: expected 'shortest' or 'squash', got {mode!r}")
        if filter_ not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation: expected 'bicubic' or 'bilinear', got {filter_!r}")
        mean = _numbers("mean", _MEAN if mean is None else mean, 3)
        std = _numbers("std", _STD if std is None else std, 3)
        resample = int(getattr(Image.Resampling, filter_.upper()))
        if mode == "squash":
            return cls((size, size), resample=resample, mean=mean, std=std)
        return cls(size, (size, size), resample=resample, mean=mean, std=std, half_to_even=True)

    @classmethod
    def squash(cls, size: int) -> ImageTransform:
        """BLIP's and MADTP's, of CLIP too: the whole picture becomes a square."""
        return cls((size, size))

    @classmethod
    def centre(cls, size: int) -> ImageTransform:
        """CLIP's: the shorter side becomes ``size``, and of the longer one the middle is taken.

        Where an odd number of pixels is cut off, the larger half comes from the right or bottom, as in transformers.
        """
        return cls(size, (size, size))

    @classmethod
    def from_settings(cls, settings: Mapping, family: str) -> ImageTransform:
        """Of a `preprocessor_config.json`, or of the image processor's part of a `processor_config.json`.

        Args:
            family: whose defaults hold where the file names no processor: "clip", "blip", "siglip", "siglip2", "dinov2", "vit".

        Raises:
            ValueError: a setting that is not known, or cannot be honoured, or makes no sense; the message names it.
        """
        values = _values(settings, family)
        # What a step needs counts only where the step is taken; null is false, as in transformers.
        resized, cropped = values["do_resize"], values["do_center_crop"]
        scaled, normalised = values["do_rescale"], values["do_normalize"]
        if resized and (isinstance(values["resample"], bool) or values["resample"] not in list(Image.Resampling)):
            raise ValueError(f"resample: expected one of PIL's filters, 0 to 5, got {values['resample']!r}")
        patches = [_side(name, values[name]) for name in ("patch_size", "max_num_patches") if name in values]
        if patches and not resized:
            raise ValueError("do_resize: expected true, since sides have to be multiples of patches, got false")
        return cls(
            _size("size", values["size"], values["default_to_square"]) if resized and not patches else None,
            _size("crop_size", values["crop_size"], True) if cropped else None,
            int(values["resample"]) if resized else _DEFAULTS["resample"],
            _numbers("rescale_factor", values["rescale_factor"], 1)[0] if scaled else None,
            _numbers("image_mean", values["image_mean"], 3) if normalised else None,
            _numbers("image_std", values["image_std"], 3) if normalised else None,
            values["half_to_even"] is True,
            *patches,
        )

    def settings(self) -> dict:
        """What `from_settings` reads, and transformers' image processors."""
        size, naflex = self.resize, self.max_patches is not None
        kind = "Siglip2ImageProcessor" if naflex else "CLIPImageProcessor"
        given: dict = {"image_processor_type": kind, "do_convert_rgb": True, "do_resize": size is not None or naflex}
        if naflex:
            given |= {"patch_size": self.patch, "max_num_patches": self.max_patches}
        if self.half_to_even:
            given["half_to_even"] = True
        if size is not None:
            given["size"] = {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]}
        given |= {"resample": self.resample, "do_center_crop": self.crop is not None}
        if self.crop is not None:
            given["crop_size"] = {"height": self.crop[0], "width": self.crop[1]}
        given |= {"do_rescale": self.scale is not None, "do_normalize": self.mean is not None}
        if self.scale is not None:
            given["rescale_factor"] = self.scale
        if self.mean is not None:
            given |= {"image_mean": list(self.mean), "image_std": list(self.std)}
        return given

    @property
    def output(self) -> tuple[int, int] | None:
        """(height, width) of all pictures' pixels; None if they depend on the picture."""
        return self.crop or (None if isinstance(self.resize, int) else self.resize)

    def at(self, size: int) -> ImageTransform:
        """The same for square pixels of another size.

        Raises:
            ValueError: it cannot be told how, since it does not resize to what it cuts out.
        """
        if self.output == (size, size):
            return self
        if self.crop is None and isinstance(self.resize, tuple):
            return replace(self, resize=(size, size))
        if self.crop is not None and self.resize in (self.crop[0], self.crop) and self.crop[0] == self.crop[1]:
            return replace(self, resize=size if isinstance(self.resize, int) else (size, size), crop=(size, size))
        raise ValueError(
            f"image_size: {size} pixels cannot be made of a picture, since the model's own processor resizes to {self.resize} "
            f"and crops to {self.crop}"
        )

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The part of a picture that its pixels show: left, top, right, bottom in the picture's own pixels. Beyond the edges
        where the picture is padded."""
        if self.crop is None:
            return 0, 0, width, height
        wide, high = self._resized(width, height)
        left, top = self._cut(wide, self.crop[1]), self._cut(high, self.crop[0])
        across, down = width / wide, height / high
        right, bottom = left + self.crop[1], top + self.crop[0]
        return round(left * across), round(top * down), round(right * across), round(bottom * down)

    def __call__(self, image: Image.Image) -> Tensor:
        """Pixels float32 ``[3, height, width]`` of an 8-bit RGB picture.

        Raises:
            ValueError: a picture so narrow that it would grow beyond what memory can be expected to hold.
        """
        size = self._resized(*image.size)
        if math.prod(size) > max(_MOST_PIXELS, math.prod(image.size)):
            raise ValueError(f"too narrow: {image.width} x {image.height} pixels would become {size[0]} x {size[1]}")
        if size != image.size or self.resize is not None:
            # transformers converts to an array and back before it resizes: 9 times slower on a 12-megapixel photo.
            image = image.resize(size, self.resample)
        if self.crop is not None:
            high, wide = self.crop
            left, top = self._cut(image.width, wide), self._cut(image.height, high)
            image = image.crop((left, top, left + wide, top + high))
        pixels = np.asarray(image)
        return torch.from_numpy(np.stack([levels.take(pixels[..., c]) for c, levels in enumerate(self.levels())]))

    def _cut(self, length: int, kept: int) -> int:
        """Pixels that are cut off at the left or top, so that of ``length`` the middle ``kept`` stay."""
        return round((length - kept) / 2) if self.half_to_even and length >= kept else (length - kept) // 2

    def _patched(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of as many whole patches as are allowed; the search is that of transformers (5.24)."""

        def sides(scale: float) -> tuple[int, int]:
            return tuple(max(self.patch, math.ceil(side * scale / self.patch) * self.patch) for side in (width, height))

        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            middle = (low + high) / 2
            wide, tall = sides(middle)
            fits = (wide / self.patch) * (tall / self.patch) <= self.max_patches
            low, high = (middle, high) if fits else (low, middle)
        return sides(low)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing."""
        if self.max_patches is not None:
            return self._patched(width, height)
        if self.resize is None:
            return width, height
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        longer = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def levels(self) -> np.ndarray:
        """What each of the 256 values becomes in each channel, float32 ``[3, 256]``; rounded where transformers rounds."""
        levels = np.arange(256, dtype=np.float64)
        levels = (levels if self.scale is None else levels * self.scale).astype(np.float32)
        if self.mean is None:
            return np.stack([levels] * 3)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (levels - mean) / std


def _values(settings: Mapping, family: str) -> dict:
    """All settings, those that a file leaves out as the processor that it names, or the family, has them."""
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if named is not None:
        known = _TYPE.fullmatch(str(named))
        if known is None:
            expected = ", ".join(f"{kind}ImageProcessor" for kind in _TYPES)
            raise ValueError(f"image_processor_type: expected one of {expected}, got {named!r}")
        family = _TYPES[known[1]]
    values = _DEFAULTS | _FAMILIES[family]
    unknown = settings.keys() - values.keys() - _INERT
    unknown = sorted(name for name in unknown if settings[name] is not None and settings[name] is not False)
    if unknown:
        shown = ", ".join(f"{name} = {settings[name]!r}" for name in unknown)
        raise ValueError(f"settings that are not supported: {shown}")
    values |= {name: value for name, value in settings.items() if name in values}
    for name, value in values.items():
        if name.startswith("do_") and not isinstance(value, (bool, type(None))):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
    return values


def _size(name: str, value, square: bool) -> int | tuple[int, int]:
    """The shorter side, or (height, width); files from before transformers 4.25 hold one number."""
    if isinstance(value, Mapping):
        sides = {side: length for side, length in value.items() if length is not None}
        if set(sides) == {"shortest_edge"} and name == "size":
            return _side(name, sides["shortest_edge"])
        if set(sides) == {"height", "width"}:
            return _side(name, sides["height"]), _side(name, sides["width"])
        raise ValueError(f"{name}: expected 'shortest_edge', or 'height' and 'width', got {dict(value)}")
    if isinstance(value, (list, tuple)) and len(value) == 2:
        return _side(name, value[0]), _side(name, value[1])
    side = _side(name, value)
    return (side, side) if square else side


def _side(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10_000:
        raise ValueError(f"{name}: expected sides of 1 to 10000 pixels, got {value!r}")
    return value


def _numbers(name: str, value, count: int) -> tuple[float, ...]:
    values = [value] * count if isinstance(value, (int, float)) else value
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"{name}: expected {'a number' if count == 1 else 'three numbers'}, got {value!r}")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise ValueError(f"{name}: expected finite numbers, got {value!r}")
    if name == "image_std" and 0 in values:
        raise ValueError(f"{name}: expected numbers other than 0, got {value!r}")
    return tuple(map(float, values))
