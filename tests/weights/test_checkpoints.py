"""From files to models and back: MADTP and BLIP checkpoints, saved directories, state dicts; and files that are refused."""

import dataclasses
import json
import logging
import os
import pickle

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file, save_file

import madtp
from madtp import (
    CaptionConfig,
    CheckpointError,
    NLVRConfig,
    RetrievalConfig,
    TextConfig,
    VisionConfig,
    VQAConfig,
)
from madtp.config import CLIPConfig, CLIPTextConfig
from madtp.data.synthetic import token_ids
from madtp.pruning import ToMe
from madtp.tasks import TASKS as REGISTRY
from madtp.tasks.nlvr.model import NLVR
from madtp.towers import interpolate_positions
from madtp.weights import from_official, key_maps, randomize, to_official

VOCABULARY = 200  # of the bundled tokenizer
SIZES = NLVRConfig(
    vision=VisionConfig(image_size=64, patch_size=16, embed_dim=128, depth=2, num_heads=2, sd_num=10, sd_dim=128),
    text=TextConfig(
        hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256, vocab_size=VOCABULARY,
        max_position_embeddings=40, encoder_width=128,
    ),
    merge_from=2,
)  # fmt: skip
POSITIONS = "visual_encoder.pos_embed"


@pytest.fixture(scope="module")
def model():
    model = NLVR(SIZES, temperature=2.0).eval()
    randomize(model, seed=3)
    return model


@pytest.fixture
def batch(generator):
    """Two pairs of pictures and two texts."""
    texts = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (9, 4)]
    return torch.randn(4, 3, 64, 64, generator=generator), texts


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def same_answer(ours, theirs, batch):
    with torch.inference_mode():
        a, b = ours(*batch), theirs(*batch)
    assert torch.equal(a.logits, b.logits)
    for one, other in zip(a.vision + a.text, b.vision + b.text, strict=True):
        assert torch.equal(one.ids, other.ids)


# ---- MADTP checkpoint files


def test_madtp_file_round_trip(model, batch, tmp_path):
    """`{'model', 'epoch', 'temperature'}` with the official key names, as MADTP's training scripts save it."""
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": to_official(model.state_dict()), "epoch": 7, "temperature": 3.25}, path)
    loaded = madtp.load(path)
    assert loaded.temperature == 3.25 and not loaded.training
    assert loaded.config == SIZES
    same_weights(loaded, model)
    with_own_temperature = madtp.load(str(path), temperature=2.0)
    assert with_own_temperature.temperature == 2.0
    same_answer(with_own_temperature, model, batch)


def test_a_file_with_a_temperature_below_0_is_dense(model, batch, tmp_path, caplog):
    """MADTP's training takes a step down where a model costs less than its target, and below 0 its code does not prune."""
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": to_official(model.state_dict()), "epoch": 7, "temperature": -0.02}, path)
    with caplog.at_level(logging.WARNING, logger="madtp"):
        loaded = madtp.load(path)
    assert loaded.temperature == 0 and "prunes nothing" in caplog.text
    same_answer(madtp.load(path, temperature=2.0), model, batch)


def test_official_key_names(model):
    official = to_official(model.state_dict())
    layer = "text_encoder.encoder.layer.2"
    for key, shape in {
        "space_dict": (10, 128),
        "visual_encoder.blocks.1.attn.qkv.weight": (384, 128),
        f"{layer}.attention.self.query.weight": (128, 128),
        f"{layer}.attention.self.value.bias": (128,),
        f"{layer}.crossattention.self0.query.weight": (128, 128),
        f"{layer}.crossattention.self1.key.weight": (128, 128),
        f"{layer}.crossattention.self1.value.bias": (128,),
        f"{layer}.crossattention.output.dense1.weight": (128, 128),
        f"{layer}.crossattention.output.merge_layer.weight": (128, 256),
        f"{layer}.intermediate.dense.weight": (256, 128),
        "cls_head.2.weight": (2, 128),
    }.items():
        assert tuple(official[key].shape) == shape, key
    assert not any(".self.qkv." in key or ".kv." in key for key in official)
    back = from_official(official)
    assert back.keys() == model.state_dict().keys()
    for key, value in model.state_dict().items():
        assert torch.equal(back[key], value), key


def test_key_names_of_the_official_checkpoints():
    """The golden state dicts carry the keys that the official classes really have."""
    for family in sorted(GOLDEN.glob("nlvr_*")):
        official = load_file(family / "state_dict.safetensors")
        ours = to_official(from_official(official))
        assert set(official) - set(ours) <= {"text_encoder.embeddings.position_ids"}
        assert set(ours) <= set(official)
        for key in ours:
            assert torch.equal(ours[key], official[key]), key


