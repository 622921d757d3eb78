"""Sizes of the models, as plain dataclasses that round-trip through `config.json`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


@dataclass(frozen=True)
class VisionConfig:
    """A BLIP vision transformer. The defaults are ViT-B/16 at 384 pixels."""

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

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"vision.image_size: {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"vision.embed_dim: {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if not self.map_func and self.sd_dim != self.embed_dim:
            raise ValueError(
                f"vision.sd_dim: without a map (map_func) it has to equal embed_dim {self.embed_dim}, got {self.sd_dim}"
            )

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """A BERT text encoder with cross-attention, in BLIP's `med_config.json` terms. The defaults are BERT-base."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30524
    max_position_embeddings: int = 512
    encoder_width: int = 768

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"text.hidden_size: {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )


@dataclass(frozen=True)
class NLVRConfig:
    """BLIP-NLVR: two images and a statement, true or false."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    merge_from: int = 6
    """First text layer that concatenates its two image streams through a merge layer; earlier ones average them."""

    def to_dict(self) -> dict:
        return {"task": "nlvr", **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict) -> NLVRConfig:
        """Unknown keys beside the sizes (temperature, task, ...) are left to the caller.

        Raises:
            ValueError: a size that does not exist, or sizes that do not fit together.
        """
        return cls(
            vision=_build(VisionConfig, "vision", values.get("vision", {})),
            text=_build(TextConfig, "text", values.get("text", {})),
            merge_from=values.get("merge_from", cls.merge_from),
        )


def _build(kind: type, name: str, values: dict):
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"config.{name}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return kind(**values)
