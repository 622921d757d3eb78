"""CLIP: pruned images and texts against the formulas written out for one sample, transformers' CLIP, checkpoints, batches."""

import dataclasses
import json
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from helpers import DEVICE, backends_here, interpreted, normal, offsets
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig as HuggingFaceConfig
from transformers import CLIPModel, CLIPTokenizer

import madtp
from madtp import CheckpointError, CLIPConfig, CLIPTextConfig, VisionConfig, flops, layers, predict
from madtp.guidance import alignment_loss
from madtp.layers import Attention, LayerNorm
from madtp.linear import Linear
from madtp.processing import CLIPProcessor, TextError
from madtp.pruning import MADTP, Tokens
from madtp.pruning.official import official, weakest_last
from madtp.tasks.clip.model import CLIP
from madtp.weights import randomize
from madtp.weights.key_maps import FAMILIES
from madtp.weights.key_maps import clip as official_layout
from madtp_kernels import RaggedBatch, compact
from madtp_kernels.attention import reference

VOCABULARY, START, END = 514, 512, 513  # the bundled one: 256 bytes, 256 that end a word, start and end
SIZES = CLIPConfig(
    vision=VisionConfig(64, 8, embed_dim=64, depth=3, num_heads=4, sd_num=12, sd_dim=48, map_func=True),
    text=CLIPTextConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, vocab_size=VOCABULARY,
        max_position_embeddings=40,
    ),
    embed_dim=32,
)  # fmt: skip
TOKENS = SIZES.vision.num_patches + 1
TEMPERATURES = [0.5, 2.0, 6.0]
MARGIN = 5e-6  # relative distance from a threshold within which rounding may decide


def make(temperature=1.0, mode="clean", sizes=SIZES, **options):
    model = CLIP(dataclasses.replace(sizes, text_mode=mode), temperature, **options).to(DEVICE).eval()
    randomize(model, seed=5)
    with torch.no_grad():
        model.space_dict.mul_(0.2)  # alignments of order one, so that thresholds are averages of many tokens
    return model


def texts_of(generator, lengths, vocabulary=START):
    """Texts of so many tokens, start and end included."""
    words = [torch.randint(0, vocabulary, (length - 2,), generator=generator) for length in lengths]
    return [torch.cat([torch.tensor([START]), text, torch.tensor([END])]) for text in words]


def pictures(generator, count, size=64):
    """Smooth structure with noise of very different strength."""
    coarse = F.interpolate(normal(generator, count, 3, 5, 5), size=size, mode="bilinear")
    strength = torch.logspace(-1, 0.3, count, device=DEVICE)[torch.randperm(count, generator=generator)]
    return coarse + normal(generator, count, 3, size, size) * strength[:, None, None, None]


def ids_of(trace, sample):
    return [record.ids[record.cu_seqlens[sample] : record.cu_seqlens[sample + 1]].tolist() for record in trace]


# ---- one sample, with every formula written out ---------------------------------------------------------------------


def gathered(scores, count):
    """Positions of the ``count`` best as a GPU's unsorted top-k leaves them: those above the last, then those equal to it."""
    last = scores.sort(descending=True).values[count - 1]
    above, equal = (scores > last).nonzero().flatten().tolist(), (scores == last).nonzero().flatten().tolist()
    return (above + equal)[:count]


