"""What the benchmarks share: options, interleaved timing, ratios, and CSV files that name machine and versions."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

import prompttune as pt
from prompttune.export.runtimes import RuntimeOptions
from prompttune.serve.bench import BenchReport, BenchSettings, Latency, Ratio, Rounds, bench_engine, interleaved
from prompttune.serve.bench.machine import machine_columns, write_csv

RESULTS = Path(__file__).parent / "results"
WARMUP = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Command = TypeVar("Command", bound=Callable[..., Any])
Key = TypeVar("Key")


@dataclass(frozen=True)
class Model:
    """Which backbone a benchmark runs on."""

    backbone: str
    image_size: int
    weights: str

    def load(self) -> pt.Backbone:
        return pt.load_backbone(self.backbone, self.image_size, self.weights)

    @property
    def columns(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"backbone": self.backbone, "image_size": self.image_size}


@dataclass(frozen=True)
class Run:
    """How often, where and with how many threads everything is timed, and where the figures go."""

    rounds: int
    threads: int
    device: str
    results: Path

    @property
    def target(self) -> torch.device:
        return torch.device(self.device)

    @property
    def timed(self) -> Rounds:
        """The rounds behind the suite's warm-up."""
        return Rounds(WARMUP, self.rounds)

    def interleaved(self, runs: Mapping[Key, Callable[[], Any]]) -> dict[Key, list[float]]:
        """Seconds of each run, taken in turn so that a noisy machine disturbs all alike."""
        torch.set_num_threads(self.threads)
        target = self.target
        return interleaved(runs, self.timed, lambda: torch.cuda.synchronize(target) if target.type == "cuda" else None)

    def bench(self, engine: Path, batches: Sequence[int], **arguments: Any) -> BenchReport:
        """An engine beside what it is held against, without the costs of adding and switching tasks."""
        settings = BenchSettings(batch_sizes=tuple(batches), rounds=self.timed, task_costs=False, **arguments)
        return bench_engine(engine, settings, RuntimeOptions(self.device, self.threads))

    def write_csv(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows with the machine's columns to ``<results>/<name>.csv``, and say so."""
        command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
        path = self.results / f"{name}.csv"
        write_csv(path, rows, machine_columns(self.device, self.threads, command))
        click.echo(f"wrote {path}")


_MODEL_OPTIONS = [
    click.option("--backbone", default="vit_base_patch16_224", show_default=True, help="timm name."),
    click.option("--image-size", default=224, show_default=True),
    click.option("--weights", default="random", show_default=True, help="Of the backbone: random, auto or a file."),
]
_RUN_OPTIONS = [
    click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Timed rounds."),
    click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="CPU threads of every side."),
    click.option("--device", default="cpu", show_default=True),
    click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Folder for the CSV file."),
]


def _packed(name: str, kind: type, options: Sequence[Callable[[Command], Command]], command: Command) -> Command:
    """``command`` with some options that reach it as one argument ``name`` of type ``kind``."""
    fields = [field.name for field in dataclasses.fields(kind)]

    @functools.wraps(command)
    def pack(**values: Any) -> Any:
        return command(**{name: kind(*(values.pop(field) for field in fields))}, **values)

    for option in reversed(options):
        pack = option(pack)
    return pack


def model_options(command: Command) -> Command:
    """``--backbone``, ``--image-size`` and ``--weights`` as the argument ``model``."""
    return _packed("model", Model, _MODEL_OPTIONS, command)


def run_options(command: Command) -> Command:
    """``--rounds``, ``--threads``, ``--device`` and ``--results`` as the argument ``run``."""
    return _packed("run", Run, _RUN_OPTIONS, command)


def batch_option(*default: int) -> Callable[[Command], Command]:
    """``--batch``, repeatable."""
    return click.option("--batch", "batches", multiple=True, type=int, default=default, show_default=True)


def ratio(seconds: Sequence[float], floor: Sequence[float]) -> float:
    """Median of the rounds' ratios."""
    return Ratio.of(seconds, floor).median


def speed(batch: int, seconds: Sequence[float], floor: Sequence[float], over: str) -> dict[str, str]:
    """Columns ``over`` and ``images_per_s`` of one run of ``batch`` images."""
    return {over: f"{ratio(seconds, floor):.3f}", "images_per_s": f"{Latency.of(seconds).per(batch):.2f}"}
