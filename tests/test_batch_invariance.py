"""A sample's result does not depend on its neighbours: alone, in a batch of 32, and in a permuted batch it is the same."""

import pytest
import torch
from helpers import (
    CASES,
    DEVICE,
    OPERATIONS,
    SIMILARITY,
    backends_here,
    clearance,
    interpreted,
    normal,
    run,
    take_samples,
)

from madtp import NLVRConfig
from madtp.config import TextConfig, VisionConfig
from madtp.tasks.nlvr.model import NLVR
from madtp.weights import randomize

UNEVEN = [
    577,
    1,
    0,
    2,
    33,
    64,
    65,
    3,
    128,
    1,
    17,
    40,
    0,
    5,
    260,
    9,
    2,
    2,
    31,
    100,
    12,
    7,
    1,
    50,
    3,
    64,
    20,
    4,
    0,
    6,
    90,
    15,
]
TEMPERATURES = [0.0, 1.0, 3.0, 10.0]

every_backend = pytest.mark.parametrize("backend", backends_here())


# ---- the operations


def pieces(op, case, backend):
    """Results of a batch, sample by sample."""
    results = run(op, case, backend)
    if op == "compact":
        cu = results[1].tolist()
        per_row = [results[0], *results[2:]]
        return [[r[a:b] for r in per_row] for a, b in zip(cu, cu[1:], strict=False)]
    cu = case["cu_seqlens_q" if op == "attention" else "cu_seqlens"].tolist()
    samples = []
    for b, (start, stop) in enumerate(zip(cu, cu[1:], strict=False)):
        if op in SIMILARITY:  # rows of the batch become positions in the sample
            whole = (r[start:stop] for r in results)
            samples.append([r.where(r < 0, r - start) if r.dtype == torch.int32 else r for r in whole])
            continue
        if op in ("attention_received", "lowest_tokens"):
            samples.append([results[0][..., start:stop]])
            continue
        first, second, *rest = results
        if op in ("attention", "attention_with_importance"):
            second = second[:, start:stop]
        else:
            second = second[b : b + 1] if op == "score_tokens" else second[start:stop]
        samples.append([first[start:stop], second, *(r[start:stop] for r in rest)])
    return samples


def check_same(op, ours, theirs, backend, what):
    for a, b in zip(ours, theirs, strict=True):
        if backend == "reference":
            # Matrix libraries choose their algorithm by address alignment; kernels may not.
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda m: f"{op}, {what}: {m}")
        else:
            assert torch.equal(a, b), f"{op}, {what}: largest difference {(a - b).abs().nan_to_num(0).max().item():.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OPERATIONS)
@every_backend
def test_same_sample_alone_and_in_a_batch(backend, op, dtype, generator):
    lengths = [9, 0, 1, 4, 20] if interpreted(backend) else UNEVEN
    options = {"compact": {"sizes": True, "norm": True, "protected": True}, "novelty": {"rank": True}}
    options |= dict.fromkeys(("nearest_kept", "match_tokens", "merge_scores", "lowest_tokens"), {})
    case = CASES[op](generator, lengths, dtype=dtype, **options.get(op, {"bias": True}))
    batch = pieces(op, case, backend)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    permuted = pieces(op, take_samples(case, order), backend)
    for position, sample in enumerate(order):
        check_same(op, permuted[position], batch[sample], backend, f"sample {sample} at position {position}")
    for sample in range(len(lengths)):
        alone = pieces(op, take_samples(case, [sample]), backend)
        check_same(op, alone[0], batch[sample], backend, f"sample {sample} of {lengths[sample]} tokens alone")


REFUSE_NAN = ("score_tokens", "compact", "lowest_tokens")


@pytest.mark.parametrize("op", [op for op in OPERATIONS if op not in REFUSE_NAN])
@every_backend
def test_a_broken_sample_breaks_no_other(backend, op, generator):
    """NaN in all that a sample brings leaves the bits of its neighbours."""
    lengths = [9, 3, 1, 4] if interpreted(backend) else [40, 17, 1, 70]
    case = CASES[op](generator, lengths)
    cu = case["cu_seqlens_q" if op == "attention" else "cu_seqlens"].tolist()
    broken = {
        name: value.clone() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in case.items()
    }
    for name, value in broken.items():
        if value is not case[name] and name != "order" and sum(lengths) in value.shape[:2]:
            (value.mT if name == "lse" else value)[cu[1] : cu[2]] = float("nan")
    whole, ours = pieces(op, case, backend), pieces(op, broken, backend)
    for sample in (0, 2, 3):
        check_same(op, ours[sample], whole[sample], backend, f"sample {sample} beside a broken one")


def test_attention_of_queries_over_other_keys_alone_and_in_a_batch(generator):
    keys = UNEVEN[::-1]
    for causal in (False, True):
        case = CASES["attention"](generator, UNEVEN, key_lengths=keys, causal=causal)
        batch = pieces("attention", case, None)
        for sample in range(0, len(UNEVEN), 3):
            alone = pieces("attention", take_samples(case, [sample]), None)
            torch.testing.assert_close(alone[0], batch[sample], atol=1e-5, rtol=1e-5)


