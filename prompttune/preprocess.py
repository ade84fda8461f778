"""How an image file becomes a tensor: one recipe, shared by evaluation, parity, inference and serving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from prompttune.errors import UsageError, choose

if TYPE_CHECKING:
    import torch
    from PIL import Image

INTERPOLATIONS = ("bicubic", "bilinear", "nearest")
CROP_MODES = ("squash", "center", "border")
NORMALISATIONS = ("backbone", "imagenet", "inception")
"""Where the mean and the standard deviation come from: the backbone's weights, ImageNet's images, or 0.5 for both."""


@dataclass(frozen=True)
class Preprocess:
    """Evaluation transform of a task.

    ``squash`` resizes both sides to ``image_size / crop_pct`` and crops the centre (with ``crop_pct`` 1, VTAB's
    habit, nothing is cut); ``center`` keeps the aspect ratio, resizes the short side and crops; ``border`` keeps
    all of the image and pads.
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
        if not 0.0 < self.crop_pct <= 1.0:
            raise UsageError(f"crop_pct must be above 0 and at most 1, not {self.crop_pct}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise UsageError("mean and std need three values each, std above 0")

    def normalised(self, normalisation: str) -> Preprocess:
        """The same with the mean and standard deviation of one of :data:`NORMALISATIONS`."""
        if choose("normalisation", normalisation, NORMALISATIONS) == "backbone":
            return self
        from timm.data import constants

        name = {"imagenet": "DEFAULT", "inception": "INCEPTION"}[normalisation]
        mean, std = (getattr(constants, f"IMAGENET_{name}_{part}") for part in ("MEAN", "STD"))
        return dataclasses.replace(self, mean=tuple(mean), std=tuple(std))

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """Return a function from an RGB PIL image to a normalised float32 tensor [3, image_size, image_size]."""
        # The imports take seconds, and engines read settings without them.
        from prompttune.transform import RESIZED_HERE, EvaluationTransform

        if self.crop_mode != "border" and self.interpolation in RESIZED_HERE:
            return EvaluationTransform(self)
        from timm.data.transforms_factory import create_transform

        made: Callable[[Image.Image], torch.Tensor] = create_transform(
            input_size=(3, self.image_size, self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return made

    def resized_pixels(self, width: int, height: int) -> float:
        """Pixels of an image of ``width`` x ``height`` once it is resized and before it is cropped.

        ``center`` fits the short side, which makes a strip of a few kilobytes into one of gigabytes.
        """
        side = self.image_size / self.crop_pct
        longer = max(width, height) / min(width, height) if self.crop_mode == "center" else 1.0
        return side * side * longer

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_dict`."""
        mean, std = tuple(values["mean"]), tuple(values["std"])
        return cls(**{**values, "mean": mean, "std": std})
