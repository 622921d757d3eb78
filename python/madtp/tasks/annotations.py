"""The annotation files of NLVR2, VQA v2, COCO captions and Flickr30k.

Read are the original formats and the JSON files that BLIP ships (and MADTP uses), in file order, without
loading images: what a record says stays as it is, no picture pair is swapped, no text cleaned. Each record is
checked; AnnotationError names the file and the record that is wrong.

Where BLIP's files have a list of records, JSON Lines with one record each will do.

Every reader takes `image_root`, the folder that image paths in the file start from, and `strict`: with it,
images that are not there are an error too.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..files import open_regular, parse_json
from ..resume import read_object

__all__ = [
    "VISUAL_GENOME_WEIGHT",
    "AnnotationError",
    "CaptionExample",
    "NLVRExample",
    "VQAExample",
    "are_paths",
    "first_object",
    "is_path",
    "read_blip_nlvr",
    "read_blip_vqa",
    "read_captions",
    "read_lines",
    "read_nlvr2",
    "read_vqa_v2",
    "require_images",
]

VISUAL_GENOME_WEIGHT = 0.2
"""Training weight that BLIP gives an answer from Visual Genome."""


class AnnotationError(ValueError):
    """An annotation file that cannot be used: `path`, number of the `record` (from 1; for JSON Lines the
    line; None for the file as a whole) and `reason`."""

    def __init__(self, path: str | os.PathLike, record: int | None, reason: str):
        super().__init__(path, record, reason)
        self.path, self.record, self.reason = path, record, reason

    def __str__(self) -> str:
        return f"{self.path}: {'' if self.record is None else f'record {self.record}: '}{self.reason}"


@dataclass(frozen=True, slots=True)
class NLVRExample:
    """A statement about a left and a right picture (its path, or the picture itself), and whether it is true. BLIP's
    files have no `identifier`; `template` is the kind of the statement, where a file of theirs has one."""

    left: Path | Image.Image
    right: Path | Image.Image
    sentence: str
    label: bool
    identifier: str | None = None
    template: str | None = None


@dataclass(frozen=True, slots=True)
class VQAExample:
    """A question about a picture.

    answers: that of each annotator (VQA: ten), in file order; one for Visual Genome; empty for a test split.
    dataset: "vqa", or "vg" for Visual Genome, whose question ids count for nothing: None.
    """

    image: Path
    question: str
    question_id: int | None
    answers: tuple[str, ...]
    dataset: str = "vqa"

    def answer_weights(self) -> dict[str, float]:
        """Training weight of each distinct answer, as in BLIP: the fraction of annotators who gave it; 0.2
        for Visual Genome."""
        if self.dataset == "vg":
            return dict.fromkeys(self.answers, VISUAL_GENOME_WEIGHT)
        return {answer: count / len(self.answers) for answer, count in Counter(self.answers).items()}


@dataclass(frozen=True, slots=True)
class CaptionExample:
    """A picture and the captions people wrote for it: one in training files, all of them in validation and
    test."""

    image: Path
    image_id: int | str
    captions: tuple[str, ...]


class _Record:
    """An object of an annotation file whose values are checked as they are asked for."""

    def __init__(self, path, number: int, value):
        self.path, self.number, self.value = path, number, value
        if not isinstance(value, dict):
            raise self.error(f"expected an object, got {_kind(value)}")

    def error(self, reason: str) -> AnnotationError:
        return AnnotationError(self.path, self.number, reason)

    def get(self, key: str, expected: str, fits):
        if key not in self.value:
            raise self.error(f"no {key!r}")
        value = self.value[key]
        if not fits(value):
            raise self.error(f"{key!r}: expected {expected}, got {_shown(value)}")
        return value

    def text(self, key: str) -> str:
        return self.get(key, "a string", lambda value: isinstance(value, str))

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self.get(key, "a list of one string or more", _are_texts))

    def integer(self, key: str) -> int:
        return self.get(key, "an integer", _is_integer)

    def label(self) -> bool:
        return self.get("label", '"True" or "False"', lambda value: value in ("True", "False")) == "True"

    def image(self, root) -> Path:
        return Path(root) / self.get("image", "a path", is_path)


def is_path(value) -> bool:
    """Whether a JSON value may be a path."""
    return isinstance(value, str) and value != ""


def are_paths(value, count: int) -> bool:
    """Whether a JSON value is a list of so many paths."""
    return isinstance(value, list) and len(value) == count and all(map(is_path, value))


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_texts(value) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(text, str) for text in value)


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{_kind(value)}, {text[:50]}..."


def _parse(path, text: bytes, record: int | None = None):
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8
        raise AnnotationError(path, record, f"not JSON: {error}") from error


def _records(path, values) -> list[_Record]:
    if not isinstance(values, list):
        raise AnnotationError(path, None, f"expected a list of objects, got {_kind(values)}")
    if not values:
        raise AnnotationError(path, None, "there are no records")
    return [_Record(path, number, value) for number, value in enumerate(values, 1)]


def _content(path) -> bytes:
    with open_regular(path) as file:  # a pipe could be read only once
        content = file.read()
    if not content.strip():
        raise AnnotationError(path, None, "the file is empty")
    return content


def first_object(path: str | os.PathLike) -> dict | None:
    """The first line of JSON Lines, or the object that a file is; None for a list, and for what is not JSON."""
    content = _content(path).strip()
    first = read_object(content.split(b"\n", 1)[0])
    return read_object(content) if first is None else first


def _read_list(path) -> list[_Record]:
    """Records of a JSON list, or one per line."""
    content = _content(path)
    if read_object(content.strip().split(b"\n", 1)[0]) is not None:
        return read_lines(path)
    return _records(path, _parse(path, content))


def read_lines(path: str | os.PathLike) -> list[_Record]:
    """The objects of JSON Lines. Raises AnnotationError, OSError."""
    lines = enumerate(_content(path).split(b"\n"), 1)
    return [_Record(path, number, _parse(path, line, number)) for number, line in lines if line.strip()]


def _read_object(path, *keys: str) -> tuple[dict, dict[str, list[_Record]]]:
    """An object, and the records in the lists it has under `keys`."""
    value = _parse(path, _content(path))
    if not isinstance(value, dict):
        raise AnnotationError(path, None, f"expected an object with {' and '.join(keys)}, got {_kind(value)}")
    for key in keys:
        if not isinstance(value.get(key), list):
            raise AnnotationError(path, None, f"expected a list under {key!r}, got {_kind(value.get(key))}")
    return value, {key: _records(path, value[key]) for key in keys}


class _Unique:
    """Finds ids that occur twice."""

    def __init__(self, name: str):
        self.name, self.first = name, {}

    def add(self, record: _Record, value):
        earlier = self.first.setdefault(value, record.number)
        if earlier != record.number:
            raise record.error(f"{self.name} {value!r} is that of record {earlier} already")
        return value


def require_images(path: str | os.PathLike, images: Mapping[Path, int | None]) -> None:
    """Raise AnnotationError if images are missing, of which each comes with the number of the first record about it."""
    missing = [image for image in images if not os.path.isfile(image)]
    if missing:
        names = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        reason = f"{len(missing)} of {len(images)} images are not there: {names}"
        raise AnnotationError(path, images[missing[0]], reason)


def _require_images(path, records: list[_Record], examples: list, *names: str) -> None:
    """The same for the images that examples have under these names."""
    first_use: dict[Path, int] = {}
    for record, example in zip(records, examples):
        for name in names:
            first_use.setdefault(getattr(example, name), record.number)
    require_images(path, first_use)


def read_blip_nlvr(path: str | os.PathLike, image_root: str | os.PathLike, strict: bool = False) -> list[NLVRExample]:
    """BLIP's nlvr_train.json, nlvr_dev.json, nlvr_test.json: objects with sentence (or text), label ("True", "False"),
    images [left, right], and template (a string) where the statements come from some.

    The pairs come in the order of the file. (The official evaluation swaps each with probability 0.5, which
    makes its result a random number.) Raises AnnotationError, OSError.
    """
    records, examples = _read_list(path), []
    for record in records:
        images = record.get("images", "a list of two paths", lambda value: are_paths(value, 2))
        left, right = (Path(image_root) / image for image in images)
        template = record.text("template") if "template" in record.value else None
        sentence = record.text("text" if "text" in record.value and "sentence" not in record.value else "sentence")
        examples.append(NLVRExample(left, right, sentence, record.label(), template=template))
    if strict:
        _require_images(path, records, examples, "left", "right")
    return examples


def read_nlvr2(path: str | os.PathLike, image_root: str | os.PathLike, strict: bool = False) -> list[NLVRExample]:
    """The original train.json, dev.json, test1.json, test2.json of NLVR2 (github.com/lil-lab/nlvr): an object
    per line with identifier, sentence, label and, in train.json, directory.

    Identifier dev-850-0-1 is the second sentence about dev-850-0-img0.png and dev-850-0-img1.png. Where these
    lie below `image_root` is as in the release, and in BLIP's files: images/train/DIRECTORY/, dev/, test1/,
    test2/. Raises AnnotationError, OSError.
    """
    records, examples, identifiers = read_lines(path), [], _Unique("identifier")
    for record in records:
        identifier = identifiers.add(record, record.text("identifier"))
        parts = re.fullmatch(r"((train|dev|test1|test2)-\d+-\d+)-\d+", identifier)
        if parts is None:
            raise record.error(f"'identifier': expected SPLIT-SET-PAIR-SENTENCE, got {_shown(identifier)}")
        pair, split = parts.groups()
        folder = f"images/train/{record.integer('directory')}" if split == "train" else split
        left, right = (Path(image_root) / folder / f"{pair}-img{side}.png" for side in (0, 1))
        examples.append(NLVRExample(left, right, record.text("sentence"), record.label(), identifier))
    if strict:
        _require_images(path, records, examples, "left", "right")
    return examples


def read_blip_vqa(
    path: str | os.PathLike,
    image_root: str | os.PathLike,
    visual_genome_root: str | os.PathLike | None = None,
    strict: bool = False,
) -> list[VQAExample]:
    """BLIP's vqa_train.json, vqa_val.json, vqa_test.json (without answers) and vg_qa.json: objects with
    image, question, dataset and, for dataset "vqa" (also if there is none), question_id and a list of answers
    under answer; for "vg" one answer.

    Images of Visual Genome are looked for under `visual_genome_root`. Raises AnnotationError, OSError, and
    ValueError if that is needed and missing.
    """
    records, examples, question_ids = _read_list(path), [], _Unique("question_id")
    first_answered = None
    for record in records:
        dataset = record.value.get("dataset", "vqa")
        if dataset == "vg":
            if visual_genome_root is None:
                raise ValueError(f"{path} has images of Visual Genome: visual_genome_root is needed")
            image, question_id, answers = record.image(visual_genome_root), None, (record.text("answer"),)
        elif dataset == "vqa":
            image = record.image(image_root)
            question_id = question_ids.add(record, record.integer("question_id"))
            answered = "answer" in record.value
            if first_answered is None:
                first_answered = answered
            if answered != first_answered:
                raise record.error(f"{'an' if answered else 'no'} 'answer', unlike the questions before it")
            answers = record.texts("answer") if answered else ()
        else:
            raise record.error(f'\'dataset\': expected "vqa" or "vg", got {_shown(dataset)}')
        examples.append(VQAExample(image, record.text("question"), question_id, answers, dataset))
    if strict:
        _require_images(path, records, examples, "image")
    return examples


def read_vqa_v2(
    questions: str | os.PathLike,
    image_root: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    strict: bool = False,
) -> list[VQAExample]:
    """The original files of VQA v2 (visualqa.org): v2_OpenEnded_mscoco_*_questions.json and, except for the
    test splits, v2_mscoco_*_annotations.json.

    Image 42 of subset val2014 is val2014/COCO_val2014_000000000042.jpg. Raises AnnotationError, also unless
    each question has its annotation and each annotation its question; OSError.
    """
    document, lists = _read_object(questions, "questions")
    subset = document.get("data_subtype")
    if not isinstance(subset, str) or not subset:
        raise AnnotationError(questions, None, f"'data_subtype': expected a string, got {_shown(subset)}")
    subset = subset.replace("test-dev", "test")  # a part of the test questions, about the same pictures
    answers = None if annotations is None else _read_vqa_answers(annotations)
    examples, question_ids = [], _Unique("question_id")
    for record in lists["questions"]:
        question_id = question_ids.add(record, record.integer("question_id"))
        image_id = record.integer("image_id")
        given: tuple[str, ...] = ()
        if answers is not None:
            if question_id not in answers:
                raise record.error(f"question {question_id} has no annotation in {annotations}")
            image_of_answer, given = answers.pop(question_id)
            if image_of_answer != image_id:
                raise record.error(f"image {image_id}, but {image_of_answer} in {annotations}")
        image = Path(image_root) / subset / f"COCO_{subset}_{image_id:012d}.jpg"
        examples.append(VQAExample(image, record.text("question"), question_id, given))
    if answers:
        raise AnnotationError(annotations, None, f"question {next(iter(answers))} is not in {questions}")
    if strict:
        _require_images(questions, lists["questions"], examples, "image")
    return examples


def _read_vqa_answers(path) -> dict[int, tuple[int, tuple[str, ...]]]:
    """Question id -> image id and the annotators' answers."""
    _, lists = _read_object(path, "annotations")
    answers, question_ids = {}, _Unique("question_id")
    for record in lists["annotations"]:
        given = record.get(
            "answers",
            "a list of objects with an 'answer' each",
            lambda value: (
                isinstance(value, list)
                and value
                and all(isinstance(item, dict) and isinstance(item.get("answer"), str) for item in value)
            ),
        )
        question_id = question_ids.add(record, record.integer("question_id"))
        answers[question_id] = record.integer("image_id"), tuple(item["answer"] for item in given)
    return answers


