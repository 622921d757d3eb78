"""Training: the dense forward is the model's own function, and a run goes on exactly where it was stopped."""

import json
import resource
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from madtp import NLVRConfig, TextConfig, VisionConfig, flops
from madtp.compress.controller import BracketController
from madtp.compress.run import CHECKPOINT, METRICS, Run
from madtp.compress.schedule import cosine, linear_decay
from madtp.compress.train import _Best
from madtp.linear import ROUNDED, Linear
from madtp.pruning import MADTP
from madtp.resume import ResumeError
from madtp.search import find_strength
from madtp.tasks.nlvr import NLVRTask
from madtp.tasks.nlvr.model import NLVR
from madtp.weights import CheckpointError, randomize

CONFIG = NLVRConfig(
    vision=VisionConfig(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, sd_num=8, sd_dim=32),
    text=TextConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, vocab_size=40,
        max_position_embeddings=16, encoder_width=32,
    ),
    merge_from=1,
)  # fmt: skip


def random_pairs(generator, dtype=torch.float64, number=3, per_pair=4, longest=9):
    """A random model (in float64 rounding hides nothing), and statements of several lengths about images."""
    model = NLVR(CONFIG)
    randomize(model, seed=int(torch.randint(100, (), generator=generator)))
    pixels = torch.randn(2 * number, 3, 32, 32, generator=generator, dtype=dtype)
    ids = torch.randint(40, (number, per_pair, longest), generator=generator)
    lengths = torch.randint(3, longest + 1, (number, per_pair), generator=generator)
    target = torch.randint(2, (number * per_pair,), generator=generator)
    return model.to(dtype), pixels, ids, lengths, target


def repeated(pixels, ids, lengths, counts):
    """The same as `NLVR.forward` takes it: every pair as often as there are statements about it."""
    images = [side.repeat_interleave(torch.tensor(counts), 0) for side in pixels.split(len(counts))]
    return torch.cat(images), [ids[p, k, : lengths[p, k]] for p, count in enumerate(counts) for k in range(count)]


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, rtol=1e-6, atol=1e-9):
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("proportional", [False, True])
def test_several_statements_about_a_pair_are_the_model_with_the_pair_repeated(generator, proportional):
    """As many statements about one pair as about another, or not."""
    # Sizes come with float32 (and half) tokens only.
    dtype, close = (
        (torch.float32, {"rtol": 1e-3, "atol": 1e-5}) if proportional else (torch.float64, {"rtol": 1e-6, "atol": 1e-8})
    )
    model, pixels, ids, lengths, _ = random_pairs(generator, dtype)
    model.pruning = MADTP(0.0, proportional_attention=proportional)
    for counts in ([4, 4, 4], [1, 4, 2]):
        images, texts = repeated(pixels, ids, lengths, counts)
        target = torch.randint(2, (len(texts),), generator=generator)
        output = model(pixels, texts, 2.0, alignment_features=True, statements=counts)
        expected = model(images, texts, 2.0, alignment_features=True)
        for trace in (output.vision, output.text):
            assert sum(record.pruned.sum() for record in trace) > 0
        torch.testing.assert_close(output.logits, expected.logits, **close)
        task = NLVRTask(types.SimpleNamespace(config=model.config, processor=None))
        vision, text = task.alignment_features(output, {"statements": counts})
        wanted = expected.alignment_features[0].unflatten(0, (2, -1)).mean(0)
        torch.testing.assert_close(vision, wanted, **close)
        costs = task.costs(task.streams(output, {"statements": counts}), True)
        torch.testing.assert_close(text, expected.alignment_features[1], **close)
        assert costs == flops.from_output(model.config, expected)
        found = gradients(model, F.cross_entropy(output.logits, target))
        assert_same_gradients(found, gradients(model, F.cross_entropy(expected.logits, target)), **close)


@pytest.mark.parametrize("shift", [0.0, 0.02])
def test_the_controller_follows_a_target_while_the_model_changes(shift):
    """A cost that falls with temperature, of a model that at each step needs a little more of it."""
    controller = BracketController(0.01, window=2)
    costs = []
    for step in range(200):
        cost = 10 / (1 + controller.strength * (1 - shift) ** step)
        costs.append(cost)
        before = controller.strength
        assert controller.update(cost, 2.0) == controller.strength
        assert step % 2 or controller.strength == before  # it moves after two measurements
    late = costs[60:]
    assert max(abs(cost - 2.0) for cost in late) < 0.3
    assert abs(sum(late) / len(late) - 2.0) < 0.1


