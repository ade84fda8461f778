"""Execution of a plan: finished runs are kept, unfinished ones are resumed, and several may run at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from prompttune.benchmark.plan import ERROR, RunSpec
from prompttune.benchmark.worker import Backbones, run_one, share_teller
from prompttune.errors import UsageError, describe_failure
from prompttune.files import locked

MOST_JOBS = 4
"""Largest default number of concurrent runs on a CPU; each run has a backbone in memory."""


@dataclass(frozen=True)
class RunResult:
    """Result of a run: its row of figures, or one line about the error."""

    spec: RunSpec
    row: dict[str, Any] | None = None
    error: str | None = None
    kept: bool = False
    """Whether an earlier call had finished the run."""
    diverged: bool = False
    """Whether the error is a candidate's result, which is not tried again."""

    @classmethod
    def of(cls, spec: RunSpec, row: dict[str, Any], *, kept: bool = False) -> RunResult:
        """The outcome from the record of a run."""
        if ERROR in row:
            return cls(spec, error=f"diverged: {row[ERROR]}", kept=kept, diverged=True)
        return cls(spec, row, kept=kept)


class Listener(Protocol):
    """Receives news about a plan."""

    def begin(self, pace: Pace) -> None:
        """The first run is about to start."""

    def update(self, pace: Pace) -> None:
        """A run has made progress."""

    def ended(self, outcome: RunResult, pace: Pace) -> None:
        """A run has ended."""


@dataclass
class Pace:
    """Progress of a plan, and the time left."""

    total: int
    jobs: int
    kept: int = 0
    ended: int = 0
    """Number of runs of this call that have ended."""
    waiting: list[RunSpec] = field(default_factory=list)
    running: dict[RunSpec, tuple[float, float]] = field(default_factory=dict)
    """Start time by ``time.monotonic`` and finished share of each running run."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Durations of this call's runs in seconds, by label."""

    @property
    def done(self) -> int:
        """Number of ended runs, including those of earlier calls."""
        return self.kept + self.ended

    def share(self) -> float:
        """Finished share of all runs."""
        return (self.done + sum(share for _, share in self.running.values())) / max(self.total, 1)

    def seconds_left(self, now: float | None = None) -> float | None:
        """Estimated seconds left; None before the first estimate."""
        now = time.monotonic() if now is None else now
        known = [value for values in self.seconds.values() for value in values]
        known += [(now - began) / share for began, share in self.running.values() if share > 0]
        if not known:
            return None
        mean = sum(known) / len(known)

        def expected(spec: RunSpec) -> float:
            own = self.seconds.get(spec.label)
            return sum(own) / len(own) if own else mean

        left = sum(expected(spec) for spec in self.waiting)
        left += sum(expected(spec) * (1 - share) for spec, (_, share) in self.running.items())
        return left / min(self.jobs, max(len(self.waiting) + len(self.running), 1))


def default_jobs(device: str) -> int:
    """Default number of concurrent runs: one on a GPU; on a CPU one per core, up to :data:`MOST_JOBS`."""
    from prompttune.training.scoring import resolve_device

    return 1 if resolve_device(device).type == "cuda" else min(cores(), MOST_JOBS)


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def execute(
    specs: Sequence[RunSpec],
    output: Path,
    jobs: int,
    listener: Listener,
    on_change: Callable[[], None] = lambda: None,
) -> list[RunResult]:
    """Train every unfinished run of a plan; a failed run does not stop the others.

    Args:
        specs: the plan.
        output: output folder of the benchmark.
        jobs: number of worker processes, which share the cores; 1 trains in this process.
        listener: receives news.
        on_change: called before the first run and after each.

    Returns:
        One outcome per run, in the order of the plan.

    Raises:
        UsageError: another benchmark writes to the folder, or a finished run had other settings; no run has started.
    """
    with locked(output):
        outcomes: dict[RunSpec, RunResult] = {}
        by_name = {spec.name: spec for spec in specs}
        if len(by_name) < len(specs):
            raise UsageError("two runs of the plan have the same task, label and seed")
        for spec in specs:
            if (row := spec.record(output)) is not None:
                outcomes[spec] = RunResult.of(spec, row, kept=True)
        todo = [spec for spec in specs if spec not in outcomes]
        jobs = max(1, min(jobs, len(todo)))
        pace = Pace(len(specs), jobs, kept=len(outcomes), waiting=list(todo))
        listener.begin(pace)
        on_change()
        run = _in_process(pace, output, listener) if jobs == 1 else _in_workers(pace, output, listener)
        for outcome in run:
            outcomes[outcome.spec] = outcome
            on_change()
        return [outcomes[spec] for spec in specs]


