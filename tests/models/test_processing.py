"""What becomes of picture files and sentences before a model sees them."""

import io
import os
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from madtp import pictures, processing
from madtp.image_transform import ImageTransform
from madtp.pictures import ImageError, load_image
from madtp.processing import TextError, clean_question, clean_sentence, load_clip_tokenizer, load_tokenizer
from madtp.tasks import TASKS
from madtp.tasks.metrics import vqa_score
from madtp.tasks.nlvr import NLVRProcessor

WIDTH, HEIGHT = 40, 24


@pytest.fixture
def picture(rng):
    """A smooth colourful RGB picture, so that lossy formats stay close to it."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    phase = rng.uniform(0, 6, size=3)
    waves = [np.sin(x / 9 + phase[0]), np.cos(y / 6 + phase[1]), np.sin((x + y) / 14 + phase[2])]
    return Image.fromarray((np.stack(waves, axis=-1) * 110 + 128).astype(np.uint8))


@pytest.fixture
def rng(generator):
    return np.random.default_rng(generator.initial_seed())


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def difference(image, expected):
    assert image.mode == "RGB" and image.size == expected.size
    return np.abs(np.asarray(image, int) - np.asarray(expected.convert("RGB"), int)).max()


# ---- formats


@pytest.mark.parametrize("kind, tolerance", [("PNG", 0), ("BMP", 0), ("TIFF", 0), ("PPM", 0), ("JPEG", 12)])
def test_rgb_files(picture, kind, tolerance, tmp_path):
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    data = encoded(picture, kind, **options)
    path = tmp_path / "no_extension"
    path.write_bytes(data)
    assert difference(load_image(data), picture) <= tolerance
    assert difference(load_image(path), picture) <= tolerance
    assert difference(load_image(str(path)), picture) <= tolerance


def test_pil_image_is_not_changed_or_shared(picture):
    before = np.asarray(picture).copy()
    loaded = load_image(picture)
    loaded.putpixel((0, 0), (1, 2, 3))
    assert (np.asarray(picture) == before).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grayscale(picture, kind):
    grey = picture.convert("L")
    assert difference(load_image(encoded(grey, kind, quality=95)), grey) <= (0 if kind == "PNG" else 6)


def test_black_and_white():
    image = Image.new("1", (5, 4))
    image.putpixel((2, 1), 1)
    loaded = load_image(encoded(image, "PNG"))
    assert loaded.getpixel((2, 1)) == (255, 255, 255) and loaded.getpixel((0, 0)) == (0, 0, 0)


def test_palette(picture):
    palette = picture.quantize(16)
    assert difference(load_image(encoded(palette, "PNG")), palette) == 0
    assert difference(load_image(encoded(palette, "GIF")), palette) == 0


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_entry_becomes_white(kind):
    image = Image.new("P", (6, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 750)
    image.putpixel((3, 2), 0)
    loaded = load_image(encoded(image, kind, transparency=0))
    assert loaded.getpixel((3, 2)) == (255, 255, 255) and loaded.getpixel((0, 0)) == (200, 100, 50)


def test_rgba_is_laid_over_white():
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 51))
    loaded = load_image(encoded(image, "PNG"))
    assert [loaded.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (255, 255, 255), (204, 204, 204)]


def test_grey_with_alpha():
    image = Image.new("LA", (2, 1), (40, 255))
    image.putpixel((1, 0), (40, 0))
    loaded = load_image(encoded(image, "PNG"))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(40, 40, 40), (255, 255, 255)]


def test_opaque_rgba_is_unchanged(picture):
    image = picture.copy()
    image.putalpha(255)
    assert difference(load_image(encoded(image, "PNG")), picture) == 0


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), kind))
    assert [loaded.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def png(width, height, depth, rows):
    """A colour PNG by hand: Pillow writes neither 16-bit colour nor files that lie about their size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_colour_png():
    loaded = load_image(png(2, 1, 16, b"\0" + struct.pack(">6H", 0, 65535, 32768, 257, 0, 65535)))
    assert [loaded.getpixel((x, 0)) for x in range(2)] == [(0, 255, 128), (1, 0, 255)]


