"""What other code does to a patched model, before and after: honoured, or refused by name, never ignored."""

import copy
import io
import pickle

import pytest
import torch
from helpers import DEVICE
from safetensors.torch import load_file, save_model
from test_huggingface import CLASSES, hugging_face, pictures
from test_patch import SAME, TASKS, clip, close, dictionary_of, equal, results, sample_inputs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import BlipForImageTextRetrieval, GenerationConfig
from transformers.models.blip.modeling_blip import BlipMLP

import madtp
from madtp.patch import attention_mask

# A tower of each kind: the task of its model, its name, and a module inside it that all its tokens pass.
TOWERS = {
    "vision": ("caption", "vision_model", "encoder.layers.1.mlp.fc1"),
    "encoder": ("vqa", "text_encoder", "encoder.layer.1.intermediate.dense"),
    "decoder": ("caption", "text_decoder.bert", "encoder.layer.1.crossattention.self.query"),
    "clip text": ("clip", "text_model", "encoder.layers.0.self_attn.v_proj"),
    "clip vision": ("clip", "vision_model", "embeddings.patch_embedding"),
}


@pytest.fixture
def make(generator):
    return lambda task: clip(generator) if task == "clip" else hugging_face(task, generator)


def run(task, model, inputs):
    """All of a patched model's towers, once."""
    model(**inputs, **({"decoder_input_ids": inputs["input_ids"]} if task == "vqa" else {}))


