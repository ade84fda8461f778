"""A video file: each frame has a number, a time and a row, even if it cannot be decoded."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.sources.decoding import Found, Reader, frames_in
from prompttune.serve.infer.sources.frames import FramePayload, Selection, pyav

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        *("3g2", "3gp", "asf", "avi", "divx", "flv", "h264", "h265", "hevc", "ivf", "m2ts", "m4v", "mjpeg", "mjpg"),
        *("mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf", "ogv", "ts", "vob", "webm", "wmv", "y4m"),
    )
)
"""Suffixes of videos, in upper or lower case."""


def is_video(name: str) -> bool:
    """Whether a file name is a video's: a known extension, not hidden."""
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS


class VideoSource:
    """A video file, decoded while it is read.

    ``frame`` counts in the order of presentation. A frame that cannot be decoded completely is an item with an error at
    its position; so is a frame that a file's index announces and that a cut file lacks. A file that cannot be read, or
    is not a video, is one item with an error, like a damaged image. Always ``frames`` = items + ``skipped``.
    ``timestamp`` counts from the stream's start; in a file without times it is the frame number divided by the average
    rate. Pictures are upright and 8-bit RGB; non-square pixels are not corrected.

    Args:
        path: the file; the path as given is the items' ``source``.
        stride: see :class:`~prompttune.serve.infer.sources.frames.Selection`.
        fps: see :class:`~prompttune.serve.infer.sources.frames.Selection`; it uses the presentation time.
        limit: largest number of items; None for no limit.

    Attributes:
        width, height: size of the upright pictures, in pixels; 0 if the file cannot be read.
        rate: average frames per second; None if the file does not state it.
        total: number of items; None unless the file's index states it exactly (MP4 and MOV with H.264 or HEVC) and
            ``fps`` is not given.

    Raises:
        UsageError: the file does not exist, or stride or fps is not positive.
        MissingExtraError: PyAV is not installed.
    """

    bounded = True

    def __init__(
        self, path: str | Path, *, stride: int = 1, fps: float | None = None, limit: int | None = None
    ) -> None:
        self._path = str(path)
        self._selection = Selection(stride, fps)
        if limit is not None and limit < 1:
            raise UsageError("the limit must be at least 1")
        self._limit = limit
        pyav()
        if not Path(self._path).is_file():
            raise UsageError(f"no video file {self._path}")
        self._closed = threading.Event()
        self._frames = self._skipped = self._damaged = 0
        self._threaded = False
        self.rate: Fraction | None = None
        self.width = self.height = 0
        announced: int | None = None
        try:
            with Reader(self._path) as reader:
                self.rate = reader.stream.average_rate
                self._threaded = reader.threaded
                announced = reader.announced
                self.width, self.height = reader.size()
        except DataError:  # its row reports the error
            announced = 1
        self.total: int | None = None
        if fps is None and announced is not None and (self._threaded or not self.width):
            chosen = math.ceil(announced / stride)
            self.total = chosen if limit is None else min(chosen, limit)

    def items(self) -> Iterator[Item]:
        """The selected frames, in the order of presentation."""
        given = 0
        for number, found in enumerate(self._found()):
            if self._closed.is_set() or given == self._limit:
                return
            self._frames += 1
            self._damaged += found.error is not None
            seconds = found.seconds
            if seconds is None and self.rate:
                seconds = float(number / self.rate)
            if not (self._selection.takes(number, seconds) or found.rest):
                self._skipped += 1
                continue
            given += 1
            payload = None if found.frame is None else FramePayload(found.frame)
            yield Item(self._path, payload, None, number, seconds, error=found.error, container=Path(self._path))

    def _found(self) -> Iterator[Found]:
        try:
            yield from frames_in(self._path, self._threaded)
        except DataError as problem:
            yield Found(None, None, str(problem), rest=True)

    def counts(self) -> Mapping[str, int]:
        """``frames`` so far, including ``skipped`` ones and ``damaged`` ones (refused, incomplete or missing)."""
        return {"frames": self._frames, "skipped": self._skipped, "damaged": self._damaged}

    def close(self) -> None:
        """Stop: ``items`` ends at the next frame."""
        self._closed.set()