def test_cmyk_jpeg():
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = np.asarray(load_image(encoded(image, "JPEG", quality=95)), int)
    assert np.abs(red - (255, 0, 0)).max() <= 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(picture, kind, orientation):
    upright = {
        1: lambda i: i,
        2: ImageOps.mirror,
        3: lambda i: i.rotate(180),
        4: ImageOps.flip,
        5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
        6: lambda i: i.rotate(-90, expand=True),
        7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
        8: lambda i: i.rotate(90, expand=True),
    }[orientation](picture)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture, kind, exif=exif, quality=95, subsampling=0)
    assert difference(load_image(data), upright) <= (12 if kind == "JPEG" else 0)


def test_damaged_exif_does_not_cost_the_picture(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture, "WEBP", exif=exif, lossless=True)
    assert difference(load_image(data), picture.rotate(-90, expand=True)) == 0
    assert difference(load_image(data.replace(b"MM\0*", b"MM\0!")), picture) == 0


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == (255, 0, 0)


# ---- files that cannot be used


def test_missing_file_names_path_and_reason(tmp_path):
    path = tmp_path / "absent.jpg"
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert caught.value.source == str(path) and "No such file" in caught.value.reason
    assert str(caught.value) == f"{path}: {caught.value.reason}"


def test_directory_and_impossible_path(tmp_path):
    with pytest.raises(ImageError, match="directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="null"):
        load_image("a\0b.png")


@pytest.mark.parametrize("content", [b"", b"some text", b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_not_an_image(content, tmp_path):
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match="text.png: not an image"):
        load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_truncated_file(rng, kind):
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(ImageError, match="damaged|not an image"):
        load_image(data[: len(data) // 2])


def test_random_damage_gives_an_image_or_an_image_error(picture, rng):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(picture, kind, exif=exif) for kind in ("JPEG", "PNG")]
    files.append(encoded(picture.quantize(8), "GIF"))
    outcomes = set()
    for data in files * 60:
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), size=rng.integers(1, 12)):
            damaged[position] = rng.integers(0, 256)
        try:
            outcomes.add(load_image(bytes(damaged)).mode)
        except ImageError:
            outcomes.add("error")
    assert outcomes == {"RGB", "error"}


def test_decompression_bomb_is_refused_before_decoding():
    for side in (11_000, 60_000):  # between Pillow's warning and its own limit, and beyond both
        data = png(side, side, 8, b"\0" * 100)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(ImageError, match="too large"):
                load_image(data)


def test_pixel_limit(picture):
    load_image(picture, max_pixels=WIDTH * HEIGHT)
    with pytest.raises(ImageError, match=f"{WIDTH} x {HEIGHT}"):
        load_image(picture, max_pixels=WIDTH * HEIGHT - 1)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_pixels_have_no_range(dtype):
    with pytest.raises(ImageError, match="32 bits"):
        load_image(encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


def test_empty_image():
    with pytest.raises(ImageError, match="empty"):
        load_image(Image.new("RGB", (0, 4)))


# ---- pixels


@pytest.mark.parametrize("size", [(640, 480), (3, 200), (1, 1), (48, 48)])
def test_pixels_are_those_of_the_transformers_processor(rng, size):
    from transformers import BlipImageProcessorPil

    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    processor = BlipImageProcessorPil(size={"height": 48, "width": 48})
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    ours = ImageTransform.squash(48)(image)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert torch.equal(ours, theirs)


def test_pixel_values_of_plain_colours():
    pixels = ImageTransform.squash(32)(Image.new("RGB", (7, 5), (255, 0, 128)))
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = [(value / 255 - m) / s for value, m, s in zip((255, 0, 128), mean, std)]
    expected = torch.tensor(expected).view(3, 1, 1).expand(3, 32, 32)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


# ---- text


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("The LEFT image.", "the left image"),
        ('a.b!c"d(e)f*g#h:i;j~k', "a b c d e f g h i j k"),
        ("two   dogs, and  a\n\ncat", "two dogs, and a cat"),
        ("  ends trimmed \n", "ends trimmed"),
        ("dog's half-open? 50% [x]", "dog's half-open? 50% [x]"),
        ("wait... what", "wait what"),
        ("keeps\tone tab", "keeps\tone tab"),
    ],
)
def test_sentence_cleaning(text, cleaned):
    assert clean_sentence(text) == cleaned


