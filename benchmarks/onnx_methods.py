"""Every method's engine over the plain backbone, both exported the same way and run by the same runtime.

python -m benchmarks.onnx_methods                        # ViT-B/16 at 224, ONNX Runtime on two CPU threads
python -m benchmarks.onnx_methods --precision fp16 --device cuda
"""

from __future__ import annotations

from typing import Any

import click

import prompttune as pt
from benchmarks.common import Model, Run, batch_option, model_options, run_options
from benchmarks.engines import make_engine, methods_option, save_checkpoint, workshop
from prompttune.export.formats.base import ATTENTIONS, BANK_PRECISIONS, PRECISIONS
from prompttune.serve.bench.settings import ALL, MIXES
from prompttune.serve.bench.subjects import BACKBONE


@click.command(help=__doc__)
@model_options
@methods_option
@batch_option(1, 4, 8, 16)
@click.option("--tasks", type=click.IntRange(1), default=16, show_default=True, help="Tasks of the bank.")
@click.option("--mix", type=click.Choice(MIXES), default=ALL, show_default=True)
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True)
@click.option("--bank-precision", type=click.Choice(BANK_PRECISIONS), help="Default: follows the precision.")
@click.option("--attention", type=click.Choice(ATTENTIONS), help="Default: the format's.")
@run_options
def main(
    model: Model,
    methods: tuple[str, ...],
    batches: tuple[int, ...],
    tasks: int,
    mix: str,
    precision: str,
    bank_precision: str | None,
    attention: str | None,
    run: Run,
) -> None:
    settings = pt.ExportSettings(
        precision=precision, bank_precision=bank_precision, attention=attention, device=run.device
    ).resolved()
    frozen = model.load()
    rows: list[dict[str, Any]] = []
    for method in methods:
        with workshop() as folder:
            engine = make_engine(save_checkpoint(method, frozen, folder), folder / method, settings, tasks)
            report = run.bench(engine.path, batches, against=(BACKBONE,), mix=(mix,))
        rows += [{**row, "attention": settings.attention} for row in report.rows()]
        for one in report.measurements:
            if one.engine_over is not None:
                click.echo(f"{method:12s} batch {one.batch_size:3d}  {one.engine_over.median:5.2f} x plain")
    name = f"onnx_methods_{run.target.type}_{settings.precision}_bank-{settings.bank_precision}_{settings.attention}"
    run.write_csv(name, rows)


if __name__ == "__main__":
    main()
