"""Pruned tokens as a model of transformers returns them: a row for every token that there was before anything was pruned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of

from ..pruning import METHODS, LayerTrace, Pruning, Tokens

_REMEDY = (
    "a model of transformers returns a row for each patch: use a rule that merges, or madtp.load, whose tokens may go"
)


def spread(values: Tensor, rows: Tensor | None, cu_seqlens: Tensor, length: int) -> Tokens:
    """Tokens ``values [C', D]`` repeated: of ``rows [C]`` int64 (None: each once), with the offsets that there were at first."""
    values = values if rows is None else values[rows]
    return Tokens.start(RaggedBatch.unchecked(values, cu_seqlens, length, True))


def standing(trace: Sequence[LayerTrace], length: int, rule: Pruning) -> list[Tensor | None]:
    """After each layer the row ``[C]`` int64 of the token that stands for each of those that there were at first, which are
    at most ``length`` in a sample; None: they are all there.

    A merged token stands for those that were merged, and one that a layer made of all that it dropped for these.

    Raises:
        ValueError: a rule that drops tokens for which none stands.
    """
    found: list[Tensor | None] = []
    source, before = None, None
    for record in trace:
        if record.cu_seqlens is not record.cu_seqlens_in:
            rows = _rows(record, before, length, len(trace), rule)
            source = rows if source is None else rows[source]
        found.append(source)
        before = record.ids
    return found


def _rows(record: LayerTrace, before: Tensor | None, length: int, layers: int, rule: Pruning) -> Tensor:
    """``[C]`` int64: the row that left a layer for each token that entered. Rows beyond the last token are valid, too.

    Args:
        before: ids of the tokens that entered; None: their places.
    """
    starts, ends, samples = record.cu_seqlens_in, record.cu_seqlens, len(record.cu_seqlens) - 1
    if record.rows is not None:
        rows = record.rows.long()
    elif record.appends:
        if before is None:
            before = torch.arange(samples * length, device=ends.device, dtype=starts.dtype)
            before = before - starts[sample_of(starts, len(before))]
        # The row of each id of each sample. Those of tokens that layers made, from -1 down, come after all others.
        table = ends.new_full((samples * (length + layers) + 1,), -1, dtype=torch.int64)
        left = torch.arange(len(record.ids), device=ends.device)
        table[_places(record.ids, ends, length, layers)] = left
        table[-1] = -1
        rows = table[_places(before, starts, length, layers)]
    else:
        raise ValueError(f"pruning: {rule.name!r} does not say which token stands for a dropped one; {_REMEDY}")
    sample = sample_of(starts, len(rows))
    if record.appends:
        rows = torch.where(rows < 0, ends[1:].long()[sample] - 1, rows)
    elif type(rule) not in METHODS.values():  # those merge all that they drop; to ask waits for a GPU
        real = torch.arange(len(rows), device=rows.device) < starts[-1]
        if (real & (rows < 0)).any():
            raise ValueError(f"pruning: {rule.name!r} drops tokens for which none stands; {_REMEDY}")
    return rows.clamp(0, max(len(record.ids) - 1, 0))


def _places(ids: Tensor, cu_seqlens: Tensor, length: int, layers: int) -> Tensor:
    """``[C]`` int64: a place of its own for each token in a table of all samples; the last one for what is beyond them."""
    rows, width = len(ids), length + layers
    places = torch.where(ids >= 0, ids, length - 1 - ids).long().clamp(0, width - 1)
    places = places + sample_of(cu_seqlens, rows) * width
    real = torch.arange(rows, device=ids.device) < cu_seqlens[-1]
    return places.where(real, (len(cu_seqlens) - 1) * width)
