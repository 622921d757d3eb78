"""layer_norm and unmerge: operations on the rows of a capacity buffer. Values, gradients, undefined rows, bad input."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_no_worse_than_torch, backends_here, normal, offsets, spare_rows

from madtp_kernels import layer_norm, unmerge

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [3, 0, 1, 40]
TOKENS = sum(LENGTHS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_backend = pytest.mark.parametrize("backend", backends_here())


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


# ---- layer_norm


def norm_case(generator, width=24, dtype=torch.float32, bias=True):
    weight, shift = normal(generator, width), normal(generator, width)
    return normal(generator, TOKENS, width, dtype=dtype), weight.to(dtype), shift.to(dtype) if bias else None


@pytest.mark.parametrize("width, bias", [(24, True), (1, True), (769, False)])
@every_dtype
@every_backend
def test_layer_norm(backend, dtype, width, bias, generator):
    """In a buffer with spare rows, at most twice the error of PyTorch's; a sample alone has the same bits."""
    x, weight, shift = norm_case(generator, width, dtype, bias)
    got = layer_norm(spare_rows(x, 7), weight, shift, offsets(LENGTHS), 1e-6, backend=backend)
    wide = [None if t is None else t.double() for t in (weight, shift)]
    exact, eager = F.layer_norm(x.double(), (width,), *wide, 1e-6), F.layer_norm(x, (width,), weight, shift, 1e-6)
    assert got.dtype == dtype and got.shape == (TOKENS + 7, width)
    assert_no_worse_than_torch(got[:TOKENS], eager, exact, 30.0, "layer_norm")
    alone = layer_norm(x[4:], weight, shift, offsets([40]), 1e-6, backend=backend)
    if backend == "reference":
        torch.testing.assert_close(got[4:TOKENS], alone)
    else:
        assert torch.equal(got[4:TOKENS], alone)


@every_backend
def test_layer_norm_of_views_and_of_weights_in_another_precision(backend, generator):
    x, weight, shift = norm_case(generator, dtype=torch.bfloat16)
    expected = layer_norm(x, weight, shift, offsets(LENGTHS), backend=backend)
    view = torch.stack([x, x], 1)[:, 1]
    assert torch.equal(layer_norm(view, weight.float(), shift.double(), offsets(LENGTHS), backend=backend), expected)
    columns = torch.stack([x, x], 2)[..., 1]
    assert torch.equal(layer_norm(columns, weight, shift, offsets(LENGTHS), backend=backend), expected)


@every_backend
def test_layer_norm_as_an_operator(backend, generator):
    x, weight, shift = (t.requires_grad_() for t in norm_case(generator))
    cu_seqlens = offsets(LENGTHS)
    torch.library.opcheck(torch.ops.madtp_kernels.layer_norm.default, (x, weight, shift, cu_seqlens, 1e-5, backend))
    call = lambda *t: layer_norm(*t, cu_seqlens, backend=backend) * 2
    assert torch.equal(compiled(call)(x, weight, shift), call(x, weight, shift))
    with torch.inference_mode():
        assert torch.equal(call(x, weight, shift), call(x, weight, shift))


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_of_layer_norm(bias, generator):
    leaves = [t.double().requires_grad_() for t in norm_case(generator, 5, bias=bias) if t is not None]
    function = lambda x, w, b=None: layer_norm(x, w, b, offsets(LENGTHS))
    assert torch.autograd.gradcheck(function, leaves)


@every_backend
def test_gradients_of_layer_norm_see_tokens_only(backend, generator):
    """NaN beyond T in x and in the gradient of the result reaches no gradient, and the gradient there is zero."""
    x, weight, shift = norm_case(generator)
    seed, grads = normal(generator, *x.shape), []
    for spare in (0, 5):
        leaves = [t.clone().requires_grad_() for t in (spare_rows(x, spare), weight, shift)]
        out = layer_norm(*leaves, offsets(LENGTHS), backend=backend)
        grads.append(torch.autograd.grad(out, leaves, spare_rows(seed, spare)))
    for alone, buffered in zip(*grads, strict=True):
        torch.testing.assert_close(buffered[: len(alone)], alone)
    assert (grads[1][0][TOKENS:] == 0).all()


