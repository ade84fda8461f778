"""From decoded inputs to answers: one engine call for many rows, whatever mix of tasks they have."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prompttune.export.runtimes import Array
from prompttune.serve.answers import Probabilities, likeliest, softmax
from prompttune.serve.engine import Engine, TaskLogits
from prompttune.serve.infer.decoding import Decoded
from prompttune.serve.infer.rows import Answer, Row, Share
from prompttune.serve.infer.sources.labels import target_index
from prompttune.serve.infer.work import NO_TASK, Work
from prompttune.serve.masks import Mask, class_map


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


@dataclass(slots=True)
class Call:
    """Rows of one engine call."""

    batch: Array
    """float32 [batch size, 3, S, S]; only the first rows, one per task, are in use."""
    tasks: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Assembled:
    """Decoded inputs with the calls that answer them."""

    inputs: Sequence[Decoded]
    calls: Sequence[Call]


@dataclass(frozen=True, slots=True)
class Scored:
    """An input with the outcome of each of its tasks."""

    decoded: Decoded
    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One task's outcome for an input: the probabilities of its classes [C], or the reason for an error."""

    task: str
    probabilities: Probabilities | None = None
    error: str | None = None
    mask: Mask | None = None
    """Mask of a segmentation, instead of probabilities: class index of each pixel of the input, [S, S]."""


def assemble(inputs: Sequence[Decoded], work: Work, buffers: Buffers) -> Assembled:
    """Pack the readable rows of a chunk into calls: first input, first task; first input, second task; and so on."""
    calls: list[Call] = []
    for one in inputs:
        for task in _answerable(one, work):
            if not calls or len(calls[-1].tasks) == work.batch_size:
                calls.append(Call(buffers.take()))
            call = calls[-1]
            call.batch[len(call.tasks)] = one.arrays[work.known[task].preprocess]
            call.tasks.append(task)
    return Assembled(inputs, calls)


def _answerable(one: Decoded, work: Work) -> Iterable[str]:
    if one.error is None:
        yield from (task for task in work.tasks_of(one.item.task) if task in work.known)


def score(engine: Engine, assembled: Assembled, work: Work, buffers: Buffers) -> list[Scored]:
    """Run the engine calls of a chunk.

    Raises:
        EngineError: the runtime fails.
    """
    found: list[TaskLogits] = []
    for call in assembled.calls:
        found += engine.answer(call.batch[: len(call.tasks)], call.tasks)
        buffers.give_back(call.batch)
    rest = iter(found)
    return [
        Scored(one, [_outcome(one, task, rest, work) for task in work.tasks_of(one.item.task)])
        for one in assembled.inputs
    ]


def _outcome(one: Decoded, task: str, rest: Iterable[TaskLogits], work: Work) -> Outcome:
    if one.error is not None:
        return Outcome(task, error=one.error)
    if task not in work.known:
        return Outcome(task, error="no task" if task == NO_TASK else f"the engine has no task {task!r}")
    logits = next(iter(rest)).logits
    if not np.isfinite(logits).all():
        return Outcome(task, error="the engine's logits are not finite")
    if logits.ndim == 3:
        return Outcome(task, mask=class_map(logits, work.image_size))
    return Outcome(task, softmax(logits))


def answers_of(scored: Sequence[Scored], work: Work) -> list[Answer]:
    """The rows of a chunk's answers."""
    return [
        Answer(
            tuple(_row(one.decoded, outcome, work) for outcome in one.outcomes),
            one.decoded.picture,
            one.decoded.item.arrived,
            one.decoded.trace,
        )
        for one in scored
    ]


def _row(decoded: Decoded, outcome: Outcome, work: Work) -> Row:
    item, facts = decoded.item, work.known.get(outcome.task)
    index = None
    if facts is not None and item.target is not None:
        index = target_index(item.target, facts.labels, work.label_is_index)
    place: dict[str, Any] = {
        "source": item.source,
        "row": item.row,
        "frame": item.frame,
        "timestamp": item.timestamp,
        "task": outcome.task,
        "task_version": None if facts is None else facts.version,
        "target": item.target if facts is None or index is None else facts.labels[index],
    }
    if facts is not None and outcome.mask is not None:
        shares = pixel_shares(outcome.mask, facts.labels)
        return Row(**place, label=shares[0].label, pixel_shares=shares, mask=outcome.mask)
    if work.segments:
        return Row(**place, error=outcome.error, pixel_shares=())
    if facts is None or outcome.probabilities is None:
        return Row(**place, error=outcome.error)
    scores = likeliest(outcome.probabilities, facts.labels, work.top_k)
    return Row(
        **place,
        label=scores[0].label,
        probability=scores[0].probability,
        top_k=scores,
        target_probability=None if index is None else float(outcome.probabilities[index]),
    )


def pixel_shares(mask: Mask, labels: Sequence[str]) -> tuple[Share, ...]:
    """The classes that occur in a mask [S, S] with their shares of its pixels, the largest share first."""
    counts = np.bincount(mask.ravel(), minlength=len(labels))
    order = np.argsort(-counts, kind="stable").tolist()
    return tuple(Share(labels[index], float(counts[index] / mask.size)) for index in order if counts[index])