def tower_alone(tower, x, dictionary, temperature, *, causal, min_keep, compat=False, protected=None):
    """Blocks of one tower on one sample ``x [L, D]`` in float64: final rows, ids after every block, and the nearest miss."""
    get = {key: value.double().cpu() for key, value in tower.state_dict().items()}
    dictionary, heads = dictionary.double().cpu(), tower.blocks[0].num_heads
    ids, history, margin = list(range(len(x))), [], math.inf

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], get[f"{name}.weight"], get[f"{name}.bias"], 1e-5)

    def linear(x, name):
        return x @ get[f"{name}.weight"].T + get[f"{name}.bias"]

    for layer in range(len(tower.blocks)):
        block = f"blocks.{layer}"
        q, k, v = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(len(x), 3, heads, -1).permute(1, 2, 0, 3)
        )
        logits = q @ k.mT * q.shape[-1] ** -0.5
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits[0]).triu(1).bool(), -math.inf)
        attention = logits.softmax(-1)
        out = attention @ v  # [H, L, d]
        after = x + linear(out.permute(1, 0, 2).flatten(1), f"{block}.attn.proj")
        if temperature > 0:
            alignment = linear(x[1:], f"query_models.{layer}.q_map.0") @ dictionary.T
            received = attention[:, 1:, 1:].amax(0).sum(0)
            best = alignment.amax(1)
            norms = out.norm(dim=-1)
            cls = (attention[:, 0] * norms / (norms.sum(0) + 1e-8)).sum(0)[1:]
            importance = (received / (received.sum() + 1e-8) + best / (best.sum() + 1e-8) + cls) / 3
            threshold = ((alignment / temperature).softmax(0) * importance[:, None]).sum(0).min()
            margin = min(margin, ((importance - threshold).abs().min() / importance.abs().mean()).item())
            above = importance > threshold
            if protected is not None:
                above[ids.index(protected) - 1] = True
            count = int(above.sum())
            if count > min_keep and len(above) - count >= 2:
                kept = above.nonzero().flatten().tolist()
                if compat:
                    kept = gathered(importance.masked_fill(~above, -math.inf), count)
                weight = importance[~above]
                merged = weight @ after[1:][~above] / (weight.sum() + 1e-8)
                after = torch.cat([after[:1], after[1:][kept], merged[None]])
                ids = [0, *(ids[1 + i] for i in kept), -(1 + layer)]
        hidden = linear(norm(after, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = after + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.fc2")
        history.append(ids)
    return x, history, margin


def text_alone(model, text, temperature, mode):
    tower, end = model.text, len(text) - 1
    if mode == "compat":
        text = F.pad(text, (0, SIZES.text.max_position_embeddings - len(text)))
    x = tower.token_embeddings.weight[text].double() + tower.position_embeddings.weight[: len(text)].double()
    rules = {"min_keep": end + 2, "compat": True} if mode == "compat" else {"min_keep": 1, "protected": end}
    x, history, margin = tower_alone(tower, x.cpu(), model.space_dict, temperature, causal=True, **rules)
    row = x[end if mode == "compat" else history[-1].index(end)]
    row = F.layer_norm(row, row.shape, tower.norm.weight.double().cpu(), tower.norm.bias.double().cpu(), 1e-5)
    return tower.proj.weight.double().cpu() @ row, history, margin


def image_alone(model, picture, temperature):
    tower, patch = model.visual, SIZES.vision.patch_size
    patches = F.conv2d(picture[None], tower.patch_embed.proj.weight, stride=patch).flatten(2)[0].T
    x = torch.cat([tower.cls_token[0], patches]) + tower.pos_embed[0]
    x = tower.norm_pre(x).double().cpu()
    x, history, margin = tower_alone(tower, x, model.space_dict, temperature, causal=False, min_keep=1)
    row = F.layer_norm(
        x[0], x[0].shape, tower.norm_post.weight.double().cpu(), tower.norm_post.bias.double().cpu(), 1e-5
    )
    return tower.proj.weight.double().cpu() @ row, history, margin


def check_alone(out, alone, count):
    """Every sample of a batch is what the formulas say for it alone. Returns the ids of every sample."""
    clear = 0
    for sample in range(count):
        features, history, margin = alone(sample)
        if margin < MARGIN:
            continue
        clear += 1
        assert ids_of(out.trace, sample) == history, f"sample {sample}"
        torch.testing.assert_close(out.features[sample].double().cpu(), features, atol=2e-5, rtol=2e-5)
    assert clear > count / 2
    return [ids_of(out.trace, sample) for sample in range(count)]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("backend", backends_here())
@torch.inference_mode()
def test_images_follow_the_formulas(backend, temperature, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    model, pixels = make(backend=backend), pictures(generator, 8)
    out = model.encode_image(pixels, temperature)
    histories = check_alone(out, lambda sample: image_alone(model, pixels[sample], temperature), len(pixels))
    assert len({len(history[-1]) for history in histories}) > 1, "every image keeps its own number of tokens"


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("mode", ["clean", "compat"])
@pytest.mark.parametrize("backend", backends_here())
@torch.inference_mode()
def test_texts_follow_the_formulas(backend, mode, temperature, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    model = make(mode=mode, backend=backend)
    texts = texts_of(generator, [3, 4, 5, 7, 9, 12, 16, 20, 28, 40])
    out = model.encode_text(texts, temperature)
    histories = check_alone(out, lambda sample: text_alone(model, texts[sample], temperature, mode), len(texts))
    ends = [len(text) - 1 for text in texts]
    if mode == "clean":
        assert all(end in ids for history, end in zip(histories, ends, strict=True) for ids in history)
        assert any(history[-1][-1] < 0 for history in histories), "some texts are pruned"
    else:
        originals = [[i for i in ids if i >= 0] for history in histories for ids in history]
        assert any(ids != sorted(ids) for ids in originals), "their order is not ascending"


@torch.inference_mode()
def test_official_texts_may_be_read_from_another_token(generator):
    """A property of the official code that the compat mode has to share: by then EOT may have gone elsewhere."""
    model = make(mode="compat")
    texts = texts_of(generator, [4, 5, 6, 7, 8, 9] * 5)
    out = model.encode_text(texts, 0.5)
    read = [ids_of(out.trace, sample)[-1][len(text) - 1] for sample, text in enumerate(texts)]
    assert sum(token != len(text) - 1 for token, text in zip(read, texts, strict=True)) > 3


@torch.inference_mode()
def test_modes_of_text_differ_only_where_tokens_are_pruned(generator):
    clean, compat = make(mode="clean"), make(mode="compat")
    texts = texts_of(generator, [5, 12, 30])
    assert torch.equal(clean.encode_text(texts, 0.0).features, compat.encode_text(texts, 0.0).features)
    assert compat.encode_text(texts, 0.0).trace[0].lengths.tolist() == [5, 12, 30], "a dense text needs no padding"
    assert (clean.encode_text(texts, 2.0).features - compat.encode_text(texts, 2.0).features).abs().max() > 1e-2


@pytest.mark.parametrize("stream", ["image", "clean", "compat"])
@torch.inference_mode()
def test_too_few_survivors_leave_a_layer_alone(stream, generator):
    """With a dictionary of one entry and a low temperature, thresholds are the score of one token, and few are above it. The
    official rule of text asks for as many as the text is long."""
    sizes = dataclasses.replace(SIZES, vision=dataclasses.replace(SIZES.vision, sd_num=1))
    model = make(1.0, "compat") if stream == "compat" else make(0.02, sizes=sizes)
    ends = [3 + number % 20 for number in range(60)]
    if stream == "image":
        first, needed = model.encode_image(pictures(generator, 60)).trace[0], [1] * 60
    else:
        first = model.encode_text(texts_of(generator, [end + 1 for end in ends])).trace[0]
        needed = [1] * 60 if stream == "clean" else [end + 2 for end in ends]
    seen = set()
    for sample, (least, length) in enumerate(zip(needed, first.lengths_in.tolist(), strict=True)):
        start = int(first.cu_seqlens_in[sample]) + 1
        above = first.importance[start : start + length - 1] > first.threshold[sample]
        if stream == "clean":
            above[-1] = True
        count = int(above.sum())
        assert bool(first.pruned[sample]) == (count > least and length - 1 - count >= 2)
        if length - 1 - count >= 2:
            seen.add(count - least)
    assert {0, 1} <= seen or (stream == "compat" and min(seen) <= 0 < max(seen)), (
        "both sides of the rule have to come up"
    )


# ---- the order of kept tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("spare", [0, 5])
def test_the_weakest_kept_token_goes_last(spare, generator):
    """Against a plain top-k gather, with tied scores, samples that are not pruned, and undefined rows at the end."""
    lengths = [9, 1, 12, 0, 6, 30]
    tokens = sum(lengths)
    scores = torch.randint(0, 6, (tokens,), generator=generator).float().to(DEVICE)  # many ties
    threshold = torch.tensor([2.5, 0.5, 1.5, 0.0, 9.0, 3.5], device=DEVICE)
    x = RaggedBatch(torch.arange(tokens + spare, device=DEVICE, dtype=torch.float32)[:, None], offsets(lengths), 30)
    rows = torch.arange(tokens + spare, dtype=torch.int32, device=DEVICE)
    scores = torch.cat([scores, scores.new_full((spare,), float("nan"))])
    result = compact(x, scores, threshold, ids=rows, merged_id=-7, exact=not spare)
    order = weakest_last(result.ids, scores, x.cu_seqlens, result.tokens.cu_seqlens)
    total = int(result.tokens.cu_seqlens[-1])
    assert sorted(order.tolist()) == list(range(len(result.ids)))
    ours = RaggedBatch(result.ids[order], result.tokens.cu_seqlens, 30).to_list()
    pruned = 0
    for sample, length in enumerate(lengths):
        start = sum(lengths[:sample])
        own = scores[start + 1 : start + length].cpu()
        count = int((own > threshold[sample].cpu()).sum())
        expected = list(range(start, start + length))
        if count >= 1 and len(own) - count >= 2:
            expected = [start, *(start + 1 + i for i in gathered(own, count)), -7]
            pruned += 1
        assert ours[sample].tolist() == expected, f"sample {sample}"
    assert pruned >= 2 and total == sum(len(ids) for ids in ours)


def test_reordered_rows_carry_everything_along(generator):
    """Values, ids, sizes and what they add to the logits move together; rows normalised before are not kept."""
    lengths, width = [20, 3, 14, 30, 25, 28, 22, 29], 16
    tokens = RaggedBatch(normal(generator, sum(lengths), width), offsets(lengths), 30)
    stream = Tokens.start(tokens)
    stream = dataclasses.replace(stream, sizes=torch.rand(sum(lengths), generator=generator).to(DEVICE) + 1)
    received, cls = normal(generator, sum(lengths)).abs(), normal(generator, sum(lengths)).abs() / 20
    guide = (normal(generator, 5, width), normal(generator, 5))
    attention = Attention(tokens.values, attention_received=received, cls_attention=cls)
    rule, norm = MADTP(2.0, proportional_attention=True), LayerNorm(width).to(DEVICE)
    results = [
        chosen(stream, block_input=stream, attention=attention, dictionary=guide, layer=1, norm=norm)
        for chosen in (rule, official(rule, "the test", weakest_last=True))
    ]
    (plain, plain_trace), (moved, moved_trace) = results
    assert plain.normed[0] is norm and torch.allclose(plain.normed[1], norm(plain.values), atol=1e-5)
    assert moved.normed is None and torch.equal(moved_trace.ids, moved.ids)
    assert torch.equal(plain_trace.cu_seqlens, moved_trace.cu_seqlens) and plain_trace.pruned.any()
    assert not torch.equal(plain.ids, moved.ids)
    for sample in range(len(lengths)):
        start, stop = moved.cu_seqlens[sample : sample + 2].tolist()
        row_of = {i: start + row for row, i in enumerate(plain.ids[start:stop].tolist())}
        rows = [row_of[i] for i in moved.ids[start:stop].tolist()]
        for before, after in (
            (plain.values, moved.values), (plain.sizes, moved.sizes), (plain.key_bias, moved.key_bias)
        ):  # fmt: skip
            assert torch.equal(before[rows], after[start:stop])


# ---- alone, in a batch, in another order ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("mode", ["clean", "compat"])
@pytest.mark.parametrize("backend", backends_here())
@torch.inference_mode()
def test_a_sample_is_the_same_alone_and_in_a_batch(backend, mode, temperature, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    model = make(temperature, mode, backend=backend)
    pixels, texts = pictures(generator, 12), texts_of(generator, [3, 40, 5, 17, 4, 8, 25, 3, 11, 31, 6, 9])
    order = torch.randperm(12, generator=generator).tolist()
    together, permuted = model(pixels, texts), model(pixels[order], [texts[s] for s in order])
    for sample in range(12):
        alone = model(pixels[sample : sample + 1], [texts[sample]])
        for other, row in ((alone, 0), (permuted, order.index(sample))):
            for ours, theirs in ((together.vision, other.vision), (together.text, other.text)):
                if is_clear(ours, sample):
                    assert ids_of(ours, sample) == ids_of(theirs, row)
            for name, trace in (("image_features", together.vision), ("text_features", together.text)):
                if is_clear(trace, sample):
                    ours, theirs = getattr(together, name)[sample], getattr(other, name)[row]
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    clear = [is_clear(trace, s) for trace in (together.vision, together.text) for s in range(12)]
    assert sum(clear) >= 20
    if temperature:  # the claim would be empty if nothing were pruned
        assert len(set(together.vision[0].kept.tolist())) > 3 and together.text[0].pruned.any()


def is_clear(trace, sample):
    """Whether no decision was on a knife edge."""
    for record in trace:
        if record.importance is not None:
            scores = record.importance[record.cu_seqlens_in[sample] : record.cu_seqlens_in[sample + 1]][1:]
            if len(scores) > 2 and (scores - record.threshold[sample]).abs().min() < MARGIN * scores.abs().mean():
                return False
    return True


@pytest.mark.parametrize("mode", ["clean", "compat"])
@torch.inference_mode()
def test_batch_grouping_ties_the_images_and_the_texts(mode, generator):
    pixels, texts = pictures(generator, 6), texts_of(generator, [20 if mode == "clean" else 4] * 6)
    tied = make(mode=mode, grouping="batch")(pixels, texts)
    for (first, *_), min_keep in ((tied.vision, 1), (tied.text, 1 if mode == "clean" else 3 + 2)):
        above = []
        for sample, length in enumerate(first.lengths_in.tolist()):
            start = int(first.cu_seqlens_in[sample])
            own = first.importance[start + 1 : start + length] > first.threshold[sample]
            if mode == "clean" and first is tied.text[0]:
                own[-1] = True  # EOT
            above.append(int(own.sum()))
        most = max(above) if max(above) > min_keep and length - 1 - max(above) >= 2 else length - 1
        assert first.kept.tolist() == [most] * 6
    assert tied.vision[0].pruned.all() and len(set((tied.vision[0].threshold).tolist())) == 6


@torch.inference_mode()
def test_official_batches_keep_the_batch_maximum():
    """Token counts of the official code with all images in one batch."""
    family = GOLDEN / "clip"
    sizes = json.loads((family / "manifest.json").read_text())["config"]
    inputs, batched = load_file(family / "inputs.safetensors"), load_file(family / "batched.safetensors")
    model = golden_model(grouping="batch")
    for row, temperature in enumerate(sizes["temps"]):
        images = model.encode_image(inputs["images_u8"].float() / 64 - 2, temperature)
        for layer, record in enumerate(images.trace):
            assert set((record.lengths - 1).tolist()) == {int(batched["vision_tokens_out"][row, layer])}
        texts = [ids[: int(ids.argmax()) + 1] for ids in inputs["text"]]
        out = model.encode_text(texts, temperature, alignment_features=True)
        assert [int(record.lengths[0]) - 1 for record in out.trace] == batched["text_tokens_out"][row].tolist()


def golden_model(**options):
    family = GOLDEN / "clip"
    state = {key: value.float() for key, value in load_file(family / "state_dict.safetensors").items()}
    sizes = json.loads((family / "manifest.json").read_text())["config"]
    ours = official_layout.to_ours(state)
    config = official_layout.infer_config(ours)
    config = dataclasses.replace(  # heads of the golden model are not 64 wide
        config,
        vision=dataclasses.replace(config.vision, num_heads=sizes["vision"]["num_heads"]),
        text=dataclasses.replace(config.text, num_attention_heads=sizes["text"]["heads"]),
        text_mode="compat",
    )
    return madtp.load(state | {"logit_scale": torch.zeros(())}, config=config, device=DEVICE, **options)


# ---- transformers' CLIP ---------------------------------------------------------------------------------------------


def hugging_face(hidden_act="quick_gelu", eos_token_id=END, vocabulary=VOCABULARY):
    torch.manual_seed(3)
    common = {"hidden_act": hidden_act, "initializer_factor": 3.0}
    config = HuggingFaceConfig(
        text_config=common
        | {
            "vocab_size": vocabulary, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 3, "max_position_embeddings": 40, "eos_token_id": eos_token_id,
            "bos_token_id": START, "pad_token_id": END,
        },
        vision_config=common
        | {
            "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 64, "patch_size": 16,
        },
        projection_dim=32,
    )  # fmt: skip
    model = CLIPModel(config).eval()
    with torch.no_grad():  # biases and norms too, which are zeros and ones at first
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def check_like_hugging_face(ours, theirs, generator):
    texts = texts_of(generator, [3, 9, 40, 17])
    pixels = normal(generator, 3, 3, 64, 64)
    padded = torch.full((4, 40), END)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    with torch.inference_mode():
        expected = theirs(input_ids=padded, pixel_values=pixels.cpu())
        image, text = theirs.get_image_features(pixels.cpu()), theirs.get_text_features(padded)
        for mode in ("clean", "compat"):
            ours.config = dataclasses.replace(ours.config, text_mode=mode)
            out = ours(pixels, texts, pruning=0.0)
            values = {name: getattr(expected, name) for name in ("logits_per_image", "image_embeds", "text_embeds")}
            values |= {"image_features": image.pooler_output, "text_features": text.pooler_output}
            for name, value in values.items():
                difference = (getattr(out, name).cpu() - value).abs().max()
                assert difference < 1e-5 * value.abs().max(), f"{name}, {mode}: {difference}"


@pytest.mark.parametrize("eos_token_id", [END, 2])
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_dense_features_are_those_of_transformers(hidden_act, eos_token_id, generator, tmp_path):
    theirs = hugging_face(hidden_act, eos_token_id)
    theirs.save_pretrained(tmp_path)
    ours = madtp.load(tmp_path, device=DEVICE)
    assert ours.config.hidden_act == hidden_act and ours.temperature == 0.0
    assert ours.config.text.eos_token_id == (None if eos_token_id == 2 else END)
    check_like_hugging_face(ours, theirs, generator)


def test_the_end_of_text_need_not_be_the_highest_id(generator, tmp_path):
    """With tokens added behind it, it is found by its id alone."""
    theirs = hugging_face(vocabulary=VOCABULARY + 10)
    theirs.save_pretrained(tmp_path)
    ours = madtp.load(tmp_path, device=DEVICE)
    text = torch.tensor([START, 7, VOCABULARY + 3, 8, END])
    with torch.inference_mode():
        expected = theirs.get_text_features(text[None]).pooler_output
        torch.testing.assert_close(ours.encode_text([text]).features.cpu(), expected, atol=1e-5, rtol=1e-5)
        highest = dataclasses.replace(ours.config.text, eos_token_id=None)
        ours.config = dataclasses.replace(ours.config, text=highest)
        with pytest.raises(ValueError, match=f"end with their first end-of-text token, id {VOCABULARY + 3}"):
            ours.encode_text([text])


def test_hugging_face_files_and_state_dicts(generator, tmp_path):
    theirs = hugging_face()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    theirs.config.save_pretrained(tmp_path)
    from_bin = madtp.load(str(tmp_path), "clip", device=DEVICE)
    check_like_hugging_face(from_bin, theirs, generator)
    from_state = madtp.load(theirs.state_dict(), config=from_bin.config, device=DEVICE)
    check_like_hugging_face(from_state, theirs, generator)
    back = FAMILIES["clip"].from_ours(from_bin.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    for key, value in theirs.state_dict().items():
        assert torch.equal(back[key].cpu(), value), key


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"vision_config": {"layer_norm_eps": 1e-6}},
            "layer_norm_eps: expected the same in both towers, got 1e-06 and 1e-05",
        ),
        (
            {"text_config": {"hidden_act": "gelu"}},
            "hidden_act: expected the same in both towers, got quick_gelu and gelu",
        ),
        (
            {"vision_config": {"hidden_act": "relu"}, "text_config": {"hidden_act": "relu"}},
            "hidden_act: expected one of quick_gelu, gelu, gelu_tanh, got 'relu'",
        ),
        ({"vision_config": {"num_channels": 4}}, "num_channels: expected 3, got 4"),
    ],
)
def test_hugging_face_models_of_another_kind(change, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **change}))
    save_file(hugging_face().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        madtp.load(tmp_path)


# ---- MADTP's and OpenAI's checkpoints -------------------------------------------------------------------------------

# What the official loaders hold in float16, by key.
HALF = ["attn.in_proj_weight", "attn.in_proj_bias"]
for part in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj", "query_model.q_map.0"):
    HALF += [f"{part}.weight", f"{part}.bias"]


def heads_of_64(**options):
    sizes = dataclasses.replace(
        SIZES,
        vision=dataclasses.replace(SIZES.vision, embed_dim=128, num_heads=2),
        text=dataclasses.replace(SIZES.text, hidden_size=64, num_attention_heads=1),
    )
    return make(sizes=sizes, **options)


def test_official_key_names():
    """Those of the golden state dict, which the official classes wrote."""
    keys = json.loads((GOLDEN / "clip" / "manifest.json").read_text())["state_dict_keys"]
    ours = golden_model().state_dict()
    assert set(official_layout.from_ours(ours)) == {*keys, "logit_scale"}


@pytest.mark.parametrize("temperature", [None, 1.75])
def test_madtp_files(temperature, tmp_path, caplog):
    """With what they hold for training, which is named and left out."""
    model = heads_of_64()
    official = official_layout.from_ours({key: value.half().float() for key, value in model.cpu().state_dict().items()})
    training = {
        key.replace(tower, f"{tower}_m", 1): value
        for key, value in official.items()
        for tower in ("visual", "transformer", "token_embedding", "ln_final", "positional_embedding", "text_projection")
        if key.split(".")[0] == tower
    }
    training |= {
        "image_queue": torch.randn(32, 8), "text_queue": torch.randn(32, 8), "idx_queue": torch.full((1, 8), -100),
        "ptr_queue": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    assert len(training) == len(official) - 2 + 4  # all but the dictionary and the scale have a copy
    torch.save({"model": official | training, "epoch": 3, "temperature": 1.75}, tmp_path / "best.pth")
    with caplog.at_level(logging.INFO, logger="madtp"):
        loaded = madtp.load(tmp_path / "best.pth", temperature=temperature)
    assert all(key in caplog.text for key in training)
    assert loaded.temperature == 1.75 and loaded.config == model.config
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key].half().float()), key
    back = official_layout.from_ours(loaded.state_dict())
    assert back.keys() == official.keys() and all(torch.equal(back[key], official[key]) for key in back)
    assert len({value.data_ptr() for value in back.values()}) == len(back)


