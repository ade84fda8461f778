"""Raw frames on a binary stream, as ffmpeg and camera tools write them into a pipe."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import UsageError, choose
from prompttune.serve.infer.items import ArrayPayload, Item
from prompttune.serve.infer.sources.frames import Selection
from prompttune.serve.infer.sources.stdin import NAME, reading
from prompttune.serve.infer.sources.waiting import Drop, Unbounded

CHANNELS: Mapping[str, int] = {"rgb24": 3, "bgr24": 3, "gray8": 1}
"""Bytes per pixel of each pixel format."""


class RawFrames(Unbounded):
    """Frames of one size, one directly after another.

    ``frame`` counts all of them; ``timestamp`` is the Unix time of arrival. An incomplete last frame gives an item with
    an error. After the end, ``frames`` = items + ``skipped`` + ``dropped``.

    Args:
        stream: binary stream, such as :func:`standard_input`.
        width: width of a frame, in pixels.
        height: height of a frame, in pixels.
        pixel_format: one of :data:`CHANNELS`.
        stride: see :class:`~prompttune.serve.infer.sources.frames.Selection`.
        fps: see :class:`~prompttune.serve.infer.sources.frames.Selection`; it uses the time of arrival.
        drop: ``none`` lets the writer wait when answers fall behind; ``oldest`` drops the oldest waiting frame.
        buffer: largest number of waiting frames.
        limit: largest number of items.

    Raises:
        UsageError: an argument is out of range or unknown.
    """

    def __init__(
        self,
        stream: BinaryIO,
        width: int,
        height: int,
        pixel_format: str = "rgb24",
        *,
        stride: int = 1,
        fps: float | None = None,
        drop: Drop = "none",
        buffer: int = 8,
        limit: int | None = None,
    ) -> None:
        super().__init__(buffer, drop, limit)
        if width < 1 or height < 1:
            raise UsageError("the frames' width and height must be at least 1")
        choose("pixel format", pixel_format, CHANNELS)
        self._stream = stream
        self._format = pixel_format
        self._shape = (height, width, CHANNELS[pixel_format])
        self._selection = Selection(stride, fps)
        self._skipped = 0

    def counts(self) -> Mapping[str, int]:
        """``frames`` so far, including ``skipped`` and ``dropped`` ones."""
        frames = self._skipped + self._waiting.received
        return {"frames": frames, "skipped": self._skipped, "dropped": self._waiting.dropped}

    def _read(self) -> None:
        size = int(np.prod(self._shape))
        number = 0
        while not self._stopping.is_set():
            data = self._frame(size)
            if not data:
                return
            arrived, now = time.monotonic(), time.time()
            if len(data) < size:
                error = f"the last frame is incomplete: {len(data)} of {size} bytes"
                self._waiting.put(Item(NAME, frame=number, timestamp=now, error=error, arrived=arrived))
                return
            if self._selection.takes(number, arrived):
                payload = ArrayPayload(self._pixels(data))
                self._waiting.put(Item(NAME, payload, frame=number, timestamp=now, arrived=arrived))
            else:
                self._skipped += 1
            number += 1

    def _frame(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer at the end."""
        parts: list[bytes] = []
        left = size
        with reading():
            while left and (part := self._stream.read(left)):
                parts.append(part)
                left -= len(part)
        return b"".join(parts) if len(parts) != 1 else parts[0]

    def _pixels(self, data: bytes) -> NDArray[np.uint8]:
        """RGB [height, width, 3] from a frame's bytes, without a copy."""
        pixels = np.frombuffer(data, np.uint8).reshape(self._shape)  # [height, width, channels]
        if self._format == "bgr24":
            return pixels[..., ::-1]
        return np.broadcast_to(pixels, (*self._shape[:2], 3))
