"""Figures of a comparison: how far two sides' logits are apart, gathered batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]
Figures = NDArray[np.float64]

TOP = 5
_KEPT = 1 << 18
"""Logits of a comparison that are kept for its medians and plots."""
QUIET = np.errstate(invalid="ignore", divide="ignore", over="ignore")
"""What is not finite is a result here, not a mistake of ours."""


@dataclass(frozen=True)
class Comparison:
    """Engine against reference over some images, logits of the padding classes left out.

    Relative differences are |Δ| over the *scale* of the row, its largest absolute reference logit: a logit that happens
    to be near zero does not blow them up, and they do not depend on the size of a task's head.
    """

    task: str
    """The task's name, or ``mixed`` for batches in which each row has its own task."""
    reference: str
    """``state``, ``checkpoint`` or ``engine``, see :data:`STATE`."""
    batch_size: int
    images: int
    max_abs: float
    """Largest absolute difference of a logit."""
    mean_abs: float
    median_abs: float
    """Over evenly spread images if there are very many logits, as ``median_rel``."""
    max_rel: float
    mean_rel: float
    median_rel: float
    cosine: float
    """Lowest cosine similarity of an image's logits."""
    kl_mean: float
    """Mean over the images of KL(reference ‖ engine) of the class probabilities, in nats."""
    kl_max: float
    agreement: float
    """Share of images on which both sides name the same class; a row that is not finite agrees with nothing."""
    disagreements: int
    ties: int
    """Disagreements on rows whose every logit is within the gate's ``noise``, see :class:`Tally`."""
    unexplained: int
    """Images of which a logit is further off than the gate's ``noise``, agreeing or not; 0 where noise is none."""
    top5_agreement: float | None
    """Mean share of the reference's five best classes among the engine's; None if no task has more than five."""
    margin: float | None
    """Smallest lead of the reference's best class over its second: how near to a tie the images come."""
    disagreement_margin: float | None
    """Largest such lead among the disagreements that are no ties."""
    pairs: Array = field(repr=False, compare=False)
    """Reference and engine logits [2, n] for plots, of evenly spread images if there are very many; not in reports."""
    pixels: int = 0
    """Of maps: the places that were compared. What is told of an image then holds of a place; 0 otherwise."""

    @property
    def decided_agreement(self) -> float:
        """The agreement, ties counted as agreeing: what a gate looks at."""
        return 1 - (self.disagreements - self.ties) / max(self.pixels or self.images, 1)


class _Rows:
    """Rows of a stream, all of them or evenly spread ones, so that they hold about ``_KEPT`` logits at most."""

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._seen, self._stride, self._values = 0, 1, 0

    def add(self, expected: Array, found: Array) -> None:
        for row in zip(expected, found, strict=True):
            if self._seen % self._stride == 0:
                self._rows.append(np.stack(row))
                self._values += len(row[0])
            self._seen += 1
            if self._values > _KEPT and len(self._rows) > 1:
                self._rows, self._stride = self._rows[::2], 2 * self._stride
                self._values = sum(one.shape[1] for one in self._rows)

    @property
    def pairs(self) -> Array:
        """[2, n]."""
        return np.concatenate(self._rows, axis=1)

    @QUIET
    def medians(self) -> tuple[float, float]:
        """Of the absolute and of the relative differences."""
        rows = [differences(row[:1].astype(np.float64), row[1:].astype(np.float64)) for row in self._rows]
        absolute, relative = (np.concatenate([one[kind][0] for one in rows]) for kind in (0, 1))
        return float(np.median(absolute)), float(np.median(relative))


def differences(expected: Figures, found: Figures) -> tuple[Figures, Figures]:
    """Absolute and relative difference of logits [B, C]; relative to the row's largest absolute expected logit."""
    absolute = np.abs(expected - found)
    relative = absolute / np.abs(expected).max(axis=1, keepdims=True)
    return absolute, np.where(absolute == 0, 0.0, relative)  # rows of zeros on both sides are equal


