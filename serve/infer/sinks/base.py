"""Interface of the sinks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from prompttune.serve.infer.rows import Answer, Row


class Sink(Protocol):
    """Takes answers in order. Committed rows stay; a crash may lose the others, which are then written again."""

    @property
    def picture_side(self) -> int | None:
        """Longest side in pixels of the pictures that it needs; 0 for whole images, None for no pictures."""

    def write(self, answer: Answer) -> None:
        """Write the rows of one input.

        Raises:
            OSError: the file system or the pipe reports an error.
        """

    def commit(self) -> Mapping[str, Any]:
        """Write everything taken so far to the disk.

        Returns:
            Plain values from which a new sink of the same kind continues without a difference; empty for a sink that
            cannot be resumed. Under :data:`~prompttune.serve.infer.sinks.appended.PARTS` they list the parts written to
            files since the last commit.
        """

    def finish(self) -> None:
        """Write what is still held back, after the last answer."""

    def close(self) -> None:
        """Release files, whether finished or not; a second call is allowed."""


class Resumable(Sink, Protocol):
    """A sink whose rows can be read again and which can resume from a commit."""

    def rows(self) -> Iterator[Row]:
        """Every committed row. The rows of a task are in order; the rows of different tasks may be in any order."""
