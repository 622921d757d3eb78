"""What takes the place of methods of transformers' BLIP."""

from __future__ import annotations

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPooling, BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.generic import can_return_tuple

from madtp_kernels import RaggedBatch

from ..generation import CACHE
from ..rows import first_rows
from .engine import Memory, groups_of, ready
from .tensors import integers, padded, pixels_of, ragged_ids, tokens_of


@can_return_tuple
@torch.no_grad()
def vision(self, pixel_values=None, **kwargs):
    """`BlipVisionModel.forward`."""
    engine = ready(self, kwargs)
    tokens, _ = engine.images(pixels_of(pixel_values))
    # BLIP's tokens have passed this LayerNorm already; transformers applies it to the pooled one twice.
    return BaseModelOutputWithPooling(padded(tokens), self.post_layernorm(first_rows(tokens)))


@can_return_tuple
@torch.no_grad()
def encoder(
    self, input_ids=None, attention_mask=None, position_ids=None, encoder_hidden_states=None, encoder_attention_mask=None,
    use_cache=None, **kwargs,
):  # fmt: skip
    """`BlipTextModel.forward` of an encoder."""
    engine = ready(self, kwargs)
    texts, positions = ragged_ids(input_ids, attention_mask, position_ids)
    images = (
        None
        if encoder_hidden_states is None
        else tokens_of(encoder_hidden_states, encoder_attention_mask, padding=engine.pads)
    )
    stream, _ = engine.texts(texts, images, positions)
    return BaseModelOutputWithPoolingAndCrossAttentions(padded(stream))


@can_return_tuple
@torch.no_grad()
def decoder(
    self, input_ids=None, attention_mask=None, position_ids=None, encoder_hidden_states=None, encoder_attention_mask=None,
    cache=None, past_key_values=None, use_cache=None, is_decoder=False, **kwargs,
):  # fmt: skip
    """`BlipTextModel.forward` of a decoder. A cache is returned where one was given (by either name) or asked for."""
    generating = isinstance(encoder_hidden_states, Memory)
    engine = ready(self, kwargs, sync=not generating)
    if not is_decoder:
        raise ValueError("is_decoder: the decoder of a patched model is always causal, got False")
    input_ids = integers(input_ids)
    model, (texts, new) = engine.model, input_ids.shape
    memory = encoder_hidden_states if generating else engine.memory(encoder_hidden_states, encoder_attention_mask)
    repeat = max(1, texts // memory.samples) if generating else 1  # beams, or sequences of one sample
    options = {"query_groups": groups_of(texts, memory.samples, repeat, input_ids.device), "backend": model.backend}
    cache = past_key_values if cache is None else cache
    if use_cache and cache is None:
        cache = DynamicCache()
    if cache is None:
        ids, positions = ragged_ids(input_ids, attention_mask, position_ids)
        states = model.text_decoder(model._ids(ids), memory.keys, positions=positions, **options).values
        hidden = states.new_zeros(texts, new, states.shape[-1])
        hidden[torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()] = states
    else:
        earlier = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        if not isinstance(earlier, DynamicCache):
            raise ValueError(
                f"cache: a patched decoder takes a DynamicCache, got {type(earlier).__name__} (cache_implementation)"
            )
        seen = earlier.get_seq_length()
        if attention_mask is not None and attention_mask.shape != (texts, seen + new):
            expected = [texts, seen + new]
            raise ValueError(
                f"attention_mask: expected {expected}, earlier tokens included, got {list(attention_mask.shape)}"
            )
        if position_ids is None:
            position_ids = torch.arange(seen, seen + new, device=input_ids.device)[None]
        ids = RaggedBatch.from_lengths(input_ids.flatten(), [new] * texts)
        options["positions"] = position_ids.expand(texts, new).flatten()
        options["visible"] = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        hidden = model.text_decoder(model._ids(ids), memory.keys, cache=earlier, **options).values.unflatten(
            0, (texts, new)
        )
    return BaseModelOutputWithPoolingAndCrossAttentions(hidden, **{CACHE: cache})


def generate(self, *args, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
    """`BlipTextLMHeadModel.generate`: keys and values of what the decoder looks at are computed once, before the first word."""
    engine = ready(self.bert, {})
    with torch.no_grad():
        memory = engine.memory(encoder_hidden_states, encoder_attention_mask)
    return type(self).generate(self, *args, encoder_hidden_states=memory, **kwargs)
