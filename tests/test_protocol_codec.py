"""Requests and answers in the protocol's JSON and as raw tensors, without a server."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tritonclient.http import InferenceServerClient, InferInput, InferResult

from prompttune.serve.limits import Limits
from prompttune.serve.messages import (
    BadRequestError,
    InferResponse,
    ModelMetadata,
    OutputTensor,
    ServeError,
    TensorMetadata,
    TooLargeError,
    UnsupportedError,
    bytes_array,
)
from prompttune.serve.protocol.body import accepted_encoding
from prompttune.serve.protocol.codec import (
    OutputForm,
    Target,
    decode_request,
    encode_response,
    header_length,
    refuse_overrides,
)
from prompttune.serve.protocol.describe import config_values

LIMITS = Limits(body_bytes=2**20, rows=16)
TARGET = Target("pets", "v", "header-id")
DATATYPES = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "UINT32": np.uint32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}


def decode(message: Any, raw: bytes = b"", binary: bool = False) -> Any:
    text = message if isinstance(message, bytes) else orjson.dumps(message)
    return decode_request(bytearray(text + raw), len(text) if binary or raw else None, TARGET, LIMITS)


def tensor(**changes: Any) -> dict[str, Any]:
    values = {"name": "image", "shape": [2], "datatype": "FP32", "data": [1, 2], **changes}
    return {key: value for key, value in values.items() if value is not ...}


def one(**changes: Any) -> dict[str, Any]:
    return {"inputs": [tensor(**changes)]}


def binary(size: Any, **changes: Any) -> dict[str, Any]:
    return one(data=..., parameters={"binary_data_size": size}, **changes)


def test_what_a_request_says() -> None:
    message = {
        "id": "7",
        "parameters": {"top_k": 2, "binary_data_output": True},
        "inputs": [tensor(), tensor(name="task", datatype="BYTES", data=["a", "ö"])],
        "outputs": [{"name": "logits", "parameters": {"binary_data": False, "classification": 3}}, {"name": "label"}],
    }
    request, form = decode(message)
    assert (request.model, request.version, request.id, request.parameters) == ("pets", "v", "7", {"top_k": 2})
    assert request.inputs[0].data.tolist() == [1.0, 2.0]
    assert request.inputs[1].data.tolist() == [b"a", "ö".encode()]
    assert request.inputs[1].text
    assert [(output.name, output.classification) for output in request.outputs] == [("logits", 3), ("label", 0)]
    assert (form.binary("logits"), form.binary("label")) == (False, True)
    assert decode(one())[0].id == "header-id"


@pytest.mark.parametrize("datatype", DATATYPES)
def test_values_survive_json_and_raw(datatype: str) -> None:
    dtype = DATATYPES[datatype]

    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(
        arrays.arrays(
            dtype,
            arrays.array_shapes(max_dims=3, max_side=3),
            elements={"allow_nan": False, "allow_infinity": False} if np.dtype(dtype).kind == "f" else None,
        )
    )
    def survives(array: Any) -> None:
        as_json = one(datatype=datatype, shape=list(array.shape), data=array.tolist())
        flat = one(datatype=datatype, shape=list(array.shape), data=array.ravel().tolist())
        as_raw = binary(array.nbytes, datatype=datatype, shape=list(array.shape))
        for request, _ in (decode(as_json), decode(flat), decode(as_raw, array.tobytes(), binary=True)):
            received = request.inputs[0].data
            assert received.dtype == array.dtype
            np.testing.assert_array_equal(received, array)

    survives()


def test_brain_floats_come_raw_and_leave_as_numbers() -> None:
    array = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    request, _ = decode(binary(4, datatype="BF16"), array.tobytes())
    assert request.inputs[0].data.dtype == ml_dtypes.bfloat16
    answer = InferResponse("m", "", "", [OutputTensor("a", "BF16", request.inputs[0].data)])
    assert orjson.loads(encode_response(answer, OutputForm()).body)["outputs"][0]["data"] == [1.5, -2.0]


def test_binary_tensors_are_views_of_the_body() -> None:
    text = orjson.dumps(binary(8))
    body = bytearray(text + np.array([1, 2], np.float32).tobytes())
    request, _ = decode_request(body, len(text), TARGET, LIMITS)
    body[-8:] = np.array([3, 4], np.float32).tobytes()
    assert request.inputs[0].data.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (b"", "not valid JSON"),
        (b'{"inputs": [', "not valid JSON"),
        (b"[" * 5000, "not valid JSON"),
        (b"3", "must be a JSON object"),
        (b'{"inputs": [{"name":"image","shape":[1],"datatype":"FP32","data":[NaN]}]}', "not valid JSON"),
        (b'{"inputs": [{"name":"image","shape":[1],"datatype":"FP32","data":[1e999]}]}', "not valid JSON"),
        (b'{"inputs": "\xff"}', "not valid JSON"),
        ({}, "inputs: Field required"),
        ({"inputs": {}}, "inputs: Input should be a valid list"),
        ({"inputs": [1]}, "inputs[0]: Input should be a valid dictionary"),
        ({"id": 3, **one()}, "id: Input should be a valid string, not 3"),
        ({"id": "a" * 257, **one()}, "at most 256 characters"),
        ({"parameters": [], **one()}, "parameters: Input should be a valid dictionary"),
        ({"parameters": {"top_k": [1]}, **one()}, "'top_k' must be a boolean"),
        ({"parameters": {"binary_data_output": 1}, **one()}, "must be true or false"),
        ({"inputs": [tensor(), tensor()]}, "'image' is given twice"),
        ({"outputs": [{"name": "a"}, {"name": "a"}], **one()}, "output 'a' is given twice"),
        ({"outputs": [{}], **one()}, "outputs[0].name: Field required"),
        ({"outputs": [{"name": "a", "parameters": {"classification": -1}}], **one()}, "must be a count"),
        ({"outputs": [{"name": "a", "parameters": {"classification": True}}], **one()}, "must be a count"),
        ({"outputs": [{"name": "a", "parameters": {"binary_data": "yes"}}], **one()}, "must be true or false"),
        (one(name=""), "inputs[0].name: String should have at least 1 character"),
        (one(name=["image"]), "inputs[0].name: Input should be a valid string"),
        (one(datatype="FP8"), "'BYTES', not 'FP8'"),
        (one(datatype=["FP32"]), "inputs[0].datatype: Input should be"),
        (one(shape=...), "inputs[0].shape: Field required"),
        (one(shape=2), "inputs[0].shape: Input should be a valid list"),
        (one(shape=[-1]), "the dimension -1"),
        (one(shape=[True, 2]), "inputs[0].shape[0]: Input should be a valid integer"),
        (one(shape=[2.0]), "inputs[0].shape[0]: Input should be a valid integer, not 2.0"),
        (one(shape=[1] * 9), "inputs[0].shape: List should have at most 8 items"),
        (one(shape=[3]), "2 values, its shape [3] needs 3"),
        (one(data=...), "has no data"),
        (one(data="12"), "inputs[0].data: Input should be a valid list"),
        (one(data=[[1], [2]]), "data of shape [2, 1], its shape says [2]"),
        (one(shape=[2, 1], data=[[1], [2, 3]]), "uneven data"),
        (one(shape=[2, 1], data=[[1], 2]), "uneven data"),
        (one(shape=[2, 1], data=[1, [2]]), "holds a list, which is not FP32"),
        (one(data=[1, None]), "holds a null, which is not FP32"),
        (one(data=[1, "2"]), "holds a string, which is not FP32"),
        (one(data=[1, True]), "holds a boolean, which is not FP32"),
        (one(data=[1, {}]), "holds a JSON object"),
        (one(data=[1, 1e39]), "that FP32 cannot hold"),
        (one(datatype="FP16", data=[1, 70_000]), "that FP16 cannot hold"),
        (one(datatype="UINT8", data=[1, 256]), "outside UINT8: 0 to 255"),
        (one(datatype="INT8", data=[1, -129]), "outside INT8"),
        (one(datatype="INT64", data=[1, 1.0]), "holds a float, which is not INT64"),
        (one(datatype="BOOL", data=[1, 0]), "which is not BOOL"),
        (one(datatype="BYTES", data=["a", 1]), "must hold strings alone"),
        (one(datatype="BYTES", data=["a", {"b64": ""}]), "must hold strings alone"),
        (one(datatype="BYTES", data=[{"b64": 1}, {"b64": ""}]), "must hold strings alone"),
        (one(datatype="BYTES", data=[{"b64": "§"}, {"b64": ""}]), "not base64"),
        (one(parameters={"binary_data_size": 8}), "both data and a binary_data_size"),
        (binary(8), "0 bytes are left"),
    ],
)
def test_malformed_requests(message: Any, problem: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        decode(message)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "raw", "problem"),
    [
        (binary(8), bytes(7), "7 bytes are left"),
        (binary(7), bytes(7), "7 bytes, its shape [2] needs 8"),
        (binary(8), bytes(9), "1 bytes after the JSON do not belong to an input"),
        (one(), bytes(1), "1 bytes after the JSON"),
        (binary(-1), bytes(8), "must be a size in bytes"),
        (binary(8.0), bytes(8), "must be a size in bytes"),
        (binary(True), bytes(8), "must be a size in bytes"),
        (binary(2**63), bytes(8), "8 bytes are left"),
        (binary(8, datatype="BYTES"), b"\xff\xff\xff\x7f" + bytes(4), "cut off"),
        (binary(3, datatype="BYTES"), bytes(3), "cut off"),
        (binary(4, datatype="BYTES"), bytes(4), "holds 1 strings, its shape [2] needs 2"),
    ],
)
def test_malformed_raw_tensors(message: Any, raw: bytes, problem: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        decode(message, raw)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        one(shape=[0, 2**62], data=[]),
        one(shape=[2**63], data=[]),
        one(datatype="FP64", shape=[2**17 + 1]),
        one(datatype="BYTES", shape=[17], data=["a"] * 17),
    ],
)
def test_tensors_beyond_the_limits(message: Any) -> None:
    with pytest.raises(TooLargeError):
        decode(message)


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_shared_memory_is_unsupported(where: str) -> None:
    parameters = {"shared_memory_region": "one", "shared_memory_byte_size": 8}
    message = {**one(), "outputs": [{"name": "logits"}]}
    message[where][0]["parameters"] = parameters
    with pytest.raises(UnsupportedError, match="shared memory"):
        decode(message)


def test_empty_batches_are_well_formed() -> None:
    assert decode(one(shape=[0, 3], data=[]))[0].inputs[0].data.shape == (0, 3)
    assert decode(binary(0, shape=[0, 3]), binary=True)[0].inputs[0].data.shape == (0, 3)


@pytest.mark.parametrize("value", ["-1", "1e3", "", "９", "11", "9" * 25, " 3"])
def test_header_lengths_that_are_none(value: str) -> None:
    with pytest.raises(BadRequestError, match="Inference-Header-Content-Length"):
        header_length(value, 10)


def test_header_lengths() -> None:
    assert header_length(None, 10) is None
    assert header_length("10", 10) == 10


@pytest.mark.parametrize("form", [OutputForm(), OutputForm(True), OutputForm(True, {"b": False})])
def test_answers_are_read_by_the_client(form: OutputForm) -> None:
    outputs = [
        OutputTensor("a", "FP32", np.array([[1.5, np.finfo(np.float32).min]], np.float32)),
        OutputTensor("b", "BYTES", bytes_array(["x", "ö"], (2, 1))),
        OutputTensor("c", "FP16", np.array([0.5], np.float16)),
        OutputTensor("d", "BYTES", bytes_array([], (0,))),
        OutputTensor("e", "BOOL", np.array([True])),
        OutputTensor("f", "FP32", np.arange(6, dtype=np.float32).reshape(2, 3).T),
    ]
    encoded = encode_response(InferResponse("m", "v", "", outputs, {"note": 1}), form)
    result = InferResult.from_response_body(encoded.body, header_length=encoded.header_length)
    assert "id" not in result.get_response()
    assert result.get_response()["parameters"] == {"note": 1}
    for output in outputs:
        found = result.as_numpy(output.name)
        expected = output.data if form.binary(output.name) or output.datatype != "BYTES" else None
        if expected is None:
            assert found.ravel().tolist() == [value.decode() for value in output.data.ravel()]
        else:
            np.testing.assert_array_equal(found, expected)
        assert found.shape == output.data.shape


def test_the_clients_own_bodies_are_read() -> None:
    images = np.array([b"\x00\xff", b""], dtype=np.object_)
    image = InferInput("image", [2], "BYTES")
    image.set_data_from_numpy(images)
    body, length = InferenceServerClient.generate_request_body([image], request_id="9")
    request, form = decode_request(body, length, TARGET, LIMITS)
    assert request.inputs[0].data.tolist() == images.tolist()
    assert not request.inputs[0].text
    assert (request.id, form.default) == ("9", True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=40), st.none() | st.integers(0, 40))
def test_any_bytes_are_read_or_refused(body: bytes, length: int | None) -> None:
    with pytest.raises(ServeError):
        decode_request(body, length, TARGET, LIMITS)


def test_only_names_may_be_loaded() -> None:
    refuse_overrides(["unload_dependents"])
    for name in ("config", "file:1/model.onnx", "other"):
        with pytest.raises(BadRequestError, match="server's own folder"):
            refuse_overrides([name])


def test_configuration_keeps_a_plain_row_dimension() -> None:
    metadata = ModelMetadata("m", ["v"], "p", [TensorMetadata("image", "BYTES", [-1])], [], ["a"])
    assert config_values(metadata, 4)["input"] == [
        {"name": "image", "data_type": "TYPE_STRING", "dims": [1], "reshape": {"shape": []}}
    ]


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("deflate, gzip", "gzip"),
        ("br, GZIP;q=0.8", "gzip"),
        ("gzip;q=0, deflate;q=0.000", None),
        ("identity", None),
    ],
)
def test_accepted_encodings(accept: str, encoding: str | None) -> None:
    assert accepted_encoding(accept) == encoding
