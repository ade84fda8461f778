"""Benchmarks: an engine compared with the plain backbone, PyTorch or other engines, timed in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompttune.lazy import lazy_names

if TYPE_CHECKING:
    from prompttune.serve.bench.report import BenchReport
    from prompttune.serve.bench.run import bench_engine
    from prompttune.serve.bench.settings import BenchSettings
    from prompttune.serve.bench.timing import Latency, Ratio, Rounds, interleaved

_LAZY = {
    "BenchReport": "prompttune.serve.bench.report",
    "BenchSettings": "prompttune.serve.bench.settings",
    "Latency": "prompttune.serve.bench.timing",
    "Ratio": "prompttune.serve.bench.timing",
    "Rounds": "prompttune.serve.bench.timing",
    "bench_engine": "prompttune.serve.bench.run",
    "interleaved": "prompttune.serve.bench.timing",
}

__all__ = ["BenchReport", "BenchSettings", "Latency", "Ratio", "Rounds", "bench_engine", "interleaved"]

__getattr__ = lazy_names(__name__, _LAZY)
