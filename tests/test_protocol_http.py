"""The HTTP transport: the binary extension, compression, limits, clients that leave, pages and documentation."""

from __future__ import annotations

import asyncio
import base64
import gzip
import http.client
import json
import shutil
import socket
import subprocess
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from tritonclient.utils import InferenceServerException

from prompttune.serve.limits import Limits
from prompttune.serve.messages import TooLargeError, UnavailableError
from prompttune.serve.protocol.body import decompress
from prompttune.serve.protocol.rest import rest_application
from prompttune.serve.protocol.settings import TransportSettings
from tests.fake_service import VERSION, WAIT_S, FakeService, Running, serving
from tests.malformed import CHANGES, HEADER_LENGTHS, RAW, changed
from tests.protocol_clients import IMAGE, LOGITS, Client, connected

LIMIT = 2**20
INFER = "/v2/models/pets/infer"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "index.html").write_text("<!doctype html><title>tasks</title>")
    (folder / "page.js").write_text("1;")
    (folder.parent / "secret.txt").write_text("secret")
    return folder


@pytest.fixture(scope="module")
def running(page: Path) -> Iterator[Running]:
    limits = Limits(body_bytes=LIMIT)
    with serving(TransportSettings(limits, page=page, head_seconds=0.5, body_seconds=0.5)) as servers:
        yield servers


@pytest.fixture
def service(running: Running) -> Iterator[FakeService]:
    running.service.requests.clear()
    yield running.service
    running.service.error = None


@pytest.fixture
def client(running: Running, service: FakeService) -> Iterator[Client]:
    with connected("http", running) as one:
        yield one


