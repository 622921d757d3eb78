"""Sizes of the models, one plain dataclass per task, that round-trip through `config.json`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

_MOST = {"depth": 1000, "num_hidden_layers": 1000, "image_size": 10_000, "patch_size": 10_000}
_MOST_OF_ANY = 10_000_000
_FROM_ZERO = ("pad_token_id", "sep_token_id", "eos_token_id", "merge_from", "registers")
# Sizes that are whole multiples of others.
_MULTIPLES = (("image_size", "patch_size"), ("embed_dim", "num_heads"), ("hidden_size", "num_attention_heads"))


def check_temperature(value: float) -> float:
    """The pruning temperature as a float. Beyond the bounds, logits divided by it would leave the range of float32.

    Raises:
        ValueError: not a number, or beyond the bounds.
    """
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (number == 0 or 1e-30 <= number <= 1e30):
        raise ValueError(f"temperature: expected 0, or a number from 1e-30 to 1e30, got {value!r}")
    return number


def check_sizes(config, section: str) -> None:
    """Types, bounds and multiples of what a configuration holds: a damaged file must not build a model without end."""
    for field_ in dataclasses.fields(config):
        name, value, kind = f"{section}{field_.name}", getattr(config, field_.name), field_.type
        if kind == "int" or (kind == "int | None" and value is not None):
            least, most = int(field_.name not in _FROM_ZERO), _MOST.get(field_.name, _MOST_OF_ANY)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise ValueError(f"{name}: expected a whole number from {least} to {most}, got {value!r}")
        elif kind == "float" and (not isinstance(value, (int, float)) or not 0 < value < math.inf):
            raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        elif kind == "bool" and not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
    for name, part in _MULTIPLES:
        whole, unit = getattr(config, name, 0), getattr(config, part, 1)
        if whole % unit:
            raise ValueError(f"{section}{name}: {whole} is not a multiple of {part} {unit}")


def check_choices(config, section: str, **choices: tuple) -> None:
    """Values of a configuration that have to be among a few, by their names."""
    for name, known in choices.items():
        if (value := getattr(config, name)) not in known:
            expected = ", ".join(str(choice) or "''" for choice in known)
            raise ValueError(f"{section}{name}: expected one of {expected}, got {value!r}")


@dataclass(frozen=True)
class VisionConfig:
    """A BLIP vision transformer. The defaults are ViT-B/16 at 384 pixels.

    ViT-L/16 has ``embed_dim=1024, depth=24, num_heads=16`` and needs ``map_func=True``, since its tokens are wider than the
    dictionary's entries. MADTP's release has no such map for BLIP, so no official checkpoint of that size exists; the map is
    the one of MADTP's CLIP.
    """

    image_size: int = 384
    patch_size: int = 16
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    sd_num: int = 100
    """Entries of the cross-modal dictionary."""
    sd_dim: int = 768
    """Width of a dictionary entry."""
    map_func: bool = False
    """Whether a linear map leads from the token width to the dictionary's (`img_query_model.q_map`)."""
    layer_norm_eps: float = 1e-6
    """Of BLIP's LayerNorms: 1e-6 in the original code, 1e-5 in transformers. CLIP's is 1e-5 everywhere."""

    def __post_init__(self) -> None:
        check_sizes(self, "vision.")
        if not self.map_func and self.sd_dim != self.embed_dim:
            raise ValueError(
                f"vision.sd_dim: without a map (map_func) it has to equal embed_dim {self.embed_dim}, got {self.sd_dim}"
            )

    @property
    def num_patches(self) -> int:
        """Of a picture."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """A BERT encoder or decoder with cross-attention, in BLIP's `med_config.json` terms. The defaults are BERT-base.

    The last two entries of the vocabulary are [DEC], with which decoders begin, and [ENC], which stands first in texts that
    look at images.
    """

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    encoder_width: int = 768
    """Width of the tokens that cross-attention looks at."""
    pad_token_id: int = 0
    sep_token_id: int = 102
    """[SEP], with which texts end."""

    def __post_init__(self) -> None:
        check_sizes(self, "text.")

    @property
    def dec_token_id(self) -> int:
        """Id of [DEC], the first of the two words that BLIP adds."""
        return self.vocab_size - 2

    @property
    def enc_token_id(self) -> int:
        """Id of [ENC], the second."""
        return self.vocab_size - 1


class Config:
    """What the configurations of all tasks have in common: a task, sections of sizes, and their way to and from JSON."""

    task: ClassVar[str]
    text_module: ClassVar[str] = "text_encoder."
    """What the names of BLIP's text weights begin with that tell its sizes."""
    sections: ClassVar[dict[str, type]] = {"vision": VisionConfig, "text": TextConfig}

    def to_dict(self) -> dict:
        """As JSON values, with the task."""
        return {"task": self.task, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict):
        """Unknown keys beside the sizes (temperature, task, ...) are left to the caller.

        Raises:
            ValueError: a size that does not exist, or sizes that do not fit together.
        """
        own = {f.name for f in dataclasses.fields(cls)} & set(values)
        build = {name: _build(cls.sections[name], name, values[name]) for name in own & set(cls.sections)}
        return cls(**build, **{name: values[name] for name in own - set(cls.sections)})


ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh")
"""Activations between the layers of an MLP."""
TEXT_MODES = ("clean", "compat")
"""Whether texts are pruned as they are, or padded as in the official code."""


