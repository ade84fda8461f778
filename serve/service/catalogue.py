"""Task folders on disk: the engine's own and the watched ones, read without their states; numbers of their versions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from prompttune.errors import EngineError, PrompttuneError, UsageError
from prompttune.export.folder import (
    STATE_FILE,
    TASK_RECORD,
    TASKS,
    EngineFolder,
    Scan,
    TaskRecord,
    check_task_name,
    read_record,
    task_names,
)
from prompttune.export.layout import largest_axes
from prompttune.export.versions import Numbered, read_number, write_number
from prompttune.serve.messages import SEVERAL

LOG = logging.getLogger("prompttune.serve")
_Stamp = tuple[tuple[int, int, int], ...]


class Catalogue:
    """The tasks of an engine on disk. Its methods block and must be called from one thread at a time.

    Args:
        engine: the engine folder, which has tasks of its own.
        folders: additional folders of tasks; a task there hides tasks of the same name in earlier folders.

    Raises:
        EngineError: a folder is missing.
    """

    def __init__(self, engine: EngineFolder, folders: Sequence[Path] = ()) -> None:
        missing = [folder for folder in folders if not folder.is_dir()]
        if missing:
            raise EngineError(f"the folder {missing[0]} to watch for tasks does not exist")
        self._manifest = engine.manifest
        self._baked = engine.manifest.baked
        self._folders = [engine.path / TASKS, *folders] if self._baked is None else [engine.path / TASKS]
        self._read: dict[Path, tuple[_Stamp, TaskRecord | str]] = {}

    def scan(self) -> Scan:
        """Read every task whose files have changed; keep what is known of the others."""
        found = {name: parent / name for parent in self._folders for name in task_names(parent)}
        if self._baked is not None:
            found = {name: folder for name, folder in found.items() if name in self._baked}
        self._read = {folder: seen for folder, seen in self._read.items() if folder in set(found.values())}
        outcomes = {name: self._look(found[name]) for name in sorted(found)}
        return Scan(
            {name: one for name, one in outcomes.items() if isinstance(one, TaskRecord)},
            {name: one for name, one in outcomes.items() if isinstance(one, str)},
        )

    def find(self, name: str) -> TaskRecord | None:
        """Read one task again; None if its folder does not exist.

        Raises:
            EngineError: the task is damaged or does not fit the engine.
        """
        try:
            check_task_name(name)
        except UsageError:  # neither a valid task name nor a safe path
            return None
        found = next((parent / name for parent in reversed(self._folders) if (parent / name).is_dir()), None)
        return None if found is None else self._checked(found)

    def axes(self, records: Mapping[str, TaskRecord]) -> dict[str, int]:
        """Sizes of the layout's named axes that hold all of ``records``."""
        return largest_axes(self._manifest.axes_of(record.shapes, name) for name, record in records.items())

    def _look(self, folder: Path) -> TaskRecord | str:
        stamp = _stamp(folder)
        seen = self._read.get(folder)
        if seen is not None and seen[0] == stamp:
            return seen[1]
        try:
            outcome: TaskRecord | str = self._checked(folder)
        except PrompttuneError as problem:
            outcome = str(problem)
        self._read[folder] = (stamp, outcome)
        return outcome

    def _checked(self, folder: Path) -> TaskRecord:
        if folder.name in SEVERAL:
            raise EngineError(
                f"a task cannot be served as {folder.name!r}, the name of a model for several tasks: rename {folder}"
            )
        check_task_name(folder.name)
        record = read_record(folder)
        self._manifest.axes_of(record.shapes, f"task {folder.name!r}")
        return record


def _stamp(folder: Path) -> _Stamp:
    """A stamp that changes with any file of the task, also where a bucket's mount has no inodes."""
    found = []
    for name in (TASK_RECORD, STATE_FILE):
        try:
            status = (folder / name).stat()
        except OSError:
            found.append((0, 0, 0))
        else:
            found.append((status.st_mtime_ns, status.st_size, status.st_ino))
    return tuple(found)


class Numbers:
    """Counts the versions of tasks. The methods block; different threads may call them for different tasks.

    A task that was copied into the folder, or that lies in another folder, has not been counted by its writer.

    Args:
        engine: the engine folder; if it cannot be written, numbers are kept in memory only.
    """

    def __init__(self, engine: Path) -> None:
        self._engine = engine
        self._last: dict[str, Numbered] = {}

    def number(self, task: str, digest: str) -> int:
        """The number of a version that is about to answer. Numbers never decrease; a new digest gets a higher one."""
        last = self._last.get(task, Numbered(0, ""))
        counted = self._read(task)
        number = last.number if last.digest == digest else last.number + 1
        if counted.digest == digest:
            number = max(number, counted.number)
        elif last.digest != digest:
            number = max(number, counted.number + 1)
        self._last[task] = found = Numbered(number, digest)
        if found != counted and number > 1:
            self._write(task, found)
        return number

    def _read(self, task: str) -> Numbered:
        try:
            return read_number(self._engine, task)
        except (PrompttuneError, OSError) as problem:
            LOG.warning("a task's version is counted from 1: %s", problem, extra={"task": task})
            return Numbered(0, "")

    def _write(self, task: str, found: Numbered) -> None:
        try:
            write_number(self._engine, task, found)
        except OSError as problem:  # a read-only mount
            LOG.debug("a task's version number is kept in memory: %s", problem, extra={"task": task})
