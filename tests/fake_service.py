"""A service with known answers behind the real transports, and servers of it that listen in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import uvicorn

from prompttune.serve.messages import (
    BatchStatistics,
    Duration,
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelStatistics,
    NotFoundError,
    OutputTensor,
    ServerMetadata,
    TensorMetadata,
    bytes_array,
)
from prompttune.serve.protocol.calls import SharedState
from prompttune.serve.protocol.grpc_server import add_port, grpc_server
from prompttune.serve.protocol.http_server import http_config
from prompttune.serve.protocol.rest import rest_application
from prompttune.serve.protocol.settings import TransportSettings

VERSION = "0123456789ab"
LABELS = ("cat", "dog", "bird")
WAIT_S = 60.0
T = TypeVar("T")


class FakeService:
    """Model ``pets``: output ``logits`` [N, 3] is the sum of each row plus the class; ``label`` [N, 1] is text."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        """Raised by every call that can fail."""
        self.requests: list[InferRequest] = []
        self.loaded = {"pets"}
        self.is_ready = True
        self.hold: asyncio.Event | None = None
        """Requests named ``slow`` wait for it."""
        self.started = threading.Event()
        """A request named ``slow`` is inside."""
        self.cancelled = threading.Event()

    def _check(self, name: str, version: str = "") -> None:
        if self.error is not None:
            raise self.error
        if name not in self.loaded or version not in ("", VERSION):
            raise NotFoundError(f"no model {name!r} version {version!r}")

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return self.is_ready

    def model_ready(self, name: str, version: str = "") -> bool:
        return name in self.loaded and version in ("", VERSION)

    def server_metadata(self) -> ServerMetadata:
        return ServerMetadata("prompttune", "1.2.3", ["binary_tensor_data", "classification"])

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        self._check(name, version)
        return ModelMetadata(
            name,
            [VERSION],
            "prompttune_fake",
            [TensorMetadata("image", "FP32", [-1, 3, 4, 4])],
            [TensorMetadata("logits", "FP32", [-1, 3]), TensorMetadata("task", "BYTES", [-1])],
            LABELS,
            {"image_size": "4"},
        )

    def index(self, ready: bool = False) -> Sequence[IndexEntry]:
        entries = [IndexEntry(name, VERSION, "READY") for name in sorted(self.loaded)]
        return entries if ready else [*entries, IndexEntry("idle", "", "UNAVAILABLE", "unloaded")]

    async def load(self, name: str) -> None:
        if name == "missing":
            raise NotFoundError("no task 'missing' in the folder")
        self.loaded.add(name)

    async def unload(self, name: str) -> None:
        self._check(name)
        self.loaded.discard(name)

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        self._check(name or "pets", version)
        found = ModelStatistics("pets", VERSION, last_inference=1_700_000_000_000, inference_count=6)
        found.execution_count = 2
        found.inference_stats.success = Duration(2, 250_000_000)
        found.batch_stats = [BatchStatistics(4, compute_infer=found.inference_stats.success)]
        return [found]

    async def infer(self, request: InferRequest) -> InferResponse:
        self._check(request.model, request.version)
        self.requests.append(request)
        if request.id.startswith("slow"):
            await self._wait()
        images = request.inputs[0].data
        rows = images.shape[0] if images.ndim else 1
        sums = np.zeros(rows, np.float32)
        if images.dtype != object:
            sums = images.reshape(rows, -1).astype(np.float32).sum(axis=1) if images.size else sums
        else:
            sums = np.array([len(one) for one in images.reshape(-1)], np.float32)
        outputs = [
            OutputTensor("logits", "FP32", sums[:, None] + np.arange(3, dtype=np.float32)),
            OutputTensor("label", "BYTES", bytes_array(["bird", *["cät"] * (rows - 1)][:rows], (rows, 1))),
        ]
        wanted = [one.name for one in request.outputs]
        chosen = [one for one in outputs if not wanted or one.name in wanted]
        return InferResponse(request.model, VERSION, request.id, chosen)

    async def _wait(self) -> None:
        self.hold = self.hold or asyncio.Event()
        self.started.set()
        try:
            await asyncio.wait_for(self.hold.wait(), WAIT_S)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def status(self) -> dict[str, Any]:
        return {"engine": "fake", "requests": len(self.requests)}

    def task_status(self) -> list[dict[str, Any]]:
        return [{"name": name, "state": "READY"} for name in sorted(self.loaded)]

    def metrics(self) -> bytes:
        return b"# TYPE prompttune_requests counter\nprompttune_requests_total 1.0\n"


@dataclass
class Running:
    """Two transports in a thread of their own."""

    service: FakeService
    loop: asyncio.AbstractEventLoop
    http: str
    """``127.0.0.1:port``"""
    grpc: str

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the servers' loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def release(self) -> None:
        """Let the slow requests go on."""

        async def let_go() -> None:
            self.service.hold = self.service.hold or asyncio.Event()
            self.service.hold.set()

        self.call(let_go())


@contextlib.contextmanager
def serving(settings: TransportSettings | None = None, service: FakeService | None = None) -> Iterator[Running]:
    """Both transports on free ports of 127.0.0.1, stopped at the end."""
    settings, service = settings or TransportSettings(), service or FakeService()
    state = SharedState(settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listening = socket.create_server(("127.0.0.1", 0))
    stack = contextlib.ExitStack()
    with stack:
        stack.callback(_stop_loop, loop, thread)
        running = Running(service, loop, f"127.0.0.1:{listening.getsockname()[1]}", "")
        http = uvicorn.Server(http_config(rest_application(service, settings, state), settings, drain_s=1))
        serving_http = asyncio.run_coroutine_threadsafe(http._serve([listening]), loop)
        stack.callback(serving_http.result, WAIT_S)
        stack.callback(setattr, http, "should_exit", True)

        async def start_grpc() -> tuple[Any, int]:
            server = grpc_server(service, settings, state)
            port = add_port(server, "127.0.0.1:0", settings.tls)
            await server.start()
            return server, port

        server, port = running.call(start_grpc())
        stack.callback(lambda: running.call(server.stop(0)))
        running.grpc = f"127.0.0.1:{port}"
        yield running


def _stop_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT_S)
    loop.close()
