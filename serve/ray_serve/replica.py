"""A replica: one engine with the whole server around it, without the sockets."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from ray import serve
from starlette.types import ASGIApp, Message, Scope

from prompttune.errors import EngineError
from prompttune.serve.protocol.rest import rest_application
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.ray_serve.messages import Headers, RequestHead, WholeAnswer
from prompttune.serve.service.assembly import make_service
from prompttune.serve.service.settings import EngineSettings, ServiceSettings

DRAIN_S = 5.0
"""Seconds for cancelled requests: Ray has already waited for the others when it ends a replica."""


class Replica:
    """An engine in this process, which Ray watches and replaces as a whole.

    Args:
        engine: settings of the engine.
        service: settings of the service.
        transport: limits and tokens; Ray's proxies handle TLS.
    """

    # Ray awaits it on the event loop that the service must be created on.
    async def __init__(  # type: ignore[misc]
        self, engine: EngineSettings, service: ServiceSettings, transport: TransportSettings
    ) -> None:
        self._service = make_service(replace(engine, in_process=True), service)
        await self._service.start()
        self._application = rest_application(self._service, transport)

        async def hold(task: str) -> str:
            return task

        # Only keeps the names that Ray routes by: the engine's own cache, of the same size, keeps the states.
        self._hold = serve.multiplexed(hold, max_num_models_per_replica=engine.resident_tasks)

    async def answer(self, head: RequestHead, body: bytes, task: str) -> WholeAnswer:
        """WholeAnswer an HTTP request; its task, empty for none, counts as held here from now on."""
        if task and self._service.model_ready(task):
            await self._hold(task)
        return await _call(self._application, head, body)

    async def check_health(self) -> None:
        """Raise if Ray should replace this replica."""
        if not (self._service.live() and self._service.ready()):
            raise EngineError("the engine does not answer")

    async def __del__(self) -> None:
        """Called by Ray when it ends a replica; without an open engine there is nothing to close."""
        with contextlib.suppress(AttributeError):
            await self._service.drain(DRAIN_S)
            await self._service.close()


async def _call(application: ASGIApp, head: RequestHead, body: bytes) -> WholeAnswer:
    """Run an ASGI application on a request that is complete."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": head.method,
        "scheme": head.scheme,
        "path": head.root_path + head.path,
        "raw_path": None,
        "root_path": head.root_path,
        "query_string": head.query,
        "headers": head.headers,
        "client": None,
        "server": None,
    }
    unread = [body]
    status = 500
    headers: Headers = []
    parts: list[bytes] = []

    async def receive() -> Message:
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        # If the client leaves, the call is cancelled, so there is never a disconnect message to wait for.
        await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        elif message["type"] == "http.response.body":
            parts.append(message.get("body", b""))

    await application(scope, receive, send)
    return WholeAnswer(status, headers, parts[0] if len(parts) == 1 else b"".join(parts))
