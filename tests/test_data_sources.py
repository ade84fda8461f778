"""Folders, tables, splits and limits."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prompttune.data import ImageSource, Subset, file_at, load_data, load_parts
from prompttune.data.base import LabelledSource, with_classes
from prompttune.data.files import Walk, find_images
from prompttune.data.splitting import split_indices
from prompttune.errors import DataError, UsageError
from tests.data_helpers import descriptions, picture, write_classes


class Masks(LabelledSource):
    def load(self, index: int) -> tuple[Image.Image, Any]:
        return Image.new("RGB", (3, 1)), np.array([[0, 1, 255]], np.uint8)


def test_masks_of_a_split_with_some_of_the_classes_are_renumbered() -> None:
    found = with_classes(Masks([0], ["sky", "road"]), ["road", "car", "sky"], "x")
    assert found.load(0)[1].tolist() == [[2, 0, 255]]
    assert found.load(0)[1].dtype == np.uint8


def counts(source: ImageSource) -> Counter[str]:
    labels = source.labels()
    assert labels is not None
    return Counter(source.classes[label] for label in labels)


@pytest.mark.parametrize("held", ["val", "validation", "valid", "test"])
def test_train_and_validation_folders(tmp_path: Path, held: str) -> None:
    write_classes(tmp_path / "train", {"cat": 3, "dog": 2})
    write_classes(tmp_path / held, {"cat": 1, "dog": 1}, start=50)
    data = load_data(str(tmp_path))
    assert data.classes == data.train.classes == data.val.classes == ["cat", "dog"]
    assert data.name == str(tmp_path)
    assert counts(data.train) == {"cat": 3, "dog": 2}
    assert descriptions(data.val) == [str(tmp_path / held / name / "000.png") for name in ("cat", "dog")]
    image, label = data.val.load(1)
    assert label == 1
    assert np.array_equal(np.asarray(image), np.asarray(picture(51)))


def test_val_goes_before_test(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2), ("val", 1)):
        write_classes(tmp_path / split, {"a": count, "b": count})
    assert len(load_data(str(tmp_path)).val) == 2


def test_training_folder_alone_is_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 5, "b": 5})
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.val)) == (8, 2)


SPELLINGS = ["Train:Val", "training:validation", "training_set:test_set", "TRAIN:dev", "Train-Images:Testing",
             "train2017:val2017", "trainset:valid", "train:Eval"]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_splits_by_any_usual_name(tmp_path: Path, spelling: str) -> None:
    train, held = spelling.split(":")
    write_classes(tmp_path / train, {"cat": 3, "dog": 2})
    write_classes(tmp_path / held, {"cat": 1, "dog": 1}, start=50)
    data = load_data(str(tmp_path))
    assert data.classes == ["cat", "dog"]
    assert (len(data.train), len(data.val)) == (5, 2)


def test_the_parts_of_a_data_set(tmp_path: Path) -> None:
    for number, (split, count) in enumerate((("train", 3), ("val", 2), ("test", 1))):
        write_classes(tmp_path / "set" / split, {"a": count, "b": count}, start=10 * number)
    parts = load_parts(str(tmp_path / "set"))
    assert {split: len(source) for split, source in parts.named.items()} == {"train": 6, "val": 4, "test": 2}
    assert file_at(parts.named["test"], 1) == (tmp_path / "set" / "test" / "b" / "000.png", "test/b/000.png")
    whole = load_parts(str(tmp_path / "set" / "test"))
    assert list(whole.named) == ["all"]
    assert file_at(Subset(whole.named["all"], [1]), 0) == (tmp_path / "set" / "test" / "b" / "000.png", "b/000.png")
    assert load_parts("demo/digits").named["val"].classes[:2] == ["0", "1"]
    assert file_at(load_parts("demo/digits").named["val"], 0) is None


def test_a_data_set_that_is_scored_needs_no_training_images(tmp_path: Path) -> None:
    write_classes(tmp_path / "Test", {"a": 2, "b": 0, "zebra": 1})
    parts = load_parts(str(tmp_path))
    assert list(parts.named) == ["test"]
    assert parts.named["test"].classes == ["a", "b", "zebra"]
    assert parts.named["test"].labels() == [0, 0, 2]
    with pytest.raises(DataError, match="has no images to train on, only a split test"):
        load_data(str(tmp_path))


def test_validation_may_lack_a_class(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 2, "b": 2, "c": 2})
    write_classes(tmp_path / "val", {"c": 1, "b": 1})
    val = load_data(str(tmp_path)).val
    assert val.classes == ["a", "b", "c"]
    assert val.labels() == [1, 2]
    assert val.load(1)[1] == 2


def test_test_images_without_class_folders_do_not_validate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_classes(tmp_path / "train", {"nok": 5, "ok": 5})
    write_classes(tmp_path, {"test": 6})
    data = load_data(str(tmp_path))
    assert (data.classes, len(data.train), len(data.val)) == (["nok", "ok"], 8, 2)
    assert f"{tmp_path}/test has no class folders, so its 6 images have no labels" in caplog.text
    picture(0).save(tmp_path / "sample.png")
    caplog.clear()
    load_data(str(tmp_path))
    assert f"1 images directly in {tmp_path} are in no class folder: they are not used" in caplog.text


def test_a_split_inside_a_folder_of_its_name(tmp_path: Path) -> None:
    write_classes(tmp_path / "training_set" / "training_set", {"a": 3, "b": 3})
    write_classes(tmp_path / "test_set" / "test_set", {"a": 1, "b": 1})
    data = load_data(str(tmp_path))
    assert (data.classes, len(data.train), len(data.val)) == (["a", "b"], 6, 2)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["train/a", "train/b", "Train/a", "Train/b"], "the folders .* mean the same split"),
        (["train/a", "train/b", "val/a", "valid/a"], "the folders .* mean the same split"),
        (["car", "train"], r"folders of splits \(train\) beside other folders with images \(car\)"),
        (["valid", "invalid"], "rename a class with a split's name"),
        (["train", "test"], "train has no class folders"),
        (["cat/train", "cat/test", "dog/train", "dog/test"], "cat holds folders of splits .* split before the class"),
        (["train/a", "train/b", "train/test"], "train holds the folder test, which has a split's name"),
        (["pets/train/a", "pets/train/b", "pets/val/a"], "pets holds folders of splits .* give that folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_apart(tmp_path: Path, folders: list[str], words: str) -> None:
    for number, name in enumerate(folders):
        write_classes(tmp_path, {name: 2}, start=10 * number)
    with pytest.raises(DataError, match=words):
        load_data(str(tmp_path))


def test_class_names_are_compared_in_one_unicode_form(tmp_path: Path) -> None:
    for split, form in (("train", "NFC"), ("val", "NFD")):
        write_classes(tmp_path / split, {unicodedata.normalize(form, "café"): 2, "tea": 2})
    data = load_data(str(tmp_path))
    assert data.classes == ["café", "tea"]
    assert len(data.val) == 4
    write_classes(tmp_path / "train", {unicodedata.normalize("NFD", "café"): 2})
    with pytest.raises(DataError, match="two class folders café, which differ in their Unicode form alone"):
        load_data(str(tmp_path))


@pytest.mark.parametrize("name", ["\udc94L", "a/\udcff"])
def test_names_that_are_no_text(tmp_path: Path, name: str) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2})
    write_classes(tmp_path, {name: 2})
    with pytest.raises(DataError, match=r"the name b'.*\\x.*' in .* is not text in UTF-8: rename it"):
        load_data(str(tmp_path))


def test_links_bring_each_file_once(tmp_path: Path) -> None:
    data, pool = tmp_path / "data", tmp_path / "pool"
    write_classes(data, {"cat": 3, "dog": 3})
    write_classes(pool, {"more": 2})
    for name, target in (
        ("cat/all", "."), ("cat/up", ".."), ("cat/top", "../.."), ("cat/0.png", "../dog/000.png"),
        ("cat/dogs", "../dog"), ("cat/pool", "../../pool/more"), ("dog/pool", "../../pool/more"), ("wolf", "../pool"),
    ):  # fmt: skip
        (data / name).symlink_to(target)
    whole = ["cat/000.png", "cat/001.png", "cat/002.png", "dog/000.png", "dog/001.png", "dog/002.png"]
    assert Walk(data).images == [*whole, "wolf/more/000.png", "wolf/more/001.png"]  # a class before a link inside one
    (data / "wolf").unlink()
    assert counts(load_parts(str(data)).named["all"]) == {"cat": 5, "dog": 3}
    (data / "ox").symlink_to("dog")
    with pytest.raises(DataError, match=r"class folder .*ox holds no image; its files have been found elsewhere"):
        load_data(str(data))


def test_folders_that_systems_make_are_hidden(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2, "__MACOSX/a": 1, "a/@eaDir": 1})
    assert [len(part) for part in load_parts(str(tmp_path)).named.values()] == [4]


def test_links_to_nowhere_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_classes(tmp_path, {"a": 1})
    (tmp_path / "a" / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "unmounted").symlink_to("/nowhere/pool")
    assert [path.name for path in find_images([tmp_path])] == ["000.png", "gone.png"]
    assert caplog.messages == [f"2 links in {tmp_path} lead nowhere, the first: a/self"]


def test_which_files_are_images(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a" / ".hidden").mkdir()
    (tmp_path / "a" / "deep" / "er").mkdir(parents=True)
    for name in (".x.png", ".hidden/y.png", "notes.txt"):
        (tmp_path / "a" / name).write_bytes(b"")
    picture(9).save(tmp_path / "a" / "deep" / "er" / "Z.JPG")
    data = load_data(str(tmp_path), val_fraction=0.4)
    assert data.classes == ["a", "b"]
    found = {Path(path).name for path in descriptions(data.train) + descriptions(data.val) if "/a/" in path}
    assert found == {"000.png", "001.png", "Z.JPG"}


def test_a_split_is_stratified_seeded_and_whole(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 20, "b": 10, "c": 5})
    first, again, other = (load_data(str(tmp_path), seed=seed) for seed in (3, 3, 4))
    assert counts(first.val) == {"a": 4, "b": 2, "c": 1}
    assert descriptions(first.val) == descriptions(again.val) != descriptions(other.val)
    assert len({*descriptions(first.train), *descriptions(first.val)}) == len(first.train) + len(first.val) == 35


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_every_class_keeps_a_training_image(fraction: float) -> None:
    labels = [0] + [1] * 2 + [2] * 3 + [3] * 40
    train, val = split_indices(len(labels), labels, fraction, seed=1)
    assert {labels[index] for index in train} == {0, 1, 2, 3}
    assert val
    assert 0 not in [labels[index] for index in val]
    assert sorted(train + val) == list(range(len(labels)))


def test_a_split_without_labels() -> None:
    train, val = split_indices(10, None, 0.3, seed=0)
    assert (len(train), len(val)) == (7, 3)


def test_limit_keeps_every_class_then_the_proportions(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 30, "b": 10, "c": 1})
    write_classes(tmp_path / "val", {"a": 2, "b": 2, "c": 2})
    three, nine, all_of_them = (load_data(str(tmp_path), limit=limit) for limit in (3, 9, 1000))
    assert counts(three.train) == {"a": 1, "b": 1, "c": 1}
    assert counts(nine.train) == {"a": 6, "b": 2, "c": 1}
    assert set(descriptions(three.train)) < set(descriptions(nine.train))
    assert (len(three.val), len(nine.val), len(all_of_them.train)) == (3, 6, 41)


def empty_class(folder: Path) -> None:
    write_classes(folder, {"a": 1, "b": 0})


def other_classes(folder: Path) -> None:
    write_classes(folder / "train", {"a": 1, "b": 1})
    write_classes(folder / "val", {"a": 1, "c": 1})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, "has no class folders; put the images of each class"),
        (empty_class, "b holds no image; add images or remove the folder"),
        (lambda folder: write_classes(folder, {"a": 3}), "has only one class, a"),
        (lambda folder: write_classes(folder, {"a": 1, "b": 1}), "no class .* has two images"),
        (other_classes, "only in training: b; only in validation: c; give both"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, make: object, words: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=words) as caught:
        load_data(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["nowhere", "some/where", "no.csv", "tfds/mnist"])
def test_missing_data(spec: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"^no .*{spec}"):
        load_data(spec, root=str(tmp_path))


@pytest.mark.parametrize("settings", [{"val_fraction": 0.0}, {"val_fraction": 1.0}, {"limit": 0}])
def test_settings_that_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        load_data("demo/digits", **settings)  # type: ignore[arg-type]


def test_root_is_where_relative_paths_begin(tmp_path: Path) -> None:
    write_classes(tmp_path / "pets", {"a": 2, "b": 2})
    assert load_data("pets", root=str(tmp_path)).classes == ["a", "b"]


# -- tables


def table(folder: Path, text: str) -> str:
    for seed in range(6):
        picture(seed).save(folder / f"{seed}.png")
    (folder / "images.csv").write_text(text, encoding="utf-8")
    return str(folder / "images.csv")


def test_a_table_is_split(tmp_path: Path) -> None:
    names = ["cat", '"dog, big"']
    rows = [f"{index}.png,{names[index // 3]}" for index in range(6)]
    data = load_data(table(tmp_path, "\n".join(["\ufeffpath, label", *rows])), val_fraction=1 / 3)
    assert data.classes == ["cat", "dog, big"]
    assert counts(data.train) == {"cat": 2, "dog, big": 2}
    for source in (data.train, data.val):
        for index in range(len(source)):
            number = int(Path(source.describe(index)).stem)
            image, label = source.load(index)
            assert np.array_equal(np.asarray(image), np.asarray(picture(number)))
            assert label == number // 3


def test_a_table_with_splits(tmp_path: Path) -> None:
    text = "label,note,split,path\na,,train,0.png\nb,x,train,1.png\na,,val,2.png\nb,,test,3.png\n\n"
    data = load_data(table(tmp_path, text))
    assert descriptions(data.train) == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    assert descriptions(data.val) == [str(tmp_path / "2.png")]
    assert data.val.classes == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: no column path and label"),
        ("path,label\n", "has a header but no rows"),
        ("file,label\n0.png,a\n", r"line 1: no column path \(columns: file, label\)"),
        ("path,label\n0.png,a\n1.png,\n", "line 3: no label"),
        ("path,label\n0.png,a\n1.png\n", "line 3 has 1 cells and the header 2"),
        ("path,label\n,a\n", "line 2: no path"),
        ("path,label\n0.png,a\n1.png,a\n", "only one class, a"),
        ("path,label\n0.png,a\n1.png,b\n0.png,b\n", "line 4: 0.png is already on line 2"),
        (
            "path,label,split\n0.png,a,train\n1.png,b,trian\n",
            "line 3: the split must be train, val or test, not 'trian'",
        ),
        ("path,label,split\n0.png,a,val\n", "has no images to train on, only a split val"),
        ("path,label,split\n0.png,a,train\n1.png,b,train\n2.png,c,val\n", "line 4: the label 'c' occurs in no"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        load_data(table(tmp_path, text))
    assert str(tmp_path / "images.csv") in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"path,label\n0.png,caf\xe9\n", "line 2 is not in UTF-8: save it as UTF-8"),
        ("path,label\n0.png,a\n".encode("utf-16"), "is in UTF-16: save it as UTF-8"),
        ("path,label\n0.png,a\n".encode("utf-16-le"), "is in UTF-16: save it as UTF-8"),
        (b"path,label\n0.png,a\n" + b"1.png,a\0\n", "line 3 holds a zero byte"),
        (b"path;label\n0.png;a\n", "line 1: no column path and label, and its columns are separated by semicolons"),
        (b"path\tlabel\n0.png\ta\n", "separated by tabs: save it with commas"),
        (b"path,label,path\n0.png,a,1.png\n", "2 columns are called path"),
        (b"path,label\n0.png,fish, fresh water\n", "line 2 has 3 cells and the header 2; put quotes around"),
        (b'path,label\n0.png,"a\n1.png,b\n2.png,"c"\n', r"line 2: the quotes do not match"),
        (b'path,label\n0.png,"a\n1.png,b\n2.png,c"\n', r"line 2: the quote that opens there closes on line 4"),
        (b'path,label\n\n0.png,"a\n1.png,b\n', r"line 3: the quotes do not match .*close the quote that opens there"),
        (b"path,label\n0.png,a\n1.png,NaN\n", "line 3: the label 'NaN' stands for a missing one"),
        (b"path,label\n0.png,a\n1.png,None\n", "line 3: the label 'None' stands for a missing one"),
        (b"path,label\ncat\\0.png,a\ndog\\1.png,b\n", r"line 2: cat\\0.png is a path of Windows"),
        (b"path,label\nC:/cat/0.png,a\n", "line 2: C:/cat/0.png is a path of Windows, and nothing is at"),
        (b"path,label\n" + b"iVBORw0KGgo" * 5 + b",a\n", "line 2: the column path holds base64 text"),
        (b"path,label\n" + b"iVBORw0KGgo" * 20_000 + b",a\n", "line 2: a cell of more than 131072 characters"),
    ],
)  # fmt: skip
def test_files_that_are_no_table(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "images.csv").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_data(str(tmp_path / "images.csv"))
    assert str(tmp_path / "images.csv") in str(caught.value)


def test_what_a_table_may_hold(tmp_path: Path) -> None:
    """Spellings of splits and headers, empty rows of a spreadsheet, Windows' paths, either form of Unicode."""
    write_classes(tmp_path, {"one": 3, unicodedata.normalize("NFD", "é"): 1})
    rows = [
        "Path,LABEL,Split,",
        "one\\000.png,café,Training,",
        f"one/001.png,{unicodedata.normalize('NFD', 'café')},TRAIN,",
        "one/002.png,tea,train_set,",
        ",,,",
        "é/000.png,tea,Valid,",
    ]
    (tmp_path / "images.csv").write_text("\r\n".join(rows), encoding="utf-8-sig", newline="")
    data = load_data(str(tmp_path / "images.csv"))
    assert data.classes == ["café", "tea"]
    assert (data.train.labels(), data.val.labels()) == ([0, 0, 1], [1])
    for source in (data.train, data.val):
        for index in range(len(source)):
            source.load(index)


