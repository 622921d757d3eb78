"""CUDA graphs of whole forwards, on any machine: a stand-in for the recorder runs the function again at each replay.

It shows buckets, filling, what a recording depends on, and what happens where none is possible. Real graphs are tested
in test_gpu.py.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import pickle
from unittest import mock

import pytest
import test_clip
import test_patch
import test_tasks
import torch
from helpers import spare_rows
from pretended_gpu import PretendedGPU
from rules import RULES
from test_waits import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import madtp
from madtp import graphs, layers, predict
from madtp.graphs import Graphs, batch_bucket, text_bucket
from madtp.pruning import LayerTrace, Pruning, Tokens
from madtp.pruning.base import STREAMS
from madtp.rows import first_rows
from madtp.tasks import TASKS
from madtp.weights import randomize
from madtp_kernels import RaggedBatch

SIZE = 64  # of the pictures
COUNT, LONGEST = 11, 21
METHODS = dict.fromkeys(("retrieval", "clip"), ["encode_image", "encode_text", "embed_image", "embed_text"])
NAMES = [name for name in CASES if name != "nlvr, batch"]  # whose samples depend on each other: it runs eagerly
CALLS = [(name, method) for name in NAMES for method in METHODS.get(name.partition(",")[0], ["forward"])]
each_call = pytest.mark.parametrize("name, method", CALLS, ids=lambda part: part.replace(", ", "-"))


def tensors(result):
    """All tensors of a result."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, (list, tuple)):
        for part in result:
            yield from tensors(part)
    elif dataclasses.is_dataclass(result):
        for field in dataclasses.fields(result):
            yield from tensors(getattr(result, field.name))


class Rerun:
    """A recorder for the CPU: a replay runs the function on the buffers, and spoils the results of the last replay."""

    device_type = "cpu"
    each, limit = 100, 10**6

    def __init__(self, device):
        self.bytes, self.last = 0, None

    def record(self, function):
        function()
        self.bytes += self.each

        def replay():
            self.last = function()
            return self.last

        return replay

    @contextlib.contextmanager
    def turn(self):
        for tensor in tensors(self.last):
            tensor.fill_(-7)
        yield

    def settle(self):
        pass


class RerunOnMeta(Rerun):
    device_type = "meta"


class Broken(Rerun):
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")


class Small(Rerun):
    limit = 250


def make(name, temperature=2.0, recorder=Rerun):
    task, (config, options) = name.partition(",")[0], CASES[name]
    with torch.inference_mode(False), torch.no_grad():
        model = TASKS[task].Model(config, temperature, **options).eval()
        randomize(model, seed=5)
        model.space_dict.mul_(0.2)  # alignments of order one, so that thresholds are averages of many tokens
    model.graphs = Graphs(recorder)
    return model


@pytest.fixture
def data(generator):
    return draw(generator)


def draw(generator):
    """Pictures and texts of which the tests take parts."""
    lengths = torch.randint(3, LONGEST, (COUNT,), generator=generator).tolist()
    ids = [torch.randint(6, test_tasks.VOCABULARY - 2, (length,), generator=generator) for length in lengths]
    return torch.randn(COUNT, 2, 3, SIZE, SIZE, generator=generator), ids, test_clip.texts_of(generator, lengths)


def inputs_of(name, method, data, numbers):
    """What a method takes, for these samples."""
    pixels, ids, clip_ids = data
    texts = [(clip_ids if name.startswith("clip") else ids)[number] for number in numbers]
    if method in ("encode_text", "embed_text"):
        return (texts,)
    if name.startswith("nlvr"):
        return pixels[numbers].transpose(0, 1).flatten(0, 1), texts
    return (pixels[numbers, 0], texts) if name == "vqa" else (pixels[numbers, 0],)


