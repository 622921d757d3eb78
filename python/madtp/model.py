"""What the models of all tasks share: the dictionary, the image encoder, how they are pruned, and checks of their
inputs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, checks

from .config import Config, VisionConfig
from .graphs import Captured, Graphs
from .pruning import MADTP, Pruning
from .pruning.official import official

_RENAMED = {"temperature": "pruning", "summaries": "alignment_features", "use_sizes": "proportional_attention"}


def renamed(method: Callable) -> Callable:
    """Decorator: keyword arguments of the release before go by their old names too.

    Raises:
        ValueError: one is given by both names.
    """

    @functools.wraps(method)
    def call(*args, **kwargs):
        for old in _RENAMED.keys() & kwargs.keys():
            new = _RENAMED[old]
            warnings.warn(f"{old}: renamed to {new}", DeprecationWarning, stacklevel=2)
            if new in kwargs:
                raise ValueError(f"{new}, {old}: expected one of them, got both")
            kwargs[new] = kwargs.pop(old)
        return method(*args, **kwargs)

    return call


class Model(nn.Module):
    """A pruned vision-language model. Parameters are named as in MADTP's checkpoints, with fused projections.

    Args:
        config: sizes.
        pruning: the rule by which tokens are dropped; a number is MADTP at that temperature, 0 runs dense.
        grouping: "instance" prunes every sample by its own count; "batch" keeps equally many tokens of all samples of a
            batch, the official code's batch-maximum execution. A task may have more.
        proportional_attention: where ``pruning`` is a number: merged tokens weigh what they stand for (not in the
            paper).
        backend: force an implementation of the kernels.

    Raises:
        ValueError: an unknown grouping, or a rule beside ``proportional_attention`` that is without.
    """

    groupings: ClassVar[tuple[str, ...]] = ("instance", "batch")
    capturable: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods that :meth:`capture` takes: each sample's results are its own, so a CUDA graph serves smaller batches
    too."""

    @renamed
    def __init__(
        self,
        config: Config,
        pruning: Pruning | float = 0.0,
        grouping: str = "instance",
        proportional_attention: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if grouping not in self.groupings:
            raise ValueError(f"grouping: expected one of {', '.join(self.groupings)}, got {grouping!r}")
        if proportional_attention and isinstance(pruning, Pruning) and not pruning.proportional_attention:
            raise ValueError(
                "proportional_attention: expected where pruning is a number, got a rule that says otherwise"
            )
        self.config = config
        if not isinstance(pruning, Pruning):
            pruning = MADTP(pruning, proportional_attention=proportional_attention)
        self.pruning = pruning
        self.grouping = grouping
        self.backend = backend
        self.processor = None
        self.graphs = Graphs()
        vision = config.vision
        entries = (vision.sd_num, vision.sd_dim) if vision else (VisionConfig.sd_num, config.text.hidden_size)
        self.space_dict = nn.Parameter(torch.empty(*entries))
        if not self.space_dict.is_meta:  # as `madtp.layers.Embedding`
            nn.init.normal_(self.space_dict)

    @property
    def temperature(self) -> float:
        """MADTP's temperature, 0 for a dense model; setting it makes MADTP the model's rule.

        Raises:
            ValueError: the model is pruned by another rule.
        """
        if self.pruning.active and not isinstance(self.pruning, MADTP):
            raise ValueError(f"temperature: {self.pruning.name!r} has none; see Model.pruning")
        return self.pruning.strength

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.pruning = self.rule(value)

    @property
    def use_sizes(self) -> bool:
        """Gone: whether merged tokens weigh what they stand for is a setting of :attr:`pruning`.

        Raises:
            AttributeError: always; an attribute that is set and has no effect would be worse.
        """
        raise AttributeError("use_sizes: gone; see Model.pruning.proportional_attention")

    @use_sizes.setter
    def use_sizes(self, value: bool) -> None:
        raise AttributeError(
            "use_sizes: gone; set Model.pruning to dataclasses.replace(model.pruning, proportional_attention=...)"
        )

    @property
    def guided(self) -> bool:
        """Whether tokens are compared with the dictionary."""
        return self.pruning.active and self.pruning.needs_dictionary

    @contextlib.contextmanager
    def dense(self) -> Iterator[Model]:
        """Run without pruning inside the ``with`` block."""
        pruning, self.pruning = self.pruning, Pruning()
        try:
            yield self
        finally:
            self.pruning = pruning

    @renamed
    def capture(
        self,
        *inputs: Tensor | RaggedBatch | Sequence[Tensor],
        method: str = "forward",
        text_length: int | None = None,
        pruning: Pruning | float | None = None,
    ) -> Captured:
        """Record a forward as a CUDA graph for one batch size. (:mod:`madtp.predict` uses graphs automatically.)

            forward = model.capture(pixels, input_ids)
            logits = forward(other_pixels, other_ids).logits

        Kernels are compiled and tuned beforehand. A graph follows new pixels, words, token counts, and weights that are
        written in place, but no other weights or settings: calling it after such a change is an error.

        Args:
            inputs: inputs of the method, with the batch size to capture.
            method: one of :attr:`capturable`.
            text_length: tokens of the longest text that has to fit; by default that of ``inputs``.
            pruning: for this graph, instead of the model's own.

        Returns:
            A replacement for the method that takes inputs of the same sizes, and shorter texts. Its results are not
            copied: the next replay of any graph of this model overwrites them.

        Raises:
            ValueError: a model that is not on a CUDA device, is training, or has hooks; enabled gradients; inputs that
                do not fit each other.
            RuntimeError: CUDA refuses the recording.
        """
        if method not in self.capturable:
            raise ValueError(f"method: expected one of {', '.join(self.capturable)}, got {method!r}")
        return self.graphs.capture(getattr(self, method), *inputs, text_length=text_length, pruning=pruning)

    @property
    def longest_text(self) -> int:
        """Tokens of the longest text that the model takes; 0 where it takes none."""
        return self.config.text.max_position_embeddings if self.config.text else 0

    @property
    def device(self) -> torch.device:
        return self.space_dict.device

    @property
    def dtype(self) -> torch.dtype:
        return self.space_dict.dtype

    def rule(self, pruning: Pruning | float | None) -> Pruning:
        """The rule of a call: its own, MADTP at a temperature, or the model's.

        Raises:
            ValueError: a temperature that makes no sense, or neither a rule nor a number.
        """
        if pruning is None:
            return self.pruning
        if isinstance(pruning, Pruning):
            return pruning
        if isinstance(pruning, (str, type)):
            raise ValueError(f"pruning: expected a rule or MADTP's temperature, got {pruning!r}")
        if isinstance(self.pruning, MADTP):
            return self.pruning.at(pruning)
        return MADTP(pruning)

    def _pruning(self, pruning: Pruning | float | None, batch: int, **settings: Tensor | bool) -> Pruning:
        """The rule for ``batch`` samples, with this model's backend, grouping, and ``settings`` of official pruning."""
        rule = self.rule(pruning)
        if rule.backend is None:
            rule = replace(rule, backend=self.backend)
        elif rule.backend != self.backend:
            raise ValueError(
                f"pruning: the rule forces backend {rule.backend!r}, the model {self.backend!r}; it is the model's to choose"
            )
        if rule.active and self.grouping == "batch":
            settings["groups"] = torch.zeros(batch, dtype=torch.int32, device=self.device)
        return official(rule, f"grouping {self.grouping!r}", **settings) if settings else rule

    def _ids(self, input_ids: RaggedBatch | Sequence[Tensor], name: str = "input_ids") -> RaggedBatch:
        """Texts as a ragged batch ``[T]`` on the model's device; checked."""
        if not isinstance(input_ids, RaggedBatch):
            texts = list(input_ids)
            if not texts:
                raise ValueError(f"{name}: expected at least one text, got none")
            input_ids = RaggedBatch.from_list(texts)
        self._check_ids(input_ids, name)
        return input_ids.to(self.device)

    def _check_ids(self, input_ids: RaggedBatch, name: str) -> None:
        check_ids(input_ids, self.config.text.vocab_size, name)

    def _pixels(self, pixels: Tensor | RaggedBatch) -> Tensor | RaggedBatch:
        return pixels.to(self.device, self.dtype)


def check_ids(input_ids: RaggedBatch, vocabulary: int, name: str = "input_ids") -> None:
    """Every text has a first token, which answers for it, and every id has an embedding.

    Raises:
        ValueError: ids of another shape or dtype, an empty text, an id beyond the vocabulary.
    """
    ids = input_ids.values
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64 ids [T], got {checks.describe(ids)}")
    if not checks.may_read(ids):
        return
    offsets = input_ids.cu_seqlens.tolist()
    for text, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if start == stop:
            raise ValueError(f"{name}: expected at least one token per text, text {text} has none")
    if offsets[-1]:
        lowest, highest = (int(bound) for bound in ids[: offsets[-1]].aminmax())
        if not 0 <= lowest <= highest < vocabulary:
            raise ValueError(f"{name}: expected ids in 0..{vocabulary - 1}, got {lowest}..{highest}")