def test_official_weights_are_rounded_as_the_official_loaders_do():
    model = heads_of_64().cpu()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-5)  # nothing is a float16
    official = official_layout.from_ours(model.state_dict())
    loaded = official_layout.from_ours(madtp.load(official).state_dict())
    rounded = {key for key in official if not torch.equal(loaded[key], official[key])}
    for key in rounded:
        assert torch.equal(loaded[key], official[key].half().float()), key
    blocks = [f"{tower}transformer.resblocks.{layer}" for tower in ("visual.", "") for layer in range(3)]
    assert rounded == {f"{block}.{name}" for block in blocks for name in HALF} | {
        "visual.conv1.weight", "visual.proj", "text_projection"
    }  # fmt: skip
    # Weights with our names have been through it, or come from elsewhere.
    untouched = madtp.load(model.state_dict()).state_dict()
    assert all(torch.equal(untouched[key], value) for key, value in model.state_dict().items())


def test_openai_state_dicts(caplog):
    """Half precision, sizes as tensors beside the weights, no dictionary and no maps."""
    model = heads_of_64().cpu()
    official = official_layout.from_ours(model.state_dict())
    openai = {
        key: value.half() for key, value in official.items() if key != "space_dict" and ".query_model." not in key
    } | {name: torch.tensor(77) for name in ("input_resolution", "context_length", "vocab_size")}
    with caplog.at_level(logging.INFO, logger="madtp"):
        loaded = madtp.load(openai)
    assert "input_resolution, context_length, vocab_size" in caplog.text
    assert "space_dict" in caplog.text and "initialised at random" in caplog.text
    expected = dataclasses.replace(model.config.vision, sd_num=100, sd_dim=768)
    assert loaded.config == dataclasses.replace(model.config, vision=expected)
    for key, value in model.state_dict().items():
        if key != "space_dict" and ".query_models." not in key:
            assert torch.equal(loaded.state_dict()[key], value.half().float()), key


