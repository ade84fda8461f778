"""The swap test: task A, then B, then A again must give A's first answer, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prompttune.export.parity.compare import Runner
from prompttune.export.parity.figures import Array


@dataclass(frozen=True)
class Swap:
    """Result of one A, B, A."""

    task: str
    """Name of task A."""
    other: str
    """Name of task B."""
    batch_size: int
    """Batch size of both calls of A."""
    between: int
    """Batch size of the call of B."""
    exact: bool
    """Whether A's two answers are bit-identical."""
    max_abs: float
    """Largest difference between them."""


def check_swaps(runner: Runner, images: Mapping[str, Array], batch_sizes: Sequence[int]) -> list[Swap]:
    """Test each task as A with the next one as B, for single rows and the largest batch, each also after the other
    size.

    An engine that carries something of one task into the answers of the next, such as blended weights or reused
    buffers, fails here even if the difference is below a tolerance.

    Args:
        runner: the engine.
        images: normalised images [N, 3, S, S] by task.
        batch_sizes: batch sizes of the comparison.

    Returns:
        The results; empty for a single task.
    """
    names = list(images)
    if len(names) < 2:
        return []

    def answer(task: str, size: int) -> Array:
        rows = np.arange(size) % len(images[task])
        return np.array(runner.logits(images[task][rows], [task] * size))  # copied: a runtime may reuse its buffer

    sizes = sorted({1, max(batch_sizes)})
    swaps = []
    for task, other in zip(names, [*names[1:], names[0]], strict=True):
        for size in sizes:
            first = answer(task, size)
            for between in sizes:
                answer(other, between)
                again = answer(task, size)
                exact = first.tobytes() == again.tobytes()
                swaps.append(
                    Swap(task, other, size, between, exact, 0.0 if exact else float(differences(first, again).max()))
                )
    return swaps


def differences(first: Array, again: Array) -> Array:
    """Absolute differences of two answers; padding classes are -inf in both."""
    with np.errstate(invalid="ignore"):
        return np.where(first == again, np.float32(0), np.abs(first - again))
