"""One line for users of transformers: its BLIP models and image encoders run ragged and pruned, on their own weights.

    model = BlipForConditionalGeneration.from_pretrained("Salesforce/blip-image-captioning-base")
    inputs = processor(images, return_tensors="pt")
    patch = madtp.apply_patch(model, keep_ratio=0.5, dictionary="checkpoint_best.pth", samples=inputs)
    print(patch.temperature, patch.keep_ratio, patch.gflops)
    model.generate(**inputs)
    madtp.remove_patch(model)

The towers of the model (vision transformer, text encoder, text decoder) get another `forward`; the rest of the model, its
`generate`, its configuration and its weights stay transformers'. What holds then:

* Outputs have transformers' types. At temperature 0 tokens have the values that transformers computes, with the exceptions below.
* What a tower returns as `last_hidden_state` (or the model as `image_embeds`) is padded as usual: the tokens of a sample stand
  at the beginning, in their order, and zeros follow (also where transformers computes something for padding).
  :func:`attention_mask` tells which are tokens. Given to another tower of the model, edited in place or not, such a tensor is
  recognised, and its padding is never attended to; a tensor computed from it (a selection, a repetition) is not, and needs the
  mask, as `encoder_attention_mask`: without it, rows of zeros are refused where they may be padding.
* Masks say which tokens there are: anything but 0 marks one, as in transformers. `encoder_attention_mask` counts, too; the BLIP
  of transformers (5.17 to 5.24) takes it and does not pass it on to its cross-attention.
* transformers' `BlipForQuestionAnswering` lets the decoder look at padded question tokens, so that an answer depends on the
  longest question of the batch. Here it does not: answers are those that transformers gives to one question at a time.
* Attention matrices are not kept, nor BLIP's hidden states: asking for them is an error. Those of image encoders come whole: a
  row for every patch, that of the token it was merged into. A decoder returns a cache where
  one was given (a `DynamicCache`) or `use_cache=True` asks for it.
* The weights stay where they are and are read at each call: whatever is done to them, in place or by new parameters, counts.
* The modules inside a tower are not called. What only a call would notice is refused, by apply_patch or by the next call: hooks,
  replaced, wrapped, compiled or parametrized modules (adapters, quantization), changed sizes, layers in training mode. Hooks on
  the towers themselves fire; hooks for all modules (`torch.nn.modules.module.register_module_forward_hook`) see our layers.

A patched model is for inference: it computes no gradients, without dropout. It can be copied, pickled and saved as any other.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import DynamicCache, EncoderDecoderCache, ViTModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import can_return_tuple

from madtp_kernels import RaggedBatch, backends, checks
from madtp_kernels.segments import sample_of

from . import flops, graphs
from .config import CLIPConfig, check_temperature
from .generation import CACHE
from .layers import Keys, QueryGroups
from .linear import Linear
from .model import Model
from .pruning import MADTP, METHODS, PER_TOKEN, LayerTrace, Pruning, Tokens
from .rows import first_rows, rows_of
from .tasks import TASKS
from .towers import Patches
from .weights import key_maps
from .weights.files import read_file
from .weights.made_up import initial_weight

__all__ = ["KINDS", "Patch", "Step", "apply_patch", "attention_mask", "pruned", "remove_patch"]

_log = logging.getLogger("madtp")

_UNTRAINED = "ranked_novelty"  # the rule of an encoder where nobody says anything
_PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")

# Tokens of a text that is counted where none is written yet: a caption, prompt included, as in the official figures; an answer
# of one word.
_CAPTION_TOKENS, _ANSWER_TOKENS = 15, 2

# The search for a strength: where it begins, how it goes on (up or down by this factor, so often at most), and when it is
# content: with a value this close to the target, or with strengths so close to each other that the next step would change no
# more than one token. What it finds is within the tolerance, relative to the target.
_FIRST, _FACTOR, _STEPS = 1.0, 4.0, 5
_CLOSE_ENOUGH, _NEIGHBOURS, _TOLERANCE = 0.002, 1.001, 0.02


class Step(NamedTuple):
    """What a strength of pruning does to the samples, on average."""

    strength: float
    """Of the rule: MADTP's temperature."""
    keep_ratio: float
    """Image tokens that leave a layer, as a share of those that enter the first; mean over layers and images."""
    gflops: float | None
    """Of an instance, counted as the official code does (:mod:`madtp.flops`); None where the samples have no texts that the
    model needs."""

    @property
    def temperature(self) -> float:
        """The same, as MADTP calls it."""
        return self.strength


@dataclass(frozen=True)
class Patch:
    """How a model was patched."""

    task: str
    pruning: Pruning
    """The rule, at the strength that was found or asked for."""
    keep_ratio: float | None
    """As in :class:`Step`; None where there were no samples, as are ``gflops``."""
    gflops: float | None
    steps: tuple[Step, ...]
    """The search for the strength, in its order."""

    @property
    def temperature(self) -> float:
        """The rule's strength, as MADTP calls it."""
        return self.pruning.strength


