"""Key names and sizes of BLIP in transformers, which has no dictionary: captioning, question answering, retrieval.

Their text encoders and decoders are named as in the original code, the vision transformer is not. What differs beside names:

* LayerNorms of the vision transformer have the epsilon that the config says, by default 1e-5; the original has 1e-6.
* Texts that look at images begin with [ENC] in the original code and here; transformers' processor leaves [CLS] there.
* The decoder of `BlipForQuestionAnswering` looks at padded question tokens, so that an answer depends on the longest question
  of its batch (`generate` masks nothing, and cross-attention ignores the mask that `forward` passes, in releases 5.17 to 5.24).
  Here nothing is padded: answers are those that it gives to one question at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from ...config import Config, TextConfig, VisionConfig
from ...tasks import TASKS as REGISTRY
from ...text import EPS
from . import blip
from .base import KeyMap, Sizes, refuse, renamed, text_sizes

__all__ = ["TASKS", "config_of", "from_ours", "parts_of", "task_of", "to_ours"]

# Their class -> task.
ARCHITECTURES = {
    "BlipForQuestionAnswering": "vqa",
    "BlipForConditionalGeneration": "caption",
    "BlipForImageTextRetrieval": "retrieval",
}
TASKS = tuple(ARCHITECTURES.values())  # whose models have these names

# Beginnings of their key names and of ours; {} is the number of a block. All other names are those of the original code.
NAMES = {
    "vision_model.embeddings.class_embedding": "visual_encoder.cls_token",
    "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
    "vision_model.embeddings.patch_embedding": "visual_encoder.patch_embed.proj",
    "vision_model.post_layernorm": "visual_encoder.norm",
    "vision_model.encoder.layers.{}.layer_norm1": "visual_encoder.blocks.{}.norm1",
    "vision_model.encoder.layers.{}.self_attn.qkv": "visual_encoder.blocks.{}.attn.qkv",
    "vision_model.encoder.layers.{}.self_attn.projection": "visual_encoder.blocks.{}.attn.proj",
    "vision_model.encoder.layers.{}.layer_norm2": "visual_encoder.blocks.{}.norm2",
    "vision_model.encoder.layers.{}.mlp": "visual_encoder.blocks.{}.mlp",
}

MAP = replace(blip.MAP, names=NAMES, own=KeyMap().own)
# The names of their weights that one of ours is stacked of; none for the dictionary, its map, and `temp`.
parts_of = MAP.parts_of

# Of the vision transformer, where no config tells.
LAYER_NORM_EPS = 1e-5


def task_of(keys: Iterable[str]) -> str | None:
    """The task of one of their three models; None for anything else."""
    modules = {key.split(".")[0] for key in keys}
    if "vision_model" not in modules or "text_model" in modules:
        return None
    if modules & {"itm_head", "vision_proj"}:
        return "retrieval"
    if "text_decoder" in modules:
        return "vqa" if "text_encoder" in modules else "caption"
    return None


def to_ours(state: Mapping[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
    """Their key names to ours. What is left out is listed by name in the log (INFO).

    Raises:
        ValueError: an output layer that differs from the embeddings that it is tied to.
    """
    return blip.to_ours({renamed(key, NAMES): value for key, value in state.items()}, task)


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our key names to theirs. Dictionary, its map and `temp` have no place there and are left out. No two tensors share
    memory."""
    return blip.with_tied(MAP.from_ours(state))


def config_of(settings: Mapping, state: Mapping[str, Tensor], task: str | None = None) -> Config:
    """Sizes from the `config.json` that transformers wrote, and of a dictionary in the state dict from that.

    The task is the one given, that of the class in ``architectures``, or the one that the keys of ``state`` tell.

    Raises:
        ValueError: a model without a task here, or something that our layers do not have.
    """
    from transformers import BlipConfig

    named = [ARCHITECTURES[name] for name in settings.get("architectures") or () if name in ARCHITECTURES]
    task = task or next(iter(named), None) or task_of(state)
    if task is None:
        raise ValueError(
            f"architectures: expected one of {', '.join(ARCHITECTURES)}, got {settings.get('architectures')}"
        )
    if task not in TASKS:
        raise ValueError(f"task: transformers' BLIP has models for {', '.join(TASKS)}, not for {task!r}")
    theirs = BlipConfig(**settings)  # fills in what the file leaves to the defaults
    vision, text = theirs.vision_config, theirs.text_config
    _check(vision, text, decodes_text={"text_encoder", "text_decoder"} <= blip.TASKS[task])
    sd_num, sd_dim = Sizes(state, "a BLIP").entries(text.hidden_size)
    sizes = {
        "vision": VisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            sd_num=sd_num,
            sd_dim=sd_dim,
            map_func=vision.hidden_size != sd_dim,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        "text": TextConfig(
            **text_sizes(text),
            encoder_width=text.encoder_hidden_size,
            pad_token_id=text.pad_token_id,
            sep_token_id=text.sep_token_id,
        ),
    }
    kind = REGISTRY[task].Config
    if "proj_dim" in {field.name for field in fields(kind)}:
        sizes["proj_dim"] = theirs.image_text_hidden_size
    return kind(**sizes)


def _check(vision: Any, text: Any, decodes_text: bool) -> None:
    """Refuse what our layers do not have, by name."""
    refuse(vision, "vision_config.", hidden_act="gelu")
    refuse(text, "text_config.", hidden_act="gelu", layer_norm_eps=EPS)
    # Their text encoders too have cross-attention only as decoders.
    refuse(text, "text_config.", is_decoder=True, bos_token_id=text.vocab_size - 2)
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise ValueError(f"vision_config.{name}: expected the side of a square, got {getattr(vision, name)!r}")
    if decodes_text and text.hidden_size != vision.hidden_size:
        raise ValueError(
            f"text_config.hidden_size: expected {vision.hidden_size} as of the vision transformer, since the decoder looks at "
            f"states of the question, got {text.hidden_size}"
        )
