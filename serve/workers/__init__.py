"""Workers: one engine on one device each."""

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
    """A worker that has yet to start, in a process of its own or in this one."""
    return ProcessWorker(settings) if process else InProcessWorker(settings)
