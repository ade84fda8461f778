"""Cameras and network streams, read in a thread that reconnects when a stream breaks off."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from prompttune.errors import DataError, UsageError
from prompttune.serve.infer.items import Item
from prompttune.serve.infer.settings import Drop, SourceSettings
from prompttune.serve.infer.sources.base import SourceContext
from prompttune.serve.infer.sources.frames import FramePayload, Selection, pyav, reason, seconds_of, video_stream
from prompttune.serve.infer.sources.waiting import Unbounded

logger = logging.getLogger("prompttune.infer")

FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0

_ADDRESS = re.compile(r"(rtsps?|rtmps?|https?|udp|tcp|srt|rtp)://", re.IGNORECASE)
_CAMERA = re.compile(r"/dev/video\d+|camera:\d+")
_USER = re.compile(r"(://)[^/\s]*@")
_SECRET = re.compile(r"(?i)([?&][^=&#\s]*(?:pass|pwd|token|secret|key|auth|sig)[^=&#\s]*=)[^&#\s]*")


def is_stream(text: str) -> bool:
    """Whether an input names a stream: an address, ``/dev/video0`` or ``camera:0``."""
    return bool(_ADDRESS.match(text) or _CAMERA.fullmatch(text))


def masked(address: str) -> str:
    """An address without its secrets: user, password, and parameters whose names suggest a secret."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1***@", address))


def backoff(attempt: int) -> float:
    """Seconds to wait before an attempt, counted from 1: 0.5, doubling up to 30, minus a random part of up to a half.

    The random part keeps many readers of one server from reconnecting at the same moment.
    """
    longest = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(attempt - 1, 16))
    return longest * random.uniform(0.5, 1.0)


