"""Pictures of an explanation, drawn with Matplotlib objects without global state, over what the model sees."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prompttune.explanation.embedding import Embedding
from prompttune.fonts import readable

Pixels = NDArray[np.float32]
"""RGB in [0, 1], [height, width, 3]."""
DPI = 120
PANEL = 1.45
"""Side of a map, in inches."""
HEAT = "inferno"
BRIGHTEST = 0.995
"""Quantile of a map that gets the brightest colour; without it a few tokens of very high norm would darken the rest."""
GREY = "#5c6670"
CAM_COLUMNS = 6
LEGEND_CLASSES = 20
"""Largest number of classes for which the t-SNE plot has a legend."""


@dataclass(frozen=True, eq=False)
class Row:
    """Maps of one subject, or of one head."""

    name: str
    view: Pixels
    maps: Mapping[int, Tensor]
    """Map of each layer, [R, C]."""


def overlay(view: Pixels, heat: Tensor) -> Pixels:
    """Lay a map over a picture: its lowest value is dark and grey, its highest is bright and in colour.

    Args:
        view: [height, width, 3].
        heat: [R, C], any range; a constant map leaves the picture dark.
    """
    height, width = view.shape[:2]
    large = F.interpolate(heat[None, None].float(), (height, width), mode="bicubic", align_corners=False)[0, 0].numpy()
    low, high = float(heat.min()), float(torch.quantile(heat.float().flatten(), BRIGHTEST))
    strength = np.clip((large - low) / (high - low), 0, 1)[..., None] if high > low else np.zeros((height, width, 1))
    grey = view @ np.array([0.299, 0.587, 0.114], dtype=view.dtype)
    dim = 0.25 * view + 0.4 * grey[..., None]
    colour = colormaps[HEAT](strength[..., 0])[..., :3]
    share = 0.85 * strength**0.7
    mixed: Pixels = np.clip((1 - share) * dim + share * (0.75 * colour + 0.45 * view), 0, 1).astype(np.float32)
    return mixed


def maps_figure(rows: Sequence[Row], layers: Sequence[int], title: str) -> Figure:
    """One row per subject: the picture, then the map of each layer over it; each map has its own scale."""
    figure, axes = _panels(len(rows), len(layers) + 1)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row.view)
        _side_label(line[0], row.name)
        for panel, layer in zip(line[1:], layers, strict=True):
            if layer in row.maps:
                panel.imshow(overlay(row.view, row.maps[layer]))
            else:
                panel.set_visible(False)
    for panel, layer in zip(axes[0][1:], layers, strict=True):
        panel.set_title(f"layer {layer}", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure


@dataclass(frozen=True, eq=False)
class CamPanel:
    """Grad-CAM of one run."""

    name: str
    caption: str
    view: Pixels
    heat: Tensor
    """[R, C]."""


def cam_figure(panels: Sequence[CamPanel], title: str) -> Figure:
    """The picture, then each run's map with its answer."""
    columns = min(len(panels) + 1, CAM_COLUMNS)
    rows = -(-(len(panels) + 1) // columns)
    figure, lines = _panels(rows, columns, side=2.1, head=0.25 + 0.4 * rows)
    axes = [axis for line in lines for axis in line]
    axes[0].imshow(panels[0].view)
    for panel, axis in zip(panels, axes[1:], strict=False):
        axis.imshow(overlay(panel.view, panel.heat))
        axis.set_title(f"{panel.name}\n{panel.caption}", fontsize=9, parse_math=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure


@dataclass(frozen=True, eq=False)
class SimilarityRow:
    """Cosine similarities of one run, with all layers on one scale."""

    name: str
    view: Pixels
    token: tuple[int, int]
    """Row and column of the image token, in the grid of the first map."""
    maps: Mapping[int, Tensor]


def similarity_figure(rows: Sequence[SimilarityRow], layers: Sequence[int], title: str) -> Figure:
    """One row per run: the picture with the token framed, then its cosine with every prompt token by layer."""
    figure, axes = _panels(len(rows), len(layers) + 1, extra=0.9)
    for line, row in zip(axes, rows, strict=True):
        grid = next(iter(row.maps.values())).shape
        line[0].imshow(row.view, extent=(-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5), aspect="auto")
        _frame(line[0], row.token)
        _side_label(line[0], row.name)
        low = min(float(one.min()) for one in row.maps.values())
        high = max(float(one.max()) for one in row.maps.values())
        drawn = None
        for panel, layer in zip(line[1:], layers, strict=True):
            if layer not in row.maps:
                panel.set_visible(False)
                continue
            drawn = panel.imshow(row.maps[layer].numpy(), vmin=low, vmax=high, cmap="viridis", aspect="auto")
            if tuple(row.maps[layer].shape) == tuple(grid):
                _frame(panel, row.token)
        assert drawn is not None
        figure.colorbar(drawn, ax=line, label="cosine", fraction=0.02, pad=0.01)
    for panel, layer in zip(axes[0][1:], layers, strict=True):
        panel.set_title(f"layer {layer}", fontsize=9)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    return figure


def shares_figure(shares: Mapping[str, Mapping[int, float]]) -> Figure:
    """The share of the attention to prompts by layer, one line per run."""
    figure = _figure(6.0, 3.2)
    axes = figure.subplots()
    for name, values in shares.items():
        axes.plot(list(values), [100 * value for value in values.values()], marker="o", markersize=4, label=name)
    axes.set(xlabel="layer", ylabel="% of the attention on prompts")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({layer for values in shares.values() for layer in values}))
    _plain(axes)
    _legend(axes)
    return figure


def values_figure(values: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> Figure:
    """Learned values by block: one plot per quantity, one bar per run.

    Args:
        values: one value per block, by quantity and run.
    """
    figure = _figure(6.0, 2.6 * len(values))
    for axes, (quantity, runs) in zip(
        figure.subplots(len(values), 1, squeeze=False)[:, 0], values.items(), strict=True
    ):
        width = 0.8 / len(runs)
        for place, (name, blocks) in enumerate(runs.items()):
            left = np.arange(len(blocks)) + (place - (len(runs) - 1) / 2) * width
            axes.bar(left, blocks, width, label=name)
        axes.set_xticks(range(max(map(len, runs.values()))))
        axes.set(xlabel="block", ylabel=quantity)
        _plain(axes)
        _legend(axes)
    return figure


def embedding_figure(embeddings: Sequence[Embedding]) -> Figure:
    """t-SNE of each subject side by side, with the same colours for the classes."""
    classes = embeddings[0].classes
    named = len(classes) <= LEGEND_CLASSES
    columns = min(len(embeddings), 3)
    rows = -(-len(embeddings) // columns)
    figure = _figure(3.1 * columns + (1.5 if named else 0.2), 3.3 * rows)
    colours = _class_colours(len(classes))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(embeddings) :]:
        axes.set_visible(False)
    for axes, one in zip(panels, embeddings, strict=False):
        for index, name in enumerate(classes):
            chosen = one.places[one.targets == index]
            axes.scatter(*chosen.T, s=11, color=colours[index], linewidths=0, alpha=0.85, label=_shortened(name))
        title = f"{one.name}\nnearest neighbour {one.nearest_accuracy:.1%}"
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("#c8ccd0")
    if named:
        handles, labels = panels[0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8, markerscale=2)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def compact_png(figure: Figure) -> bytes:
    """A figure as a PNG file of 256 colours, which is a third of the size without a visible difference."""
    stream = io.BytesIO()
    with readable(figure):
        figure.savefig(stream, format="png", dpi=DPI, facecolor="white")
    with Image.open(stream) as full:
        few = full.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    small = io.BytesIO()
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def _class_colours(count: int) -> list[tuple[float, float, float]]:
    if count <= 10:
        return [to_rgb(colour) for colour in colormaps["tab10"].colors[:count]]  # type: ignore[attr-defined]
    return [to_rgb(colormaps["turbo"](0.03 + 0.94 * index / (count - 1))) for index in range(count)]


def _shortened(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _panels(
    rows: int, columns: int, *, side: float = PANEL, extra: float = 0.0, head: float = 0.55
) -> tuple[Figure, list[list[Axes]]]:
    figure = _figure(side * columns + 0.35 + extra, side * rows + head)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flatten():
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure, [list(line) for line in axes]


def _side_label(axes: Axes, name: str) -> None:
    axes.set_ylabel(_shortened(name), fontsize=9, parse_math=False)


def _frame(axes: Axes, token: tuple[int, int]) -> None:
    row, column = token
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#ff3b30", linewidth=1.4))


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
