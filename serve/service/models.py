"""The server's view of each task: its record, whether it answers, and its statistics."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from prompttune.export.folder import TaskRecord
from prompttune.serve.batching.batcher import JobResult
from prompttune.serve.messages import IndexEntry, ModelStatistics, NotFoundError, shown
from prompttune.serve.service.metrics import percentiles_ms
from prompttune.serve.workers import Key

READY, LOADING, UNAVAILABLE = "READY", "LOADING", "UNAVAILABLE"
LABELS_SHOWN = 20
LATENCIES_KEPT = 256
"""Number of durations kept per task: enough for a 99th percentile, small for thousands of tasks."""


@dataclass(eq=False)
class Model:
    """A task that is served or could be served."""

    name: str
    record: TaskRecord | None = None
    """Record of the version that answers; None without one."""
    number: int = 0
    """Number of that version; 0 before the first."""
    state: str = UNAVAILABLE
    reason: str = ""
    unloaded: bool = False
    """Whether it was unloaded on request: it then stays unloaded until a load request."""
    refused: str = ""
    """Version on disk that could not be loaded, so that it is not tried again and again."""
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    statistics: ModelStatistics = field(init=False)
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))
    """Durations of the last requests, in seconds."""

    def __post_init__(self) -> None:
        self.statistics = ModelStatistics(self.name, str(self.number or ""))

    @property
    def version(self) -> str:
        """Digest of the record; empty without one."""
        return self.record.version if self.record else ""

    @property
    def key(self) -> Key | None:
        """Key of the answering version in a worker."""
        return Key(self.name, self.record.version) if self.record else None

    def current(self, version: str = "") -> TaskRecord:
        """The record of the version that answers.

        Raises:
            NotFoundError: no version answers, or ``version`` names another one.
        """
        if self.state != READY or self.record is None:
            raise NotFoundError(f"the task {self.name!r} is not available: {self.reason or self.state.lower()}")
        if not self.named(version):
            has = f"{self.number} ({self.record.version})"
            raise NotFoundError(f"the task {self.name!r} has the version {has}, not {shown(version)}")
        return self.record

    def named(self, version: str) -> bool:
        """Whether ``version`` names the answering version, by number or digest; an empty one always does."""
        return version in ("", str(self.number), self.version)

    def replace(self, record: TaskRecord, number: int) -> Key | None:
        """Answer with ``record`` from now on; return the key of the version before if it differs."""
        old = self.key
        self.number = number
        self.record, self.state, self.reason, self.unloaded, self.refused = record, READY, "", False, ""
        self.statistics.version = str(number)
        return old if old != self.key else None

    def retire(self, reason: str) -> Key | None:
        """Stop answering; return the key of the version before."""
        old = self.key
        self.record, self.state, self.reason = None, UNAVAILABLE, reason
        return old

    def entry(self) -> IndexEntry:
        """The task's entry in the repository index."""
        return IndexEntry(self.name, str(self.number) if self.record else "", self.state, self.reason)

    def count(self, outcome: JobResult, rows: int, decode_s: float, write_s: float) -> None:
        """Count an answer of ``rows`` rows; :meth:`count_request` counts the request."""
        statistics, stages = self.statistics, self.statistics.inference_stats
        statistics.last_inference = int(time.time() * 1000)
        statistics.inference_count += rows
        statistics.execution_count += len(outcome.batches)
        stages.queue.add(outcome.queue_s)
        stages.compute_input.add(decode_s)
        stages.compute_infer.add(outcome.infer_s)
        stages.compute_output.add(write_s)
        for size, seconds in outcome.batches:
            statistics.add_batch(size, seconds)

    def count_request(self, seconds: float, failed: bool) -> None:
        """Count a finished request."""
        stages = self.statistics.inference_stats
        (stages.fail if failed else stages.success).add(seconds)
        self.latencies.append(seconds)

    def status(self, resident: bool) -> dict[str, Any]:
        """Figures for the web page."""
        stages = self.statistics.inference_stats
        labels = self.record.labels if self.record else ()
        return {
            "name": self.name,
            "version": str(self.number) if self.record else "",
            "task_version": self.version,
            "state": self.state,
            "reason": self.reason,
            "resident": resident,
            "labels": list(labels[:LABELS_SHOWN]),
            "num_classes": len(labels),
            "requests": stages.success.count + stages.fail.count,
            "errors": stages.fail.count,
            **percentiles_ms(self.latencies),
            "last_used": self.statistics.last_inference / 1000 or None,
        }
