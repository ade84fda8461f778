"""timm's data set factory: torchvision, Hugging Face data sets and WebDataset shards, all local."""

from __future__ import annotations

import gzip
import io
import json
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prompttune.data import load_data, make_loader
from prompttune.errors import DataError, MissingExtraError, UsageError
from prompttune.images.preprocess import Preprocess
from tests.data_helpers import descriptions, picture, spoil, write_classes

# -- torch/


def test_image_folder_with_splits(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"cat": 2, "dog": 3})
    write_classes(tmp_path / "test", {"cat": 1, "dog": 1}, start=20)
    data = load_data("torch/image_folder", root=str(tmp_path))
    assert data.classes == ["cat", "dog"]
    assert data.train.labels() == [0, 0, 1, 1, 1]
    assert descriptions(data.val) == [str(tmp_path / "test" / name / "000.png") for name in data.classes]
    assert np.array_equal(np.asarray(data.val.load(1)[0]), np.asarray(picture(21)))
    assert data.name == "torch/image_folder"


def test_image_folder_without_splits_is_split(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    data = load_data("torch/image_folder", root=str(tmp_path), val_fraction=0.25)
    train, val = set(descriptions(data.train)), set(descriptions(data.val))
    assert (len(train), len(val), len(train & val)) == (6, 2, 0)


def test_torchvision_reads_with_this_packages_rules(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 4, "dog": 4})
    for file in tmp_path.glob("cat/*.png"):
        Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16)).save(file)
    spoil(tmp_path.glob("dog/*.png"))
    data = load_data("torch/image_folder", root=str(tmp_path))
    for index, label in enumerate(data.train.labels() or []):
        if label == 0:
            assert np.asarray(data.train.load(index)[0]).tolist() == [[[128] * 3] * 4] * 4
        else:
            with pytest.raises(OSError, match="not an image"):
                data.train.load(index)


def write_mnist(root: Path, train: int, test: int) -> None:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", train), ("t10k", test)):
        images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())


def test_a_data_set_with_its_own_splits(tmp_path: Path) -> None:
    write_mnist(tmp_path, train=30, test=20)
    data = load_data("torch/mnist", root=str(tmp_path), limit=20)
    assert (len(data.train), len(data.val)) == (20, 20)
    assert data.classes[:2] == ["0 - zero", "1 - one"]
    image, label = data.val.load(13)
    assert (image.mode, label) == ("RGB", 3)
    assert np.unique(np.asarray(image)).tolist() == [13]
    assert data.val.describe(13) == "torch/mnist/validation[13]"


def test_torch_data_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give --data-root"):
        load_data("torch/mnist")
    with pytest.raises(UsageError, match="Unknown torchvision dataset nothing"):
        load_data("torch/nothing", root=str(tmp_path))
    with pytest.raises(DataError, match=r"no folder .*nowhere"):
        load_data("torch/image_folder", root=str(tmp_path / "nowhere"))


# -- hfds/


@pytest.mark.parametrize(("package", "spec"), [("datasets", "hfds/x")])
def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, package: str, spec: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed: pip install 'prompttune\[data\]'"):
        load_data(spec)


def test_hugging_face_image_folder(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "pets"
    write_classes(folder / "train", {"cat": 3, "dog": 3})
    write_classes(folder / "test", {"cat": 1, "dog": 1}, start=20)
    spoil([folder / "test" / "dog" / "000.png"])
    data = load_data(f"hfds/{folder}", root=str(tmp_path / "cache"))
    assert data.classes == ["cat", "dog"]
    assert data.train.labels() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(np.asarray(data.train.load(4)[0]), np.asarray(picture(4)))
    transform = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).transform()
    (batch,) = make_loader(data.val, transform, batch_size=2, shuffle=False, seed=0)
    assert batch.targets.tolist() == [0]
    assert batch.corrupt[0].startswith(f"hfds/{folder}/test[1] ({folder}/test/dog/000.png): not an image")


