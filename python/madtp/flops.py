"""How many operations one instance costs, counted from its token numbers per layer; nothing is run or traced.

Two figures stand side by side. `official` follows the counter that published MADTP results use (fvcore on the
traced model): one multiply-add = 1, LayerNorm = 5 per element, everything else = 0; of the pruning machinery
only what survives fvcore's dead-code elimination counts, that is the token-dictionary product in the layers
that did prune, and the merge. `full` counts all that is executed. A dense BLIP-NLVR at 384 px with 36 text
tokens is 132.54 official GFLOPs.

`full` is `official` and in addition:

* the token-dictionary product in layers that consult the dictionary without pruning afterwards;
* the second query-key product, from which attention importance is rebuilt, and 4 per recomputed probability
  (subtract, exponential, maximum over heads, sum over queries);
* the threshold: 7 per (token, code) pair (maximum over codes, softmax over tokens, weighted sum);
* 5 per softmax element (maximum, subtract, exponential, sum, divide), 5 per GELU element, 1 per element of a
  residual sum, of the mean of two cross-attentions, and of the squared norms of the CLS term.

Copies, gathers, comparisons and sums over single rows are left out of both.

What the functions have in common: ``config`` is the task's configuration; token counts of a stream are those before its
first layer and after each, the first token included, as lists or integer tensors; ``pruning`` is the rule that was active
(True: MADTP, False: none); ``pooled`` says that of the last layer only the token was computed that a feature is read from, of
which ``official`` knows nothing. Counts that do not fit the configuration are a ValueError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .config import VisionConfig
from .pruning import MADTP, Pruning

_LAYER_NORM = 5
_SOFTMAX = 5
_GELU = 5


@dataclass(frozen=True)
class Flops:
    """Cost of one instance in GFLOPs (1e9 operations, one multiply-add = 1).

    `parts` splits `full` by kind: "linear" and "attention" (matrix products of the dense network), "norm"
    (LayerNorm), "alignment", "importance", "threshold", "similarity" (cosines by which a rule finds tokens), "merge"
    (pruning), "elementwise" (softmax, GELU, sums). Kinds that cost nothing are absent.
    """

    official: float
    full: float
    parts: dict[str, float]


def vit(config, lengths: Sequence[int], *, pruning: Pruning | bool = True) -> Flops:
    """Cost of the vision tower (a :class:`madtp.config.VisionConfig`) for one image.

    Source: the per-image formula verified against fvcore on the official vision tower.
    """
    return _total(_vit_cost(config, _checked("lengths", lengths, config.depth), pruning))


def nlvr(
    config, vision_lengths: Sequence[Sequence[int]], text_lengths: Sequence[int], *, pruning: Pruning | bool = True
) -> Flops:
    """Cost of one BLIP-NLVR instance: two images, the text encoder with twin cross-attention, the head.

    Args:
        vision_lengths: ``[depth + 1][2]``, left and right.
        text_lengths: ``[num_hidden_layers + 1]``.
    """
    rows = [list(row) for row in _as_list(vision_lengths)]
    if any(len(row) != 2 for row in rows):
        raise ValueError("vision_lengths: expected two token counts (left, right) per layer")
    depth = config.vision.depth
    streams = [_checked("vision_lengths", [row[side] for row in rows], depth) for side in (0, 1)]
    text = _checked("text_lengths", text_lengths, config.text.num_hidden_layers)
    cost = Counter()
    for lengths in streams:
        cost += _vit_cost(config.vision, lengths, pruning)
    images = [lengths[-1] for lengths in streams]
    cost += _text_cost(config.text, config.vision, text, images, pruning, config.merge_from)
    hidden = config.text.hidden_size
    cost["linear"] += hidden * hidden + 2 * hidden
    return _total(cost)


def caption(
    config, vision_lengths: Sequence[int], text_tokens: int, *, beams: int = 1, pruning: Pruning | bool = True
) -> Flops:
    """Cost of one BLIP caption: the image, and the decoder that writes ``text_tokens`` tokens, [DEC] and prompt included.

    `official` has one pass of the decoder over the text, as the official counter (a dense base model with 15 tokens: 65.72);
    `full` has one per beam, with the image's keys and values computed once.
    """
    lengths = _checked("vision_lengths", vision_lengths, config.vision.depth)
    cost = _vit_cost(config.vision, lengths, pruning)
    return _total(cost + _decoder_cost(config, text_tokens, lengths[-1], config.text.encoder_width, beams))


def vqa(
    config,
    vision_lengths: Sequence[int],
    text_lengths: Sequence[int],
    answer_tokens: int,
    *,
    beams: int = 1,
    pruning: Pruning | bool = True,
) -> Flops:
    """Cost of one BLIP-VQA answer: the image, the question, and the decoder that writes ``answer_tokens`` tokens, [DEC]
    included; of a ranking, the tokens of all candidates. Beams as in :func:`caption`."""
    vision = _checked("vision_lengths", vision_lengths, config.vision.depth)
    text = _checked("text_lengths", text_lengths, config.text.num_hidden_layers)
    cost = _vit_cost(config.vision, vision, pruning)
    cost += _text_cost(config.text, config.vision, text, vision[-1:], pruning)
    return _total(cost + _decoder_cost(config, answer_tokens, text[-1], config.text.hidden_size, beams))


def retrieval(
    config,
    *,
    image: Sequence[int] | None = None,
    text: Sequence[int] | None = None,
    match: tuple[int, Sequence[int]] | None = None,
    pruning: Pruning | bool = True,
    pooled: bool = False,
) -> Flops:
    """Cost of BLIP retrieval's parts at inference: the feature of an image, that of a text, a pair's match.

    Pairs that share an image share its keys and values, which are counted for each here. MADTP's own figure for retrieval
    (153.2) is that of a training step and has no counterpart.

    Args:
        image, text: token counts.
        match: the number of image tokens, and the counts of the text that looks at them.
    """
    cost, layers = Counter(), config.text.num_hidden_layers
    if image is not None:
        cost += _vit_cost(config.vision, _checked("image", image, config.vision.depth), pruning, pooled)
        cost["linear"] += config.vision.embed_dim * config.proj_dim
    if text is not None:
        cost += _text_cost(config.text, config.vision, _checked("text", text, layers), [], pruning, pooled=pooled)
        cost["linear"] += config.text.hidden_size * config.proj_dim
    if match is not None:
        tokens, lengths = match
        cost += _text_cost(
            config.text, config.vision, _checked("match", lengths, layers), [tokens], pruning, pooled=pooled
        )
        cost["linear"] += 2 * config.text.hidden_size
    return _total(cost)


def clip(
    config,
    *,
    image: Sequence[int] | None = None,
    text: Sequence[int] | None = None,
    pruning: Pruning | bool = True,
    pooled: bool = False,
) -> Flops:
    """Cost of CLIP's feature of an image and of that of a text.

    Attention of text is counted as if it were not causal, as the official counter does. MADTP's own figure (395.70) is that
    of a training step: both towers at 336 px and 77 tokens twice, for the momentum copies, and the queues.

    Args:
        image, text: token counts.
    """
    cost = Counter()
    if image is not None:
        vision = config.vision
        lengths = _checked("image", image, vision.depth)
        width, hidden = vision.embed_dim, round(vision.embed_dim * vision.mlp_ratio)
        patches = lengths[0] - vision.prefix
        projection = width * config.embed_dim if vision.projection else 0
        cost["linear"] += patches * 3 * vision.patch_size**2 * width + projection
        if vision.norm_pre:
            cost["norm"] += _LAYER_NORM * lengths[0] * width
        if vision.pool == "attention":  # one query over the final tokens, then an MLP
            cost["linear"] += 2 * (lengths[-1] + 1) * width * width + 2 * width * hidden
            cost["attention"] += 2 * lengths[-1] * width
            cost["norm"] += _LAYER_NORM * lengths[-1] * width
        cost["norm"] += _LAYER_NORM * width  # what stands for the image
        one = pooled and vision.pool == "class"
        cost += _blocks_cost(vision, lengths, width, vision.num_heads, hidden, _rule(pruning, "vision", lengths), one)
    if text is not None:
        lengths = _checked("text", text, config.text.num_hidden_layers)
        width, heads = config.text.hidden_size, config.text.num_attention_heads
        entries = config.vision or VisionConfig(embed_dim=width, num_heads=heads, sd_dim=width)
        hidden, rule = config.text.intermediate_size, _rule(pruning, "text", lengths)
        cost += _blocks_cost(entries, lengths, width, heads, hidden, rule, pooled)
        cost["norm"] += _LAYER_NORM * lengths[-1] * width
        cost["linear"] += width * config.embed_dim
    return _total(cost)


def from_output(config, output, *, pruning: Pruning | bool = True) -> list[Flops]:
    """Cost of each instance of a BLIP-NLVR forward, read off the traces in `output.vision` and
    `output.text`."""
    vision, text = stream_lengths(output.vision), stream_lengths(output.text)
    pairs = len(text)
    return [
        nlvr(config, list(zip(vision[b], vision[pairs + b], strict=True)), text[b], pruning=pruning)
        for b in range(pairs)
    ]


def stream_lengths(traces) -> list[list[int]]:
    """Token counts of every sample of one stream: [samples][layers + 1], before the first layer and after
    each."""
    columns = [_as_list(traces[0].lengths_in)] + [_as_list(trace.lengths) for trace in traces]
    return [list(sample) for sample in zip(*columns, strict=True)]


def _total(cost: Counter) -> Flops:
    # "unofficial" is what the official counter does not see of the kinds that it counts, not a kind of its own.
    unofficial = cost.pop("unofficial", 0) - cost.pop("spared", 0)
    counted = ("linear", "attention", "norm", "alignment", "similarity", "merge")
    official = sum(cost[kind] for kind in counted) - unofficial
    parts = {kind: operations / 1e9 for kind, operations in cost.items()}
    return Flops(official / 1e9, sum(cost.values()) / 1e9, parts)


def _vit_cost(config, lengths: list[int], pruning: Pruning | bool, pooled: bool = False) -> Counter:
    width, hidden = config.embed_dim, round(config.embed_dim * config.mlp_ratio)
    patches = (config.image_size // config.patch_size) ** 2
    cost = Counter()
    cost["linear"] += patches * 3 * config.patch_size**2 * width
    cost += _blocks_cost(config, lengths, width, config.num_heads, hidden, _rule(pruning, "vision", lengths), pooled)
    cost["norm"] += _LAYER_NORM * lengths[-1] * width
    return cost


def _blocks_cost(
    config, lengths: list[int], width: int, heads: int, hidden: int, rule: Pruning, pooled: bool
) -> Counter:
    """Pre-norm blocks; `config` has sd_num, sd_dim and map_func."""
    cost = Counter()
    alignment = config.sd_num * config.sd_dim + (width * config.sd_dim if config.map_func else 0)  # per token
    for layer, (before, after) in enumerate(zip(lengths, lengths[1:])):
        if pooled and layer == len(lengths) - 2:
            cost += _read_one(before, width, heads, hidden, norms=before + 1)
            continue
        cost["norm"] += _LAYER_NORM * (before + after) * width
        _self_attention(cost, before, width, heads)
        rule.count(cost, layer, before, after, width=width, heads=heads, entries=config.sd_num, alignment=alignment)
        _feed_forward(cost, after, width, hidden)
    return cost


def _read_one(tokens: int, width: int, heads: int, hidden: int, norms: int) -> Counter:
    """A last layer of which one token is read; under "spared" what the official counter still sees."""
    cost, whole = Counter(), Counter()
    cost["linear"] += 2 * tokens * width * width + 2 * width * width
    cost["norm"] += _LAYER_NORM * norms * width
    cost["elementwise"] += width
    _attend(cost, 1, tokens, width, heads)
    _feed_forward(cost, 1, width, hidden)
    _self_attention(whole, tokens, width, heads)
    _feed_forward(whole, tokens, width, hidden)
    whole["norm"] += _LAYER_NORM * 2 * tokens * width
    cost["spared"] += sum(whole[kind] - cost[kind] for kind in ("linear", "attention", "norm"))
    return cost


def _text_cost(
    text,
    vision,
    lengths: list[int],
    others: list[int],
    pruning: Pruning | bool,
    merge_from: int | None = None,
    pooled: bool = False,
) -> Counter:
    """Text encoder whose words look at `others` (token counts), twice where `merge_from` is given."""
    width, heads, rule = text.hidden_size, text.num_attention_heads, _rule(pruning, "text", lengths)
    alignment = vision.sd_num * vision.sd_dim + (width * vision.sd_dim if width != vision.sd_dim else 0)
    cost = Counter()
    cost["norm"] += _LAYER_NORM * lengths[0] * width
    for layer, (before, after) in enumerate(zip(lengths, lengths[1:])):
        if pooled and layer == len(lengths) - 2:
            cost += _read_one(before, width, heads, text.intermediate_size, norms=2)
            for tokens in others:
                cost["linear"] += 2 * width * width + 2 * tokens * text.encoder_width * width
                _attend(cost, 1, tokens, width, heads)
                cost["elementwise"] += width
                cost["norm"] += _LAYER_NORM * width
                cost["spared"] += (before - 1) * (2 * width * width + 2 * tokens * width + _LAYER_NORM * width)
            continue
        _self_attention(cost, before, width, heads)
        cost["norm"] += _LAYER_NORM * before * width
        rule.count(cost, layer, before, after, width=width, heads=heads, entries=vision.sd_num, alignment=alignment)
        for tokens in others:  # queries and output per text token, keys and values per token looked at
            cost["linear"] += 2 * after * width * width + 2 * tokens * text.encoder_width * width
            _attend(cost, after, tokens, width, heads)
        if merge_from is not None and layer >= merge_from:
            cost["linear"] += after * 2 * width * width
        elif merge_from is not None:
            cost["elementwise"] += after * width
        if others:
            cost["elementwise"] += after * width
            cost["norm"] += _LAYER_NORM * after * width
        _feed_forward(cost, after, width, text.intermediate_size)
        cost["norm"] += _LAYER_NORM * after * width
    return cost


def _decoder_cost(config, tokens: int, looked_at: int, looked_at_width: int, beams: int) -> Counter:
    text = config.text
    width, layers = text.hidden_size, text.num_hidden_layers
    sizes = replace(text, encoder_width=looked_at_width)
    keys = layers * 2 * looked_at * looked_at_width * width
    beam = _text_cost(sizes, config.vision, [tokens] * (layers + 1), [looked_at], False)
    beam["linear"] += tokens * (width * width + width * text.vocab_size) - keys
    beam["norm"] += _LAYER_NORM * tokens * width
    beam["elementwise"] += _GELU * tokens * width
    cost = Counter({kind: beams * operations for kind, operations in beam.items()})
    cost["linear"] += keys
    cost["unofficial"] += (beams - 1) * sum(beam[kind] for kind in ("linear", "attention", "norm"))
    return cost


def _self_attention(cost: Counter, tokens: int, width: int, heads: int) -> None:
    cost["linear"] += 4 * tokens * width * width
    _attend(cost, tokens, tokens, width, heads)
    cost["elementwise"] += tokens * width


def _attend(cost: Counter, queries: int, keys: int, width: int, heads: int) -> None:
    cost["attention"] += 2 * queries * keys * width
    cost["elementwise"] += _SOFTMAX * heads * queries * keys


def _feed_forward(cost: Counter, tokens: int, width: int, hidden: int) -> None:
    cost["linear"] += 2 * tokens * width * hidden
    cost["elementwise"] += _GELU * tokens * hidden + tokens * width


def _rule(pruning: Pruning | bool, stream: str, lengths: Sequence[int]) -> Pruning:
    if isinstance(pruning, bool):
        return MADTP(1.0) if pruning else Pruning()
    return pruning.on(stream, len(lengths) - 1)


def _as_list(values) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _checked(name: str, lengths, layers: int) -> list[int]:
    lengths = _as_list(lengths)
    if len(lengths) != layers + 1:
        expected = f"{layers + 1} counts (the input and {layers} layers)"
        raise ValueError(f"{name}: expected {expected}, got {len(lengths)}")
    if any(after > before for before, after in zip(lengths, lengths[1:])) or min(lengths) < 0:
        raise ValueError(f"{name}: token counts never grow and are not negative, got {lengths}")
    return lengths