@pytest.mark.parametrize(
    "width, patch, size, depth, text, embed",
    [(768, 32, 224, 12, 512, 512), (768, 16, 224, 12, 512, 512), (1024, 14, 224, 24, 768, 768), (1024, 14, 336, 24, 768, 768)],
    ids=["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"],
)  # fmt: skip
def test_sizes_of_the_published_models(width, patch, size, depth, text, embed):
    config = CLIPConfig(
        VisionConfig(size, patch, embed_dim=width, depth=depth, num_heads=width // 64, map_func=True),
        CLIPTextConfig(hidden_size=text, num_attention_heads=text // 64, intermediate_size=4 * text),
        embed,
    )
    with torch.device("meta"):
        model = CLIP(config)
    official = official_layout.from_ours(model.state_dict())
    assert official["visual.positional_embedding"].shape == ((size // patch) ** 2 + 1, width)
    assert official["visual.proj"].shape == (width, embed) and official["text_projection"].shape == (text, embed)
    ours = official_layout.to_ours(official)
    assert official_layout.infer_config(ours) == config
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    if size == 336:
        assert config == CLIPConfig()
        online = sum(value.numel() for key, value in official.items() if key not in ("space_dict", "logit_scale"))
        # The published total has momentum copies of everything but dictionary and scale; queues are buffers.
        assert 2 * online + 100 * 768 + 1 == 907_924_993


def test_files_that_are_refused(tmp_path):
    resnet = {"visual.layer1.0.conv1.weight": torch.zeros(1), "token_embedding.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="the image tower is a ResNet"):
        madtp.load(resnet)
    script = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), script)
    with pytest.raises(CheckpointError, match=r"refused, because it is a TorchScript archive.*state_dict\(\)"):
        madtp.load(script)
    official = official_layout.from_ours(heads_of_64().state_dict())
    del official["visual.ln_post.bias"]
    with pytest.raises(CheckpointError, match="task 'clip'; missing: visual.norm_post.bias"):
        madtp.load(official)
    with pytest.raises(CheckpointError, match="holds a model for task 'clip', not 'nlvr'"):
        madtp.load(official, "nlvr")


@torch.inference_mode()
def test_other_image_sizes(generator):
    model = heads_of_64()
    larger = madtp.load(model.state_dict(), image_size=96, device=DEVICE)
    assert larger.config.vision.num_patches == 144
    out = larger.encode_image(pictures(generator, 2, 96), 1.0)
    assert out.trace[0].lengths_in.tolist() == [145, 145] and out.features.isfinite().all()


@pytest.mark.parametrize("mode", ["clean", "compat"])
def test_saved_models(mode, generator, tmp_path):
    model = make(1.25, mode)
    model.processor = CLIPProcessor(64, VOCABULARY, 40, "demo")
    madtp.save_pretrained(model, tmp_path)
    loaded = madtp.load(tmp_path, device=DEVICE)
    assert loaded.config == model.config and loaded.temperature == 1.25
    texts = [loaded.processor.text(text) for text in ("A red boat.", "sky", "")]
    assert torch.equal(texts[0], model.processor.text("A red boat."))
    pixels = pictures(generator, 2)
    with torch.inference_mode():
        assert torch.equal(loaded(pixels, texts).logits_per_image, model(pixels, texts).logits_per_image)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clean", "compat"])
@pytest.mark.parametrize("backend", backends_here(kernels_only=True))
def test_gradients_agree_with_the_reference(backend, mode, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    pixels, texts = pictures(generator, 3), texts_of(generator, [5, 20, 9])
    grads = {}
    for name in (backend, "reference"):
        model = make(mode=mode, backend=name).train()
        out = model(pixels, texts, alignment_features=True)
        labels = torch.arange(3, device=DEVICE)
        loss = F.cross_entropy(out.logits_per_image, labels) + F.cross_entropy(out.logits_per_image.mT, labels)
        (loss + 0.1 * alignment_loss(*out.alignment_features)).backward()
        grads[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
    for key, theirs in grads["reference"].items():
        assert theirs is not None and theirs.isfinite().all(), key
        scale = theirs.abs().max().item()
        close = dict(atol=2e-4 * scale + 1e-7, rtol=2e-3)
        torch.testing.assert_close(grads[backend][key], theirs, **close, msg=lambda m, k=key: f"{k}: {m}")
    for key in ("space_dict", "visual.query_models.0.q_map.0.weight", "text.query_models.0.q_map.0.weight"):
        assert grads["reference"][key].abs().max() > 0, key


def test_a_changed_dictionary_or_map_is_noticed(generator):
    """At inference the dictionary seen through each map is kept."""
    model, pixels = make(), pictures(generator, 2)

    def scores():
        with torch.inference_mode():
            return model.encode_image(pixels).trace[0].importance

    def step():
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model.encode_image(pixels).features.square().sum().backward()
        optimizer.step()

    def overwrite():
        model.space_dict.data.mul_(-1)

    def replace():
        layer = model.visual.query_models[0].q_map[0]
        layer.bias = torch.nn.Parameter(layer.bias.detach() + 1)

    for change in (step, overwrite, replace):
        before = scores()
        change()
        after = scores()
        assert not torch.equal(before, after), change.__name__
        fresh = make()
        fresh.load_state_dict(model.state_dict())
        with torch.inference_mode():
            assert torch.equal(fresh.encode_image(pixels).trace[0].importance, after), change.__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu"])
def test_activations_of_linear_layers(activation, dtype, generator):
    """The fast path of inference and the differentiable one."""
    layer = Linear(24, 40).to(DEVICE, dtype)
    x = normal(generator, 9, 24, dtype=dtype)
    kept = x.clone()
    plain = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    formula = {None: plain, "gelu": F.gelu(plain), "quick_gelu": plain / (1 + torch.exp(-1.702 * plain))}[activation]
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(layer(x, activation=activation).double(), formula, **tolerance)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, activation=activation).double(), formula, **tolerance)
    assert torch.equal(x, kept)


# ---- wrong inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, message",
    [
        ([], "input_ids: expected at least one text"),
        ([[]], "input_ids: expected at least one token per text, text 0 has none"),
        ([[START, 5, END], [START, 5]], r"input_ids: expected texts without padding .* id 512; text 1 is \[512, 5\]"),
        ([[START, 5, END, 0, 0]], r"end with their first end-of-text token, id 513; text 0 is \[512, 5, 513, 0, 0\]"),
        ([[START, 5, END, END]], "end with their first end-of-text token"),
        ([[START, VOCABULARY]], rf"input_ids: expected ids in 0\.\.{VOCABULARY - 1}"),
        ([[START] + [5] * 39 + [END]], "input_ids: a text of 41 tokens exceeds the model's 40 positions"),
    ],
)
@pytest.mark.parametrize("mode", ["clean", "compat"])
def test_texts_that_do_not_fit(mode, texts, message):
    with pytest.raises(ValueError, match=message):
        make(mode=mode).encode_text([torch.tensor(text, dtype=torch.int64) for text in texts])


def test_pictures_that_do_not_fit():
    with pytest.raises(ValueError, match=r"pixels: expected \[B, 3, 64, 64\], got \[1, 3, 32, 32\]"):
        make().encode_image(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_mode": "padded"}, "text_mode: expected one of clean, compat, got 'padded'"),
        ({"hidden_act": "relu"}, "hidden_act: expected one of quick_gelu, gelu, gelu_tanh, got 'relu'"),
    ],
)
def test_sizes_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIZES, **change)


