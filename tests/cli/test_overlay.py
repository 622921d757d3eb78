"""The picture of surviving patches shows exactly those that survived."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from madtp.report.overlay import kept_patches, overlays

GRID = 4
CONFIG = SimpleNamespace(vision=SimpleNamespace(image_size=GRID * 8, patch_size=8))
CAPTION, GAP = 18, 6


def nlvr_overlay(left, right, output, config, pair=0, **options):
    """The two images of a pair, of which a batch has all left ones first."""
    pairs = len(output.vision[0].cu_seqlens) // 2
    return overlays([left, right], output.vision, config, [pair, pairs + pair], **options)


def trace(ids_per_sample):
    lengths = [len(ids) for ids in ids_per_sample]
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    # Rows past the last sample are undefined in a buffer of fixed capacity.
    ids = torch.tensor([*sum(ids_per_sample, []), 3, 3], dtype=torch.int32)
    return SimpleNamespace(cu_seqlens=cu_seqlens, ids=ids)


@pytest.fixture
def output():
    """Three pairs, two layers; patches are ids less one, merged tokens negative."""
    everything = list(range(17))
    first = [everything, [0, 1, 6, 16, -1], everything, everything, [0, 4, 5, -1], everything]
    second = [everything, [0, 6, -2], everything, everything, [0, -2], everything]
    return SimpleNamespace(vision=[trace(first), trace(second)])


def test_ids_are_patch_numbers_plus_one(output):
    kept = kept_patches(output.vision[0], 1, GRID)
    assert np.flatnonzero(kept).tolist() == [0, 5, 15]
    assert kept_patches(output.vision[0], 0, GRID).all()
    assert not kept_patches(output.vision[1], 4, GRID).any()


def tile(sheet, row, column, width, height):
    x, y = GAP + column * (width + GAP), GAP + row * (height + CAPTION + GAP) + CAPTION
    return np.asarray(sheet.crop((x, y, x + width, y + height)), int)


def patch(tile, index):
    """The inside of a patch, without the line around it."""
    height, width = tile.shape[0] // GRID, tile.shape[1] // GRID
    row, column = divmod(index, GRID)
    return tile[row * height + 2 : (row + 1) * height - 2, column * width + 2 : (column + 1) * width - 2]


@pytest.mark.parametrize("colour", [(200, 120, 40), (255, 255, 255)])
def test_pruned_patches_are_dimmed_and_kept_ones_are_not(output, colour):
    left, right = Image.new("RGB", (80, 80), colour), Image.new("RGB", (160, 80), colour)
    sheet = nlvr_overlay(left, right, output, CONFIG, pair=1, height=80)
    survivors = {(0, 1): {0, 5, 15}, (0, 2): {5}, (1, 1): {3, 4}, (1, 2): set()}
    for row, width in ((0, 80), (1, 160)):
        assert (tile(sheet, row, 0, width, 80) == colour).all()
        for column in (1, 2):
            shown = tile(sheet, row, column, width, 80)
            for index in range(GRID * GRID):
                inside = patch(shown, index)
                if index in survivors[row, column]:
                    assert (inside == colour).all(), (row, column, index)
                else:
                    assert np.abs(inside - np.array(colour) / 4).max() <= 1, (row, column, index)


def test_a_line_tells_kept_from_pruned_even_in_a_black_picture(output):
    black = Image.new("RGB", (80, 80))
    sheet = nlvr_overlay(black, black, output, CONFIG, pair=1, height=80)
    shown = tile(sheet, 0, 2, 80, 80)  # patch 5 alone is left
    bright = np.argwhere(shown.any(axis=-1))
    assert bright.min(axis=0).tolist() == [20, 20] and bright.max(axis=0).tolist() == [40, 40]
    assert not tile(sheet, 1, 2, 80, 80).any()  # nothing is left, so there is no line either


def test_patches_follow_the_picture_whatever_its_shape(output):
    """The model sees a square; the picture is drawn in its own proportions."""
    image = Image.new("RGB", (400, 100), (100, 200, 50))
    sheet = nlvr_overlay(image, image, output, CONFIG, pair=1, height=100)
    shown = tile(sheet, 0, 2, 200, 50)  # twice as wide as high was asked for at most
    kept = (shown == (100, 200, 50)).all(axis=-1)
    assert kept[15:22, 55:95].all() and not kept[:, :45].any() and not kept[30:].any()


def test_layers_can_be_chosen(output):
    image = Image.new("RGB", (40, 40))
    widths = {
        layers: nlvr_overlay(image, image, output, CONFIG, layers=layers, height=40).width for layers in ((1,), (2, 1))
    }
    assert widths[2, 1] - widths[1,] == 40 + GAP
    for layers in ((0,), (3,)):
        with pytest.raises(ValueError, match="layers"):
            nlvr_overlay(image, image, output, CONFIG, layers=layers)


def test_many_layers_are_thinned_out(output):
    many = SimpleNamespace(vision=[output.vision[0]] * 12)
    image = Image.new("RGB", (40, 40))
    assert nlvr_overlay(image, image, many, CONFIG, height=40).width == 7 * (40 + GAP) + GAP


def test_a_title_is_written_above_and_changes_nothing_below(output):
    image = Image.new("RGB", (40, 40), (100, 200, 50))
    plain, titled = (
        np.asarray(nlvr_overlay(image, image, output, CONFIG, height=40, title=title))
        for title in ("", "Both images show the moon.")
    )
    added = len(titled) - len(plain)
    assert (titled[added:] == plain).all()
    assert (titled[:added] < 128).any() and (titled[0] == 255).all()


def test_layers_of_a_panorama_are_one_below_the_other(output):
    """Side by side they would be strips."""
    wide = overlays([Image.new("RGB", (800, 100), "red")], output.vision, CONFIG, [1], height=80)
    assert wide.size == (320 + 2 * GAP, 3 * (40 + CAPTION + GAP) + GAP)
    assert (patch(tile(wide, 1, 0, 320, 40), 5) == (255, 0, 0)).all()
    assert (patch(tile(wide, 1, 0, 320, 40), 1) < 100).all()
    other = overlays([Image.new("RGB", (200, 100))], output.vision, CONFIG, [0], height=80)
    assert other.width == 3 * (160 + GAP) + GAP
