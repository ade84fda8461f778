"""The inputs and outputs behind a journal's numbers, one line each: inputs as answered, outputs as written.

A resumed run compares its inputs and outputs with those of the run before and names the first difference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from prompttune.errors import DataError
from prompttune.serve.infer.items import Encoded, Item
from prompttune.serve.infer.sinks.appended import Part, committed_lines, gone, part_digest

INPUT, OUTPUT = b"i", b"o"
"""Kind of a line."""
UNKNOWN = "-"
AFRESH = "begin again with --overwrite"


class Trace(NamedTuple):
    """The state of an input when it was answered, as short digests."""

    name: str
    """Digest of source, row and frame."""
    told: str
    """Digest of the task and the true label."""
    stamp: str
    """Digest of the size and the modification time of the containing file."""
    place: str
    """Digest of that file's inode and change time; the file is untouched if this and ``stamp`` are the same."""
    content: str = UNKNOWN
    """Digest of the encoded image; unknown for a frame of a video and for an image that could not be read."""

    @classmethod
    def of(cls, item: Item) -> Trace:
        """The trace of an item, all but the content, without opening the image."""
        stamp = place = UNKNOWN
        if item.file is not None:
            try:
                found = item.file.stat()
                stamp = _digest(found.st_size, found.st_mtime_ns)
                place = _digest(found.st_ino, found.st_ctime_ns)
            except (OSError, ValueError):  # its row reports the error
                pass
        return cls(_digest(item.source, item.row, item.frame), _digest(item.task, item.target), stamp, place)

    @property
    def line(self) -> bytes:
        """The line in a ledger."""
        return b"%s %s\n" % (INPUT, " ".join(self).encode())

    @classmethod
    def parse(cls, line: bytes) -> Trace:
        """The inverse of :attr:`line`."""
        return cls(*line.decode().split()[1:])

    def same(self, item: Item) -> bool:
        """Whether an input of this name is unchanged. Its content is read only if its file may have been touched."""
        now = Trace.of(item)
        if now[:2] != self[:2]:
            return False
        if now.stamp == self.stamp and (now.place == self.place or self.content == UNKNOWN):
            return True
        try:
            return isinstance(item.payload, Encoded) and content_of(item.payload) == self.content
        except OSError:
            return False


def content_of(payload: Encoded) -> str:
    """A digest of an encoded image.

    Raises:
        OSError: the image cannot be read.
    """
    with payload.stream() as stream:
        return content_digest(stream)


def content_digest(stream: BinaryIO) -> str:
    """A digest of a stream's whole content."""
    return part_digest(stream, 0, stream.seek(0, os.SEEK_END))[:12]


def _digest(*values: object) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=6).hexdigest()


def output_line(part: Part) -> bytes:
    """The ledger line of a part of an output."""
    return b"%s %s\n" % (OUTPUT, json.dumps(part).encode())


def traces(ledger: Path, size: int) -> Iterator[Trace]:
    """The inputs in a ledger, in order."""
    return (Trace.parse(line) for line in committed_lines(ledger, size) if line.startswith(INPUT))


def check(
    ledger: Path,
    size: int,
    items: Iterator[Item] | None,
    ended: bool,
    on_check: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Compare inputs and outputs with those that a run has recorded.

    Args:
        ledger: the file.
        size: number of its bytes that count.
        items: all inputs from the first one; afterwards the next item is the first without rows. None for a stream.
        ended: whether the run ended in order, so that its outputs end with the recorded parts.
        on_check: called with the compared bytes of the ledger and ``size``.

    Raises:
        DataError: an input or an output was changed; the message names it.
    """
    if not ledger.is_file() or ledger.stat().st_size < size:
        raise DataError(f"{ledger}, which the record of the run counts on, was changed or is gone; {AFRESH}")
    lines, read, last = committed_lines(ledger, size), 0, None
    ends: dict[str, int] = {}
    for line in lines:
        read += len(line)
        if line.startswith(OUTPUT):
            part = Part(*json.loads(line[len(OUTPUT) :]))
            _check_part(part)
            if part.grows and not part.passing:
                ends[part.path] = part.end
        elif items is not None:
            item, trace = next(items, None), Trace.parse(line)
            if item is None or not trace.same(item):
                raise DataError(f"{_difference(item, trace, last, lines)}; {AFRESH}")
            last = item
        on_check(read, size)
    for path, end in ends.items() if ended else ():
        if (there := Path(path).stat().st_size) > end:
            raise DataError(f"{path} was changed: {there - end} bytes were added to it after the run; {AFRESH}")


def _difference(item: Item | None, trace: Trace, last: Item | None, rest: Iterator[bytes]) -> str:
    where = "the first input" if last is None else f"the input after {_named(last)}"
    if item is None:
        return f"the inputs have changed since they were answered: {where} is gone"
    now = Trace.of(item)
    if now.name != trace.name:
        later = {Trace.parse(line).name for line in rest if line.startswith(INPUT)}
        if now.name in later:
            return f"the inputs have changed since they were answered: {where} is gone or has moved"
        return (
            f"the inputs have changed since they were answered: {_named(item)} is new and comes before answered ones; "
            "new inputs can only follow them"
        )
    what = "it has another task or true label" if now.told != trace.told else "its file has changed"
    return f"{_named(item)} is not what it was when it was answered: {what}"


def _named(item: Item) -> str:
    number = item.row if item.frame is None else item.frame
    return item.source if number is None else f"{item.source} ({'row' if item.frame is None else 'frame'} {number})"


def _check_part(part: Part) -> None:
    path = Path(part.path)
    try:
        with path.open("rb") as stream:
            there = stream.seek(0, os.SEEK_END)
            found = part_digest(stream, part.start, part.end)
    except FileNotFoundError:
        if part.passing:
            return
        raise gone(path) from None
    except OSError as problem:
        raise DataError(f"cannot read {path}: {problem.strerror}; {AFRESH}") from None
    if there < part.end:
        raise DataError(f"{path} was cut after it was written: it has {there} bytes, not {part.end}; {AFRESH}")
    if found != part.digest or (not part.grows and there != part.end):
        raise DataError(f"{path} was changed after it was written; {AFRESH}")
