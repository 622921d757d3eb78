"""The parts of compression: losses against plain formulas, views of pictures, the order of examples, the official
tables."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from compression import CONFIGS, VISION, annotations, pictures, tiny
from PIL import Image

from madtp.compress import distillation, loaders
from madtp.compress.calibrate import freeze_all_but_dictionary, read_pairs
from madtp.compress.dictionary import dictionary_from_examples, dictionary_from_tokens
from madtp.compress.distillation import assignment, distillation_loss
from madtp.compress.objective import Objective, Teacher, costs_of
from madtp.compress.official import OfficialController
from madtp.compress.settings import Settings
from madtp.pruning import MADTP, LayerTrace, Pruning
from madtp.tasks import TASKS, augment, losses
from madtp.tasks.annotations import AnnotationError
from madtp.tasks.caption.model import Caption
from madtp.tasks.nlvr import swap_sides
from madtp.text import Layer
from madtp.vision import Block
from madtp.weights import randomize
from madtp_kernels import RaggedBatch

SETTINGS = Settings(reduction=0.3, epochs=1, batch_size=4, lr=1e-3, weight_decay=0.05)


def batch_of(task_name, folder, number=6, model=None):
    model = tiny(task_name) if model is None else model
    task = TASKS[task_name](model)
    examples = task.split(annotations(task_name, folder / "pictures", number), folder / "pictures", training=True)
    return model, task, task.collate([task.instance(example) for example in examples])


# ---- every task


@pytest.mark.parametrize("name", list(TASKS))
def test_every_task_learns_a_handful_of_samples(name, tmp_path):
    model, task, batch = batch_of(name, tmp_path)
    objective = Objective(model, task, SETTINGS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    values = []
    for step in range(12):
        loss, terms, (measured, dense), _ = objective(batch, 0.3, (0, step))
        assert measured < dense, "nothing was pruned: the claim would be empty"
        assert loss.item() == pytest.approx(sum(terms.values()).item())
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]
    assert ("alignment" in terms) == (name != "caption")


@pytest.mark.parametrize("name", list(TASKS))
def test_the_dictionary_learns_from_the_task_too(name, tmp_path):
    """Without the alignment loss its gradient comes from the weights of merged tokens."""
    model, task, batch = batch_of(name, tmp_path)
    loss, terms, *_ = Objective(model, task, dataclasses.replace(SETTINGS, alignment=0.0))(batch, 0.3, (0, 0))
    assert "alignment" not in terms
    loss.backward()
    assert model.space_dict.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["nlvr", "vqa", "retrieval", "clip"])
def test_the_alignment_loss_is_a_tenth_and_that_of_the_features(name, tmp_path):
    model, task, batch = batch_of(name, tmp_path)
    _, terms, *_ = Objective(model, task, SETTINGS)(batch, 0.3, (0, 0))
    vision, text = model(batch["pixels"], batch["texts"], 0.3, alignment_features=True).alignment_features
    if name == "nlvr":  # the mean over the two images
        left, right = vision.chunk(2)
        vision = (left + right) / 2
    vision, text = (summary / summary.norm(dim=-1, keepdim=True) for summary in (vision, text))
    expected = 0.1 * (1 - (vision * text).sum(-1)).mean()
    assert terms["alignment"].item() == pytest.approx(expected.item(), rel=1e-5)
    _, terms, *_ = Objective(model, task, SETTINGS)(batch, 0.0, (0, 0))
    assert "alignment" not in terms


def test_costs_are_those_of_an_instance_alone(tmp_path):
    """The dense figure too: no instance pays for its neighbours."""
    for name in TASKS:
        model, task, batch = batch_of(name, tmp_path)
        examples = task.split(tmp_path / "pictures" / f"{name}-0.json", tmp_path / "pictures", training=True)
        with torch.inference_mode():
            together = costs_of(task, model(batch["pixels"], batch["texts"], 0.3), batch, MADTP(0.3))
            for example, (measured, dense) in zip(examples[:3], together, strict=False):
                alone = task.collate([task.instance(example)])
                assert costs_of(task, model(alone["pixels"], alone["texts"], 0.3), alone, MADTP(0.3)) == [
                    (measured, dense)
                ]
                (unpruned,) = costs_of(task, model(alone["pixels"], alone["texts"], 0.0), alone, Pruning())
                assert unpruned == (dense, dense) and measured < dense


@pytest.mark.parametrize("name", list(TASKS))
def test_distillation_pulls_every_stream_to_the_model_as_it_was(name, tmp_path):
    model, task, batch = batch_of(name, tmp_path)
    dense = Teacher(model, task)(batch)
    assert len(dense) == 1 + (name != "caption")
    for (tokens, _), target in zip(task.states(task.forward(model, batch, 0.0)), dense, strict=True):
        assert torch.equal(tokens.cu_seqlens, target.cu_seqlens) and not target.values.requires_grad
    objective = Objective(model, task, dataclasses.replace(SETTINGS, distill=2.0))
    _, terms, *_ = objective(batch, 0.0, (0, 0), dense)
    assert terms["distillation"].item() < 1e-8  # nothing is pruned
    loss, terms, *_ = objective(batch, 0.3, (0, 0), dense)
    expected = 0.0
    for (tokens, trace), target in zip(task.states(task.forward(model, batch, 0.3)), dense, strict=True):
        rows = assignment(trace).tolist() if trace else list(range(len(target.values)))
        assert (len(tokens.values) < len(target.values)) == bool(trace)
        expected += 2 * distance(tokens, rows, target)
    assert terms["distillation"].item() == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    assert loss.item() == pytest.approx(sum(terms.values()).item())
    # What the teacher says does not depend on what the model learns.
    loss.backward()
    teacher = Teacher(model, task)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(a.values, b.values) for a, b in zip(teacher(batch), dense, strict=True))


@pytest.mark.parametrize("name", list(TASKS))
def test_a_teacher_in_half_precision_says_the_same(name, tmp_path):
    """To the rounding of bfloat16, under autocast or not, and leaves the batch as it was."""
    model, task, batch = batch_of(name, tmp_path)
    dense, teacher = Teacher(model, task)(batch), Teacher(model, task, torch.bfloat16)
    half = teacher(batch)
    with torch.autocast("cpu", torch.bfloat16):
        again = teacher(batch)
    assert next(model.parameters()).dtype == torch.float32 and torch.as_tensor(batch["pixels"]).dtype == torch.float32
    for exact, one, other in zip(dense, half, again, strict=True):
        assert one.values.dtype == torch.bfloat16 and torch.equal(one.values, other.values)
        assert (one.values - exact.values).square().mean() < 1e-3 * exact.values.var()


# ---- the dictionary


def centred_tokens(model, batches):
    """Per batch, per layer that is pruned: the tokens that enter it, mapped as its query model does, less their
    mean."""
    found, queries = [], []
    for module in model.modules():
        if isinstance(module, Block) or (isinstance(module, Layer) and not module.causal):
            module.register_forward_pre_hook(lambda module, args: found[-1].append(args[0].values))
    if model.config.task == "clip":
        queries = [query.q_map[0] for query in (*model.visual.query_models, *model.text.query_models)]
    for batch in batches:
        found.append([])
        with torch.no_grad():
            model(batch["pixels"], batch["texts"], 0.0)
        if queries:
            found[-1] = [F.linear(x, q.weight, q.bias) for x, q in zip(found[-1], queries, strict=True)]
    return [[tokens - tokens.mean(0) for tokens in layers] for layers in found]


@pytest.mark.parametrize("name", ["nlvr", "caption", "clip"])
def test_entries_are_centred_tokens_of_every_layer_and_of_several_batches(name, tmp_path):
    model = tiny(name)
    task = TASKS[name](model)
    examples = task.split(annotations(name, tmp_path, 20), tmp_path, training=True)
    before = torch.get_rng_state()
    entries = dictionary_from_examples(model, task, examples, 7)
    assert entries.shape == model.space_dict.shape and not entries.requires_grad
    assert torch.equal(entries, dictionary_from_examples(model, task, examples, 7))
    assert not torch.equal(entries, dictionary_from_examples(model, task, examples, 8))
    assert torch.equal(torch.get_rng_state(), before), "resumed runs would have other random numbers"
    order = np.random.default_rng(7).permutation(20).tolist()
    batches = [task.collate([task.instance(examples[number]) for number in part]) for part in (order[:10], order[10:])]
    found = centred_tokens(model, batches)
    layers = {"nlvr": [0, 1, 2, 2, 3, 4, 5, 5], "clip": [0, 1, 2, 2, 3, 4, 5, 5], "caption": [0, 0, 1, 1, 1, 2, 2, 2]}
    for place, (entry, layer) in enumerate(zip(entries, layers[name], strict=True)):
        distances = [(tokens - entry).abs().amax(1).min().item() for tokens in found[place % 2]]
        assert distances[layer] < 1e-4 and sorted(distances)[1] > 1e-2, place
    assert len(torch.unique(entries, dim=0)) == 8


def test_entries_that_are_tokens_leave_more_tokens_at_low_temperatures():
    """Random ones match the few tokens that are long, as trained models have some; the least important of those is the
    threshold, though many tokens are less important."""
    config = dataclasses.replace(CONFIGS["caption"], vision=dataclasses.replace(VISION, image_size=64, sd_num=32))
    texts, dropped = [torch.tensor([1, 5, 6])] * 8, []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        model = Caption(config)
        randomize(model, seed)
        pixels = torch.randn(8, 3, 64, 64, generator=generator)
        with torch.no_grad():
            model.visual_encoder.pos_embed[0, 1:7] = 20 * torch.randn(6, 32, generator=generator)
            random = torch.randn(model.space_dict.shape, generator=generator)
            tokens = dictionary_from_tokens(
                model, lambda m=model, p=pixels: m(p, texts, 0.0, alignment_features=True), generator
            )
            for entries in (random, tokens):
                model.space_dict.copy_(entries)
                dropped.append(1 - len(model(pixels, texts, 1e-3).images.ids) / (8 * 65))
    assert min(dropped[::2]) > 0.6 and max(dropped[1::2]) < 0.35


def test_examples_that_are_too_few_for_a_dictionary_are_an_error(tmp_path):
    model, task, batch = batch_of("nlvr", tmp_path, 2)
    model.space_dict = torch.nn.Parameter(torch.zeros(400, 32))
    examples = task.split(tmp_path / "pictures" / "nlvr-0.json", tmp_path / "pictures", training=True)
    with pytest.raises(ValueError, match="400 entries take at least 6[67] tokens from each of 6 layers, got"):
        dictionary_from_examples(model, task, examples, 0)
    with pytest.raises(ValueError, match="expected alignment features, got none"):
        dictionary_from_tokens(model, lambda: model(batch["pixels"], batch["texts"], 0.0), torch.Generator())


# ---- losses


def distance(tokens, rows, dense):
    """The distillation loss, token by token in float64, from the rows that stand for the original tokens."""
    every = torch.cat([target.double() for target in dense.to_list()])
    errors = []
    for row, state in enumerate(torch.cat(tokens.to_list()).double()):
        originals = every[torch.tensor(rows) == row]
        errors += [(state - originals.mean(0)).square().mean().item()] if len(originals) else []
    return sum(errors) / len(errors) / every.var(correction=0).item()


def pruned_streams(generator, samples=5):
    """Tokens of which some stand for others and one for nothing, in a buffer with more rows than tokens; what they
    were; which row stands for each."""
    lengths = torch.randint(3, 9, (samples,), generator=generator).tolist()
    dense = RaggedBatch.from_list([torch.randn(length, 6, generator=generator) + 1 for length in lengths])
    states, rows, first = [], [], 0
    for target in dense.to_list():
        left = 1 + int(torch.randint(len(target) - 1, (), generator=generator))
        into = [0, *torch.randint(-1, left, (len(target) - 1,), generator=generator).tolist()]  # some are lost
        rows += [first + row if row >= 0 else -1 for row in into]
        states.append(target[:left] + 0.3 * torch.randn(left, 6, generator=generator))
        first += left
    exact = RaggedBatch.from_list(states)
    values = torch.cat([exact.values, torch.full((3, 6), torch.nan)]).requires_grad_()
    return exact, RaggedBatch(values, exact.cu_seqlens, exact.max_seqlen, bound=True), rows, dense


def test_distillation_pulls_each_token_to_the_mean_of_those_it_stands_for(generator):
    exact, tokens, rows, dense = pruned_streams(generator)
    expected = distance(exact, rows, dense)
    loss = distillation_loss(tokens, torch.tensor(rows), dense)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    assert distillation_loss(exact, torch.tensor(rows), dense).item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    stands = torch.tensor([row in rows for row in range(len(tokens.values))])
    moved = tokens.values.grad.abs().amax(1)
    assert (moved[stands] > 0).all() and (moved[~stands] == 0).all()  # rows that nobody wrote leave no NaN
    assert distillation_loss(dense, torch.arange(len(dense.values)), dense).item() == 0


def test_distillation_is_that_of_all_processes(generator, monkeypatch):
    _, tokens, rows, dense = pruned_streams(generator)
    rows = torch.tensor(rows)
    whole = distillation_loss(tokens, rows, dense).item()
    shares, first, cut = [], dense.cu_seqlens[2], tokens.cu_seqlens[2]
    for samples, kept, originals in (
        (slice(0, 3), slice(0, cut), slice(0, first)), (slice(2, 6), slice(cut, None), slice(first, None))
    ):  # fmt: skip
        ends, dense_ends = tokens.cu_seqlens[samples], dense.cu_seqlens[samples]
        part = RaggedBatch(tokens.values[kept], ends - ends[0], tokens.max_seqlen, bound=True)
        own = torch.where(rows[originals] < 0, -1, rows[originals] - ends[0])
        shares.append((part, own, RaggedBatch(dense.values[originals], dense_ends - dense_ends[0], dense.max_seqlen)))
    seen = []
    monkeypatch.setattr(distillation, "mean_over_processes", lambda x: seen.append(x) or x)
    alone = [distillation_loss(*share).item() for share in shares]
    monkeypatch.setattr(distillation, "mean_over_processes", lambda x: sum(seen) / 2)
    together = [distillation_loss(*share).item() for share in shares]
    assert sum(together) / 2 == pytest.approx(whole, rel=1e-5)
    assert alone != pytest.approx(together, rel=1e-3)


def test_every_token_is_followed_through_the_layers_to_the_one_that_stands_for_it(tmp_path):
    """By hand: a token that leaves goes into the token that its layer made, and with that into later ones."""
    model, task, batch = batch_of("nlvr", tmp_path)
    with torch.no_grad():
        output = task.forward(model, batch, 0.3)
    trace = output.vision
    assert sum(int(layer.pruned.sum()) for layer in trace) > len(trace[0].lengths), (
        "too little was pruned for the claim"
    )
    rows, lengths = assignment(trace), trace[0].lengths_in.tolist()
    assert len(rows) == sum(lengths) and sorted(set(rows.tolist())) == list(range(len(trace[-1].ids)))
    start = 0
    for sample, length in enumerate(lengths):
        place = list(range(length))  # the id that stands for each original token of the sample
        for number, layer in enumerate(trace):
            first, last = layer.cu_seqlens[sample : sample + 2].tolist()
            left = layer.ids[first:last].tolist()
            place = [one if one in left else -(1 + number) for one in place]
        first, last = trace[-1].cu_seqlens[sample : sample + 2].tolist()
        left = trace[-1].ids[first:last].tolist()
        assert rows[start : start + length].tolist() == [first + left.index(one) for one in place]
        start += length


def test_rows_that_a_rule_names_are_followed():
    """Two samples of 3 and 2 tokens; in the second layer one token is lost."""
    cu_seqlens = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 5], [0, 2, 4], [0, 1, 3])]
    ids = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 2, 0, 1], [0, 0, 1])]
    rows = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([0, 1, 1, 2, 3], [0, -1, 1, 2])]
    trace = [
        LayerTrace(before, after, left, rows=into)
        for before, after, left, into in zip(cu_seqlens, cu_seqlens[1:], ids, rows, strict=False)
    ]
    assert assignment(trace).tolist() == [0, -1, -1, 1, 2]


def test_contrast_is_cross_entropy_where_all_images_differ(generator):
    images, texts = (F.normalize(torch.randn(5, 8, generator=generator), dim=-1) for _ in range(2))
    logits = 7.0 * images @ texts.T
    expected = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    found = losses.contrastive_loss(images, texts, torch.tensor(7.0), torch.arange(5))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    # Two captions of an image share its target.
    same = torch.tensor([0, 1, 0, 3, 4])
    targets = torch.eye(5)
    targets[0, 2] = targets[2, 0] = 1
    targets /= targets.sum(1, keepdim=True)
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    found = losses.contrastive_loss(images, texts, torch.tensor(7.0), same)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_negatives_are_likely_and_never_of_the_same_image(generator):
    similarity = torch.randn(6, 6, generator=generator)
    similarity[0] = torch.tensor([9.0, 9.0, 9.0, 5.0, -9.0, -9.0])
    identities = torch.tensor([0, 0, 0, 1, 2, 3])
    drawn = [losses.hard_negatives(similarity, identities, generator) for _ in range(50)]
    for columns in drawn:
        assert all(identities[row] != identities[column] for row, column in enumerate(columns))
    assert sum(columns[0] == 3 for columns in drawn) > 45
    assert len({columns[4] for columns in drawn}) > 2
    assert losses.hard_negatives(similarity, torch.zeros(6), generator) == [None] * 6


def test_token_losses_are_label_smoothed_and_leave_the_prompt_out(generator):
    texts = [torch.randint(9, (length,), generator=generator) for length in (4, 2, 6)]
    ids = RaggedBatch.from_list(texts)
    logits = ids.with_values(torch.randn(12, 9, generator=generator))
    words = {first: [] for first in (1, 3)}  # first token that counts -> per text, losses of its tokens
    for first, found in words.items():
        for text, predicted in zip(texts, logits.to_list(), strict=True):
            log = predicted.log_softmax(-1)
            found.append(
                [-(0.9 * log[i - 1, text[i]] + 0.1 * log[i - 1].mean()).item() for i in range(first, len(text))]
            )
    weights = torch.tensor([0.7, 0.3, 1.0])
    expected = sum(w * sum(text) for w, text in zip(weights.tolist(), words[1], strict=True)) / 2
    assert losses.answer_loss(logits, ids, weights, questions=2).item() == pytest.approx(expected, rel=1e-5)
    counted = list(itertools.chain(*words[3]))
    assert losses.caption_loss(logits, ids, 3).item() == pytest.approx(sum(counted) / len(counted), rel=1e-5)


def test_captions_to_learn_from_begin_with_the_prompt():
    processor = tiny("caption").processor
    ids, prompt = processor.text("A dog, on a BEACH!"), processor.prompt_ids
    assert torch.equal(ids[: len(prompt)], prompt)
    assert processor.decode(ids) == "a picture of a dog, on a beach"
    assert ids[-1] == processor.tokenizer.sep_token_id
    assert len(processor.text("zebra " * 30)) == 40  # as in BLIP


# ---- pictures


def test_a_view_depends_on_its_generator_only(tmp_path):
    image = Image.open(tmp_path / pictures(tmp_path, 1)[0][0])
    views = [np.asarray(augment.augment(image, 32, np.random.default_rng((0, 3, number)))) for number in (1, 1, 2, 3)]
    assert views[0].shape == (32, 32, 3) and np.array_equal(views[0], views[1])
    assert not np.array_equal(views[0], views[2]) and not np.array_equal(views[2], views[3])


def test_crops_have_half_to_all_of_the_area():
    random = np.random.default_rng(0)
    shares, ratios = [], []
    for _ in range(300):
        left, top, right, bottom = augment.crop_box(120, 80, random)
        assert 0 <= left < right <= 120 and 0 <= top < bottom <= 80
        shares.append((right - left) * (bottom - top) / 9600)
        ratios.append((right - left) / (bottom - top))
    assert 0.49 < min(shares) < 0.55 and 0.85 < max(shares) <= 1
    assert 0.73 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.36
    assert augment.crop_box(900, 30, random) == (430, 0, 470, 30)  # nothing fits: the widest crop in the middle


def test_operations_do_what_their_names_say():
    ramp = np.linspace(50, 200, 32).astype(np.uint8)
    image = Image.fromarray(np.repeat(np.tile(ramp, (32, 1))[..., None], 3, 2))
    done = {name: np.asarray(apply(image, 0.5, 1)).astype(int) for name, apply in augment.OPERATIONS.items()}
    before = np.asarray(image).astype(int)
    for name in ("Identity", "Brightness", "Sharpness"):  # at half strength the factor of the latter two is 1
        assert np.array_equal(done[name], before), name
    brighter = np.asarray(augment.OPERATIONS["Brightness"](image, 0.6, 1)).astype(int)
    assert np.allclose(brighter, before * 1.18, atol=1)
    assert done["AutoContrast"].min() == 0 and done["AutoContrast"].max() == 255
    assert np.array_equal(done["TranslateX"][:, :27], before[:, 5:]) and (done["TranslateX"][:, 28:] == 128).all()
    assert np.array_equal(done["TranslateY"][:27], before[5:]) and (done["TranslateY"][28:] == 128).all()
    assert np.array_equal(done["ShearX"][0, :31], before[0, :31]) and done["ShearX"][20, 0, 0] > before[20, 2, 0]
    assert np.array_equal(done["ShearY"][:20, :20], before[:20, :20])  # the same in every row
    assert (done["Rotate"][0, 0] == 128).all() and np.allclose(done["Rotate"][16, 16], before[16, 16], atol=6)


def test_a_swapped_pair_has_a_swapped_statement():
    assert (
        swap_sides("Left of the cup, right; the leftmost is left.") == "right of the cup, left; the leftmost is right."
    )


def test_nlvr_pairs_are_swapped_half_of_the_time(tmp_path):
    task = TASKS["nlvr"](tiny("nlvr"))
    examples = task.split(annotations("nlvr", tmp_path), tmp_path, training=True)
    swapped = 0
    for seed in range(40):
        made = task.instance(examples[1], np.random.default_rng(seed))
        (text,), labels = made["texts"], made["labels"]
        sentence = task.processor.decode(text)
        swapped += "right" in sentence
        assert labels == [int(examples[1].label)] and ("right" in sentence) != ("left" in sentence)
    assert 10 < swapped < 30


# ---- the order of examples


class Numbers:
    """Examples are their numbers; a view is what it was drawn from."""

    @staticmethod
    def instance(example, random=None):
        return example, None if random is None else int(random.integers(1 << 30))

    @staticmethod
    def collate(instances):
        return instances


def batches(**options):
    base = dict(batch_size=3, accumulate=2, seed=5, steps=range(7), views=True, workers=0)
    return list(loaders.training_batches(Numbers, range(20), **(base | options)))


def test_an_epoch_has_every_example_once_but_for_the_rest():
    made = batches()  # 6 examples per step, 3 steps per epoch
    assert [len(batch) for batch in made] == [3] * 14
    epochs = [sum(made[start : start + 6], []) for start in (0, 6)]
    for epoch in epochs:
        assert len({number for number, _ in epoch}) == 18
    assert [number for number, _ in epochs[0]] != [number for number, _ in epochs[1]]
    views = [dict(epoch) for epoch in epochs]
    assert all(views[0][number] != views[1][number] for number in set(views[0]) & set(views[1]))


def test_a_run_goes_on_with_the_batch_that_is_next():
    assert batches(steps=range(4, 7)) == batches()[8:]
    assert batches(steps=range(4, 7), workers=1) == batches()[8:]


def test_processes_share_the_batches_of_one(monkeypatch):
    alone = batches(batch_size=4, accumulate=2, steps=range(4))
    monkeypatch.setattr(loaders, "processes", lambda: 2)
    shares = []
    for number in range(2):
        monkeypatch.setattr(loaders, "rank", lambda number=number: number)
        shares.append(batches(batch_size=2, accumulate=2, steps=range(4)))
    assert [first + second for first, second in zip(*shares, strict=True)] == alone
    seen = []
    for number in range(2):
        monkeypatch.setattr(loaders, "rank", lambda number=number: number)
        for numbers, batch in loaders.evaluation_batches(Numbers, range(7), batch_size=2, workers=0):
            assert [number for number, _ in batch] == numbers and len(numbers) <= 2
            seen += numbers
    assert sorted(seen) == list(range(7))


def test_too_few_examples_are_an_error():
    with pytest.raises(
        ValueError, match="5 training examples are fewer than one step takes: batch size 3 x accumulate 2"
    ):
        loaders.steps_per_epoch(5, 3, 2)


# ---- temperature


@pytest.mark.parametrize(
    "task, missed, step",
    [
        ("nlvr", 31, 1), ("nlvr", 30, 0.5), ("nlvr", 7, 0.25), ("nlvr", 2, 0.1), ("nlvr", 1, 0.01),
        ("vqa", 60, 0.25), ("vqa", 3, 0.01), ("vqa", 1, 0),
        ("clip", 25, 0.2), ("caption", 4, 0.02), ("retrieval", 0.5, 0.01),
    ],
)  # fmt: skip
def test_official_tables(task, missed, step):
    controller = OfficialController(TASKS[task].recipe, 2.0)
    assert controller.update(40 + missed, 40) == pytest.approx(2 + step)
    controller = OfficialController(TASKS[task].recipe, 2.0)
    assert controller.update(40 - missed, 40) == pytest.approx(2 - step)
    controller.load_state_dict(OfficialController(TASKS[task].recipe, 0.1).state_dict())
    assert controller.update(0, 400) == 0  # pruning is off; lower it does not go


# ---- pairs without labels


def test_only_the_dictionary_learns():
    assert freeze_all_but_dictionary(tiny("nlvr")) == ["space_dict"]
    names = freeze_all_but_dictionary(model := tiny("clip"))
    assert "space_dict" in names and len(names) == 1 + 2 * 6 and all("q_map" in name for name in names[1:])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


@pytest.mark.parametrize(
    "row, reason",
    [
        ("[]", "expected an object"),
        ("{", "not JSON"),
        ('{"image": "0-0.png", "text": "a", "text": "b"}', "not JSON: the name 'text' is there twice"),
        ('{"image": "0-0.png"}', "'text': expected a string"),
        ('{"text": "a"}', "'image': expected a path"),
        ('{"image": "absent.png", "text": "a"}', "image is not there: .*absent.png"),
    ],
)
def test_wrong_pairs_are_named(row, reason, tmp_path):
    pictures(tmp_path, 1)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"image": "0-0.png", "caption": "a"}\n\n' + row + "\n")
    with pytest.raises(AnnotationError, match=f"pairs.jsonl: record 3: {reason}"):
        read_pairs(path, "clip")
