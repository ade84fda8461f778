"""Engines for the benchmarks: exported from tasks with random parameters, then filled with tasks drawn at random.

What a task's numbers are changes neither speed nor memory, so nothing is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

import prompttune as pt
from prompttune.export import EngineFolder, EngineTask
from prompttune.methods import METHODS, MethodConfig

CONFIGS: dict[str, MethodConfig] = {
    "sa2vp": METHODS["sa2vp"](rank=16),
    "lspt": METHODS["lspt"](num_prompts=50),
    "vpt-deep": METHODS["vpt-deep"](num_prompts=50),
    "vpt-shallow": METHODS["vpt-shallow"](num_prompts=50),
    "linear": METHODS["linear"](),
}
"""The methods as their papers run them on ViT-B/16."""
CLASSES = 100
_SPREAD = 0.02
"""Standard deviation of a drawn state's numbers."""

methods_option = click.option(
    "--method", "methods", multiple=True, type=click.Choice(list(CONFIGS)), default=tuple(CONFIGS), help="Default: all."
)


@contextmanager
def workshop() -> Iterator[Path]:
    """A temporary folder for engines."""
    with TemporaryDirectory(prefix="prompttune-benchmark-") as name:
        yield Path(name)


def save_checkpoint(
    method: str,
    backbone: pt.Backbone,
    folder: Path,
    config: MethodConfig | None = None,
    classes: int = CLASSES,
    name: str = "",
) -> Path:
    """A task of a method with its initial parameters; ``config`` is that of :data:`CONFIGS` by default."""
    path = folder / f"{name or method}-checkpoint"
    if not path.exists():
        pt.PromptModel(backbone, config or CONFIGS[method], num_classes=classes).save(path)
    return path


def draw_task(like: EngineTask, seed: int) -> EngineTask:
    """A task of the same shapes with another state."""
    generator = np.random.default_rng(seed)
    state = {
        key: _SPREAD * generator.standard_normal(value.shape, dtype=np.float32)
        for key, value in sorted(like.state.items())  # a file has no order
    }
    return dataclasses.replace(like, state=state)


def make_engine(checkpoint: Path, output: Path, settings: pt.ExportSettings, tasks: int) -> EngineFolder:
    """Export a checkpoint and fill the folder up to ``tasks`` tasks, without a comparison with PyTorch.

    Args:
        checkpoint: the task to export.
        output: the engine folder.
        settings: how.
        tasks: how many the folder will hold, the exported one among them.
    """
    click.echo(f"exporting {output.name}", err=True)
    folder = pt.export_engine({"task0": checkpoint}, output, format=settings, parity=False)
    like = folder.read_task("task0")
    for number in range(1, tasks):
        folder.write_task(f"task{number}", draw_task(like, number))
    return folder
