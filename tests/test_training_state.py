"""The run folder and the state to resume from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prompttune.errors import CheckpointError, UsageError
from prompttune.training.state import Progression, RunFolder, Saved, load, save


def sample() -> Saved:
    return Saved(
        progression=Progression(epoch=2, best_epoch=1, best_score=0.5, history=[{"epoch": 1}], corrupt=["x"]),
        settings={"lr": 0.1, "layers": [0, 2], "limit": None},
        identity={"classes": ["ä", "b"]},
        task={"method.a": torch.arange(3.0), "head.bias": torch.zeros(2)},
        best={"method.a": torch.ones(3), "head.bias": torch.ones(2)},
        optimizer={"exp_avg/method.a": torch.ones(3), "step/method.a": torch.tensor(4.0), "momentum_buffer/x": None},
        scaler={"scale": 2.0},
    )


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save(path, sample())
    loaded, expected = load(path), sample()
    for name in ("progression", "settings", "identity", "scaler"):
        assert getattr(loaded, name) == getattr(expected, name)
    for name in ("task", "best"):
        mine, wanted = getattr(loaded, name), getattr(expected, name)
        assert mine.keys() == wanted.keys()
        assert all(torch.equal(mine[key], wanted[key]) for key in wanted)
    assert loaded.optimizer["momentum_buffer/x"] is None
    assert loaded.optimizer["step/method.a"].shape == ()


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save(path, sample())
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert path.read_bytes()[8 : 8 + length].lstrip().startswith(b"{")


@pytest.mark.parametrize("keep", [0, 20, -5])
def test_a_damaged_state_is_one_line(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "last.safetensors"
    save(path, sample())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    save(path, sample())
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("prompttune.training.state.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save(path, sample())
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["last.safetensors"]


def test_best_is_by_top1_then_loss_and_only_top1_resets_the_patience() -> None:
    progression = Progression(epoch=1)
    assert progression.judge(0.5, 0.9, 1.0)
    progression.epoch = 2
    assert progression.judge(0.5, 0.9, 0.8)
    assert (progression.best_epoch, progression.stale) == (2, 1)
    progression.epoch = 3
    assert not progression.judge(0.5, 0.9, 0.8)
    assert (progression.best_epoch, progression.stale) == (2, 2)
    assert progression.judge(0.6, 0.9, 3.0)
    assert (progression.best_epoch, progression.stale) == (3, 0)
    assert progression.best_metrics() == {"val_top1": 0.6, "val_top5": 0.9, "val_loss": 3.0, "epoch": 3}


def test_a_new_folder_is_made_and_a_full_one_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "x")
    assert not folder.check(resume=False, overwrite=False)
    assert not folder.path.exists(), "a run that cannot start leaves nothing behind"
    folder.clear()
    (folder.path / ".metrics.json.abc").touch()
    assert not folder.check(resume=True, overwrite=False), "nothing in it yet: a start from the beginning"
    folder.write_settings({"lr": 0.1})
    with pytest.raises(UsageError, match="--resume or --overwrite"):
        folder.check(resume=False, overwrite=False)
    with pytest.raises(UsageError, match=r"no last\.safetensors to resume"):
        folder.check(resume=True, overwrite=False)
    with pytest.raises(UsageError, match="contradict"):
        folder.check(resume=True, overwrite=True)
    save(folder.last, sample())
    assert folder.check(resume=True, overwrite=False)


def test_overwriting_removes_a_run_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    save(folder.last, sample())
    folder.metrics.write_text("{}")
    folder.tensorboard.mkdir()
    (tmp_path / ".metrics.json.abc").touch()
    (tmp_path / "notes.txt").write_text("mine")
    assert not folder.check(resume=False, overwrite=True)
    assert folder.last.exists()
    folder.clear()
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_holds_no_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="no run that could be overwritten"):
        RunFolder(tmp_path).check(resume=False, overwrite=True)
    assert (tmp_path / "README.md").exists()
    with pytest.raises(UsageError, match="is a file"):
        RunFolder(tmp_path / "README.md").check(resume=False, overwrite=True)
