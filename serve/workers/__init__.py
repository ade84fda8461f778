"""Workers: each runs one engine on one device."""

from prompttune.serve.workers.base import (
    BatchResult,
    Key,
    VersionGoneError,
    WorkerDiedError,
    WorkerSettings,
    WorkerStats,
)
from prompttune.serve.workers.worker import Worker

__all__ = [
    "BatchResult",
    "Key",
    "VersionGoneError",
    "Worker",
    "WorkerDiedError",
    "WorkerSettings",
    "WorkerStats",
]
