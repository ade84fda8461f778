"""No call of the command line ends in a traceback: full disks, no memory, dead workers, damaged files."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from prompttune.cli.main import TRACEBACK, cli
from prompttune.data.loading import loading, make_loader
from prompttune.errors import DataError
from prompttune.training import train
from prompttune.training.state import RunFolder
from tests.engines import checkpoint, copied
from tests.training_helpers import CLASSES, config, no_pictures, one_thread, write_folder

__all__ = ["no_pictures", "one_thread"]

HERE = Path(__file__).parent


class _Source:
    """Images of which one does something instead of being read."""

    def __init__(self, act: Callable[[], None], at: int = 3) -> None:
        self.classes = ["a", "b"]
        self._act, self._at = act, at

    def __len__(self) -> int:
        return 8

    def load(self, index: int) -> tuple[Image.Image, int]:
        if index == self._at:
            self._act()
        return Image.new("RGB", (8, 8)), 0

    def describe(self, index: int) -> str:
        return str(index)

    def labels(self) -> list[int] | None:
        return None


def _plain(image: Image.Image) -> torch.Tensor:
    return torch.full((3, 8, 8), float(image.width))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave() -> None:
    os._exit(3)


def _no_memory() -> None:
    raise MemoryError


def _line(result: Result) -> str:
    """The one line of an error; anything but that fails."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (1, 2), result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1
    assert result.stderr.rstrip().endswith(lines[0])
    assert "Traceback" not in result.output
    return lines[0]


# ------------------------------------------------------------------ workers of the loader


@pytest.mark.parametrize("act", [_kill, _leave, _no_memory])
def test_a_worker_that_ends_is_one_line(act: Callable[[], None]) -> None:
    batches = make_loader(_Source(act), _plain, batch_size=2, shuffle=False, seed=0, workers=1)
    with pytest.raises(DataError, match=r"^a loading worker .*--workers.*--resume") as raised, loading():
        list(batches)
    assert "\n" not in str(raised.value)


def test_another_error_of_a_block_that_loads_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="CUDA error"), loading():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_workers_bring_the_same_batches() -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        source = _Source(lambda: None)
        return [
            batch.images for batch in make_loader(source, _plain, batch_size=3, shuffle=True, seed=0, workers=workers)
        ]

    for here, there in zip(batches(0), batches(1), strict=True):
        assert torch.equal(here, there)
        assert there.dtype is torch.float32
        there += 1  # as an augmentation on the batch may


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root and unshare")
def test_workers_do_not_need_shared_memory() -> None:
    """With 64 kB of /dev/shm, as little as can be; torch's way would wait for ever."""
    script = (
        "from tests.test_no_traceback import _Source, _plain; from prompttune.data import make_loader\n"
        "grow = lambda image: _plain(image).repeat(1, 64, 64)\n"
        "batches = make_loader(_Source(lambda: None), grow, batch_size=2, shuffle=False, seed=0, workers=2)\n"
        "print(sum(len(batch.targets) for batch in batches))"
    )
    command = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} -c '{script}'"
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", command], cwd=HERE.parent, capture_output=True, text=True, timeout=120
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.stdout.strip() == "8", done.stderr


@pytest.mark.slow
def test_a_run_goes_on_after_its_worker_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None, one_thread: None
) -> None:
    data, here = write_folder(tmp_path / "data", train=4, val=2), os.getpid()
    config_ = config(data, tmp_path / "run", workers=1, epochs=2)
    from prompttune.data.base import FileSource

    load, epochs = FileSource.load, RunFolder.of(str(tmp_path / "run")).last

    def fatal(source: FileSource, index: int) -> tuple[Image.Image, int]:
        if os.getpid() != here and epochs.exists():
            _kill()
        return load(source, index)

    with monkeypatch.context() as patch:
        patch.setattr(FileSource, "load", fatal)
        with pytest.raises(DataError, match="a loading worker"):
            train(config_)
    assert train(config_, resume=True).epochs == 2


