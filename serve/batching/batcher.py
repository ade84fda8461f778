"""Dynamic batching across tasks: the batches of one worker mix rows of any tasks, and every task gets its turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from prompttune.export.runtimes import Array
from prompttune.serve.messages import UnavailableError
from prompttune.serve.workers import Answer, Key, Worker, WorkerDiedError

LOG = logging.getLogger("prompttune.serve")

STALL_S = 120.0
COPY_INLINE_BYTES = 2**20
"""A batch up to this size is copied on the event loop; a thread costs more."""


@dataclass(frozen=True)
class Outcome:
    """Logits and timing of one job."""

    logits: Sequence[Array]
    """float32 [C] for each row; columns past the task's own classes are -inf."""
    queue_s: float
    """Seconds from the call to the first batch that held a row."""
    infer_s: float
    """Seconds in the engine, summed over the batches."""
    batches: Sequence[tuple[int, float]]
    """Row count and seconds of each batch that held rows of the job."""


@dataclass(eq=False)
class _Job:
    """Rows of one task that arrived together; they may be split over several batches."""

    key: Key
    images: Sequence[Array]
    future: asyncio.Future[None]
    arrived: float
    logits: dict[int, Array] = field(default_factory=dict)
    taken: int = 0
    """Rows that were put into a batch."""
    ended: int = 0
    """Rows whose batch has ended, with or without an error."""
    begun: float | None = None
    batches: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Part:
    """Some rows of a job within a batch."""

    job: _Job
    start: int
    stop: int


