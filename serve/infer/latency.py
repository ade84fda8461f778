"""Latency of a live stream's frames, from arrival to the written row."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable

import numpy as np

from prompttune.serve.infer.rows import InputAnswer

KEPT = 100_000
"""Number of latest frames that the figures cover: about an hour at 30 frames per second."""


class LiveLatency:
    """Seconds from arrival to the written row, for the latest :data:`KEPT` frames."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=KEPT)

    def written(self, answers: Iterable[InputAnswer]) -> None:
        """Record the latency of answers that have just been written."""
        now = time.monotonic()
        self._seconds.extend(now - answer.arrived for answer in answers if answer.arrived is not None)

    def figures(self) -> dict[str, float] | None:
        """``p50``, ``p99`` and ``max`` in milliseconds; None without live frames."""
        if not self._seconds:
            return None
        milliseconds = np.array(self._seconds) * 1000
        p50, p99 = np.percentile(milliseconds, [50, 99])
        return {"p50_ms": float(p50), "p99_ms": float(p99), "max_ms": float(milliseconds.max())}
