"""Benchmarks: an engine compared with the plain backbone, PyTorch or other engines, timed in turn."""

from prompttune.serve.bench.report import BenchReport
from prompttune.serve.bench.run import bench_engine
from prompttune.serve.bench.settings import BenchSettings
from prompttune.serve.bench.timing import Latency, Ratio, Rounds, interleaved

__all__ = ["BenchReport", "BenchSettings", "Latency", "Ratio", "Rounds", "bench_engine", "interleaved"]
