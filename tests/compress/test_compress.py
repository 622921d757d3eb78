"""`madtp compress` and `madtp calibrate`, from annotation files to a saved model: killed, in two processes, wrongly
used."""

import dataclasses
import json
import os
import signal
import socket
import sys
import time
import types

import pytest
import torch
from compression import annotations, pictures, save_tiny, tiny
from fresh import COMMAND
from safetensors.torch import load_file

import madtp
from madtp import cli, resume
from madtp.compress import train as training
from madtp.compress.calibrate import read_pairs
from madtp.compress.dictionary import dictionary_from_examples
from madtp.compress.evaluation import evaluate
from madtp.compress.settings import Settings
from madtp.compress.train import Trainer, _Board, train
from madtp.guidance import alignment_loss
from madtp.tasks import TASKS

LEARNING = "--epochs 4 --batch-size 4 --lr 1e-3 --workers 0 --log-every 1 --reduction 0.3 --ramp 0.2".split()

EVERYTHING = "--distill", "0.5", "--use-sizes"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Models and annotations of two tasks."""
    folder = tmp_path_factory.mktemp("data")
    for task in ("nlvr", "clip", "caption"):
        save_tiny(task, folder / task)
        annotations(task, folder / "pictures", 13)
        annotations(task, folder / "pictures", 7, seed=1)
    return folder


def compress(data, task, output, *more):
    """Arguments of a run."""
    root = data / "pictures"
    files = ["--annotations", root / f"{task}-0.json", "--dev", root / f"{task}-1.json", "--image-root", root]
    arguments = ["compress", "--model", data / task, *files, "--output", output, *LEARNING, *more]
    return [str(argument) for argument in arguments]


def done(arguments, capsys):
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def outcome(output):
    """Everything that a run leaves, without times."""
    records = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["seconds"]
    checkpoint = torch.load(output / "run" / "checkpoint.pt", weights_only=True)
    result = json.loads((output / "result.json").read_text())
    return records, checkpoint["parts"], result, load_file(output / "model.safetensors")


def losses(output):
    return [record["train"]["loss"] for record in outcome(output)[0] if "train" in record]


@pytest.fixture(scope="module")
def whole(data):
    """A run that nobody disturbed, with everything that a run can have."""
    output = data / "whole"
    assert cli.main(compress(data, "nlvr", output, *EVERYTHING)) == 0
    return output


def test_a_model_is_compressed_to_the_target(data, whole):
    records, _, result, weights = outcome(whole)
    assert result["reduction"] == pytest.approx(0.3, abs=0.02)
    assert result["gflops"] == pytest.approx((1 - result["reduction"]) * result["dense_gflops"], rel=1e-3)
    model = madtp.load(whole)
    assert model.temperature == result["temperature"] > 0 and model.pruning.proportional_attention
    assert all(r["train"]["distillation"] > 0 for r in records if "train" in r)
    task, root = TASKS["nlvr"](model), data / "pictures"
    dev = task.split(root / "nlvr-1.json", root, training=False)
    again = evaluate(model, task, dev, model.temperature, batch_size=3)  # other batches, same instances
    assert again.score == pytest.approx(result["score"]) and again.gflops == pytest.approx(result["gflops"], abs=1e-6)
    # The best of the eligible epochs was taken, and dev is all that chose.
    eligible = [r for r in records if "dev" in r and r["dev"]["reduction"] >= 1 - 0.7 * 1.05 - 1e-4]
    best = max(r["dev"]["score"] for r in eligible)
    assert result["step"] == next(r["step"] for r in eligible if r["dev"]["score"] == best)
    assert [p.name for p in (whole / "run").glob("best-*")] == [f"best-{result['step']:08d}.safetensors"]
    start = load_file(data / "nlvr" / "model.safetensors")
    assert all(not torch.equal(weights[name], start[name]) for name in start)
    # The learning rate of MADTP: half a cosine, the same within an epoch (13 examples: three steps).
    rates = [r["lr"] for r in records if "train" in r]
    assert rates[:4] == pytest.approx([1e-3] * 3 + [1e-3 * (1 + 2**-0.5) / 2])


def test_a_finished_run_is_not_done_again(data, whole, capsys, monkeypatch):
    before = outcome(whole)[0]
    monkeypatch.setattr(training, "dictionary_from_examples", None)
    monkeypatch.setattr(training, "evaluate", None)
    out = done(compress(data, "nlvr", whole, *EVERYTHING), capsys)
    assert outcome(whole)[0] == before and json.JSONDecoder().raw_decode(out)[0] == before[-1]["result"]


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(data, whole, tmp_path, capsys, generator, fresh_command):
    output, lines = tmp_path / "killed", int(torch.randint(2, 12, (), generator=generator))
    log = output / "run" / "metrics.jsonl"
    arguments = compress(data, "nlvr", output, *EVERYTHING, "--save-every", "0.2")
    process = fresh_command.start(COMMAND, *arguments)
    deadline = time.monotonic() + 120
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert process.returncode is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "result.json").exists(), "it was finished before it could be killed"
    done(arguments, capsys)
    (records, parts, result, weights), expected = outcome(output), outcome(whole)
    assert records == expected[0] and result == expected[2]
    torch.testing.assert_close(parts, expected[1], rtol=0, atol=0)
    torch.testing.assert_close(weights, expected[3], rtol=0, atol=0)


def test_a_run_does_not_go_on_with_other_settings_or_data(data, whole, capsys):
    for options, reason in (
        (["--lr", "0.01"], "lr: 0.001 then, 0.01 now"),
        (["--distill", "0"], "distill: 0.5 then, 0.0 now"),
        (["--dictionary", "keep"], "dictionary: tokens then, keep now"),
    ):
        assert cli.main(compress(data, "nlvr", whole, *EVERYTHING, *options)) == 2
        assert reason in capsys.readouterr().err
    assert cli.main(compress(data, "nlvr", whole, *EVERYTHING[:2])) == 2
    assert "use_sizes: True then, False now" in capsys.readouterr().err
    assert cli.main(compress(data, "nlvr", whole, "--dev", str(data / "pictures" / "nlvr-0.json"))) == 2
    assert "data: [" in capsys.readouterr().err


def in_float64(*arguments, **options):
    return madtp_load(*arguments, **{**options, "dtype": torch.float64})


madtp_load = madtp.load


def test_two_processes_compute_what_one_does(data, tmp_path, capsys, monkeypatch, fresh_command):
    """CLIP's loss compares the samples of both processes. The dev split has an odd number of instances.

    In float64, where no token changes sides of a threshold because a batch of another size rounds otherwise. The
    learning rate is small, since Adam makes as much of a rounding error as of a gradient where the gradient is zero.
    The loss itself is computed in float32, and its gradients are what is compared.
    """
    code = "import sys, madtp, test_compress; madtp.load = test_compress.in_float64; " + COMMAND
    options = "--accumulate", "2", "--epochs", "2", "--lr", "1e-6", "--distill", "0.5"
    arguments = compress(data, "clip", tmp_path / "two", *options, "--batch-size", "2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    two = [
        fresh_command.start(code, *arguments, env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    monkeypatch.setattr(madtp, "load", in_float64)
    done(compress(data, "clip", tmp_path / "one", *options), capsys)
    for process in two:
        assert process.wait(240) == 0, process.stderr
    assert [process.stdout.count('"step"') for process in two] == [1, 0]  # only one of them speaks
    (records, parts, *_), (expected, expected_parts, *_) = (outcome(tmp_path / name) for name in ("two", "one"))
    assert records[0] == expected[0] and "dense" in records[0]  # a score of ranks, over the instances of both
    assert [r["step"] for r in records] == [r["step"] for r in expected]
    assert len(losses(tmp_path / "two")) == 2
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1.1e-4)  # four decimals are logged
    momenta = [p["optimizer"]["state"] for p in (parts, expected_parts)]  # means of the gradients so far
    assert len(momenta[0]) == len(momenta[1]) > 50
    for number, state in momenta[1].items():
        bound = 1000 * torch.finfo(torch.float32).eps * state["exp_avg"].abs().max().item()
        torch.testing.assert_close(momenta[0][number]["exp_avg"], state["exp_avg"], rtol=0, atol=bound + 1e-9)


def test_accumulated_batches_make_one_step(data, tmp_path):
    """Gradients, of which Adam keeps means, are those of the whole batch. Without distillation, which counts the
    tokens of one forward.

    In float64 no token changes sides of a threshold because a batch of another size rounds otherwise, and at a
    learning rate of 0 no rounding error becomes a step. What is left is the loss, a mean over logits in float32: an
    error of a few units in the last place for each of the four instances of a step.
    """
    momenta, root = [], data / "pictures"
    for batch_size, accumulate in ((4, 1), (2, 2)):
        model = madtp.load(data / "nlvr", temperature=1.0, dtype=torch.float64)
        task = TASKS["nlvr"](model)
        examples, dev = (task.split(root / f"nlvr-{n}.json", root, training=not n) for n in (0, 1))
        settings = Settings(
            reduction=0.3, epochs=1, batch_size=batch_size, accumulate=accumulate, lr=0.0, weight_decay=0.0, seed=3
        )
        train(model, task, examples[:8], dev[:2], settings, tmp_path / str(accumulate))
        momenta.append(outcome(tmp_path / str(accumulate))[1]["optimizer"]["state"])
    assert len(momenta[0]) > 50 and {int(state["step"]) for state in momenta[0].values()} == {2}
    for others in momenta[1:]:
        assert others.keys() == momenta[0].keys()
        for number, state in momenta[0].items():
            bound = 100 * torch.finfo(torch.float32).eps * state["exp_avg"].abs().max().item()
            torch.testing.assert_close(others[number]["exp_avg"], state["exp_avg"], rtol=0, atol=bound)


def test_another_model_can_be_the_teacher(data, whole, tmp_path, capsys):
    """A run goes on with the same one only, and one of other tokens is refused."""
    options = "--distill", "1", "--epochs", "1", "--lr", "1e-9", "--teacher"
    cli.main(compress(data, "nlvr", tmp_path, *options, str(data / "nlvr")))
    own = [r["train"]["distillation"] for r in outcome(tmp_path)[0] if "train" in r]
    cli.main(compress(data, "nlvr", tmp_path / "other", *options, str(whole)))
    others = [r["train"]["distillation"] for r in outcome(tmp_path / "other")[0] if "train" in r]
    assert all(other > 1.01 * mine for mine, other in zip(own, others, strict=True))
    assert cli.main(compress(data, "nlvr", tmp_path, *options, str(whole))) == 2
    assert "teacher" in capsys.readouterr().err
    assert cli.main(compress(data, "nlvr", tmp_path / "new", *options, str(tmp_path / "missing"))) == 2
    assert "missing" in capsys.readouterr().err
    model, larger = madtp.load(data / "nlvr"), madtp.load(data / "nlvr", image_size=96)
    settings = Settings(reduction=0.3, epochs=1, batch_size=1, lr=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="teacher: expected a model of nlvr, .* patches"):
        Trainer(model, TASKS["nlvr"](model), range(4), [], settings, tmp_path, teacher=larger)


@pytest.mark.parametrize("task_name", ["nlvr", "clip"])
def test_a_run_begins_with_tokens_and_a_teacher_that_sees_what_it_sees(data, task_name, tmp_path):
    """At temperature 0 and a learning rate of 0 nothing else happens, and on random views teacher and student agree."""
    model, root = madtp.load(data / task_name), data / "pictures"
    task = TASKS[task_name](model)
    examples, dev = (task.split(root / f"{task_name}-{n}.json", root, training=not n) for n in (0, 1))
    settings = Settings(
        reduction=0.3, epochs=1, batch_size=4, lr=0.0, weight_decay=0.0, controller="official", temperature=0.0,
        distill=1.0, seed=3,
    )  # fmt: skip
    entries = dictionary_from_examples(model, task, examples, 3)
    train(model, task, examples, dev, settings, tmp_path / "first", log_every=1)
    assert torch.equal(madtp.load(tmp_path / "first").space_dict, entries)
    lines = [r["train"] for r in outcome(tmp_path / "first")[0] if "train" in r]
    assert [line["distillation"] for line in lines] == [0.0] * 3 and all(line["gflops"] > 0 for line in lines)
    # A model with a temperature has been pruned: its dictionary stays, unless one says otherwise.
    for number, (temperature, dictionary) in enumerate([(0.5, None), (0.0, "keep"), (0.5, "tokens")]):
        model = madtp.load(data / task_name, temperature=temperature)
        before = model.space_dict.detach().clone()
        again = dataclasses.replace(settings, dictionary=dictionary)
        train(model, task, examples, dev, again, tmp_path / str(number))
        saved = madtp.load(tmp_path / str(number)).space_dict
        assert torch.equal(saved, before) == (dictionary != "tokens")


def test_what_moves_by_epoch_does_however_often_the_dev_split_is_scored(data, tmp_path):
    rates, epochs = [], []
    for every in (None, 1):
        model, root = madtp.load(data / "clip"), data / "pictures"
        task = TASKS["clip"](model)
        examples, dev = (task.split(root / f"clip-{n}.json", root, training=not n) for n in (0, 1))
        settings = Settings(reduction=0, epochs=2, batch_size=6, lr=1e-3, weight_decay=0.0, evaluate_every=every)
        train(model, task, examples, dev, settings, tmp_path / str(every), log_every=1)
        records = outcome(tmp_path / str(every))[0]
        rates.append([r["lr"] for r in records if "lr" in r])
        epochs.append([(r["step"], r["epoch"]) for r in records if "dev" in r])
    assert rates[0] == rates[1] and rates[0] == [1e-3] * 2 + [5e-4] * 2
    assert epochs == [[(2, 1), (4, 2)], [(1, 1), (2, 1), (3, 2), (4, 2)]]
    with pytest.raises(
        ValueError, match="controller: official moves once per epoch, by its evaluation; evaluate_every"
    ):
        dataclasses.replace(settings, reduction=0.3, controller="official")


def test_half_precision_official_controller_and_a_schedule_by_step(data, tmp_path, capsys):
    options = "--precision bfloat16 --controller official --schedule step --no-augment --batch-size 6 --dictionary keep".split()
    arguments = compress(data, "caption", tmp_path, *options)
    del arguments[arguments.index("--ramp") : arguments.index("--ramp") + 2]
    done(arguments, capsys)
    records, _, result, weights = outcome(tmp_path)
    temperatures = [r["dev"]["temperature"] for r in records if "dev" in r]
    assert temperatures == pytest.approx([1.0, 0.99, 0.98, 0.97])  # the target is missed by less than 1 GFLOPs
    rates = [r["lr"] for r in records if "train" in r]
    assert rates == sorted(set(rates), reverse=True)
    values = [r["train"]["loss"] for r in records if "train" in r]
    assert values[-1] < 0.8 * values[0]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert result["score"] > result["dense_score"]


def test_metrics_go_to_tensorboard_where_it_is_installed(tmp_path, monkeypatch):
    """With a writer in its place that keeps what it is given."""
    given = []

    class Writer:
        def __init__(self, directory, purge_step):
            given.append((directory, purge_step))

        def add_scalar(self, name, value, step):
            given.append((name, value, step))

        def close(self):
            given.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    board = _Board(tmp_path, 4)
    board.add({"train": {"loss": 0.5}, "lr": 0.1, "result": {"score_name": "accuracy"}}, 7)
    board.close()
    assert given == [(str(tmp_path / "tensorboard"), 5), ("train/loss", 0.5, 7), ("lr", 0.1, 7), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    board = _Board(tmp_path, 4)
    board.add({"lr": 0.1}, 7)
    board.close()


def test_settings_that_make_no_sense():
    good = dict(reduction=0.5, epochs=1, batch_size=1, lr=0.1, weight_decay=0.0)
    Settings(**good)
    for name, value in (
        ("reduction", 1.0), ("reduction", -0.1), ("epochs", 0), ("accumulate", 0), ("lr", float("nan")),
        ("ramp", -0.1), ("distill", -1.0), ("dictionary", "random"), ("controller", "none"),
        ("schedule", "never"), ("precision", "float16"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Settings(**good | {name: value})


# ---- calibration


def unlabelled(folder, number=12):
    made = pictures(folder, number)
    rows = [{"image": name, "text": f"{colour} on a table"} for name, colour in made]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def alignment(source, pairs):
    """The loss of a saved model on all pairs at once, at a temperature that is not its own."""
    model = madtp.load(source)
    task = TASKS[model.config.task](model)
    batch = task.collate([task.instance(example) for example in read_pairs(pairs, model.config.task)])
    with torch.inference_mode():
        return alignment_loss(
            *model(batch["pixels"], batch["texts"], 0.1, alignment_features=True).alignment_features
        ).item()


def test_calibration_learns_the_dictionary_and_the_temperature_only(tmp_path, capsys):
    save_tiny("retrieval", tmp_path / "model")
    options = ["--reduction", 0.3, "--steps", 20, "--batch-size", 6, "--workers", 0, "--log-every", 1]
    options += ["--dictionary", "keep", "--lr", 0.01]
    files = ["--model", tmp_path / "model", "--pairs", unlabelled(tmp_path / "pictures"), "--output", tmp_path / "out"]
    arguments = [str(argument) for argument in ["calibrate", *files, *options]]
    done(arguments, capsys)
    records, _, result, weights = outcome(tmp_path / "out")
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert [name for name in start if not torch.equal(start[name], weights[name])] == ["space_dict"]
    assert sum("train" in r for r in records) == 20
    assert alignment(tmp_path / "out", files[3]) < alignment(tmp_path / "model", files[3]) - 0.01
    assert result["reduction"] == pytest.approx(0.3, abs=0.02) and result["score"] is None
    model = madtp.load(tmp_path / "out")
    assert model.temperature == result["temperature"]
    # Stopped after any checkpoint, it goes on to the same end.
    (tmp_path / "out" / "result.json").unlink()
    log = tmp_path / "out" / "run" / "metrics.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"result"' not in line))
    done(arguments, capsys)
    assert outcome(tmp_path / "out")[2] == result


def test_calibration_takes_no_more_pairs_than_its_steps(tmp_path, capsys):
    save_tiny("nlvr", tmp_path / "model")
    made = pictures(tmp_path / "pictures", 11)
    rows = [{"images": [name, made[0][0]], "text": f"left is {colour}"} for name, colour in made]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["calibrate", "--model", tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl", "--workers", 0]
    arguments += ["--image-root", tmp_path / "pictures", "--reduction", 0.3, "--steps", 3, "--batch-size", 2]
    done([str(argument) for argument in [*arguments, "--output", tmp_path / "out"]], capsys)
    assert outcome(tmp_path / "out")[2]["step"] == 3


def test_a_caption_model_cannot_be_calibrated(data, tmp_path, capsys):
    pairs = unlabelled(tmp_path / "pictures", 2)
    arguments = [
        "calibrate",
        "--model",
        data / "caption",
        "--pairs",
        pairs,
        "--reduction",
        0.3,
        "--output",
        tmp_path / "out",
    ]
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert "no text to align" in capsys.readouterr().err


# ---- use


@pytest.mark.parametrize("command, mentioned", [("compress", "torchrun"), ("calibrate", "pairs.jsonl")])
def test_help(command, mentioned, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([command, "--help"])
    assert exit.value.code == 0 and mentioned in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--batch-size", "20"], "13 training examples are fewer than one step takes"),
        (["--image-root", "/absent"], "--image-root: /absent is no folder"),
        (["--image-root", os.path.dirname(__file__)], "images are not there"),
        (["--output", "/dev/null"], "/dev/null"),
        (["--device", "cuda:99"], "there is no such GPU"),
        (["--task", "vqa"], "holds a model for task 'nlvr', not 'vqa'"),
        (["--model", "/absent"], "/absent: no such file"),
        (["--annotations", __file__], "not JSON"),
        (["--workers", "-1"], "--workers: expected"),
        (["--rule", "temperature"], "--rule: expected NAME=VALUE, got 'temperature'"),
        (["--method", "tome", "--rule", "nope=3"], "pruning: 'tome' has no setting 'nope'; it has "),
        (["--annotations", os.devnull], "/dev/null: a device, not a regular file"),
    ],
)
def test_errors_are_one_line(data, options, reason, tmp_path, capsys):
    assert cli.main(compress(data, "nlvr", tmp_path / "out", *options)) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "option", [["--reduction", "1"], ["--lr", "0"], ["--epochs", "0"], ["--ramp", "nan"], ["--distill", "-1"]]
)
def test_numbers_out_of_range_are_wrong_usage(data, option, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(compress(data, "nlvr", tmp_path, *option))
    assert exit.value.code == 2 and f"argument {option[0]}" in capsys.readouterr().err


def test_a_target_that_cannot_be_reached_leaves_a_model_all_the_same(data, tmp_path, capsys):
    assert cli.main(compress(data, "nlvr", tmp_path, "--reduction", "0.02", "--epochs", "1")) == 1
    err = capsys.readouterr().err
    assert "the target was missed" in err and "instead of 2.0%" in err and err.count("\n") == 1
    result = outcome(tmp_path)[2]
    assert result["reduction"] > 0.1 and 0 < result["temperature"] < 0.1  # any temperature prunes more than that
    assert madtp.load(tmp_path).temperature == result["temperature"]


@pytest.mark.parametrize(
    "gflops, reduction, met",
    [
        (50, 0.5, True),
        (52, 0.5, True),
        (53, 0.5, False),
        (46, 0.5, True),
        (44, 0.5, False),
        (3, 0.999, False),
        (214, 0.3, False),
    ],
)
def test_a_target_is_met_within_five_percent_of_it(gflops, reduction, met):
    miss = training.missed({"gflops": gflops, "dense_gflops": 100}, reduction)
    assert (miss is None) == met
    assert met or f"{100 - gflops:.1f}% fewer GFLOPs instead of {100 * reduction:.1f}%" in miss


def test_two_runs_do_not_share_an_output(data, whole, capsys):
    with resume.locked(whole / "run" / "lock", whole):
        assert cli.main(compress(data, "nlvr", whole, *EVERYTHING)) == 2
    assert "is being written by another process" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["compress", "calibrate", "limits"])
def test_a_model_of_something_else_is_not_replaced(command, data, whole, tmp_path, capsys, monkeypatch):
    """Such as the one that is to be compressed, or that of the other command."""
    monkeypatch.setattr(madtp, "load", None)  # found out before
    (tmp_path / "pairs.jsonl").touch()
    for output in (data / "nlvr", *[whole] * (command == "limits")):
        arguments = ["calibrate", "--model", data / "nlvr", "--pairs", tmp_path / "pairs.jsonl", "--reduction", "0.3"]
        arguments += ["--output", output, *["--method", "tome"] * (command == "limits")]
        arguments = compress(data, "nlvr", output) if command == "compress" else list(map(str, arguments))
        before = {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
        assert cli.main(arguments) == 2
        assert "holds a model that no run of this command made; name another folder" in capsys.readouterr().err
        assert before == {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def test_options_that_say_nothing_are_refused(data, tmp_path, capsys):
    for task, options, reason in (
        ("nlvr", ["--controller", "official", "--ramp", "0.5"], "--ramp: of no use"),
        ("caption", ["--alignment", "0.1"], "--alignment: of no use"),
        ("nlvr", ["--model", "random:base"], "--task: random:base"),
    ):
        arguments = compress(data, task, tmp_path / "out", *options)
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 2 and reason in capsys.readouterr().err


def test_contrast_needs_two_samples(data, tmp_path, capsys):
    assert cli.main(compress(data, "clip", tmp_path / "out", "--batch-size", "1")) == 2
    assert "batch_size: this task's loss compares instances" in capsys.readouterr().err


def test_training_that_has_diverged_says_so(data, tmp_path, capsys):
    assert cli.main(compress(data, "nlvr", tmp_path / "out", "--lr", "1e30")) == 2
    err = capsys.readouterr().err
    assert "learning rate" in err and err.count("\n") == 1 and "madtp: error: " in err


def test_a_loss_that_is_no_number_stops_the_run(data, tmp_path, capsys):
    model = tiny("nlvr")
    with torch.no_grad():
        model.cls_head[2].weight.fill_(3e38)
    madtp.save_pretrained(model, tmp_path / "model")
    assert cli.main(compress(data, "nlvr", tmp_path / "out", "--model", str(tmp_path / "model"))) == 2
    assert "the loss is" in capsys.readouterr().err
