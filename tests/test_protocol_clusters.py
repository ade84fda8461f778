"""What clusters and proxies ask for: gRPC's health protocol, reflection, HEAD, prefixes and forwarded headers."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from prompttune.errors import UsageError
from prompttune.serve.protocol.listening import listen
from prompttune.serve.protocol.security import Guard, Tokens
from prompttune.serve.protocol.settings import TransportSettings, read_prefix, read_proxies
from tests.fake_service import WAIT_S, Running, serving

TOKEN = "a-token-for-inference"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    settings = TransportSettings(
        guard=Guard(Tokens([TOKEN])), proxies=read_proxies("127.0.0.0/8"), root_path=read_prefix("/vision/")
    )
    with serving(settings) as servers:
        yield servers


def ask(running: Running, method: str, path: str, **headers: str) -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection(running.http, timeout=WAIT_S)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def status_of(running: Running, service: str, *metadata: tuple[str, str]) -> str:
    with grpc.insecure_channel(running.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), metadata=metadata, timeout=WAIT_S)
        except grpc.RpcError as problem:
            return str(problem.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def test_health_over_grpc(running: Running) -> None:
    bearer = ("authorization", f"Bearer {TOKEN}")
    try:
        for name in ("", "inference.GRPCInferenceService"):
            running.service.is_ready = True
            assert status_of(running, name) == "SERVING"
            running.service.is_ready = False
            assert status_of(running, name) == "NOT_SERVING"
    finally:
        running.service.is_ready = True
    assert status_of(running, "pets", bearer) == "SERVING"
    assert status_of(running, "nothing", bearer) == "NOT_FOUND"
    assert status_of(running, "pets") == "UNAUTHENTICATED"
    with grpc.insecure_channel(running.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="pets"))
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_reflection_lists_the_services(running: Running) -> None:
    with grpc.insecure_channel(running.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        wanted = (
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
        )
        listed, described = stub.ServerReflectionInfo(iter(wanted), timeout=WAIT_S)
    names = {one.name for one in listed.list_services_response.service}
    assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/vision/v2/health/ready", "/docs"])
def test_head_is_get_without_a_body(running: Running, path: str) -> None:
    status, headers, body = ask(running, "HEAD", path)
    assert (status, body) == (200, b"")
    assert headers["Content-Length"] == ask(running, "GET", path)[1]["Content-Length"]
    assert ask(running, "HEAD", "/v2/models/pets")[0] == 401


@pytest.mark.parametrize("shown", ["", "/vision"])
def test_a_proxy_may_strip_the_prefix_or_leave_it(running: Running, shown: str) -> None:
    for path in ("/", "/page/page.js", "/docs", "/docs/start.js", "/docs/assets/swagger-ui.css", "/v2/health/live"):
        assert ask(running, "GET", shown + path)[0] == 200, path
    assert json.loads(ask(running, "GET", f"{shown}/openapi.json")[2])["servers"] == [{"url": "/vision"}]
    status, headers, _ = ask(running, "GET", f"{shown}/v2/", Host="models.example")
    assert (status, headers["Location"]) == (307, "http://models.example/vision/v2")
    assert ask(running, "GET", "/vision")[1]["Location"].endswith("/vision/")
    assert ask(running, "GET", "/visions")[0] == 404


def test_what_a_trusted_proxy_says_is_believed(running: Running) -> None:
    told = {"X_Forwarded_Proto": "https", "X_Forwarded_Host": "shown.example", "X_Forwarded_Prefix": "/a/b/"}
    assert ask(running, "GET", "/v2/", **told)[1]["Location"] == "https://shown.example/a/b/v2"
    assert json.loads(ask(running, "GET", "/openapi.json", **told)[2])["servers"] == [{"url": "/a/b"}]
    for wrong in ("//evil.example", "/a b", "no-slash", "/..", "/v2", "/%2e%2e"):
        status, _, body = ask(running, "GET", "/v2/", X_Forwarded_Prefix=wrong)
        assert status == 400
        assert "X-Forwarded-Prefix" in json.loads(body)["error"]


def test_what_others_say_is_not() -> None:
    with serving(TransportSettings(proxies=("10.0.0.0/8",))) as running:
        told = {"X_Forwarded_Proto": "https", "X_Forwarded_Host": "evil.example", "X_Forwarded_Prefix": "//evil"}
        assert ask(running, "GET", "/v2/", **told)[1]["Location"] == f"http://{running.http}/v2"


@pytest.mark.parametrize("wrong", ["vision", "//vision", "/a//b", "/v2", "/docs/x", "/a/../b", "/a?b", "/é"])
def test_prefixes_that_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="--root-path"):
        read_prefix(wrong)


@pytest.mark.parametrize("wrong", ["10.0.0.0/33", "proxy.example", "*,10.0.0.1", "10.0.0.1/8"])
def test_proxies_that_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="--forwarded-allow-ips"):
        read_proxies(wrong)


def test_a_wildcard_listens_on_both_families_with_one_port() -> None:
    for host in ("0.0.0.0", "::"):
        sockets = listen(host, 0)
        assert len({one.getsockname()[1] for one in sockets}) == 1
        assert len({one.family for one in sockets}) == len(sockets)
        for one in sockets:
            one.close()
