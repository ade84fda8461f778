"""A lane: one device with its worker, which is started again when it ends, its resident rows and its batches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prompttune.errors import PrompttuneError
from prompttune.export.runtimes import Array
from prompttune.serve.batcher import STALL_S, Batcher, Outcome
from prompttune.serve.residents import CacheCounts, Residents
from prompttune.serve.workers import Key, Worker, WorkerDiedError, WorkerSettings, WorkerStats

LOG = logging.getLogger("prompttune.serve")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Between attempts to start a worker again: doubled each time."""


class Lane:
    """Everything is called on the event loop.

    Args:
        settings: of the worker.
        make: makes a worker of them, which is not started yet.
        capacity: rows to keep states in; None where the model itself holds every task.
        max_delay_s: see :class:`Batcher`.
        on_batch: told rows and seconds of each batch.
        stall_s: see :class:`Batcher`.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        make: Callable[[WorkerSettings], Worker],
        capacity: int | None,
        max_delay_s: float,
        on_batch: Callable[[int, float], None],
        stall_s: float = STALL_S,
    ) -> None:
        self.settings = settings
        self.capacity = capacity
        self.counts = CacheCounts()
        self.restarts = 0
        self.description = ""
        self._make = make
        self._max_delay_s = max_delay_s
        self._on_batch = on_batch
        self._stall_s = stall_s
        self._stats: WorkerStats | None = None
        self._up = asyncio.Event()
        self._worker: Worker | None = None
        self._batcher: Batcher | None = None
        self._residents: Residents | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def device(self) -> str:
        """Its name."""
        return self.settings.runtime.device

    @property
    def ready(self) -> bool:
        """Whether the worker is warm."""
        return self._up.is_set()

    @property
    def state(self) -> str:
        """In a word: ``ready``, ``starting`` or ``closed``."""
        return "closed" if self._closed else "ready" if self.ready else "starting"

    @property
    def queued_rows(self) -> int:
        """Rows that wait for a batch."""
        return self._batcher.queued_rows if self._batcher else 0

    @property
    def running_rows(self) -> int:
        """Rows in batches that run."""
        return self._batcher.running_rows if self._batcher else 0

    @property
    def resident(self) -> int:
        """States that hold a row."""
        return len(self._residents) if self._residents else 0

    def holds(self, key: Key) -> bool:
        """Whether a state holds a row or is about to."""
        return self._residents is not None and key in self._residents

    async def start(self) -> None:
        """Open the engine and warm it up.

        Raises:
            PrompttuneError: it cannot be opened.
        """
        worker = self._make(self.settings)
        try:
            self.description = await worker.start()
        except BaseException:
            await worker.close()
            raise
        worker.on_death = self._died
        self._worker = worker
        self._residents = Residents(worker, self.capacity, self.counts)
        self._batcher = Batcher(worker, self._max_delay_s, self._on_batch, self._stall_s)
        self._up.set()

    async def answer(self, key: Key, folder: Path, images: Sequence[Array], priority: int) -> Outcome:
        """Answer ``images``, each float32 [3, S, S]; waits for the worker while that starts.

        Raises:
            WorkerDiedError: the worker ended before it had any of the rows.
            UnavailableError: it ended while it had some of them.
            VersionGoneError: ``folder`` holds another version by now.
            PrompttuneError: the state cannot be loaded, or the engine failed.
        """
        await self._up.wait()
        residents, batcher = self._parts()
        async with residents.using(key, folder):
            return await batcher.answer(key, images, priority)

    async def hold(self, key: Key, folder: Path) -> None:
        """Bring a state into a row; raises as :meth:`answer`."""
        await self._up.wait()
        residents, _ = self._parts()
        async with residents.using(key, folder, counted=False):
            pass

    async def drop(self, key: Key) -> None:
        """Forget a state that nobody will ask for again."""
        if self._residents is not None:
            with contextlib.suppress(WorkerDiedError):
                await self._residents.drop(key)

    async def observe(self) -> None:
        """Ask the worker what it holds, for :meth:`status`."""
        worker = self._worker
        if worker is not None:
            with contextlib.suppress(WorkerDiedError):
                self._stats = await worker.stats()

    def status(self) -> dict[str, Any]:
        """What the page shows."""
        stats = self._stats
        return {
            "device": self.device,
            "state": self.state,
            "runtime": self.description,
            "restarts": self.restarts,
            "resident": self.resident,
            "capacity": self.capacity,
            **asdict(self.counts),
            "host_tasks": stats.host_tasks if stats else None,
            "host_bytes": stats.host_bytes if stats else None,
            "host_limit": self.settings.host_bytes,
            "row_bytes": stats.row_bytes if stats else None,
            "resident_bytes": stats.resident_bytes if stats else None,
        }

    def _parts(self) -> tuple[Residents, Batcher]:
        if self._residents is None or self._batcher is None:
            raise WorkerDiedError("the engine's worker ended")
        return self._residents, self._batcher

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
        """Let go of what belonged to a worker; whoever waits for it is told."""
        worker, batcher, residents = self._worker, self._batcher, self._residents
        self._worker = self._batcher = self._residents = None
        if residents is not None:
            residents.close()
        if batcher is not None:
            await batcher.close()
        if worker is not None:
            await worker.close()

    async def close(self) -> None:
        """End the worker; what still waits fails."""
        self._closed = True
        self._up.clear()
        if self._reviving is not None:
            self._reviving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reviving
        await self._discard()
