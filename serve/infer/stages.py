"""Steps of a pipeline, each in a thread of its own, a few results ahead of the next one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from prompttune.serve.infer.sources.waiting import Waiting

T = TypeVar("T")

LEAVE_S = 30.0
"""For a thread to end: longer than any batch should take."""


class Ahead(Generic[T]):
    """An iterator that a thread works through, at most ``depth`` results before the one that is asked for.

    What the inner iterator raises is raised here, after the results before it.

    Args:
        inner: worked through by the thread, and by it alone.
        depth: results that may wait.
        name: of the thread.
        upstream: what ``inner`` takes from; closed when this is, so that no thread waits for it any longer.
    """

    def __init__(self, inner: Iterator[T], depth: int, name: str, upstream: Ahead[Any] | None = None) -> None:
        self._inner = inner
        self._upstream = upstream
        self._results: Waiting[T] = Waiting(depth, "none")
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for result in self._inner:
                if self._results.put(result):
                    break  # nobody takes it any more
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
            self._results.discard()  # once is enough
            raise
        if not taken:
            raise StopIteration
        return taken[0]

    def wait(self, seconds: float) -> bool:
        """Wait for the next result or the end; false if neither came within ``seconds``."""
        return self._results.wait(seconds)

    def close(self) -> None:
        """Drop what waits, let the thread end after the result that it is at, and wait for that a while.

        A process that ends while a thread is inside a native library is aborted by it.
        """
        stages: list[Ahead[Any]] = [self]
        while (before := stages[-1]._upstream) is not None:
            stages.append(before)
        for stage in stages:
            stage._results.discard()
        for stage in stages:
            stage._thread.join(LEAVE_S)
