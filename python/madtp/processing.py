"""From pictures and sentences to what a model takes in: pixel tensors and token ids.

What can be wrong with a text is found here and reported as TextError; pictures are read in `pictures`. Models, batching of
whole runs and result files live elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import string
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from . import hub
from .image_transform import ImageTransform
from .pictures import ImageError, opened

_TOKENIZER_FILES = tuple(
    "tokenizer.json vocab.txt vocab.json merges.txt spiece.model tokenizer.model tokenizer_config.json special_tokens_map.json "
    "added_tokens.json".split()
)
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = re.compile(r'[.!"()*#:;~]')
_DEMO_VOCABULARY = Path(__file__).parent / "data" / "demo" / "vocab.txt"
_loading = threading.Lock()


def _after_fork() -> None:
    """In a process of its own: a lock that another thread held when it was forked would never be given back."""
    global _loading
    _loading = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class TextError(ValueError):
    """A text that a model cannot be given."""


def clean_sentence(text: str, max_words: int = 40) -> str:
    """A caption or statement as BLIP's data code prepares it: lower case, ``.!"()*#:;~`` become spaces, runs of white space
    one space, ends trimmed, at most ``max_words`` words (30 for captions, 40 for NLVR).

    Raises:
        TextError: nothing is left.
    """
    text = _PUNCTUATION.sub(" ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """A question as BLIP's VQA data code prepares it: lower case, ``.!"()*#:;~`` deleted, trailing spaces trimmed, at most
    ``max_words`` words.

    Raises:
        TextError: nothing is left.
    """
    return _first_words(_PUNCTUATION.sub("", text.lower()).rstrip(" "), max_words)


def _first_words(text: str, max_words: int) -> str:
    if not text.strip():
        raise TextError("text is empty, or is nothing but punctuation")
    return " ".join(text.split(" ")[:max_words])


def load_tokenizer(source: str | os.PathLike):
    """BERT WordPiece tokenizer with BLIP's two extra tokens, [DEC] (beginning of sentence) and [ENC], as the last two.

    Args:
        source: a directory (vocab.txt or tokenizer.json), a vocab.txt file, a Hugging Face hub id such as "bert-base-uncased",
            or "demo": a bundled vocabulary of 200 entries that spells English text letter by letter where it lacks a word.

    Raises:
        ValueError: there is no vocabulary.
    """
    from transformers import BertTokenizer

    def load(path: Path):
        return BertTokenizer(vocab=str(path)) if path.is_file() else BertTokenizer.from_pretrained(path)

    tokenizer = _loaded(load, source, 5, "a vocab.txt or tokenizer.json")
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def load_clip_tokenizer(source: str | os.PathLike):
    """CLIP's byte-pair tokenizer.

    Args:
        source: a directory (vocab.json and merges.txt, or tokenizer.json), a Hugging Face hub id such as
            "openai/clip-vit-large-patch14", or "demo": CLIP's vocabulary without any merges, which spells texts byte by byte.

    Raises:
        ValueError: there is no vocabulary.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    if source == "demo":
        letters = sorted(ByteLevel.alphabet())
        entries = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
        return CLIPTokenizer(vocab={entry: number for number, entry in enumerate(entries)}, merges=[])
    return _loaded(CLIPTokenizer.from_pretrained, source, 3, "vocab.json and merges.txt or tokenizer.json")


def load_padded_tokenizer(source: str | os.PathLike):
    """The tokenizer of a model whose texts are padded, SigLIP's or SigLIP 2's: whatever class its files name.

    Raises:
        ValueError: it cannot be loaded; SigLIP's needs the package sentencepiece.
    """
    from transformers import AutoTokenizer

    return _loaded(AutoTokenizer.from_pretrained, source)


