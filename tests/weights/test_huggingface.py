"""BLIP of transformers: its directories are loaded, and without pruning our models compute what its classes compute."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DEVICE
from safetensors.torch import load_file, save_file
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    GenerationConfig,
)

import madtp
from madtp import CheckpointError, generation
from madtp.processing import load_tokenizer
from madtp.pruning import Tokens
from madtp.weights.key_maps import blip_hugging_face
from madtp_kernels import RaggedBatch

VOCABULARY = 200  # of the bundled tokenizer
DEC, ENC, SEP = VOCABULARY - 2, VOCABULARY - 1, 3
CLASSES = {
    "caption": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
    "retrieval": BlipForImageTextRetrieval,
}
TASKS = sorted(CLASSES)


def config(**vision) -> BlipConfig:
    """Every size is another one, and no head is 64 wide."""
    return BlipConfig(
        vision_config=dict(hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=6, image_size=64,
                           patch_size=8) | vision,
        text_config=dict(vocab_size=VOCABULARY, hidden_size=96, intermediate_size=160, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=40, bos_token_id=DEC, sep_token_id=SEP, eos_token_id=SEP),
        image_text_hidden_size=32,
    )  # fmt: skip


def hugging_face(task, generator, **vision):
    """A model of transformers, random in all its weights, with activations of order one."""
    model = CLASSES[task](config(**vision)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.copy_(1 + 0.1 * noise)
            elif "word_embeddings" in name:  # logits of order one too
                parameter.copy_(0.1 * noise)
            elif "embedding" in name and "patch" not in name:
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        if task != "retrieval":
            model.text_decoder.cls.predictions.bias[0] = -100.0  # [PAD] is no word
    return model.to(DEVICE)


def load(directory, *args, **options):
    return madtp.load(directory, *args, device=DEVICE, **options)


def pictures(generator, count):
    return torch.randn(count, 3, 64, 64, generator=generator).to(DEVICE)


def texts(generator, first, lengths=(9, 4, 1, 12)):
    """Texts of different lengths: as tensors, and padded with their mask."""
    ids = [torch.randint(5, DEC, (length,), generator=generator) for length in lengths]
    for text in ids:
        text[0] = first
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in ids], batch_first=True)
    return [text.to(DEVICE) for text in ids], padded.to(DEVICE), mask.to(DEVICE)


def answers(sequences, prompt):
    """What follows the prompt in sequences [B, L] of transformers, up to [SEP] or padding."""
    rows = [row[prompt:].tolist() for row in sequences]
    return [row[: next((n for n, token in enumerate(row) if token in (SEP, 0)), len(row))] for row in rows]


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "model"


# ---- the same weights, the same results


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_captions(eps, generator, directory):
    theirs = hugging_face("caption", generator, layer_norm_eps=eps)
    theirs.save_pretrained(directory)
    ours = load(directory)
    assert type(ours).__name__ == "Caption" and ours.temperature == 0.0
    pixels, (ids, padded, mask) = pictures(generator, 4), texts(generator, DEC)
    with torch.inference_mode():
        expected = theirs(pixels, padded, attention_mask=mask)
        output = ours(pixels, ids)
    images, _ = output.images.to_padded()
    torch.testing.assert_close(images, expected.image_embeds, atol=1e-5, rtol=1e-5)
    logits, _ = output.logits.to_padded()
    real = mask.bool()
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    assert expected.logits[real].std() > 0.5, "the texts are not all alike"


@pytest.mark.parametrize("options", [{"num_beams": 3, "min_length": 6}, {"num_beams": 1, "repetition_penalty": 1.4}])
def test_generated_captions(options, generator, directory):
    theirs = hugging_face("caption", generator)
    theirs.save_pretrained(directory)
    ours = load(directory)
    pixels, prompt = pictures(generator, 4), torch.tensor([DEC, 7, 8], device=DEVICE)
    with torch.inference_mode():
        # Their method takes the prompt as the tokenizer leaves it, with [SEP].
        sequences = theirs.generate(
            pixels, torch.nn.functional.pad(prompt, (0, 1), value=SEP).repeat(4, 1), max_length=14, **options
        )
        captions = ours.generate(ours(pixels).images, prompt, max_length=14, official_lengths=False, **options)
    assert [caption.tolist() for caption in captions] == answers(sequences, 3)
    assert len({tuple(row) for row in answers(sequences, 3)}) > 1, "the captions are not all alike"


# Every option that is served, with a value that changes the words, and what it needs beside it.
BEAMS, SAMPLE = {"num_beams": 3}, {"do_sample": True}
EFFECTS = {
    "bad_words_ids": ([[word] for word in range(100, 198)], {}),
    "begin_suppress_tokens": (list(range(100, 198)), {}),
    "do_sample": (True, {}),
    "early_stopping": (True, {**BEAMS, "length_penalty": 3.0}),
    "epsilon_cutoff": (0.02, SAMPLE),
    "eta_cutoff": (0.3, SAMPLE),
    "exponential_decay_length_penalty": ((1, 3.0), {}),
    "forced_eos_token_id": (7, {}),
    "length_penalty": (-4.0, BEAMS),
    "max_length": (6, {}),
    "max_new_tokens": (2, {"max_length": None}),
    "min_length": (12, {}),
    "min_new_tokens": (9, {}),
    "min_p": (0.5, SAMPLE),
    "no_repeat_ngram_size": (1, {}),
    "num_beams": (3, {}),
    "remove_invalid_values": (True, {}),
    "renormalize_logits": (True, {**BEAMS, "repetition_penalty": 1.3}),
    "repetition_penalty": (1.4, {}),
    "sequence_bias": ({(word,): 9.0 for word in range(50, 60)}, {}),
    "suppress_tokens": (list(range(100, 198)), {}),
    "temperature": (0.3, SAMPLE),
    "top_k": (3, SAMPLE),
    "top_p": (0.4, SAMPLE),
    "typical_p": (0.4, SAMPLE),
}
# Logits are finite; and with so few words one of these has been seen to make no difference.
WITHOUT_EFFECT = {"remove_invalid_values", "renormalize_logits", "early_stopping", "forced_eos_token_id"}


@pytest.fixture(scope="module")
def captioners(tmp_path_factory):
    """A model of theirs and ours with its weights, some pictures, and a prompt."""
    theirs, path = hugging_face("caption", torch.Generator().manual_seed(3)), tmp_path_factory.mktemp("captioner")
    theirs.text_decoder.cls.predictions.bias.data[SEP] += 3.5  # texts end before their greatest length
    theirs.save_pretrained(path)
    pixels = pictures(torch.Generator().manual_seed(4), 4)
    return theirs, load(path).text_decoder, pixels


def written(captioners, ours: bool, **options):
    """Words of greedy search with these options, by either."""
    theirs, decoder, pixels = captioners
    options = {"num_beams": 1, "max_length": 14, "min_length": 0, **options}
    torch.manual_seed(6)
    with torch.inference_mode():
        images = theirs.vision_model(pixels).last_hidden_state
        prompts = torch.tensor([[DEC, 7, 8]] * 4, device=DEVICE)
        if not ours:
            sequences = theirs.text_decoder.generate(
                prompts, encoder_hidden_states=images, eos_token_id=SEP, pad_token_id=0, attention_mask=torch.ones_like(prompts),
                **{name: value for name, value in options.items() if value is not None},
            )  # fmt: skip
            return answers(sequences, 3)
        memory = Tokens.start(RaggedBatch.from_padded(images, torch.ones(images.shape[:2], device=DEVICE)))
        return [
            words.tolist() for words in generation.generate(decoder, memory, prompts, official_lengths=False, **options)
        ]


@pytest.mark.parametrize("name", generation.OPTIONS)
def test_options_of_generate_do_what_they_do_in_transformers(name, captioners):
    value, beside = EFFECTS[name]
    found = written(captioners, True, **beside, **{name: value})
    assert found == written(captioners, False, **beside, **{name: value})
    without = beside | ({"length_penalty": 1.0} if name == "length_penalty" else {})
    if name not in WITHOUT_EFFECT:
        assert found != written(captioners, True, **without), "it makes a difference"


@pytest.mark.parametrize("name", sorted(vars(GenerationConfig()).keys() - set(generation.OPTIONS)))
def test_options_of_generate_that_are_not_served(name, captioners):
    """All others that this release of transformers has, so that a new one is no surprise."""
    with pytest.raises(ValueError, match=f"^{name}: no option here; there are "):
        written(captioners, True, **{name: False if name == "use_cache" else 2})


@pytest.mark.parametrize(
    "options, message",
    [
        *(
            ({name: EFFECTS[name][0]}, f"{name}: only sampling takes it")
            for name in ("top_k", "top_p", "temperature", "min_p")
        ),
        *(
            ({name: EFFECTS[name][0]}, f"{name}: only beam search takes it")
            for name in ("length_penalty", "early_stopping")
        ),
        ({"max_new_tokens": 2}, "max_new_tokens: give either this or max_length, got both"),
        ({"max_new_tokens": 38, "max_length": None}, "max_new_tokens: expected at least 1 and at most 37, got 38"),
        ({"max_length": 41}, "max_length: expected more than the prompt's 3 and at most 40, got 41"),
        ({"min_length": 15}, "min_length: expected at most the longest text's 14 tokens, got 15"),
        (
            {"seeds": [1, 2, 3, 4], "do_sample": True, "min_p": 0.1},
            "min_p: sampling with seeds takes temperature, top_k, top_p",
        ),
    ],
)
def test_options_of_generate_without_an_effect(options, message, captioners):
    with pytest.raises(ValueError, match=f"^{message}"):
        written(captioners, True, **options)


def test_words_that_are_sampled_with_seeds(captioners):
    """The same for a prompt in any order, from among those that the options leave; other seeds give other words."""
    sample = {"do_sample": True, "temperature": 1.5}
    first, second = (written(captioners, True, seeds=seeds, **sample) for seeds in ([1, 2, 3, 4], [1, 2, 9, 9]))
    assert first[:2] == second[:2] and first[2:] != second[2:]
    assert written(captioners, True, seeds=[1, 2, 3, 4], do_sample=True, top_k=1) == written(captioners, True)
    neutral = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    assert written(captioners, True, seeds=[1, 2, 3, 4], do_sample=True, **neutral) != first


def test_answers_are_those_to_one_question_at_a_time(generator, directory):
    theirs = hugging_face("vqa", generator)
    theirs.save_pretrained(directory)
    ours = load(directory)
    pixels, (ids, padded, mask) = pictures(generator, 4), texts(generator, ENC)
    with torch.inference_mode():
        images = theirs.vision_model(pixels).last_hidden_state
        states = theirs.text_encoder(padded, attention_mask=mask, encoder_hidden_states=images).last_hidden_state
        expected = [
            theirs.generate(text[None], pixels[b : b + 1], num_beams=3, max_length=9) for b, text in enumerate(ids)
        ]
        output = ours(pixels, ids)
        found = ours.generate(output.questions, num_beams=3, max_length=9, official_lengths=False)
    real = mask.bool()
    torch.testing.assert_close(output.questions.values, states[real], atol=1e-5, rtol=1e-5)
    assert [answer.tolist() for answer in found] == [answers(sequence, 1)[0] for sequence in expected]


def test_retrieval(generator, directory):
    theirs = hugging_face("retrieval", generator)
    theirs.save_pretrained(directory)
    ours = load(directory)
    pixels, (ids, padded, mask) = pictures(generator, 4), texts(generator, 2)
    padded_for_images = padded.clone()
    padded_for_images[:, 0] = ENC
    with torch.inference_mode():
        cosine = theirs(padded, pixels, attention_mask=mask, use_itm_head=False).itm_score
        logits = theirs(padded_for_images, pixels, attention_mask=mask).itm_score
        output = ours(pixels, ids)
        matches = ours.match(output.images, ids, [(b, b) for b in range(4)])
    torch.testing.assert_close(output.similarity, cosine, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(matches.logits, logits, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1


# ---- key names


def test_key_names_round_trip(task, generator, directory):
    theirs = hugging_face(task, generator)
    theirs.save_pretrained(directory)
    ours = load(directory)
    back, state = blip_hugging_face.from_ours(ours.state_dict()), theirs.state_dict()
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key
    own = {key for key in ours.state_dict() if not blip_hugging_face.parts_of(key)}
    assert own == {"space_dict"} | ({"temp"} if task == "retrieval" else set())
    for key in ours.state_dict():
        assert set(blip_hugging_face.parts_of(key)) <= state.keys(), key


def test_a_state_dict_is_recognised_by_its_keys(task, generator):
    theirs = hugging_face(task, generator)
    ours = load(theirs.state_dict(), config=blip_hugging_face.config_of(theirs.config.to_dict(), {}, task))
    assert ours.config.task == task
    wide = config(hidden_size=128, num_attention_heads=2)
    wide.text_config.update(
        {"hidden_size": 128, "num_attention_heads": 2, "encoder_hidden_size": 128, "sep_token_id": 102}
    )
    assert load(CLASSES[task](wide).state_dict()).config == blip_hugging_face.config_of(wide.to_dict(), {}, task)
    assert torch.equal(ours.visual_encoder.norm.weight, theirs.vision_model.post_layernorm.weight)


# ---- files


def test_parts_and_torch_files(task, generator, tmp_path):
    theirs = hugging_face(task, generator)
    whole, parts, torch_file, torch_parts = (tmp_path / name for name in ("whole", "parts", "bin", "bins"))
    theirs.save_pretrained(whole)
    theirs.save_pretrained(parts, max_shard_size="200KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    for copy in (torch_file, torch_parts):
        copy.mkdir()
        shutil.copy(whole / "config.json", copy)
    state = load_file(whole / "model.safetensors")
    torch.save(state, torch_file / "pytorch_model.bin")
    places = {key: f"part-{number % 2}.bin" for number, key in enumerate(state)}
    for place in set(places.values()):
        torch.save({key: value for key, value in state.items() if places[key] == place}, torch_parts / place)
    (torch_parts / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    expected = {k: v for k, v in load(whole).state_dict().items() if k != "space_dict"}
    for directory in (parts, torch_file, torch_parts):
        loaded = load(directory).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in expected.items()), directory


def test_a_dictionary_and_its_temperature_beside_their_weights(generator, directory):
    hugging_face("caption", generator).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text()) | {"temperature": 1.5}
    (directory / "config.json").write_text(json.dumps(settings))
    assert load(directory).temperature == 0.0, "transformers writes a key of this name for other purposes"
    dictionary = torch.randn(7, 96, generator=generator)
    save_file(load_file(directory / "model.safetensors") | {"space_dict": dictionary}, directory / "model.safetensors")
    ours = load(directory)
    assert ours.temperature == 1.5 and ours.config.vision.sd_num == 7
    assert torch.equal(ours.space_dict.cpu(), dictionary)


def test_without_a_dictionary_there_is_a_warning(generator, directory, caplog):
    hugging_face("caption", generator).save_pretrained(directory)
    with caplog.at_level(logging.WARNING, logger="madtp"):
        load(directory)
        assert caplog.text == ""  # it runs without one
        load(directory, temperature=1.0)
    assert "has no space_dict: initialised at random" in caplog.text


def test_position_numbers_in_older_files_are_left_out_by_name(generator, directory, caplog):
    hugging_face("caption", generator).save_pretrained(directory)
    key = "text_decoder.bert.embeddings.position_ids"
    save_file(
        load_file(directory / "model.safetensors") | {key: torch.arange(40)[None]}, directory / "model.safetensors"
    )
    with caplog.at_level(logging.INFO, logger="madtp"):
        load(directory)
    assert f"ignored as position numbers: {key}" in caplog.text


@pytest.mark.parametrize("complete", [True, False])
def test_tokenizer_of_the_directory(complete, generator, directory):
    """Their tokenizers may hold [DEC] and [ENC], or be BERT's."""
    hugging_face("caption", generator).save_pretrained(directory)
    demo = load_tokenizer("demo")
    if complete:
        demo.save_pretrained(directory)
    else:
        vocabulary = [
            entry for entry in Path(demo_vocabulary()).read_text().splitlines() if entry not in ("[DEC]", "[ENC]")
        ]
        (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    processor = load(directory).processor
    assert processor.tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [DEC, ENC]
    assert processor.prompt_ids.tolist() == [DEC, *demo("a picture of ")["input_ids"][1:-1]]


def demo_vocabulary():
    from madtp.processing import _DEMO_VOCABULARY

    return _DEMO_VOCABULARY


def test_a_repository_of_the_hub(generator, directory, monkeypatch):
    """Weights that it holds in several formats are downloaded in one."""
    hugging_face("caption", generator).save_pretrained(directory)
    wanted = []

    def snapshot_download(name, allow_patterns):
        assert name == "someone/blip"
        wanted.append(allow_patterns[-1])
        if allow_patterns[-1] == "*.bin":
            torch.save(load_file(hidden), directory / "pytorch_model.bin")
        return str(directory)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load("someone/blip").config.task == "caption" and wanted == ["*.safetensors"]
    hidden = directory.parent / "hidden.safetensors"
    (directory / "model.safetensors").rename(hidden)
    assert load("someone/blip").config.task == "caption" and wanted == ["*.safetensors", "*.safetensors", "*.bin"]


# ---- what does not fit


def test_keys_that_are_missing_or_unexpected_are_named(generator, directory):
    hugging_face("vqa", generator).save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    lost = "text_encoder.encoder.layer.1.crossattention.self.key.weight"
    state["text_encoder.pooler.dense.weight"] = state.pop(lost)
    state["vision_model.embeddings.class_embedding"] = torch.zeros(1, 1, 95)
    save_file(state, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"crossattention\.self\.") as error:
        load(directory)
    message = str(error.value)
    assert "missing: text_encoder.encoder.layer.1.crossattention.self.kv.weight" in message
    assert "text_encoder.pooler.dense.weight" in message.partition("unexpected: ")[2]
    assert "visual_encoder.cls_token [1, 1, 95] instead of [1, 1, 96]" in message


@pytest.mark.parametrize(
    "change, task, message",
    [
        ({}, "vqa", "holds a model for task 'caption', not 'vqa'"),
        ({}, "nlvr", "task: transformers' BLIP has models for vqa, caption, retrieval, not for 'nlvr'"),
        ({"model_type": "blip-2"}, None, "'model_type' is 'blip-2', not one of blip, clip"),
        ({"text_config": {"bos_token_id": 5}}, None, "text_config.bos_token_id: expected 198, got 5"),
        ({"text_config": {"layer_norm_eps": 1e-5}}, None, "text_config.layer_norm_eps: expected 1e-12, got 1e-05"),
        ({"text_config": {"is_decoder": False}}, None, "text_config.is_decoder: expected True, got False"),
        ({"vision_config": {"hidden_act": "relu"}}, None, "vision_config.hidden_act: expected 'gelu', got 'relu'"),
        ({"vision_config": {"image_size": [64, 32]}}, None, "vision_config.image_size: expected the side of a square"),
    ],
)
def test_configs_that_do_not_fit(change, task, message, generator, directory):
    hugging_face("caption", generator).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())
    for key, value in change.items():
        settings[key] = settings[key] | value if isinstance(value, dict) else value
    (directory / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message.replace("[", r"\[")):
        load(directory, task)


