"""Images a second through gRPC with binary tensors, over the engine's own at the same batch, side by side.

The engine alone is timed in this process before and after the server is, with the same threads, batch and mix of
tasks. Server, worker and clients share the machine with each other, the engine alone has it to itself.

python -m benchmarks.serve.throughput
python -m benchmarks.serve.throughput --model vit-s --batch 8 --seconds 30
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np

import prompttune as pt
from benchmarks.engines import workshop
from benchmarks.serve.serving import MODELS, RESULTS, Load, drive, launched, make_engine
from prompttune.serve.bench.machine import machine_columns, write_csv
from prompttune.serve.bench.subjects import noise

TASKS = 8


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


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=list(MODELS))
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--rows", type=click.IntRange(1), multiple=True, default=(1, 16), help="Images of a request.")
@click.option("--seconds", type=float, default=20.0, show_default=True, help="Of each measurement.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    models: tuple[str, ...], batch: int, rows: tuple[int, ...], seconds: float, threads: int, results: Path
) -> None:
    found = []
    for name in models:
        with workshop() as folder:
            engine = make_engine(folder, MODELS[name], TASKS)
            alone = [raw(engine, batch, threads, seconds / 2)]
            served = {}
            with launched(engine, "--max-batch", str(batch), "--threads", str(threads)) as server:
                for size in rows:
                    load = Load(
                        server.grpc,
                        seconds,
                        clients=max(2, 3 * batch // size),
                        rows=size,
                        image_size=MODELS[name].image_size,
                        tasks=[f"task{number}" for number in range(TASKS)],
                    )
                    drive(Load(**{**load.__dict__, "seconds": 2.0}))
                    served[size] = drive(load)
            alone.append(raw(engine, batch, threads, seconds / 2))
        for size, seen in served.items():
            row = {
                "model": name,
                **MODELS[name].columns,
                "batch": batch,
                "rows_a_request": size,
                "engine_images_per_s": f"{np.mean(alone):.1f}",
                "engine_spread": f"{max(alone) / min(alone) - 1:.3f}",
                "served_images_per_s": f"{seen.rows_per_s:.1f}",
                "served_over_engine": f"{seen.rows_per_s / np.mean(alone):.3f}",
                "p50_ms": f"{seen.percentile(50):.1f}",
                "p99_ms": f"{seen.percentile(99):.1f}",
                "errors": sum(seen.errors.values()),
            }
            click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
            found.append(row)
    write_csv(results / "throughput_cpu.csv", found, machine_columns("cpu", threads, "benchmarks.serve.throughput"))


if __name__ == "__main__":
    main()
