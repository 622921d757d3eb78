"""The classes of transformers that can be patched, and what is replaced in each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..config import CLIPConfig
from ..tasks import TASKS
from .blip import decoder, encoder, generate, vision
from .encoders import image_encoder, text_encoder


def _own(name: str, module: nn.Module, /, *args, **kwargs):
    """A model's own method, around patched towers: its heads would still compute gradients, of themselves alone."""
    with torch.no_grad():
        return getattr(type(module), name)(module, *args, **kwargs)


@dataclass(frozen=True)
class Kind:
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


_FEATURES = tuple(("", name, partial(_own, name)) for name in ("get_image_features", "get_text_features"))
_WHOLE = ("", "forward", partial(_own, "forward"))
_IMAGES = (("vision_model", "forward", vision),)
_DECODER = (
    ("text_decoder.bert", "forward", decoder),
    ("text_decoder", "forward", partial(_own, "forward")),
    ("text_decoder", "generate", generate),
)
_QUESTIONS = (("text_encoder", "forward", encoder),)
_INNER = (("vision_model", "forward", image_encoder), _WHOLE)
_TEXTS = ("text_model", "forward", text_encoder)
_ITSELF = Kind("clip", ("",), (("", "forward", image_encoder),), texts=False)
_SIGLIP = Kind("clip", ("vision_model",), (*_INNER, _FEATURES[0]), texts=False)

KINDS: dict[str, Kind] = {
    "BlipForConditionalGeneration": Kind("caption", ("vision_model", "text_decoder.bert"), (*_IMAGES, *_DECODER)),
    "BlipForQuestionAnswering": Kind(
        "vqa", ("vision_model", "text_encoder", "text_decoder.bert"), (*_IMAGES, *_QUESTIONS, *_DECODER)
    ),
    "BlipForImageTextRetrieval": Kind("retrieval", ("vision_model", "text_encoder"), (*_IMAGES, *_QUESTIONS, _WHOLE)),
    "CLIPModel": Kind("clip", ("vision_model", "text_model"), (*_INNER, _TEXTS, *_FEATURES), raw=True),
    "CLIPVisionModel": replace(_ITSELF, raw=True),
    "CLIPVisionModelWithProjection": Kind("clip", ("vision_model",), _INNER, raw=True, texts=False),
    "CLIPTextModel": Kind("clip", ("",), (("", "forward", text_encoder),)),
    "CLIPTextModelWithProjection": Kind("clip", ("text_model",), (_TEXTS, _WHOLE)),
    "SiglipModel": _SIGLIP,
    "SiglipVisionModel": _ITSELF,
    "Siglip2Model": _SIGLIP,
    "Siglip2VisionModel": _ITSELF,
    "Dinov2Model": _ITSELF,
    "Dinov2WithRegistersModel": _ITSELF,
    "ViTModel": _ITSELF,
}
"""Classes of transformers that :func:`apply_patch` takes."""


def base_of(model: nn.Module) -> type | None:
    """The class of transformers among :data:`KINDS` that a model is, or derives from."""
    known = (base for base in type(model).__mro__ if base.__name__ in KINDS)
    return next((base for base in known if base.__module__.startswith("transformers.")), None)


class Method:
    """What stands in the place of a method of a module. Unlike a bound function it can be pickled and copied with the model."""

    def __init__(self, module: nn.Module, place: str, name: str, stand_in: Callable) -> None:
        self.module, self.name, self.stand_in = module, name, stand_in
        self.place = f"{place or type(module).__name__}.{name}"  # for messages
        # Arguments go on by their names: what stands in for several classes cannot have the order of each.
        parameters = self.__signature__.parameters.values()
        unnamed = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL}
        self.order = (
            None
            if unnamed & {p.kind for p in parameters}
            else tuple(p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
        )

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the method itself: transformers and others look at it to learn which arguments there are."""
        return inspect.signature(getattr(type(self.module), self.name).__get__(self.module))

    def __call__(self, *args, **kwargs):
        if self.order is None:
            return self.stand_in(self.module, *args, **kwargs)
        if len(args) > len(self.order):
            raise TypeError(f"{self.place}: expected at most {len(self.order)} positional arguments, got {len(args)}")
        return self.stand_in(self.module, **dict(zip(self.order, args, strict=False)), **kwargs)