def check_same(ours, theirs, tolerance=1e-5):
    """Two results: the same kept tokens in every layer, and values that agree."""
    check = functools.partial(check_same, tolerance=tolerance)
    assert type(ours) is type(theirs)
    if isinstance(theirs, Tensor):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    elif isinstance(theirs, RaggedBatch):
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
        check(ours.exact().values, theirs.exact().values)
        if isinstance(theirs, Tokens):
            rows = theirs.num_tokens
            assert torch.equal(ours.ids[:rows], theirs.ids[:rows])
    elif isinstance(theirs, LayerTrace):
        assert torch.equal(ours.cu_seqlens_in, theirs.cu_seqlens_in)
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
        rows_in, rows = int(theirs.cu_seqlens_in[-1]), int(theirs.cu_seqlens[-1])
        assert torch.equal(ours.ids[:rows], theirs.ids[:rows])
        assert (ours.threshold is None) == (theirs.threshold is None)
        if theirs.threshold is not None:
            check(ours.threshold, theirs.threshold)
            check(ours.importance[:rows_in], theirs.importance[:rows_in])
    elif isinstance(theirs, (list, tuple)):
        for mine, yours in zip(ours, theirs, strict=True):
            check(mine, yours)
    elif dataclasses.is_dataclass(theirs):
        for field in dataclasses.fields(theirs):
            check(getattr(ours, field.name), getattr(theirs, field.name))
    else:
        assert ours == theirs


