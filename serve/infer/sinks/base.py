"""What a sink is, and the registry of sinks by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

from prompttune.registry import Registry
from prompttune.serve.infer.rows import InputAnswer, Row
from prompttune.serve.infer.work import TaskFacts

FOLDER = "/"
"""Suffix of outputs that are folders."""


@dataclass(frozen=True)
class SinkSettings:
    """What the sinks of a run are told."""

    labelled: bool = False
    """Whether there are true labels, which have their own columns."""
    rate: Fraction | float | None = None
    """Frames per second of a video, for inputs without timestamps."""
    tasks: Mapping[str, TaskFacts] = field(default_factory=dict)
    csv_bom: bool = False
    """Whether CSV starts with a byte order mark."""
    rows: Callable[[], Iterator[Row]] = lambda: iter(())
    """Reads every committed row of the run."""


class Sink:
    """Takes answers in order and writes them to a file or a folder.

    A resumed run opens a new sink and writes the answers of the row log to it first, without pictures and masks. So a
    sink needs no recovery: its files may be lost or cut by a crash.

    Args:
        path: the file or folder.
        settings: settings of the run.

    Raises:
        MissingExtraError: a library is not installed.
        OSError: the output cannot be written.
    """

    content: ClassVar[str]
    """What it writes, for messages."""
    suffixes: ClassVar[tuple[str, ...]]
    """Suffixes of its outputs, in lower case; :data:`FOLDER` for a folder."""
    writes: ClassVar[tuple[str, ...]] = ("predict",)
    """Answers that it can write: ``predict``, classes of an image; ``segment``, a class for each pixel."""
    resumable: ClassVar[bool] = True
    """Whether it can write an answer without its picture."""
    picture_side: int | None = None
    """Longest side in pixels of the pictures that it needs; 0 for whole images, None for no pictures."""

    def __init__(self, path: Path, settings: SinkSettings) -> None:
        raise NotImplementedError

    def write(self, answer: InputAnswer) -> None:
        """Write the rows of one input.

        Raises:
            OSError: the file system or the pipe reports an error.
        """
        raise NotImplementedError

    def flush(self) -> None:
        """Let readers see the answers so far; called every few seconds."""

    def finish(self) -> None:
        """Write what is still held back to the disk, after the last answer."""

    def close(self) -> None:
        """Release files, whether finished or not; a second call is allowed."""

    @classmethod
    def foreign_file(cls, path: Path) -> Path | None:
        """A file at or below the path that this kind of sink did not write, so that it stays; None without one."""
        return path

    @classmethod
    def clear(cls, path: Path) -> None:
        """Remove files of an earlier run that a new run would not replace."""


SINKS: Registry[type[Sink]] = Registry("sink", "prompttune.sinks", base=Sink)
"""The sinks by name. Where two have the same suffix and type of tasks, the one that was registered last counts."""
