"""Tokens, repository control, TLS, and what the logs do not say."""

from __future__ import annotations

import asyncio
import hmac
import http.client
import io
import json
import logging
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from prompttune.errors import UsageError
from prompttune.serve.messages import ForbiddenError, UnauthorizedError
from prompttune.serve.protocol.grpc_server import SERVICE, access_of
from prompttune.serve.protocol.logs import ACCESS, configure_logs
from prompttune.serve.protocol.security import Access, Guard, Tls, Tokens, read_tokens
from prompttune.serve.protocol.settings import TransportSettings
from tests.fake_service import WAIT_S, Running, serving
from tests.protocol_clients import MODULES, Client, connected

INFERENCE, CONTROL = "inference-secret", "control-secret"


def test_a_token_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# who\n\n  {INFERENCE}  \nöther\n")
    path.chmod(0o600)
    tokens = read_tokens(path)
    assert len(tokens) == 2
    assert INFERENCE in tokens
    assert "öther" in tokens
    assert "# who" not in tokens
    assert "" not in tokens
    assert caplog.records == []
    assert INFERENCE not in repr(tokens) + repr(vars(tokens))
    path.chmod(0o644)
    read_tokens(path)
    assert "chmod 600" in caplog.text
    assert INFERENCE not in caplog.text


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "no token"), (b"# a\n\n", "no token"), (b"a b\n", "space"), (b"\xff", "cannot read")]
)
def test_token_files_that_are_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(UsageError, match=problem):
        read_tokens(tmp_path / "tokens")
    with pytest.raises(UsageError, match="cannot read"):
        read_tokens(tmp_path / "nothing")


