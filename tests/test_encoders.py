"""Encoders of images and texts of other families than MADTP's: their dense features against transformers' own classes."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import DEVICE, normal
from safetensors.torch import load_file, save_file

import madtp
from madtp import CheckpointError
from madtp.weights.key_maps import FAMILIES

VISION = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURES = {"image_size": 32, "patch_size": 8}
TEXT = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 60,
    "max_position_embeddings": 12,
}  # fmt: skip
END = 59
NAFLEX = VISION | {"patch_size": 8, "num_patches": 16}
SIGLIP_TEXT = TEXT | {"hidden_size": 64, "num_attention_heads": 4, "projection_size": 64}
CLIP_TEXT = TEXT | {"eos_token_id": END, "projection_dim": 24}

MODELS = {
    "CLIPModel": lambda: hf.CLIPModel(
        hf.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION | PICTURES, projection_dim=24)
    ),
    "CLIPVisionModel": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, **PICTURES, hidden_act="gelu")),
    "CLIPVisionModelWithProjection": lambda: hf.CLIPVisionModelWithProjection(
        hf.CLIPVisionConfig(**VISION, **PICTURES, projection_dim=24)
    ),
    "CLIPTextModel": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)),
    "CLIPTextModelWithProjection": lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**CLIP_TEXT)),
    "SiglipModel": lambda: hf.SiglipModel(hf.SiglipConfig(text_config=SIGLIP_TEXT, vision_config=VISION | PICTURES)),
    "SiglipVisionModel": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION, **PICTURES)),
    "SiglipTextModel": lambda: hf.SiglipTextModel(hf.SiglipTextConfig(**SIGLIP_TEXT)),
    "Siglip2Model": lambda: hf.Siglip2Model(hf.Siglip2Config(text_config=SIGLIP_TEXT, vision_config=NAFLEX)),
    "Siglip2VisionModel": lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**NAFLEX)),
    "Dinov2Model": lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2, **PICTURES)),
    "Dinov2WithRegistersModel": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**DINOV2, **PICTURES, num_register_tokens=3)
    ),
    "ViTModel": lambda: hf.ViTModel(hf.ViTConfig(**VISION, **PICTURES)),
    "ViTModel without a pooler": lambda: hf.ViTModel(hf.ViTConfig(**VISION, **PICTURES), add_pooling_layer=False),
}
DINOV2 = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "layerscale_value": 0.3}
IMAGES = [name for name in MODELS if "Text" not in name]
TEXTS = [name for name in MODELS if "Text" in name or name.endswith(("CLIPModel", "SiglipModel", "Siglip2Model"))]


def theirs(name):
    """One of their models with weights that differ from each other everywhere: biases, norms and scales too."""
    torch.manual_seed(len(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> (their model, the directory it was saved in)."""
    made = {}

    def get(name):
        if name not in made:
            model, place = theirs(name), tmp_path_factory.mktemp("model")
            model.save_pretrained(place)
            made[name] = model, place
        return made[name]

    return get


def padded_patches(images, patch, length):
    """Images ``[3, H, W]`` as transformers' SigLIP 2 takes them: patches with channels last, filled up to a length."""
    values, masks, shapes = [], [], []
    for image in images:
        rows, columns = image.shape[1] // patch, image.shape[2] // patch
        cut = image.reshape(3, rows, patch, columns, patch).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        values.append(F.pad(cut, (0, 0, 0, length - len(cut))))
        masks.append(torch.arange(length) < len(cut))
        shapes.append((rows, columns))
    return {
        "pixel_values": torch.stack(values), "pixel_attention_mask": torch.stack(masks).int(),
        "spatial_shapes": torch.tensor(shapes),
    }  # fmt: skip


def pooled(output):
    """What their class says about an image or a text, whatever it calls that."""
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.last_hidden_state[:, 0]


def image_features(model, images):
    inputs = (
        padded_patches(images, 8, 20) if "Siglip2" in type(model).__name__ else {"pixel_values": torch.stack(images)}
    )
    call = getattr(model, "get_image_features", model)
    return pooled(call(**inputs))


def texts(family, generator):
    """Texts for one of our models, and padded for theirs."""
    words = [torch.randint(1, END, (length,), generator=generator) for length in (3, 11, 6)]
    if "Siglip" in family:
        filled = torch.stack([F.pad(text, (0, 12 - len(text)), value=1) for text in words])
        return list(filled), filled
    words = [torch.cat([text, torch.tensor([END])]) for text in words]
    return words, torch.stack([F.pad(text, (0, 12 - len(text)), value=END) for text in words])


def close(ours, expected):
    difference = (ours.cpu() - expected).abs().max()
    assert difference < 1e-5 * max(1, expected.abs().max()), difference


@pytest.mark.parametrize("name", IMAGES)
@torch.inference_mode()
def test_image_features_are_those_of_transformers(name, saved, generator):
    model, place = saved(name)
    images = list(normal(generator, 3, 3, 32, 32).cpu())
    expected = image_features(model, images)
    ours = madtp.load(place, device=DEVICE)
    features = ours.encode_image(torch.stack(images)).features
    close(features, expected)
    for number, image in enumerate(images):
        close(ours.encode_image(image[None]).features[0], features[number].cpu())


