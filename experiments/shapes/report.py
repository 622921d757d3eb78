"""Tables and plots of docs/results.md, from the recorded runs.

  python experiments/shapes/report.py
  python experiments/shapes/report.py --results reproduction/results --output reproduction/results.md

Where the Markdown file exists only its tables are replaced, between `<!-- table: NAME -->` and
`<!-- end -->`; what is written around them stays. Plots go beside it. A run that was not recorded is left
out. Runs that differ in more than the tables say (method, reduction, seed) are refused.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from reproduce import ANATOMY, BATCH_MAXIMUM, CALIBRATED, LARGE, LARGE_STEPS, LEVERED, LEVERS, RUNS, SEEDS, WHOLE_TEXT

SHAPES = Path(__file__).parent
ROOT = SHAPES.parents[1]
sys.path.append(str(ROOT))
from benchmarks.report import markdown  # noqa: E402
from madtp.data.synthetic import KINDS, TEMPLATES  # noqa: E402
from madtp.report.plots import save_png  # noqa: E402

NAMED = {run.name: run for run in RUNS}
"""Runs by the names of their records."""
SAID = ("row", "reduction", "seed", "steps")
"""Settings in which the runs of a table may differ, because it says so."""
BUDGET = ("batch_size", "texts", "lr", "warmup", "distill", "weight_decay", "clip", "beta2", "precision", "average")
"""Settings in which runs of the same reduction and number of steps may not differ."""
BEST, PLAIN = "ranked-novelty", "madtp"
"""The method that others are compared with, and the paper's."""


class Method(NamedTuple):
    """How a method is called and drawn."""

    name: str
    note: str
    colour: str
    marker: str


METHODS = {
    "ranked-novelty": Method("ranked novelty", "drops what is like a token that matters more", "#0072b2", "o"),
    "ranked-novelty-importance": Method("ranked by importance", "MADTP's importance as the order", "#004a75", "h"),
    "madtp": Method("MADTP", "as in the paper", "#d55e00", "s"),
    "madtp-nearest": Method("MADTP, nearest survivor", "merged into the most similar token that stays", "#8b3a00", "p"),
    "madtp-sizes": Method("MADTP with sizes", "merged tokens weigh what they stand for", "#56b4e9", "o"),
    "tome": Method("ToMe", "bipartite matching, every picture keeps as many", "#44aa99", "v"),
    "cls": Method("CLS attention", "top-k by the attention of CLS, as EViT", "#009e73", "^"),
    "random": Method("random", "tokens are kept at random", "#777777", "X"),
}
CALIBRATED_STYLE = Method("calibrated", "dictionary and temperature only, no labels", "#999933", "v")
MAXIMUM_STYLE = Method(
    f"{100 * BATCH_MAXIMUM.reduction:.0f} %, batch maximum", "", METHODS[BATCH_MAXIMUM.method].colour, "o"
)
LARGE_ROWS = {
    "large-dense": "dense",
    "large-dense-final": "dense, trained further",
    "large-dense-begun": f"{METHODS[BEST].name}, from which the dense model was trained on",
} | {f"large-{run.name}": f"{METHODS[run.method].name}, {LARGE_STEPS} steps from the dense model" for run in LARGE}
DENSE = "#000000"
SHOWN_LAYERS = (1, 2, 3, 6, 12)  # of the twelve that see images
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
"""Behind labels that a line may cross."""

SKELETON = """\
# Compression on shapes: results

Accuracy is on the test split. GFLOPs are those of an average statement about two pictures, counted from
the tokens of each instance, in the official convention (one multiply-add is 1); "full" also counts what finds
the tokens. The standard error is that of a single run and takes statements as independent of one another.

`make reproduce` makes all of this from nothing; `make reproduce ARGS=--dry-run` prints every command.

## Reductions

<!-- table: overall -->
<!-- end -->

## At the same GFLOPs

Every run starts from the same dense model and has the same steps, data and kernels.

<!-- table: baselines -->
<!-- end -->

## What each lever brings

<!-- table: levers -->
<!-- end -->

## At 577 tokens

Pictures drawn at twice the size; the dense model was trained on from interpolated positions.

<!-- table: large -->
<!-- end -->

## Where the errors come from

<!-- table: anatomy -->
<!-- end -->

## By template

<!-- table: templates -->
<!-- end -->

## Calibrated, without labels

<!-- table: calibrated -->
<!-- end -->

## Tokens

<!-- table: tokens -->
<!-- end -->

## Time

<!-- table: timing -->
<!-- end -->
"""


