"""Every call of tritonclient's four clients against the real transports."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from prompttune.serve import messages as types
from prompttune.serve.messages import ServeError
from prompttune.serve.protocol.security import Guard
from prompttune.serve.protocol.settings import TransportSettings
from tests.fake_service import LABELS, VERSION, FakeService, Running, serving
from tests.protocol_clients import IMAGE, LOGITS, MODULES, Client, connected

NOT_CALLED = {
    "plugin": "returns the client's own plugin; nothing is sent",
    "register_plugin": "client side alone: adds headers, which test_protocol_security sends itself",
    "unregister_plugin": "client side alone",
}
ERRORS = [one for one in vars(types).values() if isinstance(one, type) and issubclass(one, ServeError)]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving(TransportSettings(guard=Guard(control=True))) as servers:
        yield servers


@pytest.fixture
def service(running: Running) -> Iterator[FakeService]:
    running.service.requests.clear()
    yield running.service
    running.service.error = None
    running.service.is_ready = True
    running.service.loaded = {"pets"}


@pytest.fixture(params=sorted(MODULES))
def client(request: pytest.FixtureRequest, running: Running, service: FakeService) -> Iterator[Client]:
    with connected(request.param, running) as one:
        yield one


def _called(sources: str) -> set[str]:
    """Names that the tests call, or hand as a string to something that calls them."""
    return set(re.findall(r'[."](\w+)["(]', sources))


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_no_method_of_the_client_is_forgotten(kind: str) -> None:
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_protocol_*.py"))
    methods = [name for name in dir(MODULES[kind].InferenceServerClient) if not name.startswith("_")]
    called = _called(sources)
    assert [name for name in methods if name not in called and name not in NOT_CALLED] == []
    assert "infer" in methods


def test_health(client: Client, service: FakeService) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("pets")
    assert client.is_model_ready("pets", VERSION)
    assert not client.is_model_ready("pets", "other")
    assert not client.is_model_ready("nothing")
    service.is_ready = False
    assert not client.is_server_ready()


def test_metadata_and_configuration(client: Client) -> None:
    server = client.values("get_server_metadata")
    assert (server["name"], server["version"]) == ("prompttune", "1.2.3")
    assert "binary_tensor_data" in server["extensions"]
    model = client.values("get_model_metadata", "pets", VERSION)
    assert model["versions"] == [VERSION]
    assert [int(size) for size in model["inputs"][0]["shape"]] == [-1, 3, 4, 4]
    config = client.values("get_model_config", "pets")
    config = config if client.is_http else config["config"]
    assert config["max_batch_size"] == TransportSettings().limits.rows
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert [int(size) for size in config["input"][0]["dims"]] == [3, 4, 4]
    assert config["output"][1]["reshape"].get("shape", []) == []
    assert config["parameters"]["labels"]["string_value"] == '["cat","dog","bird"]'
    with pytest.raises(InferenceServerException, match="no model 'nothing'"):
        client.get_model_metadata("nothing")


def test_statistics(client: Client) -> None:
    for found in (
        client.values("get_inference_statistics"),
        client.values("get_inference_statistics", "pets", VERSION),
    ):
        one = found["model_stats"][0]
        assert one["name"] == "pets"
        assert int(one["inference_stats"]["success"]["ns"]) == 250_000_000
        assert int(one["batch_stats"][0]["batch_size"]) == 4
    with pytest.raises(InferenceServerException, match="no model"):
        client.get_inference_statistics("nothing")


def test_repository(client: Client) -> None:
    index = client.values("get_model_repository_index")
    entries = index if client.is_http else index["models"]
    assert [(one["name"], one["state"]) for one in entries] == [("pets", "READY"), ("idle", "UNAVAILABLE")]
    client.load_model("plants")
    assert client.is_model_ready("plants")
    client.unload_model("plants", unload_dependents=True)
    assert not client.is_model_ready("plants")
    with pytest.raises(InferenceServerException, match="no task 'missing'"):
        client.load_model("missing")


def test_a_model_cannot_bring_its_configuration(client: Client, service: FakeService) -> None:
    with pytest.raises(InferenceServerException, match=r"parameter 'config' is not accepted.*server's own folder"):
        client.load_model("plants", config="{}")
    assert service.loaded == {"pets"}


@pytest.mark.parametrize("request_id", ["", "abc-1"])
def test_infer(client: Client, service: FakeService, request_id: str) -> None:
    result = client.infer(
        "pets", [client.image()], request_id=request_id, parameters={"top_k": 2}, priority=3, timeout=5_000_000
    )
    np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS)
    assert result.as_numpy("label").tolist() == [[b"bird"], ["cät".encode()]]
    response = result.get_response()
    assert (response.get("id", "") if client.is_http else response.id) == request_id
    assert (response["model_version"] if client.is_http else response.model_version) == VERSION
    assert service.requests[0].parameters == {"top_k": 2, "priority": 3, "timeout": 5_000_000}


def test_infer_names_version_and_outputs(client: Client, service: FakeService) -> None:
    result = client.infer(
        "pets", [client.image()], model_version=VERSION, outputs=[client.output("logits", class_count=2)]
    )
    assert result.as_numpy("label") is None
    assert [(one.name, one.classification) for one in service.requests[0].outputs] == [("logits", 2)]
    with pytest.raises(InferenceServerException, match="version 'other'"):
        client.infer("pets", [client.image()], model_version="other")


def test_infer_takes_encoded_images(client: Client, service: FakeService) -> None:
    images = np.array([b"\x00\xff", b"", b"PNG\x00"], dtype=np.object_)
    result = client.infer("pets", [client.image(images, "BYTES")])
    assert result.as_numpy("logits")[:, 0].tolist() == [2, 0, 4]
    sent = service.requests[0].inputs[0]
    assert sent.data.tolist() == images.tolist()
    assert not sent.text


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT16", "INT64", "UINT64", "FP16", "FP64"])
def test_infer_takes_every_datatype(client: Client, service: FakeService, datatype: str) -> None:
    from tritonclient.utils import triton_to_np_dtype

    values = np.array([[1, 0, 1]], dtype=triton_to_np_dtype(datatype))
    client.infer("pets", [client.image(values, datatype)])
    received = service.requests[0].inputs[0].data
    assert received.dtype == values.dtype
    np.testing.assert_array_equal(received, values)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_every_error_arrives(client: Client, service: FakeService, error: type[ServeError]) -> None:
    service.error = error("what to do")
    with pytest.raises(InferenceServerException, match="what to do") as caught:
        client.infer("pets", [client.image()])
    status = str(error.http_status) if client.is_http else f"StatusCode.{error.grpc_status}"
    assert caught.value.status() == status


def test_an_unexpected_error_shows_no_traceback(
    client: Client, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service.error = ZeroDivisionError("secret detail")
    with pytest.raises(InferenceServerException, match=r"internal error; the log has it under request \w+") as caught:
        client.infer("pets", [client.image()])
    text = str(caught.value)
    assert "secret" not in text
    assert "Traceback" not in text
    request_id = text.rsplit(" ", 1)[1]
    assert any(request_id in one.getMessage() and one.exc_info for one in caplog.records)


def test_trace_and_log_settings_can_be_read_only(client: Client) -> None:
    trace = client.values("get_trace_settings", "pets")
    assert (trace["trace_level"] if client.is_http else trace["settings"]["trace_level"]["value"]) == ["OFF"]
    log = client.values("get_log_settings")
    assert log["log_info"] if client.is_http else log["settings"]["log_info"]["bool_param"]
    for model in (None, "pets"):
        with pytest.raises(InferenceServerException, match="no Triton traces"):
            client.update_trace_settings(model, {"trace_level": ["TIMESTAMPS"]})
    with pytest.raises(InferenceServerException, match="fixed when the server starts"):
        client.update_log_settings({"log_verbose_level": 1})


SHARED_MEMORY = {
    "system": (
        "get_system_shared_memory_status",
        "register_system_shared_memory",
        "unregister_system_shared_memory",
        ("key", 16),
    ),
    "cuda": (
        "get_cuda_shared_memory_status",
        "register_cuda_shared_memory",
        "unregister_cuda_shared_memory",
        (b"aGFuZGxl", 0, 16),
    ),
}


@pytest.mark.parametrize("kind", SHARED_MEMORY)
def test_shared_memory_is_empty_and_stays_so(client: Client, kind: str) -> None:
    status, register, unregister, region = SHARED_MEMORY[kind]
    found = client.values(status)
    assert not (found if client.is_http else found.get("regions"))
    with pytest.raises(InferenceServerException, match="no shared memory region 'one'"):
        getattr(client, status)("one")
    with pytest.raises(InferenceServerException, match="does not accept shared memory"):
        getattr(client, register)("one", *region)
    getattr(client, unregister)()
    getattr(client, unregister)("one")


def test_a_tensor_in_shared_memory_is_refused(client: Client) -> None:
    image = client.module.InferInput("image", IMAGE.shape, "FP32")
    image.set_shared_memory("one", IMAGE.nbytes)
    with pytest.raises(InferenceServerException, match="shared memory"):
        client.infer("pets", [image])


def test_labels_are_in_the_metadata(running: Running) -> None:
    with connected("http", running) as client:
        assert client.get_model_metadata("pets")["labels"] == list(LABELS)
