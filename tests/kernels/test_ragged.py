"""RaggedBatch: what it accepts, and that every converter gives back the samples that went in."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers import DEVICE, normal

from madtp_kernels import RaggedBatch
from madtp_kernels.ragged import offsets_from_lengths

LENGTHS = ([3, 1, 4], [0, 5, 0, 2, 0], [1], [0], [7, 7, 7])


@pytest.fixture(params=LENGTHS, ids=str)
def samples(request, generator):
    return [normal(generator, length, 2, 3) for length in request.param]


def same(ours, samples):
    assert len(ours) == len(samples)
    for a, b in zip(ours, samples, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ---- construction and access


def test_attributes(samples):
    batch = RaggedBatch.from_list(samples)
    lengths = [len(s) for s in samples]
    assert batch.batch_size == len(batch) == len(samples)
    assert batch.lengths.tolist() == lengths and batch.lengths.dtype == torch.int32
    assert batch.num_tokens == sum(lengths) == batch.values.shape[0]
    assert batch.max_seqlen == max(lengths)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens[0] == 0
    assert batch.device.type == DEVICE and batch.dtype == torch.float32


def test_a_sample_is_a_view_of_its_rows(samples):
    batch = RaggedBatch.from_list(samples)
    for b, sample in enumerate(samples):
        assert torch.equal(batch[b], sample)
        assert torch.equal(batch[b - len(samples)], sample)
        if len(sample):
            batch[b][0, 0, 0] = 5.0
            assert batch.values[batch.cu_seqlens[b], 0, 0] == 5.0
    for b in (len(samples), -len(samples) - 1):
        with pytest.raises(IndexError, match=f"sample {b} of a batch of {len(samples)}"):
            batch[b]


def test_iterating_visits_every_sample_once(samples):
    same(list(RaggedBatch.from_list(samples)), samples)


def test_with_values_keeps_the_samples(samples):
    batch = RaggedBatch.from_list(samples)
    flags = batch.with_values(batch.values[:, 0, 0] > 0)
    assert flags.dtype == torch.bool
    same(flags.to_list(), [s[:, 0, 0] > 0 for s in samples])


def test_to_converts_the_values_and_leaves_the_offsets_int32(samples):
    batch = RaggedBatch.from_list(samples).to(torch.bfloat16)
    assert batch.dtype == torch.bfloat16 and batch.cu_seqlens.dtype == torch.int32
    same(batch.to_list(), [s.bfloat16() for s in samples])
    assert RaggedBatch.from_list(samples).to("cpu").device.type == "cpu"


# ---- converters


def test_list_round_trip(samples):
    same(RaggedBatch.from_list(samples).to_list(), samples)
    same(RaggedBatch.from_list(tuple(samples)).to_list(), samples)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lengths_round_trip(samples, as_tensor):
    lengths = [len(s) for s in samples]
    batch = RaggedBatch.from_lengths(torch.cat(samples), torch.tensor(lengths) if as_tensor else lengths)
    same(batch.to_list(), samples)


@pytest.mark.parametrize(
    "as_what", [np.array, lambda lengths: map(np.int64, lengths), lambda lengths: map(torch.tensor, lengths)]
)
def test_lengths_of_other_libraries_are_integers_too(samples, as_what):
    batch = RaggedBatch.from_lengths(torch.cat(samples), as_what([len(s) for s in samples]))
    same(batch.to_list(), samples)
    assert type(batch.max_seqlen) is int


@pytest.mark.parametrize(
    "lengths", [[1.5, 2], [2.0, 2], [True, 3], ["1", 3], [None, 4], np.array([1.5, 2.5]), torch.tensor([True, True])]
)
def test_lengths_that_are_no_integers(lengths, generator):
    """[1.5, 2] were taken for [1, 2]."""
    with pytest.raises(ValueError, match="^lengths: expected integers"):
        RaggedBatch.from_lengths(normal(generator, 4, 2), lengths)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tensor: pickle.loads(pickle.dumps(tensor))])
def test_a_copy_of_offsets_that_was_written_to_is_read_again(copied, generator):
    """A copy counts its own writes, and after as many as the original's it was taken for what that had been."""
    values, cu_seqlens = normal(generator, 9, 2), torch.empty(3, dtype=torch.int32, device=DEVICE)
    cu_seqlens[0], cu_seqlens[1:] = 0, torch.tensor([2, 5])
    assert RaggedBatch(values, cu_seqlens, 3).lengths.tolist() == [2, 3]
    for writes in range(3):
        other = copied(cu_seqlens)
        for _ in range(writes):
            other[1:] = torch.tensor([1, 9])
        if writes and cu_seqlens.is_cpu:
            with pytest.raises(ValueError, match="max_seqlen: 3 is below the length 8 of sample 1"):
                RaggedBatch(values, other, 3)
            with pytest.raises(ValueError, match="offsets end at 9, beyond the 5 rows of values"):
                RaggedBatch(values[:5], other, 9)
        assert not vars(other)


