"""Where the cross-modal dictionary begins, for a model that has not learnt one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..guidance import QueryModel
from ..model import Model
from ..pruning import Pruning
from ..tasks import Task

EXAMPLES, TOGETHER = 64, 16  # how many are looked at, and at most at a time


def dictionary_from_examples(model: Model, task: Task, examples: Sequence, seed: int) -> Tensor:
    """Entries that are tokens of a model, from batches of examples as they are; the same for the same seed.

    Args:
        model, task: as in training; its weights decide what its tokens are.
        examples: of that task; up to 64 of them are taken.
        seed: draws examples and tokens.

    Returns:
        ``[M, sd_dim]`` float32 on the model's device.

    Raises:
        ValueError: the examples have fewer tokens than there are entries.
    """
    chosen = np.random.default_rng(seed).permutation(len(examples))[:EXAMPLES]
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for numbers in np.array_split(chosen, -(-len(chosen) // TOGETHER)):
        batch = task.collate([task.instance(examples[number]) for number in numbers])
        forward = partial(task.forward, model, batch, Pruning(), True)
        drawn.append(dictionary_from_tokens(model, forward, generator))
    # Every dictionary has its layers in the same places: neighbours come from different batches.
    places = torch.arange(len(drawn[0]))
    return torch.stack(drawn)[places % len(drawn), places]


@torch.no_grad()
def dictionary_from_tokens(model: Model, forward: Callable[[], object], generator: torch.Generator) -> Tensor:
    """Entries that are tokens of the model: as many from each layer of each modality, less that layer's mean token.

    The threshold of a sample is the lowest importance that any entry sees (see :func:`madtp_kernels.score_tokens`).
    Entries drawn from a normal distribution, as MADTP's begin, are nearest to a few outlying tokens only, which are
    important ones: even the lowest temperature then drops half of the tokens. Entries that are tokens lie near all
    kinds of them.

    Args:
        model: its query models say how its tokens are compared with the dictionary.
        forward: runs the model without pruning and with alignment features on some samples.
        generator: draws the tokens.

    Returns:
        ``[M, sd_dim]`` float32, on the model's device.

    Raises:
        ValueError: the forward showed fewer tokens than there are entries.
    """
    count = model.space_dict.shape[0]
    layers: list[Tensor] = []  # of each as many as could be needed: how many layers there are is known at the end

    def look(module: QueryModel, args: tuple, mapped: Tensor) -> None:
        rows = torch.randperm(len(mapped), generator=generator)[:count].to(mapped.device)
        layers.append((mapped[rows] - mapped.mean(0)).float())

    hooks = [module.register_forward_hook(look) for module in model.modules() if isinstance(module, QueryModel)]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    if not layers:
        raise ValueError("forward: expected alignment features, got none")
    entries = []
    for number, tokens in enumerate(layers):
        share = count * (number + 1) // len(layers) - count * number // len(layers)
        if share > len(tokens):
            raise ValueError(
                f"dictionary: {count} entries take at least {share} tokens from each of {len(layers)} layers, got {len(tokens)}; "
                "more examples have more"
            )
        entries.append(tokens[:share])
    return torch.cat(entries)
