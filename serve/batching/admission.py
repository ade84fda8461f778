"""Admission control: a bounded number of images inside the server, and room for every task among them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prompttune.serve.messages import LEAVING, UnavailableError

_SHORTEST_RETRY_S, _LONGEST_RETRY_S = 0.1, 30.0
"""Bounds of the retry hint, in seconds. The longest is for a server that has not answered yet: its speed is unknown."""


class Admission:
    """Counts the rows inside the server.

    Args:
        most: largest number of rows inside, waiting or running.
        rows_per_s: speed at which rows are answered, from which the retry hint is computed.
    """

    def __init__(self, most: int, rows_per_s: Callable[[], float]) -> None:
        self.most = most
        self._rows_per_s = rows_per_s
        self._inside: Counter[str] = Counter()
        self.closed = False
        """Whether new requests are refused."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def rows(self) -> int:
        """Number of rows inside."""
        return self._inside.total()

    @contextlib.contextmanager
    def inside(self, tasks: Sequence[str]) -> Iterator[None]:
        """Keep one row inside for each of ``tasks`` until the block ends.

        Raises:
            UnavailableError: the queue is full, or the server is shutting down.
        """
        coming = Counter(tasks)
        self._check(coming)
        self._inside += coming
        self._idle.clear()
        try:
            yield
        finally:
            self._inside -= coming  # removes the tasks without rows
            if not self._inside:
                self._idle.set()

    def _check(self, coming: Counter[str]) -> None:
        if self.closed:
            raise UnavailableError(LEAVING)
        after = self.rows + coming.total()
        expected_s = self.rows / max(self._rows_per_s(), 1.0)
        retry_after_s = min(max(_SHORTEST_RETRY_S, expected_s), _LONGEST_RETRY_S)
        if after > self.most:
            raise UnavailableError(f"the queue is full ({self.rows} of {self.most} images): try again", retry_after_s)
        # A single task may fill at most half of an otherwise empty queue, so that other tasks find room.
        crowded = [task for task in coming if self._inside[task] + coming[task] > self.most // 2]
        if self._inside and crowded:
            raise UnavailableError(f"the task {crowded[0]!r} fills its share of the queue: try again", retry_after_s)

    def close(self) -> None:
        """Refuse new requests."""
        self.closed = True

    async def empty(self, seconds: float) -> bool:
        """Wait at most ``seconds`` until no row is inside; return whether that is so."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()
