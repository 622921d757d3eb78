"""Encoders of transformers, patched: what comes out is what came out, in every way such models are used."""

import copy
import dataclasses
import inspect
import pickle
from typing import ClassVar

import pytest
import torch
import transformers as hf
from helpers import normal
from pretended_gpu import PretendedGPU
from test_encoders import DINOV2, IMAGES, MODELS, NAFLEX, PICTURES, VISION, padded_patches, pooled, texts, theirs

import madtp
from madtp.patch import KINDS
from madtp.pruning import METHODS, LayerTrace, Pruning

# Before 5.23 the classes of DINOv2 call their weights otherwise than they are mapped; patching them is refused then.
RENAMED = tuple(int(part) for part in hf.__version__.split(".")[:2]) >= (5, 23)
PATCHED = [name for name in IMAGES if name.split()[0] in KINDS and (RENAMED or not name.startswith("Dinov2"))]
RULE = "ranked_novelty"
needs_rule = pytest.mark.skipif(RULE not in METHODS, reason="the rule for encoders is not there")


@dataclasses.dataclass(frozen=True)
class Thinning(Pruning):
    """A rule of a test's own: drops a share of the tokens by their place alone, each into the last one before it that stays."""

    name: ClassVar[str] = "thinning"
    share: float = 0.4
    strength = property(lambda self: self.share)

    def at(self, strength):
        return dataclasses.replace(self, share=strength)

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        rows = torch.arange(len(tokens.ids))
        first = torch.zeros_like(tokens.ids, dtype=torch.bool)
        first[tokens.cu_seqlens[:-1].long()] = True
        keep = tokens.protected | first | ((rows * 0.618 + 0.1 * layer) % 1 >= self.share)
        into = torch.where(keep, rows, -1).cummax(0).values
        left, merged = tokens.merged(into.int(), proportional=True, backend=self.backend)
        return left, LayerTrace(tokens.cu_seqlens, left.cu_seqlens, left.ids, rows=merged.rows)


@dataclasses.dataclass(frozen=True)
class Dropping(Thinning):
    """Drops them instead, and says so or nothing."""

    name: ClassVar[str] = "dropping"
    rows: int | None = None

    def __call__(self, tokens, *, layer, **inputs):
        left, trace = super().__call__(tokens, layer=layer, **inputs)
        gone = trace.rows.diff(prepend=torch.tensor([-1])) == 0
        rows = None if self.rows is None else torch.where(gone, self.rows, trace.rows).int()
        return left, dataclasses.replace(trace, rows=rows)


def inputs(name, generator, count=3):
    images = [normal(generator, 3, 32, 32).cpu() for _ in range(count)]
    if name.startswith("Siglip2"):
        images = [normal(generator, 3, *shape).cpu() for shape in ((32, 32), (16, 48), (24, 16))]
        return padded_patches(images, 8, 20)
    return {"pixel_values": torch.stack(images)}


def image_side(model):
    """What a pipeline calls: the features, or the tower itself."""
    return getattr(model, "get_image_features", model)


def close(ours, expected):
    assert ours.shape == expected.shape
    difference = (ours - expected).abs().max()
    assert difference < 1e-5 * max(1, expected.abs().max()), difference


def real(name, tensor, given):
    """Rows that are no padding."""
    return tensor if not name.startswith("Siglip2") else tensor[given["pixel_attention_mask"].bool()]


@pytest.mark.parametrize("name", PATCHED)
@torch.inference_mode()
def test_dense_outputs_stay_what_they_were(name, generator):
    """Features, last hidden states, and the states of every layer, which LLaVA-style pipelines read."""
    model, given = theirs(name), inputs(name, generator)
    before = image_side(model)(**given)
    tower = getattr(model, "vision_model", model)
    states = tower(**given, output_hidden_states=True)
    assert len(states.hidden_states) == 3
    madtp.apply_patch(model, temperature=0)
    after, again = image_side(model)(**given), tower(**given, output_hidden_states=True)
    close(pooled(after), pooled(before))
    close(real(name, again.last_hidden_state, given), real(name, states.last_hidden_state, given))
    assert len(again.hidden_states) == 3
    for ours, expected in zip(again.hidden_states, states.hidden_states, strict=True):
        close(real(name, ours, given), real(name, expected, given))
    assert type(after) is type(before)
    madtp.remove_patch(model)
    assert torch.equal(pooled(image_side(model)(**given)), pooled(before))


