"""Host time of one pruned layer on the GPU path: Python, dispatcher and Triton's launcher, on a machine without a GPU.

    python benchmarks/host_time.py [--rounds N] [--profile] [--capability 90]

The layers of BLIP-NLVR run in bfloat16 on a few tokens in main memory that claim to lie on a GPU. Everything up to a launch
happens as it would there, Triton's specialisation and look-up of the compiled kernel included; the launch itself (some
4 us each, and 5 more of Python where Triton encodes descriptors for the copy engine) is left out, and so are PyTorch's flash
attention (some 20 us each) and every answer: results are undefined. What
PyTorch itself computes, such as an addition of a few rows, runs on the CPU, which costs about what its launch would.

Prints one line of JSON per layer: the least and the median of microseconds, the launches by name, and the operators of PyTorch
that compute something, each of which is a launch or several on a GPU. The first run compiles the kernels, which takes a minute.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import cProfile
import functools
import json
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from madtp.config import TextConfig
from madtp.pruning import MADTP, RankedNovelty, Tokens, ranked_novelty
from madtp.pruning import base as dtp
from madtp.pruning import madtp as rule
from madtp.text import Layer, TwinCrossAttention
from madtp.vision import Block
from madtp_kernels import RaggedBatch, backends, checks, compact, merge_redundant, merge_tokens, prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/kernels"))
from test_triton_aot import Target

MULTIPROCESSORS = 132
SAMPLES, TOKENS = 2, 8
WIDTH, ENTRIES = 768, 100
# Operators that describe or allocate memory, or that only call others.
FREE = frozenset(
    "alias as_strided chunk contiguous detach empty empty_like empty_strided expand expand_as flatten lift_fresh narrow "
    "new_empty permute promote_types reshape resize_ result_type scalar_tensor select slice split squeeze t to transpose "
    "unbind unflatten unsafe_split unsqueeze view view_as _reshape_alias _to_copy _unsafe_view".split()
)


@contextlib.contextmanager
def pretending(capability: int):
    """Tensors of the CPU take the GPU's path; yields a counter of the launches by kernel."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from madtp_kernels import triton_utils
    from madtp_kernels.attention import triton as attention
    from madtp_kernels.linear import triton as linear

    launches: collections.Counter[str] = collections.Counter()
    launch = JITFunction.run

    def count(self, *args, grid, warmup, **options):
        launches[self.__name__] += 1
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernel._run = functools.partial(count_one, self.__name__)  # how `triton_utils.launch` runs it
        return kernel

    def count_one(name, *args):
        launches[name] += 1

    def flash(q, k, v, *rest, **options):
        launches["flash attention"] += 1
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
            q.shape[1], q.shape[0], dtype=torch.float32
        )

    stand_ins = [
        (JITFunction, "run", count),
        (triton_utils, "_RUN", count),
        (torch.Tensor, "is_cuda", True),
        (torch.cuda, "current_device", lambda: None),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (triton_utils, "_multiprocessors", lambda device: MULTIPROCESSORS),
        (linear, "_copy_engine", lambda device: capability >= 90),
        (linear, "_architecture", lambda device: capability // 10),
        (attention, "capability", lambda device: divmod(capability, 10)),
        (attention, "_flash", lambda: (flash, {"num_splits": 1})),
        (checks, "may_read", lambda tensor: False),
        (dtp, "compact", functools.partial(compact, exact=False)),
        (dtp, "merge_tokens", functools.partial(merge_tokens, exact=False)),
        (rule, "prune", functools.partial(prune, exact=False)),
        (ranked_novelty, "merge_redundant", functools.partial(merge_redundant, exact=False)),
        (backends, "availability", lambda name, device_type: None),
        (backends, "_PREFERENCE", {"cpu": ("triton",)}),
    ]
    missing = object()
    before = [(owner, name, vars(owner).get(name, missing)) for owner, name, _ in stand_ins]
    driver.set_active(Target(capability))
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        yield launches
    finally:
        for owner, name, value in before:
            delattr(owner, name) if value is missing else setattr(owner, name, value)


def stream(samples: int = SAMPLES) -> Tokens:
    """Tokens in a buffer larger than they are."""
    values = torch.zeros(samples * TOKENS, WIDTH, dtype=torch.bfloat16)
    cu_seqlens = torch.arange(samples + 1, dtype=torch.int32) * (TOKENS - 1)
    return Tokens.start(RaggedBatch(values, cu_seqlens, TOKENS, bound=True))


def layers() -> dict[str, Callable[[], object]]:
    """A call of each kind of layer."""
    guide: tuple[Tensor, None] = (torch.zeros(ENTRIES, WIDTH, dtype=torch.bfloat16), None)
    config = TextConfig()
    vision = Block(WIDTH, 12, 4 * WIDTH, eps=1e-6).to(torch.bfloat16).eval()
    text = Layer(config, TwinCrossAttention(config, merges=True)).to(torch.bfloat16).eval()
    tokens, images = stream(), stream(2 * SAMPLES)
    ranked = RankedNovelty(thresholds=(0.5,))
    return {
        "vision, pruned": lambda: vision(tokens, guide, MADTP(5.0), 0),
        "vision, ranked novelty": lambda: vision(tokens, None, ranked, 0),
        "vision, dense": lambda: vision(tokens, None, MADTP(0.0), 0),
        "text, pruned": lambda: text(tokens, guide, MADTP(5.0), 0, others=(images,)),
        "text, dense": lambda: text(tokens, None, MADTP(0.0), 0, others=(images,)),
    }


def computed(call: Callable[[], object]) -> dict[str, int]:
    """The operators of PyTorch in a call that compute something, and how often."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    found: collections.Counter[str] = collections.Counter()

    def look(event) -> None:
        name = event.name.removeprefix("aten::")
        if event.name.startswith("aten::") and name not in FREE:
            found[name] += 1
            return
        for child in event.cpu_children:
            look(child)

    for event in profile.events():
        if event.cpu_parent is None:
            look(event)
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU to pretend: 80, 90 or 100")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by function")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode(), pretending(arguments.capability) as launches:
        for name, call in layers().items():
            call()  # compiles
            launches.clear()
            call()
            kernels = dict(launches)
            times = []
            for _ in range(arguments.rounds):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e6)
            facts = {"us_min": round(min(times), 1), "us": round(statistics.median(times), 1), "launches": kernels}
            facts["pytorch"] = computed(call)
            print(json.dumps({"layer": name, **facts}), flush=True)
            if arguments.profile:
                profile = cProfile.Profile()
                profile.enable()
                for _ in range(arguments.rounds):
                    call()
                profile.disable()
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
