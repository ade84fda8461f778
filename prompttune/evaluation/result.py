"""Figures of an evaluation: accuracy, precision, recall and F1 of each class, confusion, calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.evaluation.scored import Chosen, class_notes

Counts = NDArray[np.int64]
SHOWN_CLASSES = 40
"""Largest number of classes in a table for a terminal."""


@dataclass(frozen=True)
class Table:
    """A table of figures for people, as text."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str | None = None


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class, between 0 and 1; None if the denominator is 0."""

    precision: float | None
    """Share of the images predicted as this class that belong to it; None without such predictions."""
    recall: float | None
    """Share of its images that were recognised (its accuracy); None without images."""
    f1: float | None
    """Harmonic mean of both; None without images and predictions of this class."""
    support: int
    """Number of its images."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Accuracy of answers as a function of their confidence, in bins of equal width.

    Confidence is the probability of the predicted class. Bin m of M holds confidences in ((m - 1) / M, m / M], after
    Guo et al. 2017, On Calibration of Modern Neural Networks, https://arxiv.org/abs/1706.04599.
    """

    counts: Counts
    """Number of images in each bin [M]."""
    correct: Counts
    """Number of right answers in each bin [M]."""
    confidence: NDArray[np.float64]
    """Sum of the confidences in each bin [M]."""

    @property
    def ece(self) -> float | None:
        """Expected calibration error: mean |accuracy - confidence| of the bins, weighted by their number of images.

        None without images.
        """
        total = int(self.counts.sum())
        # a bin's weight times its gap is |right answers - sum of confidences| / all images
        return float(np.abs(self.correct - self.confidence).sum() / total) if total else None

    def bins(self) -> list[dict[str, float | int | None]]:
        """Bounds, number of images, mean confidence and accuracy of each bin; the means are None for an empty bin."""
        width = len(self.counts)
        return [
            {
                "low": index / width,
                "high": (index + 1) / width,
                "n": int(count),
                "confidence": float(confidence / count) if count else None,
                "accuracy": float(correct / count) if count else None,
            }
            for index, (count, correct, confidence) in enumerate(
                zip(self.counts, self.correct, self.confidence, strict=True)
            )
        ]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures of one evaluation; accuracies between 0 and 1."""

    top1: float
    top5: float | None
    """Share of images whose class is among the five likeliest (all, if there are fewer classes); None if unknown for an
    image."""
    loss: float | None
    """Mean cross entropy, in nats; None if the probability of the true class is unknown for an image."""
    n: int
    """Number of scored images."""
    labels: tuple[str, ...]
    """Names of the C classes; the last ``unseen`` of them are classes of the data that the model does not have."""
    confusion: Counts
    """Counts [C, C]: true class by predicted class, in the order of ``labels``."""
    not_finite: Counts
    """Number of images of each class [C] whose logits are not finite. They count as wrong, and are not in ``confusion``
    or ``calibration``."""
    calibration: Calibration
    unseen: int = 0
    """Number of classes that only the data have. Their images count as wrong, except in the loss, which is the mean
    over the others."""
    corrupt: tuple[str, ...] | None = None
    """One line for each image that could not be read; None if this is not known."""
    chosen: Chosen | None = None
    """Which images were scored; None during a training."""

    @property
    def notes(self) -> list[str]:
        """Remarks about the images and their classes, one line each."""
        own = class_notes(self.labels, self.unseen, self.support.tolist())
        return [*(() if self.chosen is None else self.chosen.notes), *own]

    @property
    def support(self) -> Counts:
        """Number of images of each class [C]."""
        total: Counts = self.confusion.sum(axis=1) + self.not_finite
        return total

    @property
    def per_class(self) -> dict[str, float | None]:
        """Accuracy of each class by name; None for a class without images."""
        return {label: figures.recall for label, figures in self.report.items()}

    @property
    def report(self) -> dict[str, ClassFigures]:
        """Precision, recall and F1 of each class by name."""
        right, taken, support = self.confusion.diagonal(), self.confusion.sum(axis=0), self.support
        rows = zip(self.labels, right.tolist(), taken.tolist(), support.tolist(), strict=True)
        return {
            label: ClassFigures(
                precision=hits / guesses if guesses else None,
                recall=hits / images if images else None,
                f1=2 * hits / (guesses + images) if guesses + images else None,
                support=images,
            )
            for label, hits, guesses, images in rows
        }

    @property
    def balanced_accuracy(self) -> float:
        """Mean accuracy of the classes with images."""
        return float(np.mean([one.recall for one in self.report.values() if one.recall is not None]))

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes with images or predictions."""
        return float(np.mean([one.f1 for one in self.report.values() if one.f1 is not None]))

    @property
    def ece(self) -> float | None:
        """See :attr:`Calibration.ece`."""
        return self.calibration.ece

    def confusions(self) -> dict[str, dict[str, int]]:
        """The confusion matrix without its zeros: true class → predicted class → images."""
        return {
            label: {self.labels[column]: int(row[column]) for column in np.flatnonzero(row)}
            for label, row in zip(self.labels, self.confusion, strict=True)
        }

    def worst_pairs(self, limit: int) -> list[tuple[str, str, int, float]]:
        """The most confused pairs: true class, predicted class, number of images, and their share of the true class."""
        return [
            (self.labels[row], self.labels[column], int(self.confusion[row, column]), share)
            for row, column, share in worst_cells(self.confusion, self.support, limit)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a loss that is not finite becomes None."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "loss": self.loss if self.loss is not None and math.isfinite(self.loss) else None,
            "n": self.n,
            "balanced_accuracy": self.balanced_accuracy,
            "macro_f1": self.macro_f1,
            "ece": self.ece,
            "not_finite": int(self.not_finite.sum()),
            "unseen": unseen_counts(self.labels, self.unseen, self.support),
            "per_class": self.per_class,
            "report": {label: asdict(figures) for label, figures in self.report.items()},
            "confusion": self.confusions(),
            "calibration": self.calibration.bins(),
            **({} if self.corrupt is None else {"corrupt": list(self.corrupt)}),
        }

    def tables(self) -> list[Table]:
        """The figures for a terminal; of many classes, the worst."""
        shares = (self.top1, self.top5, self.balanced_accuracy)
        loss = "-" if self.loss is None else f"{self.loss:.4f}"
        whole = [*map(percent, shares), loss, percent(self.ece), str(self.n), unreadable(self.corrupt)]
        known = [(label, one) for label, one in self.report.items() if one.recall is not None]
        worst = len(known) > SHOWN_CLASSES
        if worst:
            known = sorted(known, key=lambda pair: pair[1].recall or 0.0)[:SHOWN_CLASSES]
        rows = [
            [label, percent(one.recall), percent(one.precision), percent(one.f1), str(one.support)]
            for label, one in known
        ]
        titles = ("class", "accuracy", "precision", "F1", "images")
        return [
            Table(("top-1", "top-5", "balanced", "loss", "ECE", "images", "unreadable"), [whole]),
            Table(titles, rows, f"the {SHOWN_CLASSES} worst classes" if worst else None),
        ]


def unseen_counts(labels: Sequence[str], unseen: int, support: Counts) -> dict[str, int]:
    """Number of images of each class that only the data have."""
    known = len(labels) - unseen
    return dict(zip(labels[known:], support[known:].tolist(), strict=True))


def unreadable(corrupt: Sequence[str] | None) -> str:
    """Number of images that could not be read, or a dash if it is unknown."""
    return "-" if corrupt is None else str(len(corrupt))


def row_shares(confusion: Counts, support: Counts) -> NDArray[np.float64]:
    """Each row of a confusion matrix [C, C] divided by the number of images of its class [C]; zeros without images."""
    shares: NDArray[np.float64] = confusion / np.maximum(support, 1)[:, None]
    return shares


def worst_cells(confusion: Counts, support: Counts, limit: int) -> list[tuple[int, int, float]]:
    """Row, column and share of at most ``limit`` off-diagonal cells [C, C], the largest share first."""
    wrong = row_shares(confusion, support)
    np.fill_diagonal(wrong, 0.0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    rows, columns = np.unravel_index(order, wrong.shape)
    cells = zip(rows.tolist(), columns.tolist(), wrong.flat[order].tolist(), strict=True)
    return [cell for cell in cells if cell[2] > 0]


def percent(value: float | None) -> str:
    """A share in percent, or a dash if it is unknown."""
    return "-" if value is None else f"{value:.2%}"
