"""Which inputs are answered together, and in what order: the same in every run over the same inputs."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import cast

from prompttune.serve.infer.items import Item, Source
from prompttune.serve.infer.journal import Progress
from prompttune.serve.infer.settings import Shard as Shard
from prompttune.serve.infer.sources.waiting import Unbounded


@dataclass(frozen=True)
class Mark:
    """Where the inputs stand after a chunk."""

    chunks: int = 0
    """Of this shard, answered so far."""
    inputs: int = 0
    """In them."""


class Plan:
    """The chunks of a source, those that an earlier run has answered left out.

    Args:
        source: where inputs come from; if it is bounded, chunks are alike in every run, else they hold what is there.
        size: inputs of a chunk at most.
        shard: take the chunks of this shard alone.
        limit: take so many inputs of a bounded source at most, before shards are made.
        after: where an earlier run ended.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        shard: Shard | None = None,
        limit: int | None = None,
        after: Progress | None = None,
    ) -> None:
        self._source = source
        self._size = size
        self._shard = shard or Shard()
        self._limit = limit
        self._after = after or Progress()
        self._marks: deque[Mark] = deque()
        self._items = self._mine() if source.bounded else None
        self._stop = threading.Event()

    @property
    def total(self) -> int | None:
        """Inputs of this shard, those of an earlier run included; None where that is not known."""
        total = self._source.total
        if total is None:
            return None
        total = total if self._limit is None else min(total, self._limit)
        full, rest = divmod(total, self._size)
        mine = len(range(self._shard.index, full, self._shard.count)) * self._size
        return mine + (rest if full % self._shard.count == self._shard.index else 0)

    def stop(self) -> None:
        """End after the chunks that have been given: what is under way is still answered."""
        self._stop.set()
        if not self._source.bounded:
            self._source.close()

    def answered(self) -> Mark:
        """The next chunk, in order, has been answered: where the inputs stand."""
        return self._marks.popleft()

    @property
    def items(self) -> Iterator[Item] | None:
        """The inputs of this shard, those of an earlier run first, which are to be taken before :meth:`chunks` is.

        None where they cannot be read again.
        """
        return self._items

    def more(self) -> bool:
        """Whether there is a next input, which is not taken."""
        first = list(islice(self._items or (), 1))
        self._items = chain(first, self._items or ())
        return bool(first)

    def chunks(self) -> Iterator[list[Item]]:
        """The chunks to be answered, in order.

        Raises:
            DataError: the inputs cannot be read any further.
        """
        inputs, bounded = self._after.inputs, self._source.bounded
        chunks = self._bounded() if bounded else cast(Unbounded, self._source).chunks(self._size)
        for number, chunk in enumerate(chunks, self._after.chunks + 1):
            inputs += len(chunk)
            self._marks.append(Mark(number, inputs))
            yield chunk
            if bounded and self._stop.is_set():
                return

    def _bounded(self) -> Iterator[list[Item]]:
        """The first chunk fills up what an earlier run's last one had room for: inputs may have come since."""
        size = self._size - self._after.inputs % self._size
        while chunk := list(islice(self._items or (), size)):
            yield chunk
            size = self._size

    def _mine(self) -> Iterator[Item]:
        """The inputs of this shard's chunks."""
        for number, item in enumerate(islice(self._source.items(), self._limit)):
            if number // self._size % self._shard.count == self._shard.index:
                yield item
