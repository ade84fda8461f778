"""Clients over many tasks while tasks are loaded, updated and unloaded all the time: every answer is checked.

Each answer names its version; its logits must be those that the engine alone gives for that version. A task that is
unloaded just then may answer "not found", a full queue "unavailable"; anything else counts as an error.

With --tasks-per-image every second request is a panel: up to so many tasks about one image, or all that are loaded.

python -m benchmarks.serve.churn
python -m benchmarks.serve.churn --seconds 600 --clients 64
python -m benchmarks.serve.churn --method linear --tasks-per-image 32
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
from benchmarks.engines import CONFIGS, draw_task, workshop
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

    requests: int = 0
    panels: int = 0
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
        *(
            _ask(address, len(versions), images, expected, tally, until, seed, load["asked"])
            for seed in range(load["clients"])
        ),
        _change(control, folder, versions, tally, until),
    )
    await control.close()
    return tally


async def _ask(address, tasks, images, expected, tally, until, seed, asked) -> None:
    chance = np.random.default_rng(seed)
    async with triton.InferenceServerClient(address) as client:
        while time.monotonic() < until:
            name, number, names = f"task{chance.integers(tasks)}", int(chance.integers(IMAGES)), []
            image = triton.InferInput("image", [1, *images.shape[1:]], "FP32")
            image.set_data_from_numpy(images[number : number + 1])
            inputs, outputs = [image], [triton.InferRequestedOutput(one) for one in ("logits", "task", "task_version")]
            if asked > 1 and chance.random() < 0.5:
                name = "panel"
                if chance.random() < 0.8:  # the others ask all tasks
                    names = [f"task{one}" for one in chance.permutation(tasks)[: chance.integers(1, asked + 1)]]
                    inputs.append(triton.InferInput("tasks", [len(names)], "BYTES"))
                    inputs[-1].set_data_from_numpy(np.array(names, dtype=object))
            began = time.perf_counter()
            try:
                answer = await asyncio.wait_for(client.infer(name, inputs, outputs=outputs), REQUEST_S)
            except TimeoutError:
                tally.lost += 1
            except InferenceServerException as problem:
                tally.statuses[str(problem.status())] += 1
                await asyncio.sleep(0.02)
            else:
                tally.milliseconds.append((time.perf_counter() - began) * 1000)
                tally.requests += 1
                if name == "panel":
                    tally.panels += 1
                    named = [one.decode() for one in answer.as_numpy("task")[0]]
                    tally.wrong += bool(names) and named != names
                    _check(answer.as_numpy("logits")[0], answer.as_numpy("task_version")[0], expected, number, tally)
                    continue
                version = answer.get_response().parameters["task_version"].string_param
                tally.wrong += [version.encode()] != list(answer.as_numpy("task_version"))
                _check(answer.as_numpy("logits"), answer.as_numpy("task_version"), expected, number, tally)


def _check(logits, versions, expected, number, tally) -> None:
    """Compare each row of logits [K, C] about an image with those of the version that the answer names."""
    for row, version in zip(logits, versions.tolist(), strict=True):
        right = expected.get(version.decode())
        tally.answers += 1
        tally.wrong += right is None or not np.allclose(row, right[number], atol=1e-4)
        tally.versions.add(version.decode())


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
@click.option("--method", type=click.Choice(list(CONFIGS)), default="sa2vp", show_default=True)
@click.option("--tasks-per-image", type=click.IntRange(1), default=1, show_default=True, help="Most tasks of a panel.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    model: str,
    tasks: int,
    resident: int,
    clients: int,
    seconds: float,
    method: str,
    tasks_per_image: int,
    results: Path,
) -> None:
    with workshop() as folder:
        engine = make_engine(folder, MODELS[model], 1, method=method)
        images = noise(IMAGES, MODELS[model].image_size, seed=0)
        expected, versions = expected_logits(engine, tasks, images)
        opened = EngineFolder(engine)
        for number, some in enumerate(versions):
            opened.write_task(f"task{number}", some[0], replace=number == 0)
        options = ["--allow-control", "--resident-tasks", str(resident), "--host-memory", "8MiB"]
        options += ["--max-queue", str(max(1024, 2 * clients * tasks_per_image))]
        load = {"seconds": seconds, "clients": clients, "asked": tasks_per_image}
        with launched(engine, *options) as server:
            tally = asyncio.run(run(server.grpc, opened, versions, images, expected, **load))
            status = server.status()["workers"][0]
            padding, answered = (server.counted(f"prompttune_batch_{one}_total") for one in ("padding", "answers"))
    bad = {name: count for name, count in tally.statuses.items() if name not in ALLOWED}
    row = {
        "model": model,
        "method": method,
        "tasks_per_image": tasks_per_image,
        "tasks": tasks,
        "resident": resident,
        "clients": clients,
        "seconds": seconds,
        "requests": tally.requests,
        "panels": tally.panels,
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
        "padding_share": f"{padding / max(padding + answered, 1):.3f}",
    }
    for name, value in row.items():
        click.echo(f"{name:26s} {value}")
    command, name = "python -m benchmarks.serve.churn", "churn_cpu.csv"
    if tasks_per_image > 1:
        name = "churn_panel_cpu.csv"
        command += f" --method {method} --tasks-per-image {tasks_per_image} --resident {resident} --seconds {seconds:g}"
    write_csv(results / name, [row], machine_columns("cpu", 2, command))
    if tally.wrong or tally.lost or bad:
        raise click.ClickException(f"wrong {tally.wrong}, lost {tally.lost}, errors {bad}")


if __name__ == "__main__":
    main()
