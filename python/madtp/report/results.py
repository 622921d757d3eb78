"""What an evaluation found: on the terminal, in files, in plots."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import madtp_kernels

from ..evaluate.run import TIMING
from ..files import replacing, write_json
from ..jsonl import to_line
from ..tasks import Task
from .plots import name_of, quality_plot, save_png, strength_of, tokens_plot

__all__ = ["table", "write"]


def write(command, task: Task, settings: dict, results: list[dict], records: dict) -> list[str]:
    """Records, figures and plots, if asked for; says what is where."""
    written = []
    if command.records:
        with replacing(command.records) as file:
            dial = "temperature" if "temperature" in results[0] else "strength"
            for strength, steps in records.items():
                for step, rows in steps.items():
                    for row in rows:
                        kept = {key: value for key, value in row.items() if key != "row"}  # of a process
                        file.write(to_line({dial: strength, "step": step, **kept}))
        written.append(f"records: {command.records}")
    if command.output:
        document = {
            "task": task.name,
            "instance": task.unit,
            "settings": settings,
            "versions": _versions(settings["device"]),
            "timing": TIMING,
            "results": results,
        }
        write_json(command.output, document, indent=1)
        written.append(f"figures: {command.output}")
    if command.plots:
        written += _plot(Path(command.plots), task, results)
    return written


def _versions(device: str) -> dict[str, str]:
    import transformers

    gpu = device.startswith("cuda")
    return {
        "madtp": madtp_kernels.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if gpu else torch.backends.cpu.get_cpu_capability(),
    }


def _plot(folder: Path, task: Task, results: list[dict]) -> list[str]:
    metric = task.headline
    plots = {"tokens.png": tokens_plot(results)}
    if metric in results[0]["quality"]:
        plots["quality.png"] = quality_plot(results, metric, task.unit)
    for name, figure in plots.items():
        save_png(figure, folder / name)
    return [f"plot: {folder / name}" for name in plots]


def table(results: Sequence[dict], task: Task, settings: dict) -> list[str]:
    """Lines for the terminal, one column per strength."""
    table, first = _Table(results), results[0]
    table.lines += [*_heading(first, task, settings), ""]
    table.add("", map(name_of, results))
    for metric in first["quality"]:
        table.add(metric.replace("_to_", " to "), [f"{result['quality'][metric]:.4f}" for result in results])
    table.add_cost("GFLOPs, official count", "gflops")
    table.add_cost("GFLOPs, full count", "gflops_full")
    table.add("model time, ms", [f"{1000 * result['seconds']:.4g}" for result in results])
    table.add("per second", [f"{result['per_second']:.4g}" for result in results])
    if "match" in first["steps"]:
        found = [result["steps"]["match"] for result in results]
        table.add("matching: GFLOPs per pair", [f"{match['gflops']:.5g}" for match in found])
        table.add("matching: ms per pair", [f"{1000 * match['seconds']:.4g}" for match in found])
    table.lines.append(f"(GFLOPs and time are those of one {task.unit})")
    for template, found in first.get("templates", {}).items():
        cells = [f"{result['templates'][template]['accuracy']:.4f}" for result in results]
        table.add(f"  {template} ({found['samples']})", cells)
    for stream, layers in first["tokens"].items():
        table.lines += ["", f"{stream} tokens, least / mean / most"]
        for layer in range(len(layers)):
            cells = ["{min} / {mean:.1f} / {max}".format(**result["tokens"][stream][layer]) for result in results]
            table.add(f"  after layer {layer}" if layer else "  input", cells)
    for name, reason in first.get("not_run", {}).items():
        table.lines.append(f"not computed: {name}: {reason}")
    if first.get("tokenizer") == "plain":
        table.lines.append("words were not split by the published tokenizer: compare with nothing published")
    return table.lines


def _heading(first: dict, task: Task, settings: dict) -> list[str]:
    counts = ", ".join(f"{count} {name}s" for name, count in first["samples"].items())
    processes = f", {settings['processes']} processes" if settings["processes"] > 1 else ""
    threads = "" if settings["device"] != "cpu" else f" (threads: {settings['threads']})"
    where = f"{settings['dtype']} on {settings['device']}{threads}"
    return [f"{task.name}: {counts}; {where}, batches of {settings['batch_size']}{processes}"]


class _Table:
    def __init__(self, results: Sequence[dict]) -> None:
        self.lines: list[str] = []
        self.results = results
        self.dense = next((result for result in results if not strength_of(result)), None)

    def add(self, label: str, cells: Sequence[str]) -> None:
        self.lines.append(f"{label:28}" + "".join(f"{cell:>20}" for cell in cells).rstrip())

    def add_cost(self, label: str, key: str) -> None:
        """Beside each figure, how far it is from that of the dense model."""
        cells = []
        for result in self.results:
            compared = self.dense is not None and result is not self.dense
            change = f" ({100 * (result[key] / self.dense[key] - 1):+.1f} %)" if compared else ""
            cells.append(f"{result[key]:.5g}{change}")
        self.add(label, cells)
