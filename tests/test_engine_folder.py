"""Engine folders that others write to, that nothing can be written to, and that hold damaged tasks."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import prompttune as pt
from prompttune.cli.main import cli
from prompttune.errors import EngineError, UsageError
from prompttune.export import EngineFolder, add_task
from prompttune.files import locked
from tests.engines import checkpoint, copied, noise
from tests.mounts import root_alone


def test_one_writer_at_a_time(tmp_path):
    folder, new = copied("linear", tmp_path), tmp_path / "new"
    task = EngineFolder(folder).read_task("task0")
    writers = {
        folder: [
            lambda: add_task(folder, "late", checkpoint("linear", 4)),
            lambda: EngineFolder(folder, verify=False).remove_task("task0"),
            lambda: EngineFolder(folder).write_task("late", task),
            lambda: pt.Engine(folder).add_task("late", checkpoint("linear", 4)),
            lambda: pt.export_engine([checkpoint("linear", 0)], folder, overwrite=True),
        ],
        new: [lambda: pt.export_engine([checkpoint("linear", 0)], new)],
    }
    for path, calls in writers.items():
        with ThreadPoolExecutor(1) as other, locked(path):
            for call in calls:
                with pytest.raises(UsageError, match=rf"another run writes to {path}: process {os.getpid()} "):
                    other.submit(call).result()
    assert EngineFolder(folder).tasks() == ["task0", "task1"]
    assert [one.name for one in tmp_path.iterdir()] == ["engine"]


def test_export_into_a_folder_that_exists_keeps_that_folder(tmp_path):
    (path := tmp_path / "volume").mkdir()
    (path / "lost+found").mkdir()
    inode = path.stat().st_ino
    for overwrite in (False, True):
        pt.export_engine([checkpoint("linear", 0)], path, overwrite=overwrite, parity=False)
    assert path.stat().st_ino == inode
    assert EngineFolder(path).tasks() == ["task0"]
    shown = {"engine.json", "lost+found", "model.onnx", "model.onnx.data", "tasks", "versions"}
    assert {one.name for one in path.iterdir()} == shown


def test_a_disk_without_room_is_told_before_the_graph_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr("prompttune.export.build._write_engine", lambda *_: pytest.fail("too late"))
    with pytest.raises(EngineError, match=r"needs at least \d+ MB, but only 0 MB are free"):
        pt.export_engine([checkpoint("linear", 0)], tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


DAMAGE = {
    "bad-json": lambda folder: (folder / "task.json").write_text("{"),
    "no-state": lambda folder: (folder / "state.safetensors").unlink(),
    "short": lambda folder: (folder / "state.safetensors").write_bytes(b"0"),
    "foreign": lambda folder: [one.unlink() for one in folder.iterdir()],
    "bad name": lambda _: None,
}


def test_damaged_tasks_hide_no_others(tmp_path):
    folder = copied("linear", tmp_path)
    for name, spoil in DAMAGE.items():
        spoil(Path(shutil.copytree(folder / "tasks/task0", folder / "tasks" / name)))
    shutil.copytree(folder / "tasks/task0", folder / "tasks/.task0.abc.part")
    (folder / "tasks/lost+found").mkdir()
    listed = CliRunner().invoke(cli, ["tasks", "list", str(folder), "--json"])
    shown = json.loads(listed.stdout)
    assert listed.exit_code == 0
    assert sorted(name for name, one in shown.items() if "damaged" in one) == sorted(DAMAGE)
    assert (
        shown["task0"]
        == {**json.loads((folder / "tasks/task0/task.json").read_text()), "digest": None} | {"digest": None}
        or "digest" not in shown["task0"]
    )
    engine = pt.Engine(folder)
    assert engine.predict(noise(1), "task1")
    for name in ("bad-json", "no-state", "short", "foreign"):
        with pytest.raises(EngineError, match=name):
            engine.predict(noise(1), name)
    add_task(folder, "aaa", checkpoint("linear", 4))
    for name in DAMAGE:
        EngineFolder(folder, verify=False).remove_task(name)
    assert EngineFolder(folder).tasks() == ["aaa", "task0", "task1"]


def test_a_listing_reads_no_state_and_verifying_reads_all(tmp_path):
    folder = copied("linear", tmp_path)
    state = folder / "tasks/task0/state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    listed, verified = (CliRunner().invoke(cli, ["tasks", "list", str(folder), *more]) for more in ([], ["--verify"]))
    assert (listed.exit_code, verified.exit_code) == (0, 1)
    assert "task0" in listed.stdout
    assert "damaged: task0: " in verified.stderr
    assert "task1" in verified.stdout


@pytest.mark.slow
@root_alone
def test_a_task_for_a_read_only_engine_is_refused_before_the_work(tmp_path):
    folder = copied("linear", tmp_path)
    script = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder} && "
    command = (
        f"{sys.executable} -m prompttune.cli.main tasks add {folder} late={checkpoint('linear', 4)} --weights nowhere"
    )
    ran = subprocess.run(["unshare", "-m", "sh", "-c", script + command], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "Read-only file system" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