def test_a_long_path_is_not_base64(tmp_path: Path) -> None:
    folder = "/".join(["a" * 60] * 5)
    write_classes(tmp_path, {folder: 2, "b": 2})
    rows = [f"{folder}/000.png,a", f"{folder}/001.png,a", "b/000.png,b", "b/001.png,b"]
    (tmp_path / "images.csv").write_text("\n".join(["path,label", *rows]))
    assert load_data(str(tmp_path / "images.csv")).classes == ["a", "b"]


def test_the_splits_of_a_table(tmp_path: Path) -> None:
    rows = ["0.png,a,train", "1.png,b,train", "2.png,a,test", "3.png,zebra,test", "4.png,b,dev"]
    parts = load_parts(table(tmp_path, "\n".join(["path,label,split", *rows])))
    assert {split: source.classes for split, source in parts.named.items()} == {
        "train": ["a", "b"], "val": ["b"], "test": ["a", "zebra"]
    }  # fmt: skip
    assert file_at(parts.named["val"], 0) == (tmp_path / "4.png", "4.png")


# -- what is read


def test_formats_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_classes(tmp_path / "data", {"cat": 4, "dog": 4, "emu": 0})
    for name in ("cat/IMG_1.NEF", "cat/IMG_2.nef", "dog/art.psd", "dog/.x.psd"):
        (tmp_path / "data" / name).write_bytes(b"")
    assert len(find_images([tmp_path / "data"])) == 8
    words = f"3 files in {tmp_path / 'data'} are not read: 2 .nef, 1 .psd; convert it to PNG or JPEG"
    assert caplog.messages == [words]
    (tmp_path / "data" / "emu" / "IMG_1.nef").write_bytes(b"")
    with pytest.raises(DataError, match=r"class folder .*emu holds no image that is read here: 1 \.nef; convert it"):
        load_data(str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"no images below .*emu: 1 \.nef; convert it to PNG or JPEG"):
        find_images([tmp_path / "data" / "emu"])