def test_padded_round_trip(samples):
    padded, mask = RaggedBatch.from_list(samples).to_padded(padding_value=-7.0)
    longest = max(len(s) for s in samples)
    assert padded.shape == (len(samples), longest, 2, 3) and mask.shape == padded.shape[:2]
    assert mask.dtype == torch.bool and (padded[~mask] == -7.0).all()
    back = RaggedBatch.from_padded(padded, mask)
    same(back.to_list(), samples)
    same(RaggedBatch.from_padded(padded, mask.long()).to_list(), samples)


def test_padded_integers_stay_integers():
    batch = RaggedBatch.from_list([torch.tensor([4, 5]), torch.tensor([6])])
    padded, _ = batch.to_padded(padding_value=0)
    assert padded.dtype == torch.int64 and padded.tolist() == [[4, 5], [6, 0]]


def test_a_mask_may_have_holes(generator):
    padded = normal(generator, 4, 6, 3)
    mask = (torch.rand(4, 6, generator=generator) < 0.5).to(DEVICE)
    mask[1] = False
    batch = RaggedBatch.from_padded(padded, mask)
    same(batch.to_list(), [row[marked] for row, marked in zip(padded, mask, strict=True)])


def test_nested_round_trip(samples):
    nested = torch.nested.nested_tensor(samples, layout=torch.jagged)
    batch = RaggedBatch.from_nested(nested)
    same(batch.to_list(), samples)
    assert batch.max_seqlen == max(len(s) for s in samples)
    back = batch.to_nested()
    assert back.is_nested and back.layout == torch.jagged
    same(list(back.unbind()), samples)


def test_nested_tensor_with_gaps_between_its_samples(generator):
    """``torch.nested.narrow`` describes samples by start and length inside a larger buffer."""
    padded = normal(generator, 3, 5, 2)
    starts, lengths = torch.tensor([0, 2, 1]), torch.tensor([5, 1, 3])
    nested = torch.nested.narrow(padded, 1, starts, lengths, layout=torch.jagged)
    batch = RaggedBatch.from_nested(nested)
    same(batch.to_list(), [row[s : s + n] for row, s, n in zip(padded, starts.tolist(), lengths.tolist(), strict=True)])


def test_nested_tensor_shares_its_values(generator):
    nested = torch.nested.nested_tensor([normal(generator, 2, 3), normal(generator, 4, 3)], layout=torch.jagged)
    assert RaggedBatch.from_nested(nested).values.data_ptr() == nested.values().data_ptr()


def test_converters_carry_gradients(generator):
    leaves = [normal(generator, length, 3).requires_grad_() for length in (2, 0, 4)]
    padded, mask = RaggedBatch.from_list(leaves).to_padded()
    RaggedBatch.from_padded(padded, mask).values.square().sum().backward()
    for leaf in leaves:
        torch.testing.assert_close(leaf.grad, 2 * leaf.detach())


def test_a_batch_without_samples():
    batch = RaggedBatch(torch.zeros(0, 3, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE), 0)
    assert len(batch) == 0 and batch.num_tokens == 0 and batch.to_list() == []
    padded, mask = batch.to_padded()
    assert padded.shape == (0, 0, 3) and mask.shape == (0, 0)
    assert RaggedBatch.from_padded(padded, mask).batch_size == 0
    assert RaggedBatch.from_lengths(torch.zeros(0, 3), []).batch_size == 0


