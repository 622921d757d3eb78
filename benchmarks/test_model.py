"""The whole real-size BLIP-NLVR: our dense model against plain PyTorch, pruned ones against the dense, batches against singles."""

from __future__ import annotations

import functools

import inputs
import nlvr
import pytest
import torch
from measure import DTYPES, ON_GPU, Comparison, Goal, WrongAnswer, relative_error, require

BATCHES = inputs.choose([1, 8, 16, 64], [1, 8, 16], [1, 2])
REDUCTIONS = (0.5, 0.8)  # of the official GFLOPs
PLAIN_UP_TO = 64 if ON_GPU else 8  # plain PyTorch at larger batches costs minutes on a CPU and shows nothing new


def name_of(reduction: float) -> str:
    return f"pruned {reduction:.0%}"


@functools.cache
def check(dtype: str) -> None:
    """Two pairs dense against plain PyTorch; one pruned against the reference backend, token by token in float32."""
    with torch.inference_mode():
        sample = nlvr.pairs(dtype, 2)
        exact = nlvr.plain_answer("float32", nlvr.pairs("float32", 2))
        plain = nlvr.plain_answer(dtype, sample)
        dense = nlvr.answer(dtype, sample, 0.0).logits
        require(dense, exact, 2 * relative_error(plain, exact) + 1e-3, "dense model")
        sample = sample.take(0, 1)
        for reduction in REDUCTIONS:
            temperature = nlvr.temperature_for(reduction)
            ours = nlvr.answer(dtype, sample, temperature)
            exact = nlvr.answer(dtype, sample, temperature, backend="reference")
            if dtype == "float32":
                for name, theirs in (("vision", exact.vision), ("text", exact.text)):
                    for layer, (a, b) in enumerate(zip(getattr(ours, name), theirs, strict=True)):
                        if not torch.equal(*(record.ids[: int(record.cu_seqlens[-1])] for record in (a, b))):
                            raise WrongAnswer(f"{name_of(reduction)}: {name} layer {layer} keeps other tokens")
                require(ours.logits, exact.logits, 1e-3, name_of(reduction))
            else:
                # Borderline tokens may go either way in bfloat16, and later layers follow them.
                costs = [nlvr.gflops_per_pair(dtype, output, pruning=True) for output in (ours, exact)]
                if not abs(costs[0] / costs[1] - 1) < 0.05:
                    raise WrongAnswer(f"{name_of(reduction)}: {costs[0]:.1f} GFLOPs, the reference {costs[1]:.1f}")
                require(ours.logits, exact.logits, 0.3, name_of(reduction))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nlvr(run, dtype, batch):
    pairs = nlvr.pairs(dtype, batch)
    temperatures = {name_of(r): nlvr.temperature_for(r) for r in REDUCTIONS}
    outputs, singles = {}, [pairs.take(b, b + 1) for b in range(batch)]

    def ours(name: str, temperature: float, **options):
        def call():
            outputs[name] = nlvr.answer(dtype, pairs, temperature, **options)

        return call

    candidates = {"dense": ours("dense", 0.0)}
    candidates |= {name: ours(name, temperature) for name, temperature in temperatures.items()}
    if batch == BATCHES[1]:
        for name, temperature in temperatures.items():
            together = f"{name}, batch maximum"
            candidates[together] = ours(together, temperature, grouping="batch")
            candidates[f"{name}, one by one"] = functools.partial(nlvr.one_by_one, dtype, singles, temperature)
        # Dense, all pairs cost the same but for a few words: two of them stand for all.
        candidates["dense, two one by one"] = functools.partial(nlvr.one_by_one, dtype, singles[:2], 0.0)
    if batch <= PLAIN_UP_TO:
        candidates["dense, plain PyTorch"] = lambda: nlvr.plain_answer(dtype, pairs)

    def finish(comparison: Comparison) -> None:
        gflops = {
            name: nlvr.gflops_per_pair(dtype, output, pruning=name != "dense") for name, output in outputs.items()
        }
        comparison.facts["gflops_per_pair"] = gflops
        comparison.gflop = 2 * batch * gflops["dense"]
        goals = []
        if batch <= PLAIN_UP_TO and not ON_GPU:
            goals.append(Goal("dense", "dense, plain PyTorch", 0.95 if batch == 1 else 0.85))
        for name in temperatures:
            goals.append(Goal(name, "dense", gflops[name] / gflops["dense"] / 0.9 if batch > 1 else 1.0))
        if batch == BATCHES[1]:
            goals += [Goal(name, f"{name}, one by one", 1.0) for name in temperatures]
            goals.append(Goal("dense", "dense, two one by one", batch / 2))
        comparison.goals = tuple(goals)

    long = batch > 8 and not ON_GPU
    run(
        Comparison(
            "BLIP-NLVR",
            candidates,
            lambda: check(dtype),
            {"dtype": dtype, "batch": f"{batch} pairs", "pairs": batch, "temperature": temperatures},
            capture=False,
            finish=finish,
            min_rounds=1 if long else 2,
            warm_up=not long,
        )
    )


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nlvr_as_a_cuda_graph(run, dtype, batch):
    """Replays leave Python and its launch gaps out. Those of `madtp.predict` copy inputs and results and check weights."""
    pairs = nlvr.pairs(dtype, batch)
    candidates = {"dense": lambda: nlvr.answer(dtype, pairs, 0.0)}
    for reduction in REDUCTIONS:
        temperature = nlvr.temperature_for(reduction)
        candidates[name_of(reduction)] = functools.partial(nlvr.answer, dtype, pairs, temperature)
        product = functools.partial(nlvr.answer_by_graph, dtype, pairs, temperature)
        with torch.inference_mode():
            for _ in range(2):  # runs, records
                product()
        candidates[f"{name_of(reduction)}, madtp.graphs"] = product
    candidates["dense, plain PyTorch"] = lambda: nlvr.plain_answer(dtype, pairs)
    facts = {"dtype": dtype, "batch": f"{batch} pairs", "pairs": batch}
    replays = tuple(name for name in candidates if name.endswith("madtp.graphs"))
    run(Comparison("BLIP-NLVR as a CUDA graph", candidates, lambda: check(dtype), facts, synchronising=replays))
