"""Bad input is refused with an error that names the argument, what came and what was expected; and how backends are chosen.

Every operation, every backend that is available here.
"""

import logging
import math
import os
import re

import pytest
import torch
from helpers import CASES, DEVICE, OPERATIONS, backends_here, offsets, run

import madtp_kernels
from madtp_kernels import BackendError, RaggedBatch, attention, backends, checks, native

LENGTHS = [4, 0, 1, 6]
TOKENS = sum(LENGTHS)
BATCH = len(LENGTHS)

pytestmark = pytest.mark.parametrize("backend", backends_here())


def case_of(op, generator, **options):
    """A valid call with every optional argument given."""
    optional = {"compact": "groups protected min_keep ids sizes norm", "novelty": "rank"}
    optional |= {"nearest_kept": "goes inverse_norms", "match_tokens": ""}
    optional = optional.get(op, "bias")
    return CASES[op](generator, LENGTHS, **{**dict.fromkeys(optional.split(), True), **options})


def refuses(op, case, backend, *message, error=ValueError):
    """The call raises, and the message holds the parts in this order."""
    with pytest.raises(error, match="(?s)" + ".*".join(message)):
        OPERATIONS[op](**case, backend=backend)


def shown(value):
    """How an error shows a tensor that came."""
    return re.escape(f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}")


# ---- every tensor argument of every operation: dtype, type, number of dimensions, device, sizes

# The first one sets dtype, device and sizes; the others have to match it.
TENSORS = {
    "attention": "q k v cu_seqlens_q cu_seqlens_k key_bias",
    "attention_importance": "q k out lse cu_seqlens key_bias",
    "attention_with_importance": "q k v cu_seqlens key_bias",
    "score_tokens": "x dictionary received cls cu_seqlens bias",
    "compact": "x importance threshold keep_count protected groups min_keep ids sizes",
    "attention_received": "q k lse cu_seqlens key_bias",
    "nearest_kept": "keys kept cu_seqlens goes inverse_norms",
    "novelty": "keys rank cu_seqlens",
    "match_tokens": "keys count cu_seqlens",
}
ARGUMENTS = [(op, name) for op, names in TENSORS.items() for name in names.split() if name != "x" or op != "compact"]
MATCHED = [(op, name) for op, name in ARGUMENTS if not TENSORS[op].startswith(f"{name} ")]
# Axes whose size another argument fixes. (More keys than queries, or rows beyond the last offset, are legal.)
SIZED = [
    ("attention", "k", 2), ("attention", "v", 0), ("attention", "v", 1), ("attention", "v", 2),
    ("attention", "cu_seqlens_k", 0), ("attention", "key_bias", 0),
    *[("attention_importance", name, axis) for name in ("k", "out") for axis in range(3)],
    *[("attention_with_importance", name, axis) for name in ("k", "v") for axis in range(3)],
    ("attention_with_importance", "key_bias", 0),
    ("attention_importance", "lse", 0), ("attention_importance", "lse", 1), ("attention_importance", "key_bias", 0),
    ("score_tokens", "dictionary", 1),
    *[("score_tokens", name, 0) for name in ("received", "cls", "bias")],
    *[("compact", name, 0) for name in TENSORS["compact"].split()[1:]],
    *[("attention_received", name, axis) for name, axis in (("k", 0), ("k", 2), ("lse", 0), ("lse", 1), ("key_bias", 0))],
    *[("nearest_kept", name, 0) for name in ("kept", "goes", "inverse_norms")], ("novelty", "rank", 0), ("match_tokens", "count", 0),
]  # fmt: skip


def full_case(op, name, generator):
    return case_of(op, generator, **({"by_count": True} if name == "keep_count" else {}))


def other_dtype(value):
    return value.to(torch.int64 if value.dtype in (torch.int32, torch.bool) else torch.int16)


@pytest.mark.parametrize(
    "damage", [other_dtype, lambda v: v[None], lambda v: v.tolist()], ids=["dtype", "dims", "list"]
)
@pytest.mark.parametrize("op, name", ARGUMENTS, ids=lambda value: value)
def test_wrong_dtype_dimensions_or_type(op, name, damage, backend, generator):
    case = full_case(op, name, generator)
    case[name] = bad = damage(case[name])
    refuses(op, case, backend, f"^{name}: expected ", "got ", "list" if isinstance(bad, list) else shown(bad))


@pytest.mark.parametrize("op, name", MATCHED, ids=lambda value: value)
def test_wrong_device(op, name, backend, generator):
    case = full_case(op, name, generator)
    case[name] = bad = case[name].to("meta")
    refuses(op, case, backend, f"^{name}: expected ", f"on {DEVICE}", "got ", shown(bad))


