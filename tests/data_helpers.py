"""Tiny images that the data tests share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from prompttune.data import ImageSource


def picture(seed: int, side: int = 12) -> Image.Image:
    """A noisy RGB image, different for every seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_classes(folder: Path, counts: dict[str, int], start: int = 0) -> Path:
    """A folder of class folders with so many PNG images each, no two alike."""
    seed = start
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture(seed).save(folder / name / f"{index:03d}.png")
            seed += 1
    return folder


def descriptions(source: ImageSource) -> list[str]:
    """Every image's description."""
    return [source.describe(index) for index in range(len(source))]


def spoil(paths: Iterable[Path | str]) -> None:
    """Turn files into something that is no image."""
    for path in paths:
        Path(path).write_bytes(b"not an image")
