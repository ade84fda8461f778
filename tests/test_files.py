"""Folders that are written: by one process at a time, whole or not at all, on any kind of mount."""

import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prompttune.errors import UsageError
from prompttune.files import locked, replacing_folder, visible
from tests.mounts import in_mount, root_alone

LAST = "engine.json"
HOLD = """
import sys, time
from pathlib import Path
from prompttune.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """Start a process that holds a path."""
    started = []

    def hold(path):
        other = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
        started.append(other)
        assert other.stdout.readline() == "held\n"
        return other

    yield hold
    for other in started:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("there", [False, True])
def test_a_second_writer_is_told_who_writes_and_a_killed_one_holds_nothing(tmp_path, holder, there):
    path = tmp_path / "engine"
    if there:
        path.mkdir()
    other = holder(path)
    with pytest.raises(UsageError, match=rf"writes to {path}: process {other.pid} on .* \(-c") as caught, locked(path):
        pass
    assert "\n" not in str(caught.value)
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locked(path):
        pass
    assert not there or names(path) == []
    assert names(tmp_path) == (["engine"] if there else [])


def test_a_link_and_its_folder_are_one_place(tmp_path, holder):
    (tmp_path / "v3").mkdir()
    (tmp_path / "engine").symlink_to("v3")
    holder(tmp_path / "v3")
    with pytest.raises(UsageError, match="another run writes to"), locked(tmp_path / "engine"):
        pass


def test_a_folder_made_meanwhile_is_still_held(tmp_path, holder):
    holder(tmp_path / "engine")
    (tmp_path / "engine").mkdir()
    with pytest.raises(UsageError, match="another run writes to"), locked(tmp_path / "engine"):
        pass


def _wait(pipe):
    pipe.recv()


def test_a_forked_child_takes_no_lock_along(tmp_path):
    """A loader's processes may live some seconds longer than the run that they belong to."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    with locked(tmp_path / "run"):
        child = context.Process(target=_wait, args=(theirs,))
        child.start()
    try:
        with locked(tmp_path / "run"):
            pass
    finally:
        mine.send(None)
        child.join()
    assert child.exitcode == 0


def test_one_thread_may_hold_it_twice_where_it_says_so(tmp_path):
    with locked(tmp_path / "engine"):
        with locked(tmp_path / "engine", again=True):
            pass
        with pytest.raises(UsageError), locked(tmp_path / "engine"):
            pass
    assert names(tmp_path) == []


def names(folder):
    return sorted(one.name for one in folder.iterdir())


def made(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text)


def test_a_folder_that_exists_is_filled_from_within(tmp_path):
    path = tmp_path / "engine"
    made(path, engine_json="old", model_onnx="old", gone="old")
    (path / "lost+found").mkdir()
    (path / ".snapshot").write_text("")
    inode = path.stat().st_ino
    with replacing_folder(path, LAST) as temporary:
        made(temporary, engine_json="new", model_onnx="new")
        assert (path / LAST).read_text() == "old"
    assert path.stat().st_ino == inode
    assert {one.name: Path(one.path).read_text() for one in visible(path)} == {LAST: "new", "model.onnx": "new"}
    assert names(path) == [".snapshot", LAST, "lost+found", "model.onnx"]


@pytest.mark.parametrize("broken_at", range(4))
def test_no_crash_leaves_two_halves_that_open(tmp_path, monkeypatch, broken_at):
    path = tmp_path / "engine"
    made(path, engine_json="old", model_onnx="old")
    real, calls = Path.replace, []

    def replace(self, target):
        calls.append(self)
        if len(calls) > broken_at:
            raise OSError(5, "the power failed")
        return real(self, target)

    writing = replacing_folder(path, LAST)
    made(writing.__enter__(), engine_json="new", model_onnx="new")
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="the power failed"):
        writing.__exit__(None, None, None)
    if (path / LAST).exists():
        assert (path / LAST).read_text() == (path / "model.onnx").read_text()


def test_an_error_and_a_killed_process_leave_nothing_behind(tmp_path):
    for path, kept in ((tmp_path / "new", []), (tmp_path / "old", [LAST])):
        if kept:
            made(path, engine_json="old")
        (parent := path if kept else tmp_path).joinpath(f".{path.name}.killed.part").mkdir()
        with pytest.raises(RuntimeError), replacing_folder(path, LAST):
            raise RuntimeError
        assert [name for name in names(parent) if name.startswith(".")] == []
        assert [one.name for one in visible(path)] == kept


@root_alone
def test_the_root_of_a_mount_is_written_to(tmp_path):
    (path := tmp_path / "volume").mkdir()
    code = f"""
from pathlib import Path
from prompttune.files import locked, replacing_folder
for text in ("one", "two"):
    with locked(Path("{path}")), replacing_folder(Path("{path}"), "{LAST}") as temporary:
        (temporary / "{LAST}").write_text(text)
"""
    assert in_mount(path, code, f"cat {path}/{LAST}; ls -A {path}") == f"two{LAST}\n"
    assert names(tmp_path) == ["volume"]


@root_alone
def test_a_volume_in_a_read_only_place_is_written_to(tmp_path):
    (path := tmp_path / "place").mkdir()
    code = f"""
import os
from pathlib import Path
from prompttune.files import locked, replacing_folder
path = Path("{path}")
(path / "volume").mkdir()
os.system(f"mount -t tmpfs none {{path}}/volume && mount -o remount,ro {{path}}")
with locked(path / "volume"), replacing_folder(path / "volume", "{LAST}") as temporary:
    (temporary / "{LAST}").write_text("new")
print((path / "volume" / "{LAST}").read_text(), os.listdir(path / "volume"))
"""
    assert in_mount(path, code) == f"new ['{LAST}']\n"


@root_alone
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("mount -o remount,ro {path}", "Read-only file system"),
        ("dd if=/dev/zero of={path}/all bs=64k 2>/dev/null", "No space left on device"),
    ],
)
def test_what_cannot_be_written_to_is_refused_at_once(tmp_path, spoil, said):
    (path := tmp_path / "volume").mkdir()
    code = f"""
import os
from pathlib import Path
from prompttune.errors import UsageError
from prompttune.files import locked
os.system("{spoil.format(path=path)}")
try:
    with locked(Path("{path}")):
        print("begun")
except UsageError as problem:
    print(problem)
"""
    assert said in in_mount(path, code)
    assert names(tmp_path) == ["volume"]


def test_a_file_in_the_way_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match=r"cannot write to .*(File exists|Not a directory)"),
        locked(tmp_path / "file/x"),
    ):
        pass
