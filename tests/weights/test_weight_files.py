"""Files and weights that are not what they should be: each is refused by name, at once, and without running anything."""

import io
import json
import os
import pickle
import time
import zipfile

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_checkpoints import SIZES, state_of

import madtp
from madtp import CheckpointError
from madtp.tasks.nlvr.model import NLVR
from madtp.weights import randomize, to_official
from madtp.weights.files import read_file


@pytest.fixture(scope="module")
def model():
    model = NLVR(SIZES, temperature=2.0).eval()
    randomize(model, seed=3)
    return model


def picture(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, kind)
    return buffer.getvalue()


def archive(compression=zipfile.ZIP_STORED, **parts):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in parts.items():
            file.writestr(name.replace("__", "/").replace("_pkl", ".pkl"), content)
    return buffer.getvalue()


CONTENTS = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "a pointer of Git LFS.*git lfs pull",
    ),
    "page": (b"<html>404</html>", "a web page, perhaps an error"),
    "long page": (b"\n<!DOCTYPE html>" + b" <p>" * 500, "a web page"),
    "text": (b"e epochs: 3\nlr: 1e-5\n", "a text file that begins 'e epochs: 3 lr: 1e-5'"),
    "json": (b'{"model": 1}', "a text file that begins"),
    "umlauts": (("\ufeff" + "größer " * 300).encode(), "a text file that begins 'größer"),
    "empty": (b"", "an empty file"),
    "JPEG": (picture("JPEG"), "a JPEG picture"),
    "PNG": (picture("PNG"), "a PNG picture"),
    "gzip": (b"\x1f\x8b\x08\0" + b"\0" * 9, "compressed with gzip: unpack it first"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 40, "GGUF, which llama.cpp reads"),
    "noise": (bytes(range(100, 250)), "in no format that is known here"),
    "zip": (archive(readme="hello"), "a ZIP archive, but not one that torch.save wrote"),
    "header": (
        (1 << 20).to_bytes(8, "little") + b"{",
        "damaged or cut off: its header alone should have 1048576 of 9 bytes",
    ),
    "bomb": (
        archive(zipfile.ZIP_DEFLATED, a__data_pkl=b"\x80\x02}q\0.", a__data__0=b"\0" * 50_000_000),
        "refused, because its .* bytes would unpack to 500000.*torch.save does not compress",
    ),
}


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors", "file.bin"])
@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_no_checkpoint_is_said_to_be_what_it_is(content, name, tmp_path):
    data, message = CONTENTS[content]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        madtp.load(tmp_path / name)
    assert name in str(caught.value) and "run code" not in str(caught.value)


def test_safetensors_and_torch_files_under_the_other_name(model, tmp_path):
    save_file(state_of(model), tmp_path / "a.pth")
    torch.save({"model": state_of(model), "temperature": 1.5}, tmp_path / "b.safetensors")
    torch.save(state_of(model), tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    assert madtp.load(tmp_path / "a.pth", "nlvr").config == SIZES
    assert madtp.load(tmp_path / "b.safetensors", "nlvr").temperature == 1.5
    assert madtp.load(tmp_path / "c.bin", "nlvr").config == SIZES


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50, 0x8B1F])
def test_safetensors_whose_header_is_as_long_as_another_format_is_marked(length, tmp_path):
    """A pickle begins with the byte 0x80, an archive with PK."""
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}).ljust(
        length
    )  # padded, as the format has it
    path.write_bytes(length.to_bytes(8, "little") + header.encode() + b"\0\0\x80\x3f")
    assert read_file(path)[0]["w"].item() == 1.0


