"""Our model on the weights of a model of transformers, which stay where they are."""

from __future__ import annotations

import copy
import logging
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViTModel

from madtp_kernels import RaggedBatch

from .. import graphs
from ..config import CLIPConfig
from ..layers import Keys, QueryGroups
from ..linear import Linear
from ..model import Model
from ..pruning import LayerTrace, Pruning, Tokens
from ..tasks import TASKS
from ..weights import key_maps
from ..weights.files import read_file
from ..weights.made_up import initial_weight
from .tensors import patches_of, tokens_of
from .whole import spread, standing

if TYPE_CHECKING:
    from .kinds import Kind, Method

_log = logging.getLogger("madtp")

# Arguments that transformers passes through all of a model and that change nothing in a tower.
_HARMLESS = ("num_items_in_batch", "return_dict")


class _Link(NamedTuple):
    """A parameter of ours that is a view of one of theirs."""

    module: nn.Module
    name: str
    owner: nn.Module
    key: str
    place: str
    """Theirs, as it is called in the whole model."""
    shape: torch.Size
    """Of ours: theirs with other dimensions of 1, or with the last ones flattened."""
    expected: torch.Size
    """Of theirs, as its configuration makes it."""

    def follow(self) -> Tensor:
        """See the weight that theirs is now: it may have been moved, converted, or given anew."""
        theirs, own = self.owner._parameters.get(self.key), self.module._parameters.get(self.name)
        if type(theirs) not in (nn.Parameter, Tensor) or not theirs.is_floating_point():
            raise ValueError(
                f"model: {self.place} is no plain floating-point weight; merge adapters, and leave it unquantised"
            )
        if (
            own is None
            or theirs.shape != self.expected
            or (own.data_ptr(), own.dtype, own.device) != (theirs.data_ptr(), theirs.dtype, theirs.device)
            or (own.stride() != theirs.stride() and own.dim() == theirs.dim())
        ):
            weight = theirs.detach()
            if weight.shape != self.expected:
                raise ValueError(
                    f"model: {self.place} is {list(weight.shape)}, where {list(self.expected)} is expected"
                )
            try:
                weight = weight.view(self.shape)
            except RuntimeError as error:
                raise ValueError(
                    f"model: {self.place} has the strides {weight.stride()}; make it contiguous"
                ) from error
            own = nn.Parameter(weight, requires_grad=False)
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
        if any(hooks) or not all(map(_is_idle, module._forward_hooks.values())):
            return "has hooks"
        return next((f"has another {name}" for name, value in self.sizes.items() if facts.get(name) != value), None)


def _is_idle(hook: Callable) -> bool:
    """Whether it is a hook of transformers that does nothing here: it records outputs where they are asked for, or has gradients
    computed (`gradient_checkpointing_enable`)."""
    module, name = getattr(hook, "__module__", None), getattr(hook, "__qualname__", "")
    recorder = module == "transformers.utils.output_capturing"
    return recorder or (module == "transformers.modeling_utils" and name.endswith("make_inputs_require_grads"))


def _sizes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (int, float, str))
        and not name.startswith("_")
        and name not in ("training", "gradient_checkpointing")
    }


def _check_modules(tower: nn.Module, expected: nn.Module, place: str) -> None:
    """Refuse a tower that is not what transformers makes of its configuration (``expected``)."""
    found, wanted = (dict(t.named_modules(prefix=place, remove_duplicate=False)) for t in (tower, expected))
    for name in [*wanted, *(found.keys() - wanted.keys())]:
        module, other = found.get(name), wanted.get(name)
        if type(module) is not type(other):
            names = [type(m).__name__ for m in (module, other)]
            if names[0] == names[1]:  # a Linear of another library
                names = [f"{type(m).__module__}.{type(m).__name__}" for m in (module, other)]
            have, want = ("no module" if n == "NoneType" else f"a {n}" for n in names)
            raise ValueError(
                f"model: {name or 'it'} is {have}, expected {want}; merge adapters, and leave it unquantised"
            )
        if not type(module).forward.__module__.startswith(("torch.", "transformers.")):
            raise ValueError(f"model: {name} has the forward of another library, {type(module).forward.__module__}")
        sizes = {} if module is tower else _sizes(other)
        for size, value in sizes.items():
            if getattr(module, size, None) != value:
                raise ValueError(
                    f"model: {name}.{size} is {getattr(module, size, None)}, but its configuration makes it {value}"
                )


class Memory(NamedTuple):
    """What a decoder looks at, in place of `encoder_hidden_states`: keys and values are computed once for all steps and beams."""

    keys: list[Keys]
    samples: int


