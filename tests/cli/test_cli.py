"""`madtp nlvr`, `demo` and `info`: what they print, write, refuse, how a run goes on after a stop."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fresh import COMMAND
from PIL import Image

import madtp
from madtp import NLVRConfig, TextConfig, VisionConfig, cli, predict
from madtp.cli import demo
from madtp.data.synthetic import TEMPLATES, Shapes
from madtp.tasks.nlvr import NLVRTask

SIZES = NLVRConfig(
    VisionConfig(96, 16, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2, sd_num=12, sd_dim=64),
    TextConfig(64, 8, 4, 128, vocab_size=200, max_position_embeddings=64, encoder_width=64),
    merge_from=6,
)
TEXT = "Both images show the moon."
TEXTS = [
    "The right image contains twice as many houses as the left image.",
    "One image shows a red car, and both images show a tree.",
    "There are exactly three balls in the right image.",
    TEXT,
    "The left image shows the sun and the right image shows a boat under the moon.",
    "No image contains a cup.",
]
LEFT, RIGHT, PAIRS = "left.png", "right.png", "pairs.jsonl"  # in the folder that `small` makes, like the model
# The kernels have their own tests; the reference needs no compiler and no GPU.
MODEL = ["--model", "model", "--backend", "reference"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a small model with random weights, a pair of pictures, and statements about it."""
    folder = tmp_path_factory.mktemp("small")
    madtp.save_pretrained(madtp.load("random:base", config=SIZES, temperature=2.0), folder / "model")
    for name, image in zip((LEFT, RIGHT), Shapes("test").pair(0).images, strict=True):
        Image.fromarray(image).resize((640, 480)).save(folder / name)
    pairs_file(folder / PAIRS, [{"images": [LEFT, RIGHT], "text": text} for text in TEXTS])
    return folder


@pytest.fixture(autouse=True)
def here(small, monkeypatch):
    """Commands run in that folder."""
    monkeypatch.chdir(small)


@pytest.fixture
def madtp_command(capsys):
    def command(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def model(small):
    return madtp.load(small / "model", backend="reference")


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


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"madtp {madtp.__version__}\n"


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
        ["nlvr", *MODEL, "--text", TEXT, "--input", "pairs.jsonl"],
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
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--dense", "--temperature", "2"],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--strength", "2", "--temperature", "2"],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--method", "nonsense"],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--method", "topk", "--temperature", "2"],
        ["nlvr", *MODEL, "--input", "pairs.jsonl", "--output", "a.jsonl", "--batch-size", "0"],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--dtype", "int8"],
        ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--no-such-option", "1"],
    ],
)
def test_wrong_usage_ends_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    err = capsys.readouterr().err
    command = "madtp nlvr" if arguments[:1] == ["nlvr"] else "madtp"
    assert err.startswith(f"{command}: error: ") and err.endswith(f" ({command} --help shows the options)\n")
    assert err.count("\n") == 1


# ---- one pair