def test_sentence_is_cut_to_40_words():
    assert clean_sentence(" ".join("word" for _ in range(55))).split() == ["word"] * 40
    assert clean_sentence(" ".join("word" for _ in range(55)), max_words=30).split() == ["word"] * 30


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("What is this? ", "what is this?"),
        ('a.b!c"d(e)f*g#h:i;j~k', "abcdefghijk"),
        ("two  spaces stay", "two  spaces stay"),
        (" leading space stays", " leading space stays"),
    ],
)
def test_question_cleaning(text, cleaned):
    assert clean_question(text) == cleaned


def test_question_is_cut_to_50_words():
    assert len(clean_question("word " * 60).split()) == 50


@pytest.mark.parametrize("clean", [clean_sentence, clean_question])
@pytest.mark.parametrize("text", ["", "   ", "\n", "...!", "\t \n"])
def test_empty_text(clean, text):
    with pytest.raises(TextError, match="empty"):
        clean(text)


# ---- tokenizer


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A directory with a vocab.txt as large as BERT's, in which a few words have the ids they have there."""
    words = [f"[unused{i}]" for i in range(30522)]
    for index, word in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1996: "the",
        2048: "two",
        6077: "dogs",
        2187: "left",
        3746: "image",
        2015: "##s",
        3899: "dog",
        1010: ",",
    }.items():
        words[index] = word
    directory = tmp_path_factory.mktemp("bert")
    (directory / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return directory


def test_dec_and_enc_are_the_last_two_ids(vocabulary):
    for source in (vocabulary, str(vocabulary / "vocab.txt")):
        tokenizer = load_tokenizer(source)
        assert len(tokenizer) == 30524
        assert tokenizer.bos_token_id == 30522 and tokenizer.convert_tokens_to_ids("[ENC]") == 30523


def test_saved_tokenizer_is_not_extended_twice(vocabulary, tmp_path):
    load_tokenizer(vocabulary).save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)) == 30524


def test_text_starts_with_enc(vocabulary):
    ids = NLVRProcessor(tokenizer=vocabulary).text("The two dogs, (left image)!")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [30523, 1996, 2048, 6077, 1010, 2187, 3746, 102]


def test_special_tokens_in_a_text_are_plain_text(vocabulary):
    ids = NLVRProcessor(tokenizer=vocabulary).text("the [SEP] dogs [ENC]")
    assert ids.tolist().count(102) == 1 and ids.tolist().count(30523) == 1


def test_nlvr_text_is_cut_to_40_words_and_otherwise_not_truncated(vocabulary):
    assert len(NLVRProcessor(tokenizer=vocabulary).text("dog " * 60)) == 42


def test_text_longer_than_the_model_takes(vocabulary):
    """The end is left out, and one can ask whether it was."""
    processor = NLVRProcessor(tokenizer=vocabulary, max_tokens=11)
    ids = processor.text("dog " * 10)
    assert len(ids) == 11 and torch.equal(ids, processor.text("dog " * 9))
    assert processor.cuts("dog " * 10) and not processor.cuts("dog " * 9)
    processor = NLVRProcessor(tokenizer=vocabulary)
    assert processor.cuts("dog " * 41) and not processor.cuts("dog " * 40) and not processor.cuts("dog " * 40 + "...")


@pytest.mark.parametrize("text, reason", [("", "empty"), (" !! ", "empty"), (None, "string"), (3, "string")])
def test_bad_text(vocabulary, text, reason):
    with pytest.raises(TextError, match=reason):
        NLVRProcessor(tokenizer=vocabulary).text(text)


def test_demo_vocabulary_spells_any_english_text():
    processor = NLVRProcessor(vocab_size=200, max_tokens=64, tokenizer="demo")
    tokenizer = processor.tokenizer
    assert len(tokenizer) == 200
    ids = processor.text("Quizzical zebras, 42 of them, jumped over the left house's fence?").tolist()
    assert tokenizer.unk_token_id not in ids
    spelled = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
    assert spelled.startswith("quizzicalzebras,42ofthem")