def test_every_token_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def watched(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return compare(left, right)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    tokens = Tokens(["first", "second", "third"])
    compared.clear()
    assert "first" in tokens
    assert len(compared) == 3
    assert {len(part) for pair in compared for part in pair} == {32}


def test_a_guard() -> None:
    guard = Guard(Tokens([INFERENCE]), Tokens([CONTROL]), control=True)
    guard.check(Access.OPEN, "")
    guard.check(Access.INFERENCE, f"bearer {INFERENCE}")
    guard.check(Access.CONTROL, f"Bearer {CONTROL}")
    for access, value in (
        (Access.INFERENCE, ""),
        (Access.INFERENCE, INFERENCE),
        (Access.INFERENCE, f"Basic {INFERENCE}"),
        (Access.INFERENCE, "Bearer "),
        (Access.INFERENCE, f"Bearer {CONTROL}"),
        (Access.INFERENCE, f"Bearer {INFERENCE}x"),
        (Access.CONTROL, f"Bearer {INFERENCE}"),
    ):
        with pytest.raises(UnauthorizedError) as caught:
            guard.check(access, value)
        assert "secret" not in str(caught.value)
    with pytest.raises(ForbiddenError, match="--allow-control"):
        Guard(control_tokens=Tokens([CONTROL])).check(Access.CONTROL, f"Bearer {CONTROL}")
    with pytest.raises(UsageError, match="set a token file for control"):
        Guard(Tokens([INFERENCE]), control=True)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    guard = Guard(Tokens([INFERENCE]), Tokens([CONTROL]), control=True)
    with serving(TransportSettings(guard=guard)) as servers:
        yield servers


@pytest.fixture(params=sorted(MODULES))
def client(request: pytest.FixtureRequest, running: Running) -> Iterator[Client]:
    with connected(request.param, running) as one:
        yield one


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def test_tokens_over_every_client(client: Client, running: Running) -> None:
    denied = "401" if client.is_http else "StatusCode.UNAUTHENTICATED"
    assert client.is_server_live()
    assert client.is_server_ready()
    for headers in (None, bearer("wrong"), bearer(CONTROL)):
        for call in (
            lambda headers=headers: client.infer("pets", [client.image()], headers=headers),
            lambda headers=headers: client.get_model_metadata("pets", headers=headers),
            lambda headers=headers: client.get_model_repository_index(headers=headers),
        ):
            with pytest.raises(InferenceServerException) as caught:
                call()
            assert caught.value.status() == denied
    assert client.infer("pets", [client.image()], headers=bearer(INFERENCE)).as_numpy("logits").shape == (2, 3)
    with pytest.raises(InferenceServerException, match="not one for control"):
        client.load_model("plants", headers=bearer(INFERENCE))
    assert running.service.loaded == {"pets"}
    client.load_model("plants", headers=bearer(CONTROL))
    client.unload_model("plants", headers=bearer(CONTROL))


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_control_is_off_unless_enabled(kind: str) -> None:
    with serving() as running, connected(kind, running) as client:
        with pytest.raises(InferenceServerException, match="start the server with --allow-control") as caught:
            client.unload_model("pets")
        assert caught.value.status() in ("403", "StatusCode.PERMISSION_DENIED")
        assert running.service.loaded == {"pets"}


def test_a_stream_needs_a_token(running: Running) -> None:
    with grpc.insecure_channel(running.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.ModelStreamInfer(iter([service_pb2.ModelInferRequest()]), timeout=WAIT_S))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_which_grpc_calls_are_open() -> None:
    calls = [method.name for method in service_pb2.DESCRIPTOR.services_by_name[SERVICE].methods]
    assert [name for name in calls if access_of(name) is Access.OPEN] == ["ServerLive", "ServerReady"]
    assert [name for name in calls if access_of(name) is Access.CONTROL] == [
        "RepositoryModelLoad",
        "RepositoryModelUnload",
    ]


def ask(running: Running, method: str, path: str, headers: dict[str, str]) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection(running.http, timeout=WAIT_S)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


OPEN_PATHS = {"/v2/health/live", "/v2/health/ready"}


def test_every_path_but_health_needs_a_token(running: Running) -> None:
    document = json.loads(ask(running, "GET", "/openapi.json", {})[2])
    asked = 0
    for path, methods in document["paths"].items():
        for method in methods:
            status, headers, _ = ask(running, method.upper(), path.replace("{", "").replace("}", ""), {})
            assert (status == 401) is (path not in OPEN_PATHS), (method, path)
            assert path in OPEN_PATHS or headers["WWW-Authenticate"] == "Bearer"
            asked += 1
    assert asked > 35
    for path in ("/metrics", "/status", "/status/tasks"):
        assert ask(running, "GET", path, bearer(INFERENCE))[0] == 200
    assert ask(running, "GET", "/docs", {})[0] == 200


def test_pages_of_other_sites_cannot_call() -> None:
    with serving(TransportSettings(guard=Guard(control=True))) as running:
        path = "/v2/repository/models/pets/unload"
        status, _, content = ask(running, "POST", path, {"Sec-Fetch-Site": "cross-site"})
        assert (status, b"other sites" in content) == (403, True)
        assert running.service.loaded == {"pets"}
        assert ask(running, "POST", path, {"Sec-Fetch-Site": "same-origin"})[0] == 200


def test_logs_name_the_request_and_no_secret(running: Running) -> None:
    stream = io.StringIO()
    root, access = logging.getLogger(), logging.getLogger(ACCESS)
    handlers, level = root.handlers[:], root.level
    try:
        configure_logs("INFO", stream)
        access.setLevel(logging.DEBUG)
        for kind in ("http", "grpc"):
            with connected(kind, running) as client:
                client.infer("pets", [client.image()], request_id=f"{kind}-1", headers=bearer(INFERENCE))
                with pytest.raises(InferenceServerException):
                    client.infer("pets", [client.image()], headers=bearer("guessed-token"))
        ask(running, "GET", "/status?key=in-the-query", bearer(INFERENCE))
        ask(running, "GET", "/v2/health/live", {})
        # An answer reaches its client before its line is written, on the same turn of the loop.
        running.call(asyncio.sleep(0))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        access.setLevel(logging.NOTSET)
    text = stream.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    for hidden in (INFERENCE, "guessed-token", "in-the-query", "Bearer"):
        assert hidden not in text
    records = {line["request_id"]: line for line in lines if line["logger"] == ACCESS}
    for kind, status in (("http", 200), ("grpc", "OK")):
        line = records[f"{kind}-1"]
        assert (line["transport"], line["model"], line["version"], line["rows"]) == (kind, "pets", "0123456789ab", 2)
        assert line["status"] == status
        assert line["ms"] > 0
        assert {"time", "level", "operation"} <= set(line)
    assert {line["status"] for line in records.values()} >= {200, 401, "OK", "UNAUTHENTICATED"}
    assert [line["level"] for line in records.values() if "/health/" in line["operation"]] == ["DEBUG"]


class Certificates:
    """An authority of the test's own, the server's certificate and a client's."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.authority, self.certificate, self.key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
        self.client_certificate, self.client_key = folder / "client.pem", folder / "client-key.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        for identity, certificate, key in (
            ("127.0.0.1", self.certificate, self.key),
            ("client", self.client_certificate, self.client_key),
        ):
            issued = authority.issue_cert(identity)
            issued.cert_chain_pems[0].write_to_path(str(certificate))
            issued.private_key_pem.write_to_path(str(key))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def options(kind: str, certificates: Certificates, known: bool) -> dict[str, Any]:
    """A client's TLS options, with a certificate of its own if it is ``known``."""
    if kind == "grpc":
        own = {"private_key": str(certificates.client_key), "certificate_chain": str(certificates.client_certificate)}
        return {"ssl": True, "root_certificates": str(certificates.authority), **(own if known else {})}

    def context() -> ssl.SSLContext:
        made = ssl.create_default_context(cafile=str(certificates.authority))
        if known:
            made.load_cert_chain(certificates.client_certificate, certificates.client_key)
        return made

    return {"ssl": True, "ssl_context_factory": context, "connection_timeout": WAIT_S}


REFUSED = r"(?i)certificate|handshake|unavailable|connect|closed|reset"
"""How the clients' libraries say it."""


@pytest.mark.parametrize("kind", ["http", "grpc"])
@pytest.mark.parametrize("mutual", [False, True])
def test_tls(certificates: Certificates, kind: str, mutual: bool) -> None:
    tls = Tls(certificates.certificate, certificates.key, certificates.authority if mutual else None)
    with serving(TransportSettings(tls=tls)) as running:
        with connected(kind, running, **options(kind, certificates, known=mutual)) as client:
            assert client.infer("pets", [client.image()]).as_numpy("logits").shape == (2, 3)
        if mutual:
            stranger = connected(kind, running, **options(kind, certificates, known=False))
            with stranger as client, pytest.raises(Exception, match=REFUSED):
                client.infer("pets", [client.image()])
        with connected(kind, running) as client, pytest.raises(Exception, match=REFUSED):
            client.infer("pets", [client.image()])
        assert len(running.service.requests) == 1


def test_certificates_that_do_not_work(certificates: Certificates, tmp_path: Path) -> None:
    for certificate, key, authority in (
        (tmp_path / "nothing", certificates.key, None),
        (certificates.certificate, certificates.client_key, None),
        (certificates.certificate, certificates.key, certificates.key),
    ):
        with pytest.raises(UsageError, match="does not work"):
            Tls(certificate, key, authority)