def test_one_pair(madtp_command, model, tmp_path):
    overlay = tmp_path / "overlay.png"
    arguments = ["nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, "--save-overlay", overlay]
    code, out, err = madtp_command(*arguments)
    (expected,) = predict.nlvr(model, [(LEFT, RIGHT, TEXT)])
    assert code == 0 and err == ""
    assert json.loads(out) == {
        "row": 1,
        "images": [LEFT, RIGHT],
        "text": TEXT,
        "answer": expected.answer,
        "probability_true": round(expected.probability_true, 6),
        "left_tokens": expected.left_tokens,
        "right_tokens": expected.right_tokens,
        "text_tokens": expected.text_tokens,
        "gflops": round(expected.flops.official, 6),
        "gflops_full": round(expected.flops.full, 6),
        "overlay": str(overlay),
    }
    with Image.open(overlay) as picture:
        assert picture.height > 2 * 200 and picture.width > 4 * 200
        assert np.asarray(picture.convert("L"))[:24].min() < 50  # the title
    code, _, err = madtp_command(*arguments)
    assert code == 2 and "exists already" in err
    assert madtp_command(*arguments, "--overwrite")[0] == 0


def one(madtp_command, *options):
    return json.loads(madtp_command("nlvr", *MODEL, "--images", LEFT, RIGHT, "--text", TEXT, *options)[1])


def test_dense_keeps_every_token(madtp_command):
    for option in (["--dense"], ["--temperature", "0"]):
        assert one(madtp_command, *option)["left_tokens"] == [37] * 4 != one(madtp_command)["left_tokens"]


def test_another_rule_of_pruning(madtp_command):
    weak, strong = (one(madtp_command, "--method", "topk", "--strength", share) for share in ("0.2", "0.5"))
    assert weak["left_tokens"] == weak["right_tokens"] == [37, 31, 26, 22]
    assert strong["left_tokens"][-1] < weak["left_tokens"][-1]
    same = one(madtp_command, "--method", "madtp", "--strength", "2")
    assert same == one(madtp_command, "--temperature", "2") == one(madtp_command)


def test_grouping_ties_the_two_images(madtp_command):
    tied, free = one(madtp_command, "--grouping", "pair"), one(madtp_command)
    assert tied["left_tokens"] == tied["right_tokens"] and free["left_tokens"] != free["right_tokens"]


def test_bfloat16(madtp_command):
    assert 0 <= one(madtp_command, "--dtype", "bfloat16")["probability_true"] <= 1


@pytest.mark.parametrize(
    "replaced, reason",
    [
        ({"--images": ["absent.jpg", RIGHT]}, "absent.jpg: No such file"),
        ({"--images": [LEFT, __file__]}, "test_cli.py: not an image"),
        ({"--text": ["  .. "]}, "text is empty"),
        ({"--text": [""]}, "text is empty"),
    ],
)
def test_a_pair_that_cannot_be_used_is_an_error_row(madtp_command, replaced, reason):
    options = {"--images": [LEFT, RIGHT], "--text": [TEXT], **replaced}
    code, out, err = madtp_command("nlvr", *MODEL, *(part for o, v in options.items() for part in (o, *v)))
    assert code == 1 and reason in json.loads(out)["error"] and reason in err


@pytest.mark.parametrize(
    "replaced, reason",
    [
        ({"--model": ["absent.pth"]}, "absent.pth: no such file"),
        ({"--temperature": ["-1"]}, "temperature: expected"),
        ({"--temperature": ["nan"]}, "temperature: expected"),
        ({"--tokenizer": ["/absent/vocabulary"]}, "/absent/vocabulary"),
        ({"--device": ["nowhere"]}, "nowhere"),
        ({"--save-overlay": ["/absent/folder/overlay.png"]}, "/absent/folder"),
        ({"--save-overlay": ["overlay.xyz"]}, "xyz"),
        ({"--save-overlay": [LEFT]}, "left.png: this command reads it"),
        ({"--save-overlay": [LEFT], "--overwrite": []}, "left.png: this command reads it"),
        ({"--save-overlay": ["."]}, "the pictures themselves are in this folder"),
        ({"--output": ["."]}, "a folder, not a regular file"),
        ({"--output": ["absent/a.jsonl"]}, "error: absent/a.jsonl: there is no folder"),
        ({"--output": [PAIRS]}, "exists already"),
        ({"--output": [LEFT], "--overwrite": []}, "left.png: this command reads it"),
        ({"--device": ["cuda:99"]}, "there is no such GPU"),
        ({"--backend": ["cuda"]}, "--backend cuda: the cuda backend takes cuda tensors"),
    ],
)
def test_errors_are_one_line_and_code_2(madtp_command, monkeypatch, replaced, reason):
    options = {
        "--images": [LEFT, RIGHT],
        "--text": [TEXT],
        "--model": ["model"],
        "--backend": ["reference"],
        **replaced,
    }
    if set(replaced) - {"--model", "--tokenizer"}:
        monkeypatch.setattr(madtp, "load", None)  # found out before
    arguments = [part for option, values in options.items() for part in (option, *values)]
    code, _, err = madtp_command("nlvr", *arguments)
    assert code == 2
    assert err.startswith("madtp: error: ") and err.count("\n") == 1 and reason in err


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="absent.pth"):
        cli.main(["nlvr", "--debug", "--model", "absent.pth", "--images", LEFT, RIGHT, "--text", TEXT])


# ---- many pairs


def test_answers_to_a_file_of_pairs(madtp_command, model, tmp_path):
    for batch_size in (1, 4):
        output = tmp_path / f"answers{batch_size}.jsonl"
        code, out, err = madtp_command("nlvr", *MODEL, "--input", PAIRS, "--output", output, "--batch-size", batch_size)
        assert (code, err) == (0, "") and f"{len(TEXTS)} rows in {output}" in out
        expected = predict.nlvr(model, [(LEFT, RIGHT, text) for text in TEXTS])
        records = read(output)
        assert [record["row"] for record in records] == list(range(1, len(TEXTS) + 1))
        for record, answer in zip(records, expected, strict=True):
            assert record["answer"] is answer.answer
            assert record["probability_true"] == pytest.approx(answer.probability_true, abs=1e-5)
            assert record["left_tokens"] == answer.left_tokens and record["text_tokens"] == answer.text_tokens
            assert record["gflops"] == pytest.approx(answer.flops.official, abs=1e-6)


