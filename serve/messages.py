"""Messages between the transports and the service. Metadata, index and statistics have the protocol's own field names:
JSON, OpenAPI and gRPC are made from them.

Protocol: https://github.com/kserve/open-inference-protocol and Triton's extensions,
https://github.com/triton-inference-server/server/tree/main/docs/protocol
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prompttune.errors import PrompttuneError

Parameters = Mapping[str, bool | int | float | str]

MIXED, PANEL = "mixed", "panel"
"""The model that takes a task for each image, and the one that answers several tasks for each."""
SEVERAL = (MIXED, PANEL)
LEAVING = "the server is shutting down: ask another one"
_SHOWN = 60


class ServeError(PrompttuneError):
    """A request that cannot be answered; the class gives the status over HTTP and over gRPC."""

    http_status = 500
    grpc_status = "INTERNAL"


class BadRequestError(ServeError):
    """The request is malformed, or does not fit the model."""

    http_status, grpc_status = 400, "INVALID_ARGUMENT"


class UnauthorizedError(ServeError):
    """The token is missing or wrong."""

    http_status, grpc_status = 401, "UNAUTHENTICATED"


class ForbiddenError(ServeError):
    """The token does not allow the call, or the function is switched off."""

    http_status, grpc_status = 403, "PERMISSION_DENIED"


class NotFoundError(ServeError):
    """The model, version or page does not exist."""

    http_status, grpc_status = 404, "NOT_FOUND"


class TooLargeError(ServeError):
    """The request exceeds the limit of bytes, pixels or rows."""

    http_status, grpc_status = 413, "INVALID_ARGUMENT"


class UnsupportedError(ServeError):
    """This part of the protocol is not supported."""

    http_status, grpc_status = 501, "UNIMPLEMENTED"


class UnavailableError(ServeError):
    """The request may succeed later: the queue is full, the worker restarts, or the server is shutting down."""

    http_status, grpc_status = 503, "UNAVAILABLE"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(ServeError):
    """Deadline exceeded."""

    http_status, grpc_status = 504, "DEADLINE_EXCEEDED"


@dataclass(frozen=True)
class InputTensor:
    """A tensor of a request."""

    name: str
    datatype: str
    """Datatype in the protocol's spelling, such as ``FP32``, ``UINT8`` or ``BYTES``."""
    data: NDArray[Any]
    """Values in the request's shape. ``BYTES`` are an object array of ``bytes``, exactly as sent."""
    text: bool = False
    """Whether ``BYTES`` came as JSON strings, which cannot hold raw bytes: images in them are base64."""


@dataclass(frozen=True)
class RequestedOutput:
    """An output named in a request."""

    name: str
    classification: int = 0
    """Number of ``score:index:label`` strings of Triton's classification extension; 0 for off."""


@dataclass(frozen=True)
class InferRequest:
    """A request, decoded from its transport but not yet checked against the model."""

    model: str
    inputs: Sequence[InputTensor]
    version: str = ""
    """Requested version; empty for the current one."""
    id: str = ""
    outputs: Sequence[RequestedOutput] = ()
    """Requested outputs; empty for all."""
    parameters: Parameters = field(default_factory=dict)
    """Parameters ``top_k``, ``priority`` and ``timeout`` (in microseconds)."""
    timeout_s: float | None = None
    """The transport's time limit in seconds, counted from the call."""


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of an answer; ``BYTES`` are an object array of ``bytes``."""

    name: str
    datatype: str
    data: NDArray[Any]


@dataclass(frozen=True)
class InferResponse:
    """An answer. ``version`` is the number of the task version that gave all of it."""

    model: str
    version: str
    id: str
    outputs: Sequence[OutputTensor]
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class TensorMetadata:
    """A tensor of a model; -1 stands for any size."""

    name: str
    datatype: str
    shape: Sequence[int]


@dataclass(frozen=True)
class ServerMetadata:
    """The server's name, version and protocol extensions."""

    name: str
    version: str
    extensions: Sequence[str]


@dataclass(frozen=True)
class ModelMetadata:
    """A model's inputs, outputs and labels, known without running it."""

    name: str
    versions: Sequence[str]
    platform: str
    inputs: Sequence[TensorMetadata]
    """The default form of the inputs; ``parameters`` describe the other forms."""
    outputs: Sequence[TensorMetadata]
    labels: Sequence[str]
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class IndexEntry:
    """An entry of the repository index; ``state`` is ``READY``, ``LOADING`` or ``UNAVAILABLE``."""

    name: str
    version: str
    state: str
    reason: str = ""


@dataclass
class Duration:
    """A count and the total time in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float) -> None:
        """Add one duration in seconds."""
        self.count += 1
        self.ns += int(seconds * 1e9)


@dataclass
class InferenceStatistics:
    """Time of the requests by stage."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    """Time to decode and transform images."""
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)


@dataclass
class BatchStatistics:
    """Executions with one batch size."""

    batch_size: int
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass
class ModelStatistics:
    """Statistics of one model since the server started, in Triton's form."""

    name: str
    version: str
    last_inference: int = 0
    """Time of the last inference as Unix time in milliseconds; 0 before the first."""
    inference_count: int = 0
    """Number of answered rows."""
    execution_count: int = 0
    """Number of batches that held rows of the model."""
    inference_stats: InferenceStatistics = field(default_factory=InferenceStatistics)
    batch_stats: list[BatchStatistics] = field(default_factory=list)
    """Executions by batch size, the smallest first."""

    def add_batch(self, size: int, seconds: float) -> None:
        """Count a batch of ``size`` rows that was computed in ``seconds``."""
        found = next((one for one in self.batch_stats if one.batch_size == size), None)
        if found is None:
            found = BatchStatistics(size)
            bisect.insort(self.batch_stats, found, key=lambda one: one.batch_size)
        found.compute_infer.add(seconds)


def bytes_array(values: Sequence[str | bytes], shape: Sequence[int] | None = None) -> NDArray[np.object_]:
    """An object array of ``bytes``; text becomes UTF-8."""
    flat = np.empty(len(values), dtype=object)
    flat[:] = [value.encode() if isinstance(value, str) else value for value in values]
    return flat if shape is None else flat.reshape(tuple(shape))


def shown(value: object) -> str:
    """A value from a request, shortened for an error message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
