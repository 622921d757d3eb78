"""What importers need that no example shows, method by method, against formulas written here in float64.

EViT, ToMe, FastV, VisionZip, SnapKV and DynamicViT are examples of their own (test_examples); vision towers of transformers
are in test_varlen.
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, backends_here, interpreted, normal, offsets

from madtp_kernels import (
    RaggedBatch,
    attention,
    attention_received,
    attention_with_importance,
    linear,
    merge_tokens,
    nearest_kept,
    novelty,
    top_tokens,
    unmerge,
)

every_backend = pytest.mark.parametrize("backend", backends_here())


def lengths_for(backend):
    return [12, 0, 4, 8] if interpreted(backend) else [40, 0, 4, 64]


def inputs(generator, lengths, heads=2, width=16):
    q, k, v = normal(generator, 3, sum(lengths), heads, 8)
    x = RaggedBatch(normal(generator, sum(lengths), width), offsets(lengths), max(lengths))
    return x, q, k, v


def spans(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


def weights(q, k):
    """The attention matrix [H, L, L] of one sample, in float64."""
    return (torch.einsum("ihd,jhd->hij", q.double(), k.double()) / math.sqrt(q.shape[2])).softmax(-1)


def lse_of(x, q, k, v, backend):
    return attention(q, k, v, x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen, backend=backend)[1]


@every_backend
def test_ats(backend, generator):
    """The class token's attention, head by head, times the norm of the value; a sampled mask; the rest is dropped."""
    lengths = lengths_for(backend)
    x, q, k, v = inputs(generator, lengths)
    received = attention_received(
        q,
        k,
        lse_of(x, q, k, v, backend),
        x.cu_seqlens,
        x.max_seqlen,
        queries=slice(0, 1),
        per_key_head=True,
        backend=backend,
    )
    scores = (received * v.norm(dim=2).mT).sum(0)
    keep = torch.rand(len(scores), generator=generator).to(DEVICE) < 0.3 + scores
    kept = merge_tokens(x, keep, backend=backend)
    for span, rows in zip(spans(lengths), kept.tokens.to_list(), strict=True):
        if span.stop > span.start:
            expected = (weights(q[span], k[span])[:, 0] * v[span].double().norm(dim=2).mT).sum(0)
            torch.testing.assert_close(scores[span].double(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(rows, x.values[span][keep[span]])


@every_backend
def test_prumerge(backend, generator):
    """Above a threshold of each image's own; the others into the survivor of nearest key, weighted by attention."""
    lengths = lengths_for(backend)
    x, q, k, v = inputs(generator, lengths)
    lse = lse_of(x, q, k, v, backend)
    scores = attention_received(q, k, lse, x.cu_seqlens, x.max_seqlen, queries=slice(0, 1), backend=backend)
    bounds = torch.stack(
        [scores[s].quantile(0.75) if s.stop > s.start else scores.new_zeros(()) for s in spans(lengths)]
    )
    keep = top_tokens(scores, None, x.cu_seqlens, threshold=bounds, protected=1)
    into = nearest_kept(k, keep, x.cu_seqlens, x.max_seqlen, backend=backend)
    merged = merge_tokens(x, into, weights=scores, backend=backend)
    for b, span in enumerate(spans(lengths)):
        if span.stop == span.start:
            continue
        p = weights(q[span], k[span])[:, 0].mean(0)
        kept = [i for i in range(len(p)) if i == 0 or scores[span][i] > bounds[b]]
        keys = F.normalize(k[span].double().flatten(1), dim=1)
        group = [kept.index(i) if i in kept else int((keys[kept] @ keys[i]).argmax()) for i in range(len(p))]
        expected = []
        for g in range(len(kept)):
            members = [i for i in range(len(p)) if group[i] == g]
            expected.append(p[members] @ x.values[span][members].double() / p[members].sum())
        torch.testing.assert_close(merged.tokens[b].double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@every_backend
def test_lightcompress(backend, generator):
    """No class token: the sum over all queries, mean over heads; whole units of 2 x 2 patches stay or go."""
    lengths = lengths_for(backend)
    x, q, k, v = inputs(generator, lengths)
    scores = attention_received(q, k, lse_of(x, q, k, v, backend), x.cu_seqlens, x.max_seqlen, backend=backend)
    keep = top_tokens(scores, 1, x.cu_seqlens, unit=4)
    kept = merge_tokens(x, keep, backend=backend)
    for span, rows in zip(spans(lengths), kept.tokens.to_list(), strict=True):
        if span.stop == span.start:
            assert len(rows) == 0
            continue
        expected = weights(q[span], k[span]).mean(0).sum(0)
        torch.testing.assert_close(scores[span].double(), expected, atol=2e-5, rtol=1e-5)
        best = int(expected.unflatten(0, (-1, 4)).sum(1).argmax())
        assert torch.equal(rows, x.values[span][4 * best : 4 * best + 4])


@every_backend
def test_video_pruning(backend, generator):
    """EVS: an exact number of a video's embeddings, by any score; how many stay of each frame, maybe none; positions."""
    frames = [4, 4, 4, 6, 6]  # of a video of three frames and one of two
    x = RaggedBatch(normal(generator, 24, 8), offsets(frames), 6)
    scores = torch.rand(24, generator=generator).to(DEVICE)
    scores[4:8] = -1.0  # nothing new in the second frame
    positions = torch.arange(72, device=DEVICE).reshape(3, 24)  # M-RoPE
    keep = top_tokens(scores, torch.tensor([5, 0], dtype=torch.int32, device=DEVICE), offsets([12, 12]))
    kept = merge_tokens(x, keep, carry=(positions.mT,), backend=backend)
    counts = kept.tokens.lengths.tolist()
    assert counts[1] == 0 and sum(counts[:3]) == 5 and counts[3:] == [0, 0]
    order = sorted(sorted(range(12), key=lambda i: -scores[i])[:5])
    assert torch.equal(kept.tokens.values[:5], x.values[order])
    assert torch.equal(kept.carried[0][:5].mT, positions[:, order])


@every_backend
def test_pixelprune(backend, generator):
    """A mask in units of four rows, and many tensors that are compacted alike in the same call."""
    lengths = [16, 8, 0]
    x = RaggedBatch(normal(generator, 24, 8), offsets(lengths), 16)
    units = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.bool, device=DEVICE)
    carry = (
        torch.arange(24, device=DEVICE),
        normal(generator, 24, 2, 5, dtype=torch.bfloat16),
        torch.rand(24, generator=generator).to(DEVICE) < 0.5,
        torch.randn(24, 3, generator=generator, dtype=torch.float64).to(DEVICE),
        torch.polar(torch.ones(24, 4), torch.rand(24, 4, generator=generator)).to(DEVICE),  # rotary factors
    )
    kept = merge_tokens(x, units.repeat_interleave(4), carry=carry, backend=backend)
    assert kept.tokens.lengths.tolist() == [8, 0, 0]
    rows = [0, 1, 2, 3, 12, 13, 14, 15]
    assert torch.equal(kept.tokens.values[:8], x.values[rows])
    for before, after in zip(carry, kept.carried, strict=True):
        assert torch.equal(after[:8], before[rows])


@every_backend
def test_naflex_pooling_and_mlp(backend, generator):
    """One query for each image over its own patches, images of different sizes; an MLP with tanh GELU."""
    lengths = [n for n in lengths_for(backend) if n]
    x, _, k, v = inputs(generator, lengths)
    probes = normal(generator, len(lengths), 2, 8)
    out, _ = attention(probes, k, v, offsets([1] * len(lengths)), x.cu_seqlens, 1, x.max_seqlen, backend=backend)
    for b, span in enumerate(spans(lengths)):
        p = (torch.einsum("hd,jhd->hj", probes[b].double(), k[span].double()) / math.sqrt(8)).softmax(-1)
        torch.testing.assert_close(
            out[b].double(), torch.einsum("hj,jhd->hd", p, v[span].double()), atol=1e-5, rtol=1e-5
        )
    weight, bias = normal(generator, 24, 16), normal(generator, 24)
    hidden = linear(x.values, weight, bias, x.cu_seqlens, activation="gelu_tanh", backend=backend)
    expected = F.gelu(x.values.double() @ weight.double().mT + bias.double(), approximate="tanh")
    torch.testing.assert_close(hidden.double(), expected, atol=2e-5, rtol=1e-5)


@every_backend
def test_no_bias_is_a_bias_of_zero(backend, generator):
    """Sizes of one change nothing. On the CPU but for rounding: without a bias it multiplies by the scale elsewhere."""
    lengths = lengths_for(backend)
    x, q, k, v = inputs(generator, lengths)
    call = (q, k, v, x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen)
    plain = attention(*call, backend=backend)
    for ours, biased in zip(
        plain, attention(*call, key_bias=torch.zeros(len(q), device=DEVICE), backend=backend), strict=True
    ):
        if backend == "cpu":
            torch.testing.assert_close(ours, biased, atol=2e-6, rtol=2e-6)
        else:
            assert torch.equal(ours, biased)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="the largest memory can be reset on Linux only")
def test_scores_need_no_matrix(generator):
    """At 16,384 tokens one head's matrix is 1 GiB; the operations stay below a tenth of it."""
    tokens = 16384
    q, k, v = torch.randn(3, tokens, 1, 16, generator=generator)
    cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32)

    def memory(kind):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(kind))  # KiB

    def peak(call):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = memory("VmRSS")
        call()
        return (memory("VmHWM") - before) / 2**10

    _, lse = attention(q, k, v, cu_seqlens, cu_seqlens, tokens, tokens)
    calls = [
        lambda: attention_with_importance(q, k, v, cu_seqlens, tokens),
        lambda: attention_received(q, k, lse, cu_seqlens, tokens),
        lambda: novelty(k, cu_seqlens, tokens),
    ]
    if peak(lambda: torch.zeros(2**25).add_(1)) < 100:  # a tenth of a matrix
        pytest.skip("this kernel's largest memory does not follow what was used")
    for call in calls:
        assert peak(call) < 100


