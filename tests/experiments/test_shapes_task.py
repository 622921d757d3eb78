"""What the dense model of shapes learns from, stage by stage, through the package's trainer."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from madtp import NLVRConfig, TextConfig, VisionConfig
from madtp.compress.objective import Objective
from madtp.compress.settings import Settings
from madtp.data.synthetic import Shapes
from madtp.pruning import Pruning
from madtp.tasks.nlvr.model import NLVR
from madtp.weights import randomize

CONFIG = NLVRConfig(
    vision=VisionConfig(image_size=96, patch_size=8, embed_dim=24, depth=2, num_heads=2, sd_num=8, sd_dim=24),
    text=TextConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, vocab_size=54,
        max_position_embeddings=16, encoder_width=24,
    ),
    merge_from=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def shapes():
    path = Path(__file__).parents[2] / "experiments" / "shapes" / "task.py"
    spec = importlib.util.spec_from_file_location("shapes_task", path)
    sys.modules["shapes_task"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["shapes_task"]


@pytest.mark.parametrize(
    "images, statements, guided, terms",
    [
        (True, 0, False, {"patch"}),
        (True, 3, False, {"patch", "answer", "count"}),
        (False, 3, True, {"answer", "count", "look"}),
        (True, 3, True, {"patch", "answer", "count", "look"}),
    ],
)
def test_every_stage_learns_what_it_is_for(shapes, images, statements, guided, terms):
    model = NLVR(CONFIG)
    randomize(model, seed=1)
    task = shapes.DenseTask(model)
    stage = shapes.Stage(5, ("exist", "count") if statements else (), 2, statements, images, guided)
    examples = shapes.Drawn(Shapes("dev"), [stage])
    batch = task.collate([task.instance(examples[4])])
    objective = Objective(
        model, task, Settings(reduction=0, epochs=1, batch_size=1, lr=0.1, weight_decay=0, alignment=0)
    )
    loss, found, *_ = objective(batch, Pruning(), (0, 0))
    assert set(found) == terms and loss.item() == pytest.approx(sum(found.values()).item())
    loss.backward()
    learns = {name.split(".")[0] for name, parameter in objective.named_parameters() if parameter.grad is not None}
    assert "auxiliary" in learns
    moved = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert ("visual_encoder" in moved) == images and ("text_encoder" in moved) == bool(statements)


def test_looks_are_those_of_the_models_own_attention(shapes, generator):
    """A head of the cross-attention that looks where it is shown would make the loss the entropy of the target."""
    model = NLVR(CONFIG)
    randomize(model, seed=1)
    task = shapes.DenseTask(model)
    drawn = Shapes("dev").batch(range(2), 3)
    target = torch.nn.functional.pad(drawn.relevant.float(), (1, 0), value=1.0)
    looks = (target.log() - target.sum(-1, keepdim=True).log()).clamp(min=-50).expand(3, -1, -1, -1)
    share = target / target.sum(-1, keepdim=True)
    entropy = -(share * share.clamp(min=1e-30).log()).sum(-1).mean()
    assert shapes.look_loss(looks, drawn).item() == pytest.approx(entropy.item(), rel=1e-4)
    batch = shapes.as_batch(drawn) | {"stage": shapes.Stage(1, ("exist",), 2, 3, True, True)}
    task.forward(model, batch, Pruning())
    assert [look.shape for look in batch["looks"]] == [(4, 3, 145)] * 3


def test_answers_without_gradient_are_those_of_the_task(shapes):
    model = NLVR(CONFIG)
    randomize(model, seed=1)
    task = shapes.DenseTask(model)
    examples = shapes.Drawn(Shapes("dev"), [shapes.Stage(2, ("exist",), 2, 3, True, True)])
    batch = task.collate([task.instance(examples[1])])
    assert batch["drawn"].pixels.equal(Shapes("dev").batch(range(16, 18), 3, ("exist",)).pixels)
    with torch.no_grad():
        logits = task.forward(model, batch, Pruning()).logits
    expected = model(
        torch.cat([side.repeat_interleave(3, 0) for side in batch["pixels"].chunk(2)]), batch["texts"], Pruning()
    ).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
