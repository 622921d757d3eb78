"""What a pruned layer has to do with on its way: few objects of ours, in few lines."""

import inspect
import sys

import pytest
import torch
from compression import TEXT, VISION

import madtp.layers
import madtp.linear
from madtp import NLVRConfig
from madtp.layers import CrossAttention
from madtp.linear import Linear
from madtp.pruning import METHODS, Pruning, Tokens
from madtp.tasks import TASKS
from madtp.text import Layer
from madtp.vision import Block
from madtp.weights import randomize
from madtp_kernels import RaggedBatch

FORWARDS = {kind.forward.__code__: kind.__name__ for kind in (Block, Layer)}


def is_ours(value):
    """Whether it is an object of this project, other than a part of the network or the rule."""
    kind = type(value)
    return kind.__module__.startswith("madtp") and not isinstance(value, (torch.nn.Module, Pruning))


@pytest.mark.parametrize("method", ["madtp", "ranked_novelty"])
def test_a_walk_through_a_pruned_layer_passes_three_of_our_objects(method, generator):
    model = TASKS["nlvr"].Model(NLVRConfig(VISION, TEXT, merge_from=1), METHODS[method]().at(1.0)).eval()
    randomize(model, seed=3)
    met = {name: set() for name in FORWARDS.values()}

    def watch(frame, event, argument):
        if frame.f_code not in FORWARDS:
            return None

        def returned(frame, event, argument):
            if event == "return":
                values = [*frame.f_locals.values(), *(argument if isinstance(argument, tuple) else [])]
                met[FORWARDS[frame.f_code]] |= {type(value).__name__ for value in values if is_ours(value)}
            return returned

        return returned

    pixels = torch.randn(4, 3, VISION.image_size, VISION.image_size, generator=generator)
    sys.settrace(watch)
    try:
        with torch.inference_mode():
            model(pixels, [torch.arange(5, 12), torch.arange(5, 9)])
    finally:
        sys.settrace(None)
    assert met == {name: {"Tokens", "Attention", "LayerTrace"} for name in met}


@pytest.mark.parametrize("kind", [Block, Layer], ids=lambda kind: kind.__name__)
def test_a_layer_is_a_figure(kind):
    """At most fifteen lines besides signature and words."""
    source = inspect.getsource(kind.forward)
    body = source.split('"""')[2].strip("\n").splitlines()
    assert 1 < len([line for line in body if line.strip()]) <= 15


@pytest.mark.parametrize("bound", [True, False])
def test_what_one_call_does_on_a_gpu_is_done_apart_where_modules_are_watched(bound, generator, monkeypatch):
    """Of a linear layer and the LayerNorm behind it; the tensors claim to lie on a GPU."""
    calls, seen = [], []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(madtp.linear, "linear", lambda x, *_, **options: calls.append("norm" in options) or x)
    monkeypatch.setattr(madtp.layers, "layer_norm", lambda x, *_: x)
    dense, norm = madtp.linear.Linear(4, 4), madtp.layers.LayerNorm(4)
    x = torch.randn(3, 4, generator=generator)
    tokens = RaggedBatch.unchecked(x, torch.tensor([0, 2 + (not bound)], dtype=torch.int32), 3, bound)

    def together():
        calls.clear(), seen.clear()
        with torch.no_grad():
            madtp.linear.normed(x, dense, norm, x, tokens)
        return calls[0]

    note = lambda module, *_: seen.append(module)
    everywhere = torch.nn.modules.module.register_module_forward_hook
    assert together()
    for watch, modules in [
        (dense.register_forward_hook, [dense]),
        (norm.register_forward_pre_hook, [norm]),
        (everywhere, [dense, norm]),
    ]:
        handle = watch(note)
        assert not together() and seen == modules
        handle.remove()
    assert together()
    monkeypatch.setattr(norm, "forward", lambda x, tokens: seen.append(norm))
    assert not together() and seen == [norm]


# ---- what one call of the CPU's extension does not serve --------------------------------------------------------------


def tokens_of(lengths, width, generator):
    values = torch.randn(sum(lengths), width, generator=generator)
    return Tokens.start(RaggedBatch.from_lengths(values, lengths))


def test_heads_that_are_too_wide(generator):
    block = Block(257, 1, 8, eps=1e-6).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="^q: expected .* 1 <= d <= 256, got"):
        block(tokens_of([3, 2], 257, generator), None, Pruning(), 0)


def test_offsets_that_were_changed_since(generator):
    block = Block(16, 2, 32, eps=1e-6).eval().requires_grad_(False)
    words, patches = (tokens_of([3, 2], 16, generator) for _ in range(2))
    cross = CrossAttention(16, 16, 2).requires_grad_(False)
    patches.cu_seqlens[1] = 4
    with pytest.raises(ValueError, match="^max_seqlen_q: 3 is below the length 4 of sample 0"):
        block(patches, None, Pruning(), 0)
    with pytest.raises(ValueError, match="^max_seqlen_k: 3 is below the length 4 of sample 0"):
        cross.through(Linear(16, 16).requires_grad_(False), words, patches)


def test_attention_to_tokens_stored_by_columns(generator):
    cross, out = CrossAttention(16, 16, 2).requires_grad_(False), Linear(16, 16).requires_grad_(False)
    words, patches = (tokens_of([3, 2], 16, generator) for _ in range(2))
    columns = patches.with_values(patches.values.T.contiguous().T)
    torch.testing.assert_close(cross.through(out, words, columns), cross.through(out, words, patches))
