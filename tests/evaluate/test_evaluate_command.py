"""`madtp evaluate` on small models with random weights: its figures against those from `madtp.predict`."""

import itertools
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import threading
import time

import pytest
import torch
from PIL import Image, ImageDraw
from small_models import configs

import madtp
from madtp import cli, flops, jsonl, predict
from madtp.index import from_text
from madtp.processing import clean_sentence
from madtp.pruning import TopK
from madtp.report.plots import quality_plot
from madtp.tasks.metrics import vqa_score
from madtp.tasks.nlvr import NLVRTask

TEMPERATURE = 2.0
IMAGES = 13
TIMES = ("seconds", "per_second")
WORDS = "a red green blue dog cat house tree on under near the sea table".split()


def caption(rng):
    return " ".join(rng.choices(WORDS, k=rng.randrange(3, 7)))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of saved models, one per task."""
    folder = tmp_path_factory.mktemp("models")
    for task, config in configs(32, depth=2).items():
        model = madtp.load("random:base", config=config, temperature=TEMPERATURE)
        madtp.save_pretrained(model, folder / task)
    return folder


@pytest.fixture(scope="module")
def load(models):
    options = {"backend": "reference"}
    return lambda task, temperature=None: madtp.load(models / task, temperature=temperature, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures, and annotations of each task in the formats that BLIP ships."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(5)
    names = [f"photos/COCO_val_{number:06d}.png" for number in range(IMAGES)]
    (folder / "photos").mkdir()
    for name in names:
        size = rng.randint(20, 60), rng.randint(20, 60)
        image = Image.new("RGB", size, tuple(rng.choices(range(256), k=3)))
        draw = ImageDraw.Draw(image)
        for _ in range(4):
            x, y = rng.randrange(40), rng.randrange(40)
            box = (x, y, x + rng.randrange(5, 30), y + rng.randrange(5, 30))
            draw.ellipse(box, tuple(rng.choices(range(256), k=3)))
        image.save(folder / name)
    nlvr = [
        {
            "sentence": caption(rng),
            "label": rng.choice(["True", "False"]),
            "images": rng.sample(names, 2),
            "template": rng.choice(["more", "same"]),
        }
        for _ in range(14)
    ]
    captions = [
        {"image": name, "caption": [f"{caption(rng).capitalize()}!" for _ in range(2 + number % 2)]}
        for number, name in enumerate(names)
    ]
    answers = [caption(rng) for _ in range(4)]
    vqa = [
        {
            "image": rng.choice(names),
            "question": caption(rng),
            "question_id": number,
            "answer": rng.choices(answers, k=10),
            "dataset": "vqa",
        }
        for number in range(11)
    ]
    for name, records in (("nlvr", nlvr), ("vqa", vqa), ("caption", captions), ("answers", answers)):
        (folder / f"{name}.json").write_text(json.dumps(records))
    for name in ("retrieval", "clip"):
        (folder / f"{name}.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture
def command(capsys, models, data):
    """Evaluates the model of a task in this process: exit code, what it printed, its errors."""

    def run(task, *arguments, annotations=None):
        annotations = annotations or data / f"{task}.json"
        options = ["--model", models / task, "--annotations", annotations, "--image-root", data]
        code = cli.main(["evaluate", *map(str, [*options, "--backend", "reference", *arguments])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def without_times(value):
    """Figures or records, without how long they took."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def assert_alike(one, other):
    """The same records, but for the last bits of what a model computed: those depend on the batch."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys()
        for key in one:
            vectors = (from_text(value[key]).tolist() for value in (one, other)) if key == "features" else None
            assert_alike(*(vectors or (one[key], other[key])))
    elif isinstance(one, list) and isinstance(other, list):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_alike(*pair)
    else:
        assert one == (pytest.approx(other, abs=1e-5) if isinstance(other, float) else other)


def results(path):
    """Figures by temperature."""
    return {found["temperature"]: found for found in json.loads(path.read_text())["results"]}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def spread(samples):
    return [{"min": min(c), "mean": statistics.fmean(c), "max": max(c)} for c in zip(*samples, strict=True)]


def assert_costs(found, costs):
    assert found["gflops"] == pytest.approx(statistics.fmean(cost.official for cost in costs), rel=1e-12)
    assert found["gflops_full"] == pytest.approx(statistics.fmean(cost.full for cost in costs), rel=1e-12)


def assert_tokens(found, expected):
    assert found.keys() == expected.keys()
    for stream, samples in expected.items():
        for layer, by_hand in zip(found[stream], spread(samples), strict=True):
            assert layer == pytest.approx(by_hand), stream


# ---- figures against predictions


def test_nlvr(command, load, data, tmp_path):
    output, records = tmp_path / "out.json", tmp_path / "records.jsonl"
    code, out, err = command("nlvr", "--output", output, "--records", records, "--batch-size", 4)
    assert (code, err) == (0, "")
    rows = json.loads((data / "nlvr.json").read_text())
    assert list(results(output)) == [0.0, TEMPERATURE]  # dense, and what the checkpoint says
    triples = [(*(data / name for name in row["images"]), row["sentence"]) for row in rows]
    accuracies = []
    for temperature, found in results(output).items():
        answers = predict.nlvr(load("nlvr", temperature), triples, batch_size=1)
        right = [answer.answer == (row["label"] == "True") for answer, row in zip(answers, rows, strict=True)]
        accuracies.append(sum(right) / 14)
        assert 0 < sum(right) < 14  # or a wrong label would not show
        assert found["quality"] == {"accuracy": accuracies[-1]}
        for template in ("more", "same"):
            own = [ok for ok, row in zip(right, rows, strict=True) if row["template"] == template]
            assert found["templates"][template] == {"samples": len(own), "accuracy": sum(own) / len(own)}
        assert_costs(found, [answer.flops for answer in answers])
        images = [tokens for answer in answers for tokens in (answer.left_tokens, answer.right_tokens)]
        assert_tokens(found["tokens"], {"image": images, "text": [answer.text_tokens for answer in answers]})
        assert found["samples"] == {"pair": 14}
        mine = [record for record in read(records) if record["temperature"] == temperature]
        assert [record["sample"] for record in mine] == list(range(14))
        assert [record["answer"] for record in mine] == [answer.answer for answer in answers]
        seconds = [record["seconds"] for record in mine]
        assert min(seconds) > 0 and found["seconds"] == pytest.approx(statistics.fmean(seconds))
        assert found["per_second"] == pytest.approx(1 / found["seconds"])
    dense, pruned = results(output).values()
    assert pruned["gflops"] < 0.9 * dense["gflops"]
    line = next(line for line in out.splitlines() if line.startswith("accuracy"))
    assert line.split() == ["accuracy", *(f"{accuracy:.4f}" for accuracy in accuracies)]
    assert f"({100 * (pruned['gflops'] / dense['gflops'] - 1):.1f} %)" in out
    document = json.loads(output.read_text())
    assert document["versions"]["torch"] == torch.__version__ and document["settings"]["batch_size"] == 4


@pytest.mark.parametrize("ranked", [True, False])
def test_vqa(command, load, data, tmp_path, ranked):
    output, records = tmp_path / "out.json", tmp_path / "records.jsonl"
    given = ["--num-beams", 1, "--max-length", 6]
    if ranked:
        given = ["--answers", data / "answers.json", "--top-k", 3]
    given += ["--temperature", TEMPERATURE, "--output", output, "--records", records]
    code, _, err = command("vqa", *given)
    assert (code, err) == (0, "")
    rows = json.loads((data / "vqa.json").read_text())
    options = {"num_beams": 1, "max_length": 6}
    if ranked:
        options = {"candidates": json.loads((data / "answers.json").read_text()), "k": 3}
    questions = [(data / row["image"], row["question"]) for row in rows]
    answers = predict.vqa(load("vqa"), questions, batch_size=1, **options)
    assert [record["answer"] for record in read(records)] == [answer.answer for answer in answers]
    (found,) = results(output).values()
    scores = [vqa_score(answer.answer, row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    assert not ranked or 0 < statistics.fmean(scores) < 1
    assert found["quality"] == {"accuracy": pytest.approx(statistics.fmean(scores))}
    assert_costs(found, [answer.flops for answer in answers])
    streams = {"image": [a.image_tokens for a in answers], "question": [a.question_tokens for a in answers]}
    assert_tokens(found["tokens"], streams)


def test_captions(command, load, data, tmp_path, monkeypatch):
    from madtp.tasks import caption
    from madtp.tasks.caption_metrics import CaptionScores

    seen = []

    def scores(captions, references):
        seen.append((captions, references))
        return CaptionScores({"CIDEr": 1.25, "Bleu_4": 0.5}, {"SPICE": "no Java"}, "plain")

    monkeypatch.setattr(caption, "caption_scores", scores)
    output = tmp_path / "out.json"
    code, out, err = command("caption", "--num-beams", 2, "--max-length", 12, "--output", output)
    assert (code, err) == (0, "")
    rows = json.loads((data / "caption.json").read_text())
    assert len(seen) == 2
    for (captions, references), (temperature, found) in zip(seen, results(output).items(), strict=True):
        images = [data / row["image"] for row in rows]
        model = load("caption", temperature)
        answers = predict.caption(model, images, batch_size=1, num_beams=2, max_length=12)
        assert list(captions.values()) == [answer.caption for answer in answers]
        assert list(references.values()) == [row["caption"] for row in rows]
        assert captions.keys() == references.keys()
        assert found["quality"] == {"CIDEr": 1.25, "Bleu_4": 0.5}
        assert_costs(found, [answer.flops for answer in answers])
        assert_tokens(found["tokens"], {"image": [answer.image_tokens for answer in answers]})
    assert "not computed: SPICE: no Java" in out
    assert "compare with nothing published" in out


def test_captioning_metrics_that_are_not_installed_are_said_to_be_missing(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.bleu.bleu", None)
    code, out, _ = command("caption", "--limit", 2, "--temperature", 0, "--num-beams", 1)
    assert code == 0
    assert "not computed: all metrics: captioning metrics need the package pycocoevalcap" in out


@pytest.mark.parametrize(("task", "rerank"), [("retrieval", 4), ("retrieval", 0), ("clip", None)])
def test_retrieval(command, load, data, tmp_path, task, rerank):
    output = tmp_path / "out.json"
    options = [] if rerank is None else ["--rerank", rerank]
    options += ["--temperature", TEMPERATURE, "--output", output, "--batch-size", 5]
    code, out, err = command(task, *options)
    assert (code, err) == (0, "")
    rows = json.loads((data / f"{task}.json").read_text())
    texts = [(image, text) for image, row in enumerate(rows) for text in row["caption"]]
    # Every image and every text alone, and every pair that is matched.
    model = load(task)
    pixels = [model.processor.image(data / row["image"]) for row in rows]
    images, image_outputs = zip(*(predict.embed_images(model, [one]) for one in pixels), strict=True)
    ids = [model.processor.text(clean_sentence(text, 30)) for _, text in texts]
    words = [predict.embed_texts(model, [text])[0][0] for text in ids]
    images = [embedding for (embedding,) in images]
    every = itertools.product(range(len(images)), range(len(words)))
    similarity = {(i, t): float(images[i].features @ words[t].features) for i, t in every}

    def rank(query, candidates, pair):
        """Candidates by similarity, the best `rerank` of them again by similarity and match."""
        order = sorted(candidates, key=lambda c: -similarity[pair(query, c)])
        again = order[: rerank or 0]
        scores = {c: similarity[pair(query, c)] + logit(*pair(query, c)) for c in again}
        return sorted(again, key=lambda c: -scores[c]) if rerank else order

    costs, logits = {}, {}

    def logit(i, t):
        if (i, t) not in logits:
            stream = image_outputs[i].tokens
            (logits[i, t],) = predict.match(model, stream, [ids[t]], [(0, 0)])
            with torch.inference_mode():
                (lengths,) = flops.stream_lengths(model.match(stream, [ids[t]], [(0, 0)]).text)
            costs[i, t] = flops.retrieval(model.config, match=(images[i].tokens[-1], lengths))
        return logits[i, t]

    (found,) = results(output).values()
    expected = {}
    for k in (1, 5, 10):
        best = [rank(i, range(len(texts)), lambda i, t: (i, t))[:k] for i in range(len(rows))]
        expected[f"image_to_text R@{k}"] = statistics.fmean(
            any(texts[t][0] == i for t in found) for i, found in enumerate(best)
        )
        best = [rank(t, range(len(rows)), lambda t, i: (i, t))[:k] for t in range(len(texts))]
        hits = [texts[t][0] in found for t, found in enumerate(best)]
        expected[f"text_to_image R@{k}"] = statistics.fmean(hits)
    assert 0 < expected["text_to_image R@1"] < expected["text_to_image R@5"] < 1
    expected["r_mean"] = statistics.fmean(expected.values())
    assert found["quality"] == pytest.approx(expected)
    assert found["samples"] == {"image": len(rows), "text": len(texts)}
    parts = [statistics.fmean(e.flops.official for e in some) for some in (images, words)]
    assert found["gflops"] == pytest.approx(sum(parts), rel=1e-12)
    streams = {"image": [e.tokens for e in images], "text": [e.tokens for e in words]}
    assert_tokens(found["tokens"], streams)
    assert ("match" in found["steps"]) == bool(rerank)
    if rerank:
        assert found["steps"]["match"]["count"] == len(costs)
        assert_costs(found["steps"]["match"], costs.values())
        assert "matching: GFLOPs per pair" in out


def test_another_rule_of_pruning(command, load, data, tmp_path):
    output, records = tmp_path / "out.json", tmp_path / "records.jsonl"
    options = ["--method", "topk", "--strength", 0, 0.4, "--output", output, "--records", records, "--limit", 5]
    code, out, err = command("nlvr", *options)
    assert (code, err) == (0, "") and "topk 0.4" in out
    dense, pruned = json.loads(output.read_text())["results"]
    assert (dense["method"], dense["strength"], pruned["strength"]) == ("topk", 0, 0.4)
    model = load("nlvr")
    model.pruning = TopK(drop=0.4)
    rows = json.loads((data / "nlvr.json").read_text())[:5]
    answers = predict.nlvr(model, [(*(data / name for name in row["images"]), row["sentence"]) for row in rows])
    assert_costs(pruned, [answer.flops for answer in answers])
    assert pruned["gflops"] < dense["gflops"]
    assert [record["strength"] for record in read(records)] == [0] * 5 + [0.4] * 5


# ---- batches, processes, interruptions


def test_figures_do_not_depend_on_the_batch_size(command, tmp_path):
    found = {}
    for size in (1, 5, 14):
        output = tmp_path / f"{size}.json"
        assert command("nlvr", "--output", output, "--batch-size", size)[0] == 0
        found[size] = without_times(results(output))
    assert found[1] == found[5] == found[14]


def _process(rank, port, arguments):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    raise SystemExit(cli.main(arguments))


@pytest.mark.parametrize("task", ["nlvr", "retrieval"])
def test_two_processes_give_the_figures_of_one(command, models, data, tmp_path, task):
    documents, records = [], []
    for processes in (1, 2):
        output, answers = tmp_path / f"{processes}.json", tmp_path / f"{processes}.jsonl"
        # 13 images, or pairs, are 7 for the one and 6 for the other: the last batches differ.
        options = ["--output", output, "--records", answers, "--batch-size", 4, "--limit", 13]
        options += ["--rerank", 3] if task == "retrieval" else []
        if processes == 1:
            assert command(task, *options)[0] == 0
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            fixed = ["evaluate", "--model", models / task, "--annotations", data / f"{task}.json"]
            arguments = [*map(str, [*fixed, "--image-root", data, "--backend", "reference", *options])]
            context = multiprocessing.get_context("fork")
            started = [context.Process(target=_process, args=(rank, port, arguments)) for rank in (0, 1)]
            for process in started:
                process.start()
            for process in started:
                process.join(timeout=60)
                assert process.exitcode == 0
        documents.append(json.loads(output.read_text()))
        records.append(read(answers))
        assert not list(tmp_path.glob("*.parts"))
    assert [document["settings"].pop("processes") for document in documents] == [1, 2]
    assert without_times(documents[0]) == without_times(documents[1])
    assert_alike(without_times(records[0]), without_times(records[1]))


def test_an_interrupted_run_goes_on_where_it_stopped(command, tmp_path, monkeypatch):
    options = ["--batch-size", 3, "--output", tmp_path / "a.json", "--records", tmp_path / "a.jsonl"]
    assert command("nlvr", *options)[0] == 0
    answer, calls = NLVRTask.answer, []

    def counted(task, model, instances):
        calls.append((model.temperature, len(instances)))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return answer(task, model, instances)

    monkeypatch.setattr(NLVRTask, "answer", counted)
    options = ["--batch-size", 3, "--output", tmp_path / "b.json", "--records", tmp_path / "b.jsonl"]
    stop_at = 10  # dense: a warm-up and five batches; pruned: a warm-up and two batches, in the third
    code, _, err = command("nlvr", *options)
    assert code == 130 and "the same command goes on from here" in err
    assert not (tmp_path / "b.json").exists() and not (tmp_path / "b.jsonl").exists()
    code, _, err = command("nlvr", *options, "--temperature", 0, 5)
    assert code == 2 and "temperatures: [0.0, 2.0] then, [0.0, 5.0] now" in err
    calls.clear()
    stop_at = None
    assert command("nlvr", *options)[0] == 0
    # The dense answers are not asked for again, nor the two pruned batches that were there.
    assert calls == [(2.0, 3), (2.0, 3), (2.0, 3), (2.0, 2)]
    figures = [without_times(results(tmp_path / f"{run}.json")) for run in "ab"]
    assert figures[0] == figures[1]
    assert without_times(read(tmp_path / "a.jsonl")) == without_times(read(tmp_path / "b.jsonl"))
    assert not (tmp_path / "b.jsonl.parts").exists()
    code, _, err = command("nlvr", *options)
    assert code == 2 and "b.json exists already; remove it, or give --overwrite" in err
    assert command("nlvr", *options, "--overwrite", "--limit", 2)[0] == 0
    assert len(read(tmp_path / "b.jsonl")) == 4


def test_nothing_is_prepared_while_the_model_works_on_the_same_processor(command, monkeypatch):
    prepare, answer, working, seen = NLVRTask.prepare, NLVRTask.answer, threading.Event(), []

    def prepared(*arguments):
        seen.append(working.is_set())
        return prepare(*arguments)

    def answered(task, model, instances):
        working.set()
        before = len(seen)
        time.sleep(0.01)
        found = answer(task, model, instances)
        assert len(seen) == before
        working.clear()
        return found

    monkeypatch.setattr(NLVRTask, "prepare", prepared)
    monkeypatch.setattr(NLVRTask, "answer", answered)
    assert command("nlvr", "--batch-size", 3)[0] == 0
    assert len(seen) > 20 and not any(seen)


# ---- files and options


def test_original_files_of_nlvr2_and_of_vqa_v2(command, data, tmp_path):
    photos = sorted((data / "photos").iterdir())
    (tmp_path / "dev").mkdir()
    (tmp_path / "val2014").mkdir()
    for side in (0, 1):
        Image.open(photos[side]).save(tmp_path / "dev" / f"dev-1-0-img{side}.png")
    Image.open(photos[2]).save(tmp_path / "val2014" / "COCO_val2014_000000000007.jpg")
    line = {"identifier": "dev-1-0-0", "sentence": "a dog", "label": "True"}
    (tmp_path / "dev.json").write_text(json.dumps(line) + "\n")
    root = ["--image-root", tmp_path]
    code, out, _ = command("nlvr", *root, annotations=tmp_path / "dev.json")
    assert code == 0 and "nlvr: 1 pairs" in out
    question = {"question_id": 1, "image_id": 7, "question": "what is it?"}
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": [question]}))
    answers = [{"answer": "cat", "answer_id": n} for n in range(10)]
    annotation = {"question_id": 1, "image_id": 7, "answers": answers}
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [annotation]}))
    options = [*root, "--num-beams", 1]
    answers = ["--vqa-annotations", tmp_path / "a.json"]
    code, out, _ = command("vqa", *options, *answers, annotations=tmp_path / "q.json")
    assert code == 0 and "vqa: 1 questions" in out
    code, _, err = command("vqa", *options, annotations=tmp_path / "q.json")  # as for a test split
    assert code == 2 and "question 0 ('what is it?'): 0 answers of annotators" in err


def test_missing_images_are_named_before_anything_runs(command, tmp_path, monkeypatch):
    monkeypatch.setattr(NLVRTask, "answer", None)
    code, _, err = command("nlvr", "--image-root", tmp_path)
    assert code == 2 and "11 of 11 images are not there" in err and str(tmp_path / "photos") in err


def test_an_image_that_cannot_be_read_ends_the_run_and_can_be_put_right(command, data, tmp_path):
    rows = json.loads((data / "nlvr.json").read_text())[:5]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows[3]["images"][1] = str(tmp_path / "broken.png")
    (tmp_path / "some.json").write_text(json.dumps(rows))
    options = ["--records", tmp_path / "r.jsonl", "--batch-size", 2]
    code, _, err = command("nlvr", *options, annotations=tmp_path / "some.json")
    assert code == 2 and "pair 3:" in err and "broken.png" in err
    Image.new("RGB", (20, 20)).save(tmp_path / "broken.png")
    assert command("nlvr", *options, annotations=tmp_path / "some.json")[0] == 0
    assert len(read(tmp_path / "r.jsonl")) == 10


@pytest.mark.parametrize(
    ("task", "options", "named"),
    [
        ("nlvr", ["--num-beams", 2], "--num-beams: of no use for nlvr"),
        ("vqa", ["--top-k", 2], "vqa: --top-k: of no use without --answers"),
        ("clip", ["--rerank", 2], "--rerank: of no use for clip"),
        ("retrieval", ["--rerank", -1], "--rerank: expected at least 0, got -1"),
        ("nlvr", ["--temperature", 1, 1], "expected different numbers"),
        ("nlvr", ["--vqa-annotations", __file__], "of no use for nlvr"),
        ("nlvr", ["--output", "/nowhere/x.json"], "there is no folder /nowhere"),
        ("caption", ["--grouping", "pair"], "grouping: expected one of instance, batch"),
    ],
)
def test_options_that_make_no_sense(command, task, options, named):
    code, _, err = command(task, *options)
    assert code == 2 and named in err


def test_a_label_that_is_unknown(command, data, tmp_path):
    rows = json.loads((data / "nlvr.json").read_text())
    rows[2]["label"] = "Maybe"
    (tmp_path / "odd.json").write_text(json.dumps(rows))
    code, _, err = command("nlvr", annotations=tmp_path / "odd.json")
    assert code == 2 and 'odd.json: record 3: \'label\': expected "True" or "False", got "Maybe"' in err


def test_plots(command, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert command("nlvr", "--plots", tmp_path / "plots", "--temperature", 0, 1, 3)[0] == 0
    for name in ("quality.png", "tokens.png"):
        with Image.open(tmp_path / "plots" / name) as picture:
            assert picture.format == "PNG" and len(picture.convert("L").getcolors()) > 20
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(NLVRTask, "answer", None)  # found out before anything runs
    code, out, err = command("nlvr", "--plots", tmp_path / "none", "--limit", 2)
    assert code == 2 and out == "" and not (tmp_path / "none").exists()
    assert "plots need the package matplotlib: pip install 'madtp[plot]'" in err


@pytest.mark.parametrize("processes", [1, 3])
def test_overwriting_leaves_a_run_alone_that_goes_on(command, tmp_path, processes):
    """Of this process, or of several."""
    parts = tmp_path / "r.jsonl.parts"
    parts.mkdir()
    (parts / "0-pair-0.jsonl").write_text("of a run that goes on\n")
    with jsonl.Log(parts / "run-0", {"processes": processes}):
        code, _, err = command("nlvr", "--records", tmp_path / "r.jsonl", "--overwrite")
        assert code == 2 and "is being written by another process" in err
        assert (parts / "0-pair-0.jsonl").read_text() == "of a run that goes on\n"
    (parts / "0-pair-2.jsonl").touch()
    assert command("nlvr", "--records", tmp_path / "r.jsonl", "--overwrite", "--limit", 2)[0] == 0
    assert len(read(tmp_path / "r.jsonl")) == 4 and not parts.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--output", "{folder}"],
        ["--records", "{folder}"],
        ["--output", "/dev/null", "--overwrite"],
        ["--plots", "{file}"],
        ["--image-root", "{file}"],
        ["--device", "cuda:99"],
        ["--temperature", "0", "-1"],
        ["--annotations", "/dev/null"],
        ["--output", __file__, "--annotations", __file__, "--overwrite"],
    ],
)
def test_what_is_wrong_is_found_out_before_the_model_is_loaded(command, tmp_path, monkeypatch, options):
    monkeypatch.setattr(madtp, "load", None)
    (tmp_path / "file").touch()
    code, _, err = command("nlvr", *(option.format(folder=tmp_path, file=tmp_path / "file") for option in options))
    assert code == 2 and err.count("\n") == 1 and "NoneType" not in err


def test_pairs_of_the_demo_can_be_evaluated(command, data, tmp_path):
    """JSON Lines, "text" for "sentence"; BLIP's own form gives the same."""
    rows = json.loads((data / "nlvr.json").read_text())
    lines = [{"id": n, "text": row.pop("sentence"), **row} for n, row in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, annotations in (("a", None), ("b", tmp_path / "pairs.jsonl")):
        assert command("nlvr", "--output", tmp_path / name, annotations=annotations)[0] == 0
    assert without_times(results(tmp_path / "a")) == without_times(results(tmp_path / "b"))


def test_names_in_the_plot_of_quality_keep_clear_of_each_other():
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    points = [(0, 10, 0.8), (1, 6, 0.795), (2, 5.7, 0.794), (3, 5.5, 0.793), (4, 5.4, 0.7925), (8, 2, 0.7)]
    results = [{"temperature": t, "gflops": g, "gflops_full": g, "quality": {"a": q}} for t, g, q in points]
    figure = quality_plot(results, "a", "pair")
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 6
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["evaluate", "--help"])
    assert stopped.value.code == 0
    assert "torchrun --nproc-per-node 8 -m madtp evaluate" in capsys.readouterr().out
