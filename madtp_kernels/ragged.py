"""The one data structure of the project: a batch of samples of different lengths, packed back to back.

`RaggedBatch` and its converters live here; what is computed on a ragged batch lives in the operation packages.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks

_Batch = TypeVar("_Batch", bound="RaggedBatch")


@dataclass(frozen=True, eq=False)
class RaggedBatch:
    """B samples of different lengths in one buffer, without padding between them.

    Attributes:
        values: ``[C, ...]``; sample ``b`` owns rows ``cu_seqlens[b]:cu_seqlens[b+1]``. C may exceed the number of
            tokens ``T = cu_seqlens[B]``; rows beyond T are undefined (a *bound* buffer). C == T is an *exact* buffer.
        cu_seqlens: ``[B+1]`` int32 offsets on the device of ``values``; starts at 0 and never decreases.
        max_seqlen: host-side upper bound of the sample lengths. An upper bound never has to be read back from a
            device, so it is always valid; a tight one only saves work.
        bound: whether there may be rows beyond T. Only saves work, too: a linear layer leaves such rows out.

    Empty samples are legal. Build one with :meth:`from_list`, :meth:`from_padded`, :meth:`from_nested`,
    :meth:`from_lengths`, or directly; a direct construction checks what can be checked without waiting for a device.

    Raises:
        ValueError: wrong dtype, shape or device of ``cu_seqlens``, or offsets that do not describe ``values``.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    bound: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor) or self.values.is_nested or self.values.dim() < 1:
            raise ValueError(f"values: expected a tensor [C, ...], got {checks.describe(self.values)}")
        checks.offsets("cu_seqlens", self.cu_seqlens, "max_seqlen", self.max_seqlen, self.values, "values")

    @classmethod
    def unchecked(
        cls: type[_Batch], values: Tensor, cu_seqlens: Tensor, max_seqlen: int, bound: bool, **fields: Any
    ) -> _Batch:
        """A batch whose parts are known to fit, because an operation made them or another batch has the same offsets;
        ``fields`` are those that a subclass adds."""
        batch = object.__new__(cls)
        batch.__dict__.update(values=values, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, bound=bound, **fields)
        return batch

    # ---- sizes ------------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """Number of samples B."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """``[B]`` int32 sample lengths, on the device of the values."""
        return self.cu_seqlens.diff()

    @property
    def num_tokens(self) -> int:
        """T, read from ``cu_seqlens``: waits for the device if the batch lives on one."""
        return int(self.cu_seqlens[-1])

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    # ---- same offsets, other values ---------------------------------------------------------------------------

    def with_values(self, values: Tensor) -> RaggedBatch:
        """The same samples with other per-token values ``[C, ...]`` (any trailing shape and dtype)."""
        if values.shape[0] != self.values.shape[0]:
            return RaggedBatch(values, self.cu_seqlens, self.max_seqlen, self.bound)
        return RaggedBatch.unchecked(values, self.cu_seqlens, self.max_seqlen, self.bound)

    def to(self, *args, **kwargs) -> RaggedBatch:
        """As ``Tensor.to`` on the values; the offsets follow to the device and stay int32."""
        values = self.values.to(*args, **kwargs)
        return RaggedBatch(values, self.cu_seqlens.to(values.device), self.max_seqlen, self.bound)

    def exact(self) -> RaggedBatch:
        """A view without the undefined rows (C == T). Reads T: waits for the device if the batch lives on one."""
        return RaggedBatch(self.values[: self.num_tokens], self.cu_seqlens, self.max_seqlen)

    def __getitem__(self, b: int) -> Tensor:
        """Rows of sample ``b``: a view ``[L_b, ...]``."""
        if not -self.batch_size <= b < self.batch_size:
            raise IndexError(f"sample {b} of a batch of {self.batch_size}")
        start, stop = self.cu_seqlens[b % self.batch_size :][:2].tolist()
        return self.values[start:stop]

    def __len__(self) -> int:
        return self.batch_size

    # ---- converters -------------------------------------------------------------------------------------------

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Sequence[int] | Tensor) -> RaggedBatch:
        """Packed ``values [T, ...]`` with the length of each sample.

        ``lengths`` is read on the host (a sequence of integers, NumPy's included, or an integer tensor ``[B]``).

        Raises:
            ValueError: lengths that are no integers, and as :func:`offsets_from_lengths`.
        """
        if isinstance(lengths, Tensor):
            if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
                raise ValueError(f"lengths: expected integers [B], got {checks.describe(lengths)}")
            lengths = lengths.tolist()
        lengths = list(lengths)
        cu_seqlens = offsets_from_lengths(lengths, values.device)
        return cls(values, cu_seqlens, int(max(lengths, default=0)))

    @classmethod
    def from_list(cls, samples: Sequence[Tensor]) -> RaggedBatch:
        """Samples ``[L_b, ...]`` that share trailing shape, dtype and device; copied into one buffer."""
        samples = list(samples)
        if not samples:
            raise ValueError("samples: expected at least one tensor, got an empty sequence")
        first = samples[0]
        for b, sample in enumerate(samples):
            if not isinstance(sample, Tensor) or sample.dim() < 1:
                raise ValueError(f"samples[{b}]: expected a tensor [L, ...], got {checks.describe(sample)}")
            if (sample.shape[1:], sample.dtype, sample.device) != (first.shape[1:], first.dtype, first.device):
                raise ValueError(
                    f"samples[{b}]: {checks.describe(sample)} does not match samples[0]: "
                    f"{checks.describe(first)} in trailing shape, dtype and device"
                )
        return cls.from_lengths(torch.cat(samples), [sample.shape[0] for sample in samples])

    def to_list(self) -> list[Tensor]:
        """The samples as views ``[L_b, ...]``. Reads the offsets on the host."""
        return [self.values[start:stop] for start, stop in spans(self.cu_seqlens)]

    @classmethod
    def from_padded(cls, padded: Tensor, mask: Tensor) -> RaggedBatch:
        """``padded [B, L, ...]`` and ``mask [B, L]`` (True or 1 = a token). Tokens keep their order.

        The mask may have holes: what is kept is what it marks. Reads the number of tokens on the host.

        Raises:
            ValueError: shapes that do not fit, or a mask of other numbers than 0 and 1.
        """
        if not isinstance(padded, Tensor) or padded.dim() < 2:
            raise ValueError(f"padded: expected a tensor [B, L, ...], got {checks.describe(padded)}")
        if not isinstance(mask, Tensor) or mask.shape != padded.shape[:2] or mask.device != padded.device:
            raise ValueError(
                f"mask: expected [B, L] = {list(padded.shape[:2])} on {padded.device}, got {checks.describe(mask)}"
            )
        if mask.dtype != torch.bool:
            real = mask == 1
            if not (real | (mask == 0)).all():  # one that is added to logits means the opposite
                raise ValueError(
                    f"mask: expected True or 1 for a token and False or 0 for none, got others in {checks.describe(mask)}"
                )
            mask = real
        cu_seqlens = padded.new_zeros(mask.shape[0] + 1, dtype=torch.int32)
        cu_seqlens[1:] = mask.sum(1).cumsum(0)
        return cls(padded[mask], cu_seqlens, padded.shape[1])

    def to_padded(self, padding_value: float = 0.0) -> tuple[Tensor, Tensor]:
        """``(padded [B, max_seqlen, ...], mask [B, max_seqlen] bool)``. Does not wait for a device."""
        position = torch.arange(self.max_seqlen, device=self.device)
        mask = position < self.lengths[:, None]
        row = (self.cu_seqlens[:-1, None] + position).where(mask, 0)
        padded = self.values.new_full((*mask.shape, *self.values.shape[1:]), padding_value)
        if self.values.shape[0]:
            wide_mask = mask.reshape(*mask.shape, *[1] * (self.values.dim() - 1))
            padded = torch.where(wide_mask, self.values[row], padded)
        return padded, mask

    @classmethod
    def from_nested(cls, nested: Tensor) -> RaggedBatch:
        """A jagged NestedTensor ``[B, *, ...]`` (``torch.nested.nested_tensor(..., layout=torch.jagged)``).

        Shares the values if they are contiguous. Reads the offsets on the host for a tight ``max_seqlen``.
        """
        if not (isinstance(nested, Tensor) and nested.is_nested and nested.layout == torch.jagged):
            raise ValueError(f"nested: expected a NestedTensor of layout torch.jagged, got {checks.describe(nested)}")
        if not isinstance(nested.shape[1], torch.SymInt):  # the one size that is not a number is the jagged one
            raise ValueError(f"nested: expected [B, *, ...] with dimension 1 jagged, got {nested.shape}")
        if nested.lengths() is not None:
            nested = nested.contiguous()
        offsets = nested.offsets()
        return cls(nested.values(), offsets.to(torch.int32), max(offsets.diff().tolist(), default=0))

    def to_nested(self) -> Tensor:
        """A jagged NestedTensor ``[B, *, ...]`` over the same values. Reads T on the host if the buffer is larger."""
        values = self.exact().values
        return torch.nested.nested_tensor_from_jagged(values, self.cu_seqlens.long(), max_seqlen=self.max_seqlen)


