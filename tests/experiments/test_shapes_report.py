"""The report of the experiments on shapes, from made-up records, and the list of runs that it goes by."""

import argparse
import importlib.util
import json
import os
import runpy
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from madtp.cli import parser as madtp_parser
from madtp.data import synthetic
from madtp.data.synthetic import KINDS, TEMPLATES

FOLDER = Path(__file__).parents[2] / "experiments" / "shapes"


@pytest.fixture(scope="module")
def experiments():
    """The modules `reproduce` and `report`; their folder is on the path only here."""
    sys.path.insert(0, str(FOLDER))
    try:
        modules = {}
        for name in ("reproduce", "report"):
            spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
            sys.modules[name] = modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[name])
        yield modules
    finally:
        sys.path.remove(str(FOLDER))
        for name in modules:
            sys.modules.pop(name, None)


@pytest.fixture
def reproduce(experiments):
    return experiments["reproduce"]


@pytest.fixture
def report(experiments):
    return experiments["report"]


def write(folder: Path, name: str, accuracy: float, settings: dict | None = None, **test) -> None:
    """A record; templates are a hundredth below the whole."""
    groups = {"all": accuracy} | {key: round(accuracy - 0.01, 4) for key in (*TEMPLATES, *KINDS)}
    test = {
        "accuracy": groups, "statements": 400, "gflops": 0.1, "gflops_full": 0.12, "reduction": 0.8,
        "image_tokens": [145.0, 20.0], "text_tokens": [10.0, 4.0],
        "objects_left": [1 - 0.01 * layer for layer in range(12)],
    } | test  # fmt: skip
    content = {
        "settings": settings or {},
        "torch": "2.13.0",
        "metrics": [{"step": 1}, {"step": 2, "test": test}],
    }
    (folder / f"{name}.json").write_text(json.dumps(content))


def run(folder: Path, method: str, reduction: float, seed: int, accuracy: float, suffix: str = "", **others) -> None:
    test = {key: others.pop(key) for key in ("gflops", "reached", "statements") if key in others}
    if "reached" in test:
        test["reduction"] = test.pop("reached")
    settings = {"row": method, "reduction": reduction, "seed": seed, "steps": 90, "texts": 4, "batch_size": 8} | others
    write(folder, f"{method}-{reduction}-{seed}{suffix}", accuracy, settings, **test)


def write_times(folder: Path) -> None:
    """Times of a dense and a pruned model."""
    record = {
        "dtype": "float32", "batch": 64, "statements": 64, "rounds": 5, "subject": "dense",
        "gflops_per_statement": {"dense": 0.5, "madtp-0.8-0-1000": 0.1},
        "milliseconds": {"dense": 640.0, "madtp-0.8-0-1000": 160.0},
        "quartile_milliseconds": {"dense": [600.0, 700.0], "madtp-0.8-0-1000": [128.0, 192.0]},
    }  # fmt: skip
    environment = {"device": "a machine", "threads": 2, "torch": "2.13.0", "commit": "abc"}
    (folder / "timing-cpu.json").write_text(json.dumps({"environment": environment, "records": [record]}))


def rows(text: str, table: str) -> list[list[str]]:
    """Cells of a table in the report."""
    _, _, rest = text.partition(f"<!-- table: {table} -->")
    block = rest.partition("<!-- end -->")[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines() if "|" in line]


def row(text: str, table: str, first: str) -> dict[str, str]:
    header, _, *body = rows(text, table)
    (found,) = [cells for cells in body if cells[0] == first]
    return dict(zip(header, found, strict=True))


def made(report, folder: Path) -> str:
    """The text of the report, without plots."""
    results = report.collect(folder)
    return report.fill(report.SKELETON, {name: make(results) for name, make in report.TABLES.items()})


