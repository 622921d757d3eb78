"""Each example against its method's formula, written here on its own in plain PyTorch: sample by sample, in float64.

Uneven batches. The seed is fixed: in float32 another order of sums could decide a near tie between two tokens.
"""

import importlib.util
import math
import runpy
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, offsets

from madtp_kernels import RaggedBatch, attention

EXAMPLES = Path(__file__).parent.parent / "examples"
LENGTHS = [41, 1, 23, 0, 2, 64]
TOKENS = sum(LENGTHS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def example(name):
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def inputs(dtype, heads=4, key_heads=4, causal=False):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, 16, generator=generator).to(DEVICE, dtype)
    q = torch.randn(TOKENS, heads, 8, generator=generator).to(DEVICE, dtype)
    k, v = torch.randn(2, TOKENS, key_heads, 8, generator=generator).to(DEVICE, dtype)
    cu_seqlens = offsets(LENGTHS)
    _, lse = attention(q, k, v, cu_seqlens, cu_seqlens, 64, 64, causal=causal)
    return RaggedBatch(x, cu_seqlens, 64), q, k, lse


def samples(*tensors):
    """The tensors' rows of each sample, in float64, with the index of the first."""
    start = 0
    for length in LENGTHS:
        yield (
            start,
            *(
                t[start : start + length].double() if t.is_floating_point() else t[start : start + length]
                for t in tensors
            ),
        )
        start += length


def weights(q, k, causal=False):
    """The attention matrix [H, L, L]."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    return (s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -math.inf) if causal else s).softmax(-1)


def check(batch, expected):
    assert batch.lengths.tolist() == [len(rows) for rows in expected]
    for ours, theirs in zip(batch.to_list(), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@every_dtype
def test_evit(dtype):
    x, q, k, lse = inputs(dtype)
    expected = []
    for _, x_b, q_b, k_b in samples(x.values, q, k):
        n = len(x_b) - 1
        if n < 1:
            expected.append(x_b)
            continue
        score = weights(q_b, k_b)[:, 0, 1:].mean(0)
        best = score.topk(math.ceil(0.7 * n)).indices.sort().values
        rest = [i for i in range(n) if i not in best.tolist()]
        fused = [(score[rest, None] * x_b[1:][rest]).sum(0)[None]] if rest else []
        expected.append(torch.cat([x_b[:1], x_b[1:][best], *fused]))
    check(example("evit")(x, q, k, lse, 0.7).tokens, expected)


@every_dtype
def test_tome(dtype):
    x, _, k, _ = inputs(dtype)
    sizes = (1 + torch.arange(TOKENS, device=DEVICE) % 3).float()
    expected, expected_sizes = [], []
    for _, x_b, k_b, s_b in samples(x.values, k, sizes):
        metric = torch.nn.functional.normalize(k_b.mean(1), dim=-1)
        a, b = metric[::2], metric[1::2]
        r = min(6, (len(x_b) - 1) // 2)
        values, mass = (s_b[:, None] * x_b).clone(), s_b.clone()
        gone = []
        if r > 0:
            scores = a @ b.mT
            scores[0] = -math.inf  # the class token
            best, partner = scores.max(1)
            for i in best.argsort(descending=True)[:r].tolist():
                values[2 * partner[i] + 1] += values[2 * i]
                mass[2 * partner[i] + 1] += mass[2 * i]
                gone.append(2 * i)
        stays = [i for i in range(len(x_b)) if i not in gone]
        expected.append((values / mass[:, None])[stays])
        expected_sizes.append(mass[stays])
    merged = example("tome")(x, k, sizes, 6)
    check(merged.tokens, expected)
    check(merged.tokens.with_values(merged.sizes), expected_sizes)


@every_dtype
def test_fastv(dtype):
    """Grouped queries; two images in some prompts, none in others; text between them."""
    x, q, k, lse = inputs(dtype, heads=4, key_heads=2, causal=True)
    position = torch.cat([torch.arange(length) for length in LENGTHS]).to(DEVICE)
    is_image = ((position >= 3) & (position < 20)) | ((position >= 30) & (position < 50))
    expected, expected_ids = [], []
    for _, x_b, q_b, k_b, image, ids in samples(x.values, q, k, is_image, position):
        keep = (~image).clone()
        if image.any():
            score = weights(q_b, k_b, causal=True)[:, -1].mean(0)
            candidates = image.nonzero()[:, 0]
            keep[candidates[score[candidates].topk(round(len(candidates) * (1 - 0.6))).indices]] = True
        expected.append(x_b[keep])
        expected_ids.append(ids[keep])
    kept = example("fastv")(x, q, k, lse, is_image, position, 0.6)
    check(kept.tokens, expected)
    assert torch.equal(kept.carried[0], torch.cat(expected_ids)) and kept.carried[0].dtype == torch.int64


@every_dtype
def test_visionzip(dtype):
    x, q, k, lse = inputs(dtype)
    expected = []
    for _, x_b, q_b, k_b in samples(x.values, q, k):
        if len(x_b) == 0:
            expected.append(x_b)
            continue
        score = weights(q_b, k_b)[:, 0, 1:].sum(0)
        dominant = [0, *(1 + score.topk(min(8, len(score))).indices).tolist()]
        rest = [i for i in range(len(x_b)) if i not in dominant]
        targets = rest[:: max(1, len(rest) // 5)][:5]
        metric = k_b.mean(1)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        groups = {t: [] for t in targets}
        for i in rest:
            if i not in targets:
                groups[max(targets, key=lambda t, i=i: float(metric[i] @ metric[t]))].append(i)
        contextual = {t: x_b[t] + x_b[g].sum(0) / max(1, len(g)) for t, g in groups.items()}
        expected.append(torch.stack([contextual.get(i, x_b[i]) for i in sorted([*dominant, *targets])]))
    check(example("visionzip")(x, q, k, lse, 8, 5), expected)


@pytest.mark.parametrize("window", [6, 1])  # with one, neighbours beyond the end of a sample would count
@every_dtype
def test_snapkv(dtype, window):
    _, q, k, lse = inputs(dtype, heads=4, key_heads=2, causal=True)
    got = example("snapkv")(q, k, lse, offsets(LENGTHS), 64, capacity=16, window=window, kernel=5)
    for start, q_b, k_b in samples(q, k):
        length = len(q_b)
        keep = torch.ones(2, length, dtype=torch.bool, device=DEVICE)
        if length >= 16:
            votes = weights(q_b, k_b, causal=True)[:, -window:, :-window].sum(1)  # [H, L - w]
            votes = torch.nn.functional.avg_pool1d(votes, 5, stride=1, padding=2).unflatten(0, (2, 2)).mean(1)
            keep[:, :-window] = False
            keep.scatter_(1, votes.topk(16 - window, dim=1).indices, True)
        assert torch.equal(got[:, start : start + length], keep)


@every_dtype
def test_dynamicvit(dtype):
    x, *_ = inputs(dtype)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    expected = []
    for _, x_b in samples(x.values):
        score = x_b[1:] @ direction.double()
        best = score.topk(int(0.6 * len(score))).indices.sort().values
        expected.append(torch.cat([x_b[:1], x_b[1:][best]]))
    check(example("dynamicvit")(x, lambda rows: rows @ direction, 0.6).tokens, expected)


PRUNERS = [
    path for path in sorted(EXAMPLES.glob("*.py")) if not path.stem.startswith(("ray_", "daft_"))
]  # test_ray, test_daft


@pytest.mark.parametrize("path", PRUNERS, ids=lambda path: path.stem)
def test_an_example_runs_and_is_short(path, capsys):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.startswith(("tokens: [", "entries: ["))
