"""What the transports and the service say to each other: the Open Inference Protocol v2 without a wire format.

Protocol: https://github.com/kserve/open-inference-protocol and Triton's extensions,
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import PrompttuneError

Parameters = Mapping[str, bool | int | float | str]

MIXED = "mixed"
"""The model that takes a task for each row."""


class ServeError(PrompttuneError):
    """A request that gets no answer; the class says which status it has over HTTP and over gRPC."""

    http_status = 500
    grpc_status = "INTERNAL"


class BadRequestError(ServeError):
    """The request is malformed, or does not fit the model."""

    http_status, grpc_status = 400, "INVALID_ARGUMENT"


class UnauthorizedError(ServeError):
    """No token, or a wrong one."""

    http_status, grpc_status = 401, "UNAUTHENTICATED"


class ForbiddenError(ServeError):
    """The token does not allow it, or it is switched off."""

    http_status, grpc_status = 403, "PERMISSION_DENIED"


class NotFoundError(ServeError):
    """No such model, version or page."""

    http_status, grpc_status = 404, "NOT_FOUND"


class TooLargeError(ServeError):
    """More bytes, pixels or rows than the server takes."""

    http_status, grpc_status = 413, "INVALID_ARGUMENT"


class UnsupportedError(ServeError):
    """A part of the protocol that makes no sense here."""

    http_status, grpc_status = 501, "UNIMPLEMENTED"


class UnavailableError(ServeError):
    """It may succeed a little later: the queue is full, the worker is starting again, the server is leaving."""

    http_status, grpc_status = 503, "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(ServeError):
    """The request's time is over."""

    http_status, grpc_status = 504, "DEADLINE_EXCEEDED"


@dataclass(frozen=True)
class InputTensor:
    """A tensor of a request."""

    name: str
    datatype: str
    """``FP32``, ``UINT8``, ``BYTES``, … as the protocol spells them."""
    data: NDArray[Any]
    """Shaped as the request says. ``BYTES`` are an object array of ``bytes``, exactly as sent."""
    text: bool = False
    """The ``BYTES`` came as JSON strings, which cannot hold raw bytes: an image in them is base64."""


@dataclass(frozen=True)
class RequestedOutput:
    """An output that a request names."""

    name: str
    classification: int = 0
    """Triton's classification extension: ``score:index:label`` strings of the best so many; 0 is off."""


@dataclass(frozen=True)
class InferRequest:
    """A request, decoded from its transport but not yet checked against the model."""

    model: str
    inputs: Sequence[InputTensor]
    version: str = ""
    """Empty for whichever is current."""
    id: str = ""
    outputs: Sequence[RequestedOutput] = ()
    """Empty for all."""
    parameters: Parameters = field(default_factory=dict)
    """``top_k``, ``priority``, ``timeout`` in microseconds."""
    timeout_s: float | None = None
    """What the transport allows, from the moment of the call."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of an answer; ``BYTES`` are an object array of ``bytes``."""

    name: str
    datatype: str
    data: NDArray[Any]


@dataclass(frozen=True)
class InferResponse:
    """An answer. ``version`` is the number of the task's version that gave all of it."""

    model: str
    version: str
    id: str
    outputs: Sequence[OutputTensor]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class TensorMetadata:
    """Name, datatype and shape (-1 where any size goes) of a tensor."""

    name: str
    datatype: str
    shape: Sequence[int]


@dataclass(frozen=True)
class ServerMetadata:
    """What ``GET /v2`` says."""

    name: str
    version: str
    extensions: Sequence[str]


@dataclass(frozen=True)
class ModelMetadata:
    """What is known of a task without running it."""

    name: str
    versions: Sequence[str]
    platform: str
    inputs: Sequence[TensorMetadata]
    """The form that the metadata call names first; ``parameters`` tell of the others."""
    outputs: Sequence[TensorMetadata]
    labels: Sequence[str]
    max_batch_size: int
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexEntry:
    """A line of the repository index; ``state`` is ``READY``, ``LOADING`` or ``UNAVAILABLE``."""

    name: str
    version: str
    state: str
    reason: str = ""


@dataclass
class Duration:
    """A count and the nanoseconds that they took together."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count one more."""
        self.count += count
        self.ns += int(seconds * 1e9)


@dataclass
class ModelStatistics:
    """Triton's statistics of one model since the server started."""

    name: str
    version: str
    last_inference_ms: int = 0
    """Unix time in milliseconds, 0 for never."""
    inference_count: int = 0
    """Rows answered."""
    execution_count: int = 0
    """Batches that held rows of it."""
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    """Decoding and transforming images."""
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    batches: dict[int, Duration] = field(default_factory=dict)
    """Batch size → executions of that size and their compute time."""


def bytes_array(values: Sequence[str | bytes], shape: Sequence[int] | None = None) -> NDArray[np.object_]:
    """An object array of ``bytes``, text as UTF-8."""
    flat = np.empty(len(values), dtype=object)
    flat[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return flat if shape is None else flat.reshape(tuple(shape))