# ---- tables ------------------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_compared_with_dense(report, tmp_path):
    write(tmp_path, "dense-test", 0.97, gflops=0.5, reduction=0.0)
    for seed, accuracy, reached in ((0, 0.92, 0.79), (1, 0.95, 0.8), (2, 0.95, 0.81)):
        run(tmp_path, "ranked-novelty", 0.8, seed, accuracy, "-5600", reached=reached, gflops=0.1 + 0.01 * seed)
    text = made(report, tmp_path)
    found = row(text, "overall", "ranked novelty")
    assert found["accuracy, %"] == "**94.0**"
    assert found["range over seeds"] == "92.0 to 95.0" and found["seeds"] == "3"
    assert found["points below dense"] == "3.0"
    assert found["fewer GFLOPs: target"] == "80 %" and found["reached"] == "80.0 %"
    assert found["GFLOPs"] == "0.110"
    # sqrt(0.92 * 0.08 / 400) of the first seed, sqrt(0.97 * 0.03 / 400) of the dense model
    assert found["standard error"] == "1.36"
    assert row(text, "overall", "dense")["standard error"] == "0.85"
    assert row(text, "templates", "ranked novelty, 80 %, 90 steps")["count"] == "93.0"
    assert found["steps"] == "90" and "batch_size 8, texts 4; torch 2.13.0" in text


def test_methods_stand_beside_the_best_one_of_as_many_steps(report, tmp_path):
    write(tmp_path, "dense-test", 0.97, gflops=0.5)
    run(tmp_path, "ranked-novelty", 0.8, 0, 0.94)
    run(tmp_path, "ranked-novelty", 0.5, 0, 0.96)
    run(tmp_path, "random", 0.8, 0, 0.6, "-1000")
    run(tmp_path, "tome", 0.8, 0, 0.9, "-1000", steps=30)
    write(tmp_path, "batch-maximum-0.8", 0.945, reduction=0.6, gflops=0.2)
    write(tmp_path, "whole-text-0.8", 0.935, reduction=0.79)
    text = made(report, tmp_path)
    names = [cells[0] for cells in rows(text, "baselines")[2:]]
    assert names == ["ranked novelty", "ToMe", "random", "batch maximum", "whole text"]
    behind = "below ranked novelty of as many steps"
    assert row(text, "baselines", "random")[behind] == "34.0" and row(text, "baselines", "ToMe")[behind] == ""
    assert row(text, "baselines", "random")["points below dense"] == "37.0"
    maximum = row(text, "baselines", "batch maximum")
    assert (maximum["saved"], maximum["accuracy, %"]) == ("60.0 %", "**94.5**")
    assert row(text, "baselines", "whole text")["points below dense"] == "3.5"


def test_calibrated_stands_beside_fine_tuned_of_the_same_reduction(report, tmp_path):
    run(tmp_path, "madtp", 0.5, 0, 0.96)
    write(tmp_path, "calibrated-0.3", 0.9, reduction=0.31)
    write(tmp_path, "calibrated-0.5", 0.85, reduction=0.5)
    text = made(report, tmp_path)
    assert row(text, "calibrated", "30 %")["calibrated, %"] == "**90.0**"
    assert row(text, "calibrated", "30 %")["fine-tuned as in the paper, %"] == ""
    assert row(text, "calibrated", "50 %")["fine-tuned as in the paper, %"] == "96.0"


def test_the_shipped_model_under_other_conditions(report, tmp_path):
    write(tmp_path, "shipped-milder", 0.955, reduction=0.7)
    ((_, saved, accuracy, *left),) = rows(made(report, tmp_path), "anatomy")[2:]
    assert (saved, accuracy) == ("70.0 %", "**95.5**")
    assert left == ["100.0", "99.0", "98.0", "95.0", "89.0"]  # after layers 1, 2, 3, 6 and 12


def test_longer_runs_of_a_method_stand_beside_the_shorter_ones(report, tmp_path):
    write(tmp_path, "dense-test", 0.97, gflops=0.5, reduction=0.0)
    run(tmp_path, "madtp", 0.8, 0, 0.88, "-1000")
    run(tmp_path, "madtp", 0.8, 0, 0.93, "-5600", steps=180)
    shown = [cells[:2] + cells[9:10] for cells in rows(made(report, tmp_path), "overall")[3:]]
    assert shown == [["MADTP", "90", "9.0"], ["MADTP", "180", "4.0"]]


