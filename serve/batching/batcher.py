"""Dynamic batching across tasks: the batches of one worker mix rows of any tasks, and every task gets its turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prompttune.export.runtimes import Array
from prompttune.serve.batching.queues import Asked, Queues, RowsJob
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
    """Image count and seconds of each batch that held rows of the job."""


@dataclass(frozen=True)
class BatchSize:
    """What a batch held."""

    images: int
    answers: int
    """Pairs of an image and a task that were asked for."""
    padding: int
    """Pairs that were computed besides, because all images of a batch are asked about equally many tasks."""


class Batcher:
    """Fills the slots of one worker. Call every method on the event loop.

    Where an engine's tasks share work on an image, rows that ask about equal images are one image of a batch, asked
    about several tasks.

    A batch starts when it is full, or when the device is free and the oldest row has waited for ``max_delay_s``. While
    a batch runs, only a full batch is prepared, so that rows collect meanwhile. A task with many waiting rows gets the
    same share of a batch as the other waiting tasks, unless they leave room.

    Args:
        worker: a started worker; the batcher does not close it.
        max_delay_s: longest time in seconds that a row waits for other rows while the device is free.
        on_batch: called with the size and the seconds of each batch.
        answers: largest number of answers in a batch of images that rows share, see :class:`Queues`.
        stall_s: longest time of a batch in seconds; a worker that exceeds it is ended.
    """

    def __init__(
        self,
        worker: Worker,
        max_delay_s: float = 0.0,
        on_batch: Callable[[BatchSize, float], None] | None = None,
        stall_s: float = STALL_S,
        answers: int = 0,
    ) -> None:
        self._worker = worker
        self._max_delay_s = max_delay_s
        self._stall_s = stall_s
        self._on_batch = on_batch
        self._answers = answers
        self._queues = Queues(worker.settings.max_batch, answers)
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
        job = RowsJob(key, images, priority, future, time.monotonic())
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
            if batch := self._queues.take():
                task = asyncio.create_task(self._run(self._slots.popleft(), batch))
                self._running.add(task)
                for job in _jobs(batch):
                    job.running.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._changed.set()

    async def _batch_is_due(self) -> None:
        while True:
            self._changed.clear()
            wait: float | None = None
            if self._slots and self._queues.full:
                return
            if not self._running and (oldest := self._queues.oldest()) is not None:
                wait = oldest + self._max_delay_s - time.monotonic()
                if wait <= 0:
                    return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), wait)

    async def _run(self, slot: int, batch: Sequence[tuple[Array, Asked]]) -> None:
        task, began = asyncio.current_task(), time.monotonic()
        rows = sum(len(one) for _, asked in batch for one in asked.values())
        self.running_rows += rows
        for job in _jobs(batch):
            job.begun = job.begun or began
        watch = asyncio.get_running_loop().call_later(self._stall_s, self._stalled)
        try:
            await self._fill(slot, [pixels for pixels, _ in batch])
            result = await self._worker.run(slot, [list(asked) for _, asked in batch])
        except WorkerDiedError:
            problem = UnavailableError("the engine's worker ended while it had the request; it starts again: try again")
            self._fail(_jobs(batch), problem)
            self._end()
        except Exception as problem:
            self._fail(_jobs(batch), problem)
        else:
            self._deliver(batch, result)
        finally:
            watch.cancel()
            self.running_rows -= rows
            for job in _jobs(batch):
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

    def _deliver(self, batch: Sequence[tuple[Array, Asked]], result: BatchResult) -> None:
        for (_, asked), answers in zip(batch, result.logits, strict=True):
            for rows, logits in zip(asked.values(), answers, strict=False):
                for job, row in rows:
                    job.logits[row] = logits
        for job in _jobs(batch):
            job.batches.append((len(batch), result.seconds))
            if len(job.logits) == len(job.images) and not job.future.done():
                job.future.set_result(None)
        if self._on_batch is not None:
            counts = [len(asked) for _, asked in batch]
            padding = len(batch) * max(counts) - sum(counts)
            self._on_batch(BatchSize(len(batch), sum(counts), padding), result.seconds)

    def _fail(self, jobs: Iterable[RowsJob], problem: Exception) -> None:
        for job in dict.fromkeys(jobs):
            self._queues.drop(job)
            if not job.future.done():
                job.future.set_exception(problem)

    def _end(self) -> None:
        """Stop forming batches; another worker may answer the waiting rows."""
        self._ended = WorkerDiedError("the engine's worker ended")
        self._loop.cancel()
        queues, self._queues = self._queues, Queues(self._worker.settings.max_batch, self._answers)
        self._fail(queues.jobs(), self._ended)

    async def close(self) -> None:
        """Fail the waiting jobs. Call it after the last answer, or when the worker has ended."""
        self._end()
        with contextlib.suppress(asyncio.CancelledError):
            await self._loop


def _jobs(batch: Sequence[tuple[Array, Asked]]) -> list[RowsJob]:
    """The jobs with rows in a batch, each once."""
    return list(dict.fromkeys(job for _, asked in batch for rows in asked.values() for job, _ in rows))