@pytest.mark.parametrize("op, name, axis", SIZED, ids=str)
def test_wrong_size(op, name, axis, backend, generator):
    case = full_case(op, name, generator)
    good = case[name]
    case[name] = bad = good.narrow(axis, 0, good.shape[axis] - 1)
    refuses(op, case, backend, f"^{name}: expected ", rf"\b{good.shape[axis]}\b", "got ", shown(bad))


@pytest.mark.parametrize("op", TENSORS)
def test_a_dtype_no_backend_computes_in(op, backend, generator):
    case = case_of(op, generator)
    name = TENSORS[op].split()[0]
    if op == "compact":
        case[name] = case[name].with_values(case[name].values.to(torch.int32))
    else:
        case[name] = case[name].to(torch.int32)
    refuses(op, case, backend, rf"^{name}(\.values)?: expected floating-point", "got int32")


def test_tokens_to_compact_that_are_no_ragged_batch(backend, generator):
    case = case_of("compact", generator)
    refuses("compact", {**case, "x": case["x"].values}, backend, "^x: expected a RaggedBatch", r"got float32\[11, 16\]")
    batch = RaggedBatch(torch.zeros(TOKENS, 2, 3, device=DEVICE), offsets(LENGTHS), 6)
    refuses(
        "compact",
        {**case, "x": batch},
        backend,
        r"^x\.values: expected floating-point \[T, D\]",
        r"float32\[11, 2, 3\]",
    )


# ---- offsets and length bounds


def broken_offsets(cu):
    yield cu + 1, "expected offsets that start at 0, got 1"
    yield cu.index_fill(0, torch.tensor([2], device=DEVICE), 2), "offsets decrease from 4 to 2 at sample 1"
    yield cu.index_fill(0, torch.tensor([1], device=DEVICE), -1), "offsets decrease from 0 to -1 at sample 0"
    yield (
        cu.index_fill(0, torch.tensor([BATCH], device=DEVICE), TOKENS + 1),
        f"offsets end at {TOKENS + 1}, beyond the {TOKENS} rows",
    )


@pytest.mark.parametrize("op, name", [a for a in ARGUMENTS if a[1].startswith("cu_seqlens")], ids=lambda value: value)
def test_offsets_that_describe_no_batch(op, name, backend, generator, read_device_tensors):
    for bad, message in broken_offsets(offsets(LENGTHS)):
        case = case_of(op, generator)
        case |= {name: bad, name.replace("cu_seqlens", "max_seqlen"): 100}
        refuses(op, case, backend, f"^{name}: {message}")


@pytest.mark.parametrize(
    "op, name",
    [(op, name.replace("cu_seqlens", "max_seqlen")) for op, name in ARGUMENTS if name.startswith("cu_seqlens")],
    ids=lambda value: value,
)
def test_length_bound(op, name, backend, generator, read_device_tensors):
    case = case_of(op, generator)
    refuses(op, {**case, name: 5}, backend, f"^{name}: 5 is below the length 6 of sample 3")
    refuses(op, {**case, name: -1}, backend, f"^{name}: expected an int >= 0, got -1")
    refuses(op, {**case, name: 6.0}, backend, f"^{name}: expected an int >= 0, got float 6.0")
    refuses(op, {**case, name: torch.tensor(6)}, backend, f"^{name}: expected an int >= 0, got int64")
    refuses(op, {**case, name: None}, backend, f"^{name}: expected an int >= 0, got NoneType")
    case[name] = 100  # an upper bound need not be tight
    run(op, case, backend)


def test_queries_and_keys_have_to_be_the_same_samples(backend, generator):
    case = case_of("attention", generator)
    case |= {"cu_seqlens_k": offsets([4, 1, 6])}
    refuses("attention", case, backend, r"^cu_seqlens_k: expected \[B\+1\] = int32\[5\]", r"got int32\[4\]")


# ---- sizes and numbers


@pytest.mark.parametrize("op", ["attention", "attention_importance", "attention_with_importance"])
@pytest.mark.parametrize("heads, head_dim", [(0, 8), (2, 0), (2, 257)])
def test_heads_of_impossible_size(op, heads, head_dim, backend, generator):
    case = case_of(op, generator)
    for name in ("q", "k", "v", "out"):
        if name in case:
            case[name] = torch.zeros(TOKENS, heads, head_dim, device=DEVICE)
    got = rf"got float32\[11, {heads}, {head_dim}\]"
    refuses(op, case, backend, "^q: expected .*H >= 1 and 1 <= d <= 256", got)


