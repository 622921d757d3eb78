"""An attention function for transformers: its vision towers run on packed images, on CPU and GPU, without flash-attn.

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(...)
    madtp.varlen.apply(model)

Qwen-VL towers put all images, frames and windows of a batch into one sequence and, without flash-attn, call their
attention once for each of them, after reading the lengths on the host. SigLIP 2 NaFlex pads images of different sizes
to the longest and gives each layer a mask ``[B, 1, N, N]``. Both get one call over offsets here,
:func:`madtp_kernels.attention`. The rest of the model, its weights and its decoder stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

from madtp_kernels import attention

__all__ = ["NAME", "TOWERS", "apply", "remove"]

NAME = "madtp_flash"
"""What the function is registered as. Towers pass offsets to an attention whose name contains "flash" only."""

TOWERS = (
    "Qwen2VisionTransformerPretrainedModel",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen3VLVisionModel",
    "Siglip2VisionModel",
)
"""Classes of transformers (5.17 to 5.24) whose attention :func:`apply` replaces, and classes derived from them."""


def apply(model: nn.Module) -> list[str]:
    """Let the vision towers of a transformers model use this attention.

    Only the configuration of the towers changes, by a name: a model that is pickled into another process needs the call
    there too. Models are saved without it.

    Returns:
        The names of the towers in the model ("" is the model itself).

    Raises:
        ValueError: the model has no tower of :data:`TOWERS`.
    """
    towers = _towers(model)
    if not towers:
        raise ValueError(
            f"model: expected a vision tower among {', '.join(TOWERS)}, got {type(model).__name__} without one"
        )
    for tower in towers.values():
        # Not set_attn_implementation, which for a name with "flash" insists on loading a package of kernels.
        tower.config._attn_implementation = NAME
    return list(towers)


def remove(model: nn.Module, implementation: str = "sdpa") -> None:
    """Give the towers back one of transformers' own implementations."""
    for tower in _towers(model).values():
        tower.set_attn_implementation(implementation)


def _towers(model: nn.Module) -> dict[str, PreTrainedModel]:
    def is_tower(module: nn.Module) -> bool:
        return isinstance(module, PreTrainedModel) and any(c.__name__ in TOWERS for c in type(module).__mro__)

    return {name: module for name, module in model.named_modules() if is_tower(module)}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query ``[B, H, N, d]``, key and value ``[B, Hk, N, d]`` -> ``[B, N, H, d]`` and no weights.

    With offsets B is 1 and N all tokens.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    for name, value_given in {"is_causal": causal, "dropout": dropout, **options}.items():
        if name in _REFUSED and value_given:
            raise ValueError(f"{name}: attention {NAME!r} of {type(module).__name__} has none, got {value_given!r}")
    batch, _, length, _ = query.shape
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [B * N, H, d]: views where the model packed
    bias = None if attention_mask is None else _key_bias(attention_mask, query, key)
    if cu_seq_lens_q is None:
        max_length_q, max_length_k = length, key.shape[2]
        cu_seq_lens_q = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * max_length_q
        cu_seq_lens_k = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * max_length_k
    out, _ = attention(
        *rows,
        cu_seq_lens_q.int(),
        cu_seq_lens_k.int(),
        int(max_length_q),
        int(max_length_k),
        scale=scaling,
        key_bias=bias,
    )
    return out.unflatten(0, (batch, length)), None


_REFUSED = ("is_causal", "dropout", "sliding_window", "softcap", "s_aux", "output_attentions")


def _key_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """``[B * N]``: 0 for the keys that a mask of padding lets pass, -inf for the others; waits for nothing.

    Padded batches are not packed: NaFlex pads by few per cent, and copying all queries, keys and values costs more.
    """
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    if mask.dtype != torch.bool or mask.shape != shape or mask.stride(2) != 0:
        raise ValueError(
            f"attention_mask: expected padding, bool {list(shape)} that is the same for all queries, "
            f"got {mask.dtype} {list(mask.shape)} of strides {mask.stride()}"
        )
    seen = mask[:, 0, 0].flatten()
    zero = torch.zeros((), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    return zero.where(seen, float("-inf"))


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """A mask of padding as a view ``[B, 1, Nq, Nk]`` of ``[B, Nk]``; any other as SDPA's.

    Four dimensions, for the pooling head of SigLIP 2 takes no others.
    """
    if mask_function is not bidirectional_mask_function or attention_mask is None or attention_mask.dim() != 2:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask=attention_mask,
            **options,
        )
    tokens = attention_mask[:, None, None, kv_offset : kv_offset + kv_length].bool()
    return tokens.expand(batch_size, 1, q_length, kv_length)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)
