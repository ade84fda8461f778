"""A video of the inputs with their answers drawn in."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer import libraries
from prompttune.serve.infer.rows import Answer, Row
from prompttune.serve.infer.sinks.drawing import annotate, centred, contained

_LOG = logging.getLogger("prompttune.infer")
_pyav = partial(libraries.pyav, "or write rows alone")

RATE = Fraction(25)
"""Pictures in a second where nothing tells their time."""
HELD_BACK = 256
"""Answers without a picture that wait for the first one, which tells the size."""
SIZE_WITHOUT_PICTURES = (640, 360)
KEYFRAME_EVERY = 50
"""Pictures; a player can begin at each of them."""
MARK = "annotated by prompttune"
"""In the metadata, so that no other video is taken for one of ours."""
_HEAD_BYTES = 2**16
"""Of a file, with its metadata: every container here has them before the first picture."""
_BLACK = (0, 0, 0)
_TICK = Fraction(1, 90_000)
_LEAST_STEP = Fraction(1, 1000)
"""Seconds between two pictures: Matroska counts in milliseconds."""
_BT_709, _BT_601 = 1, 5
_LIMITED_RANGE = 1

# An MP4 file whose index comes at the end cannot be played after a crash: fragments have their own.
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "1000000"}
_CLUSTERS = {"cluster_time_limit": "1000"}
"""Milliseconds of video that Matroska holds back at most; MP4 counts in microseconds."""
# bitexact: Matroska would have a random number in it
_OPTIONS = {"flush_packets": "1", "fflags": "+bitexact"}
_H264 = ("libx264", {"preset": "veryfast", "crf": "23", "tune": "zerolatency"})
_VP9 = ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "32", "b": "0", "lag-in-frames": "0"})
# AVI has no presentation times: players take H.264 for reordered, and show each frame when the next one is due
_MPEG_4 = ("mpeg4", {"flags": "+qscale", "global_quality": str(4 * 118)})
CONTAINERS: Mapping[str, tuple[str, tuple[str, dict[str, str]], dict[str, str]]] = {
    ".mp4": ("mp4", _H264, _FRAGMENTS),
    ".mov": ("mov", _H264, _FRAGMENTS),
    ".mkv": ("matroska", _H264, _CLUSTERS),
    ".avi": ("avi", _MPEG_4, {}),
    ".webm": ("webm", _VP9, _CLUSTERS),
}
"""Suffix → FFmpeg's container, encoder with its options (nothing is held back for later pictures), and options."""


def is_annotated(file: Path) -> bool:
    """Whether a video was written here, by its :data:`MARK`; so is an empty file, which an early end leaves."""
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    return not head or MARK.encode() in head


