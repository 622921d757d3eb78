"""The shapes task: pictures and statements agree, words alone tell nothing, files hold what training sees."""

import json
import re
from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image

from madtp.data import synthetic
from madtp.data.synthetic import COLOURS, MAX_COUNT, MAX_TOKENS, SHAPES, TEMPLATES, Shapes, token_ids
from madtp.tasks.nlvr import NLVRProcessor

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}


@pytest.fixture(scope="module")
def train():
    return Shapes("train")


@pytest.fixture(scope="module")
def test():
    return Shapes("test")


def counts_of(noun: str, pair) -> tuple[int, int]:
    """Objects that a noun phrase names, counted in the grids."""
    words = re.sub(r"(?<=[a-z])(?<!cros)s$", "", noun.replace("crosses", "cross")).split()
    colour = next((1 + list(COLOURS).index(word) for word in words if word in COLOURS), None)
    shape = next((1 + SHAPES.index(word) for word in words if word in SHAPES), None)
    assert colour or shape
    assert all(word in (*COLOURS, *SHAPES, "object") for word in words)
    found = (pair.shapes > 0) & (colour is None or pair.colours == colour) & (shape is None or pair.shapes == shape)
    return tuple(int(image.sum()) for image in np.broadcast_to(found, pair.shapes.shape))


def answer(sentence: str, pair) -> tuple[bool, tuple[int, int]]:
    """What the sentence says, read word by word and looked up in the grids: another way to the label."""

    def read(pattern):
        return re.fullmatch(pattern, sentence)

    def both(noun, side="left"):
        left, right = counts_of(noun, pair)
        return (left, right) if side == "left" else (right, left)

    if m := read(r"There is a (.+) in the (left|right) image\."):
        return both(m[1], m[2])[0] > 0, both(m[1])
    if m := read(r"Both images contain a (.+)\."):
        return min(both(m[1])) > 0, both(m[1])
    if m := read(r"Neither image contains a (.+)\."):
        return max(both(m[1])) == 0, both(m[1])
    if m := read(r"Only the (left|right) image contains a (.+)\."):
        here, there = both(m[2], m[1])
        return here > 0 and there == 0, both(m[2])
    if m := read(r"The (left|right) image contains (exactly|at least) (\w+) (.+)\."):
        here = both(m[4], m[1])[0]
        return (here == NUMBERS[m[3]] if m[2] == "exactly" else here >= NUMBERS[m[3]]), both(m[4])
    if m := read(r"The (left|right) image contains more (.+) than the (left|right) image\."):
        assert m[1] != m[3]
        here, there = both(m[2], m[1])
        return here > there, both(m[2])
    if m := read(r"Both images contain the same number of (.+)\."):
        return both(m[1])[0] == both(m[1])[1], both(m[1])
    m = read(r"There are exactly (\w+) (.+) in the two images\.")
    return sum(both(m[2])) == NUMBERS[m[1]], both(m[2])


def test_every_label_is_what_the_sentence_says_of_the_scene(train):
    seen = set()
    for index in range(100):
        pair = train.pair(index, 12)
        for statement in pair.statements:
            label, counts = answer(statement.sentence, pair)
            assert statement.label == label, (index, statement)
            assert statement.counts == counts, (index, statement)
            seen.add((statement.template, statement.label))
    assert seen == {(template, label) for template in TEMPLATES for label in (True, False)}


def test_words_alone_tell_nothing(train):
    """Labels against everything in the sentence but colour and shape; and against each colour and shape."""
    names = "|".join([*COLOURS, *SHAPES])
    groups = defaultdict(list)
    for index in range(1200):
        for s in train.pair(index).statements:
            sentence = s.sentence.replace("crosses", "crosss")
            groups[s.kind, re.sub(names, "*", sentence)].append(s.label)
            for name in re.findall(names, sentence):
                groups[name].append(s.label)
            groups["all"].append(s.label)
    worst = max(abs(2 * sum(labels) - len(labels)) / len(labels) ** 0.5 for labels in groups.values())
    assert worst < 4.5  # standard deviations; 1e-5 for one group, and there are about eighty
    assert 70 < len(groups) < 150 and min(len(labels) for labels in groups.values()) >= 8