# ---- BLIP-NLVR


SIZES = NLVRConfig(
    vision=VisionConfig(image_size=80, patch_size=8, embed_dim=96, depth=4, num_heads=4, sd_num=20, sd_dim=96),
    text=TextConfig(
        hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, vocab_size=200,
        max_position_embeddings=64, encoder_width=96,
    ),
    merge_from=2,
)  # fmt: skip
SAMPLES = 32
MARGIN = 5e-6
"""Relative distance from the threshold within which a decision may differ: matrix libraries round differently by batch size."""


@pytest.fixture(scope="module")
def model():
    model = NLVR(SIZES).to(DEVICE).eval()
    randomize(model, seed=1)
    # Where alignments are large against the temperature, the softmax singles out one token and the threshold is that token's
    # own score, up to rounding: a knife edge by construction.
    with torch.no_grad():
        model.space_dict.mul_(0.2)
    return model


def inputs(generator):
    """32 pairs of pictures of very different contrast, and texts of 1 to 40 tokens."""
    contrast = torch.logspace(-1, 0.3, SAMPLES, device=DEVICE)[torch.randperm(SAMPLES, generator=generator)]
    pixels = normal(generator, 2, SAMPLES, 3, 80, 80)
    # Smooth structure besides the noise, so that patches of a picture resemble each other to different degrees.
    coarse = torch.nn.functional.interpolate(normal(generator, 2 * SAMPLES, 3, 5, 5), size=80, mode="bilinear")
    pixels = coarse.unflatten(0, (2, SAMPLES)) + pixels * contrast[:, None, None, None]
    lengths = torch.randint(2, 41, (SAMPLES,), generator=generator).tolist()
    lengths[:3] = [1, 2, 40]
    texts = [torch.randint(1, 200, (length,), generator=generator) for length in lengths]
    return pixels, texts


def forward(model, pixels, texts, samples, temperature, backend):
    model.backend = backend
    with torch.inference_mode():
        return model(pixels[:, samples].flatten(0, 1), [texts[s] for s in samples], pruning=temperature)


def sample_of(out, position, count):
    """What is compared: every layer's surviving ids of the three streams, and the outputs of one sample."""
    streams = [(out.vision, position), (out.vision, position + count), (out.text, position)]
    ids = [
        record.ids[record.cu_seqlens[row] : record.cu_seqlens[row + 1]].tolist()
        for trace, row in streams
        for record in trace
    ]
    outputs = [out.logits[position], out.last_hidden_state[position]]
    outputs += [out.image_embeds[position], out.image_embeds[position + count]]
    return ids, min(clearance(trace, row) for trace, row in streams), outputs


@pytest.mark.parametrize("temperature", TEMPERATURES)
@every_backend
def test_nlvr_gives_the_same_answer_alone_and_in_a_batch(backend, temperature, model, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    pixels, texts = inputs(generator)
    everything = list(range(SAMPLES))
    out = forward(model, pixels, texts, everything, temperature, backend)
    batch = [sample_of(out, s, SAMPLES) for s in everything]
    order = torch.randperm(SAMPLES, generator=generator).tolist()
    out = forward(model, pixels, texts, order, temperature, backend)
    permuted = {s: sample_of(out, position, SAMPLES) for position, s in enumerate(order)}
    clear = [s for s in everything if batch[s][1] > MARGIN]
    assert len(clear) >= 0.9 * SAMPLES, f"{SAMPLES - len(clear)} of {SAMPLES} samples are on a knife edge"
    for s in clear:
        alone = sample_of(forward(model, pixels, texts, [s], temperature, backend), 0, 1)
        for what, other in (("alone", alone), ("permuted", permuted[s])):
            assert other[0] == batch[s][0], f"sample {s} {what} keeps other tokens"
            if backend == "cpu":  # to the bit, up to the answer
                assert all(map(torch.equal, other[2], batch[s][2])), f"sample {s} {what} has another answer"
                continue
            torch.testing.assert_close(
                other[2], batch[s][2], atol=1e-5, rtol=1e-5, msg=lambda m, s=s, w=what: f"{s} {w}: {m}"
            )
    if temperature:
        # The claim would be empty if nothing were pruned, or everything alike.
        lengths = torch.tensor([[len(ids) for ids in sample[0]] for sample in batch])
        first_left, last_left, last_right = lengths[:, 0], lengths[:, 3], lengths[:, 7]
        assert (last_left < 101).all() and (last_right < 101).all() and len(set(first_left.tolist())) > 6


def test_tied_batches_do_depend_on_their_neighbours(model, generator):
    """The official batch-maximum execution, which is offered for comparison, is what per-instance pruning replaces."""
    pixels, texts = inputs(generator)
    model.grouping = "batch"
    try:
        out = forward(model, pixels, texts, list(range(SAMPLES)), 2.0, None)
        alone = forward(model, pixels, texts, [0], 2.0, None)
    finally:
        model.grouping = "instance"
    for record in out.vision:
        assert len(set(record.kept.tolist())) == 1
    assert int(alone.vision[-1].kept[0]) < int(out.vision[-1].kept[0])
