"""The gRPC server: tokens, errors and log lines around the calls, limits, TLS."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import orjson
from google.protobuf import json_format
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from tritonclient.grpc import service_pb2, service_pb2_grpc

from prompttune.errors import EngineError
from prompttune.serve.messages import ServeError, UnavailableError
from prompttune.serve.protocol.calls import Calls, SharedState
from prompttune.serve.protocol.grpc_calls import InferenceCalls, plain_calls
from prompttune.serve.protocol.grpc_health import SERVER_NAMES, Health
from prompttune.serve.protocol.logs import RequestRecord, answered, new_request_id, usable_id
from prompttune.serve.protocol.security import Access, Tls
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.service.service import Service
from prompttune.serve.tracing import continued

SERVICE = "GRPCInferenceService"
PROTOCOL_OVERHEAD = 64 * 1024
"""Bytes that a message may need in addition to its tensors."""
_OPEN_CALLS = frozenset({"ServerLive", "ServerReady", "Check"})
_HEALTH = "grpc.health.v1.Health"
_CONTROL_CALLS = frozenset({"RepositoryModelLoad", "RepositoryModelUnload"})
_KEEPALIVE_MS, _KEEPALIVE_ANSWER_MS = 60_000, 20_000
Call = Callable[[Any, Any, RequestRecord], Awaitable[Any]]
"""Handler of a call, from message, context and log record to the reply message."""
StreamCall = Callable[[AsyncIterator[Any], Any], AsyncGenerator[Any, None]]


def grpc_server(service: Service, settings: TransportSettings, state: SharedState | None = None) -> grpc.aio.Server:
    """Create a server without a port, on the event loop of ``service``; then call :func:`add_port` and ``start``.

    ``state`` is shared with the HTTP application, if there is one.
    """
    state = state or SharedState(settings)
    largest = settings.limits.body_bytes + PROTOCOL_OVERHEAD
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", largest),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", settings.head_bytes),
            ("grpc.so_reuseport", 0),
            # Detects clients whose machine is gone, so that their requests leave the queue.
            ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", _KEEPALIVE_ANSWER_MS),
            ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_MS // 6),
        ]
    )
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_guarded(service, settings, state), server)
    health_pb2_grpc.add_HealthServicer_to_server(_guarded_health(service, settings, state.calls), server)
    reflection.enable_server_reflection((SERVER_NAMES[1], _HEALTH, reflection.SERVICE_NAME), server)
    return server


def add_port(server: grpc.aio.Server, address: str, tls: Tls | None) -> int:
    """Listen on ``host:port``, where port 0 picks a free port; return the port.

    Raises:
        EngineError: the address is in use or invalid.
    """
    try:
        if tls is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, _credentials(tls)))
    except RuntimeError as problem:
        raise EngineError(f"cannot listen on {address} for gRPC: {problem}") from None


def _credentials(tls: Tls) -> Any:
    return grpc.ssl_server_credentials(
        [(tls.key.read_bytes(), tls.certificate.read_bytes())],
        root_certificates=tls.client_ca.read_bytes() if tls.client_ca else None,
        require_client_auth=tls.client_ca is not None,
    )


def _guarded(service: Service, settings: TransportSettings, state: SharedState) -> SimpleNamespace:
    """Every call of the protocol, wrapped; a call without a handler fails when it is added to the server."""
    inference = InferenceCalls(service, settings, state)
    replies = {one.name: one.output_type.name for one in service_pb2.DESCRIPTOR.services_by_name[SERVICE].methods}
    found: dict[str, Any] = {
        name: _wrapped(name, _replying(call, getattr(service_pb2, replies[name])), settings, state.calls)
        for name, call in plain_calls(service, settings, state).items()
    }
    found["ModelInfer"] = _wrapped("ModelInfer", inference.answer, settings, state.calls)
    found["ModelStreamInfer"] = _wrapped_stream("ModelStreamInfer", inference.answer_stream, settings)
    return SimpleNamespace(**found)


def _replying(call: Callable[[Any], Any], reply: type[Any]) -> Call:
    """A call that needs only its message; the log record gets the model's name."""

    async def answer(message: Any, _: Any, record: RequestRecord) -> Any:
        record.model = getattr(message, "model_name", getattr(message, "name", ""))
        values = call(message)
        if inspect.isawaitable(values):
            values = await values
        # Metadata over HTTP also has the labels and parameters, for which gRPC's message has no field.
        return json_format.Parse(orjson.dumps(values or {}), reply(), ignore_unknown_fields=True)

    return answer


def _guarded_health(service: Service, settings: TransportSettings, calls: Calls) -> SimpleNamespace:
    """Health calls: the server's health is open to probes; a model's needs the token of its HTTP readiness."""
    health = Health(service, calls)

    def check(message: Any, context: Any) -> None:
        access = Access.OPEN if message.service in SERVER_NAMES else Access.INFERENCE
        settings.guard.check(access, _metadata(context).get("authorization", ""))

    async def answer(message: Any, context: Any, _: RequestRecord) -> Any:
        check(message, context)
        return health.check(message)

    async def watch(message: Any, context: Any) -> AsyncGenerator[Any, None]:
        try:
            check(message, context)
        except ServeError as problem:
            await _abort(context, problem)
        async for response in health.watch(message):
            yield response

    return SimpleNamespace(Check=_wrapped("Check", answer, settings, calls), Watch=watch)


def access_of(call: str) -> Access:
    """The token that a call needs; the inference token by default."""
    if call in _CONTROL_CALLS:
        return Access.CONTROL
    return Access.OPEN if call in _OPEN_CALLS else Access.INFERENCE


def _wrapped(name: str, call: Call, settings: TransportSettings, calls: Calls) -> Callable[[Any, Any], Awaitable[Any]]:
    async def answer(message: Any, context: Any) -> Any:
        sent = _metadata(context)
        record = _record(name, sent, settings)

        async def work() -> Any:
            settings.guard.check(access_of(name), sent.get("authorization", ""))
            with continued(sent), calls.inside():
                return await call(message, context, record)

        return await answered(record, work(), functools.partial(_abort, context))

    return answer


def _wrapped_stream(name: str, call: StreamCall, settings: TransportSettings) -> StreamCall:
    async def answer(messages: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        sent = _metadata(context)
        record = _record(name, sent, settings)
        try:
            settings.guard.check(access_of(name), sent.get("authorization", ""))
        except ServeError as problem:
            record.finish(problem.grpc_status)
            await _abort(context, problem)
        async with contextlib.aclosing(call(messages, context)) as responses:
            async for response in responses:
                yield response

    return answer


def _record(name: str, sent: Mapping[str, str], settings: TransportSettings) -> RequestRecord:
    named = usable_id(sent.get("x-request-id", ""), settings.limits.id_length)
    return RequestRecord("grpc", name, request_id=named or new_request_id(), routine=name in _OPEN_CALLS)


def _metadata(context: Any) -> dict[str, str]:
    """The text metadata of a call; the first value wins if a key occurs twice."""
    pairs = [(name, value) for name, value in context.invocation_metadata() or () if isinstance(value, str)]
    return dict(reversed(pairs))


async def _abort(context: Any, problem: ServeError) -> None:
    trailing: tuple[tuple[str, str], ...] = ()
    if isinstance(problem, UnavailableError):
        trailing = (("retry-after", f"{problem.retry_after_s:g}"),)
    await context.abort(grpc.StatusCode[problem.grpc_status], str(problem), trailing)
