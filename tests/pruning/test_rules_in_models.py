"""Rules that merge, in every task's model: images are shortened, each by itself, and what looks at them is told how
much a token stands for."""

from dataclasses import replace

import pytest
import torch
from compression import CONFIGS, pictures, tiny
from rules import RULES

from madtp.compress.calibrate import _read
from madtp.pruning import MergingPruning, Pruning, RankedNovelty
from madtp.tasks import TASKS, task_of

MERGING = {name: rule for name, rule in RULES.items() if isinstance(rule, MergingPruning)}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """A tiny model of a task, and instances."""
    folder, kind = tmp_path_factory.mktemp(request.param), TASKS[request.param]
    names = [folder / name for name, _ in pictures(folder, 4)]
    model = tiny(request.param)
    task, count = task_of(model), kind.images_per_example
    examples = [kind.example((names[i], names[(i + 1) % 4])[:count], "one is red", i) for i in range(4)]
    return model, task, [task.instance(example) for example in examples]


def forward(model, task, instances, rule):
    """What decides on the answers, and tokens of images after each layer."""
    batch = task.collate(instances)
    with torch.inference_mode():
        output = task.forward(model, batch, rule)
    return _read(task.states(output)), task.streams(output, batch)[0]


@pytest.mark.parametrize("rule", MERGING.values(), ids=MERGING)
def test_images_are_shortened_each_by_itself(case, rule):
    model, task, instances = case
    features, lengths = forward(model, task, instances, rule)
    dense, before = forward(model, task, instances, Pruning())
    assert all(row[0] == 17 and row[-1] < 17 for row in lengths)
    assert before == [[17] * 4] * 4
    assert features.isfinite().all() and not torch.equal(features, dense)
    for number, instance in enumerate(instances):
        one, length = forward(model, task, [instance], rule)
        torch.testing.assert_close(one[0], features[number], atol=1e-5, rtol=1e-5)
        assert length[0] == lengths[number]


def test_sizes_count_in_attention_to_images(case):
    """Without proportional attention a merged token is one key among others."""
    model, task, instances = case
    rule = RankedNovelty(shares=(0.25,))
    # Of the last layer alone, so that only what attends to its tokens afterwards can tell.
    rule = replace(rule, shares=(0.0, 0.0, 0.5))
    with_sizes, _ = forward(model, task, instances, rule)
    without, _ = forward(model, task, instances, replace(rule, proportional_attention=False))
    if task.name in ("nlvr", "vqa"):
        assert not torch.allclose(with_sizes, without)
    else:  # nothing attends to them any more before the features
        assert torch.equal(with_sizes, without)
