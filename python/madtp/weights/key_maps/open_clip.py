"""open_clip (github.com/mlfoundations/open_clip): key names, and what `open_clip_config.json` says.

Its CLIP names weights as OpenAI does; models with a text tower of their own ("custom_text") put "text." in front, and SigLIP's
image tower is one of timm. The file says which activation, which pooling, which pixels and which text: the keys do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from ...image_transform import ImageTransform
from . import clip
from .base import KeyMap, Sizes, stacked

__all__ = ["config_of", "from_ours", "to_ours", "transform_of"]

# timm's vision transformer, as SigLIP uses it.
_TRUNK = "visual.trunk"
_TIMM = {
    f"{_TRUNK}.pos_embed": "visual.pos_embed",
    f"{_TRUNK}.patch_embed": "visual.patch_embed",
    f"{_TRUNK}.norm": "visual.norm_post",
    f"{_TRUNK}.blocks": "visual.blocks",
    f"{_TRUNK}.attn_pool.latent": "visual.head.probe",
    f"{_TRUNK}.attn_pool.qkv": "visual.head.attn.qkv",
    f"{_TRUNK}.attn_pool.proj": "visual.head.attn.proj",
    f"{_TRUNK}.attn_pool.norm": "visual.head.norm",
    f"{_TRUNK}.attn_pool.mlp": "visual.head.mlp",
}
_LINEAR_TEXT = {"text_projection.weight": "text.proj.weight", "text_projection.bias": "text.proj.bias"}

MAP = replace(
    clip.MAP,
    names=clip.NAMES | _TIMM,
    scalars=frozenset({"logit_scale", "logit_bias"}),
    own=KeyMap().own,
)
# With a bias the projection of texts is a linear layer, which is not transposed.
LINEAR_MAP = replace(MAP, names=MAP.names | _LINEAR_TEXT, transposed=MAP.transposed - {"text.proj.weight"})

_TIMM_NAME = re.compile(r"vit_\w+_patch(\d+)_siglip_(\d+)")
_KNOWN = frozenset("embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale init_logit_bias".split())
_KNOWN_VISION = frozenset(
    "image_size layers width head_width mlp_ratio patch_size no_ln_pre final_ln_after_pool pool_type output_tokens act_kwargs "
    "norm_kwargs patch_dropout timm_model_name timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop "
    "timm_drop_path".split()
)
_KNOWN_TEXT = frozenset(
    "context_length vocab_size hf_tokenizer_name tokenizer_kwargs width heads layers mlp_ratio no_causal_mask pool_type "
    "proj_bias proj_type output_tokens act_kwargs norm_kwargs pad_id eos_id".split()
)


def to_ours(state: Mapping[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
    """Their key names to ours. What is left out is listed by name in the log (INFO).

    Raises:
        ValueError: a CLIP whose image tower is a ResNet, or weights that belong together and differ.
    """
    if any(key.startswith("visual.layer1.") for key in state):
        raise ValueError("the image tower is a ResNet, which has no tokens to prune")
    if "text.token_embedding.weight" in state:
        state = {key.removeprefix("text."): value for key, value in state.items()}
    # Ours has one matrix where timm has one for the query and one for keys and values.
    state, pool = dict(state), f"{_TRUNK}.attn_pool"
    for kind in ("weight", "bias"):
        query, rest = state.pop(f"{pool}.q.{kind}", None), state.pop(f"{pool}.kv.{kind}", None)
        if query is not None and rest is not None:
            parts = {"q": query, "k": rest[: len(rest) // 2], "v": rest[len(rest) // 2 :]}
            state[f"{pool}.qkv.{kind}"] = stacked(parts, ["q", "k", "v"])
    return _map(f"{_TRUNK}.pos_embed" in state, "text_projection.weight" in state).to_ours(state)


def _map(timm: bool, linear: bool) -> KeyMap:
    """Names of a model with timm's or with open_clip's own image tower, and with a linear layer or a matrix for its texts."""
    chosen = LINEAR_MAP if linear else MAP
    names = {
        name: ours
        for name, ours in chosen.names.items()
        if (name.startswith(_TRUNK) == timm or not ours.startswith("visual"))
        and not (linear and name == "text_projection")
    }
    return replace(chosen, names=names, leading={} if timm else chosen.leading)


def from_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our key names to theirs; a model whose image tower has no class token becomes one with a trunk of timm."""
    timm = "visual.cls_token" not in state
    theirs = _map(timm, "text.proj.bias" in state).from_ours(state)
    pool = f"{_TRUNK}.attn_pool"
    for kind in ("weight", "bias"):
        whole = theirs.pop(f"{pool}.qkv.{kind}", None)
        if whole is not None:
            size = len(whole) // 3
            theirs |= {f"{pool}.q.{kind}": whole[:size].clone(), f"{pool}.kv.{kind}": whole[size:].clone()}
    theirs = {
        key: value.reshape(()) if key in ("logit_scale", "logit_bias") else value for key, value in theirs.items()
    }
    if timm:
        theirs = {
            key if key.startswith(("visual.", "logit_")) else f"text.{key}": value for key, value in theirs.items()
        }
    return theirs


