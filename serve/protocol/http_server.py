"""uvicorn for the HTTP transport: TLS, and limits that apply before the application gets a request."""

from __future__ import annotations

import asyncio
import socket
import ssl

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from prompttune.serve.protocol.forwarded import BehindProxy
from prompttune.serve.protocol.settings import TransportSettings


def http_config(application: ASGIApp, settings: TransportSettings, drain_s: int = 5) -> uvicorn.Config:
    """uvicorn's configuration; ``drain_s`` is the time in seconds for running answers when it stops."""
    tls = settings.tls
    return uvicorn.Config(
        BehindProxy(application, settings.proxies, settings.root_path),
        http=_limited_protocol(settings),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=settings.idle_seconds,
        timeout_graceful_shutdown=drain_s,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
    )


def _limited_protocol(settings: TransportSettings) -> type[HttpToolsProtocol]:
    """The connection protocol; it closes a connection whose request head is too large or too slow.

    httptools itself does not limit the head.
    """

    class LimitedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            _send_at_once(transport)
            self._await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_complete()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._head_timer is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._head_timer is not None and self._head_bytes > settings.head_bytes:
                self.send_400_response("The request's head is too large.")

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._head_timer is None:
                self._await_head()

        def on_headers_complete(self) -> None:
            self._head_complete()
            super().on_headers_complete()

        def _await_head(self) -> None:
            self._head_bytes = 0
            self._head_timer = self.loop.call_later(settings.head_seconds, self.transport.close)

        def _head_complete(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return LimitedProtocol


def _send_at_once(transport: asyncio.BaseTransport) -> None:
    """Disable Nagle's algorithm.

    asyncio does this only for sockets that name their protocol, unlike those of ``socket.create_server``. With the
    algorithm, an answer waits 40 ms for the client to acknowledge its headers.
    """
    connection = transport.get_extra_info("socket")
    if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
