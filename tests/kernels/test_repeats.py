"""Which eager calls on a GPU repeat an earlier one, and which go straight to a kernel: the extension and Python tell the same
calls apart."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from madtp_kernels import RaggedBatch, attention, checks, layer_norm, merge_redundant, native, registration, repeats


class Subclass(torch.Tensor):
    pass


def described(*tensors):
    """What both make of tensors; None where somebody has to look at them, by both."""
    extension = native.find()
    if extension is None:
        pytest.skip("there is no extension")
    facts = extension.signature(tensors), repeats._facts_in_python(tensors)
    assert (facts[0] is None) == (facts[1] is None), facts
    return None if facts[0] is None else facts


def test_what_decides_how_a_call_runs_is_told_apart():
    x = torch.zeros(8, 16)
    same = [
        (x, None), (x.clone(), None), (torch.nn.Parameter(x, requires_grad=False), None), (torch.zeros(9, 16)[:8], None)
    ]  # fmt: skip
    others = [
        (x,), (None, x), (x, x), (x[:7], None), (x[:, :8], None), (x.half(), None), (x.int(), None), (x[0], None),
        (x[0, 0], None), (torch.zeros(8 * 16 + 1)[1:].view(8, 16), None), (x[::2], None), (x[:, None], None),
        (torch.zeros(8, 0), None), (torch.zeros(0, 16), None), (x.to("meta"), None),
    ]  # fmt: skip
    for way in range(2):
        first = described(*same[0])[way]
        assert all(described(*tensors)[way] == first for tensors in same)
        found = [first, *(described(*tensors)[way] for tensors in others)]
        assert len(set(found)) == len(found)


def test_calls_that_somebody_has_to_look_at():
    x = torch.zeros(4, 6)
    weight = torch.nn.Parameter(x.clone())
    for tensor in (x.T, x[:, ::2], x.as_subclass(Subclass), weight, x.to_sparse()):
        assert described(x, tensor) is None
    with torch.no_grad():
        assert described(x, weight) is not None
    with forward_ad.dual_level():
        assert described(x) is None
    with FlopCounterMode(display=False):
        assert described(x) is None
    seen = []
    torch.func.vmap(lambda y: seen.append(described(torch.zeros(2))) or y)(x)
    torch.func.grad(lambda y: seen.append(described(torch.zeros(2))) or y.sum())(x)
    assert seen == [None, None] and described(x) is not None


@pytest.mark.parametrize("name", ["count", "portion", "share", "uncounted"])
def test_true_is_refused_where_a_one_has_passed(name, monkeypatch):
    """As numbers they are equal."""
    x, cu_seqlens = torch.rand(5, 16), torch.tensor([0, 5], dtype=torch.int32)
    asked = []
    with monkeypatch.context() as patch:  # a repeat of a call on a GPU
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "current_device", lambda: None)
        patch.setattr(checks, "may_read", lambda _: False)
        patch.setattr(repeats, "find", lambda key: asked.append(key) or (lambda *_: "repeated"))
        for value in (1, 1, True):
            batch, free = RaggedBatch(x, cu_seqlens, 5), torch.ones(5, dtype=torch.bool)
            assert merge_redundant(batch, x, x[:, 0].contiguous(), free=free, **{name: value}) == "repeated"
    assert None not in asked and asked[0] == asked[1] != asked[2]
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got bool True"):
        merge_redundant(RaggedBatch(x, cu_seqlens, 5), x, x[:, 0].contiguous(), free=x[:, 0] >= 0, **{name: True})


@pytest.mark.parametrize("operation", ["attention", "layer_norm"])
def test_a_repeat_has_options_of_the_same_kinds(operation, monkeypatch):
    """A 1 for True is refused whatever was called before, as it is the first time."""
    x, cu_seqlens, asked = torch.rand(5, 2, 8), torch.tensor([0, 5], dtype=torch.int32), []
    calls = {
        "attention": lambda value: attention(x, x, x, cu_seqlens, cu_seqlens, 5, 5, causal=value),
        "layer_norm": lambda value: layer_norm(x[:, 0].contiguous(), x[0, 0], None, cu_seqlens, value),
    }
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch.cuda, "current_device", lambda: None)
        patch.setattr(checks, "may_read", lambda _: False)
        patch.setattr(repeats, "find", lambda key: asked.append(key) or (lambda *_: (x, x)))
        for value in (True, True, 1):
            calls[operation](value)
    assert None not in asked and asked[0] == asked[1] != asked[2]


def plain(*args):
    """What both say of a call with these arguments."""
    extension = native.find()
    if extension is None:
        pytest.skip("there is no extension")
    says = extension.plain(args), registration._plain_in_python(args)
    assert says[0] == says[1], says
    return says[0]


def test_calls_that_go_straight_to_a_kernel():
    x = torch.zeros(4, 6)
    weight = torch.nn.Parameter(x.clone())
    assert plain(x, None, 3, "mean", (), (x, x.T), x.to_sparse(), torch.nn.Parameter(x, requires_grad=False))
    negative = torch.complex(x, x).conj().imag
    zeros = torch._efficientzerotensor(4)
    for tensor in (weight, x.as_subclass(Subclass), x.to("meta"), negative, torch.complex(x, x).conj(), zeros):
        assert not plain(x, tensor) and not plain(x, 1.0, (tensor,)), tensor
    with torch.no_grad():
        assert plain(x, weight) and not plain(x, negative)
    with forward_ad.dual_level():
        assert not plain(x)
    with FlopCounterMode(display=False):
        assert not plain(x)
    seen = []
    torch.func.vmap(lambda y: seen.append(plain(torch.zeros(2))) or y)(x)
    torch.func.grad(lambda y: seen.append(plain(torch.zeros(2))) or y.sum())(x)
    assert seen == [False, False] and plain(x)
