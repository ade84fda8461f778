"""Every frame of a video file at its position, even if the file is damaged."""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

from prompttune.errors import DataError
from prompttune.serve.infer.sources.frames import FramePayload, pyav, reason, seconds_of, video_stream

ONE_FRAME_A_PACKET = frozenset({"h264", "hevc"})
"""Decoders that return one frame per packet of a progressive video, so that a missing frame is a lost one. Only they
run with frame threads, which report damage late, and at the end of a file not at all."""

UNDECODABLE = "this frame cannot be decoded"
DAMAGED = "this frame is damaged"
MISSING = "this frame is missing: the file is cut short"


TOLERANCE_S = 1.0
"""Seconds that a video may be shorter than announced."""


class Found(NamedTuple):
    """A frame, or the reason why its position has none."""

    frame: Any | None
    """The ``av.VideoFrame``; None if there is an ``error``."""
    seconds: float | None
    """Presentation time from the stream's start; None if the file does not state it."""
    error: str | None = None
    rest: bool = False
    """Whether this stands for all missing frames at the end, whose number is unknown."""


class Reader:
    """One pass over a file; a context that closes the file.

    Attributes:
        stream: PyAV's video stream.
        threaded: whether frame threads and exact counts are possible.
        announced: number of frames in the file's index; None without a complete index.

    Raises:
        DataError: the file cannot be read, is not a video or does not hold a video stream.
    """

    def __init__(self, path: str) -> None:
        self._av = pyav()
        try:
            # The prefix keeps FFmpeg from reading a name such as "a:b.mp4" as a protocol.
            self._container = self._av.open(f"file:{path}")
        except self._av.FFmpegError as problem:
            raise DataError(f"cannot read the video {path}: {reason(problem)}") from None
        stream = video_stream(self._container)
        if stream is None or stream.codec_context is None:
            self._container.close()
            raise DataError(f"{path} has no video stream that can be decoded")
        self.stream: Any = stream
        self._decoder = stream.codec_context
        # Otherwise a frame whose references are lost would disappear silently.
        self._decoder.flags |= self._av.codec.context.Flags.output_corrupt
        self.threaded = self._decoder.name in ONE_FRAME_A_PACKET
        self.announced = self._in_index()
        self._read = 0
        self._until = self._gap = 0.0  # end of the latest frame and longest gap, in seconds
        # FFmpeg does not know the start at once if frames are far apart, and would change it later.
        self._start: int | None = stream.start_time
        self._broken: str | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def size(self) -> tuple[int, int]:
        """Width and height of the first upright frame; those of the stream if no frame can be decoded."""
        first = next((found.frame for found in self.found(None) if found.frame is not None), None)
        return (self._decoder.width, self._decoder.height) if first is None else FramePayload(first).open().size

    def undamaged(self) -> Iterator[Found]:
        """Every frame up to the first sign of damage, decoded in parallel.

        Raises:
            DamagedError: the file is damaged somewhere after the last frame.
        """
        self.stream.thread_type = "AUTO"
        expected: list[int] = []  # heap of presentation times of packets that wait for their frames
        gave, progressive = 0, True
        for packet in chain(self._packets(), (None,)):
            if packet is not None and packet.pts is not None and not packet.is_discard and progressive:
                heapq.heappush(expected, packet.pts)
            frames = self._decoded(packet)
            if frames is None:
                raise DamagedError
            for frame in frames:
                gave += 1
                # A packet of an interlaced video may hold half a frame.
                progressive = progressive and not frame.interlaced_frame
                late = progressive and frame.pts is not None and heapq.heappop(expected) != frame.pts
                if late or frame.is_corrupt:
                    raise DamagedError
                yield Found(frame, self._seconds(frame.pts))
        if self._missing() or self._rest() or (progressive and gave < self._read):
            raise DamagedError

    def lost(self) -> Collection[int] | None:
        """Presentation times of packets without a frame; None if a missing frame need not be a lost one."""
        sent: set[int | None] = set()
        gave: set[int | None] = set()
        for packet in chain(self._packets(), (None,)):
            if packet is not None and not packet.is_discard:
                sent.add(packet.pts)
            for frame in self._decoded(packet) or ():
                gave.add(frame.pts)
                if frame.interlaced_frame:
                    return None
        return None if None in sent else {pts for pts in sent - gave if pts is not None}

    def found(self, lost: Collection[int] | None) -> Iterator[Found]:
        """Every frame in the order of presentation, with lost and missing frames marked.

        Args:
            lost: result of :meth:`lost`; with None, the packets that the decoder refuses count as lost.
        """
        waiting = sorted(lost or ())
        came, progressive = len(waiting), True
        for packet in chain(self._packets(), (None,)):
            frames = self._decoded(packet)
            if frames is None and lost is None and packet is not None and not packet.is_discard:
                came += 1
                if packet.pts is None:
                    yield Found(None, None, UNDECODABLE)
                else:
                    heapq.heappush(waiting, packet.pts)
            for frame in frames or ():
                came += 1
                progressive = progressive and not frame.interlaced_frame
                while waiting and frame.pts is not None and waiting[0] < frame.pts:
                    yield Found(None, self._seconds(heapq.heappop(waiting)), UNDECODABLE)
                seconds = self._seconds(frame.pts)
                yield Found(None, seconds, DAMAGED) if frame.is_corrupt else Found(frame, seconds)
        while waiting:
            yield Found(None, self._seconds(heapq.heappop(waiting)), UNDECODABLE)
        if self.threaded and progressive:
            # without times it is unknown which ones they were
            yield from repeat(Found(None, None, UNDECODABLE), max(0, self._read - came))
        yield from repeat(Found(None, None, MISSING), self._missing())
        if (rest := self._rest()) and not self._missing():
            yield Found(None, None, rest, rest=True)

    def _packets(self) -> Iterator[Any]:
        """Every packet with data; after damage in the container, as long as more packets follow."""
        while True:
            before = self._read
            try:
                for packet in self._container.demux(self.stream):
                    if packet.size == 0:
                        continue  # a flush packet, or a repetition of the frame before
                    self._read += not packet.is_discard
                    self._reached(packet)
                    yield packet
                return
            except self._av.FFmpegError as problem:
                if self._read == before:
                    self._broken = reason(problem)
                    return

    def _seconds(self, pts: int | None) -> float | None:
        return seconds_of(pts, self.stream, self._start)

    def _reached(self, packet: Any) -> None:
        if self._start is None:
            self._start = packet.pts
        if (seconds := self._seconds(packet.pts)) is not None:
            self._gap = max(self._gap, seconds - self._until)
            self._until = max(self._until, seconds + float((packet.duration or 0) * self.stream.time_base))

    def _decoded(self, packet: Any | None) -> Any | None:
        """The frames of a packet, None if it is refused; for the packet None, the decoder's remaining frames."""
        try:
            return self._decoder.decode(packet)
        except self._av.FFmpegError:
            return None

    def _missing(self) -> int:
        """Number of indexed frames that were not read."""
        return 0 if self.announced is None else max(0, self.announced - self._read)

    def _rest(self) -> str | None:
        """The reason why the file ends before the video does; None if nothing suggests that."""
        if self._broken:
            return f"the rest of the video cannot be read: {self._broken}"
        length = _tagged_duration(self.stream.metadata)
        if length is not None and not self._tagged_by_mkvmerge():
            length += seconds_of(0, self.stream, self._start) or 0.0
        # The duration of the last frame is not always known.
        if length is not None and self._until < length - max(TOLERANCE_S, self._gap):
            return f"the video breaks off after {self._until:.1f} of {length:.1f} s"
        return None

    def _tagged_by_mkvmerge(self) -> bool:
        """Whether durations count from a stream's first frame (mkvmerge) or from the file's time 0 (FFmpeg)."""
        return "_STATISTICS_WRITING_APP" in self.stream.metadata

    def _in_index(self) -> int | None:
        entries = self.stream.index_entries
        # A fragmented file announces only its first part's frames, and its index grows while it is read.
        if "mov" not in self._container.format.name.split(",") or not 0 < len(entries) <= self.stream.frames:
            return None
        return sum(not entry.is_discard for entry in entries)


def _tagged_duration(metadata: Mapping[str, str]) -> float | None:
    """Duration in seconds of a stream, from the tag of a Matroska file such as ``00:01:30.500000000``."""
    clock = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", metadata.get("DURATION", ""))
    return None if clock is None else int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])


class DamagedError(Exception):
    """A part of a file is lost."""


def frames_in(path: str, threaded: bool) -> Iterator[Found]:
    """Every frame of a file.

    If the fast pass finds damage, a second pass finds out what is lost, and a third continues from there. Only these
    two see damage exactly, and they see the same on every machine, whatever its number of threads.

    Args:
        path: path of the file.
        threaded: whether the :class:`Reader` may use frame threads.
    """
    given = 0
    lost: Collection[int] | None = None
    if threaded:
        try:
            with Reader(path) as reader:
                for found in reader.undamaged():
                    given += 1
                    yield found
                return
        except DamagedError:
            pass
        with Reader(path) as reader:
            lost = reader.lost()
    with Reader(path) as reader:
        yield from islice(reader.found(lost), given, None)
