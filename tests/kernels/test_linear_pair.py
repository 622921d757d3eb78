"""Two linear layers in one launch: values in each form, undefined rows, bits, bad input; and the layer of text that uses it."""

import pytest
import torch
from helpers import DEVICE, backends_here, interpreted, normal, offsets, spare_rows

from madtp.config import TextConfig
from madtp.pruning import Pruning, Tokens
from madtp.text import TwinCrossAttention, split
from madtp_kernels import RaggedBatch, linear, linear_pair, pair_attention
from madtp_kernels.pair_attention import _repeated

WIDTH, COLUMNS = 24, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Samples of each half: empty ones, more rows than a tile, none at all.
HALVES = {"uneven": ([3, 0, 1, 7], [0, 5, 70, 2]), "one half": ([2, 1], [0, 0]), "empty": ([0], [0]), "none": ([], [])}
every_backend = pytest.mark.parametrize("backend", backends_here())
every_form = pytest.mark.parametrize("form", ["both", "halves", "columns"])
each_case = pytest.mark.parametrize("case", HALVES)


def case_of(generator, form, halves, dtype=torch.float32, spare=0, bias=True):
    """Arguments of `linear_pair`."""
    first, second = halves
    lengths = first if form == "both" else [*first, *(first if form == "columns" else second)]
    x = normal(generator, sum(lengths), WIDTH, dtype=dtype)
    batch = RaggedBatch(spare_rows(x, spare), offsets(lengths), max(lengths, default=0), bound=spare > 0)
    weights = tuple(normal(generator, COLUMNS, WIDTH, dtype=dtype) / WIDTH**0.5 for _ in range(2))
    biases = tuple(normal(generator, COLUMNS, dtype=dtype) if bias else None for _ in range(2))
    return {"x": batch, "weights": weights, "biases": biases, "form": form}


