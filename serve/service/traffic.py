"""Recent traffic of the server, second by second, and how long requests took."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

SECONDS_KEPT = 300
LATENCIES_KEPT = 256
"""Number of durations kept per task: enough for a 99th percentile, small for thousands of tasks."""


def percentile(sorted_values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0 to 1) of the values do not exceed (nearest rank)."""
    return sorted_values[max(0, math.ceil(share * len(sorted_values)) - 1)]


def percentiles_ms(seconds: Sequence[float], shares: Sequence[float] = (0.5, 0.95)) -> dict[str, float | None]:
    """``p50_ms`` and so on; None without traffic."""
    ordered = sorted(seconds)
    return {f"p{share * 100:.0f}_ms": percentile(ordered, share) * 1000 if ordered else None for share in shares}


@dataclass
class _Second:
    time: int
    seconds: list[float] = field(default_factory=list)
    errors: int = 0
    rows: int = 0
    batches: int = 0
    batch_rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "requests": len(self.seconds),
            "errors": self.errors,
            "rows": self.rows,
            **percentiles_ms(self.seconds, (0.5, 0.95, 0.99)),
            "batch_rows": self.batch_rows / self.batches if self.batches else None,
        }


class Traffic:
    """Traffic of the last minutes; seconds without traffic are left out."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque(maxlen=SECONDS_KEPT)

    def _now(self) -> _Second:
        now = int(time.time())
        if not self._seconds or self._seconds[-1].time != now:
            self._seconds.append(_Second(now))
        return self._seconds[-1]

    def request(self, seconds: float, rows: int, failed: bool) -> None:
        """Count a finished request."""
        second = self._now()
        second.seconds.append(seconds)
        second.errors += failed
        second.rows += 0 if failed else rows

    def batch(self, rows: int) -> None:
        """Count a finished batch."""
        second = self._now()
        second.batches += 1
        second.batch_rows += rows

    def rows_per_s(self, over: int = 10) -> float:
        """Answered rows per second, over the last ``over`` whole seconds."""
        now = int(time.time())
        return sum(one.rows for one in self._seconds if now - over <= one.time < now) / over

    def to_list(self) -> list[dict[str, Any]]:
        """One entry for each second with traffic, oldest first."""
        return [second.to_dict() for second in self._seconds]
