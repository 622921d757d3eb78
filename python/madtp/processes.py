"""The processes that work on one job together, as `torchrun` starts them. In a process alone everything here does
nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.nn.functional import all_gather

__all__ = [
    "from_first",
    "gathered",
    "gathered_lists",
    "gathered_rows",
    "joined",
    "mean_over_processes",
    "processes",
    "rank",
    "wait",
]


def processes() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextlib.contextmanager
def joined(device: str, timeout: timedelta | None = None) -> Iterator[str]:
    """Join the processes that `torchrun` started, if it did.

    Args:
        device: "cpu", "cuda", ...; each process gets a GPU of its own.
        timeout: how long processes wait for each other; PyTorch's default without one.

    Yields:
        The device of this process.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def gathered(x: Tensor) -> Tensor:
    """Rows ``[B, ...]`` of all processes, in their order, ``[W * B, ...]``; gradients find their way back to each."""
    if processes() == 1:
        return x
    return torch.cat(all_gather(x.contiguous()))


def gathered_rows(x: Tensor) -> Tensor:
    """Rows ``[B, ...]`` of all processes, in their order, where each may have another number; without gradient."""
    if processes() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(processes())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    longest = int(max(counts))
    padded = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded.contiguous())
    return torch.cat([rows[: int(count)] for rows, count in zip(everyone, counts, strict=True)])


def gathered_lists(items: Sequence) -> list:
    """The items of all processes, those of the first one first."""
    if processes() == 1:
        return list(items)
    shares: list[Any] = [None] * processes()
    dist.all_gather_object(shares, list(items))
    return [item for share in shares for item in share]


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor without gradient over all processes."""
    if processes() > 1:
        dist.all_reduce(x)
        x = x / processes()
    return x


def from_first(value: Any) -> Any:
    """What the first process says."""
    if processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wait() -> None:
    """Until all processes are here."""
    if processes() > 1:
        dist.barrier()
