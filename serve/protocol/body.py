"""HTTP bodies: read within limits of size and time, decompressed within the same size limit, compressed on request."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable

from starlette.requests import Request

from prompttune.serve.limits import Limits
from prompttune.serve.messages import BadRequestError, ServeError, TooLargeError, shown

COMPRESS_FROM = 1024
"""Smallest body to compress, in bytes; a smaller answer fits into one or two packets anyway."""
_LEVEL = 1
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class MediaError(ServeError):
    """The body has an encoding that the server does not read."""

    http_status, grpc_status = 415, "UNIMPLEMENTED"


class SlowBodyError(ServeError):
    """The body did not arrive in time."""

    http_status, grpc_status = 408, "DEADLINE_EXCEEDED"


def check_size(size: int, limits: Limits) -> None:
    """Raise :class:`TooLargeError` if ``size`` in bytes exceeds the limit of a body."""
    if size > limits.body_bytes:
        raise TooLargeError(f"the request exceeds {limits.body_bytes} bytes: send fewer or smaller images at once")


async def read_body(request: Request, limits: Limits, seconds: float) -> bytearray:
    """Read the body as it was sent.

    Raises:
        TooLargeError: the headers or the bytes so far exceed the limit.
        SlowBodyError: the body took longer than ``seconds``.
        starlette.requests.ClientDisconnect: the client left before the end of the body.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal():
        check_size(int(declared), limits)
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                check_size(len(body) + len(chunk), limits)
                body += chunk
    except TimeoutError:
        raise SlowBodyError(f"the request's body did not arrive within {seconds:g} seconds") from None
    return body


def check_encoding(encoding: str) -> bool:
    """Whether ``Content-Encoding`` means a compressed body; raises :class:`MediaError` for an unknown encoding."""
    if encoding.lower() in ("", "identity"):
        return False
    if encoding.lower() in ("gzip", "deflate"):
        return True
    raise MediaError(f"the Content-Encoding {shown(encoding)} is not supported: use gzip, deflate or none")


def decompress(body: bytes | bytearray, limits: Limits) -> bytes:
    """Decompress a gzip or zlib body; at most ``limits.body_bytes`` of it are in memory.

    Raises:
        BadRequestError: the body is damaged or cut off.
        TooLargeError: the decompressed body exceeds the limit.
    """
    reader = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        plain = reader.decompress(body, limits.body_bytes + 1)
    except zlib.error as problem:
        raise BadRequestError(f"the request's body cannot be decompressed: {problem}") from None
    if len(plain) > limits.body_bytes:
        raise TooLargeError(f"the decompressed request exceeds {limits.body_bytes} bytes")
    if not reader.eof or reader.unused_data:
        raise BadRequestError("the request's body is not one whole gzip or deflate stream")
    return plain


def _gzip(body: bytes) -> bytes:
    return gzip.compress(body, _LEVEL)


def _zlib(body: bytes) -> bytes:
    return zlib.compress(body, _LEVEL)


_COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gzip": _gzip, "deflate": _zlib}


def accepted_encoding(accept: str) -> str | None:
    """The encoding of the answer; None for an uncompressed one."""
    weights: dict[str, float] = {}
    for one in accept.lower().split(","):
        name, _, quality = one.partition(";")
        digits = quality.strip().removeprefix("q=")
        weights[name.strip()] = 0.0 if digits.strip("0.") == "" and digits else 1.0
    return next((name for name in _COMPRESSORS if weights.get(name)), None)


def compress(body: bytes, encoding: str) -> bytes:
    """``body`` in ``encoding``, a result of :func:`accepted_encoding`."""
    return _COMPRESSORS[encoding](body)
