"""A new task is one file and one line: everything else serves it without knowing it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from compression import TEXT, VISION, pictures
from PIL import Image
from torch import nn

import madtp
from madtp import CaptionConfig, cli, flops, predict
from madtp.compress.objective import Objective
from madtp.compress.settings import Settings
from madtp.evaluate.run import evaluate
from madtp.options import option
from madtp.rows import first_rows
from madtp.tasks import TASKS, ImageInputs, Options, Recipe, Task, task_of
from madtp.tasks.annotations import CaptionExample
from madtp.tasks.base import Answer
from madtp.tasks.caption import CaptionProcessor
from madtp.tasks.caption.model import Caption
from madtp.weights import randomize

# ---- the file


class RedConfig(CaptionConfig):
    """Sizes of an image encoder."""

    task = "red"


class Red(Caption):
    """Is an image red?"""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        del self.text_decoder
        self.head = nn.Linear(config.vision.embed_dim, 1)

    def redness(self, output):
        return self.head(first_rows(output.images)).float()[:, 0].sigmoid()


@dataclass(frozen=True)
class RedAnswer(Answer):
    """Whether it is."""

    red: bool
    image_tokens: list

    columns = ("red", "image_tokens")


@dataclass(kw_only=True)
class RedOptions(Options):
    threshold: float = option("redness from which an image is red", 0.5, type=float, metavar="P", group="red")

    def arguments(self):
        return {"threshold": self.threshold}


class RedTask(Task):
    """A classifier of images."""

    name = "red"
    Config, Processor, Model = RedConfig, CaptionProcessor, Red
    Answer, Inputs, Options, EvaluationOptions = RedAnswer, ImageInputs, RedOptions, RedOptions
    help = "red images"
    unit, headline = "image", "share"
    streams_of_records = {"image": ("image", ("image_tokens",))}  # noqa: RUF012
    recipe = Recipe(1, 2, 1e-3, 0.0)
    score_name = "accuracy"
    aligned = False

    def answer(self, model, instances, threshold=0.5):
        with torch.inference_mode():
            output = model(torch.stack(instances))
            red = (model.redness(output) > threshold).tolist()
        (lengths,) = streams = self.streams(output)
        return [RedAnswer(*values) for values in zip(self.costs(streams, True), red, lengths, strict=True)], output

    def streams(self, output, batch=None):
        return (flops.stream_lengths(output.vision),)

    def costs(self, streams, pruning, written=(), beams=1):
        return [flops.vit(self.config.vision, lengths, pruning=pruning) for lengths in streams[0]]

    def rows(self, examples):
        return [{"sample": n, "image": str(one.image), "label": one.captions[0]} for n, one in enumerate(examples)]

    def quality(self, steps, options):
        return {"quality": {"share": sum(record["red"] for record in steps["image"]) / len(steps["image"])}}

    def instance(self, example, random=None):
        return {
            "pixels": self.image(example.image, random),
            "text": torch.zeros(1),
            "red": "red" in example.captions[0],
        }

    def collate(self, instances):
        return super().collate(instances) | {"red": torch.tensor([one["red"] for one in instances])}

    def forward(self, model, batch, pruning, *args, **kwargs):
        return model(batch["pixels"], None, pruning)

    def loss(self, model, batch, output, pruning, seed):
        return {"answer": nn.functional.binary_cross_entropy(model.redness(output), batch["red"].float())}

    def records(self, model, batch, output):
        return ((model.redness(output) > 0.5) == batch["red"]).tolist()


# ---- what serves it


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, "red", RedTask)  # the line


@pytest.fixture
def model(registered):
    model = Red(RedConfig(VISION, TEXT), 0.5)
    randomize(model, seed=3)
    model.space_dict.data.mul_(0.2)
    model.processor = CaptionProcessor(32, TEXT.vocab_size, TEXT.max_position_embeddings, "demo")
    return model


@pytest.fixture
def images(tmp_path):
    return [tmp_path / name for name, _ in pictures(tmp_path, 5)]


def test_predictions(model, images):
    answers = predict.answer(model, images, batch_size=2)
    with torch.inference_mode():
        output = model(torch.stack([model.processor.image(path) for path in images]))
    assert [answer.red for answer in answers] == (model.redness(output) > 0.5).tolist()
    assert [answer.image_tokens for answer in answers] == flops.stream_lengths(output.vision)


def test_evaluation(model, images):
    examples = [CaptionExample(path, number, ("red",)) for number, path in enumerate(images)]
    (dense, pruned), records = evaluate(model, examples, threshold=0.0, progress=False)
    assert dense["quality"] == pruned["quality"] == {"share": 1.0}, "every image is redder than nothing"
    assert pruned["gflops"] < dense["gflops"] and len(records[0.5]["image"]) == len(images)


def test_training(model, images):
    task = task_of(model)
    examples = [CaptionExample(path, number, ("red",)) for number, path in enumerate(images)]
    batch = task.collate([task.instance(example, np.random.default_rng(0)) for example in examples])
    objective = Objective(model, task, Settings(reduction=0.3, epochs=1, batch_size=5, lr=1e-3, weight_decay=0.0))
    loss, terms, (measured, dense), _ = objective(batch, 0.5, (0, 0))
    assert list(terms) == ["answer"] and measured < dense
    loss.backward()
    assert model.head.weight.grad.abs().max() > 0
    assert task.score(task.records(model, batch, model(batch["pixels"]))) in {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}


def test_the_command(model, images, tmp_path, capsys):
    madtp.save_pretrained(model, tmp_path / "model")
    loaded = madtp.load(tmp_path / "model")
    assert type(loaded) is Red and loaded.config == model.config
    arguments = ["red", "--model", str(tmp_path / "model"), *map(str, images), "--threshold", "0"]
    assert cli.main([*arguments, "--save-overlay", f"{tmp_path}/drawn/"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["image"] for record in records] == [str(path) for path in images]
    assert all(record["red"] and record["image_tokens"][-1] < 17 for record in records)
    with Image.open(records[0]["overlay"]) as picture:
        assert picture.width > 200
    (tmp_path / "red.json").write_text(
        json.dumps([{"image": path.name, "image_id": 1, "caption": "a"} for path in images])
    )
    annotations = ["--annotations", str(tmp_path / "red.json"), "--threshold", "1"]
    assert cli.main(["evaluate", "--model", str(tmp_path / "model"), *annotations]) == 0
    assert "share" in capsys.readouterr().out


def test_nothing_else_asks_for_a_task_by_name():
    root = Path(madtp.__file__).parent
    asking = [
        f"{path.relative_to(root)}:{number}"
        for path in root.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "task ==" in line or "task !=" in line
    ]
    assert not asking, asking
