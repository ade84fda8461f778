"""Triton's system shared memory: clients on this machine pass and receive tensors in POSIX shared memory.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md

Regions are read and written as files, never mapped: if a client shrinks one in the meantime, the call gets an error,
but an access to mapped memory would end the server. A tensor is copied once and cannot change while it is checked.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from prompttune.serve.limits import Limits
from prompttune.serve.messages import BadRequestError, NotFoundError, TooLargeError, UnsupportedError, shown

FOLDER = Path("/dev/shm")
MOST_REGIONS = 64
LONGEST_NAME = 255
REGION, SIZE, OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
_SEMAPHORE = "sem."
_REFUSED = "the server does not accept shared memory{more}: send the tensor in the request"


@dataclass(frozen=True, eq=False)
class Region:
    """A part of a shared memory object, under the client's name for it."""

    name: str
    key: str
    offset: int
    byte_size: int
    file: IO[bytes] = field(repr=False)
    """The open file; closed when the last request that uses the region has been answered."""

    def values(self) -> dict[str, Any]:
        """The region in the protocol's form."""
        return {"name": self.name, "key": self.key, "offset": self.offset, "byte_size": self.byte_size}


@dataclass(frozen=True)
class Span:
    """The place of one tensor in a region."""

    where: str
    region: Region
    offset: int
    """Offset from the region's start, in bytes."""
    size: int

    def read(self, limits: Limits) -> bytes:
        """A copy of the bytes; raises :class:`BadRequestError` if the client has removed them."""
        if self.size > limits.body_bytes:
            raise TooLargeError(f"{self.where} would hold {self.size} bytes, over {limits.body_bytes}")
        found = os.pread(self.region.file.fileno(), self.size, self.region.offset + self.offset)
        if len(found) != self.size:
            raise self._shrunk()
        return found

    def write(self, data: bytes) -> dict[str, str | int]:
        """Write a tensor; return the parameters that tell the client its place."""
        if len(data) > self.size:
            raise BadRequestError(f"{self.where} has {len(data)} bytes, its shared memory has room for {self.size}")
        descriptor, begin = self.region.file.fileno(), self.region.offset + self.offset
        if os.fstat(descriptor).st_size < begin + self.size or os.pwrite(descriptor, data, begin) != len(data):
            raise self._shrunk()
        return {REGION: self.region.name, OFFSET: self.offset, SIZE: len(data)}

    def _shrunk(self) -> BadRequestError:
        return BadRequestError(f"{self.where}: the shared memory {shown(self.region.key)} is smaller than it was")


class Regions:
    """The regions that clients have registered, for both transports.

    Args:
        allowed: whether clients may register regions.
        kind: the protocol's name for the kind of memory.
    """

    def __init__(self, allowed: bool, kind: str = "system") -> None:
        self.allowed = allowed
        self._refused = _REFUSED.format(more=" without --allow-shared-memory" if kind == "system" else f" of {kind}")
        self._regions: dict[str, Region] = {}

    def check_allowed(self) -> None:
        """Raise :class:`UnsupportedError` if regions are not allowed."""
        if not self.allowed:
            raise UnsupportedError(self._refused)

    def register(self, name: str, key: object, offset: object, byte_size: object) -> None:
        """Open and register a region.

        Raises:
            UnsupportedError: the server does not accept regions.
            BadRequestError: a name or a number is invalid, the object does not exist or is too
                small, or there are too many regions.
        """
        self.check_allowed()
        if not name or len(name) > LONGEST_NAME:
            raise BadRequestError(f"a shared memory region needs a name of 1 to {LONGEST_NAME} characters")
        if name in self._regions:
            raise BadRequestError(f"the shared memory region {shown(name)} is registered already: unregister it first")
        if len(self._regions) >= MOST_REGIONS:
            raise BadRequestError(f"{MOST_REGIONS} shared memory regions are registered: unregister one first")
        begin, size = _count(offset, "offset"), _count(byte_size, "byte_size")
        path = _path(key)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as problem:
            raise BadRequestError(f"the shared memory {shown(key)} cannot be opened: {problem.strerror}") from None
        file = os.fdopen(descriptor, "r+b", buffering=0)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadRequestError(f"{shown(key)} is not shared memory")
        if not size or begin + size > status.st_size:
            has = f"the shared memory {shown(key)} has {status.st_size} bytes"
            raise BadRequestError(f"{has}, the region from {begin} on has {size}")
        self._regions[name] = Region(name, str(key), begin, size, file)

    def unregister(self, name: str = "") -> None:
        """Unregister one region, or all without a name; an unknown region is ignored."""
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str = "") -> Sequence[dict[str, Any]]:
        """One region, or all of them; raises :class:`NotFoundError` for an unknown region."""
        if name and name not in self._regions:
            raise NotFoundError(f"no shared memory region {shown(name)} is registered")
        return [one.values() for one in self._regions.values() if name in ("", one.name)]

    def span(self, parameters: Mapping[str, object], where: str) -> Span | None:
        """The place that the parameters of the tensor ``where`` give; None if the tensor is in the request itself.

        Raises:
            UnsupportedError: the server does not accept shared memory.
            BadRequestError: the region is unknown, or the tensor does not fit into it.
        """
        if not any(one.startswith("shared_memory") for one in parameters):
            return None
        if not self.allowed:
            raise UnsupportedError(f"{where} points into shared memory: {self._refused}")
        name = parameters.get(REGION)
        region = self._regions.get(name) if isinstance(name, str) else None
        if region is None:
            raise BadRequestError(f"{where}: no shared memory region {shown(name)} is registered")
        offset = _count(parameters.get(OFFSET, 0), f"{where}: {OFFSET}")
        size = _count(parameters.get(SIZE), f"{where}: {SIZE}")
        if offset + size > region.byte_size:
            raise BadRequestError(
                f"{where}: {size} bytes from {offset} on leave the region {shown(name)} of {region.byte_size} bytes"
            )
        return Span(where, region, offset, size)


NO_REGIONS = Regions(allowed=False)


def _path(key: object) -> Path:
    """Path of the object's file; a key cannot lead out of the folder."""
    name = key.removeprefix("/") if isinstance(key, str) else ""
    usable = name.isprintable() and "/" not in name and name not in ("", ".", "..") and not name.startswith(_SEMAPHORE)
    if not usable or len(name.encode()) > LONGEST_NAME:
        raise BadRequestError(f"{shown(key)} is not a key of shared memory: use a name such as /images")
    return FOLDER / name


def _count(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise BadRequestError(f"{what} is {shown(value)}: it must be a number of bytes")
    return value
