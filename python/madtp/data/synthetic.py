"""Shapes: image-pair statements in the manner of NLVR2, drawn on the fly, with known answers.

Every picture holds four to six small objects among saturated blobs on a cluttered background; a statement
speaks of a few of them. So few patches matter to a statement, which ones only the statement tells, and bright
colours do not give them away. A pair is a pure function of (split, seed, index); the splits differ in scenes,
backgrounds and drawings. `python -m madtp.data.synthetic` writes a split as PNG files with annotations in
NLVR's official format; training draws pairs in memory, where it also learns which object lies where.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..files import replacing
from ..image_transform import ImageTransform
from ..options import not_negative_int, positive
from ..pictures import load_image
from ..tasks.annotations import NLVRExample

__all__ = [
    "COLOURS",
    "SHAPES",
    "SPLITS",
    "TEMPLATES",
    "Batch",
    "Pair",
    "Shapes",
    "ShapesExamples",
    "Statement",
    "pixels",
    "token_ids",
]

SIZE, CELL, PATCH = 96, 16, 8
"""Pixels of a picture, of the cell that an object lies in, and of a patch that labels are given for."""
GRID = SIZE // CELL
SPLITS = ("train", "dev", "test")
"""Sets of pairs, which share no pictures."""
_INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) < 0.95,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) < 0.85,
    "triangle": lambda x, y: (y < 0.8) & (y > 2 * np.abs(x) - 1.0),
    "cross": lambda x, y: (np.minimum(np.abs(x), np.abs(y)) < 0.3) & (np.maximum(np.abs(x), np.abs(y)) < 1.0),
    "ring": lambda x, y: (np.hypot(x, y) < 1.0) & (np.hypot(x, y) > 0.55),
}
"""Name to which points belong to a shape, right and down from its middle, in units of its radius."""
SHAPES = tuple(_INSIDE)
"""What is drawn."""
COLOURS = {
    "red": (214, 45, 38), "green": (52, 160, 60), "blue": (48, 82, 214), "yellow": (232, 208, 40),
    "purple": (150, 52, 186), "cyan": (52, 200, 214),
}  # fmt: skip
"""Name to RGB."""
_PAIRS = {"train": 1_000_000, "dev": 64, "test": 512}
MAX_COUNT = 4
"""Statements are about kinds of objects of which no picture holds more."""
MAX_TOKENS = 13
"""Length of the longest sentence in tokens, [ENC] and [SEP] included."""
VOCABULARY = Path(__file__).parent / "shapes" / "vocab.txt"

_TEMPLATES: dict[str, tuple[str, Callable[[int, int, int], bool]]] = {
    "exist": ("There is a {noun} in the {here} image.", lambda here, there, number: here > 0),
    "both": ("Both images contain a {noun}.", lambda here, there, number: here > 0 and there > 0),
    "neither": ("Neither image contains a {noun}.", lambda here, there, number: here == there == 0),
    "only": ("Only the {here} image contains a {noun}.", lambda here, there, number: here > 0 and there == 0),
    "count": ("The {here} image contains exactly {number} {nouns}.", lambda here, there, number: here == number),
    "at least": ("The {here} image contains at least {number} {nouns}.", lambda here, there, number: here >= number),
    "more": ("The {here} image contains more {nouns} than the {there} image.", lambda here, there, number: here > there),
    "same": ("Both images contain the same number of {nouns}.", lambda here, there, number: here == there),
    "total": ("There are exactly {number} {nouns} in the two images.", lambda here, there, number: here + there == number),
}  # fmt: skip
"""Name to what is said, and whether that holds for the counts on the side that it names and on the other one."""
TEMPLATES = tuple(_TEMPLATES)
"""Kinds of statements."""
KINDS = ("colour and shape", "shape", "colour")
_NUMBERS = {"count": (1, 2, 3), "at least": (2, 3), "total": (2, 3, 4, 5)}
_WORDS = ("zero", "one", "two", "three", "four", "five")
_SIDES = ("left", "right")


@dataclass(frozen=True)
class Statement:
    """A sentence about a pair, and why it is true or false."""

    sentence: str
    label: bool
    template: str
    kind: str
    """How the objects are described: one of :data:`KINDS`."""
    colour: int
    """Of the objects that the sentence speaks of: 1 + position in :data:`COLOURS`, or 0 for any; ``shape``
    likewise.
    """
    shape: int
    counts: tuple[int, int]
    """How many of these objects are in the left and in the right picture."""


@dataclass(frozen=True)
class Pair:
    """Two pictures with statements, and what training losses may know about the scene."""

    images: np.ndarray
    """``[2, S, S, 3]`` uint8, left and right; S is 96 times the scale."""
    shapes: np.ndarray
    """``[2, 6, 6]`` int64 per cell: 0, or 1 + position in :data:`SHAPES`."""
    colours: np.ndarray
    """``[2, 6, 6]`` int64 per cell: 0, or 1 + position in :data:`COLOURS`."""
    statements: list[Statement]


@dataclass(frozen=True)
class Batch:
    """P pairs with K statements each, as tensors; N patches of a picture, row by row: 144, or four times as many
    at twice the scale."""

    pixels: Tensor
    """``[2P, 3, S, S]`` float32, normalised: the left pictures, then the right ones."""
    input_ids: Tensor
    """``[P, K, MAX_TOKENS]`` int64, padded with 0."""
    lengths: Tensor
    """``[P, K]`` int64 tokens of each statement."""
    labels: Tensor
    """``[P, K]`` int64, 1 = true."""
    counts: Tensor
    """``[P, K, 2]`` int64 objects that the statement speaks of, left and right; up to :data:`MAX_COUNT`."""
    patch_shapes: Tensor
    """``[2P, N]`` int64: 0, or 1 + position in :data:`SHAPES`."""
    patch_colours: Tensor
    """``[2P, N]`` int64: 0, or 1 + position in :data:`COLOURS`."""
    patch_anchors: Tensor
    """``[2P, N]`` int64: 1 at the upper left patch of each object, which has four (16 at twice the scale)."""
    relevant: Tensor
    """``[2P, K, N]`` bool: anchors of the objects that the statement speaks of."""
    statements: list[list[Statement]]


class Shapes:
    """The pairs of one split. Drawing one takes well under a millisecond.

    Args:
        split: "train", "dev" or "test": other scenes, other backgrounds.
        seed: another seed is another data set altogether.
        scale: of the drawing: 2 draws everything twice as large, on pictures of 192 pixels.
        photos: folder of photographs (PNG or JPEG) to draw on, instead of made-up clutter; each belongs to one split.

    Raises:
        ValueError: a split that does not exist, a negative seed, a scale below 1, or a folder with too few photographs.
    """

    def __init__(self, split: str, seed: int = 0, scale: int = 1, photos: str | os.PathLike | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if seed < 0:
            raise ValueError(f"seed: expected a number >= 0, got {seed}")
        if scale < 1:
            raise ValueError(f"scale: expected a number >= 1, got {scale}")
        self.split, self.seed, self.scale = split, seed, scale
        self._key = seed * len(SPLITS) + SPLITS.index(split)
        # Drawings take a second or two, and are the same for all who ask for the same.
        draw = _drawings if photos is None else _drawings.__wrapped__
        self._backgrounds, self._sprites, self._blobs = draw(self._key, scale, photos)

    def pair(self, index: int, statements: int = 8, templates: Sequence[str] = TEMPLATES) -> Pair:
        """Pair ``index`` with so many statements, made from the given templates.

        The pictures do not depend on the statements that are asked for. Whatever its template, number, side
        and kind, a statement is true with probability 1/2 exactly, and no colour or shape is special: words
        alone tell nothing. (Two statements about a pair may be the same one. To avoid that would favour the
        answer with more choice.)

        Raises:
            ValueError: a template that does not exist, or none that could be true as well as false of this
                pair.
        """
        unknown = [template for template in templates if template not in TEMPLATES]
        if unknown or (statements and not templates):
            raise ValueError(f"templates: expected some of {', '.join(TEMPLATES)}, got {', '.join(unknown) or 'none'}")
        scene = _Draws(self._key, 2 * index + 1)
        objects = _draw_scene(scene)
        while not _is_askable(census := _census(objects)):  # about one pair in 30,000
            objects = _draw_scene(scene)
        grids = np.zeros((2, 2, GRID * GRID), np.int64)
        for side, placed in enumerate(objects):
            for cell, shape, colour in placed:
                grids[:, side, cell] = shape + 1, colour + 1
        shapes, colours = grids.reshape(2, 2, GRID, GRID)
        images = np.stack([self._paint(scene, placed) for placed in objects])
        words = _Draws(self._key, 2 * index + 2)
        made = [_make_statement(words, census, templates) for _ in range(statements)]
        return Pair(images, shapes, colours, made)

    def batch(self, indices: Sequence[int], statements: int = 8, templates: Sequence[str] = TEMPLATES) -> Batch:
        """The pairs of these indices as tensors; arguments as in :meth:`pair`."""
        pairs = [self.pair(index, statements, templates) for index in indices]
        ids = [[token_ids(statement.sentence) for statement in pair.statements] for pair in pairs]
        padded = [[row + [0] * (MAX_TOKENS - len(row)) for row in rows] for rows in ids]
        # [P, 2, ...] to [2P, ...] with the left ones first, as the model takes them.
        stacked = (np.stack([getattr(pair, name) for pair in pairs], 1) for name in ("images", "shapes", "colours"))
        images, shapes, colours = (both.reshape(-1, *both.shape[2:]) for both in stacked)
        spread = np.ones((1, CELL * self.scale // PATCH, CELL * self.scale // PATCH), np.int64)
        corner = np.zeros_like(spread)
        corner[:, 0, 0] = 1
        patch_shapes, patch_colours, patch_anchors = (
            torch.from_numpy(np.kron(grid, pattern).reshape(len(images), -1))
            for grid, pattern in ((shapes, spread), (colours, spread), ((shapes > 0).astype(np.int64), corner))
        )
        # [P, K] to [2P, K, 1]: what the statements speak of, 0 for any
        colour, shape = (
            torch.tensor([[getattr(s, name) for s in pair.statements] for pair in pairs * 2]).unsqueeze(-1)
            for name in ("colour", "shape")
        )
        relevant = (
            (patch_anchors > 0)[:, None]
            & ((colour == 0) | (colour == patch_colours[:, None]))
            & ((shape == 0) | (shape == patch_shapes[:, None]))
        )
        return Batch(
            torch.from_numpy(np.ascontiguousarray(pixels(images))),
            torch.tensor(padded),
            torch.tensor([[len(row) for row in rows] for rows in ids]),
            torch.tensor([[int(statement.label) for statement in pair.statements] for pair in pairs]),
            torch.tensor([[statement.counts for statement in pair.statements] for pair in pairs]),
            patch_shapes,
            patch_colours,
            patch_anchors,
            relevant,
            [pair.statements for pair in pairs],
        )

    def _paint(self, draws: _Draws, placed: list[tuple[int, int, int]]) -> np.ndarray:
        """Background, then blobs in cells without an object, then the objects: ``[S, S, 3]`` uint8."""
        size, scale = SIZE * self.scale, self.scale
        pool = self._backgrounds[draws.below(len(self._backgrounds))]
        top, left = draws.below(pool.shape[1] - size + 1), draws.below(pool.shape[2] - size + 1)
        picture = pool[:, top : top + size, left : left + size][:, :: draws.sign(), :: draws.sign()]
        margin = 12 * scale  # blobs and tips of objects may reach beyond the edge
        canvas = np.zeros((3, size + 2 * margin, size + 2 * margin), np.float32)
        canvas[:, margin:-margin, margin:-margin] = picture
        taken = {cell for cell, _, _ in placed}
        free = [cell for cell in range(GRID * GRID) if cell not in taken]
        for cell in draws.sample(free, 4 + draws.below(4)):
            hue, shift = draws.uniform(), (draws.below(9) - 4, draws.below(9) - 4)
            colour = _saturated(hue, 0.75 + 0.25 * draws.uniform(), 0.6 + 0.4 * draws.uniform())
            _blend(canvas, self._blobs[draws.below(len(self._blobs))], cell, shift, colour, margin, scale)
        names = list(COLOURS.values())
        for cell, shape, colour in placed:
            tint = np.array([value + 36 * draws.uniform() - 18 for value in names[colour]], np.float32)
            tint = tint.clip(0, 255)
            sprites = self._sprites[shape]
            shift = (draws.below(3) - 1, draws.below(3) - 1)
            _blend(canvas, sprites[draws.below(len(sprites))], cell, shift, tint, margin, scale)
        visible = (canvas[:, margin:-margin, margin:-margin] + 0.5).astype(np.uint8)
        return visible.transpose(1, 2, 0)


class ShapesExamples(Sequence):
    """Pairs of a split as training and evaluation take examples: tuples of statements about pictures in memory.

    Args:
        shapes: the split.
        indices: which pairs.
        texts: statements about each.
    """

    def __init__(self, shapes: Shapes, indices: range, texts: int = 8) -> None:
        self.shapes, self.indices, self.texts = shapes, indices, texts

    @classmethod
    def parse(cls, source: str, texts: int = 8) -> ShapesExamples:
        """From a name: ``shapes:SPLIT``, then any of ``,pairs=N``, ``,seed=N``, ``,scale=N``, ``,photos=DIR``.

        There are 1,000,000 pairs of train, 64 of dev and 512 of test, if the name does not say otherwise.

        Raises:
            ValueError: no such split or option, a number that is none, or a folder without photographs.
        """
        split, *options = source.removeprefix("shapes:").split(",")
        values = {"pairs": _PAIRS.get(split, 1), "seed": 0, "scale": 1, "photos": None}
        for option in options:
            name, _, value = option.partition("=")
            if name not in values or not value or (name != "photos" and not value.isdigit()):
                raise ValueError(f"{source}: expected shapes:SPLIT and options {', '.join(values)}, got {option!r}")
            values[name] = value if name == "photos" else int(value)
        return cls(Shapes(split, values["seed"], values["scale"], values["photos"]), range(values["pairs"]), texts)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number):
        if isinstance(number, slice):
            return ShapesExamples(self.shapes, self.indices[number], self.texts)
        index = self.indices[number]
        pair = self.shapes.pair(index, self.texts)
        left, right = (Image.fromarray(image) for image in pair.images)
        return tuple(
            NLVRExample(left, right, one.sentence, one.label, f"{self.shapes.split}-{index}-{place}", one.template)
            for place, one in enumerate(pair.statements)
        )


class _Draws:
    """Random numbers of one pair: plain uniform ones, drawn in blocks for speed."""

    def __init__(self, key: int, stream: int) -> None:
        self._generator = np.random.Generator(np.random.Philox(key=[key, stream]))
        self._block: list[float] = []

    def uniform(self) -> float:
        if not self._block:
            self._block = self._generator.random(256).tolist()
        return self._block.pop()

    def below(self, count: int) -> int:
        return int(self.uniform() * count)

    def sign(self) -> int:
        return 1 if self.uniform() < 0.5 else -1

    def choice(self, items: Sequence):
        return items[self.below(len(items))]

    def weighted(self, weights: Sequence[float]) -> int:
        rest = self.uniform() * sum(weights)
        for position, weight in enumerate(weights):
            rest -= weight
            if rest < 0:
                return position
        return len(weights) - 1

    def sample(self, items: Sequence, count: int) -> list:
        """``count`` different items, in random order."""
        items = list(items)
        for position in range(count):
            other = position + self.below(len(items) - position)
            items[position], items[other] = items[other], items[position]
        return items[:count]


# ---- scenes ------------------------------------------------------------------------------------------------


def _draw_scene(draws: _Draws) -> list[list[tuple[int, int, int]]]:
    """(cell, shape, colour) of the objects of both pictures.

    One to three themes, kinds of objects that both pictures may hold several of, make counts and comparisons
    worth asking for; everything else, at least four objects, is random.
    """
    themes = [(draws.below(len(SHAPES)), draws.below(len(COLOURS)))]
    for _ in range(draws.below(3)):
        shape, colour = themes[0]
        change = draws.below(3)  # a theme that shares shape or colour with the first is easily taken for it
        theme = (
            draws.below(len(SHAPES)) if change != 0 else shape,
            draws.below(len(COLOURS)) if change != 1 else colour,
        )
        themes += [theme] if theme not in themes else []
    scene = []
    for _ in _SIDES:
        total = 4 + draws.below(3)
        objects = [theme for theme in themes for _ in range(draws.weighted((0.25, 0.3, 0.2, 0.15, 0.1)))]
        objects = objects[: total - 2]
        objects += [(draws.below(len(SHAPES)), draws.below(len(COLOURS))) for _ in range(total - len(objects))]
        cells = draws.sample(range(GRID * GRID), total)
        scene.append([(cell, *kind) for cell, kind in zip(cells, objects, strict=True)])
    return scene


def _census(scene) -> dict[str, dict[tuple, tuple[int, int]]]:
    """For each kind of description: {(colour or None, shape or None): (count left, count right)}."""
    kinds = range(len(SHAPES)), range(len(COLOURS))
    census = {
        KINDS[0]: {(colour, shape): [0, 0] for colour in kinds[1] for shape in kinds[0]},
        KINDS[1]: {(None, shape): [0, 0] for shape in kinds[0]},
        KINDS[2]: {(colour, None): [0, 0] for colour in kinds[1]},
    }
    for side, objects in enumerate(scene):
        for _, shape, colour in objects:
            census[KINDS[0]][colour, shape][side] += 1
            census[KINDS[1]][None, shape][side] += 1
            census[KINDS[2]][colour, None][side] += 1
    return census


# ---- statements --------------------------------------------------------------------------------------------


def _make_statement(draws: _Draws, census, templates: Sequence[str]) -> Statement:
    """A statement that could as well be true as false in this scene; then a coin decides which it is.

    Where a scene allows only one answer the template is given up, not turned to the other answer: that would
    make some templates mostly true, which a model could learn from the words alone.
    """
    for _ in range(1000):
        template = draws.choice(templates)
        for _ in range(8):  # other details, before another template: so that all templates are about as frequent
            kind = KINDS[draws.weighted((2, 1, 1))]
            number = draws.choice(_NUMBERS.get(template, (0,)))
            side = draws.below(2)
            answers = _answers(template, number, side, kind, census)
            if all(answers.values()):
                label = draws.uniform() < 0.5
                spec, counts = draws.choice(answers[label])
                colour, shape = (0 if part is None else 1 + part for part in spec)
                return Statement(
                    _phrase(template, number, side, spec), label, template, kind, colour, shape, tuple(counts)
                )
    raise ValueError(f"templates: nothing to ask about this pair with {', '.join(templates)}")


def _is_askable(census) -> bool:
    """Whether some statement could be true as well as false in this scene."""
    return any(
        all(_answers(template, number, side, kind, census).values())
        for template in TEMPLATES
        for number in _NUMBERS.get(template, (0,))
        for side in (0, 1)
        for kind in KINDS
    )


def _answers(template: str, number: int, side: int, kind: str, census) -> dict[bool, list]:
    """The objects that a statement could be about, with their counts, by whether it would be true of them."""
    answers: dict[bool, list] = {True: [], False: []}
    _, holds = _TEMPLATES[template]
    for spec, counts in census[kind].items():
        here, there = counts[side], counts[1 - side]
        nowhere = here == there == 0 and template in ("exist", "neither") and _nearly(spec, census)
        if nowhere or 0 < max(counts) <= MAX_COUNT:
            answers[holds(here, there, number)].append((spec, counts))
    return answers


def _nearly(spec: tuple, census) -> bool:
    """Whether something of this colour and something of this shape is in the scene."""
    colour, shape = spec
    return (colour is None or any(census[KINDS[2]][colour, None])) and (
        shape is None or any(census[KINDS[1]][None, shape])
    )


def _phrase(template: str, number: int, side: int, spec: tuple) -> str:
    colour, shape = spec
    noun = "object" if shape is None else SHAPES[shape]
    plural = "crosses" if noun == "cross" else noun + "s"
    if colour is not None:
        name = list(COLOURS)[colour]
        noun, plural = f"{name} {noun}", f"{name} {plural}"
    return _TEMPLATES[template][0].format(
        noun=noun,
        nouns=noun if number == 1 else plural,
        number=_WORDS[number],
        here=_SIDES[side],
        there=_SIDES[1 - side],
    )


@functools.cache
def _vocabulary() -> dict[str, int]:
    words = VOCABULARY.read_text(encoding="utf-8").split()
    return {word: number for number, word in enumerate([*words, "[DEC]", "[ENC]"])}


def token_ids(sentence: str) -> list[int]:
    """[ENC], the words, [SEP]: what the task's tokenizer makes of one of its sentences, without the
    tokenizer's cost.
    """
    ids = _vocabulary()
    return [ids["[ENC]"], *(ids[word] for word in sentence.lower().rstrip(".").split()), ids["[SEP]"]]


# ---- drawing -----------------------------------------------------------------------------------------------


def pixels(images: np.ndarray) -> np.ndarray:
    """Pictures ``[..., S, S, 3]`` uint8 as a model takes them in: ``[..., 3, S, S]`` float32, as
    `ImageTransform.squash` gives them."""
    levels = ImageTransform.squash(SIZE).levels()
    return np.stack([channel.take(images[..., c]) for c, channel in enumerate(levels)], axis=-3)


def _blend(
    canvas: np.ndarray, alpha: np.ndarray, cell: int, shift: tuple[int, int], colour, margin: int, scale: int
) -> None:
    """Lay a colour over the canvas ``[3, h, w]``, through a mask ``[s, s]`` centred on a cell."""
    half, (row, column) = len(alpha) // 2, divmod(cell, GRID)
    y = margin + scale * (row * CELL + CELL // 2 + shift[0]) - half
    x = margin + scale * (column * CELL + CELL // 2 + shift[1]) - half
    window = canvas[:, y : y + 2 * half, x : x + 2 * half]
    window += alpha * (colour[:, None, None] - window)


def _saturated(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in 0..255 of a hue in 0..1."""
    wheel = (min(max(abs((hue * 6 + start) % 6 - 3) - 1, 0.0), 1.0) for start in (0.0, 4.0, 2.0))
    return np.array([255 * value * (1 - saturation * (1 - share)) for share in wheel], np.float32)


