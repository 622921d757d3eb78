"""From files to models: MADTP and BLIP checkpoints, saved models, state dicts, random weights; and back.

Files are opened with `weights_only=True` or as safetensors. Nothing is dropped silently: keys that are missing or unexpected
are named in the error, and weights that had to be made up are named in a warning.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import backends

from .config import NLVRConfig, TextConfig, VisionConfig
from .models.nlvr import NLVR
from .processing import NLVRProcessor

__all__ = ["CheckpointError", "load", "save_pretrained", "to_official"]

_log = logging.getLogger("madtp")
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"

# Official keys whose tensors are stacked along the first axis into one of ours. The ViT's qkv is fused already.
_FUSED = (
    (r"(attention\.self)\.{part}\.(weight|bias)$", ("query", "key", "value"), "qkv"),
    (r"(crossattention\.self[01])\.{part}\.(weight|bias)$", ("key", "value"), "kv"),
)
# Buffers of the official classes that carry no weights.
_IGNORED = re.compile(r"embeddings\.position_ids$")


class CheckpointError(ValueError):
    """A file that cannot be loaded; the message says which and why."""


# ---- key mapping --------------------------------------------------------------------------------------------------


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MADTP's and BLIP's key names to ours: fuses projections, drops buffers without weights."""
    state = {key: value for key, value in state.items() if not _IGNORED.search(key)}
    for pattern, parts, fused in _FUSED:
        lead = re.compile(r"^(.*)" + pattern.format(part=parts[0]))
        if fused == "qkv":  # "crossattention.self." would match too; it has another rule
            lead = re.compile(r"^(.*(?<!cross))" + pattern.format(part=parts[0]))
        for key in [k for k in state if lead.match(k)]:
            prefix, module, kind = lead.match(key).groups()
            sources = [f"{prefix}{module}.{part}.{kind}" for part in parts]
            if all(source in state for source in sources):
                state[f"{prefix}{module}.{fused}.{kind}"] = torch.cat([state.pop(source) for source in sources])
    return state


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our key names to MADTP's: the inverse of :func:`from_official` but for the dropped buffers."""
    official = {}
    for key, value in state.items():
        for _, parts, fused in _FUSED:
            head, found, kind = key.rpartition(f".{fused}.")
            if found and not key.startswith("visual_encoder."):
                chunks = value.chunk(len(parts))
                official.update({f"{head}.{p}.{kind}": c.clone() for p, c in zip(parts, chunks, strict=True)})
                break
        else:
            official[key] = value
    return official


