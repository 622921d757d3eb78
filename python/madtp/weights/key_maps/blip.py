"""Key names of BLIP and MADTP checkpoints (github.com/salesforce/BLIP, github.com/double125/MADTP), which ours follow.

Ours differ in three ways: projections that read the same input are one weight, weights that are tied to others are left out,
and so are buffers without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace

import torch
from torch import Tensor

from ...config import Config, TextConfig, VisionConfig
from .base import KeyMap, Sizes

__all__ = ["TASKS", "from_ours", "infer_config", "parts_of", "task_of", "to_ours"]

# Task -> modules of its model, beside the dictionary.
TASKS = {
    "nlvr": {"visual_encoder", "text_encoder", "cls_head"},
    "vqa": {"visual_encoder", "text_encoder", "text_decoder"},
    "caption": {"visual_encoder", "text_decoder"},
    "retrieval": {"visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head", "temp"},
}
TWINS = {"nlvr"}  # whose text encoder looks at two images

MAP = KeyMap(
    # The ViT's qkv is fused already.
    fused=(
        (r"attention\.self", ("query", "key", "value"), "qkv"),
        (r"crossattention\.self[01]?", ("key", "value"), "kv"),
    ),
    ignored={
        r"embeddings\.position_ids$": "position numbers",
        r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.": "momentum copies, for training",
        r"^((image|text|idx)_queue|ptr_queue|queue_ptr)$": "queues of negatives, for training",
    },
    own=r"^$",
)
"""Official names of weights, and ours."""
parts_of = MAP.parts_of  # the official names of the weights that one of ours is stacked of

# The output layer of a decoder -> what it is tied to.
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}


def task_of(keys: Iterable[str]) -> str | None:
    """The task of a MADTP or BLIP checkpoint; None for anything else, and for BLIP's pretraining, which has parts of many."""
    modules = {key.split(".")[0] for key in keys}
    if "visual_encoder" not in modules and not modules & {"text_encoder", "text_decoder"}:
        return None
    if "vision_model" in modules:  # transformers'
        return None
    if _pretraining(modules):
        return None
    for task, sign in (("nlvr", "cls_head"), ("retrieval", "itm_head"), ("retrieval", "vision_proj")):
        if sign in modules:
            return task
    if "text_decoder" in modules:
        return "vqa" if "text_encoder" in modules else "caption"
    return None


def _pretraining(modules: set[str]) -> bool:
    return {"text_decoder", "itm_head"} <= modules


def to_ours(state: Mapping[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
    """MADTP's and BLIP's key names to ours, for the model of a task.

    Of a pretraining checkpoint the parts of other tasks are left out. What is left out is listed by name in the log (INFO).

    Raises:
        ValueError: an output layer that differs from the embeddings that it is tied to.
    """
    ignored = dict(MAP.ignored)
    if task is not None and _pretraining({key.split(".")[0] for key in state}):
        ignored[rf"^(?!({'|'.join(TASKS.get(task, ()))}|space_dict)(\.|$))"] = "parts of other tasks"
    state = replace(MAP, ignored=ignored).drop(state)
    ours = MAP.to_ours(_duplicate_cross_attention(state) if task in TWINS else state)
    for key in [key for key in ours if key.startswith("text_decoder.")]:
        prefix, name = key.split(".", 1)
        other = f"{prefix}.{TIED[name]}" if name in TIED else None
        if other in ours:
            if not torch.equal(ours[key], ours[other]):
                raise ValueError(f"{key} differs from {other}, to which it is tied")
            del ours[key]
    return ours


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our key names to MADTP's: the inverse of :func:`to_ours` but for what that leaves out. No two tensors share memory."""
    return with_tied(MAP.from_ours(state))


def with_tied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state, and what is tied to its weights."""
    for name, other in TIED.items():
        if f"text_decoder.{other}" in state:
            state[f"text_decoder.{name}"] = state[f"text_decoder.{other}"].clone()
    return state


def _duplicate_cross_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BLIP checkpoint with one cross-attention per layer, as BLIP-NLVR starts from it: one copy for each image."""
    twin = {}
    for key, value in state.items():
        copies = [key]
        if "crossattention.self." in key:
            copies = [key.replace("crossattention.self.", f"crossattention.self{i}.") for i in (0, 1)]
        elif "crossattention.output.dense." in key:
            copies = [key.replace("crossattention.output.dense.", f"crossattention.output.dense{i}.") for i in (0, 1)]
        twin.update({copy: value.clone() if len(copies) > 1 else value for copy in copies})
    return twin


def infer_config(
    state: Mapping[str, Tensor], kind: type[Config], layer_norm_eps: float = VisionConfig.layer_norm_eps
) -> Config:
    """Sizes of a state dict with our key names. Heads are 64 wide, as in every BLIP; pass a config where they are not.

    Raises:
        ValueError: a tensor that tells a size is missing, or of another shape.
    """
    sizes, text = Sizes(state, f"a BLIP-{kind.task.upper()} checkpoint"), kind.text_module
    tower = sizes.tower("visual_encoder.")
    vocab, hidden = sizes.shape(f"{text}embeddings.word_embeddings.weight", 2)
    sd_num, sd_dim = sizes.entries(hidden)
    config = {
        "vision": VisionConfig(
            image_size=sizes.side("visual_encoder.pos_embed", tower["patch_size"]),
            **tower,
            sd_num=sd_num,
            sd_dim=sd_dim,
            map_func="visual_encoder.img_query_model.q_map.0.weight" in state or tower["embed_dim"] != sd_dim,
            layer_norm_eps=layer_norm_eps,
        ),
        "text": TextConfig(
            hidden_size=hidden,
            num_hidden_layers=sizes.count(f"{text}encoder.layer."),
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=sizes.shape(f"{text}encoder.layer.0.intermediate.dense.weight", 2)[0],
            vocab_size=vocab,
            max_position_embeddings=sizes.shape(f"{text}embeddings.position_embeddings.weight", 2)[0],
            encoder_width=tower["embed_dim"],
        ),
    }
    own = {field.name for field in fields(kind)}
    if "merge_from" in own:
        merging = sizes.numbers(re.escape(text) + r"encoder\.layer\.(\d+)\.crossattention\.output\.merge_layer")
        config["merge_from"] = min(merging, default=kind.merge_from)
    if "proj_dim" in own:
        config["proj_dim"] = sizes.shape("vision_proj.weight", 2)[0]
    return kind(**config)
