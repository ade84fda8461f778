"""Masks: the class of each pixel of an image, and annotation files that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prompttune.images.reading import opened, turn_upright

Mask = NDArray[np.uint8]
"""[height, width]: the class index of each pixel, or :data:`IGNORE_INDEX`."""
IGNORE_INDEX = 255
"""Mask value of pixels without a class, which are neither trained nor scored; also the largest number of classes."""
INDEX_MODES = ("1", "L", "P", "I", "I;16")
"""Pillow's modes for pictures whose pixels are numbers instead of colours."""


def read_numbers(path: Path) -> tuple[NDArray[np.int64], int]:
    """The numbers of an annotation file, upright [height, width], and the EXIF orientation in the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: its pixels are colours.
    """
    try:
        with opened(path) as picture:
            if (mode := picture.mode) in INDEX_MODES:
                upright, orientation = turn_upright(picture)
                return np.asarray(upright).astype(np.int64), orientation
    except OSError as problem:
        raise OSError(f"the annotation {path.name} cannot be read ({problem})") from None
    raise ValueError(f"the annotation {path.name} has colours ({mode}), not one class number per pixel")


def indexed(numbers: NDArray[np.int64], reduce_zero_label: bool) -> Mask:
    """Class indices from an annotation's numbers.

    Raises:
        ValueError: a number exceeds the range of a mask.
    """
    ignored = numbers == IGNORE_INDEX
    if reduce_zero_label:
        ignored |= numbers == 0
        numbers = numbers - 1
    kept = numbers[~ignored]
    if kept.size and (kept.min() < 0 or kept.max() >= IGNORE_INDEX):
        raise ValueError(f"an annotation has numbers beyond {IGNORE_INDEX}")
    return np.where(ignored, IGNORE_INDEX, numbers).astype(np.uint8)