def test_buffers_of_the_official_classes_are_no_weights(model, tmp_path):
    official = to_official(model.state_dict()) | {"text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    path = tmp_path / "model.pth"
    torch.save({"model": official}, path)
    same_weights(madtp.load(path), model)


@pytest.mark.parametrize("official", [False, True])
def test_state_dicts_and_safetensors_files(official, model, tmp_path):
    state = to_official(model.state_dict()) if official else state_of(model)
    same_weights(madtp.load(state), model)
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    same_weights(madtp.load(path), model)
    assert madtp.load(path).temperature == 0.0


def test_loading_does_not_change_the_state_dict(model):
    state = to_official(model.state_dict())
    keys, copy = list(state), {key: value.clone() for key, value in state.items()}
    loaded = madtp.load(state)
    with torch.no_grad():
        loaded.space_dict.zero_()
    assert list(state) == keys
    for key in keys:
        assert torch.equal(state[key], copy[key]), key


# ---- original BLIP checkpoints


def original_blip(model):
    """What BLIP-NLVR starts from: no dictionary, no merge layers, one cross-attention per layer."""
    state = {}
    for key, value in to_official(model.state_dict()).items():
        if key == "space_dict" or ".merge_layer." in key or ".self1." in key or ".dense1." in key:
            continue
        state[key.replace(".self0.", ".self.").replace(".dense0.", ".dense.")] = value
    return state


def test_a_single_cross_attention_serves_both_images(model, tmp_path, caplog):
    path = tmp_path / "model_base.pth"
    torch.save({"model": original_blip(model)}, path)
    with caplog.at_level(logging.WARNING, logger="madtp"):
        loaded = madtp.load(path, config=SIZES)
    assert loaded.temperature == 0.0
    for layer, own in zip(loaded.text_encoder.encoder.layer, model.text_encoder.encoder.layer, strict=True):
        cross, expected = layer.crossattention, own.crossattention
        for twin in (cross.self0, cross.self1):
            assert torch.equal(twin.query.weight, expected.self0.query.weight)
            assert torch.equal(twin.kv.weight, expected.self0.kv.weight)
            assert torch.equal(twin.kv.bias, expected.self0.kv.bias)
        for twin in (cross.output.dense0, cross.output.dense1):
            assert torch.equal(twin.weight, expected.output.dense0.weight)
        assert cross.self0.kv.weight.data_ptr() != cross.self1.kv.weight.data_ptr(), "copies, not the same tensor"


def test_weights_that_had_to_be_made_up_are_named(model, caplog):
    with caplog.at_level(logging.WARNING, logger="madtp"):
        loaded = madtp.load(original_blip(model), config=SIZES)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "madtp"]
    assert "space_dict" in line and "layer.2.crossattention.output.merge_layer.weight" in line and "at random" in line
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())
    assert loaded.space_dict.std() > 0.5  # official: N(0, 1)
    caplog.clear()
    madtp.load(state_of(model))
    assert not [r for r in caplog.records if r.name == "madtp"]


