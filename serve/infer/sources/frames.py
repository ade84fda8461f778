"""Frames of videos and streams: their pixels, and the selection of frames."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prompttune.errors import UsageError, first_line
from prompttune.serve.infer.items import ArrayPayload
from prompttune.serve.infer.libraries import library

ROUNDING = 1e-6
"""Tolerance as a fraction of a tick: times are sums of floats, and a frame at 0.3 s belongs to the tick at 0.3 s."""


pyav = partial(library, "av", "stream", "or write the frames to image files first")
"""The module ``av``."""


def reason(problem: BaseException) -> str:
    """FFmpeg's reason for an error, without file names and addresses, which may hold a password."""
    return getattr(problem, "strerror", None) or first_line(problem)


def video_stream(container: Any) -> Any | None:
    """First video stream of an open container, not counting cover pictures; None without one."""
    attached = pyav().stream.Disposition.attached_pic
    return next((stream for stream in container.streams.video if not stream.disposition & attached), None)


def seconds_of(pts: int | None, stream: Any, start: int | None = None) -> float | None:
    """Presentation time from the stream's start, in seconds; None if the frame does not have one.

    ``start`` is the stream's start in its time base; None asks FFmpeg for it.

    ``frame.time`` is not the same: it counts from another start, and a decoder's last frames do not have it.
    """
    begin = stream.start_time if start is None else start
    return None if pts is None else float((pts - (begin or 0)) * stream.time_base)


@dataclass(frozen=True, slots=True)
class FramePayload:
    """A decoded frame in FFmpeg's memory; it becomes RGB when it is opened, and plain pixels when it is pickled."""

    frame: Any
    """The ``av.VideoFrame``."""

    def open(self) -> Image.Image:
        """Convert the frame to RGB and turn it upright."""
        return Image.fromarray(self._pixels())

    def _pixels(self) -> NDArray[np.uint8]:
        """RGB [height, width, 3]."""
        try:
            # one thread: decoders already run in parallel
            pixels: NDArray[np.uint8] = self.frame.reformat(format="rgb24", threads=1).to_ndarray()
        except (pyav().FFmpegError, ValueError) as problem:
            raise OSError(f"this frame cannot be converted: {reason(problem)}") from problem
        return _upright(pixels, self.frame.side_data.get("DISPLAYMATRIX"))

    def __reduce__(self) -> tuple[type[ArrayPayload], tuple[NDArray[np.uint8]]]:
        return ArrayPayload, (np.ascontiguousarray(self._pixels()),)


def _upright(pixels: NDArray[np.uint8], side_data: Any) -> NDArray[np.uint8]:
    """Turn and mirror pixels [height, width, 3] by FFmpeg's display matrix, to the nearest quarter turn.

    The matrix maps the column p and the row q of a stored pixel to the column a*p + c*q and the row b*p + d*q; see
    ``libavutil/display.h``.
    """
    if side_data is None:
        return pixels
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(side_data)[:36])
    if abs(b) > abs(a):
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


class Selection:
    """Selection of frames.

    Args:
        stride: keep every N-th frame, starting with the first.
        fps: largest number of frames per second: the first frame at or after each tick of 1 / fps seconds, among those
            that ``stride`` keeps.

    Raises:
        UsageError: one of them is not positive.
    """

    def __init__(self, stride: int = 1, fps: float | None = None) -> None:
        if stride < 1:
            raise UsageError("the stride must be at least 1")
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise UsageError("the frames per second must be a positive number")
        self._stride = stride
        self._fps = fps
        self._tick: int | None = None

    def takes(self, number: int, seconds: float | None) -> bool:
        """Whether to keep the frame ``number`` at ``seconds``; call this once for every frame, in order.

        A frame without a time is kept. If the time goes back by more than a second, as in a stream that starts again,
        the ticks start again too.
        """
        if number % self._stride:
            return False
        if self._fps is None or seconds is None:
            return True
        tick = math.floor(seconds * self._fps + ROUNDING)
        if self._tick is not None and self._tick - max(1.0, self._fps) <= tick <= self._tick:
            return False
        self._tick = tick
        return True
