"""From files to models in three steps: locate the source, build the model without memory, fill it.

Files are opened with `weights_only=True` or as safetensors. Nothing is dropped silently: keys that are missing or unexpected
are named in the error, and weights that had to be made up are named in a warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from madtp_kernels import backends

from ..config import Config
from ..model import Model
from ..pruning import MADTP, Pruning, rule_named
from ..tasks import TASKS
from ..towers import interpolate_positions
from .files import CheckpointError, naming
from .made_up import INVENTED, initial_weight, randomize
from .sources import Source, locate

__all__ = ["load"]

_log = logging.getLogger("madtp")
_NAMED = 200  # keys in an error


def load(
    source: str | os.PathLike | Mapping[str, Tensor],
    task: str | None = None,
    *,
    temperature: float | None = None,
    pruning: Pruning | str | None = None,
    config: Config | dict | None = None,
    image_size: int | None = None,
    text_mode: str | None = None,
    hidden_act: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    grouping: str = "instance",
    use_sizes: bool | None = None,
) -> Model:
    """A model in evaluation mode from wherever its weights are.

    Args:
        source: one of
            a directory written by :func:`save_pretrained`;
            a MADTP checkpoint file ``{'model', 'epoch', 'temperature'}``;
            an original BLIP checkpoint file (position embedding interpolated to ``image_size``; for NLVR, a single
            cross-attention is copied for both images);
            a CLIP of OpenAI or open_clip as a state dict (see ``hidden_act``);
            a directory of open_clip (`open_clip_config.json`): CLIP, and SigLIP with timm's image tower;
            a directory written by transformers, with its weights in one file or in parts: `BlipForConditionalGeneration`,
            `BlipForQuestionAnswering`, `BlipForImageTextRetrieval`; `CLIPModel`, `SiglipModel`, `Siglip2Model`, or one of
            their towers; `Dinov2Model`, `Dinov2WithRegistersModel`, `ViTModel`;
            a Hugging Face hub id of such a directory;
            a state dict with key names of any of these (give ``config`` where heads are not 64 wide);
            "demo" and "demo-dense", the small NLVR models in the package, trained on :mod:`madtp.data.synthetic`, pruned and
            dense, with weights of their own; or "random:base", the real sizes with random weights (of NLVR where no task is
            given).
        task: one of :data:`madtp.tasks.TASKS`; by default the saved model's, or the one that the key names tell.
        temperature: pruning temperature; by default the checkpoint's, or 0 (dense) where it has none.
        pruning: another rule than the checkpoint's, or the name of one of :data:`madtp.pruning.METHODS`.
        config: sizes; by default the source's own, or read off the tensors.
        image_size: other than the checkpoint's; the position embedding is interpolated.
        hidden_act: "quick_gelu" or "gelu", for a CLIP whose source does not tell: a state dict of OpenAI (quick_gelu) or of
            open_clip (gelu, unless the model's name says quickgelu). Nothing is guessed.
        text_mode: "clean" or "compat", for tasks that have both; by default the saved model's, or "clean", and then a pruned
            checkpoint of MADTP, which was trained in the other, is warned of.
        tokenizer: directory, `vocab.txt` or hub id of the tokenizer; by default the one that lies with the model (in its
            directory, or beside its file), or bert-base-uncased (CLIP: openai/clip-vit-large-patch14). It is opened at first
            use, so that a model that is given ids needs none.
        device, dtype: where and in which precision the model runs.
        backend: force an implementation of the kernels ("reference", "cpu", "triton", "cuda").
        grouping: "instance", "batch", or for NLVR "pair"; see :class:`madtp.model.Model`.
        use_sizes: merged tokens weigh what they stand for; by default as the model was saved, or not.

    Pictures become pixels (`model.processor`) as the model's own `preprocessor_config.json` or `processor_config.json` says,
    and where it has none as models of its kind were trained: the whole picture squashed to a square for BLIP, SigLIP and ViT,
    and for MADTP, of CLIP too; shorter side and centre for CLIP from elsewhere and DINOv2.

    Raises:
        CheckpointError: nothing there, a file that cannot be opened safely, weights that do not fit or are not finite, or
            settings of a processor that cannot be honoured.
        ValueError: an argument that makes no sense, such as a device that is not there.
    """
    device, task, config = _checked(task, config, device, dtype, backend)
    found = locate(source, task, config, hidden_act)
    found = _adjusted(found, image_size, text_mode)
    rule = _rule(found, temperature, pruning, use_sizes)
    if text_mode is None and config is None:
        _report_mode(found, rule)
    model = _build(found.config, dtype, rule, grouping, backend)
    if found.state is None:
        randomize(model.to_empty(device=device))
    else:
        _fill(model, found.state, found.origin, device)
    # Random weights know no words: the small bundled vocabulary serves, and needs no download.
    usual = "demo" if found.state is None else None
    with naming(found.origin):
        model.processor = TASKS[found.config.task].Processor.of(
            found.config, tokenizer or found.tokenizer or usual, found.transform
        )
    return model.eval()


def _checked(
    task: str | None, config: Config | dict | None, device: torch.device | str, dtype: torch.dtype, backend: str | None
) -> tuple[torch.device, str | None, Config | None]:
    """Device, task and configuration, once the arguments are known to make sense."""
    if task is not None and task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point type, got {dtype!r}")
    device = _usable(device)
    if isinstance(config, dict):
        task = task or config.get("task")
        if task not in TASKS:
            raise ValueError(f"task: give one of {', '.join(TASKS)}, since config names none")
        config = TASKS[task].Config.from_dict(config)
    if config is not None and not isinstance(config, Config):
        raise ValueError(f"config: expected sizes of a model, as a Config or its dict, got a {type(config).__name__}")
    if config is not None and task not in (None, config.task):
        raise ValueError(f"config: sizes of a model for task {config.task!r}, not {task!r}")
    return device, task if config is None else config.task, config


def _usable(device: torch.device | str) -> torch.device:
    """A device that tensors can be put on."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    # torch without CUDA, no GPU, no such number or name
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def _adjusted(found: Source, image_size: int | None, text_mode: str | None) -> Source:
    """The source with what the caller wants otherwise."""
    config, transform = found.config, found.transform
    if image_size is not None:
        if transform is None:
            raise ValueError("image_size: this model has a text tower only")
        transform = transform.at(image_size)
        if getattr(config.vision, "positions", "fixed") == "fixed":
            config = replace(config, vision=replace(config.vision, image_size=image_size))
    if text_mode is not None:
        if not hasattr(config, "text_mode"):
            raise ValueError(f"text_mode: models for task {config.task!r} have only one, got {text_mode!r}")
        config = replace(config, text_mode=text_mode)
    return found._replace(config=config, transform=transform)


def _rule(found: Source, temperature: float | None, pruning: Pruning | str | None, use_sizes: bool | None) -> Pruning:
    """How the model is pruned: as it was saved, unless the caller says otherwise."""
    if use_sizes not in (None, True, False):
        raise ValueError(f"use_sizes: expected True, False or None, got {use_sizes!r}")
    if pruning is not None and temperature is not None:
        raise ValueError("pruning, temperature: expected one of them, got both")
    if isinstance(pruning, type):
        raise ValueError(f"pruning: expected a rule or the name of one, got the class {pruning.__name__}")
    if isinstance(pruning, str):
        pruning = rule_named(pruning, "pruning")
    saved, before = found.settings.get("pruning"), found.settings.get("temperature")
    if saved is not None and before is not None:
        raise CheckpointError(f"{found.origin}: expected pruning or temperature, got both: {saved} and {before}")
    with naming(found.origin):
        rule = MADTP(before or 0.0) if saved is None else Pruning.from_dict(saved)
    if pruning is not None:
        rule = pruning
    elif temperature is not None:
        rule = MADTP(temperature, proportional_attention=rule.proportional_attention)
    if use_sizes is None and pruning is None:
        use_sizes = found.settings.get("use_sizes")
    return rule if use_sizes is None else replace(rule, proportional_attention=bool(use_sizes))


def _build(config: Config, dtype: torch.dtype, pruning: Pruning, grouping: str, backend: str | None) -> Model:
    """A model without memory: parameters are allocated once, in the dtype asked for, and not initialised twice."""
    with torch.device("meta"):
        model = TASKS[config.task].Model(config, pruning, grouping, backend=backend)
    return model.to(dtype)


def _fill(model: Model, state: dict[str, Tensor], origin: str, device: torch.device) -> None:
    """Give a model without memory (on the device "meta") these weights, once it is known that they fit; make up only what
    BLIP checkpoints lack by design, and say so."""
    _interpolate(model, state, origin)
    invented = _check_fit(model, state, origin)
    model.to_empty(device=device)
    own = model.state_dict()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key] if key in state else initial_weight(key, parameter.shape))
    bad = [key for key, parameter in own.items() if not _finite(parameter)]
    if bad:
        raise CheckpointError(f"{origin}: weights that are not finite numbers, in {model.dtype}: {_shortened(bad, 5)}")
    _report(model, invented, origin)


