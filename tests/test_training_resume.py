"""Whole processes: killed with SIGKILL and resumed, and data parallel training on two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from prompttune.model import PromptModel
from prompttune.training import train
from prompttune.training.state import RunFolder, load
from tests.training_helpers import config, no_pictures, one_thread, settings, write_folder  # noqa: F401

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "no_pictures")]

PATIENCE_S = 120.0


COMMAND = ("-m", "prompttune.cli.main")
EACH_EPOCH_WRITTEN = ("-c", """
from prompttune.cli.main import main
from prompttune.training import run_writer
run_writer.LONGEST_UNWRITTEN_S = 0.0
main()
""")  # fmt: skip
"""The same command, whose short epochs are written as long ones are."""


def start(
    folder: Path, values: dict[str, Any], *flags: str, program: tuple[str, str] = COMMAND
) -> subprocess.Popen[str]:
    """Run ``prompttune train`` on one thread, as the reference run does."""
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(values))
    return subprocess.Popen(
        [sys.executable, *program, "train", "--config", str(file), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_in_epoch(process: subprocess.Popen[str], folder: RunFolder, epoch: int) -> None:
    """Kill the process once the epochs before ``epoch``, counted from 1, are on the disk."""
    until = time.monotonic() + PATIENCE_S
    while not folder.metrics.exists() or len(json.loads(folder.metrics.read_text())["history"]) < epoch - 1:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, "the run does not get on"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


# e2vpt prunes and rewinds after epoch 2, and is killed in the epoch behind it
@pytest.mark.parametrize(
    "method",
    [{"method": "sa2vp", "rank": 4}, {"method": "e2vpt", "num_prompts": 4, "segments": 4, "prune_at": 0.4}],
    ids=lambda method: method["method"],
)
def test_killed_and_resumed_run_ends_bit_identical(tmp_path: Path, method: dict[str, Any]) -> None:
    data = write_folder(tmp_path / "data", train=24, val=4)
    changes = {**method, "epochs": 5, "batch_size": 8, "augment": "light"}
    killed = RunFolder(tmp_path / "killed")
    process = start(tmp_path, settings(data, killed.path, **changes), program=EACH_EPOCH_WRITTEN)
    kill_in_epoch(process, killed, epoch=3)
    state = load(killed.last).progression
    assert 2 <= state.epoch < 5
    assert not state.is_over
    PromptModel.load(killed.path)
    train(config(data, killed.path, **changes), resume=True)
    whole = train(config(data, tmp_path / "whole", **changes))
    name = "prompt_model.safetensors"
    assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes()
    ours, theirs = load(killed.last), load(RunFolder(whole.path).last)
    assert all(bool((ours.task[key] == theirs.task[key]).all()) for key in theirs.task)


def test_two_processes_train_one_model_and_score_every_image_once(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", train=9, val=3)
    for name in ("00.png", "01.png"):
        (data / "train" / "north" / name).write_bytes(b"no picture")
    values = settings(data, tmp_path / "run", devices=2, epochs=3, batch_size=8)
    process = start(tmp_path, values, "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    metrics = json.loads(out)
    assert metrics["final"]["n"] == 12
    assert len(metrics["corrupt_images"]) == 2
    history = metrics["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]
