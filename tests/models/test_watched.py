"""Modules that somebody watches (hooks), has put something in the place of (adapters) or has never loaded: every call of the model calls
them, also where their weights would have been read without a call."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from small_models import CONFIGS
from torch import nn
from torch.nn.utils import prune

from madtp.config import CLIPConfig, CLIPVisionConfig
from madtp.guidance import QueryModel
from madtp.layers import LayerNorm
from madtp.linear import Linear
from madtp.pruning import MADTP, Pruning, RankedNovelty, Tokens
from madtp.tasks import TASKS
from madtp.text import Output
from madtp.vision import VisionTransformer
from madtp_kernels import RaggedBatch, native

SIGLIP = CLIPVisionConfig(
    image_size=48, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, sd_num=12, sd_dim=32, map_func=False,
    class_token=False, norm_pre=False, pool="attention", projection=False,
)  # fmt: skip
MODELS = {name: (name, config) for name, config in CONFIGS.items()} | {
    "siglip": ("clip", CLIPConfig(SIGLIP, None, embed_dim=32))
}
RULES = {"dense": Pruning(), "ranked_novelty": RankedNovelty(shares=(0.3,)), "madtp": MADTP(1.0)}
every_model = pytest.mark.parametrize("name", MODELS)
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@pytest.fixture
def make(generator):
    def make(name, rule):
        if name == "siglip" and isinstance(rule, MADTP):
            pytest.skip("MADTP needs a class token")
        task, config = MODELS[name]
        model = TASKS[task].Model(config, rule).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
        return model

    return make


@pytest.fixture
def answers(generator):
    """What comes out of everything that a model can be asked, with each encoder in full and for its feature alone."""
    pixels = torch.randn(4, 3, 48, 48, generator=generator)

    def answers(name, model):
        ids = RaggedBatch.from_lengths(torch.tensor([2, 7, 9, 3, 2, 8, 3]), [4, 3])
        if name == "nlvr":
            return [model(pixels, ids).logits]
        if name == "caption":
            return [model(pixels[:2], ids).logits.values]
        if name == "vqa":
            questions = model(pixels[:2], ids).questions
            return [questions.values, model.rank(questions, ids, k=2)[0]]
        found = [model.encode_image(pixels).features, model.embed_image(pixels).features]
        if name == "siglip":
            return found
        if name == "clip":
            ids = RaggedBatch.from_lengths(torch.tensor([512, 7, 9, 513, 512, 8, 513]), [4, 3])
        else:
            images = model.encode_image(pixels).tokens
            found += [model.match(images, ids, [(0, 0), (3, 1)], pooled=pooled).logits for pooled in (False, True)]
        return [*found, model.encode_text(ids).features, model.embed_text(ids).features]

    return answers


def modules_to_call(model):
    maps = {m for query in model.modules() if isinstance(query, QueryModel) for m in query.modules()}
    return {
        place: module
        for place, module in model.named_modules()
        if place and module not in maps and type(module).forward is not nn.modules.module._forward_unimplemented
    }


def close(found, expected):
    # Others may keep other numbers of tokens.
    return all(a.shape == b.shape and torch.allclose(a, b, atol=1e-3) for a, b in zip(found, expected, strict=True))


@every_model
def test_a_hook_on_any_module_fires_in_every_call(name, make, answers):
    model = make(name, RULES["ranked_novelty"])
    expected = answers(name, model)
    alone, together = Counter(), Counter()
    for place, module in modules_to_call(model).items():
        handle = module.register_forward_hook(lambda *_, place=place: alone.update([place]))
        assert close(answers(name, model), expected), place
        handle.remove()
    for place, module in modules_to_call(model).items():
        module.register_forward_hook(lambda *_, place=place: together.update([place]))
    answers(name, model)
    # As often as where all are watched: no way through an encoder leaves one out.
    assert alone == together and alone.keys() == modules_to_call(model).keys()


@pytest.mark.skipif(native.find() is None, reason="one call of the extension")
@every_model
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layers_in_one_call_give_the_bits_of_those_that_are_watched(name, rule, dtype, make, answers, monkeypatch):
    """Where nobody watches, the CPU serves attention, cross-attention, an MLP and patches with what is around them at once."""
    extension, calls, model = native.load(), Counter(), make(name, rule).to(dtype)
    for op in ("self_attention", "cross_attention", "mlp", "embed_patches"):

        def counted(original, op=op):
            return lambda *args: calls.update([op]) or original(*args)

        monkeypatch.setattr(extension, op, counted(getattr(extension, op)))
    expected = answers(name, model)
    served = {"self_attention", "mlp"} | ({"cross_attention"} if name == "nlvr" else set())
    assert served <= calls.keys()
    for module in model.modules():
        if isinstance(module, (Linear, LayerNorm)):
            module.register_forward_hook(lambda *_: None)
    calls.clear()
    monkeypatch.setattr(VisionTransformer, "_embedded", lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(answers(name, model), expected, strict=True)) and not calls


def test_hooks_of_gradients_fire_where_only_a_feature_is_read(make, generator):
    model = make("clip", RULES["ranked_novelty"])
    blocks, fired = model.visual.blocks, []
    layers = (
        model.visual.patch_embed.proj,
        blocks[0].attn.qkv,
        blocks[0].mlp.fc1,
        blocks[-1].attn.qkv,
        blocks[-1].mlp.fc2,
    )
    for number, layer in enumerate(layers):
        layer.register_full_backward_hook(lambda *_, number=number: fired.append(number))
    pixels = torch.randn(2, 3, 48, 48, generator=generator).requires_grad_()
    model.embed_image(pixels).features.sum().backward()
    assert sorted(fired) == list(range(len(layers)))


class Adapter(nn.Module):
    """A low-rank update beside a layer, which gets the arguments of a call, as libraries of adapters write it."""

    def __init__(self, layer, generator):
        super().__init__()
        self.layer = layer
        up, down = (0.2 * torch.randn(n, 3, generator=generator) for n in layer.weight.flatten(1).shape)
        self.update = (up @ down.mT).view_as(layer.weight)

    def forward(self, x, *args, **kwargs):
        update = self.update
        beside = F.conv2d(x, update, stride=update.shape[-1]) if update.dim() == 4 else F.linear(x, update)
        return self.layer(x, *args, **kwargs) + beside

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias


@every_rule
@every_model
def test_adapters_are_called(name, rule, make, answers, generator):
    model = make(name, rule)
    places = [place for place, module in modules_to_call(model).items() if isinstance(module, (nn.Linear, nn.Conv2d))]
    plain = answers(name, model)
    for place in places:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, Adapter(model.get_submodule(place), generator))
    found = answers(name, model)
    for place in places:
        adapter = model.get_submodule(place)
        adapter.layer.weight += adapter.update
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.layer)
    assert close(found, answers(name, model)) and not close(found, plain)


class DoubledNorm(nn.Module):
    """What a library of adapters puts in the place of a LayerNorm."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, *args):
        return 2 * self.norm(x, *args)