def apply_patch(
    model: nn.Module,
    *,
    method: str | None = None,
    pruning: Pruning | None = None,
    temperature: float | None = None,
    keep_ratio: float | None = None,
    target_gflops: float | None = None,
    dictionary: Tensor | str | os.PathLike | None = None,
    samples: Mapping[str, Tensor] | None = None,
    backend: str | None = None,
) -> Patch:
    """Make a model of transformers run ragged, with pruning. At most one of ``pruning``, ``temperature``, ``keep_ratio`` and
    ``target_gflops`` says how much is pruned; without any, an encoder is pruned by its rule as it comes.

    No weights are copied or moved.

    Args:
        model: one of :data:`KINDS`, with plain floating-point weights on one device. CLIP's text is pruned in the mode "clean"
            (:mod:`madtp.tasks.clip.model`); SigLIP's text stays transformers'.
        method: name of a rule among :data:`madtp.pruning.METHODS`. By default "madtp" for BLIP, and where a temperature or a
            dictionary is given; else "ranked_novelty", which needs no training.
        pruning: the rule itself, for instance a calibrated one.
        temperature: MADTP's; 0 runs dense, which is already faster than transformers' attention without fusion.
        keep_ratio: find the strength at which this share of the image tokens is kept (mean over layers, 0 to 1), within 2 % of
            it. Shares that the samples do not allow are an error that names those that they do: even the lowest strength above
            0 may prune something, and where tokens are much alike (random weights, an untrained dictionary) many go at once.
        target_gflops: find the strength at which an instance costs this much, within 2 %, counted as the official code does: an
            image; a caption (of 15 tokens); a question about an image with its answer (of one word); or an image and a text
            (retrieval: with their features and their match).
        dictionary: MADTP's cross-modal dictionary: a tensor ``[M, width]``, or a file that holds one as ``space_dict``, such as a
            MADTP checkpoint or the weights of a saved model, from which maps to the dictionary are taken too. Without one it
            is drawn from N(0, 1) with a fixed seed, as MADTP begins; that prunes by an alignment which nobody has trained. So are
            CLIP's maps where a tensor or a file holds none; both with a warning.
        samples: a few inputs of the model, as its processor returns them (``pixel_values``, and for other models than
            captioning and image towers ``input_ids`` and ``attention_mask``, one text for each image). Needed for a target;
            otherwise they are measured.
        backend: force an implementation of the kernels ("reference", "cpu", "triton", "cuda").

    Returns:
        The rule, what it keeps and costs on the samples, and the steps of the search. The same model and samples give the same
        result.

    Raises:
        TypeError: a model of another class.
        ValueError: a model that is patched already, or has something that our layers do not have (hooks, adapters, quantized
            weights, other sizes than its configuration says); more than one setting, or none that makes sense; a target without
            samples or out of reach; a dictionary of another width than the model's tokens, without a map to it.
    """
    base = _base(model)
    if base is None:
        raise TypeError(f"model: expected one of {', '.join(KINDS)}, got {type(model).__name__}")
    if hasattr(model, "_madtp"):
        raise ValueError("model: it is patched already; call remove_patch first")
    kind = KINDS[base.__name__]
    settings = {
        "temperature": temperature,
        "keep_ratio": keep_ratio,
        "target_gflops": target_gflops,
        "pruning": pruning,
    }
    given = [name for name, value in settings.items() if value is not None]
    if len(given) > 1 or (not given and not kind.of_towers and method is None):
        expected = ", ".join(name for name in settings if name != "pruning")
        raise ValueError(f"expected exactly one of {expected}, got {', '.join(given) or 'none'}")
    rule = _rule(kind, method, pruning, temperature, dictionary)
    if keep_ratio is not None and not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio: expected a share above 0 and up to 1, got {keep_ratio}")
    if target_gflops is not None and not target_gflops > 0:
        raise ValueError(f"target_gflops: expected a number above 0, got {target_gflops}")
    if backend is not None and backend not in backends.NAMES:
        raise ValueError(f"backend: expected one of {', '.join(backends.NAMES)}, got {backend!r}")
    target = next((name for name in ("keep_ratio", "target_gflops") if settings[name] is not None), None)
    if samples is None and target is not None:
        raise ValueError(f"samples: {target} is sought on a few inputs of the model, got none")
    methods = [
        _Method(model.get_submodule(place), base.__name__, number) for number, (place, _, _) in enumerate(kind.methods)
    ]
    for replaced in methods:
        if replaced.name in vars(replaced.module):
            raise ValueError(f"model: {replaced.place} is replaced already, by a hook of accelerate or another patch")

    engine = _Engine(model, kind, methods, dictionary, rule, backend, warn=target is not None or rule.active)
    steps: list[Step] = []
    if target is not None:
        found = _search(engine, samples, target, settings[target], steps)
    elif samples is None:
        found = Step(rule.strength, None, None)
    else:
        found = engine.measure(samples, rule.strength)
    engine.model.pruning = engine.at(found.strength)
    for module in {model, *(method.module for method in methods)}:
        module._madtp = engine
    for method in methods:
        setattr(method.module, method.name, method)
    return Patch(kind.task, engine.model.pruning, found.keep_ratio, found.gflops, tuple(steps))


@contextlib.contextmanager
def pruned(model: nn.Module, **settings: Any) -> Iterator[Patch]:
    """:func:`apply_patch` with these settings, undone at the end of the ``with`` block."""
    patch = apply_patch(model, **settings)
    try:
        yield patch
    finally:
        remove_patch(model)


def _base(model: nn.Module) -> type | None:
    """The class of transformers among :data:`KINDS` that a model is, or derives from."""
    known = (base for base in type(model).__mro__ if base.__name__ in KINDS)
    return next((base for base in known if base.__module__.startswith("transformers.")), None)


def _rule(
    kind: _Kind, method: str | None, pruning: Pruning | None, temperature: float | None, dictionary: Any
) -> Pruning:
    """The rule that the arguments of :func:`apply_patch` mean; a search sets its strength."""
    if pruning is not None:
        if method not in (None, pruning.name):
            raise ValueError(f"method: the rule that was given is {pruning.name!r}, got {method!r}")
        return pruning
    if temperature is not None:
        if method not in (None, MADTP.name):
            raise ValueError(f"temperature: only madtp has one, got method {method!r}")
        return MADTP(check_temperature(temperature))
    if method is None:
        trained = not kind.of_towers or dictionary is not None
        method = MADTP.name if trained or _UNTRAINED not in METHODS else _UNTRAINED
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method]()


def remove_patch(model: nn.Module) -> None:
    """Undo :func:`apply_patch`: the model is again what transformers made it, with the same parameters.

    Raises:
        ValueError: a model that is not patched, or a method that another library has wrapped since: its wrapper has to go first.
    """
    if not hasattr(model, "_madtp"):
        raise ValueError(f"model: expected one that apply_patch has patched, got {type(model).__name__}")
    methods = model._madtp.methods
    for method in methods:
        if vars(method.module).get(method.name) is not method:
            raise ValueError(
                f"model: {method.place} was replaced after apply_patch, by a hook of accelerate or another patch; remove that first"
            )
    for method in methods:
        delattr(method.module, method.name)
    for module in {model, *(method.module for method in methods)}:
        del module._madtp


