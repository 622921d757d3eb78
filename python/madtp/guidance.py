"""MAG, the alignment guidance: how tokens are compared with the cross-modal dictionary.

Two things are derived from the same comparison: the alignment that scores tokens (done inside
`madtp_kernels.score_tokens`), and the features that training aligns between the modalities. Paper: arXiv 2403.02991,
3.2.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp_kernels import RaggedBatch

from .linear import check_device, project, reads_as


class QueryModel(nn.Module):
    """Maps tokens to the width of the dictionary where the two differ; without a map it holds no parameters.

    The parameter names (`q_map.0`) are those of MADTP's checkpoints.
    """

    def __init__(self, width: int, sd_dim: int, map_func: bool) -> None:
        super().__init__()
        self.q_map = nn.Sequential(nn.Linear(width, sd_dim)) if map_func else None

    def fold(self, dictionary: Tensor) -> tuple[Tensor, Tensor | None]:
        """The dictionary ``[M, sd_dim]`` seen from the tokens: ``([M, width], bias [M] or None)``.

        <x W^T + b, s> = <x, s W> + <s, b>: comparing with ``s W`` spares the map of every token. For a short text it
        costs as much as a block, so blocks that share a map should share the result.
        """
        if self.q_map is None:
            return dictionary, None
        if not self._reads_as_its_weights:
            raise ValueError(
                "q_map: its weights map the dictionary, without a call; remove hooks, and merge what stands in its place"
            )
        weight, bias = self.q_map[0].weight, self.q_map[0].bias
        check_device(dictionary, weight)
        wide = dictionary.float() if dictionary.dtype != torch.float64 else dictionary
        device = dictionary.device.type
        plain = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
        with plain:  # scores are compared in float32 at least
            return (wide @ weight.to(wide.dtype)).to(dictionary.dtype), wide @ bias.to(wide.dtype)

    def forward(self, tokens: RaggedBatch) -> Tensor:
        """Tokens ``[T, width]`` in the dictionary's space ``[T, sd_dim]``."""
        if self.q_map is None:
            return tokens.values
        if not self._reads_as_its_weights:
            return self.q_map(tokens.values)
        return project(tokens.values, self.q_map[0].weight, self.q_map[0].bias, tokens=tokens)

    @property
    def _reads_as_its_weights(self) -> bool:
        return reads_as(self.q_map, nn.Sequential) and reads_as(self.q_map[0], nn.Linear)


def alignment_features(tokens: RaggedBatch, dictionary: Tensor, query_model: QueryModel) -> Tensor:
    """What each dictionary entry sees of each sample, ``[B, M, sd_dim]``.

    With Q the mapped tokens but the first: softmax over tokens of <Q_j, s_m> / sqrt(sd_dim), times Q. Only training and
    calibration need it.
    """
    queries, mask = tokens.with_values(query_model(tokens)).to_padded()
    queries, mask = queries[:, 1:], mask[:, 1:]
    logits = queries @ dictionary.mT * dictionary.shape[1] ** -0.5  # [B, N, M]
    logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min)
    weights = logits.softmax(1) * mask[..., None]
    return weights.mT @ queries


def alignment_loss(vision: Tensor, text: Tensor) -> Tensor:
    """1 - cosine between the alignment features of the two modalities ``[B, M, sd_dim]``, averaged over samples and
    entries."""
    vision, text = (F.normalize(features.float(), dim=-1, eps=1e-10) for features in (vision, text))
    return (1 - F.cosine_similarity(vision, text, dim=-1)).mean()
