"""Tables and plots from benchmark records.

Reads the files that `pytest benchmarks/ --records FILE` writes, those of pytest-benchmark's `--benchmark-json` and the figures of
`gpu_check.sh` (`*.jsonl`), prints markdown tables, and draws PNG plots where matplotlib is installed. Needs neither torch nor the
packages that were measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

EXAMPLES = """examples:
  pytest benchmarks/ --benchmark-only --records out/all.json
  python benchmarks/report.py out/all.json                          tables only
  python benchmarks/report.py benchmarks/results/*/ --out docs/plots   every record in these folders, tables and plots
  python benchmarks/report.py out/*.json --only goals               one table
  python benchmarks/report.py out/figures.jsonl                     a GPU's figures; of the same figure the last one counts
"""

TABLES = ("goals", "model", "captions", "blocks", "operations")

# Candidates that are not ours, in the order in which tables show them.
BASELINES = (
    "sdpa", "sdpa one by one", "eager", "eager with scores", "batch maximum", "copy", "dense layer",
    "F.linear over the buffer", "F.linear over the tokens", "grouped_mm",
)  # fmt: skip

LINES = {"float32": "-", "bfloat16": "--"}


class BadFile(ValueError):
    """A file that holds no records; the message says why."""


# ---- reading ------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict, list[dict]]:
    """Environment and records of one file.

    Raises:
        BadFile: unreadable, or neither of the two formats.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path}: {error}") from error
    if isinstance(content, dict) and "records" in content:
        return content["environment"], content["records"]
    if isinstance(content, dict) and "benchmarks" in content:
        records = [entry["extra_info"] for entry in content["benchmarks"] if "subject" in entry["extra_info"]]
        return content["machine_info"], records
    raise BadFile(f"{path}: neither a file of records nor one of pytest-benchmark")


def read_all(sources: Iterable[Path]) -> dict[str, tuple[dict, list[dict]]]:
    """Records by device. A later file's record replaces an earlier one of the same comparison."""
    devices: dict[str, tuple[dict, dict]] = {}
    for source in sources:
        for path in sorted(source.glob("*.json")) if source.is_dir() else [source]:
            environment, records = read(path)
            _, known = devices.setdefault(environment.get("device", "unknown device"), (environment, {}))
            known.update({_identity(record): record for record in records})
    return {name: (environment, list(records.values())) for name, (environment, records) in devices.items()}


def _identity(record: dict) -> tuple:
    return tuple(record.get(key) for key in ("name", "dtype", "batch", "spread"))


# ---- tables -------------------------------------------------------------------------------------------------------


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def goals_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        for goal in record["goals"]:
            times = record["milliseconds"]
            rows.append(
                [
                    f"{record['name']}, {record.get('dtype', '')}, {record.get('batch', '')}",
                    f"{goal['candidate']} / {goal['baseline']}",
                    f"{_ms(times[goal['candidate']])} / {_ms(times[goal['baseline']])}",
                    f"{goal['ratio']:.3f}",
                    f"{goal['at_most']:.3f}",
                    "yes" if goal["met"] else "**no**",
                ]
            )
    return markdown(["benchmark", "what", "ms", "ratio", "goal: at most", "met"], rows) if rows else ""


def operations_table(records: list[dict]) -> str:
    operations = ("attention", "attention + importance", "score_tokens", "compact", "prune", "linear")
    rows = []
    for record in records:
        if record["name"] not in operations:
            continue
        times, subject = record["milliseconds"], record["subject"]
        against = [f"{name} {_times(times[name] / times[subject])}" for name in BASELINES if name in times]
        rates = [
            f"{record[rate]:.3g} {unit} ({record[share]:.0%})"
            for rate, unit, share in (("gflops", "GFLOP/s", "of_product"), ("gbps", "GB/s", "of_copy"))
            if rate in record
        ]
        rows.append(
            [
                subject,
                record["dtype"],
                record["batch"],
                _ms(times[subject]),
                ", ".join(against),
                ", ".join(rates),
            ]
        )
    return (
        markdown(["operation", "dtype", "batch", "ms", "speed-up over", "rate (of the ceiling)"], rows) if rows else ""
    )


def blocks_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        if record["name"] not in ("block with half the tokens", "twelve blocks", "spread of kept counts"):
            continue
        times, subject = record["milliseconds"], record["subject"]
        note = f", spread {record['spread']:.0%}" if "spread" in record else ""
        others = [f"{name} {_ms(value)} ms ({_times(value / times[subject])})" for name, value in times.items()]
        rows.append(
            [
                f"{record['name']}{note}",
                record["dtype"],
                record["batch"],
                subject,
                _ms(times[subject]),
                ", ".join(others[1:]),
            ]
        )
    return markdown(["benchmark", "dtype", "batch", "ours", "ms", "others (speed-up over them)"], rows) if rows else ""


def model_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        if record["name"] != "BLIP-NLVR":
            continue
        times, flops, pairs = record["milliseconds"], record["gflops_per_pair"], record["pairs"]
        plain = times.get("dense, plain PyTorch")
        for name, value in times.items():
            if "one by one" in name:
                continue
            gflops = flops.get(name, flops["dense"] if name.startswith("dense") else None)
            rows.append(
                [
                    record["dtype"],
                    str(pairs),
                    name,
                    f"{gflops:.1f}",
                    _ms(value / pairs),
                    _times(flops["dense"] / gflops),
                    _times(times["dense"] / value),
                    _times(plain / value) if plain else "",
                ]
            )
    header = ["dtype", "pairs", "run", "GFLOPs per pair", "ms per pair", "FLOPs ratio", "speed-up over our dense",
              "over plain PyTorch, dense"]  # fmt: skip
    return markdown(header, rows) if rows else ""


def captions_table(records: list[dict]) -> str:
    rows = []
    for record in records:
        if record["name"] != "BLIP captioning":
            continue
        times, gflops, images = record["milliseconds"], record["gflops_per_image"], record["images"]
        for name, value in times.items():
            rows.append(
                [
                    record["batch"],
                    name,
                    f"{gflops[name]:.1f}" if name in gflops else "",
                    f"{1000 * images / value:.2f}",
                    _times(times["transformers float32"] / value),
                    _times(times[f"dense {name.split()[-1]}"] / value),
                ]
            )
    header = ["batch", "run", "GFLOPs per image", "images/s", "over transformers", "over our dense"]
    return markdown(header, rows) if rows else ""


def tables(environment: dict, records: list[dict], only: str | None = None) -> str:
    """All tables of one device, with what they were measured on."""
    makers = {
        "goals": goals_table,
        "model": model_table,
        "captions": captions_table,
        "blocks": blocks_table,
        "operations": operations_table,
    }
    parts = [f"## {environment.get('device', 'unknown device')}", _conditions(environment)]
    for name in [only] if only else TABLES:
        if made := makers[name](records):
            parts += [f"### {name.capitalize()}", made]
    return "\n\n".join(parts)


def _conditions(environment: dict) -> str:
    product = environment.get("product_gflops", {})
    ceilings = ", ".join(f"{dtype} product {rate:.0f} GFLOP/s" for dtype, rate in product.items())
    return (
        f"torch {environment.get('torch')}, {environment.get('threads')} threads, backend {environment.get('backend')}, "
        f"{environment.get('date')}, revision {environment.get('commit')}. Ceilings measured in the same run: "
        f"copy {environment.get('copy_gbps', 0):.0f} GB/s, {ceilings}."
    )


# ---- figures of a GPU ---------------------------------------------------------------------------------------------------

# Operation, what it is held against, what of that the goal is: time at most (a share), or speed at least.
GPU_OPERATIONS = (
    ("attention", "sdpa, default", None),
    ("importance", "attention", ("time", 0.6)),
    ("score", None, None),
    ("compact", "copy of compact's bytes", ("speed", 0.8)),
    ("compact + LayerNorm", "copy of compact + LayerNorm's bytes", ("speed", 0.8)),
    ("LayerNorm", "F.layer_norm over the tokens", None),
    ("linear + GELU", "F.linear over the tokens", ("speed", 0.85)),
    ("linear + residual", "F.linear over the tokens", ("speed", 0.85)),
)


def read_figures(paths: Iterable[Path]) -> list[dict]:
    """The lines of files of figures.

    Raises:
        BadFile: unreadable, or a line that is no figure.
    """
    figures = []
    for path in paths:
        try:
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise BadFile(f"{path}: {error}") from error
        if not all(isinstance(line, dict) and "figure" in line for line in lines):
            raise BadFile(f"{path}: a line without a figure")
        figures += lines
    return figures


def gpu_operations_table(figures: list[dict]) -> str:
    """Operations of 64 x 577 tokens in bfloat16, all rows of the buffer in use."""
    times: dict[tuple[str, str], float] = {}
    for line in figures:
        if "us" in line and line.get("share", 1.0) == 1.0 and "backend" not in line and line.get("stage") != "tune":
            stage = line["stage"].removesuffix("-full") if line["figure"].startswith("F.linear") else ""
            times[line["figure"], stage] = line["us"]
    rows = []
    for name, against, goal in GPU_OPERATIONS:
        stage = {"linear + GELU": "linear-gelu", "linear + residual": "linear-residual"}.get(name, "")
        ours, theirs = times.get((name, "")), times.get((against, stage))
        if ours is None:
            continue
        verdict = ""
        if theirs is not None and goal is not None:
            kind, bound = goal
            share = ours / theirs if kind == "time" else theirs / ours
            met = share <= bound if kind == "time" else share >= bound
            verdict = f"{kind} {'at most' if kind == 'time' else 'at least'} {bound:.0%}: {share:.0%}, {'met' if met else '**missed**'}"
        rows.append([name, f"{ours:.0f}", "" if theirs is None else f"{against}: {theirs:.0f}", verdict])
    return markdown(["operation", "us", "against, us", "goal"], rows) if rows else ""


def gpu_model_table(figures: list[dict]) -> str:
    """BLIP-NLVR in bfloat16, replayed as a CUDA graph."""
    known: dict[tuple[int, str], dict] = {}
    for line in figures:
        if line.get("stage", "").startswith("nlvr-") and "us" in line:
            known[line["pairs"], line["figure"]] = line
    rows = []
    for pairs, name in sorted(known, key=lambda key: -key[0]):
        line, dense, plain = known[pairs, name], known.get((pairs, "dense")), known.get((pairs, "dense, plain PyTorch"))
        ratio, faster = None, dense["us"] / line["us"] if dense else None
        if dense and "gflops_per_pair" in line:
            ratio = dense["gflops_per_pair"] / line["gflops_per_pair"]
        verdict = ""
        if name.startswith("pruned") and ratio and pairs >= 32:
            verdict = f"at least {0.9 * ratio:.2f}x: {'met' if faster >= 0.9 * ratio else '**missed**'}"
        rows.append(
            [
                str(pairs), name, f"{line['us'] / 1e3:.2f}", f"{line['gflops_per_pair']:.1f}" if ratio else "",
                _times(ratio) if ratio else "", _times(faster) if faster else "",
                _times(plain["us"] / line["us"]) if plain else "", verdict,
            ]
        )  # fmt: skip
    header = ["pairs", "run", "ms", "GFLOPs per pair", "FLOPs ratio", "over our dense", "over plain PyTorch", "goal"]
    return markdown(header, rows) if rows else ""


def gpu_report(figures: list[dict]) -> str:
    def last(figure: str, field: str, otherwise):
        return next(
            (line[field] for line in reversed(figures) if line["figure"] == figure and field in line), otherwise
        )

    ceilings = (
        f"Copy {last('copy', 'gbps', 0):.0f} GB/s, bfloat16 product {last('product 8192', 'tflops', 0):.0f} TFLOP/s."
    )
    parts = [f"## {last('device before', 'name', 'unknown device')}", ceilings]
    for title, table in (("Model", gpu_model_table(figures)), ("Operations", gpu_operations_table(figures))):
        if table:
            parts += [f"### {title}", table]
    return "\n\n".join(parts)


# ---- plots --------------------------------------------------------------------------------------------------------


def draw(records: list[dict], device: str, folder: Path) -> list[Path]:
    """The three plots, as far as the records reach. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in (
        ("speedup_vs_flops", _plot_flops),
        ("speedup_vs_batch", _plot_batch),
        ("speedup_vs_spread", _plot_spread),
    ):
        figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
        if plot(axes, records):
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
            axes.set_title(device, fontsize=9)
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def _model_records(records: list[dict]) -> list[dict]:
    return sorted((r for r in records if r["name"] == "BLIP-NLVR"), key=lambda r: (r["dtype"], r["pairs"]))


def _plot_flops(axes, records: list[dict]) -> bool:
    """Speed-up over our own dense model against the FLOPs ratio; on the diagonal every FLOP saved is time saved."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record in _model_records(records):
        times, flops = record["milliseconds"], record["gflops_per_pair"]
        for name in flops:
            if name.startswith("pruned"):
                kind = "batch maximum" if name.endswith("batch maximum") else f"{record['pairs']} pairs"
                series = points.setdefault((record["dtype"], kind), [])
                series.append((flops["dense"] / flops[name], times["dense"] / times[name]))
    for (dtype, kind), series in points.items():
        marker = "x" if kind == "batch maximum" else "o"
        axes.plot(*zip(*sorted(series)), marker + LINES[dtype], markersize=5, label=f"{dtype}, {kind}")
    most = max((value for series in points.values() for point in series for value in point), default=1.0)
    axes.plot([1, most], [1, most], "k:", linewidth=1, label="time follows FLOPs")
    axes.set_xlabel("FLOPs ratio, dense / pruned")
    axes.set_ylabel("speed-up over our dense model")
    return bool(points)


def _plot_batch(axes, records: list[dict]) -> bool:
    """Time per pair against the batch size."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in _model_records(records):
        for name, value in record["milliseconds"].items():
            if "one by one" not in name:
                series.setdefault((record["dtype"], name), []).append((record["pairs"], value / record["pairs"]))
    series = {key: points for key, points in series.items() if len(points) > 1}
    colours: dict[str, str] = {}
    for (dtype, name), points in series.items():
        colour = colours.setdefault(name, f"C{len(colours)}")
        axes.plot(*zip(*points), "o" + LINES[dtype], color=colour, markersize=3, label=f"{dtype}, {name}")
    sizes = sorted({size for points in series.values() for size, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pairs in the batch")
    axes.set_ylabel("ms per pair")
    return bool(series)


def _plot_spread(axes, records: list[dict]) -> bool:
    """Speed-up of ragged execution over padding to the largest sample, against the spread of the lengths."""
    found = sorted((r for r in records if "spread" in r), key=lambda r: r["spread"])
    for dtype in sorted({record["dtype"] for record in found}):
        rows = [record for record in found if record["dtype"] == dtype]
        for baseline in ("batch maximum", "padded, plain PyTorch"):
            points = [(r["spread"], r["milliseconds"][baseline] / r["milliseconds"]["ragged"]) for r in rows]
            axes.plot(*zip(*points), "o" + LINES[dtype], markersize=4, label=f"over {baseline}, {dtype}")
    axes.axhline(1, color="k", linestyle=":", linewidth=1)
    axes.set_xlabel("standard deviation of the sample lengths / mean")
    axes.set_ylabel("speed-up of ragged execution")
    return bool(found)


# ---- command line -------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON files, or folders of them")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write plots here; in one folder per device, if there are several"
    )
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the tables to this file, not to the terminal"
    )
    parser.add_argument("--only", choices=TABLES, help="this table only")
    options = parser.parse_args(arguments)
    lines = [path for path in options.results if path.suffix == ".jsonl"]
    try:
        figures = read_figures(lines)
        devices = read_all(path for path in options.results if path not in lines)
    except BadFile as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if not figures and not any(records for _, records in devices.values()):
        print("report: no records in " + ", ".join(map(str, options.results)), file=sys.stderr)
        return 1

    reports = [tables(environment, records, options.only) for environment, records in devices.values()]
    text = "\n\n".join(reports + ([gpu_report(figures)] if figures else []))
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if options.out:
        for device, (_, records) in devices.items():
            own = "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())
            folder = options.out if len(devices) == 1 else options.out / own
            try:
                written = draw(records, device, folder)
            except ImportError:
                print("report: no plots, because matplotlib is missing: pip install matplotlib", file=sys.stderr)
                return 1
            print("".join(f"wrote {path}\n" for path in written), end="", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
