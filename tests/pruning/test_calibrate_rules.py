"""`madtp calibrate --method`: limits of a rule from unlabelled pairs, saved with the model."""

import json

import pytest
import torch

import madtp
from madtp.cli import main
from madtp.compress.calibrate import _read, calibrate_rule
from madtp.data.synthetic import Shapes, ShapesExamples, write
from madtp.pruning import Pruning, RankedNovelty
from madtp.rows import first_rows
from madtp.tasks import task_of


@pytest.fixture(scope="module")
def model():
    return madtp.load("demo-dense")


def test_command_saves_the_rule_and_what_is_known_of_it(tmp_path, capsys):
    write(tmp_path, "train", 2, 2)
    code = main([
        "calibrate", "--model", "demo-dense", "--pairs", str(tmp_path / "train.jsonl"), "--reduction", "0.4",
        "--method", "ranked_novelty", "--output", str(tmp_path / "out"),
    ])  # fmt: skip
    assert code == 0
    known = json.loads((tmp_path / "out" / "calibration.json").read_text())
    saved = madtp.load(tmp_path / "out")
    assert saved.pruning == Pruning.from_dict(known["rule"])
    assert isinstance(saved.pruning, RankedNovelty)
    assert known["saving"] == pytest.approx(0.4, abs=0.01)
    assert known["inputs"] == 4
    assert "standard deviation" in capsys.readouterr().out


def test_options_of_learning_are_refused_where_nothing_learns(tmp_path, capsys):
    words = ["--pairs", "none.jsonl", "--reduction", "0.4", "--method", "tome", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--model", "demo-dense", *words, "--lr", "0.5", "--distill", "1"])
    assert stop.value.code == 2
    assert "--lr, --distill: with --method nothing learns" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--reduction", "0.4", "--inputs", "40"], "--inputs: of no use without --method"),
        (["--target-gflops", "0.2"], "--target-gflops: of no use without --method"),
        (
            ["--reduction", "0.4", "--method", "tome", "--save-every", "1", "--workers", "0"],
            "--workers, --save-every: with --method nothing learns",
        ),
    ],
)
def test_options_without_effect_are_named(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--model", "demo-dense", "--pairs", "p.jsonl", "--output", str(tmp_path / "o"), *options])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_sizes_count_if_asked_for(tmp_path, monkeypatch):
    """Also with a rule whose merged tokens count once by default."""
    rules = []

    def calibrated(model, pairs, rule, *rest, **options):
        rules.append(rule)
        raise ValueError("enough")

    write(tmp_path, "train", 1, 1)
    monkeypatch.setattr("madtp.cli.calibrate.calibrate_rule", calibrated)
    words = ["--pairs", str(tmp_path / "train.jsonl"), "--reduction", "0.4", "--output", str(tmp_path / "out")]
    for more in ([], ["--use-sizes"]):
        main(["calibrate", "--model", "demo-dense", *words, "--method", "evit", *more])
    assert [rule.proportional_attention for rule in rules] == [False, True]


def test_gflops_as_the_target(model):
    pairs = ShapesExamples(Shapes("train"), range(4), 1)
    result = calibrate_rule(model, pairs, "tome", target_gflops=0.3, inputs=4)
    assert result.gflops == pytest.approx(0.3, rel=0.03)
    assert not model.pruning.active


def test_what_decides_on_answers_is_compared(model):
    """The state of a text that looked at all tokens of the images, not the tokens that stand for the images alone."""
    task = task_of(model)
    batch = task.collate([task.instance(example) for example in ShapesExamples(Shapes("train"), range(2), 1)])
    with torch.inference_mode():
        output = task.forward(model, batch, RankedNovelty(shares=(0.2,)))
    states = task.states(output)
    assert torch.equal(_read(states), first_rows(output.last_hidden_state))
    whole = _read(states[:1])  # a task whose images are read by a decoder
    assert whole.shape == (4, 145, model.config.vision.embed_dim)
    assert len(whole[0].unique(dim=0)) == output.image_embeds.lengths[0]


def test_one_target_is_needed(model):
    with pytest.raises(ValueError, match="expected one of them"):
        calibrate_rule(model, ShapesExamples(Shapes("train"), range(1), 1), "tome")
