"""Executors of a job's chunks: this machine, or a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from prompttune.serve.engine import Engine
from prompttune.serve.infer.answering import answers_of
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.local import Decoding, run_locally
from prompttune.serve.infer.rows import Answer
from prompttune.serve.infer.smoothing import Smoother
from prompttune.serve.infer.stages import Ahead
from prompttune.serve.infer.work import Work

if TYPE_CHECKING:
    from prompttune.serve.infer.cluster import RaySettings

Chunks = Iterator[Sequence[Item]]


class Executor(Protocol):
    """Answers chunks in order. Each job has its own executor."""

    def start(self, chunks: Chunks) -> None:
        """Start the work; another thread iterates over ``chunks``."""

    def wait(self, seconds: float) -> bool:
        """Wait for the next answers or for the end; return False if neither came in time."""

    def take(self) -> list[Answer] | None:
        """The answers of the next chunk; None at the end.

        Raises:
            PrompttuneError: the chunks cannot be read or answered.
        """

    def state(self) -> Mapping[str, Any]:
        """Plain values that a resumed job needs besides its position, after the answers taken so far."""

    def close(self) -> None:
        """Stop, whatever is running."""


class Here:
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
        self._scored = run_locally(chunks, self._engine, self._work, self._decoding, self._calls)

    def wait(self, seconds: float) -> bool:
        """Wait for the engine."""
        return self._scored.wait(seconds)

    def take(self) -> list[Answer] | None:
        """The next answers; their rows are made here while the engine works on the next chunk."""
        scored = next(self._scored, None)
        if scored is None:
            return None
        return answers_of(scored if self._smoother is None else self._smoother(scored), self._work)

    def state(self) -> Mapping[str, Any]:
        """The smoother's state."""
        return {} if self._smoother is None else self._smoother.state()

    def close(self) -> None:
        """Stop all threads."""
        self._scored.close()


class OnRay:
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

        self._answers: Ahead[list[Answer]] = Ahead(run_on_ray(chunks, self._work, self._settings), 1, "infer-cluster")

    def wait(self, seconds: float) -> bool:
        """Wait for the cluster."""
        return self._answers.wait(seconds)

    def take(self) -> list[Answer] | None:
        """The next answers."""
        return next(self._answers, None)

    def state(self) -> Mapping[str, Any]:
        """None: answers on Ray depend on nothing before them."""
        return {}

    def close(self) -> None:
        """Stop the execution."""
        self._answers.close()
