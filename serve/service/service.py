"""The server without a transport: tasks by name, one frozen backbone, batches of any mix of tasks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from prompttune.errors import PrompttuneError
from prompttune.export.folder import EngineFolder
from prompttune.serve.batching.admission import Admission
from prompttune.serve.batching.replica import DeviceReplica
from prompttune.serve.messages import (
    SEVERAL,
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelStatistics,
    ServerMetadata,
)
from prompttune.serve.service.catalogue import Catalogue, Numbers
from prompttune.serve.service.images import Decoder
from prompttune.serve.service.inference import Inference
from prompttune.serve.service.metadata import several_metadata, task_metadata
from prompttune.serve.service.metrics import Metrics
from prompttune.serve.service.models import READY, UNAVAILABLE
from prompttune.serve.service.repository import Repository
from prompttune.serve.service.settings import ServiceSettings
from prompttune.serve.workers.waiting import gathered
from prompttune.version import __version__

LOG = logging.getLogger("prompttune.serve")

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "parameters",
    "schedule_policy",
    "statistics",
)
OBSERVE_EVERY_S = 1.0


class Service:
    """The server without a transport. Create it, and call every method, on one event loop.

    Args:
        folder: the engine folder.
        catalogue: the tasks on disk.
        replicas: one replica per device, not started yet.
        metrics: counters; the replicas' batches count there too.
        settings: settings of the service.
    """

    def __init__(
        self,
        folder: EngineFolder,
        catalogue: Catalogue,
        replicas: Sequence[DeviceReplica],
        metrics: Metrics,
        settings: ServiceSettings,
    ) -> None:
        self._folder = folder
        self._replicas = replicas
        self._settings = settings
        self._metrics = metrics
        self._admission = Admission(settings.max_queue, metrics.rows_per_s)
        self._repository = Repository(catalogue, Numbers(folder.path), replicas)
        self._catalogue = catalogue
        self._decoder = Decoder(settings.decode_workers, settings.limits)
        self._inference = Inference(
            self._repository,
            replicas,
            self._decoder,
            self._admission,
            settings.limits,
            folder.manifest.image_size,
            metrics,
            folder.manifest.task_type,
        )
        self._started = time.monotonic()
        self._warm = False
        self._background: list[asyncio.Task[None]] = []

    # ---------------------------------------------------------------- lifecycle

    async def start(self) -> None:
        """Start the workers and fill their rows, then report ready.

        Raises:
            PrompttuneError: the engine cannot be opened.
        """
        scan = await asyncio.to_thread(self._catalogue.scan)
        await self._repository.begin(scan.records, scan.problems)
        await gathered(replica.start() for replica in self._replicas)
        for replica in self._replicas:
            await self._fill(replica)
        self._warm = True
        self._background.append(asyncio.create_task(self._observe()))
        if self._settings.watch_interval_s is not None:
            self._background.append(asyncio.create_task(self._watch(self._settings.watch_interval_s)))

    async def _fill(self, replica: DeviceReplica) -> None:
        models = list(self._repository.models.values())
        for model in models[: replica.capacity]:
            if model.state == READY and model.record is not None and model.key is not None:
                try:
                    await replica.hold(model.key, model.record.folder)
                except PrompttuneError as problem:
                    LOG.warning("a task cannot be served: %s", problem, extra={"task": model.name})
                    model.retire(str(problem))

    async def _observe(self) -> None:
        """Refresh the figures of the web page."""
        while True:
            for replica in self._replicas:
                await replica.observe()
            await asyncio.sleep(OBSERVE_EVERY_S)

    async def _watch(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._repository.follow()
            except OSError as problem:  # a lost mount may come back
                LOG.warning("the task folders cannot be read: %s", problem)
            except Exception:
                LOG.exception("looking at the task folders failed")

    async def drain(self, seconds: float) -> bool:
        """Refuse new requests and wait for those inside; return whether all were answered in time."""
        self._admission.close()
        return await self._admission.empty(seconds)

    async def close(self) -> None:
        """End the workers; waiting requests fail."""
        self._admission.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for replica in self._replicas:
            await replica.close()
        self._decoder.close()

    # ------------------------------------------------------------------- health

    def live(self) -> bool:
        """Whether the process is alive."""
        return True

    def ready(self) -> bool:
        """Whether every worker is warmed up and the server is not draining."""
        return self._warm and not self._admission.closed and any(replica.ready for replica in self._replicas)

    def model_ready(self, name: str, version: str = "") -> bool:
        """Whether a model is ready; False, not an error, for an unknown model."""
        if name in SEVERAL:
            return self.ready() and self._inference.several[name].named(version)
        model = self._repository.models.get(name)
        return model is not None and model.state == READY and model.named(version) and self.ready()

    # ----------------------------------------------------------------- metadata

    def server_metadata(self) -> ServerMetadata:
        """Name, version and extensions of the server."""
        return ServerMetadata("prompttune", __version__, EXTENSIONS)

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """Inputs, outputs and labels of a model; raises :class:`NotFoundError` for an unknown model or version."""
        manifest = self._folder.manifest
        if name in SEVERAL:
            return several_metadata(manifest, name, self._inference.model(name, version).number)
        model = self._repository.model(name)
        return task_metadata(manifest, model.current(version), model.number)

    def index(self, ready: bool = False) -> Sequence[IndexEntry]:
        """Every task in the repository; with ``ready``, only those that are ready."""
        entries = [model.entry() for _, model in sorted(self._repository.models.items())]
        state = READY if self.ready() else UNAVAILABLE
        entries += [IndexEntry(one.name, str(one.number), state) for one in self._inference.several.values()]
        return [entry for entry in entries if entry.state == READY or not ready]

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """Statistics of one model, or of all models for an empty name."""
        if name in SEVERAL:
            return [self._inference.model(name, version).statistics]
        if name:
            model = self._repository.model(name)
            if version:
                model.current(version)
            return [model.statistics]
        models = [model.statistics for _, model in sorted(self._repository.models.items())]
        return [*models, *(model.statistics for model in self._inference.several.values())]

    # ------------------------------------------------------------------ control

    async def load(self, name: str) -> None:
        """Load a task from its folder; the old version answers until the new one is ready."""
        await self._repository.load(name)

    async def unload(self, name: str) -> None:
        """Unload a task; running requests are still answered."""
        await self._repository.unload(name)

    # ---------------------------------------------------------------- inference

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer a request. If the caller leaves, it cancels the coroutine, and the rows leave the queue."""
        return await self._inference.infer(request, self._settings.timeout_s)

    # ------------------------------------------------------------------- status

    def status(self) -> dict[str, Any]:
        """Figures for the page and ``/status``, without the tasks."""
        manifest = self._folder.manifest
        return {
            "server": {
                "name": "prompttune",
                "version": __version__,
                "engine": self._folder.path.name,
                "backbone": manifest.backbone["name"],
                "method": manifest.method["name"],
                "precision": manifest.precision,
                "image_size": manifest.image_size,
                "uptime_s": time.monotonic() - self._started,
                "ready": self.ready(),
            },
            "load": {
                "queued_rows": self._admission.rows - sum(replica.running_rows for replica in self._replicas),
                "max_queue": self._settings.max_queue,
                "running_rows": sum(replica.running_rows for replica in self._replicas),
                "rows_per_s": self._metrics.rows_per_s(),
            },
            "workers": [replica.status() for replica in self._replicas],
            "latency": self._metrics.recent(),
        }

    def task_status(self) -> list[dict[str, Any]]:
        """Figures of each task for the page and ``/status/tasks``."""
        return [
            model.status(any(model.key and replica.holds(model.key) for replica in self._replicas))
            for _, model in sorted(self._repository.models.items())
        ]

    def metrics(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return self._metrics.render()
