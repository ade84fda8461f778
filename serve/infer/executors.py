"""Executors of a job's chunks: this machine, or a cluster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prompttune.serve.engine import Engine
from prompttune.serve.infer.answering import answers_of
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.local import Decoding, run_locally
from prompttune.serve.infer.prefetch import Prefetch
from prompttune.serve.infer.rows import InputAnswer
from prompttune.serve.infer.settings import RaySettings
from prompttune.serve.infer.smoothing import Smoother
from prompttune.serve.infer.work import Work

Chunks = Iterator[Sequence[Item]]


class Executor(ABC):
    """Answers chunks in order. Each job has its own executor."""

    _results: Prefetch[Any]

    @abstractmethod
    def start(self, chunks: Chunks) -> None:
        """Start the work; another thread iterates over ``chunks``."""

    @abstractmethod
    def take(self) -> list[InputAnswer] | None:
        """The answers of the next chunk; None at the end.

        Raises:
            PrompttuneError: the chunks cannot be read or answered.
        """

    def wait(self, seconds: float) -> bool:
        """Wait for the next answers or for the end; return False if neither came in time."""
        return self._results.wait(seconds)

    def state(self) -> Mapping[str, Any]:
        """Values that a resumed job needs besides its position, after the answers taken so far."""
        return {}

    def close(self) -> None:
        """Stop, whatever is running."""
        self._results.close()


class LocalExecutor(Executor):
    """Runs an open engine in this process.

    Args:
        engine: an open engine.
        work: settings of the job.
        decoding: settings of the decoders.
        smoother: smooths frames over time; None for no smoothing.
        calls: number of concurrent engine calls.
    """

    def __init__(
        self, engine: Engine, work: Work, decoding: Decoding, smoother: Smoother | None = None, calls: int = 1
    ) -> None:
        self._engine = engine
        self._work = work
        self._decoding = decoding
        self._smoother = smoother
        self._calls = calls

    def start(self, chunks: Chunks) -> None:
        """Start decoding."""
        self._results = run_locally(chunks, self._engine, self._work, self._decoding, self._calls)

    def take(self) -> list[InputAnswer] | None:
        """The next answers; their rows are made here while the engine works on the next chunk."""
        scored = next(self._results, None)
        return None if scored is None else answers_of(scored, self._work, self._smoother)

    def state(self) -> Mapping[str, Any]:
        """The smoother's state."""
        return {} if self._smoother is None else self._smoother.state()


class RayExecutor(Executor):
    """Runs engines on a Ray cluster.

    Args:
        work: settings of the job.
        settings: address of the cluster and share of it to use.
    """

    def __init__(self, work: Work, settings: RaySettings) -> None:
        self._work = work
        self._settings = settings

    def start(self, chunks: Chunks) -> None:
        """Connect and start, in a thread."""
        from prompttune.serve.infer.cluster import run_on_ray

        self._results = Prefetch(run_on_ray(chunks, self._work, self._settings), 1, "infer-cluster")

    def take(self) -> list[InputAnswer] | None:
        """The next answers."""
        return next(self._results, None)
