"""Dynamic batching across tasks: the batches of one worker mix rows of any tasks, and every task gets its turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prompttune.export.runtimes import Array
from prompttune.serve.messages import UnavailableError
from prompttune.serve.workers import BatchResult, Key, Worker, WorkerDiedError
from prompttune.serve.workers.waiting import to_the_end

LOG = logging.getLogger("prompttune.serve")

STALL_S = 120.0
COPY_INLINE_BYTES = 2**20
"""A batch up to this size is copied on the event loop; a thread costs more."""


@dataclass(frozen=True)
class JobResult:
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
class _RowsJob:
    """Rows of one task that arrived together; they may be split over several batches."""

    key: Key
    images: Sequence[Array]
    priority: int
    future: asyncio.Future[None]
    arrived: float
    logits: dict[int, Array] = field(default_factory=dict)
    running: set[asyncio.Task[None]] = field(default_factory=set)
    """Batches with rows of the job that have not ended."""
    begun: float | None = None
    batches: list[tuple[int, float]] = field(default_factory=list)


_Row = tuple[_RowsJob, int]
"""A job, and the index of one of its images."""


class _Queues:
    """Waiting rows: the most urgent priority first, a row of each task in turn within it, in order within a task."""

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[Key, deque[_Row]]] = {}
        self.rows = 0

    def add(self, job: _RowsJob) -> None:
        queue = self._levels.setdefault(job.priority, OrderedDict()).setdefault(job.key, deque())
        queue.extend((job, row) for row in range(len(job.images)))
        self.rows += len(job.images)

    def oldest(self) -> float | None:
        """Arrival time of the row that has waited longest."""
        return min((queue[0][0].arrived for level in self._levels.values() for queue in level.values()), default=None)

    def take(self, most: int) -> list[_Row]:
        """Take up to ``most`` rows."""
        taken: list[_Row] = []
        for priority in sorted(self._levels):
            level = self._levels[priority]
            while level and len(taken) < most:
                key, queue = next(iter(level.items()))
                taken.append(queue.popleft())
                level.move_to_end(key)
                if not queue:
                    del level[key]
        self._levels = {priority: level for priority, level in self._levels.items() if level}
        self.rows -= len(taken)
        return taken

    def drop(self, job: _RowsJob) -> None:
        """Drop the waiting rows of a job; its task keeps its turn."""
        level = self._levels.get(job.priority, OrderedDict())
        queue = level.get(job.key, deque())
        if kept := deque(one for one in queue if one[0] is not job):
            level[job.key] = kept
        else:
            level.pop(job.key, None)
        self.rows -= len(queue) - len(kept)

    def jobs(self) -> Iterator[_RowsJob]:
        """The job of each waiting row."""
        return (job for level in self._levels.values() for queue in level.values() for job, _ in queue)


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

    async def answer(self, key: Key, images: Sequence[Array], priority: int = 0) -> JobResult:
        """Compute the logits of ``images``, each float32 [3, S, S]; the state must hold its row until this returns.

        Raises:
            WorkerDiedError: the worker ended before it took any of the rows.
            UnavailableError: the worker ended while it had some of the rows, which may be the cause.
            PrompttuneError: the engine failed.
        """
        if self._ended is not None:
            raise WorkerDiedError(str(self._ended))
        future = asyncio.get_running_loop().create_future()
        job = _RowsJob(key, images, priority, future, time.monotonic())
        self._queues.add(job)
        self._changed.set()
        try:
            await future
        except asyncio.CancelledError:
            self._queues.drop(job)
            raise
        finally:
            if job.running:  # the caller releases the row next, so no batch may read it
                await to_the_end(asyncio.gather(*job.running))
        begun = job.begun if job.begun is not None else job.arrived
        rows = [job.logits[row] for row in range(len(images))]
        return JobResult(rows, begun - job.arrived, sum(seconds for _, seconds in job.batches), job.batches)

    async def _dispatch(self) -> None:
        while True:
            await self._batch_is_due()
            rows = self._queues.take(self._worker.settings.max_batch)
            if rows:
                task = asyncio.create_task(self._run(self._slots.popleft(), rows))
                self._running.add(task)
                for job, _ in rows:
                    job.running.add(task)
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

    async def _run(self, slot: int, rows: Sequence[_Row]) -> None:
        task, began = asyncio.current_task(), time.monotonic()
        self.running_rows += len(rows)
        for job, _ in rows:
            job.begun = job.begun or began
        watch = asyncio.get_running_loop().call_later(self._stall_s, self._stalled)
        try:
            await self._fill(slot, [job.images[row] for job, row in rows])
            result = await self._worker.run(slot, [job.key for job, _ in rows])
        except WorkerDiedError:
            problem = UnavailableError("the engine's worker ended while it had the request; it starts again: try again")
            self._fail((job for job, _ in rows), problem)
            self._end()
        except Exception as problem:
            self._fail((job for job, _ in rows), problem)
        else:
            self._deliver(rows, result)
        finally:
            watch.cancel()
            self.running_rows -= len(rows)
            for job, _ in rows:
                job.running.discard(task)
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

    def _deliver(self, rows: Sequence[_Row], result: BatchResult) -> None:
        for (job, row), logits in zip(rows, result.logits, strict=True):
            job.logits[row] = logits
        for job in dict.fromkeys(job for job, _ in rows):
            job.batches.append((len(rows), result.seconds))
            if len(job.logits) == len(job.images) and not job.future.done():
                job.future.set_result(None)
        if self._on_batch is not None:
            self._on_batch(len(rows), result.seconds)

    def _fail(self, jobs: Iterable[_RowsJob], problem: Exception) -> None:
        for job in dict.fromkeys(jobs):
            self._queues.drop(job)
            if not job.future.done():
                job.future.set_exception(problem)

    def _end(self) -> None:
        """Stop forming batches; another worker may answer the waiting rows."""
        self._ended = WorkerDiedError("the engine's worker ended")
        self._loop.cancel()
        queues, self._queues = self._queues, _Queues()
        self._fail(queues.jobs(), self._ended)

    async def close(self) -> None:
        """Fail the waiting jobs. Call it after the last answer, or when the worker has ended."""
        self._end()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop
