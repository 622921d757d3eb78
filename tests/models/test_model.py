"""BLIP-NLVR as a model: precisions, grouping, sizes of merged tokens, records, training, wrong inputs, the real size."""

import contextlib
import os
import resource
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, backends_here, clearance, interpreted, normal
from PIL import Image
from pretended_gpu import PretendedGPU
from torch.utils._python_dispatch import TorchDispatchMode

import madtp
from madtp import NLVRConfig, TextConfig, VisionConfig, vision
from madtp.data.synthetic import Shapes
from madtp.layers import CrossAttention, self_attention
from madtp.pruning import MADTP, Tokens
from madtp.tasks.nlvr.model import NLVR
from madtp.text import split
from madtp.weights import randomize
from madtp_kernels import RaggedBatch

SIZES = NLVRConfig(
    vision=VisionConfig(image_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=4, sd_num=12, sd_dim=64),
    text=TextConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=200,
        max_position_embeddings=24, encoder_width=64,
    ),
    merge_from=2,
)  # fmt: skip
TOKENS = SIZES.vision.num_patches + 1
PAIRS = 5


def make(temperature=1.0, **options):
    model = NLVR(SIZES, temperature, **options).to(DEVICE).eval()
    randomize(model, seed=4)
    with torch.no_grad():
        model.space_dict.mul_(0.2)  # alignments of order one, so that thresholds are averages of many tokens
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture
def batch(generator):
    """Pairs of pictures and texts of uneven length."""
    lengths = [12, 1, 20, 7, 3]
    texts = [torch.randint(1, 200, (length,), generator=generator) for length in lengths]
    return normal(generator, 2 * PAIRS, 3, 64, 64), texts


def answer(model, batch, **options):
    with torch.inference_mode():
        return model(*batch, **options)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", backends_here())
def test_half_precision(backend, dtype, batch):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    model = make(backend=backend)
    exact = answer(model, batch, pruning=0.0)
    model = model.to(dtype)
    dense, pruned = answer(model, batch, pruning=0.0), answer(model, batch)
    assert dense.logits.dtype == pruned.logits.dtype == pruned.image_embeds.dtype == dtype
    assert pruned.vision[0].importance.dtype == pruned.vision[0].threshold.dtype == torch.float32
    # Three layers round each activation a dozen times; pruned decisions may differ, hence the dense model.
    precision = torch.finfo(dtype).eps
    assert (dense.logits.float() - exact.logits).abs().max() < 8 * precision * exact.logits.abs().max()
    assert pruned.logits.isfinite().all()
    assert all((t.lengths < t.lengths_in).any() for t in pruned.vision)


# ---- grouping


def kept(trace):
    return torch.stack([record.kept for record in trace])  # [layers, samples]


def test_instance_grouping_prunes_every_image_by_its_own_count(model, batch):
    together = answer(model, batch)
    counts = kept(together.vision)
    for b in range(PAIRS):
        pair = (batch[0][[b, b + PAIRS]], [batch[1][b]])
        assert torch.equal(kept(answer(model, pair).vision), counts[:, [b, b + PAIRS]])
    assert len(set(counts[0].tolist())) > 2, "the images have to differ for the claim to mean anything"


def test_pair_grouping_ties_the_two_images_of_a_pair_and_nothing_else(model, batch):
    own = answer(model, batch)
    tied = answer(make(grouping="pair"), batch)
    left, right = kept(tied.vision).split(PAIRS, 1)
    assert torch.equal(left, right)
    # In the first layer the same scores are seen: the pair keeps the larger of the two counts.
    own_left, own_right = kept(own.vision)[0].split(PAIRS)
    assert torch.equal(left[0], torch.maximum(own_left, own_right))
    assert (own_left != own_right).any()
    assert len(set(left[0].tolist())) > 1, "pairs do not tie one another"
    for b in range(PAIRS):
        alone = answer(make(grouping="pair"), (batch[0][[b, b + PAIRS]], [batch[1][b]]))
        torch.testing.assert_close(alone.logits[0], tied.logits[b], atol=1e-5, rtol=1e-5)
    # Texts are not tied.
    assert torch.equal(kept(tied.text)[0], kept(own.text)[0])


def test_batch_grouping_ties_everything(model, batch):
    own = answer(model, batch)
    tied = answer(make(grouping="batch"), batch)
    counts = kept(tied.vision)
    assert (counts == counts[:, :1]).all()
    assert int(counts[0, 0]) == int(kept(own.vision)[0].max())


def test_grouping_does_not_matter_to_the_dense_model(batch):
    logits = [answer(make(grouping=g), batch, pruning=0.0).logits for g in ("instance", "pair", "batch")]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


# ---- sizes: a merged token weighs what it stands for


def repeat_rows(values, sizes):
    return values.repeat_interleave(sizes.long(), dim=0)


def merged_stream(generator, lengths, width):
    """Tokens with sizes, and the same tokens with each repeated as often as its size says."""
    sizes = torch.randint(1, 6, (sum(lengths),), generator=generator).to(DEVICE).float()
    tokens = RaggedBatch.from_lengths(normal(generator, sum(lengths), width), lengths)
    counts = [int(part.sum()) for part in sizes.split(lengths)]
    repeated = RaggedBatch.from_lengths(repeat_rows(tokens.values, sizes), counts)
    ids = torch.zeros(sum(lengths), dtype=torch.int32, device=DEVICE)
    bias = sizes.log()
    return (
        Tokens(tokens.values, tokens.cu_seqlens, tokens.max_seqlen, False, ids, sizes, bias),
        Tokens.start(repeated),
        sizes,
    )


@pytest.mark.parametrize("backend", backends_here())
def test_attention_with_sizes_is_attention_over_the_unmerged_duplicates(backend, generator):
    merged, repeated, sizes = merged_stream(generator, [3, 2] if interpreted(backend) else [7, 1, 12], 3 * 2 * 8)
    qkv = merged.values
    for temperature in (0.0, 1.0):
        pruning = MADTP(temperature, proportional_attention=True, backend=backend)
        ours, _ = self_attention(qkv, merged, 2, pruning, merged.with_values)
        theirs, _ = self_attention(repeat_rows(qkv, sizes), repeated, 2, pruning, repeated.with_values)
        torch.testing.assert_close(repeat_rows(ours.values, sizes), theirs.values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", backends_here())
def test_cross_attention_to_tokens_with_sizes(backend, generator):
    images, repeated, _ = merged_stream(generator, [3, 2] if interpreted(backend) else [7, 12], 16)
    layer = CrossAttention(16, 16, 2).to(DEVICE)
    words = RaggedBatch.from_lengths(normal(generator, 6, 16), [2, 4])
    with torch.inference_mode():
        ours, theirs = layer(words, images, backend), layer(words, repeated, backend)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_an_encoder_leaves_nothing_out_that_it_is_to_look_at(generator):
    images = Tokens.start(RaggedBatch.from_list([normal(generator, 3, 64), normal(generator, 5, 64)]))
    texts = RaggedBatch.from_list([torch.ones(2, dtype=torch.int64, device=DEVICE)] * 2)
    with pytest.raises(ValueError, match="^others: expected the tokens of at most 2, got 3"):
        make().text_encoder(texts, (images, images, images), None, MADTP(0.0))


def two_tone_pictures(generator, count):
    """Pictures made of two different patches, each in many places."""
    patches = normal(generator, count, 2, 3, 8, 8)
    which = (torch.rand(count, 8, 8, generator=generator) < 0.3).long().to(DEVICE)
    tiles = torch.stack([patches[n][which[n]] for n in range(count)])  # [count, 8, 8, 3, 8, 8]
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 64, 64)


