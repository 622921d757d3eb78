"""One line for users of transformers: its BLIP and CLIP models run ragged and pruned, on their own weights.

    model = BlipForConditionalGeneration.from_pretrained("Salesforce/blip-image-captioning-base")
    inputs = processor(images, return_tensors="pt")
    patch = madtp.apply_patch(model, keep_ratio=0.5, dictionary="checkpoint_best.pth", samples=inputs)
    print(patch.temperature, patch.keep_ratio, patch.gflops)
    model.generate(**inputs)
    madtp.remove_patch(model)

The towers of the model (vision transformer, text encoder, text decoder) get another `forward`; the rest of the model, its
`generate`, its configuration and its weights stay transformers'. Outputs keep their types:

* What a tower returns as `last_hidden_state` (or the model as `image_embeds`) is padded as usual: the tokens of a sample stand
  at the beginning, in their order, and zeros follow. :func:`attention_mask` tells which are tokens. Given to another tower of
  the model, such a tensor is recognised, and its padding is never attended to; a tensor computed from it (a selection, a
  repetition) is not, and needs the mask, as `encoder_attention_mask`.
* At temperature 0 tokens have the values that transformers computes. There is one difference: its `BlipForQuestionAnswering`
  lets the decoder look at padded question tokens, so that an answer depends on the longest question of the batch. Here it does
  not: answers are those that transformers gives to one question at a time.
* Attention matrices and hidden states of the layers are not returned.

A patched model is for inference: it computes no gradients, without dropout.
"""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPModel,
    DynamicCache,
    EncoderDecoderCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel
from transformers.utils.generic import can_return_tuple

from madtp_kernels import RaggedBatch, backends

from . import flops, graphs, layouts
from .checkpoints import initial_weight, read_file
from .config import check_temperature
from .generation import CACHE
from .layers import Keys, Runs
from .models import MODELS, Model
from .models.base import first_rows
from .models.clip import rows_of
from .pruning import LayerTrace, Stream

__all__ = ["Patch", "Step", "apply_patch", "attention_mask", "remove_patch"]

_log = logging.getLogger("madtp")

# Tokens of a text that is counted where none is written yet: a caption, prompt included, as in the official figures; an answer
# of one word.
_CAPTION_TOKENS, _ANSWER_TOKENS = 15, 2

# The search for a temperature: where it begins, how far it goes, and when it is content: with a value this close to the target,
# or with temperatures so close to each other that the next step would change no more than one token.
_FIRST, _FACTOR, _LOWEST, _HIGHEST = 1.0, 4.0, 1e-3, 1e3
_CLOSE_ENOUGH, _NEIGHBOURS, _WORTH_A_WARNING = 0.002, 1.001, 0.02


class Step(NamedTuple):
    """What a temperature does to the samples, on average."""

    temperature: float
    keep_ratio: float
    """Image tokens that leave a layer, as a share of those that enter the first; mean over layers and images."""
    gflops: float | None
    """Of an instance, counted as the official code does (:mod:`madtp.flops`); None where the samples have no texts that the
    model needs."""


@dataclass(frozen=True)
class Patch:
    """How a model was patched."""

    task: str
    temperature: float
    keep_ratio: float | None
    """As in :class:`Step`; None where there were no samples, as are ``gflops``."""
    gflops: float | None
    steps: tuple[Step, ...]
    """The search for the temperature, in its order."""


