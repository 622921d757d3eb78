"""Where the cross-modal dictionary begins, for a model that has not learnt one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..guidance import QueryModel
from ..models import Model


@torch.no_grad()
def dictionary_from_tokens(model: Model, forward: Callable[[], object], generator: torch.Generator) -> Tensor:
    """Entries that are tokens of the model: as many from each layer of each modality, less that layer's mean token.

    The threshold of a sample is the lowest importance that any entry sees (see :func:`madtp_kernels.score_tokens`). Entries
    drawn from a normal distribution, as MADTP's begin, are nearest to a few outlying tokens only, which are important ones: even
    the lowest temperature then drops half of the tokens. Entries that are tokens lie near all kinds of them.

    Args:
        model: its query models say how its tokens are compared with the dictionary.
        forward: runs the model without pruning and with summaries on some samples.
        generator: draws the tokens.

    Returns:
        ``[M, sd_dim]`` float32, in the model's device.

    Raises:
        ValueError: the forward showed fewer tokens than there are entries.
    """
    layers: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, args, mapped: layers.append(mapped.float()))
        for module in model.modules()
        if isinstance(module, QueryModel)
    ]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    count = model.space_dict.shape[0]
    entries = []
    for number, tokens in enumerate(layers):
        share = count * (number + 1) // len(layers) - count * number // len(layers)
        if share > len(tokens):
            raise ValueError(f"forward: expected at least {share} tokens in each of {len(layers)} layers, got {len(tokens)}")
        rows = torch.randperm(len(tokens), generator=generator)[:share]
        entries.append((tokens - tokens.mean(0))[rows.to(tokens.device)])
    if not entries:
        raise ValueError("forward: expected summaries, got none")
    return torch.cat(entries)
