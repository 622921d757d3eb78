"""CLIP's checkpoints: the key names of MADTP, of OpenAI (MADTP's without its own weights) and of Hugging Face, and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import CLIPConfig, CLIPTextConfig, VisionConfig

# What MADTP keeps for training only (momentum copies, queues), and what OpenAI's files say beside weights. All of it is
# listed when a checkpoint is loaded.
_IGNORED = re.compile(
    r"^(visual|transformer|token_embedding|ln_final|positional_embedding|text_projection)_m(\.|$)"
    r"|^(image|text|idx|ptr)_queue$"
    r"|^(input_resolution|context_length|vocab_size)$"
    r"|^(text|vision)_model\.embeddings\.position_ids$"
)

# Both official loaders hold these in float16 before the weights are copied in: linear layers, convolutions and attention with
# their biases (so the query maps too), and the two projections. Not rounded: LayerNorms, embeddings of tokens, positions and
# the class, the dictionary, the scale.
_ROUNDED = re.compile(
    r"^(visual\.)?transformer\.resblocks\.\d+\."
    r"(attn\.in_proj_|attn\.out_proj\.|mlp\.c_fc\.|mlp\.c_proj\.|query_model\.q_map\.0\.)(weight|bias)$"
    r"|^visual\.conv1\.weight$|^visual\.proj$|^text_projection$"
)

# Beginnings of official key names and of ours; {} is the number of a block.
_OFFICIAL = {
    "visual.class_embedding": "visual.cls_token",
    "visual.positional_embedding": "visual.pos_embed",
    "visual.conv1": "visual.patch_embed.proj",
    "visual.ln_pre": "visual.norm_pre",
    "visual.ln_post": "visual.norm_post",
    "visual.proj": "visual.proj.weight",
    "token_embedding": "text.token_embeddings",
    "positional_embedding": "text.position_embeddings.weight",
    "ln_final": "text.norm",
    "text_projection": "text.proj.weight",
}
# Beginnings of Hugging Face's key names and of ours.
_HUGGING_FACE = {
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
for _tower, _ours in (("visual.transformer", "visual"), ("transformer", "text")):
    _OFFICIAL |= {
        f"{_tower}.resblocks.{{}}.ln_1": f"{_ours}.blocks.{{}}.norm1",
        f"{_tower}.resblocks.{{}}.attn.in_proj_weight": f"{_ours}.blocks.{{}}.attn.qkv.weight",
        f"{_tower}.resblocks.{{}}.attn.in_proj_bias": f"{_ours}.blocks.{{}}.attn.qkv.bias",
        f"{_tower}.resblocks.{{}}.attn.out_proj": f"{_ours}.blocks.{{}}.attn.proj",
        f"{_tower}.resblocks.{{}}.ln_2": f"{_ours}.blocks.{{}}.norm2",
        f"{_tower}.resblocks.{{}}.mlp.c_fc": f"{_ours}.blocks.{{}}.mlp.fc1",
        f"{_tower}.resblocks.{{}}.mlp.c_proj": f"{_ours}.blocks.{{}}.mlp.fc2",
        f"{_tower}.resblocks.{{}}.query_model": f"{_ours}.query_models.{{}}",
    }
for _tower, _ours in (("vision_model", "visual"), ("text_model", "text")):
    _HUGGING_FACE |= {
        f"{_tower}.encoder.layers.{{}}.layer_norm1": f"{_ours}.blocks.{{}}.norm1",
        f"{_tower}.encoder.layers.{{}}.self_attn.qkv": f"{_ours}.blocks.{{}}.attn.qkv",  # after the three are joined
        f"{_tower}.encoder.layers.{{}}.self_attn.out_proj": f"{_ours}.blocks.{{}}.attn.proj",
        f"{_tower}.encoder.layers.{{}}.layer_norm2": f"{_ours}.blocks.{{}}.norm2",
        f"{_tower}.encoder.layers.{{}}.mlp": f"{_ours}.blocks.{{}}.mlp",
    }


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """The key with its longest known beginning replaced."""
    number = re.search(r"(?<=\.)\d+(?=\.)", key)
    general = key if number is None else f"{key[: number.start()]}{{}}{key[number.end() :]}"
    head = general
    while head:
        if head in names:
            return (names[head] + general[len(head) :]).replace("{}", "" if number is None else number.group())
        head = head.rpartition(".")[0]
    return key


def recognise(state: Mapping[str, Tensor]) -> bool:
    """Whether these are the keys of a CLIP, in any of the layouts (ResNet towers too, which `to_ours` refuses)."""
    return "logit_scale" in state or "visual.cls_token" in state or "visual.class_embedding" in state


def is_hugging_face(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("vision_model.") for key in state)


def is_official(state: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("visual.transformer.") for key in state)


def ignored(state: Mapping[str, Tensor]) -> list[str]:
    """Keys that inference has no use for: momentum copies, queues, and sizes that OpenAI's files state as tensors."""
    return [key for key in state if _IGNORED.search(key)]


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of any layout with our key names; float32, but for unknown keys, which stay as they are.

    Weights in the official layouts are rounded to float16 where the official loaders do so.

    Raises:
        ValueError: a CLIP with a ResNet for images.
    """
    if any(key.startswith("visual.layer1.") for key in state):
        raise ValueError("the image tower is a ResNet; only vision transformers have tokens to prune")
    state = {key: value for key, value in state.items() if not _IGNORED.search(key)}
    if is_hugging_face(state):
        ours = {_renamed(key, _HUGGING_FACE): value for key, value in _joined(state).items()}
    elif is_official(state):
        ours = {
            _renamed(key, _OFFICIAL): value.half().float() if _ROUNDED.search(key) else value
            for key, value in state.items()
        }
        for key in ("visual.proj.weight", "text.proj.weight"):
            if key in ours:
                ours[key] = ours[key].mT
    else:
        ours = state
    for key, axes in (("visual.cls_token", 1), ("visual.pos_embed", 2)):
        if key in ours and ours[key].dim() == axes:
            ours[key] = ours[key][None] if axes == 2 else ours[key][None, None]
    return {key: value.float() if value.is_floating_point() else value for key, value in ours.items()}


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our key names to MADTP's, which are OpenAI's with the dictionary and the query maps beside them."""
    names = {ours: theirs for theirs, ours in _OFFICIAL.items()}
    official = {}
    for key, value in state.items():
        if key in ("visual.proj.weight", "text.proj.weight"):
            value = value.mT.contiguous()
        official[_renamed(key, names)] = _flat(key, value)
    return official


