"""Conversion between gRPC's messages and the service's; raw tensors are views of the message's bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2

from prompttune.serve.limits import Limits
from prompttune.serve.messages import (
    BadRequestError,
    InferRequest,
    InferResponse,
    InputTensor,
    RequestedOutput,
    bytes_array,
    shown,
)
from prompttune.serve.protocol import codec, elements
from prompttune.serve.protocol.elements import BYTES
from prompttune.serve.protocol.shared_memory import NO_REGIONS, Regions, Span

FINAL_RESPONSE, EMPTY_FINAL_RESPONSE = "triton_final_response", "triton_enable_empty_final_response"
INLINE_BYTES, INLINE_VALUES = 2**20, 4096
"""Largest message to decode on the event loop, in well under a millisecond; larger ones go to a thread."""
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    BYTES: "bytes_contents",
}
"""Field of typed contents for each datatype; FP16 and BF16 do not have one."""


def is_small(message: Any) -> bool:
    """Whether decoding the message is too little work for a thread."""
    if message.raw_input_contents:
        return all(math.prod(one.shape) <= INLINE_BYTES for one in message.inputs)
    return all(math.prod(one.shape) <= INLINE_VALUES for one in message.inputs)


def decode_request(
    message: Any, limits: Limits, timeout_s: float | None, regions: Regions = NO_REGIONS
) -> InferRequest:
    """Decode a ``ModelInferRequest``.

    Raises:
        BadRequestError: the request is malformed.
        TooLargeError: a tensor exceeds the limit of a request.
        UnsupportedError: the request uses shared memory, which the server does not accept.
    """
    raw = message.raw_input_contents
    if not message.inputs:
        raise BadRequestError("the request has no inputs")
    codec.refuse_duplicates("input", [one.name for one in message.inputs])
    codec.refuse_duplicates("output", [one.name for one in message.outputs])
    if not all(one.name for one in message.inputs):
        raise BadRequestError("an input has no name")
    spans = [regions.span(decode_parameters(one.parameters), f"input {shown(one.name)}") for one in message.inputs]
    if raw and len(raw) != spans.count(None):
        raise BadRequestError(f"the request has {spans.count(None)} inputs and {len(raw)} raw_input_contents")
    following = iter(raw)
    contents = [next(following, None) if span is None else span.read(limits) for span in spans]
    parameters = decode_parameters(message.parameters)
    parameters.pop(EMPTY_FINAL_RESPONSE, None)
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        id=codec.check_id(message.id, limits),
        inputs=[_input(one, content, limits) for one, content in zip(message.inputs, contents, strict=True)],
        outputs=[_output(one) for one in message.outputs],
        parameters=parameters,
        timeout_s=timeout_s,
    )


def decode_parameters(parameters: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Values of parameters by name; a parameter without a value is refused."""
    found: dict[str, bool | int | float | str] = {}
    for name, parameter in parameters.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise BadRequestError(f"the parameter {shown(name)} has no value")
        found[name] = getattr(parameter, kind)
    return found


def _input(message: Any, raw: bytes | None, limits: Limits) -> InputTensor:
    name, datatype = message.name, message.datatype
    dtype = elements.numpy_type(name, datatype)
    dims = elements.check_shape(name, message.shape, dtype, limits)
    typed = message.contents.ListFields()
    if raw is not None:
        if typed:
            raise BadRequestError(f"input {shown(name)} has both contents and raw_input_contents: send one of them")
        return InputTensor(name, datatype, elements.from_raw(name, dtype, dims, raw))
    expected = _CONTENTS.get(datatype)
    if expected is None:
        raise BadRequestError(f"input {shown(name)} is {datatype}, which only raw_input_contents can hold")
    if any(field.name != expected for field, _ in typed):
        raise BadRequestError(f"input {shown(name)} is {datatype}: put its values into {expected} alone")
    flat = elements.flatten(name, list(getattr(message.contents, expected)), dims)
    if datatype == BYTES:
        return InputTensor(name, BYTES, bytes_array(flat, dims))
    return InputTensor(name, datatype, elements.numbers(name, datatype, dtype, flat).reshape(dims))


def _output(message: Any) -> RequestedOutput:
    if not message.name:
        raise BadRequestError("an output has no name")
    count = decode_parameters(message.parameters).get("classification", 0)
    return RequestedOutput(message.name, codec.check_classification(message.name, count))


def output_spans(message: Any, regions: Regions) -> dict[str, Span]:
    """Places of the outputs that go into shared memory; raises the errors of :meth:`Regions.span`."""
    found = {
        one.name: regions.span(decode_parameters(one.parameters), f"output {shown(one.name)}")
        for one in message.outputs
    }
    return {name: span for name, span in found.items() if span is not None}


def encode_response(response: InferResponse, spans: Mapping[str, Span] | None = None) -> Any:
    """A ``ModelInferResponse`` with raw outputs; those in ``spans`` go to shared memory and leave an empty place."""
    message = service_pb2.ModelInferResponse(model_name=response.model, model_version=response.version, id=response.id)
    encode_parameters(response.parameters, message.parameters)
    for tensor in response.outputs:
        output = message.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.data.shape)
        content, span = elements.to_raw(tensor), (spans or {}).get(tensor.name)
        if span is not None:
            encode_parameters(span.write(content), output.parameters)
        message.raw_output_contents.append(content if span is None else b"")
    return message


def encode_parameters(values: Mapping[str, bool | int | float | str], parameters: Any) -> None:
    """Write values into a message's parameter map."""
    fields: dict[type, str] = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for name, value in values.items():
        setattr(parameters[name], fields[type(value)], value)
