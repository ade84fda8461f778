"""Batches: the same for the same seed and epoch, whatever else happens."""

from __future__ import annotations

import dataclasses
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prompttune.data import (
    Augment,
    Batch,
    CorruptImages,
    EpochLoader,
    ImageSource,
    load_data,
    make_loader,
)
from prompttune.errors import DataError, UsageError
from prompttune.images.augment import is_exact
from prompttune.images.preprocess import Preprocess
from tests.data_helpers import picture, spoil, write_classes

PREPROCESS = Preprocess(image_size=10, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
STRONG = Augment.preset("strong").transform(PREPROCESS)
EXACT = PREPROCESS.transform()


class Numbered(ImageSource):
    """Images in memory; the class index is the image's own, so that targets show which images came."""

    def __init__(self, size: int) -> None:
        self.classes = [str(index) for index in range(size)]

    def __len__(self) -> int:
        return len(self.classes)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return picture(index), index

    def describe(self, index: int) -> str:
        return f"numbered[{index}]"

    def labels(self) -> list[int]:
        return list(range(len(self)))


def loader(size: int = 23, transform: Any = STRONG, **settings: Any) -> EpochLoader:
    return make_loader(Numbered(size), transform, **{"batch_size": 5, "shuffle": True, "seed": 3, **settings})


def epoch(batches: EpochLoader, number: int) -> list[Batch]:
    batches.set_epoch(number)
    return list(batches)


def order(batches: list[Batch]) -> list[int]:
    return [int(target) for batch in batches for target in batch.targets]


def by_index(batches: list[Batch]) -> dict[int, torch.Tensor]:
    return {int(target): image for batch in batches for image, target in zip(batch.images, batch.targets, strict=True)}


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.targets, two.targets)
        assert one.corrupt == two.corrupt


def generator_states() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    name, key, *rest = state
    return random.getstate(), (name, key.tolist(), *rest), torch.get_rng_state().tolist()


def test_batches_have_the_stated_form() -> None:
    batches = loader()
    found = epoch(batches, 0)
    assert len(batches) == len(found) == 5
    assert [len(batch.targets) for batch in found] == [5, 5, 5, 5, 3]
    assert found[0].images.shape == (5, 3, 10, 10)
    assert found[0].images.dtype == torch.float32
    assert found[0].targets.dtype == torch.int64
    assert sorted(order(found)) == list(range(23))


def test_an_epoch_is_the_same_whatever_ran_before() -> None:
    straight, jumped = loader(), loader()
    first, third = epoch(straight, 0), [epoch(straight, number) for number in (1, 2)][-1]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert_same(third, epoch(jumped, 2))
    assert_same(first, epoch(jumped, 0))
    jumped.set_epoch(1)
    next(iter(jumped))  # an epoch that is given up
    assert_same(third, epoch(jumped, 2))


def test_epochs_and_seeds_differ_in_order_and_in_augmentation() -> None:
    one, two, three = epoch(loader(), 0), epoch(loader(), 1), epoch(loader(seed=4), 0)
    assert order(one) != order(two)
    assert order(one) != order(three)
    for other in (by_index(two), by_index(three)):
        assert sum(torch.equal(image, other[index]) for index, image in by_index(one).items()) <= 2


def test_equal_images_are_augmented_differently() -> None:
    class Equal(Numbered):
        def load(self, index: int) -> tuple[Image.Image, int]:
            return picture(0), index

    found = by_index(epoch(make_loader(Equal(8), STRONG, batch_size=8, shuffle=False, seed=0), 0))
    assert len({image.numpy().tobytes() for image in found.values()}) == 8


def test_an_augmented_image_does_not_depend_on_its_batch() -> None:
    small, large = by_index(epoch(loader(batch_size=2), 1)), by_index(epoch(loader(batch_size=9), 1))
    assert all(torch.equal(image, large[index]) for index, image in small.items())


@pytest.mark.slow
def test_workers_change_nothing() -> None:
    alone, helped = loader(), loader(workers=2)
    for number in (0, 3, 1):
        assert_same(epoch(alone, number), epoch(helped, number))
    helped.set_epoch(4)
    next(iter(helped))  # the workers hold batches of an epoch that is given up
    before = generator_states()
    assert_same(epoch(alone, 2), epoch(helped, 2))
    assert generator_states() == before


