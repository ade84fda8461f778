"""Inputs of a source, one after another; each refers to its image by a small payload that a decoder opens."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompttune.images import read_image


class Payload(Protocol):
    """A reference to an image. It can be pickled, so that another process or machine can open it."""

    def open(self) -> Image.Image:
        """Decode the image to upright 8-bit RGB.

        Raises:
            OSError: the image cannot be read; the message is the reason, without the source's name.
        """


class Encoded:
    """An image in the bytes of an image file, wherever they are stored."""

    __slots__ = ()

    def stream(self) -> BinaryIO:
        """Open the bytes.

        Raises:
            OSError: the bytes cannot be read; the message is the reason, without the source's name.
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
    """Decoded pixels."""

    pixels: NDArray[np.uint8]
    """RGB [height, width, 3]."""

    def open(self) -> Image.Image:
        """Wrap the pixels."""
        return read_image(self.pixels)


@dataclass(frozen=True, slots=True)
class Item:
    """One input: an image and its position in its source."""

    source: str
    """Path as given or found, or the name of a stream; ``-`` for standard input."""
    payload: Payload | None = None
    """Reference to the image; None if there is an ``error``."""
    row: int | None = None
    """Row of a table, line of a list or member of a shard, counted from 0."""
    frame: int | None = None
    """Frame of a video or a stream, counted from 0, skipped and dropped ones included."""
    timestamp: float | None = None
    """Time of a frame in seconds: presentation time in a video file, Unix time of arrival in a live stream."""
    task: str | None = None
    """Task of this input only, from ``--task-column``; None uses the tasks of the command."""
    target: str | None = None
    """True label, if labels are given."""
    error: str | None = None
    """Reason why there is nothing to decode, such as an empty cell of a table."""
    arrived: float | None = None
    """``time.monotonic()`` at the arrival of a live frame; latency is measured from it."""
    container: Path | None = None
    """Table, shard or video file that contains the image."""

    @property
    def file(self) -> Path | None:
        """File that contains the image; None for a stream."""
        return self.payload.path if isinstance(self.payload, FilePayload) else self.container
