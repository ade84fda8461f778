"""Figures of a comparison: differences between two sides' logits, collected batch by batch."""

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
"""Largest number of a comparison's logits that are kept for its medians and plots."""
QUIET = np.errstate(invalid="ignore", divide="ignore", over="ignore")
"""Error state that ignores non-finite values: here they are results, not mistakes."""


@dataclass(frozen=True)
class Comparison:
    """Engine against reference over some images, without the logits of padding classes.

    Relative differences are |Δ| over the *scale* of the row, which is its largest absolute reference logit. A logit
    near zero therefore does not inflate them, and they do not depend on the size of a task's head.
    """

    task: str
    """Name of the task, or ``mixed`` for batches in which each row has its own task."""
    reference: str
    """``state``, ``checkpoint`` or ``engine``, see :data:`STATE`."""
    batch_size: int
    images: int
    max_abs: float
    """Largest absolute difference of a logit."""
    mean_abs: float
    median_abs: float
    """Median absolute difference; of evenly spread images if there are very many logits, as for ``median_rel``."""
    max_rel: float
    mean_rel: float
    median_rel: float
    cosine: float
    """Lowest cosine similarity of an image's logits."""
    kl_mean: float
    """Mean over the images of KL(reference ‖ engine) of the class probabilities, in nats."""
    kl_max: float
    agreement: float
    """Share of images for which both sides name the same class; a row that is not finite agrees with no class."""
    disagreements: int
    ties: int
    """Number of disagreements whose row has all logits within the gate's ``noise``, see :class:`DifferenceTally`."""
    unexplained: int
    """Number of images with a logit beyond the gate's ``noise``, agreeing or not; 0 without noise."""
    top5_agreement: float | None
    """Mean share of the reference's five best classes among the engine's; None if all tasks have at most five."""
    margin: float | None
    """Smallest lead of the reference's best class over its second: the distance of the images from a tie."""
    disagreement_margin: float | None
    """Largest lead among the disagreements that are not ties."""
    pairs: Array = field(repr=False, compare=False)
    """Reference and engine logits [2, n] for plots, of evenly spread images if there are very many; not in reports."""
    pixels: int = 0
    """Number of compared places of maps; figures are then per place instead of per image. 0 for a classification."""

    @property
    def decided_agreement(self) -> float:
        """The agreement with ties counted as agreeing, which the gate checks."""
        return 1 - (self.disagreements - self.ties) / max(self.pixels or self.images, 1)


class _Rows:
    """Rows of a stream: all, or evenly spread ones, so that about ``_KEPT`` logits are kept at most."""

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
        """Reference and engine logits, [2, n]."""
        return np.concatenate(self._rows, axis=1)

    @QUIET
    def medians(self) -> tuple[float, float]:
        """Medians of the absolute and of the relative differences."""
        rows = [differences(row[:1].astype(np.float64), row[1:].astype(np.float64)) for row in self._rows]
        absolute, relative = (np.concatenate([one[kind][0] for one in rows]) for kind in (0, 1))
        return float(np.median(absolute)), float(np.median(relative))


def differences(expected: Figures, found: Figures) -> tuple[Figures, Figures]:
    """Absolute and relative difference of logits [B, C]; relative to the row's largest absolute expected logit."""
    absolute = np.abs(expected - found)
    relative = absolute / np.abs(expected).max(axis=1, keepdims=True)
    return absolute, np.where(absolute == 0, 0.0, relative)  # rows of zeros on both sides are equal


class DifferenceTally:
    """Figures of a comparison, batch by batch.

    Args:
        noise: largest difference of a row's logits for which its disagreement is a tie, relative to the larger of its
            own scale and the median scale of its task's rows. Rounding does not shrink with the logits of a row, so
            with its own scale alone, honest rounding would be an error where all logits are small.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self._noise = noise
        self._rows = _Rows()
        self._parts: list[dict[str, NDArray[Any]]] = []
        """Values [B] of each figure, for each batch."""

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
        """The comparison of all counted logits.

        Raises:
            ValueError: nothing was counted.
        """
        # A NaN stays in every sum, mean, maximum and minimum: it must not pass for a small difference.
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
    """The larger of each row's own scale [B] and the median of its task's rows."""
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
    """Cosine similarity of each row [B]; 1 if a side is all zeros."""
    products = (expected * found).sum(axis=1)
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    cosines: Figures = np.divide(products, norms, out=np.ones_like(products), where=norms != 0)
    return cosines


def _overlap(expected: Figures, found: Figures) -> Figures:
    """Share of the expected side's best classes among the found side's best [B]."""
    first, second = (side.argpartition(-TOP, axis=1)[:, -TOP:] for side in (expected, found))
    shared: Figures = (first[:, :, None] == second[:, None, :]).any(axis=2).mean(axis=1)
    return shared
