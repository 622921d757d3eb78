"""BLIP-NLVR over several statements per pair, whose images are encoded once for all of them.

Images are pruned without regard to the statement.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from madtp_kernels import RaggedBatch

from ...layers import QueryGroups
from ...pruning import Pruning
from ...rows import first_rows
from ...vision import VisionOutput
from .model import NLVR, NLVROutput


def forward_pairs(
    model: NLVR,
    pixels: Tensor,
    input_ids: RaggedBatch | Sequence[Tensor],
    statements: Sequence[int],
    pruning: Pruning | float | None = None,
    alignment_features: bool = False,
) -> NLVROutput:
    """Answer statements about each of P pairs, as `NLVR.forward` does if it is given every pair once per statement.

    Args:
        model: sizes and backend are its own.
        pixels: ``[2P, 3, S, S]``: the P left images, then the P right ones.
        input_ids: texts, pair by pair.
        statements: how many there are about each pair.
        pruning, alignment_features: as of the model.

    Returns:
        The output for all statements; `vision`, `image_embeds` and the vision features ``[2P, M, sd_dim]`` are those
        of the 2P images.

    Raises:
        ValueError: numbers of images and texts that do not fit.
    """
    if all(count == 1 for count in statements):
        return model(pixels, input_ids, pruning, alignment_features)
    input_ids, pairs = model._ids(input_ids), len(statements)
    if len(pixels) != 2 * pairs or input_ids.batch_size != sum(statements):
        raise ValueError(
            f"input_ids: expected {sum(statements)} texts for {2 * pairs} images, got {input_ids.batch_size} for "
            f"{len(pixels)}"
        )
    rule = model._pruning(pruning, 2 * pairs)
    images = model.visual_encoder(model._pixels(pixels), model.space_dict, rule, alignment_features)
    return read_statements(model, images, input_ids, statements, pruning, alignment_features)


def read_statements(
    model: NLVR,
    images: VisionOutput,
    input_ids: RaggedBatch | Sequence[Tensor],
    statements: Sequence[int],
    pruning: Pruning | float | None = None,
    alignment_features: bool = False,
) -> NLVROutput:
    """The second half of :func:`forward_pairs`, from the images of the pairs: the left ones, then the right ones."""
    input_ids = model._ids(input_ids)
    text = model.text_encoder(
        input_ids, (images.tokens,), model.space_dict, model._pruning(pruning, sum(statements)),
        alignment_features, query_groups=QueryGroups.of(statements, model.device),
    )  # fmt: skip
    return NLVROutput(
        logits=model.cls_head(first_rows(text.tokens)),
        vision=images.trace,
        text=text.trace,
        image_embeds=images.tokens,
        last_hidden_state=text.tokens,
        alignment_features=(images.alignment_features, text.alignment_features) if alignment_features else None,
    )
