"""A last layer of which one token is read: the same features as with all of them, at less cost."""

import pytest
import test_clip
import test_tasks
import torch
from helpers import normal
from torch.utils.flop_counter import FlopCounterMode

from madtp import flops, layers
from madtp.config import CLIPConfig
from madtp.pruning import TopK

RULES = {"dense": 0.0, "madtp": 1.0, "topk": TopK(0.4, proportional_attention=True)}
by_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def clip_inputs(generator, count=3):
    size = test_clip.SIZES.vision.image_size
    return normal(generator, count, 3, size, size), test_clip.texts_of(generator, [9, 30, 14][:count])


@by_rule
@pytest.mark.parametrize("mode", ["clean", "compat"])
def test_clip_features(rule, mode, generator):
    """Whatever a rule has put behind the end-of-text token stays invisible to it. In the official mode the last layer's
    pruning decides which token the feature is read from: it is computed whole."""
    if mode == "compat" and rule is RULES["topk"]:
        rule = 3.0
    model = test_clip.make(mode=mode)
    model.pruning = model.rule(rule)
    pixels, texts = clip_inputs(generator)
    with torch.inference_mode():
        images = model.encode_image(pixels), model.embed_image(pixels), True
        words = model.encode_text(texts), model.embed_text(texts), mode == "clean" or not model.pruning.active
    for whole, pooled, one in (images, words):
        torch.testing.assert_close(pooled.features, whole.features, **CLOSE)
        assert len(pooled.tokens.values) == (3 if one else len(whole.tokens.values)) and len(whole.tokens.values) > 3
        for record, other in zip(pooled.trace[:-1], whole.trace[:-1], strict=True):
            assert torch.equal(record.ids, other.ids)
        assert not (one and pooled.trace[-1].pruned.any())


@by_rule
def test_retrieval_features_and_matches(rule, generator):
    model = test_tasks.make("retrieval")
    model.pruning = model.rule(rule)
    pixels = normal(generator, 3, 3, 64, 64)
    texts = [torch.randint(6, 190, (length,), generator=generator) for length in (12, 3, 20)]
    pairs = [(0, 1), (2, 0), (0, 2)]
    with torch.inference_mode():
        images = model.encode_image(pixels)
        torch.testing.assert_close(model.embed_image(pixels).features, images.features, **CLOSE)
        torch.testing.assert_close(model.embed_text(texts).features, model.encode_text(texts).features, **CLOSE)
        whole, pooled = (model.match(images.tokens, texts, pairs, pooled=p) for p in (False, True))
        torch.testing.assert_close(pooled.logits, whole.logits, **CLOSE)


def test_a_sample_alone_and_in_a_batch(generator):
    model = test_clip.make(1.0)
    pixels, texts = clip_inputs(generator)
    with torch.inference_mode():
        together = model.embed_image(pixels), model.embed_text(texts)
        for sample in range(3):
            alone = model.embed_image(pixels[sample : sample + 1]), model.embed_text(texts[sample : sample + 1])
            for ours, all_of_them in zip(alone, together, strict=True):
                torch.testing.assert_close(ours.features[0], all_of_them.features[sample], **CLOSE)


def test_gradients_reach_every_weight_that_is_used(generator):
    model = test_clip.make(0.0)
    pixels, texts = clip_inputs(generator, 2)
    whole, pooled = {}, {}
    for found, image, text in (
        (whole, model.encode_image, model.encode_text), (pooled, model.embed_image, model.embed_text)
    ):  # fmt: skip
        model.zero_grad()
        (image(pixels).features.square().sum() + text(texts).features.square().sum()).backward()
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert whole.keys() == pooled.keys()
    for name, grad in whole.items():
        torch.testing.assert_close(pooled[name], grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-3, msg=name)


def test_cost_follows_and_the_official_figure_does_not():
    config = CLIPConfig()
    image, text = [577] * 25, [30] * 13
    whole, pooled = (flops.clip(config, image=image, text=text, pruning=False, pooled=p) for p in (False, True))
    assert pooled.official == pytest.approx(whole.official, rel=1e-12)
    assert 0.95 < pooled.full / whole.full < 0.98  # of 24 and 12 layers


def test_products_counted_are_products_run(generator, monkeypatch):
    """Against torch's counter of matrix products, without those of attention."""
    monkeypatch.setattr(layers, "attention", lambda q, k, v, *_, **__: (torch.zeros_like(q), None))
    model = test_clip.make(0.0).double()
    pixels, texts = clip_inputs(generator, 1)
    with FlopCounterMode(display=False) as counter:
        model.embed_image(pixels), model.embed_text(texts)
    config = model.config
    image, text = config.vision.num_patches + 1, len(texts[0])
    counted = flops.clip(
        config, image=[image] * (config.vision.depth + 1), text=[text] * (config.text.num_hidden_layers + 1),
        pruning=False, pooled=True,
    )  # fmt: skip
    assert counter.get_total_flops() == 2 * round(counted.parts["linear"] * 1e9)
