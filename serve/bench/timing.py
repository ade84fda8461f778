"""Timing side by side: everything that is compared runs in turn, round by round, in one process.

A noisy machine disturbs all runs of a round alike, so figures are compared within a round: a ratio here is the median
of the rounds' own ratios, not a ratio of medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from prompttune.errors import UsageError

LEAST_ROUNDS = 3
"""Rounds timed at least, however few seconds are given."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Rounds:
    """How often everything is timed."""

    warmup: int = 3
    """Rounds before the first that counts."""
    repeats: int = 20
    """Rounds that count, unless ``seconds`` is given."""
    seconds: float | None = None
    """Go on for so long, and for :data:`LEAST_ROUNDS` rounds at least."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.repeats < 1 or (self.seconds is not None and not self.seconds > 0):
            raise UsageError("timing needs warmup of at least 0, repeats of at least 1 and seconds above 0")

    def share_done(self, done: int, elapsed: float) -> float:
        """Share of the rounds that lies behind after ``done`` of them in ``elapsed`` seconds; 1 ends the timing."""
        if self.seconds is None:
            return min(done / self.repeats, 1.0)
        return min(done / LEAST_ROUNDS, elapsed / self.seconds, 1.0)


def _nothing() -> None:
    """What a CPU needs before its clock is read."""


def interleaved(
    runs: Mapping[Key, Callable[[], Any]],
    rounds: Rounds,
    synchronize: Callable[[], Any] = _nothing,
    on_share: Callable[[float], None] = lambda _: None,
) -> dict[Key, list[float]]:
    """Seconds of each run, one figure a round, the runs of a round taken in turn.

    Args:
        runs: what to time, in the order of a round.
        rounds: how often.
        synchronize: called before the clock is read, for a device that works on after a call returns.
        on_share: told after each round which share of the counted rounds is done.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for _ in range(rounds.warmup):
        for run in runs.values():
            run()
    done, began = 0, time.perf_counter()
    while rounds.share_done(done, time.perf_counter() - began) < 1:
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
        done += 1
        on_share(rounds.share_done(done, time.perf_counter() - began))
    return seconds


@dataclass(frozen=True)
class Latency:
    """Time of one call, in milliseconds; percentiles interpolate linearly between the rounds' figures."""

    rounds: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """That of measured seconds, at least one."""
        values = np.asarray(seconds, dtype=np.float64) * 1e3
        p50, p90, p99 = (float(one) for one in np.percentile(values, (50, 90, 99)))
        return cls(len(values), float(values.mean()), p50, p90, p99)

    def per(self, count: int) -> float:
        """``count`` things in one call → things a second, at the median time."""
        return count / self.p50_ms * 1e3


@dataclass(frozen=True)
class Ratio:
    """How many times as long one run takes as another, from their figures of the same rounds."""

    median: float
    """Median of the rounds' ratios."""
    p25: float
    p75: float

    @classmethod
    def of(cls, seconds: Sequence[float], floor: Sequence[float]) -> Ratio:
        """``seconds`` over ``floor``, round by round; both of the same length."""
        if len(seconds) != len(floor):
            raise ValueError(f"{len(seconds)} rounds cannot be paired with {len(floor)}")
        each = np.asarray(seconds, dtype=np.float64) / np.asarray(floor, dtype=np.float64)
        p25, p50, p75 = (float(one) for one in np.percentile(each, (25, 50, 75)))
        return cls(p50, p25, p75)