NOT_POSITIVE = [0, 0.0, -1.0, math.nan, math.inf, torch.tensor(1.0), "1"]


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=str)
def test_temperature(value, backend, generator):
    case = case_of("score_tokens", generator) | {"temperature": value}
    got = "float32" if torch.is_tensor(value) else re.escape(repr(value))
    refuses("score_tokens", case, backend, "^temperature: expected a finite number > 0, got", got)


@pytest.mark.parametrize("op", ["attention", "attention_importance", "attention_with_importance"])
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=str)
def test_scale(op, value, backend, generator):
    case = case_of(op, generator) | {"scale": value}
    got = "float32" if torch.is_tensor(value) else re.escape(repr(value))
    refuses(op, case, backend, "^scale: expected a finite number > 0, got", got)


@pytest.mark.parametrize("op", ["attention", "attention_importance", "attention_with_importance", "attention_received"])
def test_a_switch_is_no_word(op, backend, generator):
    refuses(op, case_of(op, generator) | {"causal": "no"}, backend, "^causal: expected True or False, got str 'no'")


@pytest.mark.parametrize("op", TENSORS)
def test_tensors_are_dense(op, backend, generator):
    name = TENSORS[op].split()[1]
    case = full_case(op, name, generator)
    refuses(op, case | {name: case[name].to_sparse()}, backend, f"^{name}: expected", "of layout torch.sparse_coo")


def test_what_entered_is_named(backend, generator):
    case = case_of("score_tokens", generator)
    tokens = RaggedBatch(case.pop("x"), case.pop("cu_seqlens"), case.pop("max_seqlen"))
    for entering in (tokens.values[:-1], tokens.values.double()):
        with pytest.raises(ValueError, match=r"^entering: expected \[T, D\] = float32"):
            madtp_kernels.prune(tokens, entering, **case, backend=backend)


@pytest.mark.parametrize("op", ["attention", "attention_importance", "attention_with_importance"])
def test_key_bias_of_another_precision_than_the_logits(op, backend, generator):
    case = case_of(op, generator, dtype=torch.bfloat16)
    case["key_bias"] = case["key_bias"].double()
    refuses(op, case, backend, "^key_bias: expected", "float32", "got float64")


def test_empty_dictionary(backend, generator):
    case = case_of("score_tokens", generator, bias=False) | {"dictionary": torch.zeros(0, 16, device=DEVICE)}
    refuses("score_tokens", case, backend, r"^dictionary: expected at least one entry \[M, D\], got float32\[0, 16\]")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "op, name",
    [
        ("score_tokens", "received"), ("score_tokens", "cls"), ("compact", "importance"), ("compact", "threshold"),
        ("novelty", "rank"),
    ],
)  # fmt: skip
def test_scores_that_are_not_finite(op, name, bad, backend, generator, read_device_tensors):
    case = case_of(op, generator)
    case[name] = case[name].index_fill(0, torch.tensor([3], device=DEVICE), bad)
    refuses(op, case, backend, f"^{name}: expected finite scores, got 1 NaN or infinite of {len(case[name])}")


@pytest.mark.parametrize("both", [True, False])
def test_threshold_and_keep_count_exclude_each_other(both, backend, generator):
    case = case_of("compact", generator)
    counts = torch.ones(BATCH, dtype=torch.int32, device=DEVICE)
    case |= {"keep_count": counts} if both else {"threshold": None}
    refuses(
        "compact",
        case,
        backend,
        "^threshold, keep_count: expected exactly one of them, got",
        "both" if both else "neither",
    )


@pytest.mark.parametrize("name, values, message", [
    ("groups", [0, 1, 2, BATCH], rf"expected 0\.\.B-1 = 0\.\.{BATCH - 1}, got 0\.\.{BATCH}"),
    ("groups", [0, -1, 2, 3], rf"expected 0\.\.B-1 = 0\.\.{BATCH - 1}, got -1\.\.3"),
    ("keep_count", [1, -2, 0, 0], r"expected >= 0, got -2\.\.1"),
    ("min_keep", [1, -2, 0, 0], r"expected >= 0, got -2\.\.1"),
])  # fmt: skip
def test_counts_out_of_range(name, values, message, backend, generator, read_device_tensors):
    case = case_of("compact", generator, by_count=name == "keep_count")
    case[name] = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    refuses("compact", case, backend, f"^{name}: {message}")