@functools.lru_cache(maxsize=4)
def _drawings(
    key: int, scale: int, photos: str | os.PathLike | None
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Backgrounds, sprites of each shape, and blobs of a split."""
    random, side = np.random.Generator(np.random.Philox(key=[key, 0])), (SIZE + CELL) * scale
    if photos is None:
        backgrounds = _draw_backgrounds(random, max(384 // scale**2, 16), side, scale)
    else:
        backgrounds = _read_photos(Path(photos), key % len(SPLITS), side)
    return backgrounds, _draw_sprites(random, 96, scale), _draw_blobs(random, 96, scale)


def _draw_sprites(random: np.random.Generator, variants: int, scale: int) -> list[np.ndarray]:
    """Masks ``[variants, 20 * scale, 20 * scale]`` of each shape, nearly upright, of several sizes, antialiased."""
    fine = 4
    side = 20 * scale
    axis = ((np.arange(side * fine) + 0.5) / fine / scale - 10).astype(np.float32)
    radius = random.uniform(6.0, 8.2, (len(SHAPES), variants, 1, 1)).astype(np.float32)
    turn = random.uniform(-0.25, 0.25, radius.shape).astype(np.float32)
    offset = random.uniform(-0.5, 0.5, (2, *radius.shape)).astype(np.float32)
    y, x = axis[:, None] - offset[0], axis[None, :] - offset[1]
    across = (x * np.cos(turn) + y * np.sin(turn)) / radius
    down = (y * np.cos(turn) - x * np.sin(turn)) / radius
    masks = []
    for inside, right, below in zip(_INSIDE.values(), across, down, strict=True):
        points = inside(right, below).reshape(variants, side, fine, side, fine)
        masks.append(points.mean((2, 4), dtype=np.float32))
    return masks


def _draw_blobs(random: np.random.Generator, variants: int, scale: int) -> np.ndarray:
    """Masks ``[variants, 32 * scale, 32 * scale]`` with wavy, soft outlines: as colourful as an object, but none."""
    axis = (np.arange(32 * scale) + 0.5) / scale - 16
    angle, distance = np.arctan2(axis[:, None], axis[None, :]), np.hypot(axis[:, None], axis[None, :])
    outline = np.ones((variants, *distance.shape))
    for waves in (2, 3, 5):
        height = random.uniform(0.1, 0.3, (variants, 1, 1))
        phase = random.uniform(0, 2 * math.pi, (variants, 1, 1))
        outline += height * np.cos(waves * angle + phase)
    radius = random.uniform(5.0, 9.0, (variants, 1, 1))
    softness = random.uniform(0.8, 1.6, (variants, 1, 1))
    strength = random.uniform(0.6, 0.95, (variants, 1, 1))
    alpha = strength / (1 + np.exp((distance - radius * outline) / softness))
    alpha *= distance < 15.5  # nothing is cut off at the edge of the mask but a faint rest
    return alpha.astype(np.float32)


def _read_photos(folder: Path, split: int, side: int) -> np.ndarray:
    """``[N, 3, side, side]`` uint8: the middle of every third photograph of a folder, by name, from number ``split``
    on."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(paths) < len(SPLITS):
        raise ValueError(f"photos: expected at least {len(SPLITS)} PNG or JPEG files in {folder}, got {len(paths)}")
    fitted = [ImageOps.fit(load_image(path), (side, side)) for path in paths[split :: len(SPLITS)]]
    return np.stack([np.asarray(photo).transpose(2, 0, 1) for photo in fitted])


def _draw_backgrounds(random: np.random.Generator, count: int, side: int, scale: int) -> np.ndarray:
    """``[count, 3, side, side]`` uint8: muted colour clouds of three sizes, grain, and strokes."""
    clouds = np.full((count, side, side, 3), 118.0, np.float32)
    clouds += random.uniform(-35, 35, (count, 1, 1, 1)) + random.uniform(-16, 16, (count, 1, 1, 3))
    for cells, height in ((4, 20), (8, 16), (28, 12)):
        coarse = random.uniform(-height, height, (count, cells + 1, cells + 1, 3)).astype(np.float32)
        position = np.arange(side) * cells / side
        low, share = position.astype(int), (position % 1).astype(np.float32)
        rows = coarse[:, low] * (1 - share)[:, None, None] + coarse[:, low + 1] * share[:, None, None]
        clouds += rows[:, :, low] * (1 - share)[:, None] + rows[:, :, low + 1] * share[:, None]
    clouds += random.uniform(-14, 14, clouds.shape).astype(np.float32)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).astype(np.float32)
    for picture in clouds:
        for _ in range(random.integers(2, 7)):
            start, along = random.uniform(0, side, 2), random.normal(size=2)
            along /= np.hypot(*along)
            offset = grid - start.astype(np.float32)
            reach = np.abs(offset @ along.astype(np.float32)) < scale * random.uniform(6, 40)
            near = np.abs(offset @ np.array((-along[1], along[0]), np.float32)) < scale * random.uniform(0.5, 1.6)
            picture[reach & near] = random.uniform(40, 210, 3)
    return np.ascontiguousarray(clouds.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2))


