"""BLIP-NLVR over several statements per pair while it is pruned: what fine-tuning a pruned model runs.

Images are pruned without regard to the statement, so those of a pair are encoded once for all its statements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from madtp import flops
from madtp.layers import QueryGroups
from madtp.pruning import MADTP, ScoredPruning
from madtp.pruning.official import official
from madtp.rows import first_rows
from madtp.tasks.nlvr.model import NLVR, NLVROutput, split
from madtp_kernels import RaggedBatch


def forward_pairs(
    model: NLVR,
    pixels: Tensor,
    input_ids: RaggedBatch,
    per_pair: int,
    temperature: float,
    alignment_features: bool = False,
    *,
    rules: tuple[type[ScoredPruning], type[ScoredPruning]] = (MADTP, MADTP),
    groups: int = 1,
) -> NLVROutput:
    """Answer K statements about each of P pairs, as `NLVR.forward` does if it is given every pair K times.

    Args:
        model: sizes and backend are its own.
        pixels: ``[2P, 3, S, S]``: the P left images, then the P right ones.
        input_ids: ``[T]`` int64 of P * K texts, pair by pair.
        per_pair: K.
        temperature: 0 runs dense.
        alignment_features: also return them.
        rules: how images and texts are pruned.
        groups: so many images in succession keep equally many tokens, and so many texts.

    Returns:
        The output for P * K statements; `vision`, `image_embeds` and the vision features ``[2P, M, sd_dim]``
        are those of the 2P images.

    Raises:
        ValueError: numbers of images and texts that do not fit.
    """
    pairs = pixels.shape[0] // 2
    if pixels.shape[0] != 2 * pairs or input_ids.batch_size != pairs * per_pair:
        raise ValueError(
            f"input_ids: expected {per_pair} texts for each two of {pixels.shape[0]} images, "
            f"got {input_ids.batch_size}"
        )

    def pruning(rule: type[ScoredPruning], samples: int) -> ScoredPruning:
        shared = torch.arange(samples, dtype=torch.int32, device=pixels.device) // groups if groups > 1 else None
        chosen = rule(temperature, proportional_attention=model.pruning.proportional_attention, backend=model.backend)
        return chosen if shared is None else official(chosen, "groups", groups=shared)

    vision = model.visual_encoder(pixels, model.space_dict, pruning(rules[0], 2 * pairs), alignment_features)
    query_groups = QueryGroups.of([per_pair] * pairs, pixels.device)
    text = model.text_encoder(
        input_ids, split(vision.tokens, pairs), model.space_dict, pruning(rules[1], pairs * per_pair), alignment_features,
        query_groups=query_groups,
    )  # fmt: skip
    return NLVROutput(
        logits=model.cls_head(first_rows(text.tokens)),
        vision=vision.trace,
        text=text.trace,
        image_embeds=vision.tokens,
        last_hidden_state=text.tokens,
        alignment_features=(vision.alignment_features, text.alignment_features) if alignment_features else None,
    )


def costs(model: NLVR, output: NLVROutput, per_pair: int) -> list[flops.Flops]:
    """What each of the P * K statements of :func:`forward_pairs` costs as an instance of its own: both images
    and the text.
    """
    vision, text = flops.stream_lengths(output.vision), flops.stream_lengths(output.text)
    pairs, pruning = len(vision) // 2, output.vision[0].importance is not None
    images = [list(zip(vision[p], vision[pairs + p], strict=True)) for p in range(pairs)]
    return [
        flops.nlvr(model.config, images[i // per_pair], lengths, pruning=pruning)
        for i, lengths in enumerate(text)
    ]
