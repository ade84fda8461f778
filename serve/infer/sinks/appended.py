"""Shared parts of the sinks: append-only files that can be cut back, inputs written whole, folders on the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prompttune.errors import DataError
from prompttune.files import sync_folder

BUFFER_BYTES = 2**20
"""Largest number of bytes held in memory between two writes."""


PARTS = "parts written"
"""Key in the result of :meth:`Sink.commit`: each :class:`Part` written since the last commit."""


class Part(NamedTuple):
    """A written part of a file, from which a later run can tell that the part is still there."""

    path: str
    start: int
    end: int
    digest: str
    """Hex sha256 of the part's bytes."""
    grows: bool = True
    """Whether more may follow; False if the part is the whole file."""
    passing: bool = False
    """Whether the file is temporary; its sink knows what replaces it."""


class AppendedFile:
    """A file to which whole lines are appended.

    It is opened for each write and keeps no descriptor, so thousands can be in use. Each write starts at the size that
    earlier writes are known to have reached, so the next write repeats what a full disk cut short.

    Args:
        path: the file; its folder is created.
        kept: number of bytes to keep, the rest is cut off; None starts an empty file.
        buffer: largest number of bytes to hold in memory.
        passing: see :class:`Part`.

    Raises:
        DataError: the file was changed after its first ``kept`` bytes were written.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, kept: int | None = None, buffer: int = BUFFER_BYTES, passing: bool = False) -> None:
        self.path = path
        self._passing = passing
        self._parts: list[Part] = []
        self._digest = hashlib.sha256()
        self._limit = buffer
        self._waiting: list[bytes] = []
        self._held = 0
        self._synced = False
        if kept is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
            self._written = 0
        else:
            _cut(path, kept)
            self._written = kept
        self._digested = self._written

    @property
    def size(self) -> int:
        """Size in bytes, including those in memory."""
        return self._written + self._held

    def append(self, line: bytes) -> None:
        """Add a line, which must include its line end."""
        self._waiting.append(line)
        self._held += len(line)
        if self._held >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Pass the buffered lines to the operating system."""
        if not self._held:
            return
        data = b"".join(self._waiting)
        with self.path.open("r+b") as stream:
            stream.seek(self._written)
            stream.write(data)
        self._digest.update(data)
        self._waiting, self._held = [], 0
        self._written += len(data)
        self._synced = False

    def sync(self) -> int:
        """Write everything to the disk; return the size to resume from."""
        self.flush()
        if not self._synced:
            with self.path.open("r+b") as stream:
                os.fsync(stream.fileno())
            sync_folder(self.path.parent)
            self._synced = True
        if self._digested < self._written:
            digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
            self._parts.append(Part(str(self.path), self._digested, self._written, digest, passing=self._passing))
            self._digested = self._written
        return self._written

    def new_parts(self) -> list[Part]:
        """Parts that :meth:`sync` has written to the disk, each returned once."""
        parts, self._parts = self._parts, []
        return parts


def _cut(path: Path, kept: int) -> None:
    try:
        with path.open("r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(kept - 1, 0))
            whole = kept == 0 or stream.read(1) == b"\n"
            if size >= kept and whole:
                stream.truncate(kept)
                return
    except FileNotFoundError:
        raise gone(path) from None
    raise DataError(
        f"{path} was changed after the interrupted run wrote {kept} bytes of it and cannot be resumed: "
        "begin again with --overwrite"
    )


class Taking:
    """A context that detects inputs of which only some rows were written.

    A commit after an error in the middle of an input would record some of its rows, and a resumed run would write them
    once more.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._halfway = False

    def __enter__(self) -> None:
        """Start an input."""
        self.check()
        self._halfway = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the input, unless there was an error."""
        self._halfway = kind is not None

    def check(self) -> None:
        """Check that every input was written whole.

        Raises:
            DataError: an input was written in part.
        """
        if self._halfway:
            raise DataError(f"{self._path} was stopped in the middle of an input: run again with --resume")


def part_digest(stream: BinaryIO, start: int, end: int) -> str:
    """Hex sha256 of an open file's bytes between two positions."""
    digest = hashlib.sha256()
    stream.seek(start)
    while start < end and (block := stream.read(min(BUFFER_BYTES, end - start))):
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


def whole_file(path: Path) -> Part:
    """The part that covers a whole finished file."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        return Part(str(path), 0, end, part_digest(stream, 0, end), grows=False)


def gone(path: Path) -> DataError:
    """Error for a missing file that the interrupted run has written."""
    return DataError(f"{path} is gone, so the run cannot be resumed: begin again with --overwrite")


def committed_lines(path: Path, size: int) -> Iterator[bytes]:
    """The lines in the first ``size`` bytes."""
    left = size
    with path.open("rb") as stream:
        while left > 0 and (line := stream.readline()):
            left -= len(line)
            yield line


def state_number(state: Mapping[str, Any], name: str) -> int:
    """A count from a recorded state.

    Raises:
        DataError: the state does not hold the count.
    """
    value = state.get(name)
    if not isinstance(value, int) or value < 0:
        raise DataError(f"the record of the interrupted run is damaged ({name} is {value!r}): begin with --overwrite")
    return value