def test_bad_rows_are_reported_and_do_not_stop_the_run(madtp_command, small, tmp_path):
    Image.open(LEFT).save(tmp_path / "beside.png")
    Image.open(LEFT).save(tmp_path / "broken.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "broken.jpg").read_bytes()[:5000])
    left, right = str(small / LEFT), str(small / RIGHT)
    good = {"images": ["beside.png", right], "sentence": TEXT, "identifier": "dev-1-0"}
    bad = [
        ({"images": ["absent.jpg", right], "text": TEXT}, "absent.jpg: No such file"),
        ({"images": [left, "broken.jpg"], "text": TEXT}, "broken.jpg: damaged image"),
        ({"images": [left], "text": TEXT}, "list of two paths"),
        ({"images": [left, 7], "text": TEXT}, "list of two paths"),
        ({"images": [left, ""], "text": TEXT}, "list of two paths"),
        ({"text": TEXT}, "list of two paths"),
        ({"images": [left, right]}, "'text' (or 'sentence') is missing"),
        ({"images": [left, right], "text": 5}, "'text' must be a string, got 5"),
        ({"images": [left, right], "text": None}, "'text' must be a string, got null"),
        ({"images": [left, right], "text": "!!"}, "text is empty"),
        ('{"images": [', "not JSON"),
        ("[]", "JSON object"),
    ]
    source = pairs_file(tmp_path / "pairs.jsonl", [good, *(row for row, _ in bad), good])
    output = tmp_path / "answers.jsonl"
    code, out, err = madtp_command("nlvr", *MODEL, "--input", source, "--output", output, "--batch-size", "3")
    assert code == 1 and "14 rows" in out and "12 of 14 rows could not be answered" in err
    records = read(output)
    assert "answer" in records[0] and "answer" in records[-1]
    assert records[0]["identifier"] == "dev-1-0" and records[0]["sentence"] == TEXT
    assert {**records[0], "row": 14} == records[-1]
    for n, (record, (row, reason)) in enumerate(zip(records[1:-1], bad, strict=True), 2):
        assert record["row"] == n and reason in record["error"]
        assert record == {"row": n, **(row if isinstance(row, dict) else {}), "error": record["error"]}
        assert re.search(rf"row {n}: .*{re.escape(reason)}", err)


def test_an_unfinished_run_with_other_settings_is_not_continued(madtp_command, tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    arguments = ["nlvr", *MODEL, "--input", PAIRS, "--output", output, "--batch-size", "2"]
    batches, answer = [], NLVRTask.answer

    def interrupted(task, model, instances):
        batches.append(instances)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return answer(task, model, instances)

    monkeypatch.setattr(NLVRTask, "answer", interrupted)
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


@pytest.mark.parametrize("signal_number, exit_code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_killed_run_goes_on(madtp_command, fresh_command, small, tmp_path, signal_number, exit_code):
    row = {"images": [str(small / LEFT), str(small / RIGHT)], "text": TEXT}
    rows = [{**row, "text": f"{n} dogs"} if n % 10 else "{" for n in range(1, 31)]
    source = pairs_file(tmp_path / "pairs.jsonl", rows)
    output, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    arguments = ["nlvr", *MODEL, "--input", str(source), "--output", str(output), "--batch-size", "2"]
    process = fresh_command.start(COMMAND, *arguments)
    deadline = time.monotonic() + 180
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 4):
        assert process.returncode is None and time.monotonic() < deadline, process.stderr
        time.sleep(0.01)
    process.send_signal(signal_number)
    assert process.wait(180) == exit_code and "Traceback" not in process.stderr
    assert not output.exists()
    done = partial.read_bytes().count(b"\n") - 1

    code, out, _ = madtp_command(*arguments)
    assert code == 1 and "30 rows (" in out
    resumed = int(re.search(r"\((\d+) of them", out)[1])
    assert 4 <= resumed <= done
    records = read(output)
    assert [record["row"] for record in records] == list(range(1, 31))
    assert [n for n, record in enumerate(records, 1) if "error" in record] == list(range(10, 31, 10))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "pairs.jsonl"]


# ---- demo and info


@pytest.fixture(scope="module")
def bundled():
    """The models in the package, dense and pruned."""
    return madtp.load("demo-dense", backend="reference"), madtp.load("demo", backend="reference")


def run_demo(madtp_command, tmp_path, monkeypatch, *options):
    monkeypatch.setattr(demo, "_MOST_ROUNDS", 1)
    monkeypatch.setattr(demo, "_FEWEST_ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    return madtp_command("demo", "--backend", "reference", *options)


def figures(out, label):
    """The two numbers of a row of the demo's tables, and what is said beside them."""
    dense, pruned, remark = re.search(rf"^{label} +(\S+) +(\S+) *(.*)$", out, re.MULTILINE).groups()
    return float(dense.rstrip("%")), float(pruned.rstrip("%")), remark


def test_demo(madtp_command, bundled, tmp_path, monkeypatch):
    pairs = 24
    for limit in ("_ANSWER_SECONDS", "_LONGEST_CALL"):  # whatever else the machine is doing
        monkeypatch.setattr(demo, limit, 1e6)
    code, out, err = run_demo(madtp_command, tmp_path, monkeypatch, "--pairs", pairs)
    assert (code, err) == (0, "")
    rows = read(tmp_path / "demo-output" / "pairs.jsonl")
    pictures = [[tmp_path / "demo-output" / name for name in row["images"]] for row in rows]
    answers = [predict.nlvr(m, [(*p, r["text"]) for p, r in zip(pictures, rows)]) for m in bundled]
    assert len(rows) == len(TEMPLATES)
    for row, *both in zip(rows, *answers, strict=True):
        wrong = [" wrong" * (str(answer.answer) != row["label"]) for answer in both]
        shown = [rf"{a.answer} +{a.probability_true:.2f}{mark} *" for a, mark in zip(both, wrong)]
        assert re.search(rf"^{re.escape(row['text'])} +{row['label']} +{''.join(shown)}$", out, re.MULTILINE)

    split, held_out = Shapes("test"), []
    for pair in (split.pair(index, 1) for index in range(pairs)):
        held_out.append((*map(Image.fromarray, pair.images), *pair.statements))
    answers = [predict.nlvr(m, [(*p, s.sentence) for *p, s in held_out]) for m in bundled]
    assert f"{pairs} held-out pairs" in out
    # Of the whole test split the dense model misses less than 5 %; the rest is what so few statements may be off.
    for shown, mine, least in zip(figures(out, "right answers"), answers, (93, 75)):
        right = sum(answer.answer == statement.label for answer, (*_, statement) in zip(mine, held_out))
        assert shown == pytest.approx(100 * right / pairs, abs=0.051) and shown > least
    gflops = [sum(answer.flops.official for answer in mine) / pairs for mine in answers]
    assert gflops[1] < 0.5 * gflops[0]
    *shown, remark = figures(out, "GFLOPs per pair")
    assert shown == pytest.approx(gflops, rel=1e-3)
    assert remark == f"{1 - gflops[1] / gflops[0]:.0%} fewer: {gflops[0] / gflops[1]:.2f}x"
    for label, streams in (("an image, layer by layer", ("left", "right")), ("a statement", ("text",))):
        tokens = [getattr(answer, f"{name}_tokens") for answer in answers[1] for name in streams]
        means = [f"{sum(layer) / len(layer):.1f}" for layer in zip(*tokens)]
        assert re.search(rf"^tokens of {label} +{' +'.join(means)}$", out, re.MULTILINE)
    for batch in (1, pairs):
        dense, pruned, remark = figures(out, f"batch of {batch}")
        assert float(remark.split("x")[0]) == pytest.approx(dense / pruned, rel=0.1)
        assert remark.endswith("x") == (float(remark.split("x")[0]) >= 1)

    for name, image in zip(rows[0]["images"], split.pair(0).images):
        with Image.open(tmp_path / "demo-output" / name) as picture:
            assert (np.asarray(picture) == image).all()
    with Image.open(tmp_path / "demo-output" / "overlay.png") as picture:
        assert picture.height > 2 * 240
    again, evaluation = out[out.index("  madtp nlvr") :].replace("\\\n", "").splitlines()
    code, out, _ = madtp_command(*shlex.split(again)[1:])
    answer = predict.nlvr(bundled[1], [(*pictures[0], rows[0]["text"])])[0]
    assert code == 0 and json.loads(out)["probability_true"] == round(answer.probability_true, 6)
    code, out, _ = madtp_command(*shlex.split(evaluation)[1:])
    assert code == 0 and f"nlvr: {len(rows)} pairs" in out


def test_demo_says_where_pruning_does_not_pay(bundled, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_time", lambda models, instances, size: [0.002, 0.004 if size == 1 else 0.001])
    demo._print_times(bundled, [None] * 100, "float32")
    out = capsys.readouterr().out
    assert figures(out, "batch of 1") == (2.0, 4.0, "0.50x, slower")
    assert figures(out, "batch of 64") == (2.0, 1.0, "2.00x")


@pytest.mark.parametrize("seconds, sizes", [(0.01, [1, 64]), (1.0, [1, 8]), (6.0, [1])])
def test_demo_times_no_larger_batches_than_it_has_the_time_for(bundled, capsys, monkeypatch, seconds, sizes):
    monkeypatch.setattr(demo, "_time", lambda models, instances, size: [seconds, seconds / 2])
    demo._print_times(bundled, [None] * 100, "float32")
    assert [int(size) for size in re.findall(r"batch of (\d+)", capsys.readouterr().out)] == sizes


def test_demo_of_another_model(madtp_command, small, model, tmp_path, monkeypatch):
    """Dense and pruned on the same weights; no temperature, no demo."""
    options = ["--model", small / "model", "--output-dir", "here", "--pairs", "4"]
    code, out, _ = run_demo(madtp_command, tmp_path, monkeypatch, *options)
    assert code == 0 and f"{small}/model without pruning and with madtp of strength 2" in out
    row = read(tmp_path / "here" / "pairs.jsonl")[0]
    with model.dense():
        (dense,) = predict.nlvr(model, [(*(tmp_path / "here" / name for name in row["images"]), row["text"])])
    assert f"{dense.answer!s:5} {dense.probability_true:.2f}" in out.split(row["text"])[1].splitlines()[0]
    assert figures(out, "GFLOPs per pair")[1] < figures(out, "GFLOPs per pair")[0]
    config = json.loads((small / "model" / "config.json").read_text())
    shutil.copytree(small / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "temperature": 0.0}))
    code, _, err = run_demo(madtp_command, tmp_path, monkeypatch, "--model", "model")
    assert code != 0 and "expected pruning or temperature, got both" in err
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "pruning": {"method": "dense"}}))
    code, _, err = run_demo(madtp_command, tmp_path, monkeypatch, "--model", "model")
    assert code == 2 and "--temperature 5" in err
    options = ["--model", "model", "--temperature", "5", "--pairs", "2"]
    code, out, _ = run_demo(madtp_command, tmp_path, monkeypatch, *options)
    assert code == 0 and "with madtp of strength 5" in out
    assert "  madtp nlvr --model model --temperature 5.0 --backend reference --images" in out


