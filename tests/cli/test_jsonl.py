"""Runs over a JSON Lines file: every row is answered once, in order, however often the run is stopped."""

import fcntl
import io
import json
import os
import resource
import sys
import threading

import pytest

from madtp import jsonl

SETTINGS = {"model": "squares", "temperature": 2.0}


def prepare(number, row):
    if row["x"] < 0:
        raise ValueError(f"x is negative: {row['x']}")
    return row["x"]


def answer(instances):
    return [{"square": x * x} for x in instances]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"x": x if x != 5 else -5}) + "\n" for x in range(1, 13)))
    return path


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out.jsonl"


EXPECTED = [{"row": n, "square": n * n} if n != 5 else {"row": 5, "error": "x is negative: -5"} for n in range(1, 13)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(source, output, answer=answer, **options):
    return jsonl.run(source, output, prepare, answer, **{"settings": SETTINGS, "batch_size": 4, **options})


def leftovers(output):
    return sorted(path.name for path in output.parent.iterdir() if path.name.startswith(output.name + "."))


class Stop(BaseException):
    """Ends a run as Ctrl-C would."""


def stopping_after(batches):
    seen = []

    def limited(instances):
        if len(seen) == batches:
            raise Stop
        seen.append(instances)
        return answer(instances)

    return limited


@pytest.mark.parametrize("batch_size", [1, 4, 5, 100])
def test_rows_come_out_in_order_whatever_the_batch_size(source, output, batch_size):
    sizes = []

    def counting(instances):
        sizes.append(len(instances))
        return answer(instances)

    summary = run(source, output, counting, batch_size=batch_size)
    assert read(output) == EXPECTED
    assert (summary.rows, summary.resumed, summary.failed) == (12, 0, {5: "x is negative: -5"})
    assert sum(sizes) == 11 and min(sizes) > 0 and max(sizes) <= batch_size
    assert leftovers(output) == []


def test_rows_that_cannot_be_read_are_reported_by_line_number(tmp_path, output):
    source = tmp_path / "bad.jsonl"
    source.write_bytes(b'{"x": 2}\r\n\n{"x": \n[1]\n{"y": 1}\n\xff\xfe\n"text"\n  \n{"x": 3}')
    summary = run(source, output)
    records = {record.pop("row"): record for record in read(output)}
    assert list(records) == [1, 3, 4, 5, 6, 7, 9]
    assert records[1] == {"square": 4} and records[9] == {"square": 9}
    assert "not JSON" in records[3]["error"] and "not JSON" in records[6]["error"]
    assert "list" in records[4]["error"] and "str" in records[7]["error"]
    assert records[5]["error"] == "KeyError: 'x'"
    assert list(summary.failed) == [3, 4, 5, 6, 7]


def test_empty_input(tmp_path, output):
    source = tmp_path / "empty.jsonl"
    source.write_text("\n\n")
    assert run(source, output).rows == 0
    assert output.read_bytes() == b""


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_stopped_run_goes_on_where_it_stopped(source, output, batches):
    with pytest.raises(Stop):
        run(source, output, stopping_after(batches))
    assert not output.exists()
    asked = []

    def recording(instances):
        asked.extend(instances)
        return answer(instances)

    summary = run(source, output, recording)
    assert read(output) == EXPECTED
    assert summary.resumed == 4 * batches and summary.rows == 12
    assert list(summary.failed) == [5]
    assert asked == [x for x in range(4 * batches + 1, 13) if x != 5]
    assert leftovers(output) == []


def test_whatever_part_of_the_file_reached_the_disk_is_enough(source, output):
    with pytest.raises(Stop):
        run(source, output, stopping_after(2))
    partial = output.with_name("out.jsonl.partial")
    whole = partial.read_bytes()
    line_ends = [i for i in range(len(whole)) if whole[i : i + 1] == b"\n"]
    for length in sorted({*range(0, len(whole), 7), *line_ends, *(i + 1 for i in line_ends)}):
        partial.write_bytes(whole[:length])
        summary = run(source, output)
        assert read(output) == EXPECTED and list(summary.failed) == [5], length
        output.unlink()


@pytest.mark.parametrize("name", ["out.jsonl.partial", "out.jsonl"])
def test_a_full_disk_is_named_and_costs_nothing(name, source, output):
    """The write itself says "No space left on device", of no file; a limit of sizes stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    options = {"publish": lambda records, path: jsonl._publish(({**r, "more": "x" * 9} for r in records), path)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (450 if name == "out.jsonl" else 150, limits[1]))
        with pytest.raises(OSError, match="too large") as caught:
            run(source, output, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(output.with_name(name))
    run(source, output)
    assert read(output) == EXPECTED


@pytest.mark.parametrize("garbage", [b"\0" * 40, b'{"row": 9, "squ\n', b'"row"\n', b'{"row": 2, "square": 4}\n'])
def test_garbage_at_the_end_is_cut_off(source, output, garbage):
    with pytest.raises(Stop):
        run(source, output, stopping_after(1))
    with open(output.with_name("out.jsonl.partial"), "ab") as file:
        file.write(garbage)
    assert run(source, output).resumed == 4
    assert read(output) == EXPECTED


def test_a_stopped_run_of_another_kind_is_not_continued(source, output):
    with pytest.raises(Stop):
        run(source, output, stopping_after(1))
    with pytest.raises(jsonl.ResumeError, match=r"temperature: 2\.0 then, 3\.0 now"):
        run(source, output, settings={**SETTINGS, "temperature": 3.0})
    with pytest.raises(jsonl.ResumeError, match="grouping: None then, pair now"):
        run(source, output, settings={**SETTINGS, "grouping": "pair"})
    source.write_text(source.read_text() + '{"x": 13}\n')
    with pytest.raises(jsonl.ResumeError, match="input: sha256"):
        run(source, output)
    assert run(source, output, overwrite=True).resumed == 0
    assert read(output) == [*EXPECTED, {"row": 13, "square": 169}]


def test_a_complete_output_is_not_touched_unless_told(source, output):
    output.write_text("precious")
    with pytest.raises(jsonl.ResumeError, match="exists"):
        run(source, output)
    with pytest.raises(Stop):
        run(source, output, stopping_after(2), overwrite=True)
    assert output.read_text() == "precious"  # until the new one is complete
    run(source, output, overwrite=True)
    assert read(output) == EXPECTED


def test_two_runs_with_one_output(source, output):
    with open(output.with_name("out.jsonl.partial"), "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(jsonl.ResumeError, match="another process"):
            run(source, output)
    run(source, output)
    assert read(output) == EXPECTED


def test_an_error_of_the_model_ends_the_run_but_keeps_what_is_done(source, output):
    def failing(instances):
        if 9 in instances:
            raise RuntimeError("out of memory")
        return answer(instances)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(source, output, failing)
    assert run(source, output).resumed == 8


def test_files_that_cannot_be_opened(source, tmp_path):
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(FileNotFoundError):
        run(source, tmp_path / "absent" / "out.jsonl")


def test_text_is_written_as_it_is(tmp_path, output):
    source = tmp_path / "in.jsonl"
    source.write_text('{"x": 1}\n')
    run(source, output, lambda instances: [{"text": "Fähre ⛴"}])
    assert "Fähre ⛴" in output.read_text(encoding="utf-8")


def test_names_that_are_not_utf8_come_back(tmp_path, output):
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    rows = [{"image": name}]
    jsonl.run(rows, output, lambda n, row: row["image"], lambda names: [{}], settings=SETTINGS, keep=["image"])
    assert read(output) == [{"row": 1, "image": name}]


def test_rows_may_be_given_as_objects(output):
    rows = [{"x": x} for x in (3, -1, 2)]
    summary = run(rows, output)
    assert read(output) == [
        {"row": 1, "square": 9},
        {"row": 2, "error": "x is negative: -1"},
        {"row": 3, "square": 4},
    ]
    assert summary.failed == {2: "x is negative: -1"}


def test_other_rows_are_another_run(output):
    with pytest.raises(Stop):
        run([{"x": x} for x in range(8)], output, stopping_after(1))
    with pytest.raises(jsonl.ResumeError, match="input: sha256"):
        run([{"x": x} for x in range(9)], output)


def test_keys_that_a_record_keeps_are_there_in_errors_too(source, output):
    run(source, output, keep=["x", "absent"])
    records = read(output)
    assert records[3] == {"row": 4, "x": 4, "square": 16}
    assert records[4] == {"row": 5, "x": -5, "error": "x is negative: -5"}


def test_a_run_goes_on_with_the_batches_of_one_that_was_not_stopped(source, output):
    """Also where the file ends within a batch: results may depend on it in the last bit."""

    def batches_of(*options):
        seen = []
        run(source, output, lambda xs: seen.append(xs) or answer(xs), *options)
        output.unlink()
        return seen

    whole = batches_of()
    with pytest.raises(Stop):
        run(source, output, stopping_after(2))
    partial = output.with_name("out.jsonl.partial")
    lines = partial.read_bytes().splitlines(keepends=True)
    for count in range(len(lines)):
        partial.write_bytes(b"".join(lines[: 1 + count]))
        assert batches_of() == whole[count // 4 :], count


def test_answers_that_do_not_match_the_rows_are_not_written(source, output):
    with pytest.raises(RuntimeError, match="3 answers to 4 instances"):
        run(source, output, lambda instances: answer(instances)[:3])
    assert run(source, output).resumed == 0


@pytest.mark.parametrize("content", [b"precious\n", b"precious", b'["a list"]\n', b"\x93NUMPY"])
def test_a_file_of_another_kind_is_left_alone(source, output, content):
    partial = output.with_name("out.jsonl.partial")
    partial.write_bytes(content)
    with pytest.raises(jsonl.ResumeError, match="not written by a run like this"):
        run(source, output)
    assert partial.read_bytes() == content


def test_another_form_of_output_is_published_from_all_records(source, output):
    def publish(records, path):
        assert path == output
        path.write_text(str(sum(record.get("square", 0) for record in records)))

    with pytest.raises(Stop):
        run(source, output, stopping_after(1), publish=publish)
    run(source, output, publish=publish)
    assert int(output.read_text()) == sum(x * x for x in range(1, 13) if x != 5)
    assert leftovers(output) == []


def test_an_interrupted_publication_is_made_up_for(source, output):
    def interrupted(records, path):
        next(records)
        raise Stop

    with pytest.raises(Stop):
        run(source, output, publish=interrupted)
    asked = []
    assert run(source, output, lambda xs: asked.append(xs) or answer(xs)).resumed == 12
    assert read(output) == EXPECTED and asked == []


def test_progress_is_shown_where_there_is_a_terminal(source, output, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(source, output, unit="images", note=lambda: "7.5 of 37 tokens kept")
    shown = capsys.readouterr().err
    assert "12/12" in shown and "images/s" in shown and "7.5 of 37 tokens kept" in shown


def test_rows_of_a_pipe_are_those_of_a_file(source, output, tmp_path, monkeypatch):
    """A named pipe, /dev/stdin and "-"; and a run that was stopped goes on, whichever it was and is."""
    with pytest.raises(Stop):
        run(source, output, stopping_after(1))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(source.read_bytes()), daemon=True).start()
    assert run(pipe, output).resumed == 4
    assert read(output) == EXPECTED
    output.unlink()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(source.read_bytes())))
    run("-", output)
    assert read(output) == EXPECTED


@pytest.mark.parametrize("levels", [99, 100, 986, 5000])
def test_a_deeply_nested_row_is_one_error_and_no_more(tmp_path, output, levels):
    source = tmp_path / "in.jsonl"
    nested = "[" * levels + "]" * levels
    source.write_text(f'{{"x": 1, "deep": {nested}}}\n{{"x": 2}}\n')
    run(source, output, answers=["square"])
    first, second = read(output)
    assert second == {"row": 2, "x": 2, "square": 4}
    if levels < 100:
        assert first == {"row": 1, "x": 1, "deep": json.loads(nested), "square": 1}
    else:
        assert first == {"row": 1, "error": "not JSON of at most 100 levels"}


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_errors(tmp_path, output, number):
    (tmp_path / "in.jsonl").write_text(f'{{"x": 1, "y": {number}}}')
    run(tmp_path / "in.jsonl", output)
    assert "not JSON" in read(output)[0]["error"]


def test_fields_of_rows_are_passed_on_and_never_mixed_up_with_answers(tmp_path, output):
    source = tmp_path / "in.jsonl"
    source.write_text('{"id": 17, "x": 2, "row": 9, "error": "none", "square": 5, "input": 1}\n{"id": 18, "x": -2}\n')
    summary = run(source, output, answers=["square"])
    hidden = {"row": 9, "error": "none", "square": 5, "input": 1}
    assert read(output) == [
        {"row": 1, "id": 17, "x": 2, "input": hidden, "square": 4},
        {"row": 2, "id": 18, "x": -2, "error": "x is negative: -2"},
    ]
    assert list(summary.failed) == [2]


def test_defaults_are_part_of_the_row(output):
    run([{"x": 2}, {}], output, defaults={"x": 3}, keep=["x"])
    assert read(output) == [{"row": 1, "x": 2, "square": 4}, {"row": 2, "x": 3, "square": 9}]


@pytest.mark.parametrize("lost", [0, 5, 11])
def test_records_that_something_else_removed_are_missed(source, output, lost):
    partial = output.with_name("out.jsonl.partial")

    def damaging(instances):
        if 12 in instances:
            header, *lines = partial.read_bytes().splitlines(keepends=True)
            del lines[min(lost, len(lines) - 1)]
            partial.write_bytes(b"".join([header, *lines]))
        return answer(instances)

    with pytest.raises(jsonl.ResumeError, match="changed by something else"):
        run(source, output, damaging)
    assert not output.exists()
    run(source, output)
    assert read(output) == EXPECTED


def test_a_run_that_was_killed_after_publishing_is_complete(source, output, monkeypatch):
    partial = output.with_name("out.jsonl.partial")

    def publish(records, path):
        jsonl._publish(records, path)
        if path == output:
            raise Stop

    with pytest.raises(Stop):
        run(source, output, publish=publish)
    assert partial.exists()
    assert run(source, output).resumed == 12 and leftovers(output) == []
    assert read(output) == EXPECTED
    # But an output that is not what the records say is another one.
    output.unlink()
    with pytest.raises(Stop):
        run(source, output, publish=publish)
    output.write_text("precious")
    with pytest.raises(jsonl.ResumeError, match="exists already"):
        run(source, output)
    assert output.read_text() == "precious"


def test_a_log_in_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(jsonl.ResumeError, match="no regular file"):
        jsonl.Log(tmp_path / "pipe", {})
