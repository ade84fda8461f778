"""The job as the driver runs it: parcels of chunks go out ahead of the answers, which are taken in order."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from prompttune.errors import DataError, EngineError, UsageError, first_line
from prompttune.serve.infer.cluster.connection import alive_nodes, connected
from prompttune.serve.infer.cluster.settings import Booking
from prompttune.serve.infer.cluster.workers import EngineActor, decode_parcel
from prompttune.serve.infer.items import Encoded, Item
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.settings import RaySettings
from prompttune.serve.infer.work import Work

log = logging.getLogger(__name__)

ATTEMPTS = 10
"""Largest number of attempts to decode a parcel: each retry follows the loss of a process or a node."""
CALLS = 40
"""Largest number of calls of an engine for a parcel. Ray repeats a call every few seconds until it knows that a node is
lost: with its default health checks, a single loss took 7 calls."""
PARCELS_OF_ENGINE = 4
"""Parcels in progress per engine: one is being answered, one waits at the engine, two are being decoded."""
MOST_PARCELS = 512
PIXEL_PARCELS_OF_ENGINE = 2
"""Parcels in progress per engine if they hold pixels, such as the frames of a video; each is one chunk."""
_LOST = (WorkerCrashedError, NodeDiedError, ObjectLostError, LocalRayletDiedError)
"""Ray's errors for processes and nodes that are gone."""
LOOK_S = 1.0
"""Seconds between two checks of the nodes."""
STALLED_S = 30.0
"""Seconds without an answer after a node was lost; work that takes longer counts as stuck."""


def run(chunks: Iterable[Sequence[Item]], work: Work, settings: RaySettings) -> Iterator[list[InputAnswer]]:
    """See :func:`~prompttune.serve.infer.cluster.run_on_ray`."""
    booking = Booking.of(settings, on_gpu=work.options.cuda_index is not None)
    with connected(settings.address):
        job = _RayJob(iter(chunks), on_workers(work, settings), settings, booking)
        try:
            yield from job.answers()
        finally:
            job.close()


def on_workers(work: Work, settings: RaySettings) -> Work:
    """The work as the nodes of a cluster do it."""
    # Ray shows an engine only the GPUs that it has booked, and books CPUs, but a runtime would take all that it sees.
    options = replace(work.options, device="cpu" if work.options.cuda_index is None else "cuda")
    options = options.or_threads(max(1, math.floor(settings.cpus)))
    return replace(work, engine=work.engine.absolute(), options=options)


@dataclass(eq=False)
class _Engine:
    actor: Any
    opened: Any
    """Reference to the reason why it cannot be opened, or None."""
    is_open: bool = False
    parcels: int = 0
    """Number of its unanswered parcels."""


@dataclass(eq=False)
class _Parcel:
    """Several chunks that are sent together."""

    chunks: list[Sequence[Item]] = field(default_factory=list)
    engine: _Engine | None = None
    decoded: Any = None
    answers: Any = None
    """References to the decoded images and to the answers; None until it is sent."""

    @property
    def has_pixels(self) -> bool:
        """Whether its last chunk holds decoded images, which take far more memory than files or paths."""
        return any(one.payload is not None and not isinstance(one.payload, Encoded) for one in self.chunks[-1])