class Engine:
    """Our model for a model of transformers: the same memory, and a dictionary in addition."""

    def __init__(
        self,
        theirs: nn.Module,
        base: type,
        kind: Kind,
        methods: list[Method],
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
            expected = base(copy.deepcopy(theirs.config), **options)
        self.towers = {place: theirs.get_submodule(place) for place in kind.towers}
        for place, tower in self.towers.items():
            _check_modules(tower, expected.get_submodule(place), place)
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
        sizes = {name: parameter.shape for name, parameter in expected.named_parameters(remove_duplicate=False)}

        def link(module: nn.Module, name: str, place: str, shape: torch.Size) -> _Link:
            owner, key = _slot(theirs, place)
            return _Link(module, name, owner, key, place, shape, sizes.get(place, owner._parameters[key].shape))

        for key, shape, places in wanted:
            lead, _, name = key.rpartition(".")
            module = self.model.get_submodule(lead)
            if not places:
                self.own.append((module, name, key, shape))
            elif len(places) == 1:
                self.links.append(link(module, name, places[0], shape))
            else:
                shape = torch.Size([shape[0] // len(places), *shape[1:]])
                self.links += [
                    link(layer, name, place, shape) for layer, place in zip(module.layers, places, strict=True)
                ]
        for module, name, *_ in self.links:
            module._parameters[name] = None
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
            features = model.encode_image(patches_of(pixel_values, pixel_attention_mask, spatial_shapes))
        elif isinstance(model.config, CLIPConfig):
            features = graphs.run(model.encode_image, pixel_values)
        else:
            return graphs.run(types.MethodType(_encode_images, model), pixel_values)
        return features.tokens, features.trace

    def states(
        self, pixel_values: Tensor, mask: Tensor | None, spatial_shapes: Tensor | None, length: int
    ) -> tuple[Tokens, list[LayerTrace], tuple[Tensor, ...]]:
        """Final tokens, what every layer did, and the states before the first layer and after each ``[B, length, D]``: whole,
        with a row for every token that there was at first, that of the token which stands for it by then.

        Raises:
            ValueError: a rule that drops tokens for which none stands.
        """
        model, passed = self.model, []
        pixels = model._patches(
            pixel_values if spatial_shapes is None else patches_of(pixel_values, mask, spatial_shapes)
        )
        pruning = model._pruning(None, len(pixel_values))
        features = model.visual(pixels, model.space_dict, pruning, states=passed)
        rows = [None, *standing(features.trace, length, self.rule)]
        states = (
            spread(now.values, source, passed[0].cu_seqlens, length).to_padded()[0] for now, source in zip(passed, rows)
        )
        return features.tokens, features.trace, tuple(states)

    def whole(self, tokens: Tokens, trace: Sequence[LayerTrace], length: int) -> Tokens:
        """Final tokens with a row for every token that there was at first, at most ``length`` in a sample.

        Raises:
            ValueError: as :meth:`states`.
        """
        return spread(tokens.values, standing(trace, length, self.rule)[-1], trace[0].cu_seqlens_in, length)

    def texts(
        self, input_ids: RaggedBatch, images: Tokens | None, positions: Tensor | None = None
    ) -> tuple[Tokens, list[LayerTrace]]:
        """The same of BLIP's texts ``[T]``, alone or with images in view."""
        model = self.model
        input_ids = model._ids(input_ids)
        positions = Tokens.start(input_ids).ids if positions is None else positions
        encode = types.MethodType(_encode_texts, model)
        inputs = [input_ids, input_ids.with_values(positions)] + ([] if images is None else [images])
        runs = None if images is None else groups_of(len(input_ids), len(images), 1, model.device)
        stream, trace = graphs.run(encode, *inputs) if runs is None else encode(*inputs, query_groups=runs)
        return no_longer(stream, input_ids.max_seqlen), trace

    def memory(self, hidden_states: Tensor | None, mask: Tensor | None) -> Memory:
        """What the decoder is to look at."""
        if hidden_states is None:
            raise ValueError("encoder_hidden_states: expected what the decoder is to look at, got None")
        stream = tokens_of(hidden_states, mask, padding=self.pads)
        return Memory(self.model.text_decoder.keys(stream), stream.batch_size)


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


def no_longer(stream: Tokens, length: int) -> Tokens:
    """The stream with a bound of its lengths that no graph has rounded up: outputs are padded to it."""
    return replace(stream, max_seqlen=min(stream.max_seqlen, length))


def groups_of(texts: int, samples: int, repeat: int, device: torch.device) -> QueryGroups | None:
    """Which texts look at which sample: one each, all at the only one, or ``repeat`` consecutive ones (the beams) at each."""
    if samples == 1:
        repeat = texts
    if texts != samples * repeat:
        raise ValueError(f"encoder_hidden_states: {samples} samples do not fit {texts} texts")
    return QueryGroups.of([repeat] * samples, device) if repeat > 1 else None


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


def asked_for(module: nn.Module, kwargs: Mapping, name: str) -> Any:
    """An argument of a call, or what the configuration says where it is None."""
    value = kwargs.get(name)
    return getattr(module.config, name, None) if value is None else value


def ready(module: nn.Module, kwargs: Mapping, *, sync: bool = True, states: bool = False) -> Engine:
    """The engine of a patched tower, with the weights of now. ``kwargs`` are arguments that it does not take: one that is given is
    refused. ``states`` says whether it returns those of its layers."""
    engine = getattr(module, "_madtp", None)
    if engine is None:
        raise ValueError("model: a tower was replaced after apply_patch; call remove_patch first")
    place = next(place for place, tower in engine.towers.items() if tower is module)
    if any(seen.module.training for seen in engine.seen[place]):
        raise ValueError("a patched model is for inference: call its eval() first, or remove_patch to train it")
    served = (*_HARMLESS, "output_hidden_states") if states else _HARMLESS
    outputs = {name: asked_for(module, kwargs, name) for name in ("output_attentions", "output_hidden_states")}
    for name, value in (dict(kwargs) | outputs).items():
        if name in served or value is None or value is False:
            continue
        if name.startswith("output_"):
            raise ValueError(f"{name}: a patched model keeps neither attention matrices nor the states of its layers")
        raise ValueError(f"{name}: a patched model does not take it here")
    if sync:
        engine.sync(place)
    return engine
