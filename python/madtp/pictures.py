"""Picture files as a person would see them: opened safely, decoded within bounds, upright, opaque, in 8-bit RGB.

Everything that can be wrong with a file is found here and reported as ImageError.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from PIL import Image

from .files import open_regular

__all__ = ["MAX_PIXELS", "ImageError", "load_image", "opened"]

MAX_PIXELS = 120_000_000
"""Largest picture that is decoded (width x height); the biggest phone cameras in use have 108 megapixels."""

# Raster formats only: Pillow hands some others (EPS) to external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# EXIF orientation -> what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_STRIP = 1 << 20  # pixels that are worked on at a time where several copies are needed


class _InFlight:
    """Bounds the pixels that all threads hold at a time: pictures that together have more wait for each other."""

    def __init__(self, most: int):
        self._most, self._now, self._less = most, 0, threading.Condition()

    @contextlib.contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        """Counts that many inside; waits first until they fit. One picture always fits."""
        with self._less:
            self._less.wait_for(lambda: self._now == 0 or self._now + pixels <= self._most)
            self._now += pixels
        try:
            yield
        finally:
            with self._less:
                self._now -= pixels
                self._less.notify_all()


_opening = threading.Lock()
# While it is decoded, a picture takes up to three times four bytes per pixel, however small its file.
_in_flight = _InFlight(MAX_PIXELS)


def _after_fork() -> None:
    """In a process of its own: locks that other threads held when it was forked would never be given back."""
    global _opening, _in_flight
    _opening, _in_flight = threading.Lock(), _InFlight(MAX_PIXELS)


os.register_at_fork(after_in_child=_after_fork)


class ImageError(ValueError):
    """A picture that cannot be used: ``source`` names it, ``reason`` says why."""

    def __init__(self, source: str, reason: str):
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


def load_image(source: str | os.PathLike | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as a person would see it, as an 8-bit RGB PIL image.

    The EXIF orientation is applied; transparent parts are laid over white, as an image viewer or a web page does (dropping
    alpha would reveal whatever colour is stored beneath); 16-bit grey is scaled to 8 bits; palette, grey, CMYK become RGB; of
    an animation the first frame is taken. Threads wait for each other where their pictures have more than :data:`MAX_PIXELS`
    together.

    Args:
        source: a path, the bytes of a file, or a PIL image.
        max_pixels: of the largest picture that is decoded.

    Raises:
        ImageError: missing, not a regular file, unreadable, not an image, damaged, truncated, too large, or of a kind without
            a defined range of values (32-bit integer or float).
    """
    with opened(source, max_pixels) as (image, _):
        return image


@contextlib.contextmanager
def opened(source, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[Image.Image, str]]:
    """The picture that :func:`load_image` reads, and its name; inside the block its pixels count as in flight."""
    with contextlib.ExitStack() as stack:
        if isinstance(source, Image.Image):
            image, name = source, "PIL image"
        else:
            if not isinstance(source, (str, os.PathLike, bytes, bytearray)):  # a number would be an open file
                raise ImageError(type(source).__name__, "expected a path, the bytes of a file or a PIL image")
            if isinstance(source, (bytes, bytearray)):
                file, name = io.BytesIO(source), f"image of {len(source)} bytes"
            else:
                file, name = stack.enter_context(_regular_file(source)), str(source)
            image = stack.enter_context(_identified(file, name, max_pixels))
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(name, f"too large: {width} x {height} pixels, at most {max_pixels} are accepted")
        if width * height == 0:
            raise ImageError(name, f"empty: {width} x {height} pixels")
        if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
            raise ImageError(name, "pixels of 32 bits have no defined range of values; convert to 8 or 16 bits")
        stack.enter_context(_in_flight.holding(width * height))
        yield _as_rgb(image, name), name


def _regular_file(path: str | os.PathLike) -> BinaryIO:
    try:
        return open_regular(path)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(str(path), getattr(error, "strerror", None) or str(error)) from error


def _identified(file, name: str, max_pixels: int) -> Image.Image:
    try:
        # Pillow's own size limit only warns; ours raises. The lock is there because warning filters are global.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()  # registers all formats that this build of Pillow can read
            return Image.open(file, formats=[kind for kind in _FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"too large: more than {max_pixels} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(name, "not an image in a known format") from error
    except Exception as error:  # Pillow's readers raise many kinds of error on malformed data
        raise ImageError(name, f"damaged image ({error})") from error


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    try:
        hidden = _transparent_value(image)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I"):
            return _by_strips(image, lambda strip: _from_16_bits(strip, hidden))
        if image.has_transparency_data:
            return _by_strips(image, lambda strip: _on_white(strip, hidden))
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(name, f"damaged image ({error})") from error


def _transparent_value(image: Image.Image) -> int | tuple[int, int, int] | None:
    """The grey value or colour that a PNG declares transparent, as it is once the picture is decoded.

    Pillow gives it as the file has it, in the file's number of bits. Of colours with 16 bits per channel Pillow keeps the
    upper 8, so that there a colour counts as transparent if those agree.
    """
    value, tiles = image.info.get("transparency"), getattr(image, "tile", None)
    if image.format != "PNG" or not isinstance(value, (int, tuple)) or not tiles:
        return None
    stored = tiles[0][3]
    if stored == "RGB;16B":
        return tuple(part >> 8 for part in value)
    return value * {"L;2": 85, "L;4": 17}.get(stored, 1)


def _by_strips(image: Image.Image, to_rgb) -> Image.Image:
    """The whole picture by way of `to_rgb`, without its intermediate copies of the whole."""
    whole, rows = Image.new("RGB", image.size), max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        whole.paste(to_rgb(image.crop(box)), box)
    return whole


def _on_white(image: Image.Image, hidden: int | tuple[int, int, int] | None) -> Image.Image:
    if hidden is not None:
        image.info["transparency"] = hidden
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _from_16_bits(image: Image.Image, hidden: int | None) -> Image.Image:
    values = np.asarray(image)
    grey = np.rint(values.astype(np.float32) / 257).clip(0, 255).astype(np.uint8)  # 65535 becomes 255
    if hidden is not None:
        grey[values == hidden] = 255
    return Image.fromarray(grey).convert("RGB")


def _orientation(image: Image.Image):
    try:
        return image.getexif().get(0x0112)
    except Exception:  # damaged metadata does not make the picture itself unusable
        return None
