"""Counts of answers against true classes, as sums that can be added over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prompttune.errors import DataError
from prompttune.evaluation.result import Calibration, Evaluation

TOP_K = 5
BINS = 15
"""Number of confidence bins, as in the paper on the calibration error."""

_UPPER = np.linspace(0.0, 1.0, BINS + 1)[1:]
_SMALLEST = np.finfo(np.float64).tiny
_DENSE = 1 << 22
"""Number of logits that are processed together, so that a very large batch does not use more memory."""

Floats = NDArray[np.float64]


class Tally:
    """Sums over images; the sums of several processes can be added. Their size depends only on the number of classes.

    Args:
        classes: number of classes C; predictions are indices below it.
        unseen: number of additional classes U that only the images have; targets are indices below C + U. An image of
            such a class is a wrong answer; its loss, which is infinite, is left out of the mean.
    """

    def __init__(self, classes: int, unseen: int = 0) -> None:
        self.classes = classes
        self.rows = classes + unseen
        whole = ("top5", "top5_unknown", "loss_unknown")
        self._sums: dict[str, NDArray[Any]] = {
            "confusion": np.zeros((self.rows, self.rows), dtype=np.int64),
            "not_finite": np.zeros(self.rows, dtype=np.int64),
            **{name: np.zeros((), dtype=np.int64) for name in whole},
            "loss": np.zeros((), dtype=np.float64),
            "bin_counts": np.zeros(BINS, dtype=np.int64),
            "bin_correct": np.zeros(BINS, dtype=np.int64),
            "bin_confidence": np.zeros(BINS, dtype=np.float64),
        }

    def add(
        self,
        targets: ArrayLike,
        predictions: ArrayLike,
        confidences: ArrayLike,
        in_top5: ArrayLike | None = None,
        target_probabilities: ArrayLike | None = None,
    ) -> None:
        """Count images with known answers but unknown logits.

        Args:
            targets: true classes [N].
            predictions: predicted classes [N].
            confidences: probabilities of the predicted classes [N]; an answer whose value is not finite counts as
                wrong, whatever the prediction.
            in_top5: 1 if the true class is among the five likeliest, 0 if not, NaN if unknown [N]; None if it is
                unknown for all images.
            target_probabilities: probabilities of the true classes [N], NaN if unknown; None if unknown for all images.
                A probability of 0, which comes from rounding, counts as the smallest normal number.

        Raises:
            ValueError: an index is not a class.
        """
        chosen = np.asarray(confidences, dtype=np.float64)
        unknown = np.full(chosen.shape, np.nan)
        known = unknown if in_top5 is None else np.asarray(in_top5, dtype=np.float64)
        shares = unknown if target_probabilities is None else np.asarray(target_probabilities, dtype=np.float64)
        indices = np.asarray(targets)
        losses = np.where(indices < self.classes, -np.log(np.maximum(shares, _SMALLEST)), 0.0)
        self._sums["loss_unknown"] += np.isnan(losses).sum()
        self._count(indices, np.asarray(predictions), chosen, known, np.nan_to_num(losses))

    def add_logits(self, logits: ArrayLike, targets: ArrayLike) -> None:
        """Count images by their logits [N, C] and true classes [N]; the first of equal logits is the likelier one.

        Figures are computed in double precision. If a row is not finite, its loss and the mean are NaN.

        Raises:
            ValueError: the shapes do not fit, or an index is not a class.
        """
        values, indices = np.asarray(logits), np.asarray(targets)
        if values.ndim != 2 or values.shape[1] != self.classes or indices.shape != values.shape[:1]:
            raise ValueError(f"logits {values.shape} and targets {indices.shape} for {self.classes} classes")
        step = max(1, _DENSE // self.classes)
        for start in range(0, len(values), step):
            self._add_logits(values[start : start + step].astype(np.float64), indices[start : start + step])

    def _add_logits(self, logits: Floats, targets: NDArray[Any]) -> None:
        self._check(targets, self.rows)
        finite = np.isfinite(logits).all(axis=1)
        logits[~finite] = 0.0
        known = targets < self.classes
        of_target = np.take_along_axis(logits, np.where(known, targets, 0)[:, None], axis=1)  # [N, 1]
        earlier = np.arange(self.classes) < targets[:, None]
        ranks = ((logits > of_target) | ((logits == of_target) & earlier)).sum(axis=1)
        largest = logits.max(axis=1)
        sums = np.exp(logits - largest[:, None]).sum(axis=1)  # in units of the likeliest class
        losses = np.log(sums) + (largest - of_target[:, 0])
        self._count(
            targets,
            logits.argmax(axis=1),
            np.where(finite, 1 / sums, np.nan),
            ((ranks < TOP_K) & known).astype(np.float64),
            np.where(known, np.where(finite, losses, np.nan), 0.0),
        )

    def _count(
        self,
        targets: NDArray[Any],
        predictions: NDArray[Any],
        confidences: Floats,
        in_top5: Floats,
        losses: Floats,
    ) -> None:
        self._check(targets, self.rows)
        self._check(predictions, self.classes)
        sums, finite = self._sums, np.isfinite(confidences)
        np.add.at(sums["not_finite"], targets[~finite], 1)
        top5 = in_top5[finite]
        sums["top5"] += np.count_nonzero(top5 == 1)
        sums["top5_unknown"] += np.isnan(top5).sum()
        sums["loss"] += losses.sum()
        targets, predictions, confidences = targets[finite], predictions[finite], confidences[finite]
        np.add.at(sums["confusion"], (targets, predictions), 1)
        # a rounded sum of probabilities may slightly exceed 1
        bins = np.minimum(np.searchsorted(_UPPER, confidences, side="left"), BINS - 1)
        np.add.at(sums["bin_counts"], bins, 1)
        np.add.at(sums["bin_correct"], bins, targets == predictions)
        np.add.at(sums["bin_confidence"], bins, confidences)

    def _check(self, indices: NDArray[Any], classes: int) -> None:
        if indices.size and (indices.min() < 0 or indices.max() >= classes):
            raise ValueError(f"class indices from {indices.min()} to {indices.max()} for {classes} classes")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The sums as int64 and float64 arrays by name; names and shapes depend only on the number of classes."""
        return dict(self._sums)

    def result(self, labels: Sequence[str], corrupt: Sequence[str] | None = None) -> Evaluation:
        """The figures of all counted images.

        Args:
            labels: names of the C + U classes; unseen classes at the end may be left out if they have no images.
            corrupt: one line for each image that could not be read; None if this is not known.

        Raises:
            DataError: every image is missing or unreadable.
        """
        sums = {name: value.copy() for name, value in self._sums.items()}
        right = int(np.trace(sums["confusion"]))
        n = int(sums["confusion"].sum() + sums["not_finite"].sum())
        if not n:
            raise DataError("none of the images to evaluate on is readable")
        size = len(labels)
        known = int(sums["confusion"][: self.classes].sum() + sums["not_finite"][: self.classes].sum())
        loss = float(sums["loss"]) / known if known else math.nan
        return Evaluation(
            top1=right / n,
            top5=None if sums["top5_unknown"] else int(sums["top5"]) / n,
            loss=None if sums["loss_unknown"] else loss,
            n=n,
            labels=tuple(labels),
            confusion=sums["confusion"][:size, :size],
            not_finite=sums["not_finite"][:size],
            calibration=Calibration(sums["bin_counts"], sums["bin_correct"], sums["bin_confidence"]),
            unseen=size - self.classes,
            corrupt=None if corrupt is None else tuple(corrupt),
        )
