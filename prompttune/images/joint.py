"""Joint transforms of an image and its mask: geometry changes both, colour changes only the image."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import to_pil_image
from torchvision.transforms.v2 import functional as F

from prompttune.errors import UsageError
from prompttune.images.augment import Augment
from prompttune.images.masks import Mask
from prompttune.images.preprocess import Preprocess
from prompttune.images.transform import RESIZED_HERE, EvaluationTransform

NEAREST = InterpolationMode.NEAREST_EXACT
"""Filter for masks: each new pixel gets the class of the pixel whose area contains its centre."""


@dataclass(frozen=True)
class JointTransform:
    """From an RGB image and its mask to a normalised float32 [3, S, S] and class indices int64 [S, S].

    A random crop replaces the evaluation's resizing, as in the augmentation for classification; the mask is resized to
    the nearest pixel. Random numbers come from the global generators of ``random`` and torch.

    Args:
        preprocess: the task's evaluation transform.
        augment: augmentation of training images; None for none.

    Raises:
        UsageError: the transform pads, or the augmentation has a step that cannot be applied to a mask.
    """

    preprocess: Preprocess
    augment: Augment | None = None

    def __post_init__(self) -> None:
        check_geometry(self.preprocess)
        if self.augment is not None and (self.augment.auto_augment or self.augment.random_erase):
            raise UsageError(
                "segmentation: auto_augment and random_erase do not follow masks; use scale_min, hflip, vflip and "
                "color_jitter, or the preset light"
            )

    @property
    def is_exact(self) -> bool:
        """Whether the transform draws no random numbers."""
        one = self.augment
        return one is None or not (one.crops or one.hflip or one.vflip or one.color_jitter)

    def __call__(self, image: Image.Image, mask: Mask) -> tuple[Tensor, Tensor]:
        """Transform a pair of the same height and width.

        Raises:
            UnresizableError: the sides differ too much, see :meth:`Preprocess.check_sides`.
        """
        settings, exact = self.preprocess, EvaluationTransform(self.preprocess)
        classes = torch.from_numpy(mask)[None]  # [1, height, width]
        if self.augment is not None and self.augment.crops:
            pixels, classes = self._cropped(self.augment, F.pil_to_tensor(image), classes)
        else:
            pixels, classes = exact.pixels(image), exact.resized_with(classes, NEAREST)
        if self.augment is not None:
            pixels, classes = self._varied(self.augment, pixels, classes)
        values = pixels.to(torch.float32).div(255)
        normalised: Tensor = F.normalize_image(values, list(settings.mean), list(settings.std))
        return normalised.contiguous(), classes[0].to(torch.int64)

    def _cropped(self, augment: Augment, pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        scale, ratio = (augment.scale_min, augment.scale_max), (augment.ratio_min, augment.ratio_max)
        box = transforms.RandomResizedCrop.get_params(pixels, list(scale), list(ratio))
        size = [self.preprocess.image_size] * 2
        filtered = InterpolationMode(self.preprocess.interpolation)
        cropped: Any = F.resized_crop_image(pixels, *box, size, filtered, antialias=True)
        return cropped, F.resized_crop_image(classes, *box, size, NEAREST)

    def _varied(self, augment: Augment, pixels: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        if random.random() < augment.hflip:
            pixels, classes = pixels.flip(-1), classes.flip(-1)
        if random.random() < augment.vflip:
            pixels, classes = pixels.flip(-2), classes.flip(-2)
        if augment.color_jitter:
            jitter = transforms.ColorJitter(*[augment.color_jitter] * 3)
            pixels = F.pil_to_tensor(jitter(to_pil_image(pixels)))
        return pixels, classes


def check_geometry(preprocess: Preprocess) -> None:
    """Raise :class:`UsageError` unless the evaluation transform can be applied to a mask."""
    if preprocess.crop_mode == "border" or preprocess.interpolation not in RESIZED_HERE:
        raise UsageError(
            f"segmentation: needs crop_mode squash or center and interpolation {' or '.join(RESIZED_HERE)}, not "
            f"{preprocess.crop_mode} and {preprocess.interpolation}"
        )
