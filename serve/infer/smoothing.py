"""Smoothing over time: the answers of a video's frames follow those of the frames before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prompttune.errors import UsageError
from prompttune.serve.answers import Probabilities
from prompttune.serve.infer.items import Item


class Smoother:
    """An exponential moving average of class probabilities, per source and task.

    The weight of earlier frames halves every ``half_life`` seconds of the frames' own time, so strides and dropped
    frames do not change the result. A frame without an answer leaves the average unchanged. The averages of a source
    are dropped when another source begins.

    Args:
        half_life: half-life in seconds.
        state: an earlier :meth:`state` to continue from.
    """

    def __init__(self, half_life: float, state: Mapping[str, Any] | None = None) -> None:
        if not half_life > 0:
            raise UsageError(f"the half-life of smoothing must be above 0 seconds, not {half_life:g}")
        self._half_life = half_life
        state = state or {"source": None, "averages": {}}
        self._source: str | None = state["source"]
        self._averages: dict[str, tuple[float, Probabilities]] = {
            task: (timestamp, np.array(average, np.float64)) for task, (timestamp, average) in state["averages"].items()
        }

    def __call__(self, item: Item, task: str, new: Probabilities) -> Probabilities:
        """Smooth the probabilities [C] of the next answer of a task."""
        if item.timestamp is None:
            return new
        if item.source != self._source:
            self._source, self._averages = item.source, {}
        if task in self._averages:
            before, average = self._averages[task]
            kept = 0.5 ** (max(0.0, item.timestamp - before) / self._half_life)
            new = kept * average + (1.0 - kept) * new
        self._averages[task] = item.timestamp, new
        return new

    def state(self) -> dict[str, Any]:
        """Values, plain but for arrays [C], from which another smoother continues with bit-identical results."""
        return {"source": self._source, "averages": dict(self._averages)}