def bound(model, method):
    return model if method == "forward" else getattr(model, method)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_batches_are_filled_up_by_a_third_at_most():
    buckets = sorted({batch_bucket(samples) for samples in range(1, 257)})
    assert buckets == [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for samples in range(1, 257):
        assert samples <= batch_bucket(samples) <= max(1.5 * samples, 8)
        assert batch_bucket(samples) == min(bucket for bucket in buckets if bucket >= samples)


def test_texts_are_bounded_by_multiples_of_32_and_by_the_model():
    assert [text_bucket(length, 77) for length in (0, 1, 32, 33, 64, 65, 77)] == [0, 32, 32, 64, 64, 77, 77]


# ---- the results ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 2.0], ids=["dense", "pruned"])
@each_call
@torch.inference_mode()
def test_any_batch_gets_what_it_gets_without_graphs(name, method, temperature, data, generator):
    """Batches of many sizes, in random order; of each bucket one runs, one is recorded, others are replayed."""
    model = make(name, temperature)
    call, eager, held = bound(model, method), bound(model, method), []
    sizes = [1, 1, 1, 2, 2, 2, 3, 4, 3, 5, 8, 6, 7, 9, 11, 10]
    for place in torch.randperm(len(sizes), generator=generator).tolist():
        numbers = torch.randperm(COUNT, generator=generator)[: sizes[place]].tolist()
        inputs = inputs_of(name, method, data, numbers)
        ours, theirs = graphs.run(call, *inputs), eager(*inputs)
        check_same(ours, theirs)
        held.append((ours, theirs))
    assert 4 <= len(model.graphs) <= 9
    for ours, theirs in held:  # results are good for longer than until the next replay
        check_same(ours, theirs)
    if temperature:
        traces = [theirs.vision if method == "forward" else theirs.trace for _, theirs in held]
        assert any(bool(record.pruned.any()) for trace in traces for record in trace), (
            "nothing was pruned: the claim would be empty"
        )


@torch.inference_mode()
def test_a_bucket_runs_then_is_recorded_then_replayed(data, monkeypatch):
    model, calls = make("vqa"), []
    monkeypatch.setattr(type(model), "forward", counted(type(model).forward, calls))
    for samples, recordings in [(3, 0), (3, 1), (4, 1), (3, 1), (4, 2), (4, 2)]:
        graphs.run(model, *inputs_of("vqa", "forward", data, range(samples)))
        assert len(model.graphs) == recordings
    # Eager runs have the batch; the stand-in runs a full bucket, once to record and once for each replay.
    assert [len(pixels) for pixels in calls] == [3, 4, 4, 4, 4, 4, 4, 4]


def counted(function, calls):
    def forward(self, pixels, *rest, **options):
        calls.append(pixels)
        return function(self, pixels, *rest, **options)

    return forward


@torch.inference_mode()
def test_a_bound_buffer_of_texts_is_taken_as_it_is(data):
    """As on a GPU, where the host does not know how many rows hold tokens."""
    model = make("retrieval")
    for number, lengths in enumerate([[5, 9, 3], [9, 9, 9], [1, 2, 3], [4, 4, 4]]):
        texts = [data[1][0].repeat(4)[:length] for length in lengths]
        exact = RaggedBatch.from_list(texts)
        spare = torch.full((27,), 10**9 if number > 1 else 0)  # replays look nothing up there
        values = torch.cat([exact.values, spare])
        ours = graphs.run(model.encode_text, RaggedBatch(values[:27], exact.cu_seqlens, 9, bound=True))
        check_same(ours, model.encode_text(texts))
    assert len(model.graphs) == 1


class NoHostMemory(TorchDispatchMode):
    """Raises where an operation on the device takes a tensor of the host: a copy cannot be recorded."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tensors([*args, *kwargs.values()]) if value.dim()]
        result = function(*args, **kwargs)
        devices = {value.device.type for value in [*given, *tensors(result)]}
        assert devices <= {"meta"}, f"{function} on {devices}"
        return result


class RerunWithoutHost(RerunOnMeta):
    def record(self, function):
        with NoHostMemory():
            function()
        return lambda: function()


class RerunOnPretendedGPU(Rerun):
    device_type = "cuda"


# Every rule in one task, and those that look more tokens up in each of its own.
FORMS = {"dense": Pruning(), **RULES}
EVERYWHERE, IN_EACH_TASK = ("dense", "madtp"), ("ranked novelty, second look", "pitome, protect")
RULED = [
    (name, method, rule)
    for name, method in CALLS
    for rule in FORMS
    if rule in EVERYWHERE or name == "nlvr" or (rule in IN_EACH_TASK and not name.endswith(("compat", "pairs")))
]


@pytest.mark.parametrize("name, method, rule", RULED, ids=lambda part: part.replace(", ", "-"))
@torch.inference_mode()
def test_rows_beyond_the_last_token_decide_nothing(name, method, rule):
    """What runs on a GPU, and is recorded there: buffers have room for more tokens than there are, and hold anything.

    Inputs are always the same: two tokens that are each other's nearest have the same energy in PiToMe but for rounding.
    """
    data = draw(torch.Generator().manual_seed(1))
    model = make(name, recorder=RerunOnPretendedGPU)
    model.pruning = dataclasses.replace(FORMS[rule], streams=STREAMS)
    call, inputs = bound(model, method), inputs_of(name, method, data, range(3))
    theirs = call(*inputs)
    if method == "forward" and model.pruning.active:
        assert any(bool(record.pruned.any()) for record in theirs.vision)
    wide = [in_a_larger_buffer(value) if isinstance(value, list) else value for value in inputs]
    for given in (wide, inputs, wide):
        with PretendedGPU() as gpu:
            ours = graphs.run(call, *given)
        assert all(rows <= 4 for rows, _ in gpu.layer_norms), (
            "PyTorch's takes twice as long as ours where there are many"
        )
        check_same(ours, theirs)
    assert len(model.graphs) == 1


class Unfinished:
    """Work beside other work that is done when somebody waits for it: before, its result is NaN."""

    def __init__(self, work):
        result, self.joins = work(), 0
        self.done = result.kv if isinstance(result, layers.Keys) else result.values
        self.missing = torch.full_like(self.done, float("nan"))
        replace = result.with_values if isinstance(result, Tokens) else lambda kv: result._replace(kv=kv)
        self.result = replace(self.missing)

    def join(self):
        self.joins += 1
        self.missing.copy_(self.done)


@pytest.mark.parametrize("name, method, rule", RULED, ids=lambda part: part.replace(", ", "-"))
@torch.inference_mode()
def test_projections_of_a_recording_run_beside_the_choice_of_tokens(name, method, rule, data, monkeypatch):
    model, works = make(name), []
    model.pruning = dataclasses.replace(FORMS[rule], streams=STREAMS)
    call, inputs = bound(model, method), inputs_of(name, method, data, range(3))
    theirs = call(*inputs)

    def beside(x, work):
        works.append(Unfinished(work))
        return works[-1].result, works[-1]

    monkeypatch.setattr(layers, "recorded", lambda x: True)
    monkeypatch.setattr(layers, "beside", beside)
    check_same(call(*inputs), theirs)
    assert all(work.joins for work in works)
    if method == "forward" and model.pruning.active:  # of some models one tower alone is not pruned
        assert any(isinstance(work.result, Tokens) for work in works)


def in_a_larger_buffer(texts):
    exact = RaggedBatch.from_list(texts)
    return RaggedBatch(spare_rows(exact.values, 9), exact.cu_seqlens, exact.max_seqlen, bound=True)


def test_filling_is_taken_out_whatever_the_batch_before_was():
    """A graph writes the same tensors at each replay, and texts alone share one recording for all sizes of a bucket."""
    recording = object.__new__(graphs._Recording)
    recording.batch, recording.raw, recording.found = 4, None, None
    raw = torch.arange(8).view(4, 2)
    for samples in (4, 3, 4, 1, 3, 4):
        for copy in (True, False):
            assert torch.equal(recording.results((samples, raw), copy=copy), raw[:samples])


@pytest.mark.parametrize("temperature", [0.0, 2.0], ids=["dense", "pruned"])
@each_call
@torch.inference_mode()
def test_neither_loading_nor_running_waits_or_touches_the_host(name, method, temperature):
    """Tensors without values: whoever asks for one gets an exception."""
    task, (config, options) = name.partition(",")[0], CASES[name]
    with torch.device("meta"):
        model = TASKS[task].Model(config, temperature, **options).eval()
    model.graphs = Graphs(RerunWithoutHost)
    for samples in (3, 3, 3, 4, 4):
        pixels = torch.empty((2 if task == "nlvr" else 1) * samples, 3, SIZE, SIZE, device="meta")
        ids = RaggedBatch(
            torch.empty(25, dtype=torch.int64, device="meta"),
            torch.empty(samples + 1, dtype=torch.int32, device="meta"),
            12,
        )
        both = [pixels] if task == "caption" else [pixels, ids]
        text = method.endswith("_text")
        taken = [ids] if text else [pixels] if method.endswith("_image") else both
        with NoHostMemory():
            graphs.run(bound(model, method), *taken)
    assert len(model.graphs) == 1 + (not text)


@torch.inference_mode()
def test_predict_answers_from_recordings(monkeypatch):
    """Every function of `madtp.predict`, three times, with graphs and without."""
    model = make("retrieval")
    model.processor = None
    generator = torch.Generator().manual_seed(3)
    pixels, ids, _ = draw(generator)
    images, texts = list(pixels[:3, 0]), ids[:5]
    answers = {}
    for limit in (0, 16):
        model.graphs.limit = limit
        for _ in range(3):
            seen, output = predict.embed_images(model, images)
            read, _ = predict.embed_texts(model, texts)
            scores = predict.match(model, output.tokens, texts, [(0, 1), (2, 4), (2, 0)])
        answers[limit] = seen, read, scores
    assert len(model.graphs) == 2
    for ours, theirs in zip(answers[16][0] + answers[16][1], answers[0][0] + answers[0][1], strict=True):
        assert (ours.tokens, ours.flops) == (theirs.tokens, theirs.flops)
        torch.testing.assert_close(ours.features, theirs.features, atol=1e-5, rtol=1e-5)
    assert answers[16][2] == pytest.approx(answers[0][2], abs=1e-5)


@pytest.mark.parametrize("task", test_patch.TASKS)
@pytest.mark.parametrize("recorder", [Rerun, RerunOnPretendedGPU])
def test_patched_models_return_the_same_from_recordings(task, recorder, generator):
    model = test_patch.clip(generator) if task == "clip" else test_patch.hugging_face(task, generator)
    madtp.apply_patch(model, temperature=8.0, dictionary=test_patch.dictionary_of(task, generator))
    ours = model._madtp.model
    ours.graphs = Graphs(recorder)
    place = PretendedGPU if recorder is RerunOnPretendedGPU else contextlib.nullcontext
    _, inputs = test_patch.sample_inputs(task, generator)
    for count in (3, 4):
        some = {name: tensor[:count] for name, tensor in inputs.items()}
        ours.graphs.limit = 0
        theirs = test_patch.results(task, model, some)
        ours.graphs.limit = 16
        for _ in range(3):
            with place():
                results = test_patch.results(task, model, some)
            for mine, yours in zip(results, theirs, strict=True):
                if place is PretendedGPU:  # states are padded to as many rows as there could be
                    whole, mine = mine, mine[tuple(map(slice, yours.shape))]
                    assert whole.count_nonzero() == mine.count_nonzero()
                assert mine.shape == yours.shape
                torch.testing.assert_close(mine, yours, atol=1e-5, rtol=1e-5)
    assert len(ours.graphs) >= (1 if task == "caption" else 2)


# ---- nothing stale --------------------------------------------------------------------------------------------------


def write(model):
    model.visual_encoder.blocks[0].mlp.fc1.weight.mul_(1.5)


def replace_parameter(model):
    model.visual_encoder.blocks[0].norm1.weight = torch.nn.Parameter(torch.full((64,), 1.5))


def replace_module(model):
    head = torch.nn.Linear(64, 64)
    model.cls_head[0] = head.requires_grad_(False).eval()


def load(model):
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})


def assign(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


CHANGES = {
    "in place": write,
    "parameter": replace_parameter,
    "module": replace_module,
    "load_state_dict": load,
    "data": assign,
    "temperature": lambda model: setattr(model, "temperature", 6.0),
    "dense": lambda model: setattr(model, "temperature", 0.0),
    "pair": lambda model: setattr(model, "grouping", "pair"),
    "sizes": lambda model: setattr(model, "pruning", dataclasses.replace(model.pruning, proportional_attention=True)),
    "backend": lambda model: setattr(model, "backend", "reference"),
}
EAGER = {
    "hook": lambda model: model.text_encoder.register_forward_hook(lambda *given: None),
    "hook before": lambda model: model.cls_head.register_forward_pre_hook(lambda *given: None),
    "training": lambda model: model.train(),
    "grouping": lambda model: setattr(model, "grouping", "batch"),
    "off": lambda model: setattr(model.graphs, "limit", 0),
    "forward": lambda model: setattr(model.cls_head, "forward", lambda x: 2 * x[:, :2]),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_model_gives_changed_answers(change, data):
    model, inputs = make("nlvr"), inputs_of("nlvr", "forward", data, range(3))
    for _ in range(3):
        before = graphs.run(model, *inputs)
    CHANGES[change](model)
    theirs = model(*inputs)
    assert not torch.equal(theirs.logits, before.logits) or change == "backend"
    for _ in range(3):
        check_same(graphs.run(model, *inputs), theirs)
    # Replaced weights drop the recording, written ones are read by it, and other settings have one of their own.
    replaced, written = ("parameter", "module", "data"), ("in place", "load_state_dict")
    assert len(model.graphs) == (1 if change in replaced + written else 2)


@pytest.mark.parametrize("change", EAGER)
@torch.no_grad()
def test_what_a_replay_would_miss_runs_eagerly(change, data, monkeypatch, caplog):
    graphs._log_once.cache_clear()
    model, inputs, calls = make("nlvr"), inputs_of("nlvr", "forward", data, range(3)), []
    for _ in range(3):
        graphs.run(model, *inputs)
    EAGER[change](model)
    monkeypatch.setattr(type(model), "forward", counted(type(model).forward, calls))
    with caplog.at_level(logging.WARNING, "madtp"):
        for _ in range(2):
            check_same(graphs.run(model, *inputs), model(*inputs))
    assert all(isinstance(pixels, Tensor) for pixels in calls)  # a recording has a ragged batch of them
    assert len([r for r in caplog.records if "CUDA graphs are not used" in r.message]) == (change != "off")


def test_gradients_are_never_lost(data):
    model, inputs = make("nlvr"), inputs_of("nlvr", "forward", data, range(3))
    with torch.no_grad():
        for _ in range(3):
            graphs.run(model, *inputs)
    assert graphs.run(model, *inputs).logits.requires_grad


@torch.inference_mode()
def test_results_may_be_used_in_and_out_of_inference_mode(data):
    model, inputs = make("nlvr"), inputs_of("nlvr", "forward", data, range(3))
    for _ in range(3):
        graphs.run(model, *inputs)
    with torch.inference_mode(False), torch.no_grad():
        outside = graphs.run(model, *inputs)
        outside.logits.add_(1)
    check_same(graphs.run(model, *inputs), model(*inputs))


# ---- bounds and failures --------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_recording_used_longest_ago_is_dropped(data):
    model = make("caption")
    model.graphs.limit = 2
    batches = {size: inputs_of("caption", "forward", data, range(size)) for size in (1, 2, 4, 8)}
    for size in (1, 2, 1, 2, 1, 4, 4):
        check_same(graphs.run(model, *batches[size]), model(*batches[size]))
    assert [key[1] for key in model.graphs._recordings] == [1, 4]
    model.graphs.clear()
    assert len(model.graphs) == model.graphs.bytes == 0


@torch.inference_mode()
def test_memory_that_is_used_up_is_given_back(data, caplog):
    graphs._log_once.cache_clear()
    model = make("caption", recorder=Small)  # two recordings fit
    for size in (1, 1, 2, 2, 4, 4, 4):
        inputs = inputs_of("caption", "forward", data, range(size))
        check_same(graphs.run(model, *inputs), model(*inputs))
        assert model.graphs.bytes <= Small.limit
    assert [key[1] for key in model.graphs._recordings] == [4] and model.graphs.bytes == 100

    class TooSmall(Rerun):
        limit = 50

    model.graphs = Graphs(TooSmall)
    with caplog.at_level(logging.WARNING, "madtp"):
        for _ in range(4):
            check_same(graphs.run(model, *inputs), model(*inputs))
    assert len(model.graphs) == 0
    assert [record.message for record in caplog.records] == ["CUDA graphs are not used for 4 samples: one takes 0.0 GB"]


@torch.inference_mode()
def test_a_batch_that_could_not_be_loaded_leaves_nothing_behind(data, monkeypatch):
    """Offsets of its images were written; the next batch of the former size may not take them for its own."""
    model = make("nlvr")
    ten, nine = (inputs_of("nlvr", "forward", data, range(size)) for size in (10, 9))
    for _ in range(3):
        graphs.run(model, *ten)
    with monkeypatch.context() as full:
        full.setattr(torch, "minimum", mock.Mock(side_effect=torch.OutOfMemoryError))
        with pytest.raises(torch.OutOfMemoryError):
            graphs.run(model, *nine)
    check_same(graphs.run(model, *ten), model(*ten))
    assert len(model.graphs) == 1


class OutOfMemory(Rerun):
    def record(self, function):
        raise torch.OutOfMemoryError


@torch.inference_mode()
def test_a_capture_without_memory_does_not_leave_its_pool_to_others(data):
    model = make("caption", recorder=OutOfMemory)
    with pytest.raises(torch.OutOfMemoryError):
        model.capture(*inputs_of("caption", "forward", data, range(2)))
    assert model.graphs._recorder is None


def test_a_pool_belongs_to_the_device_of_the_model(monkeypatch):
    current, pools = [0], []

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen.index)
        yield
        current.pop()

    stand_ins = {"device": device, "MemPool": lambda: pools.append(current[-1]), "Event": object, "Stream": object}
    for name, value in (stand_ins | {"get_device_properties": mock.MagicMock()}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graphs, "_recording_stream", lambda device: None)
    graphs.CudaRecorder(torch.device("cuda", 1))
    assert pools == [1] and current == [0]


@torch.inference_mode()
def test_a_recording_that_fails_is_not_tried_again(data, caplog):
    graphs._log_once.cache_clear()
    model, inputs = make("caption", recorder=Broken), inputs_of("caption", "forward", data, range(4))
    with caplog.at_level(logging.WARNING, "madtp"):
        for _ in range(4):
            check_same(graphs.run(model, *inputs), model(*inputs))
    (record,) = caplog.records
    assert "operation not permitted when stream is capturing" in record.message


@pytest.mark.parametrize("method", ["forward", "encode_image"])
@torch.inference_mode()
def test_wrong_inputs_get_the_error_of_the_model(method, data):
    name = "retrieval" if method == "encode_image" else "vqa"
    model, good = make(name), inputs_of(name, method, data, range(3))
    for _ in range(3):
        graphs.run(bound(model, method), *good)
    wrong = [(good[0][..., :-1], *good[1:])]
    if name == "vqa":
        pixels, ids = good
        too_long = torch.ones(test_tasks.TEXT.max_position_embeddings + 1, dtype=torch.int64)
        wrong += [(pixels[:2], ids), (pixels.repeat(2, 1, 1, 1), ids)]
        wrong += [(pixels, texts) for texts in ([], [torch.tensor([10**6])] * 3, [too_long] * 3)]
    for inputs in wrong:
        for _ in range(3):
            with pytest.raises(ValueError) as ours:
                graphs.run(bound(model, method), *inputs)
            with pytest.raises(ValueError) as theirs:
                bound(model, method)(*inputs)
            assert str(ours.value) == str(theirs.value)


def test_copies_of_a_model_begin_without_recordings(data):
    model, inputs = make("caption"), inputs_of("caption", "forward", data, range(4))
    with torch.inference_mode():
        for _ in range(2):
            graphs.run(model, *inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (len(model.graphs), len(other.graphs)) == (1, 0)
        with torch.inference_mode():
            check_same(graphs.run(other, *inputs), model(*inputs))


def test_the_environment_sets_how_many_are_kept(monkeypatch):
    for value, limit in (("", 16), ("0", 0), ("3", 3)):
        monkeypatch.setenv("MADTP_GRAPHS", value)
        assert Graphs().limit == limit
    monkeypatch.setenv("MADTP_GRAPHS", "no")
    with pytest.raises(ValueError, match="MADTP_GRAPHS: expected a number"):
        Graphs()


@torch.inference_mode()
def test_on_a_cpu_nothing_is_recorded(data):
    model, inputs = make("caption", recorder=graphs.CudaRecorder), inputs_of("caption", "forward", data, range(4))
    for _ in range(3):
        check_same(graphs.run(model, *inputs), model(*inputs))
    assert len(model.graphs) == 0


# ---- by hand --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_capture_by_hand(data):
    model = make("nlvr")
    captured = model.capture(*inputs_of("nlvr", "forward", data, range(3)), text_length=LONGEST)
    hot = model.capture(*inputs_of("nlvr", "forward", data, range(2)), text_length=LONGEST, pruning=6.0)
    for numbers in ([3, 4, 5], [8, 7, 6], [0, 9, 10]):
        inputs = inputs_of("nlvr", "forward", data, numbers)
        check_same(captured(*inputs), model(*inputs))
        inputs = inputs_of("nlvr", "forward", data, numbers[:2])
        check_same(hot(*inputs), model(*inputs, pruning=6.0))
    with model.dense():
        check_same(hot(*inputs), model(*inputs, pruning=6.0))
    write(model)
    check_same(hot(*inputs), model(*inputs, pruning=6.0))


@torch.inference_mode()
def test_results_of_a_capture_are_overwritten_by_the_next_call(data):
    model = make("nlvr")
    captured = model.capture(*inputs_of("nlvr", "forward", data, range(3)), text_length=LONGEST)
    before = captured(*inputs_of("nlvr", "forward", data, range(3))).logits
    kept = before.clone()
    captured(*inputs_of("nlvr", "forward", data, range(3, 6)))
    assert not torch.equal(before, kept)


@torch.inference_mode()
def test_capture_of_one_tower(data):
    model = make("clip")
    for method in ("encode_image", "encode_text"):
        options = {"text_length": LONGEST} if method == "encode_text" else {}
        captured = model.capture(*inputs_of("clip", method, data, range(3)), method=method, **options)
        inputs = inputs_of("clip", method, data, range(3, 6))
        check_same(captured(*inputs), getattr(model, method)(*inputs))
    with pytest.raises(
        ValueError, match="method: expected one of encode_image, encode_text, embed_image, embed_text, got 'forward'"
    ):
        model.capture(*inputs_of("nlvr", "forward", data, range(3)))


@torch.inference_mode()
def test_capture_says_what_is_wrong(data):
    model, inputs = make("nlvr"), inputs_of("nlvr", "forward", data, range(3))
    captured = model.capture(*inputs, text_length=LONGEST)
    longer = [torch.ones(LONGEST + 1, dtype=torch.int64)] * 3
    fewer = inputs_of("nlvr", "forward", data, range(2))
    for wrong in (fewer, (inputs[0], longer), (inputs[0][:3], inputs[1]), inputs[:1]):
        with pytest.raises(ValueError, match=f"inputs: captured for 3 samples and texts of up to {LONGEST} tokens"):
            captured(*wrong)
    with pytest.raises(ValueError, match="inputs: expected images and texts of one batch"):
        model.capture(inputs[0][:4], inputs[1])
    with pytest.raises(ValueError, match="text_length: expected .* got 1"):
        model.capture(*inputs, text_length=1)
    with pytest.raises(ValueError, match="temperature: expected 0, or a number"):
        model.capture(*inputs, pruning=-1)
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(ValueError, match="gradients are enabled"):
        captured(*inputs)
    for change, match in [("temperature", "settings have"), ("parameter", "weights have"), ("module", "weights have")]:
        captured = model.capture(*inputs)
        with torch.inference_mode(False), torch.no_grad():
            CHANGES[change](model)
        with pytest.raises(ValueError, match=f"model: it has to be captured again, because .*{match}"):
            captured(*inputs)
    captured = model.capture(*inputs)
    EAGER["hook"](model)
    with pytest.raises(ValueError, match="model: it has to be captured again, because there are hooks on its modules"):
        captured(*inputs)
    with pytest.raises(ValueError, match="model: it cannot be captured, because there are hooks on its modules"):
        model.capture(*inputs)
    model = make("nlvr", recorder=graphs.CudaRecorder)
    with pytest.raises(ValueError, match="model: CUDA graphs need a model on a CUDA device, got one on cpu"):
        model.capture(*inputs)
    model = make("nlvr", recorder=Broken)
    with pytest.raises(RuntimeError, match="operation not permitted when stream is capturing"):
        model.capture(*inputs)


@pytest.mark.parametrize("half", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("name", ["nlvr", "caption", "vqa", "retrieval", "clip", "clip, compat"])
def test_rows_beyond_the_last_token_reach_no_gradient(name, half):
    """A number that is not finite times a gradient of zero is NaN in the gradient of a weight, which sums over rows."""
    pixels, ids, clip_ids = draw(torch.Generator().manual_seed(2))
    images = pixels[:3].transpose(0, 1).flatten(0, 1) if name == "nlvr" else pixels[:3, 0]
    inputs = (images, (clip_ids if name.startswith("clip") else ids)[:3])[: 1 + (name != "caption")]
    gradients = []
    for place in (contextlib.nullcontext, PretendedGPU):
        model = make(name)
        with place():
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = sum(map(squares, tensors_read(model(*inputs, alignment_features=True))))
            loss.backward()
        gradients.append({key: part.grad for key, part in model.named_parameters() if part.grad is not None})
    theirs, ours = gradients
    assert theirs.keys() == ours.keys() and len(theirs) > 10
    for key, gradient in theirs.items():
        assert ours[key].isfinite().all(), key
        if not half:  # where rounding decides what is kept
            scale = gradient.abs().max().item()
            torch.testing.assert_close(ours[key], gradient, atol=1e-4 * scale + 1e-6, rtol=1e-3)


HALVES = [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("place", [contextlib.nullcontext, PretendedGPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("weights, half", HALVES, ids=str)
@pytest.mark.parametrize("name, method", [call for call in CALLS if "," not in call[0] and "embed" not in call[1]])
@torch.no_grad()
def test_weights_in_half_under_autocast(name, method, weights, half, place, data):
    """Tokens are in another dtype than the weights then, on a GPU after the first LayerNorm."""
    inputs = inputs_of(name, method, data, range(COUNT))  # of three, all logits may happen to be small
    for temperature in (0, 2.0):
        model = make(name, temperature)
        expected = list(floats_read(getattr(model, method)(*inputs)))
        model.to(weights)
        with place(), torch.autocast("cpu", half):
            found = list(floats_read(getattr(model, method)(*inputs)))
        assert len(found) == len(expected) > 0
        for ours, exact in zip(found, expected, strict=True):
            assert ours.isfinite().all()
            if temperature == 0:  # 0.01 to 0.02 in half without autocast
                assert (ours - exact).abs().max() < 0.05 * exact.abs().max()


def squares(tensor):
    return tensor.float().square().mean()


def tensors_read(output):
    """What a loss is made of: features, logits, the first token of each sample."""
    return (part for part in floats_read(output) if part.requires_grad)


def floats_read(output):
    """Features, logits, the first token of each sample."""
    if isinstance(output, Tensor):
        yield output
        return
    named = output._asdict() if isinstance(output, tuple) else vars(output)
    for value in named.values():
        if isinstance(value, Tokens):
            yield first_rows(value)
        elif isinstance(value, (Tensor, tuple)):
            yield from (part for part in tensors(value) if part.is_floating_point())
