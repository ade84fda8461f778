"""Prometheus metrics. Names follow https://prometheus.io/docs/practices/naming/."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from prompttune.serve.lane import Lane

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "prompttune_requests", "Requests that ended.", ["task", "status"], registry=self._registry
        )
        self.rows = Counter("prompttune_rows", "Images that were answered.", ["task"], registry=self._registry)
        self.seconds = Histogram(
            "prompttune_request_seconds", "From the call to the answer.", buckets=_SECONDS, registry=self._registry
        )
        self.decode_seconds = Histogram(
            "prompttune_decode_seconds", "Decoding and resizing a request.", buckets=_SECONDS, registry=self._registry
        )
        self.queue_seconds = Histogram(
            "prompttune_queue_seconds", "From decoded to the first batch.", buckets=_SECONDS, registry=self._registry
        )
        self.batch_rows = Histogram("prompttune_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=self._registry)
        self.batch_seconds = Histogram(
            "prompttune_batch_seconds", "A batch in the engine.", buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_Lanes(lanes))

    def render(self) -> bytes:
        """The text format."""
        text: bytes = generate_latest(self._registry)
        return text


class _Lanes(Collector):
    """What each device holds, read when it is asked for."""

    _GAUGES = (
        ("ready", "Whether the worker answers.", lambda lane: lane.ready),
        ("queued_rows", "Rows that wait for a batch.", lambda lane: lane.queued_rows),
        ("running_rows", "Rows in batches that run.", lambda lane: lane.running_rows),
        ("resident_tasks", "Task states that hold a row.", lambda lane: lane.resident),
    )
    _COUNTERS = (
        ("worker_restarts", "Times the worker was started again.", lambda lane: lane.restarts),
        ("resident_hits", "States that were in a row when asked for.", lambda lane: lane.counts.hits),
        ("resident_misses", "States that had to be loaded.", lambda lane: lane.counts.misses),
        ("resident_evictions", "States that left their row.", lambda lane: lane.counts.evictions),
    )

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._lanes = lanes

    def collect(self) -> Iterable[Metric]:
        """One sample for each lane."""
        for kind, described in ((GaugeMetricFamily, self._GAUGES), (CounterMetricFamily, self._COUNTERS)):
            for name, text, value in described:
                family = kind(f"prompttune_{name}", text, labels=["device"])
                for lane in self._lanes:
                    family.add_metric([lane.device], float(value(lane)))  # type: ignore[no-untyped-call]
                yield family