# ---- files -------------------------------------------------------------------------------------------------

_EXAMPLES = """\
examples:
  python -m madtp.data.synthetic --output shapes --split test --pairs 256
  python -m madtp.data.synthetic --output shapes --split train --pairs 10000 --statements 4 --seed 1

It writes shapes/nlvr_test.json, a list of {"sentence", "label": "True" or "False", "images": [left, right]}
as NLVR2's annotations for BLIP have it (paths are relative to the folder) and "template", by which `madtp
evaluate` breaks its figures down, and the PNG files that it names; shapes/test.jsonl has the same questions
as `madtp nlvr --input` reads them.
"""


def write(directory: str | os.PathLike, split: str, pairs: int, statements: int = 8, seed: int = 0) -> Path:
    """Write pairs 0 to ``pairs`` - 1 of a split as files; returns the path of the annotations.

    The annotations come last and at once, so that a run that was stopped leaves none, and can be repeated.

    Raises:
        ValueError: a split that does not exist.
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    rows = list(_write_pairs(directory, Shapes(split, seed), pairs, statements))
    lines = "".join(json.dumps({"images": row["images"], "text": row["sentence"]}) + "\n" for row in rows)
    for name, content in ((f"{split}.jsonl", lines), (f"nlvr_{split}.json", json.dumps(rows, indent=0) + "\n")):
        with replacing(directory / name) as file:
            file.write(content.encode())
    return directory / f"nlvr_{split}.json"


def _write_pairs(directory: Path, shapes: Shapes, pairs: int, statements: int) -> Iterator[dict]:
    (directory / shapes.split).mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(pairs), unit=" pairs", disable=None):
        pair = shapes.pair(index, statements)
        names = [f"{shapes.split}/{index:06d}-{side}.png" for side in _SIDES]
        for name, image in zip(names, pair.images, strict=True):
            Image.fromarray(image).save(directory / name)
        for statement in pair.statements:
            yield {
                "sentence": statement.sentence,
                "label": str(statement.label),
                "images": names,
                "template": statement.template,
            }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m madtp.data.synthetic",
        description="Write image pairs of coloured shapes with true and false statements, in NLVR2's format.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to; made if it is missing")
    parser.add_argument("--split", choices=SPLITS, default="test", help="which pairs (default: test)")
    parser.add_argument("--pairs", type=positive, default=256, metavar="N", help="how many (default: 256)")
    parser.add_argument(
        "--statements", type=positive, default=8, metavar="K", help="statements about each pair (default: 8)"
    )
    parser.add_argument("--seed", type=not_negative_int, default=0, metavar="S", help="another data set (default: 0)")
    args = parser.parse_args(arguments)
    try:
        path = write(args.output, args.split, args.pairs, args.statements, args.seed)
    except OSError as error:
        print(f"madtp: {error}")
        return 1
    print(f"{args.pairs * args.statements} statements about {args.pairs} pairs in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
