"""Plots of a parity report as SVG text that is embedded in a page and uses the page's text colour."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prompttune.export.parity.bisection import Bisection
from prompttune.export.parity.figures import Array

POINTS = 4000
"""Largest number of dots in a scatter plot; more would hide each other."""
DPI = 200
"""Resolution of the dots, which are a raster picture inside the SVG."""
DOTS, LIMIT = "#3d7fd0", "#d2483c"
_INK = "#010203"
"""Placeholder for the page's text colour, which only the page knows: replaced by ``currentColor``."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prompttune",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
}


def scatter(pairs: Array) -> str:
    """Logits of the engine over those of the reference, ``pairs`` [2, n]; equal ones lie on the diagonal."""
    shown = _finite(pairs)
    shown = shown[:, np.linspace(0, shown.shape[1] - 1, min(POINTS, shown.shape[1])).astype(int)]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.6, 3.2)
        if shown.size:
            ends = [float(shown.min()), float(shown.max())]
            axes.plot(ends, ends, color=_INK, alpha=0.4, linewidth=0.8)
            axes.scatter(shown[0], shown[1], s=7, color=DOTS, alpha=0.6, linewidths=0, rasterized=True)
        axes.set(xlabel="logit of the reference", ylabel="logit of the engine", title="logits")
        return _svg(figure)


def histogram(pairs: Array, atol: float | None) -> str:
    """Histogram of the absolute differences in ``pairs`` [2, n], over their order of magnitude."""
    expected, found = _finite(pairs).astype(np.float64)
    differences = np.abs(expected - found)
    apart = differences[differences > 0]
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(3.6, 3.2)
        if len(apart):
            low, high = np.floor(np.log10(apart.min())), np.ceil(np.log10(apart.max()) + 1e-9)
            axes.hist(apart, bins=np.logspace(low, high, 41).tolist(), color=DOTS)
            axes.set_xscale("log")
        if atol:
            axes.axvline(atol, color=LIMIT, linewidth=1.2, label=f"allowed {atol:g}")
            axes.legend(frameon=False)
        equal = f"; {len(differences) - len(apart):,} are equal" if len(apart) < len(differences) else ""
        axes.set(xlabel="|Δ| of a logit", ylabel="logits", title=f"differences{equal}")
        return _svg(figure)


def divergence(bisection: Bisection) -> str:
    """Relative difference of each intermediate result in the order of the computation."""
    names = [one.name for one in bisection.probes]
    values = np.array([one.relative for one in bisection.probes])
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(7.6, 3.2)
        shown = np.isfinite(values) & (values > 0)  # a logarithm cannot show 0 and NaN
        places = np.arange(len(names))
        axes.plot(places[shown], values[shown], color=DOTS, marker="o", markersize=4, linewidth=1)
        axes.axhline(bisection.tolerance, color=LIMIT, linewidth=1.2, label=f"tolerance {bisection.tolerance:g}")
        if bisection.first is not None:
            axes.axvline(names.index(bisection.first), color=LIMIT, linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_xticks(places, names, rotation=90, fontsize=8)
        axes.set(ylabel="‖Δ‖ / ‖PyTorch‖", title="intermediate results")
        axes.legend(frameon=False)
        return _svg(figure)


def _finite(pairs: Array) -> Array:
    return pairs[:, np.isfinite(pairs).all(axis=0)]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    axes.grid()
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Only the ``<svg>`` element, without prolog and metadata."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", dpi=DPI, metadata=nothing)
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(_INK, "currentColor")