def test_pipes_do_not_keep_one_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match=r"pipe\.pth"):
        madtp.load(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        read_file(tmp_path / "absent.pth")


def test_archives_with_too_many_tensors_are_not_read(tmp_path):
    content = {f"a__data__{i}": b"" for i in range(60_000)}
    (tmp_path / "many.pth").write_bytes(archive(a__data_pkl=b"\x80\x02}q\0.", **content))
    with pytest.raises(CheckpointError, match="60001 parts; at most 50000 are accepted"):
        madtp.load(tmp_path / "many.pth")
    names = {f"w{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)}
    header = json.dumps(names).encode()
    (tmp_path / "many.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="60000 tensors; at most 50000 are accepted"):
        madtp.load(tmp_path / "many.safetensors")
    assert time.monotonic() - begin < 60


def test_pickles_of_other_things(tmp_path):
    for value in ([1, 2], {"model": {"a": 1}}):
        (tmp_path / "plain.pkl").write_bytes(pickle.dumps(value, protocol=2))
        with pytest.raises(CheckpointError, match=r"plain\.pkl"):
            madtp.load(tmp_path / "plain.pkl")


# ---- sizes without end


def test_layers_without_end_are_not_built(model, tmp_path):
    state = state_of(model)
    state["visual_encoder.blocks.999999999.norm1.weight"] = torch.ones(128)
    with pytest.raises(CheckpointError, match=r"vision\.depth: expected a whole number from 1 to 1000, got 1000000000"):
        madtp.load(state)
    state = state_of(model)
    state["text_encoder.encoder.layer.99999999999999999999.output.dense.weight"] = torch.ones(128)
    with pytest.raises(CheckpointError, match=r"text\.num_hidden_layers: expected a whole number from 1 to 1000"):
        madtp.load(state)
    save_file(state_of(model), tmp_path / "model.safetensors")
    for section, name, value in (
        ("vision", "depth", 10**9),
        ("vision", "image_size", 10**8),
        ("vision", "depth", "12"),
        ("vision", "depth", True),
        ("vision", "patch_size", 0),
        ("vision", "num_heads", -2),
        ("vision", "mlp_ratio", float("inf")),
        ("vision", "map_func", "no"),
        ("text", "num_hidden_layers", 10**9),
        ("text", "vocab_size", 1.5),
    ):
        settings = SIZES.to_dict()
        settings[section][name] = value
        (tmp_path / "config.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match=rf"{section}\.{name}: expected"):
            madtp.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(SIZES.to_dict() | {"vision": 3}))
    with pytest.raises(ValueError, match=r"config\.vision: expected an object, got int"):
        madtp.load(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not JSON"):
        madtp.load(tmp_path)


def test_nothing_is_allocated_for_weights_that_do_not_fit(model):
    """Sizes that a config makes up, at no cost: the model it describes would take 400 GB."""
    import dataclasses

    text = dataclasses.replace(SIZES.text, vocab_size=9_999_999, intermediate_size=9_999_999)
    with pytest.raises(
        CheckpointError, match=r"of another shape: .*word_embeddings\.weight \[200, 128\] instead of \[9999999, 128\]"
    ):
        madtp.load(state_of(model), config=dataclasses.replace(SIZES, text=text))


# ---- values


MISFITS = {
    "shorter": lambda value: value.flatten()[:1],
    "an axis more": lambda value: value[None],
    "a number": lambda value: value.flatten()[0],
    "empty": lambda value: value[:0],
    "whole numbers": lambda value: value.int(),
    "truth values": lambda value: value > 0,
    "complex": lambda value: value + 0j,
}
# Of each kind of treatment one: read for sizes, stacked, taken as it is, interpolated.
KEYS = [
    "visual_encoder.patch_embed.proj.weight",
    "visual_encoder.pos_embed",
    "visual_encoder.blocks.1.attn.qkv.weight",
    "text_encoder.encoder.layer.1.attention.self.key.weight",
    "text_encoder.encoder.layer.1.crossattention.self0.value.bias",
    "text_encoder.embeddings.word_embeddings.weight",
    "cls_head.2.bias",
    "space_dict",
]


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("key", KEYS)
def test_weights_of_a_wrong_shape_or_type_are_named(key, misfit, model):
    state = to_official(state_of(model))
    state[key] = MISFITS[misfit](state[key])
    with pytest.raises(CheckpointError) as caught:
        madtp.load(state)
    ours = key.replace("self.key", "self.qkv").replace("self0.value", "self0.kv")
    assert key in str(caught.value) or ours in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named(value, model):
    state = state_of(model)
    state["cls_head.0.weight"][0, 0] = value
    with pytest.raises(CheckpointError, match=r"not finite numbers, in torch.float32: cls_head\.0\.weight"):
        madtp.load(state)


def test_weights_beyond_the_range_of_a_type(model):
    state = state_of(model)
    state["cls_head.0.weight"][0, 0] = 1e6
    assert madtp.load(state, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match=r"in torch.float16: cls_head\.0\.weight"):
        madtp.load(state, dtype=torch.float16)


# ---- arguments


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path):
    """Said before anything is read."""
    for device in ("cuda", "cuda:7", torch.device("cuda")):
        with pytest.raises(ValueError, match=f"device: '{device}' cannot be used: "):
            madtp.load(tmp_path / "absent.pth", device=device)
    with pytest.raises(ValueError, match="device: 'gpu' cannot be used"):
        madtp.load("random:base", device="gpu")
    with pytest.raises(ValueError, match="dtype: expected a floating-point type, got torch.int8"):
        madtp.load("random:base", dtype=torch.int8)
