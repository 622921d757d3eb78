"""The vessel tokens travel in, the interface of a pruning rule, and the record that a layer leaves."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from madtp_kernels import Compacted, Merged, RaggedBatch, compact, merge_tokens, unmerge
from madtp_kernels.beside import Pending
from madtp_kernels.segments import sample_of

if TYPE_CHECKING:
    from ..layers import Attention, LayerNorm

STREAMS = ("vision", "text")
"""Stacks of layers whose tokens are pruned."""
PER_TOKEN = ("values", "ids", "sizes", "key_bias")
"""Fields of :class:`Tokens` with one row for each token."""


@dataclass(frozen=True, eq=False)
class Tokens(RaggedBatch):
    """Tokens ``[C, D]`` of B samples on their way through the layers; the offsets are checked where a forward begins.

    Attributes:
        ids: ``[C]`` int32: position of the original token in its sample; ``-(1 + layer)`` for one made in that layer.
        sizes: ``[C]`` float32: how many original tokens each stands for; None: one each.
        key_bias: ``[C]`` added to the logits of each key, in attention over these tokens and in cross-attention to
            them; None: nothing. Proportional attention puts the log of the sizes here.
        prefix: how many first tokens of a sample (CLS, registers) no rule may drop.
        protected_ids: ``[B]`` int32: id of one more token of each sample that no rule may drop.
        normed: the LayerNorm that was already applied to these rows, and what came out ``[C, D]``.
    """

    ids: Tensor | None = None
    sizes: Tensor | None = None
    key_bias: Tensor | None = None
    prefix: int = 1
    protected_ids: Tensor | None = None
    normed: tuple[LayerNorm, Tensor] | None = None

    @classmethod
    def start(cls, batch: RaggedBatch, **fields: Any) -> Tokens:
        """Every token stands for itself."""
        rows = torch.arange(batch.values.shape[0], dtype=torch.int32, device=batch.device)
        if batch.batch_size:
            sample = torch.searchsorted(batch.cu_seqlens[1:], rows, right=True, out_int32=True)
            rows = rows - batch.cu_seqlens[sample.clamp_(max=batch.batch_size - 1)]
        return cls.unchecked(batch.values, batch.cu_seqlens, batch.max_seqlen, batch.bound, ids=rows, **fields)

    def with_values(self, values: Tensor) -> Tokens:
        """The same tokens with other values ``[C, ...]``."""
        if values.shape[0] != self.values.shape[0]:
            raise ValueError(f"values: expected {self.values.shape[0]} rows, got {values.shape[0]}")
        tokens = object.__new__(type(self))
        tokens.__dict__.update(self.__dict__, values=values, normed=None)
        return tokens

    def survivors(
        self,
        batch: RaggedBatch,
        ids: Tensor,
        sizes: Tensor | None,
        *,
        proportional: bool = False,
        key_bias: Tensor | None = None,
        normed: tuple[LayerNorm, Tensor] | None = None,
    ) -> Tokens:
        """What a rule left of these tokens: rows ``batch [C', D]`` with their ids and sizes ``[C']``.

        ``proportional``: their sizes are to count in attention. ``key_bias``: the same, if it is known already.
        """
        bias = key_bias
        if proportional and sizes is not None:
            bias = sizes.to(torch.promote_types(batch.dtype, torch.float32)).log()  # the dtype of the logits
        tokens = object.__new__(type(self))
        tokens.__dict__.update(self.__dict__, **batch.__dict__, ids=ids, sizes=sizes, key_bias=bias, normed=normed)
        return tokens

    def merged(
        self, into: Tensor, *, proportional: bool = False, backend: str | None = None, **options: Any
    ) -> tuple[Tokens, Merged]:
        """These tokens with each merged into row ``into [C]`` or dropped (-1), weighted by their sizes, ids carried
        along.

        ``options`` are those of :func:`madtp_kernels.merge_tokens` but ``append``.
        """
        merged = merge_tokens(self, into, sizes=self.sizes, carry=(self.ids,), backend=backend, **options)
        return self.survivors(merged.tokens, merged.carried[0], merged.sizes, proportional=proportional), merged

    def single(self, rows: Tensor) -> Tokens:
        """One token of each sample: those in ``rows [B]`` int64."""
        starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=self.device)
        return Tokens.unchecked(self.values[rows], starts, 1, False, ids=self.ids[rows])

    @property
    def protected(self) -> Tensor:
        """``[C]`` bool: the tokens that no rule may drop: the first ones, and those that ``protected_ids`` names."""
        first = (self.ids >= 0) & (self.ids < self.prefix)
        if self.protected_ids is None or not self.batch_size:
            return first
        return first | (self.ids == self.protected_ids[sample_of(self.cu_seqlens, len(self.ids))])

    @property
    def free(self) -> Tensor:
        """``[C]`` bool: the tokens that are not :attr:`protected`."""
        if self.protected_ids is None:
            if self.prefix == 1:
                return self.ids != 0  # a fraction of the time
            return (self.ids & 0x7FFFFFFF) >= self.prefix  # a negative one, of no token, is far above
        return ~self.protected


class LateTokens(Tokens):
    """Tokens whose values are being computed beside the work that comes next (:mod:`madtp_kernels.beside`): whoever asks for them
    has the device wait. The rest may be read at any time."""

    def __new__(cls, *args: Any, **fields: Any) -> Tokens:  # type: ignore[misc]
        """What `dataclasses.replace` makes of them are tokens as others know them."""
        return Tokens(*args, **fields)

    @classmethod
    def of(cls, tokens: Tokens, pending: Pending) -> LateTokens:
        """The tokens, whose values are there once ``pending`` was joined."""
        late = object.__new__(cls)
        late.__dict__.update(tokens.__dict__, pending=pending)
        return late

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """``[C, D]``: the device waits for them."""
        self.__dict__["pending"].join()
        return self.__dict__["values"]

    @property
    def device(self) -> torch.device:
        return self.__dict__["values"].device

    @property
    def dtype(self) -> torch.dtype:
        return self.__dict__["values"].dtype

    def joined(self) -> Tokens:
        """The tokens as others know them."""
        fields = {name: value for name, value in self.__dict__.items() if name != "pending"}
        return Tokens.unchecked(**fields | {"values": self.values})

    def with_values(self, values: Tensor) -> Tokens:
        return self.joined().with_values(values)

    def survivors(self, batch: RaggedBatch, ids: Tensor, sizes: Tensor | None, **options: Any) -> Tokens:
        return self.joined().survivors(batch, ids, sizes, **options)


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did to its tokens. Everything stays on the device until somebody reads it."""

    cu_seqlens_in: Tensor
    """``[B+1]`` int32 offsets of the tokens that entered."""
    cu_seqlens: Tensor
    """``[B+1]`` int32 offsets of the tokens that left."""
    ids: Tensor
    """``[T']`` int32 of the tokens that left (see :class:`Tokens`)."""
    importance: Tensor | None = None
    """``[T]`` float32 of the tokens that entered, in the rule's own measure; None where the rule has none."""
    threshold: Tensor | None = None
    """``[B]`` float32; None where the rule has none, or keeps a number of tokens."""
    rows: Tensor | None = None
    """``[T]`` int32: which row that left stands for each token that entered, -1: none; None where the rule does not
    say. :func:`madtp_kernels.unmerge` takes it."""
    appends: bool = False
    """Whether the last row of a pruned sample is a token that this layer made of those that it dropped."""

    @property
    def lengths_in(self) -> Tensor:
        """``[B]`` tokens of each sample that entered."""
        return self.cu_seqlens_in.diff()

    @property
    def lengths(self) -> Tensor:
        """``[B]`` tokens of each sample that left."""
        return self.cu_seqlens.diff()

    @property
    def pruned(self) -> Tensor:
        """``[B]`` bool: pruning always shortens a sample."""
        return self.lengths < self.lengths_in

    @property
    def kept(self) -> Tensor:
        """``[B]`` tokens beside token 0 that survived as themselves."""
        return self.lengths - 1 - (self.pruned.int() if self.appends else 0)


