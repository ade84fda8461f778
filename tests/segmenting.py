"""Segmentations for tests: tiny models whose every parameter matters, engines of them, folders of masks."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import prompttune as pt
from prompttune.data.shape_masks import CLASSES
from tests.drawing import drawn_backbone
from tests.engines import backbone, config_of, workshop
from tests.reference.draw import draw

LABELS = (tuple(CLASSES), ("sky", "sea"), ("a", "b", "c"))
"""Of the tasks 0, 1 and 2."""
GIVES_MAPS = ("sa2vp", "lspt", "vpt-shallow", "vpt-deep", "adaptformer", "adapter", "lora", "linear")


def drawn_segmentation(
    over: pt.Backbone, method: str, head: str, number: int = 0, **settings: object
) -> pt.PromptModel:
    """Task ``number`` with its own parameters, in evaluation mode."""
    config = pt.SegmentationConfig(head, 8)
    labels = list(LABELS[number])
    model = pt.PromptModel(over, config_of(method, **settings), labels=labels, task_type=config)
    for name, parameter in model.task_parameters().items():
        drawn = torch.from_numpy(draw(name, tuple(parameter.shape), number + 1))
        if name in ("head.scale",):
            parameter.data.copy_(1 + drawn)
        elif name.startswith("head.") and parameter.ndim > 1:
            parameter.data.add_(drawn)
        else:
            parameter.data.copy_(drawn * (1.0 if "norm" in name else 5.0))
    return model.eval()


def tiny(name: str = "test_vit") -> pt.Backbone:
    return backbone(name)


@functools.cache
def saved(method: str, head: str, number: int) -> Path:
    folder = workshop() / "segmentation" / method / head / f"task{number}"
    own = {"rank": 2 + number} if "rank" in config_of(method).to_dict() else {}
    drawn_segmentation(tiny(), method, head, number, **own).save(folder)
    return folder


@functools.cache
def engine_of(method: str, head: str) -> Path:
    """An engine with the tasks ``task0`` and ``task1``."""
    folder = workshop() / "segmentation" / method / head / "engine"
    pt.export_engine([saved(method, head, number) for number in (0, 1)], folder, batch_sizes=(1, 3), images=4)
    return folder


def write_ade20k(folder: Path, names: str | None = "classes.txt", sizes: tuple[int, int] = (40, 30)) -> Path:
    """Two training images and one for validation; number 0 is nothing, 1 and 2 are classes."""
    width, height = sizes
    for split, count in (("training", 2), ("validation", 1)):
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            numbers = np.zeros((height, width), dtype=np.uint8)
            numbers[: height // 2] = 1
            numbers[height // 2 :, : width // 2] = 2
            Image.fromarray(numbers).save(folder / "annotations" / split / f"{index}.png")
            picture = np.repeat((numbers * 100)[..., None], 3, axis=-1)
            Image.fromarray(picture).save(folder / "images" / split / f"{index}.jpg")
    if names is not None:
        lines = "Idx\tRatio\tTrain\tVal\tName\n1\t.5\t1\t1\twall\n2\t.5\t1\t1\tfloor\n"
        (folder / names).write_text("wall\nfloor\n" if names == "classes.txt" else lines)
    return folder


def write_blocks(folder: Path, counts: tuple[int, int] = (24, 12)) -> Path:
    """Images of 16 blocks, red, green or blue in random order, each colour a class: easy to learn, none frequent."""
    random = np.random.default_rng(0)
    for split, count in zip(("training", "validation"), counts, strict=True):
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for index in range(count):
            blocks = random.integers(0, 3, (4, 4)).repeat(16, axis=0).repeat(16, axis=1)  # [64, 64]
            Image.fromarray((blocks + 1).astype(np.uint8)).save(folder / "annotations" / split / f"{index}.png")
            picture = np.eye(3)[blocks] * 160 + random.integers(0, 60, (64, 64, 3))
            Image.fromarray(picture.astype(np.uint8)).save(folder / "images" / split / f"{index}.png")
    (folder / "classes.txt").write_text("red\ngreen\nblue\n")
    return folder


@functools.cache
def other_backbone(name: str, size: int) -> pt.Backbone:
    return drawn_backbone(name, workshop(), size)
