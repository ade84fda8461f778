"""State of a worker: an open engine, the task states that hold its rows, and those in the host's memory."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prompttune.errors import EngineError, UsageError
from prompttune.export.folder import TASK_RECORD, EngineFolder, Manifest, Task, load_version, read_record
from prompttune.export.layout import bank_dtype
from prompttune.export.runtimes import Array, Runtime, open_runtime
from prompttune.serve.bank import Bank
from prompttune.serve.memory import resident_bytes
from prompttune.serve.workers.base import Answer, Key, VersionGoneError, WorkerSettings, WorkerStats
from prompttune.serve.workers.host_cache import HostCache

Reading = tuple[list[int], Mapping[str, Any]]
"""Row of each image, and the bank as placed tensors by state key."""


class Store(ABC):
    """An engine and its rows. Threads run batches while another one loads, evicts and reads statistics."""

    def __init__(self, manifest: Manifest, runtime: Runtime, settings: WorkerSettings) -> None:
        self.calls_at_once = runtime.calls_at_once
        """Threads that are worth running batches with."""
        self._runtime = runtime
        self._max_batch = settings.max_batch
        self._image_size = manifest.image_size

    @property
    def description(self) -> str:
        """Runtime, version and device, as text."""
        return self._runtime.description

    @abstractmethod
    def reading(self, keys: Sequence[Key]) -> contextlib.AbstractContextManager[Reading]:
        """The rows of ``keys``, which do not change until the block ends.

        Raises:
            EngineError: a key does not hold a row.
        """

    @abstractmethod
    def load(self, key: Key, folder: Path) -> None:
        """See :meth:`prompttune.serve.workers.base.Worker.load`."""

    @abstractmethod
    def evict(self, key: Key, keep: bool = True) -> None:
        """See :meth:`prompttune.serve.workers.base.Worker.evict`."""

    @abstractmethod
    def stats(self) -> WorkerStats:
        """Contents of the store."""

    def warm_up(self) -> None:
        """Answer batches of size 1 and of the largest size from the first row, whatever it holds."""
        for rows in sorted({1, self._max_batch}):
            images = np.zeros((rows, 3, self._image_size, self._image_size), np.float32)
            with self.reading([]) as (_, bank):
                self._runtime.logits(images, np.zeros(rows, np.int64), bank)

    def run(self, images: Array, keys: Sequence[Key]) -> Answer:
        """Answer contiguous images [B, 3, S, S] with row i for ``keys[i]``.

        Raises:
            EngineError: a key does not hold a row, or the runtime failed.
        """
        with self.reading(keys) as (rows, bank):
            # Row indices come from the bank itself, so all are in range: on a GPU, others would be undefined behaviour.
            index = np.array(rows, dtype=np.int64)
            started = time.perf_counter()
            logits = self._runtime.logits(images, index, bank)
            return Answer(logits, time.perf_counter() - started)


class ResidentStore(Store):
    """A store whose states are loaded and evicted."""

    def __init__(self, manifest: Manifest, runtime: Runtime, settings: WorkerSettings) -> None:
        super().__init__(manifest, runtime, settings)
        named = {axis for shape in manifest.layout.values() for axis in shape if isinstance(axis, str)}
        axes = dict.fromkeys(named, 1) | dict(settings.axes)  # without tasks the engine does not know the sizes
        dtype = bank_dtype(manifest.bank_precision)
        self._bank = Bank(runtime, manifest.layout, {}, dtype, settings.rows, axes)
        self._host = HostCache(settings.host_bytes)

    @contextlib.contextmanager
    def reading(self, keys: Sequence[Key]) -> Iterator[Reading]:
        """See :meth:`Store.reading`."""
        names = [_name(key) for key in keys]
        with self._bank.lease(names) as snapshot:
            missing = [name for name in names if name not in snapshot.entries]
            if missing:
                raise _no_row(missing[0])
            yield [snapshot.entries[name].row for name in names], snapshot.placed

    def load(self, key: Key, folder: Path) -> None:
        """Load a state into a row, from the host's memory or from ``folder``; a state that holds a row is unchanged."""
        name = _name(key)
        if name in self._bank.entries:
            return
        kept = self._host.take(key)
        task = _read_version(key, folder) if kept is None else kept
        try:
            self._bank.put(name, task, version=key.version)
        except EngineError:
            if kept is not None:
                self._host.keep(key, kept)
            raise

    def evict(self, key: Key, keep: bool = True) -> None:
        """Free a state's row; without ``keep``, also remove the state from the host's memory."""
        name = _name(key)
        with self._bank.lease([name]) as snapshot:
            entry = snapshot.entries.get(name)
            if keep and entry is not None:
                self._host.keep(key, entry.task)
        if not keep:
            self._host.take(key)
        if entry is not None:
            self._bank.remove(name)

    def stats(self) -> WorkerStats:
        """See :meth:`Store.stats`."""
        return WorkerStats(
            rows=len(self._bank.entries),
            row_bytes=self._bank.nbytes,
            host_tasks=len(self._host),
            host_bytes=self._host.nbytes,
            resident_bytes=resident_bytes(),
        )


