"""The examples against eager batched PyTorch as their authors write it, and NaFlex batches against a padded mask.

Images of equal length that lose the same number, which is what the eager forms need: ragged batches would make them pad. Only
what pruning adds to a layer is timed: scores, choice, rows. Eager scores are computed for the chosen queries alone, not from a
whole matrix as the authors' code does, so that the comparison is a hard one.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import inputs
import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, DTYPES, Comparison, Goal, WrongAnswer, require
from torch import Tensor

from madtp import varlen
from madtp_kernels import RaggedBatch, attention

HEADS, WIDTH = inputs.HEADS, inputs.WIDTH
EXAMPLES = Path(__file__).parent.parent / "examples"
RATE = 0.7
IMAGES = [2] if inputs.SMALL else [8, 64]


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


class Layer:
    """What a layer leaves when pruning begins: tokens, and queries and keys with the log-sum-exp of its attention."""

    def __init__(self, images: int, tokens: int, key_heads: int = HEADS, causal: bool = False) -> None:
        lengths = [tokens] * images
        self.x = inputs.packed(inputs.tokens(lengths, WIDTH, dtype=torch.float32, seed=1), lengths)
        self.q = inputs.tokens(lengths, HEADS, 64, dtype=torch.float32, seed=2)
        self.k = inputs.tokens(lengths, key_heads, 64, dtype=torch.float32, seed=3)
        cu, self.images, self.tokens = self.x.cu_seqlens, images, tokens
        _, self.lse = attention(self.q, self.k, self.k, cu, cu, tokens, tokens, causal=causal)
        self.rows = self.x.values.view(images, tokens, WIDTH)
        self.queries, self.keys = (t.view(images, tokens, *t.shape[1:]) for t in (self.q, self.k))  # [B, N, H, d]

    def weights(self, first: int, last: int, causal: bool = False) -> Tensor:
        """Attention ``[B, H, queries, N]`` of some queries."""
        keys = self.keys.repeat_interleave(HEADS // self.keys.shape[2], 2)
        logits = self.queries[:, first:last].transpose(1, 2) @ keys.permute(0, 2, 3, 1) / 8
        if causal:
            place = torch.arange(self.tokens, device=DEVICE)
            logits = logits.masked_fill(place > place[first:last, None], float("-inf"))
        return logits.softmax(-1)


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def best(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, 1).indices.sort(1).values


def evit(layer: Layer):
    count = -int(-RATE * (layer.tokens - 1) // 1)

    def eager():
        scores = layer.weights(0, 1)[:, :, 0, 1:].mean(1)
        kept = best(scores, count)
        rest = scores.scatter(1, kept, 0.0)
        rows = layer.rows[:, 1:]
        fused = rest[:, None] @ rows
        return torch.cat([layer.rows[:, :1], rows_of(rows, kept), fused], 1)

    return lambda: example("evit")(layer.x, layer.q, layer.k, layer.lse, RATE).tokens, eager


def dynamicvit(layer: Layer):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(WIDTH, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)).to(DEVICE)

    def eager():
        kept = best(network(layer.rows)[:, 1:, 0], int(RATE * (layer.tokens - 1)))
        return torch.cat([layer.rows[:, :1], rows_of(layer.rows[:, 1:], kept)], 1)

    return lambda: example("dynamicvit")(layer.x, lambda x: network(x)[:, 0], RATE).tokens, eager


def tome(layer: Layer):
    merge, sizes = 24, torch.ones(len(layer.q), device=DEVICE)

    def eager():
        metric = F.normalize(layer.keys.mean(2), dim=-1)
        scores = metric[:, ::2] @ metric[:, 1::2].mT
        scores[:, 0] = float("-inf")
        top, partner = scores.max(-1)
        order = top.argsort(-1, descending=True)
        gone, stays = order[:, :merge], order[:, merge:].sort(1).values
        size = sizes.view(layer.images, -1, 1)

        def fold(t):
            a, b = t[:, ::2], t[:, 1::2]
            target = partner.gather(1, gone)[..., None].expand(-1, -1, t.shape[2])
            return torch.cat([rows_of(a, stays), b.scatter_reduce(1, target, rows_of(a, gone), "sum")], 1)

        return fold(layer.rows * size) / fold(size)

    return lambda: example("tome")(layer.x, layer.k, sizes, merge).tokens, eager


def fastv(layer: Layer):
    place = torch.arange(layer.tokens, device=DEVICE).repeat(layer.images)
    is_image = (place >= 35) & (place < layer.tokens - 20)
    count = round(0.5 * (layer.tokens - 55))

    def eager():
        scores = layer.weights(layer.tokens - 1, layer.tokens)[:, :, 0].mean(1)
        image = best(scores[:, 35:-20], count) + 35
        text = torch.arange(layer.tokens, device=DEVICE).expand(layer.images, -1)
        kept = torch.cat([text[:, :35], image, text[:, -20:]], 1)
        return rows_of(layer.rows, kept), place.view(layer.images, -1).gather(1, kept)

    ours = lambda: example("fastv")(layer.x, layer.q, layer.k, layer.lse, is_image, place).tokens
    return ours, lambda: eager()[0]


def visionzip(layer: Layer):
    dominant, contextual = 53, 10

    def eager():
        scores = layer.weights(0, 1)[:, :, 0, 1:].sum(1)
        chosen = torch.zeros(layer.images, layer.tokens, dtype=torch.bool, device=DEVICE)
        chosen[:, 0] = True
        chosen.scatter_(1, scores.topk(dominant, 1).indices + 1, True)
        rest = (~chosen).nonzero()[:, 1].view(layer.images, -1)
        metric = F.normalize(rows_of(layer.keys.mean(2), rest), dim=-1)
        targets = torch.arange(0, rest.shape[1], max(1, rest.shape[1] // contextual), device=DEVICE)[:contextual]
        others = torch.ones(rest.shape[1], dtype=torch.bool, device=DEVICE)
        others[targets] = False
        assigned = F.one_hot((metric[:, others] @ metric[:, targets].mT).argmax(2), contextual).to(layer.rows.dtype)
        rows = rows_of(layer.rows, rest)
        mean = assigned.mT @ rows[:, others] / assigned.sum(1).clamp(min=1)[..., None]
        place = torch.cat([chosen.nonzero()[:, 1].view(layer.images, -1), rest[:, targets]], 1)
        values = torch.cat([layer.rows[chosen].view(layer.images, -1, WIDTH), rows[:, targets] + mean], 1)
        return rows_of(values, place.argsort(1))

    return lambda: example("visionzip")(layer.x, layer.q, layer.k, layer.lse, dominant, contextual), eager


def snapkv(layer: Layer):
    capacity, window = 128, 32

    def eager():
        votes = layer.weights(layer.tokens - window, layer.tokens, causal=True).unflatten(1, (layer.keys.shape[2], -1))
        votes = votes.mean((2, 3))[..., :-window]
        pooled = F.avg_pool1d(votes, 5, stride=1, padding=2)
        chosen = torch.ones(*votes.shape[:2], layer.tokens, dtype=torch.bool, device=DEVICE)
        chosen[..., :-window] = False
        return chosen.scatter(2, pooled.topk(capacity - window, 2).indices, True)

    call = example("snapkv")
    return lambda: call(layer.q, layer.k, layer.lse, layer.x.cu_seqlens, layer.tokens, capacity, window), eager


KINDS = {
    "evit": (evit, {}),
    "dynamicvit": (dynamicvit, {}),
    "tome": (tome, {}),
    "fastv": (fastv, {"key_heads": 4, "causal": True}),
    "visionzip": (visionzip, {}),
    "snapkv": (snapkv, {"key_heads": 4, "causal": True}),
}


def same(ours, exact, name: str) -> None:
    if isinstance(ours, RaggedBatch):
        rows = ours.values[: ours.num_tokens].view(exact.shape)
        if name == "tome":  # the authors' code moves destinations behind the others
            rows, exact = (t.sort(1).values for t in (rows.sum(2, keepdim=True), exact.sum(2, keepdim=True)))
        return require(rows, exact, 1e-3, name)
    differing = (ours.unflatten(1, (exact.shape[0], -1)).transpose(0, 1) != exact).float().mean().item()
    if differing > 1e-3:
        raise WrongAnswer(f"{name}: {differing:.4f} of the entries are chosen otherwise")


@pytest.mark.parametrize("tokens", [192] if inputs.SMALL else [577, 1024])
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_example(run, name, images, tokens):
    make, options = KINDS[name]
    ours, eager = make(Layer(images, tokens, **options))
    run(
        Comparison(
            name,
            {name: ours, "eager": eager},
            lambda: same(ours(), eager(), name),
            {"dtype": "float32", "batch": f"{images} x {tokens}"},
            goals=(Goal(name, "eager", 1.0),),
            synchronising=("eager",) if name == "visionzip" else (),
            budget=1.0,
        )
    )


@pytest.mark.parametrize("padding", [0.02, 0.4])
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_naflex(run, dtype, images, padding):
    """Attention of one layer of a SigLIP 2 tower, at most 256 patches an image, through transformers' interface."""
    longest, kind = 256, DTYPES[dtype]
    lengths = torch.linspace(longest, longest * (1 - 2 * padding), images).round().long().to(DEVICE)
    mask = (torch.arange(longest, device=DEVICE) < lengths[:, None])[:, None, None].expand(-1, 1, longest, -1)
    q, k, v = (inputs.tokens([longest] * images, HEADS, 64, dtype=kind, seed=s) for s in (1, 2, 3))
    q, k, v = (t.view(images, longest, HEADS, 64).transpose(1, 2) for t in (q, k, v))
    whole = mask.contiguous()  # as SDPA is given it
    ours = functools.partial(varlen._attend, torch.nn.Identity(), q, k, v, mask, scaling=0.125)
    padded = functools.partial(F.scaled_dot_product_attention, q, k, v, whole)

    def check():
        valid = mask[:, 0, 0]
        exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), whole).transpose(1, 2)[valid]
        require(ours()[0][valid], exact, 1e-2 if dtype == "bfloat16" else 1e-4, "naflex")

    run(
        Comparison(
            "naflex",
            {"ragged": ours, "padded mask": padded},
            check,
            {"dtype": dtype, "batch": f"{images} x 256, padding {padding:.0%}"},
            goals=(Goal("ragged", "padded mask", 1.0),),
            budget=1.0,
        )
    )