@pytest.mark.parametrize("name", TEXTS)
@torch.inference_mode()
def test_text_features_are_those_of_transformers(name, saved, generator):
    model, place = saved(name)
    words, filled = texts(name, generator)
    expected = pooled(getattr(model, "get_text_features", model)(filled))
    ours = madtp.load(place, device=DEVICE)
    close(ours.encode_text(words).features, expected)


@pytest.mark.parametrize("name", ["CLIPModel", "SiglipModel", "Siglip2Model"])
@torch.inference_mode()
def test_similarities_are_those_of_transformers(name, saved, generator):
    model, place = saved(name)
    words, filled = texts(name, generator)
    images = list(normal(generator, 2, 3, 32, 32).cpu())
    pixels = padded_patches(images, 8, 16) if name == "Siglip2Model" else {"pixel_values": torch.stack(images)}
    expected = model(input_ids=filled, **pixels)
    ours = madtp.load(place, device=DEVICE)(torch.stack(images), words)
    close(ours.logits_per_image, expected.logits_per_image)
    close(ours.image_embeds, expected.image_embeds)


@pytest.mark.parametrize("name", MODELS)
def test_weights_go_back_to_the_names_they_had(name, saved, tmp_path):
    model, place = saved(name)
    ours = madtp.load(place)
    back = FAMILIES[model.config.model_type].from_ours(ours.state_dict())
    own = {
        key.removeprefix(FAMILIES[model.config.model_type].prefix): value for key, value in model.state_dict().items()
    }
    prefix = FAMILIES[model.config.model_type].prefix
    back = {key.removeprefix(prefix): value for key, value in back.items()}
    assert back.keys() == {key for key in own if not key.endswith(("mask_token", "position_ids"))}
    for key, value in back.items():
        assert torch.equal(value, own[key]), key
    madtp.save_pretrained(ours, tmp_path)
    again = madtp.load(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())
    assert (again.processor.transform, again.processor.max_tokens) == (
        ours.processor.transform,
        ours.processor.max_tokens,
    )


@pytest.mark.parametrize("name", ["Siglip2Model", "Dinov2Model", "Dinov2WithRegistersModel"])
@torch.inference_mode()
def test_pictures_of_several_shapes_in_one_batch(name, saved, generator):
    """Each as transformers has it alone, without a mask."""
    model, place = saved(name)
    shapes = [(8, 8), (32, 32), (16, 56), (40, 24), (8, 120)]
    images = [normal(generator, 3, *shape).cpu() for shape in shapes]
    ours = madtp.load(place, device=DEVICE)
    out = ours.encode_image(images)
    for number, image in enumerate(images):
        close(out.features[number : number + 1], image_features(model, [image]))
        close(ours.encode_image([image]).features[0], out.features[number].cpu())
    prefix = ours.config.vision.prefix
    lengths = [high * wide // 64 + prefix for high, wide in shapes]
    assert out.trace[0].lengths_in.tolist() == lengths


def test_pixels_that_a_tower_does_not_take(saved):
    fixed, flexible = (madtp.load(saved(name)[1]) for name in ("SiglipVisionModel", "Dinov2Model"))
    for model, shape, expected in (
        (fixed, (1, 3, 32, 40), r"expected \[B, 3, 32, 32\], got \[1, 3, 32, 40\]"),
        (flexible, (1, 3, 32, 36), r"expected \[B, 3, multiples of 8\], got"),
        (flexible, (3, 32, 32), r"expected \[B, 3, multiples of 8\], got"),
    ):
        with pytest.raises(ValueError, match=expected):
            model.encode_image(torch.zeros(shape))
    with pytest.raises(ValueError, match="an image tower only"):
        fixed.encode_text([torch.tensor([1])])
    with pytest.raises(ValueError, match="a text tower only"):
        madtp.load(saved("CLIPTextModel")[1]).encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="filled up to 12 tokens"):
        madtp.load(saved("SiglipTextModel")[1]).encode_text([torch.tensor([1, 2])])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("Dinov2Model", {"use_swiglu_ffn": True}, "use_swiglu_ffn: expected False, got True"),
        (
            "SiglipVisionModel",
            {"hidden_act": "relu"},
            "hidden_act: expected one of quick_gelu, gelu, gelu_tanh, got 'relu'",
        ),
        ("SiglipVisionModel", {"num_channels": 1}, "num_channels: expected 3, got 1"),
        ("SiglipVisionModel", {"model_type": "siglip2_vision_model"}, "model_type: .* of 'siglip'"),
        ("Siglip2VisionModel", {"model_type": "siglip_vision_model"}, "model_type: .* of 'siglip2'"),
        ("ViTModel", {"qkv_bias": False}, "qkv_bias: expected True, got False"),
    ],
)
def test_models_of_another_kind_are_refused_by_name(name, change, message, saved, tmp_path):
    _, place = saved(name)
    settings = json.loads((place / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(settings))
    save_file(load_file(place / "model.safetensors"), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        madtp.load(tmp_path)
