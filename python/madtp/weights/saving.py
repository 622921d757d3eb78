"""From models to files."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import safetensors.torch

from ..files import replacing, write_json
from ..model import Model
from .files import CONFIG, PREPROCESSOR, TOKENIZER, WEIGHTS

_log = logging.getLogger("madtp")


def save_pretrained(model: Model, directory: str | os.PathLike) -> None:
    """Write `model.safetensors`, `config.json` (sizes, pruning), `preprocessor_config.json` (how pictures
    become pixels) and the tokenizer, each file atomically.

    Raises:
        ValueError: no model of this package, or no name of a directory.
    """
    if not isinstance(model, Model):
        raise ValueError(f"model: expected a model of madtp, got a {type(model).__name__}")
    if not str(directory):
        raise ValueError("directory: expected a name, got ''")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(directory / WEIGHTS) as file:
        file.write(safetensors.torch.save(state, metadata={"format": "pt"}))
    settings = {**model.config.to_dict(), "pruning": model.pruning.to_dict()}
    write_json(directory / CONFIG, settings)
    if model.processor is not None and model.processor.transform is not None:
        write_json(directory / PREPROCESSOR, model.processor.transform.settings())
    if model.config.text is None:
        return
    if model.processor is None:
        _log.warning("%s: saved without a tokenizer, because the model has no processor", directory)
        return
    try:
        model.processor.tokenizer.save_pretrained(directory / TOKENIZER)
    except (OSError, ValueError) as error:
        _log.warning("%s: saved without a tokenizer, because the model's could not be opened: %s", directory, error)
