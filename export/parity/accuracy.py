"""Evaluation of both sides on labelled images, in the same pass that compares them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from prompttune.errors import DataError
from prompttune.export.folder import EngineTask
from prompttune.export.parity.compare import Reference, Runner
from prompttune.export.parity.figures import Array
from prompttune.export.parity.samples import Labelled, read_images
from prompttune.task_types import Result

OTHER_CLASSES = "the classes of the data are not the task's labels; name the task, as TASK=DATA, to score it"
"""Reason why data for all tasks are not scored for one of them."""
NAMED = 10
"""Largest number of named images whose logits are not finite."""
DECODERS = 4
"""Number of threads that read images ahead of the engine."""
PIECE = 4
"""Number of images that a thread reads at a time."""
AHEAD = 2 * DECODERS
"""Largest number of pieces that are being read or wait."""


@dataclass(frozen=True)
class Sides:
    """Evaluations of both sides on the same images."""

    engine: Result
    reference: Result

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"engine": self.engine.to_dict(), "reference": self.reference.to_dict()}


@dataclass(frozen=True)
class Accuracy:
    """The score of both sides on the same labelled images; None, with the reason, if the labels do not match."""

    task: str
    data: str
    images: int
    engine: float | None = None
    reference: float | None = None
    skipped: str = ""
    not_finite: int = 0
    """Number of images for which the engine's logits are not finite; they count as wrong."""
    not_finite_images: tuple[str, ...] = ()
    """Names of the first of them."""
    evaluation: Sides | None = field(default=None, compare=False)
    """All figures of both sides, if requested."""
    metric: str = "top-1"
    """Name of the metric in ``engine`` and ``reference``: top-1, or the mean IoU of a segmentation."""
    notes: tuple[str, ...] = ()
    """Remarks about the scored images and about classes that only the task or only the data have."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        sides = self.evaluation
        return {
            "task": self.task,
            "data": self.data,
            "images": self.images,
            "engine": self.engine,
            "reference": self.reference,
            "skipped": self.skipped,
            "metric": self.metric,
            "notes": list(self.notes),
            "not_finite": self.not_finite,
            "not_finite_images": list(self.not_finite_images),
            "evaluation": None if sides is None else sides.to_dict(),
        }


class NotFinite:
    """Counts images whose logits are not finite, and names the first."""

    def __init__(self) -> None:
        self.count = 0
        self.images: list[str] = []

    def add(self, logits: Array, indices: Sequence[int], source: Labelled) -> None:
        """Check logits [B, ...] of the images ``indices`` of ``source``."""
        bad = np.flatnonzero(~np.isfinite(logits.reshape(len(logits), -1)).all(axis=1))
        self.count += len(bad)
        self.images += [source.describe(indices[row]) for row in bad[: NAMED - len(self.images)]]


def both_sides(
    runner: Runner,
    reference: Reference,
    name: str,
    task: EngineTask,
    spec: str,
    source: Labelled,
    size: int,
    limit: int | None,
) -> Generator[tuple[list[int], list[Any], Array, Array]]:
    """Answers of reference and engine to the labelled images of a task, in batches of at most ``size``.

    Args:
        limit: largest number of images, evenly spread.

    Yields:
        Indices of the readable images, their targets, the reference's logits, the engine's logits.

    Raises:
        DataError: every image is unreadable.
    """
    total = len(source) if limit is None else min(limit, len(source))
    chosen = np.unique(np.linspace(0, len(source) - 1, total).astype(int)).tolist()
    empty = True
    with contextlib.closing(read_ahead(source, task, chosen)) as images:
        while read := list(islice(images, size)):
            kept = [(index, image, target) for index, image, target in read if image is not None]
            if not kept:
                continue
            empty = False
            batch = np.stack([image for _, image, _ in kept])
            expected = reference(batch, name)
            found = runner.logits(batch, [name] * len(batch))[:, : task.num_classes]
            yield [index for index, _, _ in kept], [target for *_, target in kept], expected, found
    if empty:
        raise DataError(f"none of the images chosen from {spec} can be read")


def read_ahead(source: Labelled, task: EngineTask, indices: Sequence[int]) -> Generator[tuple[int, Array | None, Any]]:
    """Images of a data set through a task's transform, in order, read ahead in threads.

    At most :data:`AHEAD` pieces of :data:`PIECE` images are in memory. Close the iterator to end the threads early.

    Yields:
        Index, image [3, S, S] or None if unreadable, class index or mask.
    """
    pieces = iter([list(indices[start : start + PIECE]) for start in range(0, len(indices), PIECE)])
    pool = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
    waiting: deque[tuple[list[int], Future[list[tuple[Array | None, Any]]]]] = deque()
    try:
        while True:
            for piece in islice(pieces, AHEAD - len(waiting)):
                waiting.append((piece, pool.submit(read_images, source, task, piece)))
            if not waiting:
                return
            piece, read = waiting.popleft()
            for index, (image, target) in zip(piece, read.result(), strict=True):
                yield index, image, target
    finally:
        pool.shutdown(cancel_futures=True)
