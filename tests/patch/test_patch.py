"""apply_patch: models of transformers on ragged execution. Dense they compute what they did, pruned what our models do."""

import copy
import logging
import re

import pytest
import torch
from helpers import DEVICE
from safetensors.torch import load_file, save_file
from test_huggingface import CLASSES, DEC, ENC, SEP, answers, hugging_face, pictures, texts
from test_huggingface import config as blip_config
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

import madtp
from madtp.patch import attention_mask
from madtp.tasks import TASKS as REGISTRY
from madtp.weights.key_maps import FAMILIES

TASKS = [*sorted(CLASSES), "clip"]
EOT = 119
SAME = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.fixture
def make(generator):
    """Models of transformers with random weights."""
    return lambda task, **vision: clip(generator) if task == "clip" else hugging_face(task, generator, **vision)


def clip(generator, eos_token_id=EOT):
    config = CLIPConfig(
        text_config=dict(vocab_size=EOT + 1, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3,
                         max_position_embeddings=24, eos_token_id=eos_token_id, bos_token_id=EOT - 1, pad_token_id=EOT),
        vision_config=dict(hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6, image_size=64,
                           patch_size=8),
        projection_dim=32,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "embedding" in name and "patch" not in name:
                parameter.copy_(0.5 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.to(DEVICE)


def sample_inputs(task, generator, count=4):
    """Inputs as a processor returns them: pictures, and texts of different lengths."""
    lengths = [9, 4, 3, 12, 7, 5][:count]
    if task == "clip":
        ids, padded, mask = texts(generator, EOT - 1, lengths)
        padded = torch.where(mask.bool(), padded.clamp(max=EOT - 2), EOT)
        padded[:, 0] = EOT - 1
        padded[range(count), [length - 1 for length in lengths]] = EOT
        ids = [row[:length] for row, length in zip(padded, lengths, strict=True)]
    else:
        ids, padded, mask = texts(generator, DEC if task == "caption" else ENC, lengths)
    return ids, {"pixel_values": pictures(generator, count), "input_ids": padded, "attention_mask": mask}


def dictionary_of(task, generator):
    return torch.randn(20, 32 if task == "clip" else 96, generator=generator).to(DEVICE)


def results(task, model, inputs):
    """Tensors that a model returns, without what padding holds."""
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        if task == "caption":
            output, pixels = model(**inputs), inputs["pixel_values"]
            pooled, sequences = (
                model.vision_model(pixels).pooler_output,
                model.generate(pixels, num_beams=3, max_length=12),
            )
            return [output.logits[real], output.image_embeds, pooled, sequences]
        if task == "vqa":
            images = model.vision_model(inputs["pixel_values"]).last_hidden_state
            questions = model.text_encoder(inputs["input_ids"], inputs["attention_mask"], encoder_hidden_states=images)[
                0
            ]
            alone = [
                model.generate(ids[mask][None], pixels[None], num_beams=3, max_length=9)
                for ids, mask, pixels in zip(inputs["input_ids"], real, inputs["pixel_values"], strict=True)
            ]
            return [images, questions[:, 0], *alone]
        if task == "retrieval":
            return [model(**inputs, use_itm_head=head).itm_score for head in (True, False)]
        output = model(**inputs)
        return [
            output.logits_per_image,
            output.image_embeds,
            output.text_embeds,
            output.vision_model_output.last_hidden_state,
        ]


def close(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **SAME)


def equal(ours, theirs):
    return all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


# ---- dense


def test_without_pruning_nothing_changes(task, make, generator):
    model = make(task)
    _, inputs = sample_inputs(task, generator)
    expected = results(task, model, inputs)
    patch = madtp.apply_patch(model, temperature=0)
    assert (patch.task, patch.temperature, patch.keep_ratio, patch.steps) == (task, 0.0, None, ())
    close(results(task, model, inputs), expected)


def test_ends_of_clip_texts(generator):
    """Older configs hold a wrong number for the end-of-text token, which stands for the highest id of a text."""
    _, inputs = sample_inputs("clip", generator)
    inputs["input_ids"] = inputs["input_ids"].where(inputs["attention_mask"].bool(), 0)
    for model in (clip(generator, eos_token_id=2), clip(generator)):
        expected = results("clip", model, inputs)
        madtp.apply_patch(model, temperature=0)
        close(results("clip", model, inputs), expected)
    with pytest.raises(
        ValueError, match="attention_mask: expected texts without padding before their end-of-text token"
    ):
        model(**inputs | {"attention_mask": inputs["attention_mask"].roll(1, 1)})
    with pytest.raises(ValueError, match="position_ids: a patched model does not take it here"):
        model(**inputs, position_ids=torch.arange(12, device=DEVICE)[None])


def test_states_of_texts_of_different_lengths(make, generator):
    model = make("vqa")
    _, inputs = sample_inputs("vqa", generator)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.inference_mode():
        images = model.vision_model(inputs["pixel_values"]).last_hidden_state
        for options in (
            {},
            {"encoder_hidden_states": images},
            {"position_ids": torch.arange(3, 15, device=DEVICE)[None]},
        ):
            expected = model.text_encoder(ids, attention_mask=mask, **options).last_hidden_state
            madtp.apply_patch(model, temperature=0)
            states = model.text_encoder(ids, attention_mask=mask, **options).last_hidden_state
            madtp.remove_patch(model)
            torch.testing.assert_close(states, expected * mask[..., None], **SAME)


def test_a_batch_of_questions_is_answered_as_one_question_at_a_time(make, generator):
    model = make("vqa")
    _, inputs = sample_inputs("vqa", generator)
    expected = [answers(sequence, 1)[0] for sequence in results("vqa", model, inputs)[2:]]
    madtp.apply_patch(model, temperature=0)
    assert answers(model.generate(**inputs, num_beams=3, max_length=9), 1) == expected


@pytest.mark.parametrize("options", [
    {"do_sample": True, "top_p": 0.9}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False},
    {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True},
])  # fmt: skip
def test_ways_to_generate(options, make, generator):
    model = make("caption")
    pixels = pictures(generator, 3)
    generated = []
    for patched in (False, True):
        if patched:
            madtp.apply_patch(model, temperature=0)
        torch.manual_seed(5)
        generated.append(model.generate(pixels, max_length=10, **options))
    if "output_scores" in options:
        assert type(generated[0]) is type(generated[1])
        torch.testing.assert_close(generated[1].sequences_scores, generated[0].sequences_scores, **SAME)
        generated = [output.sequences for output in generated]
    assert torch.equal(*generated)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_different_lengths(side, make, generator):
    model = make("caption")
    _, inputs = sample_inputs("caption", generator)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if side == "left":
        order = mask.argsort(dim=1, stable=True)
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        # The method overwrites the first column with [DEC] and drops the last; neither is a token of the shorter prompts.
        ids, mask = (torch.nn.functional.pad(t, (1, 1)) for t in (ids, mask))
    options = {"attention_mask": mask, "max_length": 20, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(inputs["pixel_values"], ids.clone(), **options)
    madtp.apply_patch(model, temperature=0)
    found = model.generate(inputs["pixel_values"], ids.clone(), **options)
    torch.testing.assert_close(found.logits[0], expected.logits[0], **SAME)
    assert torch.equal(found.sequences, expected.sequences)


def test_loss(make, generator):
    model = make("caption")
    _, inputs = sample_inputs("caption", generator)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    expected = model(**inputs, labels=labels).loss
    madtp.apply_patch(model, temperature=0)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected.detach(), **SAME)


def test_one_picture_and_several_texts(make, generator):
    model = make("retrieval")
    _, inputs = sample_inputs("retrieval", generator)
    inputs["pixel_values"] = inputs["pixel_values"][:1]
    expected = results("retrieval", model, inputs)
    madtp.apply_patch(model, temperature=0)
    close(results("retrieval", model, inputs), expected)


# ---- pruned


def our_model(task, model, guidance, temperature):
    """Ours from the same weights, and a dictionary in our names."""
    layout = madtp.weights.key_maps.HUGGING_FACE[model.config.model_type]
    config = layout.config_of(model.config.to_dict(), guidance, task)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return madtp.load(state | guidance, config=config, temperature=temperature, device=DEVICE)


def guidance_of(task, model, generator, path):
    """A dictionary, with maps to it for CLIP; and the argument that gives them to a patch."""
    guidance = {"space_dict": dictionary_of(task, generator)}
    if task != "clip":
        return guidance, guidance["space_dict"]
    for key, value in our_model(task, model, guidance, 0.0).state_dict().items():
        if "query_models" in key:
            guidance[key] = torch.randn(value.shape, generator=generator).to(DEVICE) * value.shape[-1] ** -0.5
    save_file({key: value.cpu() for key, value in guidance.items()}, path)
    return guidance, path


def test_pruned_as_our_own_model(task, make, generator, tmp_path):
    model = make(task)
    guidance, dictionary = guidance_of(task, model, generator, tmp_path / "guidance.safetensors")
    ours = our_model(task, model, guidance, 4.0)
    ids, inputs = sample_inputs(task, generator)
    dense = results(task, model, inputs)
    patch = madtp.apply_patch(model, temperature=4.0, dictionary=dictionary, samples=inputs)
    assert patch.keep_ratio < 0.9, "tokens are pruned"
    pixels = inputs["pixel_values"]
    with torch.inference_mode():
        output = ours(pixels, ids)
        if task == "caption":
            found = model(**inputs)
            torch.testing.assert_close(found.image_embeds, output.images.to_padded()[0], **SAME)
            torch.testing.assert_close(found.logits[inputs["attention_mask"].bool()], output.logits.values, **SAME)
            assert (found.image_embeds.shape[1] < 65) and not torch.equal(found.logits, dense[0])
            prompt = torch.tensor([[DEC, 7, SEP]] * 4, device=DEVICE)
            for options in ({"num_beams": 3, "min_length": 6}, {"num_beams": 1, "min_length": 4}):
                expected = ours.generate(output.images, prompt[0, :2], max_length=12, official_lengths=False, **options)
                sequences = model.generate(pixels, prompt.clone(), max_length=12, **options)
                assert answers(sequences, 2) == [caption.tolist() for caption in expected]
        elif task == "vqa":
            expected = ours.generate(output.questions, num_beams=3, max_length=9, official_lengths=False)
            assert answers(model.generate(**inputs, num_beams=3, max_length=9), 1) == [
                answer.tolist() for answer in expected
            ]
            images = model.vision_model(pixels).last_hidden_state
            states = model.text_encoder(inputs["input_ids"], inputs["attention_mask"], encoder_hidden_states=images)
            torch.testing.assert_close(states.last_hidden_state, output.questions.to_padded()[0], **SAME)
        elif task == "retrieval":
            match = ours.match(output.images, ids, [(b, b) for b in range(4)])
            torch.testing.assert_close(model(**inputs).itm_score, match.logits, **SAME)
            torch.testing.assert_close(model(**inputs, use_itm_head=False).itm_score, output.similarity, **SAME)
        else:
            found = model(**inputs)
            torch.testing.assert_close(found.logits_per_image, output.logits_per_image, **SAME)
            torch.testing.assert_close(found.text_embeds, output.text_embeds, **SAME)
            features = model.get_image_features(pixels).pooler_output
            torch.testing.assert_close(features, output.image_features, **SAME)
            assert not equal([found.text_embeds], dense[2:3]), "texts are pruned too"


def test_a_sample_alone_and_in_a_batch(task, make, generator):
    model = make(task)
    _, inputs = sample_inputs(task, generator)
    madtp.apply_patch(model, temperature=4.0, dictionary=dictionary_of(task, generator))

    def run(inputs):
        if task == "caption":
            return model.generate(inputs["pixel_values"], num_beams=3, max_length=12)
        if task == "vqa":
            return model.generate(**inputs, num_beams=3, max_length=9)
        if task == "retrieval":
            return model(**inputs).itm_score
        with torch.inference_mode():
            return torch.cat([model(**inputs).image_embeds, model(**inputs).text_embeds], -1)

    together = run(inputs)
    for b, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = run({
            "pixel_values": inputs["pixel_values"][b : b + 1],
            "input_ids": inputs["input_ids"][b : b + 1, :length],
            "attention_mask": inputs["attention_mask"][b : b + 1, :length],
        })  # fmt: skip
        if task in ("caption", "vqa"):
            assert answers(alone, 1) == answers(together[b : b + 1], 1)
        else:
            torch.testing.assert_close(alone, together[b : b + 1], **SAME)


def test_no_gradients(task, make, generator):
    """Rather none than those of the heads alone."""
    model = make(task)
    _, inputs = sample_inputs(task, generator)
    inputs |= {"labels": inputs["input_ids"]} if task in ("caption", "vqa") else {}
    assert model(**inputs)[0].requires_grad
    madtp.apply_patch(model, temperature=0)
    assert not model(**inputs)[0].requires_grad
    if task == "clip":
        assert not model.get_text_features(inputs["input_ids"]).pooler_output.requires_grad


def test_padding_of_outputs(make, generator):
    model = make("caption")
    madtp.apply_patch(model, temperature=6.0, dictionary=dictionary_of("caption", generator))
    pixels = pictures(generator, 4)
    output = model.vision_model(pixels)
    assert type(output) is BaseModelOutputWithPooling
    padded, mask = output.last_hidden_state, attention_mask(output.last_hidden_state)
    assert mask.shape == padded.shape[:2] and mask.dtype == torch.int64
    assert len(set(mask.sum(1).tolist())) > 1, "images keep different numbers of tokens"
    assert (mask.diff(dim=1) <= 0).all() and (padded[mask == 0] == 0).all() and (padded[mask == 1] != 0).any(-1).all()
    torch.testing.assert_close(output.pooler_output, model.vision_model.post_layernorm(padded[:, 0]))
    assert isinstance(model.vision_model(pixels, return_dict=False), tuple)

    # Decoders know such a tensor; they need the mask with what is computed from it, and have no use for it otherwise.
    ids = torch.tensor([[DEC, 7, 8]] * 4, device=DEVICE)
    logits = model.text_decoder(ids, encoder_hidden_states=padded).logits
    torch.testing.assert_close(model(pixels, ids).logits, logits)
    flipped = model.text_decoder(ids, encoder_hidden_states=padded.flip(0), encoder_attention_mask=mask.flip(0)).logits
    torch.testing.assert_close(flipped.flip(0), logits, **SAME)
    for mask_of_all in (None, torch.ones_like(mask)):
        with pytest.raises(
            ValueError, match="encoder_hidden_states: rows of zeros may be the padding of a patched tower"
        ):
            model.text_decoder(ids, encoder_hidden_states=padded.flip(0), encoder_attention_mask=mask_of_all)
    with pytest.raises(ValueError, match="expected what a patched tower returned"):
        attention_mask(padded.flip(0))


def test_a_cache_that_goes_on(make, generator):
    """Word by word with a cache as all at once."""
    model = make("caption")
    madtp.apply_patch(model, temperature=4.0, dictionary=dictionary_of("caption", generator))
    images = model.vision_model(pictures(generator, 3)).last_hidden_state
    ids = torch.randint(5, DEC, (3, 6), generator=generator).to(DEVICE)
    expected = model.text_decoder(ids, encoder_hidden_states=images).logits
    first = model.text_decoder(ids[:, :4], encoder_hidden_states=images, use_cache=True)
    second = model.text_decoder(ids[:, 4:], encoder_hidden_states=images, past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, **SAME)


# ---- targets


@pytest.mark.parametrize("share", [0.4, 0.55])
def test_keep_ratio(share, task, make, generator):
    model = make(task)
    _, inputs = sample_inputs(task, generator, 6)
    options = {"keep_ratio": share, "dictionary": dictionary_of(task, generator)}
    patch = madtp.apply_patch(model, samples=inputs, **options)
    assert abs(patch.keep_ratio / share - 1) < 0.02
    step = next(step for step in patch.steps if step.temperature == patch.temperature)
    assert step == (patch.temperature, patch.keep_ratio, patch.gflops)
    assert patch.steps[0].keep_ratio == 1.0 and patch.steps[0].gflops > patch.gflops
    # What was found is what the model does: the last step left its last layer as it is.
    # CLIP's states repeat the token that stands for several patches.
    states = model.vision_model(inputs["pixel_values"]).last_hidden_state
    rows = [row[kept.bool()] for row, kept in zip(states, attention_mask(states), strict=True)]
    assert len(rows) < sum(len(row.unique(dim=0)) for row in rows) < len(rows) * 65 * share
    madtp.remove_patch(model)
    assert madtp.apply_patch(model, samples=inputs, **options) == patch, "deterministic"


def test_target_gflops(task, make, generator):
    model = make(task)
    _, inputs = sample_inputs(task, generator, 6)
    dense = madtp.apply_patch(model, temperature=0, samples=inputs)
    assert dense.keep_ratio == 1.0
    madtp.remove_patch(model)
    target = 0.7 * dense.gflops
    patch = madtp.apply_patch(model, target_gflops=target, samples=inputs, dictionary=dictionary_of(task, generator))
    assert abs(patch.gflops / target - 1) < 0.02 and patch.temperature > 0
    if task == "caption":
        lengths = madtp.flops.stream_lengths(model._madtp.model(inputs["pixel_values"]).vision)
        costs = [madtp.flops.caption(model._madtp.model.config, row, 15).official for row in lengths]
        assert patch.gflops == pytest.approx(sum(costs) / len(costs))


def test_targets_out_of_reach(make, generator):
    """Found within 2 %, or refused with what can be reached."""
    model = make("caption")
    inputs = {"pixel_values": pictures(generator, 3)}
    options = {"samples": inputs, "dictionary": dictionary_of("caption", generator)}
    patch = madtp.apply_patch(model, keep_ratio=1.0, **options)
    assert patch.temperature == 0.0 and len(patch.steps) == 1
    madtp.remove_patch(model)
    for target in ({"keep_ratio": 0.96}, {"keep_ratio": 0.01}, {"target_gflops": 1e-6}):
        name, value = next(iter(target.items()))
        with pytest.raises(
            ValueError, match=f"^{name}: {value:.4g} is out of reach on these samples, which allow "
        ) as error:
            madtp.apply_patch(model, **target, **options)
        assert not hasattr(model, "_madtp")
        least, most, *closest = map(
            float, re.findall(r" (\d[\d.e-]*)", str(error.value).partition("which")[2].replace(";", ""))
        )
        assert least < most and len(closest) == (2 if value == 0.96 else 1)
        assert not any(abs(found / value - 1) < 0.02 for found in closest)
        if name == "keep_ratio":  # what is said to be possible is
            patch = madtp.apply_patch(model, keep_ratio=closest[0], **options)
            assert abs(patch.keep_ratio / closest[0] - 1) < 0.02
            madtp.remove_patch(model)


def test_tokens_much_alike(make, generator):
    """Untrained weights, as somebody has who tries it: many tokens go at once. The share is met all the same, or it is an error."""
    model = CLASSES["caption"](blip_config()).eval().to(DEVICE)  # N(0, 0.02), as transformers begins
    inputs = {"pixel_values": pictures(generator, 2)}
    for share in (0.3, 0.5, 0.7, 0.95):
        try:
            patch = madtp.apply_patch(model, keep_ratio=share, samples=inputs)
        except ValueError as error:
            assert "is out of reach on these samples" in str(error)
        else:
            assert abs(patch.keep_ratio / share - 1) < 0.02
            madtp.remove_patch(model)


def test_keep_ratio_needs_no_texts(make, generator):
    samples = {"pixel_values": pictures(generator, 6)}
    patch = madtp.apply_patch(make("vqa"), keep_ratio=0.5, samples=samples, dictionary=dictionary_of("vqa", generator))
    assert abs(patch.keep_ratio / 0.5 - 1) < 0.02 and patch.gflops is None
    with pytest.raises(ValueError, match="samples: target_gflops needs 'input_ids' too for a model for task 'vqa'"):
        madtp.apply_patch(make("vqa"), target_gflops=0.01, samples=samples)


# ---- their weights stay theirs


def test_removed_without_a_trace(task, make, generator, tmp_path):
    model = make(task)
    _, inputs = sample_inputs(task, generator)
    before, names = results(task, model, inputs), [name for name, _ in model.named_modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    madtp.apply_patch(model, temperature=4.0, dictionary=dictionary_of(task, generator))
    assert not equal(results(task, model, inputs)[:1], before[:1])
    assert list(model.state_dict()) == list(state) and [name for name, _ in model.named_modules()] == names
    model.save_pretrained(tmp_path / "patched")
    reloaded = type(model).from_pretrained(tmp_path / "patched").eval().to(DEVICE)
    assert equal(results(task, reloaded, inputs), before)
    assert model.config.architectures == [type(model).__name__]

    madtp.remove_patch(model)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert equal(results(task, model, inputs), before)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name] and parameter.requires_grad, name
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(set(storages)) == len(storages), "memory is not shared any more"


def test_no_weights_are_copied(task, make):
    model = make(task)
    madtp.apply_patch(model, temperature=0)
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for link in model._madtp.links:
        assert link.module._parameters[link.name].untyped_storage().data_ptr() in theirs
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert len(sizes) == len(list(model.parameters())), "each keeps its memory for itself"
    assert sum(sizes.values()) == sum(p.numel() * p.element_size() for p in model.parameters())


def halve(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def load_others(model, **options):
    state = {key: value * 0.7 for key, value in model.state_dict().items()}
    model.load_state_dict(state, **options)


def to_bfloat16(model):
    model.to(torch.bfloat16)


def assign(model):
    load_others(model, assign=True)


@pytest.mark.parametrize("change", [halve, load_others, assign, to_bfloat16])
def test_weights_that_change_are_followed(change, task, make, generator):
    model = make(task)
    _, inputs = sample_inputs(task, generator)
    options = {"temperature": 3.0, "dictionary": dictionary_of(task, generator)}
    madtp.apply_patch(model, **options)
    before = results(task, model, inputs)
    change(model)
    after = results(task, model, inputs)
    assert not equal(after[:1], before[:1])
    madtp.remove_patch(model)
    madtp.apply_patch(model, **options)
    assert equal(results(task, model, inputs), after)


def test_a_copy_of_a_patched_model(make, generator):
    model = make("caption")
    _, inputs = sample_inputs("caption", generator)
    madtp.apply_patch(model, temperature=4.0, dictionary=dictionary_of("caption", generator))
    other, expected = copy.deepcopy(model), results("caption", model, inputs)
    halve(model)
    madtp.remove_patch(model)
    assert equal(results("caption", other, inputs), expected)
    madtp.remove_patch(other)


# ---- dictionaries


def test_without_a_dictionary_one_warning_and_a_fixed_seed(make, generator, caplog):
    _, inputs = sample_inputs("caption", generator)
    models = [make("caption") for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    with caplog.at_level(logging.WARNING, logger="madtp"):
        madtp.apply_patch(models[0], temperature=3.0)
    assert len(caplog.records) == 1 and "space_dict" in caplog.text and "not trained" in caplog.text
    torch.randn(3)
    madtp.apply_patch(models[1], temperature=3.0)
    assert equal(results("caption", models[0], inputs), results("caption", models[1], inputs))
    dictionary = models[0]._madtp.model.space_dict
    assert dictionary.shape == (100, 96) and 0.95 < dictionary.std() < 1.05
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="madtp"):
        madtp.apply_patch(make("caption"), temperature=0)
    assert not caplog.records, "a dense model has no use for one"


def test_dictionary_of_a_saved_model(make, generator, tmp_path):
    model = make("caption")
    dictionary = dictionary_of("caption", generator)
    ours = our_model("caption", model, {"space_dict": dictionary}, 2.0)
    ours.processor = REGISTRY["caption"].Processor(64, 200, 40, "demo")
    madtp.save_pretrained(ours, tmp_path / "ours")
    torch.save({"model": madtp.weights.to_official(ours.state_dict()), "epoch": 1}, tmp_path / "madtp.pth")
    save_file({"space_dict": dictionary.cpu()}, tmp_path / "alone.safetensors")
    for path in ("ours/model.safetensors", "madtp.pth", "alone.safetensors"):
        madtp.apply_patch(model, temperature=2.0, dictionary=tmp_path / path)
        assert torch.equal(model._madtp.model.space_dict, dictionary)
        madtp.remove_patch(model)
    state = load_file(tmp_path / "ours" / "model.safetensors")
    save_file({key: value for key, value in state.items() if key != "space_dict"}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="none.safetensors holds no 'space_dict'"):
        madtp.apply_patch(model, temperature=2.0, dictionary=tmp_path / "none.safetensors")


def test_clip_keys_have_a_place_or_none(make):
    model = make("clip")
    ours = our_model("clip", model, {}, 0.0)
    names = [name for key in ours.state_dict() for name in FAMILIES["clip"].parts_of(key)]
    assert sorted(names) == sorted(model.state_dict())


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "expected exactly one of temperature, keep_ratio, target_gflops, got none"),
        ({"temperature": 1, "keep_ratio": 0.5}, "exactly one of .*, got temperature, keep_ratio"),
        ({"temperature": -1.0}, "temperature: expected 0, or a number from 1e-30 to 1e30, got -1.0"),
        ({"temperature": float("nan")}, "temperature: expected 0, or a number from 1e-30 to 1e30, got nan"),
        ({"keep_ratio": 1.2, "samples": {}}, "keep_ratio: expected a share above 0 and up to 1, got 1.2"),
        ({"target_gflops": 0, "samples": {}}, "target_gflops: expected a number above 0, got 0"),
        ({"temperature": 1, "backend": "gpu"}, "backend: expected one of .*, got 'gpu'"),
        ({"keep_ratio": 0.5}, "samples: keep_ratio is sought on a few inputs of the model, got none"),
        ({"keep_ratio": 0.5, "samples": {"input_ids": 1}}, "samples: expected 'pixel_values', got input_ids"),
        ({"temperature": 1.0, "dictionary": torch.zeros(5)}, r"dictionary: expected numbers \[M, width\], got \[5\]"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, make):
    model = make("caption")
    with pytest.raises(ValueError, match=message):
        madtp.apply_patch(model, **arguments)
    assert not hasattr(model, "_madtp")


def test_a_number_of_texts_that_does_not_fit(make, generator):
    _, inputs = sample_inputs("vqa", generator)
    with pytest.raises(ValueError, match="samples: expected a text for each of 4 images, got 2"):
        madtp.apply_patch(make("vqa"), temperature=1.0, samples=inputs | {"input_ids": inputs["input_ids"][:2]})


def test_models_that_cannot_be_patched(make):
    small = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(
        TypeError, match="expected one of BlipForConditionalGeneration, .*, CLIPModel, .*, got BertModel"
    ):
        madtp.apply_patch(BertModel(small), temperature=0)
    model = make("vqa")
    with pytest.raises(ValueError, match="model: expected one that apply_patch has patched"):
        madtp.remove_patch(model)
    madtp.apply_patch(model, temperature=0)
    with pytest.raises(ValueError, match="it is patched already; call remove_patch first"):
        madtp.apply_patch(model, temperature=0)
    hooked = make("vqa")
    hooked.text_encoder.forward = hooked.text_encoder.forward
    with pytest.raises(ValueError, match="text_encoder.forward is replaced already"):
        madtp.apply_patch(hooked, temperature=0)
    mixed = make("vqa")
    mixed.vision_model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="one dtype and on one device, found torch.bfloat16 on .*, torch.float32 on"):
        madtp.apply_patch(mixed, temperature=0)
    with torch.device("meta"), pytest.raises(ValueError, match="found torch.float32 on meta"):
        madtp.apply_patch(CLASSES["caption"](blip_config()), temperature=0)
    adapted = make("vqa")
    adapted.text_encoder.encoder.layer[1].attention.self.key = torch.nn.Sequential(torch.nn.Linear(96, 96))
    with pytest.raises(
        ValueError, match="text_encoder.encoder.layer.1.attention.self.key is a Sequential, expected a Linear"
    ):
        madtp.apply_patch(adapted, temperature=0)
    other = type("Linear", (torch.nn.Linear,), {})  # as quantisation puts one in its place
    adapted.text_encoder.encoder.layer[1].attention.self.key = other(96, 96)
    with pytest.raises(
        ValueError, match=r"self.key is a [a-z.]*test_patch\.Linear, expected a torch.nn.modules.linear.Linear; "
    ):
        madtp.apply_patch(adapted, temperature=0)


