"""Tiny data and settings that the training tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prompttune.training import TrainConfig

CLASSES = ["north", "east", "south", "west"]
SIDE = 32


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny tensors train faster on one thread, and the number of threads belongs to a bit-identical result."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here."""
    monkeypatch.setattr("prompttune.training.plots.plot_curves", lambda *_: None)
    monkeypatch.setattr("prompttune.training.run_writer.save_png", lambda *_: None)


def write_folder(root: Path, train: int = 16, val: int = 6) -> Path:
    """An image folder of four classes: a bright bar at one edge of a noisy picture."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for index, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 90, (SIDE, SIDE, 3)).astype(np.uint8)
                view = np.rot90(pixels, index)  # a view: the bar lands in pixels
                view[: SIDE // 4] += 150
                Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


def settings(data: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Flat settings of a run that takes about a second."""
    return {
        "backbone": "test_vit",
        "image_size": SIDE,
        "weights": "random:0",
        "method": "vpt-deep",
        "data": str(data),
        "output": str(output),
        "epochs": 3,
        "batch_size": 16,
        "lr": 1e-2,
        "augment": "none",
        "device": "cpu",
        "workers": 0,
        "tensorboard": False,
        **changes,
    }


def config(data: Path, output: Path, **changes: Any) -> TrainConfig:
    """The same as a :class:`TrainConfig`."""
    return TrainConfig.from_flat(settings(data, output, **changes))
