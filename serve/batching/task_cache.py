"""The task states that hold a row of a worker: the most recently used ones, loaded on request."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from prompttune.serve.bank import BankFullError
from prompttune.serve.workers import Key, Worker, WorkerDiedError
from prompttune.serve.workers.waiting import to_the_end


@dataclass
class CacheCounts:
    """Hits, misses and evictions of a device; they outlive a worker."""

    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass
class _Held:
    """A state that holds a row or is being loaded."""

    loaded: asyncio.Task[None]
    users: int = 0
    leaving: bool = False
    """Whether this oldest state gives way to a waiting one: it takes no new users and leaves after its last one."""
    stays_or_went: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when ``leaving`` is decided, either way."""


class TaskCache:
    """An LRU cache of rows over a worker. Call every method on the event loop.

    Args:
        worker: holds the rows.
        capacity: number of rows; None where the tasks are baked into the model.
        counts: hit, miss and eviction counts.
    """

    def __init__(self, worker: Worker, capacity: int | None, counts: CacheCounts) -> None:
        self._worker = worker
        self._capacity = capacity
        self._counts = counts
        self._free = capacity or 0
        self._held: OrderedDict[Key, _Held] = OrderedDict()
        """States, the least recently used first."""
        self._waiting: deque[asyncio.Future[Key | None]] = deque()
        """Loads that wait for a row; each gets the state to evict, or None with a free row."""

    def __contains__(self, key: Key) -> bool:
        held = self._held.get(key)
        return held is not None and not held.leaving

    def __len__(self) -> int:
        return sum(_is_loaded(held) for held in self._held.values())

    @contextlib.asynccontextmanager
    async def using(self, key: Key, folder: Path, counted: bool = True) -> AsyncIterator[None]:
        """Keep the state of ``key`` in its row until the block ends; load it from ``folder`` if it does not hold one.

        ``counted`` says whether this counts as a hit or a miss, as a request does.

        Raises:
            VersionGoneError: the folder holds another version now.
            PrompttuneError: the state cannot be loaded.
            WorkerDiedError: the worker ended.
        """
        held = await self._find(key, folder, self._counts if counted else CacheCounts())
        held.users += 1
        self._held.move_to_end(key)
        try:
            await asyncio.shield(held.loaded)  # a caller that gives up must not cancel the load of others
            yield
        finally:
            held.users -= 1
            self._settle(key, held)

    async def _find(self, key: Key, folder: Path, counts: CacheCounts) -> _Held:
        while (held := self._held.get(key)) is not None and held.leaving:
            await held.stays_or_went.wait()
        if held is not None:
            counts.hits += 1
            return held
        counts.misses += 1
        held = self._held[key] = _Held(asyncio.create_task(self._load(key, folder)))
        held.loaded.add_done_callback(lambda done: self._loaded(key, held, done))
        return held

    async def _load(self, key: Key, folder: Path) -> None:
        victim, reserved = await self._row(), 1
        try:
            await self._evict(victim)
            while True:
                try:
                    await self._worker.load(key, folder)
                    break
                except BankFullError:  # a row is free, but not as many classes: another state must leave as well
                    if len(self._held) == 1:
                        raise
                    victim = await self._leaving()
                    reserved += 1
                    await self._evict(victim)
        except BaseException:
            for _ in range(reserved):
                self._pass_on(None)
            raise
        for _ in range(reserved - 1):
            self._pass_on(None)

    async def _evict(self, victim: Key | None) -> None:
        if victim is not None:
            self._counts.evictions += 1
            await self._worker.evict(victim)

    def _loaded(self, key: Key, held: _Held, done: asyncio.Task[None]) -> None:
        if done.cancelled() or done.exception() is not None:  # its users report the failure
            if self._held.get(key) is held:
                del self._held[key]
        else:
            self._settle(key, held)

    async def _row(self) -> Key | None:
        """Reserve a row; return the state to evict from it."""
        if self._capacity is None:
            return None
        if self._free:
            self._free -= 1
            return None
        return await self._leaving()

    async def _leaving(self) -> Key | None:
        """Reserve the row of a state that is to be evicted; None for a row that became free in the meantime."""
        idle = next((key for key, held in self._held.items() if not held.users and _is_loaded(held)), None)
        if idle is not None:
            del self._held[idle]
            return idle
        oldest = next((held for held in self._held.values() if _is_loaded(held) and not held.leaving), None)
        if oldest is not None:  # otherwise a busy state would keep its row for ever
            oldest.leaving = True
            oldest.stays_or_went.clear()
        turn: asyncio.Future[Key | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        return await turn

    def _settle(self, key: Key, held: _Held) -> None:
        """Let an unused state leave if another one waits for its row."""
        if held.users or not _is_loaded(held) or self._held.get(key) is not held:
            return
        if self._waiting:
            del self._held[key]
            self._pass_on(key)
        held.leaving = False
        held.stays_or_went.set()

    def _pass_on(self, victim: Key | None) -> None:
        """Give a row, with ``victim`` still in it, to the first waiting load."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(victim)
                return
        if self._capacity is not None:
            self._free += 1

    async def drop(self, key: Key) -> None:
        """Drop a state that nobody will request again. A state in use stays and is evicted like any other."""
        held = self._held.get(key)
        if held is None or held.users or not _is_loaded(held):
            return
        del self._held[key]
        self._counts.evictions += 1
        try:
            await to_the_end(asyncio.ensure_future(self._worker.evict(key, keep=False)))
        finally:
            self._pass_on(None)

    def close(self) -> None:
        """Fail the waiting loads: the worker ended, and its rows with it."""
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(WorkerDiedError("the engine's worker ended"))
        for held in self._held.values():
            held.stays_or_went.set()
        self._waiting.clear()
        self._held.clear()


def _is_loaded(held: _Held) -> bool:
    done = held.loaded
    return done.done() and not done.cancelled() and done.exception() is None