def test_every_command_finds_the_same_images(tmp_path: Path) -> None:
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    write_classes(tmp_path / "cat", {"a": 1, ".hidden": 1})
    (tmp_path / "cat" / "loop").symlink_to("..")
    (tmp_path / "cat" / "again").symlink_to(".")
    parts = load_parts(str(tmp_path)).named["all"]
    found = [str(path) for path in find_images([tmp_path])]
    assert descriptions(parts) == found == [str(tmp_path / name) for name in Walk(tmp_path).images]
    assert [str(path) for path in find_images([f"{tmp_path}/**/*.png"])] == found
    assert [path.name for path in find_images([f"{tmp_path}/c?t/*.png"])] == ["000.png", "001.png"]


def test_only_one_file_looks_for_images_in_folders() -> None:
    """One walk for all commands; the other places list folders of their own making."""
    own = {
        "prompttune/training/state.py", "prompttune/training/image_states.py",
        "prompttune/checkpoints/importing/run.py", "prompttune/files.py",
        "prompttune/cli/doctor.py", "export/build.py", "export/formats/onnx_int8.py", "export/folder.py",
        "export/runtimes/opening.py",
        "serve/infer/sinks/overlays.py", "serve/infer/sinks/parquet.py",
        "serve/service/catalogue.py",
    }  # fmt: skip
    root = Path(__file__).parents[1]
    walking = re.compile(r"os\.walk|\.rglob\(|\.iterdir\(|glob\(|scandir|listdir")
    found = {
        str(file.relative_to(root))
        for package in ("prompttune", "export", "serve")
        for file in (root / package).rglob("*.py")
        if walking.search(file.read_text(encoding="utf-8"))
    }
    assert found - own == {"prompttune/data/files.py"}
    for name in found & own:
        assert "is_image" not in (root / name).read_text(encoding="utf-8")
