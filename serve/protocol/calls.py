"""What both transports of one server share: their running calls, decoding threads and shared memory regions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prompttune.serve.messages import LEAVING, UnavailableError
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.protocol.shared_memory import Regions

DECODING_THREADS = 2
"""JSON takes up to twenty times its size in memory, so only a few bodies may be decoded at once."""


class Calls:
    """The running calls, so that the server cuts none off silently. Call every method on one event loop."""

    def __init__(self) -> None:
        self.leaving = False
        """Whether the server is stopping: connections close after their next answer."""
        self._over = False
        self._inside: set[asyncio.Task[Any]] = set()
        self._dismissed: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Count the current asyncio task as a call until the block ends.

        Raises:
            UnavailableError: the server has stopped, before or during the call.
        """
        if self._over:
            raise UnavailableError(LEAVING)
        task = asyncio.current_task()
        assert task is not None, "calls are answered by tasks"
        self._inside.add(task)
        self._idle.clear()
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._dismissed or task.uncancel():  # the client has left as well
                raise
            raise UnavailableError(LEAVING) from None
        finally:
            self._inside.discard(task)
            self._dismissed.discard(task)
            if not self._inside:
                self._idle.set()

    def leave(self) -> None:
        """Mark the server as stopping; calls are still answered."""
        self.leaving = True

    async def empty(self, seconds: float) -> bool:
        """Wait at most ``seconds`` until no call is running; return whether that is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()

    def dismiss(self) -> int:
        """End every call, now and later, with :class:`UnavailableError`; return how many were running."""
        self._over = True
        self._dismissed |= self._inside
        for task in self._inside:
            task.cancel()
        return len(self._inside)


class SharedState:
    """Shared state; create one per server and pass it to both transports."""

    def __init__(self, settings: TransportSettings) -> None:
        self.calls = Calls()
        self.regions = Regions(settings.shared_memory)
        self.cuda_regions = Regions(allowed=False, kind="CUDA")
        self.decoders = ThreadPoolExecutor(DECODING_THREADS, "decode")
