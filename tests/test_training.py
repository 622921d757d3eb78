"""Training: the dense forward is the model's own function, and a run goes on exactly where it was stopped."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from madtp import NLVRConfig, TextConfig, VisionConfig
from madtp.checkpoints import randomize
from madtp.compress.dense import forward_pairs
from madtp.compress.run import CHECKPOINT, METRICS, Run
from madtp.compress.schedule import cosine, linear_decay
from madtp.models.nlvr import NLVR

CONFIG = NLVRConfig(
    vision=VisionConfig(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, sd_num=8, sd_dim=32),
    text=TextConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=40,
        max_position_embeddings=16, encoder_width=32,
    ),
    merge_from=1,
)  # fmt: skip


def test_the_dense_training_forward_is_the_model_at_temperature_zero(generator):
    """Outputs and gradients, with statements of several lengths; in float64, where rounding hides nothing."""
    model = NLVR(CONFIG)
    randomize(model, seed=int(torch.randint(100, (), generator=generator)))
    model = model.double()
    pairs, per_pair, longest = 3, 4, 9
    pixels = torch.randn(2 * pairs, 3, 32, 32, generator=generator, dtype=torch.float64)
    ids = torch.randint(40, (pairs, per_pair, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (pairs, per_pair), generator=generator)
    target = torch.randint(2, (pairs, per_pair), generator=generator)

    output = forward_pairs(model, pixels, ids, lengths)
    F.cross_entropy(output.logits.flatten(0, 1), target.flatten()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    left, right = pixels.split(pairs)
    repeated = torch.cat([left.repeat_interleave(per_pair, 0), right.repeat_interleave(per_pair, 0)])
    texts = [ids[p, k, : lengths[p, k]] for p in range(pairs) for k in range(per_pair)]
    expected = model(repeated, texts, temperature=0.0)
    F.cross_entropy(expected.logits, target.flatten()).backward()

    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(output.logits.flatten(0, 1), expected.logits, **close)
    assert gradients.keys() == {name for name, _ in model.named_parameters()} - {"space_dict"}
    for name, parameter in model.named_parameters():
        if name != "space_dict":
            torch.testing.assert_close(gradients[name], parameter.grad, msg=lambda text, n=name: f"{n}: {text}", **close)


# A run that depends on the position of the sampler, on random numbers, on the optimiser's moments and on the schedule.
SCRIPT = """
import os, sys
import torch
from torch import nn
from madtp.compress.run import Run
from madtp.compress.schedule import linear_decay

directory, dies_at = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
scheduler = linear_decay(optimizer, 20, warmup=3)
parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
run = Run(directory, parts, {"steps": 20}, save_every=1e9)
while run.step < 20:
    if run.step == dies_at:
        os.kill(os.getpid(), 9)
    x = torch.full((2, 4), float(run.step)).sin() + torch.rand(2, 4)
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    run.advance()
    run.log(loss=loss.item(), lr=scheduler.get_last_lr()[0])
    if run.step % 6 == 0:
        run.save()
run.save()
"""


def execute(directory, dies_at=-1):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(SCRIPT), directory, str(dies_at)], timeout=120).returncode


def outcome(directory):
    records = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    state = torch.load(directory / CHECKPOINT, weights_only=True)
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records], state["parts"], state["random"]


def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert execute(whole) == 0
    for dies_at in (4, 11, 15):  # before the first checkpoint, and after steps that have to be done again
        assert execute(killed, dies_at) == -9
    with open(killed / METRICS, "a") as log:
        log.write('{"step": 14, "lo')  # killed while it wrote
    assert execute(killed) == 0
    (log, parts, random), (log_again, parts_again, random_again) = outcome(whole), outcome(killed)
    assert [record["step"] for record in log] == list(range(1, 21))
    assert log_again == log
    assert torch.equal(random_again, random)
    torch.testing.assert_close(parts_again, parts, rtol=0, atol=0)


def test_a_run_does_not_go_on_under_other_settings(tmp_path):
    Run(tmp_path, {}, {"lr": 0.1, "steps": 5}).save()
    Run(tmp_path, {}, {"lr": 0.1, "steps": 5})
    with pytest.raises(ValueError, match="lr: 0.1 then, 0.2 now"):
        Run(tmp_path, {}, {"lr": 0.2, "steps": 5})


def test_a_checkpoint_that_is_not_whole_never_replaces_one_that_is(tmp_path):
    class Breaks:
        def state_dict(self):
            return {"first": torch.zeros(1000), "then": lambda: "cannot be written"}

    run = Run(tmp_path, {}, {})
    run.advance()
    run.save()
    run.parts = {"model": Breaks()}
    run.advance()
    with pytest.raises(Exception, match="[Pp]ickle"):
        run.save()
    assert Run(tmp_path, {}, {}).step == 1


def rates(schedule, steps, **options):
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = schedule(optimizer, steps, **options)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values, optimizer.param_groups[0]["lr"]


def test_learning_rates():
    values, end = rates(linear_decay, 100, warmup=10)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[10:76] == [2.0] * 66
    assert values[76:] == pytest.approx([2.0 * (100 - i) / 25 for i in range(76, 100)]) and end == 0
    values, end = rates(cosine, 50)
    assert values[0] == 2.0 and values[25] == pytest.approx(1.0) and values == sorted(values, reverse=True) and end == 0
