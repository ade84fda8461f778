"""Messages between a server and its worker process: JSON, with logits as raw bytes.

A message is a header of two sizes, a JSON object and a payload. Each call has one reply; replies keep the calls' order.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prompttune.errors import EngineError, PrompttuneError, UsageError, first_line
from prompttune.export.runtimes import Array, RuntimeOptions
from prompttune.serve.workers.base import VersionGoneError, WorkerSettings

Message = Mapping[str, Any]

_HEADER = struct.Struct("<II")
"""Header: number of bytes of the JSON and of the payload."""
_ERRORS: dict[str, type[PrompttuneError]] = {
    one.__name__: one for one in (PrompttuneError, UsageError, EngineError, VersionGoneError)
}


def pack(message: Message, payload: bytes = b"") -> bytes:
    """The bytes of a message."""
    text = json.dumps(message, separators=(",", ":")).encode()
    return b"".join((_HEADER.pack(len(text), len(payload)), text, payload))


def unpack(received: bytearray) -> tuple[Message, bytearray] | None:
    """Remove the first message and its payload from ``received``; None until all of it has arrived."""
    if len(received) < _HEADER.size:
        return None
    text, payload = _HEADER.unpack_from(received)
    middle = _HEADER.size + text
    end = middle + payload
    if len(received) < end:
        return None
    found = json.loads(received[_HEADER.size : middle]), received[middle:end]
    del received[:end]
    return found


def receive(channel: socket.socket) -> Message | None:
    """Wait for a message without a payload; None if the other side has closed the channel."""
    header = channel.recv(_HEADER.size, socket.MSG_WAITALL)
    if len(header) < _HEADER.size:
        return None
    size, _ = _HEADER.unpack(header)
    text = channel.recv(size, socket.MSG_WAITALL)
    if len(text) < size:
        return None
    message: Message = json.loads(text)
    return message


def failure(problem: Exception) -> Message:
    """The reply for an error; an unexpected error keeps its type in the text."""
    if not isinstance(problem, PrompttuneError):
        text = f"the engine worker failed: {type(problem).__name__}: {first_line(problem)}"
        return {"error": EngineError.__name__, "text": text}
    known = next(one.__name__ for one in type(problem).__mro__ if one.__name__ in _ERRORS)
    return {"error": known, "text": str(problem)}


def failed(reply: Message) -> PrompttuneError | None:
    """The error in a reply; None if the reply is not an error."""
    return _ERRORS[reply["error"]](reply["text"]) if "error" in reply else None


def pack_settings(settings: WorkerSettings) -> Message:
    """Settings as plain values for JSON."""
    found: Message = json.loads(json.dumps(asdict(settings), default=str))
    return found


def unpack_settings(values: Message) -> WorkerSettings:
    """The inverse of :func:`pack_settings`."""
    options = values["runtime"]
    cache = None if options["cache"] is None else Path(options["cache"])
    runtime = RuntimeOptions(**{**options, "cache": cache})
    return WorkerSettings(**{**values, "engine": Path(values["engine"]), "runtime": runtime})


def slots_of(memory: Any, settings: WorkerSettings, image_size: int) -> Array:
    """Shared memory as images float32 [slots, max_batch, 3, S, S]."""
    shape = (settings.slots, settings.max_batch, 3, image_size, image_size)
    images: Array = np.frombuffer(memory, np.float32, count=int(np.prod(shape))).reshape(shape)
    return images


def slots_size(settings: WorkerSettings, image_size: int) -> int:
    """Number of bytes of the images of :func:`slots_of`."""
    return settings.slots * settings.max_batch * 3 * image_size * image_size * np.dtype(np.float32).itemsize
