"""Benchmark files: read as they are, a wrong record is named."""

import json
import operator
from pathlib import Path

import pytest

from madtp.tasks import annotations
from madtp.tasks.annotations import AnnotationError, CaptionExample, NLVRExample, VQAExample

FOLDER = Path(__file__).parents[1] / "data" / "annotations"
ROOT = Path("pictures")


def read_blip_nlvr(path, **options):
    return annotations.read_blip_nlvr(path, ROOT, **options)


def read_nlvr2(path, **options):
    return annotations.read_nlvr2(path, ROOT, **options)


def read_blip_vqa(path, **options):
    return annotations.read_blip_vqa(path, ROOT, ROOT / "vg", **options)


def read_questions(path, **options):
    return annotations.read_vqa_v2(path, ROOT, **options)


def read_captions(path, **options):
    return annotations.read_captions(path, ROOT, **options)


def test_blip_nlvr_keeps_the_order_of_records_and_of_the_pair():
    pair = ROOT / "dev/dev-12-0-img0.png", ROOT / "dev/dev-12-0-img1.png"
    expected = [
        NLVRExample(*pair, "One picture shows three cups, the other one only a spoon.", True),
        NLVRExample(*pair, "The left picture has more cups than the right one.", False),
        NLVRExample(
            ROOT / "dev/dev-31-2-img0.png",
            ROOT / "dev/dev-31-2-img1.png",
            "A lamp is lit in both pictures.",
            False,
        ),
    ]
    assert all(read_blip_nlvr(FOLDER / "nlvr_dev.json") == expected for _ in range(10))


def test_original_nlvr2_finds_its_images_by_identifier():
    train = read_nlvr2(FOLDER / "nlvr2_train.json")
    folder = ROOT / "images/train/15"
    pair = folder / "train-4004-1-img0.png", folder / "train-4004-1-img1.png"
    assert train == [
        NLVRExample(*pair, "Two cats sleep on a blue sofa.", True, "train-4004-1-0"),
        NLVRExample(*pair, "No cat is awake.", False, "train-4004-1-1"),
    ]
    (test,) = read_nlvr2(FOLDER / "nlvr2_test1.json")
    assert (test.left, test.right) == (ROOT / "test1/test1-77-3-img0.png", ROOT / "test1/test1-77-3-img1.png")


def test_blip_vqa_weighs_answers_by_how_many_gave_them():
    first, second = read_blip_vqa(FOLDER / "vqa_train.json")
    image = ROOT / "train2014/COCO_train2014_000000000009.jpg"
    assert (first.image, first.question, first.question_id) == (image, "Is the kettle on?", 9000)
    assert first.answers == ("yes", "yes", "no", "yes", "yes", "yes", "no", "yes", "on", "yes")
    assert first.answer_weights() == {"yes": 0.7, "no": 0.2, "on": 0.1}
    assert second.answer_weights() == {"mug": 0.8, "cup": 0.2}


def test_visual_genome_has_its_own_root_weight_and_no_question_ids():
    first, second = read_blip_vqa(FOLDER / "vg_qa.json")
    assert first == VQAExample(ROOT / "vg/image/2.jpg", "How many windows are there?", None, ("four",), dataset="vg")
    assert second.answer_weights() == {"nobody": 0.2}
    with pytest.raises(ValueError, match="visual_genome_root"):
        annotations.read_blip_vqa(FOLDER / "vg_qa.json", ROOT)


def test_blip_vqa_test_has_no_answers():
    image = ROOT / "test2015/COCO_test2015_000000000262.jpg"
    assert read_blip_vqa(FOLDER / "vqa_test.json") == [VQAExample(image, "What is the colour of the tram?", 262, ())]


def test_original_vqa_joins_questions_and_annotations_by_question_id():
    examples = annotations.read_vqa_v2(
        FOLDER / "v2_OpenEnded_mscoco_val2014_questions.json",
        ROOT,
        FOLDER / "v2_mscoco_val2014_annotations.json",
    )
    folder = ROOT / "val2014"
    assert examples == [
        VQAExample(folder / "COCO_val2014_000000000042.jpg", "Does the dog wear a collar?", 42000, ("no",) * 4),
        VQAExample(
            folder / "COCO_val2014_000000000073.jpg",
            "How many wheels can be seen?",
            73001,
            ("2", "2", "two", "3"),
        ),
    ]


def test_test_dev_questions_are_about_the_test_images():
    (example,) = read_questions(FOLDER / "v2_OpenEnded_mscoco_test-dev2015_questions.json")
    assert example.image == ROOT / "test2015/COCO_test2015_000000000262.jpg" and example.answers == ()