def _duplicate_cross_attention(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BLIP checkpoint with one cross-attention per layer, as BLIP-NLVR starts from it: one copy for each image."""
    twin = {}
    for key, value in state.items():
        copies = [key]
        if "crossattention.self." in key:
            copies = [key.replace("crossattention.self.", f"crossattention.self{i}.") for i in (0, 1)]
        elif "crossattention.output.dense." in key:
            copies = [key.replace("crossattention.output.dense.", f"crossattention.output.dense{i}.") for i in (0, 1)]
        twin.update({copy: value.clone() if len(copies) > 1 else value for copy in copies})
    return twin


def interpolate_positions(positions: Tensor, patches: int) -> Tensor:
    """Position embedding ``[1, P+1, D]`` for another square grid of patches: bicubic, the CLS position stays."""
    old, new = _grid(positions.shape[1] - 1), _grid(patches)
    if old == new:
        return positions
    cls, grid = positions[:, :1], positions[:, 1:]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([cls, grid.flatten(2).mT.to(positions.dtype)], 1)


def _grid(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise CheckpointError(f"visual_encoder.pos_embed: {patches} patches do not form a square grid")
    return side


# ---- sizes --------------------------------------------------------------------------------------------------------


def infer_config(state: Mapping[str, Tensor]) -> NLVRConfig:
    """Sizes of a BLIP-NLVR state dict (our keys). Heads are 64 wide, as in every BLIP; pass a config where they are not.

    Raises:
        CheckpointError: a tensor that tells a size is missing.
    """

    def shape(key: str, dims: int) -> torch.Size:
        if key not in state:
            raise CheckpointError(f"not a BLIP-NLVR checkpoint: {key} is missing")
        if state[key].dim() != dims:
            raise CheckpointError(f"{key}: expected {dims} dimensions, got {list(state[key].shape)}")
        return state[key].shape

    def count(pattern: str) -> int:
        found = [int(m.group(1)) for m in map(re.compile(pattern).match, state) if m]
        return max(found, default=-1) + 1

    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    side = _grid(shape("visual_encoder.pos_embed", 3)[1] - 1)
    sd_num, sd_dim = shape("space_dict", 2) if "space_dict" in state else (100, width)
    vocab, hidden = shape("text_encoder.embeddings.word_embeddings.weight", 2)
    merges = [
        int(m.group(1))
        for m in map(re.compile(r"text_encoder\.encoder\.layer\.(\d+)\.crossattention\.output\.merge_layer").match, state)
        if m
    ]
    layers = count(r"text_encoder\.encoder\.layer\.(\d+)\.")
    return NLVRConfig(
        vision=VisionConfig(
            image_size=side * patch,
            patch_size=patch,
            embed_dim=width,
            depth=count(r"visual_encoder\.blocks\.(\d+)\."),
            num_heads=max(1, width // 64),
            mlp_ratio=shape("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0] / width,
            sd_num=sd_num,
            sd_dim=sd_dim,
            map_func="visual_encoder.img_query_model.q_map.0.weight" in state,
        ),
        text=TextConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=shape("text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
            vocab_size=vocab,
            max_position_embeddings=shape("text_encoder.embeddings.position_embeddings.weight", 2)[0],
            encoder_width=width,
        ),
        merge_from=min(merges, default=NLVRConfig.merge_from),
    )


# ---- reading ------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """State dict and temperature (None if it has none) of a `.safetensors` file or a torch checkpoint.

    Raises:
        CheckpointError: unreadable, or a pickle that holds more than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path), None
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, because it holds objects other than tensors and plain values, and unpickling those could run "
            f"code. Convert it to safetensors where you trust it. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a state dict or {{'model': state dict}}, got {type(content).__name__}")
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected tensors under 'model', found other values")
    try:
        temperature = None if content.get("temperature") is None else float(content["temperature"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: temperature: expected a number, got {content['temperature']!r}") from error
    return dict(state), temperature


def load(
    source: str | os.PathLike | Mapping[str, Tensor],
    task: str = "nlvr",
    *,
    temperature: float | None = None,
    config: NLVRConfig | dict | None = None,
    image_size: int | None = None,
    tokenizer: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
    grouping: str = "instance",
) -> NLVR:
    """A model in evaluation mode from wherever its weights are.

    Args:
        source: one of
            a directory written by :func:`save_pretrained`;
            a MADTP checkpoint file ``{'model', 'epoch', 'temperature'}``;
            an original BLIP or BLIP-NLVR checkpoint file (position embedding interpolated to ``image_size``, a single
            cross-attention copied for both images);
            a Hugging Face hub id of a saved model;
            a state dict with MADTP's or our key names (give ``config`` where heads are not 64 wide);
            "demo", the small model in the package; or "random:base", the real sizes with random weights.
        task: "nlvr".
        temperature: pruning temperature; by default the checkpoint's, or 0 (dense) where it has none.
        config: sizes; by default the source's own, or read off the tensors.
        image_size: other than the checkpoint's; the position embedding is interpolated.
        tokenizer: directory, `vocab.txt` or hub id of the WordPiece tokenizer; by default the one saved with the model, or
            bert-base-uncased. It is opened at first use, so that a model that is given ids needs none.
        device, dtype: where and in which precision the model runs.
        backend: force an implementation of the kernels ("reference", "cpu", "triton", "cuda").
        grouping: "instance", "pair" or "batch"; see :class:`madtp.models.nlvr.NLVR`.

    Raises:
        CheckpointError: nothing there, a file that cannot be opened safely, or weights that do not fit.
        ValueError: an argument that makes no sense.
    """
    if task != "nlvr":
        raise ValueError(f"task: expected 'nlvr', got {task!r}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}")
    if isinstance(config, dict):
        config = NLVRConfig.from_dict(config)
    if isinstance(source, Mapping):
        state, found_temperature, origin = dict(source), None, "the state dict"
    elif source == "random:base":
        config = config or NLVRConfig()
        state, found_temperature, origin = None, None, source
    else:
        directory = _locate(source)
        origin = str(source)
        if directory.is_dir():
            settings = _read_config(directory / CONFIG)
            if settings.get("task", task) != task:
                raise CheckpointError(f"{origin}: holds a model for task {settings['task']!r}, not {task!r}")
            config = config or NLVRConfig.from_dict(settings)
            state, _ = read_file(directory / WEIGHTS)
            found_temperature = settings.get("temperature")
            if tokenizer is None and (directory / TOKENIZER).exists():
                tokenizer = directory / TOKENIZER
        else:
            state, found_temperature = read_file(directory)

    temperature = next((t for t in (temperature, found_temperature) if t is not None), 0.0)
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number >= 0, got {temperature!r}")
    if state is not None:
        state = from_official(_duplicate_cross_attention(state))
        config = config or infer_config(state)
    if image_size is not None:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    # Parameters are allocated once, in the dtype asked for, and not initialised twice.
    with torch.device("meta"):
        model = NLVR(config, temperature, grouping, backend=backend)
    model = model.to(dtype).to_empty(device=device)
    if state is None:
        randomize(model)
    else:
        _fill(model, state, origin)
    if tokenizer is None:
        # Random weights know no words: the small bundled vocabulary serves, and needs no download.
        tokenizer = "demo" if state is None or source == "demo" else "bert-base-uncased"
    model.processor = NLVRProcessor(
        config.vision.image_size, config.text.vocab_size, config.text.max_position_embeddings, tokenizer
    )
    return model.eval()


def _locate(source: str | os.PathLike) -> Path:
    """File or directory of a source that is a path, "demo" or a hub id."""
    if source == "demo":
        return Path(str(resources.files("madtp") / "data" / "demo"))
    path = Path(source)
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in (".pth", ".pt", ".safetensors", ".bin"):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(source)))
        except Exception as error:  # offline, no such repository, no access: all end here with the hub's own words
            raise CheckpointError(f"{source}: neither a path nor reachable on the hub: {error}") from error
    raise CheckpointError(f"{source}: no such file or directory")


