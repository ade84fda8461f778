"""A real server under what strangers send: nothing but the clients' errors comes back, and memory stays flat."""

import base64
import contextlib
import http.client
import io
import json
import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from benchmarks.serve.serving import launched
from tests.engines import exported
from tests.malformed import CHANGES, HEADER_LENGTHS, RAW, changed
from tests.serving import noise
from tests.test_serve_images import png_bomb

INFER = "/v2/models/task0/infer"
BODY_LIMIT = 2 * 2**20
GROWTH = 0.05
"""Of the resident set, by which a second round of the same may grow it at most."""


@pytest.fixture(scope="module")
def server():
    with launched(exported("sa2vp"), "--allow-control", "--max-body", str(BODY_LIMIT), "--max-images", "64") as running:
        yield running
        assert running.process.poll() is None
        assert running.status()["workers"][0]["restarts"] == 0


def ask(server, method, path, body=b"", headers=None):
    host, port = server.http.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()


def refused(server, method, path, body=b"", headers=None):
    """The status of a request that must be the client's fault, with one line that says why."""
    status, content = ask(server, method, path, body, headers)
    assert 400 <= status < 500, (status, content)
    problem = json.loads(content)["error"]
    assert problem
    assert "\n" not in problem
    return status


def image_request(data, datatype="BYTES", shape=(1,)):
    return json.dumps({"inputs": [{"name": "image", "datatype": datatype, "shape": shape, "data": data}]}).encode()


def picture(form="JPEG", size=(64, 48)):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)).save(stream, form)
    return stream.getvalue()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes=CHANGES, raw=RAW, header_length=HEADER_LENGTHS)
def test_malformed_requests_are_the_clients_fault(server, changes, raw, header_length):
    text = json.dumps(changed(changes)).encode()
    length = str(len(text)) if header_length == "right" else header_length
    headers = {"Inference-Header-Content-Length": length} if length else {}
    status, content = ask(server, "POST", INFER, text + raw, headers)
    assert 400 <= status < 500 or status == 501, (status, content)


def hostile_images():
    whole = picture()
    yield from (whole[:length] for length in range(0, len(whole), max(1, len(whole) // 12)))
    for form in ("PNG", "WEBP"):
        whole = picture(form)
        yield from (whole[:length] for length in range(0, len(whole), max(1, len(whole) // 6)))
    yield png_bomb(40_000, 40_000)
    yield png_bomb(2**31 - 1, 2**31 - 1)
    yield b"GIF89a" + b"\0" * 64
    yield b"<svg xmlns='http://www.w3.org/2000/svg'/>"
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"\0" * 64
    yield b"\xff\xd8\xff" * 1000


def test_hostile_images_are_refused_by_name(server):
    for content in hostile_images():
        assert refused(server, "POST", INFER, image_request([base64.b64encode(content).decode()])) in (400, 413)
    status, _ = ask(server, "POST", INFER, image_request([base64.b64encode(picture()).decode()]))
    assert status == 200


@pytest.mark.parametrize(
    "name",
    ["..", "../task0", "%2e%2e%2ftask0", "..%2f..%2fetc%2fpasswd", "task0%00", "task0/../../x", "%2Fetc", "a" * 4000],
)
def test_no_name_reaches_a_path(server, name):
    for method, path in (
        ("POST", f"/v2/models/{name}/infer"),
        ("GET", f"/v2/models/{name}"),
        ("POST", f"/v2/repository/models/{name}/load"),
        ("POST", f"/v2/repository/models/{name}/unload"),
        ("GET", f"/page/{name}"),
    ):
        status, content = ask(server, method, path, b"{}")
        assert 400 <= status < 500, (method, path, status, content)
        assert b"root:" not in content


def test_bodies_beyond_the_limit_are_refused(server):
    declared = {"Content-Length": str(10**12)}
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {declared['Content-Length']}\r\n\r\n"
        raw.sendall(head.encode())
        assert b" 413 " in raw.recv(200)
    assert refused(server, "POST", INFER, b" " * (BODY_LIMIT + 1)) == 413
    assert refused(server, "POST", INFER, image_request([0.0] * 65 * 12, "FP32", [65, 3, 2, 2])) in (400, 413)


def test_memory_stays_flat(server):
    """The same again and again grows nothing; the first rounds fill caches and arenas."""
    images = [image_request([base64.b64encode(content).decode()]) for content in hostile_images()]
    good = image_request(noise(1).ravel().tolist(), "FP32", list(noise(1).shape))

    def round_of_all():
        for body in (*images, good, b"{", b"[" * 100_000, b" " * (BODY_LIMIT + 1)):
            ask(server, "POST", INFER, body)
        for number in range(50):
            ask(server, "GET", f"/v2/models/nobody{number}")

    for _ in range(4):
        round_of_all()
    before = server.resident_bytes()
    for _ in range(8):
        round_of_all()
    assert server.resident_bytes() < before * (1 + GROWTH)
    assert not any("nobody" in entry["name"] for entry in server.get("/status/tasks"))


def test_the_log_of_a_server_holds_no_token(tmp_path: Path):
    secret = "a-token-that-nobody-may-see"
    (tmp_path / "tokens").write_text(f"{secret}\n")
    (tmp_path / "tokens").chmod(0o600)
    log = tmp_path / "log"
    with launched(
        exported("sa2vp"), "--token-file", str(tmp_path / "tokens"), "--log-level", "debug", log=log
    ) as running:
        assert ask(running, "GET", f"/v2/models/task0?token={secret}")[0] == 401
        assert ask(running, "GET", "/v2/models/task0", headers={"Authorization": f"Bearer {secret}"})[0] == 200
        assert ask(running, "GET", "/v2/models/task0", headers={"Authorization": f"Bearer {secret}x"})[0] == 401
    assert log.read_text()
    assert secret not in log.read_text()
