"""The attention that transformers' vision towers are lent, against their own SDPA on small random models.

Every image alone and without padding, too: alone with padding agrees even where a mask is lost.
"""

import copy

import pytest
import torch
from helpers import DEVICE, backends_here
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Qwen25Tower
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Qwen2Tower
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel as Qwen3Tower
from transformers.models.siglip2.modeling_siglip2 import Siglip2Model, Siglip2VisionModel

from madtp import varlen
from madtp_kernels import attention, backends

PATCH = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "depth": 3, "num_heads": 4}
CONFIGS = {
    Qwen2Tower: PATCH | {"embed_dim": 32, "hidden_size": 24},
    Qwen25Tower: PATCH | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24,
                          "window_size": 16, "fullatt_block_indexes": [1]},
    Qwen3Tower: PATCH | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 24,
                         "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
    Siglip2VisionModel: {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_patches": 16,
                         "num_attention_heads": 4, "patch_size": 4},
}  # fmt: skip
GRIDS = torch.tensor([[1, 4, 6], [3, 8, 8], [1, 2, 2], [1, 10, 6]])  # an image, a video, the smallest, windows
SHAPES = torch.tensor([[4, 4], [2, 3], [3, 3], [1, 1]])
every_qwen = pytest.mark.parametrize("kind", [Qwen2Tower, Qwen25Tower, Qwen3Tower], ids=lambda kind: kind.__name__)


def tower_of(kind, generator):
    torch.manual_seed(int(torch.randint(0, 2**31, (), generator=generator)))
    tower = kind(kind.config_class(**CONFIGS[kind])).eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.normal_(0, 0.2)
    return tower.to(DEVICE)


def both(tower):
    """The tower under SDPA, and the same under our attention."""
    sdpa, ours = copy.deepcopy(tower), copy.deepcopy(tower)
    sdpa.set_attn_implementation("sdpa")
    assert varlen.apply(ours) == [""]
    return sdpa, ours


def images(generator):
    features = 3 * 2 * 4 * 4
    return torch.randn(int(GRIDS.prod(1).sum()), features, generator=generator).to(DEVICE), GRIDS.to(DEVICE)


def run(tower, pixels, grids):
    with torch.no_grad():
        out = tower(pixels, grid_thw=grids)
    parts = [part if isinstance(part, list) else [part] for part in out.to_tuple()]
    return [tensor for part in parts for tensor in part]


@every_qwen
def test_qwen_towers(kind, generator):
    sdpa, ours = both(tower_of(kind, generator))
    pixels, grids = images(generator)
    expected, got = run(sdpa, pixels, grids), run(ours, pixels, grids)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-5)


@every_qwen
def test_qwen_towers_make_one_call_a_layer(kind, generator, monkeypatch):
    ours = both(tower_of(kind, generator))[1]
    calls = []
    monkeypatch.setattr(varlen, "attention", lambda *a, **options: calls.append(a[3]) or attention(*a, **options))
    run(ours, *images(generator))
    assert len(calls) == 3
    assert int(calls[0][-1]) == int(GRIDS.prod(1).sum())


@every_qwen
def test_a_bound_that_the_caller_knows_is_used(kind, generator, monkeypatch):
    """Nothing has to be read from the device then."""
    ours = both(tower_of(kind, generator))[1]
    pixels, grids = images(generator)
    expected, bounds = run(ours, pixels, grids), []

    def noting(*args, **options):
        bounds.append(args[5:7])
        return attention(*args, **options)

    monkeypatch.setattr(varlen, "attention", noting)
    known = {"max_seqlen": 80} | ({"max_window_seqlen": 70} if kind is Qwen25Tower else {})
    with torch.no_grad():
        got = ours(pixels, grid_thw=grids, **known)[0]
    assert torch.equal(got, expected[0])
    assert {bound for pair in bounds for bound in pair} == set(known.values())


