"""Key names and sizes of the encoders of transformers: CLIP, SigLIP, SigLIP 2, DINOv2 and ViT, whole or one tower alone.

A tower that was saved alone has no prefix in newer releases ("embeddings..." instead of "vision_model.embeddings...").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...config import ACTIVATIONS, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from .base import KeyMap, Sizes, refuse, text_sizes

__all__ = ["FAMILIES", "Family"]

_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", **{name: name for name in ("quick_gelu", "gelu")}}
_QKV = (r"(?:self_attn|attention)", ("q_proj", "k_proj", "v_proj"), "qkv")
_OLD_QKV = (r"attention\.attention", ("query", "key", "value"), "qkv")  # in files, and in releases before 5.24
_IGNORED = {r"\.position_ids$": "position numbers", r"\.mask_token$": "the mask token, for training"}


def _layers(theirs: str, ours: str) -> dict[str, str]:
    """Blocks of CLIP and SigLIP."""
    theirs, ours = f"{theirs}.encoder.layers.{{}}", f"{ours}.blocks.{{}}"
    return {
        f"{theirs}.layer_norm1": f"{ours}.norm1",
        f"{theirs}.self_attn.qkv": f"{ours}.attn.qkv",
        f"{theirs}.self_attn.out_proj": f"{ours}.attn.proj",
        f"{theirs}.layer_norm2": f"{ours}.norm2",
        f"{theirs}.mlp": f"{ours}.mlp",
    }


_BOTH = {
    "vision_model.embeddings.position_embedding.weight": "visual.pos_embed",
    "vision_model.embeddings.patch_embedding": "visual.patch_embed.proj",
    "vision_model.post_layernorm": "visual.norm_post",
    "text_model.embeddings.token_embedding": "text.token_embeddings",
    "text_model.embeddings.position_embedding": "text.position_embeddings",
    "text_model.final_layer_norm": "text.norm",
    **_layers("vision_model", "visual"),
    **_layers("text_model", "text"),
}

CLIP = KeyMap(
    names=_BOTH
    | {
        "vision_model.embeddings.class_embedding": "visual.cls_token",
        "vision_model.pre_layrnorm": "visual.norm_pre",
        "visual_projection": "visual.proj",
        "text_projection": "text.proj",
    },
    fused=(_QKV,),
    leading={"visual.cls_token": 2, "visual.pos_embed": 1},
    ignored=_IGNORED,
)

SIGLIP = KeyMap(
    names=_BOTH
    | {
        "vision_model.head.probe": "visual.head.probe",
        "vision_model.head.attention.in_proj_weight": "visual.head.attn.qkv.weight",
        "vision_model.head.attention.in_proj_bias": "visual.head.attn.qkv.bias",
        "vision_model.head.attention.out_proj": "visual.head.attn.proj",
        "vision_model.head.layernorm": "visual.head.norm",
        "vision_model.head.mlp": "visual.head.mlp",
        "text_model.head": "text.proj",
    },
    fused=(_QKV,),
    leading={"visual.pos_embed": 1},
    scalars=frozenset({"logit_scale", "logit_bias"}),
    ignored=_IGNORED,
)

_DINOV2_BLOCK, _VIT_BLOCK, _OLD_BLOCK, _BLOCK = "encoder.layer.{}", "layers.{}", "encoder.layer.{}", "visual.blocks.{}"
_ALONE = {
    "embeddings.cls_token": "visual.cls_token",
    "embeddings.position_embeddings": "visual.pos_embed",
    "embeddings.patch_embeddings.projection": "visual.patch_embed.proj",
    "layernorm": "visual.norm_post",
}

DINOV2 = KeyMap(
    names=_ALONE
    | {
        "embeddings.register_tokens": "visual.registers",
        f"{_DINOV2_BLOCK}.norm1": f"{_BLOCK}.norm1",
        f"{_DINOV2_BLOCK}.attention.qkv": f"{_BLOCK}.attn.qkv",
        f"{_DINOV2_BLOCK}.attention.attention.qkv": f"{_BLOCK}.attn.qkv",
        f"{_DINOV2_BLOCK}.attention.o_proj": f"{_BLOCK}.attn.proj",
        f"{_DINOV2_BLOCK}.attention.output.dense": f"{_BLOCK}.attn.proj",
        f"{_DINOV2_BLOCK}.layer_scale1.lambda1": f"{_BLOCK}.attn.proj.scale",
        f"{_DINOV2_BLOCK}.norm2": f"{_BLOCK}.norm2",
        f"{_DINOV2_BLOCK}.mlp": f"{_BLOCK}.mlp",
        f"{_DINOV2_BLOCK}.layer_scale2.lambda1": f"{_BLOCK}.mlp.fc2.scale",
    },
    fused=(_QKV, _OLD_QKV),
    ignored=_IGNORED,
)

VIT = KeyMap(
    names=_ALONE
    | {
        "pooler.dense": "visual.pooler",
        f"{_VIT_BLOCK}.layernorm_before": f"{_BLOCK}.norm1",
        f"{_VIT_BLOCK}.attention.qkv": f"{_BLOCK}.attn.qkv",
        f"{_VIT_BLOCK}.attention.o_proj": f"{_BLOCK}.attn.proj",
        f"{_VIT_BLOCK}.layernorm_after": f"{_BLOCK}.norm2",
        f"{_VIT_BLOCK}.mlp.fc1": f"{_BLOCK}.mlp.fc1",
        f"{_VIT_BLOCK}.mlp.fc2": f"{_BLOCK}.mlp.fc2",
        f"{_OLD_BLOCK}.layernorm_before": f"{_BLOCK}.norm1",
        f"{_OLD_BLOCK}.attention.attention.qkv": f"{_BLOCK}.attn.qkv",
        f"{_OLD_BLOCK}.attention.output.dense": f"{_BLOCK}.attn.proj",
        f"{_OLD_BLOCK}.layernorm_after": f"{_BLOCK}.norm2",
        f"{_OLD_BLOCK}.intermediate.dense": f"{_BLOCK}.mlp.fc1",
        f"{_OLD_BLOCK}.output.dense": f"{_BLOCK}.mlp.fc2",
    },
    fused=(_QKV, _OLD_QKV),
    ignored=_IGNORED,
)


# ---- sizes --------------------------------------------------------------------------------------------------------


def _activation(config: Any) -> str:
    found = _ACTIVATIONS.get(config.hidden_act)
    if found is None:
        raise ValueError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}")
    return found


def _side(value: Any, name: str) -> int:
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int):
        raise ValueError(f"{name}: expected the side of a square, got {value!r}")
    return value


def _vision(vision: Any, state: Mapping[str, Tensor], sd: bool = False, **options) -> CLIPVisionConfig:
    """Sizes of an image tower. Without a dictionary in the state (or ``sd``) entries are as wide as the tokens."""
    refuse(vision, num_channels=3)
    width, hidden = vision.hidden_size, getattr(vision, "intermediate_size", None)
    if not hidden:
        hidden = int(width * vision.mlp_ratio)
    sd_num, sd_dim = Sizes(state, "a CLIP").entries(CLIPVisionConfig.sd_dim if sd else width)
    options = {
        "image_size": _side(getattr(vision, "image_size", 0), "image_size"),
        "map_func": sd or sd_dim != width,
    } | options
    return CLIPVisionConfig(
        patch_size=_side(vision.patch_size, "patch_size"),
        embed_dim=width,
        depth=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        mlp_ratio=hidden / width,
        sd_num=sd_num,
        sd_dim=sd_dim,
        **options,
    )


def _towers(theirs: Any) -> tuple[Any, Any]:
    """Their configurations of the image and the text tower; None where there is none."""
    kind = theirs.model_type
    if kind.endswith("_vision_model"):
        return theirs, None
    return (None, theirs) if kind.endswith("_text_model") else (theirs.vision_config, theirs.text_config)


def _shared(vision: Any, text: Any) -> dict[str, Any]:
    """Activation and epsilon, which the towers share."""
    towers = [tower for tower in (vision, text) if tower is not None]
    for name in ("hidden_act", "layer_norm_eps"):
        values = [getattr(tower, name) for tower in towers]
        if len(set(values)) > 1:
            raise ValueError(f"{name}: expected the same in both towers, got {values[0]} and {values[1]}")
    return {"hidden_act": _activation(towers[0]), "norm_eps": towers[0].layer_norm_eps}


def _clip(theirs: Any, state: Mapping[str, Tensor], whole: bool) -> CLIPConfig:
    vision, text = _towers(theirs)
    shared, sizes = _shared(vision, text), {}
    if vision is not None:
        # A whole CLIP has MADTP's maps and the width of its dictionary.
        sizes["vision"] = _vision(vision, state, sd=whole, projection=whole or "visual_projection.weight" in state)
    if text is not None:
        sizes["text"] = CLIPTextConfig(
            **text_sizes(text),
            # Files from before transformers 4.31 have a wrong 2 here, which stands for the highest id.
            eos_token_id=None if text.eos_token_id == 2 else text.eos_token_id,
            projection=whole or "text_projection.weight" in state,
        )
    return CLIPConfig(**{"vision": None, "text": None} | sizes, embed_dim=theirs.projection_dim, **shared)


def _siglip(theirs: Any, state: Mapping[str, Tensor], whole: bool) -> CLIPConfig:
    vision, text = _towers(theirs)
    shared, sizes = _shared(vision, text), {}
    naflex = theirs.model_type.startswith("siglip2")
    patches = next((value for key, value in state.items() if key.endswith("embeddings.patch_embedding.weight")), None)
    if patches is not None and (patches.dim() == 2) != naflex:
        kinds = ("a convolution", "siglip") if patches.dim() == 4 else ("a linear layer", "siglip2")
        raise ValueError(
            f"model_type: {theirs.model_type!r}, but its patches go through {kinds[0]}, as those of {kinds[1]!r}"
        )
    if vision is not None:
        pool = "attention" if getattr(vision, "vision_use_head", True) else "mean"
        options = {"class_token": False, "patch_bias": True, "norm_pre": False, "pool": pool, "projection": False}
        if naflex:
            side = round(vision.num_patches**0.5)
            if side * side != vision.num_patches:
                raise ValueError(f"num_patches: expected a square number, got {vision.num_patches}")
            options |= {"image_size": side * vision.patch_size, "positions": "bilinear antialias", "patches_last": True}
        sizes["vision"] = _vision(vision, state, **options)
    if text is not None:
        sizes["text"] = CLIPTextConfig(
            **text_sizes(text),
            causal=False,
            padded=True,
            # SigLIP 2 (the vocabulary is Gemma's) was trained on lower case, whatever class its tokenizer has.
            clean="lower" if naflex or text.vocab_size == 256000 else "",
            projection_bias=True,
        )
    width = (text.projection_size or text.hidden_size) if text is not None else vision.hidden_size
    return CLIPConfig(**{"vision": None, "text": None} | sizes, embed_dim=width, logit_bias=whole, **shared)


def _dinov2(theirs: Any, state: Mapping[str, Tensor], whole: bool) -> CLIPConfig:
    refuse(theirs, use_swiglu_ffn=False, qkv_bias=True)
    registers = getattr(theirs, "num_register_tokens", 0)
    vision = _vision(
        theirs,
        state,
        patch_bias=True,
        norm_pre=False,
        projection=False,
        registers=registers,
        layer_scale=True,
        positions="bicubic antialias" if theirs.model_type.endswith("registers") else "bicubic",
    )
    return CLIPConfig(vision, None, theirs.hidden_size, _activation(theirs), norm_eps=theirs.layer_norm_eps)


def _vit(theirs: Any, state: Mapping[str, Tensor], whole: bool) -> CLIPConfig:
    refuse(theirs, qkv_bias=True, pooler_act="tanh", pooler_output_size=theirs.hidden_size)
    pooler = any(key.startswith(("pooler.", "visual.pooler.")) for key in state)
    vision = _vision(theirs, state, patch_bias=True, norm_pre=False, projection=False, pooler=pooler)
    return CLIPConfig(vision, None, theirs.hidden_size, _activation(theirs), norm_eps=theirs.layer_norm_eps)


# ---- families -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One kind of model of transformers: its `model_type`, its names, its sizes."""

    model_type: str
    key_map: KeyMap
    sizes: Callable[[Any, Mapping[str, Tensor], bool], CLIPConfig]
    prefix: str = ""
    """What names of a tower alone lack in newer releases."""
    pixels: str = "clip"
    """Whose defaults hold for its image processor."""

    TASKS = ("clip",)

    def to_ours(self, state: Mapping[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        """Their key names to ours. What is left out is listed by name in the log (INFO)."""
        if self.prefix and not any(key.startswith((self.prefix, "visual.", "text.")) for key in state):
            state = {self.prefix + key: value for key, value in state.items()}
        return self.key_map.to_ours(state)

    def parts_of(self, key: str) -> list[str]:
        """The names of their weights that one of ours is stacked of; none where they have no such weight."""
        return self.key_map.parts_of(key)

    def from_ours(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our key names to theirs. Dictionary and query maps have no place there and are left out. No two tensors share
        memory."""
        return self.key_map.from_ours(state)

    def task_of(self, keys: Iterable[str]) -> str | None:
        """ "clip" for the keys of a whole model of two towers, whose keys tell."""
        signs = {
            "clip": {"visual_projection.weight", "text_projection.weight"},
            "siglip": {"vision_model.head.probe", "text_model.head.weight"},
        }.get(self.model_type)
        return "clip" if signs and signs <= set(keys) else None

    def config_of(self, settings: Mapping, state: Mapping[str, Tensor], task: str | None = None) -> CLIPConfig:
        """Sizes from the `config.json` that transformers wrote, and of a dictionary in the state dict from that.

        Raises:
            ValueError: something that our towers do not have.
        """
        from transformers import AutoConfig

        # Fills in what the file leaves out.
        theirs = AutoConfig.for_model(**{**settings, "model_type": self.model_type})
        return self.sizes(theirs, state, not self.prefix)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("clip", CLIP, _clip),
        Family("clip_vision_model", CLIP, _clip, "vision_model."),
        Family("clip_text_model", CLIP, _clip, "text_model."),
        Family("siglip", SIGLIP, _siglip, pixels="siglip"),
        Family("siglip_vision_model", SIGLIP, _siglip, "vision_model.", "siglip"),
        Family("siglip_text_model", SIGLIP, _siglip, "text_model.", "siglip"),
        Family("siglip2", SIGLIP, _siglip, pixels="siglip2"),
        Family("siglip2_vision_model", SIGLIP, _siglip, "vision_model.", "siglip2"),
        Family("siglip2_text_model", SIGLIP, _siglip, "text_model.", "siglip2"),
        Family("dinov2", DINOV2, _dinov2, pixels="dinov2"),
        Family("dinov2_with_registers", DINOV2, _dinov2, pixels="dinov2"),
        Family("vit", VIT, _vit, pixels="vit"),
    )
}
"""Families of encoders, by `model_type` of transformers' configuration."""
