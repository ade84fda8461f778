"""Clients over many tasks while tasks are loaded, updated and unloaded all the time: every answer is checked.

Each answer names its version; its logits must be those that the engine alone gives for that version. A task that is
unloaded just then may answer "not found", a full queue "unavailable"; anything else counts as an error.

python -m benchmarks.serve.churn
python -m benchmarks.serve.churn --seconds 600 --clients 64
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

import prompttune as pt
from benchmarks.engines import draw_task, workshop
from benchmarks.serve.serving import MODELS, RESULTS, launched, make_engine
from prompttune.export import EngineFolder
from prompttune.serve.bench.machine import machine_columns, write_csv
from prompttune.serve.bench.subjects import noise

VERSIONS = 4
"""Of each task, written over each other in turn."""
IMAGES = 8
REQUEST_S = 30
"""An answer that takes longer is lost."""
ALLOWED = ("StatusCode.NOT_FOUND", "StatusCode.UNAVAILABLE")


@dataclass
class Tally:
    """What the clients saw."""

    answers: int = 0
    wrong: int = 0
    lost: int = 0
    versions: set[str] = field(default_factory=set)
    statuses: Counter[str] = field(default_factory=Counter)
    changes: Counter[str] = field(default_factory=Counter)
    milliseconds: list[float] = field(default_factory=list)


def expected_logits(engine: Path, tasks: int, images: np.ndarray) -> tuple[dict[str, np.ndarray], list[list]]:
    """Version → logits of ``images``, and for each task its versions."""
    opened = pt.Engine(engine)
    like = opened.folder.read_task("task0")
    versions = [[draw_task(like, 1000 * task + number) for number in range(VERSIONS)] for task in range(tasks)]
    expected = {}
    for task in (one for all_of_it in versions for one in all_of_it):
        opened.bank.put("drawn", task, replace=True)
        expected[task.version] = opened.logits(images, "drawn")
    return expected, versions


async def run(address: str, folder: EngineFolder, versions: list, images: np.ndarray, expected: dict, **load) -> Tally:
    """Clients and changes until the time is over."""
    tally, until = Tally(), time.monotonic() + load["seconds"]
    control = triton.InferenceServerClient(address)
    await asyncio.gather(
        *(_ask(address, len(versions), images, expected, tally, until, seed) for seed in range(load["clients"])),
        _change(control, folder, versions, tally, until),
    )
    await control.close()
    return tally


async def _ask(address, tasks, images, expected, tally, until, seed) -> None:
    chance = np.random.default_rng(seed)
    async with triton.InferenceServerClient(address) as client:
        while time.monotonic() < until:
            name, number = f"task{chance.integers(tasks)}", int(chance.integers(IMAGES))
            image = triton.InferInput("image", [1, *images.shape[1:]], "FP32")
            image.set_data_from_numpy(images[number : number + 1])
            began = time.perf_counter()
            try:
                answer = await asyncio.wait_for(client.infer(name, [image]), REQUEST_S)
            except TimeoutError:
                tally.lost += 1
            except InferenceServerException as problem:
                tally.statuses[str(problem.status())] += 1
                await asyncio.sleep(0.02)
            else:
                tally.milliseconds.append((time.perf_counter() - began) * 1000)
                _check(answer, expected, number, tally)


def _check(answer, expected, number, tally) -> None:
    version = answer.get_response().parameters["task_version"].string_param
    named = {one.decode() for one in answer.as_numpy("task_version")}
    right = expected.get(version)
    logits = answer.as_numpy("logits")
    good = right is not None and named == {version} and np.allclose(logits[0], right[number], atol=1e-4)
    tally.answers += 1
    tally.wrong += not good
    tally.versions.add(version)


async def _change(control, folder, versions, tally, until) -> None:
    """Write a version over the one before and load it, or take a task out and in again; without a pause."""
    chance = np.random.default_rng(7)
    while time.monotonic() < until:
        number = int(chance.integers(len(versions)))
        name = f"task{number}"
        if chance.random() < 0.3:
            await control.unload_model(name)
            tally.changes["unload"] += 1
        else:
            task = versions[number][int(chance.integers(VERSIONS))]
            await asyncio.to_thread(folder.write_task, name, task, True)
            tally.changes["update"] += 1
        await control.load_model(name)
        tally.changes["load"] += 1


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(MODELS)), default="tiny", show_default=True)
@click.option("--tasks", type=click.IntRange(1), default=32, show_default=True)
@click.option("--resident", type=click.IntRange(1), default=16, show_default=True, help="Rows; fewer than tasks.")
@click.option("--clients", type=click.IntRange(1), default=64, show_default=True)
@click.option("--seconds", type=float, default=60.0, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(model: str, tasks: int, resident: int, clients: int, seconds: float, results: Path) -> None:
    with workshop() as folder:
        engine = make_engine(folder, MODELS[model], 1)
        images = noise(IMAGES, MODELS[model].image_size, seed=0)
        expected, versions = expected_logits(engine, tasks, images)
        opened = EngineFolder(engine)
        for number, some in enumerate(versions):
            opened.write_task(f"task{number}", some[0], replace=number == 0)
        with launched(engine, "--allow-control", "--resident-tasks", str(resident), "--host-memory", "8MiB") as server:
            tally = asyncio.run(run(server.grpc, opened, versions, images, expected, seconds=seconds, clients=clients))
            status = server.status()["workers"][0]
    bad = {name: count for name, count in tally.statuses.items() if name not in ALLOWED}
    row = {
        "model": model,
        "tasks": tasks,
        "resident": resident,
        "clients": clients,
        "seconds": seconds,
        "answers": tally.answers,
        "versions_seen": len(tally.versions),
        "updates": tally.changes["update"],
        "unloads": tally.changes["unload"],
        "wrong": tally.wrong,
        "lost": tally.lost,
        "not_found_while_unloaded": tally.statuses["StatusCode.NOT_FOUND"],
        "unavailable": tally.statuses["StatusCode.UNAVAILABLE"],
        "other_errors": sum(bad.values()),
        "p50_ms": f"{np.percentile(tally.milliseconds, 50):.1f}",
        "p99_ms": f"{np.percentile(tally.milliseconds, 99):.1f}",
        "hits": status["hits"],
        "misses": status["misses"],
    }
    for name, value in row.items():
        click.echo(f"{name:26s} {value}")
    write_csv(results / "churn_cpu.csv", [row], machine_columns("cpu", 2, "python -m benchmarks.serve.churn"))
    if tally.wrong or tally.lost or bad:
        raise click.ClickException(f"wrong {tally.wrong}, lost {tally.lost}, errors {bad}")


if __name__ == "__main__":
    main()
