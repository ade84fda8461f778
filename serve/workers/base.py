"""A worker: one engine on one device, which keeps task states in rows and answers batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from prompttune.errors import PrompttuneError
from prompttune.export.runtimes import Array, RuntimeOptions


class Key(NamedTuple):
    """Name of a task state: each version of a task has its own key, so a row never changes under its name."""

    task: str
    version: str


class WorkerDiedError(PrompttuneError):
    """The worker ended before it answered; the same call may succeed on the next worker."""


class VersionGoneError(PrompttuneError):
    """The folder no longer holds the requested version."""


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of a worker."""

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


@dataclass(frozen=True)
class Answer:
    """Logits of a batch, and the time it took."""

    logits: Array
    """float32 [B, C], a copy for the caller; columns past a row's own classes are -inf."""
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


class Worker(ABC):
    """A worker, called only on the event loop. Every await of one caller leaves the loop free for the others."""

    settings: WorkerSettings
    on_death: Callable[[], None] | None = None
    """Called once on the event loop if the worker ends without :meth:`close`."""

    @abstractmethod
    async def start(self) -> str:
        """Open the engine and warm it up with an empty row at batch 1 and ``max_batch``; return its description.

        Raises:
            PrompttuneError: the engine cannot be opened; the message is one line.
        """

    @abstractmethod
    def images(self, slot: int) -> Array:
        """float32 [max_batch, 3, S, S]; write a batch's images to its first rows before :meth:`run`."""

    @abstractmethod
    async def run(self, slot: int, keys: Sequence[Key]) -> Answer:
        """Answer the first ``len(keys)`` images of a slot; the slot is free again after the return.

        Batches start in the order of the calls. Cancelling the caller does not stop its batch: the slot stays in use
        until the batch ends, and the caller waits for that.

        Raises:
            WorkerDiedError: the worker ended.
            PrompttuneError: a key does not hold a row, or the runtime failed.
        """

    @abstractmethod
    async def load(self, key: Key, folder: Path) -> None:
        """Load a state into a row, from the host's memory or else from ``folder``, while batches continue.

        Raises:
            VersionGoneError: ``folder`` holds another version or does not exist.
            PrompttuneError: the state is damaged or does not fit the engine, or all rows are in use.
            WorkerDiedError: the worker ended.
        """

    @abstractmethod
    async def evict(self, key: Key, keep: bool = True) -> None:
        """Free a row; running batches keep what they read. With ``keep``, the state stays in the host's memory."""

    @abstractmethod
    async def stats(self) -> WorkerStats:
        """Fetch the worker's contents."""

    def abort(self) -> None:  # noqa: B027  # an engine in this very process cannot be ended alone
        """End a hanging worker at once; waiting calls get :class:`WorkerDiedError`. Has no effect in this process."""

    @abstractmethod
    async def close(self) -> None:
        """End the worker after its running batches. Further calls have no effect."""

    @property
    @abstractmethod
    def details(self) -> Mapping[str, Any]:
        """Description for people: device, process id, runtime."""