def test_a_model_without_a_task_here(generator, directory):
    hugging_face("caption", generator).save_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text()) | {"architectures": ["BlipModel"]}
    (directory / "config.json").write_text(json.dumps(settings))
    assert load(directory).config.task == "caption", "the keys tell"
    save_file({"text_model.weight": torch.zeros(1)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"architectures: expected one of BlipFor.*, got \['BlipModel'\]"):
        load(directory)


def test_weights_that_are_not_there(generator, directory):
    hugging_face("caption", generator).save_pretrained(directory, max_shard_size="200KB")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    places = content["weight_map"]
    lost = next(iter(places))
    first = directory / places[lost]
    save_file({key: value for key, value in load_file(first).items() if key != lost}, first)
    with pytest.raises(CheckpointError, match=f"its files lack {lost}"):
        load(directory)
    index.write_text(json.dumps(content | {"weight_map": {lost: "../" + places[lost]}}))
    with pytest.raises(CheckpointError, match="'weight_map', from keys to files of the same directory"):
        load(directory)
    index.unlink()
    with pytest.raises(CheckpointError, match="no weights; expected model.safetensors or pytorch_model.bin"):
        load(directory)


def test_question_answering_of_two_widths_cannot_exist(generator):
    with pytest.raises(ValueError, match="text_config.hidden_size: expected 192 as of the vision transformer"):
        blip_hugging_face.config_of(config(hidden_size=192).to_dict(), {}, "vqa")
    sizes = blip_hugging_face.config_of(config(hidden_size=192).to_dict(), {}, "caption")
    assert sizes.vision.map_func and sizes.vision.sd_dim == 96 and sizes.text.encoder_width == 192
