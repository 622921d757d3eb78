"""Encoders of images and texts of other families than MADTP's: their dense features against transformers' own classes."""

import contextlib
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from helpers import DEVICE, normal
from PIL import Image
from pretended_gpu import PretendedGPU
from safetensors.torch import load_file, save_file

import madtp
from madtp import CheckpointError, CLIPConfig, towers
from madtp.config import CLIPVisionConfig
from madtp.pruning import MADTP, EViT, RankedNovelty, ScoredPruning, Tokens, TopK
from madtp.pruning.official import official
from madtp.tasks.clip.model import CLIP
from madtp.towers import interpolate_positions
from madtp.weights import randomize
from madtp.weights.key_maps import FAMILIES
from madtp_kernels import RaggedBatch

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
    if name.startswith("Dinov2") and not any(".q_proj." in key for key in model.state_dict()):
        pytest.skip("before transformers 5.23 its classes have the names of its files")
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
    shapes = [(8, 8), (32, 32), (16, 56), (40, 24), (8, 120), (72, 16)]  # one patch wide: the next test
    images = [normal(generator, 3, *shape).cpu() for shape in shapes]
    ours = madtp.load(place, device=DEVICE)
    out = ours.encode_image(images)
    for number, image in enumerate(images):
        close(out.features[number : number + 1], image_features(model, [image]))
        close(ours.encode_image([image]).features[0], out.features[number].cpu())
    prefix = ours.config.vision.prefix
    lengths = [high * wide // 64 + prefix for high, wide in shapes]
    assert out.trace[0].lengths_in.tolist() == lengths


@pytest.mark.parametrize("mode", ["bilinear antialias", "bicubic antialias", "bicubic"])
@pytest.mark.parametrize("rows", [1, 3, 13])
def test_positions_of_pictures_one_patch_wide(rows, mode, generator):
    """Those of the picture laid on its side; transformers before 5.24 meets an error of PyTorch there."""
    grid = normal(generator, 4, 4, 6).cpu()
    upright = interpolate_positions(grid.flatten(0, 1)[None], (rows, 1), 0, mode)
    lying = interpolate_positions(grid.transpose(0, 1).flatten(0, 1)[None], (1, rows), 0, mode)
    close(upright, lying)
    if mode == "bilinear antialias":
        places = (torch.arange(rows) + 0.5) * 4 / rows - 0.5
        high = (1 - (torch.arange(4) - places[:, None]).abs() / max(4 / rows, 1)).clamp(min=0)
        wide = (1 - (torch.arange(4) - 1.5).abs() / 4).clamp(min=0)
        high, wide = high / high.sum(1, keepdim=True), wide / wide.sum()
        close(upright[0], torch.einsum("ia,b,abd->id", high, wide, grid))


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


# ---- pixels ---------------------------------------------------------------------------------------------------------


def photo(width, height):
    x, y = torch.meshgrid(torch.linspace(0, 1, width), torch.linspace(0, 1, height), indexing="xy")
    values = torch.stack([x, y, (7 * x + 11 * y * y).sin() / 2 + 0.5], -1)
    return Image.fromarray((values * 255).byte().numpy())


PROCESSORS = {
    "CLIPVisionModel": lambda: hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32),
    "SiglipVisionModel": lambda: hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "Siglip2VisionModel": lambda: hf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20),
    "Dinov2Model": lambda: hf.BitImageProcessorPil(
        size={"shortest_edge": 40}, crop_size=32, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    ),
    "ViTModel": lambda: hf.ViTImageProcessorPil(size={"height": 32, "width": 32}),
}


