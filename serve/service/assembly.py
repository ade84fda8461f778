"""From an engine folder to a service: workers, replicas, catalogue."""

from __future__ import annotations

from dataclasses import replace

from prompttune.errors import EngineError
from prompttune.export.folder import EngineFolder, Manifest
from prompttune.export.layout import BATCH, TASKS
from prompttune.serve.batching.replica import DeviceReplica
from prompttune.serve.service.catalogue import Catalogue
from prompttune.serve.service.metrics import Metrics
from prompttune.serve.service.service import Service
from prompttune.serve.service.settings import EngineSettings, ServiceSettings
from prompttune.serve.workers import Worker, WorkerSettings

READERS = 64
"""Answers of a batch for each of its images, if tasks only read what the shared pass over an image left."""


def make_service(engine: EngineSettings, settings: ServiceSettings | None = None) -> Service:
    """Make a service over an engine folder, ready to be started. Call it within a running event loop.

    Raises:
        EngineError: the folder is not an engine, is damaged, or its tasks are baked in and cannot be followed.
    """
    folder = EngineFolder(engine.engine)
    folder.manifest.task_type.refuse("server", EngineError)
    manifest = folder.manifest
    catalogue = Catalogue(folder, engine.watch)
    rows = manifest.sizes.most(TASKS, engine.resident_tasks)
    capacity = None if manifest.baked is not None else rows
    if manifest.baked is not None and engine.watch:
        raise EngineError(f"the tasks of {engine.engine} are baked into its model: it cannot take others from a folder")
    axes = catalogue.axes(catalogue.scan().records)
    replicas: list[DeviceReplica] = []
    metrics = Metrics(replicas)

    def make(worker: WorkerSettings) -> Worker:
        return Worker(worker, process=not engine.in_process)

    for device in engine.devices:
        worker = WorkerSettings(
            engine=engine.engine,
            runtime=replace(engine.runtime, device=device),
            rows=rows,
            axes=axes,
            max_batch=manifest.sizes.most(BATCH, engine.max_batch),
            host_bytes=engine.host_bytes,
        )
        answers = most_answers(manifest, worker.max_batch)
        replicas.append(
            DeviceReplica(worker, make, capacity, engine.max_delay_s, metrics.batch, engine.stall_s, answers)
        )
    return Service(folder, catalogue, replicas, metrics, settings or ServiceSettings())


def most_answers(manifest: Manifest, max_batch: int) -> int:
    """Largest number of answers in a batch, an image and a task each; 0 if the tasks share no work on an image.

    Where a task tunes blocks, an answer takes the memory of an image in them.
    """
    if not manifest.asks_many:
        return 0
    if manifest.only_reads:
        return READERS * max_batch
    return max_batch if manifest.method["graph_settings"].get("first_block") else 0
