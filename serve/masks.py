"""From a segmentation's logits to the class and the colour of each pixel."""

from __future__ import annotations

import colorsys
from functools import cache
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import from_numpy

from prompttune.export.runtimes import Array
from prompttune.images.masks import IGNORE_INDEX
from prompttune.images.preprocess import Preprocess

Mask = NDArray[np.uint8]
_GOLDEN = (5**0.5 - 1) / 2
"""Step on the colour circle from one class to the next: classes with close indices get different colours."""


def class_map(logits: Array, side: int) -> Mask:
    """Class index of each pixel of the model's input, [side, side], from logits [C, h, w], as evaluation does it."""
    wide = F.interpolate(from_numpy(np.ascontiguousarray(logits))[None], size=(side, side), mode="bilinear")
    classes: NDArray[Any] = wide[0].argmax(dim=0).numpy()
    return classes.astype(np.uint8)


def seen_box(preprocess: Preprocess, width: int, height: int) -> tuple[int, int, int, int]:
    """The box of an image of ``width`` x ``height`` that its task sees: left, upper, right, lower, in pixels.

    The box lies inside the image and has at least one pixel.
    """
    across, down = float(width), float(height)
    if preprocess.crop_mode == "center":
        across = down = float(min(width, height))
    across, down = across * preprocess.crop_pct, down * preprocess.crop_pct
    left, upper = (width - across) / 2, (height - down) / 2
    first, top = round(left), round(upper)
    # The crop of a very narrow image may be narrower than a pixel.
    return first, top, max(round(left + across), first + 1), max(round(upper + down), top + 1)


def mask_of_image(mask: Mask, preprocess: Preprocess, width: int, height: int) -> Mask:
    """The mask of a whole image, [height, width]; ``IGNORE_INDEX`` where its task does not see the image.

    Args:
        mask: class index of each pixel of the model's input, [S, S].
        preprocess: the task's transform.
        width: width of the image, in pixels.
        height: height of the image, in pixels.
    """
    left, upper, right, lower = seen_box(preprocess, width, height)
    resized = Image.fromarray(mask).resize((right - left, lower - upper), Image.Resampling.NEAREST)
    whole = np.full((height, width), IGNORE_INDEX, dtype=np.uint8)
    whole[upper:lower, left:right] = np.asarray(resized)
    return whole


@cache
def palette(classes: int) -> Mask:
    """A colour for each class, uint8 [classes, 3]: fixed for a class index, alternately bright and dark."""
    colours = [
        colorsys.hsv_to_rgb(index * _GOLDEN % 1, (0.85, 0.6)[index % 2], (0.95, 0.75, 0.55)[index % 3])
        for index in range(classes)
    ]
    made: Mask = (np.array(colours).reshape(classes, 3) * 255).round().astype(np.uint8)
    made.setflags(write=False)
    return made
