"""What takes the place of `forward` in the towers of CLIP, SigLIP, DINOv2 and ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .. import graphs
from ..rows import rows_of
from .engine import no_longer, ready
from .tensors import padded, pixels_of, texts_of


@can_return_tuple
@torch.no_grad()
def image_encoder(
    self, pixel_values=None, pixel_attention_mask=None, spatial_shapes=None, interpolate_pos_encoding=False, **kwargs
):
    """`forward` of the image towers of CLIP, SigLIP, SigLIP 2, DINOv2 and ViT.

    Hidden states are whole: every layer has a row for each patch, that of the token it was merged into.
    """
    wanted = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
    engine = ready(self, kwargs, states=True, interpolate_pos_encoding=interpolate_pos_encoding)
    model, tower = engine.model, engine.model.visual
    pixels = (pixels_of(pixel_values), pixel_attention_mask, spatial_shapes)
    length = None if spatial_shapes is None else pixel_values.shape[1]
    if wanted:
        tokens, states = engine.states(*pixels, length)
    else:
        (tokens, _), states = engine.images(*pixels), None
    normed = (lambda x: x) if engine.kind.raw else tower.norm_post
    if states is not None:
        last = normed(states[-1])
    else:
        last = padded(tokens if engine.kind.raw else tokens.with_values(tower.norm_post(tokens)))
        if length is not None and not model.pruning.active:
            last = F.pad(last, (0, 0, 0, length - last.shape[1]))
    pools = getattr(self, "use_head", True) and getattr(self, "pooler", self) is not None
    return BaseModelOutputWithPooling(last, tower.pool(tokens, model.backend) if pools else None, hidden_states=states)


@can_return_tuple
@torch.no_grad()
def text_encoder(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
    """`CLIPTextModel.forward`."""
    engine = ready(self, kwargs, position_ids=position_ids)
    texts, eot = texts_of(engine.model, input_ids, attention_mask)
    stream = no_longer(graphs.run(engine.model.encode_text, texts).tokens, texts.max_seqlen)
    stream = stream.with_values(self.final_layer_norm(stream.values))
    return BaseModelOutputWithPooling(padded(stream), stream.values[rows_of(stream, eot)])
