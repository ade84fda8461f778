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

from prompttune.settings import setting, settle

LEAST_ROUNDS = 3
"""Smallest number of measured rounds, however few seconds are given."""

Key = TypeVar("Key")


@dataclass(frozen=True)
class Rounds:
    """Numbers of rounds."""

    warmup: int = setting(3, "Number of warm-up rounds.", low=0)
    repeats: int = setting(20, "Number of measured rounds.", low=1)
    seconds: float | None = setting(
        None, "Duration of the measurement at each batch size, instead of --repeats.", above=0
    )
    """At least :data:`LEAST_ROUNDS` rounds are measured."""

    def __post_init__(self) -> None:
        settle(self)

    def are_done(self, done: int, elapsed: float) -> bool:
        """Whether ``done`` rounds in ``elapsed`` seconds suffice."""
        return done >= self.repeats if self.seconds is None else done >= LEAST_ROUNDS and elapsed >= self.seconds


def interleaved(
    runs: Mapping[Key, Callable[[], Any]], rounds: Rounds, synchronize: Callable[[], Any] = lambda: None
) -> dict[Key, list[float]]:
    """Seconds of each run, one figure per round, with the runs of a round taken in turn.

    Args:
        runs: functions to time, in the order of a round.
        rounds: numbers of rounds.
        synchronize: called before the clock is read, for a device that continues after a call returns.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    for _ in range(rounds.warmup):
        for run in runs.values():
            run()
    done, began = 0, time.perf_counter()
    while not rounds.are_done(done, time.perf_counter() - began):
        for name, run in runs.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
        done += 1
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