@every_backend
def test_next_to_nothing(backend, generator):
    for rows, lengths in ((0, []), (0, [0]), (3, []), (3, [0, 0])):
        x = normal(generator, rows, 4)
        assert layer_norm(x, x.new_ones(4), None, offsets(lengths), backend=backend).shape == (rows, 4)
        nothing = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
        assert unmerge(x, nothing, offsets(lengths), backend=backend).shape == (rows, 4)


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(44, device=DEVICE)}, r"^x: expected floating-point \[C, D\], got float32\[44\]"),
    ({"x": torch.zeros(44, 0, device=DEVICE)}, r"^x: expected at least one feature"),
    ({"weight": torch.zeros(3, device=DEVICE)}, r"^weight: expected \[D\] = .*\[24\]"),
    ({"bias": torch.zeros(24, dtype=torch.int32, device=DEVICE)}, r"^bias: expected \[D\] = .*\[24\]"),
    ({"cu_seqlens": [0, 3]}, "^cu_seqlens: expected int32 offsets"),
    ({"eps": 0.0}, "^eps: expected a finite number > 0"),
])  # fmt: skip
def test_layer_norm_refuses(change, message, generator):
    x, weight, bias = norm_case(generator)
    case = {"x": x, "weight": weight, "bias": bias, "cu_seqlens": offsets(LENGTHS), "eps": 1e-5}
    with pytest.raises(ValueError, match=message):
        layer_norm(**case | change)


# ---- unmerge


def merged_case(generator, dtype=torch.float32, width=24):
    """Rows that stand for several tokens, for one and for none; tokens that nothing stands for."""
    rows = torch.randint(-1, 9, (TOKENS,), generator=generator, dtype=torch.int32).to(DEVICE)
    return normal(generator, 12, width, dtype=dtype), rows


@every_dtype
@every_backend
def test_every_token_gets_its_row_back(backend, dtype, generator):
    x, rows = merged_case(generator, dtype)
    got = unmerge(x, spare_rows(rows, 5), offsets(LENGTHS), backend=backend)
    assert got.dtype == dtype and got.shape == (TOKENS + 5, 24)
    for token, row in enumerate(rows.tolist()):
        assert torch.equal(got[token], x[row] if row >= 0 else torch.zeros_like(x[0]))
    same = unmerge(torch.stack([x, x], 2)[..., 0], rows, offsets(LENGTHS), backend=backend)
    assert torch.equal(same, got[:TOKENS])


@every_backend
def test_the_gradient_of_a_row_is_the_sum_over_its_group(backend, generator):
    x, rows = merged_case(generator)
    x = spare_rows(x, 3).requires_grad_()
    seed = normal(generator, TOKENS, 24)
    out = unmerge(x, spare_rows(rows, 5), offsets(LENGTHS), backend=backend)
    (grad,) = torch.autograd.grad(out, x, spare_rows(seed, 5))
    for row in range(15):
        torch.testing.assert_close(grad[row], seed[rows == row].sum(0))
    cu_seqlens = offsets(LENGTHS)
    arguments = (x[:12].detach().requires_grad_(), rows, cu_seqlens, backend)
    torch.library.opcheck(torch.ops.madtp_kernels.unmerge.default, arguments)
    call = lambda x: unmerge(x, rows, cu_seqlens, backend=backend) * 2
    assert torch.equal(compiled(call)(x), call(x))


def test_gradcheck_of_unmerge(generator):
    x, rows = merged_case(generator, torch.float64, 3)
    assert torch.autograd.gradcheck(lambda x: unmerge(x, rows, offsets(LENGTHS)), x.requires_grad_(), nondet_tol=0.0)


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(4, device=DEVICE)}, r"^x: expected floating-point \[C', D\]"),
    ({"rows": torch.zeros(44, device=DEVICE)}, r"^rows: expected \[C\] = int32"),
    ({"cu_seqlens": offsets([45])}, "^cu_seqlens: offsets end at 45, beyond the 44 rows of rows"),
    ({"rows": torch.full((44,), 12, dtype=torch.int32, device=DEVICE)}, r"^rows: expected -1\.\.11, got 12\.\.12"),
    ({"rows": torch.full((44,), -2, dtype=torch.int32, device=DEVICE)}, r"^rows: expected -1\.\.11, got -2\.\.-2"),
])  # fmt: skip
def test_unmerge_refuses(change, message, generator):
    if DEVICE != "cpu" and not message.startswith("^x") and "int32" not in message:
        pytest.skip("values of a device are read in debug mode only")
    x, rows = merged_case(generator)
    with pytest.raises(ValueError, match=message):
        unmerge(**{"x": x, "rows": rows, "cu_seqlens": offsets(LENGTHS)} | change)
