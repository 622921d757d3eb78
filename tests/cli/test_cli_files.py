"""What commands read and write: pipes, "-", devices, a closed standard output, any locale; and what they leave alone."""

import io
import json
import logging
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from small_models import CONFIGS
from test_cli_batch import files, records, save_pictures

import madtp
from madtp import cli
from madtp.cli.demo import Demo
from madtp.cli.options import check_device
from madtp.options import parsed

SHORT = ["--max-length", "6", "--num-beams", "1"]


@pytest.fixture(scope="module")
def loaded():
    """A model of each task with random weights, made once."""
    options = {"temperature": 2.0, "backend": "reference"}
    return {task: madtp.load("random:base", config=config, **options) for task, config in CONFIGS.items()}


@pytest.fixture
def command(capsys, caplog, loaded, monkeypatch):
    """Runs a subcommand on the model of a task, in this process: exit code, what it printed, its errors."""

    def run(name, task, *arguments, temperature=None):
        model = loaded[task]
        monkeypatch.setattr(madtp, "load", lambda *_, **__: model)
        monkeypatch.setattr(model, "temperature", 2.0 if temperature is None else temperature)
        caplog.clear()
        code = cli.main([name, "--model", task, *map(str, arguments)])
        captured = capsys.readouterr()
        # While tests run, pytest takes what is logged.
        notes = "".join(f"madtp: {record.getMessage()}\n" for record in caplog.records if record.name == "madtp")
        return code, captured.out, captured.err + notes

    return run


@pytest.fixture
def photos(tmp_path):
    return save_pictures(tmp_path / "photos", 2, seed=1)


# ---- rows in, records out


def test_rows_come_from_standard_input_and_go_where_a_device_takes_them(command, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    names = [str(path.relative_to(photos)) for path in files(photos)]
    rows = "".join(json.dumps({"id": n, "image": name}) + "\n" for n, name in enumerate(names)).encode()

    def piped(*options):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows)))
        return command("caption", "caption", "--input", "-", *SHORT, *options)

    code, out, err = piped("--output", "-")
    assert (code, err) == (0, "")
    assert [(record["id"], record["image"]) for record in records(out)] == list(enumerate(names))
    output = tmp_path / "out.jsonl"
    assert piped("--output", output)[:2] == (0, f"2 rows in {output}\n") and output.read_text() == out
    assert piped("--output", "/dev/null", "--overwrite")[0] == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not os.path.exists("/dev/null.partial")
    code, _, err = piped("--output", "/dev/full")
    assert code == 2 and "No space left" in err


def test_an_output_behind_a_link_is_written_there(command, photos, tmp_path):
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    target.write_text("old")
    link.symlink_to(target)
    image = files(photos)[0]
    assert command("caption", "caption", image, *SHORT, "--output", link)[0] == 2
    assert command("caption", "caption", image, *SHORT, "--output", link, "--overwrite")[0] == 0
    assert link.is_symlink() and records(target.read_text())[0]["image"] == str(image)


def test_records_are_utf_8_whatever_the_locale(command, photos, monkeypatch):
    names = [files(photos)[0].with_name(f"{name}.png") for name in ("é", "日本")]
    for name in names:
        Image.new("RGB", (9, 9)).save(name)
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert command("caption", "caption", *names, *SHORT)[0] == 0
    assert [record["image"] for record in records(out.buffer.getvalue().decode())] == [str(name) for name in names]


def test_a_standard_output_that_takes_text_only(command, photos, monkeypatch):
    """As a notebook's, in which `madtp.cli.main` may be called."""
    out = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert command("caption", "caption", files(photos)[0], *SHORT) == (0, "", "")
    assert [record["image"] for record in records(out.getvalue())] == [str(files(photos)[0])]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_no_rows_are_no_success(command, tmp_path, content):
    (tmp_path / "rows.jsonl").write_text(content)
    for output in ([], ["--output", tmp_path / "out.jsonl"]):
        code, _, err = command("caption", "caption", "--input", tmp_path / "rows.jsonl", *SHORT, *output)
        assert (code, err) == (2, "madtp: error: no rows in the input\n")


