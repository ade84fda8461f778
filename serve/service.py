"""The server without a transport: tasks by name, one frozen backbone, batches of any mix of them."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from numpy.typing import NDArray

import prompttune
from prompttune.errors import PrompttuneError
from prompttune.export.folder import EngineFolder, TaskRecord
from prompttune.export.runtimes import Array
from prompttune.preprocess import Preprocess
from prompttune.serve.admission import Admission
from prompttune.serve.batcher import Outcome
from prompttune.serve.catalogue import Catalogue
from prompttune.serve.images import Decoder
from prompttune.serve.lane import Lane
from prompttune.serve.limits import Limits
from prompttune.serve.metadata import mixed_metadata, task_metadata
from prompttune.serve.metrics import Metrics
from prompttune.serve.models import READY
from prompttune.serve.protocol.types import (
    MIXED,
    DeadlineError,
    IndexEntry,
    InferRequest,
    InferResponse,
    ModelMetadata,
    ModelStatistics,
    ServeError,
    ServerMetadata,
    UnavailableError,
)
from prompttune.serve.repository import Repository
from prompttune.serve.tensors import Payload, Rows, read_rows, write_outputs
from prompttune.serve.tracing import span
from prompttune.serve.traffic import Traffic
from prompttune.serve.workers import Key, VersionGoneError, WorkerDiedError

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
LEAST_URGENT = sys.maxsize
"""The priority 0, which is that of a request that names none."""
READ_INLINE_BYTES = 2**20
"""A request up to this size is checked on the event loop; a thread costs more."""
OBSERVE_EVERY_S = 1.0
ATTEMPTS = 5
"""Of a request whose task changes, or whose worker ends before it had any of its rows."""


@dataclass(frozen=True)
class ServiceSettings:
    """How a service treats its requests."""

    limits: Limits = field(default_factory=Limits)
    max_queue: int = 1024
    """Rows inside the server at most, waiting or running."""
    timeout_s: float = 60.0
    """Of a request that names no shorter one."""
    decode_workers: int = 2
    watch_interval_s: float | None = None
    """Between two looks at the folders; None looks only when a load is asked for."""


@dataclass(frozen=True)
class _Answered:
    """The rows of one task in a request."""

    record: TaskRecord
    outcome: Outcome
    decode_s: float


class Service:
    """Implements :class:`prompttune.serve.protocol.service.InferenceService`. Make it within a running event loop.

    Args:
        folder: the engine.
        catalogue: its tasks on disk.
        lanes: one for each device, not started yet.
        metrics: the counters, which the lanes' batches count in as well.
        traffic: the same for the page.
        settings: how to treat requests.
    """

    def __init__(
        self,
        folder: EngineFolder,
        catalogue: Catalogue,
        lanes: Sequence[Lane],
        metrics: Metrics,
        traffic: Traffic,
        settings: ServiceSettings,
    ) -> None:
        self._folder = folder
        self._lanes = lanes
        self._settings = settings
        self._metrics = metrics
        self._traffic = traffic
        self._admission = Admission(settings.max_queue, traffic)
        self._repository = Repository(catalogue, lanes)
        self._catalogue = catalogue
        self._decoder = Decoder(settings.decode_workers, settings.limits)
        self._started = time.monotonic()
        self._warm = self._draining = False
        self._background: list[asyncio.Task[None]] = []

    # ---------------------------------------------------------------- lifecycle

    async def start(self) -> None:
        """Start the workers, fill their rows, and only then be ready.

        Raises:
            PrompttuneError: the engine cannot be opened.
        """
        scan = await asyncio.to_thread(self._catalogue.scan)
        self._repository.begin(scan.records, scan.problems)
        await _all(lane.start() for lane in self._lanes)
        for lane in self._lanes:
            await self._fill(lane)
        self._warm = True
        self._background.append(asyncio.create_task(self._observe()))
        if self._settings.watch_interval_s is not None:
            self._background.append(asyncio.create_task(self._watch(self._settings.watch_interval_s)))

    async def _fill(self, lane: Lane) -> None:
        models = list(self._repository.models.values())
        for model in models[: lane.capacity]:
            if model.state == READY and model.record is not None and model.key is not None:
                try:
                    await lane.hold(model.key, model.record.folder)
                except PrompttuneError as problem:
                    LOG.warning("a task cannot be served: %s", problem, extra={"task": model.name})
                    model.retire(str(problem))

    async def _observe(self) -> None:
        """Keep the figures of the page fresh."""
        while True:
            for lane in self._lanes:
                await lane.observe()
            await asyncio.sleep(OBSERVE_EVERY_S)

    async def _watch(self, interval_s: float) -> None:
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self._repository.follow()
            except OSError as problem:  # a mount that is away comes back
                LOG.warning("the task folders cannot be read: %s", problem)
            except Exception:
                LOG.exception("looking at the task folders failed")

    async def drain(self, seconds: float) -> bool:
        """Take no more requests and wait for those inside; whether all were answered in time."""
        self._draining = True
        self._admission.close()
        return await self._admission.empty(seconds)

    async def close(self) -> None:
        """End the workers and whatever still waits for them."""
        self._draining = True
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for lane in self._lanes:
            await lane.close()
        self._decoder.close()

    # ------------------------------------------------------------------- health

    def live(self) -> bool:
        """See the interface."""
        return True

    def ready(self) -> bool:
        """See the interface."""
        return self._warm and not self._draining and any(lane.ready for lane in self._lanes)

    def model_ready(self, name: str, version: str = "") -> bool:
        """See the interface."""
        if name == MIXED:
            return self.ready() and not version
        model = self._repository.models.get(name)
        return model is not None and model.state == READY and version in ("", model.version) and self.ready()

    # ----------------------------------------------------------------- metadata

    def server_metadata(self) -> ServerMetadata:
        """See the interface."""
        return ServerMetadata("prompttune", prompttune.__version__, EXTENSIONS)

    def model_metadata(self, name: str, version: str = "") -> ModelMetadata:
        """See the interface."""
        manifest, rows = self._folder.manifest, self._settings.limits.rows
        if name == MIXED and not version:
            return mixed_metadata(manifest, rows)
        return task_metadata(manifest, self._repository.model(name).current(version), rows)

    def index(self, ready: bool = False) -> Sequence[IndexEntry]:
        """See the interface."""
        entries = [model.entry() for _, model in sorted(self._repository.models.items())]
        return [entry for entry in entries if entry.state == READY or not ready]

    def statistics(self, name: str = "", version: str = "") -> Sequence[ModelStatistics]:
        """See the interface."""
        if name:
            model = self._repository.model(name)
            if version:
                model.current(version)
            return [model.statistics]
        return [model.statistics for _, model in sorted(self._repository.models.items())]

    # ------------------------------------------------------------------ control

    async def load(self, name: str) -> None:
        """See the interface."""
        await self._repository.load(name)

    async def unload(self, name: str) -> None:
        """See the interface."""
        await self._repository.unload(name)

    # ---------------------------------------------------------------- inference

    async def infer(self, request: InferRequest) -> InferResponse:
        """See the interface."""
        began = time.monotonic()
        status = "ok"
        tasks = {request.model}
        count = 0
        try:
            rows = await self._read(request)
            tasks, count = set(rows.tasks), len(rows.tasks)
            timeouts = (self._settings.timeout_s, request.timeout_s, rows.timeout_s)
            async with asyncio.timeout(min(one for one in timeouts if one is not None)):
                with self._admission.inside(rows.tasks), span("infer", model=request.model, rows=count):
                    return await self._answer(request, rows)
        except TimeoutError:
            status = "deadline"
            raise DeadlineError("the request's time is over") from None
        except ServeError as problem:
            status = problem.grpc_status.lower()
            raise
        except asyncio.CancelledError:
            status = "cancelled"
            raise
        except PrompttuneError as problem:
            status = "internal"
            raise ServeError(str(problem)) from None
        finally:
            self._count_request(tasks, count, time.monotonic() - began, status)

    def _count_request(self, tasks: Iterable[str], rows: int, seconds: float, status: str) -> None:
        failed = status != "ok"
        self._traffic.request(seconds, rows, failed)
        self._metrics.seconds.observe(seconds)
        for name in tasks:
            model = self._repository.models.get(name)
            if model is not None:  # a made-up name gets no counter of its own
                self._metrics.requests.labels(name, status).inc()
                model.count_request(seconds, failed)

    async def _read(self, request: InferRequest) -> Rows:
        """Check a request; a large one in a thread, as its base64 and its sums take a while."""
        arguments = (request, self._settings.limits, self._folder.manifest.image_size)
        if sum(_bytes(tensor.data) for tensor in request.inputs) <= READ_INLINE_BYTES:
            return read_rows(*arguments)
        return await asyncio.to_thread(read_rows, *arguments)

    async def _answer(self, request: InferRequest, rows: Rows) -> InferResponse:
        places: dict[str, list[int]] = {}
        for place, task in enumerate(rows.tasks):
            places.setdefault(task, []).append(place)
        version = "" if request.model == MIXED else request.version
        for task in places:
            self._repository.model(task).current(version)
        answered = dict(
            zip(
                places,
                await _all(
                    self._answer_task(task, version, [rows.payloads[place] for place in places[task]], rows.priority)
                    for task in places
                ),
                strict=True,
            )
        )
        logits: list[Array] = [None] * len(rows.tasks)  # type: ignore[list-item]
        for task, one in answered.items():
            for place, row in zip(places[task], one.outcome.logits, strict=True):
                logits[place] = row[: len(one.record.labels)]
        began = time.monotonic()
        outputs = write_outputs(rows, logits, [answered[task].record for task in rows.tasks])
        for task, one in answered.items():
            model = self._repository.models[task]
            model.count(one.outcome, len(places[task]))
            model.statistics.compute_input.add(one.decode_s)
            model.statistics.compute_output.add(time.monotonic() - began)
            self._metrics.rows.labels(task).inc(len(places[task]))
            self._metrics.decode_seconds.observe(one.decode_s)
            self._metrics.queue_seconds.observe(one.outcome.queue_s)
        told = "" if request.model == MIXED else answered[request.model].record.version
        return InferResponse(request.model, told, request.id, outputs)

    async def _answer_task(self, name: str, version: str, payloads: Sequence[Payload], priority: int) -> _Answered:
        """Answer the rows of one task, all with one version of it."""
        for _ in range(ATTEMPTS):
            record = self._repository.model(name).current(version)
            began = time.monotonic()
            with span("decode", task=name, rows=len(payloads)):
                images = await self._prepare(record.preprocess, payloads)
            decode_s = time.monotonic() - began
            key = Key(name, record.version)
            try:
                with span("batch", task=name, version=record.version):
                    outcome = await self._lane(key).answer(key, record.folder, images, priority or LEAST_URGENT)
            except VersionGoneError:
                await self._repository.look_again(name)
            except WorkerDiedError:
                continue
            else:
                return _Answered(record, outcome, decode_s)
        raise UnavailableError(f"the task {name!r} is changing, or its worker does not stay up: try again")

    async def _prepare(self, preprocess: Preprocess, payloads: Sequence[Payload]) -> Sequence[Array]:
        if all(payload.normalised for payload in payloads):  # what busy clients send: spare them a task for each row
            return [cast(Array, payload.data) for payload in payloads]
        return await _all(self._decoder.prepare(preprocess, payload) for payload in payloads)

    def _lane(self, key: Key) -> Lane:
        """The device with the least to do; one where the state must be loaded counts as a batch further away."""

        def load(lane: Lane) -> tuple[bool, int]:
            waits = lane.queued_rows + lane.running_rows
            return (not lane.ready, waits + (0 if lane.holds(key) else lane.settings.max_batch))

        return min(self._lanes, key=load)

    # ------------------------------------------------------------------- status

    def status(self) -> dict[str, Any]:
        """See the interface."""
        manifest = self._folder.manifest
        return {
            "server": {
                "name": "prompttune",
                "version": prompttune.__version__,
                "engine": self._folder.path.name,
                "backbone": manifest.backbone["name"],
                "method": manifest.method["name"],
                "precision": manifest.precision,
                "image_size": manifest.image_size,
                "uptime_s": time.monotonic() - self._started,
                "ready": self.ready(),
            },
            "load": {
                "queued_rows": self._admission.rows - sum(lane.running_rows for lane in self._lanes),
                "max_queue": self._settings.max_queue,
                "running_rows": sum(lane.running_rows for lane in self._lanes),
                "rows_per_s": self._traffic.rows_per_s(),
            },
            "workers": [lane.status() for lane in self._lanes],
            "latency": self._traffic.to_list(),
        }

    def task_status(self) -> list[dict[str, Any]]:
        """See the interface."""
        models = [model for _, model in sorted(self._repository.models.items())]
        return [model.status(any(model.key and lane.holds(model.key) for lane in self._lanes)) for model in models]

    def metrics(self) -> bytes:
        """See the interface."""
        return self._metrics.render()


def _bytes(data: NDArray[Any]) -> int:
    return sum(map(len, data.flat)) if data.dtype == object else data.nbytes


async def _all(calls: Iterable[Any]) -> list[Any]:
    """The results of all calls; the first failure cancels the others and is raised as it is."""
    first, *others = calls
    if not others:
        return [await first]
    tasks = [asyncio.ensure_future(call) for call in (first, *others)]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
