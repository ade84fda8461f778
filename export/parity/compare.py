"""Comparison of an engine's answers with a reference's: each task alone, and mixed batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from prompttune.export.folder import EngineTask
from prompttune.export.parity.figures import Array, Comparison, DifferenceTally
from prompttune.export.parity.map_figures import MapTally, is_map
from prompttune.model import PromptModel

MIXED = "mixed"
STATE, CHECKPOINT, ENGINE = "state", "checkpoint", "engine"
"""References: PyTorch on the engine's stored state, the checkpoint's own unfolded forward, another engine."""
_REFERENCE_BATCH = 16


class Runner(Protocol):
    """An engine, as parity uses it."""

    @property
    def description(self) -> str:
        """Description of the engine."""

    def logits(self, images: Array, tasks: Sequence[str] | Sequence[list[str]]) -> Array:
        """Logits [B, C (, h, w)] of images [B, 3, S, S], row i for ``tasks[i]``; padding follows a task's classes.

        Lists of K tasks give [B, K, C (, h, w)].
        """


class Reference(Protocol):
    """The reference of a comparison."""

    def __call__(self, images: Array, task: str) -> Array:
        """Logits [B, classes of the task (, h, w)] of images [B, 3, S, S]."""


def state_reference(model: PromptModel, tasks: Mapping[str, EngineTask]) -> Reference:
    """PyTorch on the stored states: ``model.forward_state``, one task at a time, without padding.

    It runs in float32, even if a state is a view of a bank of another precision.
    """
    states = {
        name: {key: torch.from_numpy(np.array(value, dtype=np.float32)) for key, value in task.state.items()}
        for name, task in tasks.items()
    }

    def logits(images: Array, task: str) -> Array:
        with torch.no_grad():
            chunks = torch.from_numpy(images).split(_REFERENCE_BATCH)
            return torch.cat([model.forward_state(chunk, states[task]).logits for chunk in chunks]).numpy()

    return logits


def checkpoint_reference(models: Mapping[str, PromptModel]) -> Reference:
    """PyTorch on the checkpoints: each task's own model with unfolded parameters."""

    def logits(images: Array, task: str) -> Array:
        with torch.no_grad():
            chunks = torch.from_numpy(images).split(_REFERENCE_BATCH)
            return torch.cat([models[task](chunk).logits for chunk in chunks]).numpy()

    return logits


def runner_reference(runner: Runner, tasks: Mapping[str, EngineTask], batch_size: int) -> Reference:
    """Another engine, with ``batch_size`` images per call."""

    def logits(images: Array, task: str) -> Array:
        classes = tasks[task].num_classes
        chunks = [images[rows] for rows in batches(len(images), batch_size)]
        return np.concatenate([np.array(runner.logits(one, [task] * len(one))[:, :classes]) for one in chunks])

    return logits


def tally_for(logits: Array, noise: float) -> DifferenceTally | MapTally:
    """A tally that fits logits of this form: [B, C], or maps [B, C, h, w]."""
    return MapTally(noise) if is_map(logits) else DifferenceTally(noise)


def batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` rows, the last one shorter."""
    return (slice(start, start + size) for start in range(0, rows, size))


def compare_tasks(
    runner: Runner,
    references: Mapping[str, Reference],
    images: Mapping[str, Array],
    batch_sizes: Sequence[int],
    noise: float = 0.0,
) -> list[Comparison]:
    """Compare each task's normalised images [N, 3, S, S] alone, at each batch size, with each reference."""
    comparisons = []
    for task, batch in images.items():
        expected = {name: reference(batch, task) for name, reference in references.items()}
        for size in batch_sizes:
            tallies = {name: tally_for(expected[name], noise) for name in references}
            for rows in batches(len(batch), size):
                found = runner.logits(batch[rows], [task] * len(batch[rows]))
                for name, tally in tallies.items():
                    tally.add(expected[name][rows], found[:, : expected[name].shape[1]])
            comparisons += [tally.result(task, name, size) for name, tally in tallies.items()]
    return comparisons


def compare_mixed(
    runner: Runner,
    reference: Reference,
    images: Mapping[str, Array],
    batch_sizes: Sequence[int],
    noise: float = 0.0,
    name: str = STATE,
) -> tuple[list[Comparison], float | None]:
    """Compare batches in which neighbouring rows have different tasks with a reference and with single runs.

    Returns:
        The comparisons, and the largest difference from running each row alone; None for a single task.
    """
    names, sizes = list(images), [size for size in batch_sizes if size > 1]
    if len(names) < 2 or not sizes:
        return [], None
    tasks = [names[row % len(names)] for row in range(max(*sizes, len(names)))]
    shown = [(row // len(names)) % len(images[task]) for row, task in enumerate(tasks)]
    batch = np.stack([images[task][index] for task, index in zip(tasks, shown, strict=True)])  # [rows, 3, S, S]
    expected = [reference(batch[row : row + 1], task) for row, task in enumerate(tasks)]
    single = [np.array(runner.logits(batch[row : row + 1], [task])) for row, task in enumerate(tasks)]
    comparisons, apart = [], 0.0
    for size in sizes:
        tally = tally_for(expected[0], noise)
        for rows in batches(len(batch), size):
            found = runner.logits(batch[rows], tasks[rows])
            for row, logits in enumerate(found, rows.start):
                classes = expected[row].shape[1]
                tally.add(expected[row], logits[None, :classes], tasks[row])
                difference = np.abs(logits[:classes] - single[row][0, :classes]).max()
                apart = float(np.maximum(apart, difference))
        comparisons.append(tally.result(MIXED, name, size))
    return comparisons, apart