# ---- words and pictures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """A byte-pair vocabulary with four merges, as the files that CLIP ships."""
    directory = tmp_path_factory.mktemp("vocabulary")
    bytes_ = list(CLIPProcessor(64, VOCABULARY, 40, "demo").tokenizer.get_vocab())
    letters = sorted(entry for entry in bytes_ if not entry.startswith("<|"))
    merges = ["c a", "ca t</w>", "d o", "do g</w>"]
    entries = [*letters, *(merge.replace(" ", "") for merge in merges), "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return directory


def test_words_are_merged(vocabulary):
    processor = CLIPProcessor(64, 518, 40, vocabulary)
    ids = processor.text("Cat  DOG\ncats")
    tokens = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert tokens == ["<|startoftext|>", "cat</w>", "dog</w>", "ca", "t", "s</w>", "<|endoftext|>"]
    assert ids.dtype == torch.int64 and ids.argmax() == len(ids) - 1
    assert processor.decode(ids) == "cat dog cats"
    with_object = CLIPProcessor(64, 518, 40, CLIPTokenizer.from_pretrained(vocabulary))
    assert torch.equal(with_object.text("Cat  DOG\ncats"), ids)


def test_texts_that_are_refused(vocabulary):
    processor = CLIPProcessor(64, 518, 10, vocabulary)
    assert len(processor.text("cat " * 8)) == 10 and not processor.cuts("cat " * 8)
    assert torch.equal(processor.text("cat " * 9), processor.text("cat " * 8)) and processor.cuts("cat " * 9)
    for text, message in (
        (7, "text must be a string, got int"),
        ("cat <|endoftext|> dog", r"text contains <\|startoftext\|> or <\|endoftext\|>"),
    ):
        with pytest.raises(TextError, match=message):
            processor.text(text)


def test_tokenizers_that_do_not_fit(vocabulary, tmp_path):
    with pytest.raises(ValueError, match="518 entries, but the model is made for 49408"):
        CLIPProcessor(64, 49408, 77, vocabulary).text("cat")
    for source in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="cannot be loaded|no vocabulary found"):
            CLIPProcessor(64, 518, 40, source).text("cat")


