"""Interface between a transport and the server behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from prompttune.serve.messages import (
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
)


class InferenceService(Protocol):
    """The server without a transport. Call every method on one event loop; errors are :class:`ServeError`."""

    def live(self) -> bool:
        """Whether the process is alive."""

    def ready(self) -> bool:
        """Whether every worker is warmed up and the server is not draining."""

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether a model is ready; False, not an error, for an unknown model."""

    def server_metadata(self) -> ServerMetadata:
        """Name, version and extensions of the server."""

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Inputs, outputs and labels of a model; raises :class:`NotFoundError` for an unknown model or version."""

    def index(self, ready: bool = False) -> Sequence[IndexEntry]:
        """Every task in the repository; with ``ready``, only those that are ready."""

    async def load(self, name: str) -> None:
        """Load a task from its folder; the old version answers until the new one is ready."""

    async def unload(self, name: str) -> None:
        """Unload a task; running requests are still answered."""

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Statistics of one model, or of all models for an empty name."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer a request. If the caller leaves, it cancels the coroutine, and the rows leave the queue."""

    def status(self) -> dict[str, Any]:
        """Figures for the page and ``/status``, without the tasks."""

    def task_status(self) -> list[dict[str, Any]]:
        """Figures of each task for the page and ``/status/tasks``."""

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text format."""
