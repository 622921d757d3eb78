"""Rows and samples of a ragged batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of

from .pruning import Tokens


def ids_of(texts: RaggedBatch) -> Tensor:
    """``[C]`` int64: the ids of texts as an embedding can look them up: 0 where a bound batch has no token."""
    if not texts.bound:
        return texts.values
    return texts.values.where(torch.arange(len(texts.values), device=texts.device) < texts.cu_seqlens[-1], 0)


def first_of(tokens: RaggedBatch) -> Tensor:
    """``[B]`` int64: the row of each sample's first token; any row for an empty sample."""
    # Empty samples at the end begin beyond the last row of an exact buffer.
    return tokens.cu_seqlens[:-1].long().clamp(max=len(tokens.values) - 1)


def first_rows(tokens: RaggedBatch) -> Tensor:
    """``[B, D]``: the first token of each sample, which stands for it; any row for an empty sample."""
    return tokens.values[first_of(tokens)]


def rows_of(tokens: Tokens, ids: Tensor) -> Tensor:
    """``[B]`` int64: in which row each sample has the token with that id ``[B]``."""
    rows = torch.arange(len(tokens.ids), device=ids.device)
    sample = sample_of(tokens.cu_seqlens, len(rows))
    found = (tokens.ids == ids[sample]) & (rows < tokens.cu_seqlens[-1])
    return rows.new_zeros(len(ids) + 1).scatter_(0, sample.where(found, len(ids)), rows)[:-1]


def gather_samples(batch: RaggedBatch, samples: Tensor) -> RaggedBatch:
    """The samples of a ragged batch with these numbers ``[S]``, in that order. Waits for a device: the result is
    exact."""
    lengths = batch.lengths[samples]
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    start = (batch.cu_seqlens[:-1][samples] - cu_seqlens[:-1]).repeat_interleave(lengths)
    rows = torch.arange(len(start), device=batch.device) + start
    return RaggedBatch(batch.values[rows], cu_seqlens, batch.max_seqlen)
