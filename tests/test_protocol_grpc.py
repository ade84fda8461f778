"""The gRPC transport: typed contents, streams, deadlines, cancellation, limits."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from prompttune.serve.limits import Limits
from prompttune.serve.messages import UnavailableError
from prompttune.serve.protocol.grpc_calls import answer_stream
from prompttune.serve.protocol.logs import RequestRecord
from prompttune.serve.protocol.settings import TransportSettings
from tests.fake_service import WAIT_S, FakeService, Running, serving
from tests.protocol_clients import IMAGE, LOGITS, Client, connected

LIMIT = 2**20


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(TransportSettings(Limits(body_bytes=LIMIT), stream_requests=4)) as servers:
        yield servers


@pytest.fixture
def service(running: Running) -> Iterator[FakeService]:
    service = running.service
    service.requests.clear()
    service.hold = None
    service.started.clear()
    service.cancelled.clear()
    yield service
    service.error = None


@pytest.fixture
def client(running: Running, service: FakeService) -> Iterator[Client]:
    with connected("grpc", running) as one:
        yield one


@pytest.fixture
def stub(running: Running, service: FakeService) -> Iterator[Any]:
    with grpc.insecure_channel(running.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def request(datatype: str = "FP32", shape: tuple[int, ...] = (1, 2), **contents: Any) -> Any:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype=datatype, shape=shape)
    for key, value in contents.items():
        getattr(tensor.contents, key).extend(value)
    return service_pb2.ModelInferRequest(model_name="pets", inputs=[tensor])


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-128, 127]),
        ("INT64", "int64_contents", [-(2**63), 2]),
        ("UINT8", "uint_contents", [0, 255]),
        ("UINT64", "uint64_contents", [0, 2**64 - 1]),
        ("FP32", "fp32_contents", [0.5, -1.0]),
        ("FP64", "fp64_contents", [0.5, 1e30]),
        ("BYTES", "bytes_contents", [b"\xff", b""]),
    ],
)
def test_typed_contents(stub: Any, service: FakeService, datatype: str, field: str, values: list[Any]) -> None:
    stub.ModelInfer(request(datatype, (1, 2), **{field: values}), timeout=WAIT_S)
    received = service.requests[0].inputs[0]
    assert received.datatype == datatype
    assert received.data.tolist() == [values]


def raw(*contents: bytes, **options: Any) -> Any:
    message = request(**options)
    message.raw_input_contents.extend(contents)
    return message


def twice() -> Any:
    message = request(fp32_contents=[1, 2])
    message.inputs.append(message.inputs[0])
    return message


def with_parameter(**values: Any) -> Any:
    message = request(fp32_contents=[1, 2])
    message.inputs[0].parameters["shared_memory_region"].string_param = "one"
    return message


def empty_parameter() -> Any:
    message = request(fp32_contents=[1, 2])
    message.parameters["top_k"].SetInParent()
    return message


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (service_pb2.ModelInferRequest(model_name="pets"), "no inputs"),
        (request(fp32_contents=[1]), "1 values, its shape"),
        (request(), "0 values, its shape"),
        (request("FP8", fp32_contents=[1, 2]), "unknown datatype 'FP8'"),
        (request("FP16", fp32_contents=[1, 2]), "only raw_input_contents"),
        (request("FP32", fp64_contents=[1, 2]), "into fp32_contents alone"),
        (request("UINT8", uint_contents=[1, 256]), "outside UINT8"),
        (request(shape=(-1, 2), fp32_contents=[1, 2]), "the dimension -1"),
        (request(shape=(2**40, 2**40), fp32_contents=[1, 2]), "would hold"),
        (request(shape=(0, 2**62)), "would hold"),
        (request("BYTES", (10_000,)), "the limit is 256 strings"),
        (raw(bytes(8), bytes(8)), "1 inputs and 2 raw_input_contents"),
        (raw(bytes(7)), "7 bytes, its shape"),
        (raw(bytes(8), fp32_contents=[1, 2]), "both contents and raw_input_contents"),
        (raw(b"\xff\xff\xff\xff", datatype="BYTES", shape=(1,)), "cut off"),
        (raw(b"\x01", datatype="BYTES", shape=(1,)), "cut off"),
        (raw(bytes(8), datatype="BYTES", shape=(1,)), "2 strings, its shape"),
        (twice(), "given twice"),
        (empty_parameter(), "has no value"),
    ],
)
def test_malformed_requests(stub: Any, message: Any, problem: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(message, timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert problem in caught.value.details()


def test_shared_memory_is_unimplemented(stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(with_parameter(), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_raw_tensor_is_not_copied(stub: Any, service: FakeService) -> None:
    stub.ModelInfer(raw(bytes(8)), timeout=WAIT_S)
    received = service.requests[0].inputs[0].data
    assert isinstance(received.base, np.ndarray)
    assert isinstance(received.base.base, bytes)


def test_asynchronous_requests(client: Client) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    for _ in range(4):
        client.async_infer("pets", [client.image()], callback=lambda result, error: answers.put((result, error)))
    for _ in range(4):
        result, error = answers.get(timeout=WAIT_S)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compression(client: Client, compression: str) -> None:
    result = client.infer("pets", [client.image()], compression_algorithm=compression)
    np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS)


def test_a_stream_answers_each_request_when_it_is_done(client: Client, running: Running, service: FakeService) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer("pets", [client.image()], request_id="slow", enable_empty_final_response=True)
    assert service.started.wait(WAIT_S)
    client.async_stream_infer("pets", [client.image()], request_id="quick")
    client.async_stream_infer("nothing", [client.image()], request_id="wrong")
    seen = {}
    for _ in range(2):
        result, error = answers.get(timeout=WAIT_S)
        seen["wrong" if error else result.get_response().id] = (result, error)
    assert set(seen) == {"quick", "wrong"}
    assert "no model 'nothing'" in str(seen["wrong"][1])
    running.release()
    result, error = answers.get(timeout=WAIT_S)
    response = result.get_response()
    assert (error, response.id) == (None, "slow")
    assert response.parameters["triton_final_response"].bool_param
    np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS)
    assert "triton_enable_empty_final_response" not in service.requests[0].parameters
    client.stop_stream()


def test_a_stream_reads_only_as_much_as_it_may_run() -> None:
    async def talk() -> tuple[int, int]:
        read = 0
        go, full = asyncio.Event(), asyncio.Event()

        async def messages() -> AsyncIterator[Any]:
            nonlocal read
            for _ in range(20):
                read += 1
                yield service_pb2.ModelInferRequest()

        async def answer(message: Any, record: RequestRecord) -> Any:
            nonlocal inside
            inside += 1
            if inside == 4:
                full.set()
            await go.wait()
            return service_pb2.ModelInferResponse()

        inside = 0
        answers = answer_stream(messages(), answer, limit=4)
        first = asyncio.create_task(anext(answers))
        await full.wait()
        await asyncio.sleep(0)
        waiting = read
        go.set()
        await first
        return waiting, 1 + len([one async for one in answers])

    waiting, answered = asyncio.run(asyncio.wait_for(talk(), WAIT_S))
    # The fifth is in hand while it waits for room.
    assert waiting == 5
    assert answered == 20


def test_a_stream_of_the_asynchronous_client(running: Running, service: FakeService) -> None:
    async def talk() -> list[str]:
        async with triton_aio.InferenceServerClient(running.grpc) as client:
            image = triton_aio.InferInput("image", IMAGE.shape, "FP32")
            image.set_data_from_numpy(IMAGE)

            async def requests() -> AsyncIterator[dict[str, Any]]:
                for index in range(20):
                    yield {"model_name": "pets", "inputs": [image], "request_id": str(index)}

            return [result.get_response().id async for result, error in client.stream_infer(requests()) if not error]

    assert sorted(map(int, asyncio.run(talk()))) == list(range(20))


def test_a_stream_that_ends_early_cancels_its_requests(client: Client, service: FakeService) -> None:
    client.start_stream(callback=lambda result, error: None)
    client.async_stream_infer("pets", [client.image()], request_id="slow")
    assert service.started.wait(WAIT_S)
    client.stop_stream(cancel_requests=True)
    assert service.cancelled.wait(WAIT_S)


def test_a_cancelled_call_cancels_its_request(stub: Any, service: FakeService) -> None:
    message = request(fp32_contents=[1, 2])
    message.id = "slow"
    call = stub.ModelInfer.future(message, timeout=WAIT_S)
    assert service.started.wait(WAIT_S)
    call.cancel()
    assert service.cancelled.wait(WAIT_S)


def test_the_deadline_reaches_the_service(client: Client, service: FakeService) -> None:
    client.infer("pets", [client.image()])
    client.infer("pets", [client.image()], client_timeout=5.0)
    without, with_ = (one.timeout_s for one in service.requests)
    assert without is None
    assert with_ is not None
    assert with_ == pytest.approx(5.0, abs=1.0)


def test_a_call_past_its_deadline_is_cancelled(client: Client, service: FakeService) -> None:
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("pets", [client.image()], request_id="slow", client_timeout=0.2)
    assert service.cancelled.wait(WAIT_S)


def test_unavailable_says_when_to_come_again(stub: Any, service: FakeService) -> None:
    service.error = UnavailableError("the queue is full", retry_after_s=2.5)
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request(fp32_contents=[1, 2]), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(caught.value.trailing_metadata())["retry-after"] == "2.5"


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_large_messages_are_refused(client: Client, service: FakeService, compression: str | None) -> None:
    image = client.image(np.zeros((20, 3, 224, 224), np.float32))
    with pytest.raises(InferenceServerException, match=r"larger than max") as caught:
        client.infer("pets", [image], compression_algorithm=compression)
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert service.requests == []
    assert client.is_server_live()


def test_large_typed_contents_are_read_off_the_loop(
    stub: Any, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prompttune.serve.protocol import grpc_codec

    threads = []
    decode = grpc_codec.decode_request

    def watched(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return decode(*arguments)

    monkeypatch.setattr(grpc_codec, "decode_request", watched)
    stub.ModelInfer(request(shape=(1, 2), fp32_contents=[1, 2]), timeout=WAIT_S)
    stub.ModelInfer(request(shape=(1, 50_000), fp32_contents=[1.0] * 50_000), timeout=WAIT_S)
    assert [name.startswith("decode") for name in threads] == [False, True]


def test_the_answer_has_no_id_where_the_request_has_none(client: Client) -> None:
    assert client.infer("pets", [client.image()]).get_response().id == ""
    assert isinstance(client.infer("pets", [client.image()]), triton.InferResult)
