"""Version numbers of the tasks that a server answers with, counted by the engine or here.

A task that was copied into the folder, or that lies in another folder, has not been counted by its writer.
"""

from __future__ import annotations

import logging
from pathlib import Path

from prompttune.errors import PrompttuneError
from prompttune.export.versions import Numbered, read_number, write_number

LOG = logging.getLogger("prompttune.serve")


class Numbers:
    """Counts versions. The methods block; different threads may call them for different tasks.

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
