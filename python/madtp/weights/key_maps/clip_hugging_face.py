"""Key names and sizes of transformers' `CLIPModel`, which has neither dictionary nor query maps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from ...config import CLIPConfig, CLIPTextConfig, VisionConfig
from .clip import renamed
from .stacking import stacked

__all__ = ["TASKS", "config_of", "from_ours", "parts_of", "task_of", "to_ours"]

TASKS = {"clip": {"vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"}}

# Beginnings of their key names and of ours; {} is the number of a block.
NAMES = {
    "vision_model.embeddings.class_embedding": "visual.cls_token",
    "vision_model.embeddings.position_embedding.weight": "visual.pos_embed",
    "vision_model.embeddings.patch_embedding": "visual.patch_embed.proj",
    "vision_model.pre_layrnorm": "visual.norm_pre",
    "vision_model.post_layernorm": "visual.norm_post",
    "visual_projection": "visual.proj",
    "text_model.embeddings.token_embedding": "text.token_embeddings",
    "text_model.embeddings.position_embedding": "text.position_embeddings",
    "text_model.final_layer_norm": "text.norm",
    "text_projection": "text.proj",
}
for _tower, _ours in (("vision_model", "visual.blocks.{}"), ("text_model", "text.blocks.{}")):
    _theirs = f"{_tower}.encoder.layers.{{}}"
    NAMES |= {
        f"{_theirs}.layer_norm1": f"{_ours}.norm1",
        f"{_theirs}.self_attn.qkv": f"{_ours}.attn.qkv",
        f"{_theirs}.self_attn.out_proj": f"{_ours}.attn.proj",
        f"{_theirs}.layer_norm2": f"{_ours}.norm2",
        f"{_theirs}.mlp": f"{_ours}.mlp",
    }
_THEIRS = {ours: theirs for theirs, ours in NAMES.items()}
# Stacked along the first axis into ours.
PARTS = ("q_proj", "k_proj", "v_proj")
_EXPANDED = {"visual.cls_token": 2, "visual.pos_embed": 1}
_LAYER_NORM_EPS = 1e-5


def task_of(keys: Iterable[str]) -> str | None:
    """"clip" for the keys of a `CLIPModel`."""
    return "clip" if {"visual_projection.weight", "text_projection.weight"} <= set(keys) else None


def to_ours(state: Mapping[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
    """Their key names to ours. Position numbers, which older files hold, are left out."""
    state = {key: value for key, value in state.items() if not key.endswith(".embeddings.position_ids")}
    for key in list(state):
        lead, found, kind = key.rpartition(f".{PARTS[0]}.")
        sources = [f"{lead}.{part}.{kind}" for part in PARTS]
        if found and all(source in state for source in sources):
            state[f"{lead}.qkv.{kind}"] = stacked(state, sources)
            for source in sources:
                del state[source]
    ours = {renamed(key, NAMES): value for key, value in state.items()}
    return {key: value[(None,) * _EXPANDED.get(key, 0)] for key, value in ours.items()}


def parts_of(key: str) -> list[str]:
    """The names of their weights that one of ours is stacked of; none for the dictionary and the query maps."""
    if key == "space_dict" or ".query_models." in key:
        return []
    name = renamed(key, _THEIRS)
    return [name.replace("qkv", part) for part in PARTS] if ".qkv." in name else [name]


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our key names to theirs. Dictionary and query maps have no place there and are left out. No two tensors share memory."""
    theirs = {}
    for key, value in state.items():
        names, value = parts_of(key), value.flatten(0, _EXPANDED[key]) if key in _EXPANDED else value
        if names:
            chunks = [value] if len(names) == 1 else [chunk.clone() for chunk in value.chunk(len(names))]
            theirs.update(zip(names, chunks, strict=True))
    return theirs


def config_of(settings: Mapping, state: Mapping[str, Tensor], task: str | None = None) -> CLIPConfig:
    """Sizes from the `config.json` of a Hugging Face `CLIPModel`, and of a dictionary in the state dict from that.

    Raises:
        ValueError: something that this CLIP does not have.
    """
    from transformers import CLIPConfig as HuggingFaceConfig

    theirs = HuggingFaceConfig(**settings)  # fills in what the file leaves to the defaults
    vision, text = theirs.vision_config, theirs.text_config
    if vision.hidden_act != text.hidden_act:
        raise ValueError(f"hidden_act: expected the same in both towers, got {vision.hidden_act} and {text.hidden_act}")
    if {vision.layer_norm_eps, text.layer_norm_eps} != {_LAYER_NORM_EPS}:
        raise ValueError(f"layer_norm_eps: expected {_LAYER_NORM_EPS}, got {vision.layer_norm_eps} and {text.layer_norm_eps}")
    if vision.num_channels != 3:
        raise ValueError(f"num_channels: expected 3, got {vision.num_channels}")
    dictionary = state["space_dict"].shape if "space_dict" in state else (VisionConfig.sd_num, VisionConfig.sd_dim)
    return CLIPConfig(
        vision=VisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
            sd_num=dictionary[0],
            sd_dim=dictionary[1],
            map_func=True,
        ),
        text=CLIPTextConfig(
            hidden_size=text.hidden_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            intermediate_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_position_embeddings,
            # Files from before transformers 4.31 have a wrong 2 here, which stands for the highest id.
            eos_token_id=None if text.eos_token_id == 2 else text.eos_token_id,
        ),
        embed_dim=theirs.projection_dim,
        hidden_act=vision.hidden_act,
    )
