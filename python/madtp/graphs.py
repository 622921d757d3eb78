"""CUDA graphs: a forward is recorded once per bucket of sizes and then replayed with a single launch.

A pruned forward is hundreds of short kernels: Python takes longer to launch them than a GPU takes to run them. It can
be recorded because the host knows every size in it. Pruned tokens stay in a buffer that would hold all of them, and
only the device knows how many there are. One recording therefore serves every batch that fits:

* A batch is filled up to 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, ... samples, which keeps graphs few and filling below a
  third of a large bucket. A filling sample has no image, and empty samples cost nothing. Its text has one token,
  because a text answers through its first token.
* Texts are bounded by the next multiple of 32 tokens. It is only a bound: layers take time for the tokens that are
  there.

:func:`run` records and replays automatically; :meth:`madtp.model.Model.capture` does so by hand. Not recorded:
the decoder that writes text, and the matching of pairs, whose sizes change from call to call in other ways.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import operator
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from madtp_kernels import RaggedBatch, backends, checks

from .pruning import PER_TOKEN, LayerTrace, Pruning, Tokens

__all__ = ["Captured", "Graphs", "run"]

_log = logging.getLogger("madtp")

LARGEST_BATCH = 256  # larger ones keep the GPU busy for longer than Python needs
TEXT_STEP = 32
MOST_GRAPHS = 16
MEMORY_SHARE = 0.25  # of the device, for all graphs of a model together


def run(call: Callable, *inputs) -> Any:
    """Call a model, replaying a CUDA graph where one can be used.

    The first call of a bucket runs eagerly, the second records it, later ones replay. The result has memory of its own.

    Args:
        call: a :class:`madtp.model.Model`, one of its methods, or a function bound to one. A bare tensor in its
            result is ``[B, ...]``, one row per sample.
        inputs: images ``[k * B, 3, S, S]``; texts, as a list or a ragged batch ``[T]``; other tokens, as a ragged
            batch.
    """
    model = call if isinstance(call, nn.Module) else getattr(call, "__self__", None)
    graphs = getattr(model, "graphs", None)
    return call(*inputs) if graphs is None else graphs.run(call, *inputs)


def batch_bucket(samples: int) -> int:
    """Samples that a batch is filled up to: the next power of two or, above 8, the next midpoint of two."""
    power = 1 << (samples - 1).bit_length()
    middle = power // 4 * 3
    return middle if power > 8 and samples <= middle else power


def text_bucket(length: int, most: int) -> int:
    """Bound of the text length: the next multiple of 32, or the most that the model takes."""
    return min(-(-length // TEXT_STEP) * TEXT_STEP, most)


# ---- one recording --------------------------------------------------------------------------------------------------


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """Makes graphs that share one memory pool on one device.

    The results of one graph may lie where another keeps intermediate values, so they are valid until the next replay.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):  # a pool belongs to the current device
            self.memory = torch.cuda.MemPool()  # lives on when all of its graphs are gone, unlike a `graph_pool_handle`
        # A pool reuses memory only within a stream, so all recordings are made on this one.
        self.stream = _recording_stream(device)
        self.done = torch.cuda.Event()
        self.limit = int(torch.cuda.get_device_properties(device).total_memory * MEMORY_SHARE)
        self.bytes = 0

    def record(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Record ``function``. The result replays it and returns the tensors that ``function`` returned."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()  # compiles kernels, chooses tiles, allocates workspaces: none of it can be recorded
            _run_without_waiting(function)
        current.wait_stream(self.stream)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        # A graph that is destroyed during a recording breaks it, and models with graphs are cyclic: nothing is
        # collected.
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            # The outer block restores the stream even if ending a failed recording raises. Other threads may go on
            # using the device, to load images for example.
            with (
                torch.cuda.stream(current),
                torch.cuda.graph(graph, pool=self.memory.id, stream=self.stream, capture_error_mode="thread_local"),
            ):
                results = function()
        except BaseException:
            self._abandon()
            raise
        finally:
            if collects:
                gc.enable()
        self.bytes += max(0, torch.cuda.memory_reserved(self.device) - before)

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def _abandon(self) -> None:
        """End allocation from the pool, which torch leaves open when CUDA refuses to end a recording."""
        try:
            torch._C._cuda_endAllocateToPool(self.device.index, self.memory.id)
        except RuntimeError:
            return  # the recording was ended in order
        torch._C._cuda_releasePool(self.device.index, self.memory.id)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Calls use the buffers one after the other, also when they are made on several streams."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.done)
            yield
            self.done.record(stream)

    def settle(self) -> None:
        """Wait until no recording is running, so that recordings can be dropped."""
        torch.cuda.synchronize(self.device)


def _run_without_waiting(function: Callable[[], Any]) -> None:
    """Run what is to be recorded, and raise if it waits for the device.

    A recording that waits fails too, but leaves torch's allocator and random numbers in a state of recording.

    Raises:
        RuntimeError: something waits.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # not "error": other threads may wait
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "called a synchronizing" in str(warning.message):  # not the one that says that the mode is a prototype
            raise RuntimeError(f"it waits for the device at {warning.filename}:{warning.lineno}")


class _Recording:
    """A recorded function and the buffers that it reads."""

    def __init__(
        self, recorder, model, function: Callable, inputs: Sequence[Tensor | RaggedBatch], batch: int, text_length: int
    ) -> None:
        self.batch, self.text_length, self.device = batch, text_length, model.device
        self.loaded = 0  # samples of the last batch
        self.raw = self.found = None  # what the last replay returned, and its tensors for a batch without filling
        samples, _ = _sizes(inputs)
        # Ordinary tensors can be overwritten inside and outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = [self._buffer(value, samples, model.dtype) for value in inputs]
            with recorder.turn():
                self._load(inputs, samples)
                self.replay = recorder.record(lambda: function(model, *self.buffers))

    def _buffer(self, value: Tensor | RaggedBatch, samples: int, dtype: torch.dtype) -> Tensor | RaggedBatch:
        device = self.device
        if isinstance(value, Tensor):
            images = len(value) // samples * self.batch
            pixels = torch.zeros(images, *value.shape[1:], dtype=dtype, device=device)
            if samples == self.batch:
                return pixels
            return RaggedBatch(pixels, torch.zeros(images + 1, dtype=torch.int32, device=device), 1, bound=True)
        length = self.text_length if _is_text(value) else value.max_seqlen
        rows = {
            name: torch.zeros(self.batch * length, *part.shape[1:], dtype=part.dtype, device=device)
            for name, part in _per_token(value).items()
        }
        starts = torch.zeros(self.batch + 1, dtype=torch.int32, device=device)
        fields = {"prefix": value.prefix} if isinstance(value, Tokens) else {}
        return type(value)(cu_seqlens=starts, max_seqlen=length, bound=True, **rows, **fields)

    def _load(self, inputs: Sequence[Tensor | RaggedBatch], samples: int) -> None:
        """Copy a batch into the buffers and fill it up. Does not wait for the device."""
        filling, device = self.batch - samples, self.device
        before, self.loaded = self.loaded, 0  # if this raises, nobody knows what the buffers hold
        for buffer, value in zip(self.buffers, inputs, strict=True):
            if isinstance(buffer, Tensor):
                buffer.copy_(value, non_blocking=True)
            elif isinstance(value, Tensor):
                # All images lie at the front, and each sample owns one but for the filling, which owns none. With
                # several images per sample (NLVR) come all first ones, their filling, then all second ones.
                buffer.values[: len(value)].copy_(value, non_blocking=True)
                if samples != before:  # else the offsets are there
                    row = torch.arange(len(buffer) + 1, dtype=torch.int32, device=device)
                    first = row // self.batch * samples
                    buffer.cu_seqlens.copy_(first + (row % self.batch).clamp(max=samples))
            else:
                buffer.cu_seqlens[: samples + 1].copy_(value.cu_seqlens)
                end = value.cu_seqlens[-1:]
                if filling:
                    steps = torch.arange(1, filling + 1, dtype=torch.int32, device=device) if _is_text(value) else 0
                    buffer.cu_seqlens[samples + 1 :].copy_(end + steps)
                if _is_text(value):
                    # Every row is looked up in the embedding: the filling and the rows beyond it repeat the last token.
                    rows = torch.arange(len(buffer.values), dtype=torch.int32, device=device)
                    torch.index_select(value.values, 0, torch.minimum(rows, end - 1), out=buffer.values)
                else:
                    # Tokens fill at most these rows; a bound buffer may have more.
                    rows = min(len(value.values), samples * value.max_seqlen)
                    for name, part in _per_token(value).items():
                        getattr(buffer, name)[:rows].copy_(part[:rows])
        self.loaded = samples

    def launch(self, inputs: Sequence[Tensor | RaggedBatch]) -> Any:
        """Start a replay for a batch that fits. What it returns is for :meth:`results`."""
        samples, _ = _sizes(inputs)
        with torch.inference_mode(False), torch.no_grad():
            self._load(inputs, samples)
            return samples, self.replay()

    def results(self, launched: Any, *, copy: bool) -> Any:
        """Results of a replay. Without ``copy`` they are valid until the next one."""
        samples, raw = launched
        full = samples == self.batch
        if full and not copy:
            return raw
        if raw is not self.raw:  # a graph writes the same tensors again and again
            self.raw, self.found = raw, None
        found = self.found if full else None
        if found is None:
            found = _Results(samples, self.batch)
            found.of(raw)
            if full:
                self.found = found
        return (found.copied() if copy else found).of(raw)


class _Results:
    """Takes the filling out of what a graph computed."""

    def __init__(self, samples: int, batch: int) -> None:
        self.samples, self.batch = samples, batch
        self.seen: dict[tuple, Tensor] = {}

    def copied(self) -> _Results:
        """The same with copies of all tensors that were seen, made by one launch per dtype."""
        copies = _Results(self.samples, self.batch)
        fresh = copies.seen = {key: torch.empty_like(tensor) for key, tensor in self.seen.items()}
        for dtype in {tensor.dtype for tensor in self.seen.values()}:
            keys = [key for key, tensor in self.seen.items() if tensor.dtype == dtype]
            torch._foreach_copy_([fresh[key] for key in keys], [self.seen[key] for key in keys])
        return copies

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, self._per_sample)
        if isinstance(value, (RaggedBatch, LayerTrace)):
            parts = {
                field.name: self._tensor(part, self._part_of(field.name)) if isinstance(part, Tensor) else part
                for field in dataclasses.fields(value)
                for part in [getattr(value, field.name)]
            }
            if isinstance(value, RaggedBatch):
                parts["bound"] = value.bound or self.samples < self.batch
            return type(value)(**parts)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.of, value))
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.of, value))
        if dataclasses.is_dataclass(value):
            return type(value)(*(self.of(getattr(value, field.name)) for field in dataclasses.fields(value)))
        return value

    def _part_of(self, field: str) -> Callable[[Tensor], Tensor] | None:
        """What takes the filling out of a field of tokens or of a trace; None where it has one row per token."""
        if field.startswith("cu_seqlens"):
            return self._offsets
        return self._per_sample if field in ("threshold", "protected_ids") else None

    def _tensor(self, value: Tensor, part: Callable[[Tensor], Tensor] | None) -> Tensor:
        """A tensor or a part of it. A tensor that occurs several times in the results does so again."""
        key = (id(value), part and part.__name__)
        if key not in self.seen:
            self.seen[key] = value if part is None or self.samples == self.batch else part(value)
        return self.seen[key]

    def _per_sample(self, value: Tensor) -> Tensor:
        """Rows ``[k * batch, ...]`` to ``[k * samples, ...]``."""
        return value.unflatten(0, (-1, self.batch))[:, : self.samples].flatten(0, 1)

    def _offsets(self, value: Tensor) -> Tensor:
        """Offsets of k * batch samples to those of k * samples. Filling between samples is empty: no row moves."""
        if len(value) == self.batch + 1:
            return value[: self.samples + 1]
        return torch.cat([self._per_sample(value[:-1]), value[-1:]])


def _per_token(value: RaggedBatch) -> dict[str, Tensor]:
    """What a batch of tokens holds for each of them."""
    return {name: part for name in PER_TOKEN if isinstance(part := getattr(value, name, None), Tensor)}


def _is_text(value: RaggedBatch) -> bool:
    return not value.dtype.is_floating_point


def _sizes(inputs: Sequence[Tensor | RaggedBatch]) -> tuple[int, int] | None:
    """Samples of a batch and the bound of its text length (0 without texts); None if the inputs do not fit together."""
    counts = {len(value) for value in inputs if isinstance(value, RaggedBatch)} or {len(value) for value in inputs}
    if len(counts) != 1:
        return None
    (samples,) = counts
    if not samples or any(len(value) % samples or not len(value) for value in inputs):
        return None
    texts = [value for value in inputs if isinstance(value, RaggedBatch) and _is_text(value)]
    return samples, max((text.max_seqlen for text in texts), default=0)


def _shapes(inputs: Sequence[Tensor | RaggedBatch], samples: int) -> tuple:
    """Every other size of the inputs."""
    return tuple(
        (len(value) // samples, value.shape[1:])
        if isinstance(value, Tensor)
        else (0 if _is_text(value) else value.max_seqlen, value.dtype, value.values.shape[1:], *_per_token(value))
        for value in inputs
    )


# ---- what a recording depends on ------------------------------------------------------------------------------------


def _settings(model) -> tuple:
    """What a forward depends on besides weights and inputs."""
    return (
        model.pruning, model.grouping, model.backend, backends.forced(), model.dtype,
        torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


class _Modules:
    """The modules and weights of a model when it was recorded.

    What weights hold does not matter: a replay reads them where they lie, as an eager forward does.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._model, self._own = model, [module.__dict__ for module in modules]
        self._hooks = [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
        self._hooks += [hooks for own in self._own for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"])]
        parts = (own[name] for own in self._own for name in ("_modules", "_parameters", "_buffers"))
        self._parts = [part for part in parts if part]
        self._held = self._now()
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        # A replay begins before anybody looks. It must find memory also if a parameter lies elsewhere by now.
        self._memory = [tensor.detach() for tensor in self._tensors]

    def _now(self) -> list:
        return [*chain.from_iterable(map(dict.values, self._parts))]

    def same(self) -> bool:
        """Whether the modules are the same, and the weights where they were. Called often: its loops run in C."""
        now = self._now()
        return (
            len(now) == len(self._held)
            and all(map(operator.is_, now, self._held))
            and [*map(Tensor.data_ptr, self._tensors)] == self._addresses
        )

    def reason(self) -> str | None:
        """Why a replay would differ from running the modules; None if it would not."""
        if self._model.training:
            return "the model is in training mode"
        if any(self._hooks):
            return "there are hooks on its modules"
        if any("forward" in own for own in self._own):
            return "a module has another forward"
        return None


@functools.cache
def _log_once(message: str) -> None:
    _log.warning(message)


# ---- the recordings of a model --------------------------------------------------------------------------------------


class Graphs:
    """The recordings of one model, which :func:`run` makes as needed. The least recently used ones are dropped.

    All of them share memory that is released only as a whole. So all are dropped when they exceed their share of the
    device's memory, and when modules or weights are replaced. Replaced weights keep their memory until the next call.

    Attributes:
        limit: how many are kept; 0 turns graphs off. Set by the environment variable `MADTP_GRAPHS`.
    """

    def __init__(self, recorder: Callable[[torch.device], Any] = CudaRecorder) -> None:
        self.limit = _limit()
        self._make_recorder, self._recorder = recorder, None
        self._recordings: OrderedDict[tuple, _Recording] = OrderedDict()
        self._seen: set[tuple] = set()
        self._refused: set[tuple] = set()
        self._modules: _Modules | None = None
        self._lock = threading.RLock()

    def __reduce__(self):
        """Copied and unpickled models start without recordings."""
        return Graphs, (self._make_recorder,)

    def __len__(self) -> int:
        return len(self._recordings)

    @property
    def bytes(self) -> int:
        """Device memory that the graphs hold, besides the buffers of their inputs."""
        return 0 if self._recorder is None else self._recorder.bytes

    def clear(self) -> None:
        """Drop all recordings but those that :meth:`capture` returned, and all that is known about sizes."""
        with self._lock:
            self._clear_recordings()
            self._seen.clear()
            self._refused.clear()
            self._modules = None

    def _clear_recordings(self) -> None:
        if self._recorder is not None:
            self._recorder.settle()
        self._recordings.clear()
        self._recorder = None

    def run(self, call: Callable, *inputs) -> Any:
        """See :func:`run`."""
        model, function = _parts(call)
        if not self.limit or model.device.type != self._make_recorder.device_type:
            if self._modules is not None:
                self.clear()
            return call(*inputs)
        reason, inputs = _reason(model, function), _prepared(model, inputs)
        sizes = _sizes(inputs)
        if reason is None and sizes is not None:
            samples, length = sizes
            if samples > LARGEST_BATCH:
                reason = f"a batch has more than {LARGEST_BATCH} samples"
            elif length > model.longest_text:
                sizes = None  # the model raises
        if reason is not None:
            _log_once(f"CUDA graphs are not used: {reason}")
        if reason is not None or sizes is None:
            return call(*inputs)

        batch, length = batch_bucket(samples), text_bucket(length, model.longest_text)
        full = samples == batch or not any(isinstance(value, Tensor) for value in inputs)
        key = (function, batch, full, length, _shapes(inputs, samples), _settings(model))
        with self._lock:
            recording = self._recordings.get(key)
            if recording is not None:
                with self._recorder.turn():
                    launched = recording.launch(inputs)
                    # Hundreds of modules are looked at while the device is busy. If they have changed nobody sees the
                    # results.
                    if self._modules.same() and self._modules.reason() is None:
                        self._recordings.move_to_end(key)
                        return recording.results(launched, copy=True)
            if self._modules is None or not self._modules.same():
                self.clear()
                self._modules = _Modules(model)
            reason = self._modules.reason()
            if reason is None:
                again = key in self._seen and key not in self._refused
                if again and self._record(key, model, function, inputs, batch, length):
                    recording = self._recordings[key]
                    with self._recorder.turn():
                        return recording.results(recording.launch(inputs), copy=True)
                if len(self._seen) >= 64 * MOST_GRAPHS:
                    self._seen.clear()
        if reason is not None:
            _log_once(f"CUDA graphs are not used: {reason}")
            return call(*inputs)
        result = call(*inputs)
        self._seen.add(key)  # only now: a call that raises is not worth a recording
        return result

    def _record(self, key: tuple, model, function: Callable, inputs: Sequence, batch: int, length: int) -> bool:
        """Add a recording. Returns False if that is not possible."""
        try:
            while len(self._recordings) >= self.limit:
                self._shared(model).settle()
                self._recordings.popitem(last=False)
            recording = _Recording(self._shared(model), model, function, inputs, batch, length)
        except Exception as error:  # whatever it is, the eager forward does not need it
            self._clear_recordings()  # the pool of a failed recording cannot be used again
            self._refused.add(key)
            _log_once(f"CUDA graphs are not used for {batch} samples: {type(error).__name__}: {error}")
            return False
        if self._recorder.bytes > self._recorder.limit:
            alone, gigabytes = not self._recordings, self._recorder.bytes / 1e9
            del recording
            self._clear_recordings()
            if alone:
                self._refused.add(key)
                _log_once(f"CUDA graphs are not used for {batch} samples: one takes {gigabytes:.1f} GB")
            return False
        self._recordings[key] = recording
        return True

    def _shared(self, model) -> Any:
        if self._recorder is None:
            self._recorder = self._make_recorder(model.device)
        return self._recorder

    def capture(
        self, call: Callable, *inputs, text_length: int | None = None, pruning: Pruning | float | None = None
    ) -> Captured:
        """See :meth:`madtp.model.Model.capture`."""
        model, function = _parts(call)
        if model.device.type != self._make_recorder.device_type:
            raise ValueError(f"model: CUDA graphs need a model on a CUDA device, got one on {model.device}")
        reason = _Modules(model).reason() or _reason(model, function)
        if reason is not None:
            raise ValueError(f"model: it cannot be captured, because {reason}")
        inputs = _prepared(model, inputs)
        sizes = _sizes(inputs)
        if sizes is None:
            raise ValueError(f"inputs: expected images and texts of one batch, got {[len(value) for value in inputs]}")
        samples, longest = sizes
        longest = longest if text_length is None else text_length
        if not sizes[1] <= longest <= max(model.longest_text, sizes[1]):
            raise ValueError(f"text_length: expected {sizes[1]} to {model.longest_text} tokens, got {text_length}")
        if pruning is not None:
            pruning = model.rule(pruning)
            function = functools.partial(function, pruning=pruning)
        with self._lock:
            recorder = self._shared(model)
            try:
                recording = _Recording(recorder, model, function, inputs, samples, longest)
            except RuntimeError as error:
                self._clear_recordings()  # the pool of a failed recording cannot be used again
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                raise RuntimeError(f"model: the call cannot be recorded: {error}") from error
        return Captured(model, recorder, self._lock, recording, _shapes(inputs, samples), pruning)


class Captured:
    """A forward that :meth:`madtp.model.Model.capture` recorded for one batch size. Call it like the model.

    Results are not copied: the next replay of any graph of the model overwrites them.
    """

    def __init__(self, model, recorder, lock, recording: _Recording, shapes: tuple, pruning: Pruning | None) -> None:
        self._model, self._recorder, self._lock, self._recording = model, recorder, lock, recording
        self._shapes, self._pruning = shapes, pruning
        self._modules, self._settings = _Modules(model), self._now()

    def _now(self) -> tuple:
        pruning, *others = _settings(self._model)
        return (pruning if self._pruning is None else self._pruning, *others)

    def __call__(self, *inputs) -> Any:
        """Replay with inputs of the captured sizes; texts may be shorter.

        Raises:
            ValueError: inputs of other sizes, or a model that has changed since (replaced weights, another pruning,
                other settings, hooks, training mode) and has to be captured again. Weights may be written in place.
        """
        model, recording = self._model, self._recording
        inputs = _prepared(model, inputs)
        samples, length = _sizes(inputs) or (0, 0)
        if samples != recording.batch or length > recording.text_length or _shapes(inputs, samples) != self._shapes:
            texts = f" and texts of up to {recording.text_length} tokens" if recording.text_length else ""
            raise ValueError(
                f"inputs: captured for {recording.batch} samples{texts}, shapes {self._shapes}; got {samples or 'no'} "
                f"samples, texts of up to {length} tokens, shapes {_shapes(inputs, samples or 1)}"
            )
        with self._lock, self._recorder.turn():
            launched = recording.launch(inputs)
            now, reason = self._now(), self._modules.reason() or _reason(model, None)  # while the device is busy
            if not self._modules.same():
                reason = "its modules or weights have been replaced"
            if now != self._settings:
                reason = f"its settings have changed: {self._settings} were captured, they are {now}"
            if reason is not None:
                raise ValueError(f"model: it has to be captured again, because {reason}")
            return recording.results(launched, copy=False)


def _parts(call: Callable) -> tuple[Any, Callable]:
    """The model, and the function to call with it as the first argument."""
    return (call, type(call).forward) if isinstance(call, nn.Module) else (call.__self__, call.__func__)


def _prepared(model, inputs: Sequence) -> list[Tensor | RaggedBatch]:
    """Lists of texts as ragged batches on the device, checked as the model does."""
    return [
        value
        if isinstance(value, Tensor) or (isinstance(value, RaggedBatch) and value.device == model.device)
        else model._ids(value)
        for value in inputs
    ]


def _reason(model, function: Callable | None) -> str | None:
    """Why a call cannot be replayed now; None if it can."""
    if function is not None:
        name = function.__name__
        if getattr(type(model), name, None) is function and name not in model.capturable:
            return f"{type(model).__name__}.{name} is not one of {', '.join(model.capturable)}"
    if model.grouping == "batch":
        return "grouping 'batch' makes samples depend on each other, and so on the filling"
    if torch.is_grad_enabled():
        return "gradients are enabled"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is enabled"
    if model.device.type != "cpu" and checks.may_read(model.space_dict):
        return "the checks of MADTP_KERNELS_DEBUG wait for the device"
    if torch.compiler.is_compiling() or (model.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return "the call is being compiled or captured already"
    return None


def _limit() -> int:
    """How many recordings a model keeps: MADTP_GRAPHS, or the default."""
    value = os.environ.get("MADTP_GRAPHS", "")
    if value and not value.isdecimal():
        raise ValueError(f"MADTP_GRAPHS: expected a number of graphs to keep, or 0 for none, got {value!r}")
    return int(value) if value else MOST_GRAPHS
