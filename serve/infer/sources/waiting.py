"""Between one thread that reads and one that answers: a bounded queue, and the sources that stand on it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from prompttune.errors import UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.settings import Drop as Drop

"""What happens to a full queue: its oldest item leaves, or the reader waits."""

T = TypeVar("T")


class Waiting(Generic[T]):
    """A queue of at most ``size`` items between one reader and one consumer.

    At any time ``received`` = items taken + items waiting + ``dropped``.

    Args:
        size: items that wait at most.
        drop: ``oldest`` keeps the newest items, ``none`` keeps all and holds the reader back.

    Attributes:
        drop: may be changed before the first item is put.
        received: items that were put.
        dropped: items that nobody will take.
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
        """Add an item; under ``none`` wait for room.

        Returns:
            Items dropped by this: 1 where the oldest had to leave, or where the queue is closed and the item itself
            was dropped, else 0.
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
        """Wait for one item, then take what is there, ``most`` items at most, oldest first.

        Returns:
            The items; none once the queue is closed and empty.

        Raises:
            BaseException: what :meth:`fail` was given, once the items before it have been taken.
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
        """Whether nothing more is put."""
        return self._closed

    def wait(self, seconds: float) -> bool:
        """Wait for an item or the end; false if neither came within ``seconds``."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._items) or self._closed, seconds)

    def close(self) -> None:
        """Nothing more is put; what waits can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Close it because of an error, which :meth:`take` raises at the end; without effect on a closed one."""
        with self._changed:
            if not self._closed:
                self._error = error
            self.close()

    def discard(self) -> None:
        """Close it and drop what waits: the consumer takes no more."""
        with self._changed:
            self.dropped += len(self._items)
            self._items.clear()
            self._error = None
            self.close()


class Unbounded(ABC):
    """A :class:`~prompttune.serve.infer.items.Source` that a thread reads while earlier inputs are answered.

    It cannot be read again. ``close`` from any thread ends it at once; the thread, a daemon, lets go of what it reads
    as soon as that gives something or runs out of time.

    Args:
        buffer: inputs that wait at most.
        drop: see :class:`Waiting`.
        limit: inputs to give at most, dropped and skipped ones not counted; None for no limit.
    """

    bounded = False
    total: int | None = None

    def __init__(self, buffer: int, drop: Drop, limit: int | None = None) -> None:
        if limit is not None and limit < 1:
            raise UsageError("the limit must be at least 1")
        self._waiting: Waiting[Item] = Waiting(buffer, drop)
        self._limit = limit
        self._stopping = threading.Event()

    @abstractmethod
    def _read(self) -> None:
        """Put items until there are no more or ``_stopping`` is set; runs in a thread of its own.

        Raises:
            DataError: there should be more, and it cannot be read.
        """

    def chunks(self, most: int) -> Iterator[list[Item]]:
        """What waits, ``most`` inputs at most: waits for the first, never for the rest.

        To be called once, and not together with :meth:`items`.

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
        """The inputs one at a time, as :meth:`chunks` gives them."""
        for chunk in self.chunks(1):
            yield from chunk

    def counts(self) -> Mapping[str, int]:
        """``dropped``: inputs that were read and not given."""
        return {"dropped": self._waiting.dropped}

    def close(self) -> None:
        """End it; what still waits counts as dropped."""
        self._stopping.set()
        self._waiting.discard()

    def _run(self) -> None:
        try:
            self._read()
        except BaseException as problem:  # whatever it is, the consumer must not wait for ever
            self._waiting.fail(problem)
        else:
            self._waiting.close()
