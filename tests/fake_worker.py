"""A worker without an engine: its logits say which state and which image they are of."""

import asyncio
from pathlib import Path

import numpy as np

from prompttune.errors import EngineError
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.workers import (
    BatchResult,
    Key,
    VersionGoneError,
    Worker,
    WorkerDiedError,
    WorkerSettings,
    WorkerStats,
)

SETTINGS = WorkerSettings(Path("engine"), RuntimeOptions(), rows=4, axes={}, max_batch=4, host_bytes=0)


def image(value, size=1):
    return np.full((3, size, size), value, dtype=np.float32)


class FakeWorker(Worker):
    """Batches and loads go on when the test opens the gates; both are open at first."""

    def __init__(self, settings=SETTINGS):
        self.settings = settings
        self.slots = [np.zeros((settings.max_batch, 3, 1, 1), np.float32) for _ in range(settings.slots)]
        self.rows: set[Key] = set()
        self.batches: list[list[Key]] = []
        """The keys of each batch, image by image."""
        self.loads: list[Key] = []
        self.running = asyncio.Event()
        self.may_run, self.may_load = asyncio.Event(), asyncio.Event()
        self.may_run.set()
        self.may_load.set()
        self.dead = asyncio.Event()
        self.gone: set[Key] = set()
        self.order = asyncio.Lock()

    async def start(self):
        return "fake"

    def images(self, slot):
        return self.slots[slot]

    async def run(self, slot, keys):
        async with self.order:
            await self._unless_dead(asyncio.sleep(0))
            self.batches.append([key for row in keys for key in row])
            missing = [key for row in keys for key in row if key not in self.rows]
            if missing:
                raise EngineError(f"{missing[0]} holds no row")
            self.running.set()
            await self._unless_dead(self.may_run.wait())
            logits = np.full((len(keys), max(map(len, keys)), 2), np.nan)
            for number, row in enumerate(keys):
                for place, key in enumerate(row):
                    logits[number, place] = float(key.version), self.slots[slot][number, 0, 0, 0]
            return BatchResult(logits, 0.5)

    async def _unless_dead(self, waiting):
        wait, dead = asyncio.ensure_future(waiting), asyncio.ensure_future(self.dead.wait())
        await asyncio.wait([wait, dead], return_when=asyncio.FIRST_COMPLETED)
        wait.cancel()
        dead.cancel()
        if self.dead.is_set():
            raise WorkerDiedError("died")

    async def load(self, key, folder):
        self.loads.append(key)
        await self._unless_dead(self.may_load.wait())
        if key in self.gone:
            raise VersionGoneError("gone")
        if len(self.rows) >= self.settings.rows:
            raise EngineError("no row is free")
        self.rows.add(key)

    async def evict(self, key, keep=True):
        self.rows.remove(key)

    async def stats(self):
        return WorkerStats(len(self.rows), 0, 0, 0, None)

    async def close(self):
        pass

    def die(self):
        self.dead.set()
        self.rows.clear()
        if self.on_death:
            self.on_death()
