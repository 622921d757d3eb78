"""Rules with a threshold per layer in training: thresholds are quantiles, follow the batch, and a run goes on with
them."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from compression import annotations, tiny

import madtp
from madtp.compress import train as training
from madtp.compress.average import WeightAverage
from madtp.compress.examples import read_examples
from madtp.compress.settings import Settings
from madtp.compress.thresholds import NOTHING, Dial, Following, calibrate_thresholds, dial_for, layer_shares, quantile
from madtp.compress.train import train
from madtp.pruning import MADTP, METHODS, LayerTrace, Pruning
from madtp.tasks import TASKS


@dataclass(frozen=True)
class Loud(Pruning):
    """Drops tokens whose norm is at most the layer's threshold."""

    name: ClassVar[str] = "loud"
    adaptive: ClassVar[bool] = True
    default_shares: ClassVar[tuple] = (0.1,)

    thresholds: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    strength: float = 1.0
    streams: tuple[str, ...] = ("vision",)

    def at(self, strength):
        return replace(self, strength=strength)

    def limited(self, kind, values):
        return replace(self, thresholds=(), shares=(), strength=1.0) if not values else replace(
            self, **{"thresholds": (), "shares": (), kind: tuple(values)}, strength=1.0
        )  # fmt: skip

    @property
    def active(self):
        return self.strength > 0 and bool(self.thresholds)

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        score = tokens.values.norm(dim=1).float()
        goes = ~tokens.protected & (score <= self.thresholds[layer] * self.strength)
        into = torch.arange(len(goes), dtype=torch.int32).masked_fill(goes, -1)
        left, merged = tokens.merged(into)
        return left, LayerTrace(tokens.cu_seqlens, left.cu_seqlens, left.ids, score, rows=merged.rows)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(METHODS, "loud", Loud)


def some(tmp_path, number=8):
    model = tiny("nlvr")
    task = TASKS["nlvr"](model)
    examples = task.split(annotations("nlvr", tmp_path, number), tmp_path, training=False)
    return model, task, examples


def test_shares_of_layers():
    assert layer_shares((0.5, 0.2), 4) == pytest.approx([0.5, 0.2, 0.2, 0.2])
    assert layer_shares((0.5,), 2, 2.0) == [0.75, 0.75] and layer_shares((0.5, 0.3), 2, 0.0) == [0, 0]
    for shares in ((), (1.0,), (-0.1,), (0.1, 0.1, 0.1)):
        with pytest.raises(ValueError, match="shares: expected"):
            layer_shares(shares, 2)


def test_a_quantile_is_exceeded_by_the_rest():
    values = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0])
    assert [int((values <= quantile(values, share)).sum()) for share in (0.0, 0.2, 0.41, 0.8)] == [0, 1, 2, 4]


def test_every_layer_drops_its_share_of_the_tokens_it_was_calibrated_on(tmp_path):
    model, task, examples = some(tmp_path)
    batches = [task.collate([task.instance(example) for example in part]) for part in (examples[:3], examples[3:])]
    rule = calibrate_thresholds(model, task, batches, Loud(), [0.25, 0.0, 0.5])
    assert rule.thresholds[1] == NOTHING and rule.strength == 1
    entered, left = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for batch in batches:
            for number, layer in enumerate(task.forward(model, batch, rule).vision):
                entered[number] += int((layer.lengths_in - 1).sum())
                left[number] += int((layer.lengths - 1).sum())
    assert (1 - left / entered).tolist() == pytest.approx([0.25, 0, 0.5], abs=0.01)
    assert len(set(layer.lengths.tolist())) > 1, "every picture has to keep its own number"


def test_thresholds_follow_the_batch_with_a_memory():
    dial = Following(Loud(thresholds=(4.0, NOTHING)), (0.5,), 2, memory=0.75)
    dial.follow([torch.arange(1.0, 11), torch.arange(1.0, 11)], 1.0)
    assert dial.at(3.0).thresholds == pytest.approx(
        (0.75 * 4 + 0.25 * 5, 5.0)
    )  # from nothing to something there is no way
    again = Following(Loud(), (0.5,), 2, memory=0.75)
    again.load_state_dict(dial.state_dict())
    assert again.rule == dial.rule


def test_which_dial_a_rule_has():
    assert isinstance(dial_for(Loud(), (), 3, 0.9), Following)
    assert type(dial_for(MADTP(), (), 3, 0.9)) is Dial and dial_for(MADTP(), (), 3, 0.9).at(2.0).temperature == 2
    with pytest.raises(ValueError, match="shares: the rule 'madtp' decides itself"):
        dial_for(MADTP(), (0.1,), 3, 0.9)


SETTINGS = Settings(
    reduction=0.3, epochs=1, batch_size=3, lr=1e-3, weight_decay=0.0, steps=6, schedule="step", warmup=2, clip=1.0,
    average=0.8, ramp=0.0, shares=(0.3,), distill=1.0, evaluate_every=2, seed=3, save_as="float16",
)  # fmt: skip


def fresh(tmp_path):
    model, task, examples = some(tmp_path / "pictures", 9)
    model.pruning = Loud()
    return model, task, examples[:6], examples[6:]


def outcome(output):
    lines = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines, torch.load(output / "run" / "checkpoint.pt", weights_only=True)["parts"]


