"""Evaluation of rows that an inference has written: one for each image and task, with the true label where known."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from prompttune.errors import DataError
from prompttune.evaluation.result import Evaluation
from prompttune.evaluation.tally import TOP_K, Tally

_PENDING = 4096
"""Rows that are counted together."""
_NAMED = 8
"""Unknown labels that are named."""


OTHERS = "(other classes)"
"""Stands for true labels that are none of a task's classes, if they are several."""


class ScoredRow(Protocol):
    """What is read of a row."""

    @property
    def task(self) -> str:
        """Name of the task."""

    @property
    def label(self) -> str | None:
        """Predicted class; None where there is no answer."""

    @property
    def probability(self) -> float | None:
        """Its probability."""

    @property
    def top_k(self) -> Sequence[tuple[str, float]]:
        """The likeliest classes and their probabilities, best first; any number of them."""

    @property
    def target(self) -> str | None:
        """True class, None where it is not known."""

    @property
    def target_probability(self) -> float | None:
        """Its probability, None where it is not known."""

    @property
    def error(self) -> str | None:
        """Why there is no answer."""


@dataclass(frozen=True, eq=False)
class TaskEvaluation:
    """Figures of one task's rows, and how many rows they leave out."""

    evaluation: Evaluation | None
    """None if no row could be scored."""
    errors: int = 0
    """Rows with an error."""
    unlabelled: int = 0
    """Rows without a true label."""
    unknown: int = 0
    """Rows whose true label is none of the task's classes. They count as wrong, together as one more class, if other
    rows are scored."""
    unknown_labels: tuple[str, ...] = ()
    """Some of these labels."""

    @property
    def told_of_unknown(self) -> str:
        """What becomes of the unknown ones, in words."""
        return "nothing is scored" if self.evaluation is None else "they are counted as wrong"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: those of the evaluation, or ``n`` of 0 alone, and the rows left out."""
        return {
            **({"n": 0} if self.evaluation is None else self.evaluation.to_dict()),
            "errors": self.errors,
            "unlabelled": self.unlabelled,
            "unknown": self.unknown,
            "unknown_labels": list(self.unknown_labels),
        }


class _Task:
    """Sums of one task, and the rows that are not yet in them."""

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
        """Target, prediction, confidence, in the top five, probability of the target; NaN where not known."""
        predicted, confidence = row.label, row.probability
        if predicted is not None and predicted not in self.index:
            raise DataError(f"a row of task {row.task!r} has the label {predicted!r}, which is none of its classes")
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
    """Scores rows as they come. Its size depends on the tasks and their classes, not on the rows.

    Args:
        labels_of: task → names of its classes.
    """

    def __init__(self, labels_of: Mapping[str, Sequence[str]]) -> None:
        self._labels_of = labels_of
        self._tasks: dict[str, _Task] = {}

    def add(self, row: ScoredRow) -> None:
        """Count a row. One with an error or without a true label is not scored.

        A task that ``labels_of`` does not have may have rows with errors alone.

        Raises:
            DataError: the row's task or its predicted class is not known.
        """
        if row.error is None and row.task not in self._labels_of:
            raise DataError(f"a row has an answer of task {row.task!r}, whose classes are not known")
        if row.task not in self._tasks:
            self._tasks[row.task] = _Task(self._labels_of.get(row.task, ()))
        self._tasks[row.task].add(row)

    def results(self) -> dict[str, TaskEvaluation]:
        """Task → figures of the rows so far, in the order in which the tasks came."""
        return {name: task.result() for name, task in self._tasks.items()}


def evaluation_of_rows(rows: Iterable[ScoredRow], labels_of: Mapping[str, Sequence[str]]) -> dict[str, TaskEvaluation]:
    """Score the rows of an inference in one pass.

    Top-5 is known where every row has its true class, or at least five others, among ``top_k``, or where a task has
    five classes or fewer; the loss where every row has ``target_probability``.

    Args:
        rows: in any order, read once.
        labels_of: task → names of its classes.

    Returns:
        Task → figures, in the order in which the tasks came; none without rows.

    Raises:
        DataError: a row's task or its predicted class is not known.
    """
    scores = RowScores(labels_of)
    for row in rows:
        scores.add(row)
    return scores.results()