def test_demo_vocabulary_serves_a_larger_model_with_random_weights():
    assert NLVRProcessor(vocab_size=30524, tokenizer="demo").text("two dogs").max() < 200


def test_tokenizer_of_another_model_is_refused(vocabulary):
    with pytest.raises(ValueError, match="30524 entries.*made for 200,"):
        _ = NLVRProcessor(vocab_size=200, tokenizer=vocabulary).tokenizer
    with pytest.raises(ValueError, match="made for 40000"):
        _ = NLVRProcessor(vocab_size=40000, tokenizer=vocabulary).tokenizer


def test_directory_without_a_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="no vocabulary"):
        load_tokenizer(tmp_path)


def test_unavailable_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "absent")


# ---- batches


def test_collate_puts_left_images_first(rng):
    processor = NLVRProcessor(image_size=16, vocab_size=200, max_tokens=64, tokenizer="demo")
    colours = rng.integers(0, 256, (3, 2, 3))
    pairs = [[Image.new("RGB", (9, 5), tuple(int(v) for v in colour)) for colour in pair] for pair in colours]
    texts = ["one", "two dogs", "three"]
    pixels, ids = processor.collate([processor(*pair, text) for pair, text in zip(pairs, texts)])
    assert pixels.shape == (6, 3, 16, 16) and pixels.is_contiguous()
    for b, (left, right) in enumerate(pairs):
        assert torch.equal(pixels[b], ImageTransform.squash(16)(left))
        assert torch.equal(pixels[3 + b], ImageTransform.squash(16)(right))
    assert [i.tolist() for i in ids] == [processor.text(text).tolist() for text in texts]


# ---- words


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    entries = "[PAD] [UNK] [CLS] [SEP] [MASK] ' - . , ? ! don t know it s o clock 5 yes i m they re ve we isn can not do no".split()
    folder = tmp_path_factory.mktemp("words")
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    return TASKS["vqa"].Processor(32, len(entries) + 2, 40, folder)


@pytest.mark.parametrize(
    "text, written",
    [
        ("don't know", "don't know"),
        ("it's", "it's"),
        ("5 o'clock", "5 o'clock"),
        ("i'm", "i'm"),
        ("they're", "they're"),
        ("we've", "we've"),
        ("isn't it?", "isn't it?"),
        ("yes, they know.", "yes, they know."),
        ("no! not 5 . . .", "no! not 5..."),
        ("o - clock", "o - clock"),  # hyphens stay apart, as in transformers 4.15
        ("'yes'", "' yes '"),  # and so does what no rule of theirs covers
        ("can not", "can not"),
    ],
)
def test_written_words_are_joined_as_bert_of_transformers_4_15_joins_them(text, written, words):
    assert words.decode(words.answer(text)[1:-1]) == written


def test_joined_words_score_as_in_the_official_evaluation(words):
    for answer in ("don't know", "it's", "5 o'clock"):
        assert vqa_score(words.decode(words.answer(answer)[1:-1]), [answer] * 8 + ["yes"] * 2) == 1


def test_truncation_is_the_tokenizers(vocabulary):
    processor = TASKS["vqa"].Processor(tokenizer=vocabulary)
    for count in (1, 32, 33, 34, 35, 50):
        ids = processor.text("dog " * count)
        theirs = processor.tokenizer("dog " * count, truncation=True, max_length=35)["input_ids"]
        assert ids[1:].tolist() == theirs[1:] and len(ids) == min(count + 2, 35)


# ---- where tokenizers come from


def test_tokenizers_that_cannot_be_had_are_refused_at_once(monkeypatch, tmp_path):
    """Without a network, or with a typing error; transformers would try for minutes."""
    import huggingface_hub

    tries = []

    def snapshot_download(name, **_):
        tries.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for load, name in ((load_tokenizer, "bert-base-uncased"), (load_clip_tokenizer, "openai/clip-vit-large-patch14")):
        with pytest.raises(ValueError, match=f"tokenizer '{name}' cannot be loaded.*not known; give a directory"):
            load(name)
    assert tries == ["bert-base-uncased", "openai/clip-vit-large-patch14"]  # once each
    for missing in (tmp_path / "vocab.txt", "models/blip/tokeniser/", "./vocab.txt", "a/b/c"):
        for load in (load_tokenizer, load_clip_tokenizer):
            with pytest.raises(ValueError, match="cannot be loaded: no such file or directory"):
                load(missing)
    assert len(tries) == 2