def test_with_sizes_merging_equal_tokens_changes_nothing(generator):
    """Without position embedding such a picture has two kinds of tokens. Pruning drops one kind, which makes one token."""
    model = make(proportional_attention=True)
    with torch.no_grad():
        model.visual_encoder.pos_embed.zero_()
    pixels = two_tone_pictures(generator, 4)
    texts = RaggedBatch.from_list([torch.randint(1, 200, (6,), generator=generator).to(DEVICE) for _ in range(2)])
    with torch.inference_mode():
        dense = model.visual_encoder(pixels, None, MADTP(0.0))
        results = {}
        for proportional in (True, False):
            pruned = model.visual_encoder(pixels, model.space_dict, MADTP(1.0, proportional_attention=proportional))
            state = model.text_encoder(texts, split(pruned.tokens), None, MADTP(0.0)).tokens.values
            results[proportional] = (pruned, state)
        unmerged = model.text_encoder(texts, split(dense.tokens), None, MADTP(0.0)).tokens.values
    pruned, state = results[True]
    assert (pruned.trace[0].lengths < TOKENS).all()
    for sizes in pruned.tokens.with_values(pruned.tokens.sizes).to_list():
        assert sizes.sum() == TOKENS and sizes[0] == 1
    for ours, theirs in zip(pruned.tokens.to_list(), dense.tokens.to_list(), strict=True):
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state, unmerged, atol=1e-4, rtol=1e-4)
    # Without sizes, as in the paper, the same merging does change the answer.
    assert (results[False][1] - unmerged).abs().max() > 1e-2


def test_sizes_do_not_matter_before_anything_is_merged(batch):
    ours, theirs = answer(make(proportional_attention=True), batch, pruning=0.0), answer(make(), batch, pruning=0.0)
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-5, rtol=1e-5)


# ---- dense()


def test_dense_is_undone_even_after_an_error(batch):
    model = make(temperature=1.5)
    with pytest.raises(RuntimeError, match="stop"), model.dense() as dense:
        assert dense is model and model.temperature == 0.0
        with model.dense():
            pass
        assert model.temperature == 0.0
        raise RuntimeError("stop")
    assert model.temperature == 1.5
    assert (answer(model, batch).vision[-1].lengths < TOKENS).any()


def test_a_temperature_for_one_call(model, batch):
    hotter = answer(model, batch, pruning=8.0)
    assert model.temperature == 1.0
    assert hotter.vision[-1].lengths.sum() < answer(model, batch).vision[-1].lengths.sum()


# ---- the record of every layer


def test_sizes_in_double_precision(batch):
    model, images = make(proportional_attention=True, backend="reference"), batch[0]
    single = answer(model, batch)
    double = answer(model.double(), (images.double(), batch[1]))
    clear = [
        pair
        for pair in range(PAIRS)
        if min(clearance(double.vision, pair), clearance(double.vision, pair + PAIRS), clearance(double.text, pair))
        > 1e-4
    ]
    assert clear, "all pairs are on a knife edge"
    torch.testing.assert_close(double.logits.float()[clear], single.logits[clear], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("proportional", [False, True])
def test_traces_tell_where_every_token_came_from(proportional, batch):
    out = answer(make(proportional_attention=proportional), batch)
    texts = [len(t) for t in batch[1]]
    for trace, lengths, tokens in (
        (out.vision, [TOKENS] * 2 * PAIRS, out.image_embeds),
        (out.text, texts, out.last_hidden_state),
    ):
        assert len(trace) == 3
        assert trace[0].lengths_in.tolist() == lengths
        before = [set(range(n)) for n in lengths]
        for layer, record in enumerate(trace):
            if layer:
                assert torch.equal(record.cu_seqlens_in, trace[layer - 1].cu_seqlens)
            assert torch.equal(record.pruned, record.lengths < record.lengths_in)
            assert torch.equal(record.kept, record.lengths - 1 - record.pruned.int())
            assert record.importance.shape == (int(record.cu_seqlens_in[-1]),)
            rows = RaggedBatch(record.ids, record.cu_seqlens, int(record.lengths.max())).to_list()
            for b, ids in enumerate(rows):
                ids = ids.tolist()
                assert ids[0] == 0, "the first token is never dropped"
                originals = [i for i in ids if i >= 0]
                assert originals == sorted(originals), "kept tokens stay in order"
                merged = -(1 + layer)
                assert set(ids) - before[b] <= {merged}
                assert (ids[-1] == merged) == bool(record.pruned[b])
                if record.pruned[b]:
                    start, stop = record.cu_seqlens_in[b : b + 2].tolist()
                    above = int((record.importance[start + 1 : stop] > record.threshold[b]).sum())
                    assert int(record.kept[b]) == above == len(ids) - 2
                before[b] = set(ids)
        assert torch.equal(tokens.cu_seqlens, trace[-1].cu_seqlens)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 4e-6), (torch.bfloat16, 0.03)], ids=str)