def to_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our key names to those of transformers' `CLIPModel`, which has neither dictionary nor query maps: they are left out."""
    names = {ours: theirs for theirs, ours in _HUGGING_FACE.items()}
    theirs = {}
    for key, value in state.items():
        if key == "space_dict" or ".query_models." in key:
            continue
        key, value = _renamed(key, names), _flat(key, value)
        if ".qkv." in key:
            parts = value.chunk(3)
            theirs.update({key.replace("qkv", part): chunk.clone() for part, chunk in zip(_PARTS, parts, strict=True)})
        else:
            theirs[key] = value
    return theirs


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one projection."""
    joined = dict(state)
    for key in state:
        head, found, kind = key.rpartition(".q_proj.")
        sources = [f"{head}.{part}.{kind}" for part in _PARTS]
        if found and all(source in joined for source in sources):
            joined[f"{head}.qkv.{kind}"] = torch.cat([joined.pop(source) for source in sources])
    return joined


def _flat(key: str, value: Tensor) -> Tensor:
    """The other layouts have no batch axis in front of the class embedding and the positions."""
    return value.flatten(0, -2)[0] if key == "visual.cls_token" else value[0] if key == "visual.pos_embed" else value


# ---- sizes --------------------------------------------------------------------------------------------------------


def infer_config(state: Mapping[str, Tensor]) -> CLIPConfig:
    """Sizes of a state dict with our key names. Heads are 64 wide, as in every CLIP of OpenAI's; pass a config where not.

    With a dictionary the weights are MADTP's, which were trained in the official mode of pruned text, "compat".

    Raises:
        ValueError: a tensor that tells a size is missing or has another number of axes.
    """

    def shape(key: str, dims: int) -> torch.Size:
        if key not in state:
            raise ValueError(f"not a CLIP: {key} is missing")
        if state[key].dim() != dims:
            raise ValueError(f"{key}: expected {dims} dimensions, got {list(state[key].shape)}")
        return state[key].shape

    def count(prefix: str) -> int:
        return 1 + max((int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)), default=-1)

    width, _, patch, _ = shape("visual.patch_embed.proj.weight", 4)
    patches = shape("visual.pos_embed", 3)[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"visual.pos_embed: {patches} patches do not form a square grid")
    sd_num, sd_dim = shape("space_dict", 2) if "space_dict" in state else (100, 768)
    vocab, hidden = shape("text.token_embeddings.weight", 2)
    return CLIPConfig(
        vision=VisionConfig(
            image_size=side * patch,
            patch_size=patch,
            embed_dim=width,
            depth=count("visual.blocks."),
            num_heads=max(1, width // 64),
            mlp_ratio=shape("visual.blocks.0.mlp.fc1.weight", 2)[0] / width,
            sd_num=sd_num,
            sd_dim=sd_dim,
            map_func=True,
        ),
        text=CLIPTextConfig(
            hidden_size=hidden,
            num_hidden_layers=count("text.blocks."),
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=shape("text.blocks.0.mlp.fc1.weight", 2)[0],
            vocab_size=vocab,
            max_position_embeddings=shape("text.position_embeddings.weight", 2)[0],
        ),
        embed_dim=shape("text.proj.weight", 2)[0],
        text_mode="compat" if "space_dict" in state else "clean",
    )


def config_from_hugging_face(settings: Mapping) -> CLIPConfig:
    """Sizes from the `config.json` of a Hugging Face `CLIPModel`.

    Raises:
        ValueError: something that this CLIP does not have.
    """
    from transformers import CLIPConfig as HuggingFaceConfig

    theirs = HuggingFaceConfig(**settings)  # fills in what the file leaves to the defaults
    vision, text = theirs.vision_config, theirs.text_config
    if vision.hidden_act != text.hidden_act:
        raise ValueError(f"hidden_act: expected the same in both towers, got {vision.hidden_act} and {text.hidden_act}")
    if {vision.layer_norm_eps, text.layer_norm_eps} != {_LN_EPS}:
        raise ValueError(f"layer_norm_eps: expected {_LN_EPS}, got {vision.layer_norm_eps} and {text.layer_norm_eps}")
    if vision.num_channels != 3:
        raise ValueError(f"num_channels: expected 3, got {vision.num_channels}")
    return CLIPConfig(
        vision=VisionConfig(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            embed_dim=vision.hidden_size,
            depth=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            mlp_ratio=vision.intermediate_size / vision.hidden_size,
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
