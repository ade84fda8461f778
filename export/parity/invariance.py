"""Invariance: an answer must depend neither on what an engine ran before, nor on the other images of its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prompttune.export.parity.compare import Runner, batches
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


@dataclass(frozen=True)
class Neighbours:
    """One task's images alone, and the same images in batches."""

    task: str
    among: str
    """What is answered in the same call: other images of the task, the same in reverse, images of other tasks, or other
    tasks of the same images."""
    batch_size: int
    images: int
    changed: int
    """Number of images (places, for maps) whose top class changes."""
    max_rel: float
    """Largest difference of a logit, relative to the largest logit of the image alone."""


def check_neighbours(
    runner: Runner, images: Mapping[str, Array], batch_sizes: Sequence[int], tasks: Sequence[str]
) -> list[Neighbours]:
    """Compare each image alone and in batches: in order at every size, in reverse, among others and asked about several
    tasks at the largest.

    Args:
        runner: the engine.
        images: normalised images [N, 3, S, S] by task, at most as many as the largest batch holds.
        batch_sizes: batch sizes of the comparison.
        tasks: every task of the runner; the first others are mixed in.

    Returns:
        The findings; empty if all batches have one row.
    """
    sizes = [size for size in dict.fromkeys(batch_sizes) if size > 1]
    found = []
    for task, drawn in images.items() if sizes else ():
        batch = drawn[: max(sizes)]
        rows, own = np.arange(len(batch)), [[task]] * len(batch)
        alone = _answers(runner, batch, own, rows, 1)
        tries = [("own images", own, rows, size) for size in sizes]
        tries.append(("own images in reverse", own, rows[::-1], max(sizes)))
        if others := [one for one in tasks if one != task][: len(batch)]:
            mixed = own + [[others[row % len(others)]] for row in rows]
            tries.append(("images of other tasks", mixed, np.arange(len(mixed)).reshape(2, -1).T.ravel(), max(sizes)))
            tries.append(("other tasks of the same images", [[task, *others]] * len(batch), rows, max(sizes)))
        for among, owners, order, size in tries:
            again = _answers(runner, np.concatenate([batch, batch])[: len(owners)], owners, order, size)[: len(batch)]
            found.append(_compared(task, among, size, alone, again))
    return found


def _answers(runner: Runner, batch: Array, tasks: Sequence[list[str]], order: NDArray[np.int64], size: int) -> Array:
    """Logits of each image for the first of its tasks, run in batches of ``size`` in the order ``order``."""
    calls = [order[rows] for rows in batches(len(order), size)]
    # Copies, because a runtime may reuse its buffer.
    made = [np.array(runner.logits(batch[rows], [tasks[row] for row in rows])[:, 0]) for rows in calls]
    answers: Array = np.concatenate(_as_wide(*made))[np.argsort(order)]
    return answers


def _as_wide(*answers: Array) -> list[Array]:
    """Logits [B, C, ...] with as many classes as the widest have; a runner may give those of the asked tasks alone."""
    classes = max(one.shape[1] for one in answers)
    wide = [np.full((len(one), classes, *one.shape[2:]), -np.inf, one.dtype) for one in answers]
    for one, whole in zip(answers, wide, strict=True):
        whole[:, : one.shape[1]] = one
    return wide


def _compared(task: str, among: str, size: int, alone: Array, again: Array) -> Neighbours:
    alone, again = _as_wide(alone, again)
    apart = differences(alone, again).reshape(len(alone), -1).max(axis=1)
    scale = np.abs(np.where(np.isfinite(alone), alone, 0)).reshape(len(alone), -1).max(axis=1)
    changed = int((alone.argmax(axis=1) != again.argmax(axis=1)).sum())
    relative = np.divide(apart, scale, out=apart.copy(), where=scale != 0)
    return Neighbours(task, among, size, len(alone), changed, float(relative.max()))