def test_a_pair_depends_on_split_seed_and_index_alone(train):
    again, other_seed, dev = Shapes("train"), Shapes("train", 1), Shapes("dev")
    again.pair(3)
    first = train.pair(17)
    assert np.array_equal(again.pair(17).images, first.images)
    assert again.pair(17).statements == first.statements
    assert np.array_equal(train.pair(17, 3, ("exist", "both")).images, first.images)
    for other in (other_seed.pair(17), dev.pair(17), train.pair(18)):
        assert not np.array_equal(other.shapes, first.shapes)
        assert not np.array_equal(other.images, first.images)


def test_held_out_splits_have_backgrounds_of_their_own(train, test):
    seen = {background.tobytes() for background in train._backgrounds}
    assert len(seen) == len(train._backgrounds)
    assert not seen & {background.tobytes() for background in test._backgrounds}


def test_grids_say_what_is_drawn_where(train):
    """The colour in the middle of a disc, square or cross is that of its grid; a ring shows another there."""
    palette = np.array(list(COLOURS.values()))
    named = np.zeros((len(SHAPES), 2), int)
    for index in range(60):
        pair = train.pair(index)
        for side, row, column in np.argwhere(pair.shapes > 0):
            y, x = 16 * row + 8, 16 * column + 8
            middle = pair.images[side, y - 1 : y + 1, x - 1 : x + 1].reshape(-1, 3).mean(0)
            nearest = np.abs(palette - middle).sum(1).argmin() + 1
            named[pair.shapes[side, row, column] - 1] += (nearest == pair.colours[side, row, column], 1)
    share = dict(zip(SHAPES, named[:, 0] / named[:, 1], strict=True))
    assert all(share[shape] > 0.97 for shape in ("circle", "square", "triangle", "cross"))
    assert share["ring"] < 0.5


def test_few_patches_matter_and_bright_ones_are_not_all_objects(train):
    relevant, objects, bright = [], [], []
    for index in range(100):
        pair = train.pair(index)
        assert ((pair.shapes > 0).sum((1, 2)) >= 4).all() and ((pair.shapes > 0).sum((1, 2)) <= 6).all()
        assert ((pair.shapes > 0) == (pair.colours > 0)).all()
        relevant += [sum(s.counts) / 72 for s in pair.statements]
        assert all(max(s.counts) <= MAX_COUNT for s in pair.statements)
        colour = pair.images.astype(int)
        saturation = (colour.max(-1) - colour.min(-1)).reshape(2, 12, 8, 12, 8).mean((2, 4)).ravel()
        is_object = np.kron(pair.shapes > 0, np.ones((1, 2, 2), bool)).ravel()
        objects.append(is_object.mean())
        bright.append(is_object[saturation.argsort()[-is_object.sum() :]].mean())
    assert np.mean(relevant) < 0.04
    assert np.mean(objects) < 0.15
    assert np.mean(bright) < 0.75  # as many of the most saturated patches as there are object patches


def test_pictures_of_which_nothing_could_be_asked_are_drawn_again(train):
    # What comes first at this number are pictures of the same two kinds of objects, each more than MAX_COUNT or in both.
    draws = synthetic._Draws(train._key, 2 * 30816 + 1)
    assert not synthetic._is_askable(synthetic._census(synthetic._draw_scene(draws)))
    assert len(train.pair(30816).statements) == 8


