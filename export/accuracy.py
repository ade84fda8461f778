"""Accuracy of both sides on labelled images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import DataError
from prompttune.export.compare import Reference, Runner
from prompttune.export.figures import Array, Comparison, Tally
from prompttune.export.folder import Task
from prompttune.export.gate import Gate
from prompttune.export.samples import Samples, read_images


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of both sides on the same labelled images; None, with the reason, where the labels do not match."""

    task: str
    data: str
    images: int
    engine: float | None = None
    reference: float | None = None
    skipped: str = ""


def measure_accuracy(
    runner: Runner,
    reference: Reference,
    name: str,
    tasks: Mapping[str, Task],
    samples: Samples,
    gate: Gate,
    limit: int | None,
    against: str,
) -> tuple[list[Accuracy], list[Comparison]]:
    """The task ``name`` over its labelled validation images: top-1 of both sides, and how far they are apart.

    Args:
        runner: the engine.
        reference: what it is held to.
        name: the task.
        tasks: name → task.
        samples: images.
        gate: gives the batch size, the largest of the comparison, and the noise of ties.
        limit: at most so many images, evenly spread.
        against: the reference's name.

    Returns:
        One of each; none of them for a task without data.

    Raises:
        DataError: none of the images can be read.
    """
    task, spec, source = tasks[name], samples.spec(name), samples.source(name)
    if spec is None or source is None:
        return [], []
    labelled = set(source.classes) <= set(task.labels)
    columns = np.array([task.labels.index(one) if labelled else -1 for one in source.classes])
    total = len(source) if limit is None else min(limit, len(source))
    chosen = np.unique(np.linspace(0, len(source) - 1, total).astype(int)).tolist()
    tally, size = Tally(gate.noise), max(gate.batch_sizes)
    count = right_engine = right_reference = 0
    for start in range(0, len(chosen), size):
        read = read_images(source, task, chosen[start : start + size])
        kept = [(image, target) for image, target in read if image is not None]
        if not kept:
            continue
        batch = np.stack([image for image, _ in kept])
        targets = columns[[target for _, target in kept]]
        expected = reference(batch, name)
        found = runner.logits(batch, [name] * len(batch))[:, : task.num_classes]
        tally.add(expected, found)
        right_engine += _right(found, targets)
        right_reference += _right(expected, targets)
        count += len(batch)
    if not count:
        raise DataError(f"none of the images chosen from {spec} can be read")
    comparison = tally.result(name, against, size)
    if not labelled:
        reason = "the classes of the data are not the task's labels"
        return [Accuracy(name, spec, count, skipped=reason)], [comparison]
    return [Accuracy(name, spec, count, right_engine / count, right_reference / count)], [comparison]


def _right(logits: Array, targets: NDArray[np.int_]) -> int:
    """Rows whose best class is the target; one that is not finite has none."""
    return int(((logits.argmax(axis=1) == targets) & np.isfinite(logits).all(axis=1)).sum())
