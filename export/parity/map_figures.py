"""Figures of a comparison of maps: the logits of each place, collected image by image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.export.parity.figures import QUIET, Array, Comparison, Figures, cosines, differences, divergence

KEPT_PLACES = 256
"""Number of an image's places whose logits are kept for medians and plots, evenly spread."""
KEPT_IMAGES = 64
"""Largest number of images with kept places."""


class MapTally:
    """Figures of a comparison of logits [B, C, h, w], batch by batch; figures per image become figures per place.

    Largest values are over all places, ``cosine`` is the lowest of an image's whole map, and shares are over places.
    Only sums are kept, so that memory use does not grow with the data set.

    Args:
        noise: largest difference of a place's logits for which its disagreement is a tie, relative to the larger of its
            own scale and the median scale of its image's places.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self._noise = noise
        self._images = self._places = self._logits = 0
        self._sums: dict[str, float] = {"abs": 0.0, "rel": 0.0, "kl": 0.0}
        self._most: dict[str, float] = {"abs": 0.0, "rel": 0.0, "kl": 0.0, "left": -np.inf}
        self._least: dict[str, float] = {"cosine": np.inf, "lead": np.inf}
        self._counts = {"differ": 0, "ties": 0, "unexplained": 0}
        self._kept: list[Array] = []

    def add(self, expected: Array, found: Array, task: str = "") -> None:  # noqa: ARG002
        """Count logits [B, C, h, w] of the reference and of the engine, all of one task."""
        for reference, engine in zip(expected, found, strict=True):
            classes = len(reference)
            self._add(reference.reshape(classes, -1).T, engine.reshape(classes, -1).T)  # [h w, C]

    @QUIET
    def _add(self, expected: Array, found: Array) -> None:
        reference, engine = expected.astype(np.float64), found.astype(np.float64)
        places, classes = reference.shape
        absolute, relative = differences(reference, engine)
        kl = divergence(reference, engine)
        worst, scale = absolute.max(axis=1), np.abs(reference).max(axis=1)
        differs = (reference.argmax(axis=1) != engine.argmax(axis=1)) | ~np.isfinite(absolute).all(axis=1)
        explained = worst <= self._noise * np.maximum(scale, np.median(scale))
        self._images, self._places = self._images + 1, self._places + places
        self._logits += reference.size
        for name, values in (("abs", absolute), ("rel", relative), ("kl", kl)):
            self._sums[name] += float(values.sum())
            # np.maximum instead of max: a NaN must stay a NaN.
            self._most[name] = float(np.maximum(self._most[name], values.max()))
        cosine = cosines(reference.reshape(1, -1), engine.reshape(1, -1))[0]
        self._least["cosine"] = float(np.minimum(self._least["cosine"], cosine))
        self._counts["differ"] += int(differs.sum())
        self._counts["ties"] += int((differs & explained).sum())
        self._counts["unexplained"] += int((~explained).sum()) if self._noise else 0
        if classes > 1:
            best = np.sort(reference, axis=1)[:, -2:]
            lead = best[:, 1] - best[:, 0]
            self._least["lead"] = float(np.minimum(self._least["lead"], lead.min()))
            self._most["left"] = float(max(self._most["left"], lead[differs & ~explained].max(initial=-np.inf)))
        self._keep(expected, found)

    def _keep(self, expected: Array, found: Array) -> None:
        if len(self._kept) < KEPT_IMAGES:
            chosen = np.unique(np.linspace(0, len(expected) - 1, KEPT_PLACES).astype(int))
            self._kept.append(np.stack((expected[chosen], found[chosen])))

    @QUIET
    def result(self, task: str, reference: str, batch_size: int) -> Comparison:
        """The comparison; ``pixels`` is the number of compared places.

        Raises:
            ValueError: nothing was counted.
        """
        if not self._images:
            raise ValueError("nothing was compared")
        absolute, relative = _together(self._kept)
        return Comparison(
            task=task,
            reference=reference,
            batch_size=batch_size,
            images=self._images,
            max_abs=self._most["abs"],
            mean_abs=self._sums["abs"] / self._logits,
            median_abs=float(np.median(absolute)),
            max_rel=self._most["rel"],
            mean_rel=self._sums["rel"] / self._logits,
            median_rel=float(np.median(relative)),
            cosine=self._least["cosine"],
            kl_mean=self._sums["kl"] / self._places,
            kl_max=self._most["kl"],
            agreement=1 - self._counts["differ"] / self._places,
            disagreements=self._counts["differ"],
            ties=self._counts["ties"],
            unexplained=self._counts["unexplained"],
            top5_agreement=None,
            margin=None if np.isinf(self._least["lead"]) else self._least["lead"],
            disagreement_margin=None if np.isinf(self._most["left"]) else self._most["left"],
            pairs=np.concatenate([one.reshape(2, -1) for one in self._kept], axis=1),
            pixels=self._places,
        )


def _together(kept: list[Array]) -> tuple[Figures, Figures]:
    """Absolute and relative differences of the kept places, flat."""
    found = [differences(one[0].astype(np.float64), one[1].astype(np.float64)) for one in kept]
    absolute, relative = (np.concatenate([one[kind].ravel() for one in found]) for kind in (0, 1))
    return absolute, relative


def is_map(logits: NDArray[Any]) -> bool:
    """Whether logits are maps, [B, C, h, w]."""
    return logits.ndim == 4