class Tally:
    """Figures of a comparison, batch by batch.

    Args:
        noise: how far a row's logits may be off for its disagreement to be a tie, relative to its own scale or to the
            median scale of its task's rows, whichever is larger. Rounding does not shrink with the logits of a row, so
            its own scale alone would call honest rounding an error where all logits are small.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self._noise = noise
        self._rows = _Rows()
        self._parts: list[dict[str, NDArray[Any]]] = []
        """Of each batch: figure → its value for each image [B]."""

    @QUIET
    def add(self, expected: Array, found: Array, task: str = "") -> None:
        """Count logits [B, C] of the reference and of the engine, all of one task."""
        self._rows.add(expected, found)
        reference, engine = expected.astype(np.float64), found.astype(np.float64)
        images, classes = reference.shape
        absolute, relative = differences(reference, engine)
        finite = np.isfinite(absolute).all(axis=1)
        differs = (reference.argmax(axis=1) != engine.argmax(axis=1)) | ~finite
        ranked, best = classes > TOP, np.sort(reference, axis=1)[:, -2:]
        self._parts.append(
            {
                "task": np.full(images, task),
                "classes": np.full(images, classes),
                "scale": np.abs(reference).max(axis=1),
                "max_abs": absolute.max(axis=1),
                "sum_abs": absolute.sum(axis=1),
                "max_rel": relative.max(axis=1),
                "sum_rel": relative.sum(axis=1),
                "cosine": cosines(reference, engine),
                "kl": divergence(reference, engine),
                "differs": differs,
                "ranked": np.full(images, ranked),
                "top5": _overlap(reference, engine) * finite if ranked else np.zeros(images),
                "lead": best[:, -1] - best[:, 0] if classes > 1 else np.full(images, np.inf),
            }
        )

    @QUIET
    def result(self, task: str, reference: str, batch_size: int) -> Comparison:
        """The comparison.

        Raises:
            ValueError: nothing was added.
        """
        # A NaN stays one in every sum, mean, maximum and minimum: it must not pass for a small difference.
        image = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        logits, margin = int(image["classes"].sum()), float(image["lead"].min())
        median_abs, median_rel = self._rows.medians()
        explained = image["max_abs"] <= self._noise * _typical(image["scale"], image["task"])
        tied = image["differs"] & explained
        decided = image["lead"][image["differs"] & ~tied]
        return Comparison(
            task=task,
            reference=reference,
            batch_size=batch_size,
            images=len(image["differs"]),
            max_abs=float(image["max_abs"].max()),
            mean_abs=float(image["sum_abs"].sum() / logits),
            median_abs=median_abs,
            max_rel=float(image["max_rel"].max()),
            mean_rel=float(image["sum_rel"].sum() / logits),
            median_rel=median_rel,
            cosine=float(image["cosine"].min()),
            kl_mean=float(image["kl"].mean()),
            kl_max=float(image["kl"].max()),
            agreement=float(1 - image["differs"].mean()),
            disagreements=int(image["differs"].sum()),
            ties=int(tied.sum()),
            unexplained=int((~explained).sum()) if self._noise else 0,
            top5_agreement=float(image["top5"][image["ranked"]].mean()) if image["ranked"].any() else None,
            margin=None if np.isinf(margin) else margin,
            disagreement_margin=float(decided.max()) if len(decided) else None,
            pairs=self._rows.pairs,
        )


def _typical(scale: Figures, task: NDArray[Any]) -> Figures:
    """Of each row [B], its own scale or the median of its task's rows, whichever is larger."""
    typical = scale.copy()
    for name in np.unique(task):
        rows = task == name
        typical[rows] = np.maximum(scale[rows], np.median(scale[rows]))
    return typical


def divergence(expected: Figures, found: Figures) -> Figures:
    """KL(softmax of the expected ‖ softmax of the found) of each row, in nats [B]."""
    reference, engine = (torch.from_numpy(side).log_softmax(dim=1) for side in (expected, found))
    divergence = torch.nn.functional.kl_div(engine, reference, reduction="none", log_target=True).sum(dim=1)
    return np.asarray(divergence.clamp(min=0))  # rounding gives tiny negative ones


def cosines(expected: Figures, found: Figures) -> Figures:
    """Cosine similarity of each row [B]; 1 where a side is all zeros."""
    products = (expected * found).sum(axis=1)
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    cosines: Figures = np.divide(products, norms, out=np.ones_like(products), where=norms != 0)
    return cosines


def _overlap(expected: Figures, found: Figures) -> Figures:
    """Share of the expected side's best classes among the found side's best [B]."""
    first, second = (side.argpartition(-TOP, axis=1)[:, -TOP:] for side in (expected, found))
    shared: Figures = (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)
    return shared
