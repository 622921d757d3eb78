"""Key names of MADTP's CLIP checkpoints, which are OpenAI's (github.com/openai/CLIP) with MADTP's own weights beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ...config import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from .base import KeyMap, Sizes

__all__ = ["IGNORED", "MAP", "TASKS", "from_ours", "infer_config", "task_of", "to_ours"]

TASKS = ("clip",)  # whose models have these names

# Keys without a counterpart in our model -> what they are.
IGNORED = {
    r"^(visual|transformer|token_embedding|ln_final|positional_embedding|text_projection)_m(\.|$)": (
        "momentum copies, for training"
    ),
    r"^((image|text|idx)_queue|ptr_queue)$": "queues of negatives, for training",
    r"^(input_resolution|context_length|vocab_size)$": "sizes that the other tensors tell",
}

# MADTP's loader holds these in float16 before the weights are copied in: linear layers, convolutions and attention with
# their biases (so the query maps too), and the two projections. Not rounded: LayerNorms, embeddings of tokens, positions and
# the class, the dictionary, the scale.
ROUNDED = re.compile(
    r"^(visual\.)?transformer\.resblocks\.\d+\."
    r"(attn\.in_proj_|attn\.out_proj\.|mlp\.c_fc\.|mlp\.c_proj\.|query_model\.q_map\.0\.)(weight|bias)$"
    r"|^visual\.conv1\.weight$|^visual\.proj$|^text_projection$"
)

# Beginnings of official key names and of ours; {} is the number of a block.
NAMES = {
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
for _theirs, _ours in (("visual.transformer.resblocks.{}", "visual"), ("transformer.resblocks.{}", "text")):
    NAMES |= {
        f"{_theirs}.ln_1": f"{_ours}.blocks.{{}}.norm1",
        f"{_theirs}.attn.in_proj_weight": f"{_ours}.blocks.{{}}.attn.qkv.weight",
        f"{_theirs}.attn.in_proj_bias": f"{_ours}.blocks.{{}}.attn.qkv.bias",
        f"{_theirs}.attn.out_proj": f"{_ours}.blocks.{{}}.attn.proj",
        f"{_theirs}.ln_2": f"{_ours}.blocks.{{}}.norm2",
        f"{_theirs}.mlp.c_fc": f"{_ours}.blocks.{{}}.mlp.fc1",
        f"{_theirs}.mlp.c_proj": f"{_ours}.blocks.{{}}.mlp.fc2",
        f"{_theirs}.query_model": f"{_ours}.query_models.{{}}",
    }

MAP = KeyMap(
    names=NAMES,
    leading={"visual.cls_token": 2, "visual.pos_embed": 1},
    transposed=frozenset({"visual.proj.weight", "text.proj.weight"}),
    ignored=IGNORED,
    own=r"^$",
)
"""Official and OpenAI names of weights, and ours."""
from_ours = MAP.from_ours  # state dict -> the same under the other names


def task_of(keys: Iterable[str]) -> str | None:
    """ "clip" for keys of a MADTP or OpenAI checkpoint, or for ours."""
    keys = set(keys)
    ours = {"visual.cls_token", "text.token_embeddings.weight"} <= keys
    return "clip" if ours or ("token_embedding.weight" in keys and any(k.startswith("visual.") for k in keys)) else None


def to_ours(state: Mapping[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
    """Official key names to ours. What is left out is listed by name in the log (INFO).

    Weights of MADTP's checkpoints are rounded as its loader rounds them; OpenAI's are in float16 already.

    Raises:
        ValueError: a CLIP whose image tower is a ResNet.
    """
    if any(key.startswith("visual.layer1.") for key in state):
        raise ValueError("the image tower is a ResNet, which has no tokens to prune")
    state = MAP.drop(state)
    if "visual.cls_token" in state:
        return state
    if "space_dict" in state:  # a checkpoint of MADTP
        state = {
            key: value.half().float() if ROUNDED.search(key) and value.is_floating_point() else value
            for key, value in state.items()
        }
    return MAP.to_ours(state)


def infer_config(state: Mapping[str, Tensor], hidden_act: str = "quick_gelu") -> CLIPConfig:
    """Sizes of a state dict with our key names. Heads are 64 wide, as in every CLIP of OpenAI's; pass a config where not.

    Raises:
        ValueError: a tensor that tells a size is missing or has another number of axes.
    """
    sizes = Sizes(state, "a CLIP")
    tower = sizes.tower("visual.")
    sd_num, sd_dim = sizes.entries(CLIPVisionConfig.sd_dim)
    vocab, hidden = sizes.shape("text.token_embeddings.weight", 2)
    image_size = sizes.side("visual.pos_embed", tower["patch_size"])
    return CLIPConfig(
        vision=CLIPVisionConfig(image_size, **tower, sd_num=sd_num, sd_dim=sd_dim, map_func=True),
        text=CLIPTextConfig(
            hidden_size=hidden,
            num_hidden_layers=sizes.count("text.blocks."),
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=sizes.shape("text.blocks.0.mlp.fc1.weight", 2)[0],
            vocab_size=vocab,
            max_position_embeddings=sizes.shape("text.position_embeddings.weight", 2)[0],
        ),
        embed_dim=sizes.shape("text.proj.weight", 2)[0],
        hidden_act=hidden_act,
    )
