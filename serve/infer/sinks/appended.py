"""What sinks share: a file that only grows and can be cut back, inputs taken whole, folders on the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from prompttune.errors import DataError
from prompttune.files import sync_folder

BUFFER_BYTES = 2**20
"""Held in memory at most between two writes."""


PARTS = "parts written"
"""Key in what :meth:`Sink.commit` gives: each :class:`Part` that came since the last commit."""


class Part(NamedTuple):
    """What was written to a file, by which a later run can tell that it is still there."""

    path: str
    start: int
    end: int
    digest: str
    """Hex sha256 of the bytes between."""
    grows: bool = True
    """More may follow; otherwise this is all of the file."""
    passing: bool = False
    """The file is there for a while only, and a sink knows what took its place."""


class AppendedFile:
    """Whole lines at the end of a file.

    It is opened for each write and holds no descriptor, so thousands can be in use. A write begins at the size that
    earlier writes are known to have reached: what a full disk cut short is written again by the next one.

    Args:
        path: the file; its folder is made.
        kept: bytes of it to go on from, the rest is cut off; None begins an empty file.
        buffer: bytes to hold in memory at most.
        passing: see :class:`Part`.

    Raises:
        DataError: the file is not what it was when ``kept`` bytes of it were written.
        OSError: it cannot be written.
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
        """Bytes, those in memory included."""
        return self._written + self._held

    def append(self, line: bytes) -> None:
        """Take a line, its end included."""
        self._waiting.append(line)
        self._held += len(line)
        if self._held >= self._limit:
            self.flush()

    def flush(self) -> None:
        """Give what is held to the system."""
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
        """Bring everything to the disk; the size to go on from."""
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
        """What :meth:`sync` has brought to the disk, each part once."""
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
        f"{path} was changed after the interrupted run wrote {kept} bytes of it, so that it cannot go on: "
        "begin again with --overwrite"
    )


class Taking:
    """Watches that each input is taken whole: ``with`` it.

    Whoever commits after an error in the middle of an input would record some of its rows, and write them once more
    when the run goes on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._halfway = False

    def __enter__(self) -> None:
        """An input begins."""
        self.check()
        self._halfway = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """It has been taken, unless there was an error."""
        self._halfway = kind is not None

    def check(self) -> None:
        """Make sure that no input was taken by halves.

        Raises:
            DataError: one was.
        """
        if self._halfway:
            raise DataError(f"{self._path} was stopped in the middle of an input: go on with --resume")


def part_digest(stream: BinaryIO, start: int, end: int) -> str:
    """Hex sha256 of the bytes of an open file between two places."""
    digest = hashlib.sha256()
    stream.seek(start)
    while start < end and (block := stream.read(min(BUFFER_BYTES, end - start))):
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


def whole_file(path: Path) -> Part:
    """The part that is all of a finished file."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        return Part(str(path), 0, end, part_digest(stream, 0, end), grows=False)


def gone(path: Path) -> DataError:
    """The error of a file that the interrupted run wrote and that is not there any more."""
    return DataError(f"{path} is gone, so that there is nothing to go on from: begin again with --overwrite")


def committed_lines(path: Path, size: int) -> Iterator[bytes]:
    """The lines of the first ``size`` bytes."""
    left = size
    with path.open("rb") as stream:
        while left > 0 and (line := stream.readline()):
            left -= len(line)
            yield line


def state_number(state: Mapping[str, Any], name: str) -> int:
    """A count out of a recorded state.

    Raises:
        DataError: there is none.
    """
    value = state.get(name)
    if not isinstance(value, int) or value < 0:
        raise DataError(f"the record of the interrupted run is damaged ({name} is {value!r}): begin with --overwrite")
    return value
