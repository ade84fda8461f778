"""Image states that training keeps: the same result as without them, and no image is read twice."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prompttune as pt
from prompttune.data import load_data, make_loader
from prompttune.data.base import FileSource
from prompttune.errors import DataError
from prompttune.model import KnownImages, PromptModel
from prompttune.training import TrainResult, train
from prompttune.training.image_states import MIB, Room
from prompttune.training.state import RunFolder, load
from tests.segmenting import write_blocks
from tests.training_helpers import SIDE, config, no_pictures, one_thread, write_folder  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "no_pictures")

TUNED = {
    "linear": {"method": "linear"},
    "sa2vp": {"method": "sa2vp", "rank": 4},
    "lora": {"method": "lora", "dropout": 0.1},
    "dam-vp": {"method": "dam-vp"},
    "bf16": {"method": "sa2vp", "rank": 4, "precision": "bf16"},
    "balanced": {"method": "linear", "class_weights": "balanced", "limit": 11},
    "convolutional": {"method": "sa2vp", "rank": 4, "backbone": "test_convnext"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), train=6, val=2)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Numbers of images that were read and of images whose state was computed."""
    counts = {"read": 0, "computed": 0}
    read, compute = FileSource.load, PromptModel.image_state

    def reading(self: FileSource, index: int) -> Any:
        counts["read"] += 1
        return read(self, index)

    def computing(self: PromptModel, images: Tensor | KnownImages) -> Any:
        counts["computed"] += 0 if isinstance(images, KnownImages) else len(images)
        return compute(self, images)

    monkeypatch.setattr(FileSource, "load", reading)
    monkeypatch.setattr(PromptModel, "image_state", computing)
    return counts


def notes(data: Path, output: Path, **changes: Any) -> tuple[TrainResult, list[str]]:
    lines: list[str] = []
    settings = config(data, output, **{"batch_size": 5, **changes})
    result = train(settings, on_progress=lambda news: lines.append(news.text) if news.phase == "note" else None)
    return result, lines


def assert_equal(one: Path, other: Path) -> None:
    """All tensors of two runs, of the optimiser too, and all figures but times are the same."""
    first, second = load(RunFolder(one).last), load(RunFolder(other).last)
    for part in ("task", "best", "optimizer"):
        ours, theirs = getattr(first, part), getattr(second, part)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name], name
    timed = {"seconds", "images_per_second"}
    figures = [[{k: v for k, v in epoch.items() if k not in timed} for epoch in run.progression.history]
               for run in (first, second)]  # fmt: skip
    assert figures[0] == figures[1]
    assert first.progression.corrupt == second.progression.corrupt


@pytest.mark.parametrize("name", TUNED)
def test_a_run_ends_with_the_bits_of_one_without_cache(data: Path, tmp_path: Path, name: str) -> None:
    _, lines = notes(data, tmp_path / "kept", **TUNED[name])
    notes(data, tmp_path / "plain", cache=False, **TUNED[name])
    assert sum("kept in memory" in line for line in lines) == 2
    assert_equal(tmp_path / "kept", tmp_path / "plain")


@pytest.mark.parametrize(("cache", "passes"), [(True, 1), (False, 4)])
def test_every_image_is_read_and_computed_once(
    data: Path, tmp_path: Path, work: dict[str, int], cache: bool, passes: int
) -> None:
    notes(data, tmp_path / "run", method="linear", epochs=4, cache=cache, batch_size=8)
    again = not cache and load(RunFolder(tmp_path / "run").last).progression.best_epoch < 4
    assert work["read"] == 32 * passes + 8 * again
    shapes = 16 if cache else 0  # a batch of each split shows them
    assert work["computed"] == 32 * passes + 8 * again + shapes


def test_states_beyond_the_memory_go_to_a_file_that_leaves_nothing(data: Path, tmp_path: Path) -> None:
    _, lines = notes(data, tmp_path / "file", cache_memory=0, method="sa2vp", rank=4)
    assert [line for line in lines if f"kept in a file in {tmp_path / 'file'}" in line]
    assert not list((tmp_path / "file").glob(".*"))
    notes(data, tmp_path / "plain", cache=False, method="sa2vp", rank=4)
    assert_equal(tmp_path / "file", tmp_path / "plain")


def test_no_room_is_one_line_and_the_same_run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, lines = notes(data, tmp_path / "none", cache_memory=0, cache_disk=0, method="linear")
    assert (
        sum("do not fit and are computed in every epoch; see --cache-memory and --cache-disk" in line for line in lines)
        == 2
    )

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    _, lines = notes(data, tmp_path / "full", cache_memory=0, method="linear")
    assert sum("do not fit" in line for line in lines) == 2
    assert not list((tmp_path / "full").glob(".*"))
    assert_equal(tmp_path / "none", tmp_path / "full")