def original_tokens(tokens: RaggedBatch, trace: Sequence[LayerTrace]) -> Tensor:
    """``[T, D]``: for each original token the one that stands for it in the end, of final tokens and all layers'
    records.

    Raises:
        ValueError: a rule that does not say where tokens went (:attr:`LayerTrace.rows`).
    """
    rows = None
    for layer, record in enumerate(trace):
        if record.rows is None:
            if record.cu_seqlens_in is not record.cu_seqlens:
                raise ValueError(
                    f"trace: layer {layer} does not say where tokens went; expected a rule that merges them"
                )
            continue
        rows = record.rows if rows is None else torch.where(rows < 0, rows, record.rows[rows.clamp(min=0).long()])
    return tokens.values if rows is None else unmerge(tokens.values, rows, trace[0].cu_seqlens_in)


def is_number(value: object) -> bool:
    """Whether a setting is a number; words and switches are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


METHODS: dict[str, type[Pruning]] = {}
"""Every rule by its name."""


def register(rule: type[Pruning]) -> type[Pruning]:
    """Class decorator: makes a rule known by its ``name``, so that checkpoints and commands find it."""
    METHODS[rule.name] = rule
    return rule


def rule_named(name: str, argument: str = "method") -> Pruning:
    """The rule of that name as it comes. Raises ValueError, which names the ``argument``, if there is none."""
    if name not in METHODS:
        raise ValueError(f"{argument}: expected one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]()


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How tokens are pruned: this one drops nothing, a subclass overrides :meth:`__call__`.

    A rule is a frozen dataclass of hashable settings (numbers, strings, tuples), which are saved with a model and tell
    apart its CUDA graphs. It holds nothing that changes during a forward, and nothing in it waits for a device.

    Args:
        proportional_attention: a merged token weighs as many as it stands for, in attention and in cross-attention.
        streams: which of "vision" and "text" the rule prunes.
        backend: force an implementation of the kernels. In a model it is the model's, and another one is refused.
    """

    name: ClassVar[str] = "dense"
    importance: ClassVar[str | None] = None
    """"max": ``attention.attention_received`` and ``.cls_attention`` are computed along with the attention; None: they
    are not."""
    needs_dictionary: ClassVar[bool] = False
    """Whether the rule compares tokens with the model's cross-modal dictionary."""
    bounds: ClassVar[tuple[float, float]] = (1e-6, 1e6)
    """Lowest and highest strength that a search tries; beyond them nothing changes any more."""

    proportional_attention: bool = False
    streams: tuple[str, ...] = STREAMS
    backend: str | None = None

    def __post_init__(self) -> None:
        if not set(self.streams) <= set(STREAMS):
            raise ValueError(f"streams: expected some of {', '.join(STREAMS)}, got {self.streams}")
        if not isinstance(self.proportional_attention, bool):
            raise ValueError(f"proportional_attention: expected True or False, got {self.proportional_attention!r}")

    @property
    def strength(self) -> float:
        """The one dial that searches turn: 0 is dense, a higher one never keeps more."""
        return 0.0

    def at(self, strength: float) -> Pruning:
        """The same rule at another strength."""
        if strength:
            raise ValueError(f"strength: {self.name!r} has none but 0, got {strength}")
        return self

    @property
    def active(self) -> bool:
        """Whether anything may be dropped."""
        return self.strength > 0

    def on(self, stream: str, layers: int) -> Pruning:
        """The rule for "vision" or "text" of a model, where that stream has so many layers: itself, or a dense one.

        Raises:
            ValueError: settings that were made for another number of layers.
        """
        return self if stream in self.streams else Pruning(backend=self.backend)

    def __call__(
        self,
        tokens: Tokens,
        *,
        block_input: Tokens,
        attention: Attention,
        dictionary: tuple[Tensor, Tensor | None] | None,
        layer: int,
        norm: LayerNorm | None = None,
    ) -> tuple[Tokens, LayerTrace]:
        """Prune after the attention of a block.

        Args:
            tokens: ``[C, D]`` after the attention sub-layer, residual added.
            block_input: ``[C, D]`` as they entered the block.
            attention: of the block: keys, importance, and what more a rule may compute from them.
            dictionary: what tokens are compared with, ``([M, D], bias [M] or None)``; None unless
                :attr:`needs_dictionary`.
            layer: number of the layer, from 0.
            norm: LayerNorm that follows; a rule whose kernel can applies it in the same pass (``Tokens.normed``).

        Returns:
            The tokens that go on, and the record of the layer.
        """
        return tokens, LayerTrace(tokens.cu_seqlens, tokens.cu_seqlens, tokens.ids)

    def count(
        self,
        cost: Counter,
        layer: int,
        before: int,
        after: int,
        *,
        width: int,
        heads: int,
        entries: int,
        alignment: int,
    ) -> None:
        """Add what pruning one sample in one layer costs, beside the network's own work; see :mod:`madtp.flops`.

        Args:
            cost: kind of work -> operations.
            layer: number of the layer.
            before, after: tokens that enter and that leave.
            width, heads: of the tokens, of the attention.
            entries: of the dictionary.
            alignment: cost of comparing one token with the dictionary.
        """

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON: its name under "method", and its settings."""
        return {
            "method": self.name,
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "backend"},
        }

    @staticmethod
    def from_dict(settings: Mapping[str, Any]) -> Pruning:
        """The rule that :meth:`to_dict` described.

        Raises:
            ValueError: an unknown method or setting.
        """
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        name = settings.pop("method", None)
        rules = {Pruning.name: Pruning, **METHODS}
        if name not in rules:
            raise ValueError(f"pruning: expected a method of {', '.join(rules)}, got {name!r}")
        known = [field.name for field in dataclasses.fields(rules[name]) if field.init and field.name != "backend"]
        for unknown in sorted(settings.keys() - {*known, "backend"}):
            raise ValueError(f"pruning: {name!r} has no setting {unknown!r}; it has {', '.join(known)}")
        try:
            return rules[name](**settings)
        except TypeError as error:
            raise ValueError(f"pruning: {error}") from error


class ScoredPruning(Pruning):
    """A rule that scores tokens, keeps the best, and makes one token of the others, which goes last. Override
    :meth:`decide`."""

    def decide(
        self, block_input: Tokens, attention: Attention, dictionary: tuple[Tensor, Tensor | None] | None, layer: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the tokens that enter a layer are worth, and which of them stay; arguments as :meth:`Pruning.__call__`.

        Returns:
            Importance ``[C]`` float32, and for :func:`madtp_kernels.compact` either ``{"threshold": [B] float32}`` or
            ``{"keep_count": [B] int32}``.
        """
        raise NotImplementedError

    def __call__(self, tokens, *, block_input, attention, dictionary, layer, norm=None):
        if not self.active:
            return tokens, LayerTrace(tokens.cu_seqlens, tokens.cu_seqlens, tokens.ids)
        importance, limit = self.decide(block_input, attention, dictionary, layer)
        return self.compact(tokens, importance, limit, layer, norm)

    def count(self, cost, layer, before, after, *, width, heads, entries, alignment):
        if self.importance and self.active:
            cost["importance"] += before * before * width + 4 * heads * before * before + before * width
        if after < before:
            cost["merge"] += (before - after + 1) * width  # one row replaces the dropped ones

    def compact(
        self,
        tokens: Tokens,
        importance: Tensor,
        limit: Mapping[str, Tensor],
        layer: int,
        norm: LayerNorm | None,
        **options: Tensor | None,
    ) -> tuple[Tokens, LayerTrace]:
        """The tokens after :func:`madtp_kernels.compact`, of which ``limit`` and ``options`` are arguments."""
        compacted = compact(tokens, importance, **limit, **self.compaction(tokens, layer, norm, **options))
        return self.left(tokens, compacted, norm, importance, limit.get("threshold"))

    def compaction(
        self, tokens: Tokens, layer: int, norm: LayerNorm | None, **options: Tensor | None
    ) -> dict[str, object]:
        """The keyword arguments of :func:`madtp_kernels.compact` besides the limit; ``options`` are some of them."""
        sizes = tokens.sizes
        if sizes is None and self.proportional_attention:
            sizes = torch.ones_like(tokens.ids, dtype=torch.float32)
        if "protected" not in options and (tokens.prefix > 1 or tokens.protected_ids is not None):
            options["protected"] = tokens.protected
        return {
            "ids": tokens.ids, "sizes": sizes, "merged_id": -(1 + layer), "norm": None if norm is None else norm.affine,
            "backend": self.backend, **options,
        }  # fmt: skip

    def left(
        self, tokens: Tokens, compacted: Compacted, norm: LayerNorm | None, importance: Tensor, threshold: Tensor | None
    ) -> tuple[Tokens, LayerTrace]:
        """What compaction left of ``tokens``, and the record of the layer."""
        batch, ids, sizes, normed = compacted
        left = tokens.survivors(
            batch, ids, sizes, proportional=self.proportional_attention, normed=None if norm is None else (norm, normed)
        )
        return left, LayerTrace(tokens.cu_seqlens, left.cu_seqlens, ids, importance, threshold, appends=True)