def test_large_models_are_compared_with_the_large_dense_one(report, tmp_path):
    write(tmp_path, "large-dense", 0.98, {"row": "dense", "reduction": 0, "seed": 0}, gflops=2.5, reduction=0.0)
    settings = {"row": "madtp", "reduction": 0.8, "seed": 0, "steps": 10, "texts": 8, "batch_size": 16}
    write(tmp_path, "large-madtp-0.8-0", 0.95, settings, gflops=0.5)
    text = made(report, tmp_path)
    assert row(text, "large", "MADTP, 500 steps from the dense model")["points below dense"] == "3.0"
    assert rows(text, "overall") == []


def test_tokens_by_layer(report, tmp_path):
    run(tmp_path, "madtp", 0.8, 0, 0.9, "-1000")
    text = made(report, tmp_path)
    found = rows(text, "tokens")
    assert ["tokens of a picture", "before", "after 1"] in found and ["MADTP, 80 %, 90 steps", "145.0", "20.0"] in found
    assert ["tokens of a statement", "before", "after 1"] in found and ["MADTP, 80 %, 90 steps", "10.0", "4.0"] in found


def test_times_are_per_statement(report, tmp_path):
    write_times(tmp_path)
    found = row(made(report, tmp_path), "timing", "MADTP, 80 %")
    assert found["ms per statement"] == "2.50" and found["middle half"] == "2.00 to 3.00"
    assert found["over dense"] == "4.00x"


def test_what_was_not_recorded_is_left_out(report, tmp_path):
    text = made(report, tmp_path)
    assert text.count(report.NOTHING) == len(report.TABLES) and "|" not in text
    run(tmp_path, "random", 0.8, 0, 0.6, "-1000")
    text = made(report, tmp_path)
    assert [cells[0] for cells in rows(text, "overall")[2:]] == ["random"]
    assert row(text, "overall", "random")["points below dense"] == ""


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [{"batch_size": 16}, {"lr": 1e-3}, {"texts": 2}, {"statements": 300}])
def test_mixed_budgets_are_refused(report, tmp_path, difference):
    run(tmp_path, "madtp", 0.8, 0, 0.94, "-1000")
    run(tmp_path, "random", 0.8, 0, 0.6, "-1000", **difference)
    with pytest.raises(report.Refused, match="batch_size|lr|texts|statements"):
        report.collect(tmp_path)


def test_a_record_under_a_wrong_name_or_without_a_result_is_refused(report, tmp_path):
    run(tmp_path, "madtp", 0.8, 0, 0.9, "-1000")
    (tmp_path / "madtp-0.8-0-1000.json").rename(tmp_path / "madtp-sizes-0.8-0-1000.json")
    with pytest.raises(report.Refused, match="records madtp 0.8 0"):
        report.collect(tmp_path)
    content = {"settings": {}, "torch": "", "metrics": [{"step": 1, "train": {}}]}
    (tmp_path / "madtp-sizes-0.8-0-1000.json").write_text(json.dumps(content))
    with pytest.raises(report.Refused, match="one test result, got 0"):
        report.collect(tmp_path)


# ---- the file and its plots --------------------------------------------------------------------------------


def test_only_tables_are_replaced_and_plots_are_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path, "dense-test", 0.97, gflops=0.5)
    run(tmp_path, "madtp-sizes", 0.8, 0, 0.94, "-1000")
    run(tmp_path, "random", 0.8, 0, 0.6, "-1000")
    write(tmp_path, "batch-maximum-0.8", 0.945, reduction=0.6, gflops=0.2)
    output = tmp_path / "docs" / "results.md"
    first = report.write(report.collect(tmp_path), output)
    assert {path.name for path in first} == {
        "results.md", "results-accuracy-gflops.png", "results-templates.png"
    }  # fmt: skip
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in first if path.suffix == ".png")
    output.write_text(output.read_text().replace("## Tokens\n", "## Tokens\n\nWritten by hand.\n"))
    run(tmp_path, "random", 0.8, 0, 0.7, "-1000")
    report.write(report.collect(tmp_path), output)
    text = output.read_text()
    assert "Written by hand." in text
    assert row(text, "baselines", "random")["accuracy, %"] == "**70.0**"
    output.write_text(text.replace("table: timing", "table: another"))
    with pytest.raises(report.Refused, match="another"):
        report.write(report.collect(tmp_path), output)


