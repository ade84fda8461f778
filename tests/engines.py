"""Small engines for tests, exported once a process: exporting is what takes the time."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

import prompttune as pt
from prompttune.export.formats import BuildRequest, ExportSettings
from prompttune.methods import METHODS, MethodConfig
from tests.drawing import default_configs, drawn_backbone, drawn_model

SIZE = 64
SHARING = [name for name, config in METHODS.items() if config.shares_backbone]
"""Methods of which one engine holds many tasks; ``test_full.py`` has the other."""
BATCH_SIZES = (1, 3, 8)


@functools.cache
def workshop() -> Path:
    """A folder for this process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="prompttune-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def backbone(name: str = "test_vit", seed: int = 0, size: int = SIZE) -> pt.Backbone:
    return _backbone(name, seed, size)


def config_of(method: str, **settings: object) -> MethodConfig:
    small = next(config for config in default_configs() if config.method == method)
    return METHODS[method](**{**small.to_dict(), **settings})


def model_of(method: str, number: int, name: str = "test_vit") -> pt.PromptModel:
    """Task ``number``: own parameters, ``number + 2`` classes, own rank, γ, clusters, map scale if there are such."""
    return _model(method, number, name)


def checkpoint(method: str, number: int, name: str = "test_vit") -> Path:
    """The checkpoint of :func:`model_of`."""
    return _checkpoint(method, number, name)


def exported(method: str, name: str = "test_vit") -> Path:
    """An engine with the tasks ``task0`` and ``task1``; read it, or change a :func:`copied` one."""
    return _exported(method, name)


@functools.cache
def _backbone(name: str, seed: int, size: int) -> pt.Backbone:
    return drawn_backbone(name, workshop(), size, seed)


@functools.cache
def _model(method: str, number: int, name: str) -> pt.PromptModel:
    own = {
        "rank": 2 + number,
        "gamma": 0.2 * (1 + number),
        "clusters": 1 + number % 4,
        "map_scale": (1.0, 1.0, 0.5, 0.25)[number % 4],
    }
    settings = {name: value for name, value in own.items() if name in config_of(method).to_dict()}
    return drawn_model(backbone(name), config_of(method, **settings), number + 2, seed=number)


@functools.cache
def _checkpoint(method: str, number: int, name: str) -> Path:
    folder = workshop() / name / method / f"task{number}"
    model_of(method, number, name).save(folder)
    return folder


@functools.cache
def _exported(method: str, name: str) -> Path:
    folder = workshop() / name / method / "engine"
    pt.export_engine([checkpoint(method, number, name) for number in (0, 1)], folder, batch_sizes=BATCH_SIZES)
    return folder


def copied(method: str, folder: Path, name: str = "test_vit") -> Path:
    """A copy of an engine that a test may change."""
    return Path(shutil.copytree(exported(method, name), folder / "engine"))


def noise(rows: int, seed: int = 0) -> np.ndarray:
    """Normalised images [rows, 3, S, S]."""
    return np.random.default_rng(seed).standard_normal((rows, 3, SIZE, SIZE), dtype=np.float32)


def build_request(method: str, settings: ExportSettings, name: str = "test_vit") -> BuildRequest:
    """What a format would be given to build an engine of ``task0`` and ``task1``."""
    with torch.no_grad():
        models = {f"task{number}": model_of(method, number, name) for number in (0, 1)}
        states = {task: {key: row.numpy() for key, row in one.task_state().items()} for task, one in models.items()}
    return BuildRequest(models["task0"], settings.resolved(), states, lambda task, count: noise(min(count, 16)))