def _check(section: str, values: Mapping, known: frozenset[str], **expected) -> None:
    """Refuse what our towers do not have, by name."""
    for name, value in values.items():
        if name not in known and value not in (None, False, ""):
            raise ValueError(f"{section}.{name}: not supported here, got {value!r}")
    for name, choices in expected.items():
        if values.get(name, choices[0]) not in choices:
            raise ValueError(f"{section}.{name}: expected one of {choices}, got {values[name]!r}")


def _activation(values: Mapping, quick: bool, section: str) -> str:
    options = dict(values.get("act_kwargs") or {})
    approximate = options.pop("approximate", "none")
    if options or approximate not in ("none", "tanh") or (quick and approximate == "tanh"):
        raise ValueError(
            f"model_cfg.{section}.act_kwargs: expected 'approximate' to be 'none' or 'tanh', got {values['act_kwargs']!r}"
        )
    return "quick_gelu" if quick else "gelu_tanh" if approximate == "tanh" else "gelu"


def _eps(values: Mapping, section: str) -> float:
    options = dict(values.get("norm_kwargs") or {})
    eps = options.pop("eps", 1e-5)
    if options:
        raise ValueError(f"model_cfg.{section}.norm_kwargs: expected 'eps' alone, got {values['norm_kwargs']!r}")
    return eps


def config_of(settings: Mapping, state: Mapping[str, Tensor], task: str | None = None) -> CLIPConfig:
    """Sizes from `open_clip_config.json` and, where that leaves them to timm, from the tensors.

    Raises:
        ValueError: something that our towers do not have; the message names it.
    """
    model: Any = settings.get("model_cfg")
    vision: Any = model.get("vision_cfg") if isinstance(model, Mapping) else None
    text: Any = model.get("text_cfg") if isinstance(model, Mapping) else None
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        raise ValueError("model_cfg: expected an object with 'vision_cfg' and 'text_cfg'")
    _check("model_cfg", model, _KNOWN)
    quick = bool(model.get("quick_gelu", False))
    image_size = vision.get("image_size", 224)
    if isinstance(image_size, (list, tuple)) and len(set(image_size)) == 1:
        image_size = image_size[0]
    _check("model_cfg.vision_cfg", vision, _KNOWN_VISION)
    if vision.get("timm_model_name"):
        sizes, act, eps = _timm_sizes(vision, state), "gelu", 1e-6  # timm's own, whatever quick_gelu says
    else:
        sizes, act, eps = _sizes(vision), _activation(vision, quick, "vision_cfg"), _eps(vision, "vision_cfg")
    if _eps(text, "text_cfg") != eps:
        raise ValueError(
            f"model_cfg.text_cfg.norm_kwargs: expected eps {eps} as in the image tower, got {_eps(text, 'text_cfg')}"
        )
    sd_num, sd_dim = Sizes(state, "a CLIP").entries(sizes["embed_dim"])
    text_act = _activation(text, quick, "text_cfg")
    return CLIPConfig(
        vision=CLIPVisionConfig(
            image_size=image_size, sd_num=sd_num, sd_dim=sd_dim, map_func=sd_dim != sizes["embed_dim"], **sizes
        ),
        text=_text(text),
        embed_dim=model["embed_dim"],
        hidden_act=act,
        text_act=None if text_act == act else text_act,
        norm_eps=eps,
        logit_bias="logit_bias" in state,
    )


