"""The first step of loading: what a source is, whose names its weights have, and everything that it says about itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .. import hub
from ..config import CLIPConfig, Config, VisionConfig
from ..image_transform import ImageTransform
from ..tasks import TASKS
from . import key_maps
from .files import (
    CONFIG,
    OPEN_CLIP,
    OPEN_CLIP_WEIGHTS,
    PREPROCESSOR,
    TOKENIZER,
    WEIGHTS,
    CheckpointError,
    naming,
    read_file,
    read_json,
    read_parts,
)

__all__ = ["Source", "locate"]

_log = logging.getLogger("madtp")
_BUNDLED = {"demo": "pruned", "demo-dense": "dense"}  # names of models in the package, and their folders
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


class Source(NamedTuple):
    """A model before it is built."""

    origin: str
    """Its name in errors."""
    state: dict[str, Tensor] | None
    """Weights under our names; None: to be drawn at random."""
    config: Config
    transform: ImageTransform | None
    """How pictures become pixels; None for a model of texts alone."""
    settings: Mapping[str, Any] = {}
    """What a saved model says beside its sizes, such as how it is pruned."""
    tokenizer: Path | None = None
    """The one that lies with the model."""


def locate(
    source: str | os.PathLike | Mapping[str, Tensor], task: str | None, config: Config | None, hidden_act: str | None
) -> Source:
    """Find and read a source.

    Args:
        source, task, config, hidden_act: as :func:`madtp.load` takes them; a task and a configuration that agree.

    Raises:
        CheckpointError: nothing there, a file that cannot be opened safely, keys or settings that do not tell what is needed.
        ValueError: ``hidden_act`` for a source that says something else.
    """
    if isinstance(source, Mapping):
        return _of_state("the state dict", dict(source), task, config, hidden_act)
    if source == "random:base":
        config = config or TASKS[task or next(iter(TASKS))].Config()
        return Source(source, None, _activated(config, hidden_act), _usual(config))
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        hint = "; give its state_dict()" if hasattr(source, "state_dict") else ""
        raise ValueError(
            f"source: expected a path, a hub id or a state dict, got {type(source).__name__} {source!r:.80}{hint}"
        )
    place, origin = _place(source), str(source)
    if not place.is_dir():
        state, temperature = read_file(place)
        if temperature is not None and temperature < 0:
            _log.warning(
                "%s: with its temperature of %g MADTP's code prunes nothing, and so does this model",
                origin,
                temperature,
            )
            temperature = 0.0  # training lowers it step by step, and does not stop at 0
        found = _of_state(origin, state, task, config, hidden_act, {"temperature": temperature})
        return found._replace(tokenizer=_tokenizer(place.parent))
    settings = _settings(place)
    if "model_type" in settings:
        found = _of_transformers(origin, place, settings, task, config)
    elif "model_cfg" in settings:
        found = _of_open_clip(origin, place, settings, task, config)
    else:
        found = _of_ours(origin, place, settings, task, config)
    return found._replace(config=_activated(found.config, hidden_act, found), tokenizer=_tokenizer(place))


def _place(source: str | os.PathLike) -> Path:
    """File or directory of a source that is a path, a bundled model or a hub id."""
    if source in _BUNDLED:
        return Path(str(resources.files("madtp") / "data" / "shapes" / _BUNDLED[source]))
    path = Path(source)
    if path.exists():
        return path
    name = str(source)
    if "/" not in name or not hub.is_id(name) or path.suffix in (".pth", ".pt", ".safetensors", ".bin"):
        raise CheckpointError(f"{source}: no such file or directory")
    try:
        found = hub.download(name, ["*.json", "*.txt", "*.model", "*.safetensors"])
        if not list(found.glob("*.safetensors")):  # older repositories; those of today hold the same weights twice
            found = hub.download(name, ["*.json", "*.txt", "*.model", "*.bin"])
        return found
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _settings(place: Path) -> dict:
    """What the directory of a model says about it: transformers', open_clip's or our own file."""
    own = read_json(place / CONFIG) if (place / CONFIG).exists() else {}
    if (place / OPEN_CLIP).exists() and own.get("model_type") not in key_maps.HUGGING_FACE and "task" not in own:
        return read_json(place / OPEN_CLIP)
    if not (place / CONFIG).exists():
        raise CheckpointError(f"{place / CONFIG}: no such file; a model directory holds {CONFIG} and {WEIGHTS}")
    return own


def _tokenizer(place: Path) -> Path | None:
    """The tokenizer that lies with a model: in a folder of its own, or beside the weights."""
    folders = (place / TOKENIZER, place)
    return next((folder for folder in folders if any((folder / name).exists() for name in _VOCABULARIES)), None)


# ---- kinds of sources ---------------------------------------------------------------------------------------------


def _of_state(
    origin: str,
    state: dict[str, Tensor],
    task: str | None,
    config: Config | None,
    hidden_act: str | None,
    settings: Mapping[str, Any] | None = None,
) -> Source:
    """A state dict, whose keys have to tell."""
    layout, task = _recognise(state, task, origin)
    kind = TASKS[task].Config
    own = state.keys() & {"input_resolution", "space_dict", "visual.cls_token"}
    with naming(origin):
        state = layout.to_ours(state, task)
        if config is not None:
            config = _activated(config, hidden_act)
        elif issubclass(kind, CLIPConfig) and hidden_act is None and not own:
            raise ValueError(
                "its keys do not tell the activation of its MLPs: give hidden_act (--hidden-act), 'quick_gelu' (weights of OpenAI, "
                "and models of open_clip that are called so) or 'gelu' (others, as LAION's), or load the directory with its "
                f"{OPEN_CLIP} or {CONFIG}"
            )
        elif issubclass(kind, CLIPConfig):
            config = key_maps.clip.infer_config(state, hidden_act or "quick_gelu")
        else:
            eps = getattr(layout, "LAYER_NORM_EPS", VisionConfig.layer_norm_eps)
            config = key_maps.blip.infer_config(state, kind, eps)
    # MADTP trains its CLIP, which has a dictionary, with squashed pictures.
    centred = layout is key_maps.FAMILIES["clip"] or "space_dict" not in state
    return Source(origin, state, config, _usual(config, centred), settings or {})


def _of_transformers(origin: str, place: Path, settings: dict, task: str | None, config: Config | None) -> Source:
    """A directory that transformers wrote."""
    layout = key_maps.HUGGING_FACE.get(settings["model_type"])
    if layout is None:
        known = ", ".join(key_maps.HUGGING_FACE)
        raise CheckpointError(f"{place / CONFIG}: 'model_type' is {settings['model_type']!r}, not one of {known}")
    state = read_parts(place)
    with naming(place / CONFIG, (TypeError, ValueError)):
        config = config or layout.config_of(settings, state, task)
    _check_task(origin, layout.task_of(state) or config.task, task)
    family = getattr(layout, "pixels", "blip")
    with naming(origin):
        state = layout.to_ours(state, config.task)
    beside = {"temperature": settings.get("temperature")} if "space_dict" in state else {}
    transform = _read_transform(place, family) if config.vision is not None else None
    return Source(origin, state, config, transform or _usual(config), beside)


def _of_open_clip(origin: str, place: Path, settings: dict, task: str | None, config: Config | None) -> Source:
    """A directory as open_clip pushes it to the hub."""
    _check_task(origin, "clip", task)
    state, layout = read_parts(place, OPEN_CLIP_WEIGHTS), key_maps.open_clip
    with naming(place / OPEN_CLIP, (KeyError, TypeError, ValueError)):
        config = config or layout.config_of(settings, state, task)
        transform = layout.transform_of(settings, config.vision.image_size)
    with naming(origin):
        return Source(origin, layout.to_ours(state), config, transform)


def _of_ours(origin: str, place: Path, settings: dict, task: str | None, config: Config | None) -> Source:
    """A directory that :func:`madtp.save_pretrained` wrote."""
    saved = settings.get("task", task)
    _check_task(origin, saved, task)
    if saved not in TASKS:
        raise CheckpointError(f"{place / CONFIG}: 'task' is {saved!r}, not one of {', '.join(TASKS)}")
    with naming(place / CONFIG, (TypeError, ValueError)):
        config = config or TASKS[saved].Config.from_dict(settings)
    state, _ = read_file(place / WEIGHTS)
    if any(saved in layout.TASKS for layout in key_maps.LAYOUTS):  # the weights of other tasks have our names
        layout, _ = _recognise(state, saved, origin)
        state = layout.to_ours(state, saved)
    # Models that were saved without the file of a processor were made with squashed pictures.
    transform = None
    if config.vision is not None:
        transform = _read_transform(place, "blip") or ImageTransform.squash(config.vision.image_size)
    return Source(origin, state, config, transform, settings)


def _check_task(origin: str, found: str | None, task: str | None) -> None:
    if task not in (None, found):
        raise CheckpointError(f"{origin}: holds a model for task {found!r}, not {task!r}")


def _recognise(state: Mapping[str, Tensor], task: str | None, origin: str) -> tuple[Any, str]:
    """Layout and task of a state dict. Keys decide; a task that the caller names has to agree where they tell."""
    found = key_maps.recognise(state)
    if found is None and task is None:
        modules = sorted({key.split(".")[0] for key in state})
        some = ", ".join(modules[:8]) + (", ..." if len(modules) > 8 else "")
        raise CheckpointError(
            f"{origin}: its keys ({some or 'there are none'}) do not tell what it is for; give the task (task=, --task), one of "
            + ", ".join(TASKS)
        )
    if found is None:
        return key_maps.for_task(task), task
    _check_task(origin, found[1], task)
    return found


def _activated(config: Config, hidden_act: str | None, source: Source | None = None) -> Config:
    """The configuration, with the activation that the caller names where the source does not tell."""
    if hidden_act is None:
        return config
    if not isinstance(config, CLIPConfig):
        raise ValueError(f"hidden_act: models for task {config.task!r} have only one, got {hidden_act!r}")
    if source is not None and config.hidden_act != hidden_act:
        raise ValueError(f"hidden_act: {source.origin} says {config.hidden_act!r}, got {hidden_act!r}")
    return replace(config, hidden_act=hidden_act)


# ---- sizes and pixels ---------------------------------------------------------------------------------------------


def _usual(config: Config, centred: bool = True) -> ImageTransform | None:
    """How pictures become pixels where no file tells: as models of its kind were trained; for a CLIP ``centred``, or squashed
    as MADTP's."""
    if config.vision is None:
        return None
    size, family = config.vision.image_size, _family(config)
    if family == "blip" or (family == "clip" and not centred):
        return ImageTransform.squash(size)
    if family == "clip":
        return ImageTransform.centre(size)
    transform = ImageTransform.from_settings({}, family)
    if family == "siglip" and config.text is not None and config.text.clean == "lower":
        transform = replace(transform, resample=2)  # SigLIP 2: bilinear
    if transform.max_patches is not None:
        return replace(transform, patch=config.vision.patch_size)
    return transform.at(size) if config.vision.positions == "fixed" else transform


def _family(config: Config) -> str:
    """Whose image tower it is, by what only that one has; see :meth:`ImageTransform.from_settings`."""
    if not isinstance(config, CLIPConfig):
        return "blip"
    vision = config.vision
    if not vision.class_token:
        return "siglip2" if vision.patches_last else "siglip"
    return "dinov2" if vision.layer_scale else "vit" if vision.patch_bias else "clip"


def _read_transform(directory: Path, family: str) -> ImageTransform | None:
    """The model's own way from pictures to pixels, where a file tells; transformers 5 has one file for all processors."""
    for name, part in (("processor_config.json", "image_processor"), (PREPROCESSOR, None)):
        path = directory / name
        if not path.exists():
            continue
        settings = read_json(path)
        if part is not None and part not in settings:
            continue
        settings = settings if part is None else settings[part]
        if not isinstance(settings, dict):
            raise CheckpointError(f"{path}: {part}: expected an object, got {type(settings).__name__}")
        with naming(path):
            return ImageTransform.from_settings(settings, family)
    return None
