"""Work beside other work, where a CUDA graph is recorded.

What chooses the tokens that stay (importance, scores, cosines) does not read what the projection of the attention's result gives, and
of one or a few samples neither fills a device. So the projection is recorded on a second stream; the graph is then free to run
both at once. Only the kernel that moves the chosen rows has to wait, and it waits on the device.

Outside of a recording nothing of the kind happens: there the host is what takes time, and two more events would cost it more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .ragged import RaggedBatch

_Result = TypeVar("_Result")


class Pending:
    """Work on another stream, which some stream has yet to wait for.

    It holds ``work``, and hence the tensors that this reads: the memory of one that is dropped is given to the next that asks, on the
    stream that made it, which does not wait.
    """

    __slots__ = ("stream", "work")

    def __init__(self, stream: torch.cuda.Stream | None, work: Callable | None) -> None:
        self.stream, self.work = stream, work

    def join(self) -> None:
        """Have what comes next on the current stream wait for it. Only the first call does something."""
        stream, self.stream, self.work = self.stream, None, None
        if stream is not None:
            torch.cuda.current_stream(stream.device).wait_stream(stream)


DONE = Pending(None, None)
"""Work that nobody has to wait for."""


@functools.cache
def _stream_beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    """One for each that records: memory that such a stream took is reused on it alone."""
    return torch.cuda.Stream(device)


def recorded(x: Tensor) -> bool:
    """Whether what is launched for this tensor becomes part of a graph, without gradients."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and torch.cuda.is_current_stream_capturing()
    )


def beside(x: Tensor, work: Callable[[], _Result]) -> tuple[_Result, Pending]:
    """Record ``work`` on a second stream, after all that was recorded so far and beside what comes next; or do it now, where what
    is launched for ``x`` is not being recorded.

    Whoever reads its result calls ``join`` first.
    """
    if not recorded(x):
        return work(), DONE
    current = torch.cuda.current_stream(x.device)
    second = _stream_beside(x.device, current.cuda_stream)
    second.wait_stream(current)
    with torch.cuda.stream(second):
        result = work()
    return result, Pending(second, work)


def late(x: RaggedBatch) -> tuple[Tensor, Callable[[], None] | None]:
    """The values of a batch, and what has to be called before a kernel that reads them is launched, if anything has."""
    pending = x.__dict__.get("pending")
    if pending is None or not x.__dict__["values"].is_cuda:
        return x.values, None
    return x.__dict__["values"], pending.join
