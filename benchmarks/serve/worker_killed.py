"""SIGKILL of the engine's worker under load: how long no client gets an answer, and what they see.

python -m benchmarks.serve.worker_killed
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from pathlib import Path

import click
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

import prompttune as pt
from benchmarks.engines import workshop
from benchmarks.serve.serving import MODELS, RESULTS, Running, launched, make_engine
from prompttune.serve.bench.machine import machine_columns, write_csv
from prompttune.serve.bench.subjects import noise

TASKS, CLIENTS = 8, 32
BEFORE_S, AFTER_S = 5.0, 15.0
REQUEST_S = 60


async def run(server: Running, images: np.ndarray, expected: np.ndarray, kills: int) -> dict[str, object]:
    """Load, with the worker killed ``kills`` times."""
    statuses: Counter[str] = Counter()
    answered: list[float] = []
    wrong = hung = 0
    over = asyncio.Event()

    async def ask(seed: int) -> None:
        nonlocal wrong, hung
        chance = np.random.default_rng(seed)
        async with triton.InferenceServerClient(server.grpc) as client:
            while not over.is_set():
                number = int(chance.integers(TASKS))
                image = triton.InferInput("image", [1, *images.shape[1:]], "FP32")
                image.set_data_from_numpy(images)
                try:
                    answer = await asyncio.wait_for(client.infer(f"task{number}", [image]), REQUEST_S)
                except TimeoutError:
                    hung += 1
                except InferenceServerException as problem:
                    statuses[str(problem.status())] += 1
                    await asyncio.sleep(0.05)
                else:
                    answered.append(time.monotonic())
                    wrong += not np.allclose(answer.as_numpy("logits")[0], expected[number], atol=1e-4)

    clients = [asyncio.create_task(ask(seed)) for seed in range(CLIENTS)]
    gaps = []
    for _ in range(kills):
        await asyncio.sleep(BEFORE_S)
        killed = time.monotonic()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        await asyncio.sleep(AFTER_S)
        after = [killed, *(moment for moment in answered if moment > killed), time.monotonic()]
        gaps.append(max(np.diff(after)))
    over.set()
    await asyncio.gather(*clients)
    return {
        "kills": kills,
        "answers": len(answered),
        "wrong": wrong,
        "hung": hung,
        "unavailable": statuses.pop("StatusCode.UNAVAILABLE", 0),
        "other_errors": sum(statuses.values()),
        "longest_silence_s": f"{max(gaps):.2f}",
    }


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(1), default=3, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(kills: int, results: Path) -> None:
    with workshop() as folder:
        engine = make_engine(folder, MODELS["tiny"], TASKS)
        opened = pt.Engine(engine)
        images = noise(1, opened.image_size, seed=0)
        expected = opened.logits(np.repeat(images, TASKS, 0), [f"task{number}" for number in range(TASKS)])
        del opened
        with launched(engine) as server:
            row = {"clients": CLIENTS, **asyncio.run(run(server, images, expected, kills))}
            row["restarts"] = server.status()["workers"][0]["restarts"]
    for name, value in row.items():
        click.echo(f"{name:20s} {value}")
    columns = machine_columns("cpu", 2, "python -m benchmarks.serve.worker_killed")
    write_csv(results / "worker_killed_cpu.csv", [row], columns)
    if row["wrong"] or row["hung"] or row["other_errors"]:
        raise click.ClickException("a request was lost, hung or answered wrongly")


if __name__ == "__main__":
    main()
