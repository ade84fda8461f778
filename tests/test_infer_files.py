"""Images by files, folders, patterns and lists, and where their labels come from."""

import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prompttune.data.files import find_images
from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.sources.files import ImageFiles, ImageList
from prompttune.serve.infer.sources.labels import Labels, target_index


def save(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(path)
    return path


def shades(source):
    return [item.payload.open().getpixel((0, 0))[0] for item in source.items()]


@pytest.fixture
def photos(tmp_path):
    """Six images in nested folders, a hidden one, and a file that is none."""
    folder = tmp_path / "photos"
    for index in range(6):
        save(folder / ("a" if index < 3 else "b/c") / f"{index}.{'png' if index % 2 else 'PNG'}", index)
    save(folder / "a" / ".hidden.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_finding_images(photos):
    everything = find_images([str(photos)])
    assert [path.name[0] for path in everything] == list("012345")
    assert find_images([str(photos / "**" / "*.png")]) == [path for path in everything if path.suffix == ".png"]
    named = [str(photos / "notes.txt"), str(photos / "a" / "0.PNG")]
    assert list(map(str, find_images(named))) == named


def test_a_name_with_brackets_is_a_file_before_it_is_a_pattern(tmp_path):
    path = save(tmp_path / "x[1].png")
    assert find_images([str(path)]) == [path]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("empty", DataError, "no images below"),
        ("*.webp", UsageError, "nothing matches"),
        ("nowhere.jpg", UsageError, "no file or folder"),
    ],
)
def test_inputs_without_images(photos, name, error, message):
    (photos / "empty").mkdir()
    with pytest.raises(error, match=message):
        find_images([str(photos / name)])


def test_urls_are_refused_at_once():
    with pytest.raises(UsageError, match=r"^https://host/a\.jpg: prompttune reads no URLs: download it first$"):
        find_images(["https://host/a.jpg"])


def test_a_folder_that_cannot_be_entered_is_not_left_out(photos, monkeypatch):
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("c"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"cannot read the folder .*c: Permission denied"):
        find_images([str(photos)])


def test_files_are_items_in_order(photos):
    paths = find_images([str(photos)])
    source = ImageFiles([*paths, photos / "nowhere.png"])
    items = list(source.items())
    assert [item.source for item in items] == [str(path) for path in paths] + [str(photos / "nowhere.png")]
    assert source.total == len(items) == 7
    assert source.bounded
    assert [item.row for item in items] == [None] * 7
    assert pickle.loads(pickle.dumps(items[4].payload)).open().getpixel((0, 0)) == (4, 4, 4)
    with pytest.raises(OSError, match="No such file"):
        items[6].payload.open()


def test_a_closed_source_ends(photos):
    source = ImageFiles(find_images([str(photos)]))
    items = source.items()
    next(items)
    source.close()
    assert list(items) == []