def test_captions_for_training_come_one_by_one():
    image = ROOT / "val2014/COCO_val2014_000000000205.jpg"
    assert read_captions(FOLDER / "coco_karpathy_train.json")[:2] == [
        CaptionExample(image, "coco_205", ("A boy throws a ball over the fence.",)),
        CaptionExample(image, "coco_205", ("a ball in the air above a garden",)),
    ]


@pytest.mark.parametrize(
    ("name", "ids"), [("coco_karpathy_test.json", [411, 412]), ("flickr30k_test.json", [1007, 1009])]
)
def test_captions_for_evaluation_are_numbered_by_file_name(name, ids):
    examples = read_captions(FOLDER / name)
    assert [example.image_id for example in examples] == ids
    assert [len(example.captions) for example in examples] == [3 if 411 in ids else 2, 2]


def at(*path):
    """A function that sets the value at a place in a document; without a value it removes it."""

    def change(document, *value):
        *outer, key = path
        for part in outer:
            document = document[part]
        operator.setitem(document, key, *value) if value else operator.delitem(document, key)

    return change


BROKEN = [
    (read_blip_nlvr, "nlvr_dev.json", at(1, "label"), ("maybe",), 2, 'label.*"True" or "False".*"maybe"'),
    (read_blip_nlvr, "nlvr_dev.json", at(1, "label"), (True,), 2, "label.*true"),
    (read_blip_nlvr, "nlvr_dev.json", at(1, "label"), (["True"],), 2, "label"),
    (read_blip_nlvr, "nlvr_dev.json", at(2, "sentence"), (), 3, "no 'sentence'"),
    (read_blip_nlvr, "nlvr_dev.json", at(2, "sentence"), (7,), 3, "sentence.*expected a string, got 7"),
    (read_blip_nlvr, "nlvr_dev.json", at(0, "images"), (["a", "b", "c"],), 1, "two paths"),
    (read_blip_nlvr, "nlvr_dev.json", at(0, "images"), (["a", ""],), 1, "two paths"),
    (read_blip_nlvr, "nlvr_dev.json", at(0, "images"), ("ab",), 1, "images.*list"),
    (read_blip_nlvr, "nlvr_dev.json", at(2), (["not", "an object"],), 3, "expected an object, got a list"),
    (read_blip_vqa, "vqa_train.json", at(1, "question_id"), (9000,), 2, "9000 is that of record 1"),
    (read_blip_vqa, "vqa_train.json", at(1, "question_id"), ("9001",), 2, "question_id.*integer"),
    (read_blip_vqa, "vqa_train.json", at(1, "question_id"), (True,), 2, "question_id.*integer"),
    (read_blip_vqa, "vqa_train.json", at(1, "answer"), (), 2, "no 'answer', unlike"),
    (read_blip_vqa, "vqa_train.json", at(0, "answer"), (), 2, "an 'answer', unlike"),
    (read_blip_vqa, "vqa_train.json", at(1, "answer"), ([],), 2, "answer.*one string or more"),
    (read_blip_vqa, "vqa_train.json", at(1, "answer"), (["mug", None],), 2, "answer.*one string or more"),
    (read_blip_vqa, "vqa_train.json", at(1, "image"), ("",), 2, "image.*a path"),
    (read_blip_vqa, "vqa_train.json", at(1, "dataset"), ("coco",), 2, 'dataset.*"vg".*"coco"'),
    (read_blip_vqa, "vg_qa.json", at(0, "answer"), (["four"],), 1, "answer.*a string"),
    (read_captions, "coco_karpathy_train.json", at(0, "image_id"), (), 1, "image_id.*null"),
    (read_captions, "coco_karpathy_train.json", at(0, "image_id"), (2.5,), 1, "image_id.*2.5"),
    (read_captions, "coco_karpathy_test.json", at(1, "caption"), ([],), 2, "caption.*one string or more"),
    (read_captions, "coco_karpathy_test.json", at(1, "caption"), (), 2, "no 'caption'"),
    (read_captions, "coco_karpathy_test.json", at(1, "image"), ("a/b.jpg",), 2, "image_id.*null"),
    (read_captions, "coco_karpathy_test.json", at(1, "image_id"), ([412],), 2, r"image_id.*\[412\]"),
    (read_captions, "coco_karpathy_test.json", at(1, "image"), ("x_411.jpg",), 2, "411 is that of record 1"),
]


