"""From decoded inputs to answers: one engine call for many rows, whatever mix of tasks they have."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from prompttune.export.runtimes import Array
from prompttune.images.preprocess import Preprocess
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


@dataclass
class Call:
    """One engine call."""

    images: Array
    """float32 [batch size, 3, S, S]; the rest is not in use."""
    asked: list[tuple[int, list[str]]] = field(default_factory=list)
    """For each image the number of its input in the chunk, and the tasks that it is asked about."""


Answers = dict[tuple[int, str], TaskLogits]
"""Answers of a chunk by the number of the input and the task."""


def assemble(inputs: Sequence[Decoded], work: Work, buffers: Buffers) -> list[Call]:
    """Pack the readable images of a chunk into calls, each with all of its tasks that share a transform."""
    calls: list[Call] = []
    room = 0
    for number, one in enumerate(inputs):
        by_transform: dict[Preprocess, list[str]] = {}
        for task in work.tasks_of(one.item.task) if one.item.error is None else ():
            if task in work.known:
                by_transform.setdefault(work.known[task].preprocess, []).append(task)
        for transform, tasks in by_transform.items():
            most = len(tasks) if work.only_reads else work.batch_size
            for start in range(0, len(tasks), most):
                asked = tasks[start : start + most]
                rows = 1 if work.only_reads else len(asked)
                if rows > room:
                    calls.append(Call(buffers.take()))
                    room = work.batch_size
                calls[-1].images[len(calls[-1].asked)] = one.arrays[transform]
                calls[-1].asked.append((number, asked))
                room -= rows
    return calls


def score(engine: Engine, calls: Sequence[Call], buffers: Buffers) -> Answers:
    """Run the engine calls of a chunk.

    Raises:
        EngineError: the runtime fails.
    """
    answers: Answers = {}
    for call in calls:
        found = engine.answer(call.images[: len(call.asked)], [tasks for _, tasks in call.asked])
        for (number, tasks), logits in zip(call.asked, found, strict=True):
            answers |= {(number, task): one for task, one in zip(tasks, logits, strict=True)}
        buffers.give_back(call.images)
    return answers


def answers_of(
    inputs: Sequence[Decoded], answers: Answers, work: Work, smoother: Smoother | None = None
) -> list[InputAnswer]:
    """The answers of a chunk's inputs."""
    return [
        InputAnswer(
            tuple(
                _row(one.item, task, answers.get((number, task)), work, smoother)
                for task in work.tasks_of(one.item.task)
            ),
            one.picture,
            one.item.arrived,
            None if one.item.arrived is not None else one.trace,  # a live frame cannot be requested again
            None if smoother is None else smoother.state(),
        )
        for number, one in enumerate(inputs)
    ]


def _row(item: Item, task: str, answer: TaskLogits | None, work: Work, smoother: Smoother | None) -> Row:
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
    assert answer is not None  # the task is known, and the image could be read
    values = answer.logits
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
