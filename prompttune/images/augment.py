"""Augmentation: random transforms of training images, made by timm's factory over a task's preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data.auto_augment import (
    AutoAugment,
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from timm.data.transforms import CenterCropOrPad, MaybeToTensor, RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

from prompttune.errors import UsageError, choose
from prompttune.images.preprocess import Preprocess
from prompttune.images.transform import EvaluationTransform
from prompttune.settings import setting

Transform = Callable[[Image.Image], Tensor]

EXACT = (
    EvaluationTransform,
    transforms.Resize,
    transforms.CenterCrop,
    CenterCropOrPad,
    MaybeToTensor,
    transforms.Normalize,
)
"""Steps that draw no random numbers."""
JITTERED_POLICY = "3a"
"""The only policy that timm combines with colour jitter."""


@dataclass(frozen=True)
class Augment:
    """Augmentation of training images. The defaults do not change them.

    Raises:
        UsageError: a value is out of range, or a policy is unknown; one line that names the setting.
    """

    scale_min: float = setting(1.0, help="smallest share of the image's area in a random crop")
    scale_max: float = setting(1.0, help="largest share of the area in a random crop; with both at 1, no crop")
    ratio_min: float = setting(3 / 4, help="smallest aspect ratio (width / height) of a random crop")
    ratio_max: float = setting(4 / 3, help="largest aspect ratio (width / height) of a random crop")
    random_crop: bool = setting(
        False, help="crop at a random place instead of the centre; has an effect with crop_pct below 1"
    )
    hflip: float = setting(0.0, help="probability of a horizontal flip")
    vflip: float = setting(0.0, help="probability of a vertical flip")
    color_jitter: float = setting(0.0, help="strength of random brightness, contrast and saturation")
    auto_augment: str | None = setting(
        None, help="timm policy, such as rand-m9-mstd0.5-inc1, augmix-m3-w3, original or 3a; or none"
    )
    random_erase: float = setting(0.0, help="probability that a random rectangle becomes noise")

    def __post_init__(self) -> None:
        if self.auto_augment in ("none", ""):
            object.__setattr__(self, "auto_augment", None)
        _check_range("scale", self.scale_min, self.scale_max, most=1.0)
        _check_range("ratio", self.ratio_min, self.ratio_max, most=float("inf"))
        for name in ("hflip", "vflip", "random_erase"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name} is a probability: from 0 to 1, not {getattr(self, name)}")
        if not 0.0 <= self.color_jitter < float("inf"):
            raise UsageError(f"color_jitter must be 0 or more, not {self.color_jitter}")
        if self.auto_augment is not None:
            self._check_policy(self.auto_augment)
        if self.random_crop and self.crops:
            raise UsageError("random_crop and scale_min below 1 both crop: give one of them")

    def _check_policy(self, policy: str) -> None:
        makers = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
        try:
            makers.get(policy.split("-")[0], auto_augment_transform)(policy, {})
        except (AssertionError, KeyError, ValueError) as problem:
            raise UsageError(
                f"auto_augment {policy!r} is not a policy that timm knows ({problem}); try rand-m9-mstd0.5-inc1, "
                "augmix-m3-w3, original, v0, 3a or none"
            ) from None
        if self.color_jitter and JITTERED_POLICY not in policy:
            raise UsageError(f"color_jitter has no effect beside auto_augment {policy}: set one of them to none or 0")

    @classmethod
    def preset(cls, name: str) -> Augment:
        """``none`` (images as in evaluation, VTAB's habit), ``light`` or ``strong``."""
        return PRESETS[choose("augmentation", name, PRESETS)]

    @property
    def crops(self) -> bool:
        """Whether images are cropped at random."""
        return self.scale_min < 1.0

    def transform(self, preprocess: Preprocess) -> Transform:
        """Return a function from an RGB PIL image to a normalised float32 tensor [3, image_size, image_size].

        It draws from the global generators of ``random``, NumPy and torch. Without any random setting it is
        ``preprocess.transform()``. A random crop replaces the evaluation's resizing; without one, the resizing stays
        and the other steps follow.
        """
        exact = preprocess.transform()
        if not self._is_random:
            return exact
        geometry, colour, final = create_transform(
            input_size=(3, preprocess.image_size, preprocess.image_size),
            is_training=True,
            separate=True,
            scale=(self.scale_min, self.scale_max),
            ratio=(self.ratio_min, self.ratio_max),
            hflip=self.hflip,
            vflip=self.vflip,
            color_jitter=self.color_jitter or None,
            auto_augment=self.auto_augment,
            interpolation=preprocess.interpolation,
            mean=preprocess.mean,
            std=preprocess.std,
            re_prob=self.random_erase,
            re_mode="pixel",
        )
        for policy in colour.transforms:
            _mend_posterize(policy)
        steps = list(geometry.transforms)
        if not self.crops:
            flips = [step for step in steps if not isinstance(step, RandomResizedCropAndInterpolation)]
            resizing = [_RandomCrop.of(exact)] if self.random_crop else _resizing(exact)
            steps = [*resizing, *flips]
        composed: Transform = transforms.Compose([*steps, *colour.transforms, *final.transforms])
        return composed

    @property
    def _is_random(self) -> bool:
        chances = (self.hflip, self.vflip, self.color_jitter, self.random_erase)
        return self.crops or self.random_crop or any(chances) or self.auto_augment is not None


def _resizing(exact: Transform) -> list[Any]:
    """The steps of an evaluation transform before the conversion to a tensor."""
    if isinstance(exact, EvaluationTransform):
        return [_Resized(exact)]
    steps = _steps(exact)
    return steps[: next(index for index, step in enumerate(steps) if isinstance(step, MaybeToTensor))]


@dataclass(frozen=True)
class _Resized:
    """An evaluation transform without the conversion to a tensor."""

    exact: EvaluationTransform

    def __call__(self, image: Image.Image) -> Image.Image:
        resized: Image.Image = to_pil_image(self.exact.pixels(image))
        return resized


@dataclass(frozen=True)
class _RandomCrop:
    """An evaluation transform's resizing, followed by a crop of its size at a random place."""

    exact: EvaluationTransform

    @classmethod
    def of(cls, exact: Transform) -> _RandomCrop:
        if not isinstance(exact, EvaluationTransform):
            raise UsageError(
                "random_crop needs crop_mode squash or center and interpolation bicubic or bilinear, "
                "whose resizing it takes over"
            )
        return cls(exact)

    def __call__(self, image: Image.Image) -> Image.Image:
        size = self.exact.preprocess.image_size
        cropped: Image.Image = to_pil_image(transforms.RandomCrop(size)(self.exact.resized(image)))
        return cropped


def _steps(transform: Transform) -> list[Any]:
    return list(transform.transforms) if isinstance(transform, transforms.Compose) else [transform]


def _mend_posterize(policy: Any) -> None:
    """Raise the number of bits per colour in timm's policies to 1: Pillow refuses 0 from version 13 on."""
    chains = policy.policy if isinstance(policy, AutoAugment) else [getattr(policy, "ops", [])]
    for operation in (operation for chain in chains for operation in chain):
        if operation.aug_fn is posterize:
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    posterized: Image.Image = posterize(image, max(1, bits_to_keep))
    return posterized


def is_exact(transform: Transform) -> bool:
    """Whether a transform is known to draw no random numbers."""
    told = getattr(transform, "is_exact", None)
    if told is not None:
        return bool(told)
    return all(isinstance(step, EXACT) for step in _steps(transform))


def _check_range(name: str, least: float, greatest: float, most: float) -> None:
    if not 0.0 < least <= greatest <= most or greatest == float("inf"):
        limit = "" if most == float("inf") else f" and at most {most:g}"
        raise UsageError(f"{name}_min and {name}_max must be above 0{limit}, the first not above the second, "
                         f"not {least} and {greatest}")  # fmt: skip


PRESETS = {
    "none": Augment(),
    "light": Augment(scale_min=0.7, hflip=0.5),
    "strong": Augment(scale_min=0.35, hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25),
}
