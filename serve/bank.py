"""The resident bank: the states of tasks that are in memory, in rows that calls read while tasks change.

A call works on a snapshot, which is taken under a lock and then read without one. A replaced task gets a new row, and
its old row is reused only after the last call that may read it. Every answer therefore comes from a single version.

A change of the bank holds a second lock while it copies. It copies to rows that are not in a snapshot yet, so calls
do not wait for it: the lock that they take is held only for some instructions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import EngineError, UsageError, choose
from prompttune.export.folder import EngineTask, TaskRecord
from prompttune.export.layout import FLOAT32, TASKS, Layout, bind_axes, empty_bank, largest_axes, write_row
from prompttune.export.runtimes import Runtime

_CAPACITY = 4
Load = Callable[[str], tuple[EngineTask, str]]
"""Reads a task and its version."""


@dataclass(frozen=True)
class Entry:
    """A resident task, and the bank row that holds its state."""

    task: EngineTask
    """The task; its state is a view of the bank, so it is not stored twice: read it under a lease."""
    version: str
    row: int


@dataclass(frozen=True)
class Snapshot:
    """Consistent view for a call, which does not change while the bank does."""

    entries: Mapping[str, Entry]
    placed: Mapping[str, Any]
    """Tensors [capacity, ...] by state key, placed by the runtime."""


class Bank:
    """Rows of task states behind a runtime; all methods may be called from any thread.

    Args:
        runtime: places the rows.
        layout: layout of the engine.
        tasks: initial tasks.
        dtype: dtype of the rows.
        capacity: fixed number of rows; None starts with those of ``tasks`` and grows.
        axes: allocated sizes of the layout's named axes; a task that needs more makes the bank grow.
        limit: largest number of tasks in a bank without ``capacity``; one more replaces the least recently used one.
            An additional row, if the runtime supports it, can be written while all others are read.
        versions: known versions of ``tasks``.
    """

    def __init__(
        self,
        runtime: Runtime,
        layout: Layout,
        tasks: Mapping[str, EngineTask],
        dtype: np.dtype[Any] = FLOAT32,
        capacity: int | None = None,
        axes: Mapping[str, int] | None = None,
        limit: int | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.limit = None if limit is None else runtime.sizes.most(TASKS, limit)
        self._runtime = runtime
        self._layout = layout
        self._dtype = dtype
        self._capacity = capacity
        self._writing = threading.RLock()
        """Lock for changes to the bank; taken before the other one."""
        self._lock = threading.Condition(threading.Lock())
        """Lock for the snapshot, the leases and the lists of rows; notified when a lease ends."""
        self._readers: Counter[int] = Counter()
        """Number of calls that may read a row, by row."""
        self._retired: list[int] = []
        """Rows that are not named any more, but may still be read."""
        self._rows: dict[str, NDArray[Any]] = {}
        self._axes: dict[str, int] = dict(axes or {})
        self._recent: OrderedDict[str, None] = OrderedDict()
        """The resident tasks, the least recently used first."""
        self._free: list[int] = []
        self._snapshot = Snapshot({}, {})
        if tasks or capacity:
            needed = largest_axes([axes or {}, *(self._axes_of(name, task) for name, task in tasks.items())])
            self._grow(capacity or len(tasks), needed)
        for name, task in tasks.items():
            self.put(name, task, version=(versions or {}).get(name))

    def _axes_of(self, name: str, task: EngineTask) -> dict[str, int]:
        what = f"task {name!r}"
        return self._runtime.sizes.holding(bind_axes(self._layout, task.shapes(), what), what)

    @property
    def entries(self) -> Mapping[str, Entry]:
        """The resident tasks."""
        return self._snapshot.entries

    @property
    def nbytes(self) -> int:
        """Size of all allocated rows, in bytes."""
        return sum(rows.nbytes for rows in self._rows.values())

    @property
    def row_bytes(self) -> int:
        """Size of one row, in bytes."""
        return sum(rows[0].nbytes for rows in self._rows.values())

    @contextlib.contextmanager
    def lease(self, names: Collection[str], load: Load | None = None) -> Iterator[Snapshot]:
        """A snapshot in which the rows of ``names`` do not change until the block ends.

        Args:
            names: at most as many tasks as the bank may hold.
            load: reads tasks that are not resident and makes them so; None skips them.

        Raises:
            PrompttuneError: an error of ``load``.
        """
        snapshot, rows = self._hold(names)
        if load is not None and not snapshot.entries.keys() >= set(names):
            self._let_go(rows)
            with self._writing:  # keeps a just loaded task from being evicted
                for name in dict.fromkeys(names):
                    if name not in self.entries:
                        task, version = load(name)
                        self.put(name, task, version=version, staying=names)
                snapshot, rows = self._hold(names)
        try:
            yield snapshot
        finally:
            self._let_go(rows)

    def _hold(self, names: Collection[str]) -> tuple[Snapshot, list[int]]:
        with self._lock:
            snapshot = self._snapshot
            present = [name for name in names if name in snapshot.entries]
            rows = [snapshot.entries[name].row for name in present]
            self._readers.update(rows)
            for name in present:
                self._recent.move_to_end(name)
        return snapshot, rows

    def _let_go(self, rows: list[int]) -> None:
        with self._lock:
            self._readers.subtract(rows)
            self._readers += Counter()  # removes the zeros
            self._recycle()
            self._lock.notify_all()

    def _recycle(self) -> None:
        self._free += [row for row in self._retired if row not in self._readers]
        self._retired = [row for row in self._retired if row in self._readers]

    def put(
        self,
        name: str,
        task: EngineTask,
        replace: bool = False,
        version: str | None = None,
        staying: Collection[str] = (),
    ) -> None:
        """Make a task resident; calls see all of it or none.

        A bank that cannot grow waits for the calls that read a row that is about to become free.

        Args:
            name: name of the task.
            task: the task; its state is copied.
            replace: whether to replace a task of that name.
            version: version of the task, if known: computing it takes a digest of the state.
            staying: tasks that must not be evicted for it.

        Raises:
            UsageError: the name is taken and ``replace`` is not set.
            EngineError: the state does not fit the layout or the runtime, or the bank is full and cannot grow.
        """
        axes = self._axes_of(name, task)
        version = version or task.version
        with self._writing:
            if name in self.entries and not replace:
                raise UsageError(f"the task {name!r} already exists: choose another name or replace it")
            if (leaving := self._leaving(name, staying)) is not None:
                self.remove(leaving)
            row = self._row_for(largest_axes([self._axes, axes]))
            try:
                entry = _write(self._layout, self._rows, row, task, version)
                for key, placed in self._snapshot.placed.items():
                    self._runtime.update(placed, self._rows[key], row)
            except BaseException:
                with self._lock:
                    self._free.append(row)
                raise
            self._publish(name, {**self.entries, name: entry}, self.entries.get(name))

    def _leaving(self, name: str, staying: Collection[str]) -> str | None:
        """The task that must leave before ``name`` gets a row, if one must."""
        named = len(self.entries)
        if name in self.entries:  # it keeps its row until the new one is written, unless the runtime takes no more rows
            return name if self._runtime.sizes.most(TASKS, named + 1) == named else None
        if self.limit is None or named < self.limit:
            return None
        with self._lock:
            return next(one for one in self._recent if one not in staying)

    def remove(self, name: str) -> None:
        """Remove a task; running calls still answer for it.

        Raises:
            UsageError: the task does not exist.
        """
        with self._writing:
            choose("task", name, self.entries)
            left = dict(self.entries)
            old = left.pop(name)
            self._publish(name, left, old)

    def _publish(self, name: str, entries: Mapping[str, Entry], old: Entry | None) -> None:
        """Publish these tasks: ``name`` was added or removed, and ``old`` is its former entry."""
        with self._lock:
            self._recent.pop(name, None)
            if name in entries:
                self._recent[name] = None
            if old is not None:
                self._retired.append(old.row)
            self._snapshot = Snapshot(entries, self._snapshot.placed)
            self._recycle()

    def _row_for(self, axes: dict[str, int]) -> int:
        """A row that is not being read, in tensors of these sizes."""
        named = len(self.entries)
        if self._capacity is not None and named >= self._capacity:
            raise EngineError(f"no row is free: all {self._capacity} hold tasks; remove one first")
        wanted = max(2 * (named + 1), _CAPACITY)
        wanted = wanted if self.limit is None else min(wanted, self.limit + 1)
        wanted = max(self._runtime.sizes.most(TASKS, wanted), named + 1)  # one row too many is refused by growing
        may_grow = self._capacity is None and (self.limit is None or wanted > self._allocated)
        if axes != self._axes or (may_grow and not self._free):
            self._grow(self._capacity or wanted, axes)
        with self._lock:
            while not self._free:
                self._lock.wait()
            return self._free.pop(0)

    @property
    def _allocated(self) -> int:
        return len(next(iter(self._rows.values()), ()))

    def _grow(self, capacity: int, axes: dict[str, int]) -> None:
        """Move to larger tensors; running calls keep the old ones."""
        axes = self._runtime.sizes.holding({TASKS: capacity, **axes}, "the bank")
        capacity = axes.pop(TASKS)
        rows = empty_bank(self._layout, capacity, axes, self._dtype)
        entries = {
            name: _write(self._layout, rows, row, entry.task, entry.version)
            for row, (name, entry) in enumerate(self.entries.items())
        }
        placed = {key: self._runtime.place(value) for key, value in rows.items()}
        with self._lock:
            self._rows, self._axes = rows, axes
            self._free, self._retired = list(range(len(entries), capacity)), []
            self._snapshot = Snapshot(entries, placed)


class BakedBank(Bank):
    """The fixed tasks of an engine whose model holds them as constants, without rows."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.limit = None
        self._rows = {}
        self._snapshot = Snapshot(entries, {})

    @contextlib.contextmanager
    def lease(self, names: Collection[str], load: Load | None = None) -> Iterator[Snapshot]:
        """See :meth:`Bank.lease`; ``load`` raises an error for a task that the model does not hold."""
        for name in names:
            if name not in self.entries and load is not None:
                load(name)
                raise EngineError(f"the task {name!r} was damaged when the engine was opened: open it again")
        yield self._snapshot

    def put(self, name: str, *_: Any, **__: Any) -> None:
        """Raise :class:`UsageError`: the tasks are fixed."""
        raise UsageError(f"the task {name!r} cannot be added: the tasks of this engine are baked into its model")

    def remove(self, name: str) -> None:
        """Raise :class:`UsageError`, as :meth:`put` does."""
        raise UsageError(f"the task {name!r} cannot be removed: the tasks of this engine are baked into its model")


def baked_entries(order: Sequence[str], records: Mapping[str, TaskRecord]) -> dict[str, Entry]:
    """The undamaged tasks of a model that holds them as constants; ``order`` names the task of each row."""
    return {
        name: Entry(EngineTask(records[name].labels, records[name].preprocess, {}), records[name].version, row)
        for row, name in enumerate(order)
        if name in records
    }


def _write(layout: Layout, rows: Mapping[str, NDArray[Any]], row: int, task: EngineTask, version: str) -> Entry:
    """Write a task's state into a row; the state of the returned entry is the written row."""
    write_row(layout, rows, row, task.state)
    state = {
        key: rows[key][(slice(row, row + 1), *(slice(size) for size in value.shape[1:]))]
        for key, value in task.state.items()
    }
    return Entry(dataclasses.replace(task, state=state), version, row)
