"""Images to explain: found, read, and prepared for the model and for viewers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prompttune.errors import DataError, UsageError
from prompttune.images import read_image
from prompttune.images.preprocess import LONGEST_SIDE, Preprocess, UnresizableError

VIEW_SIDE = 336
"""Smallest side in pixels of the picture that a map is laid over."""


@dataclass(frozen=True)
class Picture:
    """A readable image."""

    source: str
    """Path of the image."""
    image: Image.Image
    """Upright RGB."""


def read_pictures(
    paths: Sequence[Path], limit: int, transforms: Sequence[Preprocess]
) -> tuple[list[Picture], list[str]]:
    """Read images until ``limit`` is reached.

    Args:
        paths: paths of the files.
        limit: largest number of images to read.
        transforms: transforms that each image will go through.

    Returns:
        The images, and one line for each image that could not be read or resized.

    Raises:
        DataError: every image is unreadable.
    """
    pictures: list[Picture] = []
    corrupt: list[str] = []
    for path in paths:
        if len(pictures) == limit:
            break
        try:
            image = read_image(path)
            for preprocess in transforms:
                preprocess.check_sides(*image.size)
                _enlarged(preprocess).check_sides(*image.size)
            pictures.append(Picture(str(path), image))
        except (OSError, UnresizableError) as problem:
            corrupt.append(f"{path}: {' '.join(str(problem).split())}")
    if paths and not pictures:
        raise DataError(f"none of the {len(corrupt)} images can be read, first: {corrupt[0]}")
    return pictures, corrupt


def model_input(preprocess: Preprocess, image: Image.Image, device: torch.device) -> Tensor:
    """The image as the model's input: normalised, [1, 3, S, S]."""
    return preprocess.transform()(image).unsqueeze(0).to(device)


def _enlarged(preprocess: Preprocess) -> Preprocess:
    """The transform for viewers, within the size that any transform may resize to."""
    side = preprocess.image_size
    most = int(LONGEST_SIDE * preprocess.crop_pct) // side
    return dataclasses.replace(preprocess, image_size=min(math.ceil(VIEW_SIDE / side), most) * side)


def view(preprocess: Preprocess, image: Image.Image) -> NDArray[np.float32]:
    """The part of the image that the model sees, for viewers.

    It is made by the same transform at a multiple of its size, at least :data:`VIEW_SIDE` if possible, without the
    normalisation.

    Returns:
        RGB in [0, 1], [side, side, 3].
    """
    seen = _enlarged(preprocess).transform()(image).permute(1, 2, 0)  # [side, side, 3]
    pixels = seen * torch.tensor(preprocess.std) + torch.tensor(preprocess.mean)
    clipped: NDArray[np.float32] = pixels.clamp(0, 1).numpy()
    return clipped


def token_of(preprocess: Preprocess, size: tuple[int, int], point: tuple[float, float], grid: tuple[int, int]) -> int:
    """The index of the token that contains a pixel of an image.

    Args:
        preprocess: the transform between the image and the model.
        size: width and height of the image, in pixels.
        point: x and y of the pixel.
        grid: rows and columns of the map.

    Raises:
        UsageError: the pixel lies outside the image, or in what the transform cuts off.
    """
    side = preprocess.image_size
    scaled = math.floor(side / preprocess.crop_pct)
    width, height = size
    if preprocess.crop_mode == "squash":
        resized = (scaled, scaled)
    else:
        fitted = min(size) if preprocess.crop_mode == "center" else max(size)
        resized = (round(width * scaled / fitted), round(height * scaled / fitted))
    place = []
    for value, full, now in zip(point, size, resized, strict=True):
        if not 0 <= value < full:
            raise UsageError(f"point {point[0]:g},{point[1]:g} lies outside an image of {width} x {height} pixels")
        place.append((value + 0.5) * now / full - (now - side) / 2)  # the centre of the pixel
    if not all(0 <= value < side for value in place):
        raise UsageError(f"point {point[0]:g},{point[1]:g} lies in what the transform cuts off")
    rows, columns = grid
    return int(place[1] * rows / side) * columns + int(place[0] * columns / side)
