"""Grouping and order of the inputs: the same in every run over the same inputs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain, islice
from typing import cast

from prompttune.serve.infer.items import Item
from prompttune.serve.infer.settings import Shard
from prompttune.serve.infer.sources.base import Source
from prompttune.serve.infer.sources.waiting import Unbounded


class ChunkPlan:
    """The chunks of a source, without those that an earlier run has answered.

    Args:
        source: source of the inputs. The chunks of a bounded source are the same in every run; a
            chunk of another source holds the inputs that wait.
        size: largest number of inputs in a chunk.
        shard: the only shard whose chunks are taken.
        limit: largest number of inputs of a bounded source, before it is split into shards.
        answered: number of inputs that earlier runs have answered.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        shard: Shard | None = None,
        limit: int | None = None,
        answered: int = 0,
    ) -> None:
        self._source = source
        self._size = size
        self._shard = shard or Shard()
        self._limit = limit
        self._answered = answered
        self._items = self._mine() if source.bounded else None
        self._stop = threading.Event()

    @property
    def total(self) -> int | None:
        """Number of inputs of this shard, including those of an earlier run; None if it is unknown."""
        total = self._source.total
        if total is None:
            return None
        total = total if self._limit is None else min(total, self._limit)
        full, rest = divmod(total, self._size)
        mine = len(range(self._shard.index, full, self._shard.count)) * self._size
        return mine + (rest if full % self._shard.count == self._shard.index else 0)

    def stop(self) -> None:
        """End after the chunks that have been given; these are still answered."""
        self._stop.set()
        if not self._source.bounded:
            self._source.close()

    @property
    def items(self) -> Iterator[Item] | None:
        """The inputs of this shard, those of an earlier run first; take the latter before calling :meth:`chunks`.

        None if the inputs cannot be read again.
        """
        return self._items

    def more(self) -> bool:
        """Whether there is a next input, without taking it."""
        first = list(islice(self._items or (), 1))
        self._items = chain(first, self._items or ())
        return bool(first)

    def chunks(self) -> Iterator[list[Item]]:
        """The chunks to answer, in order.

        Raises:
            DataError: the inputs cannot be read any further.
        """
        bounded = self._source.bounded
        for chunk in self._bounded() if bounded else cast(Unbounded, self._source).chunks(self._size):
            yield chunk
            if bounded and self._stop.is_set():
                return

    def _bounded(self) -> Iterator[list[Item]]:
        """Chunks of a bounded source. The first one fills up an earlier run's incomplete last chunk with new inputs."""
        size = self._size - self._answered % self._size
        while chunk := list(islice(self._items or (), size)):
            yield chunk
            size = self._size

    def _mine(self) -> Iterator[Item]:
        """The inputs of this shard's chunks."""
        for number, item in enumerate(islice(self._source.items(), self._limit)):
            if number // self._size % self._shard.count == self._shard.index:
                yield item
