"""Tables and the curve of docs/rules.md, from the records.

  python experiments/real/report.py
  python experiments/real/report.py --results DIR --output rules.md

Of the Markdown file only what stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced; the curve (SVG)
goes beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

REAL = Path(__file__).parent
ROOT = REAL.parents[1]
sys.path.append(str(ROOT))
from benchmarks.report import markdown  # noqa: E402
from madtp.files import replacing  # noqa: E402

PHOTOGRAPHS = {"photographs": "224.jsonl", "large": "448.jsonl"}
STATEMENTS = {"statements": "shapes.jsonl", "statements-577": "shapes-577.jsonl"}
TOKENS = {"photographs": 257, "large": 1025}
STYLES = {
    "ranked novelty": ("#0072b2", "o"), "no second look": ("#004a75", "h"), "equal counts": ("#56b4e9", "o"), "tome": ("#44aa99", "v"),
    "tome, authors' order": ("#117733", "v"), "atm": ("#d55e00", "s"), "pitome": ("#cc79a7", "D"),
}  # fmt: skip
"""What the curve shows, and how."""
NAMES = {
    "no second look": "ranked novelty without a second look",
    "equal counts": "ranked novelty, the same number from every image",
}
GROWTH = 2.4
"""By what an error grows with a tenth of the cost, where a rule has but one record."""


def read(path: Path) -> list[dict]:
    """Rows of a record; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def error(row: dict) -> float:
    """10,000 times what the cosine to dense features lacks of 1."""
    return 1e4 * (1 - row["cosine"])


def at(rows: Sequence[dict], saving: float) -> float:
    """The error of a rule at exactly this saving: a straight line through the logarithms of its two nearest records."""
    rows = sorted(rows, key=lambda row: abs(row["saving"] - saving))[:2]
    first, rate = rows[0], 10 * math.log(GROWTH)
    if len(rows) == 2 and abs(rows[1]["saving"] - first["saving"]) > 0.03:
        rate = math.log(error(rows[1]) / error(first)) / (rows[1]["saving"] - first["saving"])
    return error(first) * math.exp(rate * (saving - first["saving"]))


def by_setting(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Rows of each setting; those that the curve shows first."""
    settings: dict[str, list[dict]] = {}
    for row in rows:
        settings.setdefault(row["setting"], []).append(row)
    return {name: settings[name] for name in [*STYLES, *(n for n in settings if n not in STYLES)] if name in settings}


def cosines(rows: Sequence[dict]) -> str:
    """What was measured: a line for each rule and saving."""
    lines = []
    for name, runs in by_setting(rows).items():
        for row in sorted(runs, key=lambda row: row["target"]):
            lines.append([
                NAMES.get(name, name), f"{row['saving']:.1%}", f"{100 * row['saving_sd']:.1f}", f"**{row['cosine']:.4f}**",
                f"{row['cosine_p10']:.4f}", f"{row['same_nearest']:.3f}", f"{row['tokens'][-1]:.0f}, {row['tokens_sd'][-1]:.0f}",
                row["calibration"]["schedule"],
            ])  # fmt: skip
    return markdown(
        ["rule", "GFLOPs saved", "standard deviation, points", "cosine", "tenth percentile", "same nearest of 120",
         "tokens left, standard deviation", "schedule"],
        lines,
    )  # fmt: skip


def errors(rows: Sequence[dict]) -> str:
    """Errors at exactly the same cost, for savings at which two rules or more were measured."""
    targets = sorted({row["target"] for row in rows})
    targets = [t for t in targets if sum(row["target"] == t for row in rows) > 1]
    lines = []
    for name, runs in by_setting(rows).items():
        near = [t for t in targets if any(abs(row["saving"] - t) < 0.04 for row in runs)]
        lines.append([NAMES.get(name, name), *(f"{at(runs, t):.1f}" if t in near else "" for t in targets)])
    return markdown(["rule", *(f"{t:.0%}" for t in targets)], lines)


def statements(rows: Sequence[dict]) -> str:
    """Right answers of the bundled model."""
    targets = sorted({row["target"] for row in rows})
    lines = []
    for name, runs in by_setting(rows).items():
        found = {row["target"]: row for row in runs}
        lines.append([name, *(
            f"**{100 * found[t]['accuracy']:.1f}** at {found[t]['saving']:.1%} ({found[t]['calibration']['schedule']})"
            if t in found else "" for t in targets
        )])  # fmt: skip
    return markdown(["rule", *(f"{t:.0%} wanted" for t in targets)], lines)


def curve(records: dict[str, list[dict]]):
    """Errors against what is saved, a panel for each number of tokens; logarithmic, as errors grow by factors."""
    from matplotlib.figure import Figure  # without pyplot, which wants a display

    shown = [name for name, rows in records.items() if rows]
    plot = Figure(figsize=(4.6 * len(shown), 3.6), layout="constrained")
    for axes, name in zip(plot.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for setting, rows in by_setting(records[name]).items():
            if setting not in STYLES:
                continue
            rows = sorted(rows, key=lambda row: row["saving"])
            colour, marker = STYLES[setting]
            axes.plot(
                [100 * row["saving"] for row in rows], [error(row) for row in rows], color=colour, marker=marker,
                linestyle="--" if setting == "equal counts" else "-", label=NAMES.get(setting, setting),
            )  # fmt: skip
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_yscale("log")
        axes.set_title(f"{TOKENS[name]} tokens", fontsize=10)
        axes.set_xlabel("GFLOPs saved, % (the rule's own included)")
        axes.set_ylabel("1 - cosine to dense features, times 10,000")
        axes.legend(fontsize=7)
    return plot


def replaced(text: str, tables: dict[str, str]) -> str:
    """The text with its tables in their places.

    Raises:
        ValueError: a table without a place.
    """
    for name, table in tables.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, mark, after = text.partition(start)
        if not mark or end not in after:
            raise ValueError(f"output: expected a place {start.strip()} ... {end}, found none")
        text = f"{before}{start}\n{table}\n\n{end}{after.partition(end)[2]}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=REAL / "results", help="folder of the records")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "rules.md", help="Markdown file with places")
    args = parser.parse_args()
    records = {name: read(args.results / file) for name, file in PHOTOGRAPHS.items()}
    tables = {name: cosines(rows) for name, rows in records.items() if rows}
    tables |= {f"{name}-errors": errors(rows) for name, rows in records.items() if rows}
    answered = {name: read(args.results / file) for name, file in STATEMENTS.items()}
    tables |= {name: statements(rows) for name, rows in answered.items() if rows}
    args.output.write_text(replaced(args.output.read_text(), tables))
    if any(records.values()):
        import matplotlib

        with (
            matplotlib.rc_context({"svg.hashsalt": "rules", "svg.fonttype": "none"}),
            replacing(args.output.with_suffix(".svg")) as file,
        ):
            curve(records).savefig(file, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
