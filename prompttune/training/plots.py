"""Pictures of a run: training curves, drawn with Matplotlib objects, without global state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prompttune.evaluation.plots import save_png
from prompttune.task_types import Measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, VALIDATION = "#3b6ea5", "#c8553d"


def plot_curves(path: Path, history: Sequence[dict[str, Any]], measures: Measures) -> None:
    """Draw loss, accuracy and learning rate over the epochs into a PNG file."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    _curve(loss, history, "train_loss", "training", TRAIN)
    _curve(loss, history, "val_loss", "validation", VALIDATION)
    loss.set(title="loss", ylim=(0, None))
    names = ("training", "validation")
    if measures.score_title != measures.train_title:
        names = (f"training, {measures.train_title}", f"validation, {measures.score_title}")
    _curve(accuracy, history, f"train_{measures.train}", names[0], TRAIN, scale=100)
    _curve(accuracy, history, f"val_{measures.score}", names[1], VALIDATION, scale=100)
    accuracy.set(title=f"{measures.score_title} (%)")
    if names != ("training", "validation"):
        accuracy.legend(frameon=False)
    _curve(rate, history, "lr", "at the end of the epoch", TRAIN)
    rate.set(title="learning rate")
    rate.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    loss.legend(frameon=False)
    save_png(figure, path)


def _curve(
    axes: Axes, history: Sequence[dict[str, Any]], key: str, label: str, colour: str, scale: float = 1.0
) -> None:
    points = [(record["epoch"], record[key] * scale) for record in history if record[key] is not None]
    if points:
        epochs, values = zip(*points, strict=True)
        axes.plot(epochs, values, label=label, color=colour, marker="o" if len(points) <= 30 else None, markersize=3)