@pytest.mark.parametrize("name", PATCHED)
@torch.inference_mode()
def test_pruned_states_come_whole(name, generator):
    """As many rows as there were patches, in their order; class token and registers are never dropped."""
    model, given = theirs(name), inputs(name, generator)
    tower = getattr(model, "vision_model", model)
    before = tower(**given, output_hidden_states=True)
    patch = madtp.apply_patch(model, pruning=Thinning(), samples=given)
    assert (patch.keep_ratio < 1 and patch.gflops is None) or patch.gflops > 0
    out = tower(**given, output_hidden_states=True)
    assert [state.shape for state in out.hidden_states] == [state.shape for state in before.hidden_states]
    assert out.last_hidden_state.shape == before.last_hidden_state.shape
    close(real(name, out.hidden_states[0], given), real(name, before.hidden_states[0], given))
    rows = real(name, out.hidden_states[-1], given)[:20] if name.startswith("Siglip2") else out.hidden_states[-1][0]
    assert len(rows.unique(dim=0)) < len(rows), "merged tokens share a row"
    assert torch.equal(tower(**given).last_hidden_state, out.last_hidden_state), "whoever asks"
    engine = tower._madtp
    kept = engine.images(**given)[1][-1]
    ids = kept.ids[: kept.cu_seqlens[1]].tolist()
    prefix = engine.model.config.vision.prefix
    assert ids[:prefix] == list(range(prefix))


# Rules that need nothing trained, and what they make of dropped tokens.
PRUNERS = {
    **{name: METHODS[name](drop=0.4) for name in ("topk", "random")},
    "evit": METHODS["evit"]().limited("shares", (0.4,)),
    "tome": METHODS["tome"]().limited("shares", (0.4,)),
    "madtp": METHODS["madtp"](4.0),
    "thinning": Thinning(),
}
CLASSIFIERS = [
    name + "ForImageClassification"
    for name in ("CLIP", "Siglip", "Siglip2", *["Dinov2", "Dinov2WithRegisters"] * RENAMED)
]


def standing(trace, sample, count):
    """By hand: which row of the final tokens of a sample stands for each of its first ones."""
    rows, ids = list(range(count)), list(range(count))
    for record in trace:
        begin, end = record.cu_seqlens[sample : sample + 2].tolist()
        left = record.ids[begin:end].tolist()
        if record.rows is not None:
            start, stop = record.cu_seqlens_in[sample : sample + 2].tolist()
            into = [row - begin if row >= 0 else len(left) - 1 for row in record.rows[start:stop].tolist()]
        else:
            into = [left.index(i) if i in left else len(left) - 1 for i in ids]
        rows, ids = [into[row] for row in rows], left
    return rows


@pytest.mark.parametrize("rule", PRUNERS)
@pytest.mark.parametrize("name", ["ViTModel", "Siglip2VisionModel"])
@torch.inference_mode()
def test_every_patch_has_a_row_whatever_the_rule(name, rule):
    """That of the token it was merged into, or of the one that was made of all that were dropped."""
    if name.startswith("Siglip2") and rule in ("madtp", "evit"):
        pytest.skip("no class token")
    # Not every picture loses tokens by every rule: these do.
    model, given, dropped = theirs(name), inputs(name, torch.Generator().manual_seed(3)), 0
    before = model(**given).last_hidden_state
    madtp.apply_patch(model, pruning=PRUNERS[rule])
    engine = model._madtp
    tokens, trace = engine.images(**given)
    normed = engine.model.visual.norm_post(tokens)
    last = model(**given).last_hidden_state
    assert last.shape == before.shape
    mask = madtp.patch.attention_mask(last).bool()
    assert torch.equal(mask, given.get("pixel_attention_mask", torch.ones_like(mask)).bool())
    assert (last[~mask] == 0).all()
    for sample in range(3):
        rows = standing(trace, sample, int(mask[sample].sum()))
        dropped += len(rows) - len(set(rows))
        begin, end = tokens.cu_seqlens[sample : sample + 2].tolist()
        assert torch.equal(last[sample, mask[sample]], normed[begin:end][rows])
    assert dropped
    with PretendedGPU():
        there = model(**given).last_hidden_state
    close(there, last)


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.inference_mode()
def test_heads_that_average_patches(name, generator):
    """A tower inside a classifier: the head's mean counts every merged token as often as the patches it stands for."""
    config = {"CLIP": {"vision_config": VISION | PICTURES}, "Siglip": {"vision_config": VISION | PICTURES}}
    config |= {
        "Siglip2": {"vision_config": NAFLEX},
        "Dinov2": DINOV2 | PICTURES,
        "Dinov2WithRegisters": DINOV2 | PICTURES,
    }
    family = name.removesuffix("ForImageClassification")
    torch.manual_seed(1)
    model = getattr(hf, name)(getattr(hf, f"{family}Config")(**config[family], num_labels=5)).eval()
    given = inputs(name, generator)
    place = next(place for place, module in model.named_modules() if type(module).__name__ in KINDS)
    with pytest.raises(TypeError, match=f"got {name}; its {place} is one"):
        madtp.apply_patch(model)
    tower, dense = model.get_submodule(place), model(**given).logits
    madtp.apply_patch(tower, pruning=Thinning())
    assert (model(**given).logits - dense).abs().max() > 1e-4
    tokens, _ = tower._madtp.images(**given)
    prefix = tower._madtp.model.config.vision.prefix
    states = tokens.values if name.startswith("CLIP") else tower._madtp.model.visual.norm_post(tokens)
    for sample in range(3):
        begin, end = tokens.cu_seqlens[sample : sample + 2].tolist()
        own, sizes = states[begin:end], tokens.sizes[begin:end, None].clone()
        sizes[:prefix] -= 1  # of the patches that each stands for
        x = (own * sizes).sum(0) / sizes.sum()
        x = torch.cat([own[0], x]) if name.startswith("Dinov2") else x
        close(model(**given).logits[sample], model.classifier(x))


