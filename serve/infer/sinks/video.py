"""A video of the inputs with their answers drawn into the frames."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from prompttune.errors import DataError
from prompttune.serve.infer.libraries import library
from prompttune.serve.infer.rows import InputAnswer, Row
from prompttune.serve.infer.sinks.base import Sink, SinkSettings
from prompttune.serve.infer.sinks.drawing import annotate, centred, contained

_pyav = partial(library, "av", "stream", "or write rows alone")

RATE = Fraction(25)
"""Frames per second for inputs without a time."""
HELD_BACK = 256
"""Number of answers without a picture that wait for the first picture, which defines the frame size."""
SIZE_WITHOUT_PICTURES = (640, 360)
KEYFRAME_EVERY = 50
"""Distance of key frames, in frames; a player can start at each of them."""
MARK = "annotated by prompttune"
"""Marker in the metadata, which tells these videos from others."""
_HEAD_BYTES = 2**16
"""Bytes at the start of a file that hold its metadata: every container here writes them before the first picture."""
_BLACK = (0, 0, 0)
_TICK = Fraction(1, 90_000)
_LEAST_STEP = 90
"""Smallest number of ticks between two frames: Matroska counts in milliseconds."""
_BT_709 = 1
_LIMITED_RANGE = 1

# An MP4 file with its index at the end cannot be played after a crash; fragments have their own index.
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "1000000"}
_CLUSTERS = {"cluster_time_limit": "1000"}
"""Longest video that Matroska holds back, in milliseconds; MP4 counts in microseconds."""
# bitexact: otherwise Matroska files would hold a random number
_OPTIONS = {"flush_packets": "1", "fflags": "+bitexact"}
_H264 = ("libx264", {"preset": "veryfast", "crf": "23", "tune": "zerolatency"})
_VP9 = ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0", "lag-in-frames": "0"})
CONTAINERS: Mapping[str, tuple[str, tuple[str, dict[str, str]], dict[str, str]]] = {
    ".mp4": ("mp4", _H264, _FRAGMENTS),
    ".mov": ("mov", _H264, _FRAGMENTS),
    ".mkv": ("matroska", _H264, _CLUSTERS),
    ".webm": ("webm", _VP9, _CLUSTERS),
}
"""For each suffix: FFmpeg's container, the encoder with options that hold no picture back, and container options."""