class Adapted(nn.Module):
    """A layer with a low-rank one beside it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class Quantized(torch.Tensor):
    """A tensor that is not what its elements say."""


def replace(parent, name, module):
    setattr(parent, name, module)


def wrap(module):
    forward = module.forward
    module.forward = lambda x: forward(2 * x)


# ---- what only a call of a module inside a tower would notice

HOOKS = {
    "forward hook": lambda m: m.register_forward_hook(lambda module, inputs, output: output + 1),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_inside_a_tower(hook, tower, make, generator):
    task, place, name = TOWERS[tower]
    model, (_, inputs) = make(task), sample_inputs(task, generator)
    message = f"^model: {place}.{name} has hooks, but a patched tower does not call the modules inside it"
    handle = HOOKS[hook](model.get_submodule(f"{place}.{name}"))
    with pytest.raises(ValueError, match=message):
        madtp.apply_patch(model, temperature=0)
    handle.remove()
    madtp.apply_patch(model, temperature=0)
    run(task, model, inputs)
    handle = HOOKS[hook](model.get_submodule(f"{place}.{name}"))
    with pytest.raises(ValueError, match=message):
        run(task, model, inputs)
    handle.remove()
    run(task, model, inputs)


MLP = "vision_model.encoder.layers.1.mlp"
CHANGES = {
    "an adapter": (lambda m: replace(m.get_submodule(MLP), "fc1", Adapted(m.get_submodule(MLP).fc1)), f"{MLP}.*fc1|{MLP} holds"),
    "an adapter behind": (
        lambda m: replace(m.get_submodule(MLP), "fc2", nn.Sequential(m.get_submodule(MLP).fc2, nn.Linear(96, 96))), f"{MLP}"),
    "another layer of the same kind": (lambda m: replace(m.get_submodule(MLP), "fc1", nn.Linear(96, 192)), None),
    "an activation": (lambda m: replace(m.get_submodule(MLP), "activation_fn", nn.ReLU()), f"{MLP}"),
    "a layer more": (lambda m: m.vision_model.encoder.layers.append(m.vision_model.encoder.layers[0]), "vision_model.encoder.layers"),
    "a layer less": (lambda m: m.vision_model.encoder.layers.pop(2), "vision_model.encoder.layers"),
    "a compiled layer": (lambda m: replace(m.vision_model.encoder.layers, "0", torch.compile(m.vision_model.encoder.layers[0])),
                         "vision_model.encoder.layers"),
    "a layer compiled in place": (lambda m: m.get_submodule(MLP).compile(), f"{MLP} is compiled"),
    "a wrapper": (lambda m: wrap(m.get_submodule(MLP)), f"{MLP} has another forward"),
    "a parametrization": (lambda m: parametrize.register_parametrization(m.get_submodule(MLP).fc1, "weight", nn.Tanh()), MLP),
    "weight_norm": (lambda m: nn.utils.weight_norm(m.get_submodule(MLP).fc1), MLP),
    "weight_norm of today": (lambda m: parametrizations.weight_norm(m.get_submodule(MLP).fc1), MLP),
    "spectral_norm": (lambda m: nn.utils.spectral_norm(m.get_submodule(MLP).fc1), MLP),
    "pruned weights": (lambda m: prune.l1_unstructured(m.get_submodule(MLP).fc1, "weight", amount=0.5), MLP),
    "a weight of another kind": (
        lambda m: replace(m.get_submodule(MLP).fc1, "weight",
                          nn.Parameter(m.get_submodule(MLP).fc1.weight.data.as_subclass(Quantized))),
        f"{MLP}.fc1.weight is no plain floating-point weight"),
    "a weight of another size": (lambda m: replace(m.get_submodule(MLP).fc1, "weight", nn.Parameter(torch.zeros(7, 96))), f"{MLP}.fc1"),
    "no bias": (lambda m: replace(m.get_submodule(MLP).fc1, "bias", None), f"{MLP}.fc1"),
    "another epsilon": (lambda m: replace(m.vision_model.encoder.layers[0].layer_norm1, "eps", 0.1), "layers.0.layer_norm1"),
    "another scale": (lambda m: replace(m.vision_model.encoder.layers[0].self_attn, "scale", 2.0), "layers.0.self_attn"),
    "some weights in half precision": (lambda m: m.get_submodule(MLP).half(), "torch.float16 on .* \\(vision_model.encoder.layers.1.mlp"),
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CHANGES)
def test_changes_inside_a_tower(name, when, make, generator):
    change, message = CHANGES[name]
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    if when == "after":
        madtp.apply_patch(model, temperature=0)
        run("caption", model, inputs)
    change(model)
    model.to(DEVICE).eval()
    if when == "before" and message is None:  # a model like any other
        expected = results("caption", model, inputs)
        madtp.apply_patch(model, temperature=0)
        close(results("caption", model, inputs), expected)
        return
    with pytest.raises(ValueError, match=f"^model: .*{message or MLP}"):
        madtp.apply_patch(model, temperature=0) if when == "before" else run("caption", model, inputs)
    assert when == "after" or not hasattr(model, "_madtp")


def test_a_forward_that_replaces_one_for_all_models(make, generator, monkeypatch):
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    madtp.apply_patch(model, temperature=0)
    monkeypatch.setattr(BlipMLP, "forward", lambda self, x: 0 * x)
    with pytest.raises(ValueError, match="layers.0.mlp has another forward"):
        run("caption", model, inputs)
    with pytest.raises(ValueError, match="layers.0.mlp has the forward of another library, .*test_patch_others"):
        madtp.apply_patch(make("caption"), temperature=0)


def test_a_part_in_training_mode(make, generator):
    model, (_, inputs) = make("vqa"), sample_inputs("vqa", generator)
    madtp.apply_patch(model, temperature=0)
    model.text_encoder.encoder.layer[0].train()
    with pytest.raises(ValueError, match="a patched model is for inference"):
        run("vqa", model, inputs)


def test_idle_hooks_of_transformers_are_no_hooks(make, generator):
    """It leaves some in a model that was once asked for hidden states, and where gradient checkpointing is turned on."""
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    assert len(model.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states) == 4
    expected = results("caption", model, inputs)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    madtp.apply_patch(model, temperature=0)
    close(results("caption", model, inputs), expected)


# ---- what stays transformers'


def test_hooks_on_towers_and_changes_outside_of_them(make, generator):
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"pixel_values": 2 * kwargs["pixel_values"]}), with_kwargs=True
    )

    def shifted(module, inputs, output):
        output.last_hidden_state = output.last_hidden_state.roll(1, -1)
        return output

    model.vision_model.register_forward_hook(shifted)
    head = model.text_decoder.cls.predictions.transform
    head.dense.register_forward_hook(lambda module, inputs, output: output.roll(1, -1))
    expected = model(**inputs).logits.detach()
    madtp.apply_patch(model, temperature=0)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], **SAME)
    head.dense = Adapted(head.dense).to(DEVICE)
    found = model(**inputs).logits
    assert (found - expected)[real].abs().max() > 1e-3
    madtp.remove_patch(model)
    torch.testing.assert_close(found[real], model(**inputs).logits.detach()[real], **SAME)


def test_a_subclass_with_a_forward_of_its_own(generator):
    class Doubled(BlipForImageTextRetrieval):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.itm_score = 2 * output.itm_score
            return output

    model, (_, inputs) = hugging_face("retrieval", generator), sample_inputs("retrieval", generator)
    model.__class__ = Doubled
    expected = model(**inputs).itm_score.detach()
    madtp.apply_patch(model, temperature=0)
    found = model(**inputs).itm_score
    torch.testing.assert_close(found, expected, **SAME)
    assert not found.requires_grad


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_that_is_wrapped_later(tower, make, generator):
    """As accelerate's hooks do: they keep the forward that they find, and put it back when they are removed."""
    task, place, _ = TOWERS[tower]
    model, (_, inputs) = make(task), sample_inputs(task, generator)
    before = results(task, model, inputs)
    madtp.apply_patch(model, temperature=4.0, dictionary=dictionary_of(task, generator))
    patched, module = results(task, model, inputs), model.get_submodule(place)
    calls, kept = [], module.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return kept(*args, **kwargs)

    module.forward = forward
    assert equal(results(task, model, inputs), patched) and calls
    with pytest.raises(ValueError, match=f"^model: {place}.forward was replaced after apply_patch"):
        madtp.remove_patch(model)
    assert equal(results(task, model, inputs), patched), "nothing is half removed"
    module.forward = kept
    madtp.remove_patch(model)
    assert equal(results(task, model, inputs), before)