@pytest.mark.parametrize("size", [(640, 360), (360, 640), (190, 1000)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_family(name, size, saved, tmp_path):
    """The wrong way shifts every vector, and square pictures hide it."""
    processor, (model, place) = PROCESSORS[name](), saved(name)
    for part in ("config.json", "model.safetensors"):
        (tmp_path / part).symlink_to(place / part)
    processor.save_pretrained(tmp_path)
    ours, image = madtp.load(tmp_path), photo(*size)
    expected, pixels = processor(image, return_tensors="pt"), ours.processor.image(image)
    if name.startswith("Siglip2"):
        rows, columns = expected["spatial_shapes"][0].tolist()
        assert pixels.shape == (3, rows * 8, columns * 8)
        padded = padded_patches([pixels], 8, 20)
        assert torch.equal(padded["pixel_attention_mask"], expected["pixel_attention_mask"])
        assert torch.equal(padded["pixel_values"], expected["pixel_values"])
    else:
        assert torch.equal(pixels, expected["pixel_values"][0])
    with torch.inference_mode():
        features = ours.encode_image([pixels]).features
        close(features, pooled(model(**expected)))


@pytest.mark.parametrize("most", [128, 1024])
@torch.inference_mode()
def test_naflex_takes_any_size_in_one_batch(most, saved, tmp_path):
    """From a dot to a banner, up to the most patches that are allowed: each as transformers has it alone and padded."""
    name = "Siglip2VisionModel"
    processor, (model, place) = hf.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=most), saved(name)
    for part in ("config.json", "model.safetensors"):
        (tmp_path / part).symlink_to(place / part)
    processor.save_pretrained(tmp_path)
    ours, photos = madtp.load(tmp_path), [photo(*size) for size in [(16, 16), (224, 224), (1000, 100), (1200, 900)]]
    features = ours.encode_image([ours.processor.image(each) for each in photos]).features
    for number, each in enumerate(photos):
        expected = model(**processor(each, return_tensors="pt")).pooler_output
        torch.testing.assert_close(features[number : number + 1].cpu(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_without_a_file_are_the_familys_usual_ones(name, saved):
    """As its processor makes them by default, at the size of the model."""
    usual, transform = PROCESSORS[name](), madtp.load(saved(name)[1]).processor.transform
    assert list(transform.mean) == list(usual.image_mean) and list(transform.std) == list(usual.image_std)
    assert transform.resample == int(usual.resample)
    if name == "Siglip2VisionModel":
        assert (transform.patch, transform.max_patches, transform.output) == (8, 256, None)
    elif name == "Dinov2Model":
        assert (transform.resize, transform.crop) == (256, (224, 224)), "its positions are interpolated"
    else:
        assert transform.output == (32, 32) and isinstance(transform.resize, int) == (name == "CLIPVisionModel")


@pytest.mark.parametrize("name", [name for name in IMAGES if not name.startswith("CLIP")])
def test_pixels_of_a_state_dict_are_the_familys_too(name, saved):
    """They were those of CLIP. (Our CLIP's are those of MADTP, unless a file says otherwise.)"""
    model, place = saved(name)
    ours = madtp.load(place)
    states = [ours.state_dict(), *([model.state_dict()] if name in ("SiglipModel", "Siglip2Model") else [])]
    for state in states:
        assert madtp.load(state, config=ours.config).processor.transform == ours.processor.transform


@torch.inference_mode()
def test_another_size_of_pictures(saved, generator):
    """Positions are interpolated at loading where a tower has one size, and with every picture where it takes any."""
    model, place = saved("SiglipVisionModel")
    ours, pixels = madtp.load(place, image_size=48, device=DEVICE), normal(generator, 2, 3, 48, 48)
    close(ours.encode_image(pixels).features, model(pixels.cpu(), interpolate_pos_encoding=True).pooler_output)
    model, place = saved("Dinov2WithRegistersModel")
    close(madtp.load(place, device=DEVICE).encode_image(pixels).features, model(pixels.cpu()).pooler_output)
    with pytest.raises(
        ValueError, match="48 pixels cannot be made of a picture, since the model's own processor resizes to 256"
    ):
        madtp.load(place, image_size=48)


# ---- texts ----------------------------------------------------------------------------------------------------------


def words_tokenizer(size, lower=False):
    """A fast tokenizer of whole words that ends texts with </s>, and pads on the right."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "A", "Cat", "CAT", "dog", "<bos>", "<eos>", "<mask>"]
    words += [f"w{number}" for number in range(size - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    if lower:
        tokenizer.normalizer = normalizers.Lowercase()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


@torch.inference_mode()
def test_siglip_texts_are_padded_to_the_trained_length(saved, tmp_path):
    """Alone and beside a long one a text is the same, as transformers makes it with padding="max_length"."""
    model, place = saved("SiglipModel")
    for part in ("config.json", "model.safetensors"):
        (tmp_path / part).symlink_to(place / part)
    tokenizer = words_tokenizer(60)
    tokenizer.save_pretrained(tmp_path)
    ours = madtp.load(tmp_path)
    captions = ["A Cat", "a dog " * 40, "a"]
    ids = [ours.processor.text(caption) for caption in captions]
    expected = tokenizer(captions, padding="max_length", truncation=True, max_length=12, return_tensors="pt")[
        "input_ids"
    ]
    assert torch.equal(torch.stack(ids), expected)
    assert ids[1][-1] == 1, "the end of a text that is cut off stays"
    assert [ours.processor.cuts(caption) for caption in captions] == [False, True, False]
    close(ours.encode_text(ids).features, model.get_text_features(expected).pooler_output)
    close(ours.encode_text(ids[:1]).features, model.get_text_features(expected[:1]).pooler_output)
    again = tmp_path / "saved"
    madtp.save_pretrained(ours, again)
    assert torch.equal(madtp.load(again).processor.text("A Cat"), ids[0])


def test_siglip_2_texts_are_lower_case(saved, tmp_path):
    _, place = saved("Siglip2Model")
    for part in ("config.json", "model.safetensors"):
        (tmp_path / part).symlink_to(place / part)
    words_tokenizer(60).save_pretrained(tmp_path)
    words_tokenizer(60).save_pretrained(tmp_path / "words")
    # Beside the model, transformers may take its own class for it, which lowers case; alone, these files keep it.
    for source in (None, tmp_path / "words"):
        processor = madtp.load(tmp_path, tokenizer=source).processor
        assert torch.equal(processor.text("A CAT"), processor.text("a cat")) and len(processor.text("a cat")) == 12
        assert not torch.equal(processor.text("a cat"), processor.text("a dog"))


def test_images_need_no_tokenizer(saved):
    """SigLIP's needs a package that may not be there; pictures do not wait for it."""
    ours = madtp.load(saved("SiglipModel")[1])
    assert ours.processor.image(photo(50, 40)).shape == (3, 32, 32)
    with pytest.raises(ValueError, match="tokenizer: none lies with the model; give its directory or hub id"):
        ours.processor.text("a cat")
    with pytest.raises(madtp.processing.TextError, match="an image tower only"):
        madtp.load(saved("ViTModel")[1]).processor.text("a cat")
    with pytest.raises(madtp.processing.ImageError, match="a text tower only"):
        madtp.load(saved("CLIPTextModel")[1]).processor.image(photo(50, 40))


def test_half_precision_weights_run_in_the_dtype_that_is_asked_for(saved, tmp_path, generator):
    """float16 files on a CPU: float32 unless something else is asked for, on every device."""
    model, place = saved("CLIPVisionModel")
    (tmp_path / "config.json").symlink_to(place / "config.json")
    save_file({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    pixels = normal(generator, 2, 3, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        features = madtp.load(tmp_path, dtype=dtype, device=DEVICE).encode_image(pixels).features
        assert features.dtype == dtype and features.isfinite().all()


# ---- merged tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["attention", "mean", "mean, registers", "mean, normalised last", "class"])
@torch.inference_mode()
def test_merging_likes_changes_no_pooled_vector(kind, generator):
    """A token that stands for three counts three times in a mean and in the attention head; one that stands for itself, once."""
    pool, late = kind.split(",")[0], "last" in kind
    vision = CLIPVisionConfig(
        32,
        8,
        embed_dim=64,
        depth=1,
        num_heads=4,
        sd_dim=64,
        class_token=pool != "attention",
        registers=2 if "registers" in kind else 0,
        pool=pool,
        norm_after_pool=late,
    )
    tower = CLIP(CLIPConfig(vision, None, 64)).to(DEVICE).eval()
    randomize(tower)
    tower, prefix = tower.visual, vision.prefix
    rows = normal(generator, prefix + 3, 64)
    copies = torch.tensor([1] * prefix + [3, 1, 2], device=DEVICE)
    apart = Tokens.start(RaggedBatch.from_list([rows.repeat_interleave(copies, 0), rows]), prefix=prefix)
    together = Tokens.start(RaggedBatch.from_list([rows, rows]), prefix=prefix)
    sizes = torch.cat([copies, torch.ones_like(copies)]).float()
    together = dataclasses.replace(together, sizes=sizes)
    close(tower.pool(together), tower.pool(apart).cpu())
    counted = tower.pool(dataclasses.replace(together, sizes=None))
    assert pool == "class" or (counted[0] - tower.pool(apart)[0]).abs().max() > 1e-3
    if pool == "mean":  # of the patches: class token and registers are none
        others = together.values.where((together.ids >= prefix)[:, None], 7.0)
        close(tower.pool(together.with_values(others)), tower.pool(together).cpu())


@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "Dinov2WithRegistersModel"])
@torch.inference_mode()
def test_merging_copies_changes_no_feature(name, saved, generator):
    """A picture of few different patches without positions: the copies of each become one token, and nothing else
    changes."""
    ours = madtp.load(saved(name)[1], device=DEVICE)
    prefix = ours.config.vision.prefix
    ours.visual.pos_embed[:, -16:] = 0
    patches = normal(generator, 5, 3, 8, 8)[torch.arange(16) % 5]
    image = patches.unflatten(0, (4, 4)).permute(2, 0, 3, 1, 4).reshape(1, 3, 32, 32)
    dense = ours.encode_image(image, 0.0)
    pruned = ours.encode_image(image, RankedNovelty(thresholds=(1e-5,), most=1.0))
    assert pruned.trace[0].lengths.tolist() == [prefix + 5]
    assert F.cosine_similarity(pruned.features, dense.features).min() > 0.999999


@pytest.mark.parametrize("rule", [TopK(0.5), RankedNovelty(shares=(0.3,))], ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", ["CLIPVisionModel", "SiglipVisionModel", "Dinov2WithRegistersModel"])
def test_rows_beyond_the_last_token_reach_no_gradient_of_an_encoder(name, rule, saved, generator):
    """A number that is not finite times a gradient of zero is NaN in the gradient of what is multiplied row by row."""
    images, gradients = normal(generator, 3, 3, 32, 32), []
    for place in (contextlib.nullcontext, PretendedGPU):
        ours = madtp.load(saved(name)[1], device=DEVICE)
        with place():
            loss = ours.encode_image(images, rule).features.square().mean()
        loss.backward()
        gradients.append({key: part.grad for key, part in ours.named_parameters() if part.grad is not None})
    theirs, ours = gradients
    assert theirs.keys() == ours.keys() and ("Dinov2" not in name or any(key.endswith(".scale") for key in ours))
    for key, gradient in theirs.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[key], gradient, atol=1e-4 * scale + 1e-6, rtol=1e-3)


def test_a_rule_that_reads_the_class_token_is_known_in_any_wrapping():
    class Own(MADTP):
        name = "own"

    groups = torch.zeros(2, dtype=torch.int32)
    for rule in (MADTP(2.0), Own(2.0), EViT(), RankedNovelty(order="cls")):
        assert towers._reads_class_token(rule)
        if isinstance(rule, ScoredPruning):
            assert towers._reads_class_token(official(rule, "grouping", groups=groups))
    assert not towers._reads_class_token(official(TopK(0.5), "grouping", groups=groups))