def read_captions(path: str | os.PathLike, image_root: str | os.PathLike, strict: bool = False) -> list[CaptionExample]:
    """Karpathy's splits as BLIP ships them: coco_karpathy_{train,val,test}.json,
    flickr30k_{train,val,test}.json.

    Training files have an object per caption: caption (a string), image, image_id. Validation and test files
    have one per image: image, caption (a list) and, as a rule, no image_id; then it is the number that the
    file name ends in, by which COCO's evaluation knows the image (COCO_val2014_000000391895.jpg is 391895).
    Raises AnnotationError, also if an image of the second kind occurs twice; OSError.
    """
    records, examples, image_ids = _read_list(path), [], _Unique("image")
    for record in records:
        image = record.image(image_root)
        image_id = record.value.get("image_id")
        if isinstance(record.value.get("caption"), str):
            captions = (record.text("caption"),)
        else:
            captions = record.texts("caption")
            last = image.stem.rsplit("_", 1)[-1]
            if image_id is None and last.isascii() and last.isdigit():
                image_id = int(last)
        if not _is_integer(image_id) and not isinstance(image_id, str):
            raise record.error(f"'image_id': expected an integer or a string, got {_shown(image_id)}")
        if isinstance(record.value["caption"], list):
            image_ids.add(record, image_id)
        examples.append(CaptionExample(image, image_id, captions))
    if strict:
        _require_images(path, records, examples, "image")
    return examples
