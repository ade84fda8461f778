"""State of a worker: an open engine, the task states that hold its rows, and those in the host's memory."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from prompttune.errors import EngineError
from prompttune.export.banks import Place
from prompttune.export.folder import TASK_RECORD, EngineFolder, EngineTask, load_version, read_record
from prompttune.export.layout import bank_dtype
from prompttune.export.runtimes import Array, open_checked
from prompttune.export.runtimes.image_cache import ImageCache
from prompttune.serve.bank import BakedBank, Bank, baked_entries
from prompttune.serve.memory import resident_bytes
from prompttune.serve.workers.base import BatchResult, Key, VersionGoneError, WorkerSettings, WorkerStats


class Store:
    """An engine, warmed up, and its rows. Threads run batches while another one loads, evicts and reads statistics.

    Args:
        settings: settings of the worker.
        slots: images of batches, float32 [slots, max_batch, 3, S, S].

    Raises:
        PrompttuneError: the engine cannot be opened.
    """

    def __init__(self, settings: WorkerSettings, slots: Array) -> None:
        folder = EngineFolder(settings.engine, verify=False)
        manifest = folder.manifest
        self._slots = slots
        self._runtime = open_checked(folder, settings.runtime)
        self._turns = threading.BoundedSemaphore(self._runtime.calls_at_once)
        self._host = HostCache(settings.host_bytes)
        if manifest.baked is not None:
            held = baked_entries(manifest.baked, folder.scan().records)
            self._bank: Bank = BakedBank({str(Key(name, entry.version)): entry for name, entry in held.items()})
        else:
            named = {axis for shape in manifest.layout.values() for axis in shape if isinstance(axis, str)}
            axes = dict.fromkeys(named, 1) | dict(settings.axes)  # without tasks the engine does not know the sizes
            dtype = bank_dtype(manifest.bank_precision)
            self._bank = Bank(self._runtime, manifest.form, {}, dtype, settings.rows, axes)
        for rows in sorted({1, settings.max_batch}):
            with self._bank.lease([]) as snapshot:
                index = snapshot.form.index([[Place(0, classes=1)]] * rows, self._runtime.sizes)
                self._runtime.logits(slots[0, :rows], index, snapshot.placed)

    @property
    def description(self) -> str:
        """Runtime, version and device, as text."""
        return self._runtime.description

    def run(self, slot: int, keys: Sequence[Sequence[Key]]) -> BatchResult:
        """Answer the first images of a slot, image i with the rows of ``keys[i]``, one at least.

        Raises:
            EngineError: a key does not hold a row, or the runtime failed.
        """
        named = {key: str(key) for row in keys for key in row}
        with self._turns, self._bank.lease(named.values()) as snapshot:
            missing = [name for name in named.values() if name not in snapshot.entries]
            if missing:
                raise EngineError(f"{missing[0]} holds no row: load it first")
            most = max(map(len, keys))
            padded = [[*(named[key] for key in row), *[named[row[-1]]] * (most - len(row))] for row in keys]
            index = snapshot.index(padded, self._runtime.sizes)
            started = time.perf_counter()
            logits = self._runtime.logits(self._slots[slot, : len(keys)], index, snapshot.placed)
            return BatchResult(logits, time.perf_counter() - started)

    def load(self, key: Key, folder: Path) -> None:
        """See :meth:`prompttune.serve.workers.worker.Worker.load`; a state that holds a row is unchanged."""
        name = str(key)
        if name in self._bank.entries:
            return
        if isinstance(self._bank, BakedBank):
            raise VersionGoneError(f"the model does not hold version {key.version} of the task {key.task!r}")
        kept = self._host.take(key)
        task = _read_version(key, folder) if kept is None else kept
        try:
            self._bank.put(name, task, version=key.version)
        except EngineError:
            if kept is not None:
                self._host.keep(key, kept)
            raise

    def evict(self, key: Key, keep: bool = True) -> None:
        """Free a state's row; without ``keep``, also remove the state from the host's memory. Constants stay."""
        if isinstance(self._bank, BakedBank):
            return
        name = str(key)
        with self._bank.lease([name]) as snapshot:
            entry = snapshot.entries.get(name)
            if keep and entry is not None:
                self._host.keep(key, entry.task)
        if not keep:
            self._host.take(key)
        if entry is not None:
            self._bank.remove(name)

    def stats(self) -> WorkerStats:
        """Contents of the store."""
        rows, host = len(self._bank.entries), self._host
        stats = WorkerStats(rows, self._bank.nbytes, len(host.tasks), host.nbytes, resident_bytes())
        kept = self._runtime
        if not isinstance(kept, ImageCache):
            return stats
        return replace(stats, image_hits=kept.hits, image_misses=kept.misses, image_bytes=kept.nbytes)


class HostCache:
    """Copies of task states without a row; the least recently kept one is dropped first. For one thread at a time.

    Args:
        limit: bytes of all states together; 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.tasks: OrderedDict[Key, EngineTask] = OrderedDict()
        self.nbytes = 0
        """Bytes of the kept states."""

    def keep(self, key: Key, task: EngineTask) -> None:
        """Copy a task's state and make room for it; a state larger than the whole cache is not kept."""
        self.take(key)
        size = _size(task)
        if size > self._limit:
            return
        while self.nbytes + size > self._limit:
            self.take(next(iter(self.tasks)))
        self.tasks[key] = replace(task, state={name: np.array(value, order="C") for name, value in task.state.items()})
        self.nbytes += size

    def take(self, key: Key) -> EngineTask | None:
        """Remove a task from the cache and return it; None if it is not cached."""
        task = self.tasks.pop(key, None)
        self.nbytes -= 0 if task is None else _size(task)
        return task


def _size(task: EngineTask) -> int:
    return sum(value.nbytes for value in task.state.values())


def _read_version(key: Key, folder: Path) -> EngineTask:
    """Read a state, without the parts that a worker does not need.

    The version is computed from what was read, so a folder that is replaced in the meantime cannot give a mixture.
    """
    gone = VersionGoneError(f"{folder} no longer holds version {key.version} of the task {key.task!r}")
    try:
        task, version = load_version(folder)
    except (EngineError, OSError) as problem:
        raise (EngineError(str(problem)) if _is_recorded(key, folder) else gone) from None
    if version != key.version:
        raise gone
    return replace(task, labels=(), settings={}, source={}, parity=None)


def _is_recorded(key: Key, folder: Path) -> bool:
    """Whether an unreadable folder claims to hold a version, or may hold it."""
    if not (folder / TASK_RECORD).exists():
        return False
    try:
        return read_record(folder).version == key.version
    except EngineError:
        return True
