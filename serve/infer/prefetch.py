"""Pipeline steps, each in its own thread, a few results ahead of the next step."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from prompttune.serve.infer.sources.waiting import BoundedQueue

T = TypeVar("T")

LEAVE_S = 30.0
"""Seconds to wait for a thread to end: longer than any batch should take."""


class Prefetch(Generic[T]):
    """Iterates in a thread, at most ``depth`` results ahead of the consumer.

    An error of the inner iterator is raised here, after the results before it.

    Args:
        inner: iterator that only the thread uses.
        depth: largest number of waiting results.
        name: name of the thread.
        upstream: producer that ``inner`` takes from; it is closed with this, so that no thread keeps waiting for it.
    """

    def __init__(self, inner: Iterator[T], depth: int, name: str, upstream: Prefetch[Any] | None = None) -> None:
        self._inner = inner
        self._upstream = upstream
        self._results: BoundedQueue[T] = BoundedQueue(depth, "none")
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for result in self._inner:
                if self._results.put(result):
                    break  # the consumer has left
        except BaseException as problem:
            self._results.fail(problem)
        finally:
            close = getattr(self._inner, "close", None)
            if close is not None:
                close()
            self._results.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            taken = self._results.take(1)
        except BaseException:
            self._results.discard()  # raise the error once
            raise
        if not taken:
            raise StopIteration
        return taken[0]

    def wait(self, seconds: float) -> bool:
        """Wait for the next result or the end; return False if neither came within ``seconds``."""
        return self._results.wait(seconds)

    def close(self) -> None:
        """Drop waiting results and wait a while for the thread to end after its current result.

        The process would abort if it ended while a thread is inside a native library.
        """
        stages: list[Prefetch[Any]] = [self]
        while (before := stages[-1]._upstream) is not None:
            stages.append(before)
        for stage in stages:
            stage._results.discard()
        for stage in stages:
            stage._thread.join(LEAVE_S)
