"""What a server and its workers exchange."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from prompttune.errors import PrompttuneError, UsageError
from prompttune.export.runtimes import Array, RuntimeOptions


class Key(NamedTuple):
    """Name of a task state: each version of a task has its own key, so a row never changes under its name."""

    task: str
    version: str

    def __str__(self) -> str:
        return f"{self.task}@{self.version}"


class WorkerDiedError(PrompttuneError):
    """The worker ended before it answered; the same call may succeed on the next worker."""


class VersionGoneError(PrompttuneError):
    """The folder no longer holds the requested version."""


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker.

    Raises:
        UsageError: there are 0 rows, slots or images per batch.
    """

    engine: Path
    """The engine folder."""
    runtime: RuntimeOptions
    rows: int
    """Largest number of bank rows."""
    axes: Mapping[str, int]
    """Allocated sizes of the layout's named axes; a task that needs more makes the bank grow."""
    max_batch: int
    host_bytes: int
    """Memory for states without a row, in bytes; the least recently used is dropped first, 0 keeps none."""
    slots: int = 2
    """Number of batches that can be prepared or running at once."""

    def __post_init__(self) -> None:
        if min(self.rows, self.max_batch, self.slots) < 1:
            raise UsageError("a worker needs at least one row, one slot and one image in a batch")

    def slots_bytes(self, image_size: int) -> int:
        """Number of bytes of the images of :meth:`slots_in`."""
        return self.slots * self.max_batch * 3 * image_size * image_size * np.dtype(np.float32).itemsize

    def slots_in(self, memory: int, image_size: int) -> Array:
        """Shared memory, by its descriptor, as images float32 [slots, max_batch, 3, S, S]."""
        images: Array = np.frombuffer(mmap.mmap(memory, self.slots_bytes(image_size)), np.float32)
        return images.reshape(self.slots, self.max_batch, 3, image_size, image_size)


@dataclass(frozen=True)
class BatchResult:
    """Logits of a batch, and the time it took."""

    logits: Array
    """float32 [B, K, C], a copy for the caller; what is past an image's own tasks has no meaning, and columns past a
    task's own classes are -inf."""
    seconds: float
    """Time in the engine alone, in seconds."""


@dataclass(frozen=True)
class WorkerStats:
    """Contents of a worker."""

    rows: int
    """Number of states that hold a row."""
    row_bytes: int
    """Bytes of all allocated rows."""
    host_tasks: int
    host_bytes: int
    resident_bytes: int | None
    """Resident set size of the worker's process in bytes; None if it cannot be read."""
    image_hits: int = 0
    """Number of images whose frozen work was kept."""
    image_misses: int = 0
    image_bytes: int = 0