def _start(pace: Pace) -> RunSpec:
    spec = pace.waiting.pop(0)
    pace.running[spec] = (time.monotonic(), 0.0)
    return spec


def _progress(pace: Pace, spec: RunSpec, share: float, listener: Listener) -> None:
    pace.running[spec] = (pace.running[spec][0], share)
    listener.update(pace)


def _end(pace: Pace, outcome: RunResult, listener: Listener) -> RunResult:
    began, _ = pace.running.pop(outcome.spec)
    pace.ended += 1
    pace.seconds.setdefault(outcome.spec.label, []).append(time.monotonic() - began)
    listener.ended(outcome, pace)
    return outcome


def _in_process(pace: Pace, output: Path, listener: Listener) -> Iterator[RunResult]:
    backbones: Backbones = {}
    while pace.waiting:
        spec = _start(pace)
        tell = share_teller(lambda share, spec=spec: _progress(pace, spec, share, listener))  # type: ignore[misc]
        try:
            outcome = RunResult.of(spec, run_one(spec, output, backbones, tell))
        except Exception as problem:  # any error belongs to this run
            outcome = RunResult(spec, error=describe_failure(problem))
        yield _end(pace, outcome, listener)


@dataclass
class _Worker:
    """A process that trains one run after the other."""

    process: subprocess.Popen[bytes]
    channel: Connection
    spec: RunSpec


def _in_workers(pace: Pace, output: Path, listener: Listener) -> Iterator[RunResult]:
    workers: list[_Worker] = []
    try:
        while pace.waiting or workers:
            while pace.waiting and len(workers) < pace.jobs:
                workers.append(_hire(pace, output))
            by_channel = {worker.channel: worker for worker in workers}
            ready = deque(wait(list(by_channel)))
            while ready:
                worker = by_channel[ready.popleft()]  # type: ignore[index]
                outcome = _hear(worker, pace, listener)
                if outcome is None:
                    continue
                yield _end(pace, outcome, listener)
                if worker.process.poll() is None and pace.waiting:
                    worker.spec = _start(pace)
                    with contextlib.suppress(BrokenPipeError):  # it has just died, which the next message reports
                        worker.channel.send(worker.spec)
                else:
                    workers.remove(worker)
                    _dismiss(worker)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def _hire(pace: Pace, output: Path) -> _Worker:
    """Start a process with its first run.

    The process runs its own program: a forked process would inherit torch's threads in part, and multiprocessing's
    spawned one would run the caller's main module again. ``-P`` keeps modules in the current folder out of it.
    """
    ours, theirs = multiprocessing.Pipe()
    words = (theirs.fileno(), os.getpid(), max(1, cores() // pace.jobs), output)
    command = [sys.executable, "-P", "-m", "prompttune.benchmark", *map(str, words)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    worker = _Worker(process, ours, _start(pace))
    ours.send(worker.spec)
    return worker


def _dismiss(worker: _Worker) -> None:
    with contextlib.suppress(OSError):
        worker.channel.send(None)
    worker.process.wait()
    worker.channel.close()


def _hear(worker: _Worker, pace: Pace, listener: Listener) -> RunResult | None:
    """Read one message of a worker; return its run's outcome if that has ended."""
    try:
        kind, value = worker.channel.recv()
    except (EOFError, ConnectionResetError):
        return RunResult(worker.spec, error=f"the worker process died (exit code {worker.process.wait()})")
    if kind == "share":
        _progress(pace, worker.spec, value, listener)
        return None
    return RunResult.of(worker.spec, value) if kind == "row" else RunResult(worker.spec, error=value)