def test_labels_move_apart_and_no_more_than_they_need(report):
    assert report.apart([1.0, 5.0, 9.0], 2.0) == [1.0, 5.0, 9.0]
    assert report.apart([4.0, 4.0], 2.0) == [3.0, 5.0]
    assert report.apart([0.0, 4.0, 4.0, 4.5], 2.0) == pytest.approx([0.0, 13 / 6, 25 / 6, 37 / 6])
    assert report.apart([0.0, 3.0, 3.0, 3.0], 2.0) == pytest.approx([-0.75, 1.25, 3.25, 5.25])


# ---- the list of runs --------------------------------------------------------------------------------------


class Parsed(Exception):
    """The command line was understood; nothing of what follows is to be done."""


def jobs(reproduce, tmp_path: Path):
    return [job for stage in reproduce.stages(tmp_path) for job in stage]


def test_every_command_parses(reproduce, tmp_path, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self, *arguments):
        raise Parsed(parse(self, *arguments))

    seen = set()
    for job in [
        *jobs(reproduce, tmp_path),
        *(job for stage in reproduce.stages(tmp_path, short=True) for job in stage),
    ]:
        program, *arguments = job.command
        if program == "-m":
            module, *arguments = arguments
            if module == "madtp":
                args = madtp_parser().parse_args(arguments)
                if job.kind == "compress":
                    seen.add((args.reduction, args.seed, args.method))
            else:
                assert module == synthetic.__name__
                with monkeypatch.context() as patch, pytest.raises(Parsed):
                    patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
                    synthetic.main(arguments)
            continue
        with monkeypatch.context() as patch, pytest.raises(Parsed):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
            patch.setattr(sys, "argv", [program, *arguments])
            patch.setattr(sys, "path", [str(FOLDER), *sys.path])
            runpy.run_path(program, run_name="__main__")

    assert seen == {
        *(
            (reduction, seed, "ranked_novelty" if reduction else None)
            for seed, (reduction, *_) in enumerate(reproduce.LARGE_DENSE.values())
        ),
        *((run.reduction, run.seed, reproduce.METHODS[run.method][1]) for run in reproduce.RUNS),
    }


def test_runs_have_methods_that_the_report_knows_and_names_of_their_own(reproduce, report, tmp_path):
    assert {run.method for run in reproduce.RUNS} == set(report.METHODS) == set(reproduce.METHODS)
    names = [job.name for job in jobs(reproduce, tmp_path)]
    assert len(set(names)) == len(names)
    assert {job.kind for job in jobs(reproduce, tmp_path)} == {"compress", *reproduce.MINUTES}
    assert reproduce.BATCH_MAXIMUM in reproduce.RUNS


def test_commands_need_only_what_earlier_stages_leave(reproduce, tmp_path):
    """Models and data that a command reads are written by a stage before."""
    there = set()
    for stage in reproduce.stages(tmp_path):
        for job in stage:
            command = job.command
            wanted = {command[i + 1] for i, part in enumerate(command) if part in ("--model", "--pairs")}
            if "--models" in command:
                wanted |= set(command[command.index("--models") + 1 :])
            wanted = {path for path in wanted if path.startswith(str(tmp_path))}
            assert wanted <= there, job.name
        for job in stage:
            command = job.command
            left = {command[i + 1] for i, part in enumerate(command) if part == "--output"}
            there |= left | {str(job.result)}


