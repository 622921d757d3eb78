"""BLIP-VQA, captioning and retrieval as models: batch invariance, writing, ranking, matching, padding, wrong inputs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, backends_here, interpreted, normal

from madtp import CaptionConfig, RetrievalConfig, TextConfig, VisionConfig, VQAConfig, predict
from madtp.generation import generate
from madtp.layers import CrossAttention, QueryGroups
from madtp.pictures import ImageError
from madtp.processing import TextError
from madtp.pruning import Tokens
from madtp.pruning.official import PaddedTokens, mask_after_pruning
from madtp.rows import gather_samples
from madtp.tasks import TASKS
from madtp.weights import randomize
from madtp_kernels import RaggedBatch

VOCABULARY, SEP = 200, 3  # of the bundled tokenizer
VISION = VisionConfig(image_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=4, sd_num=12, sd_dim=64)
TEXT = TextConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, vocab_size=VOCABULARY,
    max_position_embeddings=48, encoder_width=64, sep_token_id=SEP,
)  # fmt: skip
CONFIGS = {
    "caption": CaptionConfig(VISION, TEXT),
    "vqa": VQAConfig(VISION, TEXT),
    "retrieval": RetrievalConfig(VISION, TEXT, proj_dim=24),
}
PROMPT = torch.tensor([VOCABULARY - 2, 5, 40, 7])
LENGTHS = (12, 3, 20, 7, 5)
COUNT = len(LENGTHS)


def make(task, temperature=1.0, *, sep_bias=1.5, seed=4, **options):
    config = CONFIGS[task]
    if "text_mode" in options:
        config = dataclasses.replace(config, text_mode=options.pop("text_mode"))
    model = TASKS[task].Model(config, temperature, **options)
    randomize(model, seed=seed)
    with torch.no_grad():
        model.space_dict.mul_(0.2)  # alignments of order one, so that thresholds are averages of many tokens
        if hasattr(model, "text_decoder"):
            head = model.text_decoder.cls.predictions
            head.transform.LayerNorm.weight.mul_(0.5)  # logits of order one: several words are likely, also [SEP]
            head.bias[SEP] += sep_bias
    return model.to(DEVICE).eval()


@pytest.fixture
def pixels(generator):
    return normal(generator, COUNT, 3, 64, 64)


@pytest.fixture
def texts(generator):
    return [torch.randint(6, VOCABULARY - 2, (length,), generator=generator) for length in LENGTHS]


def same_trace(ours, theirs, sample, other):
    """Two records of a sample: the same tokens in every layer."""
    for mine, yours in zip(ours, theirs, strict=True):
        rows = [
            record.ids[record.cu_seqlens[number] : record.cu_seqlens[number + 1]]
            for record, number in ((mine, sample), (yours, other))
        ]
        assert torch.equal(*rows)


@pytest.fixture
def fixed_pixels():
    """Pictures of which the models below are known to write texts of different lengths."""
    return normal(torch.Generator().manual_seed(7), COUNT, 3, 64, 64)


def shortened(trace):
    assert any(bool(record.pruned.any()) for record in trace), "nothing was pruned: the claim would be empty"


# ---- the same sample alone and in any batch

CLOSE = dict(atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", backends_here())
def test_a_caption_does_not_depend_on_its_neighbours(backend, fixed_pixels, texts):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    model, pixels = make("caption", backend=backend), fixed_pixels
    with torch.inference_mode():
        together = model(pixels, texts)
        captions = model.generate(together.images, PROMPT)
        for order in ([3], [4, 0], [2, 1, 0, 4, 3]):
            some = model(pixels[order], [texts[i] for i in order])
            again = model.generate(some.images, PROMPT)
            for sample, number in enumerate(order):
                same_trace(some.vision, together.vision, sample, number)
                torch.testing.assert_close(some.images[sample], together.images[number], **CLOSE)
                torch.testing.assert_close(some.logits[sample], together.logits[number], **CLOSE)
                assert again[sample].tolist() == captions[number].tolist()
    shortened(together.vision)
    assert len({len(caption) for caption in captions}) > 1, "captions of different lengths are the harder case"


@pytest.mark.parametrize("backend", backends_here())
def test_an_answer_does_not_depend_on_its_neighbours(backend, pixels, texts, generator):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    model = make("vqa", backend=backend)
    answers = [torch.randint(6, 198, (n,), generator=generator) for n in (2, 3, 5, 4, 3, 2, 6)]
    with torch.inference_mode():
        together = model(pixels, texts)
        words, ranking = model.generate(together.questions), model.rank(together.questions, answers, k=4)
        for order in ([3], [4, 0], [2, 1, 0, 4, 3]):
            some = model(pixels[order], [texts[i] for i in order])
            again, ranked = model.generate(some.questions), model.rank(some.questions, answers, k=4)
            for sample, number in enumerate(order):
                same_trace(some.vision, together.vision, sample, number)
                same_trace(some.text, together.text, sample, number)
                torch.testing.assert_close(some.questions[sample], together.questions[number], **CLOSE)
                assert again[sample].tolist() == words[number].tolist()
                assert torch.equal(ranked.candidates[sample], ranking.candidates[number])
                # Sums of the losses of several tokens, of order ten.
                torch.testing.assert_close(ranked.scores[sample], ranking.scores[number], atol=1e-5, rtol=1e-5)
    shortened(together.vision)
    shortened(together.text)


@pytest.mark.parametrize("text_mode", ["clean", "compat"])
@pytest.mark.parametrize("backend", backends_here())
def test_features_and_matches_do_not_depend_on_their_neighbours(backend, text_mode, pixels, texts):
    if interpreted(backend):
        pytest.skip("too much for the interpreter")
    model = make("retrieval", text_mode=text_mode, backend=backend)
    pairs = [(3, 1), (0, 0), (3, 4), (1, 2), (0, 4), (3, 0)]
    with torch.inference_mode():
        together = model(pixels, texts)
        matches = model.match(together.images, texts, pairs)
        for number in range(COUNT):
            alone = model(pixels[number : number + 1], [texts[number]])
            same_trace(alone.vision, together.vision, 0, number)
            same_trace(alone.text, together.text, 0, number)
            torch.testing.assert_close(alone.image_embeds[0], together.image_embeds[number], **CLOSE)
            torch.testing.assert_close(alone.text_embeds[0], together.text_embeds[number], **CLOSE)
        for sample, number in enumerate(matches.order.tolist()):
            image, text = pairs[number]
            single = model.match(model.encode_image(pixels[image : image + 1]).tokens, [texts[text]], [(0, 0)])
            same_trace(single.text, matches.text, 0, sample)
            torch.testing.assert_close(single.logits[0], matches.logits[number], **CLOSE)
    torch.testing.assert_close(together.similarity, together.image_embeds @ together.text_embeds.mT)
    for trace in (together.vision, together.text, matches.text):
        shortened(trace)


# ---- writing


def next_words(model, images, sequence):
    """Log-probabilities of what follows a sequence, recomputed from its beginning without any cache."""
    keys = model.text_decoder.keys(images)
    states = model.text_decoder(RaggedBatch.from_list([sequence.to(DEVICE)]), keys)
    return model.text_decoder.logits(states.values[-1:])[0].float().log_softmax(-1)


def encoded(model, task, pixels, texts, number):
    """What the decoder looks at, of one sample."""
    if task == "caption":
        return model(pixels[number : number + 1]).images
    return model(pixels[number : number + 1], [texts[number]]).questions


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_cached_greedy_words_are_those_of_a_plain_recomputation(task, fixed_pixels):
    model, pixels = make(task, sep_bias=1.5 if task == "caption" else 6.5), fixed_pixels
    texts = [torch.arange(8, 8 + length) for length in LENGTHS]
    start, longest, shortest = (PROMPT, 20, 7) if task == "caption" else (PROMPT[:1], 10, 2)
    written = []
    with torch.inference_mode():
        for number in range(COUNT):
            memory = encoded(model, task, pixels, texts, number)
            options = {"num_beams": 1, "max_length": longest, "min_length": shortest}
            (ours,) = (
                model.generate(memory, PROMPT, **options) if task == "caption" else model.generate(memory, **options)
            )
            sequence = start
            while len(sequence) < longest:
                scores = next_words(model, memory, sequence)
                if len(sequence) < shortest:
                    scores[SEP] = -torch.inf
                word = scores.argmax().cpu()
                if word == SEP:
                    break
                sequence = torch.cat([sequence, word[None]])
            assert ours.tolist() == sequence[len(start) :].tolist()
            written.append(len(sequence))
    assert min(written) >= shortest and len(set(written)) > 1


def beam_search(words_after, prompt, beams, longest, shortest, length_of):
    """Beam search as transformers 4.15 does it, one sequence at a time; ``length_of(tokens, finished)`` divides the scores."""
    running, finished = [(0.0, prompt)], []
    while True:
        candidates = []
        for score, sequence in running:
            scores = words_after(torch.tensor(sequence))
            if len(sequence) < shortest:
                scores[SEP] = -torch.inf
            best = scores.topk(2 * beams)
            candidates += [
                (score + s, sequence, w) for s, w in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beams]
        running = []
        for rank, (score, sequence, word) in enumerate(candidates):
            if word != SEP:
                running.append((score, [*sequence, word]))
            elif rank < beams:
                finished.append((score / length_of(len(sequence), True), sequence))
            if len(running) == beams:
                break
        finished = sorted(finished, key=lambda f: -f[0])[:beams]
        length = len(running[0][1])
        if len(finished) == beams and finished[-1][0] >= candidates[0][0] / length_of(length - 1, True):
            break
        if length == longest:
            finished += [(score / length_of(length, False), sequence) for score, sequence in running]
            break
    return max(finished, key=lambda f: f[0])[1][len(prompt) :]


@pytest.mark.parametrize("official", [True, False], ids=["official", "transformers"])
def test_beams_are_compared_by_the_official_length(official):
    """Official: all tokens but [SEP]. In transformers of today: those after the prompt, and [SEP]."""
    model = make("caption")
    pixels = normal(torch.Generator().manual_seed(7), 12, 3, 64, 64)  # among these are some for which it matters
    prompt = PROMPT.tolist()

    def length_of(tokens, finished):
        return tokens if official else tokens + finished - len(prompt)

    with torch.inference_mode():
        images = model(pixels).images
        ours = model.generate(images, PROMPT, max_length=12, official_lengths=official)
        others = model.generate(images, PROMPT, max_length=12, official_lengths=not official)
        for number in range(len(pixels)):
            memory = model(pixels[number : number + 1]).images
            expected = beam_search(lambda s, m=memory: next_words(model, m, s), prompt, 3, 12, 5, length_of)
            assert ours[number].tolist() == expected
    assert any(a.tolist() != b.tolist() for a, b in zip(ours, others, strict=True))


def test_nucleus_sampling(pixels):
    model = make("caption")
    with torch.inference_mode():
        images = model(pixels).images
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append([caption.tolist() for caption in model.generate(images, PROMPT, top_p=0.9)])
        assert draws[0] == draws[1] != draws[2]
        # A nucleus of one word leaves no choice.
        narrow = model.generate(images, PROMPT, top_p=1e-6, repetition_penalty=1.0)
        greedy = model.generate(images, PROMPT, num_beams=1)
        assert [c.tolist() for c in narrow] == [c.tolist() for c in greedy]


def test_cross_keys_are_computed_once_per_image(monkeypatch, pixels):
    model = make("caption")
    with torch.inference_mode():
        images = model(pixels).images
        rows, keys = [], CrossAttention.keys
        monkeypatch.setattr(CrossAttention, "keys", lambda self, s: rows.append(s.num_tokens) or keys(self, s))
        model.generate(images, PROMPT)
    assert rows == [images.num_tokens] * 3, "one projection per layer, whatever the number of beams and words"


@pytest.mark.parametrize("task", ["caption", "vqa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(task, dtype, pixels, texts):
    model = make(task)
    with torch.inference_mode():
        exact = model(pixels, texts, pruning=0.0)
        model = model.to(dtype)
        dense, pruned = model(pixels, texts, pruning=0.0), model(pixels, texts)
        written = model.generate(pruned.images, PROMPT) if task == "caption" else model.generate(pruned.questions)
    state = (lambda out: out.logits.values) if task == "caption" else (lambda out: out.questions.values)
    assert state(dense).dtype == dtype and len(written) == COUNT
    error = (state(dense).float() - state(exact)).abs().max()
    assert error < 8 * torch.finfo(dtype).eps * state(exact).abs().max()


# ---- ranking


def test_ranking_is_the_label_smoothed_likelihood_of_each_candidate(pixels, texts, generator):
    model = make("vqa")
    lengths = (2, 3, 5, 4, 3, 2, 6, 7, 3)
    answers = [torch.cat([PROMPT[:1], torch.randint(6, 198, (n - 1,), generator=generator)]) for n in lengths]
    with torch.inference_mode():
        output = model(pixels, texts)
        ranking = model.rank(output.questions, answers, k=5)
        everything = model.rank(output.questions, answers, k=100)
        for number in range(COUNT):
            memory = encoded(model, "vqa", pixels, texts, number)
            first = next_words(model, memory, PROMPT[:1]).exp().cpu()
            probabilities = torch.stack([first[answer[1]] for answer in answers])
            order = probabilities.argsort(descending=True, stable=True)
            assert ranking.candidates[number].tolist() == order[:5].tolist()
            assert everything.candidates[number].tolist() == order.tolist()
            torch.testing.assert_close(
                ranking.first_token_probabilities[number].cpu(), probabilities[order[:5]], **CLOSE
            )
            scores = []
            for candidate in order.tolist():
                answer, score = answers[candidate], 0.0
                for word in range(1, len(answer)):
                    log_probabilities = next_words(model, memory, answer[:word])
                    score += 0.9 * log_probabilities[answer[word]] + 0.1 * log_probabilities.mean()
                scores.append(float(score))
            expected = torch.tensor(scores, device=DEVICE)
            torch.testing.assert_close(everything.scores[number], expected, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(ranking.scores[number], expected[:5], atol=1e-4, rtol=1e-5)
            assert int(everything.best[number]) == int(order[expected.argmax().cpu()])


def test_ranking_does_not_depend_on_how_many_logits_exist_at_a_time(monkeypatch, pixels, texts, generator):
    model = make("vqa")
    answers = [torch.randint(6, 198, (n,), generator=generator) for n in (2, 3, 5, 4)]
    with torch.inference_mode():
        questions = model(pixels, texts).questions
        whole = model.rank(questions, answers)
        monkeypatch.setattr("madtp.tasks.vqa.model.LOGIT_ROWS", 3)
        torch.testing.assert_close(model.rank(questions, answers).scores, whole.scores, **CLOSE)


def test_samples_of_a_ragged_batch_by_number(generator):
    batch = RaggedBatch.from_list([normal(generator, n, 2) for n in (3, 0, 5, 1)])
    numbers = [2, 0, 2, 1, 3]
    picked = gather_samples(batch, torch.tensor(numbers, device=DEVICE))
    for ours, number in zip(picked.to_list(), numbers, strict=True):
        assert torch.equal(ours, batch[number])


# ---- what several texts look at


@pytest.mark.parametrize("backend", backends_here())
def test_a_run_of_texts_looks_at_one_image(backend, generator):
    layer = CrossAttention(16, 16, 2).to(DEVICE)
    key_lengths, runs = ((3, 2, 4), (2, 0, 3)) if interpreted(backend) else ((7, 30, 12), (3, 0, 4))
    lengths = [2, 1, 3, 1, 2, 4, 1][: sum(runs)]
    images = Tokens.start(RaggedBatch.from_list([normal(generator, n, 16) for n in key_lengths]))
    words = RaggedBatch.from_list([normal(generator, n, 16) for n in lengths])
    owner = [image for image, count in enumerate(runs) for _ in range(count)]
    repeated = Tokens.start(RaggedBatch.from_list([images[image] for image in owner]))
    with torch.inference_mode():
        ours = layer(words, images, backend, QueryGroups.of(runs, DEVICE))
        theirs = layer(words, repeated, backend)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_decoders_weigh_merged_tokens_by_their_sizes(pixels, texts):
    """Repeating each image token as often as its size says changes nothing."""
    model = make("caption", proportional_attention=True)
    with torch.inference_mode():
        output = model(pixels, texts)
        images = output.images
        assert images.sizes.max() > 1
        counts = images.sizes.long()
        rows = images.with_values(images.sizes).to_list()
        tokens = RaggedBatch.from_lengths(images.values.repeat_interleave(counts, 0), [int(row.sum()) for row in rows])
        keys = model.text_decoder.keys(Tokens.start(tokens))
        states = model.text_decoder(model._ids(texts), keys)
        logits = model.text_decoder.logits(states.values)
    torch.testing.assert_close(output.logits.values, logits, atol=1e-4, rtol=1e-4)


# ---- padding of texts


def test_padding_is_invisible_to_the_dense_model_only(pixels, texts):
    clean, compat = make("retrieval"), make("retrieval", text_mode="compat")
    pairs = [(0, 1), (2, 3)]
    with torch.inference_mode():
        dense = [model(pixels, texts, pruning=0.0) for model in (clean, compat)]
        torch.testing.assert_close(dense[0].text_embeds, dense[1].text_embeds, **CLOSE)
        matches = [m.match(o.images, texts, pairs, pruning=0.0) for m, o in zip((clean, compat), dense, strict=True)]
        torch.testing.assert_close(matches[0].logits, matches[1].logits, **CLOSE)
        assert dense[1].text[0].lengths_in.tolist() == [35] * COUNT
        pruned = [model(pixels, texts) for model in (clean, compat)]
        assert (pruned[0].text_embeds - pruned[1].text_embeds).abs().max() > 1e-3


@pytest.mark.parametrize("spare", [0, 4])
def test_masks_after_pruning(spare, generator):
    """Against the rule, token by token; rows beyond the last token may hold anything."""
    for _ in range(20):
        before_rows, after_rows, expected, importance = [], [], [], []
        for length in torch.randint(1, 12, (4,), generator=generator).tolist():
            merged = -1 if length > 3 else None  # from an earlier layer
            ids = [*range(0, 2 * length, 2), *([merged] if merged else [])]
            masked = (torch.rand(len(ids), generator=generator) < 0.5).tolist()
            masked[0] = False
            scores = torch.rand(len(ids), generator=generator).tolist()
            kept = [0, *(i for i in range(1, len(ids)) if torch.rand(1, generator=generator) < 0.5)]
            gone = [i for i in range(len(ids)) if i not in kept]
            if len(gone) < 2:
                kept, gone = list(range(len(ids))), []
            after, mask = [len(importance) + i for i in kept], [masked[i] for i in kept]
            if gone:
                after.append(-3)
                mask.append(masked[max(gone, key=lambda i: scores[i])])
            before_rows.append((ids, masked))
            after_rows.append(after)
            expected += mask
            importance += scores

        def stream(rows, masked=None):
            ids = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
            filler = torch.randint(-9, 9, (spare,), generator=generator, dtype=torch.int32)
            ids = torch.cat([ids, filler]).to(DEVICE)
            cu = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).to(torch.int32).to(DEVICE)
            tokens = RaggedBatch(torch.zeros(len(ids), 1, device=DEVICE), cu, max(len(row) for row in rows))
            if masked is not None:
                masked = torch.cat([torch.tensor(masked), torch.ones(spare, dtype=torch.bool)]).to(DEVICE)
            fields = (tokens.values, tokens.cu_seqlens, tokens.max_seqlen, False, ids)
            return Tokens(*fields) if masked is None else PaddedTokens(*fields, padding=masked)

        before = stream([ids for ids, _ in before_rows], [m for _, masked in before_rows for m in masked])
        after = stream(after_rows)  # its ids are the rows that its tokens come from
        scores = torch.cat([torch.tensor(importance), torch.full((spare,), 9.0)]).to(DEVICE)
        ours = mask_after_pruning(before, after.ids, after.cu_seqlens, scores)[: len(expected)]
        assert ours.tolist() == expected


# ---- grouping


def test_batch_grouping_ties_images_and_texts(pixels, texts):
    for task in CONFIGS:
        own, tied = make(task), make(task, grouping="batch")
        with torch.inference_mode():
            ours, theirs = own(pixels, texts), tied(pixels, texts)
        assert len(set(ours.vision[0].kept.tolist())) > 1
        assert theirs.vision[0].kept.tolist() == [int(ours.vision[0].kept.max())] * COUNT
    with pytest.raises(ValueError, match="grouping: expected one of instance, batch, got 'pair'"):
        make("caption", grouping="pair")


# ---- training


@pytest.mark.parametrize("task", CONFIGS)
def test_every_weight_learns(task, pixels, texts):
    model = make(task)
    if task == "caption":
        loss = model(pixels, texts, alignment_features=True).logits.values.float().log_softmax(-1)[:, 7].sum()
    elif task == "vqa":
        output = model(pixels, texts)
        states = model.text_decoder(model._ids(texts), model.text_decoder.keys(output.questions))
        loss = model.text_decoder.logits(states.values).float().log_softmax(-1)[:, 7].sum()
    else:
        output = model(pixels, texts)
        matches = model.match(output.images, texts, [(n, n) for n in range(COUNT)])
        loss = F.cross_entropy(output.similarity / model.temp, torch.arange(COUNT, device=DEVICE))
        loss = loss + matches.logits.log_softmax(-1)[:, 1].sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0 or name.endswith("kv.bias"), name


# ---- predictions


@pytest.fixture
def pictures():
    from PIL import Image

    generator = torch.Generator().manual_seed(3)
    sizes = ((40, 60), (64, 64), (90, 30))
    return [
        Image.fromarray(torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8).numpy())
        for size in sizes
    ]


def with_processor(model, task):
    model.processor = TASKS[task].Processor(64, VOCABULARY, 48, "demo")
    return model


def test_captions_of_pictures(pictures):
    model = with_processor(make("caption"), "caption")
    answers = predict.caption(model, pictures, batch_size=2)
    assert len(answers) == 3 and all(isinstance(answer.caption, str) and answer.caption for answer in answers)
    assert not any("[" in answer.caption for answer in answers), "special tokens are no words"
    for answer in answers:
        assert answer.image_tokens[0] == 65 and answer.image_tokens[-1] < 65
        assert 0 < answer.flops.official < answer.flops.full
    (alone,) = predict.caption(model, pictures[1:2])
    assert alone == answers[1]
    prompt = model.processor.prompt_ids
    assert prompt[0] == VOCABULARY - 2 and SEP not in prompt.tolist()
    assert model.processor.decode(prompt) == "a picture of"
    with pytest.raises(ImageError):
        predict.caption(model, [b"no picture"])


def test_inputs_that_make_no_sense_are_named(pictures):
    captions, questions = (with_processor(make(task), task) for task in ("caption", "vqa"))
    for call, message in [
        (lambda: predict.caption(captions, "photo.png"), "^inputs: expected a sequence, got a str"),
        (lambda: predict.caption(captions, iter(pictures)), "^inputs: expected a sequence, got a list_iterator"),
        (lambda: predict.caption(captions, pictures, batch_size=-1), "^batch_size: expected a whole number"),
        (lambda: predict.caption(captions, pictures, batch_size=0), "^batch_size: expected a whole number"),
        (lambda: predict.caption(captions, pictures, num_beams=0), "^num_beams: expected a whole number"),
        (lambda: predict.caption(questions, pictures), "^model: expected one for task 'caption', got one for 'vqa'"),
        (lambda: predict.vqa(questions, pictures), r"^inputs\[0\]: expected \(image, question\), got 1 of them"),
        (lambda: predict.nlvr(questions, [(1, 2, 3)]), "^model: expected one for task 'nlvr'"),
        (lambda: predict.caption(make("caption"), pictures), "^model: expected one with a processor"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for image in (None, 0, torch.zeros(3, 8, 8), [pictures[0]]):
        with pytest.raises(ImageError, match=f"^{type(image).__name__}: expected a path, the bytes of a file or a PIL"):
            predict.caption(captions, [image])


def test_answers_about_pictures(pictures):
    model = with_processor(make("vqa"), "vqa")
    questions = [(picture, "What is this?") for picture in pictures]
    written = predict.vqa(model, questions, batch_size=2)
    assert [len(answer.question_tokens) for answer in written] == [4] * 3 and written[0].score is None
    assert predict.vqa(model, questions[2:])[0] == written[2]
    assert predict.vqa(model, questions, num_beams=None) == written, "an option that is not given"
    candidates = ["yes", "no", "two dogs"]
    ranked = predict.vqa(model, questions, candidates=candidates)
    assert all(answer.answer in candidates and answer.score < 0 for answer in ranked)
    with pytest.raises(TextError):
        predict.vqa(model, [(pictures[0], "?!")[:1] + ("",)])


def test_embeddings_and_matches_of_pictures(pictures):
    model = with_processor(make("retrieval"), "retrieval")
    images, output = predict.embed_images(model, [model.processor.image(picture) for picture in pictures])
    ids = [model.processor.text(text) for text in ("a dog", "two cats in a house")]
    words, _ = predict.embed_texts(model, ids)
    assert ids[0][0] == 2, "[CLS] in front of a text on its own"
    assert len(images) == 3 and len(words) == 2
    for embedding in images + words:
        assert embedding.features.dtype == torch.float32 and embedding.features.shape == (24,)
        assert embedding.features.norm() == pytest.approx(1.0, abs=1e-5)
        assert embedding.tokens[0] >= embedding.tokens[-1] and embedding.flops.official > 0
    scores = predict.match(model, output.tokens, ids, [(2, 0), (0, 1)])
    with torch.inference_mode():
        assert scores == pytest.approx(model.match(output.tokens, ids, [(2, 0), (0, 1)]).logits[:, 1].tolist())


def test_numbers_that_a_precision_cannot_hold_are_an_error(pictures):
    for task in ("caption", "vqa"):
        model = with_processor(make(task, temperature=0.0), task)
        with torch.no_grad():
            model.visual_encoder.norm.weight.fill_(torch.inf)
        given = [(picture, "what is this") for picture in pictures] if task == "vqa" else pictures
        with pytest.raises(FloatingPointError, match="states are not finite in torch.float32"):
            getattr(predict, task)(model, given)


# ---- wrong inputs


def test_wrong_inputs_of_a_captioner(pixels, texts):
    model = make("caption")
    with pytest.raises(ValueError, match="input_ids: expected a text for each of 5 images, got 4"):
        model(pixels, texts[:4])
    with pytest.raises(ValueError, match=r"pixels: expected \[B, 3, 64, 64\], got \[5, 3, 32, 32\]"):
        model(pixels[:, :, :32, :32])
    with pytest.raises(ValueError, match="temperature: expected 0, or a number from 1e-30 to 1e30, got -1"):
        model(pixels, pruning=-1)
    with torch.inference_mode():
        images = model(pixels).images
        for prompt in (PROMPT[:0], PROMPT[None], PROMPT.float()):
            with pytest.raises(ValueError, match=r"prompt_ids: expected int64 \[P\], got"):
                model.generate(images, prompt)
        for longest in (4, 49):
            with pytest.raises(
                ValueError, match=f"max_length: expected more than the prompt's 4 and at most 48, got {longest}"
            ):
                model.generate(images, PROMPT, max_length=longest)
        for top_p in (0.0, 1.5):
            with pytest.raises(ValueError, match=f"top_p: expected a number above 0 and at most 1, got {top_p}"):
                model.generate(images, PROMPT, top_p=top_p)
        with pytest.raises(ValueError, match="num_beans: no option here; there are"):
            generate(model.text_decoder, images, PROMPT.expand(COUNT, -1).to(DEVICE), max_length=9, num_beans=3)


def test_wrong_inputs_of_question_answering(pixels, texts):
    model = make("vqa")
    with pytest.raises(ValueError, match="pixels: expected an image for each of 5 questions, got 4"):
        model(pixels[:4], texts)
    with torch.inference_mode():
        questions = model(pixels, texts).questions
        answers = [torch.tensor([5, 6, 7]), torch.tensor([5])]
        with pytest.raises(
            ValueError, match="answers: expected at least two tokens each and k >= 1, got 1 and k = 128"
        ):
            model.rank(questions, answers)
        with pytest.raises(ValueError, match="answers: expected at least two tokens each and k >= 1, got 3 and k = 0"):
            model.rank(questions, answers[:1], k=0)
        with pytest.raises(ValueError, match="answers: expected at least one text, got none"):
            model.rank(questions, [])
        with pytest.raises(ValueError, match=r"answers: expected ids in 0\.\.199"):
            model.rank(questions, [torch.tensor([5, 200])])


def test_wrong_inputs_of_retrieval(pixels, texts):
    model = make("retrieval")
    with torch.inference_mode():
        images = model.encode_image(pixels).tokens
        for pair in ((5, 0), (0, 5), (-1, 0)):
            with pytest.raises(ValueError, match=r"pairs: \(.*\) is beyond 5 images and 5 texts"):
                model.match(images, texts, [(0, 0), pair])
        with pytest.raises(ValueError, match="pairs: expected at least one, got none"):
            model.match(images, texts, [])
        with pytest.raises(ValueError, match="a text of 36 tokens exceeds the 35 of text_mode 'compat'"):
            make("retrieval", text_mode="compat").encode_text([torch.arange(36)])
        assert model.encode_text([torch.arange(36)]).features.isfinite().all()
    with pytest.raises(ValueError, match="text_mode: expected one of clean, compat, got 'padded'"):
        dataclasses.replace(CONFIGS["retrieval"], text_mode="padded")