def _loaded(load: Callable[[Path], Any], source: str | os.PathLike, special: int = 0, files: str = ""):
    """The tokenizer that ``load`` reads, which has more entries than ``special``; ``files`` are what it may be in."""
    path = _vocabulary(source)
    try:
        tokenizer = load(path)
    except Exception as error:  # file and format errors of several libraries, and packages that are not installed
        raise ValueError(f"tokenizer {str(source)!r} cannot be loaded: {error}") from error
    if len(tokenizer) <= special:  # transformers makes up a vocabulary of special tokens where it finds no file
        raise ValueError(f"tokenizer {str(source)!r}: no vocabulary found; give a directory with {files}")
    return tokenizer


def _vocabulary(source: str | os.PathLike) -> Path:
    """The file or directory of a tokenizer that is a path or a hub id; transformers, given an id, tries again for minutes."""
    path = _DEMO_VOCABULARY if source == "demo" else Path(source)
    if path.exists():
        return path
    if not isinstance(source, str) or not hub.is_id(source):
        raise ValueError(f"tokenizer {str(source)!r} cannot be loaded: no such file or directory")
    try:
        return hub.download(source, _TOKENIZER_FILES)
    except ValueError as error:
        raise ValueError(f"tokenizer {source!r} cannot be loaded: {error}; give a directory that holds one") from error


# Word pieces come with a space before these (and after a lone apostrophe) that English does not have.
_JOINED = (".", "?", "!", ",", "' ", "n't", "'m", "'s", "'ve", "'re")


def _joined(text: str) -> str:
    """As transformers 4.15, which BLIP's evaluation runs on, cleans up what it has decoded; newer ones do not."""
    for piece in _JOINED:
        text = text.replace(f" {piece}", piece.strip())
    return text