def test_patches_are_embedded_as_by_a_convolution(dtype, error, training, generator):
    """In double precision; in bfloat16 the product of up to 2 is rounded, and the sum of up to 4."""
    config = VisionConfig(image_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, sd_dim=32)
    encoder = vision.VisionTransformer(config).to(DEVICE, dtype)
    cls_token, pos_embed = normal(generator, 1, 1, 32).to(dtype), normal(generator, 1, 17, 32).to(dtype)
    encoder.cls_token.data, encoder.pos_embed.data = cls_token, pos_embed
    images = normal(generator, 2, 3, 32, 32).to(dtype)
    with torch.set_grad_enabled(training):
        got = encoder.embed(images)
    with torch.no_grad():
        patches = encoder.patch_embed.proj.double()(images.double()).flatten(2).mT
        want = torch.cat([cls_token.double().expand(2, -1, -1), patches], 1) + pos_embed.double()
    torch.testing.assert_close(got.values.detach().double(), want.flatten(0, 1), atol=error, rtol=0)
    assert got.cu_seqlens.tolist() == [0, 17, 34] and got.ids.tolist() == [*range(17), *range(17)]


def test_kept_rows_are_the_rows_of_their_own_patches(generator):
    """Ids point at pixels: without any layer's influence (zero weights) a surviving row is its patch's embedding."""
    model = make()
    encoder = model.visual_encoder
    with torch.no_grad():
        for block in encoder.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    pixels = normal(generator, 3, 3, 64, 64)
    with torch.inference_mode():
        embedded = encoder.embed(pixels).to_list()
        out = encoder(pixels, model.space_dict, MADTP(1.0))
        rows, record = out.tokens.to_list(), out.trace[-1]
        for b, ids in enumerate(RaggedBatch(record.ids, record.cu_seqlens, TOKENS).to_list()):
            originals = ids >= 0
            assert originals.sum() < TOKENS
            expected = encoder.norm(embedded[b][ids[originals].long()])
            torch.testing.assert_close(rows[b][originals], expected, atol=1e-5, rtol=1e-5)


# ---- training


