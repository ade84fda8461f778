"""The states of answered inputs, which a resumed run compares with its own inputs to name the first difference."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from prompttune.errors import DataError
from prompttune.serve.infer.items import Encoded, Item

UNKNOWN = "-"


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

    def same(self, item: Item) -> bool:
        """Whether an input of this name is unchanged. Its content is read only if its file may have been touched."""
        now = Trace.of(item)
        if now[:2] != self[:2]:
            return False
        if now.stamp == self.stamp and (now.place == self.place or self.content == UNKNOWN):
            return True
        if not isinstance(item.payload, Encoded):
            return False
        try:
            with item.payload.stream() as stream:
                return content_digest(stream) == self.content
        except OSError:
            return False


def content_digest(stream: BinaryIO) -> str:
    """A digest of a stream's whole content."""
    stream.seek(0)
    digest = hashlib.sha256()
    while block := stream.read(2**20):
        digest.update(block)
    return digest.hexdigest()[:12]


def _digest(*values: object) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=6).hexdigest()


def check(traces: Iterator[Trace], items: Iterator[Item], on_check: Callable[[], None]) -> None:
    """Compare inputs with those that a run has answered.

    Args:
        traces: the answered inputs.
        items: all inputs from the first one; afterwards the next item is the first without rows.
        on_check: called after each input.

    Raises:
        DataError: an input was changed; the message names it.
    """
    last = None
    for trace in traces:
        item = next(items, None)
        if item is None or not trace.same(item):
            raise DataError(f"{_difference(item, trace, last, traces)}; begin again with --overwrite")
        last = item
        on_check()


def _difference(item: Item | None, trace: Trace, last: Item | None, rest: Iterator[Trace]) -> str:
    where = "the first input" if last is None else f"the input after {_named(last)}"
    if item is None:
        return f"the inputs have changed since they were answered: {where} is gone"
    now = Trace.of(item)
    if now.name != trace.name:
        if now.name in {one.name for one in rest}:
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
