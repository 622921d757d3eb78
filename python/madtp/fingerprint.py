"""What a model's results depend on, as one short text: result files and indexes hold it, and do not go on with another."""

from __future__ import annotations

import hashlib
import json

import torch

from .model import Model

__all__ = ["fingerprint"]


def fingerprint(model: Model, *, texts: bool = True, **settings) -> str:
    """A digest of everything that decides what a model answers, wherever its files lie and whatever they are called.

    That is: sizes, every weight (so also a dictionary that was made up where a checkpoint has none), dtype, pruning,
    grouping, how pictures become pixels, and the tokenizer. It takes about a second per gigabyte of weights.

    Args:
        model: with a processor or without.
        texts: whether texts are read or written; where not, the tokenizer has no say and is not opened.
        settings: what else decides the results, as JSON values: seeds, candidates, limits.

    Returns:
        ``"sha256 "`` and 32 hexadecimal digits.

    Raises:
        ValueError: a tokenizer that cannot be opened.
        TypeError: a setting that is no JSON value.
    """
    processor = model.processor
    facts = {
        "config": model.config.to_dict(),
        "dtype": str(model.dtype),
        "pruning": model.pruning.to_dict(),
        "grouping": model.grouping,
        "processor": None if processor is None else processor.facts(texts),
        "settings": settings,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(memoryview(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return f"sha256 {digest.hexdigest()[:32]}"