# ---- records -----------------------------------------------------------------------------------------------


class Record(NamedTuple):
    """A recorded run, and what the test split said."""

    settings: dict
    torch: str
    test: dict

    @property
    def accuracy(self) -> float:
        return self.test["accuracy"]["all"]

    @property
    def steps(self) -> int:
        return self.settings.get("steps", 0)

    @property
    def cost(self) -> float | None:
        """Official GFLOPs; the training of the dense model does not record them."""
        return self.test.get("gflops")


class Refused(ValueError):
    """Records that cannot stand beside each other."""


def read(folder: Path) -> dict[str, Record]:
    """Every record that the tables use, by name.

    Raises:
        Refused: a record whose settings are not those of its name, or that has no test result; runs that
            differ in settings which the tables do not show, or in the number of test statements.
        OSError, ValueError: a file that cannot be read.
    """
    named = NAMED | {f"large-{run.name}": run for run in LARGE}
    evaluated = ["dense-test", *LARGE_ROWS, *ANATOMY, f"batch-maximum-{BATCH_MAXIMUM.reduction}"]
    evaluated.append(f"whole-text-{WHOLE_TEXT.reduction}")
    evaluated += [f"calibrated-{reduction}" for reduction in CALIBRATED]
    evaluated += [f"lever-{name}" for name in LEVERS]
    records = {}
    for name in dict.fromkeys([*evaluated, *named]):
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        tests = [line["test"] for line in content["metrics"] if "test" in line]
        if len(tests) != 1:
            raise Refused(f"{path}: expected one test result, got {len(tests)}")
        settings = content["settings"]
        if name in named and tuple(settings.get(key) for key in SAID[:3]) != named[name][:3]:
            raise Refused(f"{path}: records {' '.join(str(settings.get(key)) for key in SAID[:3])}")
        records[name] = Record(settings, content["torch"], tests[0])
    runs: dict[tuple, list] = defaultdict(list)
    for name, run in named.items():
        if name in records and not name.startswith("large-"):
            runs[run.reduction, records[name].steps].append((name, records[name].settings))
    for some in runs.values():
        budget(some)
    counts = {name: record.test["statements"] for name, record in records.items()}
    if len(set(counts.values())) > 1:
        raise Refused(f"runs with different numbers of test statements: {counts}")
    return records


def budget(settings: Sequence[tuple[str, dict]]) -> dict:
    """The settings that all runs share, of those that may not differ.

    Raises:
        Refused: runs that do not share them.
    """
    rest = [(name, {key: one[key] for key in BUDGET if one.get(key) is not None}) for name, one in settings]
    for name, other in rest:
        first, expected = rest[0]
        keys = sorted(k for k in {**expected, **other} if expected.get(k) != other.get(k))
        if keys:
            differences = "; ".join(f"{key}: {expected.get(key)} and {other.get(key)}" for key in keys)
            raise Refused(f"{first} and {name} differ in more than {', '.join(SAID)}: {differences}")
    return rest[0][1] if rest else {}


class Group(NamedTuple):
    """The seeds of a method at a reduction, after so many steps."""

    method: str
    reduction: float
    steps: int
    records: list[Record]

    def mean(self, figure: Callable[[Record], float]) -> float:
        return statistics.fmean(map(figure, self.records))

    def on(self, key: str) -> float:
        """Accuracy on a template or kind."""
        return self.mean(lambda record: record.test["accuracy"][key])

    def columns(self, stream: str) -> list[float]:
        """Tokens by layer, mean over seeds."""
        rows = [record.test[stream] for record in self.records]
        return [statistics.fmean(column) for column in zip(*rows, strict=True)]

    @property
    def accuracies(self) -> list[float]:
        return [record.accuracy for record in self.records]

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def cost(self) -> float:
        return self.mean(lambda record: record.cost)

    @property
    def reached(self) -> float:
        return self.mean(lambda record: record.test["reduction"])


