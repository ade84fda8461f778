"""A video file: each frame has a number, a time and a row; a frame that cannot be decoded is a row with an error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.sources.base import Bounded, SourceContext
from prompttune.serve.infer.sources.frames import FramePayload, Selection, pyav, reason, seconds_of, video_stream

UNDECODABLE = "this frame cannot be decoded"
DAMAGED = "this frame is damaged"


class VideoSource(Bounded):
    """A video file, decoded while it is read.

    ``frame`` counts in the order of presentation. A frame that the decoder refuses or marks as damaged is an item with
    an error; so is the rest of a file that cannot be read any further. A file that cannot be read, or is not a video,
    is one item with an error. Always ``frames`` = items + ``skipped``. ``timestamp`` counts from the stream's start; in
    a file without times it is the frame number divided by the average rate. Pictures are upright and 8-bit RGB;
    non-square pixels are not corrected.

    Args:
        path: the file; the path as given is the items' ``source``.
        stride: see :class:`~prompttune.serve.infer.sources.frames.Selection`.
        fps: see :class:`~prompttune.serve.infer.sources.frames.Selection`; it uses the presentation time.

    Attributes:
        rate: average frames per second; None if the file does not state it.
        total: number of items by the file's index; None without one or with ``fps``.

    Raises:
        UsageError: the file does not exist, or stride or fps is not positive.
        MissingExtraError: PyAV is not installed.
    """

    suffixes = tuple(
        f".{name}"
        for name in (
            *("3g2", "3gp", "asf", "avi", "divx", "flv", "h264", "h265", "hevc", "ivf", "m2ts", "m4v", "mjpeg", "mjpg"),
            *("mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf", "ogv", "ts", "vob", "webm", "wmv", "y4m"),
        )
    )
    frames = True

    def __init__(self, path: str | Path, *, stride: int = 1, fps: float | None = None) -> None:
        super().__init__()
        self._path = str(path)
        self._selection = Selection(stride, fps)
        pyav()
        if not Path(self._path).is_file():
            raise UsageError(f"no video file {self._path}")
        self._frames = self._skipped = self._damaged = 0
        announced = 0
        try:
            with self._opened() as container:
                stream = _stream(container, self._path)
                self.rate, announced = stream.average_rate, stream.frames
        except DataError:  # its row reports the error
            announced = 1
        self.total = math.ceil(announced / stride) if announced and fps is None else None

    @classmethod
    def open(cls, name: str, context: SourceContext) -> VideoSource:
        """See :class:`Source`."""
        return cls(name, stride=context.settings.stride, fps=context.settings.fps)

    def _opened(self) -> Any:
        try:
            # The prefix keeps FFmpeg from reading a name such as "a:b.mp4" as a protocol.
            return pyav().open(f"file:{self._path}")
        except pyav().FFmpegError as problem:
            raise DataError(f"cannot read the video {self._path}: {reason(problem)}") from None

    def _items(self) -> Iterator[Item]:
        for number, (frame, seconds, error) in enumerate(self._found()):
            self._frames += 1
            self._damaged += error is not None
            if seconds is None and self.rate:
                seconds = float(number / self.rate)
            rest = error not in (None, UNDECODABLE, DAMAGED)  # it stands for all that follows
            if not self._selection.takes(number, seconds) and not rest:
                self._skipped += 1
                continue
            payload = None if error else FramePayload(frame)
            yield Item(self._path, payload, None, number, seconds, error=error, container=Path(self._path))

    def _found(self) -> Iterator[tuple[Any, float | None, str | None]]:
        """Every frame with its time, or the reason why it cannot be read."""
        try:
            with self._opened() as container:
                stream = _stream(container, self._path)
                decoder = stream.codec_context
                # Otherwise a frame whose references are lost would disappear silently.
                decoder.flags |= pyav().codec.context.Flags.output_corrupt
                stream.thread_type = "AUTO"
                start = stream.start_time  # FFmpeg may change it while it reads
                for packet in container.demux(stream):
                    start = packet.pts if start is None else start
                    try:
                        frames = decoder.decode(packet if packet.size else None)
                    except pyav().FFmpegError:
                        yield None, seconds_of(packet.pts, stream, start), UNDECODABLE
                        continue
                    for frame in frames:
                        yield frame, seconds_of(frame.pts, stream, start), DAMAGED if frame.is_corrupt else None
        except DataError as problem:
            yield None, None, str(problem)
        except pyav().FFmpegError as problem:
            yield None, None, f"the rest of the video cannot be read: {reason(problem)}"

    def counts(self) -> Mapping[str, int]:
        """``frames`` so far, including ``skipped`` ones and ``damaged`` ones, which have a row with an error."""
        return {"frames": self._frames, "skipped": self._skipped, "damaged": self._damaged}


def _stream(container: Any, path: str) -> Any:
    stream = video_stream(container)
    if stream is None or stream.codec_context is None:
        raise DataError(f"{path} has no video stream that can be decoded")
    return stream