def test_a_demo_that_cannot_write_says_so_before_it_loads_anything(madtp_command, tmp_path, monkeypatch):
    monkeypatch.setattr(madtp, "load", None)
    (tmp_path / "file").touch()
    code, out, err = run_demo(madtp_command, tmp_path, monkeypatch, "--output-dir", "file")
    assert code == 2 and out == "" and "file" in err
    for name in ("pairs.jsonl", "3-left.png"):
        mine = tmp_path / "mine" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        code, out, err = run_demo(madtp_command, tmp_path, monkeypatch, "--output-dir", "mine")
        assert code == 2 and out == "" and f"{name} is not from this demo; remove it, or name another" in err
        assert mine.read_text() == "mine"
        mine.unlink()


def test_demo_of_random_weights_does_not_speak_of_accuracy(madtp_command, tmp_path, monkeypatch):
    load = madtp.load
    monkeypatch.setattr(madtp, "load", lambda source, **options: load(source, config=SIZES, **options))
    options = ["--model", "random:base", "--temperature", "2"]
    code, out, _ = run_demo(madtp_command, tmp_path, monkeypatch, *options)
    assert code == 0 and "random, its answers mean nothing" in out and "right answers" not in out
    assert f"{len(TEMPLATES)} held-out pairs" in out and f"batch of {len(TEMPLATES)}" in out


def test_info(fresh_command):
    # In a process of its own: what it finds out about the extension is kept for the life of a process.
    environment = {**os.environ, "MADTP_KERNELS_BUILD": "0"}
    for options in ([], ["--json"]):
        done = fresh_command.run(COMMAND, "info", *options, env=environment)
        assert done.returncode == 0
        for word in ("torch", "reference", "triton"):
            assert word in done.stdout
    assert set(json.loads(done.stdout)["backends"]) == {"cpu", "cuda"}


def test_making_a_model_without_numbers_imports_no_compiler(fresh_command):
    """Every command loads a model by first making one on the device "meta"; PyTorch's compiler takes more than a second."""
    code = """
import sys, torch, small_models
from madtp.tasks import TASKS
before = "torch._dynamo" in sys.modules
with torch.device("meta"):
    for task, config in small_models.CONFIGS.items():
        TASKS[task].Model(config)
print(before, "torch._dynamo" in sys.modules)
"""
    assert fresh_command.run(code).stdout == "False False\n"
