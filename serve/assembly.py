"""From an engine folder to a service: workers, lanes, catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from prompttune.errors import EngineError, UsageError
from prompttune.export.folder import EngineFolder
from prompttune.export.layout import BATCH, TASKS
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.batcher import STALL_S
from prompttune.serve.catalogue import Catalogue
from prompttune.serve.lane import Lane
from prompttune.serve.limits import MEBI
from prompttune.serve.metrics import Metrics
from prompttune.serve.service import Service, ServiceSettings
from prompttune.serve.traffic import Traffic
from prompttune.serve.workers import Worker, WorkerSettings, open_worker


@dataclass(frozen=True)
class EngineSettings:
    """Which engine is served, on which devices, and how much memory its tasks may take."""

    engine: Path
    devices: Sequence[str] = ("cpu",)
    """Devices to serve on, with one worker each."""
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    """Options of the runtime. Each of ``devices`` replaces its device."""
    max_batch: int = 16
    max_delay_s: float = 0.0
    stall_s: float = STALL_S
    """Longest time of a batch, in seconds. A worker that exceeds it is ended and restarted."""
    resident_tasks: int = 64
    """Bank rows on each device."""
    host_bytes: int = 1024 * MEBI
    """Host memory of each worker for states that do not hold a row, in bytes."""
    watch: Sequence[Path] = ()
    """Additional folders of tasks to follow."""
    in_process: bool = False
    """Run the engines in this process, where a crash ends all of them; for a process under a supervisor."""

    def __post_init__(self) -> None:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise UsageError("name each device once, and one at least")
        for device in self.devices:
            _ = RuntimeOptions(device).cuda_index  # raises for an unknown device
        if self.max_batch < 1 or self.resident_tasks < 1:
            raise UsageError("the largest batch and the number of resident tasks must be at least 1")
        if self.max_delay_s < 0 or self.host_bytes < 0 or self.stall_s <= 0:
            raise UsageError("delay and host memory cannot be negative, and a batch needs time")


def make_service(engine: EngineSettings, settings: ServiceSettings | None = None) -> Service:
    """Make a service over an engine folder, ready to be started. Call it within a running event loop.

    Raises:
        EngineError: the folder is not an engine, is damaged, or its tasks are baked in and cannot be followed.
    """
    folder = EngineFolder(engine.engine)
    folder.manifest.refuse_segmentation("the server")
    manifest = folder.manifest
    catalogue = Catalogue(folder, engine.watch)
    rows = manifest.sizes.most(TASKS, engine.resident_tasks)
    capacity = None if manifest.baked is not None else rows
    if manifest.baked is not None and engine.watch:
        raise EngineError(f"the tasks of {engine.engine} are baked into its model: it cannot take others from a folder")
    axes = catalogue.axes(catalogue.scan().records)
    traffic = Traffic()
    lanes: list[Lane] = []
    metrics = Metrics(lanes)

    def count(rows: int, seconds: float) -> None:
        traffic.batch(rows)
        metrics.batch_rows.observe(rows)
        metrics.batch_seconds.observe(seconds)

    def make(worker: WorkerSettings) -> Worker:
        return open_worker(worker, process=not engine.in_process)

    for device in engine.devices:
        worker = WorkerSettings(
            engine=engine.engine,
            runtime=replace(engine.runtime, device=device),
            rows=rows,
            axes=axes,
            max_batch=manifest.sizes.most(BATCH, engine.max_batch),
            host_bytes=engine.host_bytes,
        )
        lanes.append(Lane(worker, make, capacity, engine.max_delay_s, count, engine.stall_s))
    return Service(folder, catalogue, lanes, metrics, traffic, settings or ServiceSettings())