@dataclass(frozen=True)
class CLIPVisionConfig(VisionConfig):
    """A pre-norm vision transformer that makes one vector of an image. The defaults are those of OpenAI's CLIP.

    ``image_size`` is that of the trained positions. Towers that interpolate them take pictures of other sizes too.
    """

    class_token: bool = True
    """A first token that stands for the image. SigLIP has none."""
    registers: int = 0
    """Tokens between the class token and the patches that hold nothing of the picture (DINOv2). Never pruned."""
    patch_bias: bool = False
    layer_scale: bool = False
    """What each sub-layer adds is multiplied by learned factors (DINOv2)."""
    norm_pre: bool = True
    """LayerNorm before the first block."""
    pool: str = "class"
    """Which rows answer for the image: "class", "mean" (of the patches), or "attention" (a learned query, SigLIP's head)."""
    norm_after_pool: bool = False
    """Whether a mean is normalised itself, instead of what it is the mean of."""
    pooler: bool = False
    """A linear layer with tanh on what was pooled (ViT)."""
    projection: bool = True
    """A linear map to the features, without a bias."""
    positions: str = "fixed"
    """How other grids of patches than the trained one get positions: "fixed" (not at all), "bicubic", "bicubic antialias" or
    "bilinear antialias", as torch interpolates."""
    patches_last: bool = False
    """The weights of a patch are ordered row, column, channel (SigLIP 2 NaFlex), not channel, row, column."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positions = ("fixed", "bicubic", "bicubic antialias", "bilinear antialias")
        check_choices(self, "vision.", pool=("class", "mean", "attention"), positions=positions)
        if self.pool == "class" and not self.class_token:
            raise ValueError("vision.pool: expected 'mean' or 'attention' without a class token, got 'class'")

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.registers


@dataclass(frozen=True)
class CLIPTextConfig:
    """A pre-norm text transformer that makes one vector of a text. The defaults are those of CLIP ViT-L/14."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int | None = None
    """The end-of-text token. None: the highest id of a text, which is OpenAI's rule."""
    causal: bool = True
    padded: bool = False
    """Texts are filled up to the last position, as they were in training, and padding is read like words (SigLIP). Otherwise a
    text ends with its end-of-text token."""
    clean: str = ""
    """What is done to a text before it is cut into tokens: "" (nothing), "lower", or "canonicalize" (lower case without
    punctuation, SigLIP's evaluation in open_clip)."""
    projection: bool = True
    """A linear map to the features."""
    projection_bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "text.")
        check_choices(self, "text.", clean=("", "lower", "canonicalize"))


@dataclass(frozen=True)
class CLIPConfig(Config):
    """Comparable features of images and texts from two towers, or those of one alone. The defaults are ViT-L/14 at 336 pixels."""

    task: ClassVar[str] = "clip"
    sections: ClassVar[dict[str, type]] = {"vision": CLIPVisionConfig, "text": CLIPTextConfig}
    vision: CLIPVisionConfig | None = field(
        default_factory=lambda: CLIPVisionConfig(336, 14, embed_dim=1024, depth=24, num_heads=16, map_func=True)
    )
    text: CLIPTextConfig | None = field(default_factory=CLIPTextConfig)
    embed_dim: int = 768
    """Width of the features."""
    hidden_act: str = "quick_gelu"
    """Activation of the MLPs: "quick_gelu", "gelu" or "gelu_tanh"."""
    text_act: str | None = None
    """That of the text tower, where it differs."""
    norm_eps: float = 1e-5
    """Of all LayerNorms."""
    logit_bias: bool = False
    """Whether logits have a learned bias (SigLIP)."""
    text_mode: str = "clean"
    """"clean" or "compat", which are different models once texts are pruned; see :mod:`madtp.tasks.clip.model`."""

    def __post_init__(self) -> None:
        check_sizes(self, "")
        if self.vision is None and self.text is None:
            raise ValueError("vision, text: expected at least one tower, got neither")
        if type(self.vision) is VisionConfig:  # sizes alone, which those of BLIP have too
            object.__setattr__(self, "vision", CLIPVisionConfig(**dataclasses.asdict(self.vision)))
        check_choices(self, "", hidden_act=ACTIVATIONS, text_act=(None, *ACTIVATIONS), text_mode=TEXT_MODES)


def _build(kind: type, name: str, values: dict | None):
    if values is None and kind in (CLIPVisionConfig, CLIPTextConfig):  # a model of one tower
        return None
    if not isinstance(values, dict):
        raise ValueError(f"config.{name}: expected an object, got {type(values).__name__}")
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"config.{name}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return kind(**values)
