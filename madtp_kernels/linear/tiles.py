"""Shapes of the tiles in which the GPU multiplies, and which of them serves which product: data, not code.

Every tile of a list makes a row from the same products in the same order, so that they all give the same bits: a choice, by
whatever rule, costs or saves time and changes no result. Nothing is measured while a model runs. `benchmarks/tune.py`
measures on a GPU and writes `MEASURED`.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ..triton_utils import cdiv


class Tile(NamedTuple):
    """Shape of a tile of the result, columns of the operands per step, and how it is run."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int
    """Per multiprocessor."""
    stored: bool = False
    """The copy engine also fetches the residual and stores the result, spare rows of a tile included."""
    halves: bool = False
    """Where the last tiles would keep at most half of the programs busy, each is taken in two halves of its columns.
    `linear_pair`, whose last tiles are of two products, does without."""

    def count(self, rows: int, columns: int) -> int:
        return cdiv(rows, self.rows) * cdiv(columns, self.columns)


# From the one that reuses its operands most to the one that fills a device with the fewest rows.
FLOAT32 = (Tile(128, 128, 16, 8, 2, 1), Tile(64, 128, 16, 8, 2, 2))
# Tiles of 16-bit operands that threads fetch.
SIXTEEN_BITS = (Tile(128, 128, 32, 8, 3, 1), Tile(64, 64, 64, 4, 3, 2))
UNALIGNED = SIXTEEN_BITS[1:]  # the addresses of a large tile would not fit the registers
COPY_ENGINE = (Tile(128, 256, 64, 8, 3, 1), Tile(128, 128, 64, 4, 3, 2), Tile(64, 128, 64, 4, 3, 2))
"""Tiles of 16-bit operands that the copy engine of sm_90 and later fetches."""

# What `benchmarks/tune.py` tries besides, where the copy engine serves. Each has to fit the shared memory with every ending:
# 128 x 256 stored by the copy engine does not, with an activation and a residual.
CANDIDATES = (
    Tile(128, 256, 64, 8, 4, 1),
    Tile(128, 256, 64, 8, 4, 1, halves=True),
    Tile(128, 256, 128, 8, 2, 1),
    Tile(256, 128, 64, 8, 3, 1),
    Tile(256, 128, 64, 8, 4, 1),
    Tile(128, 128, 128, 8, 3, 1),
    Tile(128, 128, 64, 8, 3, 2),
    Tile(128, 128, 64, 4, 3, 2, stored=True),
    Tile(64, 256, 64, 4, 2, 2),
    Tile(64, 128, 64, 4, 4, 2),
    Tile(64, 128, 64, 4, 2, 3),
    Tile(64, 128, 128, 4, 4, 1),
    Tile(64, 64, 64, 4, 4, 3),
    Tile(64, 64, 64, 4, 4, 3, stored=True),
    Tile(64, 64, 128, 4, 6, 1),
)


class Measured(NamedTuple):
    """The fastest tile, on average over shares of the rows in use, of ``[rows, width]`` times ``[width, columns]``."""

    rows: int
    width: int
    columns: int
    tile: Tile


# By the major number of the compute capability; products in 16 bits that the copy engine serves.
MEASURED: dict[int, tuple[Measured, ...]] = {
    9: (
        Measured(36928, 768, 2304, Tile(128, 128, 64, 4, 3, 2, stored=True)),
        Measured(36928, 768, 768, Tile(128, 128, 64, 8, 3, 2)),
        Measured(36928, 768, 3072, Tile(128, 128, 64, 4, 3, 2, stored=True)),
        Measured(36928, 3072, 768, Tile(128, 256, 64, 8, 4, 1, halves=True)),
        Measured(1154, 768, 2304, Tile(64, 128, 64, 4, 4, 2)),
        Measured(1154, 768, 768, Tile(64, 128, 64, 4, 4, 2)),
        Measured(1154, 768, 3072, Tile(128, 128, 64, 8, 3, 2)),
        Measured(1154, 3072, 768, Tile(64, 128, 128, 4, 4, 1)),
        Measured(64, 768, 2304, Tile(64, 64, 64, 4, 4, 3, stored=True)),
        Measured(64, 768, 768, Tile(64, 64, 128, 4, 6, 1)),
        Measured(64, 768, 3072, Tile(64, 64, 128, 4, 6, 1)),
        Measured(64, 3072, 768, Tile(64, 64, 128, 4, 6, 1)),
    ),
}


def by_size(tiles: tuple[Tile, ...], rows: int, columns: int, multiprocessors: int) -> Tile:
    """The largest tile that the result fills in width, and of which half of the rows have enough for the whole device."""
    for tile in tiles:
        if columns >= tile.columns and tile.count(rows // 2, columns) >= multiprocessors * tile.programs:
            return tile
    return tiles[-1]


@functools.lru_cache(4096)
def choose(
    tiles: tuple[Tile, ...], architecture: int, multiprocessors: int, rows: int, width: int, columns: int
) -> Tile:
    """The tile for a product: that of the most similar one measured on this architecture, else by its size."""
    measured = MEASURED.get(architecture, ()) if tiles is COPY_ENGINE else ()
    if not measured or not rows or not columns:
        return by_size(tiles, rows, columns, multiprocessors)

    def distance(entry: Measured) -> float:
        sizes = zip(entry[:3], (rows, width, columns), strict=True)
        return sum(abs(math.log(theirs / ours)) for theirs, ours in sizes)

    return min(measured, key=distance).tile
