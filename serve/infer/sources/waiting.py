"""A bounded queue between a reading and an answering thread, and the sources that use it."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from prompttune.errors import UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.settings import Drop
from prompttune.serve.infer.sources.base import Source

T = TypeVar("T")


class BoundedQueue(Generic[T]):
    """A queue of at most ``size`` items between one reader and one consumer.

    At any time ``received`` = taken items + waiting items + ``dropped``.

    Args:
        size: largest number of waiting items.
        drop: ``oldest`` keeps the newest items; ``none`` keeps all items and makes the reader wait.

    Attributes:
        drop: can be changed before the first item.
        received: number of items put into the queue.
        dropped: number of items that nobody will take.
    """

    def __init__(self, size: int, drop: Drop) -> None:
        if size < 1:
            raise UsageError("the buffer must hold at least 1 input")
        self.size = size
        self.drop = drop
        self.received = 0
        self.dropped = 0
        self._items: deque[T] = deque()
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, item: T) -> int:
        """Add an item; with ``none``, wait for room.

        Returns:
            Number of dropped items: 1 if the oldest item was dropped, or if the queue is closed and the item itself was
            dropped, else 0.
        """
        with self._changed:
            while self.drop == "none" and len(self._items) >= self.size and not self._closed:
                self._changed.wait()
            self.received += 1
            full = len(self._items) >= self.size
            if self._closed or full:
                self.dropped += 1
            if self._closed:
                return 1
            if full:
                self._items.popleft()
            self._items.append(item)
            self._changed.notify_all()
            return int(full)

    def take(self, most: int) -> list[T]:
        """Wait for one item, then take the waiting ones, at most ``most``, oldest first.

        Returns:
            The items; empty once the queue is closed and empty.

        Raises:
            BaseException: the error given to :meth:`fail`, once the items before it are taken.
        """
        if most < 1:
            raise ValueError("most must be at least 1")
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            if not self._items and self._error is not None:
                raise self._error
            taken = [self._items.popleft() for _ in range(min(most, len(self._items)))]
            self._changed.notify_all()
            return taken

    @property
    def closed(self) -> bool:
        """Whether the queue is closed for new items."""
        return self._closed

    def wait(self, seconds: float) -> bool:
        """Wait for an item or the end; return False if neither came within ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._items) or self._closed, seconds)

    def close(self) -> None:
        """Refuse new items; waiting ones can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Close the queue with an error that :meth:`take` raises at the end; no effect on a closed queue."""
        with self._changed:
            if not self._closed:
                self._error = error
            self.close()

    def discard(self) -> None:
        """Close the queue and drop the waiting items: the consumer takes no more."""
        with self._changed:
            self.dropped += len(self._items)
            self._items.clear()
            self._error = None
            self.close()


class Unbounded(Source):
    """A source that a thread reads while earlier inputs are answered.

    It cannot be read again. ``close`` from any thread ends it at once; the thread is a daemon and releases what it
    reads after the next data or timeout.

    Args:
        buffer: largest number of waiting inputs.
        drop: see :class:`BoundedQueue`.
        limit: largest number of inputs, without dropped and skipped ones; None for no limit.
    """

    bounded = False

    def __init__(self, buffer: int, drop: Drop, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise UsageError("the limit must be at least 1")
        self._waiting: BoundedQueue[Item] = BoundedQueue(buffer, drop)
        self._limit = limit
        self._stopping = threading.Event()

    @abstractmethod
    def _read(self) -> None:
        """Queue items until the end or until ``_stopping`` is set; runs in its own thread.

        Raises:
            DataError: the source breaks off and cannot be read any further.
        """

    def chunks(self, most: int) -> Iterator[list[Item]]:
        """Waiting inputs, at most ``most`` at a time: waits for the first one, never for more.

        Call this once, and not together with :meth:`items`.

        Raises:
            DataError: the source cannot be read any further.
        """
        threading.Thread(target=self._run, name="prompttune-source", daemon=True).start()
        left = self._limit
        try:
            while chunk := self._waiting.take(most if left is None else min(most, left)):
                yield chunk
                if left is not None:
                    left -= len(chunk)
                    if left == 0:
                        return
        finally:
            self.close()

    def items(self) -> Iterator[Item]:
        """The inputs of :meth:`chunks`, one at a time."""
        for chunk in self.chunks(1):
            yield from chunk

    def counts(self) -> Mapping[str, int]:
        """``dropped``: number of inputs that were read and dropped."""
        return {"dropped": self._waiting.dropped}

    def close(self) -> None:
        """Stop; waiting inputs count as dropped."""
        self._stopping.set()
        self._waiting.discard()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as problem:  # on any error, the consumer must not wait for ever
            self._waiting.fail(problem)
        else:
            self._waiting.close()