class BakedStore(Store):
    """A store whose rows are constants of the model: each task is there from the start, in one version."""

    def __init__(self, folder: EngineFolder, runtime: Runtime, settings: WorkerSettings) -> None:
        super().__init__(folder.manifest, runtime, settings)
        order = folder.manifest.baked or ()
        held = folder.scan().records
        self._rows = {Key(name, held[name].version): row for row, name in enumerate(order) if name in held}

    @contextlib.contextmanager
    def reading(self, keys: Sequence[Key]) -> Iterator[Reading]:
        """See :meth:`Store.reading`."""
        missing = [key for key in keys if key not in self._rows]
        if missing:
            raise _no_row(_name(missing[0]))
        yield [self._rows[key] for key in keys], {}

    def load(self, key: Key, folder: Path) -> None:  # noqa: ARG002
        """Check that the model holds this version of the task."""
        if key not in self._rows:
            raise VersionGoneError(f"the model does not hold version {key.version} of the task {key.task!r}")

    def evict(self, key: Key, keep: bool = True) -> None:
        """Do nothing: constants stay."""

    def stats(self) -> WorkerStats:
        """See :meth:`Store.stats`; the bytes of the rows belong to the model."""
        return WorkerStats(len(self._rows), 0, 0, 0, resident_bytes())


def open_store(settings: WorkerSettings) -> Store:
    """Open an engine without loading any state.

    Raises:
        UsageError: the settings have 0 rows, slots or images per batch.
        PrompttuneError: the engine cannot be opened.
    """
    if min(settings.rows, settings.max_batch, settings.slots) < 1:
        raise UsageError("a worker needs at least one row, one slot and one image in a batch")
    folder = EngineFolder(settings.engine)
    runtime = open_runtime(folder.path, folder.manifest, settings.runtime)
    if folder.manifest.baked is None:
        return ResidentStore(folder.manifest, runtime, settings)
    return BakedStore(folder, runtime, settings)


def _name(key: Key) -> str:
    """The bank's name of a state."""
    return f"{key.task}@{key.version}"


def _no_row(name: str) -> EngineError:
    return EngineError(f"{name} holds no row: load it first")


def _read_version(key: Key, folder: Path) -> Task:
    """Read a state, without the parts that a worker does not need.

    The version is computed from what was read, so a folder that is replaced in the meantime cannot give a mixture.
    """
    try:
        task, version = load_version(folder)
    except (EngineError, OSError) as problem:
        if not _is_recorded(key, folder):
            raise _gone(key, folder) from None
        raise EngineError(str(problem)) from None
    if version != key.version:
        raise _gone(key, folder)
    return replace(task, labels=(), settings={}, source={}, parity=None)


def _is_recorded(key: Key, folder: Path) -> bool:
    """Whether an unreadable folder claims to hold a version, or may hold it."""
    if not (folder / TASK_RECORD).exists():
        return False
    try:
        return read_record(folder).version == key.version
    except EngineError:
        return True


def _gone(key: Key, folder: Path) -> VersionGoneError:
    return VersionGoneError(f"{folder} no longer holds version {key.version} of the task {key.task!r}")
