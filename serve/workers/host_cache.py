"""Cache in the host's memory for task states without a row, limited in bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import numpy as np

from prompttune.export.folder import Task
from prompttune.serve.workers.base import Key


class HostCache:
    """Copies of task states; the least recently kept one is dropped first. Call it from one thread at a time.

    Args:
        limit: bytes of all states together; 0 keeps none.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tasks: OrderedDict[Key, Task] = OrderedDict()
        self.nbytes = 0
        """Bytes of the kept states."""

    def __len__(self) -> int:
        return len(self._tasks)

    def keep(self, key: Key, task: Task) -> None:
        """Copy a task's state and make room for it; a state larger than the whole cache is not kept."""
        self.take(key)
        size = _size(task)
        if size > self._limit:
            return
        while self.nbytes + size > self._limit:
            self.take(next(iter(self._tasks)))
        self._tasks[key] = replace(task, state={name: np.array(value, order="C") for name, value in task.state.items()})
        self.nbytes += size

    def take(self, key: Key) -> Task | None:
        """Remove a task from the cache and return it; None if it is not cached."""
        task = self._tasks.pop(key, None)
        if task is not None:
            self.nbytes -= _size(task)
        return task


def _size(task: Task) -> int:
    return sum(value.nbytes for value in task.state.values())
