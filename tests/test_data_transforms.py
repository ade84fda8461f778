"""Augmentation: presets, refusals, and what stays exactly as evaluation sees it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from prompttune.data import Augment
from prompttune.data.rng import generators_kept, seed_generators
from prompttune.errors import UsageError
from prompttune.images.augment import is_exact
from prompttune.images.preprocess import CROP_MODES, Preprocess

PREPROCESS = Preprocess(image_size=24, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), crop_pct=0.9)


def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def draws(augment: Augment, count: int = 12, preprocess: Preprocess = PREPROCESS) -> list[Tensor]:
    transform = augment.transform(preprocess)
    with generators_kept():
        seed_generators(0)
        return [transform(image()) for _ in range(count)]


@pytest.mark.parametrize("mode", CROP_MODES)
def test_none_is_the_evaluation_transform(mode: str) -> None:
    preprocess = dataclasses.replace(PREPROCESS, crop_mode=mode)
    expected = preprocess.transform()(image())
    for found in draws(Augment.preset("none"), 2, preprocess):
        assert torch.equal(found, expected)
    assert Augment.preset("none") == Augment()


@pytest.mark.parametrize("name", ["light", "strong"])
def test_presets_vary_the_image(name: str) -> None:
    found = draws(Augment.preset(name))
    assert all(tensor.shape == (3, 24, 24) and tensor.dtype == torch.float32 for tensor in found)
    assert len({tensor.numpy().tobytes() for tensor in found}) > 8


@pytest.mark.parametrize("mode", CROP_MODES)
def test_without_a_crop_the_resizing_is_evaluations(mode: str) -> None:
    preprocess = dataclasses.replace(PREPROCESS, crop_mode=mode)
    expected = preprocess.transform()(image())
    (flipped,) = draws(Augment(hflip=1.0), 1, preprocess)
    assert torch.equal(flipped, expected.flip(-1))
    (turned,) = draws(Augment(hflip=1.0, vflip=1.0), 1, preprocess)
    assert torch.equal(turned, expected.flip(-1, -2))


def test_a_crop_keeps_its_share_of_the_area() -> None:
    ramp = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (200, 1, 3)))
    plain = Preprocess(image_size=50, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    transform = Augment(scale_min=0.25, scale_max=0.25, ratio_min=1.0, ratio_max=1.0).transform(plain)
    torch.manual_seed(0)
    for _ in range(5):
        row = transform(ramp)[0, 25] * 255
        assert float(row[-1] - row[0]) == pytest.approx(98, abs=3)  # half of the width


@pytest.mark.parametrize("changes", [{"color_jitter": 0.5}, {"random_erase": 1.0}, {"auto_augment": "augmix-m5"}])
def test_single_settings_vary_the_image(changes: dict[str, Any]) -> None:
    expected = PREPROCESS.transform()(image())
    assert any(not torch.equal(found, expected) for found in draws(Augment(**changes)))


def test_erasing_leaves_the_rest() -> None:
    expected = PREPROCESS.transform()(image())
    for found in draws(Augment(random_erase=1.0), 4):
        assert 0.5 < (found == expected).float().mean() < 1


def test_which_transforms_are_known_to_be_exact() -> None:
    assert is_exact(PREPROCESS.transform())
    assert is_exact(Augment().transform(PREPROCESS))
    assert not is_exact(Augment(hflip=0.5).transform(PREPROCESS))
    assert not is_exact(lambda picture: torch.zeros(3, 1, 1))


@pytest.mark.parametrize("spelled", ["none", "", None])
def test_no_policy(spelled: str | None) -> None:
    assert Augment(auto_augment=spelled) == Augment()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_min": 0.0}, "scale_min and scale_max must be above 0 and at most 1"),
        ({"scale_max": 0.5}, "the first not above the second, not 1.0 and 0.5"),
        ({"scale_max": 1.5}, "at most 1"),
        ({"scale_min": float("nan")}, "scale_min"),
        ({"ratio_min": 2.0, "ratio_max": 1.0}, "ratio_min"),
        ({"ratio_max": float("inf")}, "ratio_max"),
        ({"hflip": 1.1}, "hflip is a probability"),
        ({"vflip": -0.1}, "vflip is a probability"),
        ({"random_erase": 2}, "random_erase is a probability"),
        ({"color_jitter": -1.0}, "color_jitter must be 0 or more"),
        ({"auto_augment": "rand-m9-zz5"}, "'rand-m9-zz5' is not a policy"),
        ({"auto_augment": "randm9"}, "is not a policy"),
        ({"auto_augment": "nonsense"}, "is not a policy"),
        ({"auto_augment": "original", "color_jitter": 0.4}, "color_jitter has no effect beside"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Augment(**changes)


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="did you mean strong"):
        Augment.preset("strongg")


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3-w3", "original", "originalr", "v0", "v0r", "3a"])
def test_policies_that_the_help_names(policy: str) -> None:
    jitter = 0.3 if policy == "3a" else 0.0
    found = draws(Augment(auto_augment=policy, color_jitter=jitter), 40)
    assert len({tensor.numpy().tobytes() for tensor in found}) > 10


@pytest.mark.parametrize("policy", ["rand-m10-n6-p1-inc1", "rand-m1-n6-p1", "augmix-m10", "v0", "v0r"])
def test_posterizing_leaves_a_bit(policy: str) -> None:
    """These ask for 0 bits, sooner or later."""
    assert all(tensor.isfinite().all() for tensor in draws(Augment(auto_augment=policy), 60))
