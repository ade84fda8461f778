"""Memory of a server under ten minutes of mixed load: tensors and images, good and bad requests, tasks that change.

python -m benchmarks.serve.soak
python -m benchmarks.serve.soak --minutes 2
"""

from __future__ import annotations

import asyncio
import io
import time
from collections import Counter
from pathlib import Path

import click
import matplotlib.pyplot as plt
import numpy as np
import tritonclient.grpc.aio as triton
import tritonclient.http.aio as triton_http
from PIL import Image
from tritonclient.utils import InferenceServerException

from benchmarks.engines import draw_task, workshop
from benchmarks.serve.serving import MODELS, RESULTS, Running, launched, make_engine
from prompttune.export import EngineFolder
from prompttune.files import replacing
from prompttune.serve.bench.machine import machine_columns, write_csv
from prompttune.serve.bench.subjects import noise

TASKS, RESIDENT, CLIENTS = 64, 16, 8
SAMPLE_S = 2.0
MEBI = 2**20


def photographs() -> list[bytes]:
    """JPEG, PNG and WebP files of a drawn picture, and one that is cut off."""
    pixels = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    files = []
    for form in ("JPEG", "PNG", "WEBP"):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, form)
        files.append(stream.getvalue())
    return [*files, files[0][: len(files[0]) // 2]]


async def load(server: Running, folder: EngineFolder, size: int, seconds: float) -> tuple[list, Counter[str]]:
    """Run everything for ``seconds``; (time, bytes) samples and what the requests ended with."""
    until = time.monotonic() + seconds
    ended: Counter[str] = Counter()
    samples: list[tuple[float, int]] = []
    images, files = noise(1, size, seed=0), photographs()

    async def tensors(seed: int) -> None:
        chance = np.random.default_rng(seed)
        async with triton.InferenceServerClient(server.grpc) as client:
            image = triton.InferInput("image", list(images.shape), "FP32")
            image.set_data_from_numpy(images)
            while time.monotonic() < until:
                await _count(client.infer(f"task{chance.integers(TASKS + 1)}", [image]), ended)

    async def encoded(seed: int) -> None:
        chance = np.random.default_rng(seed)
        async with triton_http.InferenceServerClient(server.http.removeprefix("http://")) as client:
            while time.monotonic() < until:
                image = triton_http.InferInput("image", [1], "BYTES")
                image.set_data_from_numpy(np.array([files[chance.integers(len(files))]], dtype=object))
                await _count(client.infer(f"task{chance.integers(TASKS)}", [image]), ended)

    async def changes() -> None:
        like = folder.read_task("task0")
        async with triton.InferenceServerClient(server.grpc) as client:
            number = 0
            while time.monotonic() < until:
                name = f"task{number % TASKS}"
                await asyncio.to_thread(folder.write_task, name, draw_task(like, 10_000 + number), True)
                await client.load_model(name)
                number += 1
                await asyncio.sleep(1)

    async def sample() -> None:
        began = time.monotonic()
        while time.monotonic() < until:
            samples.append((time.monotonic() - began, server.resident_bytes()))
            await asyncio.sleep(SAMPLE_S)

    askers = [tensors(seed) if seed % 2 else encoded(seed) for seed in range(CLIENTS)]
    await asyncio.gather(sample(), changes(), *askers)
    return samples, ended


async def _count(call, ended: Counter[str]) -> None:
    try:
        await call
    except InferenceServerException as problem:
        ended[str(problem.status())] += 1
    else:
        ended["ok"] += 1


@click.command(help=__doc__)
@click.option("--minutes", type=float, default=10.0, show_default=True)
@click.option("--warmup", type=float, default=0.25, show_default=True, help="Share of the time that counts as warm-up.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(minutes: float, warmup: float, results: Path) -> None:
    with workshop() as folder:
        engine = make_engine(folder, MODELS["tiny"], TASKS)
        options = ("--allow-control", "--resident-tasks", str(RESIDENT), "--host-memory", "4MiB")
        with launched(engine, *options) as server:
            samples, ended = asyncio.run(load(server, EngineFolder(engine), MODELS["tiny"].image_size, minutes * 60))
    moments, sizes = (np.array(one) for one in zip(*samples, strict=True))
    warm = sizes[moments >= warmup * moments[-1]]
    tenth = max(1, len(warm) // 10)
    drift = np.median(warm[-tenth:]) / np.median(warm[:tenth]) - 1
    row = {
        "minutes": minutes,
        "tasks": TASKS,
        "resident": RESIDENT,
        "clients": CLIENTS,
        "answers": ended["ok"],
        **{f"ended_{name.removeprefix('StatusCode.').lower()}": count for name, count in ended.items() if name != "ok"},
        "warm_mib": f"{np.median(warm[:tenth]) / MEBI:.1f}",
        "end_mib": f"{np.median(warm[-tenth:]) / MEBI:.1f}",
        "highest_mib": f"{warm.max() / MEBI:.1f}",
        "drift": f"{drift:+.4f}",
    }
    for name, value in row.items():
        click.echo(f"{name:26s} {value}")
    write_csv(results / "soak_cpu.csv", [row], machine_columns("cpu", 2, "python -m benchmarks.serve.soak"))
    _plot(results / "soak_cpu.png", moments / 60, sizes / MEBI)


def _plot(path: Path, minutes: np.ndarray, mebi: np.ndarray) -> None:
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    axes.plot(minutes, mebi)
    axes.set(xlabel="minutes", ylabel="resident memory in MiB, server and worker", ylim=(0, None))
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
