"""Accuracy over trained parameters and over latency. Matplotlib's objects alone, no global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prompttune.evaluation.plots import save_png
from prompttune.protocols.latency import Latency
from prompttune.protocols.summary import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS = "#3b6ea5"


def plot_summary(path: Path, summary: Summary, latencies: Sequence[Latency]) -> bool:
    """Draw the mean accuracy of each method into a PNG file; whether there was anything to draw.

    Left over the trained parameters, head included; right over the time of a forward as a ratio to the plain backbone.
    A method that misses a task has no mean and is left out.
    """
    lines = [line for line in summary.lines if line.mean is not None]
    if not lines:
        return False
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(summary.title)
    left, right = figure.subplots(1, 2, sharey=True)
    _scatter(left, [(line.label, line.trainable, line.mean, line.deviation) for line in lines])
    left.set(xscale="log", xlabel="trained parameters, head included", ylabel="mean top-1 (%)")
    over = {one.label: one.over_backbone for one in latencies}
    timed = [(line.label, over[line.label], line.mean, line.deviation) for line in lines if line.label in over]
    _scatter(right, timed)
    batch = f", batch {latencies[0].batch}" if latencies else ""
    right.set(xlabel=f"time of a forward over the plain backbone's (PyTorch{batch})")
    save_png(figure, path)
    return True


def _scatter(axes: Axes, points: Sequence[tuple[str, float, float | None, float | None]]) -> None:
    for label, x, mean, deviation in points:
        y = (mean or 0.0) * 100
        axes.errorbar(x, y, yerr=None if deviation is None else deviation * 100, color=DOTS, marker="o", capsize=2)
        axes.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=9)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
