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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.axes import CLASSES
from prompttune.errors import EngineError, UsageError, choose
from prompttune.export.banks import BankForm, Index, Place
from prompttune.export.folder import EngineTask, TaskRecord
from prompttune.export.layout import FLOAT32, TASKS, Sizes, largest_axes
from prompttune.export.runtimes import Runtime

_CAPACITY = 4


class BankFullError(EngineError):
    """A task does not fit beside the others: it does once one of them leaves."""


Load = Callable[[str], tuple[EngineTask, str]]
"""Reads a task and its version."""


@dataclass(frozen=True)
class Entry:
    """A resident task, and the place in the bank that holds its state."""

    task: EngineTask
    """The task; its state is a view of the bank, so it is not stored twice: read it under a lease."""
    version: str
    place: Place


@dataclass(frozen=True)
class Snapshot:
    """Consistent view for a call, which does not change while the bank does."""

    entries: Mapping[str, Entry]
    placed: Mapping[str, Any]
    """Tensors by state key, placed by the runtime."""
    form: BankForm = field(default=BankForm({}, by_class=False), repr=False)

    def index(self, names: Sequence[Sequence[str]], sizes: Sizes) -> Index:
        """Inputs of a call that asks about K tasks for each of B images.

        Places come from the snapshot, so all are in range: others are undefined behaviour on a GPU.
        """
        return self.form.index([[self.entries[name].place for name in row] for row in names], sizes)


class _Spans:
    """Free spans of an axis, each from its start to its end; the first that is large enough is used."""

    def __init__(self, start: int, end: int) -> None:
        self._free = {start: end} if start < end else {}

    def take(self, count: int) -> int | None:
        """Start of a span of ``count``; None if there is none."""
        for start, end in sorted(self._free.items()):
            if end - start >= count:
                del self._free[start]
                if start + count < end:
                    self._free[start + count] = end
                return start
        return None

    def give(self, start: int, count: int) -> None:
        """Give a span back and join it with its neighbours."""
        end = start + count
        end = self._free.pop(end, end)
        before = next((first for first, last in self._free.items() if last == start), start)
        self._free[before] = end


