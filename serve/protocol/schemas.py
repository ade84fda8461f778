"""The protocol's messages with tensors, and those of control: checked by these models, documented in OpenAPI."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "BF16", "FP32", "FP64", "BYTES",
]  # fmt: skip


def _are_plain(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{name[:60]!r} must be a boolean, a number or a string")
    return values


ParameterValues = Annotated[
    dict[str, Any],
    AfterValidator(_are_plain),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": ["boolean", "number", "string"]}}),
]


class _Message(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), strict=True)


class ErrorMessage(_Message):
    """Body of every error."""

    error: str = Field(examples=["no model 'flower': did you mean flowers?"])


class RequestInput(_Message):
    """A tensor, with its data here or as raw bytes after the JSON."""

    name: str = Field(min_length=1, examples=["image"])
    shape: list[int] = Field(fail_fast=True, max_length=8, examples=[[1]])
    datatype: Datatype = Field(examples=["BYTES"])
    parameters: ParameterValues | None = Field(
        None, description="binary_data_size: number of bytes after the JSON that belong to this tensor"
    )
    data: list[Any] | None = Field(
        None,
        description="Row-major, flat or nested like the shape. Encoded images as base64 strings, data URLs or "
        '{"b64": "…"}',
    )


class RequestOutput(_Message):
    """A requested output."""

    name: str = Field(min_length=1, examples=["label"])
    parameters: ParameterValues | None = Field(
        None, description="binary_data: return raw bytes; classification: number of 'score:index:label' strings"
    )


class InferenceRequest(_Message):
    """Images to classify."""

    # fail_fast: a request with millions of wrong items must not cost the memory of as many errors.

    id: str | None = Field(None, description="Id that the answer repeats")
    parameters: ParameterValues | None = Field(
        None, description="top_k, priority, timeout in microseconds, binary_data_output"
    )
    inputs: list[RequestInput] = Field(fail_fast=True, min_length=1)
    outputs: list[RequestOutput] | None = Field(None, fail_fast=True, description="Requested outputs; all by default")


INFERENCE_EXAMPLE = {
    "id": "42",
    "parameters": {"top_k": 3},
    "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgo="]}],
    "outputs": [{"name": "label"}, {"name": "score"}],
}


class ResponseOutput(_Message):
    """A tensor of an answer."""

    name: str
    datatype: Datatype
    shape: list[int]
    data: list[Any] | None = None
    parameters: ParameterValues | None = Field(None, description="binary_data_size")


class InferenceResponse(_Message):
    """An answer; one version of the model gave all of it."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: ParameterValues | None = None
    outputs: list[ResponseOutput]


class IndexRequest(_Message):
    """Selection of the models in the index."""

    ready: bool = Field(False, description="Whether to list only models that are ready")


class RepositoryRequest(_Message):
    """Parameters of load and unload; only ``unload_dependents`` is accepted, and it has no effect."""

    parameters: ParameterValues | None = Field(None, examples=[{}])