def _interpolate(model: Model, state: dict[str, Tensor], origin: str) -> None:
    """Fit the position embedding in the state to the model's size of pictures."""
    own, prefix = model.state_dict(), int(getattr(model.config.vision, "class_token", True))
    for position in ("visual_encoder.pos_embed", "visual.pos_embed"):
        if position in state and state[position].dim() == 3 and state[position].shape != own[position].shape:
            side = round((own[position].shape[1] - prefix) ** 0.5)
            try:
                state[position] = interpolate_positions(state[position], (side, side), prefix)
            except ValueError as error:
                raise CheckpointError(f"{origin}: {position.split('.')[0]}.{error}") from error


def _check_fit(model: Model, state: dict[str, Tensor], origin: str) -> list[str]:
    """Names of the weights that the state lacks by design; CheckpointError where it does not fit otherwise."""
    own = model.state_dict()
    missing = sorted(set(own) - set(state))
    invented = [key for key in missing if INVENTED.search(key)]
    unexpected = sorted(set(state) - set(own))
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    # Whole numbers are what a quantised model holds, with scales that nothing here knows.
    mistyped = [f"{key} {state[key].dtype}" for key in own if key in state and not state[key].is_floating_point()]
    problems = [
        f"{what}: {_shortened(keys, _NAMED)}"
        for what, keys in (
            ("missing", [key for key in missing if key not in invented]),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("not of a floating-point type", mistyped),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f"{origin}: weights do not fit a model for task {model.config.task!r}; " + "; ".join(problems)
        )
    return invented


def _shortened(names: list[str], most: int) -> str:
    """A list for a message, of which no more than so many are named."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _report(model: Model, invented: list[str], origin: str) -> None:
    """Say which weights were made up."""
    if "temp" in invented:
        _log.info("%s has no temp: set to 0.07, where BLIP's training begins; nothing but training uses it", origin)
        invented.remove("temp")
    if invented:
        guides = [key for key in invented if key == "space_dict" or "query_model" in key]
        named = [key for key in invented if key not in guides] + guides[:3]
        if len(guides) > 3:
            named.append(f"{len(guides) - 3} maps more")
        # A model that runs without pruning uses no dictionary, but everything else.
        _log.log(
            logging.WARNING if model.guided or len(invented) > len(guides) else logging.INFO,
            "%s has no %s: initialised at random, always alike, as MADTP does before training. Pruning needs a trained "
            "dictionary.",
            origin,
            ", ".join(named),
        )


def _report_mode(found: Source, rule: Pruning) -> None:
    """Say that a checkpoint whose training pruned padded texts will prune them without padding, if nobody chose that."""
    trained = found.settings.get("temperature") and "text_mode" not in found.settings
    if trained and getattr(found.config, "text_mode", None) == "clean" and isinstance(rule, MADTP) and rule.active:
        _log.warning(
            "%s was trained with padded texts, and prunes them without padding, which makes it another model: give text_mode "
            "'compat' (--text-mode compat) for what MADTP's code computes, or 'clean'",
            found.origin,
        )


def _finite(weight: Tensor) -> bool:
    # A sum needs no memory; only where it overflows or is not finite, a closer look does.
    return bool(weight.sum(dtype=torch.float32).isfinite()) or bool(weight.isfinite().all())
