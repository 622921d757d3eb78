"""Fixtures and options of the benchmarks, and the summary that they print: every time, then every goal."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this file are not installed

import inputs
import measure

RECORDS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--records", metavar="FILE", help="write what was measured to this JSON file, for report.py")
    parser.addoption("--patience", type=int, default=1, metavar="N", help="N times as many rounds, for a noisy machine")
    parser.addoption("--small", action="store_true", help="tiny inputs, one round: whether everything runs")
    parser.addoption("--device-name", metavar="NAME", help="what to call this machine in the records")


def pytest_configure(config):
    config.stash[RECORDS] = []
    if config.getoption("--small"):
        inputs.shrink()


if importlib.util.find_spec("pytest_benchmark") is None:

    @pytest.fixture
    def benchmark():
        """Without pytest-benchmark everything is timed all the same, only its table is missing."""


@pytest.fixture
def run(request, benchmark):
    """Check, time and record one comparison; returns its record."""

    def run(comparison: measure.Comparison) -> dict:
        options = request.config.option
        record = measure.compare(comparison, benchmark, 0 if options.small else options.patience)
        request.config.stash[RECORDS].append(record)
        return record

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(measure.environment(config.getoption("--device-name")))


def pytest_sessionfinish(session):
    records, path = session.config.stash[RECORDS], session.config.getoption("--records")
    if records and path:
        measure.write_records(Path(path), records, session.config.getoption("--device-name"))


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's table
def pytest_terminal_summary(terminalreporter, config):
    records = config.stash[RECORDS]
    if records:
        if not measure.ON_GPU:
            terminalreporter.section("processor")
            terminalreporter.write("\n".join(measure.processor_lines(Path(__file__).parent / "results")) + "\n")
        terminalreporter.section("median times")
        terminalreporter.write("\n".join(measure.time_lines(records)) + "\n")
        terminalreporter.section("goals")
        terminalreporter.write("\n".join(measure.goal_lines(records)) + "\n")
