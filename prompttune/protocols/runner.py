"""Carries a plan out: finished runs are kept, half ones go on, several at once if asked for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from prompttune.errors import UsageError, describe_failure
from prompttune.files import locked
from prompttune.protocols.plan import ERROR, RunSpec
from prompttune.protocols.worker import Backbones, run_one, share_teller

MOST_JOBS = 4
"""Runs at once on a CPU if nothing is said; each has a backbone of its own in memory."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its row of figures, or one line that says what went wrong."""

    spec: RunSpec
    row: dict[str, Any] | None = None
    error: str | None = None
    kept: bool = False
    """Whether it had been finished by an earlier call."""
    diverged: bool = False
    """Whether the error is a candidate's result, which is not tried again."""

    @classmethod
    def of(cls, spec: RunSpec, row: dict[str, Any], *, kept: bool = False) -> Outcome:
        """From the record that a run left."""
        if ERROR in row:
            return cls(spec, error=f"diverged: {row[ERROR]}", kept=kept, diverged=True)
        return cls(spec, row, kept=kept)


class Listener(Protocol):
    """Hears how a plan gets on."""

    def begin(self, pace: Pace) -> None:
        """The first run is about to start."""

    def update(self, pace: Pace) -> None:
        """A run got a little further."""

    def ended(self, outcome: Outcome, pace: Pace) -> None:
        """A run has ended."""


@dataclass
class Pace:
    """How far a plan is, and from that the time left."""

    total: int
    jobs: int
    kept: int = 0
    ended: int = 0
    """Runs of this call that are over."""
    waiting: list[RunSpec] = field(default_factory=list)
    running: dict[RunSpec, tuple[float, float]] = field(default_factory=dict)
    """When each began, by ``time.monotonic``, and the share of it that is done."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Durations of the runs of this call, by label."""

    @property
    def done(self) -> int:
        """Runs that are over, those of earlier calls included."""
        return self.kept + self.ended

    def share(self) -> float:
        """Share of all runs that is done."""
        return (self.done + sum(share for _, share in self.running.values())) / max(self.total, 1)

    def seconds_left(self, now: float | None = None) -> float | None:
        """Estimate for what is left; None before anything is known."""
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
    """Runs at once if nothing is said: one on a GPU, on a CPU one for each core up to :data:`MOST_JOBS`."""
    from prompttune.training.scoring import resolve_device

    return 1 if resolve_device(device).type == "cuda" else min(cores(), MOST_JOBS)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def execute(specs: Sequence[RunSpec], output: Path, jobs: int, listener: Listener) -> list[Outcome]:
    """Train every run of a plan that is not finished; one that fails does not stop the others.

    Args:
        specs: the plan.
        output: folder of the benchmark.
        jobs: worker processes, each with its share of the cores; 1 trains in this process.
        listener: hears how it goes.

    Returns:
        An outcome for each run, in the order of the plan.

    Raises:
        UsageError: another benchmark is writing there, or a finished run had other settings; nothing has started.
    """
    with locked(output):
        outcomes: dict[RunSpec, Outcome] = {}
        by_name = {spec.name: spec for spec in specs}
        if len(by_name) < len(specs):
            raise UsageError("two runs of the plan have the same task, label and seed")
        for spec in specs:
            if (row := spec.record(output)) is not None:
                outcomes[spec] = Outcome.of(spec, row, kept=True)
        todo = [spec for spec in specs if spec not in outcomes]
        jobs = max(1, min(jobs, len(todo)))
        pace = Pace(len(specs), jobs, kept=len(outcomes), waiting=list(todo))
        listener.begin(pace)
        run = _in_process(pace, output, listener) if jobs == 1 else _in_workers(pace, output, listener)
        for outcome in run:
            outcomes[outcome.spec] = outcome
        return [outcomes[spec] for spec in specs]


def _start(pace: Pace) -> RunSpec:
    spec = pace.waiting.pop(0)
    pace.running[spec] = (time.monotonic(), 0.0)
    return spec


def _progress(pace: Pace, spec: RunSpec, share: float, listener: Listener) -> None:
    pace.running[spec] = (pace.running[spec][0], share)
    listener.update(pace)


def _end(pace: Pace, outcome: Outcome, listener: Listener) -> Outcome:
    began, _ = pace.running.pop(outcome.spec)
    pace.ended += 1
    pace.seconds.setdefault(outcome.spec.label, []).append(time.monotonic() - began)
    listener.ended(outcome, pace)
    return outcome


def _in_process(pace: Pace, output: Path, listener: Listener) -> Iterator[Outcome]:
    backbones: Backbones = {}
    while pace.waiting:
        spec = _start(pace)
        tell = share_teller(lambda share, spec=spec: _progress(pace, spec, share, listener))  # type: ignore[misc]
        try:
            outcome = Outcome.of(spec, run_one(spec, output, backbones, tell))
        except Exception as problem:  # whatever it is, it is this run's
            outcome = Outcome(spec, error=describe_failure(problem))
        yield _end(pace, outcome, listener)


@dataclass
class _Worker:
    """A process that trains one run after the other."""

    process: subprocess.Popen[bytes]
    channel: Connection
    spec: RunSpec


def _in_workers(pace: Pace, output: Path, listener: Listener) -> Iterator[Outcome]:
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
                    with contextlib.suppress(BrokenPipeError):  # it has just died: the next message says so
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

    A program of its own: a forked process inherits torch's threads half, and multiprocessing's spawned one runs the
    caller's main module again. ``-P`` keeps the modules of the folder that the user stands in out of it.
    """
    ours, theirs = multiprocessing.Pipe()
    words = (theirs.fileno(), os.getpid(), max(1, cores() // pace.jobs), output)
    command = [sys.executable, "-P", "-m", "prompttune.protocols", *map(str, words)]
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


def _hear(worker: _Worker, pace: Pace, listener: Listener) -> Outcome | None:
    """Take one message of a worker; its run's outcome if that has ended."""
    try:
        kind, value = worker.channel.recv()
    except (EOFError, ConnectionResetError):
        return Outcome(worker.spec, error=f"the worker process died (exit code {worker.process.wait()})")
    if kind == "share":
        _progress(pace, worker.spec, value, listener)
        return None
    return Outcome.of(worker.spec, value) if kind == "row" else Outcome(worker.spec, error=value)