def test_a_closed_standard_output_is_named(command, photos, tmp_path, monkeypatch, capsys):
    image = files(photos)[0]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert command("caption", "caption", image, *SHORT)[0] == 2
        assert command("caption", "caption", image, *SHORT, "--output", tmp_path / "out.jsonl")[0] == 0
    assert len(records((tmp_path / "out.jsonl").read_text())) == 1
    command = [sys.executable, "-m", "madtp", "caption"]
    done = subprocess.run(command, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


def test_quiet(command, caplog, photos, tmp_path):
    options = ["--output", tmp_path / "out.jsonl", "--quiet"]
    with caplog.at_level(logging.WARNING, logger="madtp"):  # and restored afterwards
        assert command("caption", "caption", photos, *SHORT, *options, temperature=0.0) == (0, "", "")


def test_a_model_without_a_temperature_says_so(command, photos):
    code, _, err = command("caption", "caption", files(photos)[0], *SHORT, temperature=0.0)
    assert code == 0 and err == (
        "madtp: caption has no pruning temperature, so nothing is pruned: give --temperature, "
        "or see `madtp compress` and `madtp calibrate`\n"
    )
    assert command("caption", "caption", files(photos)[0], *SHORT, "--dense", temperature=0.0)[2] == ""


# ---- overlays and inputs are left alone


def test_nothing_is_drawn_over(command, photos, tmp_path):
    image, drawn = files(photos)[0], tmp_path / "drawn"
    before = image.read_bytes()
    for place, reason in (
        (image, "this command reads it"),
        (image.parent, "the pictures themselves"),
        ("x.xyz", "no format of pictures that can be written"),
        ("/absent/a.png", "no folder"),
    ):
        code, _, err = command("caption", "caption", image, *SHORT, "--save-overlay", place, "--overwrite")
        assert code == 2 and reason in err and not os.path.exists("x.xyz")
    assert image.read_bytes() == before
    assert command("caption", "caption", photos, *SHORT, "--save-overlay", drawn)[0] == 0
    code, _, err = command("caption", "caption", photos, *SHORT, "--save-overlay", drawn)
    assert code == 2 and "is not empty" in err
    assert command("caption", "caption", photos, *SHORT, "--save-overlay", f"{drawn}.d/")[0] == 0
    assert len(files(drawn)) == len(files(tmp_path / "drawn.d")) == 2


def test_the_names_beside_features_are_not_overwritten_either(command, photos, tmp_path):
    (tmp_path / "x.npy.jsonl").write_text("precious")
    code, _, err = command("embed", "clip", photos, "--output", tmp_path / "x.npy")
    assert code == 2 and "x.npy.jsonl exists already" in err
    assert command("embed", "clip", photos, "--output", tmp_path / "x.npy", "--overwrite")[0] == 0


def test_names_in_dev_are_not_files_in_dev(command, photos, tmp_path, monkeypatch):
    """Standard input may be a file; its rows are not relative to /dev."""
    monkeypatch.chdir(photos)
    name = str(files(photos)[0].relative_to(photos))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": name}))
    with open(tmp_path / "rows.jsonl") as rows, open(tmp_path / "out.jsonl", "w") as out:
        place = f"/dev/fd/{rows.fileno()}", f"/dev/fd/{out.fileno()}"
        assert command("caption", "caption", "--input", place[0], "--output", place[1], *SHORT)[:2] == (0, "")
    assert records((tmp_path / "out.jsonl").read_text())[0]["image"] == name


def test_an_output_is_never_an_input(command, photos, tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"image": str(files(photos)[0])}))
    code, _, err = command("caption", "caption", "--input", source, "--output", source, "--overwrite")
    assert code == 2 and "this command reads it" in err and "image" in source.read_text()


@pytest.mark.parametrize("name", [".", "absent/out.jsonl"])
def test_an_output_that_cannot_be_written_is_found_out_first(photos, tmp_path, monkeypatch, name):
    monkeypatch.setattr(madtp, "load", None)
    assert cli.main(["caption", "--model", "x", str(photos), "--output", str(tmp_path / name)]) == 2


# ---- texts


def test_a_list_of_answers_in_json_is_one_in_lines(command, photos, tmp_path):
    answers = ["yes", "no", "a dog"]
    (tmp_path / "list.json").write_text(json.dumps(answers))
    (tmp_path / "list.txt").write_text("\n".join(answers))
    outs = [
        command("vqa", "vqa", photos, "--question", "what is it?", "--answers", tmp_path / name)[1]
        for name in ("list.json", "list.txt")
    ]
    assert outs[0] == outs[1] and {record["answer"] for record in records(outs[0])} <= set(answers)


def test_questions_are_in_the_records_and_what_is_none_is_named(command, photos, tmp_path):
    image = str(files(photos)[0])
    rows = [{"image": image, **more} for more in ({"answer": "mine"}, {"question": None}, {"question": "why?"})]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = command("vqa", "vqa", "--input", tmp_path / "rows.jsonl", "--question", "what?", "--num-beams", "1")
    first, second, third = records(out)
    assert code == 1 and (first["question"], third["question"]) == ("what?", "why?")
    assert first["input"] == {"answer": "mine"} and first["answer"] != "mine"
    assert second["error"] == "'question' must be a string, got null"


