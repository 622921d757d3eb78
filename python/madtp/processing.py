"""From image files and sentences to what a BLIP model takes in: pixel tensors and token ids.

Everything that can be wrong with a file or a text is found here and reported as ImageError or TextError.
Models, batching of whole runs and result files live elsewhere.
"""

from __future__ import annotations

import io
import json
import os
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .files import open_regular

MAX_PIXELS = 120_000_000
"""Largest picture that is decoded (width x height); the biggest phone cameras in use have 108 megapixels."""

# Raster formats only: Pillow hands some others (EPS) to external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")

# CLIP's statistics, in the [0, 1] range, which BLIP uses too.
_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), dtype=np.float32)
_STD = np.array((0.26862954, 0.26130258, 0.27577711), dtype=np.float32)

# EXIF orientation -> what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_opening = threading.Lock()

_PUNCTUATION = re.compile(r'[.!"()*#:;~]')
_DEMO_VOCABULARY = Path(__file__).parent / "data" / "demo" / "vocab.txt"


class ImageError(ValueError):
    """A picture that cannot be used. `source` names it, `reason` says why."""

    def __init__(self, source: str, reason: str):
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class TextError(ValueError):
    """A text that a model cannot be given."""


def load_image(source: str | os.PathLike | bytes | Image.Image, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as a person would see it, as an 8-bit RGB PIL image.

    `source` is a path, the bytes of a file, or a PIL image. The EXIF orientation is applied; transparent
    parts are laid over white, as an image viewer or a web page does (dropping alpha would reveal whatever
    colour is stored beneath); 16-bit grey is scaled to 8 bits; palette, grey, CMYK become RGB; of an
    animation the first frame is taken.

    Raises ImageError, naming the source, if it is missing, unreadable, not an image, damaged, truncated,
    larger than `max_pixels`, or of a kind without a defined range of values (32-bit integer or float).
    """
    if isinstance(source, Image.Image):
        return _as_rgb(source, "PIL image", max_pixels)
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), f"image of {len(source)} bytes", max_pixels)
    try:
        file = open_regular(source)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(str(source), getattr(error, "strerror", None) or str(error)) from error
    with file:
        return _decode(file, str(source), max_pixels)


def _decode(file, name: str, max_pixels: int) -> Image.Image:
    try:
        # Pillow's own size limit only warns; ours, below, raises. The lock is there because warning filters
        # are global.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()  # registers all formats that this build of Pillow can read
            image = Image.open(file, formats=[kind for kind in _FORMATS if kind in Image.OPEN])
    except Image.DecompressionBombError as error:
        raise ImageError(name, f"too large: more than {max_pixels} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError(name, "not an image in a known format") from error
    except Exception as error:  # Pillow's readers raise many kinds of error on malformed data
        raise ImageError(name, f"damaged image ({error})") from error
    with image:
        return _as_rgb(image, name, max_pixels)


def _as_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(name, f"too large: {width} x {height} pixels, at most {max_pixels} are accepted")
    if width * height == 0:
        raise ImageError(name, f"empty: {width} x {height} pixels")
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ImageError(name, "pixels of 32 bits have no defined range of values; convert to 8 or 16 bits")
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
        if image.mode.startswith("I"):
            grey = np.asarray(image).astype(np.float32) / 257  # 65535 becomes 255
            return Image.fromarray(np.rint(grey).clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(name, f"damaged image ({error})") from error


def _orientation(image: Image.Image):
    try:
        return image.getexif().get(0x0112)
    except Exception:  # damaged metadata does not make the picture itself unusable
        return None


def to_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """Pixel tensor of an RGB image: float32 [3, size, size].

    Bicubic (antialiased) resize to exactly size x size, the aspect ratio is not kept; then [0, 1] and CLIP's
    mean and standard deviation, as BLIP's evaluation does.
    """
    # Bit-identical to transformers' BlipImageProcessorPil, which however converts the full-size picture to an
    # array and back before it resizes: 9 times slower on a 12-megapixel photo.
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    normalised = (resized / np.float32(255) - _MEAN) / _STD
    return torch.from_numpy(normalised.transpose(2, 0, 1).copy())


def clean_sentence(text: str, max_words: int = 40) -> str:
    """A caption or statement as BLIP's data code prepares it: lower case, `.!"()*#:;~` become spaces, runs of
    white space one space, ends trimmed, at most `max_words` words (30 for captions, 40 for NLVR). Raises
    TextError if nothing is left.
    """
    text = _PUNCTUATION.sub(" ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """A question as BLIP's VQA data code prepares it: lower case, `.!"()*#:;~` deleted, trailing spaces
    trimmed, at most `max_words` words. Raises TextError if nothing is left.
    """
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    if not text.strip():
        raise TextError("text is empty, or is nothing but punctuation")
    return " ".join(text.split(" ")[:max_words])


def load_tokenizer(source: str | os.PathLike):
    """BERT WordPiece tokenizer with BLIP's two extra tokens, [DEC] (beginning of sentence) and [ENC], as the
    last two.

    `source` is a directory (vocab.txt or tokenizer.json), a vocab.txt file, a Hugging Face hub id such as
    "bert-base-uncased", or "demo": a bundled vocabulary of 200 entries that spells English text letter by
    letter where it lacks a word. Raises ValueError if there is no vocabulary.
    """
    from transformers import BertTokenizer

    path = _DEMO_VOCABULARY if source == "demo" else Path(source)
    try:
        if path.is_file():
            tokenizer = BertTokenizer(vocab=str(path))
        else:
            tokenizer = BertTokenizer.from_pretrained(str(source))
    except Exception as error:  # hub, file and format errors of several libraries
        raise ValueError(f"tokenizer {str(source)!r} cannot be loaded: {error}") from error
    if len(tokenizer) <= 5:  # transformers makes up a vocabulary of special tokens where it finds no file
        raise ValueError(
            f"tokenizer {str(source)!r}: no vocabulary found; give a directory with a vocab.txt or "
            "tokenizer.json, or a hub id that can be downloaded"
        )
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def load_clip_tokenizer(source: str | os.PathLike):
    """CLIP's byte-pair tokenizer.

    `source` is a directory (vocab.json and merges.txt, or tokenizer.json), a Hugging Face hub id such as
    "openai/clip-vit-large-patch14", or "demo": CLIP's vocabulary without any merges, which spells texts byte by
    byte. Raises ValueError if there is no vocabulary.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    if source == "demo":
        letters = sorted(ByteLevel.alphabet())
        entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        return CLIPTokenizer(vocab={entry: number for number, entry in enumerate(entries)}, merges=[])
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(source))
    except Exception as error:  # hub, file and format errors of several libraries
        raise ValueError(f"tokenizer {str(source)!r} cannot be loaded: {error}") from error
    if len(tokenizer) <= 3:  # transformers makes up a vocabulary of special tokens where it finds no file
        raise ValueError(
            f"tokenizer {str(source)!r}: no vocabulary found; give a directory with vocab.json and merges.txt or "
            "tokenizer.json, or a hub id that can be downloaded"
        )
    return tokenizer