def cubic(distance):
    """Keys' convolution kernel with a = -0.75, which is PyTorch's."""
    a, t = -0.75, abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def interpolation_matrix(old, new):
    """Row i: weights of the old samples in new sample i; pixel centres, edges repeated."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        nearest = int(torch.tensor(centre).floor())
        for j in range(nearest - 1, nearest + 3):
            matrix[i, min(max(j, 0), old - 1)] += cubic(centre - j)
    return matrix


@pytest.mark.parametrize("old, new", [(4, 6), (6, 4), (24, 30), (3, 3)])
def test_position_interpolation_is_separable_cubic_convolution(old, new, generator):
    positions = torch.randn(1, old * old + 1, 5, generator=generator)
    ours = interpolate_positions(positions, (new, new))
    assert ours.shape == (1, new * new + 1, 5)
    assert torch.equal(ours[:, 0], positions[:, 0]), "the CLS position stays"
    matrix = interpolation_matrix(old, new)
    grid = positions[0, 1:].double().reshape(old, old, 5)
    expected = torch.einsum("ia,jb,abd->ijd", matrix, matrix, grid).reshape(1, -1, 5)
    torch.testing.assert_close(ours[:, 1:].double(), expected, atol=1e-5, rtol=1e-5)


def test_position_embedding_of_another_image_size(model):
    state = state_of(model)
    loaded = madtp.load(state, image_size=96)
    assert loaded.config.vision.image_size == 96
    assert torch.equal(loaded.state_dict()[POSITIONS], interpolate_positions(state[POSITIONS], (6, 6)))
    with torch.inference_mode():
        out = loaded(torch.randn(2, 3, 96, 96), [torch.tensor([5, 6, 7])])
    assert out.vision[0].lengths_in.tolist() == [37, 37] and out.logits.isfinite().all()
    same = {key: value for key, value in loaded.state_dict().items() if key != POSITIONS}
    assert all(torch.equal(value, state[key]) for key, value in same.items())


def test_position_embedding_of_a_grid_that_is_not_square(model):
    state = state_of(model)
    state[POSITIONS] = state[POSITIONS][:, :16]
    with pytest.raises(CheckpointError, match="visual_encoder.pos_embed: 15 patches do not form a square grid"):
        madtp.load(state)


# ---- weights that do not fit


def test_missing_unexpected_and_misshapen_weights_are_named(model):
    state = state_of(model)
    del state["cls_head.2.bias"]
    state["text_decoder.something"] = torch.zeros(2)
    state["cls_head.0.weight"] = torch.zeros(128, 64)
    with pytest.raises(CheckpointError) as caught:
        madtp.load(state)
    message = str(caught.value)
    assert "the state dict" in message
    assert "missing: cls_head.2.bias" in message
    assert "unexpected: text_decoder.something" in message
    assert "of another shape: cls_head.0.weight [128, 64] instead of [128, 128]" in message


def test_an_incomplete_projection_is_named(model):
    state = to_official(model.state_dict())
    del state["text_encoder.encoder.layer.1.attention.self.key.weight"]
    with pytest.raises(
        CheckpointError, match=r"layer\.1\.attention\.self\.qkv\.weight.*unexpected.*self\.query\.weight"
    ):
        madtp.load(state)


@pytest.mark.parametrize(
    "key", ["visual_encoder.patch_embed.proj.weight", "text_encoder.embeddings.word_embeddings.weight"]
)
def test_something_else_than_blip_nlvr(key, model):
    state = state_of(model)
    del state[key]
    with pytest.raises(CheckpointError, match=f"not a BLIP-NLVR checkpoint: {key} is missing"):
        madtp.load(state)


def test_a_task_that_the_keys_do_not_tell():
    message = r"its keys \(conv1\) do not tell what it is for; give the task \(task=, --task\), one of nlvr, vqa"
    with pytest.raises(CheckpointError, match=message):
        madtp.load({"conv1.weight": torch.zeros(3, 3)})
    with pytest.raises(CheckpointError, match="not a BLIP-NLVR checkpoint: visual_encoder"):
        madtp.load({"conv1.weight": torch.zeros(3, 3)}, "nlvr")


def test_a_tensor_that_cannot_tell_a_size(model):
    for key in ("visual_encoder.patch_embed.proj.weight", "space_dict", POSITIONS):
        state = state_of(model)
        state[key] = state[key].flatten()
        with pytest.raises(CheckpointError, match=f"{key}: expected [234] dimensions, got"):
            madtp.load(state)


def test_the_file_is_named_when_its_weights_do_not_fit(model, tmp_path):
    state = state_of(model)
    del state["cls_head.2.bias"]
    path = tmp_path / "half.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"half\.safetensors: .*missing: cls_head\.2\.bias"):
        madtp.load(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"source": None}, "^source: expected a path, a hub id or a state dict, got NoneType None"),
        ({"source": ""}, "^source: expected a path"),
        ({"source": torch.nn.Linear(2, 2)}, r"^source: .* got Linear .*; give its state_dict\(\)"),
        ({"dtype": "bfloat16"}, "^dtype: expected a floating-point type, got 'bfloat16'"),
        ({"use_sizes": "no"}, "^use_sizes: expected True, False or None, got 'no'"),
        ({"config": 5}, "^config: expected sizes of a model, .* got a int"),
    ],
)
def test_arguments_of_another_kind_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        madtp.load(**{"source": "demo"} | arguments)


def test_saving_what_has_no_processor_or_is_no_model(tmp_path, caplog):
    model = madtp.load("demo")
    model.processor = None
    madtp.save_pretrained(model, tmp_path)
    assert "saved without a tokenizer, because the model has no processor" in caplog.text
    assert madtp.load(tmp_path).pruning == model.pruning
    with pytest.raises(ValueError, match="^model: expected a model of madtp, got a Linear"):
        madtp.save_pretrained(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ValueError, match="^directory: expected a name"):
        madtp.save_pretrained(model, "")


# ---- files that cannot be read


class Intruder:
    """Unpickling it would create a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path, trace = tmp_path / "intruder.pth", tmp_path / "was here"
    torch.save({"model": {}, "extra": Intruder(str(trace))}, path)
    with pytest.raises(CheckpointError, match=r"intruder\.pth: refused, because .* could run code.*safetensors"):
        madtp.load(path)
    assert not trace.exists()
    path.write_bytes(pickle.dumps(Intruder(str(trace))))
    with pytest.raises(CheckpointError, match=r"intruder\.pth: "):
        madtp.load(path)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(suffix, share, model, tmp_path):
    path = tmp_path / f"cut{suffix}"
    torch.save({"model": state_of(model)}, path) if suffix == ".pth" else save_file(state_of(model), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=rf"cut\{suffix}: "):
        madtp.load(path)


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "expected a state dict or {'model': state dict}, got list"),
        ({"model": [1]}, "expected tensors under 'model'"),
        ({"model": {"a": 1}}, "expected tensors under 'model'"),
        ({"epoch": 3, "temperature": 1.0}, "expected tensors under 'model'"),
        ({"model": {}, "temperature": 1.0}, r"its keys \(there are none\) do not tell what it is for"),
        (
            {"model": {"a": torch.zeros(1)}, "temperature": "hot"},
            r"odd\.pth: temperature: expected a number, got 'hot'",
        ),
    ],
)
def test_files_with_other_contents(content, message, tmp_path):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message.replace("{", r"\{")):
        madtp.load(path)