def write_parquet(folder: Path, labels: list[object], label: str = "label", image: str = "image") -> None:
    datasets = pytest.importorskip("datasets")
    columns = {image: [picture(index) for index in range(len(labels))], label: labels}
    table = datasets.Dataset.from_dict(columns).cast_column(image, datasets.Image())
    folder.mkdir()
    table.to_parquet(str(folder / "train.parquet"))


@pytest.mark.parametrize(
    ("labels", "classes"), [(["b", "a"] * 5, ["a", "b"]), ([0, 2] * 5, ["0", "1", "2"])], ids=["names", "numbers"]
)
def test_hugging_face_labels_without_class_names(tmp_path: Path, labels: list[object], classes: list[str]) -> None:
    write_parquet(tmp_path / "set", labels, image="picture")
    data = load_data(f"hfds/{tmp_path / 'set'}", root=str(tmp_path / "cache"))
    assert data.classes == classes
    assert (len(data.train), len(data.val)) == (8, 2)
    for index in range(8):
        image, label = data.train.load(index)
        number = int(data.train.describe(index).partition("train[")[2].partition("]")[0])
        assert classes[label] == str(labels[number])
        assert np.array_equal(np.asarray(image), np.asarray(picture(number)))


def test_hugging_face_data_that_are_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "unlabelled", [0, -1])
    write_parquet(tmp_path / "named", [0, 1], label="kind")
    write_parquet(tmp_path / "odd", [0.5, 1.5])
    for name, words in (
        ("unlabelled", "images without a label in its split train"),
        ("named", "no column 'label', and 0 others that could be it; its columns: image, kind"),
        ("odd", "neither class indices nor names"),
        ("nowhere", "cannot load hfds/"),
    ):
        with pytest.raises(DataError, match=words):
            load_data(f"hfds/{tmp_path / name}", root=str(tmp_path / "cache"))


# -- wds/


def write_shard(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def samples(start: int, count: int) -> dict[str, bytes]:
    """``count`` samples, the picture of each seeded with its number, the label its last digit modulo 2."""
    members = {}
    for number in range(start, start + count):
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        members[f"{number:04d}.cls"] = str(number % 2).encode()
        members[f"{number:04d}.PNG"] = buffer.getvalue()
        members[f"{number:04d}.json"] = json.dumps({"other": 1 + number % 2}).encode()
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    folder.mkdir()
    write_shard(folder / "pets-train-0.tar", samples(0, 3))
    write_shard(folder / "pets-train-1.tar", samples(3, 2))
    write_shard(folder / "pets-val-0.tar", samples(5, 2))
    return folder


def describe_splits(folder: Path, alt_label: str = "", held: str = "validation") -> None:
    splits = {
        "train": {"filenames": ["pets-train-0.tar", "pets-train-1.tar"], "shard_lengths": [3, 2], "num_samples": 5},
        held: {"filenames": ["pets-val-0.tar"], "shard_lengths": [2], "num_samples": 2},
    }
    for name, split in splits.items():
        split |= {"name": name, "alt_label": alt_label}
    (folder / "info.json").write_text(json.dumps({"splits": splits}))


@pytest.mark.parametrize("described", [True, False])
def test_shards(shards: Path, described: bool) -> None:
    if described:
        describe_splits(shards)
    data = load_data("wds/pets", root=str(shards.parent))
    assert data.classes == ["0", "1"]
    assert (data.train.labels(), data.val.labels()) == ([0, 1, 0, 1, 0], [1, 0])
    for index in (4, 0, 2):  # in any order
        assert np.array_equal(np.asarray(data.train.load(index)[0]), np.asarray(picture(index)))
    assert data.val.describe(1) == f"{shards}/pets-val-0.tar/0006.PNG"
    assert descriptions(load_data("wds/x", root=str(shards)).val) == descriptions(data.val)


def test_labels_in_the_json_member(shards: Path) -> None:
    describe_splits(shards, alt_label="other")
    assert load_data("wds/pets", root=str(shards.parent)).train.labels() == [1, 2, 1, 2, 1]


def test_shards_without_split_names_are_split(shards: Path) -> None:
    for number, file in enumerate(sorted(shards.iterdir())):
        file.rename(shards / f"{number}.tar")
    data = load_data("wds/pets", root=str(shards.parent), val_fraction=0.3)
    assert (len(data.train), len(data.val)) == (5, 2)


def test_a_corrupt_image_in_a_shard_is_named(shards: Path) -> None:
    members = samples(0, 3)
    members["0001.PNG"] = b"damaged"
    write_shard(shards / "pets-train-0.tar", members)
    train = load_data("wds/pets", root=str(shards.parent)).train
    transform = Preprocess(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).transform()
    (batch,) = make_loader(train, transform, batch_size=9, shuffle=False, seed=0)
    assert batch.targets.tolist() == [0, 0, 1, 0]
    assert batch.corrupt == [f"{shards}/pets-train-0.tar/0001.PNG: not an image, or of an unknown format"]


def without(member: str) -> dict[str, bytes]:
    return {name: content for name, content in samples(0, 3).items() if name != member}


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (without("0002.PNG"), "sample 0002 in .* has no image"),
        (without("0001.cls"), "sample 0001 in .* has no .cls member"),
        (samples(0, 2) | {"0002.png": b"", "0002.cls": b"cat"}, "label of sample 0002 in .* is not a class index"),
        ({}, "only one class|no classes"),
        (dict(reversed(samples(0, 2).items())) | {"._0001.png": b"", "2.left.jpg": b""}, "sample 2 in .* has no .cls"),
    ],
)
def test_shards_that_are_refused(shards: Path, members: dict[str, bytes], words: str) -> None:
    for file in list(shards.iterdir())[1:]:
        file.unlink()
    write_shard(next(shards.iterdir()), members)
    with pytest.raises(DataError, match=words):
        load_data("wds/pets", root=str(shards.parent))