def test_hugging_face_directories_bring_their_tokenizer(vocabulary, tmp_path):
    hugging_face(vocabulary=518).save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text((vocabulary / name).read_text())
    assert len(madtp.load(tmp_path).processor.text("cat dog")) == 4


def test_embeddings_of_pictures_and_texts(generator):
    model = madtp.load("random:base", "clip", config=SIZES, temperature=1.0, device=DEVICE)
    names = ["a cat", "two dogs in the snow"]
    images = predict.embed_images(model, list(pictures(generator, 3)))[0]
    texts = predict.embed_texts(model, [model.processor.text(name) for name in names])[0]
    assert len(images) == 3 and len(texts) == 2
    for embedding in images + texts:
        assert embedding.features.shape == (32,) and abs(embedding.features.norm() - 1) < 1e-5
        assert len(embedding.tokens) == 4 and embedding.flops.full > embedding.flops.official > 0
    assert texts[0].tokens[0] == len(model.processor.text(names[0])) and images[0].tokens[-1] < TOKENS


# ---- cost -----------------------------------------------------------------------------------------------------------


def test_dense_cost_gives_the_published_constant():
    """395.70 is a training step: two towers, their momentum copies, four products with 57601 queued features."""
    config = CLIPConfig()
    both = flops.clip(config, image=[577] * 25, text=[77] * 13, pruning=False)
    assert 2 * both.official + 4 * 768 * 57601 / 1e9 == pytest.approx(395.7007, abs=5e-5)
    apart = flops.clip(config, image=[577] * 25, pruning=False), flops.clip(config, text=[77] * 13, pruning=False)
    assert apart[0].official == pytest.approx(191.1047, abs=5e-5)
    # Before the first block, two in each, and CLS at the end; all tokens of a text at the end.
    norms = 5 * 1024 * (577 + 48 * 577 + 1), 5 * 768 * (24 * 77 + 77)
    assert [part.parts["norm"] for part in apart] == pytest.approx([count / 1e9 for count in norms], rel=1e-9)
    assert sum(part.official for part in apart) == pytest.approx(both.official)