class LiveSource(Unbounded):
    """A camera or a network stream.

    ``frame`` counts every decoded frame over all connections, including skipped and dropped ones. A packet that the
    decoder refuses is not a frame and counts as ``damaged``. ``timestamp`` is the Unix time of arrival. After the end,
    ``frames`` = items + ``skipped`` + ``dropped``.

    A stream that ends or breaks off is reconnected. A stream that states its duration is a video file, for example over
    HTTP: it ends at its end, is read only as fast as it is answered (whatever ``drop`` says), and its times are
    presentation times. With ``reconnects`` 0, any stream ends when the other side ends it.

    Args:
        address: address, see :func:`is_stream`; without its secrets it is the items' ``source``.
        stride: see :class:`~prompttune.serve.infer.sources.frames.Selection`.
        fps: see :class:`~prompttune.serve.infer.sources.frames.Selection`.
        drop: ``oldest`` drops the oldest waiting frame when answers fall behind; ``none`` lets the stream wait.
        buffer: largest number of waiting frames.
        reconnects: largest number of attempts in a row without a frame; None for any number.
        limit: largest number of items.
        open_timeout_s: seconds until connecting times out.
        read_timeout_s: seconds without data until a connection counts as broken.
        options: FFmpeg's options; RTSP uses TCP unless they say otherwise.
        delay: returns the seconds to wait before an attempt, counted from 1.

    Raises:
        UsageError: an argument is out of range.
        MissingExtraError: PyAV is not installed.
    """

    frames = True

    def __init__(
        self,
        address: str,
        *,
        stride: int = 1,
        fps: float | None = None,
        drop: Drop = "oldest",
        buffer: int = 8,
        reconnects: int | None = 10,
        limit: int | None = None,
        open_timeout_s: float = 10.0,
        read_timeout_s: float = 10.0,
        options: Mapping[str, str] | None = None,
        delay: Callable[[int], float] = backoff,
    ) -> None:
        super().__init__(buffer, drop, limit)
        if reconnects is not None and reconnects < 0:
            raise UsageError("the number of reconnects must be at least 0")
        if not (open_timeout_s > 0 and read_timeout_s > 0):
            raise UsageError("the timeouts must be positive")
        self._av = pyav()
        self._address = address
        self._name = masked(address)
        self._selection = Selection(stride, fps)
        self._reconnects = reconnects
        self._timeout = (open_timeout_s, read_timeout_s)
        self._options = {**({"rtsp_transport": "tcp"} if address.lower().startswith("rtsp") else {}), **(options or {})}
        self._delay = delay
        self._finite = False
        self._frames = self._skipped = self._attempts = self._damaged = 0

    @classmethod
    def takes(cls, name: str, settings: SourceSettings) -> bool:  # noqa: ARG003
        """See :class:`Source`."""
        return is_stream(name)

    @classmethod
    def open(cls, name: str, context: SourceContext) -> LiveSource:
        """See :class:`Source`."""
        settings = context.settings
        return cls(
            name,
            stride=settings.stride,
            fps=settings.fps,
            drop=settings.drop or "oldest",
            buffer=settings.buffer,
            reconnects=settings.reconnects,
            limit=settings.limit,
        )

    def counts(self) -> Mapping[str, int]:
        """``frames`` so far, including ``skipped`` and ``dropped`` ones; ``reconnects``; ``damaged`` packets."""
        return {
            "frames": self._skipped + self._waiting.received,
            "skipped": self._skipped,
            "dropped": self._waiting.dropped,
            "reconnects": self._attempts,
            "damaged": self._damaged,
        }

    def _read(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            before = self._frames
            problem = self._connection()
            if self._stopping.is_set() or (self._finite and problem is None):
                return
            if self._frames > before:
                attempt = 0
            if self._finite or attempt == self._reconnects:
                if problem is None and self._frames:
                    return
                raise DataError(self._why(problem))
            attempt += 1
            self._attempts += 1
            wait = self._delay(attempt)
            of = "" if self._reconnects is None else f" of {self._reconnects}"
            logger.warning(
                "%s: %s; attempt %d%s in %.1f s", self._name, problem or "the stream ended", attempt, of, wait
            )
            self._stopping.wait(wait)

    def _connection(self) -> str | None:
        """Read until the stream ends.

        Returns:
            The reason why it broke off; None if the other side ended it.
        """
        device = _CAMERA.fullmatch(self._address)
        try:
            container = self._av.open(
                self._address.replace("camera:", "/dev/video") if device else self._address,
                format="v4l2" if device else None,
                options=self._options,
                timeout=self._timeout,
            )
        except self._av.FFmpegError as problem:
            why = self._reason(problem, self._timeout[0])
            if not self._attempts and isinstance(problem, self._hopeless()):
                raise DataError(self._why(why)) from None
            return why
        with container:
            stream = video_stream(container)
            if stream is None or stream.codec_context is None:
                return "no video stream that can be decoded"
            # A stream that knows its duration will end; reconnecting would only start it again.
            if container.duration is not None and container.duration > 0:
                self._finite = True
                self._waiting.drop = "none"
            stream.thread_type = "SLICE"  # frame threads would hold back one frame each
            return self._frames_of(container, stream)

    def _frames_of(self, container: Any, stream: Any) -> str | None:
        problem = None
        try:
            for packet in container.demux(stream):
                if self._stopping.is_set():
                    return None
                if packet.size:
                    self._decode(stream, packet)
        except self._av.FFmpegError as broken:
            problem = self._reason(broken, self._timeout[1])
        self._decode(stream, None)
        return problem

    def _decode(self, stream: Any, packet: Any | None) -> None:
        """Queue the frames of a packet; the packet None flushes the decoder."""
        try:
            frames = stream.codec_context.decode(packet)
        except self._av.FFmpegError:
            self._damaged += packet is not None
            return
        for frame in frames:
            arrived, now = time.monotonic(), time.time()
            number = self._frames
            self._frames += 1
            presented = seconds_of(frame.pts, stream) if self._finite else None
            if self._selection.takes(number, presented if self._finite else arrived):
                stamp = presented if self._finite else now
                self._waiting.put(Item(self._name, FramePayload(frame), frame=number, timestamp=stamp, arrived=arrived))
            else:
                self._skipped += 1

    def _why(self, problem: str | None) -> str:
        what = f"{self._name} broke off and did not come back" if self._frames else f"no frame from {self._name}"
        return f"{what}: {problem or 'the stream ended'}"

    def _reason(self, problem: Exception, timeout_s: float) -> str:
        if isinstance(problem, self._av.error.ExitError):  # PyAV raises this when a call times out
            return f"no data within {timeout_s:g} s"
        return masked(reason(problem))

    def _hopeless(self) -> tuple[type[Exception], ...]:
        """Errors of the first connection that mean a wrong address, not a server that has yet to start."""
        error = self._av.error
        return (
            *(error.ProtocolNotFoundError, error.DemuxerNotFoundError, error.OptionNotFoundError, error.ArgumentError),
            *(error.HTTPClientError, error.FileNotFoundError, error.PermissionError),
        )
