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
* What a tower of BLIP or a text encoder returns as `last_hidden_state` (or the model as `image_embeds`) is padded as usual: the
  tokens of a sample stand at the beginning, in their order, and zeros follow (also where transformers computes something for padding).
  :func:`attention_mask` tells which are tokens. Given to another tower of the model, edited in place or not, such a tensor is
  recognised, and its padding is never attended to; a tensor computed from it (a selection, a repetition) is not, and needs the
  mask, as `encoder_attention_mask`: without it, rows of zeros are refused where they may be padding.
* Masks say which tokens there are: anything but 0 marks one, as in transformers. `encoder_attention_mask` counts, too; the BLIP
  of transformers (5.17 to 5.24) takes it and does not pass it on to its cross-attention.
* transformers' `BlipForQuestionAnswering` lets the decoder look at padded question tokens, so that an answer depends on the
  longest question of the batch. Here it does not: answers are those that transformers gives to one question at a time.
* The states of image encoders other than BLIP's (`last_hidden_state`, `hidden_states`) come whole: a row for every patch, that of
  the token it was merged into, or of the one that was made of all that a layer dropped. So whatever reads or averages them
  finds what it expects. Rules that drop tokens for which none stands are refused there.
* Attention matrices are not kept, nor BLIP's hidden states: asking for them is an error. A decoder returns a cache where
  one was given (a `DynamicCache`) or `use_cache=True` asks for it.
* The weights stay where they are and are read at each call: whatever is done to them, in place or by new parameters, counts.
* The modules inside a tower are not called. What only a call would notice is refused, by apply_patch or by the next call: hooks,
  replaced, wrapped, compiled or parametrized modules (adapters, quantization), changed sizes, layers in training mode. Hooks on
  the towers themselves fire; hooks for all modules (`torch.nn.modules.module.register_module_forward_hook`) see our layers.

A patched model is for inference: it computes no gradients, without dropout. It can be copied, pickled and saved as any other.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from madtp_kernels import backends

from ..config import check_temperature
from ..pruning import MADTP, Pruning, rule_named
from .engine import Engine
from .kinds import KINDS, Kind, Method, base_of
from .measure import Step, find, measure
from .tensors import attention_mask

__all__ = ["KINDS", "Patch", "Step", "apply_patch", "attention_mask", "pruned", "remove_patch"]

_log = logging.getLogger("madtp")

_UNTRAINED = "ranked_novelty"  # the rule of an encoder where nobody says anything


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
    ``target_gflops`` says how much is pruned; without any, an encoder is pruned by its rule as it comes: where that is not at all
    (``topk`` without a share, MADTP without a temperature), a warning says so.

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
    base = base_of(model)
    if base is None:
        inside = (name for name, module in getattr(model, "named_modules", dict)() if base_of(module) is not None)
        hint = "".join(f"; its {name} is one, and can be patched by itself" for name in [next(inside, "")] if name)
        raise TypeError(f"model: expected one of {', '.join(KINDS)}, got {type(model).__name__}{hint}")
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
    if not given and not rule.active:
        _log.warning("%s prunes nothing as it comes: give a keep_ratio, target_gflops or pruning", rule.name)
    methods = [Method(model.get_submodule(place), place, *replaced) for place, *replaced in kind.methods]
    for replaced in methods:
        if replaced.name in vars(replaced.module):
            raise ValueError(f"model: {replaced.place} is replaced already, by a hook of accelerate or another patch")

    engine = Engine(model, base, kind, methods, dictionary, rule, backend, warn=target is not None or rule.active)
    steps: tuple[Step, ...] = ()
    if target is not None:
        found, steps = find(engine, samples, target, settings[target])
    elif samples is None:
        found = Step(rule.strength, None, None)
    else:
        found = measure(engine, samples, rule.strength)
    engine.model.pruning = engine.at(found.strength)
    for module in {model, *(method.module for method in methods)}:
        module._madtp = engine
    for method in methods:
        setattr(method.module, method.name, method)
    return Patch(kind.task, engine.model.pruning, found.keep_ratio, found.gflops, steps)


@contextlib.contextmanager
def pruned(model: nn.Module, **settings: Any) -> Iterator[Patch]:
    """:func:`apply_patch` with these settings, undone at the end of the ``with`` block."""
    patch = apply_patch(model, **settings)
    try:
        yield patch
    finally:
        remove_patch(model)


def _rule(
    kind: Kind, method: str | None, pruning: Pruning | None, temperature: float | None, dictionary: Any
) -> Pruning:
    """The rule that the arguments of :func:`apply_patch` mean; a search sets its strength."""
    if pruning is not None:
        if not isinstance(pruning, Pruning):
            raise ValueError(f"pruning: expected a rule, got {pruning!r}; a name is method=, a number temperature=")
        if method not in (None, pruning.name):
            raise ValueError(f"method: the rule that was given is {pruning.name!r}, got {method!r}")
        return pruning
    if temperature is not None:
        if method not in (None, MADTP.name):
            raise ValueError(f"temperature: only madtp has one, got method {method!r}")
        return MADTP(check_temperature(temperature))
    if method is None:
        trained = not kind.of_towers or dictionary is not None
        method = MADTP.name if trained else _UNTRAINED
    return rule_named(method)


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