def test_pruned_cost():
    dense = flops.clip(SIZES, image=[65] * 4, text=[30] * 4, pruning=False)
    pruned = flops.clip(SIZES, image=[65, 40, 20, 10], text=[30, 30, 12, 8])
    assert pruned.official < dense.official
    assert pruned.parts["merge"] == pytest.approx((26 + 21 + 11) * 64e-9 + (19 + 5) * 48e-9)
    image, text = (64 + 39 + 19) * (12 * 48 + 64 * 48), (29 + 29 + 11) * (12 * 48 + 48 * 48)
    assert pruned.parts["alignment"] == pytest.approx((image + text) / 1e9)
    with pytest.raises(ValueError, match="text"):
        flops.clip(SIZES, text=[30, 30])


def test_matrix_products_agree_with_torchs_flop_counter(generator, monkeypatch):
    """With attention's formula in the open, where the counter sees its matrix products."""

    def attention(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, causal=False, backend=None, key_bias=None):
        return reference.attention(q, k, v, cu_q, cu_k, max_q, max_k, q.shape[-1] ** -0.5, causal, key_bias)

    monkeypatch.setattr(layers, "attention", attention)
    model, lengths = make(temperature=0.0), [9, 30]
    with FlopCounterMode(display=False) as counter:
        out = model(pictures(generator, 2), texts_of(generator, lengths))
    counts = [flops.clip(SIZES, image=[TOKENS] * 4, text=[length] * 4, pruning=False) for length in lengths]
    expected = sum(count.parts["linear"] + count.parts["attention"] for count in counts)
    similarities = out.logits_per_image.numel() * 32 / 1e9
    assert counter.get_total_flops() / 2e9 == pytest.approx(expected + similarities)