def _rules(tokenizer) -> dict:
    """Vocabulary and rules of a tokenizer, without the state that calls leave in it."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return {"vocabulary": tokenizer.get_vocab()}
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: value for name, value in rules.items() if name not in ("truncation", "padding")}


class Processor:
    """Turns pictures and sentences into a BLIP model's inputs.

    Args:
        image_size: side of the square of pixels.
        vocab_size, max_tokens: the model's word embedding rows and positions.
        tokenizer: anything :func:`load_tokenizer` takes, or a tokenizer object; it is loaded when first used, by one thread.
        transform: how pictures become pixels; by default they are squashed, as BLIP's and MADTP's are.

    Raises:
        ValueError: a transform to another size.
    """

    default_tokenizer = "bert-base-uncased"

    def __init__(
        self,
        image_size: int = 384,
        vocab_size: int = 30524,
        max_tokens: int = 512,
        tokenizer="bert-base-uncased",
        transform: ImageTransform | None = None,
    ):
        self.image_size, self.vocab_size, self.max_tokens = image_size, vocab_size, max_tokens
        self.transform = transform or (image_size and ImageTransform.squash(image_size))
        if self.transform is not None:
            self._check(self.transform.output)
        self._source, self._tokenizer = tokenizer, None

    def _check(self, made: tuple[int, int] | None) -> None:
        """Raise ValueError unless the model takes the pixels that the transform makes; None: they are of any size."""
        size = self.image_size
        if made != (size, size):
            shown = "pixels of any size" if made is None else "{} x {} pixels".format(*made)
            raise ValueError(f"transform: makes {shown}, but the model takes {size} x {size}")

    @classmethod
    def of(cls, config, tokenizer=None, transform: ImageTransform | None = None):
        """The processor of a model with this configuration; without a tokenizer, with the one that is usual."""
        sizes = config.vision.image_size, config.text.vocab_size, config.text.max_position_embeddings
        return cls(*sizes, tokenizer or cls.default_tokenizer, transform)

    @property
    def tokenizer(self):
        """The tokenizer; loading it raises ValueError if its vocabulary is not the model's."""
        if self._tokenizer is None:
            with _loading:  # several threads may prepare the first texts
                if self._tokenizer is None:
                    tokenizer = self._load()
                    tokenizer("a")  # undoes what a saved one remembers of truncation and padding
                    self._tokenizer = tokenizer
        return self._tokenizer

    def _load(self):
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
        return tokenizer

    def facts(self, texts: bool = True) -> dict:
        """What decides pixels and, unless ``texts`` is false, token ids, as JSON values (see `madtp.fingerprint`)."""
        return {
            "kind": type(self).__name__,
            "pixels": self.transform and self.transform.settings(),
            "max_tokens": self.max_tokens,
            "tokenizer": _rules(self.tokenizer) if texts else None,
        }

    def image(self, source) -> torch.Tensor:
        """Pixels of a picture, float32 [3, image_size, image_size]; sources and errors as in `load_image`, and ImageError
        for one so narrow that it cannot be resized in proportion."""
        with opened(source) as (image, name):
            try:
                return self.transform(image)
            except ValueError as error:
                raise ImageError(name, str(error)) from error

    def view(self, image: Image.Image) -> Image.Image:
        """The part of a picture that the model sees, as its pixels show it, in the picture's own size."""
        box = self.transform.box(*image.size)
        return image if box == (0, 0, *image.size) else image.crop(box)

    def _ids(self, text: str, clean, first: str, truncate: int | None = None) -> torch.Tensor:
        """Token ids int64 [L]: ``first``, word pieces, [SEP]; at most ``truncate`` of them. Raises TextError if the text is not
        a string, is empty or does not fit the model."""
        if not isinstance(text, str):
            raise TextError(f"text must be a string, got {type(text).__name__}")
        tokenizer = self.tokenizer
        ids = torch.tensor(tokenizer(clean(text), verbose=False)["input_ids"], dtype=torch.int64)
        if truncate is not None and len(ids) > truncate:
            # Not by the tokenizer: threads that ask it for different lengths disturb each other.
            ids = torch.cat([ids[: truncate - 1], ids[-1:]])
        if len(ids) > self.max_tokens:
            raise TextError(f"text has {len(ids)} tokens, the model takes at most {self.max_tokens}")
        ids[0] = tokenizer.convert_tokens_to_ids(first)
        return ids

    _clean = staticmethod(clean_sentence)

    def cuts(self, text: str) -> bool:
        """Whether `text` leaves out the end of a text, because the model reads no more words, or tokens."""
        whole = self.tokenizer(self._clean(text, sys.maxsize), verbose=False)["input_ids"]
        return len(whole) > len(self.text(text))

    def decode(self, ids: torch.Tensor) -> str:
        """The words of token ids [L], special tokens left out, without the spaces that word pieces bring about."""
        return _joined(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()


class CLIPProcessor(Processor):
    """Images and texts for CLIP and its kin, each on its own.

    By default images are resized to a square like BLIP's, as MADTP's CLIP does; a model from elsewhere brings its own
    ``transform`` (the original CLIP's is ``ImageTransform.centre``). Texts of CLIP are not cleaned; for MADTP's results on
    captions use :func:`clean_sentence` first.

    Args:
        image_size, vocab_size, max_tokens, transform: as of :class:`Processor`.
        tokenizer: anything :func:`load_clip_tokenizer` takes, or a tokenizer object; for texts that are padded, anything that
            transformers' AutoTokenizer takes.
        padded: texts are filled up to ``max_tokens``, as SigLIP's were in training.
        clean: what is done to texts first ("", "lower", "canonicalize").
        patch: pictures may be of any size in multiples of this.
    """

    default_tokenizer = "openai/clip-vit-large-patch14"

    def __init__(
        self,
        image_size: int | None = 336,
        vocab_size: int | None = 49408,
        max_tokens: int = 77,
        tokenizer="openai/clip-vit-large-patch14",
        transform: ImageTransform | None = None,
        *,
        padded: bool = False,
        clean: str = "",
        patch: int | None = None,
    ):
        self.padded, self.clean, self.patch = padded, clean, patch
        super().__init__(image_size, vocab_size, max_tokens, tokenizer, transform)

    def _check(self, made: tuple[int, int] | None) -> None:
        if self.patch is None:
            super()._check(made)
        elif made is None and self.transform.patch is None:
            raise ValueError(f"transform: makes pixels of any size, but the model takes multiples of {self.patch}")
        elif self.transform.patch not in (None, self.patch) or (made or (0,))[0] % self.patch:
            shown = made or f"patches of {self.transform.patch}"
            raise ValueError(f"transform: makes {shown}, but the model takes patches of {self.patch}")

    @classmethod
    def of(cls, config, tokenizer=None, transform: ImageTransform | None = None):
        vision, text = config.vision, config.text
        padded = text is not None and text.padded
        return cls(
            vision and vision.image_size,
            text and text.vocab_size,
            text.max_position_embeddings if text else 0,
            tokenizer or (None if padded else cls.default_tokenizer),
            transform,
            padded=padded,
            clean=text.clean if text else "",
            patch=vision.patch_size if vision and vision.positions != "fixed" else None,
        )

    def facts(self, texts: bool = True) -> dict:
        """As :meth:`Processor.facts`, with what is done to texts where anything is."""
        facts = super().facts(texts and self.vocab_size is not None)
        return facts | ({"padded": self.padded, "clean": self.clean} if self.padded or self.clean else {})

    def image(self, source) -> torch.Tensor:
        """Pixels of a picture, float32 [3, height, width]; sources and errors as in :meth:`Processor.image`."""
        if self.image_size is None:
            raise ImageError(str(source)[:80], "the model has a text tower only")
        return super().image(source)

    def _load(self):
        if self.vocab_size is None:
            raise ValueError("tokenizer: the model has an image tower only")
        if self._source is None:
            raise ValueError("tokenizer: none lies with the model; give its directory or hub id")
        named = isinstance(self._source, (str, os.PathLike))
        load = load_padded_tokenizer if self.padded and self._source != "demo" else load_clip_tokenizer
        tokenizer = load(self._source) if named else self._source
        size = len(tokenizer)
        # The bundled vocabulary may serve a larger model: one with random weights, which knows no words.
        if size != self.vocab_size and (self._source != "demo" or size > self.vocab_size):
            raise ValueError(
                f"tokenizer {str(self._source)!r}: {size} entries, but the model is made for {self.vocab_size}"
            )
        if self.padded and tokenizer.pad_token_id is None:
            raise ValueError(
                f"tokenizer {str(self._source)!r}: it has no token for padding, which the model was trained with"
            )
        return tokenizer

    def _clean(self, text: str, max_words: int) -> str:
        if self.clean == "canonicalize":
            text = " ".join(text.replace("_", " ").translate(_NO_PUNCTUATION).split())
        return text.lower() if self.clean else text

    def text(self, text: str) -> torch.Tensor:
        """Token ids int64 [L] of a text: start, as many word pieces as the model has positions for, end; then padding up to
        the last position where the model was trained so. Raises TextError if the text is not a string or spells out a start
        or end token."""
        if self.vocab_size is None:
            raise TextError("the model has an image tower only")
        if not isinstance(text, str):
            raise TextError(f"text must be a string, got {type(text).__name__}")
        tokenizer = self.tokenizer
        ids = tokenizer(self._clean(text, sys.maxsize), verbose=False)["input_ids"]
        if len(ids) > self.max_tokens:  # not by the tokenizer, see above
            ends = ids[-1] in tokenizer.all_special_ids
            ids = [*ids[: self.max_tokens - ends], *ids[len(ids) - ends :]]
        if self.padded:
            padding = [tokenizer.pad_token_id] * (self.max_tokens - len(ids))
            ids = padding + ids if tokenizer.padding_side == "left" else ids + padding
        elif {tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids[1:-1]):
            raise TextError(
                f"text contains {tokenizer.bos_token} or {tokenizer.eos_token}, or a piece not in the vocabulary"
            )
        return torch.tensor(ids, dtype=torch.int64)
