"""Sampling with a seed per prompt: the same words in any batch, in the proportions of the softmax."""

import pytest
import torch

from madtp import generation


def sampled(logits, seeds):
    """One word per seed, from the same logits ``[V]``."""
    noisy = generation._Gumbel(seeds)(None, logits.expand(len(seeds), -1))
    return noisy.argmax(1)


def test_words_follow_their_probabilities():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    count = 20000
    counted = sampled(logits, range(count)).bincount(minlength=5)
    expected = count * logits.softmax(0)
    deviation = (expected * (1 - expected / count)).sqrt()
    assert ((counted - expected).abs() <= 5 * deviation).all() and counted[4] == 0


def test_a_seed_gives_the_same_words_in_any_batch():
    logits = torch.zeros(50)
    seeds = [7, 3, 11, 3]
    together = sampled(logits, seeds)
    assert together.tolist() == [sampled(logits, [seed]).item() for seed in seeds]
    assert together[1] == together[3] and together.unique().numel() > 1


def test_each_step_has_new_random_numbers():
    processor, logits = generation._Gumbel([5]), torch.zeros(1, 1000)
    assert len({processor(None, logits).argmax().item() for _ in range(10)}) > 5


@pytest.mark.parametrize(
    "seeds, options",
    [([1], {"do_sample": True}), ([1, 2], {}), ([1, 2], {"do_sample": True, "num_beams": 3})],
    ids=["too few", "no sampling", "beams"],
)
def test_seeds_that_make_no_sense(seeds, options):
    with pytest.raises(ValueError, match="seeds: expected one for each of 2 prompts"):
        generation._sampling(dict(options), seeds, 2)