def test_jobs_run_so_many_at_a_time_and_not_again(reproduce, tmp_path):
    begin = "import pathlib, sys, time; here = pathlib.Path(sys.argv[1]); "

    def job(name: str, code: str):
        return reproduce.Job("evaluate", name, ("-c", begin + code, str(tmp_path)), tmp_path / name)

    def wait_for(name: str, then: str) -> str:
        """Code that leaves its own file, ends when the other one is there, and fails if that takes long."""
        return (
            f"(here / 'began-{then}').touch(); end = time.time() + 120\n"
            f"while not (here / 'began-{name}').exists(): assert time.time() < end; time.sleep(0.01)\n"
            f"(here / '{then}').touch()"
        )

    together = [job("a", wait_for("b", "a")), job("b", wait_for("a", "b"))]
    assert reproduce.minutes([[*together, job("c", "")]], 2) == 1.5 * reproduce.MINUTES["evaluate"]
    reproduce.do(together, 2, tmp_path, tqdm(disable=True))
    assert all(one.done for one in together) and reproduce.minutes([together], 2) == 0
    in_turn = [
        job("c", "time.sleep(0.3); (here / 'c').touch()"),
        job("d", "assert (here / 'c').exists(); (here / 'd').touch()"),
    ]
    reproduce.do(in_turn, 1, tmp_path, tqdm(disable=True))


def test_a_job_that_fails_stops_the_others_and_tells_why(reproduce, tmp_path):
    def job(name: str, code: str):
        return reproduce.Job("evaluate", name, ("-c", code), tmp_path / name)

    bad = [job("bad", "print('why'); raise SystemExit(3)"), job("long", "import time; time.sleep(900)")]
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="(?s)bad failed with exit code 3.*why"):
        reproduce.do(bad, 2, tmp_path, tqdm(disable=True))
    assert time.monotonic() - started < 600
    with pytest.raises(RuntimeError, match="nothing failed with exit code 0"):
        reproduce.do([job("nothing", "")], 1, tmp_path, tqdm(disable=True))


def test_only_what_has_no_result_is_done(reproduce, tmp_path, fresh_command):
    pytest.importorskip("matplotlib")
    (tmp_path / "results").mkdir()
    for job in jobs(reproduce, tmp_path):
        if job.kind in ("dense", "pairs", "calibrate", "compress"):
            job.result.parent.mkdir(parents=True, exist_ok=True)
            job.result.touch()
        elif job.kind == "timing":
            write_times(tmp_path / "results")
            job.result.touch()
        elif job.result:
            write(tmp_path / "results", job.name, 0.9, {"row": "dense"})
    for one in reproduce.RUNS:
        settings = {"row": one.method, "reduction": one.reduction, "seed": one.seed, "steps": one.steps, "texts": 4}
        write(tmp_path / "results", one.name, 0.8, settings)
    for one in reproduce.LARGE:
        settings = {"row": one.method, "reduction": one.reduction, "seed": one.seed}
        write(tmp_path / "results", f"large-{one.name}", 0.8, settings)
    code = f"import sys, runpy; sys.path.insert(0, {str(FOLDER)!r}); runpy.run_path({str(FOLDER / 'reproduce.py')!r}, run_name='__main__')"
    before = sorted(tmp_path.rglob("*"))
    options = {"timeout": 600, "env": {**os.environ, "CUDA_VISIBLE_DEVICES": ""}}  # timings are called by the device
    dry = fresh_command.run(code, "--directory", tmp_path, "--dry-run", **options)
    assert dry.returncode == 0, dry.stderr
    lines = dry.stdout.splitlines()
    assert "# random-0.8-0-1000: done" in lines and "# report" in lines
    assert lines[-1].startswith(f"1 of {len(jobs(reproduce, tmp_path))} jobs are left: about")
    assert sorted(tmp_path.rglob("*")) == before
    done = fresh_command.run(code, "--directory", tmp_path, **options)
    assert done.returncode == 0, done.stderr
    assert "to do: report" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].startswith("wrote ")
    assert row((tmp_path / "results.md").read_text(), "overall", "random")["accuracy, %"] == "**80.0**"
    assert (tmp_path / "results-accuracy-time.png").read_bytes()[:4] == b"\x89PNG"