class _Queues:
    """Waiting rows: the most urgent priority first, round robin over the tasks within it, in order within a task."""

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Key, deque[_Job]]] = {}
        self.rows = 0

    def add(self, job: _Job, priority: int) -> None:
        self._levels.setdefault(priority, OrderedDict()).setdefault(job.key, deque()).append(job)
        self.rows += len(job.images)

    def oldest(self) -> float | None:
        """Arrival time of the job that has waited longest."""
        self._drop_abandoned()
        return min((jobs[0].arrived for level in self._levels.values() for jobs in level.values()), default=None)

    def take(self, most: int) -> list[_Part]:
        """Take up to ``most`` rows."""
        self._drop_abandoned()
        parts: list[_Part] = []
        for priority in sorted(self._levels):
            most -= self._take_level(self._levels[priority], most, parts)
        self._levels = {priority: level for priority, level in self._levels.items() if level}
        return parts

    def _take_level(self, level: OrderedDict[Key, deque[_Job]], most: int, parts: list[_Part]) -> int:
        taken = 0
        while level and taken < most:
            share = max(1, (most - taken) // len(level))
            for key in list(level):
                room = min(share, most - taken)
                if not room:
                    break  # tasks that got nothing come first next time
                taken += self._take_task(level, key, room, parts)
        return taken

    def _take_task(self, level: OrderedDict[Key, deque[_Job]], key: Key, most: int, parts: list[_Part]) -> int:
        jobs, taken = level[key], 0
        while jobs and taken < most:
            job = jobs[0]
            stop = min(len(job.images), job.taken + most - taken)
            parts.append(_Part(job, job.taken, stop))
            taken += stop - job.taken
            job.taken = stop
            if stop == len(job.images):
                jobs.popleft()
        if jobs:
            level.move_to_end(key)
        else:
            del level[key]
        self.rows -= taken
        return taken

    def _drop_abandoned(self) -> None:
        """Drop jobs whose callers have left or whose earlier rows have failed."""
        for level in self._levels.values():
            for key in list(level):
                kept = deque(job for job in level[key] if not job.future.done())
                if len(kept) != len(level[key]):
                    self.rows -= sum(len(job.images) - job.taken for job in level[key] if job.future.done())
                    level[key] = kept
                    if not kept:
                        del level[key]

    def clear(self) -> list[_Job]:
        """Empty the queues and return their jobs."""
        left = [job for level in self._levels.values() for jobs in level.values() for job in jobs]
        self._levels, self.rows = {}, 0
        return left


class Batcher:
    """Fills the slots of one worker. Call every method on the event loop.

    A batch starts when it is full, or when the device is free and the oldest row has waited for ``max_delay_s``. While
    a batch runs, only a full batch is prepared, so that rows collect meanwhile. A task with many waiting rows gets the
    same share of a batch as the other waiting tasks, unless they leave room.

    Args:
        worker: a started worker; the batcher does not close it.
        max_delay_s: longest time in seconds that a row waits for other rows while the device is free.
        on_batch: called with the row count and the seconds of each batch.
        stall_s: longest time of a batch in seconds; a worker that exceeds it is ended.
    """

    def __init__(
        self,
        worker: Worker,
        max_delay_s: float = 0.0,
        on_batch: Callable[[int, float], None] | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        self._worker = worker
        self._max_delay_s = max_delay_s
        self._stall_s = stall_s
        self._on_batch = on_batch
        self._queues = _Queues()
        self._slots = deque(range(worker.settings.slots))
        self._running: set[asyncio.Task[None]] = set()
        self.running_rows = 0
        self._changed = asyncio.Event()
        self._ended: WorkerDiedError | None = None
        self._loop = asyncio.create_task(self._dispatch())

    @property
    def queued_rows(self) -> int:
        """Number of rows that wait for a batch."""
        return self._queues.rows

    async def answer(self, key: Key, images: Sequence[Array], priority: int = 0) -> Outcome:
        """Compute the logits of ``images``, each float32 [3, S, S]; the state must hold its row until this returns.

        Raises:
            WorkerDiedError: the worker ended before it took any of the rows.
            UnavailableError: the worker ended while it had some of the rows, which may be the cause.
            PrompttuneError: the engine failed.
        """
        if self._ended is not None:
            raise WorkerDiedError(str(self._ended))
        future = asyncio.get_running_loop().create_future()
        job = _Job(key, images, future, time.monotonic())
        self._queues.add(job, priority)
        self._changed.set()
        try:
            await future
        except asyncio.CancelledError:
            future.cancel()
            await self._settled(job)
            raise
        begun = job.begun if job.begun is not None else job.arrived
        rows = [job.logits[row] for row in range(len(images))]
        return Outcome(rows, begun - job.arrived, sum(seconds for _, seconds in job.batches), job.batches)

    async def _settled(self, job: _Job) -> None:
        """Wait until no batch reads the job's row; the caller releases it next."""
        while job.ended < job.taken and self._running:
            await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)

    async def _dispatch(self) -> None:
        while True:
            await self._batch_is_due()
            parts = self._queues.take(self._worker.settings.max_batch)
            if parts:
                slot = self._slots.popleft()
                task = asyncio.create_task(self._run(slot, parts))
                self._running.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._changed.set()

    async def _batch_is_due(self) -> None:
        while True:
            self._changed.clear()
            full = self._queues.rows >= self._worker.settings.max_batch
            wait: float | None = None
            if self._slots and full:
                return
            if not self._running and (oldest := self._queues.oldest()) is not None:
                wait = oldest + self._max_delay_s - time.monotonic()
                if wait <= 0:
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)

    async def _run(self, slot: int, parts: Sequence[_Part]) -> None:
        began = time.monotonic()
        rows = [(part.job, row) for part in parts for row in range(part.start, part.stop)]
        self.running_rows += len(rows)
        for part in parts:
            part.job.begun = part.job.begun or began
        watch = asyncio.get_running_loop().call_later(self._stall_s, self._stalled)
        try:
            await self._fill(slot, [job.images[row] for job, row in rows])
            answer = await self._worker.run(slot, [job.key for job, _ in rows])
        except WorkerDiedError:
            problem = UnavailableError("the engine's worker ended while it had the request; it starts again: try again")
            self._fail([part.job for part in parts], problem)
            self._end()
        except Exception as problem:
            self._fail([part.job for part in parts], problem)
        else:
            self._deliver(parts, rows, answer)
        finally:
            watch.cancel()
            self.running_rows -= len(rows)
            for part in parts:
                part.job.ended += part.stop - part.start
            self._slots.append(slot)

    def _stalled(self) -> None:
        LOG.error("a batch takes longer than %g s: its worker is ended", self._stall_s)
        self._worker.abort()

    async def _fill(self, slot: int, images: Sequence[Array]) -> None:
        place = self._worker.images(slot)

        def copy() -> None:
            for row, image in enumerate(images):
                place[row] = image

        if sum(image.nbytes for image in images) <= COPY_INLINE_BYTES:
            copy()
        else:
            await asyncio.to_thread(copy)

    def _deliver(self, parts: Sequence[_Part], rows: Sequence[tuple[_Job, int]], answer: Answer) -> None:
        for (job, row), logits in zip(rows, answer.logits, strict=True):
            job.logits[row] = logits
        for part in parts:
            job = part.job
            job.batches.append((len(rows), answer.seconds))
            if len(job.logits) == len(job.images) and not job.future.done():
                job.future.set_result(None)
        if self._on_batch is not None:
            self._on_batch(len(rows), answer.seconds)

    @staticmethod
    def _fail(jobs: Iterable[_Job], problem: Exception) -> None:
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(problem)

    def _end(self) -> None:
        """Stop forming batches; another worker may answer the waiting rows."""
        self._ended = WorkerDiedError("the engine's worker ended")
        self._loop.cancel()
        self._fail(self._queues.clear(), self._ended)

    async def close(self) -> None:
        """Fail the waiting jobs. Call it after the last answer, or when the worker has ended."""
        self._end()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop
