"""A worker in this process: for tests, and for processes that already run one engine each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from prompttune.export.folder import EngineFolder
from prompttune.export.runtimes import Array
from prompttune.serve.workers.base import Answer, Key, Worker, WorkerDiedError, WorkerSettings, WorkerStats
from prompttune.serve.workers.store import Store, open_store
from prompttune.serve.workers.waiting import or_leave, to_the_end

Result = TypeVar("Result")


class InProcessWorker(Worker):
    """See :class:`Worker`. One thread for each call that the runtime takes at once runs batches, another one loads. A
    crash of the runtime ends the process."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self._batches = ThreadPoolExecutor(1, "batches")
        self._loads = ThreadPoolExecutor(1, "loads")
        self._store: Store | None = None
        self._slots: Array | None = None
        self._closed = False

    async def start(self) -> str:
        """See :meth:`Worker.start`."""
        self._store = await to_the_end(self._submit(self._batches, self._open))
        if self._store.calls_at_once > 1:
            self._batches.shutdown(wait=False)
            self._batches = ThreadPoolExecutor(self._store.calls_at_once, "batches")
        return self._store.description

    def _open(self) -> Store:
        size = EngineFolder(self.settings.engine, verify=False).manifest.image_size
        store = open_store(self.settings)
        store.warm_up()
        self._slots = np.zeros((self.settings.slots, self.settings.max_batch, 3, size, size), np.float32)
        return store

    def images(self, slot: int) -> Array:
        """See :meth:`Worker.images`."""
        assert self._slots is not None, "the worker has not started"
        images: Array = self._slots[slot]
        return images

    async def run(self, slot: int, keys: Sequence[Key]) -> Answer:
        """See :meth:`Worker.run`."""
        images = self.images(slot)[: len(keys)]
        return await to_the_end(self._submit(self._batches, partial(self._started.run, images, tuple(keys))))

    async def load(self, key: Key, folder: Path) -> None:
        """See :meth:`Worker.load`."""
        await or_leave(self._submit(self._loads, partial(self._started.load, key, folder)))

    async def evict(self, key: Key, keep: bool = True) -> None:
        """See :meth:`Worker.evict`."""
        await or_leave(self._submit(self._loads, partial(self._started.evict, key, keep)))

    async def stats(self) -> WorkerStats:
        """See :meth:`Worker.stats`."""
        return await or_leave(self._submit(self._loads, self._started.stats))

    @property
    def _started(self) -> Store:
        assert self._store is not None, "the worker has not started"
        return self._store

    def _submit(self, where: ThreadPoolExecutor, call: Callable[[], Result]) -> asyncio.Future[Result]:
        if self._closed:
            raise WorkerDiedError("the engine worker is closed")
        return asyncio.get_running_loop().run_in_executor(where, call)

    async def close(self) -> None:
        """See :meth:`Worker.close`."""
        self._closed = True
        loop = asyncio.get_running_loop()
        for threads in (self._batches, self._loads):
            await to_the_end(loop.run_in_executor(None, threads.shutdown))

    @property
    def details(self) -> Mapping[str, Any]:
        """See :meth:`Worker.details`."""
        return {
            "device": self.settings.runtime.device,
            "process": os.getpid(),
            "runtime": "" if self._store is None else self._store.description,
        }
