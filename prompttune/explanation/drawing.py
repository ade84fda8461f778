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
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prompttune.evaluation.plots import png_bytes
from prompttune.explanation.embedding import Embedding

Pixels = NDArray[np.float32]
"""RGB in [0, 1], [height, width, 3]."""
PANEL = 1.45
"""Side of a map, in inches."""
HEAT = "inferno"
BRIGHTEST = 0.995
"""Quantile of a map that gets the brightest colour; without it a few tokens of very high norm would darken the rest."""
CAM_COLUMNS = 6
LEGEND_CLASSES = 20
"""Largest number of classes for which the t-SNE plot has a legend."""


@dataclass(frozen=True, eq=False)
class MapRow:
    """Maps of one subject, or of one head."""

    name: str
    view: Pixels
    maps: Mapping[int, Tensor]
    """Map of each layer, [R, C]."""
    token: tuple[int, int] = (0, 0)
    """Row and column of the image token that the maps compare, in the grid of the first map."""


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


def maps_figure(rows: Sequence[MapRow], layers: Sequence[int], title: str) -> Figure:
    """One row per subject: the picture, then the map of each layer over it; each map has its own scale."""
    figure, axes = _layer_panels(rows, layers, title)
    for line, row in zip(axes, rows, strict=True):
        line[0].imshow(row.view)
        for panel, layer in zip(line[1:], layers, strict=True):
            if layer in row.maps:
                panel.imshow(overlay(row.view, row.maps[layer]))
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
    figure, lines = _panels(rows, columns, title, side=2.1, head=0.25 + 0.4 * rows)
    axes = [axis for line in lines for axis in line]
    axes[0].imshow(panels[0].view)
    for panel, axis in zip(panels, axes[1:], strict=False):
        axis.imshow(overlay(panel.view, panel.heat))
        axis.set_title(f"{panel.name}\n{panel.caption}", fontsize=9, parse_math=False)
    return figure


def similarity_figure(rows: Sequence[MapRow], layers: Sequence[int], title: str) -> Figure:
    """One row per run: the picture with the token framed, then its cosine with every prompt token by layer.

    All layers of a run have one scale.
    """
    figure, axes = _layer_panels(rows, layers, title, extra=0.9)
    for line, row in zip(axes, rows, strict=True):
        grid = next(iter(row.maps.values())).shape
        line[0].imshow(row.view, extent=(-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5), aspect="auto")
        _frame(line[0], row.token)
        scale = Normalize(
            min(float(one.min()) for one in row.maps.values()), max(float(one.max()) for one in row.maps.values())
        )
        for panel, layer in zip(line[1:], layers, strict=True):
            if layer in row.maps:
                panel.imshow(row.maps[layer].numpy(), norm=scale, cmap="viridis", aspect="auto")
                if row.maps[layer].shape == grid:
                    _frame(panel, row.token)
        figure.colorbar(ScalarMappable(scale, "viridis"), ax=line, label="cosine", fraction=0.02, pad=0.01)
    return figure


def values_figure(values: Mapping[str, Mapping[str, Mapping[int, float]]]) -> Figure:
    """Values by block: one plot per quantity, one line per run.

    Args:
        values: value of each block, by quantity and run.
    """
    figure = _figure(6.0, 3.0 * len(values))
    panels = figure.subplots(len(values), 1, squeeze=False)[:, 0]
    for axes, (quantity, runs) in zip(panels, values.items(), strict=True):
        for name, blocks in runs.items():
            axes.plot(list(blocks), list(blocks.values()), marker="o", markersize=4, label=name)
        axes.set_xticks(sorted({block for blocks in runs.values() for block in blocks}))
        axes.set(xlabel="layer", ylabel=quantity)
        axes.grid(alpha=0.3, axis="y")
        axes.spines[["top", "right"]].set_visible(False)
        for text in axes.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)
    return figure


def embedding_figure(embeddings: Sequence[Embedding]) -> Figure:
    """t-SNE of each subject side by side, with the same colours for the classes."""
    classes = embeddings[0].classes
    named = len(classes) <= LEGEND_CLASSES
    columns = min(len(embeddings), 3)
    rows = -(-len(embeddings) // columns)
    figure = _figure(3.1 * columns + (1.5 if named else 0.2), 3.3 * rows)
    colours = colormaps["tab10" if len(classes) <= 10 else "turbo"].resampled(max(len(classes), 10))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(embeddings) :]:
        axes.set_visible(False)
    for axes, one in zip(panels, embeddings, strict=False):
        for index, name in enumerate(classes):
            chosen = one.places[one.targets == index]
            axes.scatter(*chosen.T, s=11, color=colours(index), linewidths=0, alpha=0.85, label=_shortened(name))
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
    with Image.open(io.BytesIO(png_bytes(figure))) as full:
        few = full.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    small = io.BytesIO()
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def _shortened(name: str, limit: int = 22) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


def _panels(
    rows: int, columns: int, title: str, *, side: float = PANEL, extra: float = 0.0, head: float = 0.55
) -> tuple[Figure, list[list[Axes]]]:
    figure = _figure(side * columns + 0.35 + extra, side * rows + head)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel in axes.flatten():
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return figure, [list(line) for line in axes]


def _layer_panels(
    rows: Sequence[MapRow], layers: Sequence[int], title: str, extra: float = 0.0
) -> tuple[Figure, list[list[Axes]]]:
    """A row of panels for each of ``rows``: one for the picture, then one for each layer, hidden without a map."""
    figure, axes = _panels(len(rows), len(layers) + 1, title, extra=extra)
    for line, row in zip(axes, rows, strict=True):
        line[0].set_ylabel(_shortened(row.name), fontsize=9, parse_math=False)
        for panel, layer in zip(line[1:], layers, strict=True):
            panel.set_visible(layer in row.maps)
    for panel, layer in zip(axes[0][1:], layers, strict=True):
        panel.set_title(f"layer {layer}", fontsize=9)
    return figure, axes


def _frame(axes: Axes, token: tuple[int, int]) -> None:
    row, column = token
    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#ff3b30", linewidth=1.4))


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
