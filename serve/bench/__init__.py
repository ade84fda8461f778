"""Benchmarks: an engine compared with the plain backbone, PyTorch or other engines, timed in turn."""

from prompttune.serve.bench.report import BenchReport, plot_report
from prompttune.serve.bench.run import bench_engine
from prompttune.serve.bench.timing import Latency, Ratio, Rounds, interleaved

__all__ = ["BenchReport", "Latency", "Ratio", "Rounds", "bench_engine", "interleaved", "plot_report"]
