"""Data sets that are objects of Python, from training to features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from torchvision.datasets import ImageFolder

import prompttune as pt
from prompttune.data import load_data, load_parts
from prompttune.data.objects import settled
from prompttune.errors import DataError, UsageError
from prompttune.training.state import RunFolder
from tests.data_helpers import spoil, write_classes
from tests.training_helpers import no_pictures, one_thread  # noqa: F401

GREY = np.zeros((4, 4, 3), np.uint8)
KINDS: dict[str, Callable[[np.ndarray], Any]] = {
    "pil": Image.fromarray,
    "array": lambda pixels: pixels,
    "tensor": lambda pixels: torch.from_numpy(pixels).permute(2, 0, 1),
}


@pytest.fixture(scope="module")
def backbone() -> pt.Backbone:
    return pt.load_backbone("test_vit", 32, "random:0")


class Colours(Dataset[Any]):
    """Noise over one of three colours."""

    def __init__(self, size: int = 12, kind: str = "pil", **attributes: Any) -> None:
        self.size, self.kind = size, kind
        self.read: list[int] = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        self.read.append(index)
        pixels = np.random.default_rng(index).integers(0, 60, (24, 20, 3)).astype(np.uint8)
        pixels[..., index % 3] += 150
        return KINDS[self.kind](pixels), index % 3


class Given(Dataset[Any]):
    """Items as they are given."""

    def __init__(self, *items: Any, **attributes: Any) -> None:
        self.items = items
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def pixels_of(data: Any, index: int = 0) -> list[Any]:
    return np.asarray(load_parts(settled(data)).named["all"].load(index)[0]).tolist()  # type: ignore[no-any-return]


def test_every_kind_of_image_gives_the_same_pixels() -> None:
    expected = np.asarray(Colours()[4][0]).tolist()
    assert [pixels_of(Colours(kind=kind), 4) for kind in KINDS] == [expected] * 3


def test_class_names_and_labels_come_from_where_they_are_told() -> None:
    def source(data: Any) -> Any:
        return load_parts(settled(data)).named["all"]

    plain = source(Colours(7))
    assert (plain.classes, plain.labels()) == (["0", "1", "2"], [0, 1, 2, 0, 1, 2, 0])
    assert source(Colours(classes=["r", "g", "b"])).classes == ["r", "g", "b"]
    assert source(Colours(class_to_idx={"b": 2, "r": 0, "g": 1})).classes == ["r", "g", "b"]
    known = Colours(4, classes=["r", "g", "b"], targets=torch.tensor([0, 1, 2, 0]))
    assert source(known).labels() == [0, 1, 2, 0]
    assert known.read == [0]  # the first image alone, to see what it is
    part = source(ConcatDataset([Subset(known, [2, 1]), known]))
    assert (part.labels(), part.classes, part.load(0)[1]) == ([2, 1, 0, 1, 2, 0], ["r", "g", "b"], 2)


def test_torchvision_folders_are_read_by_this_packages_rules(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    for file in tmp_path.glob("cat/*.png"):
        Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(file)
    folder = ImageFolder(tmp_path)
    source = load_parts(settled(folder)).named["all"]
    assert np.asarray(source.load(0)[0]).tolist() == [[[128] * 3] * 4] * 4
    assert source.describe(0) == str(tmp_path / "cat" / "000.png")
    assert folder.loader is ImageFolder(tmp_path).loader  # the user's object is as it was


def test_lists_of_paths_and_labels(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    files = sorted(tmp_path.rglob("*.png"))
    named = load_parts(settled([(file, file.parent.name) for file in files])).named["all"]
    assert (named.classes, named.labels()) == (["cat", "dog"], [0, 0, 1, 1])
    numbers = load_parts(settled([(str(file), label) for file, label in zip(files, (10, 2, 10, 2), strict=True)]))
    assert (numbers.named["all"].classes, numbers.named["all"].labels()) == (["2", "10"], [1, 0, 1, 0])
    for rows, message in (
        ([], "the list of .path, label. is empty"),
        ([(files[0], 0), files[1]], "item 1 of the list is not a pair .path, label., but PosixPath"),
        ([(GREY, 0)], "item 0 of the list is not a pair .path, label., but .ndarray, int."),
        ([(files[0], 0), (files[1], -1)], "item 1 of the list has the label -1: class indices count from 0"),
        ([(files[0], 0.5)], "item 0 of the list has the label 0.5, which is not a whole number"),
        ([(files[0], None)], "item 0 of the list has the label None"),
        ([(files[0], " ")], "item 0 of the list has the label ' '"),
        ([(files[0], 0), (files[0], 1)], "items 0 and 1 of the list are both .*: list each image once"),
        ([(tmp_path / "no.png", 0)], "item 0 of the list: the file .*no.png does not exist"),
    ):
        with pytest.raises(UsageError, match=message):
            settled(rows)  # type: ignore[arg-type]


def test_a_path_is_a_path_even_where_its_name_is_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_classes(tmp_path / "demo" / "digits", {"cat": 3, "dog": 3})
    assert load_data(settled(Path("demo/digits"))).classes == ["cat", "dog"]
    config = pt.TrainConfig(data=Path("demo/digits"), output=tmp_path / "run")  # type: ignore[arg-type]
    assert (config.data, config.output) == ("./demo/digits", str(tmp_path / "run"))


def test_items_that_fail_are_told_by_their_number(backbone: pt.Backbone) -> None:
    class Failing(Colours):
        def __getitem__(self, index: int) -> tuple[Any, Any]:
            if index == 1:
                raise KeyError("boom")
            return super().__getitem__(index)

    told = "Failing.1. cannot be read. KeyError. 'boom'"
    with pytest.raises(DataError, match=f"the label of Failing.1. cannot be read .{told}.: give the data set targets"):
        settled(Failing())
    found = pt.features(backbone, Failing(3, targets=[0, 1, 2]), device="cpu")
    assert (found.names, len(found.corrupt)) == (["Failing[0]", "Failing[2]"], 1)
    with pytest.raises(UsageError, match="features are those of a model, a checkpoint folder or a backbone, not of 3"):
        pt.features(3, Colours())  # type: ignore[arg-type]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Stream(), "Stream is an iterable-style data set, which has no index: give a map-style one, or a folder"),
        (DataLoader(Colours()), "the data are a DataLoader: give the data set that it reads, loader.dataset"),
        (3j, "the data are a complex: give a path, a map-style data set with a length, or a list of"),
        (Given(), "the data set Given is empty"),
        (Given({"image": GREY}), r"Given\[0\] is a dict, not a pair \(image, label\)"),
        (Given((GREY, 0), (GREY, 1.0)), r"Given\[1\] has the label 1.0, which is not a whole number from 0"),
        (Given((GREY, "cat")), r"Given\[0\] has the label 'cat'"),
        (Given((GREY, torch.tensor([0, 1]))), r"Given\[0\] has the label tensor\(\[0, 1\]\)"),
        (Given((GREY, 0), (GREY, -1)), r"Given\[1\] has the label -1: class indices count from 0"),
        (Given((GREY, 0), (GREY, 2), classes=["a", "b"]), r"Given\[1\] has the label 2, but the data set names 2"),
        (Given((torch.zeros(3, 4, 4), 0)), r"Given\[0\] has the image Tensor torch.float32 \[3, 4, 4\]: give a PIL"),
        (Given((GREY[..., 0], 0)), r"Given\[0\] has the image ndarray uint8 \[4, 4\]: give a PIL"),
        (Given((None, 0)), r"Given\[0\] has the image NoneType: give a PIL"),
        (Given((GREY, 0), class_to_idx={"a": 1}), "class_to_idx of Given does not number its classes from 0"),
        ({"train": Colours(), "dev": Colours()}, "unknown split 'dev'"),
        ({}, "the data are an empty mapping"),
    ],
)
def test_what_cannot_be_read_is_one_line(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_parts(settled(data)).named["all"].labels()


def config(output: Path, data: Any, **changes: Any) -> pt.TrainConfig:
    settings = {"backbone": "test_vit", "weights": "random:0", "image_size": 32, "method": "linear", "epochs": 1}
    return pt.TrainConfig(data=data, output=str(output), tensorboard=False, **{**settings, **changes})


@pytest.mark.usefixtures("no_pictures", "one_thread")
def test_a_data_set_is_trained_on_resumed_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, colours = tmp_path / "run", Colours(classes=["r", "g", "b"])
    backbone = pt.load_backbone("test_vit", 32, "random:0")
    result = pt.train(config(run, {"train": colours, "val": Colours(6, "array")}), backbone, progress=True)
    shown = capsys.readouterr().err
    assert "12 training and 6 validation images of 3 classes" in shown
    assert "epoch 1/1  loss" in shown
    assert shown.strip().endswith(result.summary)
    assert "data: object:Colours[12+6]-" in RunFolder(run).settings.read_text()
    again = pt.train(config(run, {"train": colours, "val": Colours(6, "array")}), backbone, resume=True)
    assert again.was_over
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match=r"other settings: data is 'object:Colours\[12\+7\]-.*', was 'object:Colours"):
        pt.train(config(run, {"train": colours, "val": Colours(7)}), backbone, resume=True)
    scored = pt.evaluate(run, Colours(6, "tensor", classes=["r", "g", "b"]), backbone=backbone)
    assert (scored.n, scored.top1) == (6, result.best_score)
    with pytest.raises(UsageError, match="was a Python object, which cannot be loaded by name"):
        pt.evaluate(run, backbone=backbone)


def test_a_segmentation_takes_no_object(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="segmentation: data must be a folder or a built-in, not an object"):
        config(tmp_path, Colours(), task_type="segmentation", method="lspt")


def test_features_of_a_data_set(tmp_path: Path) -> None:
    write_classes(tmp_path, {"train/cat": 2, "train/dog": 3, "test/dog": 1, "test/emu": 1})
    spoil([tmp_path / "train" / "dog" / "001.png"])
    backbone = pt.load_backbone("test_vit", 32, "random:0")
    model = pt.PromptModel(backbone, "vpt-deep", 3).train()
    found = pt.features(model, tmp_path, batch_size=2, device="cpu")
    assert model.training
    assert (found.features.shape, found.features.dtype) == ((6, 64), np.float32)
    assert found.classes == ["cat", "dog", "emu"]
    folders = [Path(name).parent.name for name in found.names]
    assert folders == [found.classes[label] for label in found.labels] == ["cat", "cat", "dog", "dog", "dog", "emu"]
    assert len(found.corrupt) == 1
    plain = pt.features(backbone, tmp_path, split="train", device="cpu")
    image = backbone.default_preprocess().transform()(pt.read_image(plain.names[3]))
    with torch.no_grad():
        expected = backbone(image[None])[0]
    torch.testing.assert_close(torch.from_numpy(plain.features[3]), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(DataError, match="has no split val"):
        pt.features(backbone, tmp_path, split="val")