def test_things_that_are_not_there(tmp_path):
    for source in (tmp_path / "nothing.pth", "nothing.pth", "runs/nothing.pth", str(tmp_path / "a" / "b" / "c")):
        with pytest.raises(CheckpointError, match="no such file or directory"):
            madtp.load(source)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; a model directory holds config\.json and"):
        madtp.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES.to_dict()))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        madtp.load(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"task": "vqa"}', "holds a model for task 'vqa', not 'nlvr'"),
        ('{"task": "cooking"}', "holds a model for task 'cooking', not 'nlvr'"),
        ('{"vision": {"width": 3}}', "config.vision: unknown keys width; known are"),
        ('{"vision": {"image_size": 100}}', "vision.image_size: 100 is not a multiple of patch_size 16"),
        ('{"vision": {"num_heads": 7}}', "vision.embed_dim: 768 is not a multiple of num_heads 7"),
        ('{"vision": {"sd_dim": 64}}', "vision.sd_dim: without a map"),
        ('{"text": {"num_attention_heads": 7}}', "text.hidden_size: 768 is not a multiple"),
    ],
)
def test_model_directories_with_a_bad_config(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        madtp.load(tmp_path, "nlvr")


def test_model_directories_that_name_no_task(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: 'task' is None, not one of nlvr, vqa"):
        madtp.load(tmp_path)


def test_a_hub_id_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        CheckpointError, match="nobody/no-such-model: neither a path, nor reachable on the hub, nor downloaded"
    ):
        madtp.load("nobody/no-such-model")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "cooking"}, "task: expected one of nlvr, vqa, caption, retrieval.*, got 'cooking'"),
        ({"task": "vqa"}, "holds a model for task 'nlvr', not 'vqa'"),
        ({"text_mode": "clean"}, "text_mode: models for task 'nlvr' have only one, got 'clean'"),
        ({"temperature": -1.0}, "temperature: expected 0, or a number from 1e-30 to 1e30, got -1.0"),
        ({"temperature": "warm"}, "temperature: expected 0, or a number from 1e-30 to 1e30, got 'warm'"),
        ({"temperature": float("nan")}, "temperature: expected 0, or a number from 1e-30 to 1e30, got nan"),
        ({"temperature": 1e31}, "temperature: expected 0, or a number from 1e-30 to 1e30, got 1e.31"),
        ({"temperature": 1e-40}, "temperature: expected 0, or a number from 1e-30 to 1e30, got 1e-40"),
        ({"temperature": float("inf")}, "temperature: expected 0, or a number from 1e-30 to 1e30, got inf"),
        ({"grouping": "triple"}, "grouping: expected one of instance, pair, batch, got 'triple'"),
        ({"image_size": 50}, "vision.image_size: 50 is not a multiple of patch_size 16"),
        ({"backend": "gpu"}, "backend: expected one of"),
    ],
)
def test_arguments_that_make_no_sense(options, message, model):
    with pytest.raises(ValueError, match=message):
        madtp.load(state_of(model), **options)


