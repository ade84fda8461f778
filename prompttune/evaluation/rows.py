"""Evaluation of an inference's rows: one per image and task, with the true label if known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prompttune.errors import DataError
from prompttune.evaluation.result import Evaluation
from prompttune.evaluation.tally import TOP_K, Tally

_PENDING = 4096
"""Number of rows that are counted together."""
_NAMED = 8
"""Number of unknown labels in a message."""


OTHERS = "(other classes)"
"""Name for several true labels outside a task's classes."""


class ScoredRow(Protocol):
    """The parts of a row that an evaluation reads."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def label(self) -> str | None:
        """Predicted class; None without an answer."""

    @property
    def probability(self) -> float | None:
        """Probability of the predicted class."""

    @property
    def top_k(self) -> Sequence[tuple[str, float]]:
        """The likeliest classes with their probabilities, best first; any number of them."""

    @property
    def target(self) -> str | None:
        """True class; None if it is unknown."""

    @property
    def target_probability(self) -> float | None:
        """Probability of the true class; None if it is unknown."""

    @property
    def error(self) -> str | None:
        """Reason why the row has no answer."""


@dataclass(frozen=True, eq=False)
class TaskEvaluation:
    """Figures of one task's rows, and the number of rows that they leave out."""

    evaluation: Evaluation | None
    """The figures; None if every row was left out."""
    errors: int = 0
    """Number of rows with an error."""
    unlabelled: int = 0
    """Number of rows without a true label."""
    unknown: int = 0
    """Number of rows whose true label is not a class of the task. They count as wrong, together as one more class, if
    other rows are scored."""
    unknown_labels: tuple[str, ...] = ()
    """Some of these true labels."""

    @property
    def told_of_unknown(self) -> str:
        """How the unknown labels are treated, for a message."""
        return "nothing is scored" if self.evaluation is None else "they are counted as wrong"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: those of the evaluation, or only ``n`` of 0, and the rows left out."""
        return {
            **({"n": 0} if self.evaluation is None else self.evaluation.to_dict()),
            "errors": self.errors,
            "unlabelled": self.unlabelled,
            "unknown": self.unknown,
            "unknown_labels": list(self.unknown_labels),
        }


class _Task:
    """Sums of one task, and its rows that are not counted yet."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.index = {label: number for number, label in enumerate(labels)}
        self.tally = Tally(len(labels), unseen=1)
        self.pending: list[tuple[int, int, float, float, float]] = []
        self.errors = self.unlabelled = self.unknown = 0
        self.unknown_labels: list[str] = []

    def add(self, row: ScoredRow) -> None:
        if row.error is not None:
            self.errors += 1
        elif row.target is None:
            self.unlabelled += 1
        else:
            if row.target not in self.index:
                self.unknown += 1
                if row.target not in self.unknown_labels and len(self.unknown_labels) < _NAMED:
                    self.unknown_labels.append(row.target)
            self.pending.append(self._scored(row, row.target))
            if len(self.pending) == _PENDING:
                self.flush()

    def _scored(self, row: ScoredRow, target: str) -> tuple[int, int, float, float, float]:
        """Target, prediction, confidence, whether it is in the top five, probability of the target; NaN if unknown."""
        predicted, confidence = row.label, row.probability
        if predicted is not None and predicted not in self.index:
            raise DataError(f"a row of task {row.task!r} has the label {predicted!r}, which is not one of its classes")
        return (
            self.index.get(target, len(self.labels)),
            0 if predicted is None else self.index[predicted],
            math.nan if confidence is None or predicted is None else confidence,
            self._in_top5(target, [name for name, _ in row.top_k]),
            math.nan if row.target_probability is None else row.target_probability,
        )

    def _in_top5(self, target: str, ranked: Sequence[str]) -> float:
        best = ranked[:TOP_K]
        if target not in self.index:
            return 0.0
        if target in best or len(self.labels) <= TOP_K:
            return 1.0
        return 0.0 if len(best) == TOP_K else math.nan

    def flush(self) -> None:
        if self.pending:
            self.tally.add(*map(list, zip(*self.pending, strict=True)))
            self.pending.clear()

    def result(self) -> TaskEvaluation:
        self.flush()
        counts = self.tally.arrays()
        known = int(counts["confusion"][:-1].sum() + counts["not_finite"][:-1].sum())
        extra = (self.unknown_labels[0] if len(self.unknown_labels) == 1 else OTHERS,) if self.unknown else ()
        return TaskEvaluation(
            self.tally.result((*self.labels, *extra)) if known else None,
            errors=self.errors,
            unlabelled=self.unlabelled,
            unknown=self.unknown,
            unknown_labels=tuple(self.unknown_labels),
        )


class RowScores:
    """Scores rows as they arrive. Memory use depends on the tasks and their classes, not on the rows.

    Args:
        labels_of: class names of each task.
    """

    def __init__(self, labels_of: Mapping[str, Sequence[str]]) -> None:
        self._labels_of = labels_of
        self._tasks: dict[str, _Task] = {}

    def add(self, row: ScoredRow) -> None:
        """Count a row. A row with an error or without a true label is not scored.

        A task that is not in ``labels_of`` may only have rows with errors.

        Raises:
            DataError: the row's task or its predicted class is unknown.
        """
        if row.error is None and row.task not in self._labels_of:
            raise DataError(f"a row has an answer of task {row.task!r}, whose classes are not known")
        if row.task not in self._tasks:
            self._tasks[row.task] = _Task(self._labels_of.get(row.task, ()))
        self._tasks[row.task].add(row)

    def results(self) -> dict[str, TaskEvaluation]:
        """Figures of each task for the rows so far, in the order in which the tasks appeared."""
        return {name: task.result() for name, task in self._tasks.items()}


def evaluation_of_rows(rows: Iterable[ScoredRow], labels_of: Mapping[str, Sequence[str]]) -> dict[str, TaskEvaluation]:
    """Score the rows of an inference in one pass.

    Top-5 is known if every row has its true class, or at least five other classes, in ``top_k``, or if the task has at
    most five classes. The loss is known if every row has ``target_probability``.

    Args:
        rows: rows in any order, read once.
        labels_of: class names of each task.

    Returns:
        Figures of each task, in the order in which the tasks appeared; empty without rows.

    Raises:
        DataError: a row's task or its predicted class is unknown.
    """
    scores = RowScores(labels_of)
    for row in rows:
        scores.add(row)
    return scores.results()
