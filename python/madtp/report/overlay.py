"""Which image patches survived, drawn over an image, or over the images of an instance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..pictures import load_image

__all__ = ["kept_patches", "overlays", "overlays_of"]

_GAP = 6
_CAPTION = 18
_TITLE = 28
_MOST_COLUMNS = 6
_DIMMED = 0.25  # of the brightness of a pruned patch
_OUTLINE = (255, 196, 0)


def kept_patches(trace, sample: int, grid: int) -> np.ndarray:
    """Which patches of one sample are still there, as themselves, after a layer: bool [grid, grid].

    Token ids are original positions, of which 0 is [CLS] and p > 0 is patch p - 1 in reading order; merged
    tokens have negative ids and are nowhere in the picture.
    """
    begin, end = trace.cu_seqlens[sample : sample + 2].tolist()
    ids = trace.ids[begin:end].cpu().numpy()
    kept = np.zeros(grid * grid, dtype=bool)
    kept[ids[ids > 0] - 1] = True
    return kept.reshape(grid, grid)


def overlays(
    images: Sequence[Image.Image],
    traces: Sequence,
    config,
    samples: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    height: int = 224,
    title: str = "",
) -> Image.Image:
    """A picture with one row per image and one column per layer, pruned patches darkened, with counts. The layers of a
    panorama that is alone and has no title are one below the other.

    Args:
        images: as loaded, of any size; they keep their aspect ratio here.
        traces: of the vision layers.
        config: the model's; image and patch size are used.
        samples: which samples of the traces' batch the images are.
        layers: numbers of the layers to show, from 1; by default up to six, spread evenly from first to last.
        height: of one image, in pixels; less where it would get more than twice as wide, or such a panorama four times.
        title: a line above all, such as the statement.

    Raises:
        ValueError: a layer that the model has not.
    """
    panorama = len(images) == 1 and not title and images[0].width > 2 * images[0].height
    rows = [
        _row(image, traces, sample, config, layers, height, widest=4 if panorama else 2)
        for image, sample in zip(images, samples, strict=True)
    ]
    return _sheet([[tile] for tile in rows[0]] if panorama else rows, title)


def overlays_of(model, paths: Sequence, traces: Sequence, samples: Sequence[int], title: str = "") -> Image.Image:
    """The same by the paths of the images, of which the part is drawn that the model sees."""
    images = [model.processor.view(load_image(path)) for path in paths]
    return overlays(images, traces, model.config, samples, title=title)


def _row(image: Image.Image, traces, sample: int, config, layers, height: int, widest: int) -> list[Image.Image]:
    depth, grid = len(traces), config.vision.image_size // config.vision.patch_size
    if layers is None:
        columns = min(depth, _MOST_COLUMNS)
        layers = sorted({round(layer) for layer in np.linspace(1, depth, columns)})
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers: expected numbers from 1 to {depth}, got {list(layers)}")
    scale = min(height / image.height, widest * height / image.width)  # a panorama gets lower, not wider
    size = [max(1, round(side * scale)) for side in image.size]
    tile = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    row = [_captioned(tile, f"{grid * grid} patches")]
    for layer in layers:
        kept = kept_patches(traces[layer - 1], sample, grid)
        row.append(_captioned(_dim(tile, kept), f"layer {layer}: {kept.sum()} left"))
    return row


def _dim(image: Image.Image, kept: np.ndarray) -> Image.Image:
    """Darken what is not kept, and draw a line where the two meet (for the sake of dark pictures)."""
    mask = Image.fromarray(kept.astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    dimmed = Image.composite(image, image.point(lambda value: int(value * _DIMMED)), mask)
    inside = np.asarray(mask) > 0
    edges = np.zeros_like(inside)
    edges[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    edges[1:] |= inside[1:] != inside[:-1]
    dimmed.paste(_OUTLINE, mask=Image.fromarray(edges.astype(np.uint8) * 255))
    return dimmed


def _captioned(image: Image.Image, text: str) -> Image.Image:
    tile = Image.new("RGB", (image.width, image.height + _CAPTION), "white")
    tile.paste(image, (0, _CAPTION))
    ImageDraw.Draw(tile).text((2, 2), text, fill="black", font=ImageFont.load_default(12))
    return tile


def _sheet(rows: list[list[Image.Image]], title: str = "") -> Image.Image:
    widths = [sum(tile.width + _GAP for tile in row) + _GAP for row in rows]
    heights = [row[0].height + _GAP for row in rows]
    top = _GAP + (_TITLE if title else 0)
    sheet = Image.new("RGB", (max(widths), top + sum(heights)), "white")
    if title:
        ImageDraw.Draw(sheet).text((_GAP + 2, _GAP), title, fill="black", font=ImageFont.load_default(18))
    y = top
    for row, height in zip(rows, heights, strict=True):
        x = _GAP
        for tile in row:
            sheet.paste(tile, (x, y))
            x += tile.width + _GAP
        y += height
    return sheet
