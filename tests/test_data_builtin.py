"""Built-in data: digits, and shapes that are where, and as turned and as many as, their labels say."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.measure import label as label_regions
from sklearn.datasets import load_digits

from prompttune.data import ImageSource, load_data
from prompttune.data.builtin import scene_of
from prompttune.data.shapes import BINS, GAP, PLACED_RADII, SIDE, TURNED, Scene
from prompttune.errors import UsageError

SHAPES = ("location", "orientation", "count")


def pixels(source: ImageSource, index: int) -> NDArray[np.uint8]:
    return np.asarray(source.load(index)[0])


def coverage(source: ImageSource, scene: Scene, index: int) -> NDArray[np.float64]:
    """How much of each pixel the shapes cover, up to one factor a shape, [SIDE, SIDE]."""
    background = np.array(scene.background, dtype=float)
    difference: NDArray[np.float64] = np.abs(pixels(source, index) - background).sum(axis=-1)
    return difference


def centre(mass: NDArray[np.float64]) -> tuple[float, float]:
    places = np.arange(SIDE) + 0.5
    return float(mass.sum(axis=0) @ places / mass.sum()), float(mass.sum(axis=1) @ places / mass.sum())


def test_digits_are_scikit_learns() -> None:
    data = load_data("demo/digits")
    assert (len(data.train), len(data.val)) == (1000, 797)
    assert data.classes == [str(digit) for digit in range(10)]
    known = {image.tobytes(): label for image, label in zip(*load_digits(return_X_y=True), strict=True)}
    for source in (data.train, data.val):
        for index in range(0, len(source), 50):
            image, label = source.load(index)
            assert image.mode == "RGB"
            values = np.asarray(image)[..., 1]
            assert known[np.rint(values / 255 * 16).astype(np.float64).tobytes()] == label
    total, training = np.bincount(load_digits().target), np.bincount(data.train.labels() or [])
    assert np.abs(training - total * 1000 / 1797).max() < 1


def test_digits_splits_do_not_share_an_image() -> None:
    train, val = (
        {pixels(source, index).tobytes() for index in range(len(source))}
        for source in (load_data("demo/digits").train, load_data("demo/digits").val)
    )
    assert not train & val


@pytest.mark.parametrize("name", ["digits", *SHAPES])
def test_built_ins_are_the_same_for_every_run(name: str) -> None:
    state = random.getstate()
    one = load_data(f"demo/{name}", seed=1, val_fraction=0.5)
    random.seed(7)
    two = load_data(f"demo/{name}", seed=2)
    two.train.load(3)  # an image does not depend on those drawn before
    for first, second in ((one.train, two.train), (one.val, two.val)):
        assert first.labels() == second.labels()
        for index in (17, 5):
            assert np.array_equal(pixels(first, index), pixels(second, index))
    random.setstate(state)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_tasks_are_balanced_and_disjoint(name: str) -> None:
    data = load_data(f"demo/{name}")
    assert (len(data.train), len(data.val)) == (1000, 400)
    for source in (data.train, data.val):
        counts = Counter(source.labels() or [])
        assert len(counts) == len(data.classes)
        assert max(counts.values()) - min(counts.values()) <= 1
    drawn = [pixels(source, index) for source in (data.train, data.val) for index in range(80)]
    assert {image.shape for image in drawn} == {(SIDE, SIDE, 3)}
    assert len({hashlib.sha256(image.tobytes()).digest() for image in drawn}) == len(drawn)
    assert data.train.load(11)[1] == (data.train.labels() or [])[11]
    with pytest.raises(IndexError):
        data.val.load(400)


def test_location_is_the_bin_of_the_drawn_centre() -> None:
    source = load_data("demo/location").train
    margin = PLACED_RADII[1]
    width = (SIDE - 2 * margin) / BINS
    for index in range(120):
        scene = scene_of("location", "train", index)
        x, y = centre(coverage(source, scene, index))
        shape = scene.shapes[0]
        assert (x, y) == pytest.approx((shape.x, shape.y), abs=0.06)
        assert int((x - margin) / width) == source.load(index)[1]


def test_orientation_is_the_bin_of_the_drawn_angle() -> None:
    source = load_data("demo/orientation").val
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    seen = set()
    for index in range(200):
        scene = scene_of("orientation", "val", index)
        shape = scene.shapes[0]
        kind = next(number for number, outline in enumerate(TURNED) if outline is shape.outline)
        mass = coverage(source, scene, index)
        x, y = centre(mass)
        # the third moments of a shape with one axis of symmetry turn with it, and tell its head from its tail
        offset = ((columns - x) + 1j * (y - rows)) / shape.radius
        moment = (mass * offset * np.abs(offset) ** 2).sum() / mass.sum()
        upright = complex(*_upright_moment(shape.outline))
        angle = np.angle(moment / upright) % (2 * math.pi)
        seen.add(kind)
        assert abs(moment) > 0.005
        assert int(angle / (2 * math.pi) * BINS) == source.load(index)[1]
    assert seen == set(range(len(TURNED)))


def _upright_moment(outline: NDArray[np.float64]) -> tuple[float, float]:
    """The same moment of an outline at angle 0, by counting the points of a fine grid inside it."""
    from matplotlib.path import Path

    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, 161)] * 2), axis=-1).reshape(-1, 2)
    inside = grid[Path(outline).contains_points(grid)]
    points = inside[:, 0] + 1j * inside[:, 1]
    moment = (points * np.abs(points) ** 2).mean()
    return float(moment.real), float(moment.imag)


def test_count_is_the_number_of_separate_shapes() -> None:
    source = load_data("demo/count").train
    for index in range(160):
        scene = scene_of("count", "train", index)
        regions, found = label_regions(coverage(source, scene, index) > 0, return_num=True, connectivity=2)
        label = source.load(index)[1]
        assert found == int(source.classes[label]) == label + 1
        assert not regions[0].any()  # none is cut off at the edge
        shapes = scene.shapes
        for number, one in enumerate(shapes):
            for other in shapes[:number]:
                assert math.hypot(one.x - other.x, one.y - other.y) >= one.radius + other.radius + GAP


def test_descriptions() -> None:
    assert load_data("demo/digits").val.describe(17) == "demo/digits/val[17]"
    assert load_data("demo/count").train.describe(3) == "demo/count/train[3]"


def test_unknown_name() -> None:
    with pytest.raises(UsageError, match="did you mean location"):
        load_data("demo/locaton")