def _integer(length: object) -> int:
    """Itself as Python has it: `int` and a tensor's dtype would round it without a word."""
    try:
        if isinstance(length, bool):
            raise TypeError
        return operator.index(length)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"lengths: expected integers, got {checks.describe(length)} among them") from None


def offsets_from_lengths(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """``cu_seqlens [B+1]`` int32 from sample lengths.

    Raises:
        ValueError: lengths that are no integers, one below 0, or more than 2**31 - 1 tokens in total.
    """
    lengths = [_integer(length) for length in lengths]  # sums of NumPy's and PyTorch's wrap around
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths: expected integers >= 0, got {lengths}")
    offsets = [0, *itertools.accumulate(lengths)]
    if offsets[-1] > torch.iinfo(torch.int32).max:
        raise ValueError(f"lengths: {offsets[-1]} tokens do not fit int32 offsets; split the batch")
    return torch.tensor(offsets, dtype=torch.int32).to(device)


def spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """``(start, stop)`` of every sample, read on the host: for the references, which loop over samples."""
    bounds = cu_seqlens.tolist()
    return list(zip(bounds, bounds[1:], strict=False))


# Elements of a padded [samples, H, Lq, Lk] block of logits that the gradients hold at a time: 64 MB in float32.
_MOST_LOGITS = 1 << 24


def padded_groups(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, heads: int) -> Iterator[tuple[Tensor, ...]]:
    """Samples of similar length together, for the gradients, which take such a group at a time. Reads the offsets on the host.

    Yields:
        ``rows_q [G, Lq], seen_q [G, Lq], rows_k [G, Lk], seen_k [G, Lk]``: buffer rows of the group's queries and keys, and
        which of them exist (a row that does not is one of the same sample's, so it is always safe to read). Samples without
        queries or without keys are in no group.
    """
    starts = [
        (q0, q1 - q0, k0, k1 - k0) for (q0, q1), (k0, k1) in zip(spans(cu_seqlens_q), spans(cu_seqlens_k), strict=True)
    ]
    left = sorted((s for s in starts if s[1] and s[3]), key=lambda s: (s[1] * s[3], s[1]), reverse=True)
    device = cu_seqlens_q.device
    while left:
        most_q = most_k = size = 0
        while size < len(left):
            wide_q, wide_k = max(most_q, left[size][1]), max(most_k, left[size][3])
            padded, wanted = wide_q * wide_k, left[size][1] * left[size][3]
            if size and (padded > 2 * wanted or (size + 1) * heads * padded > _MOST_LOGITS):
                break
            most_q, most_k, size = wide_q, wide_k, size + 1
        group, left = torch.tensor(left[:size], device=device), left[size:]
        rows = []
        for start, length, most in ((group[:, :1], group[:, 1:2], most_q), (group[:, 2:3], group[:, 3:], most_k)):
            position = torch.arange(most, device=device)
            rows += [start + torch.minimum(position, length - 1), position < length]
        yield tuple(rows)


def pack(rows: list[Tensor], like: Tensor, capacity: int) -> Tensor:
    """Per-sample rows ``[L_b, ...]`` back to back in a buffer of ``capacity`` rows; the rest is zero.

    ``like [*, ...]`` gives trailing shape, dtype and device when there is no sample.
    """
    filled = sum(r.shape[0] for r in rows)
    rest = like.new_zeros(capacity - filled, *like.shape[1:])
    return torch.cat([*rows, rest.to(rows[0].dtype) if rows else rest])