# ---- weights


def rows_by_data(weight):
    weight.data[7] = 0.3


def rows_by_numpy(weight):
    weight.detach().cpu().numpy()[7] = 0.3


def rows_without_gradients(weight):
    with torch.no_grad():
        weight[7] = 0.3


def other_memory(weight):
    weight.data = torch.full_like(weight, 0.1).index_fill(0, torch.tensor(7, device=weight.device), 0.3)


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference tensors"])
@pytest.mark.parametrize("edit", [rows_by_data, rows_by_numpy, rows_without_gradients, other_memory])
@pytest.mark.parametrize("name", ["encoder.layers.1.mlp.fc1", "encoder.layers.1.self_attn.qkv", "post_layernorm",
                                  "embeddings.patch_embedding"])  # fmt: skip
def test_a_few_numbers_of_a_weight(name, edit, inference, make, generator):
    if DEVICE != "cpu" and edit is rows_by_numpy:
        pytest.skip("NumPy sees memory of the CPU")
    with torch.inference_mode(inference):
        model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
        if inference and (edit in (rows_by_data, other_memory)):
            pytest.skip("such tensors are edited directly")
        madtp.apply_patch(model, temperature=0)
        before = model.vision_model(inputs["pixel_values"]).last_hidden_state
        edit(model.vision_model.get_submodule(name).weight)
        found = model.vision_model(inputs["pixel_values"]).last_hidden_state
        madtp.remove_patch(model)
        torch.testing.assert_close(
            found, model.vision_model(inputs["pixel_values"]).last_hidden_state, atol=1e-4, rtol=1e-4
        )
        assert (found - before).abs().max() > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_projections_that_transformers_keeps_apart(task, make, generator):
    """Query, key and value, of self- and of cross-attention."""
    model, (_, inputs) = make(task), sample_inputs(task, generator)
    parts = [name for name, _ in model.named_parameters() if any(f".{part}" in name for part in ("query", "key", "value", "q_proj",
                                                                                               "k_proj", "v_proj", "qkv"))]  # fmt: skip
    assert len(parts) > 5
    madtp.apply_patch(model, temperature=0)
    results(task, model, inputs)
    with torch.no_grad():
        for name in parts:
            model.get_parameter(name)[::5] *= 1.5
    found = results(task, model, inputs)
    madtp.remove_patch(model)
    if task == "vqa":
        expected = results(task, model, inputs)
        close(found[:2], expected[:2])
        assert equal(found[2:], expected[2:])
    else:
        close(found, results(task, model, inputs))


