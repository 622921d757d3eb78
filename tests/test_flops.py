"""Analytic operation counts against figures measured on the official code with fvcore."""

from types import SimpleNamespace

import pytest
import torch

from torch.utils.flop_counter import FlopCounterMode

import madtp
from madtp import flops, layers
from madtp_kernels.attention import reference

VISION = SimpleNamespace(
    image_size=384,
    patch_size=16,
    embed_dim=768,
    depth=12,
    num_heads=12,
    mlp_ratio=4.0,
    sd_num=100,
    sd_dim=768,
    map_func=False,
)
TEXT = SimpleNamespace(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    vocab_size=30524,
    max_position_embeddings=512,
    encoder_width=768,
)
BASE = SimpleNamespace(vision=VISION, text=TEXT, merge_from=6)

# Token counts of the official model pruning one pair at two temperatures (both images keep the same number);
# the official counter gave 62.63 and 22.94 for them.
PRUNED = {
    62.63: (
        [577, 437, 339, 334, 333, 301, 301, 269, 243, 215, 213, 212, 211],
        [20, 20, 20, 20, 17, 14, 12, 8, 6, 4, 3, 3, 3],
    ),
    22.94: (
        [577, 283, 161, 106, 98, 81, 73, 62, 58, 56, 50, 49, 45],
        [20, 16, 12, 11, 8, 6, 4, 4, 4, 4, 3, 3, 3],
    ),
}


def dense(text_tokens):
    return flops.nlvr(BASE, [[577, 577]] * 13, [text_tokens] * 13, guided=False)


@pytest.mark.parametrize("text_tokens, gflops", [(36, 132.5407), (20, 130.2564)])
def test_dense_base_model_gives_the_published_constant(text_tokens, gflops):
    assert dense(text_tokens).official == pytest.approx(gflops, abs=5e-5)


def test_one_more_text_token_costs_a_seventh_of_a_gflop():
    assert dense(21).official - dense(20).official == pytest.approx(0.1425, abs=5e-5)
    assert (dense(36).official - dense(20).official) / 16 == pytest.approx(0.1428, abs=5e-5)


@pytest.mark.parametrize("gflops", PRUNED)
def test_pruned_pair_agrees_with_the_official_counter(gflops):
    vision, text = PRUNED[gflops]
    counted = flops.nlvr(BASE, [[n, n] for n in vision], text)
    assert counted.official == pytest.approx(gflops, abs=5e-3)
    assert counted.full > counted.official


def test_vision_tower_alone():
    assert flops.vit(VISION, [577] * 13, guided=False).official == pytest.approx(55.539, abs=5e-4)


def test_consulting_the_dictionary_without_pruning_is_full_cost_only():
    lengths = ([[577, 577]] * 13, [20] * 13)
    plain, guided = flops.nlvr(BASE, *lengths, guided=False), flops.nlvr(BASE, *lengths, guided=True)
    assert guided.official == plain.official
    extra = guided.full - plain.full
    assert extra == pytest.approx(sum(guided.parts[k] for k in ("alignment", "importance", "threshold")))
    assert guided.parts["alignment"] == pytest.approx(12 * (2 * 576 + 19) * 100 * 768 / 1e9)


def test_parts_sum_to_full():
    vision, text = PRUNED[62.63]
    counted = flops.nlvr(BASE, [[n, n - 1] for n in vision], text)
    assert sum(counted.parts.values()) == pytest.approx(counted.full)


def test_the_two_images_are_counted_with_their_own_lengths():
    few, many = PRUNED[22.94][0], PRUNED[62.63][0]
    text = [20] * 13
    mixed = flops.nlvr(BASE, [list(row) for row in zip(few, many)], text).official
    swapped = flops.nlvr(BASE, [list(row) for row in zip(many, few)], text).official
    low, high = (flops.nlvr(BASE, [[n, n] for n in lengths], text).official for lengths in (few, many))
    assert mixed == pytest.approx(swapped) == pytest.approx((low + high) / 2)


def test_tensors_are_accepted():
    vision, text = PRUNED[62.63]
    as_lists = flops.nlvr(BASE, [[n, n] for n in vision], text)
    assert flops.nlvr(BASE, torch.tensor([[n, n] for n in vision]), torch.tensor(text)) == as_lists


@pytest.mark.parametrize(
    "vision, text, named",
    [
        ([[577, 577]] * 12, [20] * 13, "vision_lengths"),
        ([[577]] * 13, [20] * 13, "vision_lengths"),
        ([[577, 577]] * 13, [20] * 12, "text_lengths"),
        ([[577, 577]] * 12 + [[578, 577]], [20] * 13, "vision_lengths"),
    ],
)
def test_lengths_that_do_not_fit_the_model_are_refused(vision, text, named):
    with pytest.raises(ValueError, match=named):
        flops.nlvr(BASE, vision, text)


def test_counts_are_read_from_the_traces_of_an_output():
    def trace(before, after):
        return SimpleNamespace(lengths_in=torch.tensor(before), lengths=torch.tensor(after))

    vision, text = PRUNED[22.94]
    other = PRUNED[62.63][0]
    images = [vision, other, vision, vision]  # left 0, left 1, right 0, right 1
    output = SimpleNamespace(
        vision=[trace([i[l] for i in images], [i[l + 1] for i in images]) for l in range(12)],
        text=[trace([text[l], 20], [text[l + 1], 20]) for l in range(12)],
    )
    counts = flops.from_output(BASE, output)
    assert counts[0] == flops.nlvr(BASE, [[n, n] for n in vision], text)
    assert counts[1] == flops.nlvr(BASE, list(zip(other, vision)), [20] * 13)


@pytest.mark.parametrize(
    "source, text_tokens", [("demo", 20), pytest.param("random:base", 36, marks=pytest.mark.slow)]
)
def test_matrix_products_agree_with_torchs_flop_counter(source, text_tokens, monkeypatch):
    """The dense model with attention's formula in the open, where the counter sees its matrix products."""

    def attention(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, backend=None, **options):
        assert not any(options.values())
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, False, None)

    monkeypatch.setattr(layers, "attention", attention)
    model = madtp.load(source)
    size, pairs = model.config.vision.image_size, 1 if source == "random:base" else 3
    ids = [torch.arange(max(text_tokens - 3 * b, 1)) for b in range(pairs)]
    with model.dense(), FlopCounterMode(display=False) as counter:
        output = model(torch.randn(2 * pairs, 3, size, size), ids)
    counts = flops.from_output(model.config, output, guided=False)
    assert counter.get_total_flops() / 2e9 == pytest.approx(
        sum(c.parts["linear"] + c.parts["attention"] for c in counts)
    )
    if source == "random:base":
        assert counts[0].official == pytest.approx(132.5407, abs=5e-5)
