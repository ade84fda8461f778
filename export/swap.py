"""The swap test: task A, then B, then A again must give A's first answer, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prompttune.export.compare import Runner
from prompttune.export.figures import Array


@dataclass(frozen=True)
class Swap:
    """One A, B, A."""

    task: str
    """A."""
    other: str
    """B."""
    batch_size: int
    """Of both calls of A."""
    between: int
    """Batch size of the call of B."""
    exact: bool
    """Whether A's two answers have the same bits."""
    max_abs: float
    """Largest difference between them."""


def check_swaps(runner: Runner, images: Mapping[str, Array], batch_sizes: Sequence[int]) -> list[Swap]:
    """Each task as A with the next one as B, for single rows and the largest batch, each also after the other size.

    An engine that keeps something of one task in the answers of the next, as blended weights or reused buffers would,
    shows it here even where the difference is too small for a tolerance.

    Args:
        runner: the engine.
        images: task → normalised images [N, 3, S, S].
        batch_sizes: those of the comparison.

    Returns:
        What was found; nothing with a single task.
    """
    names = list(images)
    if len(names) < 2:
        return []

    def answer(task: str, size: int) -> Array:
        rows = np.arange(size) % len(images[task])
        return np.array(runner.logits(images[task][rows], [task] * size))  # a copy: a runtime may reuse its buffer

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
