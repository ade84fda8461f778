"""The server: one service behind HTTP and gRPC, from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import uvicorn

from prompttune.errors import EngineError
from prompttune.serve.assembly import EngineSettings, make_service
from prompttune.serve.protocol.grpc_server import add_port, grpc_server
from prompttune.serve.protocol.http_server import http_config
from prompttune.serve.protocol.rest import rest_application
from prompttune.serve.protocol.settings import TransportSettings
from prompttune.serve.service import Service, ServiceSettings

LOG = logging.getLogger("prompttune.serve")

BACKLOG = 2048
LEAVING_S = 5
"""For the transports to send what they have, after the last answer."""


@dataclass(frozen=True)
class ServerSettings:
    """Everything that ``prompttune serve`` is told."""

    engine: EngineSettings
    service: ServiceSettings = field(default_factory=ServiceSettings)
    transport: TransportSettings = field(default_factory=TransportSettings)
    host: str = "127.0.0.1"
    http_port: int = 8000
    """0 takes a free one."""
    grpc_port: int | None = 8001
    """0 takes a free one, None serves HTTP alone."""
    drain_s: float = 30.0
    """For requests inside to be answered when the server is told to stop."""


@dataclass(frozen=True)
class Addresses:
    """Where a server listens."""

    http: str
    """With its scheme."""
    grpc: str | None
    """``host:port``."""


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: the service drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server; make it within a running event loop. :meth:`run` returns when it has drained.

    Args:
        settings: see there.
        on_listening: told the addresses once both transports listen, before the engine is open.
        on_ready: called when the engine is warm.
    """

    def __init__(
        self,
        settings: ServerSettings,
        on_listening: Callable[[Addresses], None] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._on_listening = on_listening
        self._on_ready = on_ready
        self._stop, self._hurry = asyncio.Event(), asyncio.Event()

    def stop(self) -> None:
        """Drain and leave; asked twice, leave without draining."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self, signals: bool = True) -> None:
        """Serve until :meth:`stop`, or with ``signals`` until SIGTERM or SIGINT.

        Raises:
            PrompttuneError: the engine cannot be opened, or an address is taken.
        """
        service = make_service(self._settings.engine, self._settings.service)
        try:
            with self._signals(signals):
                async with self._http(service) as http, self._grpc(service) as grpc:
                    if self._on_listening is not None:
                        self._on_listening(Addresses(http, grpc))
                    if await self._warm_up(service):
                        await self._stop.wait()
                        await self._drain(service)
        finally:
            await service.close()

    @contextlib.asynccontextmanager
    async def _http(self, service: Service) -> AsyncIterator[str]:
        settings = self._settings
        listening = _listen(settings.host, settings.http_port)
        application = rest_application(service, settings.transport)
        server = _Http(http_config(application, settings.transport, LEAVING_S))
        serving = asyncio.create_task(server.serve([listening]))
        host, port = listening.getsockname()[:2]
        try:
            yield f"{'https' if settings.transport.tls else 'http'}://{_bracketed(host)}:{port}"
        finally:
            server.should_exit = True
            await serving

    @contextlib.asynccontextmanager
    async def _grpc(self, service: Service) -> AsyncIterator[str | None]:
        settings = self._settings
        if settings.grpc_port is None:
            yield None
            return
        server = grpc_server(service, settings.transport)
        host = _bracketed(settings.host)
        port = add_port(server, f"{host}:{settings.grpc_port}", settings.transport.tls)
        await server.start()
        try:
            yield f"{host}:{port}"
        finally:
            await server.stop(LEAVING_S)

    async def _warm_up(self, service: Service) -> bool:
        """Whether the service is ready; False if it was told to stop before it was."""
        starting, stopping = asyncio.create_task(service.start()), asyncio.create_task(self._stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return False
        await starting
        LOG.info("ready")
        if self._on_ready is not None:
            self._on_ready()
        return True

    async def _drain(self, service: Service) -> None:
        LOG.info("draining")
        draining = asyncio.create_task(service.drain(self._settings.drain_s))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not draining.done() or not draining.result():
            draining.cancel()
            LOG.warning("leaving with requests unanswered")

    @contextlib.contextmanager
    def _signals(self, wanted: bool) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = (signal.SIGTERM, signal.SIGINT) if wanted else ()
        for one in handled:
            loop.add_signal_handler(one, self.stop)
        try:
            yield
        finally:
            for one in handled:
                loop.remove_signal_handler(one)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as problem:
        raise EngineError(f"cannot listen on {host}:{port} for HTTP: {problem.strerror or problem}") from None