def _text(text: Mapping) -> CLIPTextConfig:
    """Sizes of the text tower."""
    _check("model_cfg.text_cfg", text, _KNOWN_TEXT, pool_type=("argmax", "last", "eos"), proj_type=("linear",))
    cleaning = dict(text.get("tokenizer_kwargs") or {})
    # The tokenizer of CLIP lowers letters itself.
    known = {None: "", "whitespace": "", "lower": "lower", "canonicalize": "canonicalize"}
    clean = known.get(cleaning.pop("clean", None))
    if cleaning or clean is None:
        raise ValueError(f"model_cfg.text_cfg.tokenizer_kwargs: not supported here, got {text['tokenizer_kwargs']!r}")
    pool, width = text.get("pool_type", "argmax"), text.get("width", 512)
    last = pool == "last"
    if last != bool(text.get("no_causal_mask", False)):
        raise ValueError("model_cfg.text_cfg: expected pool_type 'last' together with no_causal_mask, got one of them")
    return CLIPTextConfig(
        hidden_size=width,
        num_hidden_layers=text.get("layers", 12),
        num_attention_heads=text.get("heads", 8),
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        vocab_size=text.get("vocab_size", 49408),
        max_position_embeddings=text.get("context_length", 77),
        eos_token_id=text.get("eos_id", 2) if pool == "eos" else None,
        causal=not last,
        padded=last,
        clean=clean,
        projection_bias=bool(text.get("proj_bias", False)),
    )


def _sizes(vision: Mapping) -> dict[str, Any]:
    """Sizes of open_clip's own image tower."""
    if not isinstance(layers := vision.get("layers", 12), int):
        raise ValueError("the image tower is a ResNet, which has no tokens to prune")
    _check("model_cfg.vision_cfg", vision, _KNOWN_VISION, pool_type=("tok", "avg"))
    width = vision.get("width", 768)
    return {
        "patch_size": vision.get("patch_size", 16),
        "embed_dim": width,
        "depth": layers,
        "num_heads": width // vision.get("head_width", 64),
        "mlp_ratio": float(vision.get("mlp_ratio", 4.0)),
        "norm_pre": not vision.get("no_ln_pre", False),
        "pool": "mean" if vision.get("pool_type") == "avg" else "class",
        "norm_after_pool": bool(vision.get("final_ln_after_pool", False)),
    }


def _timm_sizes(vision: Mapping, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of SigLIP's image tower, of which open_clip's file has but the name."""
    name = vision["timm_model_name"]
    if not _TIMM_NAME.fullmatch(name) or vision.get("timm_pool") != "map" or vision.get("timm_proj") != "none":
        raise ValueError(
            f"model_cfg.vision_cfg.timm_model_name: of timm only SigLIP's vit_*_patch*_siglip_* with timm_pool 'map' and "
            f"timm_proj 'none' are supported, got {name!r}"
        )
    tower = Sizes(state, "timm's vision transformer").tower(f"{_TRUNK}.")
    return {
        **tower,
        "num_heads": 16 if "so400m" in name else tower["num_heads"],
        "class_token": False,
        "patch_bias": True,
        "norm_pre": False,
        "pool": "attention",
        "projection": False,
    }


def transform_of(settings: Mapping, image_size: int) -> ImageTransform:
    """How pictures become pixels (`preprocess_cfg`), as open_clip's own evaluation transform.

    Raises:
        ValueError: a setting that is not known; the message names it.
    """
    values = dict(settings.get("preprocess_cfg") or {})
    mode, filter_ = values.pop("resize_mode", "shortest"), values.pop("interpolation", "bicubic")
    mean, std = values.pop("mean", None), values.pop("std", None)
    for name, default in (("size", None), ("mode", "RGB"), ("fill_color", 0)):
        value = values.pop(name, default)
        if name != "size" and value != default:
            raise ValueError(f"preprocess_cfg.{name}: expected {default!r}, got {value!r}")
    if values:
        raise ValueError(f"preprocess_cfg: unknown settings {', '.join(sorted(values))}")
    return ImageTransform.open_clip(image_size, mode, filter_, mean, std)
