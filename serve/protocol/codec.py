"""Requests and answers over HTTP: the protocol's JSON, with tensors inside it or as raw bytes after it.

The binary tensor extension: ``Inference-Header-Content-Length`` is the length of the JSON, each ``binary_data_size``
the number of following bytes that belong to a tensor.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from prompttune.serve.limits import Limits
from prompttune.serve.messages import (
    BadRequestError,
    InferRequest,
    InferResponse,
    InputTensor,
    OutputTensor,
    RequestedOutput,
    bytes_array,
    shown,
)
from prompttune.serve.protocol import elements
from prompttune.serve.protocol.elements import BYTES
from prompttune.serve.protocol.schemas import InferenceRequest, RequestInput, RequestOutput
from prompttune.serve.protocol.shared_memory import NO_REGIONS, Regions, Span

HARMLESS = frozenset({"unload_dependents"})
"""Parameters of load and unload that clients always send; a task has no dependents, so they change nothing."""
BINARY_SIZE, BINARY_DATA, BINARY_OUTPUT = "binary_data_size", "binary_data", "binary_data_output"
LONGEST_PATH = 100
"""Most characters of a field's place in an error."""
Message = TypeVar("Message", bound=BaseModel)


class Target(NamedTuple):
    """Parts of a request outside its body."""

    model: str
    version: str = ""
    request_id: str = ""
    """Id from the headers, used if the body does not have one."""


@dataclass(frozen=True)
class OutputForm:
    """Form of each output in an answer."""

    default: bool = False
    named: Mapping[str, bool] = field(default_factory=dict)
    spans: Mapping[str, Span] = field(default_factory=dict)
    """Places in shared memory of the outputs that go there."""

    def binary(self, name: str) -> bool:
        """Whether the output is returned as raw bytes."""
        return self.named.get(name, self.default)


class EncodedResponse(NamedTuple):
    """Body of an answer."""

    body: bytes
    header_length: int | None
    """Bytes of JSON before the raw tensors; None if the body is only JSON."""


class _RawBytes:
    """The bytes after the JSON, taken tensor by tensor."""

    def __init__(self, raw: memoryview) -> None:
        self._raw = raw
        self._taken = 0

    def take(self, name: str, size: object) -> memoryview:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise BadRequestError(
                f"input {shown(name)} has the {BINARY_SIZE} {shown(size)}: it must be a size in bytes"
            )
        if size > len(self._raw) - self._taken:
            raise BadRequestError(
                f"input {shown(name)} has a {BINARY_SIZE} of {size}, {len(self._raw) - self._taken} bytes are left"
            )
        self._taken += size
        return self._raw[self._taken - size : self._taken]

    def check_empty(self) -> None:
        if self._taken != len(self._raw):
            raise BadRequestError(f"{len(self._raw) - self._taken} bytes after the JSON do not belong to an input")


def header_length(value: str | None, size: int) -> int | None:
    """``Inference-Header-Content-Length`` as a number, at most the body's ``size``; None without the header."""
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 20) or int(value) > size:
        raise BadRequestError(
            f"Inference-Header-Content-Length is {shown(value)}: it must be the JSON's size, at most {size} bytes here"
        )
    return int(value)


