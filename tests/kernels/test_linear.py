"""The linear layer of capacity buffers: accuracy, undefined rows, operator contracts, gradients, bad input, choice of tiles."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, backends_here, missing, normal, offsets, spare_rows

import madtp_kernels
from madtp_kernels import BackendError, backends, layer_norm, linear
from madtp_kernels.linear import reference

ACTIVATIONS = [None, "gelu", "gelu_tanh", "quick_gelu", "silu"]
LENGTHS = [3, 0, 1, 7]
every_backend = pytest.mark.parametrize("backend", backends_here())
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)


def case_of(
    generator, lengths=LENGTHS, width=24, columns=40, dtype=torch.float32, activation=None, spare=0, **left_out
):
    """Arguments of `linear` with logits of about 1; ``bias=False`` and ``residual=False`` leave those out."""
    tokens = sum(lengths)
    case = {
        "x": spare_rows(normal(generator, tokens, width, dtype=dtype), spare),
        "weight": normal(generator, columns, width, dtype=dtype) / width**0.5,
        "bias": normal(generator, columns, dtype=dtype),
        "cu_seqlens": offsets(lengths),
        "activation": activation,
        "residual": spare_rows(normal(generator, tokens, columns, dtype=dtype), spare),
    }
    return case | {name: None for name, wanted in left_out.items() if not wanted}


def doubled(case):
    return {n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in case.items()}


def tokens_of(case):
    return int(case["cu_seqlens"][-1])


def formula(x, weight, bias, cu_seqlens, activation, residual):
    """Written out, in float64, without any of the functions under test."""
    z = x[: int(cu_seqlens[-1])].double() @ weight.double().mT
    z = z if bias is None else z + bias.double()
    if activation == "gelu":
        z = z * 0.5 * torch.special.erfc(-z / 2**0.5)
    elif activation == "gelu_tanh":
        z = z * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    elif activation in ("quick_gelu", "silu"):
        z = z / (1 + torch.exp(-z * (1.702 if activation == "quick_gelu" else 1.0)))
    return z if residual is None else z + residual[: z.shape[0]].double()


def assert_accurate(got, case):
    exact = formula(**case)
    assert got.dtype == case["x"].dtype and got.shape == (case["x"].shape[0], case["weight"].shape[0])
    # float32 sums of terms that add up to about 1; in 16 bits PyTorch rounds after product, activation and sum.
    largest = max(exact.abs().max().item(), 4.0)
    bound = 5e-6 if got.dtype == torch.float32 else 1.5 * torch.finfo(got.dtype).eps * largest
    error = (got[: exact.shape[0]].double() - exact).abs().max().item()
    assert error <= bound, f"error {error:.2e}, expected at most {bound:.0e}"


# ---- values


@pytest.mark.parametrize("shift", [True, False])
@every_backend
def test_a_norm_that_follows_is_layer_norm(backend, shift, generator):
    case = case_of(generator, spare=3)
    gain, bias = normal(generator, 40), normal(generator, 40) if shift else None
    got = linear(**case, norm=(gain, bias, 1e-6), backend=backend)
    apart = layer_norm(linear(**case, backend=backend), gain, bias, case["cu_seqlens"], 1e-6, backend=backend)
    rows = tokens_of(case)
    assert torch.equal(got[:rows], apart[:rows])
    expected = torch.nn.functional.layer_norm(
        formula(**case), (40,), *(t if t is None else t.double() for t in (gain, bias))
    )
    torch.testing.assert_close(got[:rows].double(), expected, atol=2e-5, rtol=2e-5)


def test_gradients_flow_through_a_norm_that_follows(generator):
    case = doubled(case_of(generator, lengths=[2, 1], width=3, columns=4))
    names = ("x", "weight", "bias", "residual")
    leaves = [case[name].requires_grad_() for name in names] + [normal(generator, 4).double().requires_grad_()]

    def function(*tensors):
        return linear(**case | dict(zip(names, tensors, strict=False)), norm=(tensors[4], None, 1e-6))

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    "norm, message",
    [
        (torch.ones(40), r"norm: expected \(weight, bias, eps\)"),
        ((torch.ones(40), None), r"norm: expected \(weight, bias, eps\)"),
        ((torch.ones(39), None, 1e-6), r"norm weight: expected \[out\]"),
        ((None, None, 1e-6), "norm weight: expected"),
        ((torch.ones(40), torch.ones(41), 1e-6), r"norm bias: expected \[out\]"),
        ((torch.ones(40), None, 0.0), "norm eps: expected a finite number > 0"),
    ],
    ids=["tensor", "pair", "weight", "no weight", "bias", "eps"],
)
def test_a_norm_that_does_not_fit(norm, message, generator):
    norm = tuple(t.to(DEVICE) if torch.is_tensor(t) else t for t in norm) if isinstance(norm, tuple) else norm
    with pytest.raises(ValueError, match=message):
        linear(**case_of(generator), norm=norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_activation
@every_backend
def test_formula(backend, activation, dtype, generator):
    case = case_of(generator, dtype=dtype, activation=activation)
    assert_accurate(linear(**case, backend=backend), case)


@pytest.mark.parametrize("bias, residual", [(False, False), (True, False), (False, True)])
@every_backend
def test_optional_terms(backend, bias, residual, generator):
    case = case_of(generator, bias=bias, residual=residual)
    assert_accurate(linear(**case, backend=backend), case)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@every_backend
def test_far_from_zero_an_activation_is_nothing_or_all(backend, activation, generator):
    case = case_of(generator, lengths=[4], width=1, columns=2, activation=activation, bias=False, residual=False)
    case["x"] = torch.tensor([[1e4], [100.0], [-100.0], [-1e4]], device=DEVICE)
    case["weight"] = torch.ones(2, 1, device=DEVICE)
    expected = torch.tensor([[1e4], [100.0], [0.0], [0.0]], device=DEVICE).expand(4, 2)
    got = linear(**case, backend=backend).abs()
    torch.testing.assert_close(got, expected, atol=1e-40, rtol=0)  # -100 e^-100 is no zero to who computes it


@every_backend
def test_undefined_rows_reach_no_result(backend, generator):
    case = case_of(generator, activation="gelu")
    tokens = tokens_of(case)
    wide = case | {name: spare_rows(case[name], 9) for name in ("x", "residual")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the reference is a library's, whose threads may divide other numbers of rows otherwise
    try:
        assert torch.equal(linear(**wide, backend=backend)[:tokens], linear(**case, backend=backend))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("lengths, spare", [([], 0), ([], 4), ([0, 0], 0), ([0], 5), ([1], 0)], ids=str)
@every_backend
def test_next_to_nothing(backend, lengths, spare, generator):
    case = case_of(generator, lengths, spare=spare)
    got = linear(**case, backend=backend)
    assert got.shape == (sum(lengths) + spare, 40)
    if sum(lengths):
        assert_accurate(got, case)


@every_backend
def test_views_of_larger_buffers(backend, generator):
    case = case_of(generator)
    expected = linear(**case, backend=backend)
    views = dict(case)
    for name in ("x", "weight", "residual"):
        wide = normal(generator, case[name].shape[0], 3, case[name].shape[1])
        wide[:, 1] = case[name]
        views[name] = wide[:, 1]
    torch.testing.assert_close(linear(**views, backend=backend), expected)
    for name in ("x", "weight", "bias", "residual"):
        wide = normal(generator, *(2 * size for size in case[name].shape))
        view = wide[tuple(slice(None, None, 2) for _ in case[name].shape)]
        views[name] = view.copy_(case[name])
    torch.testing.assert_close(linear(**views, backend=backend), expected)


@every_backend
def test_addresses_beyond_32_bits(backend, generator, monkeypatch):
    """Rows of x and residual 2^28 elements apart: only the parts that are used exist in memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    case = case_of(generator, dtype=torch.bfloat16)
    expected = linear(**case, backend=backend)
    for name in ("x", "residual"):
        rows, columns = case[name].shape
        spread = torch.empty(rows * 2**28, dtype=torch.bfloat16, device=DEVICE)
        case[name] = spread.as_strided((rows, columns), (2**28, 1)).copy_(case[name])
    torch.testing.assert_close(linear(**case, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_backend
def test_same_input_same_bits(backend, dtype, generator):
    case = case_of(generator, dtype=dtype, activation="gelu")
    expected = linear(**case, backend=backend)
    with torch.inference_mode():
        assert torch.equal(linear(**case, backend=backend), expected)


# ---- operator, gradients, compilation


def differentiable(case):
    return {n: v.requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in case.items()}


def operator_arguments(case, backend):
    names = ("x", "weight", "bias", "cu_seqlens")
    return (*(case[n] for n in names), case["activation"] or "", case["residual"], backend)


@every_activation
@every_backend
def test_opcheck(backend, activation, generator):
    case = differentiable(case_of(generator, activation=activation))
    torch.library.opcheck(torch.ops.madtp_kernels.linear.default, operator_arguments(case, backend))


@pytest.mark.parametrize("bias, residual", [(True, True), (False, False)])
@every_activation
def test_gradcheck(activation, bias, residual, generator):
    case = doubled(case_of(generator, width=3, columns=4, activation=activation, bias=bias, residual=residual))
    case = differentiable(case)
    leaves = {n: v for n, v in case.items() if torch.is_tensor(v) and v.requires_grad}

    def function(*tensors):
        return linear(**(case | dict(zip(leaves, tensors, strict=True))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@every_activation
@every_backend
def test_gradients_see_tokens_only(backend, activation, generator):
    """Gradients of a buffer full of NaN beyond T, whose output's gradient is NaN there too: those of the tokens alone."""
    case = case_of(generator, activation=activation)
    tokens, seed = tokens_of(case), None
    grads = []
    for spare in (0, 5):
        wide = case | {name: spare_rows(case[name].detach(), spare) for name in ("x", "residual")}
        leaves = [
            t.detach().clone().requires_grad_() for t in (wide["x"], wide["weight"], wide["bias"], wide["residual"])
        ]
        wide |= dict(zip(("x", "weight", "bias", "residual"), leaves, strict=True))
        out = linear(**wide, backend=backend)
        seed = normal(generator, *out.shape) if seed is None else seed
        grads.append(torch.autograd.grad(out, leaves, spare_rows(seed, spare)))
    for alone, buffered in zip(*grads, strict=True):
        rows = alone.shape[0]
        torch.testing.assert_close(buffered[:rows], alone)
        assert (buffered[rows:] == 0).all()
    exact = {
        n: v.double().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in case.items()
    }
    leaves = [exact[n] for n in ("x", "weight", "bias", "residual")]
    expected = torch.autograd.grad(formula(**exact), leaves, seed[:tokens].double())
    for got, want in zip(grads[0], expected, strict=True):
        torch.testing.assert_close(got, want.float(), atol=2e-5, rtol=2e-5)


@every_backend
def test_compile_without_graph_breaks(backend, generator):
    case = case_of(generator, activation="gelu")
    tensors = {n: v for n, v in case.items() if torch.is_tensor(v)}

    def block(tensors):
        return linear(**tensors, activation="gelu", backend=backend) * 2

    torch._dynamo.reset()
    ours = torch.compile(block, fullgraph=True, backend="aot_eager")(tensors)
    assert torch.equal(ours, block(tensors))


# ---- bad input, backends


DAMAGE = {
    "dtype": lambda v: v.to(torch.int64),
    "dims": lambda v: v[None],
    "list": lambda v: v.tolist(),
    "device": lambda v: v.to("meta"),
}


@pytest.mark.parametrize("name", ["x", "weight", "bias", "cu_seqlens", "residual"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_tensors(name, damage, generator):
    case = case_of(generator)
    case[name] = DAMAGE[damage](case[name])
    named = "weight" if (name, damage) == ("x", "device") else name  # x says on which device the others have to be
    with pytest.raises(ValueError, match=f"^{named}: expected "):
        linear(**case)


@pytest.mark.parametrize("name, axis", [("weight", 1), ("bias", 0), ("residual", 0), ("residual", 1)])
def test_sizes_that_do_not_fit(name, axis, generator):
    case = case_of(generator)
    case[name] = case[name].narrow(axis, 0, case[name].shape[axis] - 1)
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        linear(**case)


@pytest.mark.parametrize("activation", ["relu", "", 1])
def test_unknown_activation(activation, generator):
    with pytest.raises(
        ValueError, match="^activation: expected None or one of 'gelu', 'gelu_tanh', 'quick_gelu', 'silu', got "
    ):
        linear(**case_of(generator, activation=activation))


@pytest.mark.parametrize("bounds", [[1, 3], [0, 5, 4], [0, 12]], ids=str)
def test_offsets_that_describe_no_batch(bounds, generator):
    case = case_of(generator) | {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE)}
    previous = madtp_kernels.checks._debug
    madtp_kernels.set_debug(True)
    try:
        with pytest.raises(ValueError, match="^cu_seqlens: "):
            linear(**case)
    finally:
        madtp_kernels.set_debug(previous)


@pytest.mark.skipif(missing("cuda") is not None, reason=str(missing("cuda")))
def test_cuda_takes_pytorchs_product(generator):
    case = case_of(generator, activation="gelu")
    assert backends.resolve("linear", "linear", "cuda", case["x"])[1] is reference.linear
    assert torch.equal(
        linear(**case, backend="cuda"), F.gelu(F.linear(case["x"], case["weight"], case["bias"])) + case["residual"]
    )


# ---- the CPU kernel

on_cpu = pytest.mark.skipif(DEVICE != "cpu" or missing("cpu") is not None, reason=f"on {DEVICE}: {missing('cpu')}")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@on_cpu
@every_dtype
@pytest.mark.parametrize("width, columns", [(1, 1), (16, 33), (31, 48), (100, 50), (768, 97)], ids=str)
def test_any_width(width, columns, dtype, generator):
    """Tiles and vectors that are full, and ones that are not."""
    for rows in (1, 15, 16, 17, 33, 130):
        case = case_of(generator, [rows], width, columns, dtype, activation="gelu")
        assert_accurate(linear(**case, backend="cpu"), case)


@on_cpu
@pytest.mark.parametrize("width", [192, 193, 768, 3072])
def test_long_sums_round_no_more_than_twice_as_much_as_pytorch(width, generator):
    case = case_of(generator, [64], width, 96, torch.float32, residual=False)
    exact = F.linear(case["x"].double(), case["weight"].double(), case["bias"].double())
    ours, theirs = linear(**case, backend="cpu"), F.linear(case["x"], case["weight"], case["bias"])
    errors = [((result.double() - exact).norm() / exact.norm()).item() for result in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] and errors[0] < 4e-7, errors


@on_cpu
@every_dtype
@pytest.mark.parametrize("width, columns", [(200, 130), (192, 130), (400, 520)])  # the last one's features are shared
def test_a_row_has_the_same_bits_in_any_number_of_rows_and_threads(dtype, width, columns, generator):
    case = case_of(generator, [1500], width, columns, dtype, activation="gelu")
    expected = linear(**case, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for rows in (1, 2, 16, 17, 31, 64, 65, 577, 1024):
            torch.set_num_threads(1 + rows % 3)
            part = case | {name: case[name][-rows:] for name in ("x", "residual")} | {"cu_seqlens": offsets([rows])}
            assert torch.equal(linear(**part, backend="cpu"), expected[-rows:]), rows
    finally:
        torch.set_num_threads(threads)


@on_cpu
def test_rows_beyond_the_last_token_take_no_time_and_no_harm(generator):
    case = case_of(generator, activation="gelu")
    expected = linear(**case, backend="cpu")
    whole = {name: case[name] for name in ("x", "weight", "bias", "activation", "residual")}
    assert torch.equal(linear(**whole, cu_seqlens=None, backend="cpu"), expected)


@on_cpu
@every_dtype
def test_not_a_number_stays_one(dtype, generator):
    for name in ("x", "weight", "bias", "residual"):
        case = case_of(generator, dtype=dtype, activation="gelu")
        case[name].view(-1)[0] = torch.nan
        exact = formula(**case)
        assert torch.equal(linear(**case, backend="cpu").isnan(), exact.isnan()), name
        assert exact.isnan().any()


@on_cpu
def test_many_numbers_of_rows_leave_no_memory_behind(generator):
    """A library that compiles a product for each number of rows keeps megabytes for each."""
    case = case_of(generator, [2000], 96, 96, torch.bfloat16, residual=False)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    def use(rows):
        linear(case["x"][:rows], case["weight"], case["bias"], None, activation="gelu", backend="cpu")

    use(2000)
    before = resident()
    for rows in range(1, 1500, 3):
        use(rows)
    assert resident() - before < 20e6


@pytest.mark.skipif(missing("triton") is not None, reason=str(missing("triton")))
def test_a_backend_that_cannot_run_says_why(generator):
    with pytest.raises(BackendError, match="linear: backend 'triton' .* float64 is left to the reference"):
        linear(**doubled(case_of(generator)), backend="triton")


# ---- choice of tiles


@pytest.fixture
def implementation(monkeypatch):
    """The Triton implementation as on a Hopper GPU."""
    pytest.importorskip("triton")
    from madtp_kernels.linear import triton as implementation

    monkeypatch.setattr(implementation, "_copy_engine", lambda device: True)
    return implementation


def product(rows, width=768, columns=768, dtype=torch.bfloat16):
    return (torch.zeros(size, width, dtype=dtype) for size in (rows, columns))


def test_without_a_measurement_half_of_the_rows_fill_the_device(implementation):
    tiles = implementation.tiles
    large, middle, small = tiles.COPY_ENGINE
    chosen = [tiles.choose(tiles.COPY_ENGINE, 10, 100, rows, 768, 768) for rows in (300, 8400, 8500, 36928)]
    assert chosen == [small, small, large, large]
    narrow = [tiles.choose(tiles.COPY_ENGINE, 10, 100, 10**5, 768, columns) for columns in (64, 128, 256)]
    assert narrow == [small, middle, large]


def test_the_most_similar_product_that_was_measured_decides(implementation, monkeypatch):
    tiles = implementation.tiles
    entries = [(36928, 768, 3072), (36928, 3072, 768), (1154, 768, 768)]
    measured = [tiles.Measured(*sizes, tile) for sizes, tile in zip(entries, tiles.COPY_ENGINE, strict=True)]
    monkeypatch.setattr(tiles, "MEASURED", {123: tuple(measured)})
    sizes = [(70000, 1024, 4096), (18000, 4096, 1024), (577, 512, 512), (36928, 768, 3072)]
    chosen = [tiles.choose(tiles.COPY_ENGINE, 123, 100, *size) for size in sizes]
    assert chosen == [*tiles.COPY_ENGINE, tiles.COPY_ENGINE[0]]
    assert tiles.choose(tiles.UNALIGNED, 123, 100, *sizes[0]) in tiles.UNALIGNED
    assert tiles.choose(tiles.COPY_ENGINE, 123, 100, 0, 768, 3072) in tiles.COPY_ENGINE


def test_tables_hold_tiles_that_were_tried(implementation):
    tiles = implementation.tiles
    for entries in tiles.MEASURED.values():
        assert {entry.tile for entry in entries} <= {*tiles.COPY_ENGINE, *tiles.CANDIDATES}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: t[:, 1:9],
        lambda t: t[:, :0],
        lambda t: t[:, :5].contiguous(),
        lambda t: t[:1].expand(64, -1),
        lambda t: t.flatten()[:1024].unfold(0, 64, 8),
    ],
    ids=["address", "empty", "stride", "one row", "overlapping rows"],
)
def test_the_copy_engine_needs_aligned_operands(implementation, spoil):
    x, weight = product(64, 64, 64)
    assert implementation._tiles(x, weight) is implementation.tiles.COPY_ENGINE
    assert implementation._tiles(spoil(x), spoil(weight)) is implementation.tiles.UNALIGNED
    assert implementation._tiles(x.float(), weight.float()) is implementation.tiles.FLOAT32
