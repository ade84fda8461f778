"""From logits to the output tensors of an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prompttune.export.runtimes import Array
from prompttune.serve.answers import ranked, softmax
from prompttune.serve.messages import OutputTensor, RequestedOutput, bytes_array

PADDING = float(np.finfo(np.float32).min)
"""Padding of logits past a row's own classes: JSON cannot express -inf."""


class Record(Protocol):
    """The task of a row, as far as an answer needs it."""

    @property
    def labels(self) -> Sequence[str]:
        """Class names, in the order of the logits."""

    @property
    def version(self) -> str:
        """Version of the task that answered."""


class Answers:
    """The answers of some rows; each output is computed only when it is requested.

    Args:
        logits: float32 [C] for each row, C the task's own classes.
        tasks: name of each row's task.
        records: record of each row's task.
        top_k: largest number of classes in ``label`` and ``score``.
    """

    def __init__(self, logits: Sequence[Array], tasks: Sequence[str], records: Sequence[Record], top_k: int) -> None:
        self._rows = logits
        self._tasks = tasks
        self._records = records
        self._top_k = top_k
        self._counts = [len(row) for row in logits]

    @property
    def finite(self) -> Sequence[bool]:
        """Whether each row's logits are finite."""
        return [bool(np.isfinite(row).all()) for row in self._rows]

    @cached_property
    def logits(self) -> Array:
        """float32 [N, C], C the largest number of classes among the rows."""
        return self._padded(self._rows, PADDING)

    @cached_property
    def probabilities(self) -> Array:
        """float32 [N, C], normalised over each row's own classes."""
        return self._padded(self._exact, 0.0)

    @cached_property
    def _exact(self) -> Sequence[NDArray[np.float64]]:
        """Probabilities of each row, computed as in :meth:`prompttune.serve.engine.Engine.predict`."""
        exact: list[Any] = [None] * len(self._rows)
        for count in set(self._counts):
            places = [place for place, own in enumerate(self._counts) if own == count]
            for place, row in zip(places, softmax(np.stack([self._rows[place] for place in places])), strict=True):
                exact[place] = row
        return exact

    def _padded(self, rows: Sequence[NDArray[Any]], padding: float) -> Array:
        filled = np.full((len(rows), max(self._counts)), padding, dtype=np.float32)
        for target, row in zip(filled, rows, strict=True):
            target[: len(row)] = row
        return filled

    def best(self, count: int) -> NDArray[np.int64]:
        """Indices [N, K] of the likeliest classes, best first; K is at most ``count`` and the smallest class count."""
        count = min(count, *self._counts)
        return np.stack([ranked(row, count) for row in self._exact])

    @cached_property
    def _top(self) -> NDArray[np.int64]:
        return self.best(self._top_k)

    @property
    def label(self) -> NDArray[np.object_]:
        """Names of the likeliest classes, BYTES [N, K]."""
        pairs = zip(self._records, self._top, strict=True)
        return bytes_array([record.labels[index] for record, row in pairs for index in row], self._top.shape)

    @property
    def score(self) -> Array:
        """Probabilities of the likeliest classes, float32 [N, K]."""
        return np.take_along_axis(self.probabilities, self._top, axis=1)

    @property
    def task(self) -> NDArray[np.object_]:
        """Name of each row's task, BYTES [N]."""
        return bytes_array(self._tasks)

    @property
    def task_version(self) -> NDArray[np.object_]:
        """Version of the task that answered each row, BYTES [N]."""
        return bytes_array([record.version for record in self._records])

    def classification(self, values: Array, count: int) -> NDArray[np.object_]:
        """``score:index:label`` of the likeliest classes, BYTES [N, K]; ``values`` [N, C] are the scores."""
        best = self.best(count)
        texts = [
            f"{value[index]:f}:{index}:{record.labels[index]}"
            for record, value, row in zip(self._records, values, best, strict=True)
            for index in row
        ]
        return bytes_array(texts, best.shape)

    def tensor(self, output: RequestedOutput) -> OutputTensor:
        """The tensor of one output."""
        datatype, read = OUTPUTS[output.name]
        if output.classification:
            return OutputTensor(output.name, "BYTES", self.classification(read(self), output.classification))
        return OutputTensor(output.name, datatype, read(self))


RANKED = ("logits", "probabilities")
"""Outputs that Triton's classification extension applies to."""

OUTPUTS: Mapping[str, tuple[str, Callable[[Answers], Any]]] = {
    "logits": ("FP32", lambda answers: answers.logits),
    "probabilities": ("FP32", lambda answers: answers.probabilities),
    "label": ("BYTES", lambda answers: answers.label),
    "score": ("FP32", lambda answers: answers.score),
    "task": ("BYTES", lambda answers: answers.task),
    "task_version": ("BYTES", lambda answers: answers.task_version),
}
"""Each output with its datatype and values, in the default order of an answer."""
