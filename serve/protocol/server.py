"""The server: one service behind HTTP and gRPC, from start to drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc.aio
import uvicorn

from prompttune.serve.protocol.calls import SharedState
from prompttune.serve.protocol.grpc_server import add_port, grpc_server
from prompttune.serve.protocol.http_server import http_config
from prompttune.serve.protocol.listening import WILDCARDS, bracketed, listen
from prompttune.serve.protocol.rest import rest_application
from prompttune.serve.protocol.settings import ServerSettings
from prompttune.serve.service.assembly import make_service
from prompttune.serve.service.service import Service

LOG = logging.getLogger("prompttune.serve")

SENDING_S = 5.0
"""Seconds for the transports to send the last answers after a complete drain."""
DISMISSING_S = 0.5
"""Seconds for the transports to send the last answers after the drain timed out."""


@dataclass(frozen=True)
class Addresses:
    """Where a server listens."""

    http: str
    """Address of HTTP, with its scheme."""
    grpc: str | None
    """Address of gRPC, as ``host:port``."""


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: the service drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server; create it within a running event loop. :meth:`run` returns after the drain.

    Args:
        settings: settings of the server.
        on_listening: called with the addresses once both transports listen, before the engine is open.
        on_ready: called when the engine is warmed up.
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
        self._state = SharedState(settings.transport)
        self._sending_s = DISMISSING_S

    def stop(self) -> None:
        """Drain and stop; a second call stops without draining."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def run(self, signals: bool = True) -> None:
        """Serve until :meth:`stop` or, with ``signals``, until SIGTERM or SIGINT.

        Raises:
            PrompttuneError: the engine cannot be opened, or an address is in use.
        """
        service = make_service(self._settings.engine, self._settings.service)
        try:
            with self._signals(signals):
                async with self._transports(service) as addresses:
                    if self._on_listening is not None:
                        self._on_listening(addresses)
                    if await self._warm_up(service):
                        await self._stop.wait()
                        await self._drain(service)
        finally:
            await service.close()

    @contextlib.asynccontextmanager
    async def _transports(self, service: Service) -> AsyncIterator[Addresses]:
        """Run both transports on the same addresses; they end together."""
        settings, transport = self._settings, self._settings.transport
        listening = listen(settings.host, settings.http_port)
        config = http_config(rest_application(service, transport, self._state), transport)
        http, grpc = _Http(config), grpc_server(service, transport, self._state)
        with contextlib.ExitStack() as unused:
            for one in listening:
                unused.callback(one.close)
            hosts = [one.getsockname()[0] for one in listening]
            grpc_port = None if settings.grpc_port is None else self._add_ports(grpc, hosts, settings.grpc_port)
            unused.pop_all()
        serving = asyncio.create_task(http.serve(listening))
        await grpc.start()
        host = bracketed(settings.host)
        scheme = "https" if transport.tls else "http"
        try:
            yield Addresses(
                f"{scheme}://{host}:{listening[0].getsockname()[1]}",
                None if grpc_port is None else f"{host}:{grpc_port}",
            )
        finally:
            config.timeout_graceful_shutdown = self._sending_s  # type: ignore[assignment]  # fractions work too
            http.should_exit = True
            await asyncio.gather(serving, grpc.stop(self._sending_s))

    def _add_ports(self, server: grpc.aio.Server, hosts: Sequence[str], port: int) -> int:
        """Let gRPC listen where HTTP does; gRPC covers both families with one wildcard."""
        if self._settings.host in WILDCARDS:
            hosts = [self._settings.host]
        for host in hosts:
            port = add_port(server, f"{bracketed(host)}:{port}", self._settings.transport.tls)
        return port

    async def _warm_up(self, service: Service) -> bool:
        """Start the service; return whether it is ready, False if it was stopped first."""
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
        self._state.calls.leave()
        draining = asyncio.create_task(self._emptied(service))
        hurrying = asyncio.create_task(self._hurry.wait())
        await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
        for one in (draining, hurrying):
            one.cancel()
        if unanswered := self._state.calls.dismiss():
            LOG.warning("leaving: requests that still waited are answered with 503", extra={"requests": unanswered})

    async def _emptied(self, service: Service) -> None:
        """Return when every call is answered or has exceeded its deadline."""
        until = time.monotonic() + self._settings.drain_s
        await service.drain(self._settings.drain_s)
        if await self._state.calls.empty(until - time.monotonic()):
            self._sending_s = min(SENDING_S, max(DISMISSING_S, until - time.monotonic()))

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
