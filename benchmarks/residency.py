"""Many tasks in one open engine: memory, correctness, time to add one, cost of switching.

Tasks are put into the engine's bank one by one while it is open. The bank grows by doubling, so its rows may be up to
twice the tasks.

python -m benchmarks.residency                           # 1,000 SA²VP tasks over ViT-B/16 at 224, bank in fp16
"""

from __future__ import annotations

import time

import click
import numpy as np

import prompttune as pt
from benchmarks.common import Model, Run, model_options, run_options
from benchmarks.engines import CONFIGS, draw_task, make_engine, save_checkpoint, workshop
from prompttune.export import EngineTask
from prompttune.export.formats.base import BANK_PRECISIONS
from prompttune.export.runtimes import RuntimeOptions, StateRunner, open_runtime
from prompttune.serve.bench import Latency
from prompttune.serve.bench.memory import memory_growth
from prompttune.serve.bench.subjects import noise
from prompttune.serve.bench.task_costs import measure_switching
from prompttune.serve.memory import resident_bytes

MIXED = 16
"""Rows, and tasks, of a mixed call that is compared with single ones."""


def fill(engine: pt.Engine, like: EngineTask, tasks: int) -> list[float]:
    """Put tasks into an open engine until it has so many; seconds of each."""
    bank, seconds = engine.bank, []
    for number in range(len(bank.entries), tasks):
        task = draw_task(like, number)
        began = time.perf_counter()
        bank.put(f"task{number}", task)
        seconds.append(time.perf_counter() - began)
    return seconds


def check_answers(
    engine: pt.Engine, like: EngineTask, numbers: list[int], options: RuntimeOptions
) -> tuple[float, int]:
    """Answers in mixed calls against those of an engine that holds the one task alone.

    Returns:
        The largest difference of a logit, and how many tasks name another class.
    """
    manifest = engine.folder.manifest
    runtime = open_runtime(engine.folder.path, manifest, options)
    classes = len(like.labels)
    apart, other = 0.0, 0
    for start in range(0, len(numbers), MIXED):
        some = numbers[start : start + MIXED]
        images = noise(len(some), engine.image_size, seed=start)
        mixed = engine.logits(images, [f"task{number}" for number in some])
        for row, number in enumerate(some):
            alone = StateRunner(runtime, manifest, {"alone": draw_task(like, number).state})
            single = alone.logits(images[row : row + 1], ["alone"])[0, :classes]
            apart = max(apart, float(np.abs(mixed[row, :classes] - single).max()))
            other += int(mixed[row, :classes].argmax() != single.argmax())
    return apart, other


@click.command(help=__doc__)
@model_options
@click.option("--method", type=click.Choice(list(CONFIGS)), default="sa2vp", show_default=True)
@click.option("--tasks", type=click.IntRange(2), default=1000, show_default=True)
@click.option("--checked", type=click.IntRange(1), help="Check so many tasks, evenly spread.  [default: all]")
@click.option("--bank-precision", type=click.Choice(BANK_PRECISIONS), default="fp16", show_default=True)
@run_options
def main(
    model: Model,
    method: str,
    tasks: int,
    checked: int | None,
    bank_precision: str,
    run: Run,
) -> None:
    frozen = model.load()
    with workshop() as folder:
        checkpoint = save_checkpoint(method, frozen, folder)
        exported = make_engine(checkpoint, folder / method, pt.ExportSettings(bank_precision=bank_precision), 1)
        del frozen
        like = exported.read_task("task0")
        exported.write_task("task0", draw_task(like, 0), replace=True)  # so that every task comes from its number
        engine = pt.Engine(exported.path, run.device, threads=run.threads, resident_tasks=tasks)
        before = resident_bytes()
        with memory_growth(run.device) as growth:
            added = Latency.of(fill(engine, like, tasks))
        numbers = np.unique(np.linspace(0, tasks - 1, min(checked or tasks, tasks)).astype(int)).tolist()
        apart, other = check_answers(engine, like, numbers, RuntimeOptions(run.device, run.threads))
        switching = measure_switching(engine, list(engine.bank.entries), run.timed)
        per_task = engine.bank.row_bytes
    assert switching is not None
    mib = {"before": before, "growth": growth.resident, "peak": growth.peak, "device": growth.device}
    shown = {name: "" if size is None else f"{size / 2**20:.1f}" for name, size in mib.items()}
    row = {
        **model.columns,
        "method": method,
        "bank_precision": bank_precision,
        "tasks": tasks,
        "bytes_per_task": per_task,
        "resident_before_mib": shown["before"],
        "resident_growth_mib": shown["growth"],
        "peak_growth_mib": shown["peak"],
        "device_growth_mib": shown["device"],
        "rows_mib": f"{per_task * tasks / 2**20:.1f}",
        "add_p50_ms": f"{added.p50_ms:.3f}",
        "add_p99_ms": f"{added.p99_ms:.3f}",
        "checked": len(numbers),
        "max_abs_from_alone": f"{apart:.3g}",
        "other_class_than_alone": other,
        "same_task_ms": f"{switching.same.p50_ms:.3f}",
        "alternating_ms": f"{switching.alternating.p50_ms:.3f}",
        "alternating_over_same": f"{switching.over_same.median:.3f}",
    }
    for name, value in row.items():
        click.echo(f"{name:24s} {value}")
    run.write_csv(f"residency_{method}_{run.target.type}", [row])


if __name__ == "__main__":
    main()