@pytest.mark.parametrize("norm, message", [
    (lambda w: (w[:3], w, 1e-6), (r"^norm weight: expected \[D\] = .*\[16\]", r"got float32\[3\]")),
    (lambda w: (w, w[:3], 1e-6), (r"^norm bias: expected \[D\] = .*\[16\]", r"got float32\[3\]")),
    (lambda w: (w.to("meta"), None, 1e-6), ("^norm weight: expected", "meta")),
    (lambda w: (w, None), (r"^norm: expected \(weight, bias, eps\), got tuple",)),
    (lambda w: w, (r"^norm: expected \(weight, bias, eps\), got float32\[16\]",)),
    (lambda w: (None, w, 1e-6), ("^norm weight: expected", "got NoneType")),
    (lambda w: (w, None, -1e-6), ("^norm eps: expected a finite number > 0, got float -1e-06",)),
    (lambda w: (w, None, math.nan), ("^norm eps: expected a finite number > 0, got float nan",)),
])  # fmt: skip
def test_layer_norm_that_does_not_fit(norm, message, backend, generator):
    case = case_of("compact", generator)
    refuses("compact", case | {"norm": norm(case["norm"][0])}, backend, *message)


# ---- what looks odd and is legal


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1], [1, 0, 1]], ids=str)
def test_batches_with_nothing_to_do(op, lengths, backend, generator):
    case = CASES[op](generator, lengths)
    results = run(op, case, backend)
    tokens = sum(lengths)
    if "v" in case:
        torch.testing.assert_close(results[0], case["v"])
        assert all((r == 0).all() and r.shape == (tokens,) for r in results[2:])
    elif op == "compact":
        assert torch.equal(results[0], case["x"].values)
        assert torch.equal(results[1], case["x"].cu_seqlens)
    elif op == "attention_received":  # each of one-token samples sees itself only
        torch.testing.assert_close(results[0], torch.ones(tokens, device=DEVICE))
    elif op == "novelty":
        assert (results[0] == 2).all() and results[0].shape == (tokens,)
    elif op == "nearest_kept":
        assert torch.equal(results[0], torch.arange(tokens, device=DEVICE).int().where(case["kept"], -1))
    elif op == "match_tokens":
        assert torch.equal(results[0], torch.arange(tokens, device=DEVICE).int()) and (results[1] == -math.inf).all()
    elif op == "merge_scores":  # a token on its own has no other to be like
        assert (results[1] == 2).all() and torch.equal(results[0] > 0, case["free"] & (case["order"] > 0))
    elif op == "lowest_tokens":
        expected = case["free"] & (case["scores"] <= case["threshold"])
        assert torch.equal(results[0], expected & (case["count"] > 0).repeat_interleave(case["cu_seqlens"].diff()))
    else:
        assert (results[0] == 0).all() and (results[1] == 0).all()
        assert results[0].shape == (tokens,)
        assert results[1].shape == ((tokens,) if op == "attention_importance" else (len(lengths),))


def test_scores_of_the_first_token_and_of_undefined_rows_do_not_matter(backend, generator):
    case = CASES["compact"](generator, LENGTHS)
    expected = run("compact", case, backend)
    case["importance"] = case["importance"].clone()
    for first, length in zip(offsets(LENGTHS).tolist(), LENGTHS, strict=False):
        if length:
            case["importance"][first] = 1e30
    for ours, theirs in zip(run("compact", case, backend), expected, strict=True):
        assert torch.equal(ours, theirs)


# ---- the choice of a backend


def log_name(op):
    """Attention with importance goes by the choice that is made for attention."""
    return "attention" if op == "attention_with_importance" else op


@pytest.fixture
def fresh_choice():
    """Nothing is remembered about which backends were available before, and nothing afterwards."""

    def forget():
        for cached in (backends._resolve, backends._implementation, backends._log_once, backends._triton_missing):
            cached.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def read_device_tensors():
    """Checks that have to read a device run in debug mode only; on the CPU they always do."""
    if DEVICE == "cpu":
        yield
        return
    madtp_kernels.set_debug(True)
    yield
    madtp_kernels.set_debug(False)


@pytest.mark.parametrize("op", OPERATIONS)
def test_unknown_backend(op, backend, generator):
    case = CASES[op](generator, LENGTHS)
    refuses(op, case, backend + "x", f"^backend: expected one of reference, cpu, triton, cuda, got '{backend}x'")


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_forced_backend_that_is_for_another_device_raises_with_the_reason(op, backend, generator):
    case = CASES[op](generator, LENGTHS)
    other = "cuda" if DEVICE == "cpu" else "cpu"
    message = f"^{log_name(op)}: backend '{other}' .*{DEVICE}: the {other} backend takes {other}"
    refuses(op, case, other, message, error=BackendError)


def test_double_precision_is_left_to_the_reference(backend, generator):
    case = CASES["attention"](generator, LENGTHS, dtype=torch.float64)
    if backend == "reference":
        run("attention", case, backend)
    else:
        refuses("attention", case, backend, f"'{backend}'.*float64 is left to the reference", error=BackendError)