# ------------------------------------------------------------------ every command under injected failures


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, a checkpoint and an engine, which is the current one."""
    for folder in write_folder(tmp_path / "data", train=2, val=1).glob("*/*"):  # the checkpoint's classes
        folder.rename(folder.with_name(str(CLASSES.index(folder.name))))
    shutil.copytree(checkpoint("linear", 2), tmp_path / "run")
    copied("linear", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = "train --backbone test_vit --image-size 32 --weights random --method linear --epochs 1 --no-tensorboard"
COMMANDS = {
    "train": f"{TRAIN} --data data --output new",
    "meta": "meta --data data --data data --output new --backbone test_vit --image-size 32 --weights random --steps 1 "
    "--inner-steps 1 --prompt-size 4",
    "evaluate": "evaluate run --data data --output new",
    "explain": "explain run data/val/0 --output new --limit 1",
    "export": "export run --output new",
    "add": "tasks add engine new=run",
    "validate": "validate engine --output new.json",
    "infer": "infer engine --task task0 data/val --output new.jsonl",
}


def _invoke(name: str) -> Result:
    return CliRunner().invoke(cli, COMMANDS[name].split())


def _raising(problem: BaseException) -> Callable[..., None]:
    def act(*_: object, **__: object) -> None:
        raise problem

    return act


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
TORCH_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 9 bytes")


@pytest.mark.parametrize("name", ["train", "meta", "explain", "export", "add", "validate", "infer"])
def test_a_full_disk_is_one_line(name: str, place: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> None:
    monkeypatch.setattr(os, "fsync", _raising(FULL))
    assert "No space left on device" in _line(_invoke(name))


@pytest.mark.parametrize("problem", [MemoryError(), TORCH_MEMORY])
@pytest.mark.parametrize("name", ["train", "meta", "evaluate", "explain", "add", "validate"])
def test_no_memory_is_one_line(
    name: str, problem: Exception, place: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", _raising(problem))
    assert _line(_invoke(name)).startswith("Error: out of memory; use smaller batches")


def test_what_nobody_expected_is_one_line_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", _raising(KeyError("cls")))
    assert _line(_invoke("evaluate")) == (
        f"Error: KeyError: 'cls'; prompttune did not expect this: {TRACEBACK}=1 shows where it happened"
    )
    monkeypatch.setenv(TRACEBACK, "1")
    assert isinstance(_invoke("evaluate").exception, KeyError)


def test_a_reader_that_leaves_ends_a_command_quietly() -> None:
    command = f"{sys.executable} -m prompttune.cli.main --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_pipe_to_something_else_that_breaks_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", _raising(BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert _line(_invoke("evaluate")) == "Error: Broken pipe"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root and unshare")
def test_a_disk_that_is_full_when_tensors_are_saved_is_one_line(place: Path) -> None:
    """safetensors tells of it in an error of its own."""
    # room for the small files of a run alone
    script = f"mkdir full && mount -t tmpfs -o size=32k tmpfs full && exec {sys.executable} -m prompttune.cli.main "
    train = COMMANDS["train"].replace("new", "full/run").replace("linear", "vpt-deep")
    done = subprocess.run(
        [
            "unshare",
            "--mount",
            "bash",
            "-c",
            script + train,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: No space left on device: full/run/prompt_model.safetensors; free some space")


DAMAGES = {
    "empty": b"",
    "garbage": b"\x00\xff\xfegarbage{",
    "another value": b"[]",
    "another object": b"{}",
    "nested too deep": b"[" * 100_000,
    "half": None,
    "a folder": None,
    "gone": None,
}


def _damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if kind == "a folder":
        file.mkdir()
    elif kind != "gone":
        file.write_bytes(content[: len(content) // 2] if kind == "half" else DAMAGES[kind] or b"")


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("run/prompt_config.json", "evaluate"),
        ("run/prompt_config.json", "export"),
        ("run/prompt_model.safetensors", "explain"),
        ("run/prompt_model.safetensors", "add"),
        ("engine/engine.json", "infer"),
        ("engine/engine.json", "add"),
        ("engine/model.onnx", "validate"),
        ("engine/model.onnx.data", "infer"),
        ("engine/tasks/task0/task.json", "infer"),
        ("engine/tasks/task0/state.safetensors", "infer"),
    ],
)
def test_a_damaged_file_is_one_line(file: str, name: str, kind: str, place: Path) -> None:
    _damage(place / file, kind)
    assert "did not expect" not in _line(_invoke(name))
