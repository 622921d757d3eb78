"""`madtp calibrate --method`: limits of a rule from unlabelled pairs, saved with the model."""

import json

import pytest

import madtp
from madtp.cli import main
from madtp.compress.calibrate import calibrate_rule
from madtp.data.synthetic import Shapes, ShapesExamples, write
from madtp.pruning import Pruning, RankedNovelty


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


def test_gflops_as_the_target(model):
    pairs = ShapesExamples(Shapes("train"), range(4), 1)
    result = calibrate_rule(model, pairs, "tome", target_gflops=0.3, inputs=4)
    assert result.gflops == pytest.approx(0.3, rel=0.03)
    assert not model.pruning.active


def test_one_target_is_needed(model):
    with pytest.raises(ValueError, match="expected one of them"):
        calibrate_rule(model, ShapesExamples(Shapes("train"), range(1), 1), "tome")
