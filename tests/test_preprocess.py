"""The evaluation transform is timm's, but for the rounding of some pixels."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from prompttune.errors import DataError, UsageError
from prompttune.images.preprocess import Preprocess, UnresizableError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def picture(width, height):
    """Edges, noise and gradients."""
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2] = np.linspace(0, 255, width, dtype=np.uint8)[None, :, None]
    pixels[height // 3 :, width // 3 :] = (250, 3, 120)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(640, 480), (201, 333), (31, 17), (56, 56), (300, 41)])
@pytest.mark.parametrize("crop_mode", ["squash", "center", "border"])
@pytest.mark.parametrize(("interpolation", "crop_pct"), [("bicubic", 1.0), ("bilinear", 0.875), ("nearest", 0.9)])
def test_it_does_what_timms_does(size, crop_mode, interpolation, crop_pct):
    image = picture(*size)
    preprocess = Preprocess(56, MEAN, STD, interpolation, crop_pct, crop_mode)
    found = preprocess.transform()(image)
    settings = {"mean": MEAN, "std": STD, "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    expected = create_transform(input_size=(3, 56, 56), is_training=False, **settings)(image)
    assert found.shape == expected.shape == (3, 56, 56)
    assert found.dtype == torch.float32
    assert found.is_contiguous()
    levels = (found - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels.max() < 2.1
    assert (levels > 0.5).float().mean() < 0.01


def test_sizes_after_resizing():
    squash, center = Preprocess(56, MEAN, STD, crop_pct=0.5), Preprocess(56, MEAN, STD, crop_mode="center")
    assert squash.resized_pixels(10, 100_000) == 112 * 112
    assert center.resized_pixels(10, 100_000) == center.resized_pixels(100_000, 10) == 56 * 56 * 10_000


@pytest.mark.parametrize(("interpolation", "crop_mode"), [("bicubic", "center"), ("nearest", "center")])
def test_a_strip_that_resizing_would_blow_up_is_refused(interpolation, crop_mode):
    transform = Preprocess(224, MEAN, STD, interpolation, crop_mode=crop_mode).transform()
    for size in [(1, 60_000), (60_000, 1)]:
        with pytest.raises(UnresizableError, match=f"sides of {size[0]} x {size[1]} pixels differ too much"):
            transform(Image.new("RGB", size))


def test_a_strip_whose_short_side_would_vanish_is_refused():
    transform = Preprocess(24, MEAN, STD, crop_mode="border").transform()
    assert transform(Image.new("RGB", (47, 1))).shape == (3, 24, 24)  # 24 / 47 rounds to 1
    with pytest.raises(UnresizableError, match="differ too much"):
        transform(Image.new("RGB", (48, 1)))  # to even: 0


def test_it_is_an_error_of_the_data_and_of_the_value():
    assert issubclass(UnresizableError, DataError)
    assert issubclass(UnresizableError, ValueError)


@pytest.mark.parametrize("crop_mode", ["squash", "center", "border"])
def test_strips_that_can_be_resized_are(crop_mode):
    transform = Preprocess(24, MEAN, STD, crop_mode=crop_mode).transform()
    assert transform(Image.new("RGB", (1, 40))).shape == (3, 24, 24)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": "160"}, "image_size must be a whole number"),
        ({"image_size": True}, "image_size must be a whole number"),
        ({"image_size": 0}, "image_size must be a whole number"),
        ({"image_size": 10**9}, "sides of more than 8192 pixels"),
        ({"crop_pct": 1e-9}, "sides of more than 8192 pixels"),
        ({"crop_pct": 0}, "crop_pct must be above 0"),
        ({"crop_pct": "1"}, "crop_pct must be above 0"),
        ({"crop_pct": float("nan")}, "crop_pct must be above 0"),
        ({"mean": ["x", "y", "z"]}, "mean needs three numbers"),
        ({"mean": [0.5, 0.5]}, "mean needs three numbers"),
        ({"mean": [0.5, 0.5, float("nan")]}, "mean needs three numbers"),
        ({"mean": [0, 0, 10**400]}, "mean needs three numbers"),
        ({"std": [1, 1, float("inf")]}, "std needs three numbers"),
        ({"std": [1, 1, 0]}, "std needs three numbers"),
        ({"std": [1, 1, 1e-50]}, "std needs three numbers"),
        ({"interpolation": ["bicubic"]}, "unknown interpolation"),
        ({"crop_mode": 5}, "unknown crop mode"),
    ],
)
def test_values_of_the_wrong_type_or_size_are_refused(changes, words):
    values = Preprocess(56, MEAN, STD).to_dict()
    assert Preprocess.from_dict(values) == Preprocess(56, MEAN, STD)
    with pytest.raises(UsageError, match=words):
        Preprocess.from_dict({**values, **changes})