def _rules(tokenizer) -> dict:
    """Vocabulary and rules of a tokenizer, without the state that calls leave in it."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return {"vocabulary": tokenizer.get_vocab()}
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in rules.items() if name not in ("truncation", "padding")}


class Processor:
    """Turns pictures and sentences into a BLIP model's inputs.

    image_size: side of the square the pictures are resized to. vocab_size and max_tokens: the model's word
    embedding rows and positions. tokenizer: anything `load_tokenizer` takes, or a tokenizer object; it is
    loaded when first used.
    """

    default_tokenizer = "bert-base-uncased"

    def __init__(
        self,
        image_size: int = 384,
        vocab_size: int = 30524,
        max_tokens: int = 512,
        tokenizer="bert-base-uncased",
    ):
        self.image_size, self.vocab_size, self.max_tokens = image_size, vocab_size, max_tokens
        self._source, self._tokenizer = tokenizer, None

    @property
    def tokenizer(self):
        """The tokenizer; loading it raises ValueError if its vocabulary is not the model's."""
        if self._tokenizer is None:
            named = isinstance(self._source, (str, os.PathLike))
            tokenizer = load_tokenizer(self._source) if named else self._source
            size, added = len(tokenizer), tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
            # The bundled vocabulary may serve a larger model: one with random weights, which knows no words.
            fits = size == self.vocab_size or (self._source == "demo" and size < self.vocab_size)
            if not fits or added != [size - 2, size - 1]:
                raise ValueError(
                    f"tokenizer {str(self._source)!r}: {size} entries with [DEC] and [ENC], but the model is "
                    f"made for {self.vocab_size}, of which the last two are [DEC] and [ENC]"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def facts(self, texts: bool = True) -> dict:
        """What decides pixels and, unless ``texts`` is false, token ids, as JSON values (see `madtp.fingerprint`)."""
        return {
            "kind": type(self).__name__,
            "image_size": self.image_size,
            "max_tokens": self.max_tokens,
            "tokenizer": _rules(self.tokenizer) if texts else None,
        }

    def image(self, source) -> torch.Tensor:
        """Pixels of a picture, float32 [3, image_size, image_size]; sources and errors as in `load_image`."""
        return to_pixels(load_image(source), self.image_size)

    def _ids(self, text: str, clean, first: str, truncate: int | None = None) -> torch.Tensor:
        """Token ids int64 [L]: `first`, word pieces, [SEP]; at most `truncate` of them. Raises TextError if the
        text is not a string, is empty or does not fit the model.
        """
        if not isinstance(text, str):
            raise TextError(f"text must be a string, got {type(text).__name__}")
        tokenizer = self.tokenizer
        length = {} if truncate is None else {"truncation": True, "max_length": truncate}
        ids = torch.tensor(tokenizer(clean(text), **length)["input_ids"], dtype=torch.int64)
        if len(ids) > self.max_tokens:
            raise TextError(f"text has {len(ids)} tokens, the model takes at most {self.max_tokens}")
        ids[0] = tokenizer.convert_tokens_to_ids(first)
        return ids

    def decode(self, ids: torch.Tensor) -> str:
        """The words of token ids [L], special tokens left out."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()


class NLVRProcessor(Processor):
    """(left image, right image, sentence) for BLIP-NLVR."""

    def images(self, left, right) -> torch.Tensor:
        """Pixels of a pair, float32 [2, 3, image_size, image_size]; sources as in `load_image`, which see for
        errors."""
        return torch.stack([self.image(source) for source in (left, right)])

    def text(self, sentence: str) -> torch.Tensor:
        """Token ids int64 [L] of a sentence: [ENC], word pieces, [SEP]. Nothing is truncated beyond the 40
        words that BLIP's cleaning keeps. Raises TextError if the sentence is not a string, is empty or does
        not fit the model.
        """
        return self._ids(sentence, clean_sentence, "[ENC]")

    def __call__(self, left, right, sentence: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels [2, 3, S, S] float32, ids [L] int64) of one instance. Raises ImageError, TextError."""
        return self.images(left, right), self.text(sentence)

    @staticmethod
    def collate(instances) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Join instances into a batch: pixels [2B, 3, S, S], all left images then all right ones, and B id
        tensors."""
        pixels = torch.stack([pixels for pixels, _ in instances], dim=1)  # [2, B, 3, S, S]
        return pixels.flatten(0, 1), [ids for _, ids in instances]


class VQAProcessor(Processor):
    """(image, question) for BLIP-VQA."""

    def text(self, question: str) -> torch.Tensor:
        """Token ids int64 [L] of a question: [ENC], word pieces, [SEP]; at most 35, as in BLIP. Raises TextError
        if the question is not a string or is empty."""
        return self._ids(question, clean_question, "[ENC]", truncate=min(35, self.max_tokens))

    def answer(self, answer: str) -> torch.Tensor:
        """Token ids int64 [L] of a candidate answer: [DEC], word pieces, [SEP]. Raises TextError if it is not a
        string or is too long."""
        return self._ids(answer, str, "[DEC]")

    def __call__(self, image, question: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels [3, S, S] float32, ids [L] int64) of one instance. Raises ImageError, TextError."""
        return self.image(image), self.text(question)

    @staticmethod
    def collate(instances) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Join instances into a batch: pixels [B, 3, S, S] and B id tensors."""
        return torch.stack([pixels for pixels, _ in instances]), [ids for _, ids in instances]


class CaptionProcessor(Processor):
    """An image for BLIP captioning, and the prompt that its captions begin with."""

    prompt = "a picture of "

    @property
    def prompt_ids(self) -> torch.Tensor:
        """Token ids int64 [P] of the prompt: [DEC] and the words, without [SEP]."""
        return self._ids(self.prompt, str, "[DEC]")[:-1]

    def text(self, caption: str) -> torch.Tensor:
        """Token ids int64 [L] of a caption to learn from, at most 30 words: the prompt, word pieces, [SEP]; at most 40,
        as in BLIP. Raises TextError if the caption is not a string or is empty."""
        return self._ids(
            caption, lambda text: self.prompt + clean_sentence(text, 30), "[DEC]", truncate=min(40, self.max_tokens)
        )

    def __call__(self, image) -> torch.Tensor:
        """Pixels [3, S, S] float32 of one instance. Raises ImageError."""
        return self.image(image)

    @staticmethod
    def collate(instances) -> torch.Tensor:
        """Join instances into a batch: pixels [B, 3, S, S]."""
        return torch.stack(list(instances))


class RetrievalProcessor(Processor):
    """Images and sentences for BLIP retrieval, each on its own."""

    def text(self, sentence: str) -> torch.Tensor:
        """Token ids int64 [L] of a sentence of at most 30 words: [CLS], word pieces, [SEP]; at most 35, as in
        BLIP. Raises TextError if the sentence is not a string or is empty."""
        return self._ids(
            sentence, lambda text: clean_sentence(text, 30), "[CLS]", truncate=min(35, self.max_tokens)
        )


class CLIPProcessor(Processor):
    """Images and texts for CLIP, each on its own.

    Images are resized to a square like BLIP's, as MADTP's CLIP does; the original CLIP resizes the shorter side
    and cuts out the centre. Texts are not cleaned; for MADTP's results on captions use `clean_sentence` first.

    tokenizer: anything `load_clip_tokenizer` takes, or a tokenizer object.
    """

    default_tokenizer = "openai/clip-vit-large-patch14"

    @property
    def tokenizer(self):
        """The tokenizer; loading it raises ValueError if its vocabulary is not the model's."""
        if self._tokenizer is None:
            named = isinstance(self._source, (str, os.PathLike))
            tokenizer = load_clip_tokenizer(self._source) if named else self._source
            size = len(tokenizer)
            # The bundled vocabulary may serve a larger model: one with random weights, which knows no words.
            if size != self.vocab_size and (self._source != "demo" or size > self.vocab_size):
                raise ValueError(
                    f"tokenizer {str(self._source)!r}: {size} entries, but the model is made for {self.vocab_size}"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def text(self, text: str) -> torch.Tensor:
        """Token ids int64 [L] of a text: start, word pieces, end. Nothing is truncated. Raises TextError if the
        text is not a string, does not fit the model, or spells out a start or end token."""
        if not isinstance(text, str):
            raise TextError(f"text must be a string, got {type(text).__name__}")
        tokenizer = self.tokenizer
        ids = tokenizer(text)["input_ids"]
        if len(ids) > self.max_tokens:
            raise TextError(f"text has {len(ids)} tokens, the model takes at most {self.max_tokens}")
        if {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1]):
            raise TextError(f"text contains {tokenizer.bos_token} or {tokenizer.eos_token}, or a piece not in the vocabulary")
        return torch.tensor(ids, dtype=torch.int64)


# One entry per task.
PROCESSORS: dict[str, type] = {
    "nlvr": NLVRProcessor,
    "vqa": VQAProcessor,
    "caption": CaptionProcessor,
    "retrieval": RetrievalProcessor,
    "clip": CLIPProcessor,
}
