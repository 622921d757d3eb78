"""From files to models: MADTP and BLIP checkpoints, saved models, state dicts, random weights; and back.

Files are opened with `weights_only=True` or as safetensors. Nothing is dropped silently: keys that are missing or unexpected
are named in the error, and weights that had to be made up are named in a warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
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

from .. import hub
from ..config import CONFIGS, Config, NLVRConfig, TextConfig, VisionConfig
from ..files import replacing
from ..image_transform import ImageTransform
from ..model import Model
from ..models import MODELS
from ..processing import PROCESSORS
from ..pruning import MADTP, Pruning
from . import key_maps
from .files import WEIGHTS, CheckpointError, read_file, read_json, read_parts
from .key_maps.blip import from_ours as to_official
from .key_maps.blip import to_ours as from_official
from .key_maps.clip import infer_config as infer_clip_config

__all__ = ["CheckpointError", "from_official", "load", "save_pretrained", "to_official"]

_log = logging.getLogger("madtp")
CONFIG, PREPROCESSOR, TOKENIZER = "config.json", "preprocessor_config.json", "tokenizer"
_NAMED = 200  # keys in an error
_BUNDLED = {"demo": "pruned", "demo-dense": "dense"}  # names of models in the package, and their folders


# Weights that original BLIP and CLIP checkpoints lack by design: the dictionary with its maps, and what NLVR adds to BLIP.
_INVENTED = re.compile(r"^space_dict$|^temp$|\.merge_layer\.|_query_model\.q_map\.|\.query_models\.\d+\.")


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
        if state[key].dim() != dims or not state[key].numel():
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


# ---- loading ------------------------------------------------------------------------------------------------------


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
        tokenizer: directory, `vocab.txt` or hub id of the tokenizer; by default the one that lies with the model (in its
            directory, or beside its file), or bert-base-uncased (CLIP: openai/clip-vit-large-patch14). It is opened at first
            use, so that a model that is given ids needs none.
        device, dtype: where and in which precision the model runs.
        backend: force an implementation of the kernels ("reference", "cpu", "triton", "cuda").
        grouping: "instance", "batch", or for NLVR "pair"; see :class:`madtp.models.Model`.
        use_sizes: merged tokens weigh what they stand for; by default as the model was saved, or not.

    Pictures become pixels (`model.processor`) as the model's own `preprocessor_config.json` or `processor_config.json` says,
    and where it has none as models of its kind were trained: the whole picture squashed to a square for BLIP and for MADTP,
    of CLIP too; shorter side and centre for CLIP from elsewhere.

    Raises:
        CheckpointError: nothing there, a file that cannot be opened safely, weights that do not fit or are not finite, or
            settings of a processor that cannot be honoured.
        ValueError: an argument that makes no sense, such as a device that is not there.
    """
    if task is not None and task not in MODELS:
        raise ValueError(f"task: expected one of {', '.join(MODELS)}, got {task!r}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
    device = _usable(device)
    if isinstance(config, dict):
        task = task or config.get("task")
        if task not in CONFIGS:
            raise ValueError(f"task: give one of {', '.join(CONFIGS)}, since config names none")
        config = CONFIGS[task].from_dict(config)
    if config is not None:
        if task not in (None, config.task):
            raise ValueError(f"config: sizes of a model for task {config.task!r}, not {task!r}")
        task = config.task
    place = transform = saved_rule = None
    if isinstance(source, Mapping):
        state, found_temperature, origin = dict(source), None, "the state dict"
    elif source == "random:base":
        task = task or "nlvr"
        config = config or CONFIGS[task]()
        state, found_temperature, origin = None, None, source
    else:
        place = _locate(source)
        origin = str(source)
        if place.is_dir():
            settings, state = _read_config(place / CONFIG), None
            if "model_type" in settings:  # written by transformers
                family = str(settings["model_type"])
                state, settings = _read_hugging_face(place, settings, task)
                transform = _read_transform(place, family)
            saved_task = settings.get("task", task)
            if task not in (None, saved_task):
                raise CheckpointError(f"{origin}: holds a model for task {saved_task!r}, not {task!r}")
            if saved_task not in CONFIGS:
                raise CheckpointError(f"{place / CONFIG}: 'task' is {saved_task!r}, not one of {', '.join(CONFIGS)}")
            task = saved_task
            if config is None:
                config = CONFIGS[task].from_dict(settings)
            if state is None:
                state, _ = read_file(place / WEIGHTS)
                # Models that were saved without this file were made with squashed pictures.
                transform = _read_transform(place, "blip") or ImageTransform.squash(config.vision.image_size)
            found_temperature = settings.get("temperature")
            if use_sizes is None:
                use_sizes = settings.get("use_sizes")
            saved_rule = settings.get("pruning")
        else:
            state, found_temperature = read_file(place)

    try:
        pruning = MADTP(found_temperature or 0.0) if saved_rule is None else Pruning.from_dict(saved_rule)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    if temperature is not None:
        pruning = MADTP(temperature, proportional_attention=pruning.proportional_attention)
    if use_sizes is not None:
        pruning = replace(pruning, proportional_attention=bool(use_sizes))
    if state is not None:
        layout, task = _recognise(state, task, origin)
        try:
            state = layout.to_ours(state, task)
            if config is None and layout is key_maps.blip_hugging_face:
                config = infer_config(state, task, layout.LAYER_NORM_EPS)
            config = config or (infer_clip_config(state) if task == "clip" else infer_config(state, task))
        except ValueError as error:
            raise CheckpointError(f"{origin}: {error}") from error
        # MADTP trains its CLIP, which has a dictionary, with squashed pictures.
        centred = layout is key_maps.clip_hugging_face or "space_dict" not in state
    else:
        centred = True
    if transform is None:
        rule = ImageTransform.centre if task == "clip" and centred else ImageTransform.squash
        transform = rule(config.vision.image_size)
    if image_size is not None:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
        transform = transform.at(image_size)
    if text_mode is not None:
        if not hasattr(config, "text_mode"):
            raise ValueError(f"text_mode: models for task {task!r} have only one, got {text_mode!r}")
        config = replace(config, text_mode=text_mode)
    # Parameters are allocated once, in the dtype asked for, and not initialised twice.
    with torch.device("meta"):
        model = MODELS[task](config, pruning, grouping, backend=backend)
    model = model.to(dtype)
    if state is None:
        randomize(model.to_empty(device=device))
    else:
        _fill(model, state, origin, device)
    if tokenizer is None and place is not None:
        tokenizer = _tokenizer_of(place if place.is_dir() else place.parent, task)
    if tokenizer is None:
        # Random weights know no words: the small bundled vocabulary serves, and needs no download.
        tokenizer = "demo" if state is None else PROCESSORS[task].default_tokenizer
    sizes = config.vision.image_size, config.text.vocab_size, config.text.max_position_embeddings
    try:
        model.processor = PROCESSORS[task](*sizes, tokenizer, transform)
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    return model.eval()


def _usable(device: torch.device | str) -> torch.device:
    """A device that tensors can be put on."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # torch without CUDA, no GPU, no such number or name
        raise ValueError(f"device: {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    return found


def _recognise(state: Mapping[str, Tensor], task: str | None, origin: str) -> tuple[ModuleType, str]:
    """Layout and task of a state dict. Keys decide; a task that the caller names has to agree where they tell."""
    found = key_maps.recognise(state)
    if found is None and task is None:
        modules = sorted({key.split(".")[0] for key in state})
        some = ", ".join(modules[:8]) + (", ..." if len(modules) > 8 else "")
        raise CheckpointError(
            f"{origin}: its keys ({some or 'there are none'}) do not tell what it is for; give the task (task=, --task), one of {', '.join(MODELS)}"
        )
    if found is None:
        return key_maps.for_task(task), task
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
    name = str(source)
    if "/" not in name or not hub.is_id(name) or path.suffix in (".pth", ".pt", ".safetensors", ".bin"):
        raise CheckpointError(f"{source}: no such file or directory")
    try:
        found = hub.download(name, ["*.json", "*.txt", "*.safetensors"])
        if not list(found.glob("*.safetensors")):  # older repositories; those of today hold the same weights twice
            found = hub.download(name, ["*.json", "*.txt", "*.bin"])
        return found
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _read_config(path: Path) -> dict:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file; a model directory holds {CONFIG} and {WEIGHTS}")
    return read_json(path)


def _read_hugging_face(directory: Path, settings: dict, task: str | None) -> tuple[dict[str, Tensor], dict]:
    """Weights and, in our terms, sizes (and the temperature, beside a dictionary) of a directory that transformers wrote."""
    layout = key_maps.HUGGING_FACE.get(settings["model_type"])
    if layout is None:
        known = ", ".join(key_maps.HUGGING_FACE)
        raise CheckpointError(f"{directory / CONFIG}: 'model_type' is {settings['model_type']!r}, not one of {known}")
    state = read_parts(directory)
    try:
        config = layout.config_of(settings, state, task)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    temperature = settings.get("temperature") if "space_dict" in state else None
    return state, {**config.to_dict(), "temperature": temperature}


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
        try:
            return ImageTransform.from_settings(settings, family)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    return None


def _tokenizer_of(place: Path, task: str) -> Path | None:
    """The tokenizer that lies with a model: in a folder of its own, or beside the weights."""
    vocabularies = ("tokenizer.json", "vocab.json" if task == "clip" else "vocab.txt")
    return next((folder for folder in (place / TOKENIZER, place) if any((folder / name).exists() for name in vocabularies)), None)


def _fill(model: Model, state: dict[str, Tensor], origin: str, device: torch.device) -> None:
    """Give a model without memory (on the device "meta") these weights, once it is known that they fit; make up only what
    BLIP checkpoints lack by design, and say so."""
    own = model.state_dict()
    for position in ("visual_encoder.pos_embed", "visual.pos_embed"):
        if position in state and state[position].dim() == 3 and state[position].shape != own[position].shape:
            state[position] = interpolate_positions(state[position], own[position].shape[1] - 1)
    missing = sorted(set(own) - set(state))
    invented = [key for key in missing if _INVENTED.search(key)]
    unexpected = sorted(set(state) - set(own))
    misshapen = [
        f"{key} {list(state[key].shape)} instead of {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    # Whole numbers are what a quantised model holds, with scales that nothing here knows.
    mistyped = [f"{key} {state[key].dtype}" for key in own if key in state and not state[key].is_floating_point()]
    problems = [
        f"{what}: {', '.join(keys[:_NAMED])}{f', and {len(keys) - _NAMED} more' if len(keys) > _NAMED else ''}"
        for what, keys in (
            ("missing", [key for key in missing if key not in invented]),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("not of a floating-point type", mistyped),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"{origin}: weights do not fit a model for task {model.config.task!r}; " + "; ".join(problems))
    model.to_empty(device=device)
    own = model.state_dict()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key] if key in state else initial_weight(key, parameter.shape))
    bad = [key for key, parameter in own.items() if not _finite(parameter)]
    if bad:
        shown = ", ".join(bad[:5]) + (f", and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise CheckpointError(f"{origin}: weights that are not finite numbers, in {model.dtype}: {shown}")
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
            logging.WARNING if model.temperature > 0 or len(invented) > len(guides) else logging.INFO,
            "%s has no %s: initialised at random, always alike, as MADTP does before training. Pruning needs a trained "
            "dictionary.",
            origin,
            ", ".join(named),
        )


def _finite(weight: Tensor) -> bool:
    # A sum needs no memory; only where it overflows or is not finite, a closer look does.
    return bool(weight.sum(dtype=torch.float32).isfinite()) or bool(weight.isfinite().all())


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
    """Write `model.safetensors`, `config.json` (sizes, pruning), `preprocessor_config.json` (how pictures
    become pixels) and the tokenizer, each file atomically."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with replacing(directory / WEIGHTS) as file:
        file.write(safetensors.torch.save(state, metadata={"format": "pt"}))
    settings = {**model.config.to_dict(), "pruning": model.pruning.to_dict()}
    with replacing(directory / CONFIG) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())
    if model.processor is not None:
        with replacing(directory / PREPROCESSOR) as file:
            file.write((json.dumps(model.processor.transform.settings(), indent=2) + "\n").encode())
    try:
        model.processor.tokenizer.save_pretrained(directory / TOKENIZER)
    except (OSError, ValueError) as error:
        _log.warning("%s: saved without a tokenizer, because the model's could not be opened: %s", directory, error)