def test_calls_that_a_patched_model_does_not_serve(make, generator):
    model = make("caption")
    pixels = pictures(generator, 2)
    madtp.apply_patch(model, temperature=0)
    for name in ("output_attentions", "output_hidden_states", "interpolate_pos_encoding"):
        with pytest.raises(ValueError, match=f"{name}: a patched model"):
            model.vision_model(pixels, **{name: True})
    model.vision_model.config.output_hidden_states = True
    for asked in ({}, {"output_hidden_states": None}):  # None is what the configuration says
        with pytest.raises(ValueError, match="output_hidden_states: a patched model"):
            model.vision_model(pixels, **asked)
    model.vision_model.config.output_hidden_states = False
    with pytest.raises(ValueError, match="pixels: expected .B, 3, 64, 64."):
        model.vision_model(pixels[..., :32])
    with pytest.raises(ValueError, match="encoder_hidden_states: expected what the decoder is to look at"):
        model.text_decoder(torch.tensor([[DEC]], device=DEVICE))
    for count in (3, 4):
        with pytest.raises(ValueError, match=f"encoder_hidden_states: 2 samples do not fit {count} texts"):
            model(pixels, torch.full((count, 2), DEC, device=DEVICE))
    model.train()
    with pytest.raises(ValueError, match="a patched model is for inference"):
        model.vision_model(pixels)
