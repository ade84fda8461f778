"""Rendered shapes with a class for each pixel: ``demo/shapes-seg``."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from prompttune.data import shapes
from prompttune.images.masks import Mask

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


def render(split: str, index: int) -> tuple[NDArray[np.uint8], Mask]:
    """Pixels [height, width, 3] and mask of an image."""
    drawn, classes = scene(index, shapes.Dice(f"{NAME}/{split}/{index}"))
    return drawn.render(), mask_of(drawn, classes)
