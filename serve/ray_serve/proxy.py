"""Middleware for Ray's HTTP proxies: it gives a request whose ingress replica dies to another replica.

Ray reads ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=prompttune.serve.ray_serve.proxy:middlewares`` on each node.
"""

from __future__ import annotations

import asyncio

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prompttune.serve.messages import UnavailableError
from prompttune.serve.protocol.rest_shared import serve_error_answer
from prompttune.serve.ray_serve.messages import ATTEMPTS, PAUSE_S


def middlewares() -> list[Middleware]:
    """Middleware that Ray wraps around its proxy."""
    return [Middleware(AskAgain)]


class AskAgain:
    """ASGI middleware that repeats a request which the proxy leaves unanswered, as it does with a lost one.

    It keeps the parts of the body; the proxy reads all of them anyway, whether a replica takes them or not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask one replica after another."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Repeated(receive)
        for _ in range(ATTEMPTS):
            if await self._answered(dict(scope), body.begin(), send) or body.client_left:
                return
            await asyncio.sleep(PAUSE_S)
        lost = UnavailableError(f"{ATTEMPTS} ingress replicas were lost with this request")
        await serve_error_answer(lost)(scope, receive, send)

    async def _answered(self, scope: Scope, receive: Receive, send: Send) -> bool:
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        await self._app(scope, receive, observed)
        return started


class _Repeated:
    """A client's messages, from the start as often as needed."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._seen: list[Message] = []

    @property
    def client_left(self) -> bool:
        return any(message["type"] == "http.disconnect" for message in self._seen)

    def begin(self) -> Receive:
        """A new ``receive`` from the start."""
        place = 0

        async def receive() -> Message:
            nonlocal place
            if place == len(self._seen):
                self._seen.append(await self._receive())
            place += 1
            return self._seen[place - 1]

        return receive
