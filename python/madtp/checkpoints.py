"""From files to models: MADTP and BLIP checkpoints, saved models, state dicts, random weights; and back.

Files are opened with `weights_only=True` or as safetensors. Nothing is dropped silently: keys that are missing or unexpected
are named in the error, and weights that had to be made up are named in a warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import zlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import ModuleType

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import backends

from . import layouts
from .config import CONFIGS, Config, NLVRConfig, TextConfig, VisionConfig
from .files import replacing
from .layouts.blip import from_ours as to_official
from .layouts.blip import to_ours as from_official
from .layouts.clip import infer_config as infer_clip_config
from .models import MODELS, Model
from .processing import PROCESSORS

__all__ = ["CheckpointError", "from_official", "load", "save_pretrained", "to_official"]

_log = logging.getLogger("madtp")
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")  # where transformers keeps them, beside the weights
_BUNDLED = {"demo": "pruned", "demo-dense": "dense"}  # names of models in the package, and their folders


# Weights that original BLIP and CLIP checkpoints lack by design: the dictionary with its maps, and what NLVR adds to BLIP.
_INVENTED = re.compile(r"^space_dict$|^temp$|\.merge_layer\.|_query_model\.q_map\.|\.query_models\.\d+\.")


class CheckpointError(ValueError):
    """A file that cannot be loaded; the message says which and why."""


# ---- sizes --------------------------------------------------------------------------------------------------------


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


def infer_config(state: Mapping[str, Tensor], task: str, layer_norm_eps: float = VisionConfig.layer_norm_eps) -> Config:
    """Sizes of a BLIP state dict (our keys). Heads are 64 wide, as in every BLIP; pass a config where they are not.

    Raises:
        CheckpointError: a tensor that tells a size is missing, or of another shape.
    """

    def shape(key: str, dims: int) -> torch.Size:
        if key not in state:
            raise CheckpointError(f"not a BLIP-{task.upper()} checkpoint: {key} is missing")
        if state[key].dim() != dims:
            raise CheckpointError(f"{key}: expected {dims} dimensions, got {list(state[key].shape)}")
        return state[key].shape

    def numbers(pattern: str) -> list[int]:
        return [int(m.group(1)) for m in map(re.compile(pattern).match, state) if m]

    def count(pattern: str) -> int:
        return max(numbers(pattern), default=-1) + 1

    text = "text_decoder.bert." if task == "caption" else "text_encoder."
    layer = re.escape(text) + r"encoder\.layer\.(\d+)\."
    width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    side = _grid(shape("visual_encoder.pos_embed", 3)[1] - 1)
    vocab, hidden = shape(f"{text}embeddings.word_embeddings.weight", 2)
    sd_num, sd_dim = shape("space_dict", 2) if "space_dict" in state else (100, hidden)
    sizes = {
        "vision": VisionConfig(
            image_size=side * patch,
            patch_size=patch,
            embed_dim=width,
            depth=count(r"visual_encoder\.blocks\.(\d+)\."),
            num_heads=max(1, width // 64),
            mlp_ratio=shape("visual_encoder.blocks.0.mlp.fc1.weight", 2)[0] / width,
            sd_num=sd_num,
            sd_dim=sd_dim,
            map_func="visual_encoder.img_query_model.q_map.0.weight" in state or width != sd_dim,
            layer_norm_eps=layer_norm_eps,
        ),
        "text": TextConfig(
            hidden_size=hidden,
            num_hidden_layers=count(layer),
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=shape(f"{text}encoder.layer.0.intermediate.dense.weight", 2)[0],
            vocab_size=vocab,
            max_position_embeddings=shape(f"{text}embeddings.position_embeddings.weight", 2)[0],
            encoder_width=width,
        ),
    }
    if task == "nlvr":
        sizes["merge_from"] = min(numbers(layer + r"crossattention\.output\.merge_layer"), default=NLVRConfig.merge_from)
    if task == "retrieval":
        sizes["proj_dim"] = shape("vision_proj.weight", 2)[0]
    return CONFIGS[task](**sizes)


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
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path}: refused, because it is a TorchScript archive, which holds code. Save its state dict instead, where you "
                "trust it: torch.save(torch.jit.load(path, 'cpu').state_dict(), ...)"
            ) from error
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
    task: str | None = None,
    *,
    temperature: float | None = None,
    config: Config | dict | None = None,
    image_size: int | None = None,
    text_mode: str | None = None,
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
            OpenAI's CLIP as a state dict;
            a directory written by transformers: `BlipForConditionalGeneration`, `BlipForQuestionAnswering`,
            `BlipForImageTextRetrieval` or `CLIPModel`, with its weights in one file or in parts;
            a Hugging Face hub id of such a directory;
            a state dict with key names of any of these (give ``config`` where heads are not 64 wide);
            "demo" and "demo-dense", the small NLVR models in the package, trained on :mod:`madtp.data.synthetic`, pruned and
            dense, with weights of their own; or "random:base", the real sizes with random weights (of NLVR where no task is
            given).
        task: one of :data:`madtp.models.MODELS`; by default the saved model's, or the one that the key names tell.
        temperature: pruning temperature; by default the checkpoint's, or 0 (dense) where it has none.
        config: sizes; by default the source's own, or read off the tensors.
        image_size: other than the checkpoint's; the position embedding is interpolated.
        text_mode: "clean" or "compat", for tasks that have both; by default the saved model's, or "clean".
        tokenizer: directory, `vocab.txt` or hub id of the tokenizer; by default the one saved with the model, or
            bert-base-uncased (CLIP: openai/clip-vit-large-patch14). It is opened at first use, so that a model that is given
            ids needs none.
        device, dtype: where and in which precision the model runs.
        backend: force an implementation of the kernels ("reference", "cpu", "triton", "cuda").
        grouping: "instance", "batch", or for NLVR "pair"; see :class:`madtp.models.Model`.
        use_sizes: merged tokens weigh what they stand for; by default as the model was saved, or not.

    Raises:
        CheckpointError: nothing there, a file that cannot be opened safely, or weights that do not fit.
        ValueError: an argument that makes no sense.
    """
    if task is not None and task not in MODELS:
        raise ValueError(f"task: expected one of {', '.join(MODELS)}, got {task!r}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}")
    if isinstance(config, dict):
        task = task or config.get("task")
        if task not in CONFIGS:
            raise ValueError(f"task: give one of {', '.join(CONFIGS)}, since config names none")
        config = CONFIGS[task].from_dict(config)
    if config is not None:
        if task not in (None, config.task):
            raise ValueError(f"config: sizes of a model for task {config.task!r}, not {task!r}")
        task = config.task
    if isinstance(source, Mapping):
        state, found_temperature, origin = dict(source), None, "the state dict"
    elif source == "random:base":
        task = task or "nlvr"
        config = config or CONFIGS[task]()
        state, found_temperature, origin = None, None, source
    else:
        directory = _locate(source)
        origin = str(source)
        if directory.is_dir():
            settings, state = _read_config(directory / CONFIG), None
            if "model_type" in settings:  # written by transformers
                state, settings = _read_hugging_face(directory, settings, task)
                if tokenizer is None and any((directory / name).exists() for name in _VOCABULARIES):
                    tokenizer = directory
            saved_task = settings.get("task", task)
            if task not in (None, saved_task):
                raise CheckpointError(f"{origin}: holds a model for task {saved_task!r}, not {task!r}")
            if saved_task not in CONFIGS:
                raise CheckpointError(f"{directory / CONFIG}: 'task' is {saved_task!r}, not one of {', '.join(CONFIGS)}")
            task = saved_task
            config = config or CONFIGS[task].from_dict(settings)
            if state is None:
                state, _ = read_file(directory / WEIGHTS)
            found_temperature = settings.get("temperature")
            if use_sizes is None:
                use_sizes = bool(settings.get("use_sizes"))
            if tokenizer is None and (directory / TOKENIZER).exists():
                tokenizer = directory / TOKENIZER
        else:
            state, found_temperature = read_file(directory)

    temperature = next((t for t in (temperature, found_temperature) if t is not None), 0.0)
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a number >= 0, got {temperature!r}")
    if state is not None:
        layout, task = _recognise(state, task, origin)
        try:
            state = layout.to_ours(state, task)
            if config is None and layout is layouts.blip_hugging_face:
                config = infer_config(state, task, layout.LAYER_NORM_EPS)
            config = config or (infer_clip_config(state) if task == "clip" else infer_config(state, task))
        except ValueError as error:
            raise CheckpointError(f"{origin}: {error}") from error
    if image_size is not None:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    if text_mode is not None:
        if not hasattr(config, "text_mode"):
            raise ValueError(f"text_mode: models for task {task!r} have only one, got {text_mode!r}")
        config = replace(config, text_mode=text_mode)
    # Parameters are allocated once, in the dtype asked for, and not initialised twice.
    with torch.device("meta"):
        model = MODELS[task](config, temperature, grouping, bool(use_sizes), backend)
    model = model.to(dtype).to_empty(device=device)
    if state is None:
        randomize(model)
    else:
        _fill(model, state, origin)
    if tokenizer is None:
        # Random weights know no words: the small bundled vocabulary serves, and needs no download.
        tokenizer = "demo" if state is None else PROCESSORS[task].default_tokenizer
    model.processor = PROCESSORS[task](
        config.vision.image_size, config.text.vocab_size, config.text.max_position_embeddings, tokenizer
    )
    return model.eval()


