"""Accuracy over trained parameters and over latency, drawn with Matplotlib objects, without global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from prompttune.benchmark.latency import MethodLatency
from prompttune.benchmark.summary import ResultsTable
from prompttune.evaluation.plots import save_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

DOTS = "#3b6ea5"
DOT_RADIUS = 4
"""Radius in pixels."""
Corner = tuple[int, int, Literal["left", "right"], Literal["bottom", "top"]]
"""Possible place of a label: offset in points, alignment."""
CORNERS: tuple[Corner, ...] = (
    (5, 4, "left", "bottom"),
    (-5, 4, "right", "bottom"),
    (5, -4, "left", "top"),
    (-5, -4, "right", "top"),
)
Point = tuple[str, float, float | None, float | None]
"""Label, horizontal position, mean and deviation, the last two as shares."""


def plot_summary(path: Path, summary: ResultsTable, latencies: Sequence[MethodLatency]) -> bool:
    """Draw the mean accuracy of each method into a PNG file; return whether there was anything to draw.

    The left plot is over the trained parameters, including the head; the right one over the time of a forward relative
    to the plain backbone. A method that misses a task does not have a mean and is left out.
    """
    lines = [line for line in summary.lines if line.mean is not None]
    if not lines:
        return False
    over = {one.label: one.over_backbone for one in latencies}
    trained: list[Point] = [(line.label, line.trainable_parameters, line.mean, line.deviation) for line in lines]
    timed: list[Point] = [
        (label, over[label], mean, deviation) for label, _, mean, deviation in trained if label in over
    ]
    panels = [points for points in (trained, timed) if points]
    figure = Figure(figsize=(12, 5) if timed else (6.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(summary.title)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, points in zip(row, panels, strict=True):
        _scatter(axes, points)
    row[0].set(xscale="log", xlabel="trained parameters, head included", ylabel="mean top-1 (%)")
    if timed:
        row[1].set(xlabel=f"time of a forward over the plain backbone's (PyTorch, batch {latencies[0].batch})")
    figure.draw_without_rendering()  # the layout places the points, which the labels need
    for axes, points in zip(row, panels, strict=True):
        _name(axes, points)
    save_png(figure, path)
    return True


def _scatter(axes: Axes, points: Sequence[Point]) -> None:
    for _, x, mean, deviation in points:
        y = (mean or 0.0) * 100
        axes.errorbar(x, y, yerr=None if deviation is None else deviation * 100, color=DOTS, marker="o", capsize=2)
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Write each point's label at the first of its corners that is free of other labels and points."""
    places = [(x, (mean or 0.0) * 100) for _, x, mean, _ in points]
    centres = axes.transData.transform(places)
    taken = [Bbox.from_bounds(x - DOT_RADIUS, y - DOT_RADIUS, 2 * DOT_RADIUS, 2 * DOT_RADIUS) for x, y in centres]
    for (label, *_), place in zip(points, places, strict=True):
        for corner in CORNERS:
            text = _write(axes, label, place, corner)
            if not any(text.get_window_extent().overlaps(other) for other in taken):
                break
            text.remove()
        else:
            text = _write(axes, label, place, CORNERS[0])
        taken.append(text.get_window_extent())


def _write(axes: Axes, label: str, place: tuple[float, float], corner: Corner) -> Annotation:
    across, up, horizontal, vertical = corner
    return axes.annotate(
        label, place, xytext=(across, up), textcoords="offset points", fontsize=9, ha=horizontal, va=vertical
    )