@pytest.mark.parametrize("name", ["digits", "location"])
def test_workers_can_be_started_anew(name: str) -> None:
    """Where processes are not forked, the source and the transform travel to them as bytes."""
    source, transform = load_data(f"demo/{name}", limit=16).train, Augment(hflip=0.5, color_jitter=0.2)
    sent, made = pickle.loads(pickle.dumps((source, transform.transform(PREPROCESS))))
    settings: dict[str, Any] = {"batch_size": 16, "shuffle": True, "seed": 0}
    assert_same(
        epoch(make_loader(sent, made, **settings), 1),
        epoch(make_loader(source, transform.transform(PREPROCESS), **settings), 1),
    )


@pytest.mark.parametrize("transform", [STRONG, EXACT])
def test_iterating_leaves_the_global_generators_alone(transform: Any) -> None:
    batches = loader(transform=transform)
    before = generator_states()
    epoch(batches, 1)
    assert generator_states() == before


def test_generators_are_put_back_after_an_error() -> None:
    def fail(image: Image.Image) -> torch.Tensor:
        raise RuntimeError(str(torch.rand(1)))

    before = generator_states()
    with pytest.raises(RuntimeError):
        epoch(loader(transform=fail), 0)
    assert generator_states() == before


def test_without_shuffling_the_order_is_the_sources() -> None:
    found = epoch(loader(transform=EXACT, shuffle=False), 7)
    assert order(found) == list(range(23))
    assert torch.equal(found[1].images[2], EXACT(picture(7)))


def test_drop_last() -> None:
    batches = loader(drop_last=True)
    assert [len(batch.targets) for batch in epoch(batches, 0)] == [5] * 4
    assert len(batches) == 4


