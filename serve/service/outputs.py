"""From logits to the outputs of the protocol: logits, probabilities and the likeliest classes of rows of any tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prompttune.export.runtimes import Array
from prompttune.serve.answers import Probabilities, ranked
from prompttune.serve.messages import OutputTensor, RequestedOutput, bytes_array
from prompttune.task_types import TaskType

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
        task_type: type of the tasks, which turns logits into probabilities.
    """

    def __init__(
        self, logits: Sequence[Array], tasks: Sequence[str], records: Sequence[Record], top_k: int, task_type: TaskType
    ) -> None:
        self.tasks = tasks
        self.records = records
        self._top_k, self._task_type = top_k, task_type
        self._fewest = min(map(len, logits))
        self.logits = np.full((len(logits), max(map(len, logits))), -np.inf, dtype=np.float32)
        """[N, C], C the largest number of classes among the rows; -inf past a row's own."""
        for target, row in zip(self.logits, logits, strict=True):
            target[: len(row)] = row

    @cached_property
    def probabilities(self) -> Probabilities:
        """[N, C] in double precision, over each row's own classes."""
        return self._task_type.probabilities(self.logits)

    @cached_property
    def top(self) -> NDArray[np.int64]:
        """Indices [N, K] of the likeliest classes."""
        return self._best(self._top_k)

    def _best(self, count: int) -> NDArray[np.int64]:
        """The likeliest classes, best first; at most ``count`` and the smallest class count."""
        return ranked(self.probabilities, min(count, self._fewest))

    def named(self, text: Callable[[int, int, str], str], best: NDArray[np.int64]) -> NDArray[np.object_]:
        """A text for each of the classes ``best`` [N, K], from the row, the class and its label; BYTES [N, K]."""
        rows = zip(self.records, best.tolist(), strict=True)
        texts = [text(at, index, one.labels[index]) for at, (one, row) in enumerate(rows) for index in row]
        return bytes_array(texts, best.shape)

    def tensor(self, output: RequestedOutput) -> OutputTensor:
        """The tensor of one output."""
        datatype, read = OUTPUTS[output.name]
        values = read(self)
        if output.classification:
            best = self._best(output.classification)
            texts = self.named(lambda row, index, label: f"{values[row, index]:f}:{index}:{label}", best)
            return OutputTensor(output.name, "BYTES", texts)
        return OutputTensor(output.name, datatype, values.astype(np.float32) if datatype == "FP32" else values)


BRIEF = ("label", "score", "task", "task_version")
"""Outputs of a panel that names none: the others have the width of its widest task."""
RANKED = ("logits", "probabilities")
"""Outputs that Triton's classification extension applies to."""

OUTPUTS: Mapping[str, tuple[str, Callable[[Answers], Any]]] = {
    "logits": ("FP32", lambda answers: np.maximum(answers.logits, PADDING)),
    "probabilities": ("FP32", lambda answers: answers.probabilities),
    "label": ("BYTES", lambda answers: answers.named(lambda _row, _index, label: label, answers.top)),
    "score": ("FP32", lambda answers: np.take_along_axis(answers.probabilities, answers.top, axis=1)),
    "task": ("BYTES", lambda answers: bytes_array(answers.tasks)),
    "task_version": ("BYTES", lambda answers: bytes_array([record.version for record in answers.records])),
}
"""Each output with its datatype and values, in the default order of an answer."""
