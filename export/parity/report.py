"""Parity: measured differences between an engine's answers and its reference's, with thresholds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from prompttune.export.parity.accuracy import Accuracy
from prompttune.export.parity.bisection import Bisection
from prompttune.export.parity.figures import Comparison
from prompttune.export.parity.gate import Gate
from prompttune.export.parity.invariance import Neighbours, Swap

_GATE = ("precision", "atol", "min_agreement", "max_accuracy_loss", "noise", "max_neighbours")
"""Thresholds that a report repeats."""


def torch_description() -> str:
    """Description of the usual reference."""
    return f"PyTorch {torch.__version__}, float32"


_Failure = tuple[float, str]
"""A figure over its threshold, and one line about it."""


def _share(figure: float, threshold: float) -> float:
    """A figure over its threshold; infinite for a threshold of 0, and for a figure that is not finite."""
    return figure / threshold if threshold and math.isfinite(figure) else math.inf


@dataclass(frozen=True)
class ParityReport:
    """A comparison, and whether it passed."""

    runtime: str
    images: dict[str, str]
    """Description of the images that each task was compared on."""
    comparisons: tuple[Comparison, ...]
    mixed_vs_single: float | None
    """Largest difference between a row of a mixed batch and the same row run alone; None for a single task."""
    gate: Gate = field(default_factory=Gate)
    accuracy: tuple[Accuracy, ...] = ()
    swaps: tuple[Swap, ...] = ()
    """Results of A, B, A for every task; empty for a single task."""
    neighbours: tuple[Neighbours, ...] = ()
    """Each task's images alone and in batches; empty if all batches have one row."""
    bisection: Bisection | None = None
    """Intermediate results, if requested."""
    reference: str = field(default_factory=torch_description)
    notes: tuple[str, ...] = ()
    """Remarks that a reader needs to judge the figures."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of the tools that made the engine."""

    @property
    def failures(self) -> list[str]:
        """One line for each figure beyond its threshold, the worst first."""
        found = [*self._comparison_failures(), *self._accuracy_failures(), *self._row_failures()]
        return [line for _, line in sorted(found, key=lambda one: -one[0])]

    @property
    def warnings(self) -> list[str]:
        """One line for each task whose logits differ by more than rounding explains, even if its answers agree, and for
        each task with images without finite logits.

        Agreement over few images may hide a mistake that moves every logit without changing an answer.
        """
        worst: dict[str, Comparison] = {}
        for one in self.comparisons:
            if one.unexplained > (worst[one.task].unexplained if one.task in worst else 0):
                worst[one.task] = one
        unexplained = [
            f"task {name!r}: {one.unexplained} of {_counted(one)} are off by more than the rounding of "
            f"{self.gate.precision} explains ({self.gate.noise:g} of the logits' scale); --debug shows where it begins"
            for name, one in worst.items()
        ]
        return [*unexplained, *self._not_finite()]

    def _not_finite(self) -> Iterator[str]:
        for one in self.accuracy:
            if one.not_finite:
                left = one.not_finite - len(one.not_finite_images)
                names = ", ".join(one.not_finite_images) + (f" and {left} more" if left else "")
                yield (
                    f"task {one.task!r}: the engine's logits are not finite for {one.not_finite} of {one.images} "
                    f"images of {one.data}, which count as wrong: {names}"
                )

    def _comparison_failures(self) -> Iterator[_Failure]:
        atol, required = self.gate.atol, self.gate.min_agreement
        for one in self.comparisons:
            where = f"task {one.task!r}, batch size {one.batch_size}, against the {one.reference}"
            if not math.isfinite(one.max_abs):
                yield math.inf, f"{where}: logits are not finite, or differ by {one.max_abs}"
            elif atol is not None and one.max_abs > atol:
                yield _share(one.max_abs, atol), f"{where}: logits differ by {one.max_abs:.3g}, allowed {atol:g}"
            if not one.decided_agreement >= required:
                counted = one.disagreements - one.ties
                near = "" if one.disagreement_margin is None else f"; leads there up to {one.disagreement_margin:.3g}"
                ties = f", {one.ties} more are ties" if one.ties else ""
                yield (
                    counted / max((1 - required) * (one.pixels or one.images), 1),
                    f"{where}: top-1 agreement {one.decided_agreement:.4g} "
                    f"({counted} of {one.pixels or one.images} differ{ties}{near}), required {required:g}",
                )
        apart, limit = self.mixed_vs_single, math.inf if atol is None else atol
        if apart is not None and not (math.isfinite(apart) and apart <= limit):
            yield _share(apart, limit), f"a mixed batch differs from single runs by {apart:.3g}, allowed {limit:g}"

    def _accuracy_failures(self) -> Iterator[_Failure]:
        allowed = self.gate.max_accuracy_loss
        for one in self.accuracy:
            if allowed is None or one.engine is None or one.reference is None or not one.images:
                continue
            loss = one.reference - one.engine
            # Few images cannot show a small loss: one of them weighs more than the limit, and may be a tie.
            permitted = max(allowed, 1 / one.images) if allowed else 0.0
            if not loss <= permitted + 1e-9:  # shares are quotients: 0.98 - 0.97 slightly exceeds 0.01
                yield (
                    _share(loss, permitted),
                    f"task {one.task!r}: {one.metric} on {one.data} falls from {one.reference:.2%} to "
                    f"{one.engine:.2%}, allowed {permitted * 100:.3g} points",
                )

    def _row_failures(self) -> Iterator[_Failure]:
        for swap in self.swaps:
            if not swap.exact:
                yield (
                    math.inf,
                    f"task {swap.task!r}, batch size {swap.batch_size}: after task {swap.other!r} with batch size "
                    f"{swap.between} its answer changes by {swap.max_abs:.3g}",
                )
        allowed = self.gate.max_neighbours
        for one in self.neighbours:
            if not one.max_rel <= allowed:
                yield (
                    _share(one.max_rel, allowed),
                    f"task {one.task!r}: in batches of {one.batch_size} with {one.among} its logits differ from those "
                    f"of the same images alone by {one.max_rel:.3g} of the largest, allowed {allowed:g}, and "
                    f"{one.changed} of {one.images} images have another top class",
                )

    @property
    def passed(self) -> bool:
        """Whether every figure is within its threshold."""
        return not self.failures

    @property
    def max_abs(self) -> float:
        """Largest absolute difference of all comparisons."""
        return float(np.max([one.max_abs for one in self.comparisons], initial=0.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; figures that are not finite become strings."""
        plain: dict[str, Any] = _plain(
            {
                "passed": self.passed,
                "failures": self.failures,
                "warnings": self.warnings,
                **{name: getattr(self.gate, name) for name in _GATE},
                "notes": list(self.notes),
                "reference": self.reference,
                "runtime": self.runtime,
                "versions": dict(self.versions),
                "images": self.images,
                "comparisons": [_figures(one) for one in self.comparisons],
                "mixed_vs_single": self.mixed_vs_single,
                "accuracy": [one.to_dict() for one in self.accuracy],
                "swaps": [_figures(one) for one in self.swaps],
                "neighbours": [_figures(one) for one in self.neighbours],
                "bisection": None if self.bisection is None else self.bisection.to_dict(),
            }
        )
        return plain


def _counted(one: Comparison) -> str:
    return f"{one.pixels} pixels" if one.pixels else f"{one.images} images"


def _figures(record: Comparison | Swap | Neighbours) -> dict[str, Any]:
    """A record's values by name, without the logits for plots."""
    return {one.name: getattr(record, one.name) for one in dataclasses.fields(record) if one.name != "pairs"}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