# ---- bound buffers: rows beyond T are undefined


def test_converters_ignore_the_undefined_rows_of_a_bound_buffer(samples):
    exact = RaggedBatch.from_list(samples)
    undefined = torch.full((6, 2, 3), float("nan"), device=DEVICE)
    bound = RaggedBatch(torch.cat([exact.values, undefined]), exact.cu_seqlens, exact.max_seqlen + 2)
    assert bound.num_tokens == exact.num_tokens
    same(bound.to_list(), samples)
    assert bound.exact().values.shape == exact.values.shape and torch.equal(bound.exact().values, exact.values)
    padded, mask = bound.to_padded()
    assert padded.shape[1] == exact.max_seqlen + 2 and not padded.isnan().any()
    same(RaggedBatch.from_padded(padded, mask).to_list(), samples)
    same(list(bound.to_nested().unbind()), samples)


# ---- errors name the argument, what came and what was expected


def raises(*parts):
    """ValueError whose message holds all parts, in this order."""
    return pytest.raises(ValueError, match="(?s)" + ".*".join(parts))


def i32(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    "cu_seqlens, max_seqlen, message",
    [
        ([0, 3, 5], 3, ("cu_seqlens: expected", "offsets", "list")),
        (lambda: torch.tensor([0, 3, 5], device=DEVICE), 3, ("cu_seqlens: expected", r"int32\[", r"got int64\[3\]")),
        (lambda: torch.tensor([0.0, 5.0], device=DEVICE), 5, ("cu_seqlens: expected", r"int32\[", r"got float32\[2\]")),
        (lambda: i32(0, 3, 5)[None], 3, ("cu_seqlens: expected", r"\[B\+1\]", r"got int32\[1, 3\]")),
        (lambda: i32(), 3, ("cu_seqlens: expected", r"\[B\+1\]", r"got int32\[0\]")),
        (lambda: i32(0, 3, 5).to("meta"), 3, ("cu_seqlens: expected", DEVICE, "got", "meta")),
        (lambda: i32(1, 3, 5), 3, ("cu_seqlens: expected offsets that start at 0", "got 1")),
        (lambda: i32(0, 4, 3), 4, ("cu_seqlens: offsets decrease from 4 to 3 at sample 1",)),
        (lambda: i32(0, 3, 6), 3, ("cu_seqlens: offsets end at 6, beyond the 5 rows of values",)),
        (lambda: i32(0, 3, 5), 2, ("max_seqlen: 2 is below the length 3 of sample 0",)),
        (lambda: i32(0, 3, 5), -1, ("max_seqlen: expected an int >= 0", "got -1")),
        (lambda: i32(0, 3, 5), 3.0, ("max_seqlen: expected an int >= 0", "got float 3.0")),
        (lambda: i32(0, 3, 5), i32(3), ("max_seqlen: expected an int >= 0", "got int32")),
        (lambda: i32(0, 3, 5), True, ("max_seqlen: expected an int >= 0", "got bool True")),
    ],
)
def test_bad_offsets(cu_seqlens, max_seqlen, message):
    if DEVICE != "cpu" and not message[0].endswith("expected"):
        pytest.skip("reading offsets back from a device is left to debug mode")
    with raises(*message):
        RaggedBatch(torch.zeros(5, 2, device=DEVICE), cu_seqlens() if callable(cu_seqlens) else cu_seqlens, max_seqlen)


NESTED = [torch.nested.nested_tensor([torch.zeros(5, 2)], layout=layout) for layout in (torch.strided, torch.jagged)]


@pytest.mark.parametrize("values", [[1.0, 2.0], torch.tensor(1.0), *NESTED], ids=["list", "scalar", "nested", "jagged"])
def test_bad_values(values):
    with raises(r"values: expected a tensor \[C, \.\.\.\], got"):
        RaggedBatch(values, i32(0), 0)


