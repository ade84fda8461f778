"""From an image file to a tensor: one recipe for evaluation, parity, inference and serving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prompttune.errors import choose
from prompttune.images.transform_settings import CROP_MODES as CROP_MODES
from prompttune.images.transform_settings import INTERPOLATIONS as INTERPOLATIONS
from prompttune.images.transform_settings import LONGEST_SIDE as LONGEST_SIDE
from prompttune.images.transform_settings import NORMALISATIONS as NORMALISATIONS
from prompttune.images.transform_settings import OWN_CROP as OWN_CROP
from prompttune.images.transform_settings import TransformSettings
from prompttune.images.transform_settings import UnresizableError as UnresizableError

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Preprocess(TransformSettings):
    """Evaluation transform of a task."""

    def normalised(self, normalisation: str) -> Preprocess:
        """The same transform with the mean and standard deviation of one of :data:`NORMALISATIONS`."""
        if choose("normalisation", normalisation, NORMALISATIONS) == "backbone":
            return self
        from timm.data import constants

        name = {"imagenet": "IMAGENET_DEFAULT", "inception": "IMAGENET_INCEPTION", "clip": "OPENAI_CLIP"}[normalisation]
        mean, std = (getattr(constants, f"{name}_{part}") for part in ("MEAN", "STD"))
        return dataclasses.replace(self, mean=tuple(mean), std=tuple(std))

    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """Return a function from a PIL image to a normalised float32 tensor [3, image_size, image_size].

        The image goes through :func:`prompttune.read_image` first, which does not change an image that it has read
        before.

        The function raises :class:`UnresizableError` if :meth:`check_sides` does.
        """
        # The imports take seconds, and engines read settings without them.
        from prompttune.images.transform import RESIZED_HERE, CheckedSides, EvaluationTransform

        if self.crop_mode != "border" and self.interpolation in RESIZED_HERE:
            return EvaluationTransform(self)
        from timm.data.transforms_factory import create_transform

        made = create_transform(
            input_size=(3, self.image_size, self.image_size),
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        made.transforms.insert(0, CheckedSides(self))
        made.is_exact = True  # tells data loaders that it draws no random numbers
        checked: Callable[[Image.Image], torch.Tensor] = made
        return checked
