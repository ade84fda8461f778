"""Numbers of the versions that a server answers with: those that the engine counted, or counted here.

A task that was copied into the folder, or that lies in another one, has not been counted by who wrote it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from prompttune.errors import PrompttuneError
from prompttune.export.versions import Numbered, read_number, write_number

LOG = logging.getLogger("prompttune.serve")


class Numbers:
    """Its methods block, and may be called from several threads for different tasks.

    Args:
        engine: the engine folder; where it cannot be written, numbers are counted in memory alone.
    """

    def __init__(self, engine: Path) -> None:
        self._engine = engine
        self._last: dict[str, Numbered] = {}

    def number(self, task: str, digest: str) -> int:
        """The number of a version that is to answer; it never goes down, and a new digest has a higher one."""
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