def test_weights_that_are_lent_for_one_call(make, generator):
    model, (_, inputs) = make("clip"), sample_inputs("clip", generator)
    others = {name: 0.8 * value for name, value in model.state_dict().items()}
    expected = torch.func.functional_call(model, others, kwargs=inputs).logits_per_image.detach()
    madtp.apply_patch(model, temperature=0)
    own = model(**inputs).logits_per_image
    torch.testing.assert_close(
        torch.func.functional_call(model, others, kwargs=inputs).logits_per_image, expected, **SAME
    )
    assert torch.equal(model(**inputs).logits_per_image, own)


# ---- saving


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("way", ["torch.save", "pickle", "deepcopy"])
def test_a_whole_model_is_saved(way, task, make, generator):
    model, (_, inputs) = make(task), sample_inputs(task, generator)
    before = results(task, model, inputs)
    madtp.apply_patch(model, temperature=4.0, dictionary=dictionary_of(task, generator))
    patched = results(task, model, inputs)
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        assert file.tell() < 1.5 * size + 500_000, "weights are written once"
        file.seek(0)
        again = torch.load(file, weights_only=False)
    else:
        again = pickle.loads(pickle.dumps(model)) if way == "pickle" else copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert equal(results(task, again, inputs), patched)
    madtp.remove_patch(again)
    assert equal(results(task, again, inputs), before)


@pytest.mark.parametrize("task", TASKS)
def test_weights_are_saved_as_without_the_patch(task, make, tmp_path):
    model = make(task)
    save_model(model, tmp_path / "before.safetensors")
    madtp.apply_patch(model, temperature=1.0)
    save_model(model, tmp_path / "after.safetensors")
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_outputs_are_saved_as_plain_tensors(make, generator):
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    madtp.apply_patch(model, temperature=4.0, dictionary=dictionary_of("caption", generator))
    states, file = model.vision_model(inputs["pixel_values"]).last_hidden_state, io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), states)


# ---- between the towers