@pytest.mark.parametrize(("read", "name", "change", "value", "record", "reason"), BROKEN)
def test_a_wrong_record_is_named(tmp_path, read, name, change, value, record, reason):
    document = json.loads((FOLDER / name).read_text())
    change(document, *value)
    path = tmp_path / name
    path.write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=rf"^{path}: record {record}: .*{reason}") as caught:
        read(path)
    assert (caught.value.path, caught.value.record) == (path, record)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"sentence": "x", "label": "True", "identifier": "train-4004-1-1"', "not JSON"),
        ("[]", "expected an object, got a list"),
        ('{"sentence": "x", "label": "True", "label": "False"}', "the name 'label' is there twice"),
        ('{"directory": 15, "identifier": "train-4004-1-0", "sentence": "x", "label": "True"}', "record 1"),
        ('{"directory": 15, "identifier": "train-4004-1", "sentence": "x", "label": "True"}', "SPLIT-SET"),
        ('{"identifier": "train-4004-1-1", "sentence": "x", "label": "True"}', "no 'directory'"),
        ('{"directory": "../x", "identifier": "train-1-1-1"}', "an integer"),
        ('{"directory": 15, "identifier": "train-1-1-1", "sentence": "x", "label": "true"}', "label"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, reason):
    path = tmp_path / "train.json"
    first = (FOLDER / "nlvr2_train.json").read_text().splitlines()[0]
    path.write_text(f"{first}\n\n{line}\n")
    with pytest.raises(AnnotationError, match=f"^{path}: record 3: .*{reason}"):
        read_nlvr2(path)


@pytest.mark.parametrize("read", [read_blip_nlvr, read_blip_vqa, read_captions, read_questions])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b'[{"a": 1}', "not JSON"),
        (b'["\xff"]', "not JSON"),
        (b"null", "got null"),
        (b"[]", ""),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, read, content, reason):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=f"^{path}: .*{reason}"):
        read(path)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_captions(tmp_path / "none.json")


QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANSWERS = "v2_mscoco_val2014_annotations.json"


@pytest.mark.parametrize(
    ("name", "change", "value", "reason"),
    [
        (QUESTIONS, at("data_subtype"), (), "'data_subtype'"),
        (QUESTIONS, at("questions"), (3,), "'questions', got a number"),
        (QUESTIONS, at("questions", 1, "question_id"), (42000,), "record 2: question_id 42000"),
        (QUESTIONS, at("questions", 1, "question_id"), (5,), "record 2: question 5 has no annotation"),
        (QUESTIONS, at("questions", 1, "image_id"), (74,), "record 2: image 74, but 73"),
        (QUESTIONS, at("questions", 1), (), f"question 73001 is not in .*{QUESTIONS}"),
        (ANSWERS, at("annotations"), (), "'annotations', got null"),
        (ANSWERS, at("annotations", 0, "answers", 2, "answer"), (), "record 1: 'answers'"),
        (ANSWERS, at("annotations", 0, "answers"), ([],), "record 1: 'answers'"),
        (ANSWERS, at("annotations", 1, "question_id"), (73001,), "record 2: question_id 73001"),
    ],
)
def test_questions_and_annotations_have_to_fit(tmp_path, name, change, value, reason):
    documents = {file: json.loads((FOLDER / file).read_text()) for file in (QUESTIONS, ANSWERS)}
    change(documents[name], *value)
    for file, document in documents.items():
        (tmp_path / file).write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=reason):
        annotations.read_vqa_v2(tmp_path / QUESTIONS, ROOT, tmp_path / ANSWERS)


@pytest.mark.parametrize(
    ("reader", "name", "record"),
    [
        (annotations.read_blip_nlvr, "nlvr_dev.json", 3),
        (annotations.read_nlvr2, "nlvr2_train.json", 1),
        (annotations.read_blip_vqa, "vqa_train.json", 1),
        (annotations.read_vqa_v2, QUESTIONS, 2),
        (annotations.read_captions, "coco_karpathy_train.json", 3),
    ],
)
def test_strict_reading_wants_every_image(tmp_path, reader, name, record):
    examples = reader(FOLDER / name, tmp_path)
    pairs = [(e.left, e.right) if isinstance(e, NLVRExample) else (e.image,) for e in examples]
    images = [image for pair in pairs for image in pair]
    for image in images:
        image.parent.mkdir(parents=True, exist_ok=True)
        image.touch()
    assert reader(FOLDER / name, tmp_path, strict=True) == examples
    images[-1].unlink()
    missing = rf"record {record}: 1 of {len(set(images))} images are not there: {images[-1]}$"
    with pytest.raises(AnnotationError, match=missing):
        reader(FOLDER / name, tmp_path, strict=True)
    assert reader(FOLDER / name, tmp_path) == examples


def test_strict_reading_names_the_first_five_missing_images(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"image": f"{n}.jpg", "caption": ["x"]} for n in range(7)]))
    names = ", ".join(str(tmp_path / f"{n}.jpg") for n in range(5))
    with pytest.raises(AnnotationError, match=f"7 of 7 images are not there: {names}, ...$"):
        annotations.read_captions(path, tmp_path, strict=True)
