"""Processes that turn rows into a model's inputs, so that reading and decoding keep neither Python nor the model
waiting.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import queue
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from .readers import Row

__all__ = ["Decoders", "Failure", "attempt", "default_workers"]


class Failure(NamedTuple):
    """Why a row has no result."""

    stage: str
    """"read", "decode" or "model"."""
    kind: str
    """Name of the exception."""
    reason: str


def attempt(prepare: Callable[[Row], object], row: Row) -> object | Failure:
    """What ``prepare`` makes of a row, or why it makes nothing."""
    if row.error is not None:
        return Failure("read", "ValueError", row.error)
    try:
        return prepare(row)
    except ValueError as error:
        return Failure("decode", type(error).__name__, getattr(error, "reason", None) or str(error))
    except Exception as error:  # whatever a single row brings about must not end the run
        return Failure("decode", type(error).__name__, str(error) or type(error).__name__)


def default_workers(device: str, processes: int = 1) -> int:
    """Decoding processes for each of so many processes with a model on this machine.

    Decoding a photograph takes a core about 5 ms, CLIP's smallest image encoder eight times as long on a CPU.
    """
    cores = len(os.sched_getaffinity(0)) // processes
    return max(1, cores // 8 if device == "cpu" else min(16, cores - 1))


class Decoders(contextlib.AbstractContextManager):
    """Answers ``submit(rows)`` with a future of what ``prepare`` makes of each, or its :class:`Failure`.

    A process that dies, as decoders written in C may, is replaced, and its rows are tried one by one; a row that ends
    two processes is a failure.

    Args:
        prepare: can be pickled; called in other processes.
        processes: how many; 0 makes do with threads of this one.
    """

    def __init__(self, prepare: Callable[[Row], object], processes: int) -> None:
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(processes or 8)
        self._workers: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(prepare) for _ in range(processes)]
        for worker in self._all:
            self._workers.put(worker)

    def __exit__(self, *_) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._all:
            worker.stop()

    def submit(self, rows: Sequence[Row]) -> Future[list]:
        """Begin with some rows."""
        return self._pool.submit(self._work if self._all else self._here, rows)

    def _here(self, rows: Sequence[Row]) -> list:
        return [attempt(self._prepare, row) for row in rows]

    def _work(self, rows: Sequence[Row]) -> list:
        worker = self._workers.get()
        try:
            try:
                return worker(rows)
            except _DiedError:
                return [self._single(worker, row, tries=2 if len(rows) > 1 else 1) for row in rows]
        finally:
            self._workers.put(worker)

    @staticmethod
    def _single(worker: _Worker, row: Row, tries: int) -> object:
        for _ in range(tries):
            try:
                return worker([row])[0]
            except _DiedError as error:
                code = error.args[0]
        return Failure("decode", "Died", f"decoding it ended two processes (exit code {code})")


class _DiedError(Exception):
    """A worker ended before its answer; with its exit code."""


class _Worker:
    """One process and the connection to it. Calls come from one thread at a time."""

    def __init__(self, prepare: Callable[[Row], object]) -> None:
        self._prepare, self._process, self._stopped = prepare, None, False

    def __call__(self, rows: Sequence[Row]) -> list:
        if self._process is None:
            self._start()
        try:
            self._connection.send(rows)
            return _receive(self._connection)
        except (EOFError, OSError) as error:
            if self._stopped:
                raise RuntimeError("the workers are stopped") from error
            self._process.join(5)
            code, self._process = self._process.exitcode, None
            raise _DiedError(code) from error

    def _start(self) -> None:
        # Forked from a process that has nothing but imported modules: no threads, no locks, no GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._prepare), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        try:
            _receive(self._connection)
        except (EOFError, OSError) as error:
            if self._stopped:
                raise RuntimeError("the workers are stopped") from error
            process.join(5)
            raise RuntimeError(
                f"a decoding process ended before it could begin (exit code {process.exitcode}); with --workers 0, "
                "images are decoded without one"
            ) from error

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(OSError):
                self._connection.close()


def _serve(connection, prepare: Callable[[Row], object]) -> None:
    """The life of a worker; it ends with the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has the model
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        _send(connection, None)  # ready: what ends it from now on is a row
        while True:
            _send(connection, [attempt(prepare, row) for row in connection.recv()])


class _Pickler(pickle.Pickler):
    """Tensors go as arrays, whose memory is not copied."""

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _send(connection, value: object) -> None:
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(value)
    connection.send((head.getvalue(), len(buffers)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def _receive(connection) -> object:
    head, count = connection.recv()
    # From bytearrays, since tensors can be written to.
    return pickle.loads(head, buffers=[bytearray(connection.recv_bytes()) for _ in range(count)])
