"""Rendered shapes with a class for each pixel: ``demo/shapes-seg``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prompttune.data import shapes
from prompttune.data.base import MaskSource, Parts
from prompttune.errors import choose
from prompttune.images.masks import Mask

TRAIN, VAL = 600, 200
"""Number of images in the two splits."""
KINDS = {"square": shapes.SQUARE, "ellipse": shapes.ELLIPSE, "heart": shapes.HEART, "arrow": shapes.ARROW}
CLASSES = ["background", *KINDS]
MOST = 3
"""Largest number of shapes in an image."""
RADII = (9.0, 18.0)
"""Smallest and largest radius, in pixels."""
NAME = "shapes-seg"


def scene(index: int, dice: shapes.Dice) -> tuple[shapes.Scene, tuple[int, ...]]:
    """One to three shapes that do not touch, with their classes; everything else varies.

    The kind of the first shape cycles with ``index``, so that every class is equally frequent.
    """
    background, wanted = dice.colour(), 1 + dice.below(MOST)
    placed: list[shapes.Shape] = []
    classes: list[int] = []
    for _ in range(shapes.TRIES):
        radius = dice.between(*RADII)
        x, y = (dice.between(radius, shapes.SIDE - radius) for _ in range(2))
        if any(math.hypot(x - one.x, y - one.y) < radius + one.radius + shapes.GAP for one in placed):
            continue
        kind = index % len(KINDS) if not placed else dice.below(len(KINDS))
        outline, angle = list(KINDS.values())[kind], dice.between(0, 2 * math.pi)
        placed.append(shapes.Shape(outline, x, y, radius, angle, dice.colour(background)))
        classes.append(1 + kind)
        if len(placed) == wanted:
            break
    return shapes.Scene(background, tuple(placed), 0), tuple(classes)


def mask_of(drawn: shapes.Scene, classes: tuple[int, ...]) -> Mask:
    """The class of each pixel: that of the shape which covers at least half of it, else the background."""
    mask = np.zeros((shapes.SIDE, shapes.SIDE), dtype=np.uint8)
    for shape, kind in zip(drawn.shapes, classes, strict=True):
        canvas = Image.new("L", (shapes.SIDE * shapes.OVERSAMPLING,) * 2, 0)
        ImageDraw.Draw(canvas).polygon(shape.corners(), fill=255)
        mask[np.asarray(canvas.reduce(shapes.OVERSAMPLING)) >= 128] = kind
    return mask


class ShapeMaskSource(MaskSource):
    """One split; an image is rendered at its first use, then kept."""

    def __init__(self, split: str, size: int) -> None:
        self.split = split
        self.classes = list(CLASSES)
        self._size = size
        self._rendered: dict[int, tuple[NDArray[np.uint8], Mask]] = {}

    def __len__(self) -> int:
        return self._size

    def load(self, index: int) -> tuple[Image.Image, Mask]:
        """See :class:`MaskSource`; 64 x 64 pixels. Raises :class:`IndexError` past the end."""
        if not 0 <= index < self._size:
            raise IndexError(index)
        if index not in self._rendered:
            drawn, classes = scene(index, shapes.Dice(f"{NAME}/{self.split}/{index}"))
            self._rendered[index] = drawn.render(), mask_of(drawn, classes)
        image, mask = self._rendered[index]
        return Image.fromarray(image), mask

    def describe(self, index: int) -> str:
        """Name, split and index."""
        return f"demo/{NAME}/{self.split}[{index}]"


def load_shape_masks(name: str) -> Parts:
    """Load ``shapes-seg``: always the same 600 training and 200 validation images.

    Raises:
        UsageError: the name is unknown.
    """
    choose("demo data set of masks", name, [NAME])
    named: dict[str, Any] = {"train": ShapeMaskSource("train", TRAIN), "val": ShapeMaskSource("val", VAL)}
    return Parts(named, f"demo/{name}")