@every_rule
@every_model
def test_adapters_of_layer_norms_are_called(name, rule, make, answers):
    model = make(name, rule)
    places = [place for place, module in modules_to_call(model).items() if isinstance(module, LayerNorm)]
    plain = answers(name, model)
    for place in places:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, DoubledNorm(model.get_submodule(place)))
    found = answers(name, model)
    for place in places:
        adapter = model.get_submodule(place)
        adapter.norm.weight *= 2
        adapter.norm.bias *= 2
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.norm)
    assert close(found, answers(name, model)) and not close(found, plain)


@pytest.mark.parametrize("name", ["nlvr", "caption", "vqa", "retrieval"])
def test_a_hook_for_all_modules_sees_each_output(name, make, answers):
    model, seen = make(name, RULES["ranked_novelty"]), set()
    expected = answers(name, model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))
    found = answers(name, model)
    handle.remove()
    assert seen >= {module for module in model.modules() if isinstance(module, Output)}
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_hook_of_a_layer_norm_gets_tokens(make, answers):
    model, got = make("clip", RULES["dense"]), []
    for norm in (model.visual.blocks[0].norm1, model.visual.blocks[0].norm2):
        norm.register_forward_pre_hook(lambda _, args: got.append([type(arg) for arg in args]))
    model.encode_image(torch.zeros(1, 3, 48, 48))
    assert got == [[Tokens], [Tokens]]


@pytest.mark.parametrize("part", ["cls_token", "pos_embed"])
def test_embeddings_of_another_dtype(part, make, answers):
    model = make("nlvr", RULES["dense"])
    parameter = getattr(model.visual_encoder, part)
    parameter.data = parameter.bfloat16()
    found = answers("nlvr", model)
    parameter.data = parameter.float()
    assert close(found, answers("nlvr", model))


def test_a_map_of_the_dictionary_that_is_not_its_weights(make, answers, generator):
    model = make("clip", RULES["madtp"])
    maps = model.visual.query_models[1].q_map
    handle = maps[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="^q_map: its weights map the dictionary, without a call; remove hooks"):
        answers("clip", model)
    handle.remove()
    maps[0] = Adapter(maps[0], generator)
    with pytest.raises(ValueError, match="^q_map: .* merge what stands in its place"):
        answers("clip", model)


def test_a_plain_linear_layer_in_an_mlp(make, answers):
    model = make("clip", RULES["dense"])
    expected = answers("clip", model)
    for block in model.visual.blocks:
        for name in ("fc1", "fc2"):
            layer = getattr(block.mlp, name)
            assert type(layer) is Linear
            other = nn.Linear(layer.in_features, layer.out_features)
            other.load_state_dict(layer.state_dict())
            setattr(block.mlp, name, other.requires_grad_(False))
    assert close(answers("clip", model), expected)


def test_weights_that_are_pruned_or_normalised_when_a_layer_is_called(make, answers):
    model = make("retrieval", RULES["ranked_novelty"])
    layers = [module for module in modules_to_call(model).values() if isinstance(module, nn.Linear)]
    for layer in layers:
        prune.l1_unstructured(layer, "weight", 0.5)
        layer.weight_orig.mul_(2)  # which layer.weight does not show before the next call
    found = answers("retrieval", model)
    for layer in layers:
        prune.remove(layer, "weight")
    assert close(found, answers("retrieval", model))


@every_model
def test_a_weight_that_was_never_loaded_is_refused(name, make, answers):
    """Of a product with one on "meta", PyTorch returns whatever lies in memory."""
    model = make(name, RULES["ranked_novelty"])
    for layer in modules_to_call(model).values():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            weight = layer.weight
            layer.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
            with pytest.raises(ValueError, match=r"^weight: expected it on cpu, .* on meta"):
                answers(name, model)
            layer.weight = weight


def test_a_map_of_the_dictionary_that_was_never_loaded_is_refused(make, answers):
    model = make("clip", RULES["madtp"])
    layer = model.visual.query_models[1].q_map[0]
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"^weight: expected it on cpu, .* on meta"):
        answers("clip", model)
