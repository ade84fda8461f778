"""Watched folders: each image once, when it is complete."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from prompttune.errors import DataError, MissingExtraError
from prompttune.serve.infer.sources.watch import Arrivals, WatchedFolder
from tests.videos import Pulled

SETTLE_S = 0.05


def png(side: int = 4) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


class Watched:
    """A watched folder whose items a test takes one after another."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.source = WatchedFolder(folder, settle_s=SETTLE_S, **settings)
        self.pulled = Pulled(self.source.items())

    def next(self) -> str:
        item = self.pulled.next()
        assert item.error is None
        item.payload.open()
        return item.source


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    found = tmp_path / "in"
    found.mkdir()
    yield found
    shutil.rmtree(found, ignore_errors=True)  # ends a source that a failed test left behind


def test_what_is_there_comes_first_and_then_what_arrives(folder: Path) -> None:
    for name in ("b.png", "a.png", "c.txt", ".d.png"):
        (folder / name).write_bytes(png())
    (folder / "below").mkdir()
    (folder / "below" / "a.png").write_bytes(png())
    watched = Watched(folder)
    assert [watched.next() for _ in range(3)] == [f"{folder}/a.png", f"{folder}/b.png", f"{folder}/below/a.png"]
    (folder / "e.txt").write_bytes(png())
    (folder / "e.png").write_bytes(png())
    assert watched.next() == f"{folder}/e.png"
    (folder / ".f.png.part").write_bytes(png())
    (folder / ".f.png.part").rename(folder / "f.png")
    assert watched.next() == f"{folder}/f.png"
    (folder / "new" / "deep").mkdir(parents=True)
    (folder / "new" / "deep" / "g.png").write_bytes(png())  # likely before anybody watches there
    assert watched.next() == f"{folder}/new/deep/g.png"
    watched.source.close()
    assert watched.pulled.rest() == []
    assert watched.source.counts() == {"skipped": 0, "dropped": 0}


def test_hidden_folders_are_left_out_whenever_they_come(folder: Path) -> None:
    (folder / ".before").mkdir()
    (folder / ".before" / "a.png").write_bytes(png())
    (folder / "first.png").write_bytes(png())
    watched = Watched(folder)
    assert watched.next() == f"{folder}/first.png"
    (folder / ".before" / "b.png").write_bytes(png())
    (folder / ".after").mkdir()
    (folder / ".after" / "c.png").write_bytes(png())
    (folder / "last.png").write_bytes(png())
    assert watched.next() == f"{folder}/last.png"
    watched.source.close()
    assert watched.pulled.rest() == []


def test_a_folder_moved_in_brings_its_images(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.png").write_bytes(png())
    (folder / "first.png").write_bytes(png())
    watched = Watched(folder)
    assert watched.next() == f"{folder}/first.png"
    outside.rename(folder / "moved")
    assert watched.next() == f"{folder}/moved/a.png"
    watched.source.close()


def test_a_changed_image_comes_again_and_an_unchanged_one_does_not(folder: Path) -> None:
    (folder / "a.png").write_bytes(png())
    watched = Watched(folder)
    assert watched.next() == f"{folder}/a.png"
    (folder / "a.png").chmod(0o600)  # a notice without a change of content
    (folder / "b.png").write_bytes(png())
    assert watched.next() == f"{folder}/b.png"
    (folder / "a.png").write_bytes(png(9))
    assert watched.next() == f"{folder}/a.png"
    watched.source.close()
    assert watched.pulled.rest() == []


def test_what_was_answered_before_is_skipped_and_counted(folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}.png").write_bytes(png())
    watched = Watched(folder, done=lambda item: not item.source.endswith("b.png"))
    assert watched.next() == f"{folder}/b.png"
    (folder / "a.png").write_bytes(png(9))
    assert watched.next() == f"{folder}/a.png"  # new content while it is watched
    watched.source.close()
    assert watched.source.counts() == {"skipped": 2, "dropped": 0}


def test_sources_are_named_as_the_folder_was_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "link").symlink_to(folder)
    watched = Watched(Path("link"))
    (folder / "a.png").write_bytes(png())
    assert watched.next() == "link/a.png"
    watched.source.close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_files_settle_before_they_are_given(tmp_path: Path) -> None:
    clock = Clock()
    arrivals = Arrivals(1.0, clock)
    growing, empty = (tmp_path / name for name in ("growing", "empty"))

    def given(at: float) -> list[Path]:
        clock.now = at
        return list(arrivals.complete())

    for path in (growing, empty):
        path.write_bytes(b"" if path == empty else b"1")
        arrivals.note(path)
    assert given(0.9) == []
    growing.write_bytes(b"12")  # no notice needed
    assert given(1.0) == []
    assert given(1.9) == []
    assert given(2.0) == [growing]
    arrivals.note(growing)
    assert given(40.0) == []
    growing.write_bytes(b"123")
    arrivals.note(growing)
    growing.unlink()
    assert given(90.0) == []


def test_what_is_old_needs_not_settle(tmp_path: Path) -> None:
    arrivals = Arrivals(1.0, Clock())
    for name, age_s in (("old", 5.0), ("new", 0.5), ("older", 1e6)):
        (tmp_path / name).write_bytes(b"1")
        arrivals.note(tmp_path / name, age_s)
    assert list(arrivals.complete()) == [tmp_path / "old", tmp_path / "older"]


def test_a_folder_that_goes_away_ends_with_one_line(folder: Path) -> None:
    (folder / "a.png").write_bytes(png())
    watched = Watched(folder)
    watched.next()
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"^the watched folder {folder} is gone$"):
        watched.pulled.next()


def test_a_folder_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"no folder .*none to watch"):
        WatchedFolder(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with pytest.raises(MissingExtraError, match=r"prompttune\[stream\]"):
        WatchedFolder(tmp_path)