# ---- saved directories


def test_a_rule_for_a_model_that_was_saved_with_another(model):
    state = state_of(model)
    assert madtp.load(state, pruning="tome", tokenizer="demo").pruning == ToMe()
    assert madtp.load(state, pruning=ToMe(counts=(3,)), tokenizer="demo").pruning == ToMe(counts=(3,))
    with pytest.raises(ValueError, match="pruning, temperature: expected one of them"):
        madtp.load(state, pruning="tome", temperature=1.0)
    with pytest.raises(ValueError, match="pruning: expected one of"):
        madtp.load(state, pruning="best")


def test_save_and_load_round_trip(model, batch, tmp_path):
    source = madtp.load(state_of(model), temperature=2.0, tokenizer="demo")
    madtp.save_pretrained(source, tmp_path / "saved")
    files = {"model.safetensors", "config.json", "preprocessor_config.json", "tokenizer"}
    assert {p.name for p in (tmp_path / "saved").iterdir()} == files
    loaded = madtp.load(tmp_path / "saved")
    assert loaded.temperature == 2.0 and loaded.config == SIZES
    same_weights(loaded, source)
    same_answer(loaded, source, batch)
    sentence = "Two dogs, and a cat."
    assert torch.equal(loaded.processor.text(sentence), source.processor.text(sentence))
    assert madtp.load(tmp_path / "saved", temperature=0.0).temperature == 0.0


def test_whether_merged_tokens_have_sizes_is_saved(model, tmp_path):
    madtp.save_pretrained(madtp.load(state_of(model), use_sizes=True, tokenizer="demo"), tmp_path / "sizes")
    madtp.save_pretrained(madtp.load(state_of(model), tokenizer="demo"), tmp_path / "plain")
    assert (
        madtp.load(tmp_path / "sizes").pruning.proportional_attention
        and not madtp.load(tmp_path / "sizes", use_sizes=False).pruning.proportional_attention
    )
    assert not madtp.load(tmp_path / "plain").pruning.proportional_attention


def test_saving_over_an_older_model_replaces_it(model, tmp_path):
    first = madtp.load(state_of(model), temperature=1.0, tokenizer="demo")
    madtp.save_pretrained(first, tmp_path)
    with torch.no_grad():
        first.space_dict.add_(1.0)
    first.temperature = 4.0
    madtp.save_pretrained(first, tmp_path)
    loaded = madtp.load(tmp_path)
    same_weights(loaded, first)
    assert loaded.temperature == 4.0
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*.partial"))


def test_a_model_without_a_tokenizer_is_saved_with_a_warning(model, tmp_path, caplog):
    source = madtp.load(state_of(model), tokenizer=tmp_path / "no tokenizer here")
    with caplog.at_level(logging.WARNING, logger="madtp"):
        madtp.save_pretrained(source, tmp_path / "saved")
    assert any("saved without a tokenizer" in r.getMessage() for r in caplog.records)
    same_weights(madtp.load(tmp_path / "saved"), model)