def test_use_forces_and_restores(backend, generator):
    with backends.use(backend):
        assert backends.forced() == backend
        with backends.use(None):
            assert backends.forced() is None
        assert backends.forced() == backend
    with pytest.raises(ValueError, match="^backend: expected one of"), backends.use(backend + "x"):
        pass
    assert backends.forced() is None


@pytest.fixture
def nothing_but_the_reference(monkeypatch, fresh_choice):
    """A machine without a compiled extension and without Triton."""

    def load():
        raise native.Unavailable("no C++ compiler was found")

    monkeypatch.setattr(native, "load", load)
    monkeypatch.setattr(backends, "_triton_missing", lambda: "triton cannot be imported")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backends._triton_missing.cache_clear = lambda: None


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_automatic_choice_falls_back_with_one_log_line(op, backend, generator, nothing_but_the_reference, caplog):
    if backend != "reference":
        pytest.skip("the choice is automatic")
    case = CASES[op](generator, LENGTHS)
    with caplog.at_level(logging.WARNING, logger="madtp_kernels"):
        first = run(op, case)
        again = run(op, case)
        OPERATIONS[op](**CASES[op](generator, LENGTHS, dtype=torch.bfloat16))
    lines = [r.getMessage() for r in caplog.records if r.name == "madtp_kernels"]
    preferred = "cpu" if DEVICE == "cpu" else "triton"
    parts = ["attention", "attention_importance"] if op == "attention_with_importance" else [op]
    for part in parts:
        assert len([line for line in lines if line.startswith(f"{part}: backend '{preferred}' is not used")]) == 1
    if DEVICE == "cpu":
        assert lines == [f"{part}: backend 'cpu' is not used on cpu: no C++ compiler was found" for part in parts]
    for ours, theirs, expected in zip(first, again, run(op, case, "reference"), strict=True):
        assert torch.equal(ours, expected) and torch.equal(theirs, expected)


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_forced_backend_that_is_missing_raises_with_the_reason(op, backend, generator, nothing_but_the_reference):
    case = CASES[op](generator, LENGTHS)
    if backend == "reference":
        run(op, case, backend)
        return
    reason = "triton" if backend == "triton" else re.escape("no C++ compiler was found")
    message = f"^{log_name(op)}: backend '{backend}' was asked for but cannot run on {DEVICE}: .*{reason}"
    refuses(op, case, backend, message, error=BackendError)
    with backends.use(backend), pytest.raises(BackendError, match=reason):
        run(op, case)


def test_environment_forces_a_backend_and_switches_on_debugging(backend, fresh):
    """Read at import, hence in a process of its own."""
    if backend != "reference":
        pytest.skip("one process is enough")
    program = """
import torch
import madtp_kernels
from madtp_kernels import BackendError, RaggedBatch, backends, checks
assert backends.forced() == "cuda" and checks.may_read(torch.zeros(1)) and checks._debug
try:
    madtp_kernels.compact(RaggedBatch.from_list([torch.ones(3, 2)]), torch.ones(3), torch.zeros(1))
except BackendError as error:
    print(error)
"""
    environment = os.environ | {"MADTP_KERNELS_BACKEND": "cuda", "MADTP_KERNELS_DEBUG": "1"}
    done = fresh.run(program, env=environment)
    assert done.returncode == 0, done.stderr
    assert "compact: backend 'cuda' was asked for but cannot run on cpu" in done.stdout


# ---- what only debug mode checks


def test_checks_that_would_wait_for_a_device_run_in_debug_mode_only(backend, generator):
    """Values of CPU tensors are always checked, those of a device in debug mode, those of fake tensors never."""
    previous = checks._debug
    try:
        for enabled in (False, True):
            madtp_kernels.set_debug(enabled)
            assert checks.may_read(torch.zeros(1))
            assert checks.may_read(torch.zeros(1, device="meta")) is enabled
            with torch._subclasses.FakeTensorMode():
                assert not checks.may_read(torch.zeros(1))
    finally:
        madtp_kernels.set_debug(previous)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a device whose values are not read by default")
def test_debug_mode_finds_bad_offsets_on_a_device(backend, generator):
    case = CASES["attention"](generator, LENGTHS)
    case["cu_seqlens_q"] = case["cu_seqlens_q"] + 1
    madtp_kernels.set_debug(True)
    try:
        with pytest.raises(ValueError, match="^cu_seqlens_q: expected offsets that start at 0, got 1"):
            attention(**case, backend=backend)
    finally:
        madtp_kernels.set_debug(False)
