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
    """A task state: versions of one task are different keys, so a row never changes under its name."""

    task: str
    version: str


class WorkerDiedError(PrompttuneError):
    """The worker ended before it answered; the same call may succeed on its successor."""


class VersionGoneError(PrompttuneError):
    """The folder no longer holds the version that was asked for."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is made of."""

    engine: Path
    """The engine folder."""
    runtime: RuntimeOptions
    rows: int
    """Bank rows to hold at most."""
    axes: Mapping[str, int]
    """Sizes of the layout's named axes to allocate for; a task that needs more makes the bank grow."""
    max_batch: int
    host_bytes: int
    """Memory for states that hold no row, the least recently used dropped first; 0 keeps none."""
    slots: int = 2
    """Batches that can be prepared or running at once."""


@dataclass(frozen=True)
class Answer:
    """Logits of a batch and what they cost."""

    logits: Array
    """float32 [B, C], the caller's own; columns past a row's own classes are -inf."""
    seconds: float
    """In the engine alone."""


@dataclass(frozen=True)
class WorkerStats:
    """What a worker holds."""

    rows: int
    """States that hold a row."""
    row_bytes: int
    """Of all rows that are allocated."""
    host_tasks: int
    host_bytes: int
    resident_bytes: int | None
    """Resident set of the worker's process, None where it cannot be read."""


class Worker(ABC):
    """Called on the event loop alone. Every await of one caller leaves the loop free for the others."""

    settings: WorkerSettings
    on_death: Callable[[], None] | None = None
    """Called on the event loop, once, when the worker ends without :meth:`close`."""

    @abstractmethod
    async def start(self) -> str:
        """Open the engine, warm it up with an empty row at batch 1 and ``max_batch``; return it in words.

        Raises:
            PrompttuneError: the engine cannot be opened, in one line.
        """

    @abstractmethod
    def images(self, slot: int) -> Array:
        """float32 [max_batch, 3, S, S], where the first rows of a slot's batch are written before :meth:`run`."""

    @abstractmethod
    async def run(self, slot: int, keys: Sequence[Key]) -> Answer:
        """Answer the first ``len(keys)`` images of a slot; the slot is free again when this returns.

        Batches run in the order of the calls. A cancelled caller does not stop a batch; the slot is still in use
        until the batch ends, and the caller waits for that.

        Raises:
            WorkerDiedError: the worker ended.
            PrompttuneError: a key holds no row, or the runtime failed.
        """

    @abstractmethod
    async def load(self, key: Key, folder: Path) -> None:
        """Give a state a row: from the host's memory, else from ``folder``, while batches go on.

        Raises:
            VersionGoneError: ``folder`` holds another version, or is gone.
            PrompttuneError: it is damaged, does not fit the engine, or no row is free.
            WorkerDiedError: the worker ended.
        """

    @abstractmethod
    async def evict(self, key: Key, keep: bool = True) -> None:
        """Free a row; batches that already run keep what they read. With ``keep`` the host's memory keeps the state."""

    @abstractmethod
    async def stats(self) -> WorkerStats:
        """What it holds."""

    def abort(self) -> None:  # noqa: B027  # an engine in this very process cannot be ended alone
        """End at once, because it hangs: what waits gets :class:`WorkerDiedError`. Does nothing where it cannot."""

    @abstractmethod
    async def close(self) -> None:
        """End, after the batches that run. More than one call does no harm."""

    @property
    @abstractmethod
    def details(self) -> Mapping[str, Any]:
        """For people: device, process id, runtime in words."""
