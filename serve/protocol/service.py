"""What a transport needs of the server behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from prompttune.serve.protocol.types import (
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
)


class InferenceService(Protocol):
    """The server without a transport. Everything is called on one event loop; errors are :class:`ServeError`."""

    def live(self) -> bool:
        """Whether the process is well."""

    def ready(self) -> bool:
        """Whether every worker is warm and the server is not draining."""

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether a model answers; False, not an error, for one that does not exist."""

    def server_metadata(self) -> ServerMetadata:
        """Name, version, extensions."""

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Inputs, outputs, labels; :class:`NotFoundError` for no such model or version."""

    def index(self, ready: bool = False) -> Sequence[IndexEntry]:
        """Every task in the repository, unloaded ones too unless ``ready``."""

    async def load(self, name: str) -> None:
        """Read a task from its folder and bring it in; the old version answers until the new one can."""

    async def unload(self, name: str) -> None:
        """Take a task out; requests that already run are answered."""

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Of one model, or of all with an empty name."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer. A caller that is gone cancels the coroutine; its rows then leave the queue."""

    def status(self) -> dict[str, Any]:
        """What the page and ``/status`` show, tasks aside."""

    def task_status(self) -> list[dict[str, Any]]:
        """What the page and ``/status/tasks`` show of each task."""

    def metrics(self) -> bytes:
        """Prometheus' text format."""
