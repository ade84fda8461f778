"""Added latency of one client at a time: a request of one image through gRPC, over the engine alone.

Rounds alternate between both, so that a noisy machine disturbs them alike; the engine alone has a process of its own,
as the server's has.

python -m benchmarks.serve.latency
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import click
import numpy as np
import tritonclient.grpc as triton
import tritonclient.http as triton_http

import prompttune as pt
from benchmarks.engines import workshop
from benchmarks.serve.serving import MODELS, RESULTS, Running, launched, make_engine
from prompttune.serve.bench.machine import machine_columns, write_csv
from prompttune.serve.bench.subjects import noise

WARMUP = 10
PAUSE_S = 0.005
"""ONNX Runtime's threads spin for a while after a call; two engines would disturb each other."""


def measure(engine: Path, server: Running, threads: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the engine alone and of each transport, taken in turn."""
    opened = pt.Engine(engine, threads=threads)
    images = noise(1, opened.image_size, seed=0)
    runs = {"engine": partial(opened.logits, images, "task0")}
    clients = []
    for name, library, address in (("grpc", triton, server.grpc), ("http", triton_http, server.http[len("http://") :])):
        client = library.InferenceServerClient(address)
        image = library.InferInput("image", list(images.shape), "FP32")
        image.set_data_from_numpy(images)
        runs[name] = partial(client.infer, "task0", [image])
        clients.append(client)
    took: dict[str, list[float]] = {name: [] for name in runs}
    for step in range(WARMUP + rounds):
        for name, run in runs.items():
            time.sleep(PAUSE_S)
            began = time.perf_counter()
            run()
            if step >= WARMUP:
                took[name].append((time.perf_counter() - began) * 1000)
    for client in clients:
        client.close()
    return took


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=("tiny",), show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=300, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(models: tuple[str, ...], rounds: int, threads: int, results: Path) -> None:
    found = []
    for name in models:
        with workshop() as folder:
            engine = make_engine(folder, MODELS[name], 1)
            with launched(engine, "--threads", str(threads)) as server:
                took = measure(engine, server, threads, rounds)
        alone = np.percentile(took.pop("engine"), 50)
        for transport, milliseconds in took.items():
            p50 = np.percentile(milliseconds, 50)
            row = {
                "model": name,
                **MODELS[name].columns,
                "transport": transport,
                "engine_p50_ms": f"{alone:.3f}",
                "served_p50_ms": f"{p50:.3f}",
                "added_p50_ms": f"{p50 - alone:.3f}",
                "served_p99_ms": f"{np.percentile(milliseconds, 99):.3f}",
                "rounds": rounds,
            }
            click.echo("  ".join(f"{key} {value}" for key, value in row.items()))
            found.append(row)
    write_csv(results / "latency_cpu.csv", found, machine_columns("cpu", threads, "python -m benchmarks.serve.latency"))


if __name__ == "__main__":
    main()