def test_bad_lists(generator):
    a = normal(generator, 2, 3)
    with raises("samples: expected at least one tensor"):
        RaggedBatch.from_list([])
    with raises(r"samples\[1\]: expected a tensor", "list"):
        RaggedBatch.from_list([a, [1.0]])
    with raises(r"samples\[1\]: expected a tensor \[L, \.\.\.\], got float32\[\]"):
        RaggedBatch.from_list([a, torch.tensor(0.0)])
    for other in (normal(generator, 2, 4), a.double(), a.to("meta")):
        with raises(r"samples\[1\]:", r"does not match samples\[0\]", r"float32\[2, 3\]"):
            RaggedBatch.from_list([a, other])


def test_bad_lengths(generator):
    values = normal(generator, 5, 2)
    with raises("lengths: expected integers >= 0", "-1"):
        RaggedBatch.from_lengths(values, [3, -1])
    with raises("lengths: expected integers", r"float32\[2\]"):
        RaggedBatch.from_lengths(values, torch.tensor([3.0, 2.0]))
    with raises("lengths: expected integers", r"int64\[1, 2\]"):
        RaggedBatch.from_lengths(values, torch.tensor([[3, 2]]))
    with raises("cu_seqlens: offsets end at 7, beyond the 5 rows"):
        RaggedBatch.from_lengths(values, [3, 4])


def test_offsets_beyond_int32():
    with raises("lengths: 3221225472 tokens do not fit int32 offsets"):
        offsets_from_lengths([2**30] * 3)
    with raises("lengths: 2147483648 tokens do not fit int32 offsets"):
        offsets_from_lengths(np.array([2**31 - 1, 1], dtype=np.int32))


@pytest.mark.parametrize("of", [np.uint8, lambda n: torch.tensor(n, dtype=torch.uint8)], ids=["numpy", "torch"])
def test_sums_of_small_integers_do_not_wrap_around(of):
    assert offsets_from_lengths([of(200), of(100)]).tolist() == [0, 200, 300]


def test_offsets_of_lengths_that_are_no_integers():
    with raises("lengths: expected integers, got float 1.5"):
        offsets_from_lengths([1.5, 2])


def test_bad_padding(generator):
    padded = normal(generator, 2, 4, 3)
    with raises(r"padded: expected a tensor \[B, L, \.\.\.\], got float32\[4\]"):
        RaggedBatch.from_padded(padded[0, :, 0], torch.ones(2, 4, device=DEVICE))
    with raises(r"mask: expected \[B, L\] = \[2, 4\]", r"got float32\[2, 3\]"):
        RaggedBatch.from_padded(padded, torch.ones(2, 3, device=DEVICE))
    with raises("mask: expected", f"on {DEVICE}", "meta"):
        RaggedBatch.from_padded(padded, torch.ones(2, 4, device="meta"))
    with raises("mask: expected", "got list"):
        RaggedBatch.from_padded(padded, [[1, 1, 1, 1], [1, 0, 0, 0]])
    # A mask that is added to logits has 0 where this one has 1.
    additive = torch.tensor([[0, 0, 0, 0], [0, -1e4, -1e4, -1e4]], device=DEVICE)
    with pytest.raises(ValueError, match="^mask: expected True or 1 for a token"):
        RaggedBatch.from_padded(padded, additive)
    assert RaggedBatch.from_padded(padded, (additive == 0).float()).lengths.tolist() == [4, 1]


def test_bad_nesting(generator):
    with raises("nested: expected a NestedTensor of layout torch.jagged", r"float32\[2, 3\]"):
        RaggedBatch.from_nested(normal(generator, 2, 3))
    with raises("nested: expected a NestedTensor of layout torch.jagged", "got list"):
        RaggedBatch.from_nested([1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls both layouts prototypes
        strided = torch.nested.nested_tensor([normal(generator, 2, 3)], layout=torch.strided)
        jagged = torch.nested.nested_tensor([normal(generator, 2, 3), normal(generator, 1, 3)], layout=torch.jagged)
    with raises("nested: expected a NestedTensor of layout torch.jagged"):
        RaggedBatch.from_nested(strided)
    with raises(r"nested: expected \[B, \*, \.\.\.\] with dimension 1 jagged, got"):
        RaggedBatch.from_nested(jagged.transpose(1, 2))