class AnnotatedVideo(Sink):
    """H.264, or VP9 in WebM, with a frame for each input.

    Frames are placed at their rows' timestamps, relative to the first one, so skipped and dropped frames leave a gap.
    If a new source starts or its time goes back, the video continues after the previous frame. The first picture
    defines the size, rounded to even numbers; other pictures are scaled to fit. An unreadable input repeats the picture
    before it. The file can be played even after a crash.
    """

    content = "annotated video"
    suffixes = tuple(CONTAINERS)
    resumable = False
    picture_side = 0

    def __init__(self, path: Path, settings: SinkSettings) -> None:
        _pyav()
        self._path = path
        self._rate = Fraction(settings.rate).limit_denominator(1001) if settings.rate else RATE
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _Output(path)
        self._clock = _Clock(self._rate)
        self._held: list[InputAnswer] = []
        self._picture: Image.Image | None = None
        self._container: Any = None
        self._stream: Any = None

    def write(self, answer: InputAnswer) -> None:
        """Add a frame.

        Raises:
            DataError: the encoder refuses the frame.
        """
        if self._picture is None and answer.picture is None:
            self._held.append(answer)
            if len(self._held) < HELD_BACK:
                return
            answer = self._held.pop()
        self._begin(answer.picture)
        self._add(answer)

    def _begin(self, picture: Image.Image | None) -> None:
        """Open the video in the size of its first picture, and write the frames that waited for it."""
        if self._picture is not None:
            return
        width, height = picture.size if picture is not None else SIZE_WITHOUT_PICTURES
        self._picture = Image.new("RGB", (width + width % 2, height + height % 2), _BLACK)
        with _clear_errors(self._path):
            self._open(*self._picture.size)
        for answer in self._held:
            self._add(answer)
        self._held = []

    def _open(self, width: int, height: int) -> None:
        container, (encoder, settings), options = CONTAINERS[self._path.suffix.lower()]
        self._container = _pyav().open(self._file, "w", format=container, container_options={**_OPTIONS, **options})
        self._container.metadata["comment"] = MARK
        stream = self._container.add_stream(encoder, rate=self._rate, options=settings)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        context.time_base = _TICK
        context.gop_size = KEYFRAME_EVERY
        context.max_b_frames = 0
        context.colorspace = context.color_primaries = context.color_trc = _BT_709
        context.color_range = _LIMITED_RANGE
        self._stream = stream

    def _add(self, answer: InputAnswer) -> None:
        if answer.picture is not None:
            assert self._picture is not None
            self._picture = _fitted(answer.picture, *self._picture.size)
        frame = _frame(self._picture, answer.rows)
        frame.time_base = _TICK
        frame.pts = self._clock.ticks(answer.rows[0] if answer.rows else None)
        with _clear_errors(self._path):
            self._container.mux(self._stream.encode(frame))
        self._file.check()

    def flush(self) -> None:
        """Write the frames to the disk as far as the container releases them."""
        self._file.sync()

    def finish(self) -> None:
        """Write the end of the video."""
        if self._held:
            self._begin(None)
        self._end()
        self._file.sync()

    def _end(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            with _clear_errors(self._path):
                container.mux(self._stream.encode(None))
                container.close()
            self._file.check()

    def close(self) -> None:
        """Close the file; an unfinished video gets its end if the disk accepts it."""
        with contextlib.suppress(OSError, DataError):
            self._end()
        self._file.close()

    @classmethod
    def foreign_file(cls, path: Path) -> Path | None:
        """The file itself if it lacks the :data:`MARK`; an empty file is one that an early end has left."""
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
        return None if not head or MARK.encode() in head else path


class _Output:
    """Output file of FFmpeg. It keeps disk errors, some of which FFmpeg loses; after an error nothing is written."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._stream = path.open("wb", buffering=0)
        self._problem: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of the data."""
        left = memoryview(data)
        try:
            while left and self._problem is None:
                left = left[self._stream.write(left) :]
        except OSError as problem:
            self._problem = problem
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """The current position."""
        return self._stream.tell()

    def check(self) -> None:
        """Raise the kept error, at each call."""
        if self._problem is not None:
            raise self._problem

    def sync(self) -> None:
        """Write everything to the disk."""
        self.check()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class _Clock:
    """Presentation times in ticks, from the timestamps of rows; they always grow.

    Args:
        rate: frames per second for rows without timestamps.
    """

    def __init__(self, rate: Fraction) -> None:
        self._gap = float(1 / rate)
        self._last: int | None = None
        self._seconds = 0.0
        self._source: str | None = None
        self._given: float | None = None
        self._shift = 0.0

    def ticks(self, row: Row | None) -> int:
        """Tick at which the next picture is shown."""
        after = 0.0 if self._last is None else self._seconds + self._gap
        if row is None or row.timestamp is None:
            self._seconds = after
        else:
            if self._given is None or row.source != self._source or row.timestamp < self._given:
                self._shift = after - row.timestamp
            self._source, self._given = row.source, row.timestamp
            self._seconds = row.timestamp + self._shift
        at = round(self._seconds / float(_TICK))
        self._last = at if self._last is None else max(at, self._last + _LEAST_STEP)
        return self._last


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    return (
        picture
        if picture.size == (width, height)
        else centred(contained(picture, width, height), width, height, _BLACK)
    )


def _frame(picture: Image.Image | None, rows: Sequence[Row]) -> Any:
    """A frame in the colours of BT.709, which players accept for any size if it is stated."""
    assert picture is not None
    av = _pyav()
    frame = av.VideoFrame.from_image(annotate(picture, rows)).reformat(
        format="yuv420p", dst_colorspace=_BT_709, dst_color_range=_LIMITED_RANGE
    )
    frame.colorspace, frame.color_range = _BT_709, _LIMITED_RANGE
    return frame


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn FFmpeg's own errors, but not those of the file system, into one line."""
    try:
        yield
    except OSError:
        raise
    except _pyav().error.FFmpegError as problem:
        raise DataError(f"cannot write the video {path}: {problem}") from problem