def apply_patch(
    model: nn.Module,
    *,
    temperature: float | None = None,
    keep_ratio: float | None = None,
    target_gflops: float | None = None,
    dictionary: Tensor | str | os.PathLike | None = None,
    samples: Mapping[str, Tensor] | None = None,
    backend: str | None = None,
) -> Patch:
    """Make a model of transformers run ragged, with pruning. Exactly one of the first three arguments says how much is pruned.

    No weights are copied, but for the CPU's packed layout. Projections of the same input that transformers keeps apart (query,
    key, value) move next to each other in memory; they stay parameters of their own.

    Args:
        model: `BlipForConditionalGeneration`, `BlipForQuestionAnswering`, `BlipForImageTextRetrieval` or `CLIPModel`, with plain
            floating-point weights on one device. CLIP's text is pruned in the mode "clean" (:mod:`madtp.models.clip`).
        temperature: pruning temperature; 0 runs dense, which is already faster than transformers' attention without fusion.
        keep_ratio: find the temperature at which this share of the image tokens is kept (mean over layers, 0 to 1). Even the
            lowest temperature above 0 prunes something; between that and dense the closer one is taken, with a warning.
        target_gflops: find the temperature at which an instance costs this much, counted as the official code does: a
            caption (of 15 tokens), a question about an image with its answer (of one word), or an image and a text (retrieval:
            with their features and their match).
        dictionary: MADTP's cross-modal dictionary: a tensor ``[M, width]``, or a file that holds one as ``space_dict``, such as a
            MADTP checkpoint or the weights of a saved model, from which maps to the dictionary are taken too. Without one it
            is drawn from N(0, 1) with a fixed seed, as MADTP begins; that prunes by an alignment which nobody has trained.
        samples: a few inputs of the model, as its processor returns them (``pixel_values``, and for other models than
            captioning ``input_ids`` and ``attention_mask``, one text for each image). Needed for a target; with a temperature
            they are measured.
        backend: force an implementation of the kernels ("reference", "cpu", "triton", "cuda").

    Returns:
        The temperature, what it keeps and costs on the samples, and the steps of the search. The same model and samples give
        the same result.

    Raises:
        TypeError: a model of another class.
        ValueError: a model that is patched already, or has something that our layers do not have; not exactly one of the three
            settings; a target without samples or out of reach; a dictionary of another shape.
    """
    task = next((task for kind, task in _TASKS.items() if isinstance(model, kind)), None)
    if task is None:
        raise TypeError(f"model: expected one of {', '.join(kind.__name__ for kind in _TASKS)}, got {type(model).__name__}")
    if hasattr(model, "_madtp"):
        raise ValueError("model: it is patched already; call remove_patch first")
    settings = {"temperature": temperature, "keep_ratio": keep_ratio, "target_gflops": target_gflops}
    given = [name for name, value in settings.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected exactly one of {', '.join(settings)}, got {', '.join(given) or 'none'}")
    if temperature is not None:
        check_temperature(temperature)
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio: expected a share above 0 and up to 1, got {keep_ratio}")
    if target_gflops is not None and not target_gflops > 0:
        raise ValueError(f"target_gflops: expected a number above 0, got {target_gflops}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}")
    if samples is None and temperature is None:
        raise ValueError(f"samples: {given[0]} is sought on a few inputs of the model, got none")
    methods = [(model.get_submodule(tower), name, method) for tower, name, method in _METHODS[task]]
    for (tower, _, _), (module, name, _) in zip(_METHODS[task], methods, strict=True):
        if name in vars(module):
            place = f"{tower or type(model).__name__}.{name}"
            raise ValueError(f"model: {place} is replaced already, by a hook of accelerate or another patch")

    engine = _Engine(model, task, dictionary, backend, warn=temperature != 0)
    try:
        steps = []
        if temperature is None:
            found = _search(engine, samples, given[0], settings[given[0]], steps)
        elif samples is None:
            found = Step(float(temperature), None, None)
        else:
            found = engine.measure(samples, float(temperature))
    except BaseException:
        engine.release()
        raise
    engine.model.temperature = found.temperature
    for module in {model, *(module for module, _, _ in methods)}:
        module._madtp = engine
    for module, name, method in methods:
        setattr(module, name, types.MethodType(method, module))
    return Patch(task, found.temperature, found.keep_ratio, found.gflops, tuple(steps))


def remove_patch(model: nn.Module) -> None:
    """Undo :func:`apply_patch`: the model is again what transformers made it, with the same parameters.

    Raises:
        ValueError: a model that is not patched.
    """
    if not hasattr(model, "_madtp"):
        raise ValueError(f"model: expected one that apply_patch has patched, got {type(model).__name__}")
    engine = model._madtp
    modules = {model}
    for tower, name, _ in _METHODS[engine.task]:
        module = model.get_submodule(tower)
        delattr(module, name)
        modules.add(module)
    for module in modules:
        del module._madtp
    engine.release()


def attention_mask(hidden_states: Tensor) -> Tensor:
    """Which rows of a padded tensor ``[B, L, D]`` from a patched tower are tokens: ``[B, L]`` int64, 1 for a token.

    Raises:
        ValueError: a tensor that is not just what a patched tower returned.
    """
    stream = getattr(hidden_states, "_madtp_stream", None)
    if stream is None:
        raise ValueError("hidden_states: expected what a patched tower returned, itself and not computed from it")
    position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    return (position < stream.tokens.lengths[:, None]).long()


# ---- our model on their weights -----------------------------------------------------------------------------------


class _Link(NamedTuple):
    """A parameter of ours that shares the memory of one of theirs, or of several that lie next to each other in it."""

    module: nn.Module
    name: str
    sources: list[tuple[nn.Module, str]]
    shape: torch.Size

    def theirs(self) -> list[Tensor]:
        return [module._parameters[name] for module, name in self.sources]

    def holds(self) -> bool:
        """Whether the memory is still shared: a model that is moved, converted or given new weights has other memory."""
        own = self.module._parameters[self.name]
        address = own.data_ptr()
        for tensor in self.theirs():
            if (tensor.data_ptr(), tensor.dtype, tensor.device) != (address, own.dtype, own.device):
                return False
            address += tensor.numel() * tensor.element_size()
        return True

    def make(self) -> None:
        tensors = [tensor.detach() for tensor in self.theirs()]
        shared = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if len(tensors) > 1:
            parts = shared.split([len(tensor) for tensor in tensors])
            for tensor, part in zip(self.theirs(), parts, strict=True):
                tensor.data = part
        self.module._parameters[self.name] = nn.Parameter(shared.view(self.shape), requires_grad=False)

    def release(self) -> None:
        """Give theirs memory of their own again."""
        if len(self.sources) > 1:
            for tensor in self.theirs():
                tensor.data = tensor.detach().clone()


class _Engine:
    """Our model for a model of transformers: the same memory, and a dictionary in addition."""

    def __init__(
        self, theirs: nn.Module, task: str, dictionary: Tensor | str | os.PathLike | None, backend: str | None, warn: bool
    ) -> None:
        self.task = task
        layout = layouts.HUGGING_FACE[theirs.config.model_type]
        guidance = _guidance(dictionary, task)
        config = layout.config_of(theirs.config.to_dict(), guidance, task)
        with torch.device("meta"):
            self.model: Model = MODELS[task](config, backend=backend).eval()
        self.links, own = [], []
        for key, parameter in self.model.named_parameters():
            names = layout.parts_of(key)
            if names:
                sources = [_slot(theirs, name) for name in names]
                self.links.append(_Link(*_slot(self.model, key), sources, parameter.shape))
            else:
                own.append((key, parameter.shape))
        kinds = {(str(tensor.device), tensor.dtype) for link in self.links for tensor in link.theirs()}
        if len(kinds) > 1 or "meta" in dict(kinds):
            found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
            raise ValueError(f"model: expected all weights in one dtype and on one device, found {found}")
        self.own = [_slot(self.model, key) for key, _ in own]
        made_up = _fill(self.own, own, guidance)
        if made_up and warn:
            _log.warning(
                "drawn at random with a fixed seed, as MADTP does before training: %s. What is pruned depends on attention, and "
                "on an alignment that is not trained.",
                made_up[0] + (f" and {len(made_up) - 1} maps" if len(made_up) > 1 else ""),
            )
        self.sync()

    def sync(self) -> None:
        """Share memory with their model again where it has been moved, converted, or given new weights."""
        with torch.inference_mode(False), torch.no_grad():
            for link in self.links:
                if not link.holds():
                    link.make()
            like = self.links[0].theirs()[0]
            for module, name in self.own:
                parameter = module._parameters[name]
                if (parameter.device, parameter.dtype) != (like.device, like.dtype):
                    module._parameters[name] = nn.Parameter(parameter.to(like), requires_grad=False)

    def release(self) -> None:
        for link in self.links:
            link.release()

    def images(self, pixel_values: Tensor) -> tuple[Stream, list[LayerTrace]]:
        """Final tokens and what every layer did, of ``[B, 3, S, S]``."""
        model = self.model
        if self.task == "clip":
            features = graphs.run(model.encode_image, pixel_values)
            return features.stream, features.trace
        return graphs.run(types.MethodType(_encode_images, model), pixel_values)

    def texts(
        self, input_ids: RaggedBatch, images: Stream | None, positions: Tensor | None = None
    ) -> tuple[Stream, list[LayerTrace]]:
        """The same of BLIP's texts ``[T]``, alone or with images in view."""
        model = self.model
        input_ids = model._ids(input_ids)
        positions = Stream.start(input_ids, use_sizes=False).ids if positions is None else positions
        encode = types.MethodType(_encode_texts, model)
        inputs = [input_ids, input_ids.with_values(positions)] + ([] if images is None else [images.tokens])
        runs = None if images is None else _runs(len(input_ids), len(images.tokens), 1, model.device)
        stream, trace = graphs.run(encode, *inputs) if runs is None else encode(*inputs, runs=runs)
        return _no_longer(stream, input_ids.max_seqlen), trace

    def memory(self, hidden_states: Tensor | None, mask: Tensor | None) -> _Memory:
        """What the decoder is to look at."""
        if hidden_states is None:
            raise ValueError("encoder_hidden_states: expected what the decoder is to look at, got None")
        stream = _stream(hidden_states, mask)
        return _Memory(self.model.text_decoder.keys(stream), stream.tokens.batch_size)

    def measure(self, samples: Mapping[str, Tensor], temperature: float) -> Step:
        """What a temperature keeps and costs."""
        if "pixel_values" not in samples:
            raise ValueError(f"samples: expected 'pixel_values', got {', '.join(samples) or 'nothing'}")
        ids, guided, model = samples.get("input_ids"), temperature > 0, self.model
        if self.task != "caption" and ids is not None and len(ids) != len(samples["pixel_values"]):
            raise ValueError(f"samples: expected a text for each of {len(samples['pixel_values'])} images, got {len(ids)}")
        model.temperature = temperature
        with torch.no_grad():
            images, trace = self.images(samples["pixel_values"].to(model.device))
            vision = flops.stream_lengths(trace)
            shares = [length / lengths[0] for lengths in vision for length in lengths[1:]]
            keep_ratio = sum(shares) / len(shares)
            if self.task == "caption":
                costs = [flops.caption(model.config, lengths, _CAPTION_TOKENS, guided=guided) for lengths in vision]
            elif ids is None:
                return Step(temperature, keep_ratio, None)
            elif self.task == "clip":
                texts = flops.stream_lengths(model.encode_text(_clip_texts(model, ids.to(model.device))[0]).trace)
                costs = [flops.clip(model.config, image=i, text=t, guided=guided) for i, t in zip(vision, texts, strict=True)]
            else:
                mask = samples.get("attention_mask")
                ragged, _ = _ragged(ids.to(model.device), None if mask is None else mask.to(model.device), None)
                looking = flops.stream_lengths(self.texts(ragged, images)[1])
                pairs = list(zip(vision, looking, strict=True))
                if self.task == "vqa":
                    costs = [flops.vqa(model.config, i, t, _ANSWER_TOKENS, guided=guided) for i, t in pairs]
                else:
                    alone = flops.stream_lengths(self.texts(ragged, None)[1])
                    costs = [
                        flops.retrieval(model.config, image=i, text=a, match=(i[-1], t), guided=guided)
                        for (i, t), a in zip(pairs, alone, strict=True)
                    ]
        return Step(temperature, keep_ratio, sum(cost.official for cost in costs) / len(costs))


def _encode_images(model: Model, pixels: Tensor | RaggedBatch) -> tuple[Stream, list[LayerTrace]]:
    """BLIP's images: what :mod:`madtp.graphs` records."""
    pruning = model._pruning(model.temperature, len(pixels))
    stream, trace, _ = model.visual_encoder(model._pixels(pixels), model.space_dict, pruning)
    return stream, trace


def _encode_texts(
    model: Model, input_ids: RaggedBatch, positions: RaggedBatch, *images: RaggedBatch, runs: Runs | None = None
) -> tuple[Stream, list[LayerTrace]]:
    """BLIP's texts, with images in view or none."""
    pruning = model._pruning(model.temperature, len(input_ids))
    others = [Stream.start(tokens, use_sizes=False) for tokens in images]
    stream, trace, _ = model.text_encoder(
        input_ids, others, model.space_dict, pruning, runs=runs, positions=positions.values
    )
    return stream, trace


def _no_longer(stream: Stream, length: int) -> Stream:
    """The stream with a bound of its lengths that no graph has rounded up: outputs are padded to it."""
    tokens = stream.tokens
    tokens = RaggedBatch(tokens.values, tokens.cu_seqlens, min(tokens.max_seqlen, length), tokens.bound)
    return replace(stream, tokens=tokens)


def _slot(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    lead, _, name = key.rpartition(".")
    try:
        owner = module.get_submodule(lead)
    except AttributeError:
        owner = nn.Module()
    parameter = owner._parameters.get(name)
    if parameter is None or not parameter.is_floating_point():
        raise ValueError(f"model: {key} is no plain floating-point weight; merge adapters, and leave it unquantised")
    return owner, name


def _guidance(dictionary: Tensor | str | os.PathLike | None, task: str) -> dict[str, Tensor]:
    """Weights under our names, among them the dictionary."""
    if dictionary is None:
        return {}
    if isinstance(dictionary, Tensor):
        state = {"space_dict": dictionary.detach()}
    else:
        state, _ = read_file(Path(dictionary))
        found = layouts.recognise(state)
        if found is not None:
            state = found[0].to_ours(state, found[1])
        if "space_dict" not in state:
            raise ValueError(f"dictionary: {dictionary} holds no 'space_dict'")
    if state["space_dict"].dim() != 2 or not state["space_dict"].is_floating_point():
        raise ValueError(f"dictionary: expected numbers [M, width], got {list(state['space_dict'].shape)}")
    return state


def _fill(slots: list[tuple[nn.Module, str]], wanted: list[tuple[str, torch.Size]], state: Mapping[str, Tensor]) -> list[str]:
    """Give values to the parameters that transformers does not have; returns those that no file knew."""
    made_up = []
    for (module, name), (key, shape) in zip(slots, wanted, strict=True):
        value = state.get(key)
        if value is None:
            value = initial_weight(key, shape)
            made_up += [key] if key != "temp" else []
        elif value.shape != shape:
            raise ValueError(f"dictionary: {key} is {list(value.shape)}, this model needs {list(shape)}")
        module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
    return made_up


def _search(engine: _Engine, samples: Mapping[str, Tensor], name: str, target: float, steps: list[Step]) -> Step:
    """The temperature whose effect comes closest to a target, by bisection; fills ``steps``."""
    what = "keep_ratio" if name == "keep_ratio" else "gflops"

    def value(temperature: float) -> float:
        steps.append(engine.measure(samples, temperature))
        found = getattr(steps[-1], what)
        if found is None:
            raise ValueError(f"samples: {name} needs 'input_ids' too for a model for task {engine.task!r}")
        return found

    if value(0.0) > target:
        here, factor = _FIRST, _FACTOR if value(_FIRST) > target else 1 / _FACTOR
        while _LOWEST < here < _HIGHEST:  # until the target lies between two neighbours
            here *= factor
            if (value(here) > target) == (factor < 1):
                low, high = sorted((here, here / factor))
                break
        else:
            if factor > 1:
                raise ValueError(f"{name}: {target} is out of reach, {getattr(steps[-1], what):.4g} is the least")
            low = high = here  # it lies between dense and the weakest pruning
        while high > low * _NEIGHBOURS and abs(getattr(steps[-1], what) / target - 1) > _CLOSE_ENOUGH:
            middle = (low * high) ** 0.5
            low, high = (middle, high) if value(middle) > target else (low, middle)
    best = min(steps, key=lambda step: abs(getattr(step, what) - target))
    if abs(getattr(best, what) / target - 1) > _WORTH_A_WARNING:
        _log.warning("%s: %.4g is the closest to %.4g that the samples allow", name, getattr(best, what), target)
    return best


# ---- what takes the place of their methods ------------------------------------------------------------------------


class _Memory(NamedTuple):
    """What a decoder looks at, in place of `encoder_hidden_states`: keys and values are computed once for all steps and beams."""

    keys: list[Keys]
    samples: int


def _ready(module: nn.Module, kwargs: Mapping, *, sync: bool = True, **unsupported) -> _Engine:
    """The engine of a patched tower, for a call that it can serve, with the weights of now."""
    if module.training:
        raise ValueError("a patched model is for inference: call its eval() first, or remove_patch to train it")
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name) or getattr(module.config, name, False):
            raise ValueError(f"{name}: a patched model keeps neither attention matrices nor the states of its layers")
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise ValueError(f"{name}: a patched model does not take it here")
    engine = module._madtp
    if sync:
        engine.sync()
    return engine


def _padded(stream: Stream) -> Tensor:
    """Tokens as ``[B, L, D]`` with zeros behind them; the tensor remembers what it was made of."""
    padded, _ = stream.tokens.to_padded()
    padded._madtp_stream = stream
    return padded


def _stream(hidden_states: Tensor, mask: Tensor | None) -> Stream:
    """Tokens of a padded tensor: those that it was made of, or those that the mask ``[B, L]`` marks."""
    stream = getattr(hidden_states, "_madtp_stream", None)
    if stream is not None:
        return stream
    mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if mask is None else mask
    return Stream.start(RaggedBatch.from_padded(hidden_states, mask), use_sizes=False)


def _ragged(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[RaggedBatch, Tensor]:
    """Texts ``[B, L]`` without their padding, and the positions of their tokens: those given, or the columns."""
    mask = torch.ones_like(input_ids) if mask is None else mask
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected {list(input_ids.shape)} as input_ids, got {list(mask.shape)}")
    return RaggedBatch.from_padded(input_ids, mask), positions.expand(input_ids.shape)[mask.bool()]


def _runs(texts: int, samples: int, repeat: int, device: torch.device) -> Runs | None:
    """Which texts look at which sample: one each, all at the only one, or ``repeat`` consecutive ones (the beams) at each."""
    if samples == 1:
        repeat = texts
    if texts != samples * repeat:
        raise ValueError(f"encoder_hidden_states: {samples} samples do not fit {texts} texts")
    return Runs.of([repeat] * samples, device) if repeat > 1 else None


@can_return_tuple
@torch.no_grad()
def _vision(self, pixel_values=None, interpolate_pos_encoding=False, **kwargs):
    """`BlipVisionModel.forward`, `CLIPVisionModel.forward`."""
    engine = _ready(self, kwargs, interpolate_pos_encoding=interpolate_pos_encoding)
    stream, _ = engine.images(pixel_values)
    # BLIP's tokens have passed this LayerNorm already; transformers applies it to the pooled one twice.
    return BaseModelOutputWithPooling(_padded(stream), self.post_layernorm(first_rows(stream.tokens)))


def _clip_texts(model: Model, input_ids: Tensor, mask: Tensor | None = None) -> tuple[RaggedBatch, Tensor]:
    """Texts ``[B, L]`` up to their end-of-text tokens, and the positions ``[B]`` of those. What follows changes nothing."""
    end = model.config.text.eos_token_id
    eot = (input_ids if end is None else (input_ids == end).int()).argmax(-1)
    real = torch.arange(input_ids.shape[1], device=input_ids.device) <= eot[:, None]
    if mask is not None and (real & ~mask.bool()).any():
        raise ValueError("attention_mask: expected texts without padding before their end-of-text token")
    return RaggedBatch.from_padded(input_ids, real), eot


@can_return_tuple
@torch.no_grad()
def _clip_text(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
    """`CLIPTextModel.forward`."""
    engine = _ready(self, kwargs, position_ids=position_ids)
    texts, eot = _clip_texts(engine.model, input_ids, attention_mask)
    stream = _no_longer(graphs.run(engine.model.encode_text, texts).stream, texts.max_seqlen)
    stream = stream.with_values(self.final_layer_norm(stream.tokens.values))
    return BaseModelOutputWithPooling(_padded(stream), stream.tokens.values[rows_of(stream, eot)])


@can_return_tuple
@torch.no_grad()
def _blip_encoder(
    self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, encoder_embeds=None,
    encoder_hidden_states=None, encoder_attention_mask=None, cache=None, past_key_values=None, use_cache=None, is_decoder=False,
    **kwargs,
):  # fmt: skip
    """`BlipTextModel.forward` of an encoder."""
    engine = _ready(
        self, kwargs, inputs_embeds=inputs_embeds, encoder_embeds=encoder_embeds, cache=cache, past_key_values=past_key_values,
        is_decoder=is_decoder,
    )  # fmt: skip
    texts, positions = _ragged(input_ids, attention_mask, position_ids)
    images = None if encoder_hidden_states is None else _stream(encoder_hidden_states, encoder_attention_mask)
    stream, _ = engine.texts(texts, images, positions)
    return BaseModelOutputWithPoolingAndCrossAttentions(_padded(stream))


@can_return_tuple
@torch.no_grad()
def _blip_decoder(
    self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, encoder_embeds=None,
    encoder_hidden_states=None, encoder_attention_mask=None, cache=None, past_key_values=None, use_cache=None, is_decoder=False,
    **kwargs,
):  # fmt: skip
    """`BlipTextModel.forward` of a decoder. A cache is returned where one was given (by either name) or asked for."""
    generating = isinstance(encoder_hidden_states, _Memory)
    engine = _ready(self, kwargs, sync=not generating, inputs_embeds=inputs_embeds, encoder_embeds=encoder_embeds)
    if not is_decoder:
        raise ValueError("is_decoder: the decoder of a patched model is always causal, got False")
    model, (texts, new) = engine.model, input_ids.shape
    memory = encoder_hidden_states if generating else engine.memory(encoder_hidden_states, encoder_attention_mask)
    repeat = max(1, texts // memory.samples) if generating else 1  # beams, or sequences of one sample
    options = {"runs": _runs(texts, memory.samples, repeat, input_ids.device), "backend": model.backend}
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
        cache = DynamicCache()
    if cache is None:
        ids, positions = _ragged(input_ids, attention_mask, position_ids)
        states = model.text_decoder(model._ids(ids), memory.keys, positions=positions, **options).values
        hidden = states.new_zeros(texts, new, states.shape[-1])
        hidden[torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()] = states
    else:
        earlier = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        seen = earlier.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (texts, seen + new):
            expected = [texts, seen + new]
            raise ValueError(f"attention_mask: expected {expected}, earlier tokens included, got {list(attention_mask.shape)}")
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new, device=input_ids.device)[None]
        ids = RaggedBatch.from_lengths(input_ids.flatten(), [new] * texts)
        options["positions"] = position_ids.expand(texts, new).flatten()
        options["visible"] = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        hidden = model.text_decoder(model._ids(ids), memory.keys, cache=earlier, **options).values.unflatten(0, (texts, new))
    return BaseModelOutputWithPoolingAndCrossAttentions(hidden, **{CACHE: cache})


def _generate(self, *args, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
    """`BlipTextLMHeadModel.generate`: keys and values of what the decoder looks at are computed once, before the first word."""
    engine = _ready(self, kwargs)
    with torch.no_grad():
        memory = engine.memory(encoder_hidden_states, encoder_attention_mask)
    return type(self).generate(self, *args, encoder_hidden_states=memory, **kwargs)


# Heads outside the towers would still compute gradients, of themselves alone.
_DECODER = (
    ("text_decoder.bert", "forward", _blip_decoder),
    ("text_decoder", "forward", torch.no_grad()(BlipTextLMHeadModel.forward)),
    ("text_decoder", "generate", _generate),
)
# Class -> task; task -> towers, and what replaces which of their methods.
_TASKS = {
    BlipForConditionalGeneration: "caption",
    BlipForQuestionAnswering: "vqa",
    BlipForImageTextRetrieval: "retrieval",
    CLIPModel: "clip",
}
_METHODS: dict[str, tuple[tuple[str, str, Callable], ...]] = {
    "caption": (("vision_model", "forward", _vision), *_DECODER),
    "vqa": (("vision_model", "forward", _vision), ("text_encoder", "forward", _blip_encoder), *_DECODER),
    "retrieval": (
        ("vision_model", "forward", _vision),
        ("text_encoder", "forward", _blip_encoder),
        ("", "forward", torch.no_grad()(BlipForImageTextRetrieval.forward)),
    ),
    "clip": (
        ("vision_model", "forward", _vision),
        ("text_model", "forward", _clip_text),
        ("", "forward", torch.no_grad()(CLIPModel.forward)),
        ("", "get_image_features", torch.no_grad()(CLIPModel.get_image_features)),
        ("", "get_text_features", torch.no_grad()(CLIPModel.get_text_features)),
    ),
}