class AnnotatedVideo:
    """H.264, VP9 in WebM or MPEG-4 Visual in AVI, with a frame for each input.

    Frames stand where their rows' timestamps say, relative to the first, so that skipped and dropped ones leave their
    time empty; where a source begins or its time goes back, the video goes on after the frame before. The size is
    that of the first picture, made even; others are fitted into it. An input that cannot be read repeats the picture
    before it. What a crash leaves can be played. AVI knows one rate: there times are rounded to it, and a frame whose
    time is another one's already is left out, so that the others keep their time; a warning says so once.

    Args:
        path: the file, with a suffix of :data:`CONTAINERS`.
        rate: pictures in a second where there are no timestamps, and what the file names as its rate.
        state: None; a video cannot be gone on with.

    Raises:
        UsageError: a state is given, or another suffix.
        MissingExtraError: PyAV is not installed.
        OSError: it cannot be written.
    """

    picture_side: int | None = 0

    def __init__(
        self, path: Path, rate: Fraction | float | None = None, state: Mapping[str, Any] | None = None
    ) -> None:
        _pyav()
        if state is not None:
            raise UsageError(f"{path} cannot be gone on with: a video is made in one run; give --overwrite")
        if path.suffix.lower() not in CONTAINERS:
            raise UsageError(f"{path} is no video that can be written: known are {', '.join(CONTAINERS)}")
        self._path = path
        self._rate = Fraction(rate).limit_denominator(1001) if rate else RATE
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _Output(path)
        one_rate = path.suffix.lower() == ".avi"
        self._clock = _Clock(self._rate, 1 / self._rate if one_rate else _TICK, late=not one_rate)
        self._colours = _BT_601 if one_rate else _BT_709  # the other one cannot be said in AVI
        self._warned = False
        self._held: list[Answer] = []
        self._picture: Image.Image | None = None
        self._container: Any = None
        self._stream: Any = None

    def write(self, answer: Answer) -> None:
        """Add a frame.

        Raises:
            DataError: the encoder does not take it.
        """
        if self._picture is None and answer.picture is None:
            self._held.append(answer)
            if len(self._held) < HELD_BACK:
                return
            answer = self._held.pop()
        self._begin(answer.picture)
        self._add(answer)

    def _begin(self, picture: Image.Image | None) -> None:
        """Open the video in the size of its first picture, and write what waited for it."""
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
        context.time_base = self._clock.tick
        context.gop_size = KEYFRAME_EVERY
        context.max_b_frames = 0
        context.colorspace = context.color_primaries = context.color_trc = self._colours
        context.color_range = _LIMITED_RANGE
        self._stream = stream

    def _add(self, answer: Answer) -> None:
        if answer.picture is not None:
            assert self._picture is not None
            self._picture = _fitted(answer.picture, *self._picture.size)
        ticks = self._clock.ticks(answer.rows[0] if answer.rows else None)
        if ticks is None:
            if not self._warned:
                _LOG.warning(
                    "%s has one rate, %.4g pictures a second: frames that come faster are left out of it; "
                    "write .mp4 or .mkv to have them all",
                    self._path,
                    float(self._rate),
                )
            self._warned = True
            return
        frame = _frame(self._picture, answer.rows, self._colours)
        frame.time_base = self._clock.tick
        frame.pts = ticks
        with _clear_errors(self._path):
            self._container.mux(self._stream.encode(frame))
        self._file.check()

    def commit(self) -> Mapping[str, Any]:
        """Bring the frames to the disk as far as the container lets go of them; empty."""
        self._file.sync()
        return {}

    def finish(self) -> None:
        """Write the end of the video."""
        if self._held:
            self._begin(None)
        self._end()
        self.commit()

    def _end(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            with _clear_errors(self._path):
                container.mux(self._stream.encode(None))
                container.close()
            self._file.check()

    def close(self) -> None:
        """Close the file; a video that was not finished is given an end if the disk takes it."""
        with contextlib.suppress(OSError, DataError):
            self._end()
        self._file.close()


class _Output:
    """What FFmpeg writes to. An error of the disk is kept, since FFmpeg loses some; after one nothing is written."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._stream = path.open("wb", buffering=0)
        self._problem: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of it."""
        left = memoryview(data)
        try:
            while left and self._problem is None:
                left = left[self._stream.write(left) :]
        except OSError as problem:
            self._problem = problem
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go somewhere else; the position."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._stream.tell()

    def check(self) -> None:
        """Raise the error that there was, each time."""
        if self._problem is not None:
            raise self._problem

    def sync(self) -> None:
        """Bring what was written to the disk."""
        self.check()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class _Clock:
    """Presentation times in ticks, from the timestamps of rows; they always grow.

    Args:
        rate: pictures in a second where there are no timestamps.
        tick: seconds.
        late: a picture whose tick is another one's already is shown later; otherwise it is left out.
    """

    def __init__(self, rate: Fraction, tick: Fraction, late: bool) -> None:
        self.tick = tick
        self._late = late
        self._gap = float(1 / rate)
        self._least = max(1, round(_LEAST_STEP / tick))
        self._last: int | None = None
        self._seconds = 0.0
        self._source: str | None = None
        self._given: float | None = None
        self._shift = 0.0

    def ticks(self, row: Row | None) -> int | None:
        """When the next picture is shown; None if it is left out."""
        after = 0.0 if self._last is None else self._seconds + self._gap
        if row is None or row.timestamp is None:
            self._seconds = after
        else:
            if self._given is None or row.source != self._source or row.timestamp < self._given:
                self._shift = after - row.timestamp
            self._source, self._given = row.source, row.timestamp
            self._seconds = row.timestamp + self._shift
        at = round(self._seconds / float(self.tick))
        if self._last is not None and at < self._last + self._least:
            if not self._late:
                return None
            at = self._last + self._least
        self._last = at
        return at


def _fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    return (
        picture
        if picture.size == (width, height)
        else centred(contained(picture, width, height), width, height, _BLACK)
    )


def _frame(picture: Image.Image | None, rows: Sequence[Row], colours: int) -> Any:
    """A frame in the colours of BT.709, which players take video of any size for when it is said; or in another's."""
    assert picture is not None
    av = _pyav()
    frame = av.VideoFrame.from_image(annotate(picture, rows)).reformat(
        format="yuv420p", dst_colorspace=colours, dst_color_range=_LIMITED_RANGE
    )
    frame.colorspace, frame.color_range = colours, _LIMITED_RANGE
    return frame


@contextlib.contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """FFmpeg's errors that are not the file system's, on one line."""
    try:
        yield
    except OSError:
        raise
    except _pyav().error.FFmpegError as problem:
        raise DataError(f"cannot write the video {path}: {problem}") from problem