def test_a_temperature_is_found_for_a_cost(generator):
    target, start = (float(x) for x in torch.rand(2, generator=generator) * 8 + 1)
    found = find_strength(lambda t: 10 / (1 + t), target, start)
    assert 10 / (1 + found) == pytest.approx(target, rel=0.01)
    found = find_strength(lambda t: 9.0 if t < 3.7 else 1.0, 2.0, start)  # no temperature costs 2
    assert found == pytest.approx(3.7, rel=1e-4)
    with pytest.raises(ValueError, match="no strength reaches 0.5; 1e.06 costs 1.0"):
        find_strength(lambda t: max(1.0, 10 - t), 0.5, start)
    with pytest.raises(ValueError, match="no strength reaches 11; 1e-06 costs 9.99"):
        find_strength(lambda t: 10 - t, 11, start)


@pytest.mark.parametrize("start", [1e-9, 0.0, 1e-6, 1e6, 1e9, float("inf")])
def test_a_search_that_starts_beyond_all_temperatures_starts_at_the_nearest(start):
    tried = []
    found = find_strength(lambda t: tried.append(t) or 10 / (1 + t), 2.0, start)
    assert 10 / (1 + found) == pytest.approx(2.0, rel=0.01)
    assert tried[0] == (1e-6 if start < 1 else 1e6) and all(1e-6 <= t <= 1e6 for t in tried)
    with pytest.raises(ValueError, match="start: expected a number, got nan"):
        find_strength(lambda t: 10 / (1 + t), 2.0, float("nan"))


@pytest.mark.parametrize("target, bound", [(0.0, 1e6), (100.0, 1e-6)])
def test_a_controller_that_never_reaches_its_target_stays_in_bounds_and_comes_back(target, bound):
    controller = BracketController(1.0, window=1)
    for _ in range(100):
        controller.update(10.0, target)
    assert controller.strength == bound
    controller.update(10.0, 10.1 if target < 1 else 9.9)  # within tolerance
    assert controller.strength == bound
    for _ in range(10):
        controller.update(10.0, 100.0 if target < 1 else 1e-3)
    assert 1e-6 < controller.strength < 1e6
    for temperature in (0.0, 1e-7, 1e7, float("nan")):
        with pytest.raises(ValueError, match="strength: expected 1e-06 to 1e.06"):
            BracketController(temperature)


class Killed(Exception):
    """Ends a run without any of its code being asked."""


def train(directory, dies_at=None, logs_until=None, saved=6):
    """A run that depends on the sampler's position, random numbers, the optimiser's moments, the schedule.

    Every ``saved`` steps there is a checkpoint. It dies before the step after ``dies_at``, or after step ``logs_until``,
    of which it logs nothing.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = linear_decay(optimizer, 20, warmup=3)
    controller = BracketController(window=4)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "controller": controller}
    run = Run(directory, parts, {"steps": 20})
    while run.step < 20:
        if run.step == dies_at:
            raise Killed
        x = torch.full((2, 4), float(run.step)).sin() + torch.rand(2, 4)
        loss = controller.strength * model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        controller.update(loss.item(), 0.1)
        run.advance(loss=loss.item())
        if run.step == logs_until:
            raise Killed
        run.log(lr=scheduler.get_last_lr()[0], **(run.averages() if run.step % 5 == 0 else {}))
        if run.step % saved == 0:
            run.save()
    run.save()


def outcome(directory):
    records = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    state = torch.load(directory / CHECKPOINT, weights_only=True)
    return (
        [{k: v for k, v in record.items() if k != "seconds"} for record in records],
        state["parts"],
        state["random"],
    )


def test_a_killed_run_ends_as_if_it_had_not_been_killed(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole)
    for dies_at in (4, 11, 15):  # before the first checkpoint, and after steps that have to be done again
        with pytest.raises(Killed):
            train(killed, dies_at)
    with open(killed / METRICS, "a") as log:
        log.write('{"step": 14, "lo')  # killed while it wrote
    (killed / f"{CHECKPOINT}.tmp").write_bytes(b"half a checkpoint")
    train(killed)
    (log, parts, random), (log_again, parts_again, random_again) = outcome(whole), outcome(killed)
    assert [record["step"] for record in log] == list(range(1, 21))
    assert log_again == log
    assert torch.equal(random_again, random)
    torch.testing.assert_close(parts_again, parts, rtol=0, atol=0)


def test_a_step_is_in_the_checkpoint_only_if_it_is_in_the_log(tmp_path):
    """There is a checkpoint of every step, and the run dies between a step and its line."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole)
    for step in (1, 5, 9, 10):  # steps 5 and 10 log averages over the steps before
        with pytest.raises(Killed):
            train(killed, logs_until=step, saved=1)
        if step > 1:
            assert torch.load(killed / CHECKPOINT, weights_only=True)["step"] == step - 1
    train(killed, saved=1)
    assert outcome(killed)[0] == outcome(whole)[0]
    torch.testing.assert_close(outcome(killed)[1:], outcome(whole)[1:], rtol=0, atol=0)