@pytest.mark.parametrize("backend", backends_here(kernels_only=True))
def test_gradients_of_a_pruned_model_agree_with_the_reference(backend, batch):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    grads = {}
    for name in (backend, "reference"):
        model = make(backend=name)
        out = model(*batch, alignment_features=True)
        labels = torch.tensor([0, 1, 1, 0, 1], device=DEVICE)
        loss = torch.nn.functional.cross_entropy(out.logits, labels)
        loss.backward()
        grads[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, theirs in grads["reference"].items():
        assert theirs is not None and theirs.isfinite().all(), key
        scale = theirs.abs().max().item()
        torch.testing.assert_close(
            grads[backend][key], theirs, atol=1e-4 * scale + 1e-7, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert grads["reference"]["space_dict"].abs().max() > 0, "the dictionary learns through the merge weights"


def test_inference_after_a_change_of_weights_uses_the_new_ones(batch):
    """However they are changed: no layer keeps anything of a weight. One element, written behind PyTorch's back, is enough."""
    model = make()
    answer(model, batch)

    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(*batch).logits.square().sum().backward()
        optimizer.step()

    def load(model):
        model.load_state_dict({key: value * 0.9 for key, value in model.state_dict().items()})

    def overwrite(model):
        for parameter in model.parameters():
            parameter.data.mul_(0.9)

    def edit_one_element(model):
        model.text_encoder.encoder.layer[0].output.dense.weight.data[3, 5] = 2.0

    def edit_by_numpy(model):
        model.visual_encoder.blocks[1].attn.proj.weight.detach().cpu().numpy()[7, 1] = 3.0

    def replace(model):
        layer = model.visual_encoder.blocks[0].mlp.fc1
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 0.5)

    changes = [step, load, overwrite, edit_one_element, replace] + ([edit_by_numpy] if DEVICE == "cpu" else [])
    for change in changes:
        before = answer(model, batch).logits
        change(model)
        fresh = make()
        fresh.load_state_dict(model.state_dict())
        after = answer(model, batch).logits
        assert not torch.equal(after, before), change.__name__
        assert torch.equal(after, answer(fresh, batch).logits), change.__name__


@pytest.mark.skipif(
    DEVICE != "cpu" or not Path("/proc/self/statm").exists(), reason="resident memory of a process on Linux"
)
def test_memory_does_not_grow_with_the_numbers_of_rows_that_pruning_makes():
    """Libraries that compile a product for each number of rows keep it: megabytes for each layer of each pair."""
    model = make().to(torch.bfloat16)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for pair in range(60):
            if pair == 10:
                before = resident()
            pixels = torch.randn(2, 3, 64, 64, generator=generator).bfloat16()
            ids = torch.randint(1, 200, (2 + pair % 20,), generator=generator)
            model(pixels, [ids], pruning=0.1 * 1.1**pair)
    assert resident() - before < 30e6


# ---- wrong inputs


@pytest.mark.parametrize(
    "pixels, message",
    [
        ((2, 3, 32, 32), r"pixels: expected \[B, 3, 64, 64\], got \[2, 3, 32, 32\]"),
        ((2, 1, 64, 64), r"pixels: expected \[B, 3, 64, 64\], got \[2, 1, 64, 64\]"),
        ((2, 64, 64), r"pixels: expected \[B, 3, 64, 64\], got \[2, 64, 64\]"),
        ((3, 3, 64, 64), "pixels: expected two images for each of 1 texts, got 3 images"),
        ((1, 3, 64, 64), "pixels: expected two images for each of 1 texts, got 1 images"),
    ],
)
def test_pictures_of_a_wrong_shape(pixels, message, model):
    with pytest.raises(ValueError, match=message):
        answer(model, (torch.zeros(pixels, device=DEVICE), [torch.tensor([5, 6])]))


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "input_ids: expected at least one text"),
        ([torch.tensor([], dtype=torch.int64)], "input_ids: expected at least one token per text, text 0 has none"),
        ([torch.arange(1, 26)], "input_ids: a text of 25 tokens exceeds the model's 24 positions"),
        ([torch.tensor([1.0, 2.0])], r"input_ids: expected int64 ids \[T\], got float32\[2\]"),
        ([torch.ones(2, 2, dtype=torch.int64)], r"input_ids: expected int64 ids \[T\], got int64\[2, 2\]"),
        ([torch.tensor([3, 200])], r"input_ids: expected ids in 0\.\.199, got 3\.\.200"),
        ([torch.tensor([3, -1])], r"input_ids: expected ids in 0\.\.199, got -1\.\.3"),
    ],
)
def test_texts_that_do_not_fit(texts, message, model):
    pixels = torch.zeros(2 * len(texts), 3, 64, 64, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        answer(model, (pixels, texts))


@pytest.mark.parametrize("temperature", [-0.5, float("nan"), float("inf")])
def test_temperatures_that_make_no_sense(temperature, model, batch):
    with pytest.raises(ValueError, match=f"temperature: expected 0, or a number from 1e-30 to 1e30, got {temperature}"):
        answer(model, batch, pruning=temperature)


def test_an_active_encoder_needs_a_dictionary(model):
    with pytest.raises(ValueError, match="dictionary: pruning needs one, got None"):
        model.visual_encoder(torch.zeros(1, 3, 64, 64, device=DEVICE), None, MADTP(1.0))


def test_unknown_grouping():
    with pytest.raises(ValueError, match="grouping: expected one of instance, pair, batch, got 'triple'"):
        NLVR(SIZES, grouping="triple")


def test_texts_may_come_as_a_list_or_as_a_ragged_batch(model, batch):
    pixels, texts = batch
    assert torch.equal(
        answer(model, (pixels, texts)).logits, answer(model, (pixels, RaggedBatch.from_list(texts))).logits
    )


# ---- the real size


@pytest.mark.slow
def test_the_real_size_answers_on_two_picture_files(tmp_path):
    """384 pixels, 259 million parameters at random: dense and pruned, float32 and bfloat16."""
    model = madtp.load("random:base", temperature=2.0, device=DEVICE)
    files = [tmp_path / "left.jpg", tmp_path / "right.png"]
    for file, image in zip(files, Shapes("test").pair(0).images):
        Image.fromarray(image).resize((640, 480)).save(file)
    pixels, ids = model.processor(*files, "The left picture shows a meadow and the right one two houses.")
    assert pixels.shape == (2, 3, 384, 384)
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model.to(dtype)
        for temperature in (0.0, 2.0):
            out = answer(model, (pixels, [ids]), pruning=temperature)
            logits[dtype, temperature] = out.logits.float()
            assert out.logits.shape == (1, 2) and out.logits.dtype == dtype and out.logits.isfinite().all()
            lengths = torch.stack([record.lengths for record in out.vision])
            assert lengths.shape == (12, 2)
            if temperature:
                assert (lengths[-1] < 577).all() and (lengths.diff(dim=0) <= 0).all() and (lengths >= 3).all()
                assert (out.vision[0].importance[1:577] != 0).all()
            else:
                assert (lengths == 577).all()
    close = dict(atol=0.1, rtol=0.0)
    torch.testing.assert_close(logits[torch.bfloat16, 0.0], logits[torch.float32, 0.0], **close)
    assert not torch.equal(logits[torch.float32, 2.0], logits[torch.float32, 0.0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process: {peak:.1f} GiB; logits: {logits}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 6, 8])
def test_patches_are_those_of_a_convolution(size, dtype, generator):
    flat = normal(generator, 1 + 2 * 3 * 48 * 24, dtype=dtype)
    aligned, beside = (part.view(2, 3, 48, 24) for part in (flat[:-1], flat[1:]))  # one does not begin at a multiple
    for images in (aligned, beside, aligned[:, :, ::2], aligned.clone().requires_grad_()):
        expected = F.unfold(images.float(), size, stride=size).mT.flatten(0, 1).to(dtype)
        by_pixel = expected.unflatten(1, (3, -1)).mT.flatten(1)
        for place in (contextlib.nullcontext, PretendedGPU) if DEVICE == "cpu" else (contextlib.nullcontext,):
            with place():
                rows, others = vision.cut_patches(images, size), vision.cut_patches(images, size, channels_last=True)
            assert torch.equal(rows, expected) and torch.equal(others, by_pixel)
            assert rows.requires_grad == images.requires_grad


@pytest.mark.skipif(DEVICE != "cpu", reason="memory of the CPU at any address")
@pytest.mark.parametrize("beside", [0, 2, 4, 8])
def test_patches_are_read_8_bytes_at_a_time_only_from_multiples_of_8(beside):
    """What a GPU faults at, wherever the memory begins; and elsewhere it is what makes the copy fast."""
    memory = torch.arange(2 * 3 * 16 * 16 * 2 + 16, dtype=torch.int64).to(torch.uint8).numpy()
    beside += -memory.ctypes.data % 8
    images = torch.frombuffer(memory, dtype=torch.int16, offset=beside, count=2 * 3 * 16 * 16).view(2, 3, 16, 16)
    assert images.storage_offset() == 0
    widened = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.view.dtype and args[1] == torch.int64:
                widened.append(args[0].data_ptr() % 8)
            return function(*args, **(kwargs or {}))

    with PretendedGPU(), Watch():
        rows = vision.cut_patches(images, 8)
    assert torch.equal(rows, vision.cut_patches(images, 8))
    assert widened == ([0] if images.data_ptr() % 8 == 0 else [])
