"""The losses of the tasks, on tensors; and what they need of the other processes where there are several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp_kernels import RaggedBatch
from madtp_kernels.segments import sample_of

from ..processes import gathered, mean_over_processes

LABEL_SMOOTHING = 0.1  # of BLIP's decoder, in captioning and VQA


def token_loss(logits: RaggedBatch, texts: RaggedBatch, ignored: int = 1) -> tuple[Tensor, Tensor]:
    """Label-smoothed loss of each token of each text, predicted from the tokens before it.

    Args:
        logits: ``[T, V]`` what comes after each token.
        texts: ``[T]`` int64 ids.
        ignored: first tokens of each text that count nothing: 1 for what a text begins with, more for a prompt.

    Returns:
        ``[T]`` losses, 0 where nothing is predicted, and ``[T]`` bool: which tokens count.
    """
    rows = torch.arange(texts.num_tokens, device=texts.device)
    counts = rows - texts.cu_seqlens[sample_of(texts.cu_seqlens, len(rows))] >= ignored
    loss = logits.values.new_zeros(texts.num_tokens, dtype=torch.float32)
    target = rows[counts]
    losses = F.cross_entropy(
        logits.values[target - 1].float(), texts.values[target], reduction="none", label_smoothing=LABEL_SMOOTHING
    )
    return loss.index_copy(0, target, losses), counts


def caption_loss(logits: RaggedBatch, texts: RaggedBatch, prompt: int) -> Tensor:
    """Mean over the tokens after the prompt (of ``prompt`` tokens), in the batches of all processes together."""
    losses, counts = token_loss(logits, texts, prompt)
    return losses.sum() / mean_over_processes(counts.sum().float())


def answer_loss(logits: RaggedBatch, answers: RaggedBatch, weights: Tensor, questions: int) -> Tensor:
    """BLIP's VQA loss: the summed loss of each answer's tokens, times its weight ``[N]``, per question."""
    losses, _ = token_loss(logits, answers)
    per_answer = torch.segment_reduce(losses, "sum", offsets=answers.cu_seqlens.long())
    return (weights * per_answer).sum() / questions


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, identities: Tensor) -> Tensor:
    """Both directions of image-text contrast; the other samples of the batch, of all processes, are the negatives.

    Args:
        images, texts: ``[B, E]`` features of length 1 of matching pairs.
        scale: factor of the similarities.
        identities: ``[B]`` int64; samples with the same number have the same image, and share the target.
    """
    everyone = gathered(identities)
    same = (identities[:, None] == everyone).float()
    targets = same / same.sum(1, keepdim=True)
    per_direction = [
        -(targets * (scale * ours.float() @ gathered(theirs).float().mT).log_softmax(1)).sum(1).mean()
        for ours, theirs in ((images, texts), (texts, images))
    ]
    return sum(per_direction) / 2


@torch.no_grad()
def hard_negatives(similarity: Tensor, identities: Tensor, generator: torch.Generator) -> list[int | None]:
    """For each row of ``similarity [B, B]`` (scaled) a column with another identity, drawn by its softmax; None where
    all have the same."""
    # A column that rounds to nothing may still be the only one.
    weights = similarity.float().softmax(1).cpu().clamp(min=1e-10)
    weights = weights.masked_fill((identities[:, None] == identities).cpu(), 0)
    drawn = torch.multinomial(weights + (weights.sum(1, keepdim=True) == 0), 1, generator=generator)[:, 0].tolist()
    return [column if weights[row].any() else None for row, column in enumerate(drawn)]