def _recognise(state: Mapping[str, Tensor], task: str | None, origin: str) -> tuple[ModuleType, str]:
    """Layout and task of a state dict. Keys decide; a task that the caller names has to agree where they tell."""
    found = layouts.recognise(state)
    if found is None and task is None:
        modules = sorted({key.split(".")[0] for key in state})
        some = ", ".join(modules[:8]) + (", ..." if len(modules) > 8 else "")
        raise CheckpointError(
            f"{origin}: its keys ({some or 'there are none'}) do not tell what it is for; give the task (task=, --task), one of {', '.join(MODELS)}"
        )
    if found is None:
        return layouts.for_task(task), task
    if task not in (None, found[1]):
        raise CheckpointError(f"{origin}: holds a model for task {found[1]!r}, not {task!r}")
    return found


def _locate(source: str | os.PathLike) -> Path:
    """File or directory of a source that is a path, a bundled model or a hub id."""
    if source in _BUNDLED:
        return Path(str(resources.files("madtp") / "data" / "shapes" / _BUNDLED[source]))
    path = Path(source)
    if path.exists():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and path.suffix not in (".pth", ".pt", ".safetensors", ".bin"):
        from huggingface_hub import snapshot_download

        try:
            found = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "*.safetensors"]))
            if not list(found.glob("*.safetensors")):  # older repositories; those of today hold the same weights twice
                found = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "*.bin"]))
            return found
        except Exception as error:  # offline, no such repository, no access: all end here with the hub's own words
            raise CheckpointError(f"{source}: neither a path nor reachable on the hub: {error}") from error
    raise CheckpointError(f"{source}: no such file or directory")


