"""What takes the place of `forward` in the towers of CLIP, SigLIP, DINOv2 and ViT."""

from __future__ import annotations

import math

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .. import graphs
from ..rows import rows_of
from .engine import asked_for, no_longer, ready
from .tensors import padded, pixels_of, texts_of


@can_return_tuple
@torch.no_grad()
def image_encoder(self, pixel_values=None, pixel_attention_mask=None, spatial_shapes=None, **kwargs):
    """`forward` of the image towers of CLIP, SigLIP, SigLIP 2, DINOv2 and ViT.

    Its states are whole: a row for each token that there was at first, that of the token it was merged into.
    """
    engine = ready(self, kwargs, states=True)
    model, tower, pixels = engine.model, engine.model.visual, pixels_of(pixel_values)
    vision, states = model.config.vision, None
    if vision.patches_last and spatial_shapes is None:
        raise ValueError("spatial_shapes: expected the grids [B, 2] of the patches, got None")
    for name, value in (("pixel_attention_mask", pixel_attention_mask), ("spatial_shapes", spatial_shapes)):
        if value is not None and not vision.patches_last:
            raise ValueError(f"{name}: a patched model does not take it here")
    if spatial_shapes is None:
        length = vision.prefix + math.prod(side // vision.patch_size for side in pixels.shape[-2:])
    else:
        length = pixels.shape[1]
    inputs = (pixels, pixel_attention_mask, spatial_shapes)
    if asked_for(self, kwargs, "output_hidden_states"):
        tokens, trace, states = engine.states(*inputs, length)
    else:
        tokens, trace = engine.images(*inputs)
    normed = tokens if engine.kind.raw else tokens.with_values(tower.norm_post(tokens))
    last = padded(engine.whole(normed, trace, length))
    pools = getattr(self, "use_head", True) and getattr(self, "pooler", self) is not None
    return BaseModelOutputWithPooling(last, tower.pool(tokens, model.backend) if pools else None, hidden_states=states)


@can_return_tuple
@torch.no_grad()
def text_encoder(self, input_ids=None, attention_mask=None, **kwargs):
    """`CLIPTextModel.forward`."""
    engine = ready(self, kwargs)
    texts, eot = texts_of(engine.model, input_ids, attention_mask)
    stream = no_longer(graphs.run(engine.model.encode_text, texts).tokens, texts.max_seqlen)
    stream = stream.with_values(self.final_layer_norm(stream.values))
    return BaseModelOutputWithPooling(padded(stream), stream.values[rows_of(stream, eot)])
