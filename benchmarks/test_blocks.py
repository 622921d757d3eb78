"""ViT-B blocks: half the tokens, twelve blocks that each drop 5 %, and batches whose samples kept different numbers."""

from __future__ import annotations

import baselines
import blocks
import inputs
import pytest
import torch
from measure import DTYPES, ON_GPU, Comparison, Goal, WrongAnswer, relative_error, require

from madtp.config import VisionConfig
from madtp.flops import vit
from madtp.pruning import Tokens
from madtp_kernels import RaggedBatch

BATCH = inputs.choose(64, 8, 2)
BATCHES = inputs.choose([1, 8, 32, 128], [1, 8, 32], [1, 2])
DEPTH, LENGTH = inputs.DEPTH, inputs.LENGTH
HALF = (LENGTH + 1) // 2

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def block_gflop(lengths, left=None) -> float:
    """Arithmetic of one block, a multiply-add counted as 2, for samples of these lengths."""
    config = VisionConfig(depth=1)
    embedding = vit(config, [0, 0]).official
    left = lengths if left is None else left
    costs = (vit(config, [before, after]).official - embedding for before, after in zip(lengths, left, strict=True))
    return 2 * sum(costs)


def check_dense(dtype: str, block, tokens) -> None:
    """Our first block against plain PyTorch: no worse than plain PyTorch in this dtype is against float32."""
    length = tokens.max_seqlen
    ours = blocks.dense_call(block, tokens)().values
    wide = blocks.vision_transformer("float32", DEPTH).blocks[0]
    padded = tokens.values.view(-1, length, inputs.WIDTH)
    exact = baselines.dense_block(wide, padded.float()).flatten(0, 1)
    plain = baselines.dense_block(block, padded).flatten(0, 1)
    require(ours, exact, 2 * relative_error(plain, exact) + 1e-5, "dense block")


def check_pruned(dtype: str, block, tokens, guide, temperature) -> None:
    """Our block on the first sample against the same block on the reference backend."""
    one = RaggedBatch.from_list(tokens.to_list()[:1])
    ours = blocks.pruned_call(block, one, guide, temperature)()
    exact = blocks.pruned_call(block, one, guide, temperature, "reference")()
    compare_streams(ours, exact, dtype)


def compare_streams(ours, exact, dtype: str) -> None:
    """Same surviving tokens; in bfloat16 up to two in a hundred borderline ones may differ."""
    rows = [stream.num_tokens for stream in (ours, exact)]
    kept, expected = (set(stream.ids[:n].tolist()) for stream, n in zip((ours, exact), rows, strict=True))
    allowed = 0 if dtype == "float32" else max(2, 0.02 * len(expected))
    if len(kept ^ expected) > allowed:
        raise WrongAnswer(f"pruned: {len(kept ^ expected)} of {len(expected)} tokens are not the reference's")
    if kept == expected:
        rounding = 1e-4 if dtype == "float32" else 0.05
        require(ours.values[: rows[0]], exact.values[: rows[1]], rounding, "pruned block")


@each_dtype
def test_block_with_half_the_tokens(run, dtype):
    block = blocks.vision_transformer(dtype, DEPTH).blocks[0]
    guide = blocks.dictionary(dtype)
    whole = blocks.embedded(dtype, BATCH, DEPTH)
    half = blocks.subset(whole, [HALF] * BATCH)
    start = Tokens.start(half)
    with torch.inference_mode():
        temperature, left = blocks.temperature_for(block, start, guide, 0.95)
    padded = whole.values.view(BATCH, LENGTH, inputs.WIDTH)

    def check():
        check_dense(dtype, block, whole)
        check_pruned(dtype, block, half, guide, temperature)

    candidates = {
        "half the tokens, pruning": blocks.pruned_call(block, half, guide, temperature),
        "half the tokens": blocks.dense_call(block, half),
        "dense": blocks.dense_call(block, whole),
        "dense, plain PyTorch": lambda: baselines.dense_block(block, padded),
    }
    run(
        Comparison(
            "block with half the tokens",
            candidates,
            check,
            {"dtype": dtype, "batch": f"{BATCH} x {HALF}", "share_left": blocks.share_left(start, left)},
            gflop=block_gflop(half.lengths.tolist(), left.lengths.tolist()),
            goals=(Goal("half the tokens, pruning", "dense", 0.56),),
        )
    )


@pytest.mark.parametrize("batch", BATCHES)
@each_dtype
def test_twelve_blocks_that_drop_five_percent_each(run, dtype, batch):
    stack = blocks.vision_transformer(dtype, DEPTH).blocks
    guide = blocks.dictionary(dtype)
    temperatures = blocks.gentle_temperatures(DEPTH, 0.95)
    tokens = blocks.embedded(dtype, batch, DEPTH)
    with torch.inference_mode():
        final = blocks.run_blocks(stack, blocks.embedded(dtype, 1, DEPTH), guide, temperatures)

    def check():
        check_dense(dtype, stack[0], blocks.embedded(dtype, 1, DEPTH))
        if dtype == "float32":
            one = blocks.embedded(dtype, 1, DEPTH)
            exact = blocks.run_blocks(stack, one, guide, temperatures, "reference")
            compare_streams(final, exact, dtype)
        else:
            check_pruned(dtype, stack[0], blocks.embedded(dtype, 1, DEPTH), guide, temperatures[0])

    long = batch > 8 and not ON_GPU
    run(
        Comparison(
            "twelve blocks",
            {
                "dropping 5 % each": lambda: blocks.run_blocks(stack, tokens, guide, temperatures),
                "dense": lambda: blocks.run_blocks(stack, tokens, None, [0.0] * DEPTH),
            },
            check,
            {"dtype": dtype, "batch": f"{batch} x {LENGTH}", "share_left": final.num_tokens / LENGTH},
            goals=(Goal("dropping 5 % each", "dense", 1.0),),
            min_rounds=1 if long else 2,
            warm_up=not long,
        )
    )


@pytest.mark.parametrize("spread", [0.0, 0.25, 0.5])
@each_dtype
def test_samples_that_kept_different_numbers(run, dtype, spread):
    """One dense block on samples of half the tokens on average: ragged, and padded to the largest as batch-maximum code does."""
    block = blocks.vision_transformer(dtype, DEPTH).blocks[0]
    whole = blocks.embedded(dtype, BATCH, DEPTH)
    lengths = inputs.spread_lengths(BATCH, HALF, spread)
    ragged = blocks.subset(whole, lengths)
    largest = blocks.subset(whole, [max(lengths)] * BATCH)
    padded, mask = ragged.to_padded()
    mask = None if spread == 0 else mask[:, None, None]

    def check():
        ours = blocks.dense_call(block, ragged)().values
        plain = baselines.dense_block(block, padded, mask)[ragged.to_padded()[1]]
        require(ours, plain, 1e-5 if dtype == "float32" else 0.02, "ragged block")

    run(
        Comparison(
            "spread of kept counts",
            {
                "ragged": blocks.dense_call(block, ragged),
                "batch maximum": blocks.dense_call(block, largest),
                "padded, plain PyTorch": lambda: baselines.dense_block(block, padded, mask),
            },
            check,
            {"dtype": dtype, "batch": f"{BATCH} x {HALF}", "spread": spread, "largest": max(lengths)},
            gflop=block_gflop(lengths),
        )
    )
