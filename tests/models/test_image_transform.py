"""Pixels are the model's own: to the bit what the PIL processors of transformers make of the same picture."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import BlipImageProcessorPil, CLIPImageProcessorPil
from transformers import CLIPConfig as HuggingFaceConfig
from transformers import CLIPModel as HuggingFaceModel

import madtp
from madtp import CheckpointError
from madtp.image_transform import ImageTransform
from madtp.pictures import ImageError, load_image
from madtp.processing import CLIPProcessor

SIDE = 32
SIZES = [
    (SIDE, SIDE),
    (451, 300),
    (300, 451),
    (33, 32),
    (32, 47),
    (31, 400),
    (400, 31),
    (7, 5),
    (5, 7),
    (1, 1),
    (1, 90),
    (64, 65),
]


@pytest.fixture
def rng(generator):
    return np.random.default_rng(generator.initial_seed())


def colours(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def theirs(processor, image):
    return processor(image, return_tensors="pt")["pixel_values"][0]


# ---- against transformers' processors


CLIP_SETTINGS = [
    {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
    {"size": SIDE, "crop_size": SIDE},  # files from before transformers 4.25
    {"size": SIDE, "crop_size": SIDE, "default_to_square": True},
    {"size": 40, "crop_size": SIDE, "resample": 2},
    {"size": 20, "crop_size": SIDE, "resample": 1},  # padded with black
    {"size": 21, "crop_size": SIDE, "do_normalize": False},
    {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False, "resample": 0},
    {"size": SIDE, "crop_size": [SIDE, SIDE], "do_rescale": False},
    {
        "do_resize": False,
        "crop_size": SIDE,
        "image_mean": [0.5, 0.25, 0.0],
        "image_std": [0.1, 0.2, 1.5],
        "resample": 4,
    },
    {"size": SIDE, "crop_size": SIDE, "rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0, "resample": 5},
    {"size": SIDE, "crop_size": SIDE, "do_normalize": None, "image_mean": None, "do_pad": False, "pad_size": None},
]


@pytest.mark.parametrize("settings", CLIP_SETTINGS, ids=range(len(CLIP_SETTINGS)))
def test_clip_pixels_are_those_of_transformers(settings, rng):
    processor = CLIPImageProcessorPil(**settings)
    transform = ImageTransform.from_settings(settings, "clip")
    again = ImageTransform.from_settings(json.loads(json.dumps(transform.settings())), "blip")
    assert again == transform and transform.output == (SIDE, SIDE)
    saved = CLIPImageProcessorPil(**transform.settings())
    for size in SIZES:
        image = colours(rng, *size)
        ours = transform(image)
        assert ours.dtype == torch.float32 and ours.shape == (3, SIDE, SIDE) and ours.is_contiguous()
        assert torch.equal(ours, theirs(processor, image).float()), size
        assert torch.equal(ours, theirs(saved, image).float()), size


@pytest.mark.parametrize("settings", [{"size": SIDE}, {"size": {"height": SIDE, "width": SIDE}, "resample": 2}])
def test_blip_pixels_are_those_of_transformers(settings, rng):
    processor, transform = BlipImageProcessorPil(**settings), ImageTransform.from_settings(settings, "blip")
    for size in SIZES:
        image = colours(rng, *size)
        assert torch.equal(transform(image), theirs(processor, image)), size


def test_the_two_rules_are_the_defaults_of_transformers(rng):
    for image in (colours(rng, 500, 300), colours(rng, 300, 301)):
        assert torch.equal(ImageTransform.centre(224)(image), theirs(CLIPImageProcessorPil(), image))
        assert torch.equal(ImageTransform.squash(384)(image), theirs(BlipImageProcessorPil(), image))
    assert ImageTransform.from_settings({}, "clip") == ImageTransform.centre(224)
    assert ImageTransform.from_settings({}, "blip") == ImageTransform.squash(384)
    assert ImageTransform.from_settings(
        {"image_processor_type": "BlipImageProcessor"}, "clip"
    ) == ImageTransform.squash(384)
    assert ImageTransform.from_settings(
        {"feature_extractor_type": "CLIPFeatureExtractor"}, "blip"
    ) == ImageTransform.centre(224)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_pictures_of_every_kind(rng):
    """Theirs is given what a viewer shows: they do not turn pictures, and clip 16-bit grey to white."""
    wide = colours(rng, 70, 41)
    alpha = wide.copy()
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, (41, 70), dtype=np.uint8)))
    white = Image.alpha_composite(Image.new("RGBA", alpha.size, "white"), alpha).convert("RGB")
    grey = wide.convert("L")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = wide.quantize(64)
    cases = [
        (encoded(wide), wide),
        (encoded(grey), grey.convert("RGB")),
        (encoded(sixteen), grey.convert("RGB")),
        (encoded(palette), palette.convert("RGB")),
        (encoded(alpha), white),
        (encoded(wide, exif=exif), wide.transpose(Image.Transpose.ROTATE_270)),
        (encoded(wide.convert("CMYK"), "TIFF"), wide.convert("CMYK").convert("RGB")),
    ]
    processor = CLIPProcessor(SIDE, 514, 40, "demo", ImageTransform.centre(SIDE))
    crop = CLIPImageProcessorPil(size=SIDE, crop_size=SIDE)
    for number, (data, seen) in enumerate(cases):
        assert torch.equal(processor.image(data), theirs(crop, seen)), number
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode in ("RGB", "L", "P") and not opened.getexif():  # what theirs reads by itself as we do
                assert torch.equal(processor.image(data), theirs(crop, opened)), number
            upright = ImageOps.exif_transpose(opened)
            if opened.mode in ("RGB", "L", "P"):
                assert torch.equal(processor.image(data), theirs(crop, upright)), number


# ---- settings that cannot be honoured


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"do_flip_channel_order": True}, "not supported: do_flip_channel_order = True"),
        ({"do_pad": True, "size_divisor": 8}, "not supported: do_pad = True, size_divisor = 8"),
        ({"rescale_offset": 1}, "not supported: rescale_offset = 1"),
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "image_processor_type: expected one of CLIPImageProcessor, .*'ConvNextImageP",
        ),
        ({"image_processor_type": "ChineseCLIPImageProcessor"}, "image_processor_type"),
        (
            {"size": {"longest_edge": 30}},
            "size: expected 'shortest_edge', or 'height' and 'width', got {'longest_edge': 30}",
        ),
        ({"size": {"shortest_edge": 30, "longest_edge": 90}}, "size: expected 'shortest_edge'"),
        ({"size": {"shortest_edge": 0}}, "size: expected sides of 1 to 10000 pixels, got 0"),
        ({"size": True}, "size: expected sides"),
        ({"size": 10**9}, "size: expected sides"),
        ({"crop_size": {"shortest_edge": 30}}, "crop_size: expected"),
        ({"crop_size": "large"}, "crop_size: expected sides of 1 to 10000 pixels, got 'large'"),
        ({"do_resize": "yes"}, "do_resize: expected true or false, got 'yes'"),
        ({"resample": 9}, "resample: expected one of PIL's filters, 0 to 5, got 9"),
        ({"image_mean": [0.5]}, r"image_mean: expected three numbers, got \[0.5\]"),
        ({"image_std": [0.5, 0, 1]}, "image_std: expected numbers other than 0"),
        ({"image_mean": [0.5, float("nan"), 1]}, "image_mean: expected finite numbers"),
        ({"rescale_factor": "small"}, "rescale_factor: expected a number, got 'small'"),
        (
            {"image_processor_type": "BlipImageProcessor", "do_center_crop": True},
            "crop_size: expected sides .* got None",
        ),
        ({"resample": None}, "resample: expected one of PIL's filters, 0 to 5, got None"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform.from_settings(settings, "clip")


def test_pixels_of_a_size_that_the_model_does_not_take():
    with pytest.raises(ValueError, match="transform: makes 24 x 24 pixels, but the model takes 32 x 32"):
        CLIPProcessor(32, 514, 40, "demo", ImageTransform.centre(24))
    with pytest.raises(ValueError, match="transform: makes pixels of any size, but the model takes 32 x 32"):
        CLIPProcessor(32, 514, 40, "demo", ImageTransform(32))


def test_other_sizes():
    assert ImageTransform.centre(224).at(336) == ImageTransform.centre(336)
    assert ImageTransform.squash(224).at(336) == ImageTransform.squash(336)
    assert ImageTransform(256, (224, 224)).at(224) == ImageTransform(256, (224, 224))
    with pytest.raises(ValueError, match=r"image_size: 336 .* resizes to 256 and crops to \(224, 224\)"):
        ImageTransform(256, (224, 224)).at(336)


def test_a_picture_so_narrow_that_it_would_grow_without_end():
    processor = CLIPProcessor(224, 514, 40, "demo", ImageTransform.centre(224))
    data = encoded(Image.new("L", (100_000, 1)))
    with pytest.raises(ImageError, match="too narrow: 100000 x 1 pixels would become 22400000 x 224"):
        processor.image(data)
    assert CLIPProcessor(224, 514, 40, "demo").image(data).shape == (3, 224, 224)


# ---- what an overlay shows


@pytest.mark.parametrize("size", [(90, 30), (30, 90), (40, 40), (41, 40)])
def test_the_part_that_is_seen(size, rng):
    image = colours(rng, *size)
    processor = CLIPProcessor(20, 514, 40, "demo", ImageTransform.centre(20))
    seen = processor.view(image)
    assert abs(seen.width - seen.height) <= 1 and min(seen.size) == min(size)
    left, top = (size[0] - seen.width) / 2, (size[1] - seen.height) / 2
    assert np.array_equal(
        np.asarray(seen), np.asarray(image)[int(top) : int(top) + seen.height, int(left) : int(left) + seen.width]
    )
    assert CLIPProcessor(20, 514, 40, "demo").view(image) is image


# ---- models


def hugging_face(directory, image_size=SIDE):
    """A CLIPModel of transformers with random weights, and its directory without a processor."""
    torch.manual_seed(2)
    config = HuggingFaceConfig(
        text_config=dict(vocab_size=514, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                         max_position_embeddings=40, eos_token_id=513, bos_token_id=512),
        vision_config=dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
                           image_size=image_size, patch_size=8),
        projection_dim=32,
    )  # fmt: skip
    model = HuggingFaceModel(config).eval()
    model.save_pretrained(directory)
    return model


FILES = {
    "none": (None, None, {"size": SIDE, "crop_size": SIDE}),
    "file": (
        "preprocessor_config.json",
        {"size": 40, "crop_size": SIDE, "resample": 2, "image_processor_type": "CLIPImageProcessor"},
        None,
    ),
    "old": ("preprocessor_config.json", {"size": SIDE, "crop_size": SIDE, "feature_extractor_type": "CLIPFeatureExtractor"}, None),
    "nested": ("processor_config.json", {"image_processor": {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}}, None),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
@torch.inference_mode()
def test_features_of_clip_are_those_of_transformers(kind, rng, tmp_path):
    """Of the picture of 451 x 300 pixels whose features had a cosine of 0.83 when it was squashed."""
    name, settings, used = FILES[kind]
    model = hugging_face(tmp_path)
    if name:
        (tmp_path / name).write_text(json.dumps(settings))
        used = settings.get("image_processor", settings)
    used = {key: value for key, value in used.items() if not key.endswith("_type")}
    ours, processor = madtp.load(tmp_path), CLIPImageProcessorPil(**used)
    for size in ((451, 300), (300, 451), (600, 400), (800, 33)):
        image = Image.fromarray(
            np.kron(rng.integers(0, 256, (9, 11, 3)), np.ones((64, 64, 1))).astype(np.uint8)
        ).resize(size)
        pixels = ours.processor.image(image)
        assert torch.equal(pixels, theirs(processor, image))
        expected = model.get_image_features(pixels[None]).pooler_output[0]
        features = ours.encode_image(pixels[None]).features[0]
        assert torch.cosine_similarity(features, expected, dim=0) > 0.999999


def test_a_processor_that_a_directory_cannot_be_loaded_with(tmp_path):
    hugging_face(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    for settings, message in (
        ({"do_reduce_labels": True}, "do_reduce_labels = True"),
        ({"size": 224, "crop_size": 224}, "makes 224 x 224 pixels, but the model takes 32 x 32"),
        ([], "expected a JSON object"),
    ):
        path.write_text(json.dumps(settings))
        with pytest.raises(CheckpointError, match=message):
            madtp.load(tmp_path)


def test_which_models_squash(tmp_path):
    """MADTP trains its CLIP with squashed pictures, and says so by holding a dictionary."""
    ours = madtp.load("random:base", "clip", config=madtp.load(hugging_face_directory(tmp_path)).config)
    squash, centre = ImageTransform.squash(SIDE), ImageTransform.centre(SIDE)
    assert ours.processor.transform == centre
    state = ours.state_dict()
    assert madtp.load(state, tokenizer="demo").processor.transform == squash
    plain = {key: value for key, value in state.items() if key != "space_dict" and ".query_models." not in key}
    assert madtp.load(plain).processor.transform == centre
    assert madtp.load(plain, image_size=48).processor.transform == ImageTransform.centre(48)
    assert madtp.load("random:base", "caption", config=blip_sizes()).processor.transform == squash


def hugging_face_directory(directory):
    hugging_face(directory)
    return directory


def blip_sizes():
    return madtp.CaptionConfig(
        madtp.VisionConfig(SIDE, 16, 64, 1, 1, sd_num=5, sd_dim=64),
        madtp.TextConfig(64, 1, 1, 96, vocab_size=200, max_position_embeddings=40, encoder_width=64),
    )


def test_saved_models_keep_their_pixels(tmp_path):
    model = madtp.load(hugging_face_directory(tmp_path / "theirs"), tokenizer="demo")
    madtp.save_pretrained(model, tmp_path / "ours")
    assert madtp.load(tmp_path / "ours").processor.transform == ImageTransform.centre(SIDE)
    (tmp_path / "ours" / "preprocessor_config.json").unlink()  # as earlier versions saved, which squashed all pictures
    assert madtp.load(tmp_path / "ours").processor.transform == ImageTransform.squash(SIDE)


def test_directories_of_blip_bring_their_processor(generator, rng, tmp_path):
    from test_huggingface import hugging_face as blip

    blip("caption", generator).save_pretrained(tmp_path)
    settings = {"size": {"height": 64, "width": 64}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(settings | {"image_processor_type": "BlipImageProcessor"})
    )
    image = colours(rng, 90, 50)
    assert torch.equal(madtp.load(tmp_path).processor.image(image), theirs(BlipImageProcessorPil(**settings), image))


# ---- transparency


def png(width, depth, colour, row, transparent):
    """One row; Pillow writes neither 16-bit colour nor 2 and 4 bits with transparency."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    "depth, colour, row, transparent, expected",
    [
        (1, 0, bytes([0b01000000]), [0], [255, 255]),
        (1, 0, bytes([0b01000000]), [1], [0, 255]),
        (2, 0, bytes([0b01100000]), [1], [255, 170]),
        (4, 0, bytes([0x4A]), [4], [255, 170]),
        (8, 0, bytes([10, 200]), [10], [255, 200]),
        (16, 0, struct.pack(">2H", 10 * 257, 200 * 257), [10 * 257], [255, 200]),
        (16, 0, struct.pack(">2H", 10 * 257, 200 * 257), [10], [10, 200]),
        (16, 0, struct.pack(">2H", 10 * 257, 10 * 257 + 1), [10 * 257], [255, 10]),
        (8, 2, bytes([10, 10, 10, 200, 200, 200]), [10] * 3, [255, 200]),
        (16, 2, struct.pack(">6H", *[10 * 257] * 3, *[200 * 257] * 3), [10 * 257] * 3, [255, 200]),
        (16, 2, struct.pack(">6H", *[10 * 257] * 3, *[200 * 257] * 3), [200] * 3, [10, 200]),
    ],
)
def test_transparent_values_become_white(depth, colour, row, transparent, expected):
    data = png(2, depth, colour, row, transparent)
    assert np.asarray(load_image(data))[0, :, 0].tolist() == expected
    with Image.open(io.BytesIO(data)) as image:
        info = dict(image.info)
        assert np.asarray(load_image(image))[0, :, 0].tolist() == expected
        assert image.info == info  # somebody else's picture stays as it is
