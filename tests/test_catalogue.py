"""Tasks on disk: read without their states, followed as they change."""

import os
import shutil

import pytest

from prompttune.errors import EngineError
from prompttune.export.folder import STATE_FILE, TASK_RECORD, EngineFolder, read_record
from prompttune.serve.service.catalogue import Catalogue
from tests.engines import copied, exported


@pytest.fixture
def engine(tmp_path):
    return EngineFolder(copied("sa2vp", tmp_path / "engine"))


@pytest.fixture
def more(engine, tmp_path):
    """A watched folder with a copy of ``task1`` called ``other``."""
    folder = tmp_path / "more"
    shutil.copytree(engine.path / "tasks/task1", folder / "other")
    return folder


def test_a_record_says_what_the_whole_task_says():
    folder = EngineFolder(exported("sa2vp"))
    for name in folder.tasks():
        record, task = read_record(folder.path / "tasks" / name), folder.read_task(name)
        assert (record.name, record.version) == (name, task.version)
        assert (record.labels, record.preprocess, dict(record.shapes)) == (task.labels, task.preprocess, task.shapes())


def test_finds_the_tasks_of_all_folders(engine, more):
    scan = Catalogue(engine, [more]).scan()
    assert list(scan.records) == ["other", "task0", "task1"]
    assert scan.records["other"].folder == more / "other"
    assert not scan.problems


def test_a_later_folder_hides_an_earlier_one(engine, more):
    (more / "other").rename(more / "task0")
    catalogue = Catalogue(engine, [more])
    assert catalogue.scan().records["task0"].folder == more / "task0"
    assert catalogue.find("task0").folder == more / "task0"


def test_axes_hold_every_task(engine, more):
    catalogue = Catalogue(engine)
    assert catalogue.axes(catalogue.scan().records) == {"rank": 3, "classes": 3}


def test_reads_again_only_what_changed(engine, monkeypatch):
    catalogue, read = Catalogue(engine), []
    monkeypatch.setattr(
        "prompttune.serve.service.catalogue.read_record", lambda folder: read.append(folder.name) or read_record(folder)
    )
    first = catalogue.scan()
    assert sorted(read) == ["task0", "task1"]
    assert catalogue.scan() == first
    assert len(read) == 2
    record = engine.path / "tasks/task1" / TASK_RECORD
    os.utime(record, ns=(1, 1))
    catalogue.scan()
    assert read[2:] == ["task1"]


def test_new_and_gone_tasks_are_seen(engine):
    catalogue = Catalogue(engine)
    catalogue.scan()
    shutil.copytree(engine.path / "tasks/task0", engine.path / "tasks/new")
    shutil.rmtree(engine.path / "tasks/task1")
    assert list(catalogue.scan().records) == ["new", "task0"]
    assert catalogue.find("task1") is None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / TASK_RECORD).unlink(), "task record"),
        (lambda folder: (folder / TASK_RECORD).write_text("{"), "task record"),
        (lambda folder: (folder / STATE_FILE).unlink(), "missing"),
        (lambda folder: (folder / STATE_FILE).write_bytes(b"\x10\0\0\0\0\0\0\0junk"), "damaged"),
        (lambda folder: folder.rename(folder.parent / "mixed"), "mixed"),
        (lambda folder: folder.rename(folder.parent / "bad name"), "bad task name"),
    ],
)
def test_a_bad_task_is_a_line_and_the_others_are_served(engine, spoil, said):
    spoil(engine.path / "tasks/task1")
    scan = Catalogue(engine).scan()
    assert list(scan.records) == ["task0"]
    [problem] = scan.problems.values()
    assert said in problem
    assert "\n" not in problem


def test_a_task_of_another_method_does_not_fit(engine, tmp_path):
    other = EngineFolder(exported("linear"))
    shutil.copytree(other.path / "tasks/task0", engine.path / "tasks/linear")
    assert "does not fit" in Catalogue(engine).scan().problems["linear"]
    with pytest.raises(EngineError, match="does not fit"):
        Catalogue(engine).find("linear")


@pytest.mark.parametrize("name", ["../task0", "..", "/etc", "task0/../task1", ".hidden", ""])
def test_no_name_leaves_the_folders(engine, name):
    shutil.copytree(engine.path / "tasks/task0", engine.path / "tasks/.hidden")
    assert Catalogue(engine).find(name) is None


def test_a_folder_to_watch_must_be_there(engine, tmp_path):
    with pytest.raises(EngineError, match="does not exist"):
        Catalogue(engine, [tmp_path / "nowhere"])
