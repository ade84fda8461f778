"""Thousands of tasks on disk, few of them resident: memory, hit rate and latency under Zipf traffic, and what the first
answer of a cold task costs.

The engine is DINOv2 ViT-S/14 at 56 pixels with SA²VP tasks drawn at random, 0.7 MiB each.

python -m benchmarks.serve.residency                       # 2,000 tasks, 64 resident
python -m benchmarks.serve.residency --tasks 200 --seconds 20
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import matplotlib.pyplot as plt
import numpy as np
import tritonclient.grpc as triton

from benchmarks.common import Model
from benchmarks.engines import workshop
from benchmarks.serve.serving import RESULTS, Load, Running, drive, launched, make_engine, popularity
from prompttune.export.folder import TASKS
from prompttune.files import replacing
from prompttune.serve.bench.machine import machine_columns, write_csv
from prompttune.serve.bench.subjects import noise

MODEL = Model("vit_small_patch14_dinov2", 56, "random")
MEBI = 2**20
WARMUP_S = 20
COLD_ROUNDS = 40


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget what it keeps of the tasks' files, so that a cold task comes from disk."""
    for path in folder.rglob("state.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def first_answers(server: Running, tasks: int, folder: Path) -> tuple[list[float], list[float]]:
    """Milliseconds of the first answers of cold tasks, and of answers of resident ones, taken in turn."""
    client = triton.InferenceServerClient(server.grpc)
    image = triton.InferInput("image", [1, 3, MODEL.image_size, MODEL.image_size], "FP32")
    image.set_data_from_numpy(noise(1, MODEL.image_size, seed=0))

    def ask(number: int) -> float:
        began = time.perf_counter()
        client.infer(f"task{number}", [image])
        return (time.perf_counter() - began) * 1000

    cold, warm = [], []
    ask(0)
    drop_cache(folder)
    for step in range(COLD_ROUNDS):
        warm.append(ask(0))
        cold.append(ask(tasks - 1 - step))
    client.close()
    return cold, warm


@click.command(help=__doc__)
@click.option("--tasks", type=click.IntRange(COLD_ROUNDS + 2), default=2000, show_default=True)
@click.option("--resident", type=click.IntRange(2), default=64, show_default=True)
@click.option("--host-memory-mib", type=click.IntRange(0), default=256, show_default=True)
@click.option("--zipf", type=float, default=1.0, show_default=True, help="Exponent of the tasks' popularity.")
@click.option("--clients", type=click.IntRange(1), default=8, show_default=True)
@click.option("--seconds", type=float, default=90.0, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    tasks: int, resident: int, host_memory_mib: int, zipf: float, clients: int, seconds: float, results: Path
) -> None:
    with workshop() as folder:
        engine = make_engine(folder, MODEL, tasks)
        names = [f"task{number}" for number in range(tasks)]
        task_bytes = sum(path.stat().st_size for path in (engine / TASKS / "task0").iterdir())
        options = ("--resident-tasks", str(resident), "--host-memory", f"{host_memory_mib}MiB")
        with launched(engine, *options) as server:
            started = server.resident_bytes()
            cold, warm = first_answers(server, tasks, engine)
            load = Load(server.grpc, seconds, clients, 1, MODEL.image_size, names, zipf)
            drive(Load(**{**load.__dict__, "seconds": WARMUP_S, "seed": 1}))
            before, memory = server.status()["workers"][0], [server.resident_bytes()]
            seen = drive(load)
            after = server.status()["workers"][0]
            memory.append(server.resident_bytes())
    asked = after["hits"] + after["misses"] - before["hits"] - before["misses"]
    chance = np.sort(popularity(tasks, zipf))[::-1]
    row = {
        **MODEL.columns,
        "tasks": tasks,
        "resident": resident,
        "host_memory_mib": host_memory_mib,
        "mib_a_task_on_disk": f"{task_bytes / MEBI:.2f}",
        "zipf": zipf,
        "clients": clients,
        "requests": len(seen.milliseconds),
        "errors": sum(seen.errors.values()),
        "images_per_s": f"{seen.rows_per_s:.1f}",
        "hit_rate": f"{(after['hits'] - before['hits']) / asked:.3f}",
        "hit_rate_of_the_most_popular": f"{chance[:resident].sum():.3f}",
        "p50_ms": f"{seen.percentile(50):.1f}",
        "p99_ms": f"{seen.percentile(99):.1f}",
        "host_tasks": after["host_tasks"],
        "host_mib": f"{after['host_bytes'] / MEBI:.1f}",
        "row_mib": f"{after['row_bytes'] / MEBI:.1f}",
        "started_mib": f"{started / MEBI:.0f}",
        "warm_mib": f"{memory[0] / MEBI:.0f}",
        "end_mib": f"{memory[1] / MEBI:.0f}",
        "cold_p50_ms": f"{np.percentile(cold, 50):.1f}",
        "cold_max_ms": f"{max(cold):.1f}",
        "resident_p50_ms": f"{np.percentile(warm, 50):.1f}",
        "cold_over_resident_p50_ms": f"{np.percentile(cold, 50) - np.percentile(warm, 50):.1f}",
        "cold_over_resident_max_ms": f"{max(cold) - np.percentile(warm, 50):.1f}",
    }
    for name, value in row.items():
        click.echo(f"{name:30s} {value}")
    columns = machine_columns("cpu", 2, "python -m benchmarks.serve.residency")
    write_csv(results / "residency_cpu.csv", [row], columns)
    _plot(results / "residency_cpu.png", cold, warm, seen.milliseconds)


def _plot(path: Path, cold: list[float], warm: list[float], zipf: list[float]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for values, label in ((warm, "resident, one client"), (cold, "cold, one client"), (zipf, "Zipf traffic")):
        axes.plot(np.sort(values), np.linspace(0, 100, len(values)), label=label)
    axes.set(xscale="log", xlabel="latency in ms", ylabel="% of requests answered")
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