def test_a_rule_with_thresholds_trains_to_the_target_and_goes_on_after_a_stop(tmp_path, monkeypatch):
    result = train(*fresh(tmp_path), SETTINGS, tmp_path / "whole", log_every=1, progress=False)
    assert result["reduction"] == pytest.approx(0.3, abs=0.03)
    model = madtp.load(tmp_path / "whole")
    assert isinstance(model.pruning, Loud) and len(model.pruning.thresholds) == 3
    assert model.pruning.to_dict() == json.loads(json.dumps(result["pruning"]), object_hook=dict) | {
        "thresholds": model.pruning.thresholds, "shares": (), "streams": ("vision",)
    }  # fmt: skip
    lines, parts = outcome(tmp_path / "whole")
    assert parts["thresholds"]["thresholds"] != list(
        model.pruning.thresholds
    )  # taken anew for the weights that were kept
    assert {"average", "thresholds"} <= set(parts)

    class Stopped(Exception):
        pass

    steps = iter(range(100))

    def step(self):
        if next(steps) == 3:
            raise Stopped
        means = original(self)
        self.run.save()
        return means

    original = training.Trainer._step
    monkeypatch.setattr(training.Trainer, "_step", step)
    with pytest.raises(Stopped):
        train(*fresh(tmp_path), SETTINGS, tmp_path / "stopped", log_every=1, progress=False)
    assert train(*fresh(tmp_path), SETTINGS, tmp_path / "stopped", log_every=1, progress=False) == result
    again, parts_again = outcome(tmp_path / "stopped")
    assert again == lines
    torch.testing.assert_close(parts_again, parts, rtol=0, atol=0)


@pytest.mark.parametrize("ramp", [0.0, 0.5])
def test_the_strength_of_shares_is_found_once_and_does_not_answer_to_the_cost(tmp_path, ramp):
    train(*fresh(tmp_path), replace(SETTINGS, ramp=ramp), tmp_path / "run", log_every=1, progress=False)
    lines, parts = outcome(tmp_path / "run")
    strengths = [line["train"]["strength"] for line in lines if "train" in line]
    goal = parts["controller"]["goal"]
    rises = [0, 1 / 3, 2 / 3, 1, 1, 1] if ramp else [1] * 6
    assert goal > 0 and strengths == pytest.approx([goal * part for part in rises], rel=1e-3, abs=1e-4)


def test_without_a_reduction_the_model_trains_unpruned(tmp_path):
    settings = replace(SETTINGS, reduction=0.0, shares=(), distill=0.0, average=0.0)
    result = train(*fresh(tmp_path), settings, tmp_path / "out", log_every=1, progress=False)
    assert result["reduction"] == 0 and result["gflops"] == result["dense_gflops"]
    lines, _ = outcome(tmp_path / "out")
    losses = [line["train"]["loss"] for line in lines if "train" in line]
    assert len(losses) == 6 and losses[-1] != losses[0]


def test_averaged_weights_are_shown_and_put_back():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    average = WeightAverage(model, 0.5)
    for value in (2.0, 4.0):
        torch.nn.init.constant_(model.weight, value)
        average.update(model)
    # memories of 1/10 and 2/11, then never more than a half
    expected = 2 / 11 * (1 / 10 * 1 + 9 / 10 * 2) + 9 / 11 * 4
    with average.shown(model):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4
    average.put(model)
    assert model.weight.item() == pytest.approx(expected)


def test_drawn_examples_are_named_and_grouped():
    task = TASKS["nlvr"](tiny("nlvr"))
    examples = read_examples(task, "shapes:dev,pairs=3,seed=2", None, 4, training=False)
    assert len(examples) == 3 and len(examples[1]) == 4 and len({id(one.left) for one in examples[0]}) == 1
    assert [one.sentence for one in examples[2]] == [one.sentence for one in examples[1:][1]]
    larger = read_examples(task, "shapes:dev,pairs=3,seed=2,scale=2", None, 4, training=False)
    assert larger[0][0].left.size == (192, 192) and larger[0][0].sentence == examples[0][0].sentence
    for name in ("shapes:none", "shapes:dev,pairs=0x", "shapes:dev,size=2"):
        with pytest.raises(ValueError, match=r"shapes|split"):
            read_examples(task, name, None, 4, training=False)
    with pytest.raises(ValueError, match="cannot answer"):
        read_examples(TASKS["clip"](tiny("clip")), "shapes:dev", None, 1, training=False)


def test_thresholds_are_those_of_all_processes_together(fresh_command):
    """Each has its share of the scores, of another length."""
    code = """
import torch
from madtp.processes import gathered_rows, joined, rank
from madtp.compress.thresholds import quantile
with joined("cpu"):
    scores = gathered_rows(torch.arange(10.0)[[slice(0, 3), slice(3, 10)][rank()]])
    print(scores.tolist(), quantile(scores, 0.4))
"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = [fresh_command.start(code, env={**os.environ, **place, "RANK": rank}) for rank in "01"]
    for process in started:
        assert process.wait() == 0, process.stderr
        assert process.stdout.strip() == f"{[float(n) for n in range(10)]} 3.0"


def test_ranked_novelty_is_trained_by_shares(tmp_path):
    """A rule of the package, and one of a limit that every picture shares."""
    for name, adaptive in (("ranked_novelty", True), ("tome", False)):
        model, task, examples, dev = fresh(tmp_path)
        model.pruning = METHODS[name]()
        settings = replace(SETTINGS, steps=2, average=0.0, shares=(0.3, 0.2))
        result = train(model, task, examples, dev, settings, tmp_path / name / "out", log_every=1, progress=False)
        rule = madtp.load(tmp_path / name / "out").pruning
        assert rule.name == name and len(rule.thresholds if adaptive else rule.shares) == 3
        assert result["reduction"] > 0.05 and rule.active