def test_half_precision_weights_are_saved_as_they_are(model, tmp_path):
    source = madtp.load(state_of(model), dtype=torch.bfloat16, tokenizer="demo")
    assert {p.dtype for p in source.parameters()} == {torch.bfloat16}
    madtp.save_pretrained(source, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    same_weights(madtp.load(tmp_path, dtype=torch.bfloat16), source)
    assert madtp.load(tmp_path).dtype == torch.float32


# ---- sizes


def test_sizes_are_read_off_the_tensors(model):
    assert madtp.load(to_official(model.state_dict())).config == SIZES
    other = dataclasses.replace(
        SIZES,
        vision=dataclasses.replace(SIZES.vision, image_size=48, depth=1, sd_num=3, sd_dim=32, mlp_ratio=2.0, map_func=True),
        text=dataclasses.replace(SIZES.text, hidden_size=64, num_attention_heads=1, num_hidden_layers=2, max_position_embeddings=17),
        merge_from=1,
    )  # fmt: skip
    narrow = NLVR(other)
    randomize(narrow)
    assert madtp.load(state_of(narrow)).config == other


def test_config_round_trip():
    for config in (SIZES, NLVRConfig()):
        assert NLVRConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert NLVRConfig.from_dict({"merge_from": 3, "temperature": 2.0}).merge_from == 3


def test_config_may_be_given_as_a_dict(model):
    assert madtp.load(state_of(model), config=SIZES.to_dict()).config == SIZES


def test_the_real_size_has_the_official_number_of_parameters():
    with torch.device("meta"):
        model = NLVR(NLVRConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 259_448_834
    official = to_official(model.state_dict())
    assert len(official) == 579  # the official 580 include the buffer position_ids
    assert official["visual_encoder.pos_embed"].shape == (1, 577, 768)
    assert official["text_encoder.embeddings.word_embeddings.weight"].shape == (30524, 768)
    merged = [key for key in official if key.endswith("merge_layer.weight")]
    assert len(merged) == 6 and official[merged[0]].shape == (768, 1536)


def test_random_weights_follow_the_seed():
    ours, theirs, others = (NLVR(SIZES) for _ in range(3))
    randomize(ours, seed=1)
    randomize(theirs, seed=1)
    randomize(others, seed=2)
    same_weights(ours, theirs)
    assert not torch.equal(ours.space_dict, others.space_dict)


def test_the_bundled_models_load_and_know_the_words_of_their_task():
    pruned, dense = madtp.load("demo"), madtp.load("demo-dense")
    assert pruned.pruning.active and not dense.pruning.active
    assert pruned.config == dense.config
    statement = "There are exactly two red objects in the two images."
    for model in (pruned, dense):
        assert model.processor.text(statement).tolist() == token_ids(statement)
        assert all(parameter.isfinite().all() for parameter in model.parameters())


# ---- temperature 0


def test_temperature_zero_is_the_dense_model(model, batch):
    state = state_of(model)
    cold, hot = madtp.load(state, temperature=0.0), madtp.load(state, temperature=2.0)
    with torch.inference_mode():
        expected = cold(*batch)
        with hot.dense():
            dense = hot(*batch)
        by_call = hot(*batch, temperature=0.0)
        pruned = hot(*batch)
    for out in (dense, by_call):
        assert torch.equal(out.logits, expected.logits)
        assert all(torch.equal(t.lengths, t.lengths_in) and t.importance is None for t in out.vision + out.text)
    assert hot.temperature == 2.0
    assert int(pruned.vision[-1].lengths.sum()) < int(expected.vision[-1].lengths.sum())
    # A dictionary is of no use to a dense model: another one gives the same answer.
    state["space_dict"] = torch.randn_like(state["space_dict"])
    with torch.inference_mode():
        assert torch.equal(madtp.load(state, temperature=0.0)(*batch).logits, expected.logits)


# ---- the other BLIP tasks

TASKS = {
    "vqa": VQAConfig(SIZES.vision, SIZES.text),
    "caption": CaptionConfig(SIZES.vision, SIZES.text),
    "retrieval": RetrievalConfig(SIZES.vision, SIZES.text, proj_dim=24),
}
SMALL_CLIP = CLIPConfig(
    VisionConfig(image_size=32, patch_size=16, embed_dim=64, depth=1, num_heads=1, sd_num=5, sd_dim=48, map_func=True),
    CLIPTextConfig(64, 1, 1, 256, vocab_size=514, max_position_embeddings=40),
    embed_dim=32,
)


@pytest.fixture(scope="module", params=TASKS)
def other(request):
    """A random model of another task."""
    model = REGISTRY[request.param].Model(TASKS[request.param], temperature=1.5).eval()
    randomize(model, seed=5)
    return model


def official_state(model):
    """The state dict of MADTP's class for the task: with buffers, tied weights and momentum copies."""
    state = to_official(model.state_dict())
    for key in [key for key in state if key.endswith("embeddings.word_embeddings.weight")]:
        state[key.replace("word_embeddings.weight", "position_ids")] = torch.arange(40)[None]
    if model.config.task == "retrieval":
        for key, value in list(state.items()):
            module, _, rest = key.partition(".")
            if module in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
                state[f"{module}_m.{rest}"] = value + 1
        state |= {"image_queue": torch.randn(24, 8), "text_queue": torch.randn(24, 8)}
        state |= {"idx_queue": torch.zeros(1, 8).long(), "ptr_queue": torch.zeros(1).long()}
    return state


def test_madtp_files_of_the_other_tasks(other, tmp_path, caplog):
    path = tmp_path / "checkpoint_best.pth"
    torch.save({"model": official_state(other), "epoch": 2, "temperature": 0.75}, path)
    with caplog.at_level(logging.INFO, logger="madtp"):
        loaded = madtp.load(path, text_mode="clean" if other.config.task == "retrieval" else None)
    assert type(loaded) is type(other) and loaded.temperature == 0.75 and loaded.config == other.config
    same_weights(loaded, other)
    # What has no counterpart is named, key by key.
    listed = " ".join(r.getMessage() for r in caplog.records if r.name == "madtp")
    known = set(to_official(other.state_dict()))
    dropped = set(official_state(other)) - known
    assert dropped and all(key in listed for key in dropped)
    assert not any(r.levelno >= logging.WARNING for r in caplog.records if r.name == "madtp")


def test_official_names_of_the_other_tasks():
    """The golden state dicts carry the keys that the official classes really have."""
    for task in TASKS:
        official = load_file(GOLDEN / task / "state_dict.safetensors")
        assert key_maps.recognise(official)[1] == task
        ours = to_official(from_official(official, task))
        assert {key for key in official if not key.endswith("position_ids")} == set(ours)
        for key in ours:
            assert torch.equal(ours[key], official[key]), key


@pytest.mark.parametrize(
    "task, parameters, tensors",
    [("vqa", 361_555_772, 790), ("caption", 224_048_444, 474), ("retrieval", 223_821_059, 474)],
)
def test_the_real_sizes_have_the_official_number_of_parameters(task, parameters, tensors):
    """Of retrieval's official 447,563,779 the momentum copies are not ours."""
    with torch.device("meta"):
        model = REGISTRY[task].Model(REGISTRY[task].Config())
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert len(to_official(model.state_dict())) == tensors


def test_original_blip_files_of_the_other_tasks(other, tmp_path, caplog):
    """No dictionary, and of another image size."""
    state = official_state(other)
    del state["space_dict"]
    path = tmp_path / "model_base.pth"
    torch.save({"model": state}, path)
    with caplog.at_level(logging.INFO, logger="madtp"):
        loaded = madtp.load(path, image_size=96)
    assert "has no space_dict: initialised at random" in caplog.text
    assert loaded.temperature == 0.0 and loaded.config.vision.image_size == 96
    ours, theirs = loaded.state_dict(), other.state_dict()
    assert torch.equal(ours[POSITIONS], interpolate_positions(theirs[POSITIONS], (6, 6)))
    for key in set(theirs) - {POSITIONS, "space_dict"}:
        assert torch.equal(ours[key], theirs[key]), key


def test_a_missing_training_temperature_is_no_matter_for_a_warning(caplog):
    model = REGISTRY["retrieval"].Model(TASKS["retrieval"])
    randomize(model)
    state = {key: value for key, value in state_of(model).items() if key != "temp"}
    with caplog.at_level(logging.INFO, logger="madtp"):
        loaded = madtp.load(state)
    assert float(loaded.temp.detach()) == pytest.approx(0.07)
    (record,) = [r for r in caplog.records if r.name == "madtp"]
    assert record.levelno == logging.INFO and "temp" in record.getMessage()


def test_a_pretraining_file_has_parts_of_many_tasks(caplog):
    parts = {}
    for task in ("vqa", "retrieval"):
        model = REGISTRY[task].Model(TASKS[task])
        randomize(model)
        parts |= to_official(model.state_dict())
    del parts["space_dict"]
    with pytest.raises(CheckpointError, match=r"its keys \(itm_head, .*\) do not tell what it is for; give the task"):
        madtp.load(parts)
    for task in TASKS:
        with caplog.at_level(logging.INFO, logger="madtp"):
            loaded = madtp.load(parts, task)
        assert loaded.config == dataclasses.replace(TASKS[task], vision=dataclasses.replace(SIZES.vision, sd_num=100))
        assert any("ignored as parts of other tasks" in r.getMessage() for r in caplog.records)
        official = to_official(loaded.state_dict())
        assert all(torch.equal(official[key], parts[key]) for key in official if key != "space_dict")
        caplog.clear()


def test_tied_weights_that_differ_are_refused():
    model = REGISTRY["caption"].Model(TASKS["caption"])
    randomize(model)
    state = to_official(model.state_dict())
    state["text_decoder.cls.predictions.decoder.bias"] = state["text_decoder.cls.predictions.decoder.bias"] + 1
    message = r"decoder\.bias differs from text_decoder\.cls\.predictions\.bias, to which it is tied"
    with pytest.raises(CheckpointError, match=message):
        madtp.load(state)


def test_unexpected_and_missing_keys_of_the_other_tasks(other):
    state = official_state(other)
    prefix = "text_decoder.bert" if other.config.task == "caption" else "text_encoder"
    key = f"{prefix}.encoder.layer.0.crossattention.output.dense.weight"
    del state[key]
    state[f"{prefix}.pooler.dense.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError) as caught:
        madtp.load(state)
    assert f"missing: {key}" in str(caught.value) and f"unexpected: {prefix}.pooler.dense.weight" in str(caught.value)
    assert f"weights do not fit a model for task '{other.config.task}'" in str(caught.value)


def test_a_task_that_the_weights_contradict(other):
    with pytest.raises(CheckpointError, match=f"holds a model for task '{other.config.task}', not 'nlvr'"):
        madtp.load(official_state(other), "nlvr")
    with pytest.raises(ValueError, match=f"config: sizes of a model for task 'nlvr', not '{other.config.task}'"):
        madtp.load(official_state(other), other.config.task, config=SIZES)


def test_save_and_load_round_trip_of_the_other_tasks(other, tmp_path):
    source = madtp.load(state_of(other), temperature=1.25, tokenizer="demo")
    madtp.save_pretrained(source, tmp_path)
    loaded = madtp.load(tmp_path)
    assert type(loaded) is type(other) and loaded.temperature == 1.25 and loaded.config == other.config
    same_weights(loaded, source)
    assert type(loaded.processor) is type(source.processor)
    assert loaded.processor.tokenizer.get_vocab() == source.processor.tokenizer.get_vocab()
    with pytest.raises(CheckpointError, match=f"holds a model for task '{other.config.task}', not 'nlvr'"):
        madtp.load(tmp_path, "nlvr")


def test_the_text_mode_is_saved(tmp_path):
    model = REGISTRY["retrieval"].Model(TASKS["retrieval"])
    randomize(model)
    source = madtp.load(state_of(model), text_mode="compat", tokenizer="demo")
    assert source.config.text_mode == "compat"
    madtp.save_pretrained(source, tmp_path)
    assert madtp.load(tmp_path).config.text_mode == "compat"
    assert madtp.load(tmp_path, text_mode="clean").config.text_mode == "clean"
    with pytest.raises(ValueError, match="text_mode: expected one of clean, compat, got 'dirty'"):
        madtp.load(tmp_path, text_mode="dirty")


@pytest.mark.parametrize("config", [TASKS["retrieval"], SMALL_CLIP], ids=["retrieval", "clip"])
def test_who_chose_no_text_mode_is_told_how_a_checkpoint_was_trained(config, tmp_path, caplog):
    model = REGISTRY[config.task].Model(config)
    randomize(model)
    path = tmp_path / "checkpoint_best.pth"
    names = key_maps.clip if config.task == "clip" else key_maps.blip
    torch.save({"model": names.from_ours(model.state_dict()), "epoch": 7, "temperature": 2.0}, path)

    def told(**options):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="madtp"):
            model = madtp.load(path, tokenizer="demo", **options)
        return model, [record.getMessage() for record in caplog.records if record.name == "madtp"]

    model, (line,) = told()
    assert model.config.text_mode == "clean" and "give text_mode 'compat'" in line
    for options in ({"text_mode": "clean"}, {"text_mode": "compat"}, {"config": config}, {"temperature": 0.0}):
        assert told(**options)[1] == []
    madtp.save_pretrained(model, tmp_path)
    path = tmp_path
    assert told()[1] == []


def test_configs_of_all_tasks_round_trip():
    for config in (*TASKS.values(), *(task.Config() for task in REGISTRY.values())):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_vit_large_gets_a_map_to_the_dictionary(caplog):
    """MADTP's release has no BLIP of that width; the map is CLIP's, and is made up where the file has none."""
    vision = dataclasses.replace(SIZES.vision, embed_dim=192, num_heads=3, map_func=True)
    config = CaptionConfig(vision, dataclasses.replace(SIZES.text, encoder_width=192))
    model = REGISTRY["caption"].Model(config, temperature=1.0).eval()
    randomize(model)
    state = to_official(model.state_dict())
    assert madtp.load(state).config == config
    original = {key: value for key, value in state.items() if key != "space_dict" and "query_model" not in key}
    with caplog.at_level(logging.WARNING, logger="madtp"):
        loaded = madtp.load(original, temperature=1.0)
    assert "visual_encoder.img_query_model.q_map.0.weight" in caplog.text
    with torch.inference_mode():
        output = loaded(torch.randn(2, 3, 64, 64), [torch.tensor([5, 6])] * 2)
    assert output.logits.values.isfinite().all()
    assert output.vision[0].importance.shape == (2 * 17,) and output.vision[0].importance.isfinite().all()
    with pytest.raises(ValueError, match="vision.sd_dim: without a map"):
        VisionConfig(embed_dim=1024, depth=24, num_heads=16)