class Results(NamedTuple):
    """What there is to show."""

    records: dict[str, Record]
    groups: list[Group]
    """By method, in the order of METHODS, then by reduction."""
    timings: list[dict]

    @property
    def dense(self) -> Record | None:
        return self.records.get("dense-test")

    @property
    def maximum(self) -> Record | None:
        return self.records.get(f"batch-maximum-{BATCH_MAXIMUM.reduction}")

    @property
    def whole_text(self) -> Record | None:
        return self.records.get(f"whole-text-{WHOLE_TEXT.reduction}")

    @property
    def calibrated(self) -> list[Group]:
        found = ((reduction, self.records.get(f"calibrated-{reduction}")) for reduction in CALIBRATED)
        return [Group("calibrated", reduction, 0, [record]) for reduction, record in found if record]

    def at(self, reduction: float) -> list[Group]:
        return [group for group in self.groups if group.reduction == reduction]


def collect(folder: Path) -> Results:
    """All records of a folder; errors as in :func:`read`."""
    records = read(folder)
    found = defaultdict(list)
    for name, run in NAMED.items():
        if name in records:
            found[run.method, run.reduction, records[name].steps].append(records[name])
    methods = list(METHODS)
    order = sorted(found, key=lambda key: (methods.index(key[0]), key[1:]))
    timings = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("timing-*.json"))]
    return Results(records, [Group(*key, found[key]) for key in order], timings)


# ---- tables ------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def whole(share: float) -> str:
    return f"{100 * share:.0f} %"


def error(record: Record) -> str:
    """Standard error of an accuracy, in points."""
    return f"{100 * (record.accuracy * (1 - record.accuracy) / record.test['statements']) ** 0.5:.2f}"


def loss(results: Results, accuracy: float) -> str:
    """Points below the dense model."""
    return percent(results.dense.accuracy - accuracy) if results.dense else ""


def made_by(results: Results, groups: Iterable[Group], *others: str) -> str:
    """The commands and settings behind a table."""
    commands, records = list(others), [record for group in groups for record in group.records]
    if records:
        commands.insert(0, "`madtp compress ...`")
    shared = [{key: record.settings.get(key) for key in BUDGET} for record in records]
    settings = "".join(
        f", {key} {shared[0][key]}"
        for key in BUDGET
        if shared and shared[0][key] is not None and all(one[key] == shared[0][key] for one in shared)
    )
    versions = ", ".join(sorted({record.torch for record in (records or results.records.values())}))
    return f"Made by {' and '.join(commands)}{settings}; torch {versions}. `make reproduce ARGS=--dry-run` prints each."


EVALUATE = "`python experiments/shapes/evaluate.py --model DIR ...`"


def overall(results: Results) -> str:
    """Accuracy of every method and reduction."""
    rows = []
    if dense := results.dense:
        cost = f"{dense.cost:.3f}" if dense.cost else ""
        full = f"{dense.test['gflops_full']:.3f}" if dense.cost else ""
        name = ["dense", "", "", "", cost, full, "1", f"**{percent(dense.accuracy)}**", "", "", error(dense)]
        rows.append(name)
    for group in results.groups:
        low, high = min(group.accuracies), max(group.accuracies)
        rows.append(
            [
                METHODS[group.method].name,
                str(group.steps),
                whole(group.reduction),
                f"{percent(group.reached)} %",
                f"{group.cost:.3f}",
                f"{group.mean(lambda record: record.test['gflops_full']):.3f}",
                str(len(group.records)),
                f"**{percent(group.accuracy)}**",
                f"{percent(low)} to {percent(high)}" if len(group.records) > 1 else "",
                loss(results, group.accuracy),
                error(group.records[0]),
            ]
        )
    header = ["method", "steps", "fewer GFLOPs: target", "reached", "GFLOPs", "full", "seeds", "accuracy, %"]
    header += ["range over seeds", "points below dense", "standard error"]
    image = "![Accuracy against GFLOPs](PLOT-accuracy-gflops.png)"
    return table(header, rows, image, made_by(results, results.groups, EVALUATE))