def ask(
    running: Running, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of one request."""
    connection = http.client.HTTPConnection(running.http, timeout=WAIT_S)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def message(**changes: Any) -> bytes:
    tensor = {"name": "image", "shape": [1, 2], "datatype": "FP32", "data": [1, 2], **changes}
    return json.dumps({"inputs": [{key: value for key, value in tensor.items() if value is not None}]}).encode()


@pytest.mark.parametrize("binary_in", [False, True])
@pytest.mark.parametrize("binary_out", [False, True])
@pytest.mark.parametrize("encoding", [None, "gzip", "deflate"])
def test_json_and_binary_tensors(
    client: Client, service: FakeService, binary_in: bool, binary_out: bool, encoding: str | None
) -> None:
    images = np.repeat(IMAGE, 60, axis=0)
    result = client.infer(
        "pets",
        [client.image(images, binary_data=binary_in)],
        outputs=[client.output(name, binary_data=binary_out) for name in ("logits", "label")],
        request_compression_algorithm=encoding,
        response_compression_algorithm=encoding,
    )
    np.testing.assert_array_equal(result.as_numpy("logits"), np.repeat(LOGITS, 60, axis=0))
    assert result.as_numpy("label").shape == (120, 1)
    assert ("data" in result.get_output("logits")) is not binary_out
    assert service.requests[0].outputs[1].name == "label"


def test_answers_are_compressed_when_asked(running: Running, service: FakeService) -> None:
    body = message(shape=[400, 1], data=[1.5] * 400)
    plain = ask(running, "POST", INFER, body)
    for encoding, read in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        status, headers, content = ask(running, "POST", INFER, body, {"Accept-Encoding": f"br, {encoding};q=0.5"})
        assert (status, headers["content-encoding"]) == (200, encoding)
        assert len(content) < len(plain[2])
        assert read(content) == plain[2]
    assert "content-encoding" not in ask(running, "POST", INFER, body, {"Accept-Encoding": "gzip;q=0"})[1]


def test_asynchronous_requests(client: Client) -> None:
    waiting = [client.async_infer("pets", [client.image()]) for _ in range(4)]
    for one in waiting:
        np.testing.assert_array_equal(one.get_result(timeout=WAIT_S).as_numpy("logits"), LOGITS)


def test_bodies_made_and_read_without_a_connection(client: Client, running: Running) -> None:
    body, header_length = client.generate_request_body([client.image()])
    headers = {"Inference-Header-Content-Length": str(header_length)}
    status, answered, content = ask(running, "POST", INFER, body, headers)
    assert status == 200
    length = int(answered["inference-header-content-length"])
    result = triton.InferenceServerClient.parse_response_body(content, header_length=length)
    np.testing.assert_array_equal(result.as_numpy("logits"), LOGITS)


def test_a_large_binary_tensor_is_not_copied(client: Client, service: FakeService) -> None:
    client.infer("pets", [client.image(np.ones((1, 3, 200, 200), np.float32))])
    received = service.requests[0].inputs[0].data
    assert not received.flags.owndata
    assert received.sum() == 120_000


def test_curl_with_base64(running: Running, service: FakeService, tmp_path: Path) -> None:
    image = bytes(range(256))
    text = base64.b64encode(image).decode()
    body = message(shape=[2], datatype="BYTES", data=[text, f"data:image/png;base64,{text}"])
    curl = shutil.which("curl")
    if curl:
        (tmp_path / "body.json").write_bytes(body)
        command = [
            curl,
            "-sS",
            "-m",
            "10",
            "--data-binary",
            f"@{tmp_path / 'body.json'}",
            f"http://{running.http}{INFER}",
        ]
        answer = subprocess.run(command, capture_output=True, check=True, timeout=WAIT_S).stdout
    else:
        answer = ask(running, "POST", INFER, body)[2]
    assert json.loads(answer)["outputs"][1]["data"] == ["bird", "cät"]
    assert service.requests[0].inputs[0].text
    assert service.requests[0].inputs[0].data[0] == text.encode()
    ask(running, "POST", INFER, message(shape=[1], datatype="BYTES", data=[{"b64": text}]))
    assert not service.requests[1].inputs[0].text
    assert service.requests[1].inputs[0].data[0] == image


def test_request_ids(running: Running, service: FakeService) -> None:
    _, headers, content = ask(running, "POST", INFER, message())
    assert "id" not in json.loads(content)
    assert len(headers["x-request-id"]) == 32
    _, headers, content = ask(running, "POST", INFER, message(), {"X-Request-Id": "mine-1"})
    assert json.loads(content)["id"] == headers["x-request-id"] == "mine-1"
    _, _, content = ask(running, "POST", INFER, b'{"id": "body",' + message()[1:], {"X-Request-Id": "mine-1"})
    assert json.loads(content)["id"] == "body"
    strange = "日本\r\nX-Injected: 1"
    status, headers, content = ask(
        running, "POST", INFER, json.dumps({**json.loads(message()), "id": strange}).encode()
    )
    assert (status, json.loads(content)["id"]) == (200, strange)
    assert "x-injected" not in headers
    _, headers, _ = ask(running, "POST", INFER, message(), {"X-Request-Id": "two words"})
    assert len(headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nothing", None, 404),
        ("GET", "/v2/models/a/b/c", None, 404),
        ("GET", "/v2/models/..%2f..%2fetc", None, 404),
        ("GET", "/v2/models/nothing", None, 404),
        ("GET", "/page/nothing.js", None, 404),
        ("DELETE", "/v2", None, 405),
        ("GET", INFER, None, 405),
        ("POST", INFER, b"", 400),
        ("POST", INFER, b"[]", 400),
        ("POST", "/v2/repository/index", b'{"ready": 1}', 400),
        ("POST", "/v2/repository/models/pets/load", b"", 403),
    ],
)
def test_errors_have_the_protocols_form(running: Running, method: str, path: str, body: bytes, status: int) -> None:
    found, headers, content = ask(running, method, path, body)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert list(json.loads(content)) == ["error"]


def test_unavailable_says_when_to_come_again(running: Running, service: FakeService) -> None:
    service.error = UnavailableError("the queue is full", retry_after_s=2.5)
    status, headers, _ = ask(running, "POST", INFER, message())
    assert (status, headers["retry-after"]) == (503, "3")


@pytest.mark.parametrize("path", ["/page/../secret.txt", "/page/%2e%2e/secret.txt", "/page/..%2fsecret.txt"])
def test_no_path_leaves_the_pages_folder(running: Running, path: str) -> None:
    status, _, content = ask(running, "GET", path)
    assert status == 404
    assert b"secret" not in content.replace(b"secret.txt", b"")


def test_page_and_documentation_work_offline(running: Running) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/page/page.js", "javascript"),
        ("/docs", "text/html"),
        ("/docs/start.js", "javascript"),
        ("/docs/assets/swagger-ui-bundle.js", "javascript"),
        ("/docs/assets/swagger-ui.css", "text/css"),
    ):
        status, headers, content = ask(running, "GET", path)
        assert status == 200
        assert kind in headers["content-type"]
        assert headers["content-security-policy"].startswith("default-src 'self'; object-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"
        if path in ("/", "/docs"):
            assert b"://" not in content
            assert b"<script>" not in content


def test_data_of_the_page_and_metrics(running: Running) -> None:
    assert json.loads(ask(running, "GET", "/status")[2])["engine"] == "fake"
    assert json.loads(ask(running, "GET", "/status/tasks")[2]) == [{"name": "pets", "state": "READY"}]
    status, headers, content = ask(running, "GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    assert b"prompttune_requests_total 1.0" in content


def test_openapi_describes_the_protocol(running: Running) -> None:
    document = json.loads(ask(running, "GET", "/openapi.json")[2])
    infer = document["paths"]["/v2/models/{model}/infer"]["post"]
    content = infer["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/InferenceRequest"}
    assert content["example"]["inputs"][0]["name"] == "image"
    assert "inputs" in document["components"]["schemas"]["InferenceRequest"]["properties"]
    assert infer["responses"]["503"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorMessage")
    assert infer["security"]


def test_a_declared_size_is_refused_at_once(running: Running) -> None:
    with socket.create_connection(running.http.split(":"), timeout=WAIT_S) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_stream_is_refused_when_it_grows_too_long(running: Running) -> None:
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    with socket.create_connection(running.http.split(":"), timeout=WAIT_S) as connection:
        connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(LIMIT // 65536 + 1):
            connection.sendall(chunk)
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_clients_see_the_size_limit(client: Client) -> None:
    with pytest.raises(InferenceServerException, match=rf"exceeds {LIMIT} bytes") as caught:
        client.infer("pets", [client.image(np.zeros((8, 3, 224, 224), np.float32))])
    assert caught.value.status() == "413"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_decompression_bombs_are_refused(running: Running, service: FakeService, encoding: str) -> None:
    pack = gzip.compress if encoding == "gzip" else zlib.compress
    bomb = pack(b" " * 50 * LIMIT)
    status, _, content = ask(running, "POST", INFER, bomb, {"Content-Encoding": encoding})
    assert (status, b"decompressed request" in content) == (413, True)
    for damaged in (pack(message())[:-3], b"nonsense", pack(message()) + b"more"):
        assert ask(running, "POST", INFER, damaged, {"Content-Encoding": encoding})[0] == 400
    assert ask(running, "POST", INFER, message(), {"Content-Encoding": "br"})[0] == 415
    assert service.requests == []


def test_a_bomb_costs_no_more_than_the_limit() -> None:
    bomb = bytearray(gzip.compress(bytes(50 * LIMIT)))
    tracemalloc.start()
    try:
        with pytest.raises(TooLargeError):
            decompress(bomb, Limits(body_bytes=LIMIT))
        assert tracemalloc.get_traced_memory()[1] < 4 * LIMIT
    finally:
        tracemalloc.stop()


def test_answers_leave_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Nagle's algorithm an answer would wait 40 ms for the client to acknowledge its headers."""
    seen = []
    send = asyncio.selector_events._SelectorSocketTransport.write  # type: ignore[attr-defined]

    def write(transport: Any, data: bytes) -> None:
        connection = transport.get_extra_info("socket")
        if data.startswith(b"HTTP/1.1 200"):
            seen.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        send(transport, data)

    monkeypatch.setattr(asyncio.selector_events._SelectorSocketTransport, "write", write)  # type: ignore[attr-defined]
    with serving() as running:
        assert ask(running, "GET", "/v2/health/live")[0] == 200
    assert seen
    assert all(seen)


def test_a_client_that_stops_sending_is_let_go(running: Running) -> None:
    address = running.http.split(":")
    with socket.create_connection(address, timeout=WAIT_S) as head, socket.create_connection(address, WAIT_S) as body:
        head.sendall(b"GET /v2 HTTP/1.1\r\nHost:")
        body.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{{".encode())
        assert head.recv(4096) == b""
        assert b" 408 " in body.recv(4096).split(b"\r\n")[0]


def test_a_head_without_end_is_refused(running: Running) -> None:
    with socket.create_connection(running.http.split(":"), timeout=WAIT_S) as connection:
        connection.sendall(b"GET /v2 HTTP/1.1\r\nX-Long: " + b"a" * 100_000)
        assert b" 400 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_client_that_leaves_cancels_its_request(running: Running, service: FakeService) -> None:
    service.started.clear()
    service.cancelled.clear()
    connection = socket.create_connection(running.http.split(":"), timeout=WAIT_S)
    body = b'{"id": "slow",' + message()[1:]
    connection.sendall(f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert service.started.wait(WAIT_S)
    connection.close()
    assert service.cancelled.wait(WAIT_S)


def test_version_in_the_path(running: Running, service: FakeService) -> None:
    status, _, content = ask(running, "POST", f"/v2/models/pets/versions/{VERSION}/infer", message())
    assert (status, json.loads(content)["model_version"]) == (200, VERSION)
    assert service.requests[0].version == VERSION


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    changes=CHANGES,
    raw=RAW,
    header_length=HEADER_LENGTHS,
)
def test_malformed_requests_are_the_clients_fault(
    running: Running, changes: Any, raw: bytes, header_length: str
) -> None:
    text = json.dumps(changed(changes)).encode()
    length = str(len(text)) if header_length == "right" else header_length
    headers = {"Inference-Header-Content-Length": length} if length else {}
    status, _, content = ask(running, "POST", INFER, text + raw, headers)
    assert status in (200, 400, 413, 501)
    if status != 200:
        problem = json.loads(content)["error"]
        assert "\n" not in problem
        assert len(problem) < 400


schema = schemathesis.openapi.from_asgi("/openapi.json", rest_application(FakeService(), TransportSettings()))


@schema.exclude(path_regex="^/v2/(models|repository/models)/.*(register|setting)|shared|logging|trace").parametrize()
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_requests_from_the_schema(case: Any) -> None:
    answer = case.call()
    assert answer.status_code < 500
    if answer.status_code >= 400:
        assert list(answer.json()) == ["error"]