def test_metrics_are_means_over_the_steps_since_the_last_line(tmp_path):
    run = Run(tmp_path, {}, {"lr": 0.1})
    for loss in (3.0, 1.0):
        run.advance(loss=loss)
    run.log(**run.averages(), note="half way")
    (line,) = run.metrics()
    assert line["step"] == 2 and line["loss"] == 2.0 and line["note"] == "half way"


def test_a_run_does_not_go_on_under_other_settings(tmp_path):
    Run(tmp_path, {}, {"lr": 0.1, "steps": 5}).save()
    Run(tmp_path, {}, {"lr": 0.1, "steps": 5})
    with pytest.raises(ValueError, match="lr: 0.1 then, 0.2 now"):
        Run(tmp_path, {}, {"lr": 0.2, "steps": 5})


def test_a_damaged_checkpoint_is_named(tmp_path):
    settings, path = {"lr": 0.1}, tmp_path / "checkpoint.pt"

    def run():
        return Run(tmp_path, {"model": torch.nn.Linear(64, 64)}, settings)

    run().save()
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)
    torch.save([1], tmp_path / "list")
    torch.save(state | {"parts": {}}, tmp_path / "parts")
    torch.save(state | {"parts": {"model": torch.nn.Linear(3, 3).state_dict()}}, tmp_path / "shape")
    others = [(tmp_path / name).read_bytes() for name in ("list", "parts", "shape")]
    for damaged in (b"", b"hello\n", good[:5000], good[-5000:], *others):
        path.write_bytes(damaged)
        with pytest.raises(ResumeError, match="checkpoint.pt: damaged, or no checkpoint of such a run .*; remove "):
            run()
    path.write_bytes(good)
    run()


def test_damaged_weights_of_the_best_step_are_named(tmp_path):
    model, best = nn.Linear(4, 4), _Best(tmp_path)
    best.offer(model, 0.5, 7)
    best.restore(model)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="best-00000007.safetensors: damaged or cut off"):
        best.restore(model)
    path.unlink()
    with pytest.raises(CheckpointError, match="best-00000007.safetensors: no such file"):
        best.restore(model)


def test_a_run_from_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    Run(tmp_path, {}, {"lr": 0.1}).save()
    Run(tmp_path, {}, {"lr": 0.1, "clip": None, "shares": ()}, defaults={"clip": None, "shares": ()})
    with pytest.raises(ValueError, match="clip: None then, 1.0 now"):
        Run(tmp_path, {}, {"lr": 0.1, "clip": 1.0}, defaults={"clip": None})


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


@pytest.mark.parametrize("name", [CHECKPOINT, METRICS])
def test_a_full_disk_is_named(name, tmp_path):
    """torch.save tells of an "unexpected pos" instead; a limit of sizes stands for the disk."""
    run, limits = Run(tmp_path, {"model": nn.Linear(64, 64)}, {}), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        with pytest.raises(OSError, match="too large") as caught:
            run.save() if name == CHECKPOINT else run.log(much="x" * 9000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / name)
    run.save()


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


def test_products_of_a_training_step_have_few_shapes(generator, monkeypatch):
    """oneDNN compiles a product for each number of rows, and pruning leaves another one in every batch."""
    layer, product, seen = Linear(12, 20), F.linear, set()

    def watched(x, *others):
        seen.add(len(x))
        return product(x, *others)

    for rows in (1, 5, ROUNDED, ROUNDED + 1, 2 * ROUNDED - 1):
        x = torch.randn(rows, 12, generator=generator, requires_grad=True)
        d_y = torch.randn(rows, 20, generator=generator)
        grads = []
        for call in (layer, lambda x: product(x, layer.weight, layer.bias)):
            with torch.autocast("cpu", torch.bfloat16), monkeypatch.context() as patch:
                patch.setattr(F, "linear", watched)
                y = call(x)
            assert y.shape == d_y.shape and y.dtype == torch.bfloat16
            grads.append((y.float(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), d_y.bfloat16())))
        torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)
    assert seen == {ROUNDED, 2 * ROUNDED}


def test_learning_rates():
    values, end = rates(linear_decay, 100, warmup=10)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert values[10:76] == [2.0] * 66
    assert values[76:] == pytest.approx([2.0 * (100 - i) / 25 for i in range(76, 100)]) and end == 0
    values, end = rates(cosine, 50)
    assert values[0] == 2.0 and values[25] == pytest.approx(1.0) and end == 0
    assert values == sorted(values, reverse=True)
