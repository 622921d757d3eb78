"""Weights that no file has: those that a checkpoint lacks by design, and those of a model with random weights."""

from __future__ import annotations

import math
import re
import zlib

import torch
from torch import Tensor, nn

__all__ = ["INVENTED", "initial_weight", "randomize"]

# Weights that original BLIP and CLIP checkpoints lack by design: the dictionary with its maps, and what NLVR adds to BLIP.
INVENTED = re.compile(r"^space_dict$|^temp$|\.merge_layer\.|_query_model\.q_map\.|\.query_models\.\d+\.")


def initial_weight(key: str, shape: torch.Size) -> Tensor:
    """A value, float32 on the CPU, for a weight that a checkpoint lacks by design, distributed as MADTP's training begins.

    It depends on the name and the shape alone (the generator's seed is the name's CRC-32), so that every process, device and
    dtype has the same, whatever else is missing.
    """
    if key == "temp":
        return torch.full(shape, 0.07)
    if key.endswith("bias"):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.empty(shape).normal_(0.0, 1.0 if key == "space_dict" else 0.02, generator=generator)


def randomize(model: nn.Module, seed: int = 0, qk_gain: float = 1.6) -> None:
    """Random weights that keep activations of order one, with peaked attention, so that tokens differ and pruning bites.

    Linear weights are N(0, 1/fan_in), those of queries and keys ``qk_gain`` times larger; embeddings N(0, 1) over the root of
    their width; norms are the identity. The same seed gives the same weights on every device and in every dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def fill(parameter: Tensor, std: float) -> None:
        values = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
        parameter.copy_(values)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "space_dict":
                fill(parameter, 1.0)
            elif name == "temp":
                parameter.fill_(0.07)
            elif name == "logit_scale":
                parameter.fill_(math.log(1 / 0.07))
            elif "norm" in name.lower():
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                parameter.zero_()
            elif "embeddings" in name or name.endswith(("cls_token", "pos_embed")):
                fill(parameter, 0.5)
            else:
                fill(parameter, parameter[0].numel() ** -0.5)
            if name.endswith("qkv.weight"):
                parameter[: 2 * parameter.shape[1]] *= qk_gain