class Bank:
    """Rows of task states behind a runtime; all methods may be called from any thread.

    Args:
        runtime: places the rows.
        form: how states lie in the engine's bank.
        tasks: initial tasks.
        dtype: dtype of the rows.
        capacity: fixed number of rows; None starts with those of ``tasks`` and grows.
        axes: sizes of the layout's named axes to begin with; a task that needs more makes the bank grow.
        limit: largest number of tasks in a bank without ``capacity``; one more replaces the least recently used one.
            An additional row, if the runtime supports it, can be written while all others are read.
        versions: known versions of ``tasks``.
    """

    def __init__(
        self,
        runtime: Runtime,
        form: BankForm,
        tasks: Mapping[str, EngineTask],
        dtype: np.dtype[Any] = FLOAT32,
        capacity: int | None = None,
        axes: Mapping[str, int] | None = None,
        limit: int | None = None,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.limit = None if limit is None else runtime.sizes.most(TASKS, limit)
        self._runtime = runtime
        self._form = form
        self._dtype = dtype
        self._capacity = capacity
        self._writing = threading.RLock()
        """Lock for changes to the bank; taken before the other one."""
        self._lock = threading.Condition(threading.Lock())
        """Lock for the snapshot, the leases and the lists of rows; notified when a lease ends."""
        self._readers: Counter[int] = Counter()
        """Number of calls that may read a row, by row."""
        self._retired: list[Place] = []
        """Places that are not named any more, but may still be read."""
        self._rows: dict[str, NDArray[Any]] = {}
        self._axes: dict[str, int] = dict(axes or {})
        self._recent: OrderedDict[str, None] = OrderedDict()
        """The resident tasks, the least recently used first."""
        self._free: list[int] = []
        self._rooms = 0
        """Number of allocated rows."""
        self._spans = _Spans(0, 0)
        """Free classes, where heads lie by class."""
        self._snapshot = Snapshot({}, {}, form)
        if tasks or capacity:
            sized = [self._axes_of(name, task) for name, task in tasks.items()]
            needed = largest_axes([axes or {}, *sized])
            if form.by_class:
                room = self._room(sum(one[CLASSES] for one in sized) or needed[CLASSES])
                needed[CLASSES] = room if limit is None else runtime.sizes.most(CLASSES, room)
            self._grow(capacity or len(tasks), needed)
        for name, task in tasks.items():
            self.put(name, task, version=(versions or {}).get(name))

    def _axes_of(self, name: str, task: EngineTask) -> dict[str, int]:
        return self._form.checked(task.shapes(), self._runtime.sizes, f"task {name!r}")

    def _room(self, classes: int) -> int:
        """Classes to allocate for so many: twice as many if the runtime takes them, and one for padding."""
        return max(self._runtime.sizes.most(CLASSES, 2 * classes + 1), classes + 1)

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
        """Size of one row, in bytes; classes that lie by themselves count as those of the widest resident task."""
        widest = max((entry.place.classes for entry in self.entries.values()), default=0)
        by_class = {key for key in self._rows if self._form.lies_by_class(key)}
        return sum(rows[0].nbytes * (widest if key in by_class else 1) for key, rows in self._rows.items())

    @contextlib.contextmanager
    def lease(self, names: Collection[str], load: Load | None = None) -> Iterator[Snapshot]:
        """A snapshot in which the rows of ``names`` do not change until the block ends.

        Args:
            names: some tasks.
            load: reads tasks that are not resident and makes them so; None skips them. Where not all of ``names`` fit
                at once, the snapshot has those that do, at least one.

        Raises:
            PrompttuneError: an error of ``load``.
        """
        snapshot, rows = self._hold(names)
        if load is not None and not snapshot.entries.keys() >= set(names):
            self._let_go(rows)
            with self._writing:  # keeps a just loaded task from being evicted
                staying: list[str] = []
                for name in sorted(dict.fromkeys(names), key=lambda one: one not in self.entries):
                    if name not in self.entries:
                        task, version = load(name)
                        try:
                            self.put(name, task, version=version, staying=staying)
                        except BankFullError:
                            break
                    staying.append(name)
                snapshot, rows = self._hold(staying)
        try:
            yield snapshot
        finally:
            self._let_go(rows)

    def _hold(self, names: Collection[str]) -> tuple[Snapshot, list[int]]:
        with self._lock:
            snapshot = self._snapshot
            present = [name for name in names if name in snapshot.entries]
            rows = [snapshot.entries[name].place.row for name in present]
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
        for place in [one for one in self._retired if one.row not in self._readers]:
            self._retired.remove(place)
            self._free_place(place)

    def _free_place(self, place: Place) -> None:
        self._free.append(place.row)
        if place.classes:
            self._spans.give(place.first, place.classes)

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
            BankFullError: the bank cannot grow, and no other task may leave.
            EngineError: the state does not fit the layout or the runtime.
        """
        axes = self._axes_of(name, task)
        version = version or task.version
        with self._writing:
            if name in self.entries and not replace:
                raise UsageError(f"the task {name!r} already exists: choose another name or replace it")
            while (leaving := self._leaving(name, axes, staying)) is not None:
                self.remove(leaving)
            place = self._place_for(axes)
            try:
                entry = _write(self._form, self._rows, place, task, version)
                for key, placed in self._snapshot.placed.items():
                    self._runtime.update(placed, self._rows[key], self._form.slice_of(key, place))
            except BaseException:
                with self._lock:
                    self._free_place(place)
                raise
            self._publish(name, {**self.entries, name: entry}, self.entries.get(name))

    def _leaving(self, name: str, axes: Mapping[str, int], staying: Collection[str]) -> str | None:
        """The next task that must leave before ``name``, of these sizes, gets a place; None if there is room."""
        named, sizes = len(self.entries), self._runtime.sizes
        old = self.entries.get(name)
        classes = 1 + self._taken + axes[CLASSES] if self._form.by_class else 0
        crowded = sizes.most(CLASSES, classes) < classes
        if self.limit is None and crowded:  # before the old one leaves
            without = classes - (old.place.classes if old else 0)
            try:
                sizes.holding({CLASSES: without}, "the bank")
            except EngineError as problem:
                raise BankFullError(str(problem)) from None
        if old is not None:  # it keeps its place until the new one is written, unless the runtime takes no more
            if crowded or sizes.most(TASKS, named + 1) == named:
                return name
            return None
        if self.limit is None or not (crowded or named >= self.limit):
            return None
        with self._lock:
            leaving = next((one for one in self._recent if one not in staying), None)
        if leaving is None:
            raise BankFullError(f"the bank is full: its {named} tasks stay, and {name!r} does not fit beside them")
        return leaving

    @property
    def _taken(self) -> int:
        """Number of classes of the resident tasks."""
        return sum(entry.place.classes for entry in self.entries.values())

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
                self._retired.append(old.place)
            self._snapshot = Snapshot(entries, self._snapshot.placed, self._form)
            self._recycle()

    def _place_for(self, axes: Mapping[str, int]) -> Place:
        """A place that is not being read, for a task of these sizes."""
        named, classes = len(self.entries), axes.get(CLASSES, 0) if self._form.by_class else 0
        if self._capacity is not None and named >= self._capacity:
            raise BankFullError(f"no row is free: all {self._capacity} hold tasks; remove one first")
        wanted = max(2 * (named + 1), _CAPACITY)
        wanted = wanted if self.limit is None else min(wanted, self.limit + 1)
        wanted = max(self._runtime.sizes.most(TASKS, wanted), named + 1)  # one row too many is refused by growing
        may_grow = self._capacity is None and (self.limit is None or wanted > self._rooms)
        larger = largest_axes([self._axes, {**axes, CLASSES: 0} if classes else axes])
        if larger != self._axes or (may_grow and not self._free):
            self._grow(self._capacity or wanted, larger, classes)
        with self._lock:
            while not self._free:
                self._lock.wait()
            row = self._free.pop(0)
            first = self._spans.take(classes) if classes else 0
        if first is None:  # the new tensors have no gaps
            self._grow(self._rooms, self._axes, classes)
            row, first = self._free.pop(0), self._spans.take(classes)
            assert first is not None
        return Place(row, first, classes)

    def _grow(self, capacity: int, axes: Mapping[str, int], classes: int = 0) -> None:
        """Move to larger tensors, one task after the other, with room for ``classes`` more; running calls keep the old
        ones."""
        if classes:
            room = self._taken + classes
            axes = {**axes, CLASSES: max(self._room(room), axes.get(CLASSES, 0))}
        axes = self._runtime.sizes.holding({TASKS: capacity, **axes}, "the bank")
        rows = self._form.empty(axes, self._dtype)
        capacity = axes.pop(TASKS)
        entries, first = {}, 1
        for row, (name, entry) in enumerate(self.entries.items()):
            place = Place(row, first if entry.place.classes else 0, entry.place.classes)
            first += place.classes
            entries[name] = _write(self._form, rows, place, entry.task, entry.version)
        placed = {key: self._runtime.place(value) for key, value in rows.items()}
        with self._lock:
            self._rows, self._axes, self._rooms = rows, axes, capacity
            self._free, self._retired = list(range(len(entries), capacity)), []
            self._spans = _Spans(first, axes.get(CLASSES, 0) if self._form.by_class else 0)
            self._snapshot = Snapshot(entries, placed, self._form)


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
        name: Entry(EngineTask(records[name].labels, records[name].preprocess, {}), records[name].version, Place(row))
        for row, name in enumerate(order)
        if name in records
    }


def _write(form: BankForm, rows: Mapping[str, NDArray[Any]], place: Place, task: EngineTask, version: str) -> Entry:
    """Write a task's state into its place; the state of the returned entry is what was written."""
    return Entry(dataclasses.replace(task, state=form.write(rows, place, task.state)), version, place)
