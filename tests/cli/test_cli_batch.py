"""`madtp caption`, `vqa`, `embed`, `retrieve` on small models with random weights: images in, records out."""

import json
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh import COMMAND
from PIL import Image, ImageDraw
from safetensors.numpy import load_file
from small_models import CONFIGS

import madtp
from madtp import cli, predict
from madtp.tasks.caption import CaptionTask

FORMATS = ["png", "jpg", "webp", "gif", "bmp", "tiff", "ppm"]
MODES = ["RGB", "RGB", "L", "RGBA", "P"]
# The kernels have their own tests; the reference needs no compiler and no GPU.
REFERENCE = ["--backend", "reference"]


def picture(rng):
    """A few blobs on a ground of one colour, of any size and mode."""
    image = Image.new("RGB", (rng.randint(4, 90), rng.randint(4, 90)), tuple(rng.choices(range(256), k=3)))
    draw = ImageDraw.Draw(image)
    for _ in range(5):
        x, y = rng.randrange(80), rng.randrange(80)
        box = (x, y, x + rng.randrange(5, 40), y + rng.randrange(5, 40))
        draw.ellipse(box, fill=tuple(rng.choices(range(256), k=3)))
    return image


def save_pictures(folder, count, seed=0):
    rng = random.Random(seed)
    for number in range(count):
        suffix, mode = FORMATS[number % len(FORMATS)], MODES[number % len(MODES)]
        mode = "RGB" if suffix in ("jpg", "ppm") else mode
        path = folder / f"part{number % 3}" / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(rng).convert(mode).save(path)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of saved models, one per task."""
    folder = tmp_path_factory.mktemp("models")
    for task, config in CONFIGS.items():
        madtp.save_pretrained(madtp.load("random:base", config=config, temperature=2.0), folder / task)
    return folder


@pytest.fixture(scope="module")
def load(models):
    return lambda task: madtp.load(models / task, backend="reference")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("photos"), 12, seed=1)


@pytest.fixture
def command(capsys, models):
    """Runs a subcommand with the model of a task, in this process: exit code, what it printed, its errors."""

    def run(name, task, *arguments):
        model = ["--model", str(models / task), *REFERENCE]
        code = cli.main([name, *model, *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def read(path):
    return records(Path(path).read_text())


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ---- captions


def test_captions_of_a_folder(command, load, photos):
    code, out, err = command("caption", "caption", photos, "--batch-size", "5")
    assert (code, err) == (0, "")
    expected = predict.caption(load("caption"), files(photos))
    assert len({answer.caption for answer in expected}) > 6  # or the comparison says nothing
    for row, (record, path, answer) in enumerate(zip(records(out), files(photos), expected, strict=True), 1):
        assert list(record) == ["row", "image", "caption", "image_tokens", "gflops", "gflops_full"]
        assert (record["row"], record["image"]) == (row, str(path))
        assert (record["caption"], record["image_tokens"]) == (answer.caption, answer.image_tokens)
        assert record["gflops"] == pytest.approx(answer.flops.official, abs=1e-6)
        assert record["gflops_full"] == pytest.approx(answer.flops.full, abs=1e-6)


@pytest.mark.parametrize("search", [[], ["--sample"]], ids=["beams", "sample"])
def test_captions_do_not_depend_on_the_batch_size(command, photos, search):
    options = [*search, "--max-length", "9", "--batch-size"]
    outputs = {command("caption", "caption", photos, *options, size)[1] for size in (1, 5, 16)}
    assert len(outputs) == 1


def test_sampling_follows_the_seed(command, photos):
    def captions(*options):
        return [record["caption"] for record in records(command("caption", "caption", photos, *options)[1])]

    assert captions("--sample", "--seed", "1") != captions("--sample", "--seed", "2") != captions()
    first = files(photos)[0]
    _, out, _ = command("caption", "caption", first, "--sample")
    assert records(out)[0]["caption"] == captions("--sample")[0]


def test_rows_with_the_same_image_are_sampled_separately(command, photos, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text((json.dumps({"image": str(files(photos)[0])}) + "\n") * 4)
    _, out, _ = command("caption", "caption", "--input", source, "--sample")
    assert len({record["caption"] for record in records(out)}) == 4


def test_only_the_most_likely_words_are_sampled(command, load, photos):
    _, out, _ = command("caption", "caption", photos, "--sample", "--top-p", "1e-6")
    greedy = predict.caption(load("caption"), files(photos), num_beams=1, repetition_penalty=1.1)
    assert [record["caption"] for record in records(out)] == [answer.caption for answer in greedy]


def test_length_of_captions(command, load, photos):
    code, out, _ = command("caption", "caption", photos, "--max-length", "9", "--num-beams", "1")
    expected = predict.caption(load("caption"), files(photos), max_length=9, num_beams=1)
    assert [record["caption"] for record in records(out)] == [answer.caption for answer in expected]
    for limits in (("--max-length", "2"), ("--max-length", "65")):  # the prompt has four, the model 64
        code, _, err = command("caption", "caption", photos, *limits)
        assert code == 2 and "max_length" in err and err.count("\n") == 1


def test_dense_and_temperature(command, photos):
    def counts(*options):
        _, out, _ = command("caption", "caption", photos, "--max-length", "9", *options)
        return [record["image_tokens"] for record in records(out)]

    pruned, dense, hot = counts(), counts("--dense"), counts("--temperature", "9")
    assert dense == counts("--temperature", "0") == [[37] * 4] * 12
    last = [sum(tokens[-1] for tokens in rows) for rows in (hot, pruned, dense)]
    assert last[0] < last[1] < last[2]


def test_grouping_and_precision(command, photos):
    _, out, _ = command("caption", "caption", photos, "--max-length", "9", "--grouping", "batch", "--batch-size", "12")
    tied = [record["image_tokens"] for record in records(out)]
    assert tied == [tied[0]] * 12 and tied[0][-1] < 37
    code, out, _ = command("caption", "caption", photos, "--max-length", "9", "--dtype", "bfloat16")
    assert code == 0 and all(record["image_tokens"][-1] < 37 for record in records(out))


def test_rows_of_a_file(command, photos, tmp_path):
    shutil.copy(photos / "part0" / "000.png", tmp_path / "beside.png")
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes((photos / "part1" / "001.jpg").read_bytes()[:300])
    good = json.dumps({"image": str(files(photos)[-1])})
    bad = ["", "{", '{"image": 3}', '{"image": "damaged.jpg"}', '{"image": "absent.png"}', '{"image": ""}']
    bad += ['{"image": "beside.png", "image": "absent.png"}']
    rows = ['{"image": "beside.png", "caption": "its own"}', *bad, good]
    source, output = tmp_path / "rows.jsonl", tmp_path / "captions.jsonl"
    source.write_text("\n".join(rows))
    code, out, err = command("caption", "caption", "--input", source, "--output", output)
    assert code == 1 and f"8 rows in {output}" in out and "6 of 8 rows could not be answered" in err
    found = {record["row"]: record for record in read(output)}
    assert list(found) == [1, 3, 4, 5, 6, 7, 8, 9]
    assert found[1]["image"] == "beside.png" and found[1]["caption"] != "its own" and "caption" in found[9]
    reasons = {
        3: "not JSON",
        4: "'image' must be a path",
        5: "damaged",
        6: "No such file",
        7: "'image' must be a path, got ''",
    }
    for row, reason in (reasons | {8: "the name 'image' is there twice"}).items():
        assert reason in found[row]["error"] and "caption" not in found[row]
        assert re.search(rf"row {row}: .*{reason}", err)
    assert found[5]["image"] == "damaged.jpg"


def test_a_damaged_image_in_a_folder(command, photos, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(photos / "part0", folder)
    (folder / "001.png").write_bytes(b"no image")
    code, out, err = command("caption", "caption", folder)
    assert code == 1 and err.startswith("madtp: 1 of 5 rows") and "001.png: not an image" in err
    assert [("error" in record, record["image"]) for record in records(out)] == [
        (path.name == "001.png", str(path)) for path in files(folder)
    ]


def test_overlays(command, photos, tmp_path):
    single = tmp_path / "one.png"
    code, out, _ = command("caption", "caption", photos / "part0" / "000.png", "--save-overlay", single)
    assert code == 0 and records(out)[0]["overlay"] == str(single)
    folder = tmp_path / "many"
    options = ["--batch-size", "5", "--max-length", "9", "--save-overlay", folder]
    code, out, _ = command("caption", "caption", photos, *options)
    assert [Path(record["overlay"]).name for record in records(out)] == [
        f"{row:06d}-{path.stem}.png" for row, path in enumerate(files(photos), 1)
    ]
    assert single.read_bytes() == (folder / "000001-000.png").read_bytes()
    # The seventh image is the second of its batch: the picture drawn alone is the same.
    seventh = files(photos)[6]
    command("caption", "caption", seventh, "--save-overlay", single, "--overwrite")
    assert single.read_bytes() == (folder / f"000007-{seventh.stem}.png").read_bytes()
    code, _, err = command("caption", "caption", photos, "--save-overlay", single)
    assert code == 2 and "expected a folder" in err


@pytest.mark.parametrize("name, task", [("vqa", "vqa"), ("embed", "retrieval"), ("embed", "clip")])
def test_overlays_of_other_commands(command, photos, tmp_path, name, task):
    options = ["--question", "?a"] if name == "vqa" else ["--output", tmp_path / "x.npy"]
    code, _, err = command(name, task, photos, *options, "--save-overlay", tmp_path / "drawn")
    assert (code, err) == (0, "")
    assert len(files(tmp_path / "drawn")) == 12
    with Image.open(files(tmp_path / "drawn")[0]) as drawn, Image.open(files(photos)[0]) as original:
        assert drawn.height > 100 and drawn.width / drawn.height > 2 * original.width / original.height


# ---- questions


def test_one_question_about_many_images(command, load, photos):
    code, out, err = command("vqa", "vqa", photos, "--question", "What is red?", "--batch-size", "5")
    assert (code, err) == (0, "")
    expected = predict.vqa(load("vqa"), [(path, "What is red?") for path in files(photos)])
    assert len({answer.answer for answer in expected}) > 3
    for record, path, answer in zip(records(out), files(photos), expected, strict=True):
        assert (record["image"], record["question"]) == (str(path), "What is red?")
        assert record["answer"] == answer.answer and "score" not in record
        assert record["image_tokens"] == answer.image_tokens
        assert record["question_tokens"] == answer.question_tokens
        assert record["gflops"] == pytest.approx(answer.flops.official, abs=1e-6)


def test_questions_of_a_file_with_a_list_of_answers(command, load, photos, tmp_path):
    answers = ["red", "a ball", "dog", "two", "yes", "no"]
    (tmp_path / "answers.txt").write_text("\n".join(answers) + "\n")
    questions = ["how many dogs are there?", None, "", 7, "is it a cat?"]
    paths = [str(path) for path in files(photos)[:5]]
    rows = [{"image": path} | ({} if q is None else {"question": q}) for path, q in zip(paths, questions)]
    source = tmp_path / "questions.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--input", source, "--answers", tmp_path / "answers.txt", "--top-k", "4"]
    code, out, err = command("vqa", "vqa", *options)
    found = records(out)
    assert code == 1 and "3 of 5 rows" in err
    assert "'question' is missing" in found[1]["error"]
    assert "empty" in found[2]["error"] and "must be a string" in found[3]["error"]
    instances = [(paths[0], questions[0]), (paths[4], questions[4])]
    expected = predict.vqa(load("vqa"), instances, candidates=answers, k=4)
    for record, answer in zip((found[0], found[4]), expected, strict=True):
        assert record["answer"] == answer.answer in answers
        assert record["score"] == pytest.approx(answer.score, abs=1e-4)
    # With --question, rows without one have that.
    code, out, _ = command("vqa", "vqa", *options, "--question", "is it a cat?")
    assert "answer" in records(out)[1] and records(out)[4] == found[4]
    assert [records(out)[row]["question"] for row in (0, 1)] == [questions[0], "is it a cat?"], "as it was asked"


# ---- features


@pytest.mark.parametrize("task", ["retrieval", "clip"])
@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_features_of_images(command, load, photos, tmp_path, task, suffix):
    folder = tmp_path / "some"
    shutil.copytree(photos / "part0", folder)
    (folder / "003a.png").write_bytes(b"no image")
    output = tmp_path / f"features{suffix}"
    code, out, err = command("embed", task, folder, "--output", output, "--batch-size", "3")
    assert code == 1 and "003a.png: not an image" in err and f"5 rows in {output}" in out
    features = np.load(output) if suffix == ".npy" else load_file(output)["features"]
    assert features.dtype == np.float32 and features.shape == (4, 16)
    names = read(f"{output}.jsonl")
    assert [record["image"] for record in names] == [str(path) for path in files(folder)]
    assert [record.get("index") for record in names] == [0, 1, None, 2, 3]
    assert "error" in names[2] and not any("features" in record for record in names)
    model = load(task)
    for record in names:
        if "index" in record:
            with torch.inference_mode():
                (exact,) = model.encode_image(model.processor.image(record["image"])[None]).features
            exact = exact / exact.norm()
            np.testing.assert_allclose(features[record["index"]], exact.numpy(), atol=1e-5)
            assert record["image_tokens"][0] == 37 and record["gflops"] > 0


@pytest.mark.parametrize("task", ["retrieval", "clip"])
def test_features_of_texts(command, load, tmp_path, task):
    (tmp_path / "texts.txt").write_text("a dog\n\na red ball and two cars\n..\n")
    output = tmp_path / "texts.npy"
    code, _, err = command("embed", task, "--texts", tmp_path / "texts.txt", "--output", output)
    names, features, model = read(f"{output}.jsonl"), np.load(output), load(task)
    assert [record["text"] for record in names] == ["a dog", "a red ball and two cars", ".."]
    nothing_left = task == "retrieval"  # BLIP drops the dots
    assert code == nothing_left and ("error" in names[2]) == nothing_left
    for record in names[:2]:
        with torch.inference_mode():
            (exact,) = model.encode_text([model.processor.text(record["text"])]).features
        np.testing.assert_allclose(features[record["index"]], (exact / exact.norm()).numpy(), atol=1e-5)


def test_no_image_can_be_embedded(command, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    code, _, _ = command("embed", "clip", tmp_path / "a.png", "--output", tmp_path / "none.npy")
    assert code == 1 and len(np.load(tmp_path / "none.npy")) == 0


# ---- retrieval

QUERIES = ["a dog", "two red balls", "the moon and a house"]


def similarities(model, paths):
    """``[images, texts]``, image by image and text by text."""
    with torch.inference_mode():
        images = [model.encode_image(model.processor.image(path)[None]).features[0] for path in paths]
        texts = [model.encode_text([model.processor.text(text)]).features[0] for text in QUERIES]
    normal = [torch.nn.functional.normalize(torch.stack(features), dim=-1) for features in (images, texts)]
    return normal[0] @ normal[1].mT


def logits(model, paths):
    with torch.inference_mode():
        return torch.tensor(
            [
                [
                    model.match(
                        model.encode_image(model.processor.image(path)[None]).tokens,
                        [model.processor.text(text)],
                        [(0, 0)],
                    ).logits[0, 1]
                    for text in QUERIES
                ]
                for path in paths
            ]
        )


@pytest.fixture(scope="module")
def scores(load, photos):
    """Per task: similarities and (BLIP) logits ``[images, texts]``."""
    blip = load("retrieval")
    paths = files(photos)
    return {
        "clip": (similarities(load("clip"), paths), None),
        "retrieval": (similarities(blip, paths), logits(blip, paths)),
    }


@pytest.fixture
def queries(tmp_path):
    path = tmp_path / "queries.txt"
    path.write_text("\n".join(QUERIES))
    return path


def check_ranking(matches, names, similarity, logit, top, rerank):
    """Matches of one query are the best of all, the first `rerank` in the order of the classifier."""
    order = similarity.argsort(descending=True).tolist()
    again = sorted(order[:rerank], key=lambda n: -(logit[n] + similarity[n]).item())
    expected = [*again, *order[rerank:]][:top]
    assert [names.index(next(iter(match.values()))) for match in matches] == expected
    for match, number in zip(matches, expected, strict=True):
        assert match["similarity"] == pytest.approx(similarity[number].item(), abs=1e-4)
        assert ("match" in match) == (number in order[:rerank])
        if "match" in match:
            assert match["match"] == pytest.approx(logit[number].item(), abs=1e-3)


@pytest.mark.parametrize(
    "task, options, top, rerank",
    [
        ("clip", [], 10, 0),
        ("retrieval", [], 10, 12),
        ("retrieval", ["--top", "3"], 3, 12),
        ("retrieval", ["--top", "6", "--rerank", "4"], 6, 4),
        ("retrieval", ["--rerank", "0", "--top", "100"], 12, 0),
    ],
)
@pytest.mark.parametrize("direction", ["text-to-image", "image-to-text"])
def test_matches_are_those_of_pairwise_comparison(
    command, scores, photos, queries, task, options, top, rerank, direction
):
    options = ["--texts", queries, "--direction", direction, "--batch-size", "5", *options]
    code, out, err = command("retrieve", task, photos, *options)
    assert (code, err) == (0, "")
    similarity, logit = scores[task]
    paths, found = [str(path) for path in files(photos)], records(out)
    if direction == "text-to-image":
        similarity, logit = similarity.mT, None if logit is None else logit.mT
        assert [record["text"] for record in found] == QUERIES
        kind, names = "images", paths
    else:
        assert [record["image"] for record in found] == paths
        kind, names = "texts", QUERIES
    for n, record in enumerate(found):
        row_logits = None if logit is None else logit[n]
        count = min(top, len(names))
        check_ranking(record[kind], names, similarity[n], row_logits, count, min(rerank, len(names)))


@pytest.fixture
def encoded(monkeypatch):
    """How many images each call of the encoder was given."""
    counts, embed = [], predict.embed_images

    def counting(model, pixels):
        counts.append(len(pixels))
        return embed(model, pixels)

    monkeypatch.setattr(predict, "embed_images", counting)
    return counts


def test_the_index_is_reused_and_extended(command, photos, tmp_path, encoded):
    folder, index = tmp_path / "growing", tmp_path / "growing.index"
    shutil.copytree(photos / "part0", folder)

    def search():
        encoded.clear()
        options = ["--index", index, "--text", "a dog", "--rerank", "0"]
        code, out, err = command("retrieve", "retrieval", folder, *options)
        (record,) = records(out)
        return code, sum(encoded), record["images"], err

    code, count, first, err = search()
    assert (code, count, len(first)) == (0, 4, 4) and "4 of 4 images encoded anew" in err
    assert search()[1:3] == (0, first)
    # A new image, one that changed, one that is gone.
    spare = files(photos / "part1")
    shutil.copy(spare[0], folder / "new.jpg")
    gone, _, changed, *_ = files(folder)
    assert changed.suffix == ".ppm"  # other pixels in a file of the same size
    changed.write_bytes(changed.read_bytes()[:-300] + bytes(300))
    gone.unlink()
    code, count, found, _ = search()
    assert (code, count) == (0, 2)
    assert {match["image"] for match in found} == {str(path) for path in files(folder)}
    # What the index says is what a search without one says.
    _, out, _ = command("retrieve", "retrieval", folder, "--text", "a dog", "--rerank", "0")
    for ours, fresh in zip(found, records(out)[0]["images"], strict=True):
        assert ours["image"] == fresh["image"]
        assert ours["similarity"] == pytest.approx(fresh["similarity"], abs=1e-5)
    # An image that cannot be used is named, and tried again the next time.
    (folder / "damaged.png").write_bytes(b"no image")
    code, count, found, err = search()
    assert (code, count) == (1, 0) and "damaged.png: not an image" in err and len(found) == 4
    shutil.copy(spare[2], folder / "damaged.png")
    assert search()[:2] == (0, 1)


def test_an_interrupted_index_goes_on(command, photos, tmp_path, monkeypatch):
    embed, calls = predict.embed_images, []

    def interrupted(model, pixels):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(pixels)
        return embed(model, pixels)

    options = ["--index", tmp_path / "photos.index", "--text", "a dog", "--batch-size", "4", "--rerank", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(predict, "embed_images", interrupted)
        code, _, err = command("retrieve", "retrieval", photos, *options)
    assert code == 130 and "the index has what is done" in err
    (tmp_path / "photos.index/.unfinished/000001-npy").write_bytes(b"half")
    code, _, err = command("retrieve", "retrieval", photos, *options)
    assert code == 0 and "4 of 12 images encoded anew" in err
    code, _, err = command("retrieve", "retrieval", photos, *options)
    assert code == 0 and "0 of 12 images encoded anew" in err


def test_an_index_of_another_kind_is_refused(command, photos, tmp_path):
    index, foreign = tmp_path / "photos.index", tmp_path / "foreign.npy"
    command("retrieve", "retrieval", photos, "--index", index, "--text", "a dog")
    for task, options, reason in [
        ("clip", [], "task: retrieval then, clip now"),
        ("retrieval", ["--temperature", "3"], "temperature: 2.0 then, 3.0 now"),
    ]:
        code, _, err = command("retrieve", task, photos, "--index", index, "--text", "a dog", *options)
        assert code == 2 and reason in err and "name another index" in err
    np.save(foreign, np.zeros(3))
    before = foreign.read_bytes()
    code, _, err = command("retrieve", "retrieval", photos, "--index", foreign, "--text", "a dog")
    assert code == 2 and "an index is a folder" in err and foreign.read_bytes() == before


def test_an_image_that_cannot_be_asked_for_texts(command, photos, tmp_path, queries):
    folder = tmp_path / "mixed"
    shutil.copytree(photos / "part0", folder)
    (folder / "000a.png").write_bytes(b"no image")
    options = ["--texts", queries, "--direction", "image-to-text"]
    code, out, err = command("retrieve", "retrieval", folder, *options)
    found = records(out)
    assert code == 1 and "1 of 5 rows" in err and "not an image" in found[1]["error"]
    _, alone, _ = command("retrieve", "retrieval", files(folder)[-1], *options)
    for ours, fresh in zip(found[4]["texts"], records(alone)[0]["texts"], strict=True):
        assert ours["text"] == fresh["text"] and ours["match"] == pytest.approx(fresh["match"], abs=1e-4)


def test_images_of_a_file_are_searched(command, photos, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"image": str(path)}) + "\n\n" for path in files(photos)[:3]))
    options = ["--text", "a dog", "--text", "a cat"]
    _, out, _ = command("retrieve", "clip", "--input", source, *options)
    _, expected, _ = command("retrieve", "clip", *files(photos)[:3], *options)
    assert out == expected and len(records(out)) == 2
    source.write_text('{"image": "a.png"}\n\n{"picture": "b.png"}\n')
    code, _, err = command("retrieve", "clip", "--input", source, *options)
    assert code == 2 and "rows.jsonl, line 3: 'image' must be a path" in err


# ---- usage and errors


@pytest.mark.parametrize(
    "name, arguments, reason",
    [
        ("caption", ["absent/"], "absent/: no such file or folder"),
        ("caption", ["--input", "absent.jsonl"], "absent.jsonl"),
        ("vqa", ["{photo}", "--question", "?", "--answers", "absent.txt"], "absent.txt"),
        ("embed", ["--texts", "absent.txt", "--output", "x.npy"], "absent.txt"),
        ("embed", ["{photo}", "--output", "absent/x.npy"], "absent/x.npy"),
        ("retrieve", ["{photo}", "--text", "a", "--rerank", "-1"], "--rerank: expected at least 0"),
        ("retrieve", ["{photo}", "--text", "a", "--index", "absent/index"], "absent/index"),
        ("retrieve", ["{photo}", "--text", "a", "--index", "{photo}"], "an index is a folder"),
        ("retrieve", ["--index", "{photo}", "--text", "a"], "expected a folder, a .npy or a .safetensors file"),
        (
            "caption",
            ["{photo}", "--output", "new/", "--format", "parquet"],
            "error: parquet needs pyarrow (pip install",
        ),
    ],
)
def test_errors_are_one_line_and_code_2(command, photos, monkeypatch, name, arguments, reason):
    monkeypatch.setattr(madtp, "load", None)  # found out before
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    task = {"embed": "retrieval", "retrieve": "retrieval"}.get(name, name)
    arguments = [argument.format(photo=files(photos)[0]) for argument in arguments]
    code, _, err = command(name, task, *arguments)
    assert code == 2 and err.startswith("madtp: error: ") and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize(
    "name, task, reason",
    [
        ("caption", "vqa", "holds a model for task 'vqa', not 'caption'"),
        ("embed", "caption", "holds a model for task 'caption', not 'retrieval' or 'clip'"),
        ("retrieve", "vqa", "not 'retrieval' or 'clip'"),
    ],
)
def test_a_model_for_another_task(command, photos, tmp_path, name, task, reason):
    more = {"embed": ["--output", tmp_path / "x.npy"], "retrieve": ["--text", "a"]}.get(name, [])
    code, _, err = command(name, task, photos, *more)
    assert code == 2 and reason in err


def test_clip_has_no_classifier(command, photos):
    code, _, err = command("retrieve", "clip", photos, "--text", "a dog", "--rerank", "5")
    assert code == 2 and "CLIP has no classifier" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption"],
        ["caption", "a.jpg", "--input", "rows.jsonl"],
        ["caption", "a.jpg", "--sample", "--num-beams", "2"],
        ["caption", "a.jpg", "--sample", "--num-beams", "3"],
        ["caption", "a.jpg", "--top-p", "0.9"],
        ["caption", "a.jpg", "--seed", "0"],
        ["caption", "a.jpg", "--max-length", "9", "--min-length", "10"],
        ["vqa", "a.jpg", "--question", "?", "--top-k", "128"],
        ["vqa", "a.jpg", "--question", "?", "--answers", "a.txt", "--num-beams", "3"],
        ["vqa", "a.jpg", "--question", "?", "--answers", "a.txt", "--max-length", "10"],
        ["caption", "a.jpg", "--grouping", "pair"],
        ["vqa", "a.jpg"],
        ["vqa", "a.jpg", "--input", "rows.jsonl"],
        ["embed", "a.jpg"],
        ["embed", "a.jpg", "--output", "a.txt"],
        ["embed", "a.jpg", "--texts", "t.txt", "--output", "a.npy"],
        ["retrieve", "a.jpg"],
        ["retrieve", "a.jpg", "--text", "a", "--texts", "t.txt"],
        ["retrieve", "a.jpg", "--text", "a", "--save-overlay", "drawn/"],
    ],
)
def test_wrong_usage_ends_with_code_2(arguments, photos, capsys):
    """Options that the others make useless are named, too."""
    options = [argument for argument in arguments if argument.startswith("--")]
    arguments = [str(files(photos)[0]) if argument == "a.jpg" else argument for argument in arguments]
    with pytest.raises(SystemExit) as exit:
        cli.main([*arguments, "--model", "absent"])
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert "--help shows the options" in message and (not options or any(option in message for option in options))


@pytest.mark.parametrize("name", ["caption", "vqa", "embed", "retrieve"])
def test_help_has_examples(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    assert len(re.findall(rf"^  madtp {name} --model", capsys.readouterr().out, flags=re.M)) >= 3


# ---- interruptions


def test_a_stopped_run_goes_on_only_with_the_same_options(command, photos, tmp_path, monkeypatch):
    caption, calls = CaptionTask.answer, []

    def interrupted(*arguments, **options):
        calls.append(options)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return caption(*arguments, **options)

    fixed = [photos, "--output", tmp_path / "out.jsonl", "--batch-size", "4", "--max-length", "9"]
    with monkeypatch.context() as patch:
        patch.setattr(CaptionTask, "answer", interrupted)
        code, _, err = command("caption", "caption", *fixed)
    assert code == 130 and err == "madtp: interrupted; the same command goes on from here\n"
    for options, reason in [
        (["--dtype", "bfloat16"], "dtype: float32 then, bfloat16 now"),
        (["--num-beams", "2"], "num_beams: 3 then, 2 now"),
        (["--max-length", "10"], "max_length: 9 then, 10 now"),
        (["--sample"], "top_p: None then, 0.9 now"),
        (["--grouping", "batch"], "grouping: instance then, batch now"),
        (["--dense"], "temperature: 2.0 then, 0.0 now"),
    ]:
        code, _, err = command("caption", "caption", *fixed, *options)
        assert code == 2 and reason in err
    code, out, _ = command("caption", "caption", *fixed)
    assert code == 0 and "12 rows (4 of them from an earlier run)" in out


def test_a_stopped_run_that_samples_ends_as_one_that_was_not(command, photos, tmp_path, monkeypatch):
    """Each row has random numbers of its own, wherever it is answered."""
    caption, outputs = CaptionTask.answer, [tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"]
    fixed = [photos, "--batch-size", "4", "--sample", "--top-p", "1"]
    assert command("caption", "caption", *fixed, "--output", outputs[0])[0] == 0
    for stop in (2, 1):  # after the first batch, and after the second
        calls = []

        def interrupted(*arguments, calls=calls, stop=stop, **options):
            calls.append(options)
            if len(calls) == stop:
                raise KeyboardInterrupt
            torch.randn(7)  # the global random numbers are no part of it
            return caption(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(CaptionTask, "answer", interrupted)
            assert command("caption", "caption", *fixed, "--output", outputs[1])[0] == 130
    code, out, _ = command("caption", "caption", *fixed, "--output", outputs[1])
    assert code == 0 and "12 rows (4 of them from an earlier run)" in out
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert len({record["caption"] for record in read(outputs[0])}) == 12


PICTURES = 80
RUNS = {"caption": ("caption", "all.jsonl"), "embed": ("clip", "all.npy")}


def long_run(name, album, where):
    """Arguments of a run over the album, of which the output goes to a folder."""
    where.mkdir()
    options = ["--max-length", "7", "--num-beams", "2"] if name == "caption" else []
    return [str(album), "--output", str(where / RUNS[name][1]), "--batch-size", "8", *options]


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """PICTURES files of mixed sizes and formats, some of them damaged."""
    folder = save_pictures(tmp_path_factory.mktemp("album"), PICTURES)
    for path in [path for path in files(folder) if path.suffix == ".png"][3::7]:
        path.write_bytes(path.read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def whole(album, models, tmp_path_factory):
    """Output folders of runs that nothing interrupted."""
    folders = {}
    for name, (task, _) in RUNS.items():
        folders[name] = tmp_path_factory.mktemp("whole") / name
        model = ["--model", str(models / task), *REFERENCE]
        assert cli.main([name, *model, *long_run(name, album, folders[name])]) == 1
    return folders


@pytest.mark.parametrize("signal_number, exit_code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_ends_as_one_that_was_not(
    command, fresh_command, models, album, whole, tmp_path, name, signal_number, exit_code
):
    task, output = RUNS[name]
    stopped = tmp_path / "stopped"
    arguments = long_run(name, album, stopped)
    child = fresh_command.start(COMMAND, name, "--model", models / task, *REFERENCE, *arguments)
    partial = stopped / f"{output}.partial"
    deadline = time.monotonic() + 180
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 20):
        assert child.returncode is None and time.monotonic() < deadline, child.stderr
        time.sleep(0.005)
    child.send_signal(signal_number)
    assert child.wait(180) == exit_code and "Traceback" not in child.stderr and not (stopped / output).exists()
    done = partial.read_bytes().count(b"\n") - 1

    code, out, err = command(name, task, *arguments)
    assert code == 1 and re.search(rf"[2-9] of {PICTURES} rows could not be answered", err)
    resumed = int(re.search(rf"{PICTURES} rows \((\d+) of them from an earlier run\)", out)[1])
    assert 16 <= resumed <= done < PICTURES and resumed % 8 == 0
    assert [path.name for path in files(stopped)] == [path.name for path in files(whole[name])]
    for ours, theirs in zip(files(stopped), files(whole[name]), strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours.name
    names = read(stopped / (output if name == "caption" else f"{output}.jsonl"))
    assert [record["image"] for record in names] == [str(path) for path in files(album)]
