"""What a source gives: one input after another, each with a small reference that a decoder opens."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompttune.images import read_image


class Payload(Protocol):
    """Where an image is. It can be pickled, so that another process or another machine opens it."""

    def open(self) -> Image.Image:
        """Decode the image: upright, 8-bit RGB.

        Raises:
            OSError: it cannot be read; the message is the reason, without the source's name.
        """


class Encoded:
    """An image as the bytes of an image file, wherever they are."""

    __slots__ = ()

    def stream(self) -> BinaryIO:
        """Open the bytes.

        Raises:
            OSError: they cannot be read; the message is the reason, without the source's name.
        """
        raise NotImplementedError

    def open(self) -> Image.Image:
        """Decode the bytes."""
        with self.stream() as stream:
            return read_image(stream)


@dataclass(frozen=True, slots=True)
class FilePayload(Encoded):
    """An image file."""

    path: Path

    def stream(self) -> BinaryIO:
        """Open the file."""
        try:
            return self.path.open("rb")
        except (OSError, ValueError) as problem:
            raise OSError(getattr(problem, "strerror", None) or str(problem)) from None


@dataclass(frozen=True, slots=True)
class BytesPayload(Encoded):
    """An encoded image in memory."""

    data: bytes

    def stream(self) -> BinaryIO:
        """Wrap the bytes."""
        return io.BytesIO(self.data)


@dataclass(frozen=True, slots=True)
class ArrayPayload:
    """Pixels."""

    pixels: NDArray[np.uint8]
    """RGB [height, width, 3]."""

    def open(self) -> Image.Image:
        """Wrap the pixels."""
        return read_image(self.pixels)


@dataclass(frozen=True, slots=True)
class Item:
    """One input: an image, and where it stands in its source."""

    source: str
    """A path as it was given or found, or the name of a stream; ``-`` for standard input."""
    payload: Payload | None = None
    """None where there is an ``error``."""
    row: int | None = None
    """Row of a table, line of a list or member of a shard, counted from 0."""
    frame: int | None = None
    """Frame of a video or a stream, counted from 0, skipped and dropped ones included."""
    timestamp: float | None = None
    """Of a frame, in seconds: presentation time in a video file, Unix time of arrival in a live stream."""
    task: str | None = None
    """Task of this input alone, from ``--task-column``; None takes the tasks of the command."""
    target: str | None = None
    """True label, where labels are given."""
    error: str | None = None
    """Why there is nothing to decode, such as an empty cell of a table."""
    arrived: float | None = None
    """``time.monotonic()`` when a frame of a live stream was received; latency counts from it."""
    container: Path | None = None
    """Table, shard or video file that it is in."""

    @property
    def file(self) -> Path | None:
        """The file that the image is in; None for a stream."""
        return self.payload.path if isinstance(self.payload, FilePayload) else self.container


class Source(Protocol):
    """A sequence of inputs.

    ``items`` is called once. A bounded source gives the same items in the same order whenever it is opened, which is
    what resuming and shards stand on; making an item is cheap, the work is left to its payload.
    """

    @property
    def bounded(self) -> bool:
        """Whether it ends by itself and can be read again; not so a stream, a watched folder or standard input."""

    @property
    def total(self) -> int | None:
        """Number of items, None where it is not known before the end."""

    def items(self) -> Iterator[Item]:
        """The inputs, in order.

        Raises:
            DataError: the source cannot be read any further.
        """

    def counts(self) -> Mapping[str, int]:
        """What became of inputs that gave no item, such as ``skipped``, ``dropped``, ``reconnects``; so far."""

    def close(self) -> None:
        """End it, from another thread if need be: ``items`` stops soon."""