def attention_mask(hidden_states: Tensor) -> Tensor:
    """Which rows of a padded tensor ``[B, L, D]`` from a patched tower are tokens: ``[B, L]`` int64, 1 for a token.

    Raises:
        ValueError: a tensor that is not just what a patched tower returned.
    """
    ids = _streams.get(hidden_states)
    if ids is None:
        raise ValueError("hidden_states: expected what a patched tower returned, itself and not computed from it")
    position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    return (position < ids.lengths[:, None]).long()


# ---- our model on their weights -----------------------------------------------------------------------------------


class _Link(NamedTuple):
    """A parameter of ours that is a view of one of theirs."""

    module: nn.Module
    name: str
    owner: nn.Module
    key: str
    place: str
    """Theirs, as it is called in the whole model."""
    shape: torch.Size

    def follow(self) -> Tensor:
        """See the weight that theirs is now: it may have been moved, converted, or given anew."""
        theirs, own = self.owner._parameters.get(self.key), self.module._parameters.get(self.name)
        if type(theirs) not in (nn.Parameter, Tensor) or not theirs.is_floating_point():
            raise ValueError(
                f"model: {self.place} is no plain floating-point weight; merge adapters, and leave it unquantised"
            )
        if (
            own is None
            or (own.data_ptr(), own.dtype, own.device) != (theirs.data_ptr(), theirs.dtype, theirs.device)
            or (own.stride() != theirs.stride() and own.dim() == theirs.dim())
        ):
            weight = theirs.detach()
            if weight.numel() != self.shape.numel() or (weight.shape != self.shape and not weight.is_contiguous()):
                raise ValueError(f"model: {self.place} is {list(weight.shape)}, where {list(self.shape)} is expected")
            own = nn.Parameter(weight if weight.shape == self.shape else weight.view(self.shape), requires_grad=False)
            self.module._parameters[self.name] = own
        return own