def baselines(results: Results) -> str:
    """All methods at each reduction where there is something to compare with."""
    rows, used = [], []
    for reduction in sorted({group.reduction for group in results.groups}, reverse=True):
        groups = results.at(reduction)
        if len({group.method for group in groups}) < 2:
            continue
        used += groups
        for group in groups:
            same = [one for one in groups if one.method == BEST and one.steps == group.steps]
            behind = percent(same[0].accuracy - group.accuracy) if same and group is not same[0] else ""
            row = [METHODS[group.method].name, METHODS[group.method].note, str(group.steps), f"{group.cost:.3f}"]
            row += [f"{percent(group.reached)} %", str(len(group.records)), f"**{percent(group.accuracy)}**"]
            rows.append([*row, loss(results, group.accuracy), behind, error(group.records[0])])
        for name, note, run, record in (
            ("batch maximum", "as many tokens as any picture of the batch", BATCH_MAXIMUM, results.maximum),
            ("whole text", "the text is not pruned", WHOLE_TEXT, results.whole_text),
        ):
            if record and reduction == run.reduction:
                row = [name, f"{METHODS[run.method].name}, {run.steps} steps, but {note}", "", f"{record.cost:.3f}"]
                row += [f"{percent(record.test['reduction'])} %", "1", f"**{percent(record.accuracy)}**"]
                rows.append([*row, loss(results, record.accuracy), "", error(record)])
    header = ["method", "", "steps", "GFLOPs", "saved", "seeds", "accuracy, %", "points below dense"]
    header += [f"below {METHODS[BEST].name} of as many steps", "standard error"]
    return table(header, rows, made_by(results, used, EVALUATE))


def levers(results: Results) -> str:
    """What one change brings to a run of the best method at 80 %."""
    plain = results.records.get(LEVERED.name)
    changes = [(LEVERED.name, f"as it is, {LEVERED.steps} steps")]
    changes += [(f"lever-{name}", lever.said) for name, lever in LEVERS.items()]
    changes += [(f"{BEST}-0.8-0", "2800 steps"), (SEEDS[0].name, f"{SEEDS[0].steps} steps")]
    rows = []
    for name, said in changes:
        if plain and (record := results.records.get(name)):
            more = percent(record.accuracy - plain.accuracy) if record is not plain else ""
            rows.append(
                [said, f"{percent(record.test['reduction'])} %", f"**{percent(record.accuracy)}**", more, error(record)]
            )
    header = ["change", "saved", "accuracy, %", "points gained", "standard error"]
    return table(header, rows, f"Made by `madtp compress ...` with one option changed and {EVALUATE}, one seed.")


def large(results: Results) -> str:
    """Models of 577 tokens."""
    rows, dense = [], results.records.get("large-dense")
    for name, said in LARGE_ROWS.items():
        if record := results.records.get(name):
            row = [said, f"{percent(record.test['reduction'])} %", f"{record.cost:.3f}"]
            row += [f"{record.test['gflops_full']:.3f}", f"**{percent(record.accuracy)}**"]
            rows.append([*row, percent(dense.accuracy - record.accuracy) if dense else "", error(record)])
    header = ["method", "saved", "GFLOPs", "full", "accuracy, %", "points below dense", "standard error"]
    return table(header, rows, f"Made by `madtp compress ... --image-size 192` and {EVALUATE}.")


