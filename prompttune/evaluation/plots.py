"""Pictures of an evaluation: confusion matrix and reliability, drawn with Matplotlib objects, without global state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from prompttune.evaluation.result import Counts, Evaluation, row_shares, worst_cells
from prompttune.files import replacing
from prompttune.fonts import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

NUMBERED_CLASSES = 20
"""Largest number of classes whose confusion matrix shows a number in each cell."""
NAMED_CLASSES = 40
"""Largest number of classes whose names are all on the axes; with more, evenly spread ones are shown."""
WORST_PAIRS = 20
DPI = 120
_LIST_WIDTH = 6.5
"""Width of the list of pairs, in inches."""
BARS, GAP = "#3b6ea5", "#c8553d"


def confusion_figure(evaluation: Evaluation) -> Figure:
    """The confusion matrix, each row divided by the images of its class; see :func:`draw_confusion`."""
    return draw_confusion(evaluation.confusion, evaluation.labels, evaluation.not_finite)


def draw_confusion(
    confusion: Counts, labels: Sequence[str], not_finite: Counts | None = None, unit: str = "images"
) -> Figure:
    """Draw a confusion matrix, each row divided by the number of images of its class.

    A small matrix shows numbers in its cells. A large one shows the numbers and names of some classes on its axes, and
    a list of the most confused pairs beside it.

    Args:
        confusion: counts [C, C], true class by predicted class.
        labels: names of the C classes.
        not_finite: images of each class [C] that are in no column; None for zero.
        unit: name of what is counted.
    """
    classes = len(labels)
    many = classes > NAMED_CLASSES
    support = confusion.sum(axis=1) + (0 if not_finite is None else not_finite)
    side = min(max(4.0, 2.0 + 0.42 * classes), 11.0)
    figure = _figure(side + (_LIST_WIDTH if many else 1.2), side + (1.0 if many else 0.0))
    axes, text = figure.subplots(1, 2, width_ratios=(side, _LIST_WIDTH)) if many else (figure.subplots(), None)
    share = row_shares(confusion, support)
    image = axes.imshow(share * 100, vmin=0, vmax=100, cmap="Blues", interpolation="nearest")
    axes.set(xlabel="predicted class", ylabel="true class", title=_title(confusion, int(support.sum()), unit))
    _name_axes(axes, labels)
    if classes <= NUMBERED_CLASSES:
        _write_numbers(axes, share)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    if text is not None:
        _list_pairs(text, confusion, support, labels)
    return figure


def _title(confusion: Counts, total: int, unit: str) -> str:
    return f"top-1 {np.trace(confusion) / max(total, 1):.2%} of {total} {unit}"


def _name_axes(axes: Axes, labels: Sequence[str]) -> None:
    classes = len(labels)
    places = range(0, classes, math.ceil(classes / NAMED_CLASSES))
    if classes <= NAMED_CLASSES:
        names = [_shortened(label) for label in labels]
    else:
        names = [f"{_shortened(labels[place], 14)} ({place})" for place in places]
    axes.set_xticks(places, names, rotation=90 if max(map(len, names)) > 3 else 0, parse_math=False)
    axes.set_yticks(places, names, parse_math=False)
    axes.tick_params(labelsize=9)


def _write_numbers(axes: Axes, share: NDArray[np.float64]) -> None:
    for row, column in np.argwhere(share > 0):
        value = share[row, column]
        axes.text(
            column,
            row,
            f"{value * 100:.0f}" if value >= 0.005 else "<1",
            ha="center",
            va="center",
            fontsize=max(7.0, 13.0 - 0.4 * len(share)),
            color="white" if value > 0.5 else "black",
        )


def _list_pairs(axes: Axes, confusion: Counts, support: Counts, labels: Sequence[str]) -> None:
    lines = [
        f"{share:4.0%}  {_shortened(labels[row])} ({row}) as {_shortened(labels[column])} ({column})"
        f", {confusion[row, column]}"
        for row, column, share in worst_cells(confusion, support, WORST_PAIRS)
    ]
    axes.axis("off")
    head = "confused most (true as predicted, images):" if lines else "no class is confused with another"
    text = "\n".join([head, "", *lines])
    shown = axes.text(0, 1, text, va="top", fontsize=9, transform=axes.transAxes, parse_math=False)
    shown.set_in_layout(False)  # otherwise it takes its room from the matrix


def _shortened(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def reliability_figure(evaluation: Evaluation) -> Figure:
    """Accuracy over confidence in bins, the gap between both, and the number of images in each bin."""
    calibration = evaluation.calibration
    bins, filled = len(calibration.counts), calibration.counts > 0
    counts = np.maximum(calibration.counts, 1)
    accuracy, confidence = calibration.correct / counts, calibration.confidence / counts
    low, width = np.arange(bins) / bins, 1 / bins
    figure = _figure(5.2, 5.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(low[filled], accuracy[filled], width, align="edge", color=BARS, edgecolor="white", label="accuracy")
    upper.bar(
        low[filled],
        (confidence - accuracy)[filled],
        width,
        bottom=accuracy[filled],
        align="edge",
        color="none",
        edgecolor=GAP,
        hatch="///",
        linewidth=0.8,
        label="gap to the confidence",
    )
    upper.plot([0, 1], [0, 1], color="black", alpha=0.5, linewidth=0.9, linestyle="--")
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=_reliability_title(evaluation))
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    shares = calibration.counts / max(int(calibration.counts.sum()), 1)
    lower.bar(low, shares, width, align="edge", color=BARS, edgecolor="white")
    lower.set(xlabel="confidence", ylabel="images")
    lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _reliability_title(evaluation: Evaluation) -> str:
    ece, images = evaluation.ece, int(evaluation.calibration.counts.sum())
    return "no answer has a confidence" if ece is None else f"ECE {ece:.2%} of {images} images"


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file, atomically."""
    with replacing(path) as temporary, readable(figure):
        figure.savefig(temporary, format="png", dpi=DPI)


def png_bytes(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    with readable(figure):
        figure.savefig(stream, format="png", dpi=DPI)
    return stream.getvalue()