def expected(x, weights, biases, form, product=None):
    """Values and offsets, by two products of all rows; in float64 unless another ``product`` is given."""

    def exact(rows, weight, bias):
        return rows.double() @ weight.double().mT + (0 if bias is None else bias.double())

    rows = x.values[: int(x.cu_seqlens[-1])]
    ours, theirs = ((product or exact)(rows, *layer) for layer in zip(weights, biases, strict=True))
    if form == "both":
        return torch.cat([ours, theirs]), torch.cat([x.cu_seqlens, x.cu_seqlens[1:] + x.cu_seqlens[-1]])
    cut = int(x.cu_seqlens[x.batch_size // 2])
    if form == "halves":
        return torch.cat([ours[:cut], theirs[cut:]]), x.cu_seqlens
    return torch.cat([ours[:cut], theirs[cut:]], 1), x.cu_seqlens[: x.batch_size // 2 + 1]


@pytest.mark.parametrize("spare", [0, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_form
@every_backend
def test_formula(backend, form, dtype, spare, generator):
    case = case_of(generator, form, HALVES["uneven"], dtype, spare)
    got = linear_pair(**case, backend=backend)
    values, cu_seqlens = expected(**case)
    assert got.values.dtype == dtype and got.bound == (spare > 0) and torch.equal(got.cu_seqlens, cu_seqlens)
    assert got.values.shape == ({"both": 2, "halves": 1, "columns": 0.5}[form] * len(case["x"].values), values.shape[1])
    bound = 5e-6 if dtype == torch.float32 else 1.5 * torch.finfo(dtype).eps * values.abs().max().item()
    assert (got.values[: len(values)].double() - values).abs().max() <= bound


@each_case
@every_form
@every_backend
def test_the_bits_of_two_layers(backend, form, case, generator):
    """Rows have the bits that they have in a product of their own."""
    case = case_of(generator, form, HALVES[case], spare=2, bias=False)
    got = linear_pair(**case, backend=backend)
    cu_seqlens = offsets([int(case["x"].cu_seqlens[-1])])
    values, cu_out = expected(**case, product=lambda x, w, b: linear(x, w, b, cu_seqlens, backend=backend))
    assert torch.equal(got.cu_seqlens, cu_out)
    if interpreted(backend) or DEVICE == "cuda":
        assert torch.equal(got.values[: len(values)], values)
    else:  # the library's products differ with the number of rows
        torch.testing.assert_close(got.values[: len(values)], values)


@every_form
def test_a_buffer_without_rows_is_not_launched(form, generator, monkeypatch):
    """A descriptor for the copy engine cannot be made of it."""
    implementation = pytest.importorskip("madtp_kernels.linear.triton")
    monkeypatch.setattr(implementation.Launch, "__call__", lambda *_: pytest.fail("a kernel was launched"))
    got = linear_pair(**case_of(generator, form, HALVES["empty"]), backend="triton")
    assert len(got.values) == 0 and got.cu_seqlens.tolist() == [0] * {"both": 3, "halves": 3, "columns": 2}[form]


@every_form
@every_backend
def test_opcheck(backend, form, generator):
    case = case_of(generator, form, HALVES["uneven"])
    arguments = (case["x"].values, *case["weights"], *case["biases"], case["x"].cu_seqlens, form, backend)
    torch.library.opcheck(torch.ops.madtp_kernels.linear_pair.default, arguments)


def test_bad_input(generator):
    case = case_of(generator, "halves", HALVES["uneven"])
    (weight, other), biases = case["weights"], case["biases"]
    odd = RaggedBatch(case["x"].values, case["x"].cu_seqlens[[0, 1, 2, 8]], 90)
    for change, message in [
        ({"form": "rows"}, "form: expected one of"),
        ({"x": odd}, "x: expected an even number of samples"),
        ({"weights": (weight, other[1:])}, r"weights\[1\]: expected"),
        ({"weights": (weight.double(), other)}, r"weights\[0\]: expected"),
        ({"biases": (biases[0], biases[1][1:])}, r"biases\[1\]: expected"),
        ({"biases": biases[:1]}, "biases: expected a tuple of two, got 1"),
        ({"weights": torch.stack([weight, other])}, r"weights: expected a tuple of two, got float32\[2, "),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_pair(**case | change)
    with pytest.raises(NotImplementedError, match="no gradient"):
        linear_pair(**case | {"weights": (weight.requires_grad_(), other)})


def test_a_call_that_repeats_another_computes_the_same(generator):
    """What an eager call on a GPU does from the second on, here through the interpreter."""
    attention_triton = pytest.importorskip("madtp_kernels.attention.triton")
    from madtp_kernels.linear import triton as linear_triton

    def tokens(lengths):
        x = spare_rows(normal(generator, sum(lengths), 32), 3)
        return RaggedBatch(x, offsets(lengths), max(lengths), bound=True)

    words, images = tokens([3, 1, 0, 6]), tokens([9, 2, 3, 0, 4, 5, 1, 7])
    bias = spare_rows(normal(generator, 31), 3)
    shapes = [((32, 32), (32,)), ((64, 32), (64,)), ((16, 32), (16,))]
    layers = [tuple(tuple(normal(generator, *shape) / 6 for _ in range(2)) for shape in pair) for pair in shapes]
    expected = pair_attention(words, images, *layers, 2, key_bias=bias, backend="triton")
    flat = [tensor for weights, biases in layers for tensor in (*weights, *biases)]
    tensors = (words.values, words.cu_seqlens, images.values, images.cu_seqlens, bias, *flat)
    pair = linear_triton.linear_pair
    got = _repeated(pair, pair, attention_triton.attention, pair, tensors, 2, words.max_seqlen, images.max_seqlen)
    torch.testing.assert_close(got[:10], expected[:10], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("merges", [False, True])
@every_backend
def test_words_look_at_both_images_at_once(backend, merges, generator):
    """As at one after the other, whose keys are longer or missing, with a bias of the keys."""
    config = TextConfig(hidden_size=32, num_attention_heads=2, encoder_width=24, intermediate_size=64)
    layer = TwinCrossAttention(config, merges).to(DEVICE).eval()
    for parameter in layer.parameters():
        parameter.data.copy_(normal(generator, *parameter.shape) / parameter.shape[-1] ** 0.5)
    assert layer.is_plain

    def tokens(lengths, width, spare=4):
        values = spare_rows(normal(generator, sum(lengths), width), spare)
        bias = spare_rows(normal(generator, sum(lengths)), spare)
        return Tokens.start(RaggedBatch(values, offsets(lengths), max(lengths), bound=True), key_bias=bias)

    words, images = tokens([3, 1, 0, 6], 32), tokens([9, 2, 3, 0, 4, 5, 1, 7], 24)
    with torch.no_grad():
        both, apart = (
            layer(words, others, Pruning(backend=backend).backend, None) for others in ((images,), split(images))
        )
    torch.testing.assert_close(both.values[:10], apart.values[:10], atol=2e-6, rtol=2e-6)
