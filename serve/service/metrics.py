"""What a server counts: Prometheus' metrics, and the recent traffic of the web page.

Names of metrics follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from prompttune.serve.batching.batcher import BatchSize
from prompttune.serve.batching.replica import DeviceReplica

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SECONDS_KEPT = 300


def percentiles_ms(seconds: Sequence[float], shares: Sequence[int] = (50, 95)) -> dict[str, float | None]:
    """``p50_ms`` and so on, by nearest rank; None without traffic."""
    ordered = sorted(seconds)
    ranks = {share: math.ceil(share * len(ordered) / 100) for share in shares}
    return {f"p{share}_ms": ordered[rank - 1] * 1000 if ordered else None for share, rank in ranks.items()}


@dataclass
class _Second:
    time: int
    seconds: list[float] = field(default_factory=list)
    errors: int = 0
    rows: int = 0
    batches: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "time": self.time,
            "requests": len(self.seconds),
            "errors": self.errors,
            "rows": self.rows,
            **percentiles_ms(self.seconds, (50, 95, 99)),
            "batch_rows": sum(self.batches) / len(self.batches) if self.batches else None,
        }


class Metrics:
    """The counters of one server, in their own registry, and the traffic of its last minutes."""

    def __init__(self, replicas: Sequence[DeviceReplica]) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("requests", "Number of finished requests.", "task", "status")
        self._rows = self._counter("rows", "Number of answered images.", "task")
        self._request_seconds = self._histogram("request_seconds", "Time from the call to the answer.")
        self._decode_seconds = self._histogram("decode_seconds", "Time to decode and resize images.")
        self._queue_seconds = self._histogram("queue_seconds", "Time in the queue.")
        self._batch_rows = self._histogram("batch_rows", "Images of a batch.", _ROWS)
        self._batch_answers = self._counter("batch_answers", "Number of answers of batches, an image and a task each.")
        self._batch_padding = self._counter("batch_padding", "Number of answers that were computed as padding besides.")
        self._batch_seconds = self._histogram("batch_seconds", "Time of a batch in the engine.")
        self._registry.register(_Replicas(replicas))
        self._recent: deque[_Second] = deque(maxlen=SECONDS_KEPT)
        """The last seconds with traffic, oldest first."""

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"prompttune_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
        return Histogram(f"prompttune_{name}", text, buckets=buckets, registry=self._registry)

    def _now(self) -> _Second:
        now = int(time.time())
        if not self._recent or self._recent[-1].time != now:
            self._recent.append(_Second(now))
        return self._recent[-1]

    def request(self, tasks: Iterable[str], rows: int, seconds: float, status: str) -> None:
        """Count a finished request for known tasks."""
        self._request_seconds.observe(seconds)
        for task in tasks:
            self._requests.labels(task, status).inc()
        second = self._now()
        second.seconds.append(seconds)
        second.errors += status != "ok"
        second.rows += rows if status == "ok" else 0

    def decoded(self, seconds: float) -> None:
        """Count the decoding of an answered request."""
        self._decode_seconds.observe(seconds)

    def answer(self, task: str, rows: int, queue_s: float) -> None:
        """Count the answered rows of one task in a request."""
        self._rows.labels(task).inc(rows)
        self._queue_seconds.observe(queue_s)

    def batch(self, size: BatchSize, seconds: float) -> None:
        """Count a finished batch."""
        self._batch_rows.observe(size.images)
        self._batch_answers.inc(size.answers)
        self._batch_padding.inc(size.padding)
        self._batch_seconds.observe(seconds)
        self._now().batches.append(size.images)

    def rows_per_s(self, over: int = 10) -> float:
        """Answered rows per second, over the last ``over`` whole seconds."""
        now = int(time.time())
        return sum(one.rows for one in self._recent if now - over <= one.time < now) / over

    def recent(self) -> list[dict[str, Any]]:
        """One entry for each second with traffic in the last minutes, oldest first."""
        return [second.to_dict() for second in self._recent]

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text


class _Replicas(Collector):
    """Gauges and counters of each device, read at each scrape."""

    _GAUGES = (
        ("ready", "Whether the worker answers.", lambda replica: replica.ready),
        ("queued_rows", "Number of rows that wait for a batch.", lambda replica: replica.queued_rows),
        ("running_rows", "Number of rows in running batches.", lambda replica: replica.running_rows),
        ("resident_tasks", "Number of task states that hold a row.", lambda replica: replica.resident),
    )
    _COUNTERS = (
        ("worker_restarts", "Number of worker restarts.", lambda replica: replica.restarts),
        ("resident_hits", "Number of requested states that already held a row.", lambda replica: replica.counts.hits),
        ("resident_misses", "Number of requested states that had to be loaded.", lambda replica: replica.counts.misses),
        ("resident_evictions", "Number of evicted states.", lambda replica: replica.counts.evictions),
        ("image_hits", "Images whose frozen work was kept.", lambda replica: replica.status()["image_hits"] or 0),
        ("image_misses", "Images whose frozen work was not.", lambda replica: replica.status()["image_misses"] or 0),
    )

    def __init__(self, replicas: Sequence[DeviceReplica]) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        """One sample for each replica."""
        for kind, described in ((GaugeMetricFamily, self._GAUGES), (CounterMetricFamily, self._COUNTERS)):
            for name, text, value in described:
                family = kind(f"prompttune_{name}", text, labels=["device"])
                for replica in self._replicas:
                    family.add_metric([replica.device], float(value(replica)))  # type: ignore[no-untyped-call]
                yield family