class _RayJob:
    """One job on the cluster.

    Ray restarts lost engines on other nodes and repeats lost work. If it cannot place an engine again, all engines are
    started anew on the nodes that are left, from the first unanswered parcel.
    """

    def __init__(self, chunks: Iterator[Sequence[Item]], work: Work, settings: RaySettings, booking: Booking) -> None:
        self._chunks = chunks
        self._in_parcel = max(1, settings.parcel // work.chunk_inputs)
        self._settings = settings
        self._booking = booking
        self._work = work
        self._shared_work = ray.put(work)
        # decoded images are lost with their node: Ray repeats the task that made them
        self._decode = ray.remote(decode_parcel).options(num_cpus=booking.decoder_cpus, max_retries=ATTEMPTS - 1)
        self._engines: list[_Engine] = []
        self._waiting: deque[_Parcel] = deque()
        self._problem: Exception | None = None
        self._answered_at = time.monotonic()
        self._has_warned = False

    def answers(self) -> Generator[list[InputAnswer], None, None]:
        """The answers of every chunk. An error of the inputs comes after the answers of the chunks before it."""
        self._start_engines(self._settings.actors[0])
        while True:
            while len(self._waiting) < self._window() and (parcel := self._next_parcel()).chunks:
                self._waiting.append(parcel)
            if not self._waiting:
                break
            yield from self._take()
        if self._problem is not None:
            raise self._problem

    def _start_engines(self, least: int) -> None:
        self._nodes, booking = alive_nodes(), self._booking
        room = booking.room(self._nodes.values())
        if not room:
            gpus = f" and {booking.gpus:g} GPUs" if booking.gpus else ""
            raise UsageError(
                f"the Ray cluster has no room for an engine ({booking.cpus:g} CPUs{gpus} on a node) and a decoder "
                f"({booking.decoder_cpus:g} CPUs): let them book less, or add nodes"
            )
        if least > room:
            # Additional engines would take the CPUs of the decoders and wait for them for ever.
            raise UsageError(f"the Ray cluster has room for {room} engines with their decoders, not for {least}")
        kind = ray.remote(EngineActor).options(
            num_cpus=booking.cpus, num_gpus=booking.gpus, max_restarts=-1, max_task_retries=CALLS - 1
        )
        for _ in range(min(room, self._settings.actors[1] or room)):
            actor = kind.remote(self._work)
            self._engines.append(_Engine(actor, actor.opened.remote()))

    def close(self) -> None:
        """End all engines, and the decoding of parcels without answers."""
        for engine in self._engines:
            ray.kill(engine.actor)
        self._engines = []
        for parcel in self._waiting:
            if parcel.decoded is not None:
                ray.cancel(parcel.decoded)
            parcel.engine = parcel.decoded = parcel.answers = None

    def _window(self) -> int:
        """Largest number of unanswered parcels."""
        if self._settings.window is not None:
            return self._settings.window
        if self._waiting and self._waiting[-1].has_pixels:
            return PIXEL_PARCELS_OF_ENGINE * len(self._engines)
        cpus = math.floor(sum(node.get("CPU", 0.0) for node in self._nodes.values()))
        return min(MOST_PARCELS, PARCELS_OF_ENGINE * len(self._engines) + cpus)

    def _next_parcel(self) -> _Parcel:
        """The next parcel; it is empty at the end."""
        parcel = _Parcel()
        try:
            for chunk in self._chunks:
                parcel.chunks.append(list(chunk))  # chunks before an error count
                if len(parcel.chunks) == self._in_parcel or parcel.has_pixels:
                    break
        except Exception as problem:
            self._problem = problem
            self._chunks = iter(())
        return parcel

    def _take(self) -> list[list[InputAnswer]]:
        """Wait for the first parcel's answers."""
        first = self._waiting[0]
        try:
            while True:
                self._send()
                awaited = [one.opened for one in self._engines] if first.answers is None else [first.answers]
                done, _ = ray.wait(awaited, timeout=LOOK_S)
                if done and first.engine is not None:
                    break
                self._check_nodes()
            found = ray.get(first.answers)
        except RayError as problem:
            raise _failure(problem, first) from problem
        if isinstance(found, str):
            raise EngineError(found)
        first.engine.parcels -= 1
        self._waiting.popleft()
        self._answered_at = time.monotonic()
        answers: list[list[InputAnswer]] = found
        return answers

    def _send(self) -> None:
        """Send waiting parcels to the engines that are open."""
        opening = [one for one in self._engines if not one.is_open]
        done = ray.wait([one.opened for one in opening], num_returns=len(opening), timeout=0)[0] if opening else []
        for engine in opening:
            if engine.opened in done:
                if (problem := ray.get(engine.opened)) is not None:
                    raise EngineError(problem)
                engine.is_open = True
        ready = [one for one in self._engines if one.is_open]
        share = math.ceil(self._window() / len(self._engines))  # engines that open later get theirs
        for parcel in self._waiting if ready else ():
            engine = min(ready, key=lambda one: one.parcels)
            if parcel.answers is None and engine.parcels < share:
                engine.parcels += 1
                parcel.engine = engine
                parcel.decoded = self._decode.remote(parcel.chunks, self._shared_work, Path.cwd())
                parcel.answers = engine.actor.answer.remote(parcel.decoded)

    def _check_nodes(self) -> None:
        """Start all engines anew if a lost node has stopped the job and other nodes have room."""
        nodes = alive_nodes()
        if self._nodes.keys() <= nodes.keys() or time.monotonic() - self._answered_at < STALLED_S:
            return
        if self._booking.room(nodes.values()):
            log.warning("a node was lost and its work cannot be placed elsewhere: its inputs are retried")
            self.close()
            self._start_engines(1)  # the cluster may be smaller than when the job began
            self._answered_at = time.monotonic()
        elif not self._has_warned:
            log.warning("a node was lost, and no other node has room for an engine: waiting for a node")
            self._has_warned = True


def _failure(problem: RayError, parcel: _Parcel) -> DataError:
    """The error of a worker that Ray's errors wrap, in one line."""
    inner: BaseException = problem
    while isinstance(inner, RayTaskError):
        inner = inner.cause
    inputs = f"{parcel.chunks[0][0].source} and the inputs after it"
    if isinstance(inner, RayActorError):
        return DataError(f"an engine was lost in each of {CALLS} attempts to answer {inputs}")
    if isinstance(inner, _LOST):
        return DataError(f"{ATTEMPTS} processes or nodes were lost trying to answer {inputs}")
    return DataError(f"the job on Ray has failed: {type(inner).__name__}: {first_line(inner)}")
