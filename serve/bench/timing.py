"""Side-by-side timing: all compared runs take turns, round by round, in one process.

A noisy machine disturbs all runs of a round alike, so figures are compared within a round: a ratio here is the median
of the rounds' own ratios instead of a ratio of medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from prompttune.errors import UsageError

LEAST_ROUNDS = 3
"""Smallest number of measured rounds, however few seconds are given."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Rounds:
    """Numbers of rounds."""

    warmup: int = 3
    """Number of rounds before the first measured one."""
    repeats: int = 20
    """Number of measured rounds, unless ``seconds`` is given."""
    seconds: float | None = None
    """Duration of the measurement in seconds, with at least :data:`LEAST_ROUNDS` rounds."""

    def __post_init__(self) -> None:
        if self.warmup < 0 or self.repeats < 1 or (self.seconds is not None and not self.seconds > 0):
            raise UsageError("timing needs warmup of at least 0, repeats of at least 1 and seconds above 0")

    def share_done(self, done: int, elapsed: float) -> float:
        """Finished share of the rounds after ``done`` rounds in ``elapsed`` seconds; 1 ends the timing."""
        if self.seconds is None:
            return min(done / self.repeats, 1.0)
        return min(done / LEAST_ROUNDS, elapsed / self.seconds, 1.0)


def _nothing() -> None:
    """Do nothing: a CPU's clock can be read at once."""


def interleaved(
    runs: Mapping[Key, Callable[[], Any]],
    rounds: Rounds,
    synchronize: Callable[[], Any] = _nothing,
    on_share: Callable[[float], None] = lambda _: None,
) -> dict[Key, list[float]]:
    """Seconds of each run, one figure per round, with the runs of a round taken in turn.

    Args:
        runs: functions to time, in the order of a round.
        rounds: numbers of rounds.
        synchronize: called before the clock is read, for a device that continues after a call returns.
        on_share: called after each round with the finished share of the measured rounds.
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
        """The latency from measured seconds, at least one."""
        values = np.asarray(seconds, dtype=np.float64) * 1e3
        p50, p90, p99 = (float(one) for one in np.percentile(values, (50, 90, 99)))
        return cls(len(values), float(values.mean()), p50, p90, p99)

    def per(self, count: int) -> float:
        """Things per second at the median time, with ``count`` things in one call."""
        return count / self.p50_ms * 1e3


@dataclass(frozen=True)
class Ratio:
    """Time of one run divided by that of another, from their figures in the same rounds."""

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
