"""Settings of the evaluation transform, checked; a module that imports neither torch nor timm."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

from prompttune.errors import DataError, UsageError, choose

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
CROP_MODES = ("squash", "center", "border")
OWN_CROP = "backbone"
"""Choice of the crop that the backbone's publishers evaluate with."""
NORMALISATIONS = ("backbone", "imagenet", "inception", "clip")
"""Sources of the mean and the standard deviation: the backbone's weights, ImageNet, 0.5 for both, or CLIP."""
LONGEST_SIDE = 2**13
"""Largest side in pixels that images are resized to."""
LEAST_STD, GREATEST = 1e-6, 1e6
"""Bounds of the normalisation, beyond which float32 loses precision."""


class UnresizableError(DataError, ValueError):
    """The sides of an image differ too much for its task's transform to resize it."""


@dataclass(frozen=True)
class TransformSettings:
    """Size, crop, filter and normalisation of a task's images.

    ``squash`` resizes both sides to ``image_size / crop_pct`` and crops the centre (with ``crop_pct`` 1, as is
    usual for VTAB, the whole image is kept); ``center`` keeps the aspect ratio, resizes the short side and crops;
    ``border`` keeps the whole image and pads.
    """

    image_size: int
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float]
    """Mean of each RGB channel, on a scale from 0 to 1."""
    std: tuple[float, float, float]
    """Standard deviation of each RGB channel, on a scale from 0 to 1."""
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "squash"

    def __post_init__(self) -> None:
        choose("interpolation", self.interpolation, INTERPOLATIONS)
        choose("crop mode", self.crop_mode, CROP_MODES)
        if type(self.image_size) is not int or self.image_size < 1:
            raise UsageError(f"image_size must be a whole number of at least 1, not {self.image_size!r}")
        if not _within(self.crop_pct, 0.0, 1.0) or self.crop_pct == 0:
            raise UsageError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct!r}")
        if self.image_size > LONGEST_SIDE * self.crop_pct:
            raise UsageError(
                f"image_size {self.image_size} with crop_pct {self.crop_pct} resizes images to sides of more than "
                f"{LONGEST_SIDE} pixels: give a smaller image_size or a greater crop_pct"
            )
        for name, values, least in (("mean", self.mean, -GREATEST), ("std", self.std, LEAST_STD)):
            if len(values) != 3 or not all(_within(value, least, GREATEST) for value in values):
                raise UsageError(f"{name} needs three numbers from {least:g} to {GREATEST:g}")

    def resized_pixels(self, width: int, height: int) -> float:
        """Number of pixels of an image of ``width`` x ``height`` after resizing and before cropping.

        ``center`` fits the short side, which turns a narrow strip of a few kilobytes into gigabytes.
        """
        side = self.image_size / self.crop_pct
        longer = max(width, height) / min(width, height) if self.crop_mode == "center" else 1.0
        return side * side * longer

    def check_sides(self, width: int, height: int) -> None:
        """Check an image of ``width`` x ``height`` before it is resized.

        Raises:
            UnresizableError: the resized image would exceed Pillow's pixel limit, or with ``border`` be 0 pixels wide.
        """
        from PIL import Image

        limit = Image.MAX_IMAGE_PIXELS  # Pillow warns above this, and refuses above twice as many
        vast = limit is not None and self.resized_pixels(width, height) > 2 * limit
        if vast or (self.crop_mode == "border" and self._fitted_short_side(width, height) < 1):
            raise UnresizableError(f"sides of {width} x {height} pixels differ too much to be resized")

    def _fitted_short_side(self, width: int, height: int) -> int:
        """Short side in pixels after fitting the long side, rounded as timm does."""
        return round(min(width, height) / (max(width, height) / math.floor(self.image_size / self.crop_pct)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`.

        Raises:
            UsageError: a value is of the wrong type or out of range.
            KeyError, TypeError: a name is missing or unknown, or mean or std is not a list.
        """
        mean, std = tuple(values["mean"]), tuple(values["std"])
        return cls(**{**values, "mean": mean, "std": std})


def _within(value: object, low: float, high: float) -> bool:
    """Whether a value is a number in the range; files that a user may have edited can hold text, true and NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
