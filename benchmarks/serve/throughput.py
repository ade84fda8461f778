"""Images a second through gRPC with binary tensors, over the engine's own at the same batch, side by side.

The engine alone is timed in this process before and after the server is, with the same threads, batch and mix of
tasks. Server, worker and clients share the machine with each other, the engine alone has it to itself: on two cores an
engine of two threads leaves the others nothing.

python -m benchmarks.serve.throughput
python -m benchmarks.serve.throughput --model vit-s --threads 2 --seconds 30
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np

import prompttune as pt
from benchmarks.common import Model
from benchmarks.engines import workshop
from benchmarks.serve.serving import MODELS, RESULTS, Load, Running, Seen, drive, launched, make_engine
from prompttune.serve.bench.machine import machine_columns, write_csv
from prompttune.serve.bench.subjects import noise

TASKS = 8
WARMUP_S = 3.0


def raw(engine: Path, batch: int, threads: int, seconds: float) -> float:
    """Images a second of the engine alone, every row for another task."""
    opened = pt.Engine(engine, threads=threads)
    images = noise(batch, opened.image_size, seed=0)
    tasks = [opened.tasks[row % TASKS] for row in range(batch)]
    opened.logits(images, tasks)
    rows, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        opened.logits(images, tasks)
        rows += batch
    return rows / (time.perf_counter() - began)


def served(server: Running, model: Model, batch: int, rows: int, seconds: float) -> Seen:
    """What clients see that keep three batches inside, ``rows`` images a request."""
    tasks = [f"task{number}" for number in range(TASKS)]
    load = Load(server.grpc, WARMUP_S, max(2, 3 * batch // rows), rows, model.image_size, tasks)
    drive(load)
    return drive(replace(load, seconds=seconds))


def measure(engine: Path, model: Model, batch: int, sizes: Sequence[int], threads: int, seconds: float) -> list[dict]:
    """A row for each size of request."""
    alone = [raw(engine, batch, threads, seconds / 2)]
    with launched(engine, "--max-batch", str(batch), "--threads", str(threads)) as server:
        seen = {size: served(server, model, batch, size, seconds) for size in sizes}
    alone.append(raw(engine, batch, threads, seconds / 2))
    return [
        {
            **model.columns,
            "batch": batch,
            "engine_threads": threads,
            "rows_a_request": size,
            "mb_a_request": f"{size * 3 * model.image_size**2 * 4 / 1e6:.2f}",
            "engine_images_per_s": f"{np.mean(alone):.1f}",
            "engine_spread": f"{max(alone) / min(alone) - 1:.3f}",
            "served_images_per_s": f"{one.rows_per_s:.1f}",
            "served_over_engine": f"{one.rows_per_s / np.mean(alone):.3f}",
            "p50_ms": f"{one.percentile(50):.1f}",
            "p99_ms": f"{one.percentile(99):.1f}",
            "errors": sum(one.errors.values()),
        }
        for size, one in seen.items()
    ]


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=list(MODELS))
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--rows", multiple=True, type=click.IntRange(1), default=(1, 16), help="Images of a request.")
@click.option("--threads", multiple=True, type=click.IntRange(1), default=(1, 2), help="Of the engine, on both sides.")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Of each measurement.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    models: tuple[str, ...],
    batch: int,
    rows: tuple[int, ...],
    threads: tuple[int, ...],
    seconds: float,
    results: Path,
) -> None:
    found = []
    for name in models:
        with workshop() as folder:
            engine = make_engine(folder, MODELS[name], TASKS)
            for count in threads:
                for row in measure(engine, MODELS[name], batch, rows, count, seconds):
                    click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
                    found.append({"model": name, **row})
    columns = machine_columns("cpu", max(threads), "python -m benchmarks.serve.throughput")
    write_csv(results / "throughput_cpu.csv", found, columns)


if __name__ == "__main__":
    main()
