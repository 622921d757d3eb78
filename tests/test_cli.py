"""The `madtp` command on the bundled model: what it prints, writes, refuses, how it goes on after a stop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import madtp
from madtp import cli, predict

DATA = Path(madtp.__file__).parent / "data" / "demo"
LEFT, RIGHT = str(DATA / "night.png"), str(DATA / "table.png")
TEXT = "Both images show the moon."
# The kernels have their own tests; the reference needs no compiler and no GPU.
MODEL = ["--model", "demo", "--backend", "reference"]


@pytest.fixture
def madtp_command(capsys):
    def command(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def model():
    return madtp.load("demo", backend="reference")


def pairs_file(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- help and usage


@pytest.mark.parametrize(
    "command, mentioned", [([], "madtp demo"), (["nlvr"], "pairs.jsonl"), (["demo"], "--output-dir")]
)
def test_help(command, mentioned, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    assert exit.value.code == 0
    assert mentioned in capsys.readouterr().out


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "madtp", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "nlvr" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["nlvr", "--images", LEFT, RIGHT, "--text", TEXT],
        ["nlvr", *MODEL],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT],
        ["nlvr", *MODEL, "--input", "pairs.jsonl"],
        [
            "nlvr",
            *MODEL,
            "--images",
            LEFT,
            RIGHT,
            "--text",
            TEXT,
            "--input",
            "pairs.jsonl",
            "--output",
            "a.jsonl",
        ],
        ["nlvr", *MODEL, "--input", "pairs.jsonl", "--output", "a.jsonl", "--save-overlay", "a.png"],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--dense", "--temperature", "2"],
        ["nlvr", *MODEL, "--input", "pairs.jsonl", "--output", "a.jsonl", "--batch-size", "0"],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--dtype", "int8"],
    ],
)
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


# ---- one pair


def test_one_pair(madtp_command, model, tmp_path):
    overlay = tmp_path / "overlay.png"
    code, out, err = madtp_command(
        "nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--save-overlay", overlay
    )
    (expected,) = predict.nlvr(model, [(LEFT, RIGHT, TEXT)])
    assert code == 0 and err == ""
    assert re.search(
        rf"answer +{expected.answer} +\(probability of True: {expected.probability_true:.3f}\)", out
    )
    for name in ("left", "right", "text"):
        tokens = getattr(expected, f"{name}_tokens")
        assert re.search(rf"{name}.* {tokens[0]} tokens, {tokens[-1]} after", out) and str(tokens) in out
    assert re.search(rf"GFLOPs +{expected.flops.official:.4g} +\(dense: 0.0\d+\)", out)
    assert re.search(r"time +[\d.]+ ms", out)
    assert 0.1 < float(re.search(r"peak memory +([\d.]+) GiB", out)[1]) < 100
    with Image.open(overlay) as picture:
        assert picture.height > 2 * 200 and picture.width > 4 * 200


def test_dense_keeps_every_token(madtp_command):
    _, pruned, _ = madtp_command("nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT)
    for option in (["--dense"], ["--temperature", "0"]):
        _, dense, _ = madtp_command("nlvr", *MODEL, *option, "--images", LEFT, RIGHT, "--text", TEXT)
        assert str([37] * 4) in dense and str([37] * 4) not in pruned


def test_grouping_ties_the_two_images(madtp_command):
    _, out, _ = madtp_command("nlvr", *MODEL, "--grouping", "pair", "--images", LEFT, RIGHT, "--text", TEXT)
    left, right = re.findall(r"image .*layers: (\[.*\])", out)
    assert left == right


def test_bfloat16(madtp_command):
    code, out, _ = madtp_command(
        "nlvr", *MODEL, "--dtype", "bfloat16", "--images", LEFT, RIGHT, "--text", TEXT
    )
    assert code == 0 and "probability of True" in out


@pytest.mark.parametrize(
    "replaced, reason",
    [
        ({"--images": ["absent.jpg", RIGHT]}, "absent.jpg: No such file"),
        ({"--images": [LEFT, __file__]}, "test_cli.py: not an image"),
        ({"--text": ["  .. "]}, "text is empty"),
        ({"--text": ["zyx " * 30]}, "at most 64"),
        ({"--model": ["absent.pth"]}, "absent.pth: no such file"),
        ({"--temperature": ["-1"]}, "temperature: expected"),
        ({"--temperature": ["nan"]}, "temperature: expected"),
        ({"--tokenizer": ["/absent/vocabulary"]}, "/absent/vocabulary"),
        ({"--device": ["nowhere"]}, "nowhere"),
        ({"--save-overlay": ["/absent/folder/overlay.png"]}, "/absent/folder"),
        ({"--save-overlay": ["overlay.xyz"]}, "xyz"),
    ],
)
def test_errors_are_one_line_and_code_2(madtp_command, replaced, reason):
    options = {
        "--images": [LEFT, RIGHT],
        "--text": [TEXT],
        "--model": ["demo"],
        "--backend": ["reference"],
        **replaced,
    }
    arguments = [part for option, values in options.items() for part in (option, *values)]
    code, _, err = madtp_command("nlvr", *arguments)
    assert code == 2
    assert err.startswith("madtp: error: ") and err.count("\n") == 1 and reason in err


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="absent.jpg"):
        cli.main(["nlvr", *MODEL, "--debug", "--images", "absent.jpg", RIGHT, "--text", TEXT])


# ---- many pairs


def test_answers_to_a_file_of_pairs(madtp_command, model, tmp_path):
    rows = read(DATA / "pairs.jsonl")
    for batch_size in (1, 4):
        output = tmp_path / f"answers{batch_size}.jsonl"
        code, out, err = madtp_command(
            "nlvr", *MODEL, "--input", DATA / "pairs.jsonl", "--output", output, "--batch-size", batch_size
        )
        assert (code, err) == (0, "") and f"{len(rows)} rows in {output}" in out
        expected = predict.nlvr(
            model, [(*(DATA / name for name in row["images"]), row["text"]) for row in rows]
        )
        records = read(output)
        assert [record["row"] for record in records] == list(range(1, len(rows) + 1))
        for record, answer in zip(records, expected, strict=True):
            assert record["answer"] is answer.answer
            assert record["probability_true"] == pytest.approx(answer.probability_true, abs=1e-5)
            assert record["left_tokens"] == answer.left_tokens and record["text_tokens"] == answer.text_tokens
            assert record["gflops"] == pytest.approx(answer.flops.official, abs=1e-6)


def test_bad_rows_are_reported_and_do_not_stop_the_run(madtp_command, tmp_path):
    (tmp_path / "broken.jpg").write_bytes((DATA / "meadow.jpg").read_bytes()[:5000])
    Image.open(LEFT).save(tmp_path / "beside.png")
    good = {"images": ["beside.png", RIGHT], "sentence": TEXT, "identifier": "dev-1-0"}
    bad = [
        ({"images": ["absent.jpg", RIGHT], "text": TEXT}, "absent.jpg: No such file"),
        ({"images": [LEFT, "broken.jpg"], "text": TEXT}, "broken.jpg: damaged image"),
        ({"images": [LEFT], "text": TEXT}, "list of two paths"),
        ({"images": [LEFT, 7], "text": TEXT}, "list of two paths"),
        ({"text": TEXT}, "list of two paths"),
        ({"images": [LEFT, RIGHT]}, "'text' (or 'sentence') is missing"),
        ({"images": [LEFT, RIGHT], "text": 5}, "text must be a string"),
        ({"images": [LEFT, RIGHT], "text": "!!"}, "text is empty"),
        ('{"images": [', "not JSON"),
        ("[]", "JSON object"),
    ]
    source = pairs_file(tmp_path / "pairs.jsonl", [good, *(row for row, _ in bad), good])
    output = tmp_path / "answers.jsonl"
    code, out, err = madtp_command("nlvr", *MODEL, "--input", source, "--output", output, "--batch-size", "3")
    assert code == 1 and "12 rows" in out and "10 of 12 rows could not be answered" in err
    records = read(output)
    assert "answer" in records[0] and "answer" in records[-1]
    assert {**records[0], "row": 12} == records[-1]
    for n, (record, (_, reason)) in enumerate(zip(records[1:-1], bad, strict=True), 2):
        assert record["row"] == n and set(record) == {"row", "error"} and reason in record["error"]
        assert re.search(rf"row {n}: .*{re.escape(reason)}", err)


def test_an_unfinished_run_with_other_settings_is_not_continued(madtp_command, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    arguments = ["nlvr", *MODEL, "--input", DATA / "pairs.jsonl", "--output", output, "--batch-size", "2"]
    batches, answer = [], predict.nlvr_batch

    def interrupted(model, instances):
        batches.append(instances)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(model, instances)

    monkeypatch.setattr(predict, "nlvr_batch", interrupted)
    code, _, err = madtp_command(*arguments)
    assert code == 130 and "interrupted" in err and not output.exists()
    code, _, err = madtp_command(*arguments, "--temperature", "7")
    assert code == 2 and "temperature: 2.0 then, 7.0 now" in err
    code, out, _ = madtp_command(*arguments)
    assert code == 0 and "6 rows (2 of them from an earlier run)" in out
    code, _, err = madtp_command(*arguments)
    assert code == 2 and "exists already" in err
    code, out, _ = madtp_command(*arguments, "--overwrite")
    assert code == 0 and "6 rows in" in out


@pytest.mark.parametrize(
    "signal_number, exit_code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_a_killed_run_goes_on(madtp_command, tmp_path, signal_number, exit_code):
    row = {"images": [LEFT, RIGHT], "text": TEXT}
    rows = [{**row, "text": f"{n} dogs"} if n % 10 else "{" for n in range(1, 101)]
    source = pairs_file(tmp_path / "pairs.jsonl", rows)
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    arguments = ["nlvr", *MODEL, "--input", str(source), "--output", str(output), "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "madtp", *arguments],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background leaves SIGINT ignored, and commands inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 10):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal_number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == exit_code and "Traceback" not in err
    assert not output.exists()
    done = partial.read_bytes().count(b"\n") - 1

    code, out, _ = madtp_command(*arguments)
    assert code == 1 and "100 rows (" in out
    resumed = int(re.search(r"\((\d+) of them", out)[1])
    assert 10 <= resumed <= done
    records = read(output)
    assert [record["row"] for record in records] == list(range(1, 101))
    assert [n for n, record in enumerate(records, 1) if "error" in record] == list(range(10, 101, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "pairs.jsonl"]


# ---- demo and info


def test_demo(madtp_command, model, tmp_path):
    code, out, err = madtp_command("demo", "--backend", "reference", "--output-dir", tmp_path / "demo")
    assert (code, err) == (0, "")
    assert "untrained" in out and "mean nothing" in out
    rows = read(DATA / "pairs.jsonl")
    answers = predict.nlvr(model, [(*(DATA / name for name in row["images"]), row["text"]) for row in rows])
    for row, answer in zip(rows, answers, strict=True):
        assert row["text"] in out
        assert f"{answer.answer!s:6}{answer.probability_true:.2f}" in out
    layers = re.findall(r"after layer \d+ +(\d+) / ([\d.]+) / (\d+)", out)
    assert len(layers) == model.config.text.num_hidden_layers
    last = [tokens for answer in answers for tokens in (answer.left_tokens[-1], answer.right_tokens[-1])]
    assert layers[2] == (str(min(last)), f"{sum(last) / len(last):.1f}", str(max(last)))
    dense, pruned, ratio = (
        float(x) for x in re.search(r"GFLOPs per pair +(\S+) +(\S+) +(\S+)x", out).groups()
    )
    assert pruned < dense and ratio == pytest.approx(dense / pruned, abs=0.01)
    assert re.search(r"time per pair +\S+ ms +\S+ ms +\S+x", out)
    with Image.open(tmp_path / "demo" / "overlay.png") as picture:
        assert picture.height > 2 * 200


def test_demo_of_a_model_without_a_temperature_asks_for_one(madtp_command, tmp_path):
    weights, config = tmp_path / "model", json.loads((DATA / "config.json").read_text())
    weights.mkdir()
    (weights / "model.safetensors").write_bytes((DATA / "model.safetensors").read_bytes())
    (weights / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "temperature"}))
    options = ["--model", weights, "--tokenizer", "demo", "--output-dir", tmp_path / "demo"]
    code, _, err = madtp_command("demo", *options)
    assert code == 2 and "--temperature 5" in err
    code, out, _ = madtp_command("demo", *options, "--temperature", "5", "--backend", "reference")
    assert code == 0 and "T=5" in out and "untrained" not in out


def test_info():
    # In a process of its own: what it finds out about the extension is kept for the life of a process.
    environment = {**os.environ, "MADTP_KERNELS_BUILD": "0"}
    for options in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-m", "madtp", "info", *options], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0
        for word in ("torch", "reference", "triton"):
            assert word in done.stdout
    assert set(json.loads(done.stdout)["backends"]) == {"cpu", "cuda"}