def test_tokenizers_of_the_hub_are_read_from_what_was_downloaded(monkeypatch, vocabulary):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(vocabulary))
    assert len(load_tokenizer("bert-base-uncased")) == 30524


def test_the_tokenizer_beside_a_weights_file(tmp_path):
    from test_checkpoints import SIZES

    import madtp

    model = madtp.load("random:base", config=SIZES)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert madtp.load(tmp_path / "weights.pth").processor._source == "bert-base-uncased"
    tokenizer = load_tokenizer("demo")
    tokenizer.save_pretrained(tmp_path)
    statement = "two dogs"
    expected = model.processor.text(statement)
    assert torch.equal(madtp.load(tmp_path / "weights.pth").processor.text(statement), expected)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer.json").unlink()
    assert torch.equal(madtp.load(tmp_path / "weights.pth").processor.text(statement), expected)


def test_the_first_texts_may_come_from_several_threads(monkeypatch):
    loaded, load = [], processing.load_tokenizer
    monkeypatch.setattr(
        processing, "load_tokenizer", lambda source: (time.sleep(0.1), loaded.append(source), load(source))[-1]
    )
    processor = TASKS["vqa"].Processor(32, 200, 40, "demo")
    texts = [f"what is {number}?" * (number % 9 + 1) for number in range(64)]
    with ThreadPoolExecutor(8) as pool:
        questions, answers = list(pool.map(processor.text, texts)), list(pool.map(processor.answer, ["yes", "no"] * 32))
    assert loaded == ["demo"]
    assert all(torch.equal(ids, processor.text(text)) for ids, text in zip(questions, texts))
    assert all(torch.equal(ids, answers[number % 2]) for number, ids in enumerate(answers))


# ---- memory


def test_pictures_in_flight_are_bounded_in_pixels(monkeypatch):
    """However many threads prepare them: two of 60 pixels do not fit into 100, and one of 1000 goes alone."""
    monkeypatch.setattr(pictures, "_in_flight", pictures._InFlight(100))
    now, most, lock, seen = [0], [0], threading.Lock(), []

    def transform(image):
        with lock:
            now[0] += image.width * image.height
            most[0] = max(most[0], now[0])
            seen.append((image.size, now[0]))
        time.sleep(0.01)
        with lock:
            now[0] -= image.width * image.height
        return torch.zeros(3, 32, 32)

    processor = TASKS["caption"].Processor(32, 200, 40, "demo")
    processor.transform = transform
    sizes = [(6, 10), (5, 5), (5, 5), (25, 40), (6, 10), (5, 5), (3, 3)] * 4
    files = [encoded(Image.new("RGB", size), "PNG") for size in sizes]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(processor.image, files))
    assert len(seen) == len(sizes) and all(held == 1000 for size, held in seen if size == (25, 40))
    assert max(held for size, held in seen if size != (25, 40)) <= 100
    with pytest.raises(ImageError):
        processor.image(b"no picture")
    assert pictures._in_flight._now == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_large_pictures_are_worked_on_in_strips(mode, rng, monkeypatch):
    """What needs several copies of a picture needs them of a strip at a time; nothing shows."""
    values = rng.integers(0, 256, (37, 29, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA")
    if mode == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 256 + values[..., 1])
    elif mode == "P":
        image = image.quantize(200)
    else:
        image = image.convert(mode)
    data = encoded(image, "PNG")
    whole = load_image(data)
    monkeypatch.setattr(pictures, "_STRIP", 64)
    assert np.array_equal(np.asarray(load_image(data)), np.asarray(whole))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_regular_file_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match=r"pipe\.png"):
        load_image(tmp_path / "pipe.png")
    with pytest.raises(ImageError):
        load_image("/dev/zero")
