"""From decoded inputs to answers: one engine call for many rows, whatever mix of tasks they have."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from prompttune.export.runtimes import Array
from prompttune.serve.answers import likeliest
from prompttune.serve.engine import Engine, TaskLogits
from prompttune.serve.infer.decoding import Decoded
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.rows import InputAnswer, Row, Share
from prompttune.serve.infer.smoothing import Smoother
from prompttune.serve.infer.sources.labels import target_index
from prompttune.serve.infer.work import NO_TASK, Work
from prompttune.serve.masks import Mask, class_map


def open_engine(work: Work) -> Engine:
    """The engine of a job, with only its tasks; the caller has checked the digests of its folder."""
    return Engine(work.engine, **asdict(work.options), verify=False, tasks=list(work.known))


class Buffers:
    """Reusable batches [N, 3, S, S]; on a GPU they are page-locked memory, which the device reads directly.

    Args:
        work: settings of the job, which give the size of a batch.
    """

    def __init__(self, work: Work) -> None:
        self._shape = (work.batch_size, 3, work.image_size, work.image_size)
        self._pinned = work.options.cuda_index is not None
        self._lock = threading.Lock()
        self._free: list[Array] = []

    def take(self) -> Array:
        """Take a batch; its content is undefined."""
        with self._lock:
            if self._free:
                return self._free.pop()
        if not self._pinned:
            return np.empty(self._shape, np.float32)
        import torch

        pinned: Array = torch.empty(self._shape, pin_memory=True).numpy()
        return pinned

    def give_back(self, batch: Array) -> None:
        """Return a batch that nobody reads any more."""
        with self._lock:
            self._free.append(batch)


Calls = list[tuple[Array, list[str]]]
"""Engine calls: float32 [batch size, 3, S, S] and a task for each of its first rows; the rest is not in use."""


def assemble(inputs: Sequence[Decoded], work: Work, buffers: Buffers) -> Calls:
    """Pack the readable rows of a chunk into calls: first input, first task; first input, second task; and so on."""
    calls: Calls = []
    for one in inputs:
        for task in work.tasks_of(one.item.task):
            if one.item.error is not None or task not in work.known:
                continue
            if not calls or len(calls[-1][1]) == work.batch_size:
                calls.append((buffers.take(), []))
            batch, tasks = calls[-1]
            batch[len(tasks)] = one.arrays[work.known[task].preprocess]
            tasks.append(task)
    return calls


def score(engine: Engine, calls: Calls, buffers: Buffers) -> list[TaskLogits]:
    """Run the engine calls of a chunk: the logits of row after row.

    Raises:
        EngineError: the runtime fails.
    """
    logits: list[TaskLogits] = []
    for batch, tasks in calls:
        logits += engine.answer(batch[: len(tasks)], tasks)
        buffers.give_back(batch)
    return logits


def answers_of(
    inputs: Sequence[Decoded], logits: Sequence[TaskLogits], work: Work, smoother: Smoother | None = None
) -> list[InputAnswer]:
    """The answers of a chunk's inputs."""
    left = iter(logits)
    return [
        InputAnswer(
            tuple(_row(one.item, task, left, work, smoother) for task in work.tasks_of(one.item.task)),
            one.picture,
            one.item.arrived,
            None if one.item.arrived is not None else one.trace,  # a live frame cannot be requested again
            None if smoother is None else smoother.state(),
        )
        for one in inputs
    ]


def _row(item: Item, task: str, logits: Iterator[TaskLogits], work: Work, smoother: Smoother | None) -> Row:
    facts = work.known.get(task)
    index = None
    if facts is not None and item.target is not None:
        index = target_index(item.target, facts.labels, work.label_is_index)
    place: dict[str, Any] = {
        "source": item.source,
        "row": item.row,
        "frame": item.frame,
        "timestamp": item.timestamp,
        "task": task,
        "task_version": None if facts is None else facts.version,
        "target": item.target if facts is None or index is None else facts.labels[index],
    }
    by_pixel = work.task_type.takes("segment")
    shares: tuple[Share, ...] | None = () if by_pixel else None
    if item.error is not None:
        return Row(**place, error=item.error, pixel_shares=shares)
    if facts is None:
        error = "no task" if task == NO_TASK else f"the engine has no task {task!r}"
        return Row(**place, error=error, pixel_shares=shares)
    values = next(logits).logits
    if not np.isfinite(values).all():
        return Row(**place, error="the engine's logits are not finite", pixel_shares=shares)
    if by_pixel:
        mask = class_map(values, work.image_size)
        shares = pixel_shares(mask, facts.labels)
        return Row(**place, label=shares[0].label, pixel_shares=shares, mask=mask)
    probabilities = work.task_type.probabilities(values)
    if smoother is not None:
        probabilities = smoother(item, task, probabilities)
    scores = likeliest(probabilities, facts.labels, work.top_k)
    return Row(
        **place,
        label=scores[0].label,
        probability=scores[0].probability,
        top_k=scores,
        target_probability=None if index is None else float(probabilities[index]),
    )


def pixel_shares(mask: Mask, labels: Sequence[str]) -> tuple[Share, ...]:
    """The classes that occur in a mask [S, S] with their shares of its pixels, the largest share first."""
    counts = np.bincount(mask.ravel(), minlength=len(labels))
    order = np.argsort(-counts, kind="stable").tolist()
    return tuple(Share(labels[index], float(counts[index] / mask.size)) for index in order if counts[index])