@pytest.mark.parametrize("temperature", [0, 4.0])
def test_states_that_are_edited_on_their_way(temperature, make, generator):
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    options = {"temperature": temperature, "dictionary": dictionary_of("caption", generator)}

    @torch.no_grad()
    def logits(mask_of=None):
        states = model.vision_model(pixels).last_hidden_state
        mask = None if mask_of is None else mask_of(states)
        states[:, 1:4] = 0
        states[1] *= -1
        return model.text_decoder(ids, encoder_hidden_states=states, encoder_attention_mask=mask).logits

    if temperature == 0:
        expected = logits()
    madtp.apply_patch(model, **options)
    if temperature:
        states = model.vision_model(pixels).last_hidden_state
        mask = attention_mask(states)
        states = [row[kept.bool()].clone() for row, kept in zip(states, mask, strict=True)]
        for row in states:
            row[1:4] = 0
        states[1] *= -1
        madtp.remove_patch(model)
        with torch.no_grad():
            expected = torch.cat([
                model.text_decoder(text[None], encoder_hidden_states=row[None]).logits for text, row in zip(ids, states, strict=True)
            ])  # fmt: skip
        madtp.apply_patch(model, **options)
    torch.testing.assert_close(logits(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(lambda s: torch.ones(s.shape[:2], device=DEVICE)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, "two"])
def test_masks_hide_tokens_of_any_states(kind, make, generator):
    """Anything but 0 marks a token, as in transformers."""
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    ids, pixels, real = inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"].bool()
    seen = torch.rand(4, 65, generator=generator).to(DEVICE) < 0.6
    seen[:, 0] = True
    masks = [(2 * mask.long() if kind == "two" else mask.to(kind)) for mask in (seen, real)]

    with torch.no_grad():  # transformers ignores the mask of what is looked at, so only that is given to it
        states = model.vision_model(pixels).last_hidden_state
        expected = [
            model.text_decoder(text[None], encoder_hidden_states=row[kept][None], attention_mask=mask[None]).logits[0]
            for text, row, kept, mask in zip(ids, states, seen, masks[1], strict=True)
        ]
    madtp.apply_patch(model, temperature=0)
    for given in (states, model.vision_model(pixels).last_hidden_state):  # theirs, and what is recognised
        found = model.text_decoder(
            ids, encoder_hidden_states=given, encoder_attention_mask=masks[0], attention_mask=masks[1]
        ).logits
        torch.testing.assert_close(found[real], torch.stack(expected)[real], **SAME)
    states = model.vision_model(pixels).last_hidden_state
    for mask, message in (
        (seen[:, :9], "encoder_attention_mask .4, 65.: got .4, 9."),
        (0 * seen, "at least one token of each"),
    ):
        with pytest.raises(ValueError, match=message):
            model.text_decoder(ids, encoder_hidden_states=states, encoder_attention_mask=mask)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_integers_of_any_type(dtype, task, make, generator):
    model, (_, inputs) = make(task), sample_inputs(task, generator)
    madtp.apply_patch(model, temperature=0)
    expected = results(task, model, inputs)
    assert equal(results(task, model, inputs | {"input_ids": inputs["input_ids"].to(dtype)}), expected)
    for wrong in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=f"input_ids: expected integers, got {wrong}"):
            run(task, model, inputs | {"input_ids": inputs["input_ids"].to(wrong)})


def test_anything_but_zero_marks_a_token(make, generator):
    model, (_, inputs) = make("vqa"), sample_inputs("vqa", generator)
    madtp.apply_patch(model, temperature=0)
    expected = results("vqa", model, inputs)
    assert equal(results("vqa", model, inputs | {"attention_mask": inputs["attention_mask"] * 7}), expected)


# ---- what is asked for


@pytest.mark.parametrize(
    "tower, options",
    [(tower, options) for tower in TOWERS for options in (
        {"output_attentions": True}, {"output_hidden_states": True}, {"output_hidden_states": 0}, {"output_hidden_states": [1]},
        {"output_cross_attentions": True}, {"sliding_window": 3},
    ) if (tower, *options) != ("clip vision", "output_hidden_states")]
    + [(tower, options) for tower in ("encoder", "decoder") for options in ({"inputs_embeds": 1}, {"encoder_embeds": 1})],
)  # fmt: skip
def test_arguments_that_a_tower_does_not_take(tower, options, make, generator):
    task, place, _ = TOWERS[tower]
    model, (_, inputs) = make(task), sample_inputs(task, generator)
    madtp.apply_patch(model, temperature=0)
    given = {"pixel_values": inputs["pixel_values"]} if "vision" in tower else {"input_ids": inputs["input_ids"]}
    given |= {"is_decoder": True} if tower == "decoder" else {}
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}: a patched model "):
        model.get_submodule(place)(**given, **options)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_what_a_configuration_asks_for(name, make, generator):
    model, (_, inputs) = make("retrieval"), sample_inputs("retrieval", generator)
    madtp.apply_patch(model, temperature=0)
    setattr(model.vision_model.config, name, True)
    with pytest.raises(ValueError, match=f"^{name}: a patched model"):
        model(**inputs)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cache_implementation": "static"}, "cache: a patched decoder takes a DynamicCache, got StaticCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: a patched model"),
        (
            {"generation_config": GenerationConfig(output_hidden_states=True, return_dict_in_generate=True)},
            "output_hidden_states: ",
        ),
    ],
)
def test_ways_to_generate_that_are_refused(options, message, make, generator):
    model = make("caption")
    madtp.apply_patch(model, temperature=0)
    with pytest.raises(ValueError, match=f"^{message}"):
        model.generate(pictures(generator, 2), max_length=8, **options)