@needs_rule
@pytest.mark.parametrize(
    "name", [*("CLIPVisionModel", "SiglipModel", "Siglip2VisionModel"), *["Dinov2WithRegistersModel"] * RENAMED]
)
@torch.inference_mode()
def test_saved_copied_pickled_and_moved(name, generator, tmp_path):
    model, given = theirs(name), inputs(name, generator)
    expected, weights = pooled(image_side(model)(**given)), copy.deepcopy(model.state_dict())
    with madtp.pruned(model, pruning=METHODS[RULE]().limited("shares", (0.3,)), samples=given) as patch:
        assert patch.keep_ratio < 0.9 and patch.gflops > 0 and patch.pruning.name == RULE
        found = pooled(image_side(model)(**given))
        assert (found - expected).abs().max() > 1e-4
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(pooled(image_side(other)(**given)), found)
            madtp.remove_patch(other)
            assert torch.equal(pooled(image_side(other)(**given)), expected)
        model.save_pretrained(tmp_path)
        halved = pooled(
            image_side(model.to(torch.bfloat16))(
                **{k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
            )
        )
        assert halved.dtype == torch.bfloat16
        model.to(torch.float32)
    again = type(model).from_pretrained(tmp_path).eval()
    for key, weight in again.state_dict().items():
        assert torch.equal(weight, weights.pop(key))
    assert not weights
    close(pooled(image_side(again)(**given)), expected)  # PyTorch's products round by the place of weights in memory


def by_columns(weight):
    return weight.transpose(0, -1).contiguous().transpose(0, -1)


def with_gaps(weight):
    return torch.stack([weight, weight], -1)[..., 0]


@pytest.mark.parametrize("lay", [by_columns, with_gaps])
@pytest.mark.parametrize("name", PATCHED)
@torch.no_grad()
def test_weights_may_lie_in_memory_as_they_like(name, lay, generator):
    """By columns as linear algebra returns them, or as a view of something larger: transformers takes them, too."""
    model, given = theirs(name), inputs(name, generator)
    expected = pooled(image_side(model)(**given))
    madtp.apply_patch(model, temperature=0)
    for place, weight in list(model.named_parameters()):
        lead, _, key = place.rpartition(".")
        setattr(model.get_submodule(lead), key, torch.nn.Parameter(lay(weight)))
    close(pooled(image_side(model)(**given)), expected)


@pytest.mark.parametrize("patched", [True, False], ids=["after", "before"])
@pytest.mark.parametrize("name", PATCHED)
@torch.no_grad()
def test_as_many_numbers_in_another_shape_are_another_weight(name, patched, generator):
    """They were read in the order in which they lie, where transformers refuses them."""
    model, given = theirs(name), inputs(name, generator)
    place, layer = next((p, m) for p, m in model.named_modules() if p.endswith("mlp.fc1") and "text" not in p)
    out, width = layer.weight.shape
    if patched:
        madtp.apply_patch(model, temperature=0)
    layer.weight = torch.nn.Parameter(layer.weight.T.contiguous())
    with pytest.raises(
        ValueError, match=rf"^model: {place}.weight is \[{width}, {out}\], where \[{out}, {width}\] is expected"
    ):
        _ = image_side(model)(**given) if patched else madtp.apply_patch(model, temperature=0)


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
@torch.inference_mode()
def test_text_towers(name, generator):
    model, (_, filled) = theirs(name), texts("CLIP", generator)
    before = model(filled)
    madtp.apply_patch(model, temperature=0)
    close(pooled(model(filled)), pooled(before))
    madtp.remove_patch(model)


@torch.inference_mode()
def test_texts_of_siglip_stay_transformers(generator):
    model, (_, filled) = theirs("SiglipModel"), texts("SiglipModel", generator)
    before = model.get_text_features(filled).pooler_output
    madtp.apply_patch(model, pruning=Thinning())
    assert torch.equal(model.get_text_features(filled).pooler_output, before)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "Siglip2VisionModel"])
