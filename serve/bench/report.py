"""Results of a benchmark as values and as rows of a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from prompttune.serve.bench.timing import Latency, Ratio

MEBI = 2**20


@dataclass(frozen=True)
class SubjectReport:
    """One side of the comparison."""

    name: str
    """``engine``, ``backbone``, ``torch``, or another engine's folder."""
    description: str
    load_s: float
    """Seconds to open it, once; for an engine, including the check of its digests."""
    resident_bytes: int | None
    """Growth of the process's resident set by opening it and answering the largest batch, in bytes; None off Linux."""
    peak_bytes: int | None
    """Highest such growth in between, in bytes; None if the kernel does not report it."""
    device_bytes: int | None
    """Growth of the used memory on the CUDA device, in bytes; None on a CPU."""


@dataclass(frozen=True)
class Measurement:
    """One subject at one batch size and mix."""

    subject: str
    batch_size: int
    mix: str
    tasks: int
    """Number of tasks that the rows alternate between; 0 for a side without tasks."""
    latency: Latency
    images_per_s: float
    """Speed at the median latency, in images per second."""
    engine_over: Ratio | None
    """The engine's time divided by this subject's; None for the engine itself."""


@dataclass(frozen=True)
class Mixing:
    """The engine's time for mixed rows divided by its time for rows of one task, at one batch size."""

    batch_size: int
    tasks: int
    over_one: Ratio


@dataclass(frozen=True)
class FanOut:
    """The engine's time for several tasks of each image in one call, at one batch size."""

    batch_size: int
    tasks: int
    """Number of tasks that each image is asked about."""
    latency: Latency
    over_one: Ratio
    """Divided by its time for one task of each image."""
    over_backbone: Ratio | None
    """Divided by the plain backbone's time; None if the two are not compared."""


@dataclass(frozen=True)
class Switching:
    """Calls of one row that alternate between two tasks, A B A B, compared with calls of A alone."""

    tasks: tuple[str, str]
    calls: int
    """Number of calls in a round; the figures are per call."""
    same: Latency
    alternating: Latency
    over_same: Ratio


@dataclass(frozen=True)
class Adding:
    """Time to make one more task resident in the open engine."""

    state: Latency
    """Time from a folded state, as read from an engine folder."""
    checkpoint: Latency | None
    """Time from a checkpoint, folded but not compared with PyTorch, with the backbone already loaded."""
    first_checkpoint_s: float | None
    """Seconds of the first such call, which loads the backbone."""


@dataclass(frozen=True)
class BenchReport:
    """All results of one run of the benchmark."""

    engine: str
    backbone: str
    image_size: int
    method: str
    format: str
    precision: str
    bank_precision: str
    device: str
    threads: int
    hardware: str
    versions: dict[str, str]
    warmup: int
    repeats: int | None
    """Number of measured rounds; None if ``seconds`` was given."""
    seconds: float | None
    seed: int
    resident_tasks: int
    bytes_per_task: int
    """Bytes of one bank row, padded to the largest resident task; 0 if the tasks are part of the model."""
    subjects: tuple[SubjectReport, ...]
    measurements: tuple[Measurement, ...]
    mixing: tuple[Mixing, ...]
    fan_out: tuple[FanOut, ...]
    switching: Switching | None
    """None for a single task, or if it was not requested."""
    adding: Adding | None
    """None if the tasks are part of the model, or if it was not requested."""
    quickest: str | None = None
    """A line about the quickest runtime; None if runtimes were not compared."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row of a table per measurement, with its subject's figures; missing figures are empty strings."""
        subjects = {one.name: one for one in self.subjects}
        for one in self.measurements:
            subject, over = subjects[one.subject], one.engine_over
            yield {
                "backbone": self.backbone,
                "image_size": self.image_size,
                "method": self.method,
                "format": self.format,
                "precision": self.precision,
                "bank_precision": self.bank_precision,
                "subject": one.subject,
                "batch": one.batch_size,
                "mix": one.mix,
                "tasks": one.tasks,
                "rounds": one.latency.rounds,
                "p50_ms": f"{one.latency.p50_ms:.3f}",
                "p90_ms": f"{one.latency.p90_ms:.3f}",
                "p99_ms": f"{one.latency.p99_ms:.3f}",
                "images_per_s": f"{one.images_per_s:.2f}",
                "engine_over": "" if over is None else f"{over.median:.3f}",
                "load_s": f"{subject.load_s:.3f}",
                "peak_mib": mebibytes(subject.peak_bytes),
                "device_mib": mebibytes(subject.device_bytes),
                "bytes_per_task": self.bytes_per_task,
            }


def mebibytes(size: int | None) -> str:
    """A size in MiB; empty for None."""
    return "" if size is None else f"{size / MEBI:.1f}"