class _Side(nn.Module):
    """Linear layers side by side in place of one: transformers keeps query, key and value apart."""

    def __init__(self, whole: Linear, parts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Linear(whole.in_features, whole.out_features // parts, whole.bias is not None) for _ in range(parts)
        )

    def forward(self, x: Tensor, *, tokens: RaggedBatch | None = None) -> Tensor:
        """``x [C, in]`` to ``[C, out]``, as :class:`madtp.linear.Linear`."""
        return torch.cat([layer(x, tokens=tokens) for layer in self.layers], -1)


class _Seen(NamedTuple):
    """A tower or a module inside it as apply_patch saw it. What is inside is not called any more, and has to stay what it was."""

    place: str
    module: nn.Module
    is_tower: bool
    kind: type
    forward: Callable
    children: list[tuple[str, nn.Module]]
    parameters: list[tuple[str, bool]]
    """Names, and whether there is one."""
    sizes: dict[str, Any]
    """Numbers and words among its attributes: the epsilon of a LayerNorm, the scale of an attention."""

    @classmethod
    def of(cls, place: str, module: nn.Module, is_tower: bool) -> _Seen:
        kind = type(module)
        parameters = [(name, value is not None) for name, value in module._parameters.items()]
        return cls(
            place, module, is_tower, kind, kind.forward, list(module._modules.items()), parameters, _sizes(module)
        )

    def change(self) -> str | None:
        """What transformers' own tower would notice and the patched one does not; None if there is nothing."""
        module, facts = self.module, self.module.__dict__
        if list(module._modules.items()) != self.children:
            return "holds other modules"
        if [(name, value is not None) for name, value in module._parameters.items()] != self.parameters:
            return "holds other parameters"
        if self.is_tower:
            return None
        if type(module) is not self.kind:
            return f"has become a {type(module).__name__}"
        if "forward" in facts or self.kind.forward is not self.forward:
            return "has another forward"
        if module._compiled_call_impl is not None:
            return "is compiled"
        hooks = (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or not all(map(_is_recorder, module._forward_hooks.values())):
            return "has hooks"
        return next((f"has another {name}" for name, value in self.sizes.items() if facts.get(name) != value), None)


def _is_recorder(hook: Callable) -> bool:
    """Whether transformers has put a hook there to record outputs, which does nothing where none are asked for."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str))
        and not name.startswith("_")
        and name not in ("training", "gradient_checkpointing")
    }


def _check_kinds(tower: nn.Module, expected: nn.Module, place: str) -> None:
    """Refuse a tower that is not what transformers makes of its configuration (``expected``)."""
    found, wanted = (dict(t.named_modules(prefix=place, remove_duplicate=False)) for t in (tower, expected))
    for name in [*wanted, *(found.keys() - wanted.keys())]:
        module, other = found.get(name), wanted.get(name)
        if type(module) is not type(other):
            have, want = ("no module" if m is None else f"a {type(m).__name__}" for m in (module, other))
            raise ValueError(f"model: {name} is {have}, expected {want}; merge adapters, and leave it unquantised")
        if not type(module).forward.__module__.startswith(("torch.", "transformers.")):
            raise ValueError(f"model: {name} has the forward of another library, {type(module).forward.__module__}")
        sizes = {} if module is tower else _sizes(other)
        for size, value in sizes.items():
            if getattr(module, size, None) != value:
                raise ValueError(
                    f"model: {name}.{size} is {getattr(module, size, None)}, but its configuration makes it {value}"
                )


class _Engine:
    """Our model for a model of transformers: the same memory, and a dictionary in addition."""

    def __init__(
        self,
        theirs: nn.Module,
        kind: _Kind,
        methods: list[_Method],
        dictionary: Tensor | str | os.PathLike | None,
        rule: Pruning,
        backend: str | None,
        warn: bool,
    ) -> None:
        task = kind.task
        self.task, self.kind, self.methods, self.rule = task, kind, methods, rule
        layout = key_maps.HUGGING_FACE[theirs.config.model_type]
        guidance = _guidance(dictionary, task)
        config = layout.config_of(theirs.config.to_dict(), theirs.state_dict() | guidance, task)
        if not kind.texts:  # transformers' own
            config = replace(config, text=None, logit_bias=False)
        with torch.device("meta"):
            self.model: Model = TASKS[task].Model(config, rule, backend=backend).eval()
            options = {"add_pooling_layer": theirs.pooler is not None} if isinstance(theirs, ViTModel) else {}
            expected = _base(theirs)(copy.deepcopy(theirs.config), **options)
        self.towers = {place: theirs.get_submodule(place) for place in kind.towers}
        for place, tower in self.towers.items():
            _check_kinds(tower, expected.get_submodule(place), place)
        self.seen = {
            place: [_Seen.of(name, module, module is tower) for name, module in tower.named_modules(prefix=place)]
            for place, tower in self.towers.items()
        }
        prefix = getattr(layout, "prefix", "")
        if prefix and hasattr(theirs, prefix.rstrip(".")):
            prefix = ""
        wanted = [
            (key, parameter.shape, [place.removeprefix(prefix) for place in layout.parts_of(key)])
            for key, parameter in self.model.named_parameters()
        ]
        for lead, places in {key.rpartition(".")[0]: places for key, _, places in wanted if len(places) > 1}.items():
            parent, _, child = lead.rpartition(".")
            with torch.device("meta"):
                side = _Side(self.model.get_submodule(lead), len(places))
            setattr(self.model.get_submodule(parent), child, side.eval())
        self.links, self.own = [], []
        for key, shape, places in wanted:
            lead, _, name = key.rpartition(".")
            module = self.model.get_submodule(lead)
            if not places:
                self.own.append((module, name, key, shape))
            elif len(places) == 1:
                self.links.append(_Link(module, name, *_slot(theirs, places[0]), places[0], shape))
            else:
                shape = torch.Size([shape[0] // len(places), *shape[1:]])
                self.links += [
                    _Link(layer, name, *_slot(theirs, place), place, shape)
                    for layer, place in zip(module.layers, places, strict=True)
                ]
        for link in self.links:
            link.module._parameters[link.name] = None
        made_up = _fill(self.own, guidance)
        if made_up and dictionary is not None and not isinstance(config, CLIPConfig):
            raise ValueError(
                f"dictionary: its entries are {config.vision.sd_dim} wide, the model's tokens are not, and it holds no {made_up[0]}"
            )
        if made_up and warn and rule.needs_dictionary:
            _log.warning(
                "drawn at random with a fixed seed, as MADTP does before training: %s. What is pruned depends on attention, and "
                "on an alignment that is not trained.",
                made_up[0] + (f" and {len(made_up) - 1} maps" if len(made_up) > 1 else ""),
            )
        for place in self.towers:
            self.sync(place)

    @torch.compiler.disable  # a compiled model has to look again at each call
    def sync(self, place: str) -> None:
        """For a call of a tower: see the weights of now.

        Raises:
            ValueError: something inside the tower that only a call of its modules would notice, or weights that are not plain,
                of different dtypes, or on different devices.
        """
        for seen in self.seen[place]:
            reason = seen.change()
            if reason is not None:
                raise ValueError(
                    f"model: {seen.place} {reason}, but a patched tower does not call the modules inside it; merge the change "
                    "into the weights, or call remove_patch first"
                )
        with torch.inference_mode(False), torch.no_grad():
            first = None
            for link in self.links:
                weight = link.follow()
                kind = (weight.dtype, weight.device)
                first = first or (kind, link.place)
                if kind != first[0] or weight.is_meta:
                    raise ValueError(
                        f"model: expected all weights in one dtype and on one device, found {first[0][0]} on {first[0][1]} "
                        f"({first[1]}), {kind[0]} on {kind[1]} ({link.place})"
                    )
            for module, name, _, _ in self.own:
                parameter = module._parameters[name]
                if (parameter.dtype, parameter.device) != first[0]:
                    module._parameters[name] = nn.Parameter(parameter.to(weight), requires_grad=False)

    @property
    def pads(self) -> bool:
        """Whether its towers return tensors with padding."""
        asks = hasattr(self.model, "text_encoder") and hasattr(self.model, "text_decoder")
        return asks or self.model.pruning.active

    def at(self, strength: float) -> Pruning:
        """The rule at a strength; 0 is dense for every rule."""
        return self.rule.at(strength) if strength != self.rule.strength else self.rule

    def images(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor | None = None, spatial_shapes: Tensor | None = None
    ) -> tuple[Tokens, list[LayerTrace]]:
        """Final tokens and what every layer did, of ``[B, 3, S, S]``, or of patches as SigLIP 2's processor makes them."""
        model = self.model
        if spatial_shapes is not None:
            features = model.encode_image(_cut(pixel_values, pixel_attention_mask, spatial_shapes))
            return features.tokens, features.trace
        if isinstance(model.config, CLIPConfig):
            features = graphs.run(model.encode_image, pixel_values)
            return features.tokens, features.trace
        return graphs.run(types.MethodType(_encode_images, model), pixel_values)

    def states(
        self, pixel_values: Tensor, mask: Tensor | None, spatial_shapes: Tensor | None, length: int | None
    ) -> tuple[Tokens, tuple[Tensor, ...]]:
        """Final tokens, and the states before the first layer and after each ``[B, L, D]``: whole, with a row for every token
        that there was at first, that of the token which stands for it by then.

        Raises:
            ValueError: a rule that does not say which token stands for a dropped one.
        """
        model, passed = self.model, []
        pixels = model._patches(pixel_values if spatial_shapes is None else _cut(pixel_values, mask, spatial_shapes))
        batch = len(pixel_values)
        features = model.visual(pixels, model.space_dict, model._pruning(None, batch), states=passed)
        first, source = passed[0], torch.arange(len(passed[0].values), device=model.device)
        whole = []
        for tokens, trace in zip(passed, (None, *features.trace)):
            if trace is not None and trace.rows is not None:
                source = trace.rows.long()[source]
            elif trace is not None and trace.cu_seqlens is not trace.cu_seqlens_in:
                raise ValueError(
                    f"output_hidden_states: pruned by {model.pruning.name!r}, which does not say which token stands for a dropped "
                    "one; use a rule that merges, or none"
                )
            if (source < 0).any():
                raise ValueError(f"output_hidden_states: {model.pruning.name!r} drops tokens for which none stands")
            padded, _ = first.with_values(tokens.values[source]).to_padded()
            whole.append(padded if length is None else F.pad(padded, (0, 0, 0, length - padded.shape[1])))
        return features.tokens, tuple(whole)

    def texts(
        self, input_ids: RaggedBatch, images: Tokens | None, positions: Tensor | None = None
    ) -> tuple[Tokens, list[LayerTrace]]:
        """The same of BLIP's texts ``[T]``, alone or with images in view."""
        model = self.model
        input_ids = model._ids(input_ids)
        positions = Tokens.start(input_ids).ids if positions is None else positions
        encode = types.MethodType(_encode_texts, model)
        inputs = [input_ids, input_ids.with_values(positions)] + ([] if images is None else [images])
        runs = None if images is None else _runs(len(input_ids), len(images), 1, model.device)
        stream, trace = graphs.run(encode, *inputs) if runs is None else encode(*inputs, query_groups=runs)
        return _no_longer(stream, input_ids.max_seqlen), trace

    def memory(self, hidden_states: Tensor | None, mask: Tensor | None) -> _Memory:
        """What the decoder is to look at."""
        if hidden_states is None:
            raise ValueError("encoder_hidden_states: expected what the decoder is to look at, got None")
        stream = _stream(hidden_states, mask, padding=self.pads)
        return _Memory(self.model.text_decoder.keys(stream), stream.batch_size)

    def measure(self, samples: Mapping[str, Tensor], strength: float) -> Step:
        """What a strength keeps and costs."""
        if "pixel_values" not in samples:
            raise ValueError(f"samples: expected 'pixel_values', got {', '.join(samples) or 'nothing'}")
        ids, model = samples.get("input_ids"), self.model
        if TASKS[self.task].aligned and ids is not None and len(ids) != len(samples["pixel_values"]):
            raise ValueError(
                f"samples: expected a text for each of {len(samples['pixel_values'])} images, got {len(ids)}"
            )
        model.pruning = self.at(strength)
        with torch.no_grad():
            pixels = {name: samples[name].to(model.device) for name in _PIXELS if name in samples}
            images, trace = self.images(**pixels)
            vision = flops.stream_lengths(trace)
            shares = [length / lengths[0] for lengths in vision for length in lengths[1:]]
            keep_ratio = sum(shares) / len(shares)
            costs = _COSTS[self.task](self, vision, images, ids, samples.get("attention_mask"))
        gflops = None if costs is None else sum(cost.official for cost in costs) / len(costs)
        return Step(strength, keep_ratio, gflops)

    def looking(self, images: Tokens, ids: Tensor, mask: Tensor | None) -> tuple[RaggedBatch, list[list[int]]]:
        """BLIP's texts, and their token counts with the images in view."""
        device = self.model.device
        texts, _ = _ragged(ids.to(device), None if mask is None else mask.to(device), None)
        return texts, flops.stream_lengths(self.texts(texts, images)[1])


Counts = list[list[int]]


def _caption_costs(engine: _Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    """Cost of each instance of the samples; None where they have no texts."""
    model = engine.model
    return [flops.caption(model.config, lengths, _CAPTION_TOKENS, pruning=model.pruning) for lengths in vision]


def _vqa_costs(engine: _Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    if ids is None:
        return None
    model, pairs = engine.model, zip(vision, engine.looking(images, ids, mask)[1], strict=True)
    return [flops.vqa(model.config, i, t, _ANSWER_TOKENS, pruning=model.pruning) for i, t in pairs]


def _retrieval_costs(engine: _Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    if ids is None:
        return None
    model, (texts, looking) = engine.model, engine.looking(images, ids, mask)
    alone = flops.stream_lengths(engine.texts(texts, None)[1])
    return [
        flops.retrieval(model.config, image=i, text=a, match=(i[-1], t), pruning=model.pruning)
        for i, t, a in zip(vision, looking, alone, strict=True)
    ]


def _clip_costs(engine: _Engine, vision: Counts, images: Tokens, ids: Tensor | None, mask: Tensor | None):
    model = engine.model
    if model.config.text is None:
        texts = [None] * len(vision)
    elif ids is None:
        return None
    else:
        texts = flops.stream_lengths(model.encode_text(_clip_texts(model, ids.to(model.device))[0]).trace)
    pairs = zip(vision, texts, strict=True)
    return [flops.clip(model.config, image=i, text=t, pruning=model.pruning) for i, t in pairs]


_COSTS = {"caption": _caption_costs, "vqa": _vqa_costs, "retrieval": _retrieval_costs, "clip": _clip_costs}


def _encode_images(model: Model, pixels: Tensor | RaggedBatch) -> tuple[Tokens, list[LayerTrace]]:
    """BLIP's images: what :mod:`madtp.graphs` records."""
    pruning = model._pruning(None, len(pixels))
    stream, trace, _ = model.visual_encoder(model._pixels(pixels), model.space_dict, pruning)
    return stream, trace


def _encode_texts(
    model: Model,
    input_ids: RaggedBatch,
    positions: RaggedBatch,
    *images: Tokens,
    query_groups: QueryGroups | None = None,
) -> tuple[Tokens, list[LayerTrace]]:
    """BLIP's texts, with images in view or none."""
    pruning = model._pruning(None, len(input_ids))
    stream, trace, _ = model.text_encoder(
        input_ids, images, model.space_dict, pruning, query_groups=query_groups, positions=positions.values
    )
    return stream, trace


def _no_longer(stream: Tokens, length: int) -> Tokens:
    """The stream with a bound of its lengths that no graph has rounded up: outputs are padded to it."""
    return replace(stream, max_seqlen=min(stream.max_seqlen, length))


def _slot(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its name there."""
    lead, _, name = key.rpartition(".")
    try:
        owner = module.get_submodule(lead)
    except AttributeError:
        owner = nn.Module()
    parameter = owner._parameters.get(name)
    if parameter is None or not parameter.is_floating_point():
        renamed = "" if parameter is not None else " (or this release of transformers calls it otherwise)"
        raise ValueError(
            f"model: {key} is no plain floating-point weight; merge adapters, and leave it unquantised{renamed}"
        )
    return owner, name


def _guidance(dictionary: Tensor | str | os.PathLike | None, task: str) -> dict[str, Tensor]:
    """Weights under our names, among them the dictionary."""
    if dictionary is None:
        return {}
    if isinstance(dictionary, Tensor):
        state = {"space_dict": dictionary.detach()}
    else:
        state, _ = read_file(Path(dictionary))
        found = key_maps.recognise(state)
        if found is not None:
            state = found[0].to_ours(state, found[1])
        if "space_dict" not in state:
            raise ValueError(f"dictionary: {dictionary} holds no 'space_dict'")
    if state["space_dict"].dim() != 2 or not state["space_dict"].is_floating_point():
        raise ValueError(f"dictionary: expected numbers [M, width], got {list(state['space_dict'].shape)}")
    return state


def _fill(own: Sequence[tuple[nn.Module, str, str, torch.Size]], state: Mapping[str, Tensor]) -> list[str]:
    """Give values to the parameters that transformers does not have; returns those that no file knew."""
    made_up = []
    for module, name, key, shape in own:
        value = state.get(key)
        if value is None:
            value = initial_weight(key, shape)
            made_up += [key] if key != "temp" else []
        elif value.shape != shape:
            raise ValueError(f"dictionary: {key} is {list(value.shape)}, this model needs {list(shape)}")
        module._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
    return made_up


def _search(engine: _Engine, samples: Mapping[str, Tensor], name: str, target: float, steps: list[Step]) -> Step:
    """The strength that meets a target, by bisection; fills ``steps``.

    Mostly a higher strength keeps less, but not always: a layer in which no token would survive MADTP is left alone. So all
    intervals between the strengths that were tried first may hold the target.
    """
    what = "keep_ratio" if name == "keep_ratio" else "gflops"

    def value(strength: float) -> float:
        steps.append(engine.measure(samples, strength))
        found = getattr(steps[-1], what)
        if found is None:
            raise ValueError(f"samples: {name} needs 'input_ids' too for a model for task {engine.task!r}")
        return found

    def close(found: float, within: float) -> bool:
        return abs(found / target - 1) <= within

    dense = value(0.0)
    if dense <= target or close(dense, _CLOSE_ENOUGH):
        if not close(dense, _TOLERANCE):
            _log.warning("%s: %.4g is more than the model costs without pruning, %.4g", name, target, dense)
        return steps[0]
    known = {_FIRST: value(_FIRST)}
    up, down = ([_FIRST * _FACTOR ** (sign * n) for n in range(1, _STEPS + 1)] for sign in (1, -1))
    for strength in up + down if known[_FIRST] > target else down + up:
        if close(getattr(steps[-1], what), _CLOSE_ENOUGH):
            return steps[-1]
        known[strength] = value(strength)
        neighbour = strength / _FACTOR if strength > _FIRST else strength * _FACTOR
        low, high = sorted((strength, neighbour))
        falls = known[low] > target
        if falls == (known[high] > target):
            continue
        while high > low * _NEIGHBOURS and not close(getattr(steps[-1], what), _CLOSE_ENOUGH):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if (value(middle) > target) == falls else (low, middle)
        if close(getattr(steps[-1], what), _TOLERANCE):
            return steps[-1]
    best = min(steps, key=lambda step: abs(getattr(step, what) - target))
    if close(getattr(best, what), _TOLERANCE):
        return best
    reached = sorted({getattr(step, what) for step in steps})
    nearest = [
        *[found for found in reached if found < target][-1:],
        *[found for found in reached if found > target][:1],
    ]
    raise ValueError(
        f"{name}: {target:.4g} is out of reach on these samples, which allow {reached[0]:.4g} to {reached[-1]:.4g}; the closest "
        f"{'are' if len(nearest) > 1 else 'is'} {' and '.join(f'{found:.4g}' for found in nearest)}"
    )


# ---- what takes the place of their methods ------------------------------------------------------------------------


class _Memory(NamedTuple):
    """What a decoder looks at, in place of `encoder_hidden_states`: keys and values are computed once for all steps and beams."""

    keys: list[Keys]
    samples: int


class _Method:
    """What stands in the place of a method of a module. Unlike a bound function it can be pickled and copied with the model."""

    def __init__(self, module: nn.Module, kind: str, number: int) -> None:
        self.module, self.kind, self.number = module, kind, number

    @property
    def name(self) -> str:
        return KINDS[self.kind].methods[self.number][1]

    @property
    def place(self) -> str:
        return f"{KINDS[self.kind].methods[self.number][0] or type(self.module).__name__}.{self.name}"

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method itself: transformers and others look at it to learn which arguments there are."""
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))

    def __call__(self, *args, **kwargs):
        return KINDS[self.kind].methods[self.number][2](self.module, *args, **kwargs)


# Padded tensors that towers returned -> ids of their tokens, as a ragged batch. Attributes of the tensors would be saved with them.
_streams = WeakTensorKeyDictionary()

# Arguments that transformers passes through all of a model and that change nothing in a tower.
_HARMLESS = ("num_items_in_batch", "return_dict")


def _ready(module: nn.Module, kwargs: Mapping, *, sync: bool = True, states: bool = False, **unsupported) -> _Engine:
    """The engine of a patched tower, for a call that it can serve, with the weights of now; ``states`` says whether it returns
    those of its layers."""
    engine = getattr(module, "_madtp", None)
    if engine is None:
        raise ValueError("model: a tower was replaced after apply_patch; call remove_patch first")
    place = next(place for place, tower in engine.towers.items() if tower is module)
    if any(seen.module.training for seen in engine.seen[place]):
        raise ValueError("a patched model is for inference: call its eval() first, or remove_patch to train it")
    outputs = {
        name: kwargs.get(name, getattr(module.config, name, None))
        for name in ("output_attentions", "output_hidden_states")
    }
    for name, value in (
        outputs | {name: value for name, value in kwargs.items() if name.startswith("output_")}
    ).items():
        if value is not None and value is not False and not (states and name == "output_hidden_states"):
            raise ValueError(f"{name}: a patched model keeps neither attention matrices nor the states of its layers")
    for name, value in (unsupported | dict(kwargs)).items():
        if (
            value is not None
            and value is not False
            and name not in _HARMLESS
            and not (states and name == "output_hidden_states")
        ):
            raise ValueError(f"{name}: a patched model does not take it here")
    if sync:
        engine.sync(place)
    return engine


def _padded(stream: Tokens) -> Tensor:
    """Tokens as ``[B, L, D]`` with zeros behind them, which are recognised."""
    padded, _ = stream.to_padded()
    _streams[padded] = stream.with_values(stream.ids)
    return padded


def _stream(hidden_states: Tensor, mask: Tensor | None, *, padding: bool) -> Tokens:
    """Tokens of ``encoder_hidden_states [B, L, D]``, as they are now: those that a tower returned, of these those that the mask
    ``[B, L]`` marks. ``padding``: whether rows of zeros may be padding.
    """
    if hidden_states.dim() != 3 or (mask is not None and mask.shape != hidden_states.shape[:2]):
        what = (
            "encoder_hidden_states [B, L, D]"
            if mask is None
            else f"encoder_attention_mask {list(hidden_states.shape[:2])}"
        )
        raise ValueError(f"{what}: got {list((hidden_states if mask is None else mask).shape)}")
    mask = None if mask is None or mask.all() else mask.bool()
    ids = _streams.get(hidden_states)
    if ids is not None and hidden_states.shape[:2] == (ids.batch_size, ids.max_seqlen):
        if mask is None:
            row = torch.arange(ids.values.shape[0], device=hidden_states.device)
            sample = sample_of(ids.cu_seqlens, len(row))
            place = sample * ids.max_seqlen + row - ids.cu_seqlens[sample]
            values = hidden_states.flatten(0, 1)[place.clamp(0, max(hidden_states.shape[:2].numel() - 1, 0))]
            return ids.with_values(values)
        mask = mask & attention_mask(hidden_states).bool()
    mask = hidden_states.new_ones(hidden_states.shape[:2], dtype=torch.bool) if mask is None else mask
    if ids is None and padding and (mask & (hidden_states == 0).all(-1)).any():
        raise ValueError(
            "encoder_hidden_states: rows of zeros may be the padding of a patched tower; give what the tower returned itself, or an "
            "encoder_attention_mask (madtp.patch.attention_mask makes one) that hides them"
        )
    if not mask.any(1).all():
        raise ValueError("encoder_attention_mask: expected at least one token of each sample")
    tokens, parts = Tokens.start(RaggedBatch.from_padded(hidden_states, mask)), {}
    if ids is not None:  # what a tower said of its tokens holds for those that are left
        known = {name: getattr(ids, name) for name in PER_TOKEN[1:]}
        parts = {n: ids.with_values(p).to_padded()[0][mask] for n, p in known.items() if p is not None}
    return replace(tokens, **parts)


def _integers(input_ids: Tensor | None) -> Tensor:
    """Ids ``[B, L]`` of any integer type, as int64."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected integers [B, L], got {checks.describe(input_ids)}")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected integers, got {input_ids.dtype}")
    return input_ids.long()


def _ragged(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[RaggedBatch, Tensor]:
    """Texts ``[B, L]`` without their padding, and the positions of their tokens: those given, or the columns."""
    input_ids = _integers(input_ids)
    mask = torch.ones_like(input_ids) if mask is None else mask
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected {list(input_ids.shape)} as input_ids, got {list(mask.shape)}")
    return RaggedBatch.from_padded(input_ids, mask), positions.expand(input_ids.shape)[mask.bool()]


def _runs(texts: int, samples: int, repeat: int, device: torch.device) -> QueryGroups | None:
    """Which texts look at which sample: one each, all at the only one, or ``repeat`` consecutive ones (the beams) at each."""
    if samples == 1:
        repeat = texts
    if texts != samples * repeat:
        raise ValueError(f"encoder_hidden_states: {samples} samples do not fit {texts} texts")
    return QueryGroups.of([repeat] * samples, device) if repeat > 1 else None


@can_return_tuple
@torch.no_grad()
def _vision(self, pixel_values=None, interpolate_pos_encoding=False, **kwargs):
    """`BlipVisionModel.forward`."""
    engine = _ready(self, kwargs, interpolate_pos_encoding=interpolate_pos_encoding)
    tokens, _ = engine.images(pixel_values)
    # BLIP's tokens have passed this LayerNorm already; transformers applies it to the pooled one twice.
    return BaseModelOutputWithPooling(_padded(tokens), self.post_layernorm(first_rows(tokens)))


@can_return_tuple
@torch.no_grad()
def _encoder(
    self, pixel_values=None, pixel_attention_mask=None, spatial_shapes=None, interpolate_pos_encoding=False, **kwargs
):
    """`forward` of the image towers of CLIP, SigLIP, SigLIP 2, DINOv2 and ViT.

    Hidden states are whole: every layer has a row for each patch, that of the token it was merged into.
    """
    wanted = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
    engine = _ready(self, kwargs, states=True, interpolate_pos_encoding=interpolate_pos_encoding)
    model, tower = engine.model, engine.model.visual
    pixels = (pixel_values, pixel_attention_mask, spatial_shapes)
    length = None if spatial_shapes is None else pixel_values.shape[1]
    if wanted:
        tokens, states = engine.states(*pixels, length)
    else:
        (tokens, _), states = engine.images(*pixels), None
    normed = (lambda x: x) if engine.kind.raw else tower.norm_post
    if states is not None:
        last = normed(states[-1])
    else:
        last = _padded(tokens if engine.kind.raw else tokens.with_values(tower.norm_post(tokens)))
        if length is not None and not model.pruning.active:
            last = F.pad(last, (0, 0, 0, length - last.shape[1]))
    pools = getattr(self, "use_head", True) and getattr(self, "pooler", self) is not None
    return BaseModelOutputWithPooling(last, tower.pool(tokens, model.backend) if pools else None, hidden_states=states)


def _cut(pixel_values: Tensor, mask: Tensor | None, spatial_shapes: Tensor) -> Patches:
    """Patches ``[B, N, 3 * patch * patch]`` with their grids ``[B, 2]``, as SigLIP 2's processor makes them, without padding.

    Raises:
        ValueError: a mask ``[B, N]`` that marks other patches than the grids say.
    """
    grids = tuple((int(rows), int(columns)) for rows, columns in spatial_shapes.tolist())
    numbers = [rows * columns for rows, columns in grids]
    if pixel_values.dim() != 3 or len(numbers) != len(pixel_values) or max(numbers, default=0) > pixel_values.shape[1]:
        raise ValueError(f"spatial_shapes: {list(grids)} do not fit pixel_values {list(pixel_values.shape)}")
    ends = torch.tensor(numbers, device=pixel_values.device)[:, None]
    real = torch.arange(pixel_values.shape[1], device=pixel_values.device) < ends
    if mask is not None and (mask.shape != real.shape or not torch.equal(mask.bool(), real)):
        raise ValueError(f"pixel_attention_mask: expected the first {numbers} patches, as spatial_shapes says")
    return Patches(RaggedBatch.from_padded(pixel_values, real), grids)


def _clip_texts(model: Model, input_ids: Tensor, mask: Tensor | None = None) -> tuple[RaggedBatch, Tensor]:
    """Texts ``[B, L]`` up to their end-of-text tokens, and the positions ``[B]`` of those. What follows changes nothing."""
    end, input_ids = model.config.text.eos_token_id, _integers(input_ids)
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected {list(input_ids.shape)} as input_ids, got {list(mask.shape)}")
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
    stream = _no_longer(graphs.run(engine.model.encode_text, texts).tokens, texts.max_seqlen)
    stream = stream.with_values(self.final_layer_norm(stream.values))
    return BaseModelOutputWithPooling(_padded(stream), stream.values[rows_of(stream, eot)])


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
    images = (
        None
        if encoder_hidden_states is None
        else _stream(encoder_hidden_states, encoder_attention_mask, padding=engine.pads)
    )
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
    input_ids = _integers(input_ids)
    model, (texts, new) = engine.model, input_ids.shape
    memory = encoder_hidden_states if generating else engine.memory(encoder_hidden_states, encoder_attention_mask)
    repeat = max(1, texts // memory.samples) if generating else 1  # beams, or sequences of one sample
    options = {"query_groups": _runs(texts, memory.samples, repeat, input_ids.device), "backend": model.backend}
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
        if not isinstance(earlier, DynamicCache):
            raise ValueError(
                f"cache: a patched decoder takes a DynamicCache, got {type(earlier).__name__} (cache_implementation)"
            )
        seen = earlier.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (texts, seen + new):
            expected = [texts, seen + new]
            raise ValueError(
                f"attention_mask: expected {expected}, earlier tokens included, got {list(attention_mask.shape)}"
            )
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new, device=input_ids.device)[None]
        ids = RaggedBatch.from_lengths(input_ids.flatten(), [new] * texts)
        options["positions"] = position_ids.expand(texts, new).flatten()
        options["visible"] = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        hidden = model.text_decoder(model._ids(ids), memory.keys, cache=earlier, **options).values.unflatten(
            0, (texts, new)
        )
    return BaseModelOutputWithPoolingAndCrossAttentions(hidden, **{CACHE: cache})


def _generate(self, *args, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
    """`BlipTextLMHeadModel.generate`: keys and values of what the decoder looks at are computed once, before the first word."""
    engine = _ready(self.bert, {})
    with torch.no_grad():
        memory = engine.memory(encoder_hidden_states, encoder_attention_mask)
    return type(self).generate(self, *args, encoder_hidden_states=memory, **kwargs)


def _forward(self, *args, **kwargs):
    """A model's own forward, around patched towers: its heads would still compute gradients, of themselves alone."""
    with torch.no_grad():
        return type(self).forward(self, *args, **kwargs)


def _image_features(self, *args, **kwargs):
    with torch.no_grad():
        return type(self).get_image_features(self, *args, **kwargs)


def _text_features(self, *args, **kwargs):
    with torch.no_grad():
        return type(self).get_text_features(self, *args, **kwargs)


@dataclass(frozen=True)
class _Kind:
    """One class of transformers: what is patched of it."""

    task: str
    towers: tuple[str, ...]
    """Modules that our layers stand in for; "" is the model itself."""
    methods: tuple[tuple[str, str, Callable], ...]
    """Where, which, and what takes its place."""
    raw: bool = False
    """`last_hidden_state` has not passed the last LayerNorm (CLIP)."""
    texts: bool = True
    """Whether texts go through our layers too."""

    @property
    def of_towers(self) -> bool:
        """Whether it is one of CLIP's kin, towers that were never trained with a dictionary."""
        return issubclass(TASKS[self.task].Config, CLIPConfig)


_FEATURES = (("", "get_image_features", _image_features), ("", "get_text_features", _text_features))
_IMAGES = (("vision_model", "forward", _vision),)
_DECODER = (
    ("text_decoder.bert", "forward", _blip_decoder),
    ("text_decoder", "forward", _forward),
    ("text_decoder", "generate", _generate),
)
_QUESTIONS = (("text_encoder", "forward", _blip_encoder),)
_INNER = (("vision_model", "forward", _encoder), ("", "forward", _forward))
_ITSELF = _Kind("clip", ("",), (("", "forward", _encoder),), texts=False)
_SIGLIP = _Kind("clip", ("vision_model",), (*_INNER, _FEATURES[0]), texts=False)

KINDS: dict[str, _Kind] = {
    "BlipForConditionalGeneration": _Kind("caption", ("vision_model", "text_decoder.bert"), (*_IMAGES, *_DECODER)),
    "BlipForQuestionAnswering": _Kind(
        "vqa", ("vision_model", "text_encoder", "text_decoder.bert"), (*_IMAGES, *_QUESTIONS, *_DECODER)
    ),
    "BlipForImageTextRetrieval": _Kind(
        "retrieval", ("vision_model", "text_encoder"), (*_IMAGES, *_QUESTIONS, ("", "forward", _forward))
    ),
    "CLIPModel": _Kind(
        "clip",
        ("vision_model", "text_model"),
        (_INNER[0], ("text_model", "forward", _clip_text), _INNER[1], *_FEATURES),
        raw=True,
    ),
    "CLIPVisionModel": replace(_ITSELF, raw=True),
    "CLIPVisionModelWithProjection": _Kind("clip", ("vision_model",), _INNER, raw=True, texts=False),
    "CLIPTextModel": _Kind("clip", ("",), (("", "forward", _clip_text),)),
    "CLIPTextModelWithProjection": _Kind(
        "clip", ("text_model",), (("text_model", "forward", _clip_text), ("", "forward", _forward))
    ),
    "SiglipModel": _SIGLIP,
    "SiglipVisionModel": _ITSELF,
    "Siglip2Model": _SIGLIP,
    "Siglip2VisionModel": _ITSELF,
    "Dinov2Model": _ITSELF,
    "Dinov2WithRegistersModel": _ITSELF,
    "ViTModel": _ITSELF,
}
"""Classes of transformers that :func:`apply_patch` takes."""
