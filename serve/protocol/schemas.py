"""The protocol's messages for the OpenAPI page. They document the requests; :mod:`prompttune.serve.protocol.codec`
reads them, and is stricter and faster than these models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "BF16", "FP32", "FP64", "BYTES",
]  # fmt: skip
ParameterValues = dict[str, bool | int | float | str]


class _Message(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ErrorMessage(_Message):
    """Body of every error."""

    error: str = Field(examples=["no model 'flower': did you mean flowers?"])


class Live(_Message):
    """The process is alive."""

    live: bool


class Ready(_Message):
    """The server, or a model, is ready."""

    ready: bool


class ModelReady(Ready):
    """A model is ready."""

    name: str


class Server(_Message):
    """The server's name, version and protocol extensions."""

    name: str
    version: str
    extensions: list[str]


class Tensor(_Message):
    """A tensor of a model; -1 stands for any size."""

    name: str
    datatype: Datatype
    shape: list[int]


class Model(_Message):
    """A model's inputs, outputs and labels."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    labels: list[str]
    parameters: dict[str, str]


class RequestInput(_Message):
    """A tensor, with its data here or as raw bytes after the JSON."""

    name: str = Field(min_length=1, examples=["image"])
    shape: list[int] = Field(max_length=8, examples=[[1]])
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

    id: str | None = Field(None, description="Id that the answer repeats")
    parameters: ParameterValues | None = Field(
        None, description="top_k, priority, timeout in microseconds, binary_data_output"
    )
    inputs: list[RequestInput] = Field(min_length=1)
    outputs: list[RequestOutput] | None = Field(None, description="Requested outputs; all by default")


INFERENCE_EXAMPLE = {
    "id": "42",
    "parameters": {"top_k": 3},
    "inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["iVBORw0KGgo="]}],
    "outputs": [{"name": "label"}, {"name": "score"}],
}


class ResponseOutput(Tensor):
    """A tensor of an answer."""

    data: list[Any] | None = None
    parameters: ParameterValues | None = Field(None, description="binary_data_size")


class InferenceResponse(_Message):
    """An answer; one version of the model gave all of it."""

    model_name: str
    model_version: str
    id: str | None = None
    parameters: ParameterValues | None = None
    outputs: list[ResponseOutput]


class Duration(_Message):
    """A count and the total time in nanoseconds."""

    count: int
    ns: int


class InferenceStatistics(_Message):
    """Time of the requests by stage."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class BatchStatistics(_Message):
    """Executions with one batch size."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(_Message):
    """Statistics of one model since the server started."""

    name: str
    version: str
    last_inference: int = Field(description="Unix time in milliseconds; 0 without inference so far")
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]


class Statistics(_Message):
    """Statistics of models."""

    model_stats: list[ModelStatistics]


class IndexRequest(_Message):
    """Selection of the models in the index."""

    ready: bool = Field(False, description="Whether to list only models that are ready")


class IndexedModel(_Message):
    """An entry of the repository index."""

    name: str
    version: str
    state: str = Field(examples=["READY"])
    reason: str


class RepositoryRequest(_Message):
    """Parameters of load and unload; only ``unload_dependents`` is accepted, and it has no effect."""

    parameters: ParameterValues | None = Field(None, examples=[{}])