def _read_config(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a model directory holds {CONFIG} and {WEIGHTS}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings


def _read_hugging_face(directory: Path, settings: dict, task: str | None) -> tuple[dict[str, Tensor], dict]:
    """Weights and, in our terms, sizes (and the temperature, beside a dictionary) of a directory that transformers wrote."""
    layout = layouts.HUGGING_FACE.get(settings["model_type"])
    if layout is None:
        known = ", ".join(layouts.HUGGING_FACE)
        raise CheckpointError(f"{directory / CONFIG}: 'model_type' is {settings['model_type']!r}, not one of {known}")
    state = _read_parts(directory)
    try:
        config = layout.config_of(settings, state, task)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    temperature = settings.get("temperature") if "space_dict" in state else None
    return state, {**config.to_dict(), "temperature": temperature}


def _read_parts(directory: Path) -> dict[str, Tensor]:
    """Weights in one of transformers' files, or in several that an index lists."""
    for name in (WEIGHTS, "pytorch_model.bin"):
        if (directory / name).exists():
            return read_file(directory / name)[0]
        index = directory / f"{name}.index.json"
        if not index.exists():
            continue
        places = _read_config(index).get("weight_map")
        if not isinstance(places, dict) or not all(part == Path(str(part)).name for part in places.values()):
            raise CheckpointError(f"{index}: expected 'weight_map', from keys to files of the same directory")
        state = {}
        for part in sorted(set(places.values())):
            state |= read_file(directory / part)[0]
        lost = sorted(set(places) - set(state))
        if lost:
            raise CheckpointError(f"{index}: its files lack {', '.join(lost)}")
        return state
    raise CheckpointError(f"{directory}: no weights; expected {WEIGHTS} or pytorch_model.bin, or the index of their parts")


def _fill(model: Model, state: dict[str, Tensor], origin: str) -> None:
    """Copy weights into an uninitialised model; make up only what BLIP checkpoints lack by design, and say so."""
    own = model.state_dict()
    for position in ("visual_encoder.pos_embed", "visual.pos_embed"):
        if position in state and state[position].shape != own[position].shape:
            state[position] = interpolate_positions(state[position], own[position].shape[1] - 1)
    missing = sorted(set(own) - set(state))
    invented = [key for key in missing if _INVENTED.search(key)]
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
        raise CheckpointError(f"{origin}: weights do not fit a model for task {model.config.task!r}; " + "; ".join(problems))
    with torch.no_grad():
        for key, parameter in own.items():
            if key in state:
                parameter.copy_(state[key])
            else:
                parameter.copy_(initial_weight(key, parameter.shape))
    if "temp" in invented:
        _log.info("%s has no temp: set to 0.07, where BLIP's training begins; nothing but training uses it", origin)
        invented.remove("temp")
    if invented:
        _log.warning(
            "%s has no %s: made up at random (always the same), as MADTP does before training. Pruning needs a trained dictionary.",
            origin,
            ", ".join(invented),
        )


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


# ---- writing ------------------------------------------------------------------------------------------------------


def save_pretrained(model: Model, directory: str | os.PathLike) -> None:
    """Write `model.safetensors`, `config.json` (sizes, temperature, `use_sizes`) and the tokenizer, each file atomically."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(directory / WEIGHTS) as file:
        file.write(safetensors.torch.save(state, metadata={"format": "pt"}))
    settings = {**model.config.to_dict(), "temperature": model.temperature, "use_sizes": model.use_sizes}
    with replacing(directory / CONFIG) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())
    try:
        model.processor.tokenizer.save_pretrained(directory / TOKENIZER)
    except (OSError, ValueError) as error:
        _log.warning("%s: saved without a tokenizer, because the model's could not be opened: %s", directory, error)