@pytest.mark.parametrize("task", ["vqa", "retrieval", "clip"])
def test_a_text_that_is_not_read_to_its_end_is_marked(command, photos, tmp_path, task):
    """In one way, whatever the model."""
    (tmp_path / "texts.txt").write_text("a dog\n" + "a dog and " * 500)
    if task == "vqa":
        questions = (tmp_path / "texts.txt").read_text().split("\n")
        rows = [{"image": str(files(photos)[0]), "question": question} for question in questions]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, out, err = command("vqa", "vqa", "--input", tmp_path / "rows.jsonl", "--num-beams", "1")
    else:
        code, _, err = command("embed", task, "--texts", tmp_path / "texts.txt", "--output", tmp_path / "out.npy")
        out = (tmp_path / "out.npy.jsonl").read_text()
    assert code == 0 and [record.get("truncated") for record in records(out)] == [None, True]
    assert "1 texts were not read to their end" in err


# ---- indexes


@pytest.fixture
def index(command, photos, tmp_path):
    path = tmp_path / "photos.index"
    assert command("retrieve", "retrieval", photos, "--index", path, "--text", "a dog", "--rerank", "0")[0] == 0
    return path


def test_an_index_is_searched_without_its_pictures(command, photos, index):
    _, expected, _ = command("retrieve", "retrieval", photos, "--text", "a dog", "--rerank", "0")
    for path in files(photos):
        path.unlink()
    before = {path: path.read_bytes() for path in files(index)}
    code, out, err = command("retrieve", "retrieval", "--index", index, "--text", "a dog")
    assert (code, err) == (0, "") and {path: path.read_bytes() for path in files(index)} == before
    assert records(out)[0]["images"] == records(expected)[0]["images"]
    code, out, _ = command("retrieve", "retrieval", "--index", index, "--text", "a dog", "--direction", "image-to-text")
    assert code == 0 and len(records(out)) == 2
    code, _, err = command("retrieve", "retrieval", "--index", f"{index}.absent", "--text", "a dog")
    assert code == 2 and "no such index" in err and not os.path.exists(f"{index}.absent")


@pytest.mark.parametrize("damage", ["nan", "zero", "names", "cut"])
def test_damaged_vectors_of_an_index_count_for_nothing(command, photos, index, damage):
    _, expected, _ = command("retrieve", "retrieval", photos, "--text", "a dog", "--rerank", "0")
    vectors, names = index / "img_emb/img_emb_000000.npy", index / "metadata/metadata_000000.jsonl"
    array = np.load(vectors)
    if damage in ("nan", "zero"):
        array[1] = np.nan if damage == "nan" else 0
        np.save(vectors, array)
    elif damage == "names":
        names.write_bytes(names.read_bytes().splitlines()[0] + b"\n")
    else:
        vectors.write_bytes(vectors.read_bytes()[:-20])
    code, out, err = command("retrieve", "retrieval", photos, "--index", index, "--text", "a dog", "--rerank", "0")
    assert code == 0 and out == expected
    one = damage in ("nan", "zero")
    assert ("1 damaged vectors are left out" if one else "img_emb_000000.npy is left out") in err
    assert f"{1 if one else 2} of 2 images encoded anew" in err


def test_an_index_of_another_dictionary_is_not_used(command, photos, index, loaded, monkeypatch):
    """Whatever a result depends on is in its header, named or drawn."""
    changed = loaded["retrieval"].space_dict.detach().clone()
    monkeypatch.setattr(loaded["retrieval"].space_dict, "data", changed + 1)
    code, _, err = command("retrieve", "retrieval", photos, "--index", index, "--text", "a dog")
    assert code == 2 and "fingerprint: sha256" in err


# ---- options


def test_devices_that_are_not_there(monkeypatch):
    check_device("cpu")
    check_device("cpu:0")
    for name, reason in (
        ("cuda:99", "no such GPU"),
        ("nowhere", "expected cpu"),
        ("meta", "expected"),
        ("", "expected"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_device(name)


def test_the_demo_repeats_its_options():
    def given(arguments):
        return parsed(Demo, cli.parser().parse_args(arguments))._given()

    assert given(["demo"]) == []
    options = ["--temperature", "8.0", "--dtype", "bfloat16", "--grouping", "pair"]
    assert given(["demo", *options, "--pairs", "3"]) == options