def parse_object(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Parse a JSON object; raises :class:`BadRequestError` for anything else."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as problem:
        raise BadRequestError(f"the request is not valid JSON: {problem}") from None
    if not isinstance(found, dict):
        raise BadRequestError("the request must be a JSON object")
    return found


def decode_request(
    body: bytes | bytearray, json_bytes: int | None, target: Target, limits: Limits, regions: Regions = NO_REGIONS
) -> tuple[InferRequest, OutputForm]:
    """Decode a request from its body, whose first ``json_bytes`` are JSON (None for all of it).

    Binary tensors are views of ``body``.

    Raises:
        BadRequestError: the request is malformed.
        TooLargeError: a tensor exceeds the limit of a request.
        UnsupportedError: the request uses shared memory, which the server does not accept.
    """
    whole = memoryview(body)
    raw = _RawBytes(whole[json_bytes:] if json_bytes is not None else whole[:0])
    message = checked(InferenceRequest, parse_object(whole[:json_bytes]))
    parameters = message.parameters or {}
    inputs = [_input(one, raw, limits, regions) for one in message.inputs]
    raw.check_empty()
    refuse_duplicates("input", [one.name for one in inputs])
    outputs = [_output(one, regions) for one in message.outputs or ()]
    refuse_duplicates("output", [one.name for one, _, _ in outputs])
    form = OutputForm(
        _flag(parameters.pop(BINARY_OUTPUT, False), BINARY_OUTPUT),
        {one.name: binary for one, binary, _ in outputs if binary is not None},
        {one.name: span for one, _, span in outputs if span is not None},
    )
    request = InferRequest(
        model=target.model,
        version=target.version,
        id=check_id(message.id or "", limits) or target.request_id,
        inputs=inputs,
        outputs=[one for one, _, _ in outputs],
        parameters=parameters,
    )
    return request, form


def checked(model: type[Message], values: dict[str, Any]) -> Message:
    """The message of ``values``; raises :class:`BadRequestError` that names the first wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        where = "".join(f"[{one}]" if isinstance(one, int) else f".{one}" for one in first["loc"]).removeprefix(".")
        found = f", not {shown(first['input'])}" if isinstance(first["input"], str | int | float) else ""
        raise BadRequestError(f"{where[:LONGEST_PATH]}: {first['msg']}{found}") from None


def refuse_duplicates(what: str, names: list[str]) -> None:
    """Raise :class:`BadRequestError` if a name occurs twice."""
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRequestError(f"the {what} {shown(twice)} is given twice")


def check_id(value: str, limits: Limits) -> str:
    """The id of a request, if it is not too long."""
    if len(value) > limits.id_length:
        raise BadRequestError(f"the request's id must have at most {limits.id_length} characters")
    return value


def _flag(value: object, name: str) -> bool:
    if not isinstance(value, bool):
        raise BadRequestError(f"the parameter {name!r} must be true or false, it is {shown(value)}")
    return value


def _input(record: RequestInput, raw: _RawBytes, limits: Limits, regions: Regions) -> InputTensor:
    name, datatype, parameters = record.name, record.datatype, record.parameters or {}
    dtype = elements.numpy_type(name, datatype)
    dims = elements.check_shape(name, record.shape, dtype, limits)
    span = regions.span(parameters, f"input {shown(name)}")
    if span is not None or BINARY_SIZE in parameters:
        if record.data is not None:
            other = "shared memory" if span else f"a {BINARY_SIZE}"
            raise BadRequestError(f"input {shown(name)} has both data and {other}: send one of them")
        content = span.read(limits) if span else raw.take(name, parameters[BINARY_SIZE])
        return InputTensor(name, datatype, elements.from_raw(name, dtype, dims, content))
    if record.data is None:
        raise BadRequestError(f"input {shown(name)} has no data: give it a list, or raw bytes with a {BINARY_SIZE}")
    flat = elements.flatten(name, record.data, dims)
    if datatype == BYTES:
        return _strings(name, flat, dims)
    return InputTensor(name, datatype, elements.numbers(name, datatype, dtype, flat).reshape(dims))


def _strings(name: str, flat: list[Any], dims: tuple[int, ...]) -> InputTensor:
    """Text, or objects ``{"b64": …}`` whose text stands for raw bytes."""
    if all(isinstance(one, str) for one in flat):
        return InputTensor(name, BYTES, bytes_array(flat, dims), text=True)
    if not all(isinstance(one, dict) and isinstance(one.get("b64"), str) for one in flat):
        raise BadRequestError(f"input {shown(name)} must hold strings alone, or objects with the string 'b64' alone")
    try:
        decoded = [base64.b64decode(one["b64"], validate=True) for one in flat]
    except (binascii.Error, ValueError) as problem:
        raise BadRequestError(f"input {shown(name)} has 'b64' that is not base64: {problem}") from None
    return InputTensor(name, BYTES, bytes_array(decoded, dims))


def _output(record: RequestOutput, regions: Regions) -> tuple[RequestedOutput, bool | None, Span | None]:
    """A requested output, whether it is wanted as raw bytes (None if unspecified), and its place in shared memory."""
    name, parameters = record.name, record.parameters or {}
    binary = _flag(parameters[BINARY_DATA], BINARY_DATA) if BINARY_DATA in parameters else None
    count = check_classification(name, parameters.get("classification", 0))
    return RequestedOutput(name, count), binary, regions.span(parameters, f"output {shown(name)}")


def check_classification(name: str, count: object) -> int:
    """The count of the classification extension, checked; 0 for off."""
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count < 2**31:
        raise BadRequestError(f"output {shown(name)} has the classification {shown(count)}: it must be a count")
    return count


def encode_response(response: InferResponse, form: OutputForm) -> EncodedResponse:
    """An answer as JSON, followed by its binary outputs in the order of their names there."""
    raw: list[bytes] = []
    outputs = []
    for tensor in response.outputs:
        values: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.data.shape)}
        if tensor.name in form.spans:
            # No parameters, as in Triton's answers: its C++ client would take any for those of a binary tensor.
            form.spans[tensor.name].write(elements.to_raw(tensor))
        elif form.binary(tensor.name):
            raw.append(elements.to_raw(tensor))
            values["parameters"] = {BINARY_SIZE: len(raw[-1])}
        else:
            values["data"] = _json_values(tensor)
        outputs.append(values)
    message: dict[str, Any] = {"model_name": response.model, "model_version": response.version}
    if response.id:
        message["id"] = response.id
    if response.parameters:
        message["parameters"] = dict(response.parameters)
    message["outputs"] = outputs
    header = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    return EncodedResponse(b"".join([header, *raw]), len(header)) if raw else EncodedResponse(header, None)


def _json_values(tensor: OutputTensor) -> NDArray[Any] | list[str]:
    """Row-major values in a form that orjson can write."""
    if tensor.datatype == BYTES:
        return [value.decode() for value in tensor.data.ravel()]
    data = tensor.data.astype(np.float32) if tensor.datatype == "BF16" else tensor.data
    return np.ascontiguousarray(data.ravel())


def refuse_overrides(names: Iterable[str]) -> None:
    """Raise :class:`BadRequestError` if a load or unload request has more than a name.

    Triton would accept a configuration and files from the client; here models come only from the engine's folder.
    """
    unknown = sorted(set(names) - HARMLESS)
    if unknown:
        raise BadRequestError(
            f"the parameter {shown(unknown[0])} is not accepted: a model comes from the server's own folder, "
            "with its own configuration"
        )
