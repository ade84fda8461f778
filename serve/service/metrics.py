"""Prometheus metrics. Names follow https://prometheus.io/docs/practices/naming/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from prompttune.serve.batching.replica import DeviceReplica

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server, in their own registry."""

    def __init__(self, replicas: Sequence[DeviceReplica]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "prompttune_requests", "Number of finished requests.", ["task", "status"], registry=self._registry
        )
        self.rows = Counter("prompttune_rows", "Number of answered images.", ["task"], registry=self._registry)
        self.seconds = Histogram(
            "prompttune_request_seconds", "Time from the call to the answer.", buckets=_SECONDS, registry=self._registry
        )
        self.decode_seconds = Histogram(
            "prompttune_decode_seconds", "Time to decode and resize images.", buckets=_SECONDS, registry=self._registry
        )
        self.queue_seconds = Histogram(
            "prompttune_queue_seconds", "Time in the queue.", buckets=_SECONDS, registry=self._registry
        )
        self.batch_rows = Histogram("prompttune_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=self._registry)
        self.batch_seconds = Histogram(
            "prompttune_batch_seconds", "Time of a batch in the engine.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_Replicas(replicas))

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
