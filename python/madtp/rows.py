"""Which rows of a ragged batch answer for its samples. Nothing here waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of

from .pruning import Tokens


def first_rows(tokens: RaggedBatch) -> Tensor:
    """``[B, D]``: the first token of each sample, which stands for it; any row for an empty sample."""
    # Empty samples at the end begin beyond the last row of an exact buffer.
    return tokens.values[tokens.cu_seqlens[:-1].long().clamp(max=len(tokens.values) - 1)]


def rows_of(tokens: Tokens, ids: Tensor) -> Tensor:
    """``[B]`` int64: in which row each sample has the token with that id ``[B]``."""
    rows = torch.arange(len(tokens.ids), device=ids.device)
    sample = sample_of(tokens.cu_seqlens, len(rows))
    found = (tokens.ids == ids[sample]) & (rows < tokens.cu_seqlens[-1])
    return rows.new_zeros(len(ids) + 1).scatter_(0, sample.where(found, len(ids)), rows)[:-1]