def test_tensors_are_what_the_processor_makes_of_the_files(tmp_path, train):
    processor = NLVRProcessor(96, 54, 16, synthetic.VOCABULARY)
    batch = train.batch(range(5, 8), 4)
    assert batch.pixels.shape == (6, 3, 96, 96) and batch.input_ids.shape == (3, 4, MAX_TOKENS)
    for p, index in enumerate(range(5, 8)):
        pair = train.pair(index, 4)
        paths = [tmp_path / f"{p}{side}.png" for side in "lr"]
        for path, image in zip(paths, pair.images, strict=True):
            Image.fromarray(image).save(path)
        assert torch.equal(processor.images(*paths), batch.pixels[[p, 3 + p]])
        for k, statement in enumerate(pair.statements):
            ids = processor.text(statement.sentence)
            assert ids.tolist() == token_ids(statement.sentence)
            assert torch.equal(batch.input_ids[p, k, : batch.lengths[p, k]], ids)
            assert not batch.input_ids[p, k, batch.lengths[p, k] :].any()
            assert batch.labels[p, k] == statement.label and tuple(batch.counts[p, k]) == statement.counts
            for side in (0, 1):
                cells = np.argwhere(batch.relevant[3 * side + p, k].view(12, 12).numpy()).tolist()
                assert statement.counts[side] == len(cells)
                for row, column in cells:
                    assert row % 2 == column % 2 == 0
                    assert statement.shape in (0, pair.shapes[side, row // 2, column // 2])
                    assert statement.colour in (0, pair.colours[side, row // 2, column // 2])
            noun = [list(COLOURS)[statement.colour - 1]] * (statement.colour > 0)
            noun += [SHAPES[statement.shape - 1]] if statement.shape else ["object"]
            assert " ".join(noun) in statement.sentence
        for side in (0, 1):
            shapes = batch.patch_shapes[3 * side + p].view(12, 12)
            anchors = batch.patch_anchors[3 * side + p].view(12, 12)
            for row in range(12):
                for column in range(12):
                    shape = pair.shapes[side, row // 2, column // 2]
                    assert shapes[row, column] == shape
                    assert anchors[row, column] == (shape > 0 and row % 2 == 0 and column % 2 == 0)


def test_the_vocabulary_has_exactly_the_words_of_the_sentences(train):
    used = {i for index in range(400) for s in train.pair(index, 16).statements for i in token_ids(s.sentence)}
    assert used == {3, 5, *range(7, 52), 53}  # [SEP], the words (6 is [unused0]) and [ENC], but no [UNK]
    longest = max(len(token_ids(s.sentence)) for index in range(100) for s in train.pair(index).statements)
    assert longest == MAX_TOKENS


def test_files_in_the_official_format(tmp_path):
    synthetic.main(["--output", str(tmp_path), "--split", "dev", "--pairs", "3", "--statements", "2"])
    rows = json.loads((tmp_path / "nlvr_dev.json").read_text())
    expected = [(pair, s) for pair in map(Shapes("dev").pair, range(3), [2] * 3) for s in pair.statements]
    assert len(rows) == len(expected) == 6
    for row, (pair, statement) in zip(rows, expected, strict=True):
        assert row.keys() == {"sentence", "label", "images", "template"}
        assert row["sentence"] == statement.sentence and row["label"] == str(statement.label)
        assert row["template"] == statement.template
        for path, image in zip(row["images"], pair.images, strict=True):
            assert np.array_equal(np.asarray(Image.open(tmp_path / path)), image)
    lines = [json.loads(line) for line in (tmp_path / "dev.jsonl").read_text().splitlines()]
    assert lines == [{"images": row["images"], "text": row["sentence"]} for row in rows]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        synthetic.main(["--help"])
    assert stopped.value.code == 0
    assert "python -m madtp.data.synthetic --output shapes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda _: Shapes("validation"), "split: expected one of train, dev, test, got 'validation'"),
        (lambda _: Shapes("train", -1), "seed: expected a number >= 0, got -1"),
        (lambda train: train.pair(0, 1, ("most",)), "templates: .* got most"),
        (lambda train: train.pair(0, 1, ()), "templates: .* got none"),
    ],
)
def test_wrong_arguments_are_named(train, call, named):
    with pytest.raises(ValueError, match=named):
        call(train)
