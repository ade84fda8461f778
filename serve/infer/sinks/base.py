"""What inference writes to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prompttune.serve.infer.rows import Answer, Row


class Sink(Protocol):
    """Takes answers in order. What is committed stays; the rest may be lost by a crash and is written again."""

    @property
    def picture_side(self) -> int | None:
        """Longest side of the pictures that it wants, in pixels; 0 for whole images, None for no pictures."""

    def write(self, answer: Answer) -> None:
        """Take the rows of one input.

        Raises:
            OSError: as the file system or the pipe gives it.
        """

    def commit(self) -> Mapping[str, Any]:
        """Bring everything taken so far to the disk.

        Returns:
            Plain values from which a sink of the same kind goes on as if nothing had come between; empty where a
            sink cannot. Beside them, under :data:`~prompttune.serve.infer.sinks.appended.PARTS`, what came to its
            files since the last commit.
        """

    def finish(self) -> None:
        """The last answer has been taken: write what is still held back, completely."""

    def close(self) -> None:
        """Let go of files, whether finished or not; may be called twice."""


class Resumable(Sink, Protocol):
    """A sink whose rows can be read again and which goes on where a commit left it."""

    def rows(self) -> Iterator[Row]:
        """Every committed row: of a task in order, but one task's may come before another's."""
