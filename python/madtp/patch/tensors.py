"""Between transformers' padded tensors and ragged tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from madtp_kernels import RaggedBatch, checks
from madtp_kernels.segments import sample_of

from ..model import Model
from ..pruning import PER_TOKEN, Tokens
from ..towers import Patches

# Padded tensors that towers returned -> ids of their tokens, as a ragged batch. Attributes of the tensors would be saved with them.
_returned = WeakTensorKeyDictionary()


def attention_mask(hidden_states: Tensor) -> Tensor:
    """Which rows of a padded tensor ``[B, L, D]`` from a patched tower are tokens: ``[B, L]`` int64, 1 for a token.

    Raises:
        ValueError: a tensor that is not just what a patched tower returned.
    """
    ids = _returned.get(hidden_states)
    if ids is None:
        raise ValueError("hidden_states: expected what a patched tower returned, itself and not computed from it")
    position = torch.arange(hidden_states.shape[1], device=hidden_states.device)
    return (position < ids.lengths[:, None]).long()


def padded(stream: Tokens) -> Tensor:
    """Tokens as ``[B, L, D]`` with zeros behind them, which are recognised."""
    padded, _ = stream.to_padded()
    _returned[padded] = stream.with_values(stream.ids)
    return padded


def tokens_of(hidden_states: Tensor, mask: Tensor | None, *, padding: bool) -> Tokens:
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
    ids = _returned.get(hidden_states)
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


def pixels_of(pixel_values: Tensor | None) -> Tensor:
    """The pixels, which have to be there."""
    if not isinstance(pixel_values, Tensor):
        raise ValueError(f"pixel_values: expected a tensor, got {checks.describe(pixel_values)}")
    return pixel_values


def integers(input_ids: Tensor | None) -> Tensor:
    """Ids ``[B, L]`` of any integer type, as int64."""
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected integers [B, L], got {checks.describe(input_ids)}")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids: expected integers, got {input_ids.dtype}")
    return input_ids.long()


def ragged_ids(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> tuple[RaggedBatch, Tensor]:
    """Texts ``[B, L]`` without their padding, and the positions of their tokens: those given, or the columns."""
    input_ids = integers(input_ids)
    mask = torch.ones_like(input_ids) if mask is None else mask
    if positions is None:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected {list(input_ids.shape)} as input_ids, got {list(mask.shape)}")
    return RaggedBatch.from_padded(input_ids, mask.bool()), positions.expand(input_ids.shape)[mask.bool()]


def patches_of(pixel_values: Tensor, mask: Tensor | None, spatial_shapes: Tensor) -> Patches:
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


def texts_of(model: Model, input_ids: Tensor, mask: Tensor | None = None) -> tuple[RaggedBatch, Tensor]:
    """Texts ``[B, L]`` up to their end-of-text tokens, and the positions ``[B]`` of those. What follows changes nothing."""
    end, input_ids = model.config.text.eos_token_id, integers(input_ids)
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask: expected {list(input_ids.shape)} as input_ids, got {list(mask.shape)}")
    eot = (input_ids if end is None else (input_ids == end).int()).argmax(-1)
    real = torch.arange(input_ids.shape[1], device=input_ids.device) <= eot[:, None]
    if mask is not None and (real & ~mask.bool()).any():
        raise ValueError("attention_mask: expected texts without padding before their end-of-text token")
    return RaggedBatch.from_padded(input_ids, real), eot
