"""Plots of an evaluation: quality against cost, and tokens per layer. They need matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..files import replacing

__all__ = ["name_of", "quality_plot", "require_matplotlib", "save_png", "strength_of", "tokens_plot"]


def require_matplotlib():
    """matplotlib's figures. Raises ImportError: it is not installed."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which keeps figures and wants a display
    except ImportError as error:
        raise ImportError("plots need the package matplotlib: pip install 'madtp[plot]'") from error
    return Figure


def name_of(result: dict) -> str:
    """How a result of an evaluation is labelled."""
    strength = strength_of(result)
    if not strength:
        return "dense"
    return f"T = {strength:g}" if "temperature" in result else f"{result['method']} {strength:g}"


def strength_of(result: dict) -> float:
    """The strength of pruning of a result; MADTP's is its temperature."""
    return result["temperature"] if "temperature" in result else result["strength"]


def quality_plot(results: Sequence[dict], metric: str, unit: str):
    """A matplotlib figure of a metric against GFLOPs, official and full, one point per strength.

    Args:
        results: figures as :func:`madtp.evaluate.figures.figures` gives them, with "temperature" or "strength".
        metric: a key of their "quality".
        unit: what one instance is.

    Raises:
        ImportError: matplotlib is not installed.
        KeyError: a result without this metric.
    """
    figure = require_matplotlib()(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    results = sorted(results, key=lambda result: result["gflops"])
    quality = [result["quality"][metric] for result in results]
    for key, style, label in (("gflops", "o-", "official count"), ("gflops_full", "s--", "full count")):
        axes.plot([result[key] for result in results], quality, style, label=label)
    axes.margins(x=0.08, y=0.25)
    axes.set_xlim(left=0)
    _label(axes, [(name_of(result), result["gflops"], result["quality"][metric]) for result in results])
    axes.set_xlabel(f"GFLOPs per {unit}")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _label(axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside points, each at the first place around its point where no other name is."""
    taken: list[tuple[float, float, float]] = []
    scale = 72 / axes.figure.dpi
    for name, *place in points:
        x, y = (scale * pixels for pixels in axes.transData.transform(place))
        width = 5 * len(name)
        for right, up in ((-6, 6), (6 + width, -12), (-6, -12), (6 + width, 6), (-6, 18), (6 + width, -24), (-6, 30)):
            end, base = x + right, y + up
            if all(abs(base - b) > 10 or end - width > e or e - w > end for e, b, w in taken):
                break
        taken.append((end, base, width))
        axes.annotate(name, place, xytext=(right, up), textcoords="offset points", ha="right", fontsize=8)


def tokens_plot(results: Sequence[dict]):
    """A matplotlib figure of the tokens after each layer, one panel per stream: mean, and a band from least
    to most.

    `results` as in :func:`quality_plot`. Raises ImportError: matplotlib is not installed.
    """
    streams = list(results[0]["tokens"])
    figure = require_matplotlib()(figsize=(5 * len(streams), 4), layout="constrained")
    for axes, stream in zip(figure.subplots(1, len(streams), squeeze=False)[0], streams, strict=True):
        for result in results:
            layers = result["tokens"][stream]
            (line,) = axes.plot([layer["mean"] for layer in layers], "o-", markersize=3, label=name_of(result))
            band = ([layer[key] for layer in layers] for key in ("min", "max"))
            axes.fill_between(range(len(layers)), *band, alpha=0.2, color=line.get_color(), linewidth=0)
        axes.set_title(stream)
        axes.set_xlabel("layer (0: input)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("tokens: mean, least to most")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def save_png(figure, path: str | os.PathLike) -> None:
    """Write a figure, complete or not at all. Raises OSError."""
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)