def test_shards_that_are_cut_or_compressed_are_refused(shards: Path) -> None:
    whole = (shards / "pets-train-0.tar").read_bytes()
    (shards / "pets-train-0.tar").write_bytes(whole[: whole.rindex(b"0002.PNG")])
    with pytest.raises(DataError, match=r"cannot read the shard .*pets-train-0.tar: it is cut short"):
        load_data("wds/pets", root=str(shards.parent))
    (shards / "pets-train-0.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match=r"sample 0000 in .*pets-train-0.tar: its image is a link or compressed"):
        load_data("wds/pets", root=str(shards.parent))


@pytest.mark.parametrize("name", ["constraint-0.tar", "train-test-0.tar"])
def test_shards_of_no_split_beside_those_of_one_are_refused(shards: Path, name: str) -> None:
    (shards / "pets-val-0.tar").rename(shards / name)
    with pytest.raises(DataError, match=r"the name of the shard .*0.tar (does not name a split|has several splits)"):
        load_data("wds/pets", root=str(shards.parent))


def test_test_shards_without_labels_are_not_used(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_shard(shards / "pets-test-0.tar", {name: data for name, data in samples(7, 2).items() if "cls" not in name})
    data = load_data("wds/pets", root=str(shards.parent))
    assert len(data.val) == 2
    assert "the split test of" in caplog.text


def test_shard_folders_that_are_refused(shards: Path) -> None:
    (shards / "pets-train-1.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match=r"cannot read the shard .*pets-train-1.tar"):
        load_data("wds/pets", root=str(shards.parent))
    describe_splits(shards)
    described = json.loads((shards / "info.json").read_text())
    del described["splits"]["train"]
    (shards / "info.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="no images to train on, only a split val"):
        load_data("wds/pets", root=str(shards.parent))
    (shards / "info.json").write_text('{"splits": {"train": {}}}')
    with pytest.raises(DataError, match="does not describe splits in timm's form"):
        load_data("wds/pets", root=str(shards.parent))
    with pytest.raises(DataError, match="download them and give it as --data-root"):
        load_data("wds/nowhere")
    (shards.parent / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar shards"):
        load_data("wds/empty", root=str(shards.parent))
