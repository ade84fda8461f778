"""Several tasks of one image over the plain backbone's pass, and a narrow task beside a wide one, timed in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import prompttune as pt
from benchmarks.common import Model, Run, batch_option, model_options, ratio, run_options
from benchmarks.engines import CONFIGS, make_engine, save_checkpoint, workshop
from prompttune.export import EngineFolder
from prompttune.methods import METHODS, MethodConfig
from prompttune.serve.bench.subjects import noise

SHARED = 9
"""Blocks that tasks share where a method tunes the later ones; of 12 in a ViT-B."""
METHODS_HERE: dict[str, MethodConfig] = {
    **{name: METHODS[name]() for name in ("linear", "reader", "vqt", "side") if name in METHODS},
    **{
        f"{name} first_block={SHARED}": METHODS[name](
            **{**CONFIGS.get(name, METHODS[name]()).to_dict(), "first_block": SHARED}
        )
        for name in ("sa2vp", "lora", "vpt-deep")
    },
}
CLASSES, WIDE = 10, 10_000
WIDE_BATCH, WIDE_TASKS = 16, 16


def fan_out(model: Model, method: str, folder: Path, batches: tuple[int, ...], tasks: list[int], run: Run) -> list[Any]:
    """Rows of one method: its own time for one task and for several, over the plain backbone in the same rounds."""
    frozen, config = model.load(), METHODS_HERE[method]
    name = method.replace(" ", "-")
    checkpoint = save_checkpoint(method, frozen, folder, config, CLASSES, name)
    engine = make_engine(checkpoint, folder / name, pt.ExportSettings(), max(tasks))
    report = run.bench(engine.path, batches, against=("backbone",), mix=("one",), tasks_per_image=tuple(tasks))
    rows = []
    for one in report.fan_out:
        first, depth = getattr(config, "first_block", 0), frozen.depth
        rows.append(
            {
                **model.columns,
                "method": method,
                "batch": one.batch_size,
                "tasks_per_image": one.tasks,
                "over_plain_pass": "" if one.over_backbone is None else f"{one.over_backbone.median:.3f}",
                "over_one_task": f"{one.over_one.median:.3f}",
                "passes_of_tuned_blocks": f"{first / depth + one.tasks * (1 - first / depth):.2f}" if first else "",
                "p50_ms": f"{one.latency.p50_ms:.1f}",
            }
        )
        click.echo(" ".join(f"{key}={value}" for key, value in list(rows[-1].items())[2:]))
    return rows


def beside_wide(model: Model, folder: Path, run: Run) -> list[Any]:
    """A batch of narrow tasks without and with a task of many classes in the bank, and with a row that asks for it."""
    frozen = model.load()
    narrow = save_checkpoint("linear", frozen, folder, METHODS["linear"](), CLASSES, "narrow")
    wide = save_checkpoint("linear", frozen, folder, METHODS["linear"](), WIDE, "wide")
    engines: dict[str, EngineFolder] = {}
    for name in ("alone", "beside"):
        engines[name] = make_engine(narrow, folder / name, pt.ExportSettings(), WIDE_TASKS)
    beside = pt.Engine(engines["beside"].path, threads=run.threads)
    beside.add_task("wide", wide, parity=False, weights=model.weights)
    alone = pt.Engine(engines["alone"].path, threads=run.threads)
    images = noise(WIDE_BATCH, frozen.image_size, 0)
    tasks = [f"task{number}" for number in range(WIDE_TASKS)]
    calls = {
        "alone": lambda: alone.logits(images, tasks),
        "beside": lambda: beside.logits(images, tasks),
        "one row of it": lambda: beside.logits(images, [*tasks[1:], "wide"]),
    }
    seconds = run.interleaved(calls)
    rows = []
    for name in ("beside", "one row of it"):
        over = f"{ratio(seconds[name], seconds['alone']):.3f}"
        rows.append({**model.columns, "case": name, "batch": WIDE_BATCH, "classes": WIDE, "over_alone": over})
        click.echo(f"{name}: {over}")
    return rows


@click.command(help=__doc__)
@model_options
@click.option("--method", "methods", multiple=True, type=click.Choice([*METHODS_HERE, "wide"]), help="Default: all.")
@batch_option(1, 8)
@click.option("--tasks", multiple=True, type=click.IntRange(1), default=(1, 10, 100), show_default=True)
@run_options
def main(model: Model, methods: tuple[str, ...], batches: tuple[int, ...], tasks: tuple[int, ...], run: Run) -> None:
    rows: list[Any] = []
    chosen = methods or (*METHODS_HERE, "wide")
    with workshop() as folder:
        for method in chosen:
            if method != "wide":
                rows += fan_out(model, method, folder, batches, list(tasks), run)
        if rows:
            run.write_csv("fan_out", rows)
        if "wide" in chosen:
            run.write_csv("fan_out_wide", beside_wide(model, folder, run))


if __name__ == "__main__":
    main()
