"""What chooses tokens is launched before anything waits for the rows themselves."""

import contextlib
import dataclasses
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from madtp.pruning import Tokens
from madtp.pruning.base import LateTokens
from madtp_kernels import RaggedBatch, beside, merge_redundant, prune
from madtp_kernels.beside import Pending, late


class Stream:
    """A stream that keeps what is asked of it."""

    def __init__(self, name, said):
        self.name, self.said, self.device, self.cuda_stream = name, said, None, 7

    def wait_stream(self, other):
        self.said.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def said(monkeypatch):
    """What two streams, the current one and the second, are asked for, in order."""
    said = []
    current, second = Stream("current", said), Stream("second", said)
    streams = [current]

    @contextlib.contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(beside, "_stream_beside", lambda device, stream: second)
    return said


def test_work_beside_begins_after_what_was_recorded_and_is_waited_for_once(said, monkeypatch):
    x = torch.zeros(1)
    assert beside.beside(x, lambda: 4) == (4, beside.DONE) and not said
    monkeypatch.setattr(beside, "recorded", lambda x: True)
    result, pending = beside.beside(x, lambda: said.append(torch.cuda.current_stream(x.device).name) or 5)
    assert result == 5
    pending.join(), pending.join()
    assert said == ["second waits for current", "second", "current waits for second"]


def test_what_the_work_reads_lives_until_it_is_waited_for(said, monkeypatch):
    """Else its memory would go to the next tensor of the stream that made it, which the work does not wait for."""
    monkeypatch.setattr(beside, "recorded", lambda x: True)
    x = torch.zeros(1)
    alive = weakref.ref(x)
    _, pending = beside.beside(x, partial(len, x))
    del x
    assert alive() is not None
    pending.join()
    assert alive() is None


def tokens_of(pending):
    batch = RaggedBatch.from_list([torch.randn(3, 4), torch.randn(2, 4)])
    return LateTokens.of(Tokens.start(batch), pending), batch


def test_late_tokens_wait_when_their_values_are_read_and_not_before():
    joined = []
    tokens, batch = tokens_of(SimpleNamespace(join=lambda: joined.append(1)))
    assert (tokens.device, tokens.dtype, tokens.batch_size) == (batch.device, batch.dtype, 2)
    assert torch.equal(tokens.free, torch.tensor([False, True, True, False, True])) and not joined
    assert tokens.values is batch.values and joined
    others = tokens.with_values(batch.values), tokens.survivors(batch, tokens.ids, None), tokens.joined()
    for other in (*others, dataclasses.replace(tokens, prefix=2)):
        assert type(other) is Tokens and "pending" not in other.__dict__


def test_only_a_device_is_waited_for_later():
    """On a CPU nothing runs beside: whoever gets the values may read them."""
    joined = []
    tokens, batch = tokens_of(SimpleNamespace(join=lambda: joined.append(1)))
    assert late(tokens) == (batch.values, None) and joined
    assert late(batch) == (batch.values, None)
    assert Pending(None, None).join() is None


@pytest.mark.parametrize("groups", [None, torch.zeros(2, dtype=torch.int32)])
def test_rows_are_waited_for_between_scoring_and_compaction(groups):
    steps = []

    def score(*_):
        steps.append("scores")
        return (None, None, None) if groups is None else (None, None)

    def compact(*_):
        steps.append("rows")
        raise StopIteration

    tensors = (*[None] * 8, groups, *[None] * 5)
    with pytest.raises(StopIteration):
        prune.__globals__["_on_gpu"](score, compact, tensors, 3, 1.0, -1, 0.0, False, lambda: steps.append("wait"))
    assert steps == ["scores", "wait", "rows"]


def test_rows_are_waited_for_between_the_choice_and_merging():
    steps, keys, flags = [], torch.randn(5, 4), torch.ones(5, dtype=torch.bool)

    def step(name, result):
        def run(*_):
            steps.append(name)
            if result is None:
                raise StopIteration
            return result

        return run

    tensors = (
        torch.randn(5, 4),
        keys,
        keys[:, 0],
        None,
        None,
        flags,
        None,
        torch.tensor([0, 5], dtype=torch.int32),
        None,
        None,
    )
    stages = (
        step("pairs", (None, None)),
        step("choice", (None, (None,) * 6)),
        step("nearest", flags),
        step("rows", None),
    )
    with pytest.raises(StopIteration):
        merge_redundant.__globals__["_on_gpu"](
            *stages,
            tensors,
            (),
            lambda: steps.append("wait"),
            5,
            (0.25, 1.0, 0.3),
            (None, 1.0, None, None, 0),
            0.0,
            False,
            False,
        )
    assert steps == ["pairs", "choice", "nearest", "wait", "rows"]