def test_the_bound_holds_for_both_splits_together(data: Path, tmp_path: Path) -> None:
    # 24 and 8 images, of each 101 tokens of 64 float32 and its class; sa2vp adds as many keys and values
    _, lines = notes(data, tmp_path / "run", method="lora", image_size=160, cache_memory=1)
    kept = [("in memory" in line, float(re.findall(r"([\d.]+) MiB", line)[0])) for line in lines if "states" in line]
    assert kept == [(True, 0.6), (True, 0.2)]
    _, lines = notes(data, tmp_path / "more", method="sa2vp", rank=4, image_size=160, cache_memory=2)
    kept = [("in memory" in line, float(re.findall(r"([\d.]+) MiB", line)[0])) for line in lines if "states" in line]
    assert kept == [(True, 1.8), (False, 0.6)]


def test_the_file_of_a_killed_run_is_removed_unread(data: Path, tmp_path: Path) -> None:
    left = tmp_path / "run" / ".image_states.killed"
    left.parent.mkdir()
    left.write_bytes(b"of another run")
    notes(data, tmp_path / "run", cache_memory=0, method="linear")
    assert not left.exists()


def test_full_fine_tuning_keeps_nothing(data: Path, tmp_path: Path, work: dict[str, int]) -> None:
    _, lines = notes(data, tmp_path / "run", method="full", epochs=2)
    assert not [line for line in lines if "image states" in line]
    assert work["read"] >= 64


def test_augmented_images_are_not_kept_and_validation_images_are(
    data: Path, tmp_path: Path, work: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "prompttune.training"):
        _, lines = notes(data, tmp_path / "run", method="linear", epochs=3, augment="light")
    assert [record.getMessage() for record in caplog.records if "augmentation" in record.getMessage()]
    assert [line.split(",")[0] for line in lines if "image states" in line] == ["the image states of 8 images"]
    assert work["read"] == 3 * 24 + 8


def test_unreadable_images_are_counted_as_without_cache(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", train=4, val=2)
    for name in ("train/north/00.png", "train/west/03.png", "val/east/01.png"):
        (data / name).write_bytes(b"no picture")
    for name in ("00.png", "01.png", "02.png", "03.png"):
        (data / "train" / "south" / name).write_bytes(b"no picture")
    notes(data, tmp_path / "kept", method="linear", batch_size=2)
    notes(data, tmp_path / "plain", method="linear", batch_size=2, cache=False)
    assert_equal(tmp_path / "kept", tmp_path / "plain")
    assert len(load(RunFolder(tmp_path / "kept").last).progression.corrupt) == 7
    with pytest.raises(DataError, match=r"cannot be read \(limit 5\)"):
        notes(data, tmp_path / "many", method="linear", max_corrupt=5)


@pytest.mark.parametrize("head", ["linear", "pyramid"])
def test_segmentation_keeps_maps_and_masks(tmp_path: Path, head: str) -> None:
    data = write_blocks(tmp_path / "data", (7, 4))
    shared = {"task_type": "segmentation", "head": head, "method": "linear", "epochs": 2, "image_size": 64}
    _, lines = notes(data, tmp_path / "kept", **shared)
    assert sum("kept in memory" in line for line in lines) == 2
    notes(data, tmp_path / "plain", cache=False, **shared)
    assert_equal(tmp_path / "kept", tmp_path / "plain")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_an_undisturbed_one(data: Path, tmp_path: Path, workers: int) -> None:
    shared = {"method": "sa2vp", "rank": 4, "epochs": 4, "schedule": "constant", "warmup_epochs": 0}
    whole = train(config(data, tmp_path / "whole", **shared))
    train(config(data, tmp_path / "short", **shared | {"epochs": 2}, workers=workers))
    train(config(data, tmp_path / "short", **shared, workers=workers, cache_memory=0), resume=True)
    assert_equal(whole.path, tmp_path / "short")


def test_batches_tell_the_places_of_readable_images(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", train=2, val=1)
    (data / "train" / "east" / "01.png").write_bytes(b"no picture")
    source, backbone = load_data(str(data)).train, pt.load_backbone("test_vit", SIDE, "random:0")
    shared = {"batch_size": 3, "shuffle": True, "seed": 0}
    for workers in (0, 1):
        loader = make_loader(source, backbone.default_preprocess().transform(), workers=workers, **shared)
        for indices, batch in zip(loader.indices(), loader, strict=True):
            bad = [place for place, index in enumerate(indices) if source.describe(index).endswith("east/01.png")]
            assert batch.places == [place for place in range(len(indices)) if place not in bad]
            assert len(batch.corrupt) == len(bad)
    assert [one for part in loader.in_order().indices() for one in part] == list(range(8))


def test_a_disk_keeps_half_of_its_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=2 * MIB))
    room = Room(memory=0, disk=100 * MIB, folder=tmp_path)
    assert room._make_file(MIB + 1) is None
    file = room._make_file(MIB)
    assert file is not None
    assert file.stat().st_size == MIB
