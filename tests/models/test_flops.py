"""Analytic operation counts against figures measured on the official code with fvcore."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import madtp
from madtp import CaptionConfig, NLVRConfig, RetrievalConfig, TextConfig, VisionConfig, VQAConfig, flops, layers
from madtp.tasks.nlvr.model import NLVR
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
    return flops.nlvr(BASE, [[577, 577]] * 13, [text_tokens] * 13, pruning=False)


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
    assert flops.vit(VISION, [577] * 13, pruning=False).official == pytest.approx(55.539, abs=5e-4)


def test_consulting_the_dictionary_without_pruning_is_full_cost_only():
    lengths = ([[577, 577]] * 13, [20] * 13)
    plain, guided = flops.nlvr(BASE, *lengths, pruning=False), flops.nlvr(BASE, *lengths, pruning=True)
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


def few_layers_of_the_base_model():
    """The real widths; every further layer is one more of the same."""
    return NLVR(NLVRConfig(VisionConfig(depth=2), TextConfig(num_hidden_layers=3), merge_from=2)).eval()


@pytest.mark.parametrize(
    "make, pairs, text_tokens",
    [(lambda: madtp.load("demo-dense"), 3, 13), (few_layers_of_the_base_model, 1, 36)],
    ids=["small", "base"],
)
def test_matrix_products_agree_with_torchs_flop_counter(make, pairs, text_tokens, monkeypatch):
    """The dense model with attention's formula in the open, where the counter sees its matrix products."""

    def attention(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, backend=None, **options):
        assert not any(options.values())
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return reference.attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, False, None)

    monkeypatch.setattr(layers, "attention", attention)
    model = make()
    size = model.config.vision.image_size
    ids = [torch.arange(max(text_tokens - 3 * b, 1)) for b in range(pairs)]
    with model.dense(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        output = model(torch.randn(2 * pairs, 3, size, size), ids)
    counts = flops.from_output(model.config, output, pruning=False)
    assert counter.get_total_flops() / 2e9 == pytest.approx(
        sum(c.parts["linear"] + c.parts["attention"] for c in counts)
    )


# ---- the other tasks


def test_dense_caption_gives_the_published_constant():
    counted = flops.caption(CaptionConfig(), [577] * 13, 15, pruning=False)
    assert counted.official == pytest.approx(65.72, abs=5e-3)


def test_beams_share_the_image_and_count_in_full_only():
    one, three = (flops.caption(CaptionConfig(), [577] * 13, 10, beams=n, pruning=False) for n in (1, 3))
    assert three.official == pytest.approx(one.official)
    # 10 tokens through the decoder cost about a GFLOP, the keys and values of the image another eight.
    assert 1.9 < three.full - one.full < 2.9


def in_the_open(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, causal=False, backend=None, key_bias=None, with_lse=True
):
    """Attention's formula where the counter sees its matrix products."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return reference.attention(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, key_bias)


SMALL = {
    "vision": VisionConfig(image_size=48, patch_size=16, embed_dim=128, depth=2, num_heads=2, mlp_ratio=2.0, sd_dim=128),
    "text": TextConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, vocab_size=200,
        max_position_embeddings=40, encoder_width=128,
    ),
}  # fmt: skip


def measured(run):
    """GFLOPs of the matrix products of a call, in multiply-adds, and what the call returned."""
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops() / 2e9, result


def products(counts):
    return pytest.approx(sum(c.parts["linear"] + c.parts["attention"] for c in counts))


@pytest.fixture
def pictures():
    return torch.randn(3, 3, 48, 48)


@pytest.fixture
def texts():
    return [torch.arange(1, 1 + length) for length in (9, 4, 6)]


def test_caption_agrees_with_torchs_flop_counter(monkeypatch, pictures, texts):
    monkeypatch.setattr(layers, "attention", in_the_open)
    model = madtp.load("random:base", "caption", config=CaptionConfig(**SMALL))
    total, output = measured(lambda: model(pictures, texts))
    images = flops.stream_lengths(output.vision)
    counts = [flops.caption(model.config, i, len(t), pruning=False) for i, t in zip(images, texts, strict=True)]
    assert total == products(counts)


def test_vqa_agrees_with_torchs_flop_counter(monkeypatch, pictures, texts):
    monkeypatch.setattr(layers, "attention", in_the_open)
    model = madtp.load("random:base", "vqa", config=VQAConfig(**SMALL))

    def run():
        output = model(pictures, texts)
        keys = model.text_decoder.keys(output.questions)
        states = model.text_decoder(model._ids(texts), keys)
        model.text_decoder.logits(states.values)
        return output

    total, output = measured(run)
    streams = zip(flops.stream_lengths(output.vision), flops.stream_lengths(output.text), texts, strict=True)
    assert total == products([flops.vqa(model.config, i, q, len(t), pruning=False) for i, q, t in streams])


def test_retrieval_agrees_with_torchs_flop_counter(monkeypatch, pictures, texts):
    monkeypatch.setattr(layers, "attention", in_the_open)
    model = madtp.load("random:base", "retrieval", config=RetrievalConfig(**SMALL, proj_dim=16))
    total, image = measured(lambda: model.encode_image(pictures))
    counts = [flops.retrieval(model.config, image=i, pruning=False) for i in flops.stream_lengths(image.trace)]
    assert total == products(counts)
    total, text = measured(lambda: model.encode_text(texts))
    counts = [flops.retrieval(model.config, text=t, pruning=False) for t in flops.stream_lengths(text.trace)]
    assert total == products(counts)
    total, matches = measured(lambda: model.match(image.tokens, texts, [(2, 0), (0, 1), (1, 1)]))
    counts = [flops.retrieval(model.config, match=(10, t), pruning=False) for t in flops.stream_lengths(matches.text)]
    assert total == products(counts)
    # Two texts of one image cost less than twice one: the image's keys and values are computed once.
    alone, _ = measured(lambda: model.match(image.tokens, texts[:1], [(0, 0)]))
    shared, _ = measured(lambda: model.match(image.tokens, texts[:1], [(0, 0), (0, 0)]))
    keys = 3 * 2 * 10 * 128 * 128 / 1e9  # per image and layer; those of the other two are computed in both
    assert shared - alone == pytest.approx(alone - 3 * keys)


def test_pruned_parts_of_the_other_tasks():
    vision, text = PRUNED[22.94]
    pruned, dense = flops.vqa(VQAConfig(), vision, text, 3), flops.vqa(VQAConfig(), [577] * 13, [20] * 13, 3)
    assert pruned.official < 0.5 * dense.official and {"alignment", "importance", "merge"} <= pruned.parts.keys()
    with pytest.raises(ValueError, match="text_lengths: expected 13 counts"):
        flops.vqa(VQAConfig(), vision, text[:-1], 3)
    with pytest.raises(ValueError, match="match: expected 13 counts"):
        flops.retrieval(RetrievalConfig(), match=(10, text[1:]))
    parts = [flops.retrieval(RetrievalConfig(), **part) for part in ({"image": vision}, {"text": text})]
    both = flops.retrieval(RetrievalConfig(), image=vision, text=text)
    assert both.full == pytest.approx(sum(part.full for part in parts))