def labelled(results: Results) -> list[tuple[str, Group]]:
    """Every model there is, with a name: dense, the groups, the calibrated ones, batch maximum."""
    found = [("dense", Group("dense", 0.0, 0, [results.dense]))] if results.dense else []
    for group in results.groups:
        found.append((f"{METHODS[group.method].name}, {whole(group.reduction)}, {group.steps} steps", group))
    found += [(f"calibrated, {whole(group.reduction)}", group) for group in results.calibrated]
    if results.maximum:
        group = Group(BATCH_MAXIMUM.method, BATCH_MAXIMUM.reduction, 0, [results.maximum])
        found.append((MAXIMUM_STYLE.name, group))
    return found


def templates(results: Results) -> str:
    """Accuracy by template and by the way objects are described; mean over seeds."""
    groups = [*TEMPLATES, *KINDS]
    rows = [[name, *(percent(group.on(key)) for key in groups)] for name, group in labelled(results)]
    image = "![Accuracy by template](PLOT-templates.png)"
    return table(["accuracy, %", *groups], rows, image, made_by(results, results.groups, EVALUATE))


def anatomy(results: Results) -> str:
    """The shipped model under other conditions."""
    names = {
        "shipped-as-it-is": "as it is",
        "shipped-milder": "at half of its strength",
        "shipped-unpruned": "not pruned at all",
    }
    rows = []
    for name in ANATOMY:
        if record := results.records.get(name):
            row = [names[name], f"{percent(record.test['reduction'])} %", f"**{percent(record.accuracy)}**"]
            left = record.test["objects_left"]
            rows.append([*row, *(percent(left[layer - 1]) for layer in SHOWN_LAYERS)])
    header = ["the model of the package", "fewer GFLOPs", "accuracy, %"]
    header += [f"objects with a token after layer {layer}, %" for layer in SHOWN_LAYERS]
    return table(header, rows, f"Made by {EVALUATE} with `--strength`.")


def calibrated(results: Results) -> str:
    """Calibrated models beside fine-tuned ones."""
    rows = []
    for group in results.calibrated:
        row = [whole(group.reduction), f"{percent(group.reached)} %", f"**{percent(group.accuracy)}**"]
        row.append(loss(results, group.accuracy))
        tuned = next((one for one in results.at(group.reduction) if one.method == PLAIN), None)
        rows.append([*row, percent(tuned.accuracy) if tuned else ""])
    header = ["fewer GFLOPs: target", "reached", "calibrated, %", "points below dense"]
    header += ["fine-tuned as in the paper, %"]
    beside = [group for group in results.groups if group.reduction in CALIBRATED and group.method == PLAIN]
    return table(header, rows, made_by(results, beside, "`madtp calibrate ...`", EVALUATE))


def tokens(results: Results) -> str:
    """Mean tokens before the first layer and after each."""
    parts = []
    models = [(name, group) for name, group in labelled(results) if "image_tokens" in group.records[0].test]
    for stream, name in (("image_tokens", "tokens of a picture"), ("text_tokens", "tokens of a statement")):
        rows = [[label, *(f"{count:.1f}" for count in group.columns(stream))] for label, group in models]
        if rows:
            layers = ["before", *(f"after {layer}" for layer in range(1, len(rows[0]) - 1))]
            parts.append(markdown([name, *layers], rows))
    rest = [made_by(results, results.groups, EVALUATE)] if parts else []
    return "\n\n".join([*parts, *rest]) or NOTHING


def timing(results: Results) -> str:
    """Milliseconds of a statement, by device."""
    parts = []
    runs = {name: f"{METHODS[run.method].name}, {whole(run.reduction)}" for name, run in NAMED.items()}
    for content in results.timings:
        environment = content["environment"]
        rows = []
        for record in content["records"]:
            dense = record["milliseconds"][record["subject"]]
            for name, value in record["milliseconds"].items():
                each = [1 / record["statements"] * time for time in record["quartile_milliseconds"][name]]
                model, *maximum = name.split(", ")
                called = "dense" if name == record["subject"] else ", ".join([runs.get(model, model), *maximum])
                row = [called, record["dtype"], str(record["batch"])]
                row += [f"{record['gflops_per_statement'][name]:.3f}", f"{value / record['statements']:.2f}"]
                rows.append([*row, f"{each[0]:.2f} to {each[1]:.2f}", f"{dense / value:.2f}x"])
        header = ["model", "dtype", "batch", "GFLOPs per statement", "ms per statement", "middle half"]
        parts.append(markdown([*header, "over dense"], rows))
        where = f"{environment['device']}, {environment['threads']} threads, torch {environment['torch']}"
        parts.append(
            f"{where}, revision {environment['commit']}. Made by `python experiments/shapes/measure.py "
            f"--models DENSE PRUNED...`: medians of {content['records'][0]['rounds']} rounds over all models."
        )
    return "\n\n".join(["![Accuracy against time](PLOT-accuracy-time.png)", *parts]) if parts else NOTHING