@torch.inference_mode()
def test_no_picture_at_all(name, generator):
    model, given = theirs(name), inputs(name, generator)
    madtp.apply_patch(model, pruning=Thinning())
    empty = model(**{key: value[:0] for key, value in given.items()})
    assert empty.pooler_output.shape == (0, 64) and empty.last_hidden_state.shape[::2] == (0, 64)


@needs_rule
@torch.inference_mode()
def test_an_encoder_needs_no_further_words():
    model = theirs("SiglipVisionModel")
    patch = madtp.apply_patch(model)
    assert patch.pruning.name == RULE and patch.pruning.active and patch.task == "clip"


@pytest.mark.parametrize("settings", [{"method": name} for name in METHODS] + [{"dictionary": torch.ones(5, 64)}, {}])
def test_a_rule_that_prunes_nothing_says_so(settings, caplog):
    model = theirs("ViTModel")
    patch = madtp.apply_patch(model, **settings)
    silent = "prunes nothing as it comes" not in caplog.text
    assert silent is patch.pruning.active
    madtp.remove_patch(model)
    caplog.clear()
    madtp.apply_patch(model, temperature=0)
    assert not caplog.text, "that is what was asked for"


@needs_rule
@pytest.mark.parametrize("target", ["keep_ratio", "target_gflops"])
@torch.inference_mode()
def test_a_target_is_met_without_training(target, generator):
    torch.manual_seed(1)
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION, image_size=64, patch_size=4)).eval()
    given = {"pixel_values": normal(generator, 3, 3, 64, 64).cpu()}
    dense = madtp.apply_patch(model, temperature=0, samples=given)
    assert dense.keep_ratio == 1
    madtp.remove_patch(model)
    wanted = 0.7 if target == "keep_ratio" else 0.75 * dense.gflops
    patch = madtp.apply_patch(model, samples=given, **{target: wanted})
    found = patch.keep_ratio if target == "keep_ratio" else patch.gflops
    assert abs(found / wanted - 1) <= 0.02 and patch.pruning.name == RULE


@pytest.mark.parametrize("target", ["keep_ratio", "target_gflops"])
@pytest.mark.parametrize("rule", ["topk", "random", "evit", "tome", "atm", "pitome", "ranked_novelty"])
@torch.inference_mode()
def test_every_rule_that_needs_no_training_meets_a_target(rule, target, generator):
    """Whatever its strength means: that of topk and random is a share below 1."""
    torch.manual_seed(1)
    model = hf.ViTModel(hf.ViTConfig(**VISION | {"num_hidden_layers": 3}, image_size=96, patch_size=8)).eval()
    given = {"pixel_values": normal(generator, 3, 3, 96, 96).cpu()}
    dense = madtp.apply_patch(model, temperature=0, samples=given)
    madtp.remove_patch(model)
    wanted = 0.7 if target == "keep_ratio" else 0.75 * dense.gflops
    patch = madtp.apply_patch(model, method=rule, samples=given, **{target: wanted})
    found = patch.keep_ratio if target == "keep_ratio" else patch.gflops
    assert abs(found / wanted - 1) <= 0.02 and patch.pruning.name == rule


