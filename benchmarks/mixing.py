"""A batch whose rows belong to as many tasks over the same batch for one task, method by method.

python -m benchmarks.mixing                              # 16 images, 16 tasks, ViT-B/16 at 224
"""

from __future__ import annotations

import click

import prompttune as pt
from benchmarks.common import Model, Run, model_options, run_options
from benchmarks.engines import make_engine, methods_option, save_checkpoint, workshop
from prompttune.export.formats.base import BANK_PRECISIONS


@click.command(help=__doc__)
@model_options
@methods_option
@click.option("--tasks", type=click.IntRange(2), default=16, show_default=True, help="Tasks, and images of a call.")
@click.option("--bank-precision", type=click.Choice(BANK_PRECISIONS), default="fp32", show_default=True)
@run_options
def main(
    model: Model,
    methods: tuple[str, ...],
    tasks: int,
    bank_precision: str,
    run: Run,
) -> None:
    frozen = model.load()
    settings = pt.ExportSettings(bank_precision=bank_precision)
    rows = []
    for method in methods:
        with workshop() as folder:
            engine = make_engine(save_checkpoint(method, frozen, folder), folder / method, settings, tasks)
            report = run.bench(engine.path, (tasks,))
        speeds = {one.mix: one.images_per_s for one in report.measurements}
        throughput = 1 / report.mixing[0].over_one.median
        rows.append(
            {
                **model.columns,
                "method": method,
                "bank_precision": bank_precision,
                "batch": tasks,
                "tasks": tasks,
                "one_task_images_per_s": f"{speeds['one']:.2f}",
                "mixed_images_per_s": f"{speeds['all']:.2f}",
                "mixed_throughput_over_one": f"{throughput:.3f}",
                "bytes_per_task": report.bytes_per_task,
            }
        )
        click.echo(f"{method:12s} {tasks} tasks in one call run at {throughput:.3f} of the speed of one task")
    run.write_csv(f"mixing_{run.target.type}_bank-{bank_precision}", rows)


if __name__ == "__main__":
    main()