NOTHING = "Not recorded yet."


def table(header: list[str], rows: list[list[str]], *rest: str) -> str:
    return "\n\n".join([markdown(header, rows), *rest]) if rows else NOTHING


TABLES = {
    make.__name__: make for make in (overall, baselines, levers, large, anatomy, templates, calibrated, tokens, timing)
}


def fill(text: str, tables: dict[str, str]) -> str:
    """The text with new tables.

    Raises:
        Refused: a table without a place, or a place without a table.
    """
    places = re.findall(r"<!-- table: (\S+) -->\n.*?<!-- end -->", text, re.DOTALL)
    if sorted(places) != sorted(tables):
        found = ", ".join(places) or "none"
        raise Refused(f"expected places for the tables {', '.join(tables)}; found {found}")
    return re.sub(
        r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}\n{tables[match[2]]}\n\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


# ---- plots -------------------------------------------------------------------------------------------------


def figure(width: float, height: float):
    """A figure without pyplot, which wants a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def apart(places: Sequence[float], least: float) -> list[float]:
    """The same places, ascending, moved as little as need be to lie `least` from one another."""
    blocks: list[list[float]] = []  # [sum of (place - rank within), count]: neighbours that touch
    for place in places:
        blocks.append([place, 1])
        while len(blocks) > 1:
            (below, size), (above, more) = blocks[-2:]
            if below / size + size * least <= above / more:
                break
            blocks[-2:] = [[below + above - more * size * least, size + more]]
    return [total / size + rank * least for total, size in blocks for rank in range(int(size))]


def accuracy_plot(results: Results):
    """Accuracy against GFLOPs: a line per method through the means, every seed as a small point."""
    drawn = figure(7, 4.6)
    axes = drawn.subplots()
    by_name: dict[str, list[Group]] = defaultdict(list)
    for group in [*results.groups, *results.calibrated]:
        name = METHODS.get(group.method, CALIBRATED_STYLE).name
        # Of a method's groups at the same reduction, the longer ones stand alone.
        shortest = min(
            (one.steps for one in results.at(group.reduction) if one.method == group.method), default=group.steps
        )
        by_name[name if group.steps == shortest else f"{name}, {group.steps} steps"].append(group)
    names = []  # (x, y, text, colour) of each line's left end
    for name, groups in by_name.items():
        style = METHODS.get(groups[0].method, CALIBRATED_STYLE)
        groups.sort(key=lambda group: group.cost)
        x, y = [group.cost for group in groups], [100 * group.accuracy for group in groups]
        axes.plot(x, y, style.marker + "-", color=style.colour, markersize=6, linewidth=1.6, zorder=3)
        for group in groups:
            if len(group.records) > 1:
                seeds = [100 * value for value in group.accuracies]
                costs = [record.cost for record in group.records]
                axes.plot(costs, seeds, ".", color=style.colour, markersize=5, alpha=0.5, zorder=2)
        names.append((x[0], y[0], name, style.colour))
    if maximum := results.maximum:
        place = (maximum.cost, 100 * maximum.accuracy)
        axes.plot(*place, "o", mec=MAXIMUM_STYLE.colour, mfc="white", markersize=7, zorder=4)
        axes.annotate(
            MAXIMUM_STYLE.name, place, (8, -4), textcoords="offset points", va="top",
            fontsize=8, color=MAXIMUM_STYLE.colour, bbox=PAPER,
        )  # fmt: skip
    if dense := results.dense:
        axes.axhline(100 * dense.accuracy, color=DENSE, linestyle=":", linewidth=1)
        axes.annotate(
            f"dense {percent(dense.accuracy)}", (1, 100 * dense.accuracy), (-22, 3),
            xycoords=("axes fraction", "data"), textcoords="offset points", ha="right", fontsize=8.5,
        )  # fmt: skip
        if cost := dense.cost:
            axes.plot(cost, 100 * dense.accuracy, "*", color=DENSE, markersize=11, zorder=4)
            saved = (lambda x: 100 * (1 - x / cost), lambda y: cost * (1 - y / 100))
            above = axes.secondary_xaxis("top", functions=saved)
            above.set_xticks(range(0, 100, 10))
            above.set_xlabel("fewer GFLOPs than dense, %")
            above.spines["top"].set_visible(False)
    # Room for the names on the left, where there are no GFLOPs.
    axes.set_xlim(-2 * min((x for x, *_ in names), default=0.0), None)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick < axes.get_xlim()[1]])
    low = min(100 * record.accuracy for record in results.records.values())
    axes.set_ylim(max(0, min(low - 4, 90)), 100.5)
    name_lines(axes, names)
    axes.set_xlabel("GFLOPs per statement, official count")
    axes.set_ylabel("test accuracy, %")
    tidy(axes)
    return drawn


def name_lines(axes, names: list[tuple[float, float, str, str]]) -> None:
    """Names of lines left of their left ends where that is the leftmost cost, else below them."""
    if not names:
        return
    leftmost = min(x for x, *_ in names)
    left = sorted((name for name in names if name[0] < 1.4 * leftmost), key=lambda name: name[1])
    span = axes.get_ylim()[1] - axes.get_ylim()[0]
    heights = apart([y for _, y, _, _ in left], 0.045 * span)
    for (x, y, text, colour), height in zip(left, heights, strict=True):
        axes.annotate(
            text, (x, y), (0.9 * leftmost, height), ha="right", va="center", fontsize=8, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4},
        )  # fmt: skip
    for x, y, text, colour in names:
        if x >= 1.4 * leftmost:
            axes.annotate(
                text, (x, y), (0, -9), textcoords="offset points", ha="center", va="top",
                fontsize=8, color=colour,
            )  # fmt: skip


def time_plot(results: Results):
    """Accuracy against the time of a statement, one panel per device, dtype and batch size."""
    panels = [(content["environment"], record) for content in results.timings for record in content["records"]]
    across = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // across)
    drawn = figure(4.2 * across + 0.4, 3.7 * rows)
    all_axes = drawn.subplots(rows, across, squeeze=False, sharey=True).flatten()
    for axes in all_axes[len(panels) :]:
        axes.remove()
    for axes, (environment, record) in zip(all_axes, panels, strict=False):
        lines: dict[str, list[tuple]] = defaultdict(list)
        for name, value in record["milliseconds"].items():
            model, _, maximum = name.partition(", ")
            where = results.records.get(model)
            if name == record["subject"]:
                where = results.dense
            elif maximum:
                where = results.maximum if NAMED.get(model) == BATCH_MAXIMUM else None
            if where is None:
                continue
            scale = 1 / record["statements"]
            low, high = (scale * each for each in record["quartile_milliseconds"][name])
            time = scale * value
            point = (time, 100 * where.accuracy, time - low, high - time, NAMED.get(model))
            key = "dense" if name == record["subject"] else "batch maximum" if maximum else NAMED[model].method
            lines[key].append(point)
        for key, points in lines.items():
            points.sort()
            style = METHODS.get(key, MAXIMUM_STYLE)
            colour = DENSE if key == "dense" else style.colour
            x, y, before, after, models = zip(*points, strict=True)
            marker = {"dense": "*", "batch maximum": "o"}.get(key, style.marker)
            fill = "white" if key == "batch maximum" else colour
            axes.errorbar(
                x, y, xerr=(before, after), fmt=marker + "-", color=colour, mfc=fill, elinewidth=1, zorder=3,
                markersize=10 if key == "dense" else 6,
            )  # fmt: skip
            for place, height, model in zip(x, y, models, strict=True):
                if key in (BEST, PLAIN):
                    axes.annotate(
                        whole(model.reduction), (place, height), (-5, 4), textcoords="offset points",
                        ha="right", fontsize=8, color=colour,
                    )  # fmt: skip
            beside = {"xytext": (9, 0), "ha": "left", "va": "center"}
            below = {"xytext": (0, -9), "ha": "center", "va": "top"}
            axes.annotate(
                "dense" if key == "dense" else style.name, (x[0], y[0]), textcoords="offset points",
                fontsize=8, color=colour, bbox=PAPER, zorder=5,
                **(beside if key == "batch maximum" else below),
            )  # fmt: skip
        axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
        axes.set_title(f"{environment['device']}, {record['dtype']}, batch {record['batch']}", fontsize=9)
        axes.set_xlabel("ms per statement")
        tidy(axes)
    low, high = all_axes[0].get_ylim()
    all_axes[0].set_ylim(low - 0.12 * (high - low), min(high + 0.06 * (high - low), 100.5))
    for axes in all_axes[::across][:rows]:
        axes.set_ylabel("test accuracy, %")
    return drawn


def template_plot(results: Results):
    """Accuracy by template: a row each, a marker per model."""
    drawn = figure(7.5, 5.2)
    axes = drawn.subplots()
    keys = [*TEMPLATES, *KINDS]
    rows = {key: -(row + (row >= len(TEMPLATES)) * 0.7) for row, key in enumerate(keys)}
    strongest = max((group.reduction for group in results.groups), default=0.0)
    shown = [group for group in results.groups if group.reduction == strongest]
    shown += [group for group in results.at(0.5) if group.method in (BEST, PLAIN) and strongest != 0.5]
    for row in rows.values():
        axes.axhline(row, color="0.9", linewidth=0.8, zorder=1)
    if dense := results.dense:
        values = [100 * dense.test["accuracy"][key] for key in keys]
        axes.plot(values, rows.values(), "|", color=DENSE, markersize=13, mew=2, label="dense", zorder=3)
    for group in shown:
        style = METHODS[group.method]
        values = [100 * group.on(key) for key in keys]
        options = {"mfc": "white"} if group.reduction != strongest else {}
        axes.plot(
            values, rows.values(), style.marker, color=style.colour, markersize=7, zorder=4,
            label=f"{METHODS[group.method].name}, {whole(group.reduction)}", **options,
        )  # fmt: skip
    axes.set_yticks(list(rows.values()), keys)
    axes.set_xlim(None, 101)
    axes.set_xlabel("test accuracy, %")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    drawn.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    return drawn


# ---- command line ------------------------------------------------------------------------------------------


def write(results: Results, output: Path) -> list[Path]:
    """Write the report and, as far as there is something to draw, its plots; returns their paths.

    Raises:
        Refused: the file has no place for a table.
        OSError: it cannot be written.
    """
    text = output.read_text(encoding="utf-8") if output.exists() else SKELETON
    tables = {name: make(results).replace("PLOT", output.stem) for name, make in TABLES.items()}
    text = fill(text, tables)
    output.parent.mkdir(parents=True, exist_ok=True)
    plots = []
    if results.groups:
        plots += [("accuracy-gflops", accuracy_plot), ("templates", template_plot)]
    if results.timings:
        plots.append(("accuracy-time", time_plot))
    written = []
    for name, draw in plots:
        written.append(output.with_name(f"{output.stem}-{name}.png"))
        save_png(draw(results), written[-1])
    output.write_text(text, encoding="utf-8")
    return [*written, output]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=SHAPES / "results", help="folder of records")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md", help="Markdown file")
    args = parser.parse_args()
    try:
        written = write(collect(args.results), args.output)
    except (Refused, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print("wrote " + ", ".join(str(path) for path in written))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