class Wrapper(torch.nn.Module):
    """As sentence-transformers wraps CLIP: it calls the towers and the projection itself."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids):
        vision = self.model.vision_model(pixel_values=pixel_values)
        images = vision[1] if not hasattr(self.model, "visual_projection") else self.model.visual_projection(vision[1])
        words = self.model.text_model(input_ids=input_ids)
        return images, words[1] if not hasattr(self.model, "text_projection") else self.model.text_projection(words[1])


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel"])
@torch.inference_mode()
def test_wrappers_that_call_the_towers(name, generator):
    wrapper, (_, filled) = Wrapper(theirs(name)), texts(name, generator)
    pixels = inputs(name, generator)["pixel_values"]
    before = wrapper(pixels, filled)
    madtp.apply_patch(wrapper.model, temperature=0)
    for ours, expected in zip(wrapper(pixels, filled), before, strict=True):
        close(ours, expected)


def test_what_is_refused(generator):
    given = inputs("Siglip2VisionModel", generator)
    model = theirs("Siglip2VisionModel")
    madtp.apply_patch(model, temperature=0)
    with pytest.raises(ValueError, match="pixel_attention_mask: expected the first"):
        model(**given | {"pixel_attention_mask": torch.ones_like(given["pixel_attention_mask"])})
    for missing in (["spatial_shapes"], ["spatial_shapes", "pixel_attention_mask"]):
        with pytest.raises(ValueError, match="^spatial_shapes: expected the grids .B, 2. of the patches, got None"):
            model(**{name: value for name, value in given.items() if name not in missing})
    with pytest.raises(ValueError, match="spatial_shapes: .* do not fit"):
        model(**given | {"spatial_shapes": given["spatial_shapes"] * 2})
    with pytest.raises(ValueError, match="output_attentions: a patched model keeps neither"):
        model(**given, output_attentions=True)
    with pytest.raises(ValueError, match="pixel_values: expected a tensor, got NoneType None"):
        model()
    with pytest.raises(TypeError, match="got Sequential; its 1 is one"):
        madtp.apply_patch(torch.nn.Sequential(torch.nn.Identity(), theirs("ViTModel")))
    with pytest.raises(ValueError, match="method: expected one of .*, got 'magic'"):
        madtp.apply_patch(theirs("ViTModel"), method="magic")
    with pytest.raises(ValueError, match="temperature: only madtp has one, got method"):
        madtp.apply_patch(theirs("ViTModel"), method="topk", temperature=1.0)
    with pytest.raises(ValueError, match="class token"), torch.inference_mode():
        model = theirs("SiglipVisionModel")
        madtp.apply_patch(model, temperature=2.0)
        model(**inputs("SiglipVisionModel", generator))
    for rows, message in ((None, "does not say which token stands"), (-1, "drops tokens for which none stands")):
        model = theirs("ViTModel")
        madtp.apply_patch(model, pruning=Dropping(rows=rows))
        with pytest.raises(ValueError, match=message), torch.inference_mode():
            model(**inputs("ViTModel", generator))


@pytest.mark.parametrize("name", PATCHED)
@torch.inference_mode()
def test_arguments_without_their_names_are_those_of_the_class(name, generator):
    """Each class has its own order; one argument was taken for another, and a mask of patches for nothing."""
    model, given = theirs(name), inputs(name, generator)
    tower = getattr(model, "vision_model", model)
    madtp.apply_patch(model, temperature=0)
    order = list(inspect.signature(type(tower).forward).parameters)[1:]
    expected = tower(**given).last_hidden_state
    defaults = [given.get(argument) for argument in order if argument not in ("kwargs", "interpolate_pos_encoding")]
    assert torch.equal(tower(*defaults).last_hidden_state, expected)
    with pytest.raises(TypeError, match=f"expected at most {len(order) - 1} positional arguments, got {len(order)}"):
        tower(*given.values(), *[None] * (len(order) - len(given)))
    mask = torch.ones(3, 16, dtype=torch.bool)
    for place, argument in enumerate(order[1:-1], 1):
        if argument not in given:
            values = [*given.values(), *[None] * (place - len(given)), mask]
            with pytest.raises(ValueError, match=f"^{argument}: a patched model does not take it here"):
                tower(*values)
    if "spatial_shapes" not in given:
        for argument in ("pixel_attention_mask", "spatial_shapes"):
            with pytest.raises(ValueError, match=f"^{argument}: a patched model does not take it here"):
                tower(**given, **{argument: mask})


def test_a_class_of_ones_own_is_refused():
    """Its forward may be another one."""
    own = type("Own", (hf.CLIPVisionModel,), {})(hf.CLIPVisionConfig(**VISION)).eval()
    with pytest.raises(ValueError, match="^model: it is a Own, expected a CLIPVisionModel"):
        madtp.apply_patch(own, temperature=0)


def test_all_classes_are_tried():
    assert {name.split()[0] for name in MODELS} >= {name for name in KINDS if not name.startswith("Blip")}
    assert all(hasattr(hf, name) for name in KINDS)