def _read_config(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model directory holds {CONFIG} and {WEIGHTS}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def _fill(model: NLVR, state: dict[str, Tensor], origin: str) -> None:
    """Copy weights into an uninitialised model; make up only what BLIP checkpoints lack by design, and say so."""
    own = model.state_dict()
    position = "visual_encoder.pos_embed"
    if position in state and state[position].shape != own[position].shape:
        state[position] = interpolate_positions(state[position], own[position].shape[1] - 1)
    missing = sorted(set(own) - set(state))
    invented = [key for key in missing if key == "space_dict" or ".merge_layer." in key]
    unexpected = sorted(set(state) - set(own))
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    problems = [
        f"{what}: {', '.join(keys)}"
        for what, keys in (
            ("missing", [key for key in missing if key not in invented]),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"{origin}: weights do not fit BLIP-NLVR; " + "; ".join(problems))
    with torch.no_grad():
        for key, parameter in own.items():
            if key in state:
                parameter.copy_(state[key])
            elif key.endswith("bias"):
                parameter.zero_()
            else:
                parameter.normal_(0.0, 1.0 if key == "space_dict" else 0.02)
    if invented:
        _log.warning(
            "%s has no %s: initialised at random, as MADTP does before training. Pruning needs a trained dictionary.",
            origin,
            ", ".join(invented),
        )


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


# ---- writing ------------------------------------------------------------------------------------------------------


def save_pretrained(model: NLVR, directory: str | os.PathLike) -> None:
    """Write `model.safetensors`, `config.json` (sizes and temperature) and the tokenizer, each file atomically."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    temporary = directory / f".{WEIGHTS}.partial"
    safetensors.torch.save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, directory / WEIGHTS)
    settings = {**model.config.to_dict(), "temperature": model.temperature}
    temporary = directory / f".{CONFIG}.partial"
    temporary.write_text(json.dumps(settings, indent=2) + "\n")
    os.replace(temporary, directory / CONFIG)
    try:
        model.processor.tokenizer.save_pretrained(directory / TOKENIZER)
    except (OSError, ValueError) as error:
        _log.warning("%s: saved without a tokenizer, because the model's could not be opened: %s", directory, error)
