"""Rendered shapes for tasks about location, orientation and count, after the structured group of VTAB.

VTAB (https://arxiv.org/abs/1910.04867) takes these tasks from dSprites and Clevr; here the images are new drawings. An
image depends only on its task, split and index, so it never changes and never depends on another image.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 64
"""Side of an image, in pixels."""
OVERSAMPLING = 8
"""Number of subpixels along a pixel's side, which are averaged."""
BINS = 16
"""Number of classes of location and of orientation."""
STEPS = 32
"""Number of places or angles that occur: two per bin, each half a step from the bin's ends."""
PLACED_RADII = (5.0, 12.0)
"""Smallest and largest radius of a shape in the location task, in pixels."""
TURNED_RADII = (11.0, 16.0)
"""Smallest and largest radius of a shape in the orientation task, in pixels."""
MOST = 8
"""Largest number of shapes."""
GAP = 2.0
"""Smallest distance between the circles around two shapes, in pixels."""
COUNTED_RADII = (3.0, 6.0)
"""Smallest and largest radius of a shape in the counting task, in pixels."""
CONTRAST = 120.0
"""Smallest distance of a shape's colour from the background; the largest possible is 442."""
TRIES = 200

Point = tuple[float, float]
Colour = tuple[int, int, int]


def _centred(points: Sequence[Point]) -> NDArray[np.float64]:
    """Move a polygon's centre of area to the origin and scale its farthest corner to distance 1, [corners, 2]."""
    corners = np.asarray(points, dtype=np.float64)
    following = np.roll(corners, -1, axis=0)
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    centre = ((corners + following) * cross[:, None]).sum(axis=0) / (3 * cross.sum())
    moved = corners - centre
    scaled: NDArray[np.float64] = moved / np.hypot(moved[:, 0], moved[:, 1]).max()
    return scaled


def _curve(point: Callable[[float], Point], corners: int = 72) -> NDArray[np.float64]:
    return _centred([point(2 * math.pi * step / corners) for step in range(corners)])


def _heart_point(t: float) -> Point:
    upward = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return 16 * math.sin(t) ** 3, upward


SQUARE = _centred([(-1, -1), (1, -1), (1, 1), (-1, 1)])
ELLIPSE = _curve(lambda t: (math.cos(t), 0.6 * math.sin(t)))
HEART = _curve(_heart_point)
ARROW = _centred([(0, 1), (0.7, 0), (0.25, 0), (0.25, -1), (-0.25, -1), (-0.25, 0), (-0.7, 0)])
WEDGE = _centred([(0, 1), (0.5, -1), (-0.5, -1)])

PLACED = (SQUARE, ELLIPSE, HEART)
"""dSprites' three shapes."""
TURNED = (ARROW, HEART, WEDGE)
"""Shapes that repeat only after a full turn; at angle 0 they point up (the heart's notch is up)."""


@dataclass(frozen=True)
class Shape:
    """A shape to draw."""

    outline: NDArray[np.float64]
    """Corners [corners, 2], y upwards, centre of area at the origin, farthest corner at distance 1."""
    x: float
    """Centre of area, in pixels from the left edge."""
    y: float
    """Centre of area, in pixels from the upper edge."""
    radius: float
    """Distance of the farthest corner, in pixels."""
    angle: float
    """Counter-clockwise rotation, in radians."""
    colour: Colour

    def corners(self) -> list[Point]:
        """Corners on a canvas that is :data:`OVERSAMPLING` times as fine."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        across, up = self.outline[:, 0], self.outline[:, 1]
        x = self.x + self.radius * (cos * across - sin * up)
        y = self.y - self.radius * (sin * across + cos * up)
        corners = np.stack((x, y), axis=1) * OVERSAMPLING
        return [(float(x), float(y)) for x, y in corners]


@dataclass(frozen=True)
class Scene:
    """Content of an image."""

    background: Colour
    shapes: tuple[Shape, ...]
    label: int

    def render(self) -> NDArray[np.uint8]:
        """Draw the scene, anti-aliased: uint8 [SIDE, SIDE, 3]."""
        canvas = Image.new("RGB", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING), self.background)
        draw = ImageDraw.Draw(canvas)
        for shape in self.shapes:
            draw.polygon(shape.corners(), fill=shape.colour)
        return np.asarray(canvas.reduce(OVERSAMPLING))


class Dice(random.Random):
    """Random numbers of one image. Only ``random()`` is called, whose sequence Python keeps stable."""

    def between(self, low: float, high: float) -> float:
        """A number from ``low`` to ``high``."""
        return low + (high - low) * self.random()

    def below(self, count: int) -> int:
        """A whole number from 0 to ``count - 1``."""
        return int(self.random() * count)

    def colour(self, background: Colour | None = None) -> Colour:
        """A random colour; with a background, one that contrasts with it."""
        while True:
            colour = (self.below(256), self.below(256), self.below(256))
            if background is None or math.dist(colour, background) >= CONTRAST:
                return colour


def location(index: int, dice: Dice) -> Scene:
    """The horizontal place of a shape's centre, in 16 bins of equal width; everything else varies."""
    label = index % BINS
    step = label * (STEPS // BINS) + dice.below(STEPS // BINS)
    margin = PLACED_RADII[1]
    background = dice.colour()
    shape = Shape(
        outline=PLACED[dice.below(len(PLACED))],
        x=margin + (SIDE - 2 * margin) * (step + 0.5) / STEPS,
        y=dice.between(margin, SIDE - margin),
        radius=dice.between(*PLACED_RADII),
        angle=dice.between(0, 2 * math.pi),
        colour=dice.colour(background),
    )
    return Scene(background, (shape,), label)


def orientation(index: int, dice: Dice) -> Scene:
    """The angle of a shape over the full turn, in 16 bins of 22.5 degrees; everything else varies."""
    label = index % BINS
    step = label * (STEPS // BINS) + dice.below(STEPS // BINS)
    margin = TURNED_RADII[1]
    background = dice.colour()
    shape = Shape(
        outline=TURNED[dice.below(len(TURNED))],
        x=dice.between(margin, SIDE - margin),
        y=dice.between(margin, SIDE - margin),
        radius=dice.between(*TURNED_RADII),
        angle=2 * math.pi * (step + 0.5) / STEPS,
        colour=dice.colour(background),
    )
    return Scene(background, (shape,), label)


def count(index: int, dice: Dice) -> Scene:
    """The number of shapes, 1 to 8, that do not touch; everything else varies."""
    label = index % MOST
    background = dice.colour()
    shapes: list[Shape] = []
    tries = 0
    while len(shapes) <= label:
        radius = dice.between(*COUNTED_RADII)
        x, y = (dice.between(radius + 1, SIDE - radius - 1) for _ in range(2))
        if all(math.hypot(x - other.x, y - other.y) >= radius + other.radius + GAP for other in shapes):
            outline, angle = PLACED[dice.below(len(PLACED))], dice.between(0, 2 * math.pi)
            shapes.append(Shape(outline, x, y, radius, angle, dice.colour(background)))
        elif (tries := tries + 1) % TRIES == 0:
            shapes.clear()  # the shapes so far may leave no room
    return Scene(background, tuple(shapes), label)