@pytest.mark.parametrize(("size", "world"), [(23, 4), (24, 4), (3, 8)])
def test_shuffled_shards_are_even_and_together_the_epoch(size: int, world: int) -> None:
    shards = [epoch(loader(size, rank=rank, world_size=world, batch_size=3), 1) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    seen = [order(shard) for shard in shards]
    assert {len(part) for part in seen} == {-(-size // world)}
    assert {index for part in seen for index in part} == set(range(size))
    alone = order(epoch(loader(size), 1))
    assert [part[0] for part in seen][:size] == alone[:world]


@pytest.mark.parametrize(("size", "world"), [(23, 4), (3, 8)])
def test_shards_of_an_evaluation_hold_every_image_once(size: int, world: int) -> None:
    parts = [loader(size, EXACT, shuffle=False, rank=rank, world_size=world) for rank in range(world)]
    seen = [order(epoch(part, 0)) for part in parts]
    assert sorted(index for part in seen for index in part) == list(range(size))
    assert [len(part) for part in parts] == [-(-len(found) // 5) for found in seen]


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"workers": -1}, {"rank": 2, "world_size": 2}, {"world_size": 0}]
)
def test_numbers_that_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        loader(**settings)


# -- images that cannot be read


@pytest.fixture
def damaged(tmp_path: Path) -> ImageSource:
    """Twelve images, the first six (one class) damaged."""
    folder = write_classes(tmp_path / "train", {"bad": 6, "good": 6})
    write_classes(tmp_path / "val", {"bad": 1, "good": 1})
    spoil(sorted((folder / "bad").iterdir())[1:])
    (folder / "bad" / "000.png").unlink()
    spoil([folder / "bad" / "000.png"])
    source = load_data(str(tmp_path)).train
    (folder / "bad" / "000.png").unlink()  # gone since the folder was listed
    return source


@pytest.mark.parametrize("transform", [STRONG, EXACT])
def test_corrupt_images_are_left_out_and_named(damaged: ImageSource, transform: Any) -> None:
    batches = epoch(make_loader(damaged, transform, batch_size=4, shuffle=False, seed=0), 0)
    assert [(len(batch.targets), len(batch.corrupt)) for batch in batches] == [(0, 4), (2, 2), (4, 0)]
    assert batches[0].images.shape == (0, 3, 10, 10)
    assert batches[0].images.dtype == torch.float32
    assert batches[0].targets.dtype == torch.int64
    assert batches[1].targets.tolist() == [1, 1]
    assert batches[0].corrupt[:2] == [
        f"{damaged.describe(0)}: No such file or directory",
        f"{damaged.describe(1)}: not an image, or of an unknown format",
    ]


def test_an_augmented_image_does_not_depend_on_corrupt_ones(damaged: ImageSource) -> None:
    before = generator_states()
    (batch,) = epoch(make_loader(damaged, STRONG, batch_size=12, shuffle=False, seed=0), 0)
    alone = epoch(make_loader(damaged, STRONG, batch_size=1, shuffle=False, seed=0), 0)
    assert torch.equal(batch.images, torch.cat([one.images for one in alone]))
    assert generator_states() == before


def test_corrupt_images_count_once_up_to_the_limit(damaged: ImageSource) -> None:
    corrupt = CorruptImages(limit=6)
    batches = make_loader(damaged, EXACT, batch_size=4, shuffle=True, seed=0)
    for number in range(3):
        for batch in epoch(batches, number):
            corrupt.add(batch.corrupt)
    assert corrupt.count == 6
    assert sorted(line.rpartition(": ")[0] for line in corrupt.lines) == [damaged.describe(index) for index in range(6)]
    with pytest.raises(DataError) as caught:
        corrupt.add(["a: b.png: damaged", "a: c.png: damaged"])
    assert str(caught.value) == (
        f"8 images cannot be read (limit 6), first: {corrupt.lines[0]}; raise --max-corrupt or remove them"
    )


def test_the_reason_never_hides_the_path() -> None:
    class Odd(Numbered):
        def load(self, index: int) -> tuple[Image.Image, int]:
            raise ValueError("tile: 3: cannot\ndecode" if index else "")

    (batch,) = epoch(make_loader(Odd(2), EXACT, batch_size=2, shuffle=False, seed=0), 0)
    assert batch.corrupt == ["numbered[0]: ValueError", "numbered[1]: tile, 3, cannot decode"]


@pytest.mark.parametrize(
    ("changes", "augment"),
    [
        ({"crop_mode": "center"}, Augment()),
        ({"crop_mode": "center"}, Augment(hflip=0.5)),
        ({"crop_mode": "center", "crop_pct": 0.9}, Augment(random_crop=True)),
        ({"crop_mode": "center", "interpolation": "nearest"}, Augment()),
        ({"crop_mode": "border"}, Augment()),
        ({"crop_mode": "border"}, Augment(hflip=0.5)),
    ],
)
def test_an_image_that_cannot_be_resized_is_a_corrupt_one(
    changes: dict[str, Any], augment: Augment, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Strip(Numbered):
        def load(self, index: int) -> tuple[Image.Image, int]:
            return picture(index) if index else Image.new("RGB", (1, 90)), index

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # of 10 x 10, a strip becomes 10 x 900
    transform = augment.transform(dataclasses.replace(PREPROCESS, **changes))
    batches = make_loader(Strip(3), transform, batch_size=1, shuffle=False, seed=0)
    assert [batch.corrupt for batch in epoch(batches, 0)] == [
        ["numbered[0]: sides of 1 x 90 pixels differ too much to be resized"], [], [],
    ]  # fmt: skip


@pytest.mark.parametrize("crop_mode", ["squash", "center", "border"])
def test_an_evaluation_transform_draws_no_random_numbers(crop_mode: str) -> None:
    assert is_exact(dataclasses.replace(PREPROCESS, crop_mode=crop_mode).transform())
    assert is_exact(dataclasses.replace(PREPROCESS, interpolation="nearest").transform())


def test_a_mistake_in_a_transform_is_no_corrupt_image() -> None:
    def mistaken(image: Image.Image) -> torch.Tensor:
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        epoch(loader(transform=mistaken), 0)


def test_a_mistake_in_a_source_is_no_corrupt_image() -> None:
    class Broken(Numbered):
        def load(self, index: int) -> tuple[Image.Image, int]:
            raise AttributeError("a mistake")

    with pytest.raises(AttributeError):
        epoch(make_loader(Broken(2), EXACT, batch_size=2, shuffle=False, seed=0), 0)


@pytest.mark.gpu
def test_pinned_batches() -> None:
    found = epoch(loader(pin_memory=True), 0)
    assert all(batch.images.is_pinned() and batch.targets.is_pinned() for batch in found)
    assert_same(found, epoch(loader(), 0))
