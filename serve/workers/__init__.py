"""Workers: each runs one engine on one device."""

from prompttune.serve.workers.base import (
    Answer,
    Key,
    VersionGoneError,
    Worker,
    WorkerDiedError,
    WorkerSettings,
    WorkerStats,
)
from prompttune.serve.workers.inprocess import InProcessWorker
from prompttune.serve.workers.process import ProcessWorker

__all__ = [
    "Answer",
    "InProcessWorker",
    "Key",
    "ProcessWorker",
    "VersionGoneError",
    "Worker",
    "WorkerDiedError",
    "WorkerSettings",
    "WorkerStats",
    "open_worker",
]


def open_worker(settings: WorkerSettings, process: bool) -> Worker:
    """Create a worker that is not started yet, in its own process or in this one."""
    return ProcessWorker(settings) if process else InProcessWorker(settings)