@pytest.mark.parametrize("task", TASKS)
def test_signatures_stay(task, make):
    """transformers reads them to tell arguments from mistakes."""
    import inspect

    model = make(task)
    names = [name for name, module in model.named_modules() if type(module).__name__.startswith(("Blip", "CLIP"))]
    before = {name: inspect.signature(model.get_submodule(name).forward) for name in names}
    madtp.apply_patch(model, temperature=0)
    assert {name: inspect.signature(model.get_submodule(name).forward) for name in names} == before
    if task == "caption":
        with pytest.raises(ValueError, match="not_an_option"):
            model.generate(torch.zeros(1, 3, 64, 64, device=DEVICE), not_an_option=1)


# ---- precision


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_autocast(task, temperature, make, generator):
    """Results are those of the dtype within its precision, and calls outside are what they were."""
    model, (_, inputs) = make(task), sample_inputs(task, generator)
    madtp.apply_patch(model, temperature=temperature)  # an untrained dictionary: CLIP has maps to it
    fresh = copy.deepcopy(model)

    def states(net):
        return net.vision_model(inputs["pixel_values"]).last_hidden_state

    with torch.autocast(DEVICE, torch.bfloat16):
        half, words = states(model), results(task, model, inputs)
    assert all(tensor.isfinite().all() for tensor in words if tensor.is_floating_point())
    exact = states(fresh)
    if temperature == 0:
        assert (half.float() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert torch.equal(states(model), exact)
    assert equal(results(task, model, inputs), results(task, fresh, inputs))


def test_a_patched_tower_that_is_compiled(make, generator):
    """It notices the same things, at each call."""
    model, (_, inputs) = make("caption"), sample_inputs("caption", generator)
    madtp.apply_patch(model, temperature=0)
    tower, pixels = model.vision_model, inputs["pixel_values"]
    compiled = torch.compile(tower, backend="eager")
    torch.testing.assert_close(compiled(pixels).last_hidden_state, tower(pixels).last_hidden_state, **SAME)
    tower.get_submodule("encoder.layers.0.mlp.fc1").weight.data[3] = 2
    torch.testing.assert_close(compiled(pixels).last_hidden_state, tower(pixels).last_hidden_state, **SAME)
    tower.encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="encoder.layers.0 has hooks"):
        compiled(pixels)


@pytest.mark.parametrize("widths", [(96, None), (64, "img_query_model"), (128, "img_query_model")])
def test_dictionaries_of_another_width(widths, make):
    width, missing = widths
    dictionary = torch.ones(5, width)
    if missing is None:
        madtp.apply_patch(make("vqa"), temperature=1.0, dictionary=dictionary)
        return
    for task in sorted(CLASSES):
        model = make(task)
        with pytest.raises(
            ValueError, match=f"^dictionary: its entries are {width} wide, .* holds no visual_encoder.{missing}"
        ):
            madtp.apply_patch(model, temperature=1.0, dictionary=dictionary)
        assert not hasattr(model, "_madtp")
