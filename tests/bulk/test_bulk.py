"""Runs over shards: whatever stops them, each row has one result or one reason, beside the right name."""

import contextlib
import json
import os
import pickle
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from decoders import Unloadable, faulty
from fresh import COMMAND
from small_models import CONFIGS
from test_bulk_readers import tar_of
from test_cli_batch import picture, save_pictures

import madtp
from madtp import cli, predict
from madtp.bulk.callables import Embedder, answer_all
from madtp.bulk.readers import Row, Source
from madtp.bulk.run import Part, run
from madtp.bulk.workers import Decoders, Failure
from madtp.bulk.writers import Results, read_records, write_records
from madtp.jsonl import ResumeError

try:
    import pyarrow  # noqa: F401

    FORMATS = ["jsonl", "parquet"]
except ImportError:
    FORMATS = ["jsonl"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for task, config in CONFIGS.items():
        madtp.save_pretrained(madtp.load("random:base", config=config, temperature=2.0), folder / task)
    return folder


def jpeg(rng):
    import io

    file = io.BytesIO()
    picture(rng).save(file, "JPEG")
    return file.getvalue()


def save_tars(folder, tars, samples, bad=()):
    """Tars of images with captions; samples named in ``bad`` have no image in their file."""
    rng = random.Random(3)
    for t in range(tars):
        members = []
        for n in range(samples):
            key = f"{t:03d}{n:04d}"
            members += [(f"{key}.jpg", b"<html>" if key in bad else jpeg(rng)), (f"{key}.txt", f"text {key}".encode())]
        tar_of(folder / f"{t:03d}.tar", members)
    return [folder / f"{t:03d}.tar" for t in range(tars)]


def files_below(folder):
    """Contents by name, of what a finished run leaves."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }


@pytest.fixture
def command(capsys, models):
    def call(name, task, *arguments):
        options = ["--model", models / task, "--backend", "reference", "--workers", "0", *arguments]
        code = cli.main([name, *map(str, options)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# ---- a run in this process, of rows that are numbers


def rows_file(path, count):
    path.write_text("".join(json.dumps({"image": f"{n}.jpg", "value": n}) + "\n" for n in range(count)))
    return path


def number_of(row):
    if row.fields["value"] % 10 == 7:
        raise ValueError("sevens are not counted")
    return row.fields["value"]


def squares(instances):
    return [{"square": n * n, "embedding": np.array([n, 1], dtype=np.float32)} for n in instances]


def fields_of(row):
    return {"key": row.key, **row.fields}


def answered(
    source, folder, *, vectors=None, format="jsonl", answer=None, settings=None, shard_size=10, workers=0, **options
):
    answer = answer or (squares if vectors else squares_only)
    results = Results(folder, settings or {"model": 1}, vectors=vectors, format=format)
    options = {"batch_size": 4, **options}
    return run(
        Source([source], shard_size=shard_size), results, number_of, answer, fields_of, workers=workers, **options
    )


def squares_only(instances):
    return [{"square": n * n} for n in instances]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("vectors", [None, "img"])
@pytest.mark.parametrize(
    "batch", [{"batch_size": 1}, {"batch_size": 32}, {"batch_tokens": 40, "tokens": lambda n: 1 + n}]
)
def test_every_row_has_its_own_result(tmp_path, format, vectors, batch):
    source = rows_file(tmp_path / "rows.jsonl", 38)
    summary = answered(source, tmp_path / "out", vectors=vectors, format=format, **batch)
    assert (summary.shards, summary.rows, summary.failures) == (4, 38, 4)
    assert summary.failed[0] == (f"{source}:1", str(tmp_path / "7.jpg"), "sevens are not counted")
    seen = []
    for shard in range(4):
        if vectors:
            records = read_records(tmp_path / f"out/metadata/metadata_{shard:06d}.{format}")
            array = np.load(tmp_path / f"out/img_emb/img_emb_{shard:06d}.npy")
            assert array.dtype == np.float32 and array.flags.c_contiguous and len(array) == len(records)
            assert array[:, 0].tolist() == [record["value"] for record in records]
        else:
            records = read_records(tmp_path / f"out/records_{shard:06d}.{format}")
        for record in records:
            assert record["key"].endswith(f"/{record['value']}.jpg") and record["row"] == record["value"] % 10
            if record["value"] % 10 == 7:
                assert record["error"] == "sevens are not counted" and record.get("square") is None
            else:
                assert record["square"] == record["value"] ** 2
        seen += [record["value"] for record in records]
        (failure,) = read_records(tmp_path / f"out/errors/errors_{shard:06d}.jsonl")[:1] or [None]
        assert failure["stage"] == "decode" and failure["kind"] == "ValueError" and failure["key"].endswith("7.jpg")
    assert seen == [n for n in range(38) if not vectors or n % 10 != 7]


@pytest.mark.parametrize("vectors", [None, "img"])
def test_a_run_that_was_stopped_anywhere_goes_on(tmp_path, vectors, generator, monkeypatch):
    """Every time a file gets its name is a moment at which a process may end."""
    source, options = rows_file(tmp_path / "rows.jsonl", 35), {"vectors": vectors}
    answered(source, tmp_path / "whole", **options)
    expected = files_below(tmp_path / "whole")
    replace, left = os.replace, [0]

    def failing(*names):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        replace(*names)

    monkeypatch.setattr(os, "replace", failing)
    stops = 0
    for moment in torch.randint(0, 7, (40,), generator=generator).tolist():
        left[0] = moment
        try:
            summary = answered(source, tmp_path / "out", **options)
        except KeyboardInterrupt:
            stops += 1
            whole = [
                json.loads(content)
                for name, content in files_below(tmp_path / "out").items()
                if name.startswith("stats/")
            ]
            for marker in whole:
                assert all((tmp_path / "out" / name).stat().st_size == size for name, size in marker["files"].items())
        else:
            if not summary.shards:
                break
    assert stops and files_below(tmp_path / "out") == expected


def test_a_run_in_parts_answers_each_row_once(tmp_path):
    source = rows_file(tmp_path / "rows.jsonl", 101)
    answered(source, tmp_path / "whole")
    for folder, count in (("three", 3), ("many", 20)):
        done = [answered(source, tmp_path / folder, part=Part(index, count)).shards for index in reversed(range(count))]
        assert sum(done) == 11 and files_below(tmp_path / folder) == files_below(tmp_path / "whole")


def test_what_changed_is_said(tmp_path):
    source = rows_file(tmp_path / "rows.jsonl", 25)
    answered(source, tmp_path / "out")
    with pytest.raises(ResumeError, match="of another run \\(model: 1 then, 2 now\\)"):
        answered(source, tmp_path / "out", settings={"model": 2})
    with (
        pytest.raises(ResumeError, match="format: jsonl then, parquet now|needs pyarrow")
        if FORMATS[1:]
        else contextlib.nullcontext()
    ):
        answered(source, tmp_path / "out", format=FORMATS[-1]) if FORMATS[1:] else None
    source.write_text(source.read_text().replace('"value": 13', '"value": 14'))
    with pytest.raises(ResumeError, match="shard 1 was .*rows.jsonl:11 now, or its rows have changed"):
        answered(source, tmp_path / "out")
    rows_file(source, 25)
    assert answered(source, tmp_path / "out").before == 3
    (tmp_path / "out/records_000001.jsonl").write_text("{}\n")
    with pytest.raises(ResumeError, match="records_000001.jsonl was changed: 3 bytes"):
        answered(source, tmp_path / "out")
    (tmp_path / "out/records_000001.jsonl").unlink()  # moved elsewhere
    assert answered(source, tmp_path / "out").before == 3
    marker = tmp_path / "out/stats/000001.json"
    for damaged in (marker.read_bytes()[:20], b"[]"):
        marker.write_bytes(damaged)
        with pytest.raises(ResumeError, match="000001.json is damaged; remove it"):
            answered(source, tmp_path / "out")
    marker.unlink()
    assert answered(source, tmp_path / "out").before == 2
    with pytest.raises(NotADirectoryError, match="rows.jsonl"):
        Results(source, {}, format="jsonl")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").touch()
    with pytest.raises(ResumeError, match="holds other files \\(mine.txt\\)"):
        answered(source, tmp_path / "other")
    with pytest.raises(ResumeError, match="no results of a run"):
        Results.clear(tmp_path / "other")
    Results.clear(tmp_path / "out")
    assert files_below(tmp_path / "out") == {}


def test_a_shard_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr("madtp.bulk.writers._PATIENCE", 0.2)
    source = rows_file(tmp_path / "rows.jsonl", 5)
    reached, go_on = threading.Event(), threading.Event()

    def slow(instances):
        reached.set()
        assert go_on.wait(30)
        return squares_only(instances)

    first = threading.Thread(target=answered, args=(source, tmp_path / "out"), kwargs={"answer": slow})
    first.start()
    try:
        assert reached.wait(30)
        with pytest.raises(ResumeError, match="shard 0 is being written by another process"):
            answered(source, tmp_path / "out", answer=squares_only)
    finally:
        go_on.set()
        first.join()
    assert len(read_records(tmp_path / "out/records_000000.jsonl")) == 5


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("vectors", [None, "img"])
def test_failed_rows_are_answered_once_more(tmp_path, monkeypatch, vectors, format):
    source = rows_file(tmp_path / "rows.jsonl", 28)
    options = {"vectors": vectors, "format": format}
    first = answered(source, tmp_path / "out", **options)
    again = answered(source, tmp_path / "out", **options)  # those of shards that are done are still said
    assert again.failures == first.failures == 3 and again.failed == first.failed and again.shards == 0
    calls = []

    def counted(instances):
        calls.extend(instances)
        return (squares if vectors else squares_only)(instances)

    monkeypatch.setattr(sys.modules[__name__], "number_of", lambda row: row.fields["value"])
    summary = answered(source, tmp_path / "out", retry_failed=True, **{**options, "answer": counted})
    assert calls == [7, 17, 27] and (summary.shards, summary.failures) == (3, 0)
    answered(source, tmp_path / "whole", **options)
    got, expected = files_below(tmp_path / "out"), files_below(tmp_path / "whole")
    assert list(got) == list(expected)
    for name in got:
        assert got[name] == expected[name] or name.endswith(".parquet"), name
    names = [name for name in got if name.endswith(format)]
    assert all(read_records(tmp_path / "out" / name) == read_records(tmp_path / "whole" / name) for name in names)


@pytest.mark.parametrize("format", FORMATS)
def test_names_that_are_not_utf8_change_no_others(tmp_path, format):
    names = [os.fsdecode(b"caf\xe9.jpg"), "caf\u00e9.jpg", "\u65e5\n.jpg"]
    values = [{"name": name, "deep": {"names": [name]}, "mixed": n or name} for n, name in enumerate(names)]
    with open(tmp_path / "table", "wb") as file:
        write_records(file, values, format)
    os.rename(tmp_path / "table", tmp_path / f"table.{format}")
    found = read_records(tmp_path / f"table.{format}")
    shown = ["caf\\udce9.jpg" if format == "parquet" else names[0], *names[1:]]
    assert [record["name"] for record in found] == [record["deep"]["names"][0] for record in found] == shown
    assert [str(record["mixed"]) for record in found] == [shown[0], "1", "2"]


def test_a_shard_without_any_result_has_no_vectors(tmp_path):
    source = tmp_path / "rows.jsonl"
    source.write_text(
        '{"image": "a.jpg", "value": 1}\n{"image": "b.jpg", "value": 7}\n{"image": "c.jpg", "value": 3}\n'
    )
    summary = answered(source, tmp_path / "out", vectors="img", shard_size=1)
    assert (summary.shards, summary.failures) == (3, 1)
    assert sorted(os.listdir(tmp_path / "out/img_emb")) == ["img_emb_000000.npy", "img_emb_000002.npy"]
    assert sorted(os.listdir(tmp_path / "out/metadata")) == ["metadata_000000.jsonl", "metadata_000002.jsonl"]


def test_a_full_disk_leaves_nothing_half(tmp_path, monkeypatch):
    source, calls = rows_file(tmp_path / "rows.jsonl", 30), []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space.*out"):
        patch.setattr(os, "fsync", full)
        answered(source, tmp_path / "out", vectors="img")
    assert len(list((tmp_path / "out/stats").glob("*.json"))) == 0 or not list((tmp_path / "out").rglob("*.tmp"))
    assert answered(source, tmp_path / "out", vectors="img").before < 3
    answered(source, tmp_path / "whole", vectors="img")
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


# ---- decoding


def test_a_decoder_that_dies_costs_the_row_that_it_dies_of(tmp_path):
    whats = ["fine", "dies", "fine", "fails", "dies once", "fine"]
    rows = [Row(n, str(n), None, {"what": what, "mark": str(tmp_path / str(n))}) for n, what in enumerate(whats)]
    with Decoders(faulty, 1) as decoders:
        first, second = decoders.submit(rows), decoders.submit([rows[0]._replace(error="not there"), rows[2]])
        found, (lost, after) = first.result(60), second.result(60)
    assert found[1].kind == "Died" and "exit code -9" in found[1].reason
    assert found[3] == Failure("decode", "ZeroDivisionError", "division by zero")
    for n in (0, 2, 4, 5):
        pixels, (ids,), name = found[n]
        assert (
            pixels.eq(n).all()
            and pixels.dtype == torch.int64
            and ids.tolist() == list(range(n))
            and name == {"name": whats[n]}
        )
        pixels += 1  # it can be written to
    assert lost == Failure("read", "ValueError", "not there") and after[0].eq(2).all()


def test_decoders_that_cannot_begin_are_no_fault_of_the_rows():
    with (
        Decoders(Unloadable(), 1) as decoders,
        pytest.raises(RuntimeError, match="ended before it could begin \\(exit code 3\\)"),
    ):
        decoders.submit([Row(0, "0")]).result(60)


def test_rows_are_decoded_in_other_processes(tmp_path, models):
    """Every kind of source and process gives what the model says of each image alone."""
    tars = save_tars(tmp_path, 2, 9, bad=("0000000", "0010004", "0010008"))
    embedder = Embedder(models / "clip", backend="reference")
    results = Results(tmp_path / "out", {}, vectors="img", format="jsonl")
    source = Source(tars)
    summary = run(
        source, results, embedder.prepare(), embedder.answer, lambda row: {"image_path": row.key, **row.fields},
        workers=2, batch_size=4,
    )  # fmt: skip
    assert [key for _, key, _ in summary.failed] == ["0000000", "0010004", "0010008"]
    for shard in source:
        vectors = np.load(tmp_path / f"out/img_emb/img_emb_{shard.number:06d}.npy")
        records = read_records(tmp_path / f"out/metadata/metadata_{shard.number:06d}.jsonl")
        images = {row.key: row.image for row in shard.rows()}
        assert len(vectors) == len(records) == 9 - len([key for name, key, _ in summary.failed if name == shard.name])
        for vector, record in zip(vectors, records, strict=True):
            pixels = embedder.model.processor.image(images[record["image_path"]].read())
            np.testing.assert_allclose(vector, predict.embed_images(embedder.model, [pixels])[0][0].features, atol=1e-6)
            assert record["caption"] == f"text {record['image_path']}"


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def answer(instances):
        sizes.append(len(instances))
        if len(instances) > 2 or "large" in instances:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if "wild" in instances:
            raise FloatingPointError("features are not finite in torch.float16")
        return [{"of": instance} for instance in instances]

    found = answer_all(answer, ["a", "b", "large", "c", "wild", "d"])
    assert [one["of"] if isinstance(one, dict) else one.kind for one in found] == [
        "a", "b", "OutOfMemoryError", "c", "FloatingPointError", "d",
    ]  # fmt: skip
    with pytest.raises(FloatingPointError):  # of the very first rows none: it is the model
        answer_all(answer, ["wild", "wild"])
    assert answer_all(answer, ["wild"], done=True)[0].kind == "FloatingPointError"


# ---- processes that share a run


def test_parts():
    assert [n for n in range(8) if Part.parse("1/3").has(n)] == [1, 4, 7]
    for text in ("3/3", "1", "-1/2", "a/b", "1/0"):
        with pytest.raises(ValueError, match="--shard: expected i/n"):
            Part.parse(text)
    of = Part.from_environment
    assert of({}) == (Part(0, 1), 0, None)
    assert of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})[:2] == (Part(5, 8), 1)
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    assert of(step) == (Part(3, 4), 1, "srun")
    for wrong in ({"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "x"}):
        with pytest.raises(ValueError, match="RANK|WORLD_SIZE"):
            of(wrong)
    # The batch script itself is one process, whatever it asked for.
    assert of({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"})[0] == Part(0, 1)
    array = {
        "SLURM_ARRAY_TASK_ID": "14",
        "SLURM_ARRAY_TASK_MIN": "10",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_STEP": "2",
    }
    assert of(array)[0] == Part(2, 3) and of({**array, **step})[0] == Part(11, 12)


# ---- the command


@pytest.mark.parametrize("format", FORMATS)
def test_embed_a_folder_of_tars(command, tmp_path, models, format):
    tars = save_tars(tmp_path, 3, 7, bad=("0010000", "0010003"))
    options = ["--format", format, "--batch-size", "3"]
    code, out, err = command("embed", "clip", *tars, "--output", f"{tmp_path}/out/", *options)
    assert code == 1 and f"21 images in 3 shards of {tmp_path}/out/" in out
    assert "2 rows have no result" in err and f"{tars[1]}: 0010003: not an image" in err
    model = madtp.load(models / "clip", backend="reference")
    for shard in Source(tars):
        records = read_records(tmp_path / f"out/metadata/metadata_{shard.number:06d}.{format}")
        vectors = np.load(tmp_path / f"out/img_emb/img_emb_{shard.number:06d}.npy")
        images = {row.key: row.image.read() for row in shard.rows()}
        for record, vector in zip(records, vectors, strict=True):
            pixels = model.processor.image(images[record["image_path"]])
            (one,), _ = predict.embed_images(model, [pixels])
            np.testing.assert_allclose(vector, one.features, atol=1e-6)
            assert record["image_tokens"] == one.tokens and record["gflops"] == round(one.flops.official, 6)
    # All of it is there, and nothing is done twice.
    assert "0 images in 0 shards" in command("embed", "clip", *tars, "--output", tmp_path / "out/", *options)[1]
    code, _, err = command("embed", "clip", *tars, "--output", f"{tmp_path}/out/", *options, "--temperature", "3")
    assert code == 2 and "temperature: 2.0 then, 3.0 now" in err
    assert (
        command("embed", "clip", *tars, "--output", f"{tmp_path}/out/", *options, "--temperature", "3", "--overwrite")[
            0
        ]
        == 1
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "name, options",
    [
        ("caption", ["--num-beams", "1"]),
        ("caption", ["--sample", "--top-p", "0.9", "--seed", "3"]),
        ("vqa", ["--question", "is it red?"]),
        ("vqa", ["--answers"]),
    ],
)
def test_records_of_a_folder_are_those_of_a_file(command, models, tmp_path, name, options, format):
    photos = sorted(path for path in save_pictures(tmp_path / "photos", 6).rglob("*") if path.is_file())
    rows = [{"image": str(path.relative_to(tmp_path)), "id": n} for n, path in enumerate(photos)]
    rows += [{"image": "absent.jpg", "id": 6}, {"id": 7}]
    if name == "vqa":
        rows[1]["question"], rows[2]["question"] = "what is it?", 5
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if options == ["--answers"]:
        (tmp_path / "answers.txt").write_text("yes\nno\nred\n")
        options = ["--answers", tmp_path / "answers.txt", "--question", "is it red?"]
    options = ["--input", tmp_path / "rows.jsonl", *options, "--batch-size", "3"]
    single = ["--model", models / name, "--backend", "reference", "--output", tmp_path / "one.jsonl"]
    assert cli.main([name, *map(str, [*options, *single])]) == 1
    many = ["--output", f"{tmp_path}/many/", "--shard-size", "5", "--format", format]
    code, out, _ = command(name, name, *options, *many)
    assert code == 1 and "8 images in 2 shards" in out.replace("questions", "images")
    one = read_records(tmp_path / "one.jsonl")
    found = [
        record
        for shard in range(2)
        for record in read_records(
            next((tmp_path / "many").glob(f"{name if name != 'vqa' else 'answer'}s_00000{shard}.{format}"))
        )
    ]
    assert [record["row"] for record in found] == [0, 1, 2, 3, 4, 0, 1, 2]
    for single, record in zip(one, found, strict=True):
        record = {key: value for key, value in record.items() if value is not None}
        assert record["id"] == single["id"] and ("error" in record) == ("error" in single)
        if "error" not in single and "--top-p" not in options:  # what is drawn there hangs on the row's number
            assert record.pop("image") == str(tmp_path / single.pop("image"))
            del record["row"], single["row"]
            assert record == single
    again = command(name, name, *options, *many)
    assert again[0] == 1 and "0 images in 0 shards" in again[1].replace("questions", "images")


def test_embed_texts_of_a_table(command, tmp_path, models):
    (tmp_path / "rows.csv").write_text('url,caption\nhttp://a,a dog\nhttp://b,"a, red\nball"\nhttp://c,\n')
    options = ["--text-key", "caption", "--format", "jsonl", "--output", f"{tmp_path}/out/"]
    code, out, _ = command("embed", "clip", tmp_path / "rows.csv", *options)
    assert code == 0 and "3 texts" in out
    model = madtp.load(models / "clip", backend="reference")
    texts = [record["caption"] for record in read_records(tmp_path / "out/metadata/metadata_000000.jsonl")]
    assert texts == ["a dog", "a, red\nball", ""]
    found = predict.embed_texts(model, [model.processor.text(text) for text in texts])[0]
    np.testing.assert_array_equal(
        np.load(tmp_path / "out/text_emb/text_emb_000000.npy"), np.stack([one.features for one in found])
    )


def test_options_of_folders(command, tmp_path):
    save_pictures(tmp_path / "photos", 2)
    with pytest.raises(SystemExit):
        command("embed", "clip", tmp_path / "photos", "--output", tmp_path / "x.npy", "--shard", "0/2")
    code, _, err = command(
        "embed", "clip", tmp_path / "photos", "--output", f"{tmp_path}/o/", "--format", "jsonl", "--shard", "2/2"
    )
    assert code == 2 and "--shard: expected i/n" in err
    (tmp_path / "empty.jsonl").touch()
    code, _, err = command("embed", "clip", tmp_path / "empty.jsonl", "--output", f"{tmp_path}/o/", "--format", "jsonl")
    assert code == 2 and "no rows in any of the sources" in err
    options = ["--output", f"{tmp_path}/p/", "--format", "jsonl", "--shard", "7/8"]
    assert command("embed", "clip", tmp_path / "photos", *options)[0] == 0  # there is nothing for it to do


@pytest.mark.slow
def test_two_processes_that_are_stopped_twice(command, fresh_command, tmp_path, models):
    """Ctrl-C, then SIGKILL, at random moments: the files are those of a run that was not stopped."""
    save_tars(tmp_path, 8, 12, bad=("0030004",))
    sources = [str(tmp_path / "{000..007}.tar")]

    options = ["--format", "jsonl", "--batch-size", "2"]
    code, _, err = command("embed", "clip", *sources, "--output", f"{tmp_path}/whole/", *options)
    assert code == 1 and "003.tar: 0030004" in err

    def start():
        more = ["--model", models / "clip", "--backend", "reference", "--output", f"{tmp_path}/out/"]
        more += ["--devices", "cpu,cpu", "--workers", "0", *options]
        return fresh_command.start(COMMAND, "embed", *sources, *more)

    rng, done = random.Random(), tmp_path / "out/stats"
    for number in (signal.SIGINT, signal.SIGKILL):
        before = len(list(done.glob("*.json")))
        process = start()
        while len(list(done.glob("*.json"))) <= before and process.returncode is None:
            time.sleep(0.02)
        time.sleep(rng.random() * 0.05)
        process.send_signal(number)
        assert process.wait(60) in ({signal.SIGINT: 130, signal.SIGKILL: -9}[number], 1), process.stderr
    last = start()
    assert last.wait(300) == 1, last.stderr
    assert re.search(r"in [0-6] shards of .*, [2-8] shards were done before", last.stdout)
    assert files_below(tmp_path / "out") == files_below(tmp_path / "whole")


def test_a_prepared_row_is_small(models):
    embedder = Embedder(models / "clip", backend="reference")
    assert len(pickle.dumps(embedder)) < 2_000 and len(pickle.dumps(embedder.prepare())) < 20_000