@every_qwen
def test_qwen_images_do_not_see_each_other(kind, generator):
    ours = both(tower_of(kind, generator))[1]
    pixels, grids = images(generator)
    together = run(ours, pixels, grids)[0]
    start = 0
    for i, count in enumerate(grids.prod(1).tolist()):
        alone = run(ours, pixels[start : start + count], grids[i : i + 1])[0]
        unit = len(pixels) // len(together)  # 4 where the tower merges its patches
        part = together[start // unit : (start + count) // unit]
        torch.testing.assert_close(part, alone, atol=2e-5 * float(alone.abs().max()), rtol=1e-5)
        start += count


def naflex(generator):
    counts = SHAPES.prod(1)
    mask = torch.arange(16)[None] < counts[:, None]
    pixels = torch.randn(len(SHAPES), 16, 48, generator=generator).masked_fill(~mask[..., None], 0)
    inputs = {"pixel_values": pixels, "pixel_attention_mask": mask.long(), "spatial_shapes": SHAPES}
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def test_siglip2_naflex(generator):
    """Hidden states and the pooled feature, at batch 4 and of each image alone without padding."""
    sdpa, ours = both(tower_of(Siglip2VisionModel, generator))
    inputs = naflex(generator)
    with torch.no_grad():
        expected, got = sdpa(**inputs), ours(**inputs)
        torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
        for b, count in enumerate(SHAPES.prod(1).tolist()):
            one = {name: value[b : b + 1] for name, value in inputs.items()}
            one |= {name: one[name][:, :count] for name in ("pixel_values", "pixel_attention_mask")}
            alone, hidden = sdpa(**one), got.last_hidden_state[b, :count]
            torch.testing.assert_close(got.pooler_output[b], alone.pooler_output[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(hidden, alone.last_hidden_state[0], atol=1e-5, rtol=1e-5)


def test_padding_reaches_nobody(generator):
    ours = both(tower_of(Siglip2VisionModel, generator))[1]
    inputs = naflex(generator)
    with torch.no_grad():
        expected = ours(**inputs)
        inputs["pixel_values"][1, 6:] = 100.0
        got = ours(**inputs)
    assert torch.equal(got.last_hidden_state[:, :1], expected.last_hidden_state[:, :1])
    assert torch.equal(got.pooler_output, expected.pooler_output)


@pytest.mark.parametrize("backend", backends_here())
def test_padding_anywhere(backend, generator):
    """On the left, longer than a tile of the kernels; in the middle; everywhere: nothing is seen then, nothing is NaN."""
    tokens = 150
    place = torch.arange(tokens, device=DEVICE)
    mask = torch.stack([place >= 130, (place < 3) | (place > 140), place < 0])[:, None, None].expand(-1, 1, tokens, -1)
    q, k, v = torch.randn(3, 3, 1, tokens, 8, generator=generator).to(DEVICE)
    with backends.use(backend):
        out, _ = varlen._attend(torch.nn.Identity(), q, k, v, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
    torch.testing.assert_close(out[:2], expected[:2], atol=1e-5, rtol=1e-5)
    assert (out[2] == 0).all()


def test_gradients(generator):
    """Of weights and pixels, against SDPA."""
    grads = []
    pixels, grids = images(generator)
    for tower in both(tower_of(Qwen2Tower, generator)):
        out = tower(pixels, grid_thw=grids)[0]
        (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)).sum().backward()
        grads.append(tower.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-4 * float(grads[0].abs().max()), rtol=1e-4)


def test_only_the_tower_changes_and_it_changes_back(generator):
    shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = shared | {"vocab_size": 50, "projection_size": 32}
    model = Siglip2Model(Siglip2Model.config_class(text_config=text, vision_config=CONFIGS[Siglip2VisionModel]))
    before = model.config.text_config._attn_implementation
    assert varlen.apply(model) == ["vision_model"]
    assert model.config.vision_config._attn_implementation == varlen.NAME
    assert model.config.text_config._attn_implementation == model.config._attn_implementation == before
    assert varlen.NAME not in str(model.config.to_dict())  # what is saved
    varlen.remove(model)
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options, message", [
    ({"is_causal": True}, "^is_causal: attention 'madtp_flash' of Linear has none, got True"),
    ({"dropout": 0.1}, "^dropout: "),
    ({"sliding_window": 4}, "^sliding_window: "),
    ({"softcap": 30.0}, "^softcap: "),
    ({"attention_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()}, "^attention_mask: expected padding"),
    ({"attention_mask": torch.zeros(2, 5)}, "^attention_mask: expected padding"),
])  # fmt: skip
def test_refuses(options, message):
    q = torch.zeros(2, 4, 5, 8)
    with pytest.raises(ValueError, match=message):
        varlen._attend(torch.nn.Linear(1, 1), q, q, q, **{"attention_mask": None} | options)


def test_refuses_a_model_without_a_tower():
    with pytest.raises(ValueError, match="^model: expected a vision tower among Qwen2Vision.* got Linear without one"):
        varlen.apply(torch.nn.Linear(1, 1))


def test_grouped_queries_and_no_mask(generator):
    q, k, v = (torch.randn(2, heads, 5, 8, generator=generator).to(DEVICE) for heads in (4, 2, 2))
    out, weights = varlen._attend(torch.nn.Linear(1, 1), q, k, v, None, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert weights is None
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