def test_names_that_are_no_text_can_be_written(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    save(path)
    (tmp_path / "list.txt").write_bytes(os.fsencode(path) + b"\n")
    for source in (ImageFiles([path]), ImageList(tmp_path / "list.txt")):
        item = next(iter(source.items()))
        assert item.source.encode("utf-8").endswith(rb"/caf\xe9.png")
        assert item.payload.open().size == (6, 4)


def test_lists(photos, tmp_path):
    lines = ["\ufeff# comment", str(photos / "a" / "0.PNG"), "", "  ", "https://host/a.jpg", "photos/a/1.png", "gone"]
    path = tmp_path / "list.txt"
    path.write_text("\r\n".join(lines), encoding="utf-8")
    source = ImageList(path)
    items = list(source.items())
    assert [(item.source, item.row) for item in items] == [(lines[row], row) for row in (1, 4, 5, 6)]
    assert source.total == 4
    assert [item.error for item in items] == [None, "prompttune reads no URLs: download it first", None, None]
    assert items[2].payload.open().getpixel((0, 0)) == (1, 1, 1)
    with pytest.raises(OSError, match="No such file"):
        items[3].payload.open()


def test_relative_paths_of_a_list_belong_to_one_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for name, shade in (("a.png", 1), ("b.png", 2)):
        save(there / name, shade)
    save(here / "b.png", 9)
    path = there / "list.txt"
    path.write_text("gone.png\na.png\nb.png\n")
    monkeypatch.chdir(here)
    items = list(ImageList(path).items())
    # a.png is the first that there is, and it is beside the list: so b.png is the one beside the list
    assert [item.payload.path for item in items] == [there / name for name in ("gone.png", "a.png", "b.png")]
    save(here / "a.png", 8)
    assert [item.payload.path.resolve() for item in ImageList(path).items()][2] == here / "b.png"


def test_lists_that_name_nothing(tmp_path):
    (tmp_path / "list.txt").write_text("# nothing\n\n")
    with pytest.raises(DataError, match=r"the list .* names no image: write a path on each line"):
        ImageList(tmp_path / "list.txt")
    with pytest.raises(UsageError, match=r"no file .*nowhere\.txt; a list is"):
        ImageList(tmp_path / "nowhere.txt")


def test_lists_in_another_encoding(tmp_path):
    for content, message in (
        ("a.png\n".encode("utf-16"), r"the list .* is in UTF-16: save it as UTF-8"),
        (b"a.png\nb.png\n0123456789\0.png\n", r"the list .* line 3 holds a zero byte"),
    ):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(DataError, match=message):
            ImageList(tmp_path / "list.txt")


def test_paths_of_another_system(tmp_path):
    save(tmp_path / "photos" / unicodedata.normalize("NFD", "é.png"), 7)
    lines = ["photos\\é.png", "photos/é.png", "C:\\photos\\é.png", "photos\\gone.png"]
    (tmp_path / "list.txt").write_bytes("\r\n".join(lines).encode() + b"\r\nphotos/\xe9.png")
    items = list(ImageList(tmp_path / "list.txt").items())
    assert [item.payload and item.payload.open().getpixel((0, 0))[0] for item in items] == [7, 7, None, None, None]
    assert "is a path of Windows, and nothing is at" in items[2].error
    assert "its name is not in UTF-8: save the list as UTF-8" in items[4].error
    labels = Labels.parse(write_labels(tmp_path, "photos\\é.png,a", "D:\\x\\other.png,b", "none.png,NaN"))
    assert [labels.of(item.payload.path) for item in items[:2]] == ["a", "a"]
    assert labels.of(tmp_path / "other.png") == "b"
    assert labels.of(tmp_path / "none.png") is None


def test_labels_of_folders(photos, monkeypatch):
    labels = Labels.parse("folder")
    assert [item.target for item in ImageFiles(find_images([str(photos)]), labels).items()] == ["a"] * 3 + ["c"] * 3
    monkeypatch.chdir(photos / "a")
    assert [labels.of(Path(name)) for name in ("0.PNG", "../b/c/3.png", "/x.png")] == ["a", "c", None]


def test_labels_of_a_column_are_not_those_of_files(photos):
    labels = Labels.parse("species")
    assert labels.column == "species"
    assert labels.of(photos / "a" / "0.PNG") is None
    assert Labels.parse("folder").column is None


def write_labels(folder, *rows, header="path,label"):
    path = folder / "labels.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return str(path)


def test_labels_of_a_table(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    text = write_labels(
        tmp_path,
        "a/0.PNG,written",  # by the path as it is given
        "photos/a/1.png, placed ",  # relative to the table
        "/elsewhere/2.PNG,named",  # from another machine
        '"photos/b/c/3.png",""',
        "one/4.PNG,ambiguous",
        "two/4.PNG,ambiguous",
    )
    source = ImageFiles(find_images(["a", "b"]), Labels.parse(text))
    assert [item.target for item in source.items()] == ["written", "placed", "named", None, None, None]


def test_a_label_does_not_go_to_a_namesake(tmp_path):
    images = [save(tmp_path / folder / "1.png") for folder in ("a", "b")]
    labels = Labels.parse(write_labels(tmp_path, "a/1.png,cat"))
    assert [labels.of(image) for image in images] == ["cat", None]


def test_labels_through_a_linked_folder(tmp_path):
    save(tmp_path / "real" / "1.png")
    (tmp_path / "link").symlink_to("real")
    labels = Labels.parse(write_labels(tmp_path, "real/1.png,cat"))
    assert labels.of(tmp_path / "link" / "1.png") == "cat"


def test_labels_of_lists(photos, tmp_path):
    (tmp_path / "list.txt").write_text("photos/a/0.PNG\nphotos/a/1.png\n")
    labels = Labels.parse(write_labels(tmp_path, "photos/a/1.png,one"))
    assert [item.target for item in ImageList(tmp_path / "list.txt", labels).items()] == [None, "one"]
    assert [item.target for item in ImageList(tmp_path / "list.txt", Labels.parse("folder")).items()] == ["a", "a"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    labels = Labels.parse(write_labels(elsewhere, "photos/a/0.PNG,zero", "other/0.PNG,two"))
    assert [item.target for item in ImageList(tmp_path / "list.txt", labels).items()] == ["zero", None]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (["a.png,x", "b.png,y", "./a.png,z"], "path,label", r"line 4: \./a\.png is already on line 2"),
        ([",x"], "path,label", r"line 2: no path"),
        (["a.png,x"], "file,label", r"line 1: no column path \(columns: file, label\); the header must be path,label"),
        (["a,b.png,x"], "path,label", r"line 2 has 3 cells and the header 2"),
        (['"a.png,x'], "path,label", r"the labels .* line 2: the quotes do not match"),
    ],
)
def test_damaged_label_tables(tmp_path, rows, header, message):
    with pytest.raises(DataError, match=message) as problem:
        Labels.parse(write_labels(tmp_path, *rows, header=header))
    assert "\n" not in str(problem.value)


def test_labels_that_are_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"no file .*labels\.csv for --labels"):
        Labels.parse(str(tmp_path / "labels.csv"))
    with pytest.raises(UsageError, match="--labels needs"):
        Labels.parse("")


@pytest.mark.parametrize(
    ("target", "labels", "as_index", "index"),
    [
        ("dog", ["cat", "dog"], False, 1),
        ("1", ["cat", "dog"], False, None),
        ("1", ["cat", "dog"], True, 1),
        ("2", ["cat", "dog"], True, None),
        ("-1", ["cat", "dog"], True, None),
        ("١", ["cat", "dog"], True, None),
        ("0", ["1", "0"], True, 1),
        (unicodedata.normalize("NFD", "café"), ["tea", "café"], False, 1),
        ("9" * 5000, ["cat"], True, None),
    ],
)
def test_the_class_that_a_target_means(target, labels, as_index, index):
    assert target_index(target, labels, as_index) == index
