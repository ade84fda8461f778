"""A replica: one device with its worker (restarted when it ends), its resident rows and its batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prompttune.errors import PrompttuneError
from prompttune.export.runtimes import Array
from prompttune.serve.batching.batcher import STALL_S, Batcher, BatchSize, JobResult
from prompttune.serve.batching.task_cache import CacheCounts, TaskCache
from prompttune.serve.workers import Key, Worker, WorkerDiedError, WorkerSettings, WorkerStats

LOG = logging.getLogger("prompttune.serve")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""First and longest pause between attempts to restart a worker, in seconds; it doubles each time."""


@dataclass(frozen=True)
class _Running:
    """A started worker, and what ends with it."""

    worker: Worker
    cache: TaskCache
    batcher: Batcher

    async def close(self) -> None:
        """End the worker; its waiters get an error."""
        self.cache.close()
        await self.batcher.close()
        await self.worker.close()


class DeviceReplica:
    """One device. Call every method on the event loop.

    Args:
        settings: settings of the worker.
        make: makes a worker that is not started yet.
        capacity: number of bank rows; None where the tasks are baked into the model.
        max_delay_s: see :class:`Batcher`.
        on_batch: called with the size and the seconds of each batch.
        stall_s: see :class:`Batcher`.
        answers: see :class:`Batcher`.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        make: Callable[[WorkerSettings], Worker],
        capacity: int | None,
        max_delay_s: float,
        on_batch: Callable[[BatchSize, float], None],
        stall_s: float = STALL_S,
        answers: int = 0,
    ) -> None:
        self.settings = settings
        self.capacity = capacity
        self.counts = CacheCounts()
        self.restarts = 0
        self._description = ""
        self._make = make
        self._batcher_of = partial(
            Batcher, max_delay_s=max_delay_s, on_batch=on_batch, stall_s=stall_s, answers=answers
        )
        self._stats: WorkerStats | None = None
        self._up = asyncio.Event()
        self._running: _Running | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def device(self) -> str:
        """Name of the device."""
        return self.settings.runtime.device

    @property
    def ready(self) -> bool:
        """Whether the worker is warmed up."""
        return self._up.is_set()

    @property
    def state(self) -> str:
        """State of the device: ``ready``, ``starting`` or ``closed``."""
        return "closed" if self._closed else "ready" if self.ready else "starting"

    @property
    def queued_rows(self) -> int:
        """Number of rows that wait for a batch."""
        return self._running.batcher.queued_rows if self._running else 0

    @property
    def running_rows(self) -> int:
        """Number of rows in running batches."""
        return self._running.batcher.running_rows if self._running else 0

    @property
    def resident(self) -> int:
        """Number of states that hold a row."""
        return len(self._running.cache) if self._running else 0

    def holds(self, key: Key) -> bool:
        """Whether a state holds a row or is being loaded."""
        return self._running is not None and key in self._running.cache

    async def start(self) -> None:
        """Open the engine and warm it up.

        Raises:
            PrompttuneError: the engine cannot be opened.
        """
        worker = self._make(self.settings)
        try:
            self._description = await worker.start()
        except BaseException:
            await worker.close()
            raise
        worker.on_death = self._died
        self._running = _Running(worker, TaskCache(worker, self.capacity, self.counts), self._batcher_of(worker))
        self._up.set()

    async def answer(self, key: Key, folder: Path, images: Sequence[Array], priority: int) -> JobResult:
        """Compute the logits of ``images``, each float32 [3, S, S]; wait for the worker while it starts.

        Raises:
            WorkerDiedError: the worker ended before it took any of the rows.
            UnavailableError: the worker ended while it had some of the rows.
            VersionGoneError: ``folder`` holds another version now.
            PrompttuneError: the state cannot be loaded, or the engine failed.
        """
        running = await self._started()
        async with running.cache.using(key, folder):
            return await running.batcher.answer(key, images, priority)

    async def hold(self, key: Key, folder: Path) -> None:
        """Load a state into a row; raises the errors of :meth:`answer`."""
        running = await self._started()
        async with running.cache.using(key, folder, counted=False):
            pass

    async def _started(self) -> _Running:
        await self._up.wait()
        if self._running is None:
            raise WorkerDiedError("the engine's worker ended")
        return self._running

    async def drop(self, key: Key) -> None:
        """Drop a state that nobody will request again."""
        if self._running is not None:
            with contextlib.suppress(WorkerDiedError):
                await self._running.cache.drop(key)

    async def observe(self) -> None:
        """Fetch the worker's statistics for :meth:`status`."""
        if self._running is not None:
            with contextlib.suppress(WorkerDiedError):
                self._stats = await self._running.worker.stats()

    def status(self) -> dict[str, Any]:
        """Figures for the web page."""
        return {
            "device": self.device,
            "state": self.state,
            "runtime": self._description,
            "restarts": self.restarts,
            "resident": self.resident,
            "capacity": self.capacity,
            **asdict(self.counts),
            "host_limit": self.settings.host_bytes,
            **{
                name: getattr(self._stats, name, None)
                for name in (
                    "host_tasks",
                    "host_bytes",
                    "row_bytes",
                    "resident_bytes",
                    "image_hits",
                    "image_misses",
                    "image_bytes",
                )
            },
        }

    def _died(self) -> None:
        LOG.error("the engine's worker ended; starting another", extra={"device": self.device})
        self._up.clear()
        self._reviving = asyncio.create_task(self._revive())

    async def _revive(self) -> None:
        await self._discard()
        pause = FIRST_PAUSE_S
        while not self._closed:
            self.restarts += 1
            try:
                await self.start()
            except PrompttuneError as problem:
                LOG.error("the engine's worker does not start: %s", problem, extra={"device": self.device})
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                LOG.info("the engine's worker is back", extra={"device": self.device})
                return

    async def _discard(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            await running.close()

    async def close(self) -> None:
        """End the worker; waiting requests fail."""
        self._closed = True
        self._up.clear()
        if self._reviving is not None:
            self._reviving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reviving
        await self._discard()