@every_backend
def test_dropped_tokens_have_gradients_of_zero(backend, generator):
    """Zero and not missing, whatever a sample keeps: only what is protected, nothing, or all."""
    lengths = [5, 3, 0, 4]
    x, q, k, v = inputs(generator, lengths)
    leaves = [t.detach().clone().requires_grad_() for t in (x.values, q, k, v)]
    cu, most = x.cu_seqlens, x.max_seqlen
    out, lse = attention(*leaves[1:], cu, cu, most, most, backend=backend)
    scores = attention_received(*leaves[1:3], lse, cu, most, backend=backend)
    bounds = torch.tensor([9.0, 9.0, 9.0, -9.0], device=DEVICE)
    keep = top_tokens(scores.detach(), None, cu, threshold=bounds, protected=(torch.arange(12, device=DEVICE) == 0))
    merged = merge_tokens(RaggedBatch(leaves[0] + out.flatten(1), cu, most), keep, weights=scores, backend=backend)
    assert merged.tokens.lengths.tolist() == [1, 0, 0, 4]
    count = merged.tokens.num_tokens
    grads = torch.autograd.grad(merged.tokens.values[:count].square().sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    dropped = torch.arange(12, device=DEVICE)
    dropped = (dropped > 0) & (dropped < 8)
    assert (grads[0][dropped] == 0).all() and (grads[0][~dropped] != 0).any(1).all()
    assert (grads[1][dropped] == 0).all()  # as queries; as keys and values the kept token of their sample saw them
    assert (grads[3][5:8] == 0).all()


def rotate(t, position):
    """Rotary position embedding of [T, H, d] in float64."""
    angle = position[:, None].double() / 10.0 ** torch.arange(
        0, 1, 2 / t.shape[2], dtype=torch.float64, device=t.device
    )
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = t.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def test_generation_goes_on_after_pruning_the_prefill(generator):
    """A small decoder with grouped queries, pruned at layer 2 of 4: greedy tokens are those of a decoder that keeps all rows
    and hides the dropped keys from layer 2 on. Caches hold what was kept; the next position is the length of the prompt.
    """
    depth, at, width, heads, key_heads, words, steps = 4, 2, 32, 4, 2, 19, 12

    def table(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE) / math.sqrt(shape[-1])

    embed, head = table(words, width) * 5, table(words, width)
    layers = [(table(heads * 8, width), table(key_heads * 8, width), table(key_heads * 8, width), table(width, heads * 8))
              for _ in range(depth)]  # fmt: skip
    lengths = [20, 9]
    prompts = [torch.randint(0, words, (n,), generator=generator).to(DEVICE) for n in lengths]
    kept = [torch.rand(n, generator=generator).to(DEVICE) < 0.6 for n in lengths]
    for mask in kept:
        mask[-1] = True

    def project(x, layer, position):
        q, k, v = (F.linear(x, w).unflatten(1, (-1, 8)) for w in layer[:3])
        return rotate(q, position), rotate(k, position), v

    def oracle(prompt, mask):
        """All rows anew for every token, dropped keys hidden."""
        tokens, visible, words_out = prompt, mask, []
        for _ in range(steps):
            x, position = embed[tokens], torch.arange(len(tokens), device=DEVICE)
            for i, layer in enumerate(layers):
                q, k, v = project(x, layer, position)
                k, v = (t.repeat_interleave(heads // key_heads, 1) for t in (k, v))
                s = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(8)
                hidden = (position[None] > position[:, None]) | (~visible & (i >= at))[None] & (
                    position[None] != position[:, None]
                )
                out = torch.einsum("hij,jhd->ihd", s.masked_fill(hidden, -math.inf).softmax(-1), v)
                x = x + F.linear(out.flatten(1), layer[3])
            words_out.append(int(F.linear(x[-1], head).argmax()))
            tokens = torch.cat([tokens, tokens.new_tensor(words_out[-1:])])
            visible = torch.cat([visible, visible.new_ones(1)])
        return words_out

    x = RaggedBatch.from_list([embed[p] for p in prompts])
    position = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])
    caches = []
    for i, layer in enumerate(layers):
        if i == at:
            merged = merge_tokens(x, torch.cat(kept), carry=(position,))
            x, (position,) = merged.tokens, merged.carried
        q, k, v = project(x.values, layer, position)
        caches.append([list(x.with_values(t).to_list()) for t in (k, v)])
        out, _ = attention(q, k, v, x.cu_seqlens, x.cu_seqlens, x.max_seqlen, x.max_seqlen, causal=True)
        x = x.with_values(x.values + F.linear(out.flatten(1), layer[3]))
    last = F.linear(x.values[x.cu_seqlens[1:].long() - 1], head).argmax(1)
    said = [[int(word)] for word in last]
    assert [len(t) for t in caches[0][0]] == lengths and [len(t) for t in caches[at][0]] == [int(m.sum()) for m in kept]
    for step in range(steps - 1):
        y, position = embed[last], torch.tensor(lengths, device=DEVICE) + step
        for layer, cache in zip(layers, caches, strict=True):
            q, k, v = project(y, layer, position)
            for held, new in zip(cache, (k, v), strict=True):
                held[:] = [torch.cat([rows, new[b : b + 1]]) for b, rows in enumerate(held)]
            keys, values = (RaggedBatch.from_list(held) for held in cache)
            out, _ = attention(q, keys.values, values.values, offsets([1, 1]), keys.cu_seqlens, 1, keys.max_seqlen)
            y = y + F.linear(out.flatten(1), layer[3])
        last = F.linear(y, head).argmax(1)
        for b, word in enumerate(last.tolist()):
            said[b].append(word)
    assert said == [oracle(p, m) for p, m in zip(prompts, kept, strict=True)]
    unpruned = [oracle(p, torch.ones_like(m)) for p, m in zip(prompts, kept, strict=True)]
    assert said != unpruned  # what was dropped mattered


def test_new_lengths_compile_once(generator):
    """Scores, choice, merge and back for twenty lists of lengths: two compilations at most."""
    compiled = []

    def counting(module, example):
        compiled.append(module)
        return module.forward

    def prune(q, k, v, x, cu_seqlens, bound):
        batch = RaggedBatch(x, cu_seqlens, bound)
        out, lse = attention(q, k, v, cu_seqlens, cu_seqlens, bound, bound, backend="reference")
        scores = attention_received(q, k, lse, cu_seqlens, bound, backend="reference")
        into = nearest_kept(k, top_tokens(scores, 2, cu_seqlens), cu_seqlens, bound, backend="reference")
        merged = merge_tokens(batch.with_values(x + out.flatten(1)), into, exact=False, backend="reference")
        return unmerge(merged.tokens.values, merged.rows, cu_seqlens, backend="reference")

    torch._dynamo.reset()
    call = torch.compile(prune, fullgraph=True, dynamic=True, backend=counting)
    for _ in range(20):
        lengths = torch.randint(0, 9, (3,), generator=generator).tolist()
        q, k, v = normal(generator, 3, sum(lengths) + 2, 2, 8)
        x = normal(generator, sum(lengths) + 2, 16)
        args = (q, k, v, x, offsets(lengths), 8)
        torch.testing.assert_close(call(*args)[: sum(lengths)], prune(*args)[: sum(lengths)])
    assert 1 <= len(compiled) <= 2
