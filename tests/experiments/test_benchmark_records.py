"""Benchmarks say on which processor they run, and when records are of another; the table of tiles is what one of them writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def measure(monkeypatch):
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield __import__("measure")
    sys.modules.pop("measure", None)


def test_a_run_on_another_processor_than_the_records_says_so(measure, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "_cpu_info", lambda: {"model name": "Some Xeon", "flags": "fpu avx2 avx512f amx_bf16"})
    monkeypatch.setattr(measure, "environment_kernels", lambda: "amx")
    for folder, cpu, kernels in (
        ("cpu-intel", "Some Xeon", "amx"),
        ("cpu-amd", "AMD EPYC", "avx512bf16"),
        ("cpu-old", "Some Xeon", "avx2"),
    ):
        (tmp_path / folder).mkdir()
        content = {"environment": {"cpu": cpu, "extension": {"cpu": kernels}}, "records": []}
        (tmp_path / folder / "2026-01-01.json").write_text(json.dumps(content))
    (tmp_path / "nvidia").mkdir()
    here, *recorded = measure.processor_lines(tmp_path)
    assert here.startswith("Some Xeon, ") and "AVX2, AVX-512, AMX BF16; kernels: amx" in here
    assert [(line.partition(":")[0], "another processor" in line) for line in recorded] == [
        ("cpu-amd", True), ("cpu-intel", False), ("cpu-old", True),
    ]  # fmt: skip


def test_records_of_both_kinds_of_processor_are_tables_of_their_own(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    report = __import__("report")
    for number, device in enumerate(("AMD EPYC (2 cores)", "Intel Xeon, AMX (2 cores)")):
        record = {"name": "BLIP-NLVR", "dtype": "float32", "batch": "1 pairs", "milliseconds": {"dense": 1.0 + number}}
        (tmp_path / f"{number}.json").write_text(json.dumps({"environment": {"device": device}, "records": [record]}))
    devices = report.read_all([tmp_path])
    assert [records[0]["milliseconds"]["dense"] for _, records in devices.values()] == [1.0, 2.0]
    sys.modules.pop("report", None)


def test_figures_of_every_gpu_are_tables(measure, capsys):
    """Lines of other kinds (encoders have no stage) stand in the same file and hurt nobody."""
    report = __import__("report")
    for folder in sorted(BENCHMARKS.glob("results/nvidia-*")):
        assert report.main([str(path) for path in sorted(folder.glob("*-figures.jsonl"))]) == 0
        printed = capsys.readouterr().out
        assert "| 64 | pruned 80% |" in printed and "| importance |" in printed, folder
    sys.modules.pop("report", None)


def test_tiles_that_were_measured_are_written_as_the_table_has_them(monkeypatch):
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not installed")
    pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    tune = __import__("tune")
    sys.modules.pop("tune", None)
    tiles = tune.tiles
    assert tune.source(tiles.MEASURED) in tune.TABLE.read_text(encoding="utf-8")
    slow, fast = (tiles.Tile(128, 256, 64, 8, 4, 1, halves=halves) for halves in (False, True))
    sizes = {"rows": 5, "width": 3072, "columns": 768, "share": 1.0}
    line = {"figure": "tile", "architecture": 9, "dtype": "bfloat16", **sizes}
    times = {slow: 258.0, fast: 257.0, tiles.COPY_ENGINE[0]: 1.0}  # the last with other bits
    lines = [line | {"tile": [*t], "us": us, "same_bits": us > 1} for t, us in times.items()]
    table = tune.entries([json.loads(json.dumps(line)) for line in lines])
    assert table == {9: [(5, 3072, 768, fast)]}
    assert "Measured(5, 3072, 768, Tile(128, 256, 64, 8, 4, 1, halves=True))" in tune.source(table)


def test_the_benchmarks_run():
    """With tiny inputs, which leave their checks of the answers as they are."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not installed")
    files = [f"test_{name}.py" for name in ("blocks", "model", "operations", "pruners")]
    command = [sys.executable, "-m", "pytest", *files, "--small", "-q", "-p", "no:cacheprovider"]
    ran = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "passed" in ran.stdout
